"""Patterns of the fold benchmark that are ONNX files: bodies of If and Loop, functions, and norms that must stay."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from fold_graph_sites import parts, simple
from fold_sheets import Sheet, graph
from onnx import TensorProto, helper

# Bodies and functions ------------------------------------------------------------------------------------------


def choice(s: Sheet, then: Any, otherwise: Any) -> str:
    """An If over a boolean input."""
    flag = s.input(1, name="flag", dtype=TensorProto.BOOL, dynamic=False)
    s.data[flag] = np.array([True])
    return s.node("If", flag, then_branch=then, else_branch=otherwise)


@graph("hard", norms=2)
def inside_if(s: Sheet) -> None:
    a, b = s.widths(2)
    x = s.input(2, a, 9, 8)

    def branch(name: str) -> Any:
        return s.body({name: 4}, lambda: s.norm(s.conv(x, a, b, bias=False), b, outputs=[name]))

    s.output(choice(s, branch("one"), branch("two")))


@graph("hard", norms=2)
def inside_if_same_names(s: Sheet) -> None:
    """Both branches have their own initializers under the same names."""
    a, b = s.widths(2)
    x = s.input(2, a, 9, 8)

    def write() -> None:
        kernel = s.constant(s.numbers(b, a, 3, 3), name="kernel")
        rest = [s.constant(each, name=f"norm{index}") for index, each in enumerate(s.statistics(b))]
        s.node("BatchNormalization", s.node("Conv", x, kernel, outputs=["inner"]), *rest, outputs=["out"])

    s.output(choice(s, s.body({"out": 4}, write), s.body({"out": 4}, write)))


@graph("hard", norms=2)
def inside_if_outer_weights(s: Sheet) -> None:
    """Both branches use one weight of the graph around them."""
    a, b = s.widths(2)
    x, kernel = s.input(2, a, 9, 8), s.weight(b, a, 3, 3)

    def branch(name: str) -> Any:
        return s.body({name: 4}, lambda: s.norm(s.node("Conv", x, kernel), b, outputs=[name]))

    s.output(choice(s, branch("one"), branch("two")))


@graph("trap")
def used_inside_if(s: Sheet) -> None:
    """The convolution's output is normalised outside and used as it is in one branch of an If."""
    a, b = s.widths(2)
    y = s.conv(s.input(2, a, 9, 8), a, b)
    z = s.norm(y, b)
    then = s.body({"one": 4}, lambda: s.node("Relu", y, outputs=["one"]))
    otherwise = s.body({"two": 4}, lambda: s.node("Relu", z, outputs=["two"]))
    s.output(choice(s, then, otherwise), s.node("Tanh", z))


@graph("trap", least=0)
def normalised_inside_if(s: Sheet) -> None:
    """The convolution outside, the norm in one branch only, the other takes the values as they are."""
    a, b = s.widths(2)
    y = s.conv(s.input(2, a, 9, 8), a, b)
    then = s.body({"one": 4}, lambda: s.norm(y, b, outputs=["one"]))
    otherwise = s.body({"two": 4}, lambda: s.node("Relu", y, outputs=["two"]))
    s.output(choice(s, then, otherwise))


@graph("plain")
def beside_if(s: Sheet) -> None:
    """Plain pairs in a graph that has an If."""
    a, b = s.widths(2)
    y = s.norm(s.conv(s.input(2, a, 9, 8), a, b), b)
    then = s.body({"one": 4}, lambda: s.node("Relu", y, outputs=["one"]))
    otherwise = s.body({"two": 4}, lambda: s.node("Tanh", y, outputs=["two"]))
    s.output(choice(s, then, otherwise))


@graph("hard")
def inside_loop(s: Sheet) -> None:
    (a,) = s.widths(1)
    x = s.input(2, a, 6, 6)

    def write() -> None:
        y = s.conv("state", a, a, bias=False, pads=[1] * 4)
        s.node("Tanh", s.norm(y, a), outputs=["next"])
        s.node("Identity", "go", outputs=["again"])

    inputs = [
        helper.make_tensor_value_info("step", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [None, a, 6, 6]),
    ]
    body = s.body({"again": 0, "next": 4}, write, inputs)
    body.output[0].CopyFrom(helper.make_tensor_value_info("again", TensorProto.BOOL, []))
    s.output(s.node("Loop", s.constant(np.array(3)), s.constant(np.array(True), dtype=TensorProto.BOOL), x, body=body))


@graph("trap")
def carried_by_loop(s: Sheet) -> None:
    """The norm stands where the carried state comes in; the first state is a convolution's output, later ones not."""
    (a,) = s.widths(1)
    x = s.conv(s.input(2, a, 6, 6), a, a, pads=[1] * 4)

    def write() -> None:
        s.node("Relu", s.norm("state", a), outputs=["next"])
        s.node("Identity", "go", outputs=["again"])

    inputs = [
        helper.make_tensor_value_info("step", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [None, a, 6, 6]),
    ]
    body = s.body({"again": 0, "next": 4}, write, inputs)
    body.output[0].CopyFrom(helper.make_tensor_value_info("again", TensorProto.BOOL, []))
    s.output(s.node("Loop", s.constant(np.array(2)), s.constant(np.array(True), dtype=TensorProto.BOOL), x, body=body))


def function(s: Sheet, calls: int, inside: bool) -> None:
    """A local function of a convolution and its norm; with weights as inputs, or as constants inside."""
    a, b = s.widths(2)
    opsets = [helper.make_opsetid("", s.opset)]
    names = ["W", "scale", "shift", "mean", "variance"]
    nodes = [
        helper.make_node("Conv", ["X", "W"], ["inner"]),
        helper.make_node("BatchNormalization", ["inner", *names[1:]], ["Y"]),
    ]

    def numbers() -> list[np.ndarray]:
        return [s.numbers(b, a, 3, 3), *s.statistics(b)]

    if inside:
        constants = [s.tensor(values, name) for values, name in zip(numbers(), names, strict=True)]
        nodes = [*(helper.make_node("Constant", [], [each.name], value=each) for each in constants), *nodes]
    inputs = ["X"] if inside else ["X", *names]
    s.functions.append(helper.make_function("local", "ConvNorm", inputs, ["Y"], nodes, opsets))
    for _ in range(calls):
        rest = [] if inside else map(s.constant, numbers())
        y = s.node("ConvNorm", s.input(2, a, 9, 8), *rest, domain="local")
        s.output(s.node("Relu", y))


graph("hard", name="function_once")(partial(function, calls=1, inside=False))
graph("hard", norms=2, name="function_twice")(partial(function, calls=2, inside=False))
graph("hard", norms=2, name="function_with_constants")(partial(function, calls=2, inside=True))


@graph("plain")
def beside_function(s: Sheet) -> None:
    """Plain pairs in a file that has functions."""
    a, b = s.widths(2)
    nodes = [helper.make_node("Mul", ["X", "X"], ["Y"])]
    s.functions.append(helper.make_function("local", "Square", ["X"], ["Y"], nodes, [helper.make_opsetid("", s.opset)]))
    s.output(s.node("Square", s.norm(s.conv(s.input(2, a, 9, 8), a, b), b), domain="local"))


@graph("hard", norms=1)
def conv_before_function(s: Sheet) -> None:
    """The function is a norm only, its convolution stands in front of the call."""
    a, b = s.widths(2)
    names = ["scale", "shift", "mean", "variance"]
    nodes = [helper.make_node("BatchNormalization", ["X", *names], ["Y"])]
    opsets = [helper.make_opsetid("", s.opset)]
    s.functions.append(helper.make_function("local", "Norm", ["X", *names], ["Y"], nodes, opsets))
    y = s.conv(s.input(2, a, 9, 8), a, b)
    s.output(s.node("Norm", y, *map(s.constant, s.statistics(b)), domain="local"))


# No map that is the same for every input, or none to be touched -------------------------------------------------


@graph("trap")
def training_mode(s: Sheet) -> None:
    x, weight, _, statistics, _ = parts(s)
    y = s.node("Conv", x, s.constant(weight))
    rest = map(s.constant, statistics)
    s.output(s.node("BatchNormalization", y, *rest, outputs=["y", "mean", "variance"], training_mode=1))


@graph("trap", opset=9, ir=4)
def training_outputs(s: Sheet) -> None:
    """Before version 14 a norm with five outputs is one in training."""
    x, weight, _, statistics, _ = parts(s)
    y = s.node("Conv", x, s.constant(weight))
    outputs = ["y", "mean", "variance", "saved_mean", "saved_variance"]
    s.output(s.node("BatchNormalization", y, *map(s.constant, statistics), outputs=outputs))


@graph("trap", opset=7, ir=4)
def not_spatial(s: Sheet) -> None:
    """Version 7 has norms with statistics for each pixel."""
    a, b = s.widths(2)
    y = s.conv(s.input(2, a, 5, 6, dynamic=False), a, b)
    values = [each.reshape(b, 3, 4) for each in s.statistics(12 * b)]
    s.output(s.node("BatchNormalization", y, *map(s.constant, values), spatial=0))


@graph("trap", norms=0)
def instance_norm(s: Sheet) -> None:
    a, b = s.widths(2)
    s.output(s.node("InstanceNormalization", s.conv(s.input(2, a, 9, 8), a, b), s.weight(b), s.weight(b)))


def quantised(s: Sheet, where: str) -> None:
    """A pair of QuantizeLinear and DequantizeLinear at the convolution's weight, or between it and the norm."""
    x, weight, bias, statistics, b = parts(s)

    def pair(y: str, step: float) -> str:
        ends = [s.constant(np.array(step)), s.constant(np.array(0), dtype=TensorProto.INT8)]
        return s.node("DequantizeLinear", s.node("QuantizeLinear", y, *ends), *ends)

    if where == "weight":
        step = [s.constant(np.full(b, 0.03)), s.constant(np.zeros(b, int), dtype=TensorProto.INT8)]
        stored = s.constant(np.clip(np.round(weight / 0.03), -127, 127).astype(int), dtype=TensorProto.INT8)
        kernel = s.node("DequantizeLinear", stored, *step, axis=0)
    else:
        kernel = s.constant(weight)
    y = s.node("Conv", x, kernel, s.constant(bias))
    y = pair(y, 0.2) if where == "output" else y
    y = s.node("BatchNormalization", y, *map(s.constant, statistics))
    s.output(pair(y, 0.2) if where == "behind" else y)


graph("trap", name="quantised_weight", opset=19, ir=9, folds=1, least=0)(partial(quantised, where="weight"))
graph("trap", name="quantised_output", opset=19, ir=9)(partial(quantised, where="output"))
graph("plain", name="quantised_behind", opset=19, ir=9)(partial(quantised, where="behind"))


@graph("trap")
def integer_conv(s: Sheet) -> None:
    a, b = s.widths(2)
    x = s.input(2, a, 9, 8)
    step, zero = s.constant(np.array(0.05)), s.constant(np.array(128), dtype=TensorProto.UINT8)
    stored = s.constant(s.random.integers(0, 255, (b, a, 3, 3)), dtype=TensorProto.UINT8)
    y = s.node("ConvInteger", s.node("QuantizeLinear", x, step, zero), stored, zero, zero)
    y = s.node("Mul", s.node("Cast", y, to=TensorProto.FLOAT), s.constant(np.array(0.0005)))
    s.output(s.norm(y, b))


@graph("trap", dtype=TensorProto.FLOAT16)
def half_overflow(s: Sheet) -> None:
    """Folded, one weight would be larger than float16 can hold."""
    a, b = s.widths(2)
    x = s.node("Mul", s.input(2, a, 9, 8), s.constant(np.array(0.0005)))
    weight, statistics = s.numbers(b, a, 3, 3), s.statistics(b)
    weight[0] = np.sign(weight[0]) * 40
    statistics[0][0], statistics[2][0], statistics[3][0] = 20.0, 0.0, 0.0001
    simple(s, x, s.constant(weight), *map(s.constant, statistics))


@graph("trap", folds=1)
def rare_statistics(s: Sheet) -> None:
    """A channel that never moved, one with an enormous variance, one whose scale is nothing."""
    a, _ = s.widths(2)
    statistics = [np.array([0.01, 1, 1e-30, -0.02]), s.numbers(4), s.numbers(4), np.array([0, 1e8, 1, 1e-12])]
    simple(s, s.input(2, a, 9, 8), s.weight(4, a, 3, 3), *map(s.constant, statistics))
