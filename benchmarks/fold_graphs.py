"""Patterns of the fold benchmark that are ONNX files: operators around a norm, as exporters and people write them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from fold_sheets import Sheet, graph
from onnx import TensorProto

# A convolution and its norm, in every version and element type -------------------------------------------------


def conv_norm(s: Sheet) -> None:
    a, b = s.widths(2)
    s.output(s.node("Relu", s.norm(s.conv(s.input(2, a, 9, 8), a, b), b)))


for opset in (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22):
    graph("plain", name=f"conv_norm_opset_{opset}", opset=opset, ir=4 if opset < 13 else 8)(conv_norm)
graph("plain", name="conv_norm_double", dtype=TensorProto.DOUBLE)(conv_norm)
graph("plain", name="conv_norm_half", dtype=TensorProto.FLOAT16)(conv_norm)
graph("plain", name="conv_norm_bfloat16", dtype=TensorProto.BFLOAT16, opset=22, ir=10)(conv_norm)


@graph("plain", ir=3, opset=8)
def initializers_are_inputs(s: Sheet) -> None:
    """Before version 4 of the format every initializer is an input, too."""
    conv_norm(s)
    from onnx import helper

    s.inputs += [helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in s.initializers]


@graph("hard", dtype=TensorProto.FLOAT16)
def half_conv_float_norm(s: Sheet) -> None:
    """Data in float16, the norm's parameters in float32."""
    a, b = s.widths(2)
    s.output(s.norm(s.conv(s.input(2, a, 9, 8), a, b), b, parameters=TensorProto.FLOAT))


@graph("plain")
def conv_1d(s: Sheet) -> None:
    a, b = s.widths(2)
    s.output(s.norm(s.conv(s.input(2, a, 9), a, b, dims=1), b))


@graph("plain")
def conv_3d(s: Sheet) -> None:
    a, b = s.widths(2)
    s.output(s.norm(s.conv(s.input(2, a, 5, 4, 5), a, b, dims=3, pads=[1] * 6), b))


@graph("plain")
def conv_groups(s: Sheet) -> None:
    a, b = s.widths(2)
    s.output(s.norm(s.conv(s.input(2, 3 * a, 9, 8), 3 * a, 3 * b, group=3, dilations=[2, 2]), 3 * b))


@graph("plain")
def conv_auto_pad(s: Sheet) -> None:
    a, b = s.widths(2)
    s.output(s.norm(s.conv(s.input(2, a, 9, 8), a, b, auto_pad="SAME_UPPER", strides=[2, 2]), b))


@graph("plain")
def conv_empty_bias(s: Sheet) -> None:
    """The optional bias is there, without a name."""
    a, b = s.widths(2)
    s.output(s.norm(s.node("Conv", s.input(2, a, 9, 8), s.weight(b, a, 3, 3), ""), b))


def deconv(s: Sheet, groups: int, square: bool = False, **settings: Any) -> None:
    a, b = s.widths(2)
    b = a if square else b
    y = s.node("ConvTranspose", s.input(2, groups * a, 5, 6), s.weight(groups * a, b, 3, 3), group=groups, **settings)
    s.output(s.norm(y, groups * b))


graph("plain", name="deconv")(partial(deconv, groups=1))
graph("plain", name="deconv_square")(partial(deconv, groups=1, square=True, strides=[2, 2]))
graph("plain", name="deconv_groups")(partial(deconv, groups=3, strides=[2, 2], pads=[1, 1, 1, 1]))
graph("plain", name="deconv_groups_square")(partial(deconv, groups=2, square=True))
graph("plain", name="deconv_output_padding")(partial(deconv, groups=1, strides=[2, 2], output_padding=[1, 1]))


@graph("plain", name="deconv_depthwise")
def deconv_depthwise(s: Sheet) -> None:
    (a,) = s.widths(1)
    y = s.node("ConvTranspose", s.input(2, a, 5, 6), s.weight(a, 1, 3, 3), s.weight(a), group=a)
    s.output(s.norm(y, a))


# Matrix products -------------------------------------------------------------------------------------------------


def gemm(s: Sheet, bias: str = "vector", forward: bool = False, **settings: Any) -> None:
    a, b = s.widths(2)
    rows = 4
    x = s.input(a, rows, dynamic=False) if settings.get("transA") else s.input(rows, a, dynamic=bias in ("vector", "none"))
    shapes = {"vector": (b,), "scalar": (), "row": (1, b), "column": (rows, 1), "full": (rows, b), "one": (1,)}
    if forward:
        x = s.norm(x, a)
    weight = s.weight(b, a) if settings.get("transB") else s.weight(a, b)
    y = s.node("Gemm", x, weight, *([] if bias == "none" else [s.weight(*shapes[bias])]), **settings)
    s.output(s.node("Tanh", y) if forward else s.norm(y, b))


graph("plain", name="gemm")(gemm)
graph("plain", name="gemm_trans_b")(partial(gemm, transB=1))
graph("plain", name="gemm_no_bias", opset=13)(partial(gemm, bias="none", transB=1))
graph("hard", name="gemm_trans_a")(partial(gemm, transA=1))
graph("hard", name="gemm_alpha")(partial(gemm, alpha=0.5, transB=1))
graph("hard", name="gemm_beta")(partial(gemm, beta=0.25))
graph("hard", name="gemm_alpha_beta")(partial(gemm, alpha=-1.5, beta=0.25, transA=1, transB=1))
graph("hard", name="gemm_beta_zero")(partial(gemm, beta=0.0, transB=1))
graph("hard", name="gemm_beta_zero_no_bias")(partial(gemm, beta=0.0, alpha=2.0, bias="none"))
graph("hard", name="gemm_bias_scalar")(partial(gemm, bias="scalar"))
graph("hard", name="gemm_bias_one")(partial(gemm, bias="one", beta=0.5))
graph("hard", name="gemm_bias_row")(partial(gemm, bias="row", transB=1))
graph("hard", name="gemm_bias_column")(partial(gemm, bias="column"))
graph("hard", name="gemm_bias_full")(partial(gemm, bias="full", beta=2.0))
graph("hard", name="norm_gemm")(partial(gemm, forward=True))
graph("hard", name="norm_gemm_trans_b_alpha_beta")(partial(gemm, forward=True, transB=1, alpha=0.5, beta=0.25))
graph("hard", name="norm_gemm_no_bias")(partial(gemm, forward=True, bias="none", transB=1))
graph("hard", name="norm_gemm_scalar")(partial(gemm, forward=True, bias="scalar"))


@graph("plain", opset=7, ir=4)
def gemm_opset_7(s: Sheet) -> None:
    gemm(s, transB=1)


@graph("trap")
def gemm_constant_left(s: Sheet) -> None:
    """The constant has the rows, the norm is over the columns, which come from the data."""
    a, b = s.widths(2)
    y = s.node("Gemm", s.weight(4, a), s.input(a, b, dynamic=False))
    s.output(s.norm(y, b))


@graph("trap", least=0)
def norm_is_gemm_bias(s: Sheet) -> None:
    """The norm's output is what Gemm adds, not what it multiplies."""
    a, b = s.widths(2)
    bias = s.norm(s.input(4, b), b)
    s.output(s.node("Tanh", s.node("Gemm", s.input(4, a), s.weight(a, b), bias, beta=0.5)))


def matmul(s: Sheet, add: str = "", forward: bool = False, wrong: bool = False) -> None:
    a, b = s.widths(2)
    if wrong:
        s.output(s.norm(s.node("MatMul", s.input(3, b, a), s.weight(a, b)), b))
        return
    x = s.input(4, a)
    x = s.norm(x, a) if forward else x
    y = s.node("MatMul", x, s.weight(a, b))
    if add:
        bias = s.weight(*({"vector": (b,), "left": (b,), "row": (1, b), "scalar": ()}[add]))
        y = s.node("Add", bias, y) if add == "left" else s.node("Add", y, bias)
    s.output(s.node("Tanh", y) if forward else s.norm(y, b))


graph("hard", name="matmul")(matmul)
graph("hard", name="matmul_add")(partial(matmul, add="vector"))
graph("hard", name="matmul_add_left")(partial(matmul, add="left"))
graph("hard", name="matmul_add_row")(partial(matmul, add="row"))
graph("hard", name="matmul_add_scalar")(partial(matmul, add="scalar"))
graph("hard", name="norm_matmul")(partial(matmul, forward=True))
graph("hard", name="norm_matmul_add")(partial(matmul, forward=True, add="vector"))
graph("trap", name="matmul_wrong_axis")(partial(matmul, wrong=True))


@graph("hard")
def matmul_constant_left(s: Sheet) -> None:
    """Weights on the left: its rows are the norm's channels."""
    a, b = s.widths(2)
    s.output(s.norm(s.node("MatMul", s.weight(b, a), s.input(2, a, 7)), b))


@graph("hard")
def norm_matmul_constant_left(s: Sheet) -> None:
    a, b = s.widths(2)
    s.output(s.node("Tanh", s.node("MatMul", s.weight(b, a), s.norm(s.input(2, a, 7), a))))


@graph("hard")
def matmul_transpose(s: Sheet) -> None:
    a, b = s.widths(2)
    y = s.node("Add", s.node("MatMul", s.input(2, 7, a), s.weight(a, b)), s.weight(b))
    s.output(s.norm(s.node("Transpose", y, perm=[0, 2, 1]), b))


@graph("hard")
def norm_transpose_matmul(s: Sheet) -> None:
    a, b = s.widths(2)
    x = s.node("Transpose", s.norm(s.input(2, a, 7), a), perm=[0, 2, 1])
    s.output(s.node("Tanh", s.node("Add", s.node("MatMul", x, s.weight(a, b)), s.weight(b))))


# Written out by another framework --------------------------------------------------------------------------------


def written(s: Sheet, steps: str, shape: str = "channels") -> None:
    """steps: one letter for each of Mul, Add, Sub, Div; lower case with the constant on the left."""
    a, b = s.widths(2)
    y = s.conv(s.input(2, a, 9, 8), a, b)
    last = shape == "last"
    y = s.node("Transpose", y, perm=[0, 2, 3, 1]) if last else y
    form = {"channels": (1, b, 1, 1), "short": (b, 1, 1), "last": (b,), "scalar": ()}[shape]
    for letter in steps:
        op = {"m": "Mul", "a": "Add", "s": "Sub", "d": "Div"}[letter.lower()]
        values = 0.5 + np.abs(s.numbers(*form)) if op == "Div" else s.numbers(*form)
        other = s.constant(values)
        y = s.node(op, other, y) if letter.islower() else s.node(op, y, other)
    s.output(s.node("Relu", y))


for title, steps, shape in (
    ("mul_add", "MA", "channels"),
    ("mul_add_short", "MA", "short"),
    ("mul_add_left", "ma", "short"),
    ("sub_mul_add", "SMA", "channels"),
    ("mul_add_channels_last", "MA", "last"),
    ("mul_add_scalar", "MA", "scalar"),
):
    graph("hard", name=f"written_{title}", written_out=True)(partial(written, steps=steps, shape=shape))
graph("hard", norms=2, name="written_sub_div_mul_add", written_out=True)(partial(written, steps="SDMA"))
graph("hard", norms=2, name="written_sub_left_div_mul", written_out=True)(partial(written, steps="sDM"))
graph("trap", name="written_constant_over_conv", written_out=True)(partial(written, steps="d"))


def forward_written(s: Sheet, padded: bool) -> None:
    """Preprocessing: (x - mean) / deviation in front of the first convolution."""
    a, b = s.widths(2)
    x = s.node("Sub", s.input(2, a, 9, 8), s.weight(1, a, 1, 1))
    x = s.node("Div", x, s.constant(0.5 + np.abs(s.numbers(a, 1, 1))))
    s.output(s.node("Relu", s.conv(x, a, b, pads=[1] * 4 if padded else [0] * 4)))


graph("hard", name="written_before_conv", written_out=True)(partial(forward_written, padded=False))
graph("trap", name="written_before_padded_conv", folds=1, least=0, written_out=True)(partial(forward_written, padded=True))


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


def passing(kind: str, name: str, *ops: Any, opset: int = 17, least: int | None = None, folds: int | None = None, **settings: Any) -> None:
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
    return lambda s, y, b: s.node("Resize", y, "", s.constant(np.array([1.0, 1, 2, 2]), dtype=TensorProto.FLOAT), mode=mode)


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
