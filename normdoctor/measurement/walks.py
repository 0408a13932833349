"""A batch on its way through a model, which stops in front of every norm: what all ways of measuring rest on.

A norm is known by the name that the reader gives its layer. Nothing here imports torch or onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from normdoctor.data import Batch
from normdoctor.looking import Look, Seen, TokensSeen, Vector


class Pause:
    """A walk stands in front of a norm."""

    __slots__ = ("norm", "seen")

    def __init__(self, norm: str, seen: Seen) -> None:
        self.norm = norm
        self.seen = seen


class Walk(Protocol):
    """One batch on its way."""

    def advance(self) -> Pause | None:
        """Go on to the next norm; None at the end, where `outputs` are to be had.

        Raises MisfitError where the model does not take the batch, CannotRunError for an operator without kernel."""

    @property
    def outputs(self) -> dict[str, NDArray[Any]]:
        """What the model gives, by name; bfloat16 as float32."""

    def close(self) -> None:
        """Give up on the rest and let go of what is held. May be called at any time, and twice."""


class Walker(Protocol):
    """A model whose norms can be measured and given other statistics. What is done to it is done to a copy, or
    undone by `restore`."""

    name: str
    """For messages."""
    ddof: int
    """What the format stores in running_var: 1, the unbiased variance (torch), or 0 (ONNX)."""

    @property
    def norms(self) -> Mapping[str, int]:
        """The norms with running statistics that it stops at → their channels."""

    @property
    def left(self) -> Mapping[str, str]:
        """The norms of the file that it does not stop at → why."""

    def start(self, batch: Batch, look: Look) -> Walk:
        """Send a batch on its way; nothing is computed yet."""

    def put(self, norm: str, mean: Vector, var: Vector) -> None:
        """Use these statistics in this norm from now on, in walks that are under way too.

        mean, var: float64, shape (channels,); they are rounded to the type of the buffers."""

    def restore(self) -> None:
        """Put back the statistics that were there in the beginning."""


__all__ = ["Look", "Pause", "Seen", "TokensSeen", "Vector", "Walk", "Walker"]
