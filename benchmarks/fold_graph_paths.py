"""Patterns of the fold benchmark that are ONNX files: what stands between a norm and a weight."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from fold_sheets import Sheet, graph
from onnx import TensorProto

# Through other operators ------------------------------------------------------------------------------------------


def through(s: Sheet, *ops: Any, channels: int = 1, positive: bool | None = None, wide: int = 1) -> None:
    """conv, then each of `ops` (a function of sheet, name and width, or an operator with attributes), then the norm."""
    a, b = s.widths(2)
    y = s.conv(s.input(2, a, 10, 8), a, b * wide)
    for op in ops:
        y = op(s, y, b * wide) if callable(op) else s.node(op[0], y, **op[1])
    s.output(s.norm(y, b * channels, positive=positive))


def op(name: str, **attributes: Any) -> tuple[str, dict[str, Any]]:
    return name, attributes


def reshape(*shape: int) -> Any:
    return lambda s, y, b: s.node("Reshape", y, s.constant(np.array([each if each < 100 else b for each in shape])))


def with_ints(name: str, *values: Any, **attributes: Any) -> Any:
    return lambda s, y, b: s.node(name, y, *(s.constant(np.array(each)) for each in values), **attributes)


def passing(
    kind: str,
    name: str,
    *ops: Any,
    opset: int = 17,
    least: int | None = None,
    folds: int | None = None,
    **settings: Any,
) -> None:
    graph(kind, name=f"through_{name}", opset=opset, ir=4 if opset < 13 else 8, least=least, folds=folds)(
        lambda s: through(s, *ops, **settings)
    )


passing("hard", "identity", op("Identity"))
passing("hard", "dropout", op("Dropout"), opset=12)
passing("hard", "dropout_7", op("Dropout", ratio=0.4), opset=7)
passing("hard", "transpose_pair", op("Transpose", perm=[0, 2, 3, 1]), op("Transpose", perm=[0, 3, 1, 2]))
passing("hard", "cast_pair", op("Cast", to=TensorProto.DOUBLE), op("Cast", to=TensorProto.FLOAT))
passing("hard", "average_pool", op("AveragePool", kernel_shape=[2, 2], strides=[2, 2]))
passing("hard", "average_pool_uncounted", op("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=0))
passing("trap", "average_pool_counted", op("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1))
passing("hard", "average_pool_same", op("AveragePool", kernel_shape=[3, 3], auto_pad="SAME_UPPER"))
passing("hard", "global_average_pool", op("GlobalAveragePool"))
passing("hard", "global_pool_flatten", op("GlobalAveragePool"), op("Flatten"))
passing("hard", "reduce_mean", op("ReduceMean", axes=[2, 3], keepdims=0))
passing("hard", "reduce_mean_18", with_ints("ReduceMean", [2, 3], keepdims=1), opset=18)
passing("hard", "reduce_mean_negative_axes", op("ReduceMean", axes=[-1], keepdims=0))
passing("trap", "reduce_sum", with_ints("ReduceSum", [2, 3], keepdims=0), folds=1, least=0)
passing("hard", "max_pool_positive", op("MaxPool", kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]), positive=True)
passing("hard", "global_max_pool_positive", op("GlobalMaxPool"), positive=True)
passing("hard", "reduce_max_positive", op("ReduceMax", axes=[2, 3], keepdims=1), positive=True)
passing("trap", "max_pool", op("MaxPool", kernel_shape=[3, 3], strides=[2, 2]), positive=False)
passing("trap", "global_max_pool", op("GlobalMaxPool"), op("Flatten"), positive=False)
passing("trap", "reduce_max", op("ReduceMax", axes=[2, 3], keepdims=0), positive=False)
passing("trap", "lp_pool", op("LpPool", kernel_shape=[2, 2]))
passing("trap", "hard_sigmoid", op("HardSigmoid"))
passing("trap", "relu", op("Relu"))
passing("trap", "relu_positive", op("Relu"), positive=True)
passing("trap", "clip", with_ints("Clip", 0.0, 6.0))
passing("trap", "sqrt", op("Abs"), op("Sqrt"))
passing("trap", "softmax", op("Softmax", axis=1))
passing("hard", "negation", op("Neg"))
passing("hard", "flatten_last", reshape(0, 0, -1))
passing("hard", "reshape_known", reshape(-1, 999, 8, 6))
passing("hard", "squeeze", op("GlobalAveragePool"), with_ints("Squeeze", [2, 3]))
passing("hard", "squeeze_11", op("GlobalAveragePool"), op("Squeeze", axes=[2, 3]), opset=11)
passing("hard", "unsqueeze", with_ints("Unsqueeze", [-1]))
passing("trap", "pad_zero", with_ints("Pad", [0, 0, 1, 1, 0, 0, 1, 1]))
passing("hard", "pad_reflect", with_ints("Pad", [0, 0, 1, 1, 0, 0, 1, 1], mode="reflect"))
passing("hard", "pad_edge", with_ints("Pad", [0, 0, 1, 1, 0, 0, 1, 1], mode="edge"))
passing("hard", "slice_space", with_ints("Slice", [1, 1], [5, 4], [2, 3]))
passing("hard", "tile", with_ints("Tile", [1, 1, 2, 1]), least=0)
passing("hard", "depth_to_space", op("DepthToSpace", blocksize=2), wide=4)
passing("hard", "depth_to_space_crd", op("DepthToSpace", blocksize=2, mode="CRD"), wide=4)
passing("trap", "space_to_depth", op("SpaceToDepth", blocksize=2), channels=4)


def resize(mode: str) -> Any:
    return lambda s, y, b: s.node(
        "Resize", y, "", s.constant(np.array([1.0, 1, 2, 2]), dtype=TensorProto.FLOAT), mode=mode
    )


passing("hard", "resize_nearest", resize("nearest"))
passing("hard", "resize_linear", resize("linear"))
passing("hard", "upsample_9", lambda s, y, b: s.node("Upsample", y, s.constant(np.array([1.0, 1, 2, 2]))), opset=9)


def scaled(name: str, *shape: int, left: bool = False) -> Any:
    """One more constant on the way; 999 stands for the number of channels."""

    def write(s: Sheet, y: str, b: int) -> str:
        other = s.constant(0.5 + np.abs(s.numbers(*(b if each == 999 else each for each in shape))))
        return s.node(name, other, y) if left else s.node(name, y, other)

    return write


passing("hard", "add_channels", scaled("Add", 1, 999, 1, 1))
passing("hard", "add_scalar_left", scaled("Add", left=True))
passing("hard", "add_whole", scaled("Add", 1, 999, 8, 6), least=0)
passing("hard", "add_space", scaled("Add", 8, 6), least=0)
passing("trap", "mul_space", scaled("Mul", 8, 6))
passing("hard", "sub_from", scaled("Sub", 999, 1, 1, left=True))


@graph("hard", folds=1)
def through_cast_to_half(s: Sheet) -> None:
    """The convolution in float32, the norm in float16."""
    a, b = s.widths(2)
    y = s.node("Cast", s.conv(s.input(2, a, 9, 8), a, b), to=TensorProto.FLOAT16)
    y = s.norm(y, b, parameters=TensorProto.FLOAT16)
    s.output(s.node("Cast", y, to=TensorProto.FLOAT))


@graph("hard")
def through_reshape_pairs(s: Sheet) -> None:
    """Each channel of the norm is two of the convolution."""
    a, b = s.widths(2)
    y = s.conv(s.input(2, a, 9, 8), a, 2 * b)
    y = s.node("Reshape", y, s.constant(np.array([-1, b, 14, 6])))
    s.output(s.norm(y, b))


@graph("trap")
def through_reshape_split(s: Sheet) -> None:
    """Two channels of the norm are one of the convolution."""
    a, b = s.widths(2)
    y = s.conv(s.input(2, a, 10, 8), a, b)
    y = s.node("Reshape", y, s.constant(np.array([-1, 2 * b, 4, 6])))
    s.output(s.norm(y, 2 * b))


@graph("trap")
def through_transpose(s: Sheet) -> None:
    """The norm is over what was the height, of the same length."""
    (b,) = s.widths(1)
    y = s.conv(s.input(2, 3, b, b), 3, b, pads=[1] * 4)
    s.output(s.norm(s.node("Transpose", y, perm=[0, 2, 1, 3]), b))


@graph("hard", least=0)
def through_gather(s: Sheet) -> None:
    """Channels in another order."""
    a, b = s.widths(2)
    order = s.constant(s.random.permutation(b))
    s.output(s.norm(s.node("Gather", s.conv(s.input(2, a, 9, 8), a, b), order, axis=1), b))


@graph("hard")
def through_slice_channels(s: Sheet) -> None:
    a, b = s.widths(2)
    y = s.conv(s.input(2, a, 9, 8), a, b + 3)
    bounds = [s.constant(np.array([each])) for each in (1, b + 1, 1)]
    s.output(s.norm(s.node("Slice", y, *bounds), b))


def split(s: Sheet, both: bool) -> None:
    a, b, c = s.widths(3)
    one, two = s.name(), s.name()
    y = s.conv(s.input(2, a, 9, 8), a, b + c)
    s.node("Split", y, s.constant(np.array([b, c])), outputs=[one, two], axis=1)
    s.output(s.norm(one, b), s.norm(two, c) if both else s.node("Relu", two))


graph("hard", norms=2, name="through_split")(partial(split, both=True))
graph("hard", name="through_split_one")(partial(split, both=False))


def joined(s: Sheet, op: str, inputs: bool = False, **settings: Any) -> None:
    a, b = s.widths(2)
    x = s.input(2, a, 9, 8)
    parts = [s.conv(x, a, b, pads=[1] * 4), s.input(2, b, 9, 8) if inputs else s.conv(x, a, b, pads=[1] * 4)]
    y = s.node(op, *parts, *([s.conv(x, a, b, pads=[1] * 4)] if op == "Sum" else []), **settings)
    s.output(s.norm(y, 2 * b if settings.get("axis") in (1, -3) else b))


graph("hard", name="through_concat")(partial(joined, op="Concat", axis=1))
graph("hard", name="through_concat_negative_axis")(partial(joined, op="Concat", axis=-3))
graph("hard", name="through_concat_space")(partial(joined, op="Concat", axis=2))
graph("hard", name="through_add")(partial(joined, op="Add"))
graph("hard", name="through_sub")(partial(joined, op="Sub"))
graph("hard", name="through_sum")(partial(joined, op="Sum"))
graph("trap", name="through_mul")(partial(joined, op="Mul"))
graph("trap", name="through_max")(partial(joined, op="Max"))
graph("trap", name="through_add_of_input")(partial(joined, op="Add", inputs=True))
graph("trap", name="through_concat_of_input")(partial(joined, op="Concat", inputs=True, axis=1))


@graph("hard", least=0)
def through_add_to_itself(s: Sheet) -> None:
    a, b = s.widths(2)
    y = s.conv(s.input(2, a, 9, 8), a, b)
    s.output(s.norm(s.node("Add", y, y), b))


# The norm comes first ---------------------------------------------------------------------------------------------


def forward(s: Sheet, *ops: Any, consumers: int = 1, end: bool = False, **settings: Any) -> None:
    a, b = s.widths(2)
    kernel = settings.pop("kernel", 3)
    y = s.norm(s.input(2, a, 10, 8), a)
    for each in ops:
        y = each(s, y, a) if callable(each) else s.node(each[0], y, **each[1])
    for _ in range(consumers):
        s.output(s.node("Relu", s.conv(y, a, b, kernel, **settings)))
    if end:
        s.output(y)


graph("hard", name="norm_conv")(forward)
graph("hard", name="norm_conv_valid")(partial(forward, auto_pad="VALID", strides=[2, 2]))
graph("hard", name="norm_conv_same_pointwise")(partial(forward, auto_pad="SAME_UPPER", kernel=1))
graph("trap", name="norm_conv_same")(partial(forward, auto_pad="SAME_UPPER"))
graph("trap", name="norm_conv_padded")(partial(forward, pads=[0, 0, 1, 1]))
graph("hard", name="norm_two_convs")(partial(forward, consumers=2))
graph("trap", name="norm_conv_and_output")(partial(forward, end=True))
graph("hard", name="norm_dropout_conv", opset=12, ir=4)(lambda s: forward(s, op("Dropout")))
graph("hard", name="norm_average_pool_conv")(lambda s: forward(s, op("AveragePool", kernel_shape=[2, 2])))
graph("hard", name="norm_mul_add_conv")(lambda s: forward(s, scaled("Mul", 999, 1, 1), scaled("Add", 999, 1, 1)))
graph("trap", name="norm_relu_conv")(lambda s: forward(s, op("Relu")))
graph("hard", name="norm_reflect_conv")(
    lambda s: forward(s, with_ints("Pad", [0, 0, 1, 1, 0, 0, 1, 1], mode="reflect"))
)
graph("trap", name="norm_zero_pad_conv")(lambda s: forward(s, with_ints("Pad", [0, 0, 1, 1, 0, 0, 1, 1])))


@graph("hard")
def norm_flatten_gemm(s: Sheet) -> None:
    """Each channel of the norm meets twelve rows of the weight."""
    a, b = s.widths(2)
    y = s.node("Flatten", s.norm(s.input(2, a, 3, 4), a))
    s.output(s.node("Tanh", s.node("Gemm", y, s.weight(b, 12 * a), s.weight(b), transB=1)))


@graph("hard")
def norm_grouped_conv(s: Sheet) -> None:
    a, b = s.widths(2)
    s.output(s.node("Relu", s.conv(s.norm(s.input(2, 2 * a, 9, 8), 2 * a), 2 * a, 2 * b, group=2)))


@graph("hard", norms=2)
def norm_norm_conv(s: Sheet) -> None:
    (a,) = s.widths(1)
    s.output(s.conv(s.norm(s.norm(s.input(2, a, 9, 8), a), a), a, 4))


@graph("hard", norms=2)
def conv_norm_norm(s: Sheet) -> None:
    (a,) = s.widths(1)
    s.output(s.norm(s.norm(s.conv(s.input(2, 3, 9, 8), 3, a), a), a))


@graph("trap")
def norm_alone(s: Sheet) -> None:
    (a,) = s.widths(1)
    s.output(s.norm(s.input(2, a, 9, 8), a))


@graph("trap")
def norm_deconv(s: Sheet) -> None:
    a, b = s.widths(2)
    y = s.node("ConvTranspose", s.norm(s.input(2, a, 5, 6), a), s.weight(a, b, 3, 3), strides=[2, 2])
    s.output(s.node("Relu", y))


@graph("hard")
def norm_pointwise_deconv(s: Sheet) -> None:
    a, b = s.widths(2)
    y = s.node("ConvTranspose", s.norm(s.input(2, 2 * a, 5, 6), 2 * a), s.weight(2 * a, b, 1, 1), group=2)
    s.output(s.node("Relu", y))
