"""What was seen of norms on the user's own data: records that `measurement` fills and the rules judge, and the
record of how far the stored statistics are from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

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
    options: str = ""
    """What a command must add to have the data so; empty where no option can do that."""


@dataclass(frozen=True, kw_only=True)
class Recalibrated:
    """The outputs of a model whose statistics were measured anew."""

    accuracy: float | None = None
    """With labels: share of samples whose largest output is the label."""
    p_value: float | None = None
    """Of McNemar's test on the samples that were right before and are wrong now, and the other way round."""
    entropy_before: float | None = None
    """Mean entropy of the softmax of the outputs, in nats; None for models without scores over classes."""
    entropy: float | None = None


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
    options: str = ""
    """What a command about this model and this data must add, as the shell wants it: --arch nets:ResNet --data x.npy"""
    recalibrated: Recalibrated | None = None
    """What became of the outputs when the statistics were measured anew; None: that was not tried."""


class DriftVerdict(Enum):
    """Whether the stored statistics of a model are those of the data it was run on."""

    HEALTHY = "healthy"
    NOISY = "noisy"
    """Off by no more than averages over so few batches are."""
    STALE = "stale"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """How far one layer's statistics are from those of the data, over its channels that carry signal."""

    layer: str
    channels: int
    """How many were compared."""
    broken: int
    """Channels whose buffers or inputs are not finite, or whose variance is negative: they are left out."""
    divergence: float
    """Median of KL(data || buffers) of normal distributions with these statistics, in nats."""
    divergence_p95: float
    shift: float
    """Median of |mean of the data - running_mean| in standard deviations by the buffers."""
    shift_p95: float
    ratio: float
    """Median of variance of the data / running_var."""
    beyond: float | None
    """Share of channels whose mean or variance is further off than six standard errors; None: too few batches."""
    effective: float | None
    """How many independent values of a channel there were, median."""
    worst: tuple[int, ...]
    """The channels with the largest divergence, at most five."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far a model's statistics are from those of the data it was run on."""

    data: str
    samples: int
    batches: int
    verdict: DriftVerdict
    meaning: str
    """The verdict in a sentence or two."""
    command: str
    """What to do next, empty for nothing."""
    divergence: float | None
    """Median of the divergence over the channels of all layers, in nats; None where none could be compared."""
    noise: float | None
    """What of it is to be expected from the number of samples alone."""
    beyond: float | None
    """Share of the channels that are off by more than six standard errors."""
    layers: tuple[LayerDrift, ...]
    """Largest divergence first."""
    left: Mapping[str, str]
    """Layer with statistics that was not compared → why."""
    disagreement: float | None
    """Share of samples whose largest output differs between the stored statistics and those of the batch."""
    output_change: float | None
    """Relative L2 distance of the outputs under these two."""
    accuracy: float | None
    prepared: str = ""
    """How the data was probably prepared for training (D608); empty where nothing says that it was otherwise."""
