"""S: how the running statistics came about: never updated, not enough updates, lost on the way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from normdoctor.findings import DEBIAS_COMMAND, Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormKind, NormLayer
from normdoctor.rules.decay import (
    SMALLEST_NORMAL,
    plain_momentum,
    residue,
    started_elsewhere,
)
from normdoctor.rules.guards import exported, frozen, frozen_class
from normdoctor.rules.wording import REESTIMATE, both, number, percent, plural, where

BATCHNORM_PAPER = "https://arxiv.org/abs/1502.03167"


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
    limits={"error": 0.10, "warning": 0.01, "info": 0.001},
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
    "S110",
    "counter-disagreement",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("num_batches_tracked",),
    scope=Scope.MODEL,
    why="This layer saw other batches than its neighbours, so its statistics may belong to another time.",
    fix=f"find out when it was frozen, inserted or loaded; if by mistake: {REESTIMATE}",
    reference="https://github.com/kgl-prml/Contrastive-Adaptation-Network-for-Unsupervised-Domain-Adaptation/issues/7",
    limits={"calls": 8},
)
def counter_disagreement(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """num_batches_tracked differs from the commonest value among the layers.

    A smaller count: the layer was frozen for a while or inserted later. A larger one: it came with
    pretrained weights. An exact multiple only means that the layer is called several times per step, which
    is said just where the file shows it under several names. An exact half, third, ... may be the layer that
    is called once while the others are called more often (a siamese backbone): info.

    Layers that counted 0 belong to S111 and S103. Example: 19 layers at 25,301, one at 11,200.
    """
    counts = {layer: layer.numbers.updates for layer in layers}
    counted = {layer: int(t) for layer, t in counts.items() if t and t > 0 and t == int(t)}
    if len(set(counted.values())) < 2:
        return
    table = Counter(counted.values())
    usual = max(table, key=lambda t: (table[t], t))
    most = context.limits["calls"]
    for layer, t in counted.items():
        severity = confidence = None
        if t == usual:
            continue
        if t % usual == 0:
            if not layer.aliases:
                continue
            severity = Severity.INFO
            meaning = (
                f"it is used under {len(layer.aliases) + 1} names and called {t // usual} times per step, so "
                "one set of statistics serves several inputs"
            )
        elif usual % t == 0 and usual // t <= most:
            severity, confidence = Severity.INFO, Confidence.MEDIUM
            meaning = f"the others are called {usual // t} times per step, or it was frozen or inserted later"
        elif t < usual:
            meaning = "it was frozen for a while or inserted later"
        else:
            meaning = "it came with pretrained weights"
        norms = plural(len(layers), "layer")
        yield Observation(
            layer=layer,
            message=f"{t:,} updates, but {usual:,} in {table[usual]} of {norms}: {meaning}.",
            evidence={"num_batches_tracked": t, "usual": usual, "layers_at_usual": table[usual]},
            severity=severity,
            confidence=confidence,
            rank=abs(math.log(t / usual)),
        )


@rule(
    "S111",
    "counter-missing",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH,),
    needs=("running_mean", "running_var"),
    why="How much of the initial values is left (S104) cannot be computed without the number of updates.",
    fix="none needed for inference; before training on, set num_batches_tracked or momentum on purpose",
    reference="https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
)
def counter_missing(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Real statistics, but num_batches_tracked is absent or 0.

    Converted from another framework, or saved before torch 0.4.1 introduced the counter. With
    momentum=None the first training step would overwrite the statistics, since torch then averages over a
    count that starts at 0.

    Harmless for inference: six published healthy models have it in every layer. Frozen layers and exported
    operators have no counter by design and are passed over; so is InstanceNorm, whose counter torch never
    moves. Example: 52 layers of a converted MobileNetV2.
    """
    updates = layer.numbers.updates
    if layer.numbers.default_statistics or exported(layer) or frozen_class(layer):
        return
    if updates is None and layer.num_batches_tracked is not None:
        return  # something is stored there, and it is no count
    if updates is None or updates == 0:
        said = "num_batches_tracked is " + ("not in the file" if updates is None else "0")
        risk = ""
        if layer.momentum == "cumulative":
            risk = " momentum=None: the first training step would overwrite them."
        yield Observation(
            message=f"{said} although running_mean and running_var hold real values.{risk}",
            evidence={"num_batches_tracked": updates},
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


@rule(
    "S116",
    "buffers-missing",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH,),
    scope=Scope.MODEL,
    why="Loaded with strict=False the layer keeps its initial values without a word.",
    fix="find where the keys were dropped (renaming, filtering) and save again; load with strict=True",
    reference="https://github.com/mapillary/inplace_abn/issues/130",
)
def buffers_missing(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """A BatchNorm lacks tensors that its siblings have.

    Keys get lost when a checkpoint is filtered (only parameters saved, so all buffers gone), renamed for
    another class, or put together from two. A layer that declares affine=False or track_running_stats=False
    lacks nothing. Only the counter missing is info: it does not enter the output.

    In a bare state_dict where no BatchNorm has statistics it may be track_running_stats=False for all of
    them: medium confidence. Example: 19 of 20 layers have running_mean and running_var, layer4.1.bn2 has neither.
    """
    modules = [layer for layer in layers if not exported(layer)]
    having = {part: sum(_has(layer, part) for layer in modules) for part in PARTS}
    for layer in modules:
        missing = [part for part in PARTS if not _has(layer, part) and not _declares_none(layer, part)]
        others = len(modules) - 1
        lost = [part for part in missing if 2 * having[part] > others]
        confidence = None
        if not lost and "statistics" in missing and layer.track_running_stats is None and layer.training is None:
            lost, confidence = ["statistics"], Confidence.MEDIUM
        if not lost:
            continue
        have = min(having[part] for part in lost)
        words = both([field for part in lost for field in PARTS[part]])
        if have:
            where_else = f", but in {have} of {others} other BatchNorms"
            if layer.affine is None and "statistics" not in lost:
                where_else += "; dropped, or built with affine=False"
        else:
            nowhere = ", nor in any other BatchNorm" if others else ""
            where_else = f"{nowhere}: dropped, or track_running_stats=False, or another norm named so"
        yield Observation(
            layer=layer,
            message=f"{words}: not in the file{where_else}.",
            evidence={"missing": lost, "siblings_having": have, "siblings": others},
            severity=Severity.INFO if lost == ["num_batches_tracked"] else None,
            confidence=confidence,
            rank=len(lost),
        )


PARTS = {
    "statistics": ("running_mean", "running_var"),
    "weight": ("weight",),
    "bias": ("bias",),
    "num_batches_tracked": ("num_batches_tracked",),
}


def _has(layer: NormLayer, part: str) -> bool:
    if part == "statistics":
        return layer.running_mean is not None or layer.running_var is not None  # one of them: S117
    return getattr(layer, part) is not None


def _declares_none(layer: NormLayer, part: str) -> bool:
    if part in ("weight", "bias"):
        return layer.affine is False
    if part == "num_batches_tracked" and frozen_class(layer):
        return True
    return layer.track_running_stats is False


@rule(
    "S117",
    "mean-without-variance",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    why="Half of the statistics is no statistics: the other half will be the initial value after loading.",
    fix="find where the key was dropped or renamed and save again; load with strict=True",
    reference="https://github.com/facebookresearch/video-nonlocal-net/issues/61",
)
def mean_without_variance(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A layer has a running_mean but no running_var, or the other way round.

    The two are always saved together, so one key was dropped or renamed on the way (moving_variance,
    running_std). Loaded with strict=False the missing one stays 0 or 1. Exported operators, whose inputs may
    be computed elsewhere in the graph, are passed over.

    Example: layer3.bn has running_mean of 128 values and no running_var.
    """
    has, lacks = "running_mean", "running_var"
    if (layer.running_mean is None) == (layer.running_var is None) or exported(layer):
        return
    if layer.running_mean is None:
        has, lacks = lacks, has
    yield Observation(
        message=f"{has} is in the file ({layer.channels} values), {lacks} is not.",
        evidence={"missing": lacks},
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
    limits={"least": 0.3, "spread": 4.0, "channels": 64},
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
    if not limits["least"] <= least < 1 or largest > limits["spread"] * least or largest >= 1 / limits["least"]:
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
    never_updated_stats,
    warmup_residue,
    counter_disagreement,
    counter_missing,
    momentum_contradiction,
    buffers_missing,
    mean_without_variance,
    residue_suspected,
)
