"""Which array is which argument of the model, and which are the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from normdoctor.data.wanted import (
    Wanted,
    by_place,
    listed,
    plain,
    required,
    takes_any_name,
    takes_any_place,
)
from normdoctor.errors import UsageError, did_you_mean

LABELS = frozenset({"label", "labels", "target", "targets", "y"})
"""Names under which data sets keep the right classes."""

T = TypeVar("T")


@dataclass(frozen=True)
class Assigned(Generic[T]):
    """The arguments by name, the labels, and the names of what is neither."""

    given: dict[str, T]
    labels: T | None = None
    dropped: tuple[str, ...] = ()


def by_name(
    origin: str, entries: Mapping[str, T], wanted: Sequence[Wanted], is_labels: Callable[[T], bool]
) -> Assigned[T]:
    """Of entries with names. A single one that the model has no argument for goes to the only one it needs.

    is_labels: whether an entry can be one integer for each sample.
    Raises UsageError where something that the model needs is not there."""
    given: dict[str, T] = {}
    labels: T | None = None
    left: list[str] = []
    known = {entry.name for entry in plain(wanted)}
    for name, entry in entries.items():
        if name in known:
            given[name] = entry
        elif name.lower() in LABELS and labels is None and is_labels(entry):
            labels = entry
        else:
            left.append(name)
    missing = [entry.name for entry in required(wanted) if entry.name not in given]
    if len(left) == 1 and len(missing) == 1 == len(required(wanted)):
        given[missing.pop()] = entries[left.pop()]
    if missing:
        held = f"It holds {', '.join(list(entries)[:8]) or 'nothing'}. "
        raise UsageError(
            f"{origin}: has nothing for input {missing[0]}", did_you_mean(missing[0], left) + held + listed(wanted)
        )
    if not known and not given and len(left) == 1 and takes_any_place(wanted):
        given["input_0"] = entries[left.pop()]
    if takes_any_name(wanted):
        given |= {name: entries[name] for name in left}
        left = []
    ordered = {entry.name: given[entry.name] for entry in plain(wanted) if entry.name in given}
    return Assigned(ordered | given, labels, tuple(left))


def in_order(
    origin: str, entries: Sequence[T], wanted: Sequence[Wanted], is_labels: Callable[[T], bool]
) -> Assigned[T]:
    """Of entries by place, as (input, label): a model that needs k arguments gets the first k, and a single one left
    over is the labels where it can be; otherwise all where it takes them and none can be the labels.

    Raises UsageError for fewer than the model needs."""
    names = [entry.name for entry in by_place(wanted)]
    needed = [entry.name for entry in required(wanted)]
    if takes_any_place(wanted):
        names += [f"input_{place}" for place in range(len(names), len(entries))]
    count = max(1, len(needed))
    if len(entries) < count or len(names) < count:
        raise UsageError(
            f"{origin}: {len(entries)} entr{'y' if len(entries) == 1 else 'ies'}, the model needs {count} arguments",
            f"Give them in this order or as a dict by name. {listed(wanted)}",
        )
    rest = entries[count:]
    if len(rest) == 1 and is_labels(rest[0]):
        return Assigned(dict(zip(names, entries[:count], strict=False)), rest[0])
    if len(entries) <= len(names) and not any(map(is_labels, rest)):
        return Assigned(dict(zip(names, entries, strict=False)))
    dropped = tuple(f"entry {place}" for place in range(count, len(entries)))
    return Assigned(dict(zip(names, entries[:count], strict=False)), None, dropped)


def note_on_dropped(assigned: Assigned[T]) -> list[str]:
    """Says what the model does not take."""
    if not assigned.dropped:
        return []
    return [f"not used, since the model does not take it: {', '.join(assigned.dropped[:8])}"]
