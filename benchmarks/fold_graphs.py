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
    x = (
        s.input(a, rows, dynamic=False)
        if settings.get("transA")
        else s.input(rows, a, dynamic=bias in ("vector", "none"))
    )
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
):
    graph("hard", name=f"written_{title}", written_out=True)(partial(written, steps=steps, shape=shape))
# By single numbers no norm is written; two tools fold it, and nobody misses it where it stays.
graph("hard", name="written_mul_add_scalar", least=0, written_out=True)(partial(written, steps="MA", shape="scalar"))
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
graph("trap", name="written_before_padded_conv", folds=1, least=0, written_out=True)(
    partial(forward_written, padded=True)
)
