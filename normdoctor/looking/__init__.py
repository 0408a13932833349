"""What is looked at in front of a norm, and what was seen of its input in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
