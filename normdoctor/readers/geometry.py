"""Where a convolution looks, per spatial axis: strides, dilations, and the zeros before and after its input.

Each is None where it is not known for every axis, or where no convolution can have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Numbers = Sequence[int | None] | None
Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Geometry:
    """As `Op.CONV` and `Op.CONV_TRANSPOSE` have it."""

    strides: tuple[int, ...] | None
    dilations: tuple[int, ...] | None
    pads: Pads | None

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of the node."""
        return {"strides": self.strides, "dilations": self.dilations, "pads": self.pads}


def per_axis(numbers: Numbers, count: int, least: int) -> tuple[int, ...] | None:
    """One number for each of `count` axes, none below `least`."""
    known = tuple(number for number in numbers or () if number is not None and number >= least)
    return known if len(known) == len(numbers or ()) == count else None


def halves(total: int, *, more_after: bool) -> tuple[int, int]:
    """So many zeros on both sides; the odd one after, or before."""
    less = max(total, 0) // 2
    more = max(total, 0) - less
    return (less, more) if more_after else (more, less)


def reach(kernel: int, dilation: int) -> int:
    """How many inputs in a row a kernel spans."""
    return dilation * (kernel - 1) + 1
