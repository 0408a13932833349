"""Several processes that measure parts of the same data. Nothing here imports torch."""

from __future__ import annotations

from typing import Any, Protocol


class Processes(Protocol):
    """The processes that were started together, and which of them this one is."""

    rank: int
    """This one's number, from 0."""
    count: int
    speaks: bool
    """Whether this one prints and writes: one of them does. Another may take that over where the first has died."""

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of their ranks; all must come here.

        Raises NormDoctorError in all of them where one is gone or has failed."""

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """What the process of this rank gives, to all of them; all must come here."""

    def barrier(self) -> None:
        """Wait until all are here."""

    def close(self) -> None:
        """Leave the others. May be called twice."""


class Alone:
    """A single process."""

    rank = 0
    count = 1
    speaks = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return value

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        pass


ALONE = Alone()
