"""Laws of folding over random ONNX graphs in float64: what is folded computes the same, and is folded once.

The chains are written with the sheet of benchmarks/fold_sheets.py and run by onnx's reference evaluator with torch's
convolutions, in float64, so that any difference is one of algebra.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import onnx
from fold_doubles import evaluate
from fold_judge import count_nodes
from fold_sheets import Sheet
from onnx import TensorProto

import normdoctor as nd

Shape = tuple[int, ...]
"""Channels, height, width; every batch is 2."""
Step = Callable[[Sheet, str, Shape], tuple[str, Shape]]


def ints(s: Sheet, *values: int) -> str:
    return s.constant(np.array(values, np.int64))


def plain(op: str, **attributes: Any) -> Step:
    return lambda s, x, shape: (s.node(op, x, **attributes), shape)


def constant(op: str, left: bool = False, scalar: bool = False) -> Step:
    """One more constant for each channel, never near zero."""

    def step(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
        form = () if scalar else (shape[0], 1, 1)
        values = s.constant((0.5 + s.random.random(form)) * s.random.choice([-1.0, 1.0], form))
        return (s.node(op, values, x) if left else s.node(op, x, values)), shape

    return step


def turned(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    return s.node("Transpose", s.node("Transpose", x, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2]), shape


def pooled(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    return s.node("AveragePool", x, kernel_shape=[2, 2]), (c, h - 1, w - 1)


def reflected(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    return s.node("Pad", x, ints(s, 0, 0, 1, 0, 0, 0, 0, 1), mode="reflect"), (c, h + 1, w + 1)


def cropped(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    return s.node("Slice", x, ints(s, 1), ints(s, h), ints(s, 2)), (c, h - 1, w)


def half(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    return s.node("Slice", x, ints(s, 0), ints(s, c // 2 + 1), ints(s, 1)), (c // 2 + 1, h, w)


def shuffled(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    if c % 2:
        return x, shape
    y = s.node("Reshape", x, ints(s, 2, 2, c // 2, h, w))
    return s.node("Reshape", s.node("Transpose", y, perm=[0, 2, 1, 3, 4]), ints(s, 2, c, h, w)), shape


def to_space(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    if c % 4 or h > 6:
        return x, shape
    mode = ("DCR", "CRD")[s.random.integers(2)]
    return s.node("DepthToSpace", x, blocksize=2, mode=mode), (c // 4, 2 * h, 2 * w)


def beside(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    """Concatenated with another convolution of another input."""
    c, h, w = shape
    other = s.conv(s.input(2, 3, h, w, dynamic=False), 3, 2, 1)
    pair = [x, other] if s.random.random() < 0.5 else [other, x]
    return s.node("Concat", *pair, axis=1), (c + 2, h, w)


def plus(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    other = s.conv(s.input(2, 3, h, w, dynamic=False), 3, c, 1)
    return s.node(("Add", "Sub")[s.random.integers(2)], *([x, other] if s.random.random() < 0.5 else [other, x])), shape


def enlarged(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    if h > 6:
        return x, shape
    scales = s.constant(np.array([1.0, 1, 2, 2]), dtype=TensorProto.FLOAT)
    return s.node("Resize", x, "", scales, mode=("nearest", "linear")[s.random.integers(2)]), (c, 2 * h, 2 * w)


def normed(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    return s.norm(x, shape[0]), shape


PASSING: dict[str, Step] = {
    "identity": plain("Identity"),
    "negation": plain("Neg"),
    "cast": plain("Cast", to=TensorProto.DOUBLE),
    "mul": constant("Mul"),
    "mul_left": constant("Mul", left=True),
    "mul_scalar": constant("Mul", scalar=True),
    "div": constant("Div"),
    "add": constant("Add"),
    "sub_left": constant("Sub", left=True),
    "sub_scalar": constant("Sub", scalar=True),
    "turned": turned,
    "pooled": pooled,
    "reflected": reflected,
    "cropped": cropped,
    "half": half,
    "shuffled": shuffled,
    "to_space": to_space,
    "beside": beside,
    "plus": plus,
    "enlarged": enlarged,
    "normed": normed,
}


def conv(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    outputs = int(s.random.integers(2, 6))
    if min(h, w) < 3 or s.random.random() < 0.3:
        return s.conv(x, c, outputs, 1), (outputs, h, w)
    if s.random.random() < 0.5:
        return s.conv(x, c, outputs, 3, pads=[1] * 4), (outputs, h, w)
    return s.conv(x, c, outputs, 3), (outputs, h - 2, w - 2)


def deconv(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    return s.node("ConvTranspose", x, s.weight(c, 3, 1, 1), s.weight(3)), (3, h, w)


def zero_padded(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    return s.node("Pad", x, ints(s, 0, 0, 0, 0, 0, 0, 1, 0)), (c, h + 1, w)


def kept(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    """Somebody else sees the value as it is here."""
    s.output(x)
    return x, shape


def skip(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    return s.node("Add", x, s.node("Tanh", x)), shape


def max_pooled(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    return s.node("MaxPool", x, kernel_shape=[2, 2]), (c, h - 1, w - 1)


def swapped(s: Sheet, x: str, shape: Shape) -> tuple[str, Shape]:
    c, h, w = shape
    return s.node("Transpose", x, perm=[0, 2, 1, 3]), (h, c, w)


ANY = PASSING | {
    "conv": conv,
    "conv_again": conv,
    "deconv": deconv,
    "norm": normed,
    "norm_again": normed,
    "zero_padded": zero_padded,
    "kept": kept,
    "skip": skip,
    "max_pooled": max_pooled,
    "swapped": swapped,
    "relu": plain("Relu"),
    "sigmoid": plain("Sigmoid"),
    "leaky": plain("LeakyRelu", alpha=0.1),
}


def write(steps: list[str], seed: int, first: bool) -> Sheet:
    """An input, a convolution where `first`, and the steps while there are pixels left."""
    s = Sheet(seed, opset=17, dtype=TensorProto.DOUBLE)
    shape: Shape = (4, 6, 6)
    x = s.input(2, *shape, dynamic=False)
    if first:
        x, shape = conv(s, x, shape)
    for step in steps:
        if min(shape[1:]) > 2:
            x, shape = ANY[step](s, x, shape)
    if first:
        x, shape = normed(s, x, shape)
    s.output(s.node("Identity", x))
    return s


def folded(s: Sheet) -> tuple[Any, Any]:
    """The model and what is folded of it; folded again, not a byte changes."""
    model = s.model()
    with tempfile.TemporaryDirectory() as temporary:
        path, once, twice = (Path(temporary) / name for name in ("model.onnx", "once.onnx", "twice.onnx"))
        onnx.save(model, path)
        nd.fold(path, output=once, verify=False)
        nd.fold(once, output=twice, verify=False)
        assert twice.read_bytes() == once.read_bytes()
        return model, onnx.load(once)


def same(one: Any, two: Any, s: Sheet) -> None:
    for expected, got in zip(evaluate(one, s.data), evaluate(two, s.data), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * max(1.0, np.abs(expected).max()))


SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 2**32 - 1)


@SETTINGS
@given(st.lists(st.sampled_from(sorted(PASSING)), max_size=5), SEEDS)
def test_what_lets_an_affine_map_pass_lets_every_norm_go(steps: list[str], seed: int) -> None:
    s = write(steps, seed, first=True)
    before, after = folded(s)
    assert count_nodes(before)[0] > 0
    assert count_nodes(after)[0] == 0
    same(before, after, s)


@SETTINGS
@given(st.lists(st.sampled_from(sorted(ANY)), min_size=3, max_size=9), SEEDS)
@example(["add", "norm", "div", "norm"], 0)  # merged in two steps once
def test_whatever_stands_around_the_norms_the_outputs_stay(steps: list[str], seed: int) -> None:
    s = write(steps, seed, first=False)
    before, after = folded(s)
    assert [each.name for each in after.graph.output] == [each.name for each in before.graph.output]
    same(before, after, s)
