"""Mean and variance of an activation of a normal variable: X ~ N(mean, std²), what is E[f(X)], Var[f(X)]?

Piecewise polynomials (ReLU, clip, hard-swish, ...), exponentials and waves have closed forms. What is smooth on each
side of zero is integrated with Gauss and Legendre's nodes, spaced finely near zero, where such functions bend, and ever
wider further out, where they are all but straight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

ROOT_2 = math.sqrt(2)
PEAK = 1 / math.sqrt(2 * math.pi)
"""The density of a standard normal variable at zero."""

_complement = np.frompyfunc(math.erfc, 1, 1)


def pdf(z: ArrayLike) -> Array:
    """The density of a standard normal variable."""
    z = np.asarray(z, np.float64)
    with np.errstate(under="ignore", over="ignore"):
        return np.asarray(PEAK * np.exp(-0.5 * z * z))


def cdf(z: ArrayLike) -> Array:
    """P(Z <= z) of a standard normal variable, to rounding in both tails: erfc(-z / √2) / 2."""
    return np.asarray(0.5 * np.asarray(_complement(np.asarray(z, np.float64) / -ROOT_2), np.float64))


def probability_above(threshold: float, mean: ArrayLike, std: ArrayLike) -> Array:
    """P(X > threshold) for X ~ N(mean, std²), to rounding however small it is; 0 or 1 where std is 0."""
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = cdf((mean - threshold) / std)
    return np.where(std > 0, share, np.where(np.isnan(mean + std), np.nan, mean > threshold))


def moments_after(
    name: str,
    mean: ArrayLike,
    std: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[Array, Array] | None:
    """Mean and variance of the activation of X ~ N(mean, std²), elementwise; None where it is not known.

    name, alpha, low and high are those of `flow.graph.Op.ACTIVATION`; alpha is a slope, a limit or a scale, as the
    activation has it, and may be an array. Without alpha: 1 for elu, celu, silu and softplus (there it is torch's
    beta), 0.5 for hardshrink and softshrink, 1/6 for hardsigmoid; leaky_relu, prelu and thresholded_relu need it.
    Where std is 0 this is f(mean) and 0. Within 1e-6 of the truth, or of its size where that is above one; infinite
    where an exponential leaves the range of float64.
    """
    mean, std = np.broadcast_arrays(np.asarray(mean, np.float64), np.asarray(std, np.float64))
    if name in DEFAULTS and alpha is None:
        alpha = DEFAULTS[name]
    if alpha is None and name in NEED_ALPHA:
        return None
    parameter = None if alpha is None else np.asarray(alpha, np.float64)
    if parameter is not None and name in POSITIVE_ALPHA and not (parameter > 0).all():
        return None
    with np.errstate(all="ignore"):
        if name in WAVES:
            return WAVES[name](mean, std)
        if name in SMOOTH:
            if parameter is None:
                return _integrated(SMOOTH[name], mean, std)
            if name == "elu":
                return _integrated(_elu, mean, std, parameter)
            # f(x) = scale * f1(x / scale)
            scale = parameter if name == "celu" else 1 / parameter
            center, variance = _integrated(SMOOTH[name], mean / scale, std / np.abs(scale))
            return scale * center, scale**2 * variance
        pieces = _pieces(name, parameter, low, high)
        return None if pieces is None else _piecewise(pieces, mean, std)


DEFAULTS = {
    "elu": 1.0,
    "celu": 1.0,
    "silu": 1.0,
    "softplus": 1.0,
    "hardshrink": 0.5,
    "softshrink": 0.5,
    "hardsigmoid": 1 / 6,
}
"""What alpha is where it is not given: torch's defaults, those of ONNX's operators where they have the parameter. The
exception is ONNX's HardSigmoid: 0.2."""

POSITIVE_ALPHA = {"celu", "silu", "softplus", "hardshrink", "softshrink", "hardsigmoid"}

NEED_ALPHA = {"leaky_relu", "prelu", "thresholded_relu"}


# exponentials and waves


def _exponential(mean: Array, std: Array) -> tuple[Array, Array]:
    """The log-normal distribution: exp(mean + std²/2), exp(2 mean + std²) (exp(std²) - 1)."""
    square = std**2
    return np.exp(mean + square / 2), np.exp(2 * (mean + square) + np.log(-np.expm1(-square)))


def _power_of_two(mean: Array, std: Array) -> tuple[Array, Array]:
    return _exponential(mean * math.log(2), std * math.log(2))


def _exponential_less_one(mean: Array, std: Array) -> tuple[Array, Array]:
    return np.expm1(mean + std**2 / 2), _exponential(mean, std)[1]


def _sine(mean: Array, std: Array) -> tuple[Array, Array]:
    """From the characteristic function: exp(-std²/2) sin(mean), (1 - q) (1 + q cos(2 mean)) / 2 with q = exp(-std²)."""
    q = np.exp(-(std**2))
    return np.exp(-(std**2) / 2) * np.sin(mean), -np.expm1(-(std**2)) * (1 + q * np.cos(2 * mean)) / 2


def _cosine(mean: Array, std: Array) -> tuple[Array, Array]:
    return _sine(mean + math.pi / 2, std)


WAVES: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "exp": _exponential,
    "exp2": _power_of_two,
    "expm1": _exponential_less_one,
    "sin": _sine,
    "cos": _cosine,
}


# piecewise polynomials


class Piece(NamedTuple):
    """f(x) = c0 + c1 x + c2 x² up to and with `end`, from where the piece before ends."""

    end: float | Array
    coefficients: tuple[float | Array, float | Array, float | Array]


ZERO = (0.0, 0.0, 0.0)
SAME = (0.0, 1.0, 0.0)


def _pieces(name: str, alpha: Array | None, low: float, high: float) -> list[Piece] | None:
    """The pieces from the left; None where the activation is no piecewise polynomial."""
    infinity = math.inf
    if name == "relu":
        return [Piece(0.0, ZERO), Piece(infinity, SAME)]
    if name in ("relu6", "clip"):
        low, high = (0.0, 6.0) if name == "relu6" else (min(low, high), high)
        found = [Piece(low, (low, 0.0, 0.0))] if low > -infinity else []
        found.append(Piece(high, SAME))
        return [*found, Piece(infinity, (high, 0.0, 0.0))] if high < infinity else found
    if name == "abs":
        return [Piece(0.0, (0.0, -1.0, 0.0)), Piece(infinity, SAME)]
    if name == "hardswish":  # x * relu6(x + 3) / 6
        return [Piece(-3.0, ZERO), Piece(3.0, (0.0, 0.5, 1 / 6)), Piece(infinity, SAME)]
    if alpha is None:
        return None
    if name in ("leaky_relu", "prelu"):
        return [Piece(0.0, (0.0, alpha, 0.0)), Piece(infinity, SAME)]
    if name == "hardsigmoid":  # alpha * x + 0.5 within 0 and 1
        reach = 0.5 / alpha
        return [Piece(-reach, ZERO), Piece(reach, (0.5, alpha, 0.0)), Piece(infinity, (1.0, 0.0, 0.0))]
    if name == "thresholded_relu":
        return [Piece(alpha, ZERO), Piece(infinity, SAME)]
    if name == "hardshrink":
        return [Piece(np.nextafter(-alpha, -infinity), SAME), Piece(alpha, ZERO), Piece(infinity, SAME)]
    if name == "softshrink":
        return [Piece(-alpha, (alpha, 1.0, 0.0)), Piece(alpha, ZERO), Piece(infinity, (-alpha, 1.0, 0.0))]
    return None


FAR = 40.0
"""Standard deviations beyond which float64 holds no density."""


def _piecewise(pieces: Sequence[Piece], mean: Array, std: Array) -> tuple[Array, Array]:
    """Sum over the pieces of the partial moments of Z = (X - mean) / std: with T_k the integral of z^k pdf(z) from a
    to b, T_k = (k - 1) T_(k-2) + a^(k-1) pdf(a) - b^(k-1) pdf(b) (integration by parts)."""
    known = std > 0
    scale = np.where(known, std, 1.0)
    parts: list[tuple[list[Array], tuple[Array, ...]]] = []
    start = np.full(mean.shape, -FAR)
    for end, (c0, c1, c2) in pieces:
        # Where std is 0, one piece has all of it.
        reach = np.where(known, (end - mean) / scale, np.where(mean <= end, FAR, -FAR))
        stop = np.clip(reach, -FAR, FAR)
        around = (c0 + (c1 + c2 * mean) * mean, (c1 + 2 * c2 * mean) * std, c2 * std**2)
        parts.append((_partial(start, stop), tuple(np.asarray(c, np.float64) for c in around)))
        start = stop
    center = sum((c0 * t[0] + c1 * t[1] + c2 * t[2] for t, (c0, c1, c2) in parts), np.zeros(()))
    variance = np.zeros(())
    for t, (c0, c1, c2) in parts:
        off = c0 - center
        ends = off**2 * t[0] + 2 * off * c1 * t[1]
        variance = variance + ends + (c1**2 + 2 * off * c2) * t[2] + 2 * c1 * c2 * t[3] + c2**2 * t[4]
    return center, np.where(known, np.maximum(variance, 0.0), np.where(np.isnan(center + std), np.nan, 0.0))


def _partial(a: Array, b: Array) -> list[Array]:
    """T_0 to T_4 between a and b."""
    right = (a > 0) & (b > 0)  # in the right tail both are near one: their distance is that of the mirrored ones
    moments = [np.where(right, cdf(-a) - cdf(-b), cdf(b) - cdf(a))]
    at_a, at_b = pdf(a), pdf(b)
    moments.append(at_a - at_b)
    for k in (2, 3, 4):
        at_a, at_b = at_a * a, at_b * b
        moments.append((k - 1) * moments[k - 2] + at_a - at_b)
    return moments


# what is smooth on each side of zero


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def _mish(x: Array) -> Array:
    """x tanh(softplus(x)); with e = exp(-|x|), tanh(ln(1 + exp(x))) is (1 + 2e) / (1 + 2e + 2e²) on the right and
    (2e + e²) / (2 + 2e + e²) on the left."""
    e = np.exp(-np.abs(x))
    right = x > 0
    over = np.where(right, 1 + 2 * e, e * (2 + e))
    return np.asarray(x * over / np.where(right, over + 2 * e * e, over + 2))


STEP = 1 / 256
_grid = np.arange(0, 6.5, STEP)
_erf_at = np.array([math.erf(x) for x in _grid])
_slope_at = 2 / math.sqrt(math.pi) * np.exp(-(_grid**2))


def _erf(x: Array) -> Array:
    """Taylor's series of third order from the nearest point of a table, to 1e-11. numpy has no erf of its own."""
    size = np.fmin(np.abs(x), _grid[-1])
    place = (size * (1 / STEP) + 0.5).astype(np.intp)
    near = place * STEP
    d = size - near
    series = d * (1 - d * (near - d * (near * near * (2 / 3) - 1 / 3)))
    found: Array = np.copysign(_erf_at.take(place) + _slope_at.take(place) * series, x)
    return found


def _gelu(x: Array) -> Array:
    """x cdf(x) (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + _erf(x / ROOT_2))


def _gelu_tanh(x: Array) -> Array:
    """Its approximation, from the same paper."""
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))))


def _elu(x: Array, alpha: ArrayLike = 1.0) -> Array:
    """Clevert, Unterthiner and Hochreiter 2015."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


def _selu(x: Array) -> Array:
    """Klambauer, Unterthiner, Mayr and Hochreiter 2017."""
    return 1.0507009873554804934193349852946 * _elu(x, 1.6732632423543772848170429916717)


SMOOTH: dict[str, Function] = {
    "sigmoid": _sigmoid,
    "log_sigmoid": lambda x: -_softplus(-x),
    "tanh": np.tanh,
    "tanhshrink": lambda x: x - np.tanh(x),
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "elu": _elu,
    "celu": _elu,
    "selu": _selu,
    "softplus": _softplus,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "mish": _mish,
    "erf": _erf,
    "erfc": lambda x: 1 - _erf(x),
}

WINDOW = 7.5
"""Standard deviations to each side of the mean that are integrated: 1e-13 lies outside."""
NODES = 40
SHORT = 1e-6
"""Below this exp(t) - 1 is t + t²/2 to 1e-12, and would lose digits as it stands."""
AT_ONCE = 64
"""Channels that are integrated together: small arrays, which stay in the cache, are several times as fast."""


@cache
def _nodes() -> tuple[Array, Array]:
    """Gauss and Legendre's places and weights between 0 and 1."""
    places, weights = np.polynomial.legendre.leggauss(NODES)
    return (places + 1) / 2, weights / 2


def _integrated(f: Callable[..., Array], mean: Array, std: Array, *parameters: Array) -> tuple[Array, Array]:
    """By quadrature on each side of zero. Taken about f(mean): for monotone f this is the median of f(X), and no mean
    is further than a standard deviation from the median, so the squares lose nothing that counts."""
    mean, std, *arrays = np.broadcast_arrays(mean, std, *parameters)
    shape = mean.shape
    flat, spread, *arrays = (np.ascontiguousarray(array).reshape(-1) for array in (mean, std, *arrays))
    if not spread.any():
        value = np.where(np.isnan(flat), np.nan, f(flat, *arrays)).reshape(shape)
        return value, np.where(np.isnan(value), np.nan, 0.0)
    center, variance = np.empty(flat.size), np.empty(flat.size)
    for first in range(0, flat.size, AT_ONCE):
        chunk = slice(first, first + AT_ONCE)
        own = [array[chunk] for array in arrays]
        reference = f(flat[chunk], *own)
        first_moment, second_moment = np.zeros(reference.size), np.zeros(reference.size)
        for side in (1.0, -1.0):
            _add_side(f, side, flat[chunk], spread[chunk], own, reference, first_moment, second_moment)
        reference[~np.isfinite(flat[chunk] + spread[chunk])] = np.nan
        center[chunk] = reference + first_moment
        variance[chunk] = np.maximum(second_moment - first_moment**2, 0.0) + 0 * reference
    return center.reshape(shape), variance.reshape(shape)


def _add_side(
    f: Callable[..., Array],
    side: float,
    mean: Array,
    std: Array,
    parameters: Sequence[Array],
    reference: Array,
    first_moment: Array,
    second_moment: Array,
) -> None:
    """Add E[f(X) - reference] and E[(f(X) - reference)²] over side * X > 0.

    The variable is t of side * X = least + scale * (exp(t) - 1). With scale = 1 + least a function that bends near
    zero, within about one, and is straight further out is smooth in t at every size of std, and so is the density.
    Where zero lies in its tail, scale is larger: less is to be seen there, more around the mean."""
    start = np.maximum(-side * mean / std, -WINDOW)
    here = np.flatnonzero((start < WINDOW) & (std > 0))
    if not here.size:
        return
    mean, std, start = side * mean[here, None], std[here, None], start[here, None]
    least = np.maximum(mean + std * start, 0.0)
    scale = 1 + least + (np.maximum(-start - 2, 0.0) / 4) ** 2 * std
    length = np.log1p(std * (WINDOW - start) / scale)
    places, weights = _nodes()
    grown = np.exp(length * places) - 1
    short = length[:, 0] < SHORT
    grown[short] = length[short] * places * (1 + 0.5 * length[short] * places)
    distance = scale * grown
    z = start + distance / std
    share = (length * scale / std * PEAK) * weights * (1 + grown) * np.exp(-0.5 * z * z)
    off = f(side * (least + distance), *(p[here, None] for p in parameters)) - reference[here, None]
    share *= off
    first_moment[here] += share.sum(1)
    share *= off
    second_moment[here] += share.sum(1)
