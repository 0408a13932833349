"""S: what running_mean and running_var hold: broken, dead or out of range."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormLayer, Vector, median
from normdoctor.rules.decay import SMALLEST_NORMAL, flushed, left_of_one, on_the_floor, plain_momentum
from normdoctor.rules.guards import FEW, carries_signal, distance, for_size, nonfinite, usable_eps
from normdoctor.rules.wording import REESTIMATE, both, number, plural, some_of, where


@rule(
    "S101",
    "nonfinite-stats",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    why="Every eval output of these channels is NaN or constant, although training looks normal.",
    fix=f"no data-free repair exists, and never fold such a layer: {REESTIMATE}",
    reference="https://github.com/pytorch/pytorch/issues/90342",
)
def nonfinite_stats(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A running mean or variance is NaN or infinite.

    One bad batch is enough: the moving average keeps (1 - momentum) * NaN for ever, while training mode
    normalises with the batch's own numbers and never looks at the buffer. Mixed-precision overflow and
    batches of one value per channel (variance of one number) are the usual causes; in a half-precision file
    it is often a variance above 65504 that became infinite when the model was cast.

    Example: running_var has 3 NaN of 256 channels; the loss recovered two steps later, eval never did.
    """
    mean, var = layer.numbers.mean, layer.numbers.var
    assert mean is not None and var is not None
    yield from nonfinite(running_mean=mean, running_var=var)


@rule(
    "S102",
    "negative-variance",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_var",),
    why="A variance cannot be negative: eval divides by NaN, or by less than the real spread.",
    fix=f"clamping to 0 only hides it; {REESTIMATE}",
    reference="https://github.com/shicai/MobileNet-Caffe/issues/87",
    limits={"near_eps": 0.01},
)
def negative_variance(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A running variance is below zero.

    Causes: a converter that subtracts eps from a variance of 0 (the value is then almost exactly -eps),
    E[x^2] - E[x]^2 in float32 for a mean far from 0, extrapolated or merged checkpoints, debiasing by
    subtraction. Between -eps and 0 the square root still works and the gain is merely too large, which is
    no better: the number is not a variance.

    Example: -1e-05 in 3 of 64 channels of a converted MobileNet, whose framework had added eps before saving.
    """
    var = layer.numbers.var
    assert var is not None
    bad = var < 0
    if not bad.any():
        return
    finite = bad & np.isfinite(var)
    lowest = float(var[finite].min()) if finite.any() else None
    message = f"running_var is negative in {some_of(where(bad), len(var))}"
    if lowest is not None:
        message += f", down to {number(lowest)} in channel {int(np.flatnonzero(var == lowest)[0])}"
    evidence: dict[str, float | int | None] = {"lowest": lowest}
    eps = usable_eps(layer)
    known = [eps] if eps else []
    cause = next((e for e in (*known, 1e-5, 1e-3) if _near(var[finite], -e, context.limits["near_eps"])), None)
    if eps is not None:
        nan = int((var[bad] + eps < 0).sum())
        evidence["nan_with_eps"] = nan
        message += f"; with eps {number(eps)} eval gives " + (f"NaN in {nan} of them" if nan else "too much gain")
    if cause is not None:
        evidence["eps_subtracted"] = cause
        message += f". That is -eps for eps {number(cause)}: a converter subtracted it"
    channels = where(bad)
    yield Observation(message=message + ".", channels=channels, evidence=evidence, rank=len(channels) / len(bad))


def _near(values: Vector, target: float, tolerance: float) -> bool:
    return bool(values.size) and bool((np.abs(values - target) <= tolerance * abs(target)).any())


@rule(
    "S105",
    "never-active-channel",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_var",),
    why="The input of these channels never varied in training, so they give a constant and cost time.",
    fix="none needed; they can be pruned (keep their constant output). Do not recalibrate them alone",
    reference="https://github.com/deepinsight/insightface/issues/277",
    limits={"share": 0.05, "near": 1e-5, "near_when_tiny": 1e-3},
)
def never_active_channel(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A running variance is only what the decay of its initial 1 has left: no batch ever added to it.

    After t updates without any variance the buffer is (1 - momentum)^t. That falls until rounding stops it
    at k * 2^-149, where k tells the momentum: 4 for 0.1 (printed 5.605e-45), 16 for 0.03, 50 for 0.01, 166
    for 0.003, 500 for 0.001. Where tiny numbers are flushed it ends at exactly 0.

    Info below 5 % of the channels: good published networks have them (14 of 32 in one layer of an ImageNet
    MobileNetV2, 34 of 17,056 overall). A variance like 1e-14 is another thing, weights that decayed: S106.
    Example: 5.605e-45 in 3 of 64 channels, so momentum was 0.1 and nothing varied for 1,000 batches or more.
    """
    var = layer.numbers.var
    assert var is not None
    least = float(var.min())
    if layer.numbers.default_statistics or least > 1:
        return
    limits = context.limits
    hits = [left_of_one(layer, var, near=limits["near"], near_when_tiny=limits["near_when_tiny"])]
    if not least >= SMALLEST_NORMAL:  # smaller, or NaN somewhere
        hits += [on_the_floor(layer, var), flushed(layer, var)]
    found = [(mask, momentum) for mask, momentum in hits if mask.any()]
    if not found:
        return
    dead = np.logical_or.reduce([mask for mask, _ in found])
    momentum = next((momentum for _, momentum in found if momentum is not None), None)
    channels = where(dead)
    share = len(channels) / len(var)
    value = float(var[dead].max())
    said = "" if momentum is None else f"; it shows a momentum of {number(momentum)}"
    if momentum is not None and plain_momentum(layer) not in (None, momentum):
        said += f", not the {layer.momentum:g} in the file"
    what = "exactly 0" if value == 0 else f"{number(value)}, what is left of the initial 1"
    yield Observation(
        message=f"running_var is {what} in {some_of(channels, len(var))}{said}.",
        channels=channels,
        evidence={"share": share, "largest": value, "momentum_shown": momentum},
        severity=Severity.WARNING if share >= limits["share"] else Severity.INFO,
        rank=share,
    )


@rule(
    "S106",
    "variance-below-eps",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_var", "eps"),
    why="eps and not the data sets the gain there, so a framework with another eps gives other outputs.",
    fix="keep eps as it is on export and conversion; prune silent channels; do not clamp the variance",
    reference="https://github.com/pytorch/vision/issues/648",
    limits={"signal": 0.01},
)
def variance_below_eps(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A running variance is below eps, so eps and not the data sets the channel's gain.

    The gain gamma / sqrt(var + eps) can then be at most gamma / sqrt(eps): 316 * gamma for 1e-5, 31.6 *
    gamma for 1e-3. Mostly the channel is dead (its weights decayed, a ReLU before it never opens), and its
    output is the constant beta: info.

    A warning where the channel still carries signal, that is where gamma * sqrt(var / (var + eps)), the
    spread of its output, exceeds 1 % of the layer's typical gamma. Example: variance 1.9e-07 with gamma 5.6
    and eps 1e-05 gives a gain of 1,756; with eps 1e-03 it would be 177.
    """
    var, eps = layer.numbers.var, usable_eps(layer)
    assert var is not None
    if eps is None:
        return
    below = (var >= 0) & (var < eps)
    if not below.any():
        return
    alive = below & carries_signal(layer, eps, context.limits["signal"])
    silent = where(below & ~alive)
    channels = where(alive) or silent
    scale = layer.numbers.scale(eps)
    worst = max(channels, key=lambda channel: np.nan_to_num(abs(scale[channel]), nan=-1.0))
    other = 1e-5 if eps >= 1e-3 else 1e-3
    here = float(scale[worst])
    there = float(layer.numbers.gain[worst]) / math.sqrt(float(var[worst]) + other)
    listed = some_of(channels, len(below))
    message = f"running_var is below eps {number(eps)} in {listed}, none of which carries signal."
    if alive.any():
        message = (
            f"running_var is below eps {number(eps)} in {listed} that carry signal: channel {worst} is "
            f"multiplied by {number(here)}, with eps {number(other)} it would be {number(there)}."
        )
        if silent:
            message += f" Also in {plural(len(silent), 'silent channel')}."
    yield Observation(
        message=message,
        channels=channels,
        evidence={
            "eps": eps,
            "smallest": float(var[below].min()),
            "worst_channel": worst,
            "gain": here if math.isfinite(here) else None,
            "gain_with_other_eps": there if math.isfinite(there) else None,
            "silent_channels": silent,
        },
        severity=Severity.WARNING if alive.any() else Severity.INFO,
        rank=np.count_nonzero(alive) + np.count_nonzero(below) / (1 + len(below)),
    )


@rule(
    "S107",
    "constant-buffers",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    why="Measured statistics differ from channel to channel; equal ones were filled in, and eval works with them.",
    fix=f"find where the measured values got lost (conversion, initialiser), or {REESTIMATE}",
    reference="https://arxiv.org/abs/1502.03167",
    limits={"channels": FEW},
)
def constant_buffers(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """running_mean or running_var has the same value in every channel, bit for bit.

    Averages over real inputs never agree to the last digit. A converter filled in a placeholder, an initialiser
    ran after loading, or one of the two buffers was reset. Compared are the channels that carry signal, in layers
    with 8 of them or more. Mean 0 together with variance 1 is S103, and channels that are all dead are S105.

    Harmless where a converter put the real statistics into gamma and beta and left a constant behind.

    Example: mean and variance 0.02 in 48 of 49 layers of a shufflenet that exists to test a runtime.
    """
    mean, var = layer.numbers.mean, layer.numbers.var
    assert mean is not None and var is not None
    live = layer.numbers.live
    if len(var) < context.limits["channels"] or layer.numbers.default_statistics:
        return
    if live[0] and live[-1] and mean[0] != mean[-1] and var[0] != var[-1]:
        return  # nearly always
    live = live & np.isfinite(mean)
    if np.count_nonzero(live) < context.limits["channels"] or var[live].max() < SMALLEST_NORMAL:
        return
    stored = {"running_mean": mean[live], "running_var": var[live]}
    constant = {name: float(values[0]) for name, values in stored.items() if values.min() == values.max()}
    if constant:
        channels = where(live)
        said = both([f"{name} is {number(value)}" for name, value in constant.items()])
        which = some_of(channels, len(live)) if len(channels) == len(live) else f"all {len(channels)} live channels"
        yield Observation(message=f"{said} in {which}.", channels=channels, evidence=constant)


@rule(
    "S108",
    "mean-dominates",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    why="Subtracting two nearly equal numbers loses digits: the error grows by the ratio of mean to spread.",
    fix="look for a large bias before the norm or inputs not normalised; keep this layer in float32",
    reference="https://doi.org/10.1080/00031305.1983.10483115",
    limits={"info": 10.0, "warning": 100.0, "share": 0.05},
)
def mean_dominates(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Running means lie many standard deviations away from zero.

    The layer computes x - mean; where the mean is r standard deviations from 0, the result carries a relative
    error of about r * 2^-24 in float32, r * 2^-11 in float16, r * 2^-8 in bfloat16. Typical causes: a large
    bias in the convolution before, raw 0-255 inputs, the all-positive output of an activation with little
    variation.

    Healthy public networks mostly stay below 5. Example: means of 59 standard deviations in 5 of 96 channels.
    """
    far = distance(layer)
    limits = context.limits
    mask = far > limits["info"]
    if np.count_nonzero(mask) < limits["share"] * len(far) or not mask.any():
        return
    very = np.count_nonzero(far > limits["warning"])
    worst = int(np.argmax(far))
    channels = where(mask)
    yield Observation(
        message=(
            f"The mean is more than {limits['info']:g} standard deviations from 0 in "
            f"{some_of(channels, len(far))}; {number(far[worst])} in channel {worst}."
        ),
        channels=channels,
        evidence={"largest": float(far[worst]), "share": len(channels) / len(far)},
        severity=Severity.WARNING if very and very >= limits["share"] * len(far) else Severity.INFO,
        rank=float(far[worst]),
    )


@rule(
    "S109",
    "variance-spread",
    severity=Severity.INFO,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("running_var",),
    why="One channel with a far larger spread takes the whole range of a per-tensor quantiser.",
    fix="look at the channel's weights or inputs; quantise this layer per channel",
    reference="https://arxiv.org/abs/1906.04721",
    # benchmarks/calibration.md: our own nets stay below 5, published ones below 700.
    limits={"info": 1e3, "warning": 1e6},
)
def variance_spread(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The largest running variance is more than a thousand times the layer's median.

    One exploding channel, or inputs in mixed units. Only channels that carry signal are compared, and only
    layers of 8 channels or more (info at most below 16). Healthy networks measured so far stay below 700.

    Example: one channel at 2.1e+07 in a layer whose median is 0.4.
    """
    var = layer.numbers.var
    assert var is not None
    severity = for_size(len(var), Severity.WARNING)
    live = layer.numbers.live
    if severity is None or not live.any():
        return
    values = var[live]
    largest = float(values.max())
    limits = context.limits
    if largest <= limits["info"] * float(values.min()):
        return  # then it is nearer still to the median
    middle = median(values)
    ratio = largest / middle
    if ratio <= limits["info"]:
        return
    channels = where(live & (var > limits["info"] * middle))
    yield Observation(
        message=(
            f"running_var reaches {number(largest)}, {number(ratio)} times the layer's median: "
            f"{some_of(channels, len(var))}."
        ),
        channels=channels,
        evidence={"ratio": ratio, "largest": largest, "median": middle},
        severity=severity if ratio > limits["warning"] else Severity.INFO,
        rank=ratio,
    )


RULES: tuple[Rule, ...] = (
    nonfinite_stats,
    negative_variance,
    never_active_channel,
    variance_below_eps,
    constant_buffers,
    mean_dominates,
    variance_spread,
)
