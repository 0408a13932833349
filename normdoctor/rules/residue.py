"""S: how much of the initial 0 and 1 is left in running statistics: computed, contradicted or suspected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from normdoctor.findings import DEBIAS_COMMAND, Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormLayer, median
from normdoctor.rules.decay import SMALLEST_NORMAL, plain_momentum, residue, started_elsewhere
from normdoctor.rules.guards import frozen
from normdoctor.rules.wording import REESTIMATE, names, number, percent, plural, where

BATCHNORM_PAPER = "https://arxiv.org/abs/1502.03167"


@rule(
    "S104",
    "warmup-residue",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var", "num_batches_tracked", "momentum"),
    scope=Scope.MODEL,
    why="Eval divides by the wrong spread while training never notices; the repair needs no data.",
    fix=DEBIAS_COMMAND,
    reference=BATCHNORM_PAPER,
    # benchmarks/calibration.md: 5 % costs depthwise nets 7 to 12 points, 1 % none more than 1.
    limits={"error": 0.05, "warning": 0.01, "info": 0.001, "sure": 0.5},
)
def warmup_residue(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """A known share q = (1 - momentum)^updates of the running statistics is still their initial value.

    The buffers start at mean 0 and variance 1 and move by `momentum` towards each batch, so after t updates
    exactly (1 - momentum)^t of what they hold is that 0 and 1. The true values follow without any data:
    mean / (1 - q) and (var - q) / (1 - q). If the run started from another checkpoint's buffers, the same
    share belongs to those instead.

    Harmless where the buffers were computed anew by a plain average over t batches (update_bn, precise BN),
    which counts them and puts the momentum back. Silent therefore where a variance is smaller than q, in this
    layer or in another with the same momentum and counter: buffers that started at 1 cannot be (see S115).
    Confidence is high only where q makes up half of the typical variance or more, else medium: then look at
    how the buffers came about before you repair them.

    Example: momentum 0.001 after 216 updates leaves 81 %; accuracy 33.2 %, 98.2 % after debiasing without data.
    """
    alike: dict[tuple[float, float], list[NormLayer]] = {}
    for layer in layers:
        momentum, updates = plain_momentum(layer), layer.numbers.updates
        if momentum is None or updates is None or updates < 1 or layer.numbers.default_statistics:
            continue  # among them S103's
        alike.setdefault((momentum, updates), []).append(layer)
    for (momentum, updates), group in alike.items():
        left = residue(momentum, updates)
        if left < context.limits["info"] or any(started_elsewhere(layer, left) for layer in group):
            continue  # S115 says it
        for layer in group:
            yield _residue(layer, momentum, updates, left, context)


def _residue(layer: NormLayer, momentum: float, updates: float, left: float, context: Context) -> Observation:
    limits, doubt, confidence = context.limits, "", None
    severity = Severity.INFO
    if left >= limits["error"]:
        severity = Severity.ERROR
    elif left >= limits["warning"]:
        severity = Severity.WARNING
    if frozen(layer):
        severity, doubt = severity.lowered(), " Frozen by design?"
    elif context.model.averaged:  # averaging weights often averages the counter too, and truncates it
        severity, confidence = min(severity, Severity.WARNING), Confidence.LOW
        doubt = f" The counter may be an average itself ({context.model.averaged})."
    var = layer.numbers.var
    assert var is not None
    share = median(left / var[layer.numbers.live])
    if share < limits["sure"]:
        confidence = confidence or Confidence.MEDIUM
        doubt += " Buffers computed anew over as many batches (update_bn, precise BN) look the same and are right."
    return Observation(
        layer=layer,
        message=(
            f"{percent(left)} of running_mean and running_var is still the 0 and 1 they were created with "
            f"(momentum {number(momentum)}, {updates:,.0f} updates).{doubt}"
        ),
        evidence={
            "residue": left,
            "momentum": momentum,
            "num_batches_tracked": updates,
            "share_of_variance": share,
        },
        severity=severity,
        confidence=confidence,
        rank=left,
        # A layer used in several places saw several distributions; debias refuses to write it.
        fix=REESTIMATE if layer.aliases else None,
    )


@rule(
    "S115",
    "momentum-contradiction",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_var", "num_batches_tracked", "momentum"),
    why="How much of the initial values is left is then unknown, so the repair without data is not possible.",
    fix=f"none needed for inference; to be sure, {REESTIMATE}",
    reference=BATCHNORM_PAPER,
)
def momentum_contradiction(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A running variance is smaller than buffers that started at 1 can be after so few updates.

    What started at 1 is never below (1 - momentum)^updates, since no batch has a negative variance. So the
    momentum was larger once, or the counter was reset, or the buffers came from another checkpoint, or they were
    computed anew after training (update_bn, precise BN), which counts from 0. S104 keeps silent on such a layer
    and on all with the same momentum and counter, and `recalibrate --method debias` refuses it.

    Usual and harmless after update_bn and after fine-tuning a converted model. Example: a variance of 0.02 after
    216 updates needs a momentum of at least 0.018; the file says 0.001.
    """
    momentum, updates, var = plain_momentum(layer), layer.numbers.updates, layer.numbers.var
    assert var is not None
    if momentum is None or updates is None or updates < 1:
        return
    left = residue(momentum, updates)
    if left < SMALLEST_NORMAL or layer.numbers.default_statistics or not started_elsewhere(layer, left):
        return
    least = float(var[np.isfinite(var) & (var >= 0)].min())
    if layer.running_var is not None and layer.running_var.dtype == "float16" and left < 1e-6:
        return  # float16 rounds such a residue to 0 by itself
    needed = -math.expm1(math.log(least) / updates) if least > 0 else None
    needs = "" if needed is None else f"; that takes a momentum of at least {number(needed)}"
    channels = where((var >= 0) & (var < left))
    yield Observation(
        message=(
            f"running_var is {number(least)} after {updates:,.0f} updates with momentum {number(momentum)}, but "
            f"a buffer that started at 1 cannot be below {number(left)}{needs}. It started elsewhere, or was computed "
            "anew (update_bn)."
        ),
        channels=channels,
        evidence={
            "least": least,
            "residue": left,
            "momentum": momentum,
            "momentum_needed": needed,
            "num_batches_tracked": updates,
        },
        rank=left,
    )


ENOUGH_UPDATES = 44
"""After as many updates torch's default momentum of 0.1 leaves 1 %, where S104 becomes a warning."""


@rule(
    "S118",
    "residue-suspected",
    severity=Severity.WARNING,
    confidence=Confidence.LOW,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    scope=Scope.MODEL,
    why="If it is residue, eval divides by the wrong spread, and the file alone cannot show it.",
    fix="find the momentum the model was trained with, then: normdoctor inspect {path} --momentum VALUE",
    reference=BATCHNORM_PAPER,
    # benchmarks/calibration.md: at most a fifth of the layers of a healthy net lie in the band; residue lifts most.
    limits={"least": 0.55, "spread": 2.5, "share": 0.5, "channels": 64},
)
def residue_suspected(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Running variances lie close to the initial 1, and the file does not say the momentum or the updates.

    What started at 1 holds at least q = (1 - momentum)^updates, so the smallest variance bounds the residue
    from above, and that is all a bare state_dict tells. In a trained network variances differ by a factor of
    ten and more between channels; a residue squeezes them together just above q. Said where that is so in half of
    the layers or more: where inputs vary far more than 1, as those of a first layer that gets raw pixels, the
    residue does not show.

    Silent where momentum and updates are both known (S104 then computes q). Harmless if the inputs of most
    norms really have a spread near 1. Example: 0.82 to 0.93 in all 120 channels after 216 updates, a momentum
    of 0.001; accuracy 33.2 %, and 98.2 % once debiased.
    """
    limits = context.limits
    unknown = [
        layer
        for layer in layers
        if (layer.momentum is None or layer.numbers.updates is None) and not layer.numbers.default_statistics
    ]
    few = [layer for layer in unknown if layer.numbers.updates is not None and layer.numbers.updates < ENOUGH_UPDATES]
    if not unknown or few:
        return  # after so few updates S104 speaks for torch's default momentum already
    ranges = {layer: found for layer in unknown if (found := _squeezed(layer, limits["least"], limits["spread"]))}
    channels = sum(layer.lengths["running_var"] for layer in ranges)
    if not ranges or len(ranges) < limits["share"] * len(unknown) or channels < limits["channels"]:
        return
    least, largest = min(low for low, _ in ranges.values()), max(high for _, high in ranges.values())
    updates = {layer.numbers.updates for layer in ranges}
    momenta = {layer.momentum for layer in ranges}
    listed = [layer.name for layer in ranges]
    message = f"running_var lies between {number(least)} and {number(largest)} in all {channels:,} channels"
    if len(ranges) < len(unknown):
        message += f" of {len(ranges)} of {plural(len(unknown), 'layer')} ({names(listed)})"
    message += f", so up to {percent(least)} of it could be the 1 it was created with"
    evidence: dict[str, Any] = {"least": least, "largest": largest, "channels": channels, "layers": listed}
    fix = None
    if len(updates) == 1 and (count := updates.pop()) and count >= 1:
        evidence["momentum_at_most"] = -math.expm1(math.log(least) / count)
        message += f": with {count:,.0f} updates, if the momentum was near {number(evidence['momentum_at_most'])}"
    elif len(momenta) == 1 and isinstance(momentum := momenta.pop(), float) and 0 < momentum < 1:
        evidence["updates_at_least"] = math.ceil(math.log(least) / math.log1p(-momentum))
        message += f": with momentum {number(momentum)}, after about {evidence['updates_at_least']:,} updates"
        fix = "find the number of training steps, then: normdoctor recalibrate {path} --method debias --updates STEPS"
    yield Observation(message=message + ".", evidence=evidence, fix=fix, rank=least)


def _squeezed(layer: NormLayer, least: float, spread: float) -> tuple[float, float] | None:
    """Smallest and largest running_var of a layer where the one is from `least` to 1 and the other at most `spread`
    times as much."""
    var = layer.numbers.var
    assert var is not None
    var = var[np.isfinite(var)]
    if not var.size:
        return None
    low, high = float(var.min()), float(var.max())
    return (low, high) if least <= low < 1 and high <= spread * low else None


RULES: tuple[Rule, ...] = (
    warmup_residue,
    momentum_contradiction,
    residue_suspected,
)
