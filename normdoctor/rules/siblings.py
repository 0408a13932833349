"""S: what a layer's counter and its siblings tell: other counts, copies, tensors that got lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormKind, NormLayer, Vector
from normdoctor.rules.guards import frozen, frozen_class, operator
from normdoctor.rules.wording import REESTIMATE, both, names, plural


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

    A smaller count: the layer may have been frozen for a while or inserted later. A larger one: it may have come
    with pretrained weights, or a repair raised it (debias). One level lower where the layer takes no gradient, or
    none of those it differs from does: somebody froze a part on purpose, as in fine-tuning.

    An exact multiple only means that the layer is called several times per step, which is said just where the
    file shows it under several names. An exact half, third, ... may be the layer that is called once while the
    others are called more often (a siamese backbone): info.

    Layers that counted 0 belong to S111 and S103. Example: 19 layers at 25,301, one at 11,200.
    """
    counts = {layer: layer.numbers.updates for layer in layers}
    counted = {layer: int(t) for layer, t in counts.items() if t and t > 0 and t == int(t)}
    if len(set(counted.values())) < 2:
        return
    table = Counter(counted.values())
    usual = max(table, key=lambda t: (table[t], t))
    most = context.limits["calls"]
    others_frozen = all(frozen(layer) for layer, t in counted.items() if t == usual)
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
            meaning = "perhaps it was frozen for a while or inserted later"
        else:
            meaning = "perhaps it came with pretrained weights, or a repair raised its counter (debias)"
        purpose = ""
        if others_frozen or frozen(layer):
            severity = (severity or Severity.WARNING).lowered()
            purpose = f" {'The others are' if others_frozen else 'It is'} frozen: by design?"
        norms = plural(len(layers), "layer")
        yield Observation(
            layer=layer,
            message=f"{t:,} updates, but {usual:,} in {table[usual]} of {norms}: {meaning}.{purpose}",
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
    if layer.numbers.default_statistics or operator(layer) or frozen_class(layer):
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
    "S112",
    "counter-not-integer",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("num_batches_tracked",),
    scope=Scope.MODEL,
    why="Whoever averaged the counter averaged the statistics as well, and those are not the averaged weights'.",
    fix=REESTIMATE,
    reference="https://github.com/Lightning-AI/pytorch-lightning/issues/14866",
)
def counter_not_integer(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """num_batches_tracked is a fraction, and nothing counts in fractions.

    Several checkpoints were averaged number by number (a soup, a moving average over the whole state_dict), so
    running_mean and running_var are averages of those of the single models. The averaged weights make other
    activations than any of them: mostly a smaller spread than the buffers claim.

    Harmless where the models lay so close together that it does not matter. A counter stored as a float without
    a fraction says nothing. Example: 10,812.5 in 20 layers, halfway between two checkpoints.
    """
    fractions = [layer for layer in layers if (t := layer.numbers.updates) is not None and t % 1 != 0]
    if not fractions:
        return
    count = fractions[0].numbers.updates
    yield Observation(
        message=f"num_batches_tracked is {count:,} in {fractions[0].name}, a fraction, as in {len(fractions)} of "
        f"{plural(len(layers), 'layer')}: checkpoints were averaged number by number.",
        evidence={"num_batches_tracked": count, "layers": len(fractions)},
    )


@rule(
    "S114",
    "duplicate-buffers",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    scope=Scope.MODEL,
    why="Layers with different inputs cannot measure the same numbers, so one of them may hold the other's.",
    fix=f"none if they have the same input or are one module; otherwise {REESTIMATE}",
    reference="https://huggingface.co/docs/safetensors/torch_shared_tensors",
)
def duplicate_buffers(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Two layers have the same running_mean and running_var, bit for bit, without sharing the memory.

    Usual and harmless for two norms that are fed with the same tensor (two branches that begin with a norm), and
    for one module that was saved under two names by a tool that copies shared tensors. Otherwise something was
    copied: a conversion that looked up the wrong key, a merge of checkpoints layer by layer.

    Said once for each set of equal layers, where the statistics are not constant. Example: layer2.0.bn1 and
    layer3.0.bn1 agree in all 256 values, gamma and beta differ.
    """
    groups: dict[tuple[bytes, bytes], list[NormLayer]] = {}
    for layer in layers:
        mean, var = layer.numbers.mean, layer.numbers.var
        assert mean is not None and var is not None
        if mean.min() < mean.max() and var.min() < var.max():  # nor NaN
            groups.setdefault((_digest(mean), _digest(var)), []).append(layer)
    for first, *others in groups.values():
        if not others:
            continue
        numbers = [layer.numbers for layer in (first, *others)]
        affine = {(_digest(each.gain), _digest(each.shift)) for each in numbers}
        yield Observation(
            layer=first,
            message=f"running_mean and running_var are bit for bit those of {names([layer.name for layer in others])}; "
            f"gamma and beta {'agree as well' if len(affine) == 1 else 'differ'}.",
            channels=range(first.channels),
            evidence={"same_as": [layer.name for layer in others], "affine_agrees": len(affine) == 1},
            rank=float(len(others)),
        )


def _digest(values: Vector) -> bytes:
    """Equal for vectors that are equal bit for bit, without keeping a copy of each."""
    return blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()


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
    lacks nothing. Only the counter missing is info, since it does not enter the output; so is the weight together with
    the bias in a file that does not say affine, since a layer built with affine=False looks the same.

    In a bare state_dict where no BatchNorm has statistics it may be track_running_stats=False for all of
    them: medium confidence. Example: 19 of 20 layers have running_mean and running_var, layer4.1.bn2 has neither.
    """
    modules = [layer for layer in layers if not operator(layer)]
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
        unaffine = layer.affine is None and lost == ["weight", "bias"]
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
            severity=Severity.INFO if lost == ["num_batches_tracked"] or unaffine else None,
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
    if (layer.running_mean is None) == (layer.running_var is None) or operator(layer):
        return
    if layer.running_mean is None:
        has, lacks = lacks, has
    yield Observation(
        message=f"{has} is in the file ({layer.channels} values), {lacks} is not.",
        evidence={"missing": lacks},
    )


RULES: tuple[Rule, ...] = (
    counter_disagreement,
    counter_missing,
    counter_not_integer,
    duplicate_buffers,
    buffers_missing,
    mean_without_variance,
)
