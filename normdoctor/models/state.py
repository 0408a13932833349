"""The tensors of a checkpoint, named as an architecture names them; refused where the two do not match."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from normdoctor.errors import InputError, UsageError, did_you_mean
from normdoctor.layers import ArrayRef, Checkpoint
from normdoctor.readers.naming import AVERAGE_COUNTER, strip_wrappers

SHOWN = 10
"""So many keys of each kind are listed."""

COUNTER = "num_batches_tracked"
"""Not in files of torch before 0.4.1, and without meaning for inference."""


@dataclass(frozen=True)
class Wanted:
    """A parameter or buffer of an architecture."""

    shape: tuple[int, ...]
    identity: Hashable
    """Equal for names that share one tensor."""


def choose(keys: Iterable[str], key: str | None, what: str) -> str:
    """The one of `keys` that is meant. Raises UsageError where that cannot be told."""
    known = list(keys)
    if key is not None and key not in known:
        listed = f"It has {', '.join(known)}." if any(known) else "It holds one model: leave --key out."
        raise UsageError(f"{what}: holds no model {key!r}", did_you_mean(key, known) + listed)
    if key is None and len(known) != 1:
        raise UsageError(f"{what}: holds {len(known)} models", f"Choose one with --key: {', '.join(known)}.")
    return known[0] if key is None else key


def tensors_of(checkpoint: Checkpoint, key: str | None) -> dict[str, ArrayRef]:
    """All tensors of the model with this key, of the only one where None is given.

    Raises UsageError, listing the keys, where it cannot be told which model is meant."""
    keys = {model.key or "": bool(model.layers) for model in checkpoint.models}
    found: dict[str, dict[str, ArrayRef]] = {name: {} for name in keys}
    for reference in checkpoint.list_references():
        owner = next((name for name in keys if name and reference.name.startswith(f"{name}:")), "")
        name = reference.name.removeprefix(f"{owner}:") if owner else reference.name
        if name and owner in found:
            found[owner][name] = reference.array
    full = [name for name in keys if found[name]]
    with_norms = [name for name in full if keys[name]]
    if not full:
        raise InputError(f"{checkpoint.path}: holds no tensors of a model", "normdoctor inspect tells what it holds.")
    candidates = with_norms if key is None and len(with_norms) == 1 else full
    return found[choose(candidates, key, checkpoint.path)]


def match(
    tensors: Mapping[str, ArrayRef], wanted: Mapping[str, Wanted], what: str
) -> tuple[dict[str, ArrayRef], list[str]]:
    """The tensors by the names of the architecture, and notes on what was left out.

    Names of wrappers (module., _orig_mod.) and one prefix common to all (model. of Lightning) do not count.
    what: the architecture, for messages. Raises InputError listing the names and shapes that do not match."""
    plain = {strip_wrappers(name): name for name in wanted}
    given = {strip_wrappers(name): array for name, array in tensors.items()}
    notes: list[str] = []
    prefix, cut = _prefix(given, plain)
    if cut:
        plain = {name.removeprefix(prefix): own for name, own in plain.items() if name.startswith(prefix)}
        unreached = [name for name in map(strip_wrappers, wanted) if not name.startswith(prefix)]
    else:
        beside = [name for name in given if not name.startswith(prefix)]
        given = {name.removeprefix(prefix): array for name, array in given.items() if name.startswith(prefix)}
        unreached = []
        if prefix:
            notes.append(f"the names in the file begin with {prefix} and were read without it")
        if beside:
            notes.append(f"{len(beside)} tensors of the file do not belong to the model ({beside[0]}, ...)")
    if AVERAGE_COUNTER in given and AVERAGE_COUNTER not in plain:
        del given[AVERAGE_COUNTER]
        notes.append(f"{AVERAGE_COUNTER}, the counter of an AveragedModel, is no part of the architecture: left out")
    found = {own: given[name] for name, own in plain.items() if name in given}
    reached = {wanted[own].identity for own in found}
    missing = [name for name, own in plain.items() if own not in found and wanted[own].identity not in reached]
    missing = [name for name in [*missing, *unreached] if not name.endswith(COUNTER)]
    unexpected = [name for name in given if name not in plain and not name.endswith(COUNTER)]
    differing = [
        f"{own} {list(array.shape)} in the file, {list(wanted[own].shape)} in the architecture"
        for own, array in found.items()
        if array.shape != wanted[own].shape and not own.endswith(COUNTER)
    ]
    problems = [
        *_listed("missing in the file", missing),
        *_listed("not in the architecture", unexpected),
        *_listed("of another shape", differing),
    ]
    if problems:
        raise InputError(
            f"{what} does not fit the file: {'; '.join(problems)}",
            "Check --arch and --arch-args; inspect --all lists what the file holds.",
        )
    return found, notes


def _listed(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"


def _prefix(given: Mapping[str, ArrayRef], wanted: Mapping[str, str]) -> tuple[str, bool]:
    """What all names on one side begin with and those on the other do not, and whether it is the architecture's.

    Empty where that is nothing: also where no prefix makes more names match than none."""
    best, score, of_wanted = "", len(given.keys() & wanted.keys()), False
    for side, other, cut in ((given, wanted, False), (wanted, given, True)):
        first = next((name for name in other if not name.endswith(COUNTER)), None)
        if first is None:
            continue
        for name in side:
            if name.endswith(f".{first}"):
                prefix = name.removesuffix(first)
                matching = sum(prefix + own in side for own in other)
                if matching > score:
                    best, score, of_wanted = prefix, matching, cut
    return best, of_wanted
