"""The repair that needs no data: take the initial 0 and 1 out of running statistics that still hold them.

After t updates with momentum m a buffer holds q = (1 - m)^t of its initial value and 1 - q of the moving
average of what it saw (the bias correction of Adam, https://arxiv.org/abs/1412.6980, section 3, for buffers
that start at 0 and 1): mean' = mean / (1 - q), var' = (var - q) / (1 - q).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from normdoctor.errors import RefusedError
from normdoctor.layers import TRACKING_KINDS, NormLayer, Vector

NEGLIGIBLE = 1e-4
"""A smaller residue is not worth a change, and a counter is raised to where the residue is below it."""

ENOUGH_DATA = 1e-4
"""Below this share of data in the buffers, float32 rounding is of the size of what is looked for."""

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True, kw_only=True)
class Repair:
    """New buffers of one layer: float64 vectors of `channels` values."""

    layer: NormLayer
    running_mean: Vector
    running_var: Vector
    residue: float
    momentum: float
    updates: int
    counter: int | None
    """What num_batches_tracked becomes, None where it stays or there is none."""


@dataclass(frozen=True, kw_only=True)
class Untouched:
    """A layer left as it is, and why."""

    layer: NormLayer
    reason: str


def plan(
    layers: Iterable[NormLayer], *, momentum: float | None, updates: int | None, keep_counters: bool
) -> tuple[list[Repair], list[Untouched]]:
    """The repairs that debiasing makes, and the layers with buffers that it leaves alone.

    momentum, updates: the user's word where the file is silent (None: no word; nothing is assumed).
    Raises RefusedError where a layer's numbers are not known or contradict the assumption that its buffers
    started at 0 and 1, and where there is nothing to repair."""
    repairs: list[Repair] = []
    untouched: list[Untouched] = []
    for layer in layers:
        if layer.kind not in TRACKING_KINDS or layer.running_mean is None or layer.running_var is None:
            continue
        outcome = _debias(layer, momentum, updates, keep_counters)
        if isinstance(outcome, Repair):
            repairs.append(outcome)
        else:
            untouched.append(Untouched(layer=layer, reason=outcome))
    if not repairs:
        counts = Counter(entry.reason for entry in untouched)
        reasons = [f"{reason} ({count} of {len(untouched)} layers)" for reason, count in counts.items()]
        raise RefusedError(
            f"nothing to debias: {'; '.join(reasons) or 'no layer has running statistics'}",
            "normdoctor inspect says what is wrong, if anything is.",
        )
    return repairs, untouched


def _debias(
    layer: NormLayer, given_momentum: float | None, given_updates: int | None, keep_counters: bool
) -> Repair | str:
    mean, var = layer.numbers.mean, layer.numbers.var
    assert mean is not None and var is not None
    if layer.numbers.default_statistics:
        return "still holds the initial 0 and 1, so it was never updated"
    momentum = given_momentum if layer.momentum is None else layer.momentum
    if momentum == "cumulative":
        return "momentum None is a plain average, which keeps nothing of the initial values"
    if momentum is None:
        raise RefusedError(
            f"{layer.name}: the file does not say its momentum",
            "Give it with --momentum; nothing is assumed here.",
        )
    assert isinstance(momentum, float)
    if not 0 < momentum < 1:
        return f"momentum {momentum:g} leaves no known residue"
    updates = _updates(layer, given_updates)
    residue = math.exp(updates * math.log1p(-momentum))
    if residue < NEGLIGIBLE:
        return f"the residue is below {NEGLIGIBLE:g}"
    if not (np.isfinite(mean).all() and np.isfinite(var).all()):
        raise RefusedError(
            f"{layer.name}: has NaN or infinite statistics, which no arithmetic brings back",
            "Re-estimate the buffers on training data.",
        )
    if 1 - residue < ENOUGH_DATA:
        raise RefusedError(
            f"{layer.name}: only {1 - residue:.2g} of its buffers is data ({updates} updates, momentum {momentum:g})",
            "Too little to recover in the buffers' precision; re-estimate them on training data.",
        )
    new_var = _without_residue(layer, var, residue, updates, momentum)
    counter = None
    if layer.num_batches_tracked is not None and not keep_counters:
        needed = math.floor(math.log(NEGLIGIBLE) / math.log1p(-momentum)) + 1
        counter = max(updates, needed)
    return Repair(
        layer=layer,
        running_mean=mean / (1 - residue),
        running_var=new_var,
        residue=residue,
        momentum=momentum,
        updates=updates,
        counter=counter,
    )


def _updates(layer: NormLayer, given: int | None) -> int:
    counted = layer.numbers.updates
    if counted is None:
        if given is None:
            raise RefusedError(
                f"{layer.name}: the file has no update counter",
                "Give the number of training steps with --updates.",
            )
        return given
    if counted < 1 or not counted.is_integer():
        raise RefusedError(
            f"{layer.name}: num_batches_tracked is {counted:g} although its statistics are not the initial ones",
            "The counter was lost or averaged, so the residue is unknown; re-estimate on training data.",
        )
    return int(counted)


def _without_residue(layer: NormLayer, var: Vector, residue: float, updates: int, momentum: float) -> Vector:
    """(var - q) / (1 - q), with channels that never varied at exactly 0.

    Their var is q up to the rounding of t multiplications; anything further below q contradicts a start at 1."""
    assert layer.running_var is not None
    roundoff = UNIT_ROUNDOFF.get(layer.running_var.dtype, 2.0**-24)
    tolerance = residue * roundoff * (updates + 4)
    below = var < residue - tolerance
    if below.any():
        channel = int(np.argmin(var))
        raise RefusedError(
            f"{layer.name}: running_var of channel {channel} is {var[channel]:.3g}, below the {residue:.3g} that "
            f"buffers started at 1 must still hold (momentum {momentum:g}, {updates} updates)",
            "The buffers started elsewhere, the momentum is another or they were debiased before: "
            "re-estimate them on training data.",
        )
    new = np.where(np.abs(var - residue) <= tolerance, 0.0, (var - residue) / (1 - residue))
    return np.asarray(np.maximum(new, 0.0), dtype=np.float64)
