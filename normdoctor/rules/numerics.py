"""N: numbers that the precision a model is meant for cannot hold. Above info only with --target."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormLayer
from normdoctor.rules.decay import SMALLEST_NORMAL
from normdoctor.rules.guards import distance, usable_eps
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


RULES: tuple[Rule, ...] = (fp16_overflow, fp16_underflow, low_precision_mean, denormal_buffers)
