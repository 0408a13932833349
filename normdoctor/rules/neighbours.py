"""G: what stands around a norm and disturbs or undoes what it does."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from normdoctor.findings import FOLD, Confidence, Context, Observation, Rule, Severity, rule
from normdoctor.flow.graph import Op
from normdoctor.layers import TRACKING_KINDS, NormKind, NormLayer, median
from normdoctor.places import Place
from normdoctor.rules.guards import SWITCHED_OFF, frozen, usable_eps
from normdoctor.rules.verdict import quantile
from normdoctor.rules.wording import REESTIMATE, names, number, percent, plural

RELU_RATIO = 1 / (math.pi - 1)
"""mean² / variance of max(x, 0) for a normal x with mean 0: what dropout usually stands behind."""

CENTRING = (NormKind.BATCH, NormKind.INSTANCE, NormKind.LAYER, NormKind.GROUP)
SUMMING = tuple(op.value for op in (Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL))


@rule(
    "G501",
    "bias-before-norm",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH, NormKind.GROUP, NormKind.INSTANCE),
    needs=("place",),
    guesses=True,
    why="The norm subtracts the bias again with the mean, so it never gets a gradient and only takes up digits.",
    fix=f"nothing; by hand running_mean -= bias, then bias = 0, which is exact; or: {FOLD}",
    reference="https://arxiv.org/abs/1502.03167",
    limits={"warning": 10.0},
)
def bias_before_norm(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The convolution or linear layer before the norm has a bias, and nothing but the norm takes its output.

    A norm that subtracts the mean of each channel makes the output of a training independent of it, and its gradient
    is 0 to rounding (2e-13, where that of the weight is 294). Harmless: in a trained net |bias| is 0.08 standard
    deviations at the 95th percentile. A warning from 10 on, where the bias is most of the mean and costs digits (S108).

    A norm that was frozen, or fine-tuned in eval mode, does not subtract it anew: there the bias is live. A GroupNorm
    counts only with one channel a group. Example: 64 biases of conv1, |bias| / s.d. median 0.02, p95 0.08.
    """
    place = layer.place
    producer = None if place is None else place.producer
    if producer is None or not producer.alone or producer.bias is None or not producer.bias.size:
        return
    if layer.kind is NormKind.GROUP and layer.groups != layer.channels:
        return
    bias, var = np.abs(producer.bias), layer.numbers.var
    evidence: dict[str, float | int | bool] = {"parameters": bias.size, "frozen": frozen(layer)}
    size, severity, fix, high = "", Severity.INFO, None, 0.0
    if var is None:
        fix = "nothing, or set the bias to 0, which is exact"
    elif var.shape == bias.shape:
        good = layer.numbers.live & np.isfinite(bias)
        with np.errstate(over="ignore"):
            relative = bias[good] / np.sqrt(var[good] + (usable_eps(layer) or 0.0))
        relative = relative[np.isfinite(relative)]
        if relative.size:
            middle, high = median(relative), quantile(relative, 0.95)
            size = f" |bias| / s.d. has the median {number(middle)} and the 95th percentile {number(high)}."
            evidence |= {"median": middle, "p95": high}
            severity = Severity.WARNING if high > context.limits["warning"] else severity
    live = " The norm is frozen: where it trains in eval mode the bias is live." if frozen(layer) else ""
    count = "1 bias" if bias.size == 1 else f"{bias.size:,} biases"
    yield Observation(
        message=f"{count} of {producer.neighbour} before it: without effect in training, since the norm subtracts the "
        f"mean.{size}{live}",
        evidence=evidence,
        severity=severity,
        fix=fix,
        rank=high,
    )


@rule(
    "G506",
    "dropout-before-norm",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=(NormKind.BATCH,),
    needs=("place",),
    why="Dropout adds variance in training only, so the norm divides by more than eval gives it.",
    fix="when training anew move dropout behind the last norm; as it is, re-estimate with dropout off, after which "
    f"this finding stays and means nothing: {REESTIMATE}",
    reference="https://arxiv.org/abs/1801.05134",
    limits={"p": 0.1, "warning": 0.3},
)
def dropout_before_norm(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A dropout with p above 0.1 lies before a BatchNorm, with no norm in between (variance shift, Li 2019).

    With keep probability q = 1 - p eval sees the share q v / (v + (1 - q) mean^2) of the variance that the running
    average was made of: q where the mean is 0, as behind a norm, and 41 % for independent values behind a ReLU and
    p = 0.5. Sums over inputs that vary together keep more of it, so wide nets suffer less (a digits net: median 82 %,
    0.8 points of accuracy); behind a matrix product it is therefore info, and so is p below 0.3. DenseNet on
    CIFAR-100 fell from 77.4 to 68.6 % with p = 0.5.

    Harmless behind the last norm, and where the statistics were re-estimated with dropout off, which no file says.
    Example: dropout 0.5 in front of conv2 and bn2.
    """
    place = layer.place
    assert place is not None
    strong = [(label, p) for label, p in place.dropouts if context.limits["p"] < p <= 1]
    if not strong:
        return
    _, p = max(strong, key=lambda pair: pair[1])
    keep = 1 - p
    norm = _fed_by_norm(place, context)
    least = keep if norm else keep / (1 + p * RELU_RATIO)
    share = f"about {percent(least)} for independent values "
    share += f"with mean 0, as behind {norm}" if norm else f"behind a ReLU ({percent(keep)} where their mean is 0)"
    mixed = any(neighbour.op == Op.MATMUL.value for neighbour in place.before)
    listed = names([f"{label or 'dropout'}, p = {number(each)}" for label, each in strong])
    yield Observation(
        message=f"Dropout before it with no norm in between ({listed}): eval gives it less variance than training "
        f"stored, {share}, more where they vary together.",
        evidence={"dropouts": [label for label, _ in strong], "p": [each for _, each in strong], "least": least},
        severity=Severity.INFO if mixed or frozen(layer) or p < context.limits["warning"] else None,
        rank=p,
    )


def _fed_by_norm(place: Place, context: Context) -> str:
    """The norm whose output goes straight into the layer before this one; empty where none is known to."""
    nearest = place.before[0] if place.before else None
    if nearest is None or not nearest.label or nearest.op not in SUMMING:
        return ""
    for layer in context.model.layers:
        if layer.kind in CENTRING and layer.place is not None and nearest in layer.place.after:
            return f"{layer.kind.value} {layer.name}"
    return ""


@rule(
    "G510",
    "few-samples-norm",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=(NormKind.BATCH,),
    needs=("place",),
    why="A variance of a handful of values is mostly noise, in training as in its running average.",
    fix="train with larger batches or SyncBatchNorm, or use a LayerNorm there; nothing if batches were large",
    reference="https://arxiv.org/abs/2105.07576",
    limits={"values": 16},
)
def few_samples_norm(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A sample gives each channel of this norm a single value, as behind global pooling: the batch is all it has.

    A batch of one then raises in training, two give -1 and 1 whatever goes in. The running variance of n values has a
    relative noise of about sqrt(m / (2 - m) * 2 / (n - 1)): 23 % for n = 3, 5.8 % for n = 32, with momentum m = 0.1.
    How large the batches were is in no file: a warning only with --train-batch below 16, silent from there on.

    Harmless with large batches. Example: head.bn behind global pooling, trained in batches of 4.
    """
    place, batch = layer.place, context.train_batch
    assert place is not None
    if place.positions is None or place.positions < 1:
        return
    values = None if batch is None else batch * place.positions
    if values is None:
        if place.positions == 1:
            yield Observation(
                message="A sample has one value a channel here, so a batch of n gives n: a batch of 1 raises in "
                "training, 2 give -1 and 1 whatever goes in. --train-batch tells more.",
                evidence={"positions": 1},
                severity=Severity.INFO,
            )
        return
    if values >= context.limits["values"]:
        return
    m = layer.momentum
    known = isinstance(m, int | float) and 0 < m <= 1 and values > 1
    noise = math.sqrt(float(m) / (2 - float(m)) * 2 / (values - 1)) if known else None  # type: ignore[arg-type]
    said = "" if noise is None else f": the running variance is uncertain by about {percent(noise)}"
    yield Observation(
        message=f"In training {plural(values, 'value')} a channel ({plural(place.positions, 'value')} of each sample, "
        f"batches of {batch}){said}.",
        evidence={"values": values, "positions": place.positions, "noise": noise},
        severity=Severity.WARNING if place.positions == 1 else Severity.INFO,
        rank=1 / values if values else 1.0,
    )


@rule(
    "G511",
    "shared-norm",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("place", "running_mean", "running_var"),
    why="Training normalises each call with its own statistics, eval all of them with the mixture of the calls.",
    fix="give each call its own norm (gamma and beta may stay shared) and train on; siamese branches: nothing",
    reference="https://arxiv.org/abs/2105.07576",
)
def shared_norm(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """One norm with running statistics is called several times in a forward pass.

    Its buffers are an average over the inputs of all calls. Where these differ (time steps, pyramid levels, two
    domains) eval normalises none of them as training did.

    Fine where all calls see the same distribution, as the two branches of a siamese network do. Info for a frozen
    layer. Example: head.bn called 5 times, once for each level of a pyramid.
    """
    place, updates = layer.place, layer.numbers.updates
    assert place is not None
    if place.calls < 2:
        return
    others = [each.numbers.updates for each in context.model.layers if each.place is not None and each.place.calls == 1]
    counted = updates is not None and updates > 0 and any(updates == place.calls * (other or 0) for other in others)
    confirmed = (
        f" Its counter is {place.calls} times that of others, so training called it as often." if counted else ""
    )
    yield Observation(
        message=f"Called {place.calls} times in a forward pass, with one set of statistics for all calls.{confirmed} "
        "Fine where all calls see the same distribution (siamese branches).",
        evidence={"calls": place.calls, "num_batches_tracked": updates},
        severity=Severity.INFO if frozen(layer) else None,
        rank=float(place.calls),
    )


@rule(
    "G512",
    "residual-off",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    needs=("place", "weight"),
    even_untrained=False,
    why="The branch that the norm ends is computed for every input and adds nothing of it.",
    fix="remove the branch and add the norm's constant shift, if it has one, to what remains",
    reference="https://arxiv.org/abs/1706.02677",
    limits={"gain": SWITCHED_OFF},
)
def residual_off(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """All channels of a norm that ends a residual branch are switched off, so its block is the identity.

    The graph confirms that the norm's output is added to another value; with no gain of 0.001 or more the branch adds
    a constant. The block then passes on its other branch alone and can be removed. A203 says why that may have
    happened, and whether it is a fault.

    Harmless where blocks were switched off on purpose (pruning, stochastic depth). Example: all 256 gains of
    layer3.5.bn3 are 0 and its shift as well.
    """
    place, gain = layer.place, np.abs(layer.numbers.gain)
    assert place is not None
    if not place.joins_branches or not (gain < context.limits["gain"]).all():
        return
    shift = np.abs(layer.numbers.shift)
    largest = float(shift.max(initial=0.0)) if np.isfinite(shift).all() else None
    adds = "nothing" if largest == 0 else "a constant"
    removed = "the block is the identity and can be removed" if largest == 0 else "the branch can be replaced by it"
    yield Observation(
        message=f"It ends a residual branch with no gain above {number(float(gain.max(initial=0.0)))}, so the branch "
        f"adds {adds}: {removed}.",
        channels=range(len(gain)),
        evidence={"largest_gain": float(gain.max(initial=0.0)), "largest_shift": largest},
    )


RULES: tuple[Rule, ...] = (bias_before_norm, dropout_before_norm, few_samples_norm, shared_norm, residual_off)
