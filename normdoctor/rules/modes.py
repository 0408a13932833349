"""C: which statistics a layer uses when, and who may change it: mode, gradient, class."""

from __future__ import annotations

from collections.abc import Iterator

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import NormKind, NormLayer
from normdoctor.rules.guards import exported, frozen
from normdoctor.rules.wording import REESTIMATE, both, names, plural


@rule(
    "C301",
    "batch-stats-at-inference",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH,),
    needs=("training",),
    why="Eval works with the batch at hand, so an answer depends on its neighbours, or with buffers that stand still.",
    fix=f"build the layer with track_running_stats=True, then {REESTIMATE}",
    reference="https://github.com/pytorch/pytorch/issues/37823",
)
def batch_stats_at_inference(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """At inference the layer would normalise with the statistics of the batch at hand.

    In an exported or traced graph: it was recorded in training mode, for good, since nobody can call eval() on
    it (error).
    In a module: there are no buffers to use, because it was built with track_running_stats=False or they were
    removed. A batch of one with 1x1 maps then raises or gives the shift alone. InstanceNorm does so by design.

    Also said where track_running_stats was set to False afterwards and the buffers are still there: torch then
    does use them in eval mode, whatever the batch, but training no longer updates them.

    Example: a classifier whose answer for one image changes with its neighbours in the batch.
    """
    stored = layer.running_mean is not None or layer.running_var is not None
    if exported(layer):
        if layer.training:
            # Without buffers eval mode is no way out either.
            eval_helps = stored or layer.track_running_stats is None
            yield Observation(
                message="The graph was recorded in training mode: the layer uses the batch at hand for ever.",
                evidence={"training": True},
                severity=Severity.ERROR,
                fix="call model.eval() and export or trace it again" if eval_helps else None,
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
    "C307",
    "affine-frozen",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    needs=("requires_grad",),
    scope=Scope.MODEL,
    why="Training on leaves these gains and shifts alone, but in training mode the statistics move all the same.",
    fix="none if they are meant to stand still (then call eval() on them too); otherwise requires_grad_(True)",
    reference="https://github.com/pytorch/pytorch/issues/66073",
)
def affine_frozen(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """gamma and beta of some norm layers take no gradient: requires_grad is False.

    Done on purpose when a backbone is frozen for fine-tuning or a model is prepared for use. S104 and A204 take
    it for a choice and lower their voice. Half of a choice where a BatchNorm is in training mode: gamma and beta
    stand still while running_mean and running_var follow the new data.

    Only a pickled or live module knows; a state_dict does not. Example: 49 of 53 norm layers, of which 49 are in
    training mode.
    """
    still = [layer for layer in layers if layer.requires_grad is False]
    if not still:
        return
    moving = [layer for layer in still if layer.kind is NormKind.BATCH and layer.training]
    which = f"all {plural(len(layers), 'norm layer')}"
    if len(still) < len(layers):
        which = f"{len(still)} of {plural(len(layers), 'norm layer')} ({names([layer.name for layer in still])})"
    message = f"gamma and beta take no gradient in {which}."
    if moving:
        message += f" Among them in training mode: {plural(len(moving), 'BatchNorm')}, whose statistics still move."
    yield Observation(
        message=message,
        evidence={"layers": [layer.name for layer in still], "in_training_mode": len(moving)},
    )


@rule(
    "C308",
    "instancenorm-tracks",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=(NormKind.INSTANCE,),
    needs=("running_mean", "running_var"),
    why="It was trained with the statistics of each sample and is used with those of all: another function.",
    fix="set track_running_stats=False and remove the buffers, unless the model was validated in eval mode",
    reference="https://github.com/pytorch/pytorch/issues/58843",
)
def instancenorm_tracks(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """An InstanceNorm keeps running statistics (track_running_stats=True) and so has two faces.

    In training it normalises every sample with its own mean and variance; in eval with the averages over all
    samples, exactly as an eval-mode BatchNorm. What the instance norm was there for, to remove the contrast of
    each image, is then not removed. Old code relies on a default that was True once.

    Harmless where the model was validated in eval mode and found to be good. Silent where the flag is False,
    for then torch passes over the buffers. Example: an image generator that gives washed-out pictures after eval().
    """
    if layer.track_running_stats is False:
        return
    yield Observation(
        message=f"InstanceNorm with running statistics in {plural(layer.channels, 'channel')}: eval normalises "
        "with them, training with each sample's own.",
        evidence={"track_running_stats": layer.track_running_stats},
    )


@rule(
    "C309",
    "syncbn-left",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH,),
    needs=("origin",),
    scope=Scope.MODEL,
    why="Exporters, quantisers and fusers look for BatchNorm by its class and pass over or refuse this one.",
    fix="before export put a BatchNorm of the same tensors, eps and momentum in the place of each",
    reference="https://github.com/ultralytics/yolov5/issues/1018",
)
def syncbn_left(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The module still has layers of a class that synchronises statistics between processes (SyncBatchNorm).

    In eval mode it computes what a BatchNorm computes, so nothing is wrong with the numbers: info. Some of its
    versions want a GPU or a process group even then, and tools that fold or quantise know the plain class
    only: a warning with --target, when the model is on its way there.

    Example: 53 layers of torch.nn.modules.batchnorm.SyncBatchNorm.
    """
    synchronised = [layer for layer in layers if "Sync" in (layer.origin or "").rpartition(".")[2]]
    if synchronised:
        classes = list(dict.fromkeys(layer.origin or "" for layer in synchronised))
        yield Observation(
            message=f"{plural(len(synchronised), 'layer')} of {both(classes)}: "
            f"{names([layer.name for layer in synchronised])}.",
            evidence={"layers": [layer.name for layer in synchronised], "classes": classes},
            severity=Severity.WARNING if context.precision else None,
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
    mixed_mode,
    affine_frozen,
    instancenorm_tracks,
    syncbn_left,
    saved_in_training_mode,
)
