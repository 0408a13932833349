"""G507: running means against what the norms before and the weights between say they must be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormLayer, Vector, median
from normdoctor.places import Prediction
from normdoctor.rules.decay import plain_momentum, residue
from normdoctor.rules.guards import ENOUGH, FEW, frozen, usable_eps
from normdoctor.rules.wording import REESTIMATE, number, percent

TOLD = 5
"""Channels that a message names."""

SEVERAL = 3
"""Ways from which on a median says what is typical of a model."""

AGREED = 0.02
"""Slopes of exact ways that are no further apart than this are one: an average that lags has another in each layer."""

LOUD = 0.1
"""From this size on (root mean square over the channels, in standard deviations) predictions through activations must
show in the stored means; smaller ones drown in what the normal distribution leaves out."""

AUDIBLE = 1e-3
"""The same for exact predictions: many published networks have norms with beta 0, which predict 0 behind them."""

ALIKE = 0.8
"""Correlation from which on the slope of stored against predicted means is a measurement."""

FLAT = 1e-3
"""Predictions that differ between channels by less than this share of their size say nothing about channels: the
weights are placeholders."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """Predicted against stored means of one layer, over its live channels, in standard deviations by running_var.

    The bias just before the norm is left out of both: it would agree with itself."""

    prediction: Prediction
    predicted: Vector
    stored: Vector
    channels: Vector
    """Indices of the channels compared."""

    @property
    def off(self) -> Vector:
        """|stored - predicted| of each channel."""
        return np.abs(self.stored - self.predicted)

    @property
    def shift(self) -> float:
        """Median over the channels of |stored - predicted|."""
        return median(self.off)

    @property
    def correlation(self) -> float:
        """Pearson's, over the channels; 0 where the stored means are all alike."""
        first, second = self.predicted - self.predicted.mean(), self.stored - self.stored.mean()
        norm = math.sqrt(float(first @ first) * float(second @ second))
        return float(first @ second) / norm if norm > 0 else 0.0

    @property
    def slope(self) -> float:
        """Stored on predicted: the median of their ratios, of the channels whose prediction is not small."""
        size = np.abs(self.predicted)
        clear = size >= 0.5 * math.sqrt(float(np.mean(size**2)))
        return median(self.stored[clear] / self.predicted[clear]) if clear.any() else 1.0

    @property
    def loudness(self) -> float:
        """Root mean square of the predictions."""
        return math.sqrt(float(np.mean(self.predicted**2)))

    @property
    def telling(self) -> bool:
        """Whether it is exact, and large enough to be heard."""
        return self.prediction.exact and self.prediction.even and self.loudness > AUDIBLE

    @property
    def says_something(self) -> bool:
        """Whether the channels differ in what is predicted of them."""
        size = self.loudness
        evidence = self.prediction.mean - (0.0 if self.prediction.bias is None else self.prediction.bias)
        alike = float(np.ptp(evidence)) <= FLAT * float(np.abs(evidence).max(initial=0.0))
        return size > 0 and not alike and len(self.predicted) >= FEW


def agreement(layer: NormLayer) -> Agreement | None:
    """How prediction and statistics of a layer agree; None where there is no prediction, or nothing to compare."""
    place, mean, var, eps = layer.place, layer.numbers.mean, layer.numbers.var, usable_eps(layer)
    prediction = None if place is None else place.prediction
    if prediction is None or mean is None or var is None or eps is None or layer.numbers.default_statistics:
        return None
    if len(prediction.mean) != len(mean) or float(np.ptp(mean)) == 0:
        return None  # constant means are S103's or S107's
    good = layer.numbers.live & np.isfinite(mean)
    if not good.any():
        return None
    spread = np.sqrt(var[good] + eps)
    bias = np.zeros(len(mean)) if prediction.bias is None else prediction.bias
    found = Agreement(
        prediction,
        (prediction.mean - bias)[good] / spread,
        (mean - bias)[good] / spread,
        np.flatnonzero(good).astype(np.float64),
    )
    return found if found.says_something else None


@rule(
    "G507",
    "stats-contradict-weights",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("place", "running_mean", "running_var", "eps"),
    scope=Scope.MODEL,
    assumes=False,
    even_untrained=False,
    why="Eval mode then computes another function than training did; the loss of training says nothing of it.",
    fix=REESTIMATE,
    reference="https://arxiv.org/abs/1502.03167",
    limits={
        "shift_warning": 0.1,
        "shift_uneven": 0.25,
        "shift_error": 0.3,
        "slope": 0.05,
        "lag": 0.25,
        "correlation_warning": 0.5,
        "correlation_error": 0.3,
        "typical_correlation": 0.9,
        "correlation_doubted": 0.8,
        "typical_slope": 0.25,
    },
)
def stats_contradict_weights(layers: Sequence[NormLayer], context: Context) -> Iterator[Observation]:
    """The running means are not those that the norms before and the weights between give.

    In training a BatchNorm gives every channel the mean beta and the standard deviation |gamma|, whatever goes in.
    Carried through the weights to the next norm, that says what its running_mean must be, without any data:
    exactly where nothing lies between but convolutions, linear layers, additions and averages; through activations
    by the moments of a normal variable, which are near but not exact. Statistics that say otherwise do not belong
    to these weights: averaged weights with the buffers of one of them, a partial load, a conversion that dropped a
    bias, buffers of another run, of early training, or that still hold a part of their initial 0.

    Exact ways are judged by the median shift in standard deviations; those without borders and strides also by the
    correlation (below 0.5), and by the slope of stored against predicted means, which is 1 minus the share of the
    initial zeros: where it is below 0.75, where the shift is large, or where all exact ways agree on one below
    0.95. Running averages lag behind weights that still move, so a single slope of 0.9 proves nothing, and where
    the counter rules a residue out the lag is what is named. Ways through activations are judged by the
    correlation over the channels: below 0.5, or below 0.8 where the model's median of it is below 0.9; and by a
    slope that is the same in most layers, since sparse activations bend the slope of a single layer. At most info
    under 16 channels; silent under 8, where statistics are the untouched 0 and 1 (S103), and where all predictions
    are alike. Max-pooling and products of two values end a chain: the report says so.

    Harmless where BatchNorm was frozen while the weights were fine-tuned: then the output of a norm is no longer
    beta and |gamma|, and it need not be. Example: correlation -0.12 over 64 channels, where trained networks have
    0.9 and more: the buffers are those of another checkpoint.
    """
    found = {layer.name: each for layer in layers if (each := agreement(layer)) is not None}
    usual = _usual(list(found.values()), context)
    still = {layer.name for layer in layers if frozen(layer)}
    for layer in layers:
        if layer.name not in found:
            continue
        each = found[layer.name]
        verdict = (
            _exactly(layer, each, context, usual) if each.prediction.exact else _nearly(layer, each, context, usual)
        )
        if verdict is None:
            continue
        severity, words = verdict
        doubt = ""
        if layer.name in still or still.intersection(each.prediction.sources):
            severity = severity.lowered()
            doubt = " Frozen by design? Then weights that were trained on are no contradiction."
        if len(each.predicted) < ENOUGH:
            severity = Severity.INFO
        worst = [int(each.channels[place]) for place in np.argsort(-each.off, kind="stable")[:TOLD]]
        way = " and ".join(dict.fromkeys((*each.prediction.sources[:2], *each.prediction.sources[2:][-1:])))
        yield Observation(
            layer=layer,
            message=f"{words} (from {way}, through {', '.join(each.prediction.through) or 'nothing'}).{doubt}",
            channels=worst,
            evidence={
                "shift": each.shift,
                "correlation": each.correlation,
                "slope": each.slope,
                "exact": each.prediction.exact,
                "compared": len(each.predicted),
                "sources": list(each.prediction.sources),
                "usual_correlation": usual.correlation,
                "usual_slope": usual.slope,
            },
            severity=severity,
            confidence=Confidence.HIGH if each.prediction.exact else Confidence.MEDIUM,
            rank=each.shift,
        )


class _Usual(NamedTuple):
    """What is typical of a model, where a single way proves little; None: too few."""

    correlation: float | None
    """Through activations."""
    doubted: bool
    """Whether that is lower than trained networks have it."""
    slope: float | None
    """Through activations, behind known borders."""
    scaled: bool
    """Whether that is none that trained networks have."""
    common: float | None
    """The slope of all exact ways, where they agree on one below 1."""


def _usual(found: Sequence[Agreement], context: Context) -> _Usual:
    limits = context.limits
    near = [each for each in found if not each.prediction.exact]
    correlations = [each.correlation for each in near if each.loudness > LOUD]
    slopes = np.asarray([each.slope for each in near if each.prediction.sized and each.correlation >= ALIKE])
    exact = np.asarray([each.slope for each in found if each.telling and each.correlation >= ALIKE])
    correlation = median(np.asarray(correlations)) if len(correlations) >= SEVERAL else None
    slope = median(slopes) if len(slopes) > 1 else None
    off = np.abs(slopes - 1)
    scaled = slope is not None and abs(slope - 1) > limits["typical_slope"]
    if len(slopes) < SEVERAL:
        scaled = scaled and bool((off > 2 * limits["typical_slope"]).all())
    common = median(exact) if len(exact) >= SEVERAL else None
    if common is not None and (common > 1 - limits["slope"] or float(np.abs(exact - common).max()) > AGREED):
        common = None
    return _Usual(
        correlation, correlation is not None and correlation < limits["typical_correlation"], slope, scaled, common
    )


def _exactly(layer: NormLayer, each: Agreement, context: Context, usual: _Usual) -> tuple[Severity, str] | None:
    limits, shift, slope, correlation = context.limits, each.shift, each.slope, each.correlation
    severity = Severity.ERROR if shift > limits["shift_error"] else Severity.WARNING
    far = shift > limits["shift_warning" if each.prediction.even else "shift_uneven"]
    short_of = each.telling and correlation >= ALIKE and 0 < slope < 1 - limits["slope"]
    if short_of and (far or slope < 1 - limits["lag"] or usual.common is not None):
        lags = _ruled_out(layer, slope) and not far and usual.common is None
        return (Severity.INFO if lags else severity), (
            f"running_mean is {number(slope)} times what the norms before it give: {_cause(layer, slope)}"
        )
    if far:
        return severity, (
            f"running_mean is {number(shift)} s.d. (median) off what the norms before it give, without an activation "
            f"between, over {len(each.predicted)} channels"
        )
    if each.telling and correlation < limits["correlation_warning"]:
        return Severity.WARNING, (
            f"running_mean does not follow what the norms before it give, without an activation between: correlation "
            f"{correlation:.2f} over {len(each.predicted)} channels, where it is 1"
        )
    return None


def _cause(layer: NormLayer, slope: float) -> str:
    """What makes stored means a fraction of the predicted ones."""
    if _ruled_out(layer, slope):
        return "no initial zeros, by its counter, but an average that lags behind the weights, or was taken with others"
    return f"about {percent(1 - slope)} of the buffers is still their initial 0"


def _ruled_out(layer: NormLayer, slope: float) -> bool:
    """By momentum and counter far less of the buffers is initial than the slope would take."""
    momentum, updates = plain_momentum(layer), layer.numbers.updates
    return momentum is not None and bool(updates) and residue(momentum, updates or 0.0) < (1 - slope) / 2


def _nearly(layer: NormLayer, each: Agreement, context: Context, usual: _Usual) -> tuple[Severity, str] | None:
    limits, correlation = context.limits, each.correlation
    bar = limits["correlation_doubted" if usual.doubted else "correlation_warning"]
    if correlation < bar and each.loudness > LOUD:
        severity = Severity.ERROR if correlation < limits["correlation_error"] else Severity.WARNING
        typical = "" if usual.correlation is None else f" (median of this model: {usual.correlation:.2f})"
        return severity, (
            f"running_mean and what the norms before it give have a correlation of {correlation:.2f} over "
            f"{len(each.predicted)} channels, where trained networks have 0.9 and more{typical}"
        )
    if usual.scaled and usual.slope is not None and abs(each.slope - 1) > limits["typical_slope"]:
        words = (
            f"running_mean is {number(each.slope)} times what the norms before it give, {number(usual.slope)} times "
            "in the typical layer"
        )
        return Severity.WARNING, words + (f": {_cause(layer, usual.slope)}" if 0 < usual.slope < 1 else "")
    return None


RULES: tuple[Rule, ...] = (stats_contradict_weights,)
