"""Patterns of the fold benchmark that are ONNX files: where parameters come from, and who else sees them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from fold_sheets import Sheet, graph
from onnx import TensorProto, helper

# Where parameters come from ------------------------------------------------------------------------------------


def parts(s: Sheet) -> tuple[str, np.ndarray, np.ndarray, list[np.ndarray], int]:
    """An input, a weight, a bias and the statistics of a norm behind it."""
    a, b = s.widths(2)
    return s.input(2, a, 9, 8), s.numbers(b, a, 3, 3), s.numbers(b), s.statistics(b), b


def simple(s: Sheet, x: str, weight: str, *rest: str, bias: str = "", **settings: Any) -> None:
    y = s.node("Conv", x, weight, *([bias] if bias else []))
    s.output(s.node("BatchNormalization", y, *rest, **settings))


@graph("plain", opset=13)
def constant_nodes(s: Sheet) -> None:
    s.constants_as_nodes = True
    x, weight, bias, statistics, _ = parts(s)
    simple(s, x, s.constant(weight), *(s.constant(each) for each in statistics), bias=s.constant(bias))


@graph("hard")
def constant_floats(s: Sheet) -> None:
    """A norm's parameters as lists in attributes of Constant nodes."""
    x, weight, _, statistics, _ = parts(s)
    simple(s, x, s.constant(weight), *(s.node("Constant", value_floats=each.tolist()) for each in statistics))


def behind(s: Sheet, op: str, norm: bool = True, **attributes: Any) -> None:
    x, weight, bias, statistics, _ = parts(s)
    dtype = TensorProto.FLOAT16 if op == "Cast" else None
    lead = [s.constant(weight, dtype=dtype), *(s.constant(each, dtype=dtype if norm else None) for each in statistics)]
    lead = [s.node(op, each, **attributes) if norm or not index else each for index, each in enumerate(lead)]
    simple(s, x, *lead, bias=s.constant(bias))


graph("plain", name="behind_identity")(partial(behind, op="Identity"))
graph("hard", name="behind_cast")(partial(behind, op="Cast", to=TensorProto.FLOAT))
graph("hard", name="weight_behind_cast")(partial(behind, op="Cast", norm=False, to=TensorProto.FLOAT))


@graph("hard")
def behind_reshape(s: Sheet) -> None:
    x, weight, bias, statistics, b = parts(s)
    flat = s.node("Reshape", s.constant(weight.reshape(b, -1)), s.constant(np.array(weight.shape)))
    rest = [s.node("Squeeze", s.constant(each[None]), s.constant(np.array([0]))) for each in statistics]
    simple(s, x, flat, *rest, bias=s.constant(bias))


@graph("hard")
def behind_transpose(s: Sheet) -> None:
    x, weight, bias, statistics, _ = parts(s)
    turned = s.node("Transpose", s.constant(weight.transpose(2, 3, 1, 0)), perm=[3, 2, 0, 1])
    simple(s, x, turned, *map(s.constant, statistics), bias=s.constant(bias))


@graph("hard")
def expanded_bias(s: Sheet) -> None:
    """As the dynamo exporter writes a bias that is absent: zeros of a computed shape."""
    x, weight, _, statistics, _ = parts(s)
    kernel = s.constant(weight)
    shape = s.node("Shape", kernel, start=0, end=1)
    bias = s.node("Expand", s.node("CastLike", s.constant(np.array(0.0)), kernel), shape)
    simple(s, x, kernel, *map(s.constant, statistics), bias=bias)


@graph("hard")
def constant_of_shape_bias(s: Sheet) -> None:
    x, weight, _, statistics, b = parts(s)
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.5])
    bias = s.node("ConstantOfShape", s.constant(np.array([b])), value=value)
    simple(s, x, s.constant(weight), *map(s.constant, statistics), bias=bias)


@graph("hard")
def computed_variance(s: Sheet) -> None:
    """The variance is the square of a stored deviation, the scale 1 + g."""
    x, weight, bias, (scale, shift, mean, variance), _ = parts(s)
    deviation = s.constant(np.sqrt(variance))
    rest = [
        s.node("Add", s.constant(scale - 1), s.constant(np.array(1.0))),
        s.constant(shift),
        s.constant(mean),
        s.node("Mul", deviation, deviation),
    ]
    simple(s, x, s.constant(weight), *rest, bias=s.constant(bias))


@graph("hard")
def computed_weight(s: Sheet) -> None:
    """Weight normalisation written out in the graph."""
    x, weight, bias, statistics, b = parts(s)
    direction = s.constant(weight)
    length = s.node("ReduceL2", direction, axes=[1, 2, 3], keepdims=1)
    kernel = s.node("Mul", s.node("Div", direction, length), s.weight(b, 1, 1, 1))
    simple(s, x, kernel, *map(s.constant, statistics), bias=s.constant(bias))


@graph("plain")
def float_data(s: Sheet) -> None:
    """Numbers in float_data, not in raw bytes."""
    x, weight, bias, statistics, _ = parts(s)
    names = [s.name("w") for _ in range(6)]
    for name, values in zip(names, (weight, bias, *statistics), strict=True):
        s.initializers.append(helper.make_tensor(name, TensorProto.FLOAT, values.shape, values.ravel().tolist()))
    simple(s, x, names[0], *names[2:], bias=names[1])


@graph("trap")
def weight_is_input(s: Sheet) -> None:
    x, _, _, statistics, b = parts(s)
    a = s.data[x].shape[1]
    simple(s, x, s.input(b, a, 3, 3, dynamic=False), *map(s.constant, statistics))


@graph("trap")
def scale_is_input(s: Sheet) -> None:
    x, weight, _, statistics, b = parts(s)
    simple(s, x, s.constant(weight), s.input(b, dynamic=False), *map(s.constant, statistics[1:]))


@graph("trap", folds=1, least=0)
def initializer_is_input(s: Sheet) -> None:
    """The weight has a default and may be given anew at each call."""
    x, weight, bias, statistics, _ = parts(s)
    kernel = s.constant(weight)
    s.inputs.append(helper.make_tensor_value_info(kernel, TensorProto.FLOAT, weight.shape))
    simple(s, x, kernel, *map(s.constant, statistics), bias=s.constant(bias))


# One tensor at several places ----------------------------------------------------------------------------------


@graph("trap", folds=1)
def shared_weight_one_norm(s: Sheet) -> None:
    x, weight, bias, statistics, _ = parts(s)
    kernel, offset = s.constant(weight), s.constant(bias)
    s.output(s.node("Relu", s.node("Conv", x, kernel, offset, strides=[2, 2])))
    simple(s, x, kernel, *map(s.constant, statistics), bias=offset)


@graph("trap", norms=2, folds=2)
def shared_weight_two_norms(s: Sheet) -> None:
    x, weight, bias, statistics, b = parts(s)
    kernel, offset = s.constant(weight), s.constant(bias)
    simple(s, x, kernel, *map(s.constant, statistics), bias=offset)
    simple(s, s.input(*s.data[x].shape), kernel, *map(s.constant, s.statistics(b)), bias=offset)


@graph("trap", norms=2, folds=2)
def shared_everything(s: Sheet) -> None:
    """The same pair at two places."""
    x, weight, bias, statistics, _ = parts(s)
    names = [s.constant(weight), *map(s.constant, statistics)]
    offset = s.constant(bias)
    simple(s, x, *names, bias=offset)
    simple(s, s.input(*s.data[x].shape), *names, bias=offset)


@graph("trap", folds=1)
def weight_used_elsewhere(s: Sheet) -> None:
    x, weight, _, statistics, _ = parts(s)
    kernel = s.constant(weight)
    s.output(s.node("ReduceSum", s.node("Mul", kernel, s.node("ReduceMax", x, keepdims=0)), keepdims=0))
    simple(s, x, kernel, *map(s.constant, statistics))


@graph("trap", folds=1)
def bias_is_beta(s: Sheet) -> None:
    x, weight, _, statistics, _ = parts(s)
    scale, shift, mean, variance = map(s.constant, statistics)
    simple(s, x, s.constant(weight), scale, shift, mean, variance, bias=shift)


@graph("trap", folds=1)
def scale_is_variance(s: Sheet) -> None:
    """All four parameters of the norm and the bias are one tensor, as a deduplicating exporter may write it."""
    x, weight, _, (_, _, _, variance), _ = parts(s)
    one = s.constant(variance)
    simple(s, x, s.constant(weight), one, one, one, one, bias=one)


@graph("trap", folds=1)
def weight_is_output(s: Sheet) -> None:
    x, weight, bias, statistics, _ = parts(s)
    kernel = s.constant(weight)
    s.output(s.node("Identity", kernel))
    simple(s, x, kernel, *map(s.constant, statistics), bias=s.constant(bias))


TAKEN = (
    "conv_bias", "conv.bias", "conv_b", "conv_B", "conv.weight_bn", "conv.weight_folded", "conv.weight.folded",
    "conv.weight_fused", "conv.weight_fused_bn", "fused conv.weight", "bn_bias", "bn.bias",
)  # fmt: skip


@graph("trap", folds=1)
def names_taken(s: Sheet) -> None:
    """Names that tools like to give are there already."""
    x, weight, _, statistics, b = parts(s)
    kernel = s.constant(weight, name="conv.weight")
    rest = [s.constant(each, name=f"bn.{name}") for each, name in zip(statistics, ("w", "b", "m", "v"), strict=True)]
    y = s.node("Conv", x, kernel, outputs=["conv"])
    y = s.node("BatchNormalization", y, *rest, outputs=["bn"])
    for taken in TAKEN:
        y = s.node("Add", y, s.constant(s.numbers(b, 1, 1), name=taken))
    s.output(y)


# Who else sees the values --------------------------------------------------------------------------------------


@graph("trap")
def conv_is_output(s: Sheet) -> None:
    x, weight, bias, statistics, _ = parts(s)
    y = s.node("Conv", x, s.constant(weight), s.constant(bias))
    s.output(y, s.node("BatchNormalization", y, *map(s.constant, statistics)))


@graph("trap")
def conv_has_skip(s: Sheet) -> None:
    x, weight, bias, statistics, _ = parts(s)
    y = s.node("Conv", x, s.constant(weight), s.constant(bias))
    s.output(s.node("Mul", y, s.node("BatchNormalization", y, *map(s.constant, statistics))))


@graph("plain")
def norm_is_output_and_used(s: Sheet) -> None:
    """The name of the norm's output is promised; its values are those of the folded convolution."""
    x, weight, bias, statistics, _ = parts(s)
    y = s.node("Conv", x, s.constant(weight), s.constant(bias))
    y = s.node("BatchNormalization", y, *map(s.constant, statistics), outputs=["features"])
    s.output(y, s.node("Relu", y))


@graph("hard")
def output_through_identity(s: Sheet) -> None:
    x, weight, bias, statistics, _ = parts(s)
    y = s.node("Identity", s.node("Conv", x, s.constant(weight), s.constant(bias)))
    s.output(s.node("Identity", s.node("BatchNormalization", y, *map(s.constant, statistics)), outputs=["y"]))
