"""Which rules, layers and thresholds a user chose: checked, with a guess at what was meant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from normdoctor.errors import UsageError, did_you_mean
from normdoctor.findings import PRECISIONS, LayerIgnore, Precision, Rule, Survey
from normdoctor.layers import NormLayer
from normdoctor.rules import RULES


def near_layers(glob: str, known: Iterable[str]) -> str:
    """A hint for a glob that matches none of the `known` layer names: those, or parts of the model, like it."""
    spellings = dict.fromkeys(known)
    for name in list(spellings):
        while name := name.rpartition(".")[0]:
            spellings[f"{name}.*"] = None
    return f"{did_you_mean(glob, spellings)}normdoctor inspect --all lists the layers."


def layers_not_found(ignores: Iterable[LayerIgnore], found: Survey) -> Iterator[str]:
    """A sentence for each per-layer ignore whose glob matches no layer of any file."""
    every = [layer for report in found.reports for layer in report.layers]
    for one in ignores if every else ():
        if not any(matches(layer, [one.glob]) for layer in every):
            hint = did_you_mean(one.glob, [layer.name for layer in every]).strip()
            yield f"per-layer-ignores: {one.glob!r} matches no layer. {hint}".strip()


def several(words: str | Iterable[str]) -> tuple[str, ...]:
    """One string, with commas between several words, or any number of them."""
    return tuple(words.split(",")) if isinstance(words, str) else tuple(words)


def matches(layer: NormLayer, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches the layer by its name, its path without wrappers, or an alias."""
    names = (layer.name, layer.path, layer.name.rpartition(":")[2], *layer.aliases)
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def choose_rules(select: Iterable[str], ignore: Iterable[str]) -> list[Rule]:
    """The rules whose code begins with one of `select` (all by default) and with none of `ignore`."""
    select, ignore = tuple(map(known_code, select)), tuple(map(known_code, ignore))
    chosen = [
        rule
        for rule in RULES
        if (not select or rule.code.startswith(select)) and not (ignore and rule.code.startswith(ignore))
    ]
    if not chosen:
        raise UsageError("no rule is left: all that are selected are ignored", "All rules: normdoctor rules")
    return chosen


def find_rule(code: str) -> Rule:
    """The rule of this code or name. Raises UsageError with the nearest codes where there is none."""
    for rule in RULES:
        if code.upper() == rule.code or code.lower() == rule.name:
            return rule
    raise _unknown(code)


def known_code(code: str) -> str:
    """The code, or beginning of codes, in capitals; a rule's name as its code. Raises UsageError for any other."""
    given = code.strip()
    for rule in RULES:
        if given.lower() == rule.name:
            return rule.code
    if not given or not any(rule.code.startswith(given.upper()) for rule in RULES):
        raise _unknown(given)
    return given.upper()


def _unknown(code: str) -> UsageError:
    known = [rule.code for rule in RULES] + [rule.name for rule in RULES]
    return UsageError(f"no rule {code!r}", f"{did_you_mean(code, known)}All rules: normdoctor rules")


def checked_limits(limits: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`limits` with the codes in capitals. Raises UsageError for a rule or threshold that does not exist."""
    checked = {}
    for code, values in limits.items():
        rule = find_rule(code)
        for name in values:
            if name not in rule.limits:
                hint = f"{did_you_mean(name, rule.limits)}Its thresholds: {', '.join(rule.limits) or 'none'}."
                raise UsageError(f"rule {rule.code} has no threshold {name!r}", hint)
            if not math.isfinite(values[name]):
                raise UsageError(f"{rule.code}.{name} must be a number, not {values[name]}")
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


def check_train_batch(samples: int | None) -> int | None:
    """`samples` as it is. Raises UsageError where it is below 1."""
    if samples is not None and samples < 1:
        raise UsageError(f"--train-batch must be at least 1, not {samples}")
    return samples


def check_precision(target: str) -> Precision:
    """`target` as it is. Raises UsageError where it names no precision that is judged."""
    if target not in PRECISIONS:
        hint = f"{did_you_mean(str(target), PRECISIONS)}One of: {', '.join(PRECISIONS)}."
        raise UsageError(f"no precision {target!r}", hint)
    return target
