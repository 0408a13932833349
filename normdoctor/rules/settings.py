"""C: eps, momentum, mode and shapes that do not fit together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, VECTORS, NormKind, NormLayer, median
from normdoctor.rules.guards import exported, frozen
from normdoctor.rules.wording import both, names, number, percent, plural

REESTIMATE = "re-estimate them on training data (torch.optim.swa_utils.update_bn(loader, model))"

FAMILY_EPS = (1e-5, 1e-3)
"""What BatchNorms are built with: torch, ONNX and Caffe; Keras and TensorFlow."""


@rule(
    "C301",
    "batch-stats-at-inference",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH,),
    needs=("training",),
    why="The answer for one input depends on the others in its batch.",
    fix=f"build the layer with track_running_stats=True and fill its buffers: {REESTIMATE}",
    reference="https://github.com/pytorch/pytorch/issues/37823",
)
def batch_stats_at_inference(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """At inference the layer would normalise with the statistics of the batch at hand.

    In an exported graph: the node is in training mode, for good, since nobody can call eval() on it (error).
    In a module: there are no buffers to use, because it was built with track_running_stats=False or they were
    removed. A batch of one with 1x1 maps then raises or gives the shift alone. InstanceNorm does so by design.

    Also said where track_running_stats was set to False afterwards and the buffers are still there: torch then
    does use them in eval mode, but training no longer updates them. Example: a classifier whose answer for one
    image changes with its neighbours in the batch.
    """
    stored = layer.running_mean is not None or layer.running_var is not None
    if exported(layer):
        if layer.training:
            yield Observation(
                message="The exported node is in training mode: it normalises with the batch at hand for ever.",
                evidence={"training": True},
                severity=Severity.ERROR,
                fix="call model.eval() and export again",
            )
        return
    if layer.track_running_stats is False and stored:
        yield Observation(
            message="track_running_stats is False but the buffers exist: eval uses them, training never updates them.",
            evidence={"track_running_stats": False, "buffers": True},
            fix=f"set track_running_stats=True on the layer; if it was trained like that, {REESTIMATE}",
        )
    elif not stored:
        cause = "track_running_stats is False" if layer.track_running_stats is False else "the buffers are gone"
        yield Observation(
            message=f"There is no running_mean and running_var ({cause}): eval mode normalises with the batch at hand.",
            evidence={"track_running_stats": layer.track_running_stats, "buffers": False},
        )


@rule(
    "C302",
    "momentum-zero",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("momentum",),
    assumes=False,
    why="The running statistics never move, however long the model is trained.",
    fix="set momentum to 0.1 before training on; for inference nothing is needed",
    reference="https://github.com/pytorch/pytorch/issues/15298",
)
def momentum_zero(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """momentum is 0, so running_mean and running_var stay what they are.

    Some converters write 0 to freeze the statistics they brought along, which is harmless as long as the
    buffers hold real values and the model is only used: info. A warning where they still hold 0 and 1, or
    where the layer was saved in training mode.

    Example: momentum 0.0 in six layers of a converted pitch tracker with real statistics (info).
    """
    if isinstance(layer.momentum, str) or layer.momentum != 0:
        return
    if layer.running_var is not None and layer.numbers.default_statistics:
        severity, said = Severity.WARNING, "still the 0 and 1 they were created with"
    elif layer.training:
        severity, said = Severity.WARNING, "frozen although the layer was saved in training mode"
    else:
        severity, said = Severity.INFO, "frozen at the values they came with"
    yield Observation(
        message=f"momentum is 0: the running statistics are {said}.",
        evidence={"momentum": 0.0, "training": layer.training},
        severity=severity,
    )


@rule(
    "C303",
    "momentum-swapped",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("momentum",),
    assumes=False,
    why="The running statistics are those of the last batch or two, with all their noise.",
    fix=f"set momentum to 1 minus this value; {REESTIMATE}",
    reference="https://github.com/eriklindernoren/PyTorch-YOLOv3/issues/230",
    limits={"from": 0.5},
)
def momentum_swapped(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """momentum is 0.5 or more: the new batch outweighs everything before it.

    0.9 and 0.99 are what Keras, TensorFlow and ONNX call momentum, the weight of the OLD value; torch means
    the weight of the new batch, 0.1 and 0.01. (For an ONNX file the number judged here is already in torch's
    sense.) With momentum m the statistics carry m / (2 - m) of one batch's noise: 0.82 for 0.9, 0.98 for 0.99.

    1.0 is sometimes set for re-estimating and forgotten. Example: momentum 0.99 in all 75 layers of a port.
    """
    momentum = layer.momentum
    if momentum is None or isinstance(momentum, str) or not momentum >= context.limits["from"]:
        return
    noise = momentum / (2 - momentum) if momentum < 2 else math.inf
    swapped = f"set momentum to {number(1 - momentum)}; {REESTIMATE}" if momentum < 1 else None
    yield Observation(
        message=f"momentum {number(momentum)}: the newest batch makes up {percent(momentum)} of the running "
        "statistics." + (f" Keras's decay {number(momentum)} is torch's {number(1 - momentum)}." if swapped else ""),
        evidence={"momentum": momentum, "noise_share": noise if math.isfinite(noise) else None},
        confidence=Confidence.MEDIUM if exported(layer) else None,
        fix=swapped,
        rank=momentum,
    )


@rule(
    "C305",
    "eps-odd",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    needs=("eps",),
    assumes=False,
    scope=Scope.MODEL,
    why="Where variances are small, another eps is another gain; a wrong one is invisible in the shapes.",
    fix="set eps to what the model was trained with (see its config or original code) and save again",
    reference="https://github.com/qqwweee/keras-yolo3/issues/451",
    limits={"change": 0.01},
)
def eps_odd(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """eps differs between layers of one kind, or is none that the frameworks use.

    1e-5 is the default of torch, ONNX and Caffe, 1e-3 that of Keras and TensorFlow; either is right if the
    model was trained with it, and neither is said. eps is not in a state_dict, so a port easily ends with the
    other one, in all layers or in those that were written by hand.

    A warning where the difference changes the median gain of a BatchNorm by more than 1 %, else info. Going
    from 1e-5 to 1e-3 changes it by 4.6 % at variance 1e-2 and 29 % at 1e-3. Example: eps 0.001 in head.bn,
    1e-05 in 19 of 20 BatchNorms, gain changed by 12 %.
    """
    by_kind: dict[NormKind, list[NormLayer]] = {}
    for layer in layers:
        if layer.eps is not None and 0 <= layer.eps < math.inf:
            by_kind.setdefault(layer.kind, []).append(layer)
        else:
            yield Observation(
                layer=layer,
                message=f"eps is {layer.eps}, which is no usable number.",
                evidence={"eps": str(layer.eps)},
                severity=Severity.ERROR,
                rank=1e3,
            )
    for kind, group in by_kind.items():
        table = Counter(_eps(layer) for layer in group)
        # Where two are equally common the one the frameworks use is the usual one.
        usual = max(table, key=lambda eps: (table[eps], _is_family(eps), -eps))
        for layer in group:
            eps = _eps(layer)
            if eps != usual:
                expected, known = usual, f"{number(usual)} in {table[usual]} of {len(group)} {kind.value} layers"
            elif kind in TRACKING_KINDS and not _is_family(eps):
                expected = min(FAMILY_EPS, key=lambda family: abs(math.log(max(eps, 1e-30) / family)))
                known = "the frameworks use 1e-5 or 1e-3"
            else:
                continue
            change = _gain_change(layer, eps, expected)
            serious = change is not None and change > context.limits["change"]
            if eps == usual and not serious:
                continue
            effect = "" if change is None else f", which changes the median gain by {percent(change)}"
            yield Observation(
                layer=layer,
                message=f"eps is {number(eps)}, but {known}{effect}.",
                evidence={"eps": eps, "expected": expected, "gain_change": change},
                severity=Severity.WARNING if serious else Severity.INFO,
                rank=change or 0.0,
            )


def _eps(layer: NormLayer) -> float:
    """eps to six digits: a file may hold 1e-5 rounded to float32."""
    assert layer.eps is not None
    return float(f"{layer.eps:.6g}")


def _is_family(eps: float) -> bool:
    return any(abs(eps - family) <= 0.01 * family for family in FAMILY_EPS)


def _gain_change(layer: NormLayer, eps: float, expected: float) -> float | None:
    """By how much the median gain of the live channels moves when eps is replaced; None without variances."""
    var = layer.numbers.var
    if var is None or not layer.numbers.live.any():
        return None
    live = var[layer.numbers.live]
    return abs(math.expm1(median(np.log((live + eps) / (live + expected))) / 2))


@rule(
    "C306",
    "mixed-mode",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH,),
    needs=("training",),
    scope=Scope.MODEL,
    why="Part of the model follows the batch at hand, part the stored statistics, until eval() is called.",
    fix="none if these layers were frozen on purpose; otherwise call model.eval() before saving",
    reference="https://github.com/fxia22/pointnet.pytorch/issues/19",
)
def mixed_mode(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Some BatchNorms were saved in training mode and some in eval mode.

    Fine-tuning with frozen BatchNorms sets some of them to eval and leaves the rest, on purpose. It is a fault
    where a submodule was missed, or where train() was called on the whole model after freezing, which silently
    lets the frozen statistics move again. A call of model.eval() ends it either way.

    Said of the layers in the minority. Example: layer4.1.bn2 in training mode, 19 others in eval mode.
    """
    modules = [layer for layer in layers if not exported(layer)]
    training = [layer for layer in modules if layer.training]
    still = [layer for layer in modules if not layer.training]
    if not training or not still:
        return
    few, many = (training, still) if len(training) <= len(still) else (still, training)
    mode, other = ("training", "eval") if few is training else ("eval", "training")
    for layer in few:
        purpose = " It has no gradient: frozen on purpose?" if mode == "eval" and frozen(layer) else ""
        yield Observation(
            layer=layer,
            message=f"Saved in {mode} mode, {len(many)} of {plural(len(modules), 'BatchNorm')} in {other} mode."
            + purpose,
            evidence={"mode": mode, "in_this_mode": len(few), "in_the_other": len(many)},
        )


@rule(
    "C310",
    "averaged-weights-old-stats",
    severity=Severity.INFO,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    scope=Scope.MODEL,
    why="The weights are an average of several models, the statistics may still be those of one of them.",
    fix=f"unless the statistics were computed after averaging, {REESTIMATE}",
    reference="https://github.com/Lightning-AI/pytorch-lightning/issues/14866",
)
def averaged_weights_old_stats(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The file says that its weights are an average (EMA, SWA, a soup), and the model has running statistics.

    Averaged weights make other activations than any of the models they come from, so their statistics must be
    computed anew after averaging; a file cannot show whether they were. A counter with a fraction says that
    the buffers were averaged along, which is not the same thing.

    Harmless where update_bn or the like ran afterwards. Example: n_averaged = 12; re-estimating took a digits
    CNN from 96.6 % to 98.7 %.
    """
    fractions = [layer for layer in layers if (t := layer.numbers.updates) and t % 1 != 0]
    reasons = []
    if context.model.averaged:
        reasons.append(context.model.averaged)
    if fractions:
        counts = f"num_batches_tracked is a fraction ({number(fractions[0].numbers.updates or 0.0)}) in "
        reasons.append(counts + names([layer.name for layer in fractions]))
    if reasons:
        yield Observation(
            message=f"Averaged weights: {'; '.join(reasons)}. The running statistics of "
            f"{plural(len(layers), 'layer')} may be older.",
            evidence={"averaged": context.model.averaged, "fractional_counters": len(fractions)},
            confidence=Confidence.HIGH if context.model.averaged and fractions else None,
        )


@rule(
    "C311",
    "shape-mismatch",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    why="The layer cannot run; loading it or the first batch will fail.",
    fix="find which one was changed (pruned, resized, from another model) and bring the others along",
    reference="https://pytorch.org/docs/stable/generated/torch.nn.functional.batch_norm.html",
)
def shape_mismatch(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """weight, bias, running_mean and running_var do not have the same number of values.

    Usual after pruning that forgot the buffers, after replacing a head, or when two checkpoints were merged
    key by key. No other rule can calculate with such a layer, so they skip it.

    Example: weight has 64 values, running_var 48.
    """
    lengths = layer.lengths
    if layer.lengths_agree:
        return
    groups: dict[int, list[str]] = {}
    for name in VECTORS:
        if name in lengths:
            groups.setdefault(lengths[name], []).append(name)
    said = [f"{both(fields)} {plural(size, 'value')}" for size, fields in groups.items()]
    what = "Lengths differ" if len(groups) > 1 else "Nothing is stored"
    yield Observation(message=f"{what}: {', '.join(said)}.", evidence=dict(lengths))


@rule(
    "C313",
    "dtype-disagrees",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    scope=Scope.MODEL,
    why="torch on a CPU refuses such a layer, and what is kept in fewer bits has lost digits for good.",
    fix="convert the layer as a whole (layer.float() or layer.to(dtype)) and save again",
    reference="https://github.com/pytorch/pytorch/issues/88474",
)
def dtype_disagrees(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The tensors of one layer have different types, or a layer has another type than its siblings.

    Inside one layer: torch's CPU kernels raise "mixed dtype" or "expected scalar type Float but found Half";
    GPUs accept parameters in 16 bits beside statistics in float32, which mixed-precision training (FSDP with
    float32 buffers) leaves behind on purpose. Between layers of one kind it is only info: norms kept in
    float32 among 16-bit ones are usual, one in 16 bits among float32 ones is a leftover.

    Example: weight and bias float16, running_mean and running_var float32.
    """
    by_kind: dict[NormKind, list[tuple[NormLayer, str]]] = {}
    for layer in layers:
        types = {name: ref.dtype for name in VECTORS if (ref := getattr(layer, name)) is not None}
        distinct = set(types.values())
        if len(distinct) == 1:
            by_kind.setdefault(layer.kind, []).append((layer, distinct.pop()))
        elif distinct:
            said = [
                f"{both([name for name, have in types.items() if have == kind])} {kind}"
                for kind in dict.fromkeys(types.values())
            ]
            yield Observation(layer=layer, message=f"Types differ: {', '.join(said)}.", evidence=types, rank=1.0)
    for group in by_kind.values():
        yield from _unlike_siblings(group)


def _unlike_siblings(group: Sequence[tuple[NormLayer, str]]) -> Iterator[Observation]:
    table = Counter(dtype for _, dtype in group)
    usual, count = table.most_common(1)[0]
    if 2 * count <= len(group):
        return  # no usual type to differ from
    for layer, dtype in group:
        if dtype != usual:
            yield Observation(
                layer=layer,
                message=f"Stored as {dtype}, {count} of {len(group)} {layer.kind.value} layers as {usual}.",
                evidence={"dtype": dtype, "usual": usual},
                severity=Severity.INFO,
            )


@rule(
    "C314",
    "saved-in-training-mode",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH,),
    needs=("training",),
    scope=Scope.MODEL,
    why="Whoever loads it and forgets eval() gets answers that depend on the batch and move the statistics.",
    fix="call model.eval() before saving, and after loading in any case",
    reference="https://github.com/yaodongyu/TRADES/issues/3",
)
def saved_in_training_mode(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The module was saved with all its BatchNorms in training mode.

    Usual for a checkpoint written in the middle of training, and harmless where the loading code calls eval().
    A whole pickled module remembers the flag, unlike a state_dict. Where only some layers are in training mode
    it is C306.

    Example: 20 of 20 BatchNorms with training=True.
    """
    modules = [layer for layer in layers if not exported(layer)]
    if modules and all(layer.training for layer in modules):
        yield Observation(
            message=f"{plural(len(modules), 'BatchNorm')}, all saved with training=True.",
            evidence={"layers": len(modules)},
        )


RULES: tuple[Rule, ...] = (
    batch_stats_at_inference,
    momentum_zero,
    momentum_swapped,
    eps_odd,
    mixed_mode,
    averaged_weights_old_stats,
    shape_mismatch,
    dtype_disagrees,
    saved_in_training_mode,
)
