"""`compare`: two or more checkpoints of one network, or the models in one file → a Report."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from normdoctor.compared import Comparison
from normdoctor.comparing import compare_parts, models_compared, of_ranks, whole
from normdoctor.comparing.parts import Part, chosen
from normdoctor.comparing.ranks import rank_groups
from normdoctor.comparing.travelled import Travelled
from normdoctor.errors import InputError, UsageError
from normdoctor.findings import Report, Rule, Scope
from normdoctor.layers import Checkpoint
from normdoctor.readers import open_checkpoint
from normdoctor.readers.folders import find_checkpoints
from normdoctor.rules.runner import Settings, examine
from normdoctor.selection import check_eps, checked_limits, choose_rules, matches, near_layers, several

FAMILY = "X"


def compare(
    *models: Any,
    in_file: bool = False,
    key: str | None = None,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    layer: str | Iterable[str] = (),
    eps: float | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
) -> Report:
    """How the norms of a network differ between checkpoints (str or Path), live modules or their state_dicts.

    Folders and globs stand for the checkpoints in them, e2.pt before e10.pt. Two models are taken for before and
    after, three or more for states of one training in the order given, files that are named after the ranks of one
    run for these. Nothing in a file is executed. The report is about the last of them; what was seen is in
    `Report.comparison`.

    in_file: compare the models inside one file, the weights and their average.
    key: which model of files that hold several; by default the first that is no average.
    select, ignore: rule codes among X, their beginnings or names. layer: globs on layer names.
    eps: stands in where a file does not say it. limits: thresholds by rule code and name.

    Raises InputError where a file cannot be read, the models have no norm in common or a norm has another number of
    channels, UsageError for options that make no sense."""
    models = expanded(models)
    rules = _chosen(several(select), several(ignore))
    settings = Settings(eps=check_eps(eps), limits=checked_limits(limits or {}))
    globs = several(layer)
    if in_file:
        if len(models) != 1:
            raise UsageError(
                "--in-file compares the models of one file",
                "Name just that file: normdoctor compare --in-file model.pt",
            )
        if key is not None:
            raise UsageError("--in-file compares the models of a file, --key picks one of them", "Leave out one.")
        return _in_file(models[0], rules, settings, globs)
    if not models:
        raise UsageError("name the checkpoints to compare", "normdoctor compare before.pt after.pt")
    if len(models) == 1:
        raise UsageError(
            "one checkpoint has nothing to be compared with",
            "Name another one, or add --in-file to compare the models in it (weights and their EMA).",
        )
    _check_different(models)
    return _files(models, key, rules, settings, globs)


def expanded(models: Iterable[Any]) -> tuple[Any, ...]:
    """The models with the checkpoints that folders and globs among them stand for, in the order of the numbers in
    their names. Raises InputError for a folder or glob without one."""
    found: list[Any] = []
    for model in models:
        if isinstance(model, (str, Path)) and not os.path.isfile(model):  # noqa: PTH113  Path.is_file raises
            found += sorted(find_checkpoints([model]).targets, key=_by_numbers)
        else:
            found.append(model)
    return tuple(found)


def _by_numbers(path: Path) -> list[tuple[str, int]]:
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d{0,18})", str(path))]


def _chosen(select: Sequence[str], ignore: Sequence[str]) -> list[Rule]:
    rules = [rule for rule in choose_rules(select, ignore) if rule.scope is Scope.COMPARISON]
    if not rules:
        raise UsageError(
            f"none of these rules compares checkpoints: {', '.join(select)}",
            f"Those that do begin with {FAMILY}; `normdoctor inspect` applies the others.",
        )
    return rules


def _check_different(models: Sequence[Any]) -> None:
    """Raise UsageError where the same thing is given twice: all would be equal, and nothing learnt."""
    seen: dict[Any, Any] = {}
    for model in models:
        same: Any = id(model)
        if isinstance(model, (str, Path)):
            try:
                same = Path(model).resolve()
            except (OSError, RuntimeError, ValueError):
                continue  # opening it says why
        if same in seen:
            what = str(model) if isinstance(model, (str, Path)) else f"the same {type(model).__name__}"
            raise UsageError(f"{what} is given twice", "Compare it with another state of the network.")
        seen[same] = model


def _in_file(model: Any, rules: Sequence[Rule], settings: Settings, globs: Sequence[str]) -> Report:
    with open_checkpoint(model) as checkpoint:
        found = models_compared(checkpoint, eps=settings.eps, thorough=True, anyhow=True)
        if found is None:
            keys = [model.key for model in checkpoint.models if model.layers and model.key]
            held = f"its models are {', '.join(keys)}" if keys else "it holds one model"
            raise InputError(
                f"{checkpoint.path}: no two models with the same norms in it ({held})",
                "Name two files to compare these.",
            )
        return _report(checkpoint, found, rules, settings, globs, [_bytes(checkpoint)])


def _files(
    models: Sequence[Any], key: str | None, rules: Sequence[Rule], settings: Settings, globs: Sequence[str]
) -> Report:
    with ExitStack() as stack:
        if all(isinstance(model, (str, Path)) for model in models):
            groups = rank_groups(map(Path, models))
            if len(groups) == 1 and len(groups[0]) == len(models):
                opened = [stack.enter_context(open_checkpoint(path)) for path in groups[0]]
                found = of_ranks([whole(checkpoint, key) for checkpoint in opened], settings.eps)
                if found is not None:
                    sizes = list(map(_bytes, opened))
                    return _report(_only(opened[-1], key), found, rules, settings, globs, sizes)
        return _in_order(models, key, rules, settings, globs)


def _in_order(
    models: Sequence[Any], key: str | None, rules: Sequence[Rule], settings: Settings, globs: Sequence[str]
) -> Report:
    """Each against the next, and the first against the last; no more than three files are open at once."""
    with ExitStack() as stack:
        first = stack.enter_context(open_checkpoint(models[0]))
        start = whole(first, key, _label(models, 0, first))
        travelled = Travelled()
        before: tuple[Checkpoint, Part] = (first, start)
        sizes: list[tuple[int, int | None]] = []
        found: Comparison | None = None
        for place in range(1, len(models)):
            checkpoint = open_checkpoint(models[place])
            stack.callback(checkpoint.close)
            part = whole(checkpoint, key, _label(models, place, checkpoint))
            found = compare_parts(before[1], part, eps=settings.eps)
            travelled.add(found)
            if before[0] is not first:
                sizes.append(_bytes(before[0]))
                before[0].close()
            before = (checkpoint, part)
        last, end = before
        assert found is not None
        if len(models) > 2:
            found = travelled.over(compare_parts(start, end, eps=settings.eps))
        notes = tuple(filter(None, (_several_models(one, key) for one in (first, last))))
        sizes += [_bytes(first), _bytes(last)]
        return _report(_only(last, key), replace(found, notes=(*notes, *found.notes)), rules, settings, globs, sizes)


def _only(checkpoint: Checkpoint, key: str | None) -> Checkpoint:
    """The checkpoint as far as it is compared."""
    return replace(checkpoint, models=(chosen(checkpoint, key),))


def _bytes(checkpoint: Checkpoint) -> tuple[int, int | None]:
    """How many bytes were read of how many."""
    return checkpoint.bytes_read, checkpoint.bytes_total


def _label(models: Sequence[Any], place: int, checkpoint: Checkpoint) -> str:
    """What tells a side from the others: its path; of live modules, which of them it is as well."""
    if isinstance(models[place], (str, Path)):
        return checkpoint.path
    return f"{checkpoint.path} {place + 1}"


def _several_models(checkpoint: Checkpoint, key: str | None) -> str | None:
    keys = [model.key for model in checkpoint.models if model.layers and model.key is not None]
    if key is not None or len(keys) < 2:
        return None
    taken = chosen(checkpoint, key).key
    return f"{checkpoint.path} holds {len(keys)} models ({', '.join(keys)}): {taken} is compared; --key takes another"


def _report(
    checkpoint: Checkpoint,
    found: Comparison,
    rules: Sequence[Rule],
    settings: Settings,
    globs: Sequence[str],
    sizes: Sequence[tuple[int, int | None]],
) -> Report:
    """sizes: of each file, how many bytes were read of how many."""
    known = {row.layer for row in found.layers} | {one.layer for one in found.missing}
    if globs:
        found = replace(found, missing=tuple(one for one in found.missing if _matches(one.layer, globs)))
    examined = replace(checkpoint, comparison=found, notes=found.notes)
    report = examine(examined, rules, settings, lambda layer: not globs or matches(layer, globs))
    for glob in globs:
        if not any(_matches(name, [glob]) for name in known) and not any(matches(one, [glob]) for one in report.layers):
            raise UsageError(f"no layer matches {glob!r}", near_layers(glob, known))
    totals = [total for _, total in sizes if total is not None]
    return replace(report, bytes_read=sum(read for read, _ in sizes), bytes_total=sum(totals) if totals else None)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) or fnmatchcase(name.rpartition(":")[2], glob) for glob in globs)
