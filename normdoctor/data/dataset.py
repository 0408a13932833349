"""Data ready for a model: its batches, as often as they are asked for, and what reports say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from normdoctor.data import Batch
from normdoctor.errors import UsageError

Part = tuple[int, int]
"""Which of the processes that share the work this one is, and how many there are."""


@dataclass(kw_only=True, eq=False)
class Dataset:
    """Samples in batches. A context manager: closing it closes the files behind it."""

    words: str
    """For reports: calib.npz: x (2048 x 3 x 32 x 32 uint8), 1/255."""
    total: int | None
    """How many samples there are, None where only walking through all of them would tell."""
    samples: int | None
    """How many of them are used; those that are left out on the way are not taken off."""
    has_labels: bool
    repeatable: bool = True
    """False once it is known that another pass gives other batches (a loader that shuffles or augments)."""
    fingerprint: int = 0
    """Of the first batch, where the user's code gives it: differs between processes that see other data."""
    remarks: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """Samples that were left out so far (sample 17 of x, cat/1.jpg) → why."""
    start: Callable[[int | None, Part | None], Iterator[Batch]] = field(repr=False)
    """The work behind `batches`."""
    on_close: Callable[[], None] = field(default=lambda: None, repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report must know of the data; complete after a pass."""
        notes = list(self.remarks)
        if self.dropped:
            shown = ", ".join(f"{name} ({why})" for name, why in list(self.dropped.items())[:3])
            more = ", ..." if len(self.dropped) > 3 else ""
            count = len(self.dropped)
            notes.append(f"{count:,} {'sample' if count == 1 else 'samples'} left out: {shown}{more}")
        return tuple(notes)

    def batches(self, batch_size: int | None = None, part: Part | None = None) -> Iterator[Batch]:
        """All batches, from the beginning at each call and in the same order.

        batch_size: another one than that of the options, for data that has no batches of its own.
        part: (rank, world): only those whose index % world is rank; the others are not read where that can be.

        The index of a batch of which nothing is left (--drop-nonfinite) is left out, so indices have gaps there.
        Raises InputError for NaN, Inf and what cannot be read, UsageError for what does not fit."""
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"a batch of {batch_size}", "Give 1 or more.")
        return self.start(batch_size, part)

    def close(self) -> None:
        self.on_close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
