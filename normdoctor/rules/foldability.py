"""G: what folding does to a norm, and what in the graph stands in its way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from normdoctor.findings import FOLD, Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.flow.graph import Op
from normdoctor.layers import TRACKING_KINDS, NormKind, NormLayer
from normdoctor.places import Fate, Neighbour, Verdict
from normdoctor.rules.guards import usable_eps
from normdoctor.rules.wording import names, number, plural, some_of, where

REMAINS = frozenset({Verdict.LEFT.value, Verdict.DECOMPOSED.value})
"""Verdicts on norms that no weight takes in."""

DESTINATIONS = {
    Verdict.BACKWARD.value: "into the weights before",
    Verdict.FORWARD.value: "into the weights behind",
    Verdict.MERGED.value: "into another norm or a constant",
}

OWN_REASONS = frozenset(
    {
        "own-statistics",
        "training-mode",
        "no-running-statistics",
        "statistics-used",
        "not-finite",
        "no-parameters",
        "unused",
        "taken-out",
    }
)
"""Why a norm stays whatever is around it (`flow.reasons`)."""

NORMS = frozenset({Op.BATCH_NORM.value, Op.LAYER_NORM.value, Op.OTHER_NORM.value})
NORMALISING = tuple(kind for kind in NormKind if kind not in (NormKind.DYNAMIC_TANH, NormKind.AFFINE))
MAXIMA = frozenset({Op.MAX_POOL.value, Op.REDUCE_MAX.value})


def nearest(layer: NormLayer) -> Neighbour | None:
    """The operator whose output the norm takes."""
    return layer.place.before[0] if layer.place is not None and layer.place.before else None


def _fates(layers: Sequence[NormLayer]) -> dict[NormLayer, Fate]:
    return {layer: layer.place.fate for layer in layers if layer.place is not None and layer.place.fate is not None}


def _noun(layers: Sequence[NormLayer]) -> str:
    kinds = {layer.kind for layer in layers}
    return kinds.pop().value if len(kinds) == 1 else "norm"


@rule(
    "G502",
    "foldable",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("place",),
    scope=Scope.MODEL,
    why="In eval mode such a norm is one multiplication and one addition a channel, which the weights can take over.",
    fix=FOLD,
    reference="https://arxiv.org/abs/1712.05877",
)
def foldable(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Norms that vanish into the weights around them when the model is folded, without changing what it computes.

    Counted by the plan of `normdoctor fold`, for the whole model at once: the convolution or linear layer before
    takes in W * s and (bias - mean) * s + beta with s = gamma / sqrt(var + eps); where that cannot be, the layer behind
    or another norm may.

    Nothing to do for a model that will be trained on. Example: 35 of 35 BatchNorms fold into the weights before,
    17,056 parameters fewer.
    """
    fates = _fates(layers)
    folded = {layer: fate for layer, fate in fates.items() if fate.verdict not in REMAINS}
    if not folded:
        return
    counts = Counter(fate.verdict for fate in folded.values())
    places = [(count, DESTINATIONS.get(verdict, verdict)) for verdict, count in counts.most_common()]
    how = f" {places[0][1]}" if len(places) == 1 else ": " + ", ".join(f"{count} {words}" for count, words in places)
    saved = sum(fate.saved for fate in folded.values())
    fewer = f"; {plural(saved, 'parameter')} fewer" if saved else ""
    yield Observation(
        message=f"{len(folded)} of {plural(len(fates), _noun(list(fates)))} fold{_s(len(folded))}{how}{fewer}.",
        evidence={
            "layers": [layer.name for layer in folded],
            "into": [", ".join(fate.into) for fate in folded.values()],
            "saved": saved,
            "norms": len(fates),
        },
        subject=context.model.key or "",
    )


@rule(
    "G503",
    "not-foldable",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("place",),
    scope=Scope.MODEL,
    why="What stays is computed for every input, and an int8 model has to requantise around it.",
    fix=f"{FOLD} --dry-run",
    reference="https://arxiv.org/abs/1712.05877",
)
def not_foldable(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Norms that stay when the model is folded, counted by reason, with the first layers of each.

    The reasons are those of `normdoctor fold`: an activation between norm and weights (nonlinear), a value that is
    used elsewhere too (several-consumers), zeros at a border (padding), a norm that was saved in training mode, and
    so on. The evidence has the whole sentence for each layer.

    Harmless: the model is as good with them. Example: 3 of 38 BatchNorms stay: 2 nonlinear (a, b), 1 several-consumers
    (c).
    """
    fates = _fates(layers)
    left = {layer: fate for layer, fate in fates.items() if fate.verdict in REMAINS}
    if not left:
        return
    counts = Counter(fate.code or fate.verdict for fate in left.values())
    reasons = []
    for code, count in counts.most_common():
        listed = [layer.name for layer, fate in left.items() if (fate.code or fate.verdict) == code]
        reasons.append(f"{count} {code} ({names(listed)})")
    yield Observation(
        message=f"{len(left)} of {plural(len(fates), _noun(list(fates)))} stay{_s(len(left))}: {', '.join(reasons)}.",
        evidence={
            "layers": [layer.name for layer in left],
            "codes": [fate.code for fate in left.values()],
            "reasons": [fate.reason for fate in left.values()],
            "norms": len(fates),
        },
        subject=context.model.key or "",
    )


def _s(count: int) -> str:
    """The ending of a verb."""
    return "s" if count == 1 else ""


@rule(
    "G504",
    "forward-fold-padding",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("place", "running_mean", "running_var", "eps"),
    why="A tool that folds the norm forward all the same changes the outputs along the border, and nothing else.",
    fix="leave the norm, as normdoctor fold does; exact is only padding with -b / s a channel instead of 0",
    reference="https://arxiv.org/abs/2103.13425",
)
def forward_fold_padding(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The norm cannot go into the weights before it, and a convolution behind it pads with zeros.

    That convolution sees 0 beyond the border, where the norm never reached. Folded into it, the shift b = beta -
    mean * s would be added there as well: the middle of the image stays exact to rounding, the border is off (0.60 in
    a small convolution, 1e-15 in the middle). Nothing is wrong with the model itself.

    Silent where b is 0 in all channels. Example: b reaches 1.8 in features.norm0, and features.conv1 pads by 1.
    """
    place, eps = layer.place, usable_eps(layer)
    mean = layer.numbers.mean
    assert place is not None and mean is not None
    fate = place.fate
    if fate is None or fate.verdict not in REMAINS or fate.code in OWN_REASONS or not place.padded or eps is None:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        shift = np.abs(layer.numbers.shift - mean * layer.numbers.scale(eps))
    moved = np.isfinite(shift) & (shift > 0)
    if not moved.any():
        return
    worst = int(np.argmax(np.where(moved, shift, 0.0)))
    channels = where(moved)
    yield Observation(
        message=f"{names(place.padded)} behind it sees zeros at the border. Folding the norm forward would put its "
        f"shift there too: up to {number(shift[worst])} (channel {worst}) in {some_of(channels, len(shift))}.",
        channels=channels,
        evidence={"largest_shift": float(shift[worst]), "padded": list(place.padded), "code": fate.code},
        rank=float(shift[worst]),
    )


@rule(
    "G505",
    "stacked-norms",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=NORMALISING,
    needs=("place",),
    why="The second normalises what is normalised already, so one of them costs time for nothing.",
    fix=f"drop one of the two and train on; two BatchNorms: {FOLD}",
    reference="https://arxiv.org/abs/1502.03167",
)
def stacked_norms(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A norm takes the output of another norm, with nothing in between that computes.

    Two BatchNorms in eval mode are one: scale s1 * s2 and shift b1 * s2 + b2, exact to rounding. Others are no
    affine maps, so dropping one changes the model a little.

    Harmless where the output of the first is used elsewhere too (a norm in front of a whole residual stream).
    Example: head.bn behind backbone.bn, 512 channels.
    """
    before = nearest(layer)
    if before is None or before.op not in NORMS:
        return
    merges = before.op == Op.BATCH_NORM.value and layer.kind is NormKind.BATCH
    effect = "in eval mode the two are one, s1 * s2 and b1 * s2 + b2" if merges else "it normalises anew"
    yield Observation(
        message=f"It takes the output of another norm ({before}): {effect}.",
        evidence={"before": str(before), "merges": merges},
    )


@rule(
    "G508",
    "norm-after-activation",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH,),
    needs=("place",),
    why="The weights before the norm cannot take it in, only those behind it.",
    fix="none needed; for a new training put the norm in front of the activation if it has to fold backward",
    reference="https://arxiv.org/abs/1502.03167",
)
def norm_after_activation(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A BatchNorm stands directly behind an activation.

    Networks are built either way (Ioffe and Szegedy put the norm in front). Behind an activation a norm folds only
    forward, into weights without zero padding.

    Example: bn1 behind relu, folded into fc2.
    """
    before, place = nearest(layer), layer.place
    if before is None or place is None or before.op != Op.ACTIVATION.value:
        return
    fate = place.fate
    outlook = ""
    if fate is not None and fate.verdict in REMAINS:
        outlook = f"; it stays ({fate.code})" if fate.code else "; it stays"
    elif fate is not None and fate.into:
        outlook = f"; it folds into {names(fate.into)}"
    yield Observation(
        message=f"It stands behind {before}, so the weights before cannot take it in{outlook}.",
        evidence={"before": str(before), "verdict": fate.verdict if fate is not None else None},
    )


@rule(
    "G509",
    "maxpool-negative-gain",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=(NormKind.BATCH,),
    needs=("place", "weight"),
    why="A maximum of negated values is a minimum, so norm and max-pooling cannot change places in these channels.",
    fix="leave the order as it is, or turn the sign of these channels in the weights on both sides",
    reference="https://arxiv.org/abs/1709.04060",
)
def maxpool_negative_gain(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Max-pooling stands between a norm and the weights it could fold into, and some gains are negative.

    With s >= 0 a norm may be moved through a max-pooling exactly. With s < 0 that gives the minimum instead (errors up
    to 4.5 standard deviations in a test). Up to 11 % of the gains of healthy nets are negative. Said only of a norm
    that no weight takes in.

    Example: 3 of 64 gains are negative, down to -0.21, and a max-pooling precedes the norm.
    """
    place = layer.place
    assert place is not None
    if place.fate is not None and place.fate.verdict not in REMAINS:
        return
    before = nearest(layer)
    if before is not None and before.op in MAXIMA:
        side = "before"
    elif len(place.after) == 1 and place.after[0].op in MAXIMA:
        side = "behind"
    else:
        return
    gain = layer.numbers.gain
    negative = np.isfinite(gain) & (gain < 0)
    if not negative.any():
        return
    channels = where(negative)
    lowest = float(gain[negative].min())
    yield Observation(
        message=f"Max-pooling stands {side} the norm, and {some_of(channels, len(gain))} have a negative gain, down to "
        f"{number(lowest)}: the two cannot change places there.",
        channels=channels,
        evidence={"lowest": lowest, "share": len(channels) / len(gain), "side": side},
    )


RULES: tuple[Rule, ...] = (
    foldable,
    not_foldable,
    forward_fold_padding,
    stacked_norms,
    norm_after_activation,
    maxpool_negative_gain,
)
