"""Several processes that measure parts of the same data. Nothing here imports torch."""

from __future__ import annotations

from typing import Any, Protocol


class Processes(Protocol):
    """The processes that were started together, and which of them this one is."""

    rank: int
    """This one's number, from 0."""
    count: int

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of their ranks; all must come here.

        Raises NormDoctorError in all of them where one is gone."""


class Alone:
    """A single process."""

    rank = 0
    count = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


ALONE = Alone()
