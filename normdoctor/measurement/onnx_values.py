"""What is seen of a norm's input, and values that wait on disk until somebody takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.measurement.walks import Look, Seen, Vector
from normdoctor.moments import Moments

FEW = 16
"""A sample's values per channel below which squares are summed over the samples first."""

BLOCK = 4096
"""Values that are summed in their own type at a time; the sums of blocks are added in float64."""

CHUNK = 1 << 17
"""Values that are worked on at a time: what fits a processor's cache is read from memory once."""

MANY = 128
"""Samples that are worked on at a time at most."""

MOST = 2 / 3
"""A mean whose square is above this share of the mean square lies more than 1.4 standard deviations from 0."""


@dataclass(frozen=True, eq=False)
class Affine:
    """What makes a norm's output of its normalised input."""

    gain: Vector
    shift: Vector
    eps: float


def seen(x: NDArray[Any]) -> tuple[Moments, Vector]:
    """Moments of the channels (axis 1) of a norm's input, and the mean of each row, shape (rows, channels).

    Rows are those of axis 0. Where means are large against standard deviations values are centred before they are
    squared, so that nothing cancels. Blocks of values are summed in their own type (float16 in float32)."""
    values = x.reshape(*x.shape[:2], -1)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32)
    with np.errstate(all="ignore"):
        if values.shape[2] == 1:
            wide = values[:, :, 0].astype(np.float64)
            return Moments.of(wide), wide
        moments, means = _seen(values)
        if values.dtype == np.float32 and not (np.isfinite(moments.mean) & np.isfinite(moments.m2)).all():
            return _seen(values.astype(np.float64))  # out of the range of float32, perhaps
    return moments, means


def _seen(values: NDArray[Any]) -> tuple[Moments, Vector]:
    rows, channels, each = values.shape
    count = rows * each
    # The first row tells mostly which channels must be centred.
    sums, squares = _sums(values[:1], None)
    base = _centre(sums[0] / each, squares / each).astype(values.dtype)
    sums, squares = _sums(values, base if base.any() else None)
    delta, square = sums.sum(axis=0) / count, squares / count
    mean, means, variance = base + delta, base + sums / each, square - np.square(delta)
    off = np.flatnonzero(_centre(delta, square))
    if off.size:
        base = mean[off].astype(values.dtype)
        sums, squares = _sums(values if off.size == channels else values[:, off], base)
        delta = sums.sum(axis=0) / count
        mean[off], means[:, off] = base + delta, base + sums / each
        variance[off] = squares / count - np.square(delta)
    return Moments(count, mean, np.maximum(variance, 0.0) * count), means


def _centre(mean: Vector, square: Vector) -> Vector:
    """What to take from the values: their mean where its square is most of the mean square, so that the difference
    of these two would be inexact; else 0."""
    return np.where(np.square(mean) > MOST * square, mean, 0.0)


def _sums(values: NDArray[Any], base: NDArray[Any] | None) -> tuple[Vector, Vector]:
    """Sums of values - base, shape (rows, channels), and of their squares, shape (channels,)."""
    rows, channels, each = values.shape
    blocks, length = _blocks(each)
    ones = np.ones(length, values.dtype)
    sums, squares = np.empty((rows, channels)), np.zeros(channels)
    step = max(1, min(MANY, rows, CHUNK // (channels * each)))
    centred = None if base is None else np.empty((step, channels, each), values.dtype)
    for begin in range(0, rows, step):
        part = values[begin : begin + step]
        if base is not None and centred is not None:
            part = np.subtract(part, base[:, None], out=centred[: len(part)])
        count = len(part)
        flat = part.reshape(-1, length)
        of_blocks = flat @ ones if length > 1 else flat
        sums[begin : begin + step] = of_blocks.reshape(count, channels, blocks).sum(axis=2, dtype=np.float64)
        if each < FEW:
            flat = part.reshape(count, -1)
            squares += np.einsum("nk,nk->k", flat, flat).reshape(channels, each).sum(axis=1, dtype=np.float64)
        else:
            of_blocks = np.einsum("ns,ns->n", flat, flat)
            squares += of_blocks.reshape(count, channels, blocks).sum(axis=(0, 2), dtype=np.float64)
    return sums, squares


def _blocks(each: int) -> tuple[int, int]:
    """How many blocks of how many values these many values are cut into."""
    for blocks in range(1, min(each, 1000) + 1):
        if each % blocks == 0 and each // blocks <= BLOCK:
            return blocks, each // blocks
    return 1, each


def of_samples(means: Vector, samples: int) -> Vector | None:
    """The means of samples out of those of rows, where a sample is one row or some that follow each other."""
    rows, channels = means.shape
    return None if rows % samples else np.asarray(means.reshape(samples, -1, channels).mean(axis=1))


def active(x: NDArray[Any], mean: Vector, var: Vector, affine: Affine) -> Vector:
    """Share of values that leave the norm above 0, by channel; NaN where the statistics are no numbers."""
    gain, shift = affine.gain, affine.shift
    with np.errstate(all="ignore"):
        # gain * (x - mean) / sd + shift > 0
        edge = mean - shift * np.sqrt(var + affine.eps) / gain
    count = x.size // x.shape[1]
    axes = (0, *range(2, x.ndim))
    share = np.where(shift > 0, 1.0, 0.0)
    for channels, above in ((gain > 0, True), (gain < 0, False)):
        if channels.any():
            part = x if channels.all() else x[:, channels]
            limit = edge[channels].astype(x.dtype).reshape(-1, *[1] * (x.ndim - 2))
            share[channels] = np.count_nonzero(part > limit if above else part < limit, axis=axes) / count
    return np.where(np.isnan(edge) & (gain != 0), np.nan, share)


def look_at(x: NDArray[Any], samples: int, look: Look, mean: Vector, var: Vector, affine: Affine) -> Seen:
    """What was asked for of the input of a norm with these statistics."""
    moments, rows = seen(x)
    return Seen(
        moments=moments,
        sample_means=of_samples(rows, samples) if look.samples else None,
        active=active(x, mean, var, affine) if look.active else None,
    )


class Shelf:
    """Arrays in files of a folder, each read whole when it is wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def put(self, array: NDArray[Any]) -> Shelved:
        self._count += 1
        path = self.folder / f"{self._count}.values"
        np.ascontiguousarray(array).tofile(path)
        return Shelved(path, array.shape, array.dtype)


@dataclass(frozen=True, eq=False)
class Shelved:
    """An array in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> NDArray[Any]:
        # By way of bytes: numpy knows no text for the types of ml_dtypes.
        return np.fromfile(self.path, dtype=np.uint8).view(self.dtype).reshape(self.shape)

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
