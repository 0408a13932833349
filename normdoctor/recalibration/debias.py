"""The repair that needs no data: take the initial 0 and 1 out of running statistics that still hold them.

After t updates with momentum m a buffer holds q = (1 - m)^t of its initial value and 1 - q of the moving
average of what it saw (the bias correction of Adam, https://arxiv.org/abs/1412.6980, section 3, for buffers
that start at 0 and 1): mean' = mean / (1 - q), var' = (var - q) / (1 - q).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from normdoctor.errors import RefusedError
from normdoctor.layers import TRACKING_KINDS, NormLayer, Vector, median

NEGLIGIBLE = 1e-4
"""A smaller residue is not worth a change, and a counter is raised to where the residue is below it."""

ENOUGH_DATA = 1e-4
"""Below this share of data in the buffers, float32 rounding is of the size of what is looked for."""

CLEAR_SHARE = 0.5
"""Where the residue is a smaller share of a typical channel's variance, the buffers would look the same without."""

CUT = "lies partly in another shard, and is repaired once the model is in one file"

INSPECT = "normdoctor inspect says what is wrong, if anything is."
WHOLE_FIRST = "normdoctor recalibrate on the folder of all shards says how to have the model in one file."
STARTED_ELSEWHERE = (
    "The buffers started elsewhere, the momentum is another or they were debiased before: re-estimate them on "
    "training data. --layer names those that are known to have started at 0 and 1."
)

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

    @property
    def group(self) -> _Group:
        return _group(self.layer, self.momentum, self.updates)


@dataclass(frozen=True)
class _Contradiction:
    """What in a layer's numbers cannot be if its buffers started at 0 and 1."""

    group: _Group
    words: str


_Group = tuple[str, float, int]
"""Which model of the file, momentum and updates: layers that went through the same together."""


def _group(layer: NormLayer, momentum: float, updates: int) -> _Group:
    return layer.name.rpartition(":")[0], momentum, updates


@dataclass(frozen=True, kw_only=True)
class Untouched:
    """A layer left as it is, and why."""

    layer: NormLayer
    reason: str


def plan(
    layers: Iterable[NormLayer],
    *,
    momentum: float | None,
    updates: int | None,
    keep_counters: bool,
    cut: Collection[str] = (),
) -> tuple[list[Repair], list[Untouched]]:
    """The repairs that debiasing makes, and the layers with buffers that it leaves alone.

    momentum, updates: the user's word where the file is silent (None: no word; nothing is assumed).
    cut: names of layers of which the file holds a part only.
    A layer that contradicts the assumption that its buffers started at 0 and 1 speaks for all that went through
    the same updates with it. Raises RefusedError where a layer's numbers are not known, and where there is
    nothing to repair."""
    outcomes: dict[NormLayer, Repair | _Contradiction | str] = {}
    for layer in layers:
        if layer.kind not in TRACKING_KINDS:
            continue
        if layer.name in cut:
            outcomes[layer] = CUT
        elif layer.running_mean is not None and layer.running_var is not None:
            outcomes[layer] = _debias(layer, momentum, updates, keep_counters)
        elif layer.running_mean is not None:
            outcomes[layer] = "has a running_mean, but no running_var in this file"
        elif layer.running_var is not None:
            outcomes[layer] = "has a running_var, but no running_mean in this file"
    doubts: dict[_Group, str] = {}
    for outcome in outcomes.values():
        if isinstance(outcome, _Contradiction):
            doubts.setdefault(outcome.group, outcome.words)
    repairs: list[Repair] = []
    untouched: list[Untouched] = []
    for layer, outcome in outcomes.items():
        reason = outcome if isinstance(outcome, str) else doubts.get(outcome.group)
        if reason is not None:
            untouched.append(Untouched(layer=layer, reason=reason))
        elif isinstance(outcome, Repair):
            repairs.append(outcome)
    if not repairs:
        counts = Counter(entry.reason for entry in untouched)
        reasons = [f"{reason} ({count} of {len(untouched)} layers)" for reason, count in counts.items()]
        raise RefusedError(
            f"nothing to debias: {'; '.join(reasons) or 'no layer has running statistics'}",
            STARTED_ELSEWHERE if doubts else WHOLE_FIRST if CUT in counts else INSPECT,
        )
    return repairs, untouched


def is_weak(repair: Repair) -> bool:
    """Whether most of a typical channel's variance is data, so that nothing shows that the rest is residue."""
    var, live = repair.layer.numbers.var, repair.layer.numbers.live
    assert var is not None
    return bool(live.any()) and median(repair.residue / var[live]) < CLEAR_SHARE


def _debias(
    layer: NormLayer, given_momentum: float | None, given_updates: int | None, keep_counters: bool
) -> Repair | _Contradiction | str:
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
    new_var = _without_residue(layer, var, residue, updates)
    if new_var is None:
        channel = int(np.argmin(var))
        return _Contradiction(
            _group(layer, momentum, updates),
            f"{layer.name}: running_var of channel {channel} is {var[channel]:.3g}, below the {residue:.3g} that "
            f"buffers started at 1 must still hold, so no layer of momentum {momentum:g} and {updates} updates is "
            "known to have started there",
        )
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


def _without_residue(layer: NormLayer, var: Vector, residue: float, updates: int) -> Vector | None:
    """(var - q) / (1 - q), with channels that never varied at exactly 0. None where that cannot be.

    Their var is q up to the rounding of t multiplications; anything further below q contradicts a start at 1."""
    assert layer.running_var is not None
    roundoff = UNIT_ROUNDOFF.get(layer.running_var.dtype, 2.0**-24)
    tolerance = residue * roundoff * (updates + 4)
    if (var < residue - tolerance).any():
        return None
    new = np.where(np.abs(var - residue) <= tolerance, 0.0, (var - residue) / (1 - residue))
    return np.asarray(np.maximum(new, 0.0), dtype=np.float64)
