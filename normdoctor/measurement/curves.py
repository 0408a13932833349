"""Whether what a norm does to its values is a straight line, or bent like tanh."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ALPHAS = np.geomspace(1e-2, 10.0, 61)
"""Tried as alpha * s.d. of the inputs."""


class Curves(NamedTuple):
    """How well two shapes fit: R^2, the share of the variance of the outputs that they explain."""

    tanh: float
    linear: float
    alpha: float
    """Of the best g * tanh(alpha * x)."""


def fit_curves(points: NDArray[np.float64]) -> Curves:
    """The best g * tanh(alpha * x) and the best g * x. points: shape (n, 2), inputs and outputs.

    >>> x = np.linspace(-3, 3, 101)
    >>> curves = fit_curves(np.stack([x, 2 * np.tanh(0.7 * x)], 1))
    >>> curves.tanh > 0.999 > curves.linear + 0.03, abs(curves.alpha - 0.7) < 0.05
    (True, True)
    """
    x, y = points[np.isfinite(points).all(axis=1)].T
    spread = float(x.std()) if x.size else 0.0
    total = float(np.square(y - y.mean()).sum()) if y.size else 0.0
    if spread == 0 or total == 0:
        return Curves(float("nan"), float("nan"), float("nan"))

    def explained(shape: NDArray[np.float64]) -> float:
        gain = float(shape @ y) / float(shape @ shape)
        return 1 - float(np.square(y - gain * shape).sum()) / total

    fits = [explained(np.tanh(alpha / spread * x)) for alpha in ALPHAS]
    best = int(np.argmax(fits))
    return Curves(fits[best], explained(x), float(ALPHAS[best]) / spread)
