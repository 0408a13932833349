"""What was seen of norms on the user's own data: records that `measurement` fills and the rules judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from normdoctor.moments import Moments

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What one norm's inputs were on the user's data, in eval mode with the buffers as they are stored.

    Vectors have a value per channel, in float64; None where there were too few batches or samples to tell."""

    moments: Moments
    """Over all values of all samples."""
    samples: int
    batches: int
    calls: int = 1
    """How often a forward pass comes through this layer."""
    mean_spread: Vector | None = None
    """Standard deviation, between batches, of the mean of a batch."""
    var_spread: Vector | None = None
    """Standard deviation, between batches, of the (biased) variance of a batch."""
    effective: Vector | None = None
    """How many independent values the data is worth: samples * variance / variance of the means of samples, which
    is the count where the values of a sample are independent, less where neighbouring pixels are alike."""
    active: Vector | None = None
    """Share of values that leave the norm (gain * normalised + shift) above 0."""
    gate: str | None = None
    """The activation that takes the norm's output and nothing else does: relu, relu6, ...; None: unknown or none."""
    starved: float | None = None
    """LayerNorm and its like: share of tokens (groups) whose variance is below eps."""
    saturated: float | None = None
    """DynamicTanh and its like: share of values where the slope is below a tenth of the steepest."""
    input_sd: float | None = None
    """DynamicTanh and its like: standard deviation of all inputs."""
    tanh_fit: float | None = None
    """LayerNorm: R^2 of the best g * tanh(alpha * x) for the norm without its affine part."""
    linear_fit: float | None = None
    """LayerNorm: R^2 of the best straight line for it."""
    tanh_alpha: float | None = None
    """alpha of that tanh."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What the first norm would see if the data were prepared otherwise."""

    words: str
    """What was tried: "times 255", "channels swapped (BGR)"."""
    divergence: float
    """Median over channels of KL(data || buffers), in nats."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """What was seen of a whole model on the user's data."""

    data: str
    """The data in words."""
    samples: int
    batches: int
    order: tuple[str, ...]
    """Names of the layers that were reached, as forward reaches them."""
    left: Mapping[str, str] = field(default_factory=dict)
    """Layer with statistics that could not be measured → why."""
    notes: tuple[str, ...] = ()
    disagreement: float | None = None
    """Share of samples whose largest output differs between the stored statistics and those of the batch; None for
    models without scores over classes."""
    output_change: float | None = None
    """Relative L2 distance of the outputs under these two."""
    preprocessing: tuple[Preprocessing, ...] = ()
    """The data as given first, then what was tried instead; empty where nothing had to be tried."""
    order_dependence: float | None = None
    """Relative change of a sample's output with its neighbours in the batch, in the modes as saved; None: not tried."""
    accuracy: float | None = None
    """With labels: share of samples whose largest output is the label."""
