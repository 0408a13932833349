"""Torch operators that take several steps: variances, lengths of vectors, weights that are normalised → neutral nodes.

Code that computes a weight from parameters is made of them; what they give is then still a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from normdoctor.flow.graph import Node, Op, Shape, Value
from normdoctor.readers.arrays import FLOAT_TYPES
from normdoctor.readers.aten_calls import PART, Call, Translator, axes, literal, node, part, rank

Nodes = list[Node] | None


def _float(call: Call, name: str) -> Value | None:
    """A tensor argument of the type of the result."""
    x = call.value(name)
    return x if x is not None and x.shape is not None and x.dtype in FLOAT_TYPES else None


def _shortened(shape: Shape, over: Sequence[int]) -> Shape:
    return tuple(1 if place in over else length for place, length in enumerate(shape))


def _number(call: Call, name: str, value: float) -> Value:
    return literal(call, name, value, call.outputs[0].dtype)


def _last(result: Node) -> Node:
    """The node that gives the result: nothing but a part either."""
    result.fixed = result.fixed or PART
    return result


def _squares(call: Call, x: Value, over: tuple[int, ...]) -> list[Node]:
    """The sum of squares along axes, which stay with length 1."""
    square = part(call, Op.MULTIPLY, [x, x], x.shape)
    return [square, part(call, Op.REDUCE_SUM, [square.y], _shortened(x.shape or (), over), axes=over, keepdims=True)]


def _ended(call: Call, value: Value) -> Node:
    """A value as the result of the call, whose axes of length 1 may be gone."""
    same = value.shape == call.outputs[0].shape
    return _last(node(call, Op.IDENTITY if same else Op.RESHAPE, [value], (None,)))


def _vector_norm(call: Call) -> Nodes:
    """The Euclidean length."""
    x = _float(call, "self")
    over = axes(call.lengths("dim"), rank(x))
    order = call.number("ord" if "ord" in call.arguments else "p", 2)
    if x is None or over is None or order != 2 or call.outputs[0].dtype != x.dtype:
        return None
    steps = _squares(call, x, over)
    steps.append(part(call, Op.SQRT, [steps[-1].y], steps[-1].y.shape))
    return [*steps, _ended(call, steps[-1].y)]


def _variance(call: Call) -> Nodes:
    """The mean square distance from the mean, or its root."""
    x = _float(call, "self")
    over = axes(call.lengths("dim"), rank(x))
    correction = call.number("correction", 1.0 if call.flag("unbiased", True) else 0.0)
    correction = 1.0 if correction is None and call.arguments.get("correction") is None else correction
    if x is None or x.shape is None or over is None or correction is None:
        return None
    lengths = [length for place in over if isinstance(length := x.shape[place], int)]
    count = math.prod(lengths)
    if len(lengths) != len(over) or count <= correction:
        return None
    mean = part(call, Op.REDUCE_MEAN, [x], _shortened(x.shape, over), axes=over, keepdims=True)
    centred = part(call, Op.SUBTRACT, [x, mean.y], x.shape)
    steps = [mean, centred, *_squares(call, centred.y, over)]
    divided = part(call, Op.DIVIDE, [steps[-1].y, _number(call, "count", count - correction)], steps[-1].y.shape)
    steps.append(divided)
    if call.name == "std":
        steps.append(part(call, Op.SQRT, [steps[-1].y], steps[-1].y.shape))
    return [*steps, _ended(call, steps[-1].y)]


def _weight_norm(call: Call) -> Nodes:
    """v * g / |v|, the length taken over all axes but one. Salimans and Kingma 2016 (arXiv:1602.07868)."""
    v, g = _float(call, "v"), _float(call, "g")
    dim = call.integer("dim", 0)
    if v is None or g is None or v.shape is None or dim is None or not -1 <= dim < len(v.shape):
        return None
    over = tuple(place for place in range(len(v.shape)) if place != dim)
    steps = _squares(call, v, over)
    steps.append(part(call, Op.SQRT, [steps[-1].y], steps[-1].y.shape))
    steps.append(part(call, Op.DIVIDE, [g, steps[-1].y], steps[-1].y.shape))
    return [*steps, _last(node(call, Op.MULTIPLY, [v, steps[-1].y], ("v", None)))]


TABLE: dict[str, Translator] = {
    "linalg_vector_norm": _vector_norm,
    "norm": _vector_norm,
    "var": _variance,
    "std": _variance,
    "_weight_norm": _weight_norm,
    "_weight_norm_interface": _weight_norm,
}
