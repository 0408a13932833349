"""A batch on its way through a model, which stops in front of every norm: what all ways of measuring rest on.

A norm is known by the name that the reader gives its layer. Nothing here imports torch or onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from normdoctor.data import Batch
from normdoctor.moments import Moments

Vector = NDArray[np.float64]

MOST_POINTS = 8192
"""Points of a curve that are kept."""


@dataclass(frozen=True)
class Look:
    """What is to be seen of a norm's input beside its moments. Each costs a pass over the values."""

    samples: bool = False
    """The mean of every sample: tells how many independent values there are."""
    active: bool = False
    """How many values leave the norm above 0."""
    others: bool = False
    """Stop at LayerNorm, RMSNorm and DynamicTanh too, which have no buffers."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of the input of a norm in one batch."""

    moments: Moments
    sample_means: Vector | None = None
    """Shape (samples, channels)."""
    active: Vector | None = None
    """Share of values above 0 behind the norm, shape (channels,)."""
    tokens: TokensSeen | None = None
    """Of a norm without buffers, whose moments are those of all values as one channel."""


@dataclass(frozen=True, eq=False)
class TokensSeen:
    """What was seen of the input of a LayerNorm, an RMSNorm or a DynamicTanh in one batch."""

    count: int
    """Tokens (groups that are normalised together); for DynamicTanh values."""
    starved: int = 0
    """Tokens with a variance (mean square for RMSNorm) below eps."""
    saturated: int = 0
    """Values where the slope is under a tenth of the steepest."""
    points: NDArray[np.float64] | None = None
    """Shape (n, 2): inputs and what the norm without its affine part makes of them, a few of each batch."""

    def __add__(self, other: TokensSeen) -> TokensSeen:
        points = None
        if self.points is not None and other.points is not None:
            points = self.points if len(self.points) >= MOST_POINTS else np.concatenate([self.points, other.points])
        return TokensSeen(
            self.count + other.count, self.starved + other.starved, self.saturated + other.saturated, points
        )


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
