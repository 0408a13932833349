"""What a moving average keeps of the value it was created with.

A buffer that starts at 1 and moves by `momentum` towards every batch holds, after t updates,

    (1 - momentum)^t * 1  +  the rest, which comes from the batches.

For a variance that rest is never negative, so (1 - momentum)^t is also the least it can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from normdoctor.layers import Mask, NormLayer, Vector, median

USUAL_MOMENTA = (0.1, 0.01, 0.03, 0.001, 0.003, 0.05, 0.02, 0.2, 0.3, 0.0003)
"""Momenta that people write, commonest first: tried where the file names none."""

SMALLEST_STEP: Mapping[str, float] = {"float32": 2.0**-149, "float64": 2.0**-1074}
"""The smallest number above 0 of each type that an average is usually kept in."""

SMALLEST_NORMAL = 2.0**-126
"""Below this float32 has fewer digits and a decay no longer follows (1 - momentum)^t."""


def plain_momentum(layer: NormLayer) -> float | None:
    """The layer's momentum if it is a number that moves and forgets (0 < momentum < 1), else None."""
    momentum = layer.momentum
    if momentum is None or isinstance(momentum, str) or not 0 < momentum < 1:
        return None
    return float(momentum)


def residue(momentum: float, updates: float) -> float:
    """(1 - momentum)^updates: the share of the initial value that is left.

    >>> round(residue(0.001, 216), 2)
    0.81
    """
    return math.exp(updates * math.log1p(-momentum))


def floors(momentum: float) -> tuple[int, ...]:
    """Where a decay by 1 - momentum stops, in steps of the smallest number: k rounds back to k.

    Almost always one number; two where k * (1 - momentum) lies halfway and it depends on whether the
    factor was held in single or double precision.

    >>> floors(0.1), floors(0.01), floors(0.05)
    ((4,), (50,), (9, 10))
    """
    return tuple(sorted({_floor(factor, momentum) for factor in _factors(momentum)} - {0}))


def _factors(momentum: float) -> tuple[float, float]:
    """1 - momentum as torch holds it for a float32 buffer, and as it is: after 2,000 updates 1e-5 apart."""
    return float(np.float32(1.0 - momentum)), 1.0 - momentum


def _floor(factor: float, momentum: float) -> int:
    start = int(0.5 / momentum) + 1
    return next((steps for steps in range(start, 0, -1) if round(steps * factor) == steps), 0)


FLOORS: Mapping[int, float] = {steps: momentum for momentum in reversed(USUAL_MOMENTA) for steps in floors(momentum)}
"""Steps of the smallest number → the usual momentum that stops there."""


def started_elsewhere(layer: NormLayer, left: float) -> bool:
    """Some running_var lies below `left`, the share of the initial 1 that must be in it.

    Then the buffers did not start at 1, or the momentum or the counter was changed on the way."""
    var = layer.numbers.var
    assert var is not None
    # 16-bit types round by up to 2^-9; a variance that is exactly the residue must not fall below it.
    exact = layer.running_var is not None and layer.running_var.dtype in SMALLEST_STEP
    stored = var[np.isfinite(var) & (var >= 0)]
    return bool(stored.size) and float(stored.min()) < left * (1 - (1e-3 if exact else 1e-2))


def on_the_floor(layer: NormLayer, var: Vector) -> tuple[Mask, float | None]:
    """Channels at k * (smallest number), where a decay by one of the usual momenta stops, and that momentum."""
    step = SMALLEST_STEP.get(layer.running_var.dtype if layer.running_var else "")
    if step is None or not ((var > 0) & (var < SMALLEST_NORMAL)).any():
        return _none(var)
    own = plain_momentum(layer)
    known = FLOORS if own is None else {**FLOORS, **dict.fromkeys(floors(own), own)}
    with np.errstate(over="ignore"):
        steps = var / step
    mask = np.isin(steps, list(known))
    return mask, known[round(float(steps[mask][0]))] if mask.any() else None


def flushed(layer: NormLayer, var: Vector) -> tuple[Mask, float | None]:
    """Channels at exactly 0. float16 cannot hold anything below 6e-8, so there a 0 proves nothing."""
    if layer.running_var is not None and layer.running_var.dtype == "float16":
        return _none(var)
    return var == 0, None


def left_of_one(layer: NormLayer, var: Vector, *, near: float, near_when_tiny: float) -> tuple[Mask, float | None]:
    """Channels at (1 - momentum)^updates, for the file's momentum or a usual one, and that momentum.

    A live channel must not be taken for one that happens to lie there, so three things are asked for. No
    channel is below (one that started at 1 cannot be). What was added to the residue is next to nothing
    beside what the typical channel added. And the match is close: relative `near` among live variances,
    `near_when_tiny` only where the residue is far below them and rounding had many steps to add up."""
    updates = layer.numbers.updates
    if updates is None or updates < 1 or layer.running_var is None or layer.running_var.dtype not in SMALLEST_STEP:
        return _none(var)
    least = float(var.min())  # NaN or negative: no decay, and the comparison is false
    if not SMALLEST_NORMAL < least < 0.99:
        return _none(var)
    own = plain_momentum(layer)
    for momentum in dict.fromkeys(USUAL_MOMENTA if own is None else (own, *USUAL_MOMENTA)):
        if not 0.99 < residue(momentum, updates) / least < 1.01:
            continue
        middle = median(var)
        for factor in _factors(momentum):
            left = math.exp(updates * math.log(factor))
            off = near_when_tiny * left
            if left > 1e-4 * middle:
                rounding = 2.0**-24 * (1 + math.sqrt(updates)) * left
                added = middle - left
                if added < 1e3 * rounding:
                    return _none(var)  # too early to tell a channel that added nothing from one that did
                off = min(near * left, max(1e-4 * added, rounding))
            if abs(least - left) <= off:
                return np.abs(var - left) <= off, momentum
    return _none(var)


def _none(var: Vector) -> tuple[Mask, None]:
    return np.zeros(len(var), dtype=bool), None
