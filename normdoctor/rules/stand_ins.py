"""T: what takes the place of LayerNorm: DynamicTanh, Derf, GroupNorm."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Severity, rule
from normdoctor.layers import NormKind, NormLayer, Vector, as_vector
from normdoctor.rules.wording import number, percent


@rule(
    "T707",
    "dyt-alpha",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    kinds=(NormKind.DYNAMIC_TANH,),
    needs=("alpha",),
    why="alpha scales the input of the tanh: at 0 the layer is constant, far too large it only gives signs.",
    fix="go back to a checkpoint where alpha is sound, or train on with a smaller learning rate for it",
    reference="https://arxiv.org/abs/2503.10622",
    # benchmarks/calibration.md: two small nets keep within 1.4 times their start and lose 5 points at 10 times that,
    # but large nets start anywhere between 0.05 and 0.8 and are not measured: 20 leaves room for them.
    limits={"init": 0.5, "small": 0.01, "large": 20.0},
)
def dyt_alpha(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The scalar alpha of a DynamicTanh, gamma * tanh(alpha * x) + beta, or of a Derf is out of range.

    Error where it is 0 (the output is beta) or not a finite number. Warning where |alpha| is below 0.01 or
    above 20 times its initial value of 0.5 (large language models start it between 0.05 and 0.8: set the limit
    `init`). A negative alpha is legal, the sign can go to gamma: info.

    Example: alpha 0.0 in blocks.3.norm1: every token gets the same output.
    """
    alpha = as_vector(layer.alpha)
    assert alpha is not None
    limits = context.limits
    curve = "tanh" if layer.inner_shift is None else "erf"
    finite = np.isfinite(alpha)
    size = np.abs(alpha[finite])
    low, high = limits["small"] * limits["init"], limits["large"] * limits["init"]
    value = float(alpha[0]) if alpha.size == 1 else None
    shown = "alpha" if value is None else f"alpha is {number(value)}"
    if not finite.all():
        severity, said = Severity.ERROR, "not a finite number, so is every output"
    elif (size == 0).any():
        severity, said = Severity.ERROR, "the output is the constant beta"
    elif (size < low).any():
        severity, said = Severity.WARNING, f"below {number(low)}, the {curve} is a straight line"
    elif (size > high).any():
        severity, said = Severity.WARNING, f"above {number(high)}, the {curve} gives little but signs"
    elif (alpha < 0).any():
        severity, said = Severity.INFO, "negative, which only turns the sign of gamma"
    else:
        return
    yield Observation(
        message=f"{shown}: {said}.",
        channels=range(layer.channels) if severity is Severity.ERROR else (),
        evidence={"alpha": value if value is not None and np.isfinite(value) else None},
        severity=severity,
        rank=float(severity),
    )


@rule(
    "T709",
    "derf",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=(NormKind.DYNAMIC_TANH,),
    needs=("inner_shift",),
    why="A shift inside the erf moves every input towards one of its flat ends, where nothing is passed on.",
    fix="go back to a checkpoint where the shift is small, or train on with a smaller learning rate for it",
    reference="https://arxiv.org/abs/2512.10938",
    # benchmarks/calibration.md: a trained net stays below 0.06, and moving all layers by 1 costs 5 points.
    limits={"shift": 1.5},
)
def derf(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The scalar s of a Derf, gamma * erf(alpha * x + s) + beta, is out of range.

    It starts at 0. The slope at x = 0 is exp(-s^2) of the largest, a tenth of it from |s| = 1.5 on: warning. In
    the authors' study trainings with a shift of 2 or more diverge. Not a finite number: error. alpha is judged
    by T707.

    Harmless where alpha * x is large enough to reach back over the shift. Example: s = -2.4 in
    blocks.7.norm2: an input of 0 gets 0.3 % of the slope.
    """
    shift = as_vector(layer.inner_shift)
    assert shift is not None
    if not np.isfinite(shift).all():
        severity, said = Severity.ERROR, "s is not a finite number, so is every output"
    elif np.abs(shift).max(initial=0.0) >= context.limits["shift"]:
        severity = Severity.WARNING
        said = f"s is {number(float(shift[0]))}, where the slope of erf is {percent(_slope(shift))} of the largest"
    else:
        return
    finite = severity is Severity.WARNING
    yield Observation(
        message=f"{said}.",
        channels=() if finite else range(layer.channels),
        evidence={"shift": float(shift[0]) if finite else None, "slope": _slope(shift) if finite else None},
        severity=severity,
        rank=float(severity),
    )


def _slope(shift: Vector) -> float:
    """The slope of erf there as a share of that at 0: exp(-s^2)."""
    return float(np.exp(-np.square(shift)).min())


@rule(
    "T710",
    "group-of-one",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=(NormKind.GROUP,),
    needs=("groups",),
    why="With one channel to a group it is an InstanceNorm, and where the map is 1x1 its output is beta alone.",
    fix="none if it is meant (wav2vec 2.0 has one); otherwise fewer groups: num_groups counts groups, not channels",
    reference="https://arxiv.org/abs/1803.08494",
)
def group_of_one(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A GroupNorm has as many groups as channels, so that every channel is normalised by itself.

    That is an InstanceNorm under another name. Chosen on purpose in some networks, an accident where num_groups
    was taken for the number of channels in a group. Behind a global pooling, or on vectors, each group is a single
    number, whose distance from its own mean is 0: the output is beta whatever the input.

    Example: GroupNorm(512, 512) in the first layer of wav2vec 2.0, on long sequences, by design.
    """
    if layer.groups == layer.channels > 1:
        yield Observation(
            message=f"{layer.groups} groups for {layer.channels} channels: every channel by itself, as in an "
            "InstanceNorm; on a map of 1x1 the output is beta.",
            evidence={"groups": layer.groups, "channels": layer.channels},
        )


RULES: tuple[Rule, ...] = (
    dyt_alpha,
    derf,
    group_of_one,
)
