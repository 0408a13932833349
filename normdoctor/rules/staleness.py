"""S: how the running statistics came about: never updated, not enough updates, kept in too few bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from normdoctor.findings import DEBIAS_COMMAND, Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormLayer, Vector
from normdoctor.rules.decay import SMALLEST_NORMAL, plain_momentum, residue, started_elsewhere
from normdoctor.rules.guards import TOKEN_KINDS, frozen
from normdoctor.rules.wording import REESTIMATE, number, percent, plural, where

BATCHNORM_PAPER = "https://arxiv.org/abs/1502.03167"


@rule(
    "S100",
    "untrained-model",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    scope=Scope.MODEL,
    why="Nothing that needs training can be judged, so S103, A203 and A204 keep silent.",
    fix="none if the model is meant to be fresh; otherwise make sure the weights were loaded before saving",
    reference="https://github.com/matterport/Mask_RCNN/issues/753",
)
def untrained_model(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Every norm layer still holds exactly what it was created with.

    Mean 0, variance 1, gain 1 (or 0, for blocks that start as the identity), shift 0, in all layers at once,
    and no counter says that a batch went through. Either the model was never trained, or loading the weights
    failed without a word and a fresh model was saved again.

    Harmless for a model that is meant to be fresh. A transformer whose gains were folded into the next
    weights (QuaRot, SliceGPT) looks the same, so there the confidence is medium.

    Example: 53 BatchNorms, all of them 0, 1, 1, 0.
    """
    if not context.model.untrained:
        return
    message = (
        f"{plural(len(layers), 'norm layer')}, and all hold what they were created with: "
        "mean 0, variance 1, gain 1 (or 0), shift 0."
    )
    folded = all(layer.kind in TOKEN_KINDS for layer in layers)
    if folded:
        message += " A transformer whose gains were folded into the next weights looks the same."
    yield Observation(
        message=message,
        evidence={"layers": len(layers)},
        confidence=Confidence.MEDIUM if folded else None,
    )


@rule(
    "S103",
    "never-updated-stats",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    even_untrained=False,
    why="Eval does not normalise at all: it passes on whatever scale and offset the weights produce.",
    fix=REESTIMATE,
    reference="https://github.com/pytorch/pytorch/issues/16793",
)
def never_updated_stats(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """running_mean is exactly 0 and running_var exactly 1 in every channel of a trained network.

    These are the values a layer is created with. Causes: trained in eval mode from scratch, momentum 0,
    buffers dropped on load (strict=False), a reset without re-estimation. A converted model that merged its
    statistics into gamma and beta by design looks the same; then gamma and beta carry the statistics.

    Only a warning where the file has no counter to confirm it. Example: a digits CNN went from 99.2 % to
    29.3 % accuracy in eval mode.
    """
    if not layer.numbers.default_statistics:
        return
    updates = layer.numbers.updates
    if updates is None:
        severity, counted = Severity.WARNING, "the file has no update counter"
    elif updates > 0:
        severity, counted = None, f"although {updates:,.0f} batches were counted, so momentum was 0"
    else:
        severity, counted = None, "0 batches were counted"
    yield Observation(
        message=f"running_mean is 0 and running_var is 1 in all {layer.channels} channels; {counted}.",
        channels=range(layer.channels),
        evidence={"num_batches_tracked": updates},
        severity=severity,
    )


@rule(
    "S104",
    "warmup-residue",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var", "num_batches_tracked", "momentum"),
    why="Eval divides by the wrong spread while training never notices; the repair needs no data.",
    fix=DEBIAS_COMMAND,
    reference=BATCHNORM_PAPER,
    # benchmarks/calibration.md: 5 % costs depthwise nets 7 to 12 points, 1 % none more than 1.
    limits={"error": 0.05, "warning": 0.01, "info": 0.001},
)
def warmup_residue(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A known share q = (1 - momentum)^updates of the running statistics is still their initial value.

    The buffers start at mean 0 and variance 1 and move by `momentum` towards each batch, so after t updates
    exactly (1 - momentum)^t of what they hold is that 0 and 1. The true values follow without any data:
    mean / (1 - q) and (var - q) / (1 - q). If the run started from another checkpoint's buffers, the same
    share belongs to those instead.

    Silent where a variance is smaller than q: buffers that started at 1 cannot be (see S115).

    Example: momentum 0.001 after 216 updates leaves 81 %; accuracy 27.6 %, 98.0 % after debiasing without data.
    """
    momentum, updates = plain_momentum(layer), layer.numbers.updates
    if momentum is None or updates is None or updates < 1:
        return
    left = residue(momentum, updates)
    limits = context.limits
    if left < limits["info"] or layer.numbers.default_statistics or started_elsewhere(layer, left):
        return  # S103 and S115 say it
    severity = Severity.INFO
    if left >= limits["error"]:
        severity = Severity.ERROR
    elif left >= limits["warning"]:
        severity = Severity.WARNING
    doubt = confidence = None
    if frozen(layer):
        severity, doubt = severity.lowered(), " Frozen by design?"
    elif context.model.averaged:  # averaging weights often averages the counter too, and truncates it
        severity, confidence = min(severity, Severity.WARNING), Confidence.LOW
        doubt = f" The counter may be an average itself ({context.model.averaged})."
    yield Observation(
        message=(
            f"{percent(left)} of running_mean and running_var is still the 0 and 1 they were created with "
            f"(momentum {number(momentum)}, {updates:,.0f} updates).{doubt or ''}"
        ),
        evidence={"residue": left, "momentum": momentum, "num_batches_tracked": updates},
        severity=severity,
        confidence=confidence,
        rank=left,
        # A layer used in several places saw several distributions; debias refuses to write it.
        fix=REESTIMATE if layer.aliases else None,
    )


@rule(
    "S113",
    "low-precision-ema",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    why="A moving average kept in 16 bits stops moving once a step is smaller than its last digit.",
    fix=f"if the model was only cast to 16 bits and back, nothing; otherwise {REESTIMATE} in float32",
    reference="https://arxiv.org/abs/1710.03740",
    limits={"channels": 16, "distinct": 8},
)
def low_precision_ema(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """float32 buffers whose values all fit into bfloat16 or float16.

    By chance that happens to one value in thousands. Either the average was kept in 16 bits while training,
    and then stalls as soon as momentum * |batch - average| is below half of the last digit (with momentum
    0.01 and a true mean of 10 it stayed at 7.85 in bfloat16), or a finished model was cast down and up again,
    which costs only rounding. The file cannot tell the two apart; re-estimating settles it.

    Example: all 512 values of a layer have the low 16 bits zero.
    """
    mean, var, limits = layer.numbers.mean, layer.numbers.var, context.limits
    assert mean is not None and var is not None and layer.running_mean is not None and layer.running_var is not None
    if len(var) < limits["channels"] or {layer.running_mean.dtype, layer.running_var.dtype} != {"float32"}:
        return
    used = _bits_used(var)
    if used > FLOAT16_BITS:
        return
    used = max(used, _bits_used(mean))
    if used > FLOAT16_BITS or np.unique(var).size < limits["distinct"]:
        return
    both_vectors = np.abs(np.concatenate([mean, var]))
    stored = both_vectors[np.isfinite(both_vectors) & (both_vectors > 0)]
    if used <= BFLOAT16_BITS:
        kind = "bfloat16"
    elif stored.size and stored.max() <= np.finfo(np.float16).max and stored.min() >= 2.0**-24:
        kind = "float16"
    else:
        return
    yield Observation(
        message=(
            f"All {2 * len(var)} values of running_mean and running_var fit into {kind} although they are "
            "stored as float32: the average was kept in 16 bits, or the model was cast down and up again."
        ),
        channels=range(len(var)),
        evidence={"fits": kind, "distinct_variances": int(np.unique(var).size)},
    )


FLOAT16_BITS = 10
BFLOAT16_BITS = 7


def _bits_used(values: Vector) -> int:
    """How many of float32's 23 fraction bits any of the values uses, counted from the top.

    A subnormal float16 is a normal float32 with still fewer bits, so the count serves both types."""
    fraction = int(np.bitwise_or.reduce(values.astype(np.float32).view(np.uint32))) & 0x7FFFFF
    return 23 - ((fraction & -fraction).bit_length() - 1) if fraction else 0


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
    momentum was larger once, or the counter was reset, or the buffers came from another checkpoint. S104
    keeps silent on such a layer and `recalibrate --method debias` refuses it.

    Usual and harmless after fine-tuning a converted model. Example: a variance of 0.02 after 216 updates
    needs a momentum of at least 0.018; the file says 0.001.
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
            f"a buffer that started at 1 cannot be below {number(left)}{needs}."
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
    # benchmarks/calibration.md: healthy nets have a variance below 0.3 somewhere; 80 % of residue lifts all above.
    limits={"least": 0.6, "spread": 4.0, "channels": 64},
)
def residue_suspected(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """All running variances lie close to the initial 1, and the file does not say the momentum or the updates.

    What started at 1 holds at least q = (1 - momentum)^updates, so the smallest variance bounds the residue
    from above, and that is all a bare state_dict tells. In a trained network variances differ by a factor of
    ten and more between channels; a residue squeezes them together just above q.

    Silent where momentum and updates are both known (S104 then computes q). Harmless if the inputs of all
    norms really have a spread near 1. Example: 0.82 to 0.93 in all 120 channels after 216 updates, a momentum
    of 0.001; accuracy 33 %, and 98 % once debiased.
    """
    unknown = [
        layer
        for layer in layers
        if (layer.momentum is None or layer.numbers.updates is None) and not layer.numbers.default_statistics
    ]
    few = [layer for layer in unknown if layer.numbers.updates is not None and layer.numbers.updates < ENOUGH_UPDATES]
    if not unknown or few:
        return  # after so few updates S104 speaks for torch's default momentum already
    both_vectors = [layer.numbers.var for layer in unknown if layer.numbers.var is not None]
    var = np.concatenate(both_vectors)
    var = var[np.isfinite(var)]
    limits = context.limits
    if var.size < limits["channels"]:
        return
    least, largest = float(var.min()), float(var.max())
    if not limits["least"] <= least < 1 or largest > limits["spread"] * least:
        return
    updates = {layer.numbers.updates for layer in unknown}
    momenta = {layer.momentum for layer in unknown}
    message = f"running_var lies between {number(least)} and {number(largest)} in all {var.size:,} channels, so up to "
    message += f"{percent(least)} of it could be the 1 it was created with"
    evidence: dict[str, Any] = {"least": least, "largest": largest, "channels": int(var.size)}
    fix = None
    if len(updates) == 1 and (count := updates.pop()) and count >= 1:
        evidence["momentum_at_most"] = -math.expm1(math.log(least) / count)
        message += f": with {count:,.0f} updates, if the momentum was near {number(evidence['momentum_at_most'])}"
    elif len(momenta) == 1 and isinstance(momentum := momenta.pop(), float) and 0 < momentum < 1:
        evidence["updates_at_least"] = math.ceil(math.log(least) / math.log1p(-momentum))
        message += f": with momentum {number(momentum)}, after about {evidence['updates_at_least']:,} updates"
        fix = "find the number of training steps, then: normdoctor recalibrate {path} --method debias --updates STEPS"
    yield Observation(message=message + ".", evidence=evidence, fix=fix, rank=least)


RULES: tuple[Rule, ...] = (
    untrained_model,
    never_updated_stats,
    warmup_residue,
    low_precision_ema,
    momentum_contradiction,
    residue_suspected,
)
