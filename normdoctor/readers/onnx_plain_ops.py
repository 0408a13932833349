"""ONNX's ops without weights as neutral nodes: activations, pooling, and all that moves values about."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np

from normdoctor.flow.graph import Op, Shape, Value
from normdoctor.readers.onnx_arrays import DTYPES, size
from normdoctor.readers.onnx_builder import Builder
from normdoctor.readers.onnx_graph import Place, Step, resolved

HOMOGENEOUS = {"Relu": "relu", "LeakyRelu": "leaky_relu", "PRelu": "prelu", "Abs": "abs"}
"""f(s * x) = s * f(x) for every s >= 0."""

CURVED = {
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Elu": "elu",
    "Selu": "selu",
    "Celu": "celu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish",
    "Mish": "mish",
    "Swish": "silu",
    "Gelu": "gelu",
    "Erf": "erf",
    "Exp": "exp",
    "Log": "log",
    "ThresholdedRelu": "thresholded_relu",
}

LARGEST = 3.4028234e38
"""Clip's default limits in old opsets: those of float32."""

REDUCTIONS = {"ReduceMean": Op.REDUCE_MEAN, "ReduceMax": Op.REDUCE_MAX, "ReduceSum": Op.REDUCE_SUM}


def _rank(value: Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _whole(shape: Shape | None) -> tuple[int, ...]:
    return tuple(length for length in shape or () if isinstance(length, int))


def _is_whole(shape: Shape | None) -> bool:
    """Whether every length is known."""
    return shape is not None and len(_whole(shape)) == len(shape)


def _positive(axis: int, rank: int | None) -> int | None:
    """The axis counted from the front; None where that takes a rank nobody knows, or there is no such axis."""
    if axis < 0:
        axis = -1 if rank is None else axis + rank
    return axis if axis >= 0 and (rank is None or axis < rank) else None


def _axes(axes: Sequence[int], rank: int | None) -> tuple[int, ...] | None:
    placed = [_positive(axis, rank) for axis in axes]
    known = tuple(axis for axis in placed if axis is not None)
    return known if len(known) == len(placed) == len(set(known)) else None


def activation(b: Builder, step: Step) -> bool:
    op = step.node.op
    if op in HOMOGENEOUS:
        slots = (0, 1) if op == "PRelu" else (0,)
        attributes = {"alpha": b.program.number(step, "alpha", 0.01)} if op == "LeakyRelu" else {}
        b.add(step, Op.ACTIVATION, slots, {"name": HOMOGENEOUS[op], "homogeneous": True, **attributes})
        return True
    name = CURVED[op]
    if op == "Gelu" and b.program.text(step, "approximate", "none") == "tanh":
        name = "gelu_tanh"
    b.add(step, Op.ACTIVATION, (0,), {"name": name, "homogeneous": False})
    return True


def clip(b: Builder, step: Step) -> bool:
    limits = []
    for index, name, free in ((1, "min", -math.inf), (2, "max", math.inf)):
        if step.scope.opset < 11:
            limit: float | None = b.program.number(step, name, free)
        else:
            limit = b.scalar(step, index) if b.at(step, index) is not None else free
        if limit is None:
            return False
        limits.append(free if abs(limit) >= LARGEST else limit)
    _clipped(b, step, 0, *limits)
    return True


def extreme(b: Builder, step: Step) -> bool:
    """Max or Min with a constant: a clip with one limit."""
    if len(step.node.inputs) != 2:
        return False
    for data, other in ((0, 1), (1, 0)):
        limit = b.scalar(step, other)
        if limit is not None and b.constant(step, data) is None and (_rank(b.at(step, other)) or 0) <= 1:
            low, high = (limit, math.inf) if step.node.op == "Max" else (-math.inf, limit)
            _clipped(b, step, data, low, high)
            return True
    return False


def _clipped(b: Builder, step: Step, data: int, low: float, high: float) -> None:
    name = {(0.0, math.inf): "relu", (0.0, 6.0): "relu6"}.get((low, high), "clip")
    attributes = {"name": name, "low": low, "high": high}
    homogeneous = low in (0.0, -math.inf) and high in (0.0, math.inf)
    b.add(step, Op.ACTIVATION, (data,), {**attributes, "homogeneous": homogeneous})


def max_pool(b: Builder, step: Step) -> bool:
    if b.is_used(step, 1):  # where the largest were
        return False
    b.add(step, Op.MAX_POOL, (0,))
    return True


def average_pool(b: Builder, step: Step) -> bool:
    program = b.program
    counts = False
    if step.node.op == "AveragePool" and program.integer(step, "count_include_pad", 0):
        auto = program.text(step, "auto_pad", "NOTSET")
        pads = any(program.integers(step, "pads", None) or ())
        counts = pads or auto.startswith("SAME") or program.integer(step, "ceil_mode", 0) != 0
    b.add(step, Op.AVERAGE_POOL, (0,), {"counts_padding": counts})
    return True


def reduction(b: Builder, step: Step) -> bool:
    op = step.node.op
    index = 1 if step.scope.opset >= (13 if op == "ReduceSum" else 18) else None
    rank = _rank(b.at(step, 0))
    axes = b.integers(step, "axes", index)
    if not axes:
        if index is not None and b.at(step, index) is not None and axes is None:
            return False
        if b.program.integer(step, "noop_with_empty_axes", 0):
            b.add(step, Op.IDENTITY, (0,))
            return True
        if rank is None:
            return False
        axes = list(range(rank))
    placed = _axes(axes, rank)
    if placed is None:
        return False
    keepdims = b.program.integer(step, "keepdims", 1) != 0
    b.add(step, REDUCTIONS[op], (0,), {"axes": tuple(sorted(placed)), "keepdims": keepdims})
    return True


def concat(b: Builder, step: Step) -> bool:
    slots = range(len(step.node.inputs))
    rank = next(filter(None, map(_rank, (b.out(step, 0), *(b.at(step, index) for index in slots)))), None)
    axis = _positive(b.program.integer(step, "axis", 1), rank)
    if axis is None or not all(step.node.inputs):
        return False
    b.add(step, Op.CONCAT, slots, {"axis": axis})
    return True


def split(b: Builder, step: Step) -> bool:
    x = b.at(step, 0)
    axis = _positive(b.program.integer(step, "axis", 0), _rank(x))
    if axis is None or x is None:
        return False
    outputs = [b.out(step, index) for index in range(len(step.node.outputs))]
    lengths = b.integers(step, "split", 1 if step.scope.opset >= 13 else None)
    if lengths and len(lengths) == len(outputs) and x.shape is not None:
        for value, length in zip(outputs, lengths, strict=True):
            value.shape = value.shape or (*x.shape[:axis], length, *x.shape[axis + 1 :])
    b.add(step, Op.SPLIT, (0,), {"axis": axis}, outputs=outputs)
    return True


def _bound(value: int, length: object, low: int, high: int) -> int | None:
    """A start or an end, counted from the front and within the length."""
    if not isinstance(length, int):
        # Not beyond the front, for all that is known; how far the axis goes is not.
        return 0 if value == 0 else None
    return min(max(value + length if value < 0 else value, low), length + high)


def slice_(b: Builder, step: Step) -> bool:
    x, y = b.at(step, 0), b.out(step, 0)
    old = step.scope.opset < 10
    starts, ends, axes, steps = (
        b.integers(step, name if old else None, None if old else index)
        for index, name in enumerate(("starts", "ends", "axes", "steps"), 1)
    )
    given = step.node.inputs
    if axes is None and not (old or len(given) < 4 or not given[3]):
        return False
    if axes is None:
        count = len(starts or ends or ())
        axes = list(range(count))
    placed = _axes(axes, _rank(x))
    if x is None or not placed or (not old and len(given) > 4 and given[4] and steps is None):
        return False
    running = x
    for place, axis in enumerate(placed):
        stride = steps[place] if steps and place < len(steps) else 1
        length = running.shape[axis] if running.shape is not None else None
        start = starts[place] if starts and place < len(starts) else None
        end = ends[place] if ends and place < len(ends) else None
        if stride > 0:
            start = None if start is None else _bound(start, length, 0, 0)
            end = None if end is None else _bound(end, length, 0, 0)
        else:
            start = None if start is None else _bound(start, length, 0, -1)
            end = None if end is None else _bound(end, length, -1, -1)
            end = None if end == -1 else end
        last = place == len(placed) - 1
        target = y if last else b.temporary(x, _cut(running, axis, start, end, stride))
        attributes = {"axis": axis, "start": start, "end": end, "step": stride}
        whole = len(placed) == 1
        b.add(step, Op.SLICE, (0,), attributes, inputs=[running], outputs=[target], whole=whole)
        running = target
    return True


def _cut(value: Value, axis: int, start: int | None, end: int | None, stride: int) -> Shape | None:
    if value.shape is None:
        return None
    known = start is not None and end is not None and stride > 0
    length = len(range(start or 0, end or 0, stride)) if known else None
    return (*value.shape[:axis], length, *value.shape[axis + 1 :])


def pad(b: Builder, step: Step) -> bool:
    old = step.scope.opset < 11
    x = b.at(step, 0)
    mode = b.program.text(step, "mode", "constant")
    name = "paddings" if step.scope.opset < 2 else "pads"
    pads = b.integers(step, name if old else None, None if old else 1)
    given = b.integers(step, None, 3)
    if pads is None or (b.at(step, 3) is not None and given is None) or len(pads) % 2:
        return False
    count = len(pads) // 2
    rank = _rank(x) if given is not None else count
    axes = _axes(given if given is not None else range(count), rank)
    if axes is None or len(axes) != count or min((0, *pads)) < 0:
        return False
    padded = tuple(sorted(axis for place, axis in enumerate(axes) if pads[place] or pads[count + place]))
    filler: float | None = 0.0
    if mode == "constant":
        if old:
            filler = b.program.number(step, "value", 0.0)
        elif b.at(step, 2) is not None:
            filler = b.scalar(step, 2)
    if filler is None or mode not in ("constant", "reflect", "edge", "wrap"):
        return False
    if not padded:
        b.add(step, Op.IDENTITY, (0,))
    else:
        b.add(step, Op.PAD, (0,), {"mode": mode, "value": filler, "axes": padded})
    return True


def transpose(b: Builder, step: Step) -> bool:
    rank = _rank(b.at(step, 0))
    order = b.program.integers(step, "perm", None)
    if order is None:
        if rank is None:
            return False
        order = list(range(rank))[::-1]
    if sorted(order) != list(range(len(order))):
        return False
    b.add(step, Op.TRANSPOSE, (0,), {"order": tuple(order)})
    return True


def reshape(b: Builder, step: Step) -> bool:
    """Reshape, Flatten, Squeeze, Unsqueeze: the shape of the output says all."""
    x, y = b.at(step, 0), b.out(step, 0)
    plain = step.node.op == "Reshape" and not b.program.integer(step, "allowzero", 0)
    if plain and not _is_whole(y.shape) and x is not None and _is_whole(x.shape):
        wanted = b.integers(step, "shape", 1)
        y.shape = y.shape if wanted is None else resolved(wanted, _whole(x.shape)) or y.shape
    b.add(step, Op.RESHAPE, (0,))
    return True


def expand(b: Builder, step: Step) -> bool:
    x, y = b.at(step, 0), b.out(step, 0)
    if not _is_whole(y.shape) and x is not None and _is_whole(x.shape):
        wanted = b.integers(step, None, 1)
        if wanted is not None:
            with contextlib.suppress(ValueError):
                y.shape = np.broadcast_shapes(_whole(x.shape), tuple(wanted))
    b.add(step, Op.EXPAND, (0,))
    return True


def tile(b: Builder, step: Step) -> bool:
    repeats = b.integers(step, None, 1) if step.scope.opset >= 6 else None
    if repeats is None:
        return False
    b.add(step, Op.TILE, (0,), {"axes": tuple(axis for axis, times in enumerate(repeats) if times != 1)})
    return True


def resize(b: Builder, step: Step) -> bool:
    program, opset = b.program, step.scope.opset
    x, y = b.at(step, 0), b.out(step, 0)
    rank = _rank(x) or _rank(y)
    if rank is None or program.text(step, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return False
    if program.text(step, "mode", "nearest") not in ("nearest", "linear", "cubic", "bilinear"):
        return False
    scales = program.floats(step, "scales")
    index = 2 if step.node.op == "Resize" and opset >= 11 else 1
    if scales is None and (ref := b.constant(step, index)) is not None and 0 < size(ref) <= rank:
        scales = [float(number) for number in ref.numpy().reshape(-1)]
    axes = _axes(b.integers(step, "axes", None) or range(rank), rank)
    if axes is None:
        return False
    if step.node.op == "Upsample" and opset < 7:
        axes = (2, 3)
    before = x.shape if x is not None and x.shape is not None else (None,) * rank
    after = y.shape if y.shape is not None and len(y.shape) == rank else (None,) * rank
    changed = []
    for place, axis in enumerate(axes):
        same = before[axis] is not None and before[axis] == after[axis]
        if scales is not None and len(scales) == len(axes):
            same = scales[place] == 1
        if not same:
            changed.append(axis)
    b.add(step, Op.RESIZE, (0,), {"axes": tuple(sorted(changed))})
    return True


def depth_to_space(b: Builder, step: Step) -> bool:
    block = b.program.integer(step, "blocksize", 0)
    order = b.program.text(step, "mode", "DCR")
    if block < 1 or order not in ("DCR", "CRD"):
        return False
    b.add(step, Op.DEPTH_TO_SPACE, (0,), {"block": block, "order": order})
    return True


def identity(b: Builder, step: Step) -> bool:
    b.add(step, Op.IDENTITY, (0,))
    return True


def cast(b: Builder, step: Step) -> bool:
    y = b.out(step, 0)
    if y.dtype is None and step.node.op == "CastLike":
        like = b.at(step, 1)
        y.dtype = None if like is None else like.dtype
    elif y.dtype is None:
        y.dtype = DTYPES.get(b.program.integer(step, "to", 0))
    if y.dtype is None:
        return False
    b.add(step, Op.CAST, (0,))
    return True


def shape(b: Builder, step: Step) -> bool:
    x, y = b.at(step, 0), b.out(step, 0)
    rank = _rank(x)
    start, end = b.program.integer(step, "start", 0), b.program.integer(step, "end", 1 << 62)
    if (start, end) == (0, 1 << 62):
        b.add(step, Op.SHAPE, (0,))
        return True
    lengths = b.temporary(y, None if rank is None else (rank,))
    b.add(step, Op.SHAPE, (0,), outputs=[lengths], whole=False)
    bounds = {"start": _bound(start, rank, 0, 0), "end": _bound(end, rank, 0, 0)}
    b.add(step, Op.SLICE, (), {"axis": 0, "step": 1, **bounds}, inputs=[lengths], whole=False)
    return True


def count(b: Builder, step: Step) -> bool:
    """Size: the number of elements is no use of their values."""
    b.add(step, Op.OTHER, ())
    return True


def constant(b: Builder, step: Step) -> bool:
    y = b.out(step, 0)
    if y.name and y.array is None:
        y.array = b.program.constant(Place(step.scope, y.name))
    if y.array is None:
        return False
    y.shape, y.dtype = y.array.shape, y.array.dtype
    b.add(step, Op.CONSTANT, ())
    return True


def fill(b: Builder, step: Step) -> bool:
    given = b.program.attribute(step, "value")
    value: float = 0.0
    y = b.out(step, 0)
    if given is not None and given.tensor is not None:
        ref = b.program.tensors.array(given.tensor)
        if ref is None or size(ref) != 1 or ref.dtype.startswith("complex"):
            return False
        value, y.dtype = ref.numpy().reshape(-1)[0].item(), ref.dtype
    else:
        y.dtype = "float32"
    if not _is_whole(y.shape):
        wanted = b.integers(step, None, 0)
        y.shape = y.shape if wanted is None or min((0, *wanted)) < 0 else tuple(wanted)
    b.add(step, Op.FILL, (0,), {"value": value})
    return True


def gather(b: Builder, step: Step) -> bool:
    axis = _positive(b.program.integer(step, "axis", 0), _rank(b.at(step, 0)))
    if axis is None:
        return False
    b.add(step, Op.GATHER, (0, 1), {"axis": axis})
    return True


def quantize(b: Builder, step: Step) -> bool:
    slots = range(len(step.node.inputs))
    outputs = [b.out(step, index) for index in range(len(step.node.outputs))]
    b.add(step, Op.DEQUANTIZE if step.node.op == "DequantizeLinear" else Op.QUANTIZE, slots, outputs=outputs)
    return True
