"""D: the stored statistics against those of the user's own data, layer by layer and for the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from normdoctor.findings import MEASURE_ANEW, Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormLayer, median
from normdoctor.measured import Drift, DriftVerdict
from normdoctor.rules.divergence import Shift, shift_of
from normdoctor.rules.guards import for_size, frozen
from normdoctor.rules.verdict import TOO_LITTLE, VERDICT_LIMITS, effective_values, quantile
from normdoctor.rules.wording import number, percent, plural, some_of

STATISTICS = ("measured", "running_mean", "running_var")
REPEAT = f"make sure that the data is what the model is for, prepared as for training; then: {MEASURE_ANEW}"
PREPARE_FIRST = "first prepare the data as the model was trained (D608)"


@rule(
    "D601",
    "mean-shift",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=STATISTICS,
    assumes=False,
    even_untrained=False,
    why="Eval subtracts means that the inputs do not have, so every later layer gets inputs it was not trained on.",
    fix=REPEAT,
    reference="https://arxiv.org/abs/2105.07576",
    # benchmarks/drift.md
    limits={"warning": 0.25, "error": 0.5},
)
def mean_shift(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The inputs of the layer have other means than the buffers say.

    Measured in eval mode on the data given, with the stored statistics in all layers before it, in standard
    deviations by the buffers. Warning where the 5 % worst channels are off by 0.25 or more, error where half of
    them are off by 0.5. What lies within three standard errors of the measuring counts as no shift, channels
    without signal are left out, and a layer that is frozen is judged one level lower.

    Harmless where the data is not what the model is for, which this cannot know. Example: weights averaged
    over a training, with the buffers of its last step: 0.54 standard deviations.
    """
    shift = shift_of(layer, context.train_batch)
    if shift is None or not len(shift.channels):
        return
    limits, middle, high = context.limits, median(shift.sure_z), quantile(shift.sure_z, 0.95)
    if middle <= limits["error"] and high <= limits["warning"]:
        return
    severity, remark = _level(layer, shift, Severity.ERROR if middle > limits["error"] else Severity.WARNING, context)
    if severity is None:
        return
    far = [int(channel) for channel in shift.channels[shift.sure_z > limits["warning"]]]
    yield Observation(
        message=f"The means of the inputs are off by {number(middle)} standard deviations in the median channel and by "
        f"{number(high)} in the worst twentieth; by more than {number(limits['warning'])} in "
        f"{some_of(far, layer.channels)}.{remark}",
        channels=far,
        evidence={"shift": middle, "shift_p95": high, **_extent(layer, shift)},
        severity=severity,
        fix=_step(context),
        rank=high,
    )


@rule(
    "D602",
    "variance-shift",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=STATISTICS,
    assumes=False,
    even_untrained=False,
    why="Eval divides by a spread that the inputs do not have: all outputs come too large or too small.",
    fix=REPEAT,
    reference="https://arxiv.org/abs/1801.05134",
    # benchmarks/drift.md
    limits={"warning": 1.25, "error": 2.0},
)
def variance_shift(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The inputs of the layer vary more, or less, than the buffers say.

    The ratio of measured to stored variance, in the median channel: warning outside 0.8 to 1.25, error outside
    0.5 to 2. Below 1 in all layers after a dropout: the dropout was on while the statistics were collected. Below
    1 everywhere: data of lower contrast, or what is left of the initial 1. Above 1: averaged weights with the
    buffers of one of them. What lies within three standard errors of the measuring counts as no shift.

    Example: images of half the contrast: ratio 0.34 in the first layer.
    """
    shift = shift_of(layer, context.train_batch)
    if shift is None or not len(shift.channels):
        return
    limits, middle = context.limits, median(shift.sure_log_ratio)
    if abs(middle) <= math.log(limits["warning"]):
        return
    severe = Severity.ERROR if abs(middle) > math.log(limits["error"]) else Severity.WARNING
    severity, remark = _level(layer, shift, severe, context)
    if severity is None:
        return
    far = [int(c) for c in shift.channels[np.abs(shift.sure_log_ratio) > math.log(limits["warning"])]]
    ratio = math.exp(min(middle, 700.0))
    yield Observation(
        message=f"The variance of the inputs is {number(ratio)} times running_var in the median channel, and more than "
        f"{number(limits['warning'])} times larger or smaller in {some_of(far, layer.channels)}.{remark}",
        channels=far,
        evidence={"ratio": ratio, **_extent(layer, shift)},
        severity=severity,
        fix=_step(context),
        rank=abs(middle),
    )


@rule(
    "D603",
    "stat-divergence",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=STATISTICS,
    scope=Scope.MODEL,
    assumes=False,
    even_untrained=False,
    why="With statistics that are not those of its inputs a network in eval is another function than was trained.",
    fix=REPEAT,
    reference="https://arxiv.org/abs/2105.07576",
    # benchmarks/drift.md
    limits={"warning": 0.05, "error": 0.2, **VERDICT_LIMITS},
)
def stat_divergence(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The distribution that the buffers describe is not that of the inputs: of a layer, and of the whole model.

    KL(data || buffers) of normal distributions takes mean and variance together, in nats. For the whole model the
    median over the channels of all layers decides, less what measuring on so few samples adds: healthy nets stay
    below 0.0015, on data they have not seen as well. Stale (warning; error from 0.2 on) where besides more than 20 %
    of the channels are further off than six standard errors of a healthy moving average; noisy (info) where not.
    A single layer is named where its worst twentieth of channels are above 0.05 (warning) or half of them above
    0.2 (error).

    Example: buffers kept while the weights were trained for another epoch: 0.005 to 0.06, in 61 to 94 % of the
    channels.
    """
    drift = context.drift
    if drift is None:
        return
    yield from _of_model(layers, context, drift)
    for layer in layers:
        shift = shift_of(layer, context.train_batch)
        if shift is not None and len(shift.channels):
            yield from _of_layer(layer, shift, context)


def _of_model(layers: tuple[NormLayer, ...], context: Context, drift: Drift) -> Iterator[Observation]:
    if drift.verdict not in (DriftVerdict.STALE, DriftVerdict.NOISY) or drift.divergence is None:
        return
    if drift.verdict is DriftVerdict.NOISY:
        severity, said = Severity.INFO, "The stored statistics are noisy"
    else:
        severity = Severity.ERROR if drift.divergence > context.limits["error"] else Severity.WARNING
        said = "The stored statistics are not those of this data"
    remark = ""
    if all(frozen(layer) for layer in layers):
        severity, remark = severity.lowered(), " All layers are frozen: by design?"
    yield Observation(
        message=f"{said}: {_in_numbers(drift)}.{remark}",
        evidence={
            "verdict": drift.verdict.value,
            "divergence": drift.divergence,
            "noise": drift.noise,
            "beyond": drift.beyond,
            "samples": drift.samples,
        },
        severity=severity,
        confidence=None if drift.beyond is not None else Confidence.MEDIUM,
        rank=math.inf,
        subject=context.model.key or "",
    )


def _in_numbers(drift: Drift) -> str:
    """What the verdict rests on: median divergence 0.0213 nats over 9 layers, 74 % of the channels beyond ..."""
    words = f"median divergence {number(drift.divergence or 0.0)} nats over {plural(len(drift.layers), 'layer')}"
    if drift.beyond is not None:
        words += f", {percent(drift.beyond)} of the channels beyond six standard errors"
    return words


def _of_layer(layer: NormLayer, shift: Shift, context: Context) -> Iterator[Observation]:
    divergence, limits = shift.sure_divergence, context.limits
    middle, high = median(divergence), quantile(divergence, 0.95)
    if middle <= limits["error"] and high <= limits["warning"]:
        return
    severity, remark = _level(layer, shift, Severity.ERROR if middle > limits["error"] else Severity.WARNING, context)
    if severity is None:
        return
    far = [int(channel) for channel in shift.channels[divergence > limits["warning"]]]
    yield Observation(
        layer=layer,
        message=f"The inputs diverge from the buffers by {number(middle)} nats in the median channel and by "
        f"{number(high)} in the worst twentieth; by more than {number(limits['warning'])} in "
        f"{some_of(far, layer.channels)}.{remark}",
        channels=far,
        evidence={"divergence": middle, "divergence_p95": high, **_extent(layer, shift)},
        severity=severity,
        fix=_step(context),
        rank=high,
    )


def _level(layer: NormLayer, shift: Shift, severity: Severity, context: Context) -> tuple[Severity | None, str]:
    """The severity as far as so many channels carry it, with what speaks against it; None for too few channels."""
    allowed = for_size(len(shift.channels), severity)
    if allowed is None:
        return None, ""
    remarks = ""
    if layer.measured is not None and layer.measured.samples < TOO_LITTLE:
        allowed, remarks = Severity.INFO, f" Seen on {plural(layer.measured.samples, 'sample')} only."
    if frozen(layer):
        allowed, remarks = allowed.lowered(), remarks + " The layer is frozen: by design?"
    if _prepared_otherwise(context):
        allowed, remarks = allowed.lowered(), remarks + " The data may be prepared otherwise than for training (D608)."
    return allowed, remarks


def _prepared_otherwise(context: Context) -> bool:
    return context.drift is not None and bool(context.drift.prepared)


def _step(context: Context) -> str | None:
    """The fix where it is not the rule's own: statistics of data that is prepared wrongly repair nothing."""
    return PREPARE_FIRST if _prepared_otherwise(context) else None


def _extent(layer: NormLayer, shift: Shift) -> dict[str, int | float | None]:
    """On how much a statement about the layer rests."""
    return {"compared": len(shift.channels), "broken": shift.broken, "effective_samples": effective_values(layer)}


@rule(
    "D604",
    "train-eval-gap",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    needs=STATISTICS,
    kinds=TRACKING_KINDS,
    scope=Scope.MODEL,
    assumes=False,
    even_untrained=False,
    why="The model answers otherwise in eval than it did in training.",
    fix=REPEAT,
    reference="https://github.com/pytorch/pytorch/issues/4741",
    # Healthy nets of benchmarks/drift.py: up to 3 % and 0.25.
    limits={"samples": 32, "flips": 0.05, "change": 0.3, "flips_error": 0.2, "change_error": 0.5},
)
def train_eval_gap(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The outputs with the stored statistics differ from those with the statistics of each batch.

    This is a consequence, and no proof: on images they have not seen healthy nets change up to 11 % of their
    answers, for the statistics of a batch are noisy themselves. So it is an info unless the statistics are stale
    (D603). Then it is a warning where 5 % of the answers change or the outputs move by 30 % of their length, an error
    from 20 % or a half on. Only said where a batch has at least 32 independent values a channel.

    Example: the same net, the same batch: loss 0.17 with the statistics of the batch, 0.94 with the stored ones.
    """
    drift, limits = context.drift, context.limits
    if drift is None or drift.verdict is DriftVerdict.UNKNOWN:
        return
    values = [known for layer in layers if (known := effective_values(layer)) is not None]
    if not values or min(values) / max(drift.batches, 1) < limits["samples"]:
        return
    flips, change = drift.disagreement or 0.0, drift.output_change or 0.0
    if flips <= limits["flips"] and change <= limits["change"]:
        return
    severity = Severity.INFO
    if drift.verdict is DriftVerdict.STALE:
        much = flips > limits["flips_error"] or change > limits["change_error"]
        severity = Severity.ERROR if much else Severity.WARNING
    said = []
    if drift.disagreement is not None:
        said.append(f"{percent(flips)} of the answers change")
    if drift.output_change is not None:
        said.append(f"the outputs move by {percent(change)} of their length")
    yield Observation(
        message=f"With the statistics of each batch in place of the stored ones {' and '.join(said)}.",
        evidence={
            "disagreement": drift.disagreement,
            "output_change": None if drift.output_change is None or change == math.inf else change,
        },
        severity=severity,
        subject=context.model.key or "",
        fix=None if severity > Severity.INFO else "none: the stored statistics are not what is wrong",
    )


RULES: tuple[Rule, ...] = (mean_shift, variance_shift, stat_divergence, train_eval_gap)
