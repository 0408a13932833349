"""Statistics beside the data that they should fit: mixed with what was measured, and how far they are from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from normdoctor.errors import RefusedError, UsageError
from normdoctor.layers import DEFAULT_EPS, Vector
from normdoctor.moments import Moments
from normdoctor.rules.divergence import kullback_leibler


def blend(
    stored_mean: Vector,
    stored_var: Vector,
    moments: Moments,
    *,
    prior: float,
    samples: int,
    ddof: int,
    pooled: bool = False,
) -> tuple[Vector, Vector]:
    """Stored statistics as a prior worth `prior` samples, mixed with those measured on `samples` samples.

    mean = (N stored + n measured) / (N + n) and the variance likewise, for few samples of a new domain. A sample is
    an image, not a pixel of one. pooled adds N n / (N + n)^2 (stored mean - measured mean)^2, which makes it the
    variance of both sets of samples together. ddof: what the format stores, see `Moments.variance`. A channel whose
    stored mean or variance is NaN, infinite or a variance below 0 has the measured values alone.

    Raises UsageError for a prior below 0 or no samples, RefusedError where a measured value is not finite.
    (Schneider and others 2020, "Improving robustness against common corruptions by covariate shift adaptation",
    https://arxiv.org/abs/2006.16971)

    >>> two = Moments.of(np.array([[1.0], [3.0]]))
    >>> blend(np.zeros(1), np.ones(1), two, prior=6, samples=2, ddof=0)
    (array([0.5]), array([1.]))
    >>> blend(np.zeros(1), np.ones(1), two, prior=6, samples=2, ddof=0, pooled=True)
    (array([0.5]), array([1.75]))
    """
    if not (math.isfinite(prior) and prior >= 0):
        raise UsageError(f"the prior must be a number of samples, 0 or more, not {prior:g}")
    if samples < 1:
        raise UsageError("there is nothing to blend with: no samples were measured")
    mean, var = moments.mean, moments.variance(ddof)
    if not (np.isfinite(mean) & np.isfinite(var)).all():
        raise RefusedError("measured statistics are not finite", "Check the data, and give more samples.")
    usable = np.isfinite(stored_mean) & np.isfinite(stored_var) & (stored_var >= 0)
    kept = prior / (prior + samples)
    share = samples / (prior + samples)
    old_mean, old_var = np.where(usable, stored_mean, mean), np.where(usable, stored_var, var)
    between = kept * share * np.square(old_mean - mean) if pooled else 0.0
    new_mean = np.where(usable, kept * old_mean + share * mean, mean)
    new_var = np.where(usable, kept * old_var + share * var + between, var)
    return new_mean, new_var


@dataclass(frozen=True, eq=False)
class Residual:
    """How far the statistics of one layer are from its data, per channel. 0 everywhere is a perfect fit."""

    shift: Vector
    """(measured mean - stored mean) in standard deviations by the stored variance."""
    log_ratio: Vector
    """ln(measured variance / stored variance)."""
    divergence: Vector
    """KL(data || stored), both taken as normal distributions, in nats."""


def residual(mean: Vector, var: Vector, moments: Moments, *, ddof: int, eps: float = DEFAULT_EPS) -> Residual:
    """The stored statistics beside those measured. ddof: what the format stores, see `Moments.variance`.

    eps is added to both variances, as the layer does. So a channel whose variances are far below it, a dead one, has
    a ratio near 1 and a shift in units of sqrt(eps), which is what the layer makes of it. With eps 0, two variances
    of 0 are a ratio of 1, and a mean beside a variance of 0 is infinitely far from any other. Stored values that are
    NaN, infinite or a variance below 0 give infinity in all three.

    >>> found = residual(np.zeros(1), np.ones(1), Moments.of(np.array([[1.0], [3.0]])), ddof=0, eps=0.0)
    >>> found.shift, found.log_ratio, found.divergence
    (array([2.]), array([0.]), array([2.]))
    """
    seen, stored = moments.variance(ddof) + eps, np.asarray(var, dtype=np.float64) + eps
    delta = moments.mean - mean
    usable = np.isfinite(mean) & np.isfinite(var) & (np.asarray(var) >= 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shift = np.where(delta == 0, 0.0, delta / np.sqrt(stored))
        excess = np.where(seen == stored, 0.0, (seen - stored) / stored)
        log_ratio = np.where(np.abs(excess) < 0.5, np.log1p(excess), np.log(seen) - np.log(stored))  # each exact there
        divergence = kullback_leibler(shift, log_ratio)
    divergence = np.where(np.isnan(divergence), np.inf, divergence)  # infinity less infinity, far away all the same
    return Residual(*(np.where(usable, values, np.inf) for values in (shift, log_ratio, divergence)))
