"""How far a long run is: one line on stderr, on a terminal only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normdoctor.measurement.lockstep import Progress

INTERVAL = 0.2
"""Seconds between two lines at least."""


class Line:
    """The line. See `Progress`."""

    def __init__(self) -> None:
        self._words = ""
        self._begin = self._shown = 0.0
        self._width = 0

    def __call__(self, done: int, total: int | None, words: str) -> None:
        now = time.monotonic()
        if words != self._words:
            self._words, self._begin, self._shown = words, now, 0.0
        if now - self._shown < INTERVAL and done != total:
            return
        self._shown = now
        text = f"{words} {done:,}" + (f" of {total:,}" if total is not None else "")
        seconds = now - self._begin
        if seconds > 1 and done:
            text += f", {done / seconds:.3g} a second"
            if total is not None and total > done:
                text += f", {clock((total - done) * seconds / done)} left"
        self._write(text)

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text.ljust(self._width)}\r")
        sys.stderr.flush()
        self._width = len(text)

    def clear(self) -> None:
        if self._width:
            self._write("")


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(75)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


@contextmanager
def progress() -> Iterator[Progress | None]:
    """What shows the progress of the block; None where stderr is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    line = Line()
    try:
        yield line
    finally:
        line.clear()
