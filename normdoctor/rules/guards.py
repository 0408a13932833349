"""What keeps a rule from saying too much: small layers, silent channels, frozen layers, exported graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Observation, Severity
from normdoctor.layers import Mask, NormKind, NormLayer, Vector, median
from normdoctor.rules.wording import some_of, where

FEW = 8
"""Below this many channels a layer says nothing about a distribution."""

ENOUGH = 16
"""From this many on it does; between the two a finding is a hint."""

SWITCHED_OFF = 1e-3
"""A gain below this passes on next to nothing, whatever the others are."""

TOKEN_KINDS = (NormKind.LAYER, NormKind.RMS, NormKind.LAYER_OR_RMS)
"""Norms over the features of a token; a GroupNorm that could be a LayerNorm is left to the other rules."""

OPERATORS = ("ai.onnx", "com.microsoft", "torch.ops.aten", "aten::")


def for_size(channels: int, severity: Severity) -> Severity | None:
    """`severity` as far as a statement about the distribution of `channels` values can carry it.

    None under 8 channels, info at most under 16."""
    if channels < FEW:
        return None
    return severity if channels >= ENOUGH else Severity.INFO


def operator(layer: NormLayer) -> bool:
    """The layer is an operator of a graph without modules (ONNX): it has no counter and no class."""
    origin = layer.origin or ""
    return origin.startswith(OPERATORS) or ("." not in origin and origin.endswith("Normalization"))


def exported(layer: NormLayer) -> bool:
    """The layer's mode is that of a recorded graph, ONNX, exported or traced: nobody can call eval() on it."""
    return operator(layer) or layer.baked


def frozen(layer: NormLayer) -> bool:
    """Somebody chose that this layer stands still: no gradient, or a FrozenBatchNorm class."""
    return layer.requires_grad is False or frozen_class(layer)


def frozen_class(layer: NormLayer) -> bool:
    """The class itself cannot learn and, unlike torch's own, has no update counter (FrozenBatchNorm2d)."""
    return "Frozen" in (layer.origin or "")


def usable_eps(layer: NormLayer) -> float | None:
    """eps, or None where the file does not say or says nonsense (which is C305's to tell)."""
    eps = layer.eps
    return float(eps) if eps is not None and 0 <= eps < math.inf else None


def in_use(layer: NormLayer) -> Mask:
    """Channels that have an input and are not switched off: what a ratio may be compared with.

    A slimmed network has most of its gains at 1e-9; their median is no yardstick for the rest."""
    size = np.abs(layer.numbers.gain)
    known = layer.numbers.live & np.isfinite(size)
    used = known & (size >= SWITCHED_OFF)
    return used if used.any() else known & (size > 0)


def typical_gain(layer: NormLayer) -> float:
    """Median |gamma| of the channels in use; 0 where there are none."""
    return median(np.abs(layer.numbers.gain[in_use(layer)]))


def switched_on(layer: NormLayer, of_median: float) -> Mask:
    """Channels with an input whose gain is not switched off (A202): above 0.001 and `of_median` of a typical one."""
    size = np.abs(layer.numbers.gain)
    bar = max(SWITCHED_OFF, of_median * typical_gain(layer))
    return np.asarray(layer.numbers.live & np.isfinite(size) & (size >= bar))


def carries_signal(layer: NormLayer, eps: float, share: float) -> Mask:
    """Channels whose output varies: s.d. |gamma| * sqrt(v / (v + eps)) above `share` of a typical gain.

    A huge factor gamma / sqrt(v + eps) on an input that never changes multiplies nothing: published models
    are full of such channels."""
    var = layer.numbers.var
    assert var is not None
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        swing = np.abs(layer.numbers.gain) * np.sqrt(var / (var + eps))
    return np.asarray(swing > share * typical_gain(layer))


def distance(layer: NormLayer) -> Vector:
    """|mean| in standard deviations of the channel; 0 for channels without signal or with broken numbers.

    eps counts only where the file says it, so nothing here is assumed."""
    mean, var, live = layer.numbers.mean, layer.numbers.var, layer.numbers.live
    assert mean is not None and var is not None
    good = live & np.isfinite(mean)
    eps = usable_eps(layer) or 0.0
    if good.all():
        return np.asarray(np.abs(mean) / np.sqrt(var + eps))
    result = np.zeros(len(var))
    result[good] = np.abs(mean[good]) / np.sqrt(var[good] + eps)
    return result


def nonfinite(**vectors: Vector) -> Iterator[Observation]:
    """One observation where the named vectors of a layer hold NaN or infinity: how many, and in which channels."""
    bad = ~np.logical_and.reduce([np.isfinite(values) for values in vectors.values()])
    if not bad.any():
        return
    counts = {}
    for name, values in vectors.items():
        counts[f"{name}_nan"] = int(np.isnan(values).sum())
        counts[f"{name}_inf"] = int(np.isinf(values).sum())
    words = [f"{count} {key[-3:].replace('nan', 'NaN')} in {key[:-4]}" for key, count in counts.items() if count]
    channels = where(bad)
    yield Observation(
        message=f"{' and '.join(words)}: {some_of(channels, len(bad))}.",
        channels=channels,
        evidence=counts,
        rank=len(channels) / len(bad),
    )
