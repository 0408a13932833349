"""What a graph computes from stored tensors alone, worked out in numpy.

Floating-point arithmetic is done in float64 whatever the types say, except that a cast to a narrower type rounds as
the network does. Integers stay integers: they are shapes and axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import InputError
from normdoctor.flow.graph import Node, Op, Value
from normdoctor.layers import load

MAX_DEPTH = 100
"""Nodes between a stored tensor and what is computed from it; deeper is not taken for a constant."""

MAX_MADE = 1 << 28
"""Elements of what is made from nothing (expanded or filled): no file vouches for their number."""

KEPT = 1 << 16
"""Elements of a result that is kept for the next one who asks."""

BINARY: dict[Op, Callable[..., NDArray[Any]]] = {
    Op.ADD: np.add,
    Op.SUBTRACT: np.subtract,
    Op.MULTIPLY: np.multiply,
    Op.POWER: np.power,
}

UNARY: dict[Op, Callable[..., NDArray[Any]]] = {
    Op.NEGATE: np.negative,
    Op.SQRT: np.sqrt,
    Op.RSQRT: lambda x: 1.0 / np.sqrt(x),
    Op.RECIPROCAL: lambda x: 1.0 / x,
}

MOVING = {Op.RESHAPE, Op.EXPAND, Op.TRANSPOSE, Op.IDENTITY, Op.CAST, Op.CONCAT, Op.SLICE, Op.GATHER, Op.SPLIT}

REDUCING: dict[Op, Callable[..., NDArray[Any]]] = {
    Op.REDUCE_MEAN: np.mean,
    Op.REDUCE_SUM: np.sum,
    Op.REDUCE_MAX: np.max,
}

EVALUATED = {*BINARY, *UNARY, *MOVING, *REDUCING, Op.DIVIDE, Op.CONSTANT, Op.FILL}


class Constants:
    """Answers for one graph which values are constant, and what they are."""

    def __init__(self) -> None:
        self._known: dict[Value, bool] = {}
        self._kept: dict[Value, NDArray[Any]] = {}

    def knows(self, value: Value | None) -> bool:
        """Whether the value is the same whatever goes into the network. Reads no data."""
        return value is not None and self._is_known(value, 0)

    def _is_known(self, value: Value, depth: int) -> bool:
        if value not in self._known:
            self._known[value] = False  # while it is being worked out: what depends on itself is no constant
            self._known[value] = self._decide(value, depth)
        return self._known[value]

    def _decide(self, value: Value, depth: int) -> bool:
        node = value.producer
        if value.array is not None:
            return True
        if node is None or depth > MAX_DEPTH:
            return False
        if node.op is Op.SHAPE:
            return _whole(node.x) is not None
        if node.op not in EVALUATED or (node.op in (Op.RESHAPE, Op.EXPAND) and _whole(value) is None):
            return False
        # RESHAPE and EXPAND know the shape of their output, wherever that came from.
        inputs = node.inputs[:1] if node.op in (Op.RESHAPE, Op.EXPAND, Op.CAST, Op.IDENTITY) else node.inputs
        return all(entry is not None and self._is_known(entry, depth + 1) for entry in inputs)

    def array(self, value: Value) -> NDArray[Any]:
        """The constant's values: float64, or int64 and bool as they are. Shape as the graph has it.

        Raises InputError where the data is missing, has no numbers, or does not fit together."""
        if value in self._kept:
            return self._kept[value]
        try:
            with np.errstate(all="ignore"):
                result = self._evaluate(value)
        except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            raise InputError(
                f"{value.name}: the constant cannot be worked out ({error})", "The file is damaged; export it again."
            ) from None
        if result.size <= KEPT:
            self._kept[value] = result
        return result

    def _evaluate(self, value: Value) -> NDArray[Any]:
        if value.array is not None:
            return _plain(load(value.array))
        node = value.producer
        assert node is not None
        if node.op is Op.SHAPE:
            return np.array(_whole(node.x), dtype=np.int64)
        if node.op is Op.FILL:
            shape = [int(length) for length in self.array(node.x)]
            _check_made(math.prod(shape))
            return _plain(np.full(shape, node.attributes.get("value", 0.0)))
        x = self.array(node.x)
        if node.op in UNARY:
            return np.asarray(UNARY[node.op](x))
        if node.op in BINARY:
            return np.asarray(BINARY[node.op](x, self._second(node)))
        if node.op is Op.DIVIDE:
            return _divided(x, self._second(node))
        if node.op in REDUCING:
            axes, keep = tuple(node.attributes["axes"]), bool(node.attributes["keepdims"])
            return np.asarray(REDUCING[node.op](x, axis=axes, keepdims=keep))
        return self._moved(node, x, value)

    def _second(self, node: Node) -> NDArray[Any]:
        value = node.inputs[1]
        assert value is not None
        return self.array(value)

    def _moved(self, node: Node, x: NDArray[Any], value: Value) -> NDArray[Any]:
        attributes = node.attributes
        if node.op is Op.RESHAPE:
            return x.reshape(_whole(value) or ())
        if node.op is Op.EXPAND:
            _check_made(math.prod(_whole(value) or ()))
            return np.broadcast_to(x, _whole(value) or ())
        if node.op is Op.TRANSPOSE:
            return np.asarray(np.transpose(x, attributes["order"]))
        if node.op is Op.CAST:
            return rounded(x, value.dtype)
        if node.op is Op.CONCAT:
            return np.concatenate([self.array(entry) for entry in node.inputs if entry], axis=attributes["axis"])
        if node.op is Op.SLICE:
            cut = slice(attributes["start"], attributes["end"], attributes["step"])
            return np.asarray(x[(slice(None),) * attributes["axis"] + (cut,)])
        if node.op is Op.GATHER:
            return np.asarray(np.take(x, self._second(node).astype(np.int64), axis=attributes["axis"]))
        if node.op is Op.SPLIT:
            axis = attributes["axis"]
            lengths = [(_whole(entry) or ())[axis] for entry in node.outputs]
            place = node.outputs.index(value)
            start = sum(lengths[:place])
            return np.asarray(np.take(x, np.arange(start, start + lengths[place]), axis=axis))
        return x


def _whole(value: Value) -> tuple[int, ...] | None:
    """The shape where every length is known; () for a scalar is falsy and still a shape."""
    if value.shape is None:
        return None
    lengths = tuple(length for length in value.shape if isinstance(length, int))
    return lengths if len(lengths) == len(value.shape) else None


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind == "f":
        return values.astype(np.float64)
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    if values.dtype.kind == "b":
        return values
    raise TypeError(f"elements of type {values.dtype}")


def _check_made(count: int) -> None:
    if count > MAX_MADE:
        raise ValueError(f"{count:,} elements out of nothing")


def _divided(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    if a.dtype.kind == b.dtype.kind == "i":  # of shapes; towards zero, as ONNX says
        return np.asarray(np.trunc(a / b).astype(np.int64))
    return np.asarray(a / b)


def rounded(values: NDArray[Any], dtype: str | None) -> NDArray[Any]:
    """Values as a cast to torch's `dtype` leaves them, still in float64 (int64, bool)."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        halves = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in ("float16", "float32", "float64"):
        return np.asarray(values.astype(dtype).astype(np.float64))
    if dtype is None:
        return values
    return np.asarray(values.astype(np.bool_ if dtype == "bool" else np.int64))
