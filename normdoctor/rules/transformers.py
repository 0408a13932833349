"""T: LayerNorm, RMSNorm and what stands in for them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import NormKind, NormLayer, as_vector, median
from normdoctor.rules.guards import ENOUGH
from normdoctor.rules.wording import number, plural, some_of, where

TOKEN_KINDS = (NormKind.LAYER, NormKind.RMS, NormKind.LAYER_OR_RMS)
"""Norms over the features of a token; a GroupNorm that could be a LayerNorm is left to the other rules."""


@rule(
    "T701",
    "gain-outliers",
    severity=Severity.INFO,
    confidence=Confidence.MEDIUM,
    kinds=TOKEN_KINDS,
    needs=("weight",),
    scope=Scope.MODEL,
    why="These few dimensions set the range of a per-tensor quantiser and leave the others a handful of steps.",
    fix="do not clip or reset them; for int8 move the gain into the next linear layer, or smooth (alpha 0.5)",
    reference="https://arxiv.org/abs/2105.06990",
    limits={"deviations": 3.0, "share": 0.5, "norms": 3, "of_median": 10.0},
)
def gain_outliers(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The same few dimensions have an outlying gain in most norms, or one gain towers above its layer.

    Trained transformers put a few features far from the rest: more than 3 standard deviations of gamma in the
    same position of at least half of the norms. The model depends on them (resetting less than 0.0001 % of the
    weights breaks BERT), so they are no fault. For int8 they are what costs accuracy: a warning with
    --target int8. A single gain above 10 times the layer's median |gamma| is named too.

    Layers of 16 features or more, and at least three norms that agree. Example: dimensions 308 and 381 in 25
    of 25 norms of a BERT.
    """
    limits = context.limits
    severity = Severity.WARNING if context.precision == "int8" else Severity.INFO
    by_width: dict[int, list[np.ndarray]] = {}
    for layer in layers:
        gain = layer.numbers.gain
        if len(gain) < ENOUGH or not np.isfinite(gain).all():
            continue
        spread = float(gain.std())
        far = np.abs(gain - gain.mean()) > limits["deviations"] * spread
        by_width.setdefault(len(gain), []).append(far)
        if not far.any():
            continue  # a gain of ten times the median among 16 or more values is far from their mean, too
        size = np.abs(gain)
        middle = median(size)
        towering = size > limits["of_median"] * middle
        if middle > 0 and towering.any():
            worst = int(np.argmax(size))
            ratio = float(size[worst]) / middle
            channels = where(towering)
            yield Observation(
                layer=layer,
                message=f"Gain {worst} is {number(ratio)} times the layer's median: "
                f"{some_of(channels, len(size))} above {limits['of_median']:g} times.",
                channels=channels,
                evidence={"ratio": ratio, "largest": float(size[worst]), "median": middle},
                severity=severity,
                rank=ratio,
            )
    for width, masks in by_width.items():
        counts = np.sum(masks, axis=0)
        needed = max(limits["norms"], limits["share"] * len(masks))
        common = where(counts >= needed)
        if common:
            most = int(counts.max())
            yield Observation(
                message=f"The gain of {some_of(common, width)} lies more than {limits['deviations']:g} standard "
                f"deviations off in up to {most} of {plural(len(masks), 'norm')} of that width.",
                channels=common,
                evidence={"width": width, "norms": len(masks), "most": most},
                severity=severity,
                rank=most / len(masks),
            )


@rule(
    "T703",
    "zero-centred-gain",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TOKEN_KINDS,
    needs=("weight",),
    scope=Scope.MODEL,
    why="Weights stored as gain - 1 and read as gain, or the reverse, change every output of the model.",
    fix="none needed; whoever converts the model must add 1 exactly once",
    reference="https://github.com/linkedin/Liger-Kernel/issues/74",
    limits={"share": 0.75, "near_zero": 0.25, "near_one": 0.5, "negative": 0.1},
)
def zero_centred_gain(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """A norm stores gain - 1: its weights centre on 0 and it multiplies by 1 + weight (Gemma, Qwen3-Next).

    A fact, and all other rules read such weights as 1 + weight. A warning where the class and the values do
    not fit together in three quarters of its layers: the class adds 1 but the weights centre on 1 already
    (converted, so it is added twice and gains are near 2), or the class multiplies by weights that centre on 0
    (the 1 was lost, so nearly nothing passes).

    Example: a Gemma class with weights of median 1.02 in all 37 layers.
    """
    limits = context.limits
    if all(layer.zero_centred_by_class is None and not layer.zero_centred for layer in layers):
        return
    stored = {layer: _stored(layer) for layer in layers}
    adding = [layer for layer in layers if layer.zero_centred_by_class is True]
    plain = [layer for layer in layers if layer.zero_centred_by_class is False]
    twice = [layer for layer in adding if limits["near_one"] <= median(stored[layer]) <= 2]
    lost = [layer for layer in plain if _centred_on_zero(stored[layer], limits["near_zero"], limits["negative"])]
    if len(twice) < limits["share"] * len(adding):
        twice = []  # some layers of a real 1 + w model have large weights
    if len(lost) < limits["share"] * len(plain):
        lost = []
    for layer in layers:
        centre = median(stored[layer])
        evidence = {"median_weight": centre, "median_gain": centre + 1 if layer.zero_centred else centre}
        if layer in twice or layer in lost:
            does, is_at, result = (
                ("adds 1 to the weight", "1 already", "added twice, or converted before")
                if layer in twice
                else ("multiplies by the weight", "0", "the 1 + is lost")
            )
            yield Observation(
                layer=layer,
                message=f"The class {does}, but the weights centre on {is_at} (median {number(centre)}): {result}.",
                evidence=evidence,
                severity=Severity.WARNING,
                confidence=Confidence.MEDIUM,
                fix="find out whether a converter added 1; then subtract it, or use the class without 1 + weight",
            )
        elif layer.zero_centred:
            yield Observation(
                layer=layer,
                message=f"The weights (median {number(centre)}) are gain - 1; read as 1 + weight.",
                evidence=evidence,
            )


def _stored(layer: NormLayer) -> np.ndarray:
    weight = as_vector(layer.weight)
    assert weight is not None
    return weight[np.isfinite(weight)]


def _centred_on_zero(weight: np.ndarray, near: float, negative: float) -> bool:
    """Values of both signs about 0. Small gains alone (a first layer of a Llama) are nearly all positive."""
    return abs(median(weight)) < near and float(np.mean(weight < 0)) >= negative if weight.size else False


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
    limits={"init": 0.5, "small": 0.01, "large": 20.0},
)
def dyt_alpha(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """The scalar alpha of a DynamicTanh, gamma * tanh(alpha * x) + beta, is out of range.

    Error where it is 0 (the output is beta) or not a finite number. Warning where |alpha| is below 0.01 or
    above 20 times its initial value of 0.5 (large language models start it between 0.05 and 0.8: set the limit
    `init`). A negative alpha is legal, the sign can go to gamma: info.

    Example: alpha 0.0 in blocks.3.norm1: every token gets the same output.
    """
    alpha = as_vector(layer.alpha)
    assert alpha is not None
    limits = context.limits
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
        severity, said = Severity.WARNING, f"below {number(low)}, the tanh is a straight line"
    elif (size > high).any():
        severity, said = Severity.WARNING, f"above {number(high)}, the tanh gives little but signs"
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
    "T712",
    "mixed-zero-centred",
    severity=Severity.INFO,
    confidence=Confidence.MEDIUM,
    kinds=TOKEN_KINDS,
    needs=("weight",),
    scope=Scope.MODEL,
    why="A converter that treats all norms of the model alike gets one of the two sorts wrong.",
    fix="none if the model is built like that (Qwen3.5 is); otherwise compare with the original weights",
    reference="https://github.com/NeuraLegion/shainet/issues/176",
    limits={"near_zero": 0.25, "near_one": 0.25, "negative": 0.1, "share": 0.75},
)
def mixed_zero_centred(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Some norms of one model multiply by 1 + weight and others by weight.

    Some architectures do that on purpose (Qwen3.5 within one block). It is also what is left when 1 was added
    to, or lost from, a single layer; the values then stand alone: about 1 where three quarters of the others
    centre on 0, or about 0 with both signs where the others centre on 1. Said of the layers in the minority.

    Example: layers.7.self_attn.q_norm has the median 1.01, 111 of 112 other norms lie about 0.
    """
    known = [layer for layer in layers if layer.zero_centred is not None]
    adding = [layer for layer in known if layer.zero_centred]
    plain = [layer for layer in known if not layer.zero_centred]
    if adding and plain:
        few, many = (adding, plain) if len(adding) <= len(plain) else (plain, adding)
        reads = ("1 + weight", "weight") if few is adding else ("weight", "1 + weight")
        for layer in few:
            yield Observation(
                layer=layer,
                message=f"This layer multiplies by {reads[0]}, {len(many)} of {plural(len(known), 'norm')} "
                f"by {reads[1]}.",
                evidence={"like_this": len(few), "otherwise": len(many)},
            )
    elif len(known) >= 3:
        yield from _standing_alone(known, context)


def _standing_alone(layers: list[NormLayer], context: Context) -> Iterator[Observation]:
    limits = context.limits
    stored = {layer: _stored(layer) for layer in layers}
    zero = [layer for layer in layers if _centred_on_zero(stored[layer], limits["near_zero"], limits["negative"])]
    one = [layer for layer in layers if abs(median(stored[layer]) - 1) <= limits["near_one"]]
    few, many, centre, other = (one, zero, 1, 0) if layers[0].zero_centred else (zero, one, 0, 1)
    if not few or len(many) < limits["share"] * (len(layers) - 1):
        return
    for layer in few:
        yield Observation(
            layer=layer,
            message=f"The weights centre on {centre} (median {number(median(stored[layer]))}), those of "
            f"{len(many)} of {plural(len(layers), 'norm')} on {other}.",
            evidence={"median_weight": median(stored[layer]), "otherwise": len(many)},
            confidence=Confidence.LOW,
        )


RULES: tuple[Rule, ...] = (gain_outliers, zero_centred_gain, dyt_alpha, mixed_zero_centred)
