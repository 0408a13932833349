"""T: what LayerNorm, RMSNorm and DynamicTanh do to the user's own data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import NormKind, NormLayer, as_vector
from normdoctor.rules.guards import TOKEN_KINDS, usable_eps
from normdoctor.rules.wording import number, percent, plural

GROUPED = (NormKind.GROUP, NormKind.LAYER_OR_GROUP)


@rule(
    "T704",
    "eps-rules-tokens",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=(*TOKEN_KINDS, *GROUPED),
    needs=("measured",),
    assumes=False,
    even_untrained=False,
    why="Where eps is larger than the variance the norm does not normalise, and another eps gives another answer.",
    fix="compare eps with the original model (1e-5, 1e-6 and 1e-12 are all in use); keep the one it was trained with",
    reference="https://github.com/huggingface/candle/pull/271",
    limits={"share": 0.01},
)
def eps_rules_tokens(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """More than 1 % of the tokens have a variance below eps in this LayerNorm or RMSNorm.

    Their outputs have a standard deviation of sqrt(v / (v + eps)) before the gain, not 1: 0.30 for a variance of
    1e-6 and an eps of 1e-5.

    Harmless where the tokens are padding, or the model was trained with this eps. Example: 12 % of the tokens of
    a model whose eps became 1e-5 on conversion, from 1e-12.
    """
    share = None if layer.measured is None else layer.measured.starved
    if share is None or not share > context.limits["share"]:
        return
    eps = usable_eps(layer)
    known = "" if eps is None else f" ({number(eps)})"
    yield Observation(
        message=f"{percent(share)} of the tokens have a variance below eps{known}: for them eps decides the scale.",
        evidence={"share": share, "eps": eps},
        rank=share,
    )


@rule(
    "T706",
    "tanh-likeness",
    severity=Severity.INFO,
    confidence=Confidence.LOW,
    kinds=(NormKind.LAYER,),
    needs=("measured",),
    scope=Scope.MODEL,
    assumes=False,
    even_untrained=False,
    why="A norm that acts like one curve for all tokens can be replaced by DynamicTanh, which needs no statistics.",
    fix="none needed; a swap needs training, with gamma * tanh(alpha x) from this alpha on",
    reference="https://arxiv.org/abs/2503.10622",
    limits={"tanh": 0.9, "better": 0.02, "linear": 0.95},
)
def tanh_likeness(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Which LayerNorms map their inputs like a tanh, and which like a straight line, whatever the token.

    R^2 of the best g * tanh(alpha x), and of the best line, for the norm without its affine part. Like a tanh: above
    0.9 and 0.02 better than the line. Like a line: above 0.95. The rest scales each token by itself too much for one
    curve. It says how the norm looks, not that it can be swapped as it is.

    Example: early norms of a vision transformer are lines (R^2 0.99), late ones tanh (0.91 against 0.88).
    """
    limits, curves, lines, seen = context.limits, [], [], 0
    for layer in layers:
        measured = layer.measured
        if measured is None or measured.tanh_fit is None or measured.linear_fit is None:
            continue
        seen += 1
        if measured.tanh_fit > limits["tanh"] and measured.tanh_fit - measured.linear_fit > limits["better"]:
            curves.append(layer)
        elif measured.linear_fit > limits["linear"]:
            lines.append(layer)
    if not curves and not lines:
        return
    alphas = [each.measured.tanh_alpha for each in curves if each.measured and each.measured.tanh_alpha is not None]
    span = f" with alpha {number(min(alphas))} to {number(max(alphas))}" if alphas else ""
    verb = "acts" if len(curves) == 1 else "act"
    yield Observation(
        message=f"Of {plural(seen, 'LayerNorm')} {len(curves)} {verb} like a tanh{span}, {len(lines)} like a straight "
        f"line and {seen - len(curves) - len(lines)} like neither.",
        evidence={
            "tanh": [layer.name for layer in curves],
            "alpha": [layer.measured.tanh_alpha if layer.measured else None for layer in curves],
            "linear": [layer.name for layer in lines],
        },
        subject=context.model.key or "",
    )


@rule(
    "T708",
    "dyt-saturation",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=(NormKind.DYNAMIC_TANH,),
    needs=("measured",),
    assumes=False,
    even_untrained=False,
    why="Where the curve is flat nothing but a sign is passed on, and no gradient comes back.",
    fix="train on with a smaller alpha, or look for what makes the inputs of this layer so large",
    reference="https://arxiv.org/abs/2503.10622",
    limits={"share": 0.5},
)
def dyt_saturation(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """More than half of the values lie where DynamicTanh or Derf has less than a tenth of its steepest slope.

    For tanh that is |alpha x| > 1.818, for erf |alpha x + s| > 1.517. For normal inputs half of the values are out
    there when alpha times their standard deviation is 2.7.

    Trained language models are reported to have a quarter to a half there. Example: alpha 0.5 on inputs with a
    standard deviation of 9: 69 % of the values.
    """
    seen = layer.measured
    if seen is None or seen.saturated is None or not seen.saturated > context.limits["share"]:
        return
    alpha = as_vector(layer.alpha)
    drive = None
    if alpha is not None and alpha.size == 1 and seen.input_sd is not None:
        drive = float(np.abs(alpha[0]) * seen.input_sd)
    drive = drive if drive is not None and np.isfinite(drive) else None
    strength = "" if drive is None else f"; alpha times the standard deviation of the inputs is {number(drive)}"
    yield Observation(
        message=f"{percent(seen.saturated)} of the values lie where the slope is below a tenth{strength}.",
        evidence={"share": seen.saturated, "alpha_sd": drive},
        rank=seen.saturated,
    )


RULES: tuple[Rule, ...] = (eps_rules_tokens, tanh_likeness, dyt_saturation)
