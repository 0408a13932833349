"""N: numbers that the precision a model is meant for cannot hold. Above info only with --target."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Severity, rule
from normdoctor.layers import TRACKING_KINDS, Mask, NormLayer, Vector
from normdoctor.places import Verdict
from normdoctor.rules.decay import SMALLEST_NORMAL
from normdoctor.rules.guards import distance, switched_on, usable_eps
from normdoctor.rules.wording import both, number, percent, some_of, where

UNIT_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""The largest relative error of rounding to the type."""

FLOAT_FORMATS = "https://github.com/pytorch/pytorch/issues/126525"


@rule(
    "N401",
    "fp16-overflow",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    why="In float16 these become infinite; with an infinite variance the channel gives only its shift.",
    fix="fold the norm into the layer before it first, or keep norms in float32 (as torch.autocast does)",
    reference=FLOAT_FORMATS,
    limits={"largest": 65504.0},
)
def fp16_overflow(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A value is larger than float16 can hold.

    model.half() turns it into infinity without a word. A large running_var is no fault in itself: a first
    layer on raw 0-255 inputs has 80,000 to 150,000 in published models. Info unless the target is fp16, where it is
    an error; silent for targets with a wider range.

    Example: running_var up to 4.97e+05 in a published pitch tracker; 64 of 128 channels become infinite.
    """
    if context.precision not in (None, "fp16"):
        return
    bar = context.limits["largest"]
    bad = np.zeros(0, dtype=bool)
    said: list[str] = []
    largest = 0.0
    for name, values in _values(layer).items():
        if values.max() <= bar and values.min() >= -bar:
            continue
        size = np.abs(values)
        over = (size > bar) & np.isfinite(size)
        if over.any():
            highest = float(size[over].max())
            largest = max(largest, highest)
            said.append(f"{name} reaches {number(highest)}")
            bad = over if bad.shape != over.shape else bad | over
    if not said:
        return
    channels = where(bad)
    yield Observation(
        message=f"{both(said)}, float16 ends at {bar:,.0f}: {some_of(channels, len(bad))}.",
        channels=channels,
        evidence={"largest": largest},
        severity=Severity.ERROR if context.precision == "fp16" else Severity.INFO,
        rank=largest,
    )


def _values(layer: NormLayer) -> dict[str, np.ndarray]:
    numbers = layer.numbers
    found = {"running_var": numbers.var, "running_mean": numbers.mean}
    if layer.weight is not None:
        found["weight"] = numbers.gain
    if layer.bias is not None:
        found["bias"] = numbers.shift
    return {name: values for name, values in found.items() if values is not None and values.size}


@rule(
    "N402",
    "fp16-underflow",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    why="What is below float16's smallest number becomes 0; variance and eps both 0 is a division by zero.",
    fix="fold the norm before converting, keep norms in float32, or use an eps of 1e-5 or more",
    reference=FLOAT_FORMATS,
    limits={"smallest": 2.0**-25},
)
def fp16_underflow(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A variance or eps is so small that float16 rounds it to 0: below 3e-8, half of its smallest number.

    eps = 1e-5 survives (as a subnormal, to 0.14 %), 1e-8 and 1e-12 become 0. A variance that becomes 0 only
    drops a channel that had next to no input, as long as eps stays. With both gone the layer divides by zero:
    error for target fp16, otherwise a warning there; info without a target, silent for other targets.

    Example: LayerNorm with eps 1e-12, as BERT has it, cast to float16.
    """
    if context.precision not in (None, "fp16"):
        return
    bar, var, eps = context.limits["smallest"], layer.numbers.var, usable_eps(layer)
    eps_lost = eps is not None and eps < bar
    lost = np.zeros(0, dtype=bool) if var is None else (var > 0) & (var < bar)
    if not eps_lost and not lost.any():
        return
    zero = lost if var is None else lost | (var == 0)
    severity = Severity.ERROR if eps_lost and zero.any() else Severity.WARNING
    said = [f"running_var in {some_of(where(lost), len(lost))}"] if lost.any() else []
    if eps is not None and eps_lost:
        said.append(f"eps {number(eps)}")
    division = " Dividing by zero follows." if severity is Severity.ERROR else ""
    yield Observation(
        message=f"Below {number(bar)}, which float16 rounds to 0: {both(said)}.{division}",
        channels=where(zero if eps_lost else lost),
        evidence={
            "eps": eps,
            "smallest_variance": float(var[lost].min()) if var is not None and lost.any() else None,
        },
        severity=severity if context.precision == "fp16" else Severity.INFO,
        rank=float(np.count_nonzero(zero)),
    )


@rule(
    "N403",
    "low-precision-mean",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    why="Rounding the mean alone shifts the channel's output.",
    fix="fold the norm before converting, or keep norms in float32",
    reference="https://arxiv.org/abs/1710.03740",
    # benchmarks/calibration.md: healthy nets reach 1 %, and 20 % in every channel costs 5 points.
    limits={"shift": 0.05},
)
def low_precision_mean(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Storing running_mean in 16 bits moves a channel by more than 5 % of its standard deviation.

    The rounding error is up to |mean| * 2^-8 in bfloat16 and |mean| * 2^-11 in float16, so it starts at means
    of 12.8 and 102 standard deviations. Judged for the target, and without one as info for bfloat16.

    Example: a mean of 59 standard deviations is rounded by up to 0.23 of them in bfloat16.
    """
    unit = UNIT_ROUNDING.get(context.precision or "bf16")
    if unit is None:
        return
    shift = distance(layer) * unit
    mask = shift > context.limits["shift"]
    if not mask.any():
        return
    worst = int(np.argmax(shift))
    channels = where(mask)
    name = "float16" if context.precision == "fp16" else "bfloat16"
    yield Observation(
        message=(
            f"In {name} rounding the mean shifts {some_of(channels, len(mask))} by up to "
            f"{percent(shift[worst])} of a standard deviation (channel {worst})."
        ),
        channels=channels,
        evidence={"largest_shift": float(shift[worst]), "type": name},
        severity=Severity.WARNING if context.precision else Severity.INFO,
        rank=float(shift[worst]),
    )


@rule(
    "N404",
    "fold-range-spread",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("place", "running_var", "eps"),
    guesses=True,
    why="One int8 step for the whole tensor is made for the widest channel and leaves the narrow ones a few values.",
    fix="quantise the weights per channel, or equalise the ranges across layers first (s_i = sqrt(r1 r2) / r2)",
    reference="https://arxiv.org/abs/1906.04721",
    limits={"least": 1 / 16, "mean": 0.2, "of_median": 1e-2},
)
def fold_range_spread(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Folded into the weights before it, the norm leaves channels of very different range: max |W s| differs.

    s = gamma / sqrt(var + eps). A channel with a 16th of the widest one keeps 4 of 8 bits; said from there on, or
    where the mean range is below 0.2 of the widest. Channels that are switched off or get no input are left out. Silent
    where the norm does not fold backward. A warning with --target int8, else info; silent for other targets.

    Folding itself is one cause: the mean went from 0.49 to 0.42 and from 0.43 to 0.30 of the widest in two text
    networks, and depthwise nets spread far more. Example: mean 0.12, the narrowest 0.013 of the widest.
    """
    if context.precision not in (None, "int8"):
        return
    found = _folded_range(layer, context.limits["of_median"])
    if found is None:
        return
    before, after, good = found
    shares, unfolded = after[good] / after[good].max(), before[good] / before[good].max()
    least, mean = float(shares.min()), float(shares.mean())
    if least >= context.limits["least"] and mean >= context.limits["mean"]:
        return
    narrow = where(good)[int(np.argmin(shares))]
    low = np.zeros(len(good), dtype=bool)
    low[good] = shares < context.limits["least"]
    channels = where(low)
    yield Observation(
        message=f"After folding the weights of a channel reach {number(mean)} of the widest on average (before: "
        f"{number(unfolded.mean())}), the narrowest {number(least)} (channel {narrow}).",
        channels=channels,
        evidence={"mean": mean, "least": least, "mean_unfolded": float(unfolded.mean())},
        severity=Severity.WARNING if context.precision == "int8" else Severity.INFO,
        rank=1 / least if least else 1e9,
    )


def _folded_range(layer: NormLayer, of_median: float) -> tuple[Vector, Vector, Mask] | None:
    """Largest |weight| of each channel before and after folding backward, and which channels carry signal; None where
    the norm is not folded so, the weights are not known or nothing is left."""
    place, eps = layer.place, usable_eps(layer)
    if place is None or place.producer is None or place.producer.largest is None or eps is None:
        return None
    largest = place.producer.largest
    scale = np.abs(layer.numbers.scale(eps))
    fate = place.fate
    folds = fate is None or fate.verdict == Verdict.BACKWARD.value or fate.code == "overflow"
    if largest.shape != scale.shape or not folds:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        after = largest * scale
    good = switched_on(layer, of_median) & np.isfinite(after) & (after > 0)
    return (largest, after, good) if good.any() else None


@rule(
    "N405",
    "fold-overflow",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("place", "running_var", "eps"),
    guesses=True,
    why="What is infinite in float16 makes every output of the channel infinite or NaN; a subnormal loses its digits.",
    fix="keep this layer in float32, or do not fold it; look at A205 and S106 for what made the factor large",
    reference=FLOAT_FORMATS,
    limits={"largest": 65504.0, "smallest": 2.0**-14, "share": 0.99, "of_median": 1e-2},
)
def fold_overflow(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Folded into the weights before it, the norm gives weights or biases that float16 cannot hold.

    max |W s| or |beta + (bias - mean) s| of a channel is above 65,504, with s = gamma / sqrt(var + eps): an error with
    --target fp16, info without a target. Or nearly all channels that carry signal (99 %) have no weight above 6.1e-5,
    so that all of them are subnormal and lose digits: a warning with --target fp16 only.

    Silent where the norm does not fold backward. Example: a factor of 3.2e5 on weights up to 0.5 in channel 7.
    """
    if context.precision not in (None, "fp16"):
        return
    limits = context.limits
    found = _folded_range(layer, limits["of_median"])
    if found is None:
        return
    _, after, good = found
    place, eps, mean = layer.place, usable_eps(layer), layer.numbers.mean
    assert place is not None and place.producer is not None and eps is not None
    over = np.isfinite(after) & (after > limits["largest"])
    highest = float(after[over].max()) if over.any() else 0.0
    what = "weights"
    bias = place.producer.bias
    if mean is not None and (bias is None or bias.shape == mean.shape):
        with np.errstate(over="ignore", invalid="ignore"):
            offset = -mean if bias is None else bias - mean
            shift = np.abs(layer.numbers.shift + offset * layer.numbers.scale(eps))
        far = np.isfinite(shift) & (shift > limits["largest"])
        if far.any() and float(shift[far].max()) > highest:
            highest, what = float(shift[far].max()), "bias"
        over = over | far
    if over.any():
        channels = where(over)
        yield Observation(
            message=f"After folding the {what} would reach {number(highest)}, float16 ends at "
            f"{limits['largest']:,.0f}: {some_of(channels, len(over))}.",
            channels=channels,
            evidence={"largest": highest},
            severity=Severity.ERROR if context.precision == "fp16" else Severity.INFO,
            rank=highest,
        )
        return
    small = good & (after < limits["smallest"])
    if context.precision == "fp16" and np.count_nonzero(small) > limits["share"] * np.count_nonzero(good):
        channels = where(small)
        widest = float(after[small].max())
        yield Observation(
            message=f"After folding no weight of {some_of(channels, len(small))} is above {number(widest)}: float16 "
            "holds them as subnormal numbers, with fewer digits.",
            channels=channels,
            evidence={"widest": widest},
            severity=Severity.WARNING,
        )


@rule(
    "N407",
    "denormal-buffers",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    why="Some processors compute with subnormal numbers slowly, others flush them to 0.",
    fix="none needed; folding the norm removes them",
    reference="https://pytorch.org/docs/stable/generated/torch.set_flush_denormal.html",
)
def denormal_buffers(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A running mean or variance is so small (below 1.18e-38) that float32 stores it as a subnormal number.

    The remains of a decay in channels that never get an input (see S105). Harmless for the result: eps is
    larger by dozens of orders of magnitude.

    Example: 5.605e-45 in 14 of 32 channels of a published MobileNetV2.
    """
    mean, var = layer.numbers.mean, layer.numbers.var
    assert mean is not None and var is not None
    mean = np.abs(mean)
    if var.min() >= SMALLEST_NORMAL and mean.min() >= SMALLEST_NORMAL:
        return
    tiny = ((var < SMALLEST_NORMAL) & (var > 0)) | ((mean < SMALLEST_NORMAL) & (mean > 0))
    if not tiny.any():
        return
    channels = where(tiny)
    yield Observation(
        message=f"Subnormal numbers in running_mean or running_var: {some_of(channels, len(tiny))}.",
        channels=channels,
        evidence={"count": len(channels)},
        rank=float(len(channels)),
    )


RULES: tuple[Rule, ...] = (
    fp16_overflow,
    fp16_underflow,
    low_precision_mean,
    fold_range_spread,
    fold_overflow,
    denormal_buffers,
)
