"""ONNX's ops without weights that compute: activations, pooling, means, casts, constants; as neutral nodes."""

from __future__ import annotations

import math

from normdoctor.flow.graph import Op
from normdoctor.readers.onnx_arrays import DTYPES, size
from normdoctor.readers.onnx_builder import Builder, positive_axes, rank_of, whole
from normdoctor.readers.onnx_graph import Place, Step

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

ALPHA = {"Elu": 1.0, "Celu": 1.0, "ThresholdedRelu": 1.0, "HardSigmoid": 0.2, "Swish": 1.0}
"""What alpha is where the node does not say it."""

USUAL = {
    "HardSigmoid": {"beta": 0.5},
    "Selu": {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875},
}
"""Parameters that the neutral activation has no place for."""

LARGEST = 3.4028234e38
"""Clip's default limits in old opsets: those of float32."""

REDUCTIONS = {"ReduceMean": Op.REDUCE_MEAN, "ReduceMax": Op.REDUCE_MAX, "ReduceSum": Op.REDUCE_SUM}


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
    if any(abs(b.program.number(step, key, usual) - usual) > 1e-6 for key, usual in USUAL.get(op, {}).items()):
        return False  # an activation of its own
    attributes = {"alpha": b.program.number(step, "alpha", ALPHA[op])} if op in ALPHA else {}
    b.add(step, Op.ACTIVATION, (0,), {"name": name, "homogeneous": False, **attributes})
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
        if limit is not None and b.constant(step, data) is None and (rank_of(b.at(step, other)) or 0) <= 1:
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
    rank = rank_of(b.at(step, 0))
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
    placed = positive_axes(axes, rank)
    if placed is None:
        return False
    keepdims = b.program.integer(step, "keepdims", 1) != 0
    b.add(step, REDUCTIONS[op], (0,), {"axes": tuple(sorted(placed)), "keepdims": keepdims})
    return True


def euclidean(b: Builder, step: Step) -> bool:
    """ReduceL2 and ReduceSumSquare: weights are divided by their own length in weight normalisation."""
    x, y = b.at(step, 0), b.out(step, 0)
    rank = rank_of(x)
    axes = b.integers(step, "axes", 1 if step.scope.opset >= 18 else None)
    placed = positive_axes(axes, rank) if axes else None
    if x is None or placed is None:
        return False
    keepdims = b.program.integer(step, "keepdims", 1) != 0
    square = b.temporary(x, x.shape)
    b.add(step, Op.MULTIPLY, (0, 0), inputs=[x, x], outputs=[square], whole=False)
    root = step.node.op == "ReduceL2"
    total = b.temporary(y, y.shape) if root else y
    attributes = {"axes": tuple(sorted(placed)), "keepdims": keepdims}
    b.add(step, Op.REDUCE_SUM, (), attributes, inputs=[square], outputs=[total], whole=False)
    if root:
        b.add(step, Op.SQRT, (), inputs=[total], whole=False)
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
    if whole(y.shape) is None:
        wanted = b.integers(step, None, 0)
        y.shape = y.shape if wanted is None or min((0, *wanted)) < 0 else tuple(wanted)
    b.add(step, Op.FILL, (0,), {"value": value})
    return True


def quantize(b: Builder, step: Step) -> bool:
    slots = range(len(step.node.inputs))
    outputs = [b.out(step, index) for index in range(len(step.node.outputs))]
    b.add(step, Op.DEQUANTIZE if step.node.op == "DequantizeLinear" else Op.QUANTIZE, slots, outputs=outputs)
    return True
