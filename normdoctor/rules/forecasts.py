"""A: what the activation behind a norm does to its channels, forecast from gamma and beta alone.

The output of a BatchNorm has the mean beta and the standard deviation |gamma| in each channel; taken as normal, the
share of it that an activation passes on, or flattens, is known without data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Severity, rule
from normdoctor.flow.gaussian import probability_above
from normdoctor.layers import TRACKING_KINDS, Mask, NormLayer, Vector
from normdoctor.places import Activation
from normdoctor.rules.guards import for_size, switched_on, usable_eps
from normdoctor.rules.wording import number, percent, some_of, where

CUT_OFF = frozenset({"relu", "relu6"})
"""Activations that give 0 for everything below 0; a clip does so below its lower bound."""

LESSENED = frozenset({"leaky_relu", "prelu", "elu", "selu", "celu", "silu", "gelu", "gelu_tanh", "mish", "hardswish"})
"""Those that pass on a little of it."""

SLOPE_FALLS = {"sigmoid": 3.637, "tanh": 1.818}
"""|x| from which on the slope is under 10 % of its largest: 4 s (1 - s) = 0.1 and 1 - t^2 = 0.1."""

HARD_SLOPE = 1 / 6
"""Of torch's hardsigmoid, clip(x / 6 + 1/2, 0, 1); ONNX has 0.2 unless it says another."""


def lower_bound(activation: Activation) -> float | None:
    """Below which all that goes in comes out as one number; None where there is no such bound."""
    if activation.name in CUT_OFF:
        return 0.0
    return activation.low if activation.name == "clip" and math.isfinite(activation.low) else None


def upper_bound(activation: Activation) -> float | None:
    if activation.name == "relu6":
        return 6.0
    return activation.high if activation.name == "clip" and math.isfinite(activation.high) else None


def working(layer: NormLayer, of_median: float) -> Mask:
    """Channels that a forecast is about: finite, not switched off (A202), with a variance above eps (S106)."""
    numbers, eps = layer.numbers, usable_eps(layer)
    good = switched_on(layer, of_median) & np.isfinite(numbers.shift)
    if numbers.var is not None and eps is not None:
        good &= numbers.var >= eps
    return np.asarray(good)


@rule(
    "A208",
    "dead-relu-forecast",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("place", "weight"),
    even_untrained=False,
    why="A channel that its ReLU never lets through is computed for every input and gives 0.",
    fix="prune these channels; while still training, lower the learning rate or the weight decay on beta",
    reference="https://arxiv.org/abs/1903.06733",
    # A warning at twice the largest share of a healthy layer: 8 of 32 in the first one of a published MobileNetV2.
    limits={"on": 1e-3, "warning": 0.5, "error": 0.9, "of_median": 1e-2},
)
def dead_relu_forecast(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The ReLU behind the norm lets hardly anything of a channel through: P(on) = Phi(beta / |gamma|) < 0.001.

    Beta then lies more than 3.09 |gamma| below 0 (below the lower bound of a clip). Channels that are switched off
    (A202) or have no variance (S106) are left out. Good models have some of the others: up to 3 of 64 in a text
    detector, 8 of 32 in the first layer of a MobileNetV2. A warning from half of a layer of 16 channels or more, an
    error from 90 %. LeakyReLU, GELU, SiLU and their like pass on a little of the negative side: info.

    The tails of real data are heavier than those of a normal variable, so such channels may fire more often; with
    data D609 counts. Example: beta -1.9 and |gamma| 0.5 in channel 12, on for 0.0072 % of the inputs.
    """
    place, limits = layer.place, context.limits
    activation = None if place is None else place.activation
    if activation is None:
        return
    bound = lower_bound(activation)
    if bound is None and activation.name not in LESSENED:
        return
    size, shift = np.abs(layer.numbers.gain), layer.numbers.shift
    good = working(layer, limits["of_median"])
    on = _above(bound or 0.0, shift, size, good)
    dead = good & (on < limits["on"])
    if not dead.any():
        return
    channels = where(dead)
    share = len(channels) / len(size)
    severity = Severity.INFO
    if bound is not None and share >= limits["warning"]:
        severity = Severity.ERROR if share >= limits["error"] else Severity.WARNING
    allowed = for_size(len(size), severity)
    if allowed is None:
        return
    worst = channels[int(np.argmin(on[dead]))]
    yield Observation(
        message=f"{activation.name} behind it is on for less than {percent(limits['on'])} of the inputs in "
        f"{some_of(channels, len(size))}, as far as gamma and beta tell: beta {number(shift[worst])}, |gamma| "
        f"{number(size[worst])} in channel {worst}, on for {percent(float(on[worst]))}.",
        channels=channels,
        evidence={
            "share": share,
            "on": [float(each) for each in on[dead]],
            "activation": activation.name,
            "bound": bound if bound is not None else 0.0,
        },
        severity=allowed,
        rank=share,
    )


def _above(threshold: float, mean: Vector, std: Vector, good: Mask) -> Vector:
    """P(output > threshold) in the good channels, NaN in the others."""
    found = np.full(len(mean), np.nan)
    found[good] = probability_above(threshold, mean[good], std[good])
    return found


@rule(
    "A209",
    "never-clipped-channels",
    severity=Severity.INFO,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("place", "weight"),
    even_untrained=False,
    why="An activation that never bends leaves the layers on both sides one linear map, with an offset that int8 pays.",
    fix="none needed; for int8 absorb the offset into the next bias (high-bias absorption)",
    reference="https://arxiv.org/abs/1906.04721",
    limits={"deviations": 3.0, "share": 0.5, "of_median": 1e-2},
)
def never_clipped_channels(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The ReLU behind the norm never cuts anything off: beta lies more than 3 |gamma| above 0.

    99.87 % of the values then pass unchanged (for ReLU6 and clip: between both bounds). Said of layers of 16
    channels or more in which half of the channels that work are so. The nonlinearity is not used there, and the
    offset takes up range that a quantiser needs (Nagel 2019 absorbs max(0, beta - 3 gamma) into the next bias).

    Harmless in itself. Example: 40 of 64 channels, beta up to 9 |gamma|.
    """
    place, limits = layer.place, context.limits
    activation = None if place is None else place.activation
    low = None if activation is None else lower_bound(activation)
    if activation is None or low is None or for_size(len(layer.numbers.gain), Severity.WARNING) is not Severity.WARNING:
        return
    size, shift, high = np.abs(layer.numbers.gain), layer.numbers.shift, upper_bound(activation)
    good = working(layer, limits["of_median"])
    with np.errstate(invalid="ignore", over="ignore"):
        reach = limits["deviations"] * size
        free = good & (shift - low > reach)
        if high is not None:
            free &= high - shift > reach
    channels = where(free)
    if not channels or len(channels) < limits["share"] * np.count_nonzero(good):
        return
    highest = max(float(shift[channel] - low) / float(size[channel]) for channel in channels)
    yield Observation(
        message=f"{activation.name} behind it passes everything on unchanged in {some_of(channels, len(size))}: beta "
        f"is up to {number(highest)} |gamma| above its bound.",
        channels=channels,
        evidence={"share": len(channels) / len(size), "deviations": highest, "activation": activation.name},
        rank=len(channels) / len(size),
    )


@rule(
    "A210",
    "saturation-forecast",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("place", "weight"),
    even_untrained=False,
    why="Where the activation is flat nothing of the input passes on, and no gradient comes back.",
    fix="look at gamma and beta of these channels; while still training, lower the learning rate or their weight decay",
    reference="https://proceedings.mlr.press/v9/glorot10a.html",
    limits={"saturated": 0.5, "share": 0.25, "of_median": 1e-2},
)
def saturation_forecast(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The activation behind the norm is flat for most inputs: sigmoid, tanh, their hard forms, ReLU6 above 6.

    Flat means a slope under 10 % of the largest: beyond 3.637 for sigmoid, 1.818 for tanh, 3 for hard-sigmoid, the
    bounds of a clip. Counted are channels that spend more than half of the inputs there, from gamma and beta as
    P = Phi((-t - beta) / |gamma|) + 1 - Phi((t - beta) / |gamma|). Said from a quarter of the channels on; info for
    layers of 8 to 15.

    Harmless for a gate that is meant to be open or shut. Example: 20 of 64 channels in front of a sigmoid, beta 5 and
    |gamma| 1 in channel 3: flat for 91 %.
    """
    place, limits = layer.place, context.limits
    activation = None if place is None else place.activation
    if activation is None:
        return
    low, high = _flat_beyond(activation)
    if low is None and high is None:
        return
    size, shift = np.abs(layer.numbers.gain), layer.numbers.shift
    good = working(layer, limits["of_median"])
    flat = np.zeros(len(size)) if high is None else _above(high, shift, size, good)
    if low is not None:
        flat = flat + _above(-low, -shift, size, good)
    stuck = good & (flat > limits["saturated"])
    channels = where(stuck)
    severity = for_size(len(size), Severity.WARNING)
    if severity is None or not channels or len(channels) < limits["share"] * len(size):
        return
    worst = channels[int(np.argmax(flat[stuck]))]
    yield Observation(
        message=f"{activation.name} behind it is flat for more than {percent(limits['saturated'])} of the inputs in "
        f"{some_of(channels, len(size))}, as far as gamma and beta tell: beta {number(shift[worst])}, |gamma| "
        f"{number(size[worst])} in channel {worst}, flat for {percent(float(flat[worst]))}.",
        channels=channels,
        evidence={
            "share": len(channels) / len(size),
            "saturated": [float(each) for each in flat[stuck]],
            "activation": activation.name,
        },
        severity=severity,
        rank=len(channels) / len(size),
    )


def _flat_beyond(activation: Activation) -> tuple[float | None, float | None]:
    """The bounds below and above which it is flat. A lower bound of 0 or more makes it a ReLU, which A208 judges."""
    if activation.name in SLOPE_FALLS:
        bound = SLOPE_FALLS[activation.name]
        return -bound, bound
    if activation.name == "hardsigmoid":
        bound = 0.5 / (activation.alpha or HARD_SLOPE)
        return -bound, bound
    low = lower_bound(activation)
    return (low if low is not None and low < 0 else None), upper_bound(activation)


RULES: tuple[Rule, ...] = (dead_relu_forecast, never_clipped_channels, saturation_forecast)
