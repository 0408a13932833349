"""Count, mean and sum of squared deviations per channel. They add: any split of the data gives the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Moments:
    """The first two moments of the values of each channel, in float64."""

    count: int
    """Values per channel, the same for all channels."""
    mean: NDArray[np.float64]
    """Shape (channels,)."""
    m2: NDArray[np.float64]
    """Sum of (x - mean)^2 over the values of a channel, shape (channels,)."""

    @classmethod
    def of(cls, values: NDArray[Any], axis: int = 1) -> Moments:
        """Those of an array whose channels lie along `axis`, by two passes in float64.

        >>> Moments.of(np.array([[1.0, 10.0], [3.0, 10.0]]))
        Moments(count=2, mean=array([ 2., 10.]), m2=array([2., 0.]))
        """
        wide = np.asarray(values, dtype=np.float64)
        if wide.ndim != 2 or axis != 1:
            wide = np.moveaxis(wide, axis, -1).reshape(-1, values.shape[axis])
        mean = wide.mean(axis=0)
        centred = wide - mean
        return cls(len(wide), mean, np.einsum("nc,nc->c", centred, centred))

    @classmethod
    def none(cls, channels: int) -> Moments:
        """Those of no values at all: what sums start from."""
        return cls(0, np.zeros(channels), np.zeros(channels))

    def __add__(self, other: Moments) -> Moments:
        """Of both sets of values together (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm
        for computing sample variances", formula 2.1)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return other if other.count else self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + np.square(delta) * (self.count * other.count / count)
        return Moments(count, mean, m2)

    def variance(self, ddof: int = 0) -> NDArray[np.float64]:
        """m2 / (count - ddof): ddof 0 is the variance of these values, 1 the unbiased estimate of where they are
        from, which torch stores in running_var. NaN where there are too few values."""
        if self.count <= ddof:
            return np.full_like(self.m2, np.nan)
        return self.m2 / (self.count - ddof)


def merged(parts: Iterable[Moments]) -> Moments:
    """All of them together, added in the order given, so that the same parts give the same bits."""
    return reduce(Moments.__add__, parts)


def divergence(
    moments: Moments, mean: NDArray[np.float64], var: NDArray[np.float64], eps: float = 0.0
) -> NDArray[np.float64]:
    """KL(N(data) || N(mean, var)) of each channel in nats: 1/2 [ln(v/u) + (u + (m - mean)^2)/v - 1], where m, u are
    the data's and v is var; eps is added to both variances. NaN where a variance is not positive."""
    stored, seen = var + eps, moments.variance() + eps
    with np.errstate(all="ignore"):
        value = 0.5 * (np.log(stored / seen) + (seen + np.square(moments.mean - mean)) / stored - 1)
    return np.asarray(np.where((stored > 0) & (seen > 0), value, np.nan))
