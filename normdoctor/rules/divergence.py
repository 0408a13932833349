"""How far the stored statistics of a layer are from those of its inputs on data, channel by channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normdoctor.layers import (
    DEFAULT_EPS,
    DEFAULT_MOMENTUM,
    LIVE_SHARE_OF_MEDIAN,
    Mask,
    NormKind,
    NormLayer,
    Vector,
    median,
)
from normdoctor.measured import Measured
from normdoctor.rules.guards import SWITCHED_OFF, usable_eps

BATCHES_FOR_SPREAD = 8
"""A spread between fewer batches is no standard error that a channel could be held against."""

USUAL_BATCH = 32
"""Samples in a batch of the training where that is not known and more were measured at a time."""

SURE = 3.0
"""Standard errors of the measuring below which a difference is taken for none."""


@dataclass(frozen=True, eq=False)
class Shift:
    """Data against buffers in the channels that carry signal; vectors have a value for each of those."""

    channels: NDArray[np.intp]
    """Their indices."""
    broken: int
    """Channels left out because their buffers or their inputs are no numbers that could be compared."""
    z: Vector
    """|mean of the data - running_mean| in standard deviations by the buffers."""
    log_ratio: Vector
    """ln(variance of the data / running_var), with eps in both."""
    divergence: Vector
    """KL(N(data) || N(buffers)) in nats."""
    noise: Vector
    """What of the divergence comes from measuring on a sample: half of the squared standard errors."""
    sure_z: Vector
    """z, and 0 where it lies within three standard errors of the measuring."""
    sure_log_ratio: Vector
    """log_ratio, likewise."""
    tested: Vector | None
    """The larger of the two differences in standard errors of a healthy moving average, None for too few batches."""

    @property
    def sure_divergence(self) -> Vector:
        return kullback_leibler(self.sure_z, self.sure_log_ratio)


def kullback_leibler(z: Vector, log_ratio: Vector) -> Vector:
    """KL of a normal distribution from another, z of the other's standard deviations away and with a variance
    exp(log_ratio) times as large, in nats."""
    return np.asarray(0.5 * (np.expm1(log_ratio) - log_ratio + np.square(z)))


def shift_of(layer: NormLayer, train_batch: int | None = None) -> Shift | None:
    """Compare; None where the layer was not measured or has no statistics.

    train_batch: samples in a batch of the training, where it is known."""
    seen, mean, var = layer.measured, layer.numbers.mean, layer.numbers.var
    if seen is None or mean is None or var is None or not layer.lengths_agree:
        return None
    if not len(mean) == len(var) == len(seen.moments.mean) or not seen.moments.count:
        return None
    with np.errstate(all="ignore"):
        return _compared(layer, seen, mean, var, train_batch)


def _compared(layer: NormLayer, seen: Measured, mean: Vector, var: Vector, train_batch: int | None) -> Shift:
    eps = usable_eps(layer) or DEFAULT_EPS
    data_mean, data_var = seen.moments.mean, _variance(layer, seen)
    used = _carries_gain(layer)
    sound = np.isfinite(mean) & np.isfinite(var) & (var >= 0) & np.isfinite(data_mean) & np.isfinite(data_var)
    z = np.abs(data_mean - mean) / np.sqrt(var + eps)
    log_ratio = np.log(data_var + eps) - np.log(var + eps)
    divergence = kullback_leibler(z, log_ratio)
    sound &= np.isfinite(divergence)
    # A channel that is dead in the buffers and alive in the data, or the other way round, is a difference.
    alive = used & sound & (layer.numbers.live | (data_var > LIVE_SHARE_OF_MEDIAN * median(data_var[sound & used])))
    broken = int((used & ~sound).sum())
    mean_error, var_error = _standard_errors(seen, data_var)
    z_error, ratio_error = mean_error / np.sqrt(var + eps), var_error / (data_var + eps)
    noise = 0.5 * (np.square(z_error) + 0.5 * np.square(ratio_error))
    sure = SURE * (1 + 4 / max(seen.samples, 1))  # as Student's t: an error from few samples is itself uncertain
    tested = _tested(layer, seen, data_mean - mean, data_var - var, train_batch)
    return Shift(
        channels=np.flatnonzero(alive),
        broken=broken,
        z=z[alive],
        log_ratio=log_ratio[alive],
        divergence=divergence[alive],
        noise=np.where(np.isfinite(noise), noise, 0.0)[alive],
        sure_z=np.where(z > sure * z_error, z, 0.0)[alive],
        sure_log_ratio=np.where(np.abs(log_ratio) > sure * ratio_error, log_ratio, 0.0)[alive],
        tested=None if tested is None else tested[alive],
    )


def _carries_gain(layer: NormLayer) -> Mask:
    """Channels that are not switched off; a slimmed layer has nothing but such channels, and keeps them."""
    size = np.abs(layer.numbers.gain)
    known = np.isfinite(size)
    used = known & (size >= SWITCHED_OFF)
    return np.asarray(used if used.any() else known & (size > 0))


def _variance(layer: NormLayer, seen: Measured) -> Vector:
    """What running_var should be: the unbiased variance, in an InstanceNorm within samples only."""
    variance = seen.moments.variance(1 if seen.moments.count > 1 else 0)
    if layer.kind is NormKind.INSTANCE and seen.effective is not None:
        return np.asarray(variance * np.clip(1.0 - seen.samples / seen.effective, 0.0, 1.0))
    return variance


def _standard_errors(seen: Measured, variance: Vector) -> tuple[Vector, Vector]:
    """Of the measured mean and variance: those of the mean from how many independent values there are, which batches
    that differ do not mislead, those of the variance from the spread between batches, whatever the tails."""
    values = np.full_like(variance, max(seen.samples, 1)) if seen.effective is None else np.maximum(seen.effective, 1.0)
    mean_error, var_error = np.sqrt(variance / values), variance * np.sqrt(2.0 / values)
    root = math.sqrt(max(seen.batches, 1))
    if seen.effective is None and seen.mean_spread is not None:
        mean_error = seen.mean_spread / root
    if seen.var_spread is not None and seen.batches >= BATCHES_FOR_SPREAD:
        var_error = seen.var_spread / root
    return mean_error, var_error


def _tested(
    layer: NormLayer, seen: Measured, mean_off: Vector, var_off: Vector, train_batch: int | None
) -> Vector | None:
    """|difference| / sqrt(s^2 m / (2 - m) + s^2 / batches), where s is the spread between batches: the first part is
    the error of a moving average with momentum m over such batches, the second that of the measuring.

    The spread is measured, since values of one image depend on each other: in trained nets it is up to twice what
    the number of values says."""
    if seen.var_spread is None or not seen.samples or not seen.batches:
        return None
    momentum = layer.momentum
    if not isinstance(momentum, float) or not 0 < momentum <= 1:
        momentum = DEFAULT_MOMENTUM
    batch = seen.samples / seen.batches
    wider = batch / (train_batch or min(batch, USUAL_BATCH))
    factor = math.sqrt(wider * momentum / (2.0 - momentum) + 1.0 / seen.batches)
    if seen.effective is not None:
        mean_spread = np.sqrt(seen.moments.variance() * seen.batches / np.maximum(seen.effective, 1.0))
    elif seen.mean_spread is not None:
        mean_spread = seen.mean_spread
    else:
        return None
    tested = np.fmax(_over(mean_off, factor * mean_spread), _over(var_off, factor * seen.var_spread))
    return tested if np.isfinite(tested).any() else None


def _over(difference: Vector, error: Vector) -> Vector:
    """|difference| / error; 0 of nothing, and a difference where batches do not differ at all is infinitely far."""
    size = np.abs(difference)
    return np.asarray(np.where(size > 0, size / error, 0.0))
