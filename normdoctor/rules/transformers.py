"""T: the gains of LayerNorm and RMSNorm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from normdoctor.findings import FOLD, Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import NormKind, NormLayer, as_vector, median
from normdoctor.rules.foldability import REMAINS
from normdoctor.rules.guards import ENOUGH, TOKEN_KINDS
from normdoctor.rules.wording import number, plural, some_of, where


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
    # A gain of 10 times the median leaves the others 3.3 of 8 bits less; benchmarks/calibration.md: healthy below 2.
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
    "T702",
    "gain-absorbed",
    severity=Severity.INFO,
    confidence=Confidence.MEDIUM,
    kinds=TOKEN_KINDS,
    needs=("weight",),
    scope=Scope.MODEL,
    even_untrained=False,
    why="A gain of 1 everywhere costs time and does nothing, and who sees it may take the model for a fresh one.",
    fix="none if the gains were folded into the next weights; otherwise check that they reach the optimiser",
    reference="https://arxiv.org/abs/2404.00456",
    limits={"share": 0.5, "norms": 3},
)
def gain_absorbed(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Most LayerNorms or RMSNorms have a gain of exactly 1 and no shift, while other norms of the model learnt.

    Tools that rotate or slice a language model (QuaRot, SliceGPT) first fold each gain into the weights behind
    it and leave 1 behind. Norms of queries and keys keep theirs, since rotary embeddings stand in the way. It is
    also what is left where the gains never got a gradient.

    Silent where no norm layer of the model ever moved: nothing tells such a model from a fresh one (S100).
    Example: 57 of 113 RMSNorms with a gain of 1 in all 4,096 features, the 56 q_norm and k_norm between 0.4 and 3.
    """
    ones = [layer for layer in layers if (layer.numbers.gain == 1).all() and not layer.numbers.shift.any()]
    if not ones or len(ones) < max(context.limits["norms"], context.limits["share"] * len(layers)):
        return
    yield Observation(
        message=f"Gain exactly 1 and no shift in {len(ones)} of {plural(len(layers), 'norm')} ({ones[0].name}, ...), "
        "while other layers learnt: folded into the next weights?",
        evidence={"layers": [layer.name for layer in ones], "norms": len(layers)},
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
    "T705",
    "affine-foldable",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TOKEN_KINDS,
    needs=("place",),
    scope=Scope.MODEL,
    why="Gain and shift can move into the linear layers behind the norm, which leaves it nothing but to normalise.",
    fix=f"{FOLD} --layernorm",
    reference="https://arxiv.org/abs/2404.00456",
)
def affine_foldable(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """LayerNorms and RMSNorms whose gain and shift fold into the linear layers that take their output.

    W diag(gamma), and W beta added to the bias, exact to rounding; the norm itself stays. Counted by the plan of
    `normdoctor fold --layernorm` for the whole model. Not possible where anything else takes the output, such as the
    shortcut of a post-norm block. Whether the model gets smaller depends on the linear layers: one without a bias gets
    one, and weights that several norms feed are stored apart. `fold` says so of the file it writes.

    Tools that rotate or quantise a language model do so first (QuaRot). Example: 24 of 25 LayerNorms.
    """
    fates = [(layer, layer.place.gain_fate) for layer in layers if layer.place is not None]
    known = [(layer, fate) for layer, fate in fates if fate is not None]
    folded = [(layer, fate) for layer, fate in known if fate.verdict not in REMAINS]
    if not folded:
        return
    left = Counter(fate.code or fate.verdict for _, fate in known if fate.verdict in REMAINS)
    rest = ", ".join(f"{count} {code}" for code, count in left.most_common())
    yield Observation(
        message=f"Gain and shift of {len(folded)} of {plural(len(known), 'norm')} fold into the linear layers behind "
        f"(normdoctor fold --layernorm).{f' The others stay: {rest}.' if rest else ''}",
        evidence={"layers": [layer.name for layer, _ in folded], "norms": len(known)},
        subject=context.model.key or "",
    )


@rule(
    "T711",
    "ln-bound",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TOKEN_KINDS,
    scope=Scope.MODEL,
    why="A range that no input can leave serves a quantiser without data, and tells whether float16 can overflow.",
    fix="none needed; if it is too wide to be of use, measure the range on data",
    reference="https://arxiv.org/abs/1607.06450",
    limits={"largest": 65504.0},
)
def ln_bound(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """How large an output of a LayerNorm or RMSNorm can become, whatever the input: known from gain and shift.

    No normalised value exceeds sqrt(C - 1) in a LayerNorm over C features, or sqrt(C) in an RMSNorm (all the
    variance in a single feature), so the output stays within |gamma| sqrt(C - 1) + |beta|. The bounds of all
    layers are in the evidence. Only said with --target int8 or fp16.

    Example: 27.7 for 768 features with gain 1 and no shift; at most 64.9 over 25 norms of an encoder.
    """
    if context.precision not in ("int8", "fp16"):
        return
    bounds: dict[str, tuple[float, int]] = {}
    for layer in layers:
        size = np.abs(layer.numbers.gain)
        free = len(size) - (1 if layer.kind is NormKind.LAYER else 0)
        if layer.lengths_agree and size.size:
            with np.errstate(over="ignore", invalid="ignore"):
                outputs = size * math.sqrt(free) + np.abs(layer.numbers.shift)
            if np.isfinite(outputs).all():
                feature = int(np.argmax(outputs))
                bounds[layer.name] = (float(outputs[feature]), feature)
    if not bounds:
        return
    worst = max(bounds, key=lambda name: bounds[name])
    largest, feature = bounds[worst]
    message = (
        f"No input takes the output of {plural(len(bounds), 'norm')} beyond {number(largest)} "
        f"({worst}, feature {feature})"
    )
    if context.precision == "int8":
        message += f", where a step of int8 is {number(largest / 127)}."
    elif largest > context.limits["largest"]:
        over = sum(bound > context.limits["largest"] for bound, _ in bounds.values())
        message += f": {plural(over, 'norm')} could overflow float16."
    else:
        message += ": none can overflow float16."
    yield Observation(
        message=message,
        evidence={
            "largest": largest,
            "layers": list(bounds),
            "bounds": [bound for bound, _ in bounds.values()],
        },
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
    # benchmarks/calibration.md: healthy plain gains have medians above 0.45, healthy gain - 1 below 0.2.
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


RULES: tuple[Rule, ...] = (
    gain_outliers,
    gain_absorbed,
    zero_centred_gain,
    affine_foldable,
    ln_bound,
    mixed_zero_centred,
)
