"""`inspect`: open a checkpoint, apply the rules the caller wants, give the report."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from normdoctor.errors import UsageError
from normdoctor.findings import Precision, Report, Rule
from normdoctor.layers import NormLayer
from normdoctor.readers import open_checkpoint
from normdoctor.rules import RULES
from normdoctor.rules.runner import Settings, examine


def inspect(
    model: Any,
    *,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    layer: str | Iterable[str] = (),
    eps: float | None = None,
    momentum: float | None = None,
    assume: bool = True,
    target: Precision | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
) -> Report:
    """Judge every norm layer of a checkpoint (str or Path) or of a live torch.nn.Module.

    Nothing in the file is executed or imported. A live module is looked at as it is and left so.

    select, ignore: rule codes or their beginnings ("S", "A2", "S104"); everything is selected by default.
    layer: globs on layer names; only findings about matching layers are kept.
    eps, momentum: stand in where the file does not say. assume=False: rather skip than assume torch's defaults.
    target: judge the numbers for fp16, bf16 or int8 as well.
    limits: thresholds by rule code and name, {"S104": {"error": 0.2}}.

    Raises InputError where the file cannot be read, UsageError for an unknown rule code or threshold."""
    rules = choose_rules(several(select), several(ignore))
    settings = Settings(
        eps=check_eps(eps),
        momentum=check_momentum(momentum),
        assume=assume,
        precision=target,
        limits=checked_limits(limits or {}),
    )
    globs = several(layer)
    with open_checkpoint(model) as checkpoint:
        return examine(checkpoint, rules, settings, lambda found: not globs or matches(found, globs))


def several(words: str | Iterable[str]) -> tuple[str, ...]:
    """One string, with commas between several words, or any number of them."""
    return tuple(words.split(",")) if isinstance(words, str) else tuple(words)


def matches(layer: NormLayer, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches the layer by its name, its path without wrappers, or an alias."""
    names = (layer.name, layer.path, layer.name.rpartition(":")[2], *layer.aliases)
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def choose_rules(select: Iterable[str], ignore: Iterable[str]) -> list[Rule]:
    """The rules whose code begins with one of `select` (all by default) and with none of `ignore`."""
    select, ignore = tuple(map(_known_code, select)), tuple(map(_known_code, ignore))
    return [
        rule
        for rule in RULES
        if (not select or rule.code.startswith(select)) and not (ignore and rule.code.startswith(ignore))
    ]


def find_rule(code: str) -> Rule:
    """The rule of this code or name. Raises UsageError with the nearest codes where there is none."""
    for rule in RULES:
        if code.upper() == rule.code or code.lower() == rule.name:
            return rule
    raise _unknown(code)


def _known_code(code: str) -> str:
    code = code.strip().upper()
    if not code or not any(rule.code.startswith(code) for rule in RULES):
        raise _unknown(code)
    return code


def _unknown(code: str) -> UsageError:
    known = [rule.code for rule in RULES] + [rule.name for rule in RULES]
    near = difflib.get_close_matches(code, known, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    return UsageError(f"no rule {code!r}", hint + "All rules: normdoctor rules")


def checked_limits(limits: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`limits` with the codes in capitals. Raises UsageError for a rule or threshold that does not exist."""
    checked = {}
    for code, values in limits.items():
        rule = find_rule(code)
        for name in values:
            if name not in rule.limits:
                known = ", ".join(rule.limits) or "none"
                raise UsageError(f"rule {rule.code} has no threshold {name!r}", f"Its thresholds: {known}.")
        checked[rule.code] = {name: float(value) for name, value in values.items()}
    return checked


def check_eps(eps: float | None) -> float | None:
    """`eps` as a float. Raises UsageError where it is not positive."""
    if eps is not None and not eps > 0:
        raise UsageError(f"eps must be above 0, not {eps:g}", "1e-5 is torch's default.")
    return None if eps is None else float(eps)


def check_momentum(momentum: float | None) -> float | None:
    """`momentum` as a float. Raises UsageError where it does not lie between 0 and 1."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise UsageError(f"momentum must lie between 0 and 1, not {momentum:g}", "0.1 is torch's default.")
    return None if momentum is None else float(momentum)
