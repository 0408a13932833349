"""D: the data that a model was run on: how much of it there is, how it was prepared, what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormLayer, median
from normdoctor.measured import DriftVerdict, Measured
from normdoctor.rules.divergence import BATCHES_FOR_SPREAD
from normdoctor.rules.guards import in_use
from normdoctor.rules.verdict import PREPARED_LIMITS, better_prepared, effective_values
from normdoctor.rules.wording import number, percent, plural, some_of, where

GATES = frozenset({"relu", "relu6"})
"""Activations that pass nothing on below 0."""

PREPARE = "prepare the data as the model was trained"
INSPECT_AGAIN = "normdoctor inspect {path}{data}"


@rule(
    "D605",
    "recalibration-hurts",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    needs=("measured",),
    scope=Scope.MODEL,
    assumes=False,
    why="Statistics of the wrong data are worse than old ones of the right data.",
    fix="keep the statistics that were stored; use data like that of the training, or --method blend",
    reference="https://arxiv.org/abs/2006.16971",
    limits={"accuracy": 0.002, "p": 0.01, "entropy": 0.1},
)
def recalibration_hurts(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """With statistics measured anew on this data the model is worse than with the stored ones.

    Said by `recalibrate`, which tries both. With labels: the accuracy falls by more than 0.2 points, and a paired
    test (McNemar) says that this is no chance. Without labels the entropy of the answers stands in: an info where
    it rises by more than 10 %, for a model on harder data is rightly less sure.

    Example: statistics of inverted images took the accuracy on them from 26.6 to 18.8 %; a net trained with
    frozen statistics fell from 98.8 to 98.0 %.
    """
    seen, limits = context.model.measurement, context.limits
    after = None if seen is None else seen.recalibrated
    if seen is None or after is None:
        return
    if seen.accuracy is not None and after.accuracy is not None:
        lost = seen.accuracy - after.accuracy
        if lost > limits["accuracy"] and (after.p_value is None or after.p_value < limits["p"]):
            tested = "" if after.p_value is None else f" (McNemar p = {number(after.p_value)})"
            yield Observation(
                message=f"With statistics measured anew {percent(after.accuracy)} of {plural(seen.samples, 'sample')} "
                f"{'is' if seen.samples == 1 else 'are'} right, with the stored ones {percent(seen.accuracy)}{tested}.",
                evidence={"before": seen.accuracy, "after": after.accuracy, "p_value": after.p_value},
                subject=context.model.key or "",
            )
        return
    before, now = after.entropy_before, after.entropy
    if before is not None and now is not None and now > before * (1 + limits["entropy"]):
        yield Observation(
            message=f"With statistics measured anew the answers are less sure: mean entropy {number(now)} nats, with "
            f"the stored ones {number(before)}.",
            evidence={"entropy_before": before, "entropy": now},
            severity=Severity.INFO,
            subject=context.model.key or "",
        )


@rule(
    "D606",
    "too-little-data",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("measured", "running_var"),
    scope=Scope.MODEL,
    assumes=False,
    why="A variance from fewer than 450 independent values is not known to a fifth, whatever the number of pixels.",
    fix="give more samples, of all classes; 1,000 to 10,000 are enough",
    reference="https://arxiv.org/abs/2105.07576",
    # Three standard errors of a mean, 3 / sqrt(n), and of a log variance, 3 sqrt(2 / n), within the limits of D602.
    limits={"least": 32, "enough": 450},
)
def too_little_data(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The data holds too few independent values a channel to tell a shift of D601 or D602 from chance.

    Pixels of one image are alike, so what counts is samples * variance / variance of the means of samples: a map
    of 256 pixels may be worth no more than 1.6 values. From 144 on a mean is known to a quarter of a standard
    deviation (three standard errors), from 450 on a variance to a fifth; under 32 nothing can be said, and
    `recalibrate` refuses.

    Harmless for a first look. Example: 64 digits are worth 76 values in layer3.0.bn2.
    """
    limits = context.limits
    known = {layer: values for layer in layers if (values := effective_values(layer)) is not None}
    few = sorted((layer for layer in known if known[layer] < limits["enough"]), key=lambda layer: known[layer])
    if not few:
        return
    least = known[few[0]]
    said = "Nothing can be said of such a layer." if least < limits["least"] else "Small shifts are not seen."
    yield Observation(
        message=f"The data is worth {number(least)} independent values a channel in {few[0].name}, and fewer than "
        f"{number(limits['enough'])} in {len(few)} of {plural(len(known), 'layer')}. {said}",
        evidence={"least": least, "layers": [layer.name for layer in few], "values": [known[layer] for layer in few]},
        subject=context.model.key or "",
    )


@rule(
    "D607",
    "small-batch-stats",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("measured", "running_var"),
    assumes=False,
    why="Training divided by the variance of a few values, which is smaller than the one eval divides by.",
    fix="train on with larger batches or SyncBatchNorm, or multiply running_var by 1 - 1 / n (EvalNorm)",
    reference="https://arxiv.org/abs/1904.06031",
    limits={"info": 16, "warning": 8},
)
def small_batch_stats(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """In a batch of the training there were too few independent values, so eval is softer than training was.

    The biased variance of n values is (1 - 1 / n) v on average. Only said where the batch of the training is known
    (--train-batch, of each process) and n, from how alike the values of a sample are, is below 16; a warning
    below 8.

    Example: batches of 4 behind a global pooling: eval divides by a variance one third larger.
    """
    values, batch, seen = effective_values(layer), context.train_batch, layer.measured
    if values is None or batch is None or seen is None or not seen.samples:
        return
    worth = max(batch * values / seen.samples, 1.0)
    if worth >= context.limits["info"]:
        return
    larger = "by what a single value cannot tell" if worth <= 1 else f"{number(worth / (worth - 1))} times as large"
    yield Observation(
        message=f"A batch of {batch} is worth {number(worth)} independent values a channel: eval divides by a variance "
        f"{larger}.",
        evidence={"train_batch": batch, "values": worth, "factor": 1 - 1 / worth},
        severity=None if worth < context.limits["warning"] else Severity.INFO,
        rank=1 / worth,
    )


@rule(
    "D608",
    "input-scale",
    severity=Severity.ERROR,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("measured", "running_mean", "running_var"),
    scope=Scope.MODEL,
    assumes=False,
    even_untrained=False,
    why="Wrong preprocessing is far more frequent than wrong statistics, and looks like them.",
    fix="prepare the data as for training (--scale, --mean, --std, the order of the channels) and look again",
    reference="https://github.com/onnx/onnx/issues/1440",
    # benchmarks/drift.md
    limits=PREPARED_LIMITS,
)
def input_scale(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The first norm does not fit the data as it was given, and does fit it prepared otherwise.

    Tried are times 255, divided by 255, the colours in the other order, and what else the report lists. Only where
    the first norm is off, another preparation is ten times better, and with it the inputs are close to the
    buffers; D601 to D603 are then judged one level lower.

    Harmless: nothing, the model would be used on such data. Example: bytes from 0 to 255 given to a net that was
    trained on 0 to 1: 32,600 nats as given, 0.00005 divided by 255.
    """
    seen = context.model.measurement
    better = None if seen is None else better_prepared(seen.preprocessing, context.limits)
    if seen is None or better is None:
        return
    given = seen.preprocessing[0]
    yield Observation(
        message=f"The inputs of the first norm diverge from its buffers by {number(given.divergence)} nats with the "
        f"data as given, and by {number(better.divergence)} with it prepared otherwise: {better.words}.",
        evidence={
            "tried": [one.words for one in seen.preprocessing],
            "divergences": [one.divergence for one in seen.preprocessing],
        },
        fix=f"{PREPARE}, then: {INSPECT_AGAIN} {better.options}"
        if better.options
        else f"{PREPARE}, where it is made: {better.words}",
        subject=context.model.key or "",
    )


@rule(
    "D609",
    "dead-on-data",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    needs=("measured",),
    assumes=False,
    even_untrained=False,
    why="A channel that never passes the ReLU does no work and gets no gradient.",
    fix="prune these channels, or train on with a smaller learning rate; more data may still wake some",
    reference="https://arxiv.org/abs/1903.06733",
    limits={"warning": 0.1, "error": 0.9, "samples": 32},
)
def dead_on_data(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Channels whose output is never above 0 on any sample, in front of a ReLU or ReLU6.

    No firing in K samples means that at most 3 / K of all samples make it fire (95 % sure). Channels with a gain of
    next to 0 are A202's and are left out. Info; a warning from 10 % of the channels on, an error from 90 %. Not said
    below 32 samples, nor where the statistics are broken or stale (D603) or the data is prepared otherwise than for
    training (D608), for such channels only look dead.

    Harmless where the data lacks what these channels look for. Example: 7 of 64 channels never fire on 1,000
    images, so they do on fewer than 0.3 %.
    """
    seen = layer.measured
    if seen is None or seen.active is None or seen.gate not in GATES or len(seen.active) != len(layer.numbers.gain):
        return
    if layer.running_var is not None and not layer.lengths_agree:
        return
    if seen.samples < context.limits["samples"] or not _trusted(layer, context):
        return
    used = in_use(layer)
    dead = where((seen.active == 0) & used)
    if not dead:
        return
    share = len(dead) / int(used.sum())
    limits = context.limits
    severity = Severity.ERROR if share >= limits["error"] else Severity.WARNING
    yield Observation(
        message=f"Not above 0 on any of {plural(seen.samples, 'sample')}: {some_of(dead, layer.channels)}. So at most "
        f"{percent(min(3 / seen.samples, 1.0))} of all samples make such a channel fire.",
        channels=dead,
        evidence={"dead": len(dead), "in_use": int(used.sum()), "samples": seen.samples},
        severity=severity if share >= limits["warning"] else Severity.INFO,
        rank=share,
    )


def _trusted(layer: NormLayer, context: Context) -> bool:
    """Whether what leaves the layer is what left it in training, as far as its numbers and the verdict say."""
    mean, var, drift = layer.numbers.mean, layer.numbers.var, context.drift
    if drift is not None and (drift.verdict is DriftVerdict.STALE or drift.prepared):
        return False
    assert layer.measured is not None
    moments = layer.measured.moments
    vectors = [each for each in (mean, var, moments.mean, moments.m2) if each is not None]
    return all(np.isfinite(each).all() for each in vectors) and (var is None or bool((var >= 0).all()))


@rule(
    "D610",
    "non-iid-batches",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("measured",),
    scope=Scope.MODEL,
    assumes=False,
    why="A moving average then knows the last kind of batch, and averaged variances lack what lies between batches.",
    fix="shuffle the data before it is cut into batches",
    reference="https://arxiv.org/abs/2105.07576",
    limits={"share": 0.1, "sure": 3.0},
)
def non_iid_batches(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The batches of this data differ from each other by more than chance.

    The variance of all values is that within batches plus that of the means of batches. Shuffled data leaves to the
    second what sampling explains; said where it is more than that by 10 % of the whole in some layer. Only of data
    that comes in batches of its own, for samples in files are shuffled here. `recalibrate` merges all values and
    does not mind; a training on such batches would.

    Harmless for measuring. Example: digits sorted by class: 65 % of the variance in layer3.0.bn2 lies between
    batches.
    """
    limits = context.limits
    found = {}
    for layer in layers:
        if layer.measured is not None:
            share, error = _between_batches(layer.measured)
            if share > max(limits["share"], limits["sure"] * error):
                found[layer.name] = share
    if found:
        worst = max(found, key=lambda name: found[name])
        yield Observation(
            message=f"In {worst} {percent(found[worst])} of the variance lies between batches beyond what chance "
            f"explains, and more than {percent(limits['share'])} in {len(found)} of {plural(len(layers), 'layer')}: "
            "the data is not shuffled.",
            evidence={"layers": list(found), "shares": list(found.values())},
            subject=context.model.key or "",
        )


def _between_batches(seen: Measured) -> tuple[float, float]:
    """The share of the variance that lies between batches beyond sampling, median over channels, and its standard
    error where the batches are alike."""
    if seen.mean_spread is None or seen.effective is None or seen.batches < BATCHES_FOR_SPREAD:
        return 0.0, 0.0
    with np.errstate(all="ignore"):
        by_chance = seen.batches / seen.effective
        excess = np.square(seen.mean_spread) / seen.moments.variance() - by_chance
        good = np.isfinite(excess)
    error = median(by_chance[good]) * math.sqrt(2.0 / (seen.batches - 1))
    return median(excess[good]), error


@rule(
    "D611",
    "order-dependence",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    needs=("measured",),
    scope=Scope.MODEL,
    assumes=False,
    why="The answer to one sample depends on what else is in the batch.",
    fix="call model.eval() before saving or exporting; where there are no running statistics, collect some first",
    reference="https://github.com/yaodongyu/TRADES/issues/3",
    limits={"change": 0.01},
)
def order_dependence(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The same sample among other neighbours gives another output, in the modes that the model was saved in.

    What C301 forecasts, seen on data: somewhere the statistics of the batch are used. Rounding moves outputs by
    less than a millionth (a thousandth in 16 bits); from 1 % on it is said.

    Example: an output that moves by 37 % of its length when the batch is shuffled.
    """
    seen = context.model.measurement
    change = None if seen is None else seen.order_dependence
    if change is not None and not change <= context.limits["change"]:
        moved = percent(change) if math.isfinite(change) else "more than can be calculated"
        yield Observation(
            message=f"The outputs of the same samples move by {moved} of their length with their neighbours in the "
            "batch.",
            evidence={"change": change if math.isfinite(change) else None},
            subject=context.model.key or "",
        )


RULES: tuple[Rule, ...] = (
    recalibration_hurts,
    too_little_data,
    small_batch_stats,
    input_scale,
    dead_on_data,
    non_iid_batches,
    order_dependence,
)
