"""One norm on two sides → how far its statistics, its affine part and its counter went."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from normdoctor.compared import LayerChange, Motion
from normdoctor.comparing.matching import Pair
from normdoctor.comparing.weights import tolerance
from normdoctor.layers import DEFAULT_EPS, ArrayRef, Mask, NormLayer, Vector, median
from normdoctor.rules.divergence import kullback_leibler
from normdoctor.rules.guards import SWITCHED_OFF, usable_eps
from normdoctor.rules.verdict import quantile

WORST = 5
SMALLEST_HALF = 1e-7
"""Below this float16 has no steps left: a variance may become anything from 0 on."""


def layer_change(pair: Pair, eps: float | None = None) -> LayerChange:
    """How the norm changed. eps: stands in where a side does not say it."""
    old, new = pair.earlier, pair.later
    statistics, apart, broken, broken_on = None, None, 0, (0, 0)
    has_statistics = (_has_statistics(old), _has_statistics(new))
    if all(has_statistics):
        statistics = _statistics_motion(old, new)
        apart, broken, broken_on = _divergences(old, new, eps)
    by_eps = _gain_by_eps(old, new)
    both_affine = old.weight is not None and new.weight is not None
    return LayerChange(
        layer=new.name,
        other=old.name,
        matched=pair.matched,
        kind=new.kind.value,
        channels=new.channels,
        statistics=statistics,
        affine=_affine_motion(old, new) if both_affine else None,
        divergence=None if apart is None else median(apart.divergence),
        divergence_p95=None if apart is None else quantile(apart.divergence, 0.95),
        shift=None if apart is None else median(apart.z),
        shift_p95=None if apart is None else quantile(apart.z, 0.95),
        log_ratio=None if apart is None else median(apart.log_ratio),
        log_ratio_p95=None if apart is None else quantile(np.abs(apart.log_ratio), 0.95),
        gamma=_relative(new.numbers.gain - old.numbers.gain, old.numbers.gain) if both_affine else None,
        beta=_relative(new.numbers.shift - old.numbers.shift, np.concatenate([old.numbers.gain, old.numbers.shift]))
        if old.bias is not None and new.bias is not None
        else None,
        updates=(old.numbers.updates, new.numbers.updates),
        eps=(old.eps, new.eps),
        momentum=(old.momentum, new.momentum),
        gain_by_eps=None if by_eps is None else median(by_eps),
        gain_by_eps_worst=None if by_eps is None else float(by_eps[np.abs(by_eps).argmax()]),
        as_created=(old.numbers.default_statistics, new.numbers.default_statistics),
        broken=broken,
        broken_on=broken_on,
        reordered=statistics is Motion.MOVED and _reordered(old, new),
        has_statistics=has_statistics,
        worst=() if apart is None else tuple(map(int, apart.channels[np.argsort(-apart.divergence)[:WORST]])),
    )


class _Apart:
    """Distances in the channels that are compared."""

    def __init__(self, channels: NDArray[np.intp], z: Vector, log_ratio: Vector) -> None:
        self.channels, self.z, self.log_ratio = channels, z, log_ratio
        self.divergence = kullback_leibler(z, log_ratio)


def _has_statistics(layer: NormLayer) -> bool:
    return layer.numbers.mean is not None and layer.numbers.var is not None


def _divergences(old: NormLayer, new: NormLayer, given: float | None) -> tuple[_Apart | None, int, tuple[int, int]]:
    """The later statistics against the earlier, and how many channels have none that could be compared: in all, and
    on each side."""
    mean, var, later_mean, later_var = old.numbers.mean, old.numbers.var, new.numbers.mean, new.numbers.var
    assert mean is not None and var is not None and later_mean is not None and later_var is not None
    before, after = (usable_eps(layer) or given or DEFAULT_EPS for layer in (old, new))
    eps = max(before, after)
    with np.errstate(invalid="ignore"):
        sound_on = [np.isfinite(m) & np.isfinite(v) & (v >= 0) for m, v in ((mean, var), (later_mean, later_var))]
    sound = sound_on[0] & sound_on[1]
    used = _used(old) | _used(new)
    kept = np.flatnonzero(sound & used & (old.numbers.live | new.numbers.live))
    broken = int((used & ~sound).sum())
    broken_on = (int((used & ~sound_on[0]).sum()), int((used & ~sound_on[1]).sum()))
    if not kept.size:
        return None, broken, broken_on
    with np.errstate(all="ignore"):
        z = np.abs(later_mean[kept] - mean[kept]) / np.sqrt(var[kept] + eps)
        log_ratio = np.log(later_var[kept] + eps) - np.log(var[kept] + eps)
    return _Apart(kept, z, log_ratio), broken, broken_on


def _used(layer: NormLayer) -> Mask:
    """Channels that are not switched off; a slimmed layer has nothing but such channels, and keeps them."""
    size = np.abs(layer.numbers.gain)
    used = np.isfinite(size) & (size >= SWITCHED_OFF)
    return np.asarray(used if used.any() else np.ones(len(size), dtype=bool))


def _statistics_motion(old: NormLayer, new: NormLayer) -> Motion:
    mean, var, later_mean, later_var = old.numbers.mean, old.numbers.var, new.numbers.mean, new.numbers.var
    assert mean is not None and var is not None and later_mean is not None and later_var is not None
    if _same(mean, later_mean) and _same(var, later_var):
        return Motion.EQUAL
    share = tolerance(*_types(old, new, "running_mean", "running_var"))
    with np.errstate(all="ignore"):
        spread = np.sqrt(np.abs(var))
        close = np.abs(later_mean - mean) <= share * (np.abs(mean) + spread) + SMALLEST_HALF * (share > 1e-5)
        close &= np.abs(later_var - var) <= share * np.abs(var) + SMALLEST_HALF * (share > 1e-5)
    return Motion.ROUNDED if close.all() else Motion.MOVED


def _reordered(old: NormLayer, new: NormLayer) -> bool:
    """The same means and the same variances, at other channels."""
    before, after = old.numbers, new.numbers
    assert before.mean is not None and before.var is not None and after.mean is not None and after.var is not None
    return _same(np.sort(before.mean), np.sort(after.mean)) and _same(np.sort(before.var), np.sort(after.var))


def _affine_motion(old: NormLayer, new: NormLayer) -> Motion:
    before, after = old.numbers, new.numbers
    if _same(before.gain, after.gain) and _same(before.shift, after.shift):
        return Motion.EQUAL
    share = tolerance(*_types(old, new, "weight", "bias"))
    with np.errstate(all="ignore"):
        size = np.abs(before.gain) + np.abs(before.shift)
        close = np.abs(after.gain - before.gain) <= share * size + SMALLEST_HALF * (share > 1e-5)
        close &= np.abs(after.shift - before.shift) <= share * size + SMALLEST_HALF * (share > 1e-5)
    return Motion.ROUNDED if close.all() else Motion.MOVED


def _same(before: Vector, after: Vector) -> bool:
    return before.tobytes() == after.tobytes()


def _types(old: NormLayer, new: NormLayer, *names: str) -> list[str]:
    refs: list[ArrayRef | None] = [getattr(layer, name) for layer in (old, new) for name in names]
    return [ref.dtype for ref in refs if ref is not None]


def _relative(difference: Vector, reference: Vector) -> float | None:
    """|difference| / |reference|; None where either is not finite or there is nothing to compare with."""
    with np.errstate(all="ignore"):
        size, length = float(np.linalg.norm(difference)), float(np.linalg.norm(reference))
    if not np.isfinite(size) or not np.isfinite(length):
        return None
    return size / length if length else (None if size else 0.0)


def _gain_by_eps(old: NormLayer, new: NormLayer) -> Vector | None:
    """How much larger or smaller the later layer scales each channel in use because of its eps alone."""
    before, after, var = usable_eps(old), usable_eps(new), new.numbers.var
    if before is None or after is None or var is None:
        return None
    kept = var[new.numbers.live & _used(new)]
    if not kept.size:
        return None
    return np.asarray(np.sqrt((kept + before) / (kept + after)) - 1.0)
