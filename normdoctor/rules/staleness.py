"""S: how the running statistics came about: never updated, kept in too few bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormLayer, Vector
from normdoctor.rules.guards import TOKEN_KINDS
from normdoctor.rules.wording import REESTIMATE, number, plural


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
        severity, counted = None, f"although {updates:,.0f} batches were counted, {_why_unmoved(layer)}"
    else:
        severity, counted = None, "0 batches were counted"
    yield Observation(
        message=f"running_mean is 0 and running_var is 1 in all {layer.channels} channels; {counted}.",
        channels=range(layer.channels),
        evidence={"num_batches_tracked": updates},
        severity=severity,
    )


def _why_unmoved(layer: NormLayer) -> str:
    """What keeps counted batches out of the buffers, as far as the file tells."""
    if layer.momentum == 0:
        return "so momentum was 0"
    lost = "the buffers were reset or lost afterwards"
    if layer.momentum is None:
        return f"so momentum was 0 or {lost}"
    if isinstance(layer.momentum, str):
        return f"so {lost}"
    return f"with momentum {number(layer.momentum)}, so {lost}"


@rule(
    "S113",
    "low-precision-ema",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    why="A moving average kept in 16 bits stops moving once a step is smaller than its last digit.",
    fix=f"if the model was only cast to 16 bits and back, nothing; otherwise, in float32, {REESTIMATE}",
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


RULES: tuple[Rule, ...] = (
    untrained_model,
    never_updated_stats,
    low_precision_ema,
)
