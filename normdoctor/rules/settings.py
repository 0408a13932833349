"""C: eps and momentum."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormKind, NormLayer, median
from normdoctor.rules.guards import exported
from normdoctor.rules.wording import REESTIMATE, names, number, percent, plural

FAMILY_EPS = (1e-5, 1e-3)
"""What BatchNorms are built with: torch, ONNX and Caffe; Keras and TensorFlow."""


@rule(
    "C302",
    "momentum-zero",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("momentum",),
    assumes=False,
    why="The running statistics never move, however long the model is trained.",
    fix="set momentum to 0.1 before training on; for inference nothing is needed",
    reference="https://github.com/pytorch/pytorch/issues/15298",
)
def momentum_zero(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """momentum is 0, so running_mean and running_var stay what they are.

    Some converters write 0 to freeze the statistics they brought along, which is harmless as long as the
    buffers hold real values and the model is only used: info. A warning where they still hold 0 and 1, or
    where the layer was saved in training mode.

    Example: momentum 0.0 in six layers of a converted pitch tracker with real statistics (info).
    """
    if isinstance(layer.momentum, str) or layer.momentum != 0:
        return
    if layer.running_var is not None and layer.numbers.default_statistics:
        severity, said = Severity.WARNING, "still the 0 and 1 they were created with"
    elif layer.training:
        severity, said = Severity.WARNING, "frozen although the layer was saved in training mode"
    else:
        severity, said = Severity.INFO, "frozen at the values they came with"
    yield Observation(
        message=f"momentum is 0: the running statistics are {said}.",
        evidence={"momentum": 0.0, "training": layer.training},
        severity=severity,
    )


@rule(
    "C303",
    "momentum-swapped",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("momentum",),
    assumes=False,
    why="The running statistics are those of the last batch or two, with all their noise.",
    fix=f"set momentum to 1 minus this value; {REESTIMATE}",
    reference="https://github.com/eriklindernoren/PyTorch-YOLOv3/issues/230",
    # benchmarks/calibration.md: in large batches even 1 costs little, so it is a warning and no error.
    limits={"from": 0.5},
)
def momentum_swapped(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """momentum is 0.5 to 1: the new batch outweighs everything before it.

    0.9 and 0.99 are what Keras, TensorFlow and ONNX call momentum, the weight of the OLD value; torch means
    the weight of the new batch, 0.1 and 0.01. (For an ONNX file the number judged here is already in torch's
    sense.) With momentum m the statistics carry m / (2 - m) of one batch's noise: 0.82 for 0.9, 0.98 for 0.99.

    1.0 is sometimes set for re-estimating and forgotten. Example: momentum 0.99 in all 75 layers of a port.
    """
    momentum = layer.momentum
    if momentum is None or isinstance(momentum, str) or not context.limits["from"] <= momentum <= 1:
        return  # beyond 1 it is C315's
    swapped = f"set momentum to {number(1 - momentum)}; {REESTIMATE}" if momentum < 1 else None
    yield Observation(
        message=f"momentum {number(momentum)}: the newest batch makes up {percent(momentum)} of the running "
        "statistics." + (f" Keras's decay {number(momentum)} is torch's {number(1 - momentum)}." if swapped else ""),
        evidence={"momentum": momentum, "noise_share": momentum / (2 - momentum)},
        confidence=Confidence.MEDIUM if exported(layer) else None,
        fix=swapped,
        rank=momentum,
    )


@rule(
    "C315",
    "momentum-out-of-range",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("momentum",),
    assumes=False,
    why="The next training step puts the running statistics outside what they average, or makes them NaN.",
    fix="set momentum to 0.1 before training on; for inference the stored statistics decide",
    reference="https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
)
def momentum_out_of_range(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """momentum is negative, above 1 or no number, so it is no share of anything.

    Every step sets a buffer to (1 - momentum) * old + momentum * new. From 0 to 1 that lies between the two;
    outside it is extrapolated, and a variance can turn negative. NaN makes all buffers NaN at the first step.
    torch takes any of them without a word.

    Harmless as long as the model is only used, if it was not trained like that: look at the statistics. S104 and
    S115 compute nothing from such a momentum. Example: momentum 10, meant as 10 % (0.1).
    """
    momentum = layer.momentum
    if momentum is None or isinstance(momentum, str) or 0 <= momentum <= 1:
        return
    effect = "no step can average with it"
    if math.isfinite(momentum):
        effect = f"a step takes {number(momentum)} times the new batch and {number(1 - momentum)} times the old value"
    yield Observation(
        message=f"momentum is {momentum:g}: {effect}.",
        evidence={"momentum": momentum if math.isfinite(momentum) else str(momentum)},
        confidence=Confidence.MEDIUM if exported(layer) else None,
    )


@rule(
    "C304",
    "cumulative-average",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("momentum",),
    assumes=False,
    scope=Scope.MODEL,
    why="What the first, barely trained weights produced counts as much as what the last ones did.",
    fix=f"before training on, set momentum to 0.1; {REESTIMATE}",
    reference="https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
)
def cumulative_average(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """momentum is None: the running statistics are the plain average over all batches that were counted.

    That is right for weights that stand still, and what update_bn sets for the time it runs. Kept on during
    training it averages over all the networks there were on the way, and the share of the first ones falls only
    as one over the number of batches.

    Harmless where the statistics were re-estimated like that after training. Example: momentum=None in all 20
    layers; half of the average comes from the first half of the training.
    """
    plain = [layer for layer in layers if layer.momentum == "cumulative"]
    if not plain:
        return
    which = f"all {plural(len(layers), 'layer')}" if len(plain) == len(layers) else names([one.name for one in plain])
    yield Observation(
        message=f"momentum=None in {which}: the statistics are a plain average over all batches.",
        evidence={"layers": [layer.name for layer in plain]},
    )


@rule(
    "C305",
    "eps-odd",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=tuple(kind for kind in NormKind if kind not in (NormKind.DYNAMIC_TANH, NormKind.AFFINE)),
    needs=("eps",),
    assumes=False,
    scope=Scope.MODEL,
    why="Where variances are small, another eps is another gain; a wrong one is invisible in the shapes.",
    fix="set eps to what the model was trained with (see its config or original code) and save again",
    reference="https://github.com/qqwweee/keras-yolo3/issues/451",
    limits={"change": 0.01},
)
def eps_odd(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """eps differs between layers of one kind, or is none that the frameworks use.

    1e-5 is the default of torch, ONNX and Caffe, 1e-3 that of Keras and TensorFlow; either is right if the
    model was trained with it, and neither is said. eps is not in a state_dict, so a port easily ends with the
    other one, in all layers or in those that were written by hand.

    A warning where the difference changes the median gain of a BatchNorm by more than 1 %, else info. Going
    from 1e-5 to 1e-3 changes it by 4.6 % at variance 1e-2 and 29 % at 1e-3. Example: eps 0.001 in head.bn,
    1e-05 in 19 of 20 BatchNorms, gain changed by 12 %.
    """
    by_kind: dict[NormKind, list[NormLayer]] = {}
    for layer in layers:
        if layer.eps is not None and 0 <= layer.eps < math.inf:
            by_kind.setdefault(layer.kind, []).append(layer)
        else:
            yield Observation(
                layer=layer,
                message=f"eps is {layer.eps}, which is no usable number.",
                evidence={"eps": str(layer.eps)},
                severity=Severity.ERROR,
                rank=1e3,
            )
    for kind, group in by_kind.items():
        table = Counter(_eps(layer) for layer in group)
        # Where two are equally common the one the frameworks use is the usual one.
        usual = max(table, key=lambda eps: (table[eps], _is_family(eps), -eps))
        for layer in group:
            eps = _eps(layer)
            if eps != usual:
                expected, known = usual, f"{number(usual)} in {table[usual]} of {len(group)} {kind.value} layers"
            elif kind in TRACKING_KINDS and not _is_family(eps):
                expected = min(FAMILY_EPS, key=lambda family: abs(math.log(max(eps, 1e-30) / family)))
                known = "the frameworks use 1e-5 or 1e-3"
            else:
                continue
            change = _gain_change(layer, eps, expected)
            serious = change is not None and change > context.limits["change"]
            if eps == usual and not serious:
                continue
            effect = "" if change is None else f", which changes the median gain by {percent(change)}"
            yield Observation(
                layer=layer,
                message=f"eps is {number(eps)}, but {known}{effect}.",
                evidence={"eps": eps, "expected": expected, "gain_change": change},
                severity=Severity.WARNING if serious else Severity.INFO,
                rank=change or 0.0,
            )


def _eps(layer: NormLayer) -> float:
    """eps to six digits: a file may hold 1e-5 rounded to float32."""
    assert layer.eps is not None
    return float(f"{layer.eps:.6g}")


def _is_family(eps: float) -> bool:
    return any(abs(eps - family) <= 0.01 * family for family in FAMILY_EPS)


def _gain_change(layer: NormLayer, eps: float, expected: float) -> float | None:
    """By how much the median gain of the live channels moves when eps is replaced; None without variances."""
    var = layer.numbers.var
    if var is None or not layer.numbers.live.any():
        return None
    live = var[layer.numbers.live]
    return abs(math.expm1(median(np.log((live + eps) / (live + expected))) / 2))


RULES: tuple[Rule, ...] = (
    momentum_zero,
    momentum_swapped,
    momentum_out_of_range,
    cumulative_average,
    eps_odd,
)
