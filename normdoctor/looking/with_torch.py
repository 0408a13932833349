"""What is seen of a tensor of torch in front of a norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from normdoctor.layers import DEFAULT_EPS, NormKind, NormLayer
from normdoctor.looking import Seen, TokensSeen, Vector
from normdoctor.moments import Moments

CHUNK = 1 << 18
"""Values that are shifted, widened or squared at a time: what fits a processor's cache is read from memory once."""

FEW = 8
"""Up to so many values of a channel in a sample, sums are taken over samples first: rows so short are slow to sum."""

LONG = 256
"""Squares of a row that are added one after the other, as torch's vector_norm does; of more the sum is inexact."""

TOGETHER = 8
"""Samples that are added in the type of the values where rows are short, all others in float64."""

MOST = 8 / 9
"""A mean whose square is above this share of the mean square lies 2.8 standard deviations from 0: their difference
would lose a digit."""

TRIES = 3
"""With a shift taken from rounded values a second one may be needed; a third where all values are the same."""

SAMPLED = 512
"""Points of a norm's curve that are kept of each batch."""

BEND = {False: 1.818, True: 1.517}
"""Where the slope of tanh, and of erf (True), is a tenth of the steepest."""


def seen(x: torch.Tensor, *, samples: bool = True, shift: torch.Tensor | None = None) -> Seen:
    """Moments of each channel (axis 1) of a norm's input, and the mean of each sample where they are asked for.

    shift: near the means, float32 or float64, shape (channels,). It is taken from the values before they are squared;
    where a mean still lies far off, they are gone over again with the means themselves. Sums over a sample, or over
    some of them, are taken in the type of x (float32 for narrower ones), all others in float64."""
    count, channels = x.shape[:2]
    values = x.detach().reshape(count, channels, -1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    each = values.shape[2]
    for _ in range(TRIES):
        total, of_samples = _sums(values, shift, wide, samples)
        delta, square = total / (count * each)
        if not is_off(delta, square):
            break
        near = torch.from_numpy(delta).to(x.device)
        shift = (near if shift is None else shift.double() + near).to(wide)
    m2 = np.maximum(square - delta * delta, 0) * (count * each)
    means = None if of_samples is None else of_samples / each
    if shift is not None:
        base = _float64(shift)
        delta, means = base + delta, None if means is None else base + means
    return Seen(Moments(count * each, delta, m2), means)


def is_off(mean: Vector, square: Vector) -> bool:
    """Whether the square of a mean is most of the mean square of some channel, so that their difference is inexact."""
    return bool((mean * mean > MOST * square).any())


def _sums(
    values: torch.Tensor, shift: torch.Tensor | None, wide: torch.dtype, samples: bool
) -> tuple[Vector, Vector | None]:
    """Sums and sums of squares of values - shift, shape (2, channels); and the sums over each sample, if asked for,
    shape (samples, channels)."""
    of_rows = values.shape[2] > FEW
    total, of_samples = [], []
    for part in _parts(values, shift, wide, whole=of_rows):
        if of_rows:
            sums = _float64(part.sum(2))
            of_samples.append(sums)
            total.append((sums.sum(0), _row_squares(part)))
        else:
            total.append((_column_sums(part), _column_sums(part.square())))
            if samples:
                of_samples.append(_float64(_row_sums(part)))
    if len(total) == 1:
        return np.asarray(total[0]), of_samples[0] if samples else None
    return np.sum(total, axis=0), np.concatenate(of_samples) if samples else None


def _parts(
    values: torch.Tensor, shift: torch.Tensor | None, wide: torch.dtype, *, whole: bool
) -> Iterator[torch.Tensor]:
    """values - shift, some samples at a time; all at once where that is (`whole`) no loss and nothing is to be done."""
    samples, channels, each = values.shape
    if shift is None and values.dtype == wide and whole:
        yield values
        return
    step = max(1, CHUNK // (channels * each)) if values.device.type == "cpu" else samples
    centre = None if shift is None else shift.view(1, channels, 1)
    for begin in range(0, samples, step):
        part = values[begin : begin + step].to(wide)
        yield part if centre is None else part - centre


def _column_sums(values: torch.Tensor) -> Vector:
    """The sums of each channel, by way of those over samples."""
    even = len(values) // TOGETHER * TOGETHER
    sums = values[even:].sum(0, dtype=torch.float64)
    if even:
        sums += values[:even].view(-1, TOGETHER, *values.shape[1:]).sum(1).sum(0, dtype=torch.float64)
    return _float64(sums.sum(1))


def _row_squares(values: torch.Tensor) -> Vector:
    """The sums of squares of each channel, by way of those over rows."""
    samples, channels, length = values.shape
    while length > LONG and length % 2 == 0:
        length //= 2
    if length > LONG:
        return _float64(values.square().sum(2).sum(0, dtype=torch.float64))
    norms = _float64(torch.linalg.vector_norm(values.view(samples, channels, -1, length), dim=3))
    return np.asarray(np.einsum("ncp,ncp->c", norms, norms))


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """The sums over the last axis, which is short: faster column by column."""
    first, *others = values.unbind(2)
    for other in others:
        first = first + other
    return first


def _float64(tensor: torch.Tensor) -> Vector:
    return tensor.double().cpu().numpy()


def active(x: torch.Tensor, norm: nn.Module) -> Vector:
    """Share of values above 0 behind the norm in eval mode, shape (channels,)."""
    y = norm.forward(x)  # not norm(x), which would stop here again
    return _float64((y > 0).transpose(0, 1).reshape(x.shape[1], -1).float().mean(1))


def look_at(module: nn.Module, layer: NormLayer) -> Callable[[torch.Tensor], Seen]:
    """What looks at the input of a norm without statistics."""
    if layer.kind is NormKind.DYNAMIC_TANH:
        alpha = float(layer.alpha.numpy().reshape(-1)[0]) if layer.alpha is not None else 1.0
        shift = None if layer.inner_shift is None else float(layer.inner_shift.numpy().reshape(-1)[0])
        bend = BEND[shift is not None]

        def bent(x: torch.Tensor) -> Seen:
            values = x.detach().float().reshape(1, 1, -1)
            beyond = int(((alpha * values + (shift or 0.0)).abs() > bend).sum())
            return Seen(seen(values, samples=False).moments, tokens=TokensSeen(values.numel(), saturated=beyond))

        return bent
    shape = getattr(module, "normalized_shape", None) or (layer.weight.shape if layer.weight is not None else None)
    rank = len(shape) if shape is not None else 1
    eps = layer.eps if layer.eps is not None else DEFAULT_EPS
    centred = layer.kind is NormKind.LAYER

    def starved(x: torch.Tensor) -> Seen:
        rows = x.detach().float().flatten(-rank).reshape(-1, x.shape[-rank:].numel())
        mean = rows.mean(1, keepdim=True) if centred else torch.zeros(1)
        spread = (rows - mean).square().mean(1, keepdim=True)
        made = (rows - mean) * torch.rsqrt(spread + eps)
        points = torch.stack([rows.reshape(-1), made.reshape(-1)], 1)
        points = points[:: max(1, len(points) // SAMPLED)][:SAMPLED]
        tokens = TokensSeen(len(rows), starved=int((spread < eps).sum()), points=_float64(points))
        return Seen(seen(rows.reshape(1, 1, -1), samples=False).moments, tokens=tokens)

    return starved
