"""What the symbolic pickle machine builds in place of objects: names, calls and references that do nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A name the pickle refers to; never looked up."""

    module: str
    name: str

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Call:
    """What pickle.load would have got by calling `function` (REDUCE) or `function.__new__` (`creates`)."""

    function: Any
    args: tuple[Any, ...]
    creates: bool
    state: Any = None
    """What BUILD would have given to __setstate__ or __dict__."""
    items: dict[Any, Any] | None = None
    """What SETITEM(S) would have stored in it."""
    members: list[Any] | None = None
    """What APPEND(S) and ADDITEMS would have added to it."""


@dataclass(frozen=True, slots=True)
class PersistentId:
    """A reference to something stored outside the pickle: torch's storages."""

    value: Any


@dataclass(frozen=True, slots=True)
class Skipped:
    """A literal too long to be of interest."""

    length: int


@dataclass(frozen=True, slots=True)
class OpaqueKey:
    """A dictionary key that is not an atom."""

    identity: int


@dataclass(slots=True)
class Pickled:
    """The outcome of one pickle: its value, and every call that loading it would make, in order."""

    value: Any
    calls: list[Call] = field(default_factory=list)
    persistent_ids: list[PersistentId] = field(default_factory=list)


ORDERED_DICT = Global("collections", "OrderedDict")
