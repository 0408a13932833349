"""Torch operators that compute: products, norms, activations, pooling, arithmetic → nodes of the neutral graph."""

from __future__ import annotations

import math
from collections.abc import Iterable

from normdoctor.flow.graph import Node, Op, Shape, Value
from normdoctor.readers.arrays import FLOAT_TYPES
from normdoctor.readers.aten_calls import (
    PART,
    Call,
    Translator,
    axes,
    is_stored,
    known,
    literal,
    node,
    part,
    promoted,
    rank,
)
from normdoctor.readers.geometry import Geometry, Pads, halves, per_axis, reach

Nodes = list[Node] | None


def _alike(*values: Value | None) -> bool:
    """Whether those that are given have one type of floating point, as products need it."""
    types = {value.dtype for value in values if value is not None}
    return len(types) == 1 and types <= FLOAT_TYPES


# products


def _convolution(call: Call) -> Nodes:
    """Convolutions over one, two or three axes, of a batch."""
    x, weight, bias = call.value("input"), call.value("weight"), call.value("bias")
    count = rank(weight)
    if x is None or weight is None or weight.shape is None or count is None or not 3 <= count <= 5:
        return None
    if rank(x) != count or not _alike(x, weight, bias):  # torch also takes a single image without a batch
        return None
    transposed = "transpose" in call.name or call.flag("transposed", False)
    groups = call.integer("groups", 1)
    if transposed is None or groups is None or groups < 1:
        return None
    if (known(weight, 0) or groups) % groups or not _is_bias(bias, None):
        return None
    slots = ("input", "weight", "bias")
    kernel = weight.shape[2:]
    if transposed:
        padded = any(length != 1 for length in kernel) or _any(call, "output_padding") or _any(call, "padding")
        padded = padded or any(step != 1 for step in call.lengths("stride", [1]) or [None])
        where = _geometry(call, kernel, transposed=True).attributes
        return [node(call, Op.CONV_TRANSPOSE, [x, weight, bias], slots, groups=groups, padded=padded, **where)]
    if isinstance(call.arguments.get("padding"), str):
        padded = call.arguments["padding"] != "valid" and any(length != 1 for length in kernel)
    else:
        padded = _any(call, "padding")
    where = _geometry(call, kernel, transposed=False).attributes
    return [node(call, Op.CONV, [x, weight, bias], slots, groups=groups, padded=padded, **where)]


def _geometry(call: Call, kernel: Shape, *, transposed: bool) -> Geometry:
    count = len(kernel)

    def numbers(name: str, default: int, least: int) -> tuple[int, ...] | None:
        found = call.lengths(name, [default])
        return per_axis(found * count if found is not None and len(found) == 1 else found, count, least)

    strides, dilations = numbers("stride", 1, 1), numbers("dilation", 1, 1)
    pads: Pads | None = None
    padding = call.arguments.get("padding")
    if padding == "valid":
        pads = ((0, 0),) * count
    elif padding == "same":
        lengths = per_axis([length if isinstance(length, int) else None for length in kernel], count, 1)
        if lengths is not None and dilations is not None:
            totals = (reach(*axis) - 1 for axis in zip(lengths, dilations, strict=True))
            pads = tuple(halves(total, more_after=True) for total in totals)
    else:
        befores = numbers("padding", 0, 0)
        added = numbers("output_padding", 0, 0) if transposed else (0,) * count
        if befores is not None and added is not None:
            pads = tuple((before, before - more) for before, more in zip(befores, added, strict=True))
    return Geometry(strides, dilations, pads)


def _is_bias(bias: Value | None, length: int | None) -> bool:
    """Whether it has one number per channel, where it is given."""
    if bias is None or bias.shape is None:
        return True
    return len(bias.shape) == 1 and (length is None or bias.shape[0] == length)


def _any(call: Call, name: str) -> bool:
    """Whether any of the numbers is not zero."""
    found = call.lengths(name, [0])
    return found is None or any(number != 0 for number in found)


def _linear(call: Call) -> Nodes:
    x, weight, bias = call.value("input"), call.value("weight"), call.value("bias")
    if x is None or weight is None or rank(weight) != 2 or not rank(x) or not _alike(x, weight, bias):
        return None
    if not _is_bias(bias, known(weight, 0)):
        return None
    slots = ("input", "weight", "bias")
    return [node(call, Op.MATMUL, [x, weight, bias], slots, transpose_b=True, takes_bias=True)]


MATRICES = {"matmul": ("self", "other"), "mm": ("self", "mat2"), "bmm": ("self", "mat2")}


def _matmul(call: Call) -> Nodes:
    slots = MATRICES[call.name]
    a, b = (call.value(name) for name in slots)
    if a is None or b is None or (rank(a) or 0) < 2 or (rank(b) or 0) < 2 or not _alike(a, b, call.outputs[0]):
        return None
    return [node(call, Op.MATMUL, [a, b, None], (*slots, None), takes_bias=False)]


def _addmm(call: Call) -> Nodes:
    slots = ("batch1", "batch2") if call.name == "baddbmm" else ("mat1", "mat2")
    a, b, bias = (call.value(name) for name in (*slots, "self"))
    alpha, beta = call.number("alpha", 1), call.number("beta", 1)
    if a is None or b is None or bias is None or alpha is None or beta is None:
        return None
    if not _alike(a, b, bias, call.outputs[0]):
        return None
    scales = {"alpha": alpha, "beta": beta}
    return [node(call, Op.MATMUL, [a, b, bias], (*slots, "self"), takes_bias=True, **scales)]


# norms

ALWAYS = ("_batch_norm_with_update", "_batch_norm_with_update_functional")
NEVER = ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
ROLES = ("input", "weight", "bias", "running_mean", "running_var")


def _batch_norm(call: Call) -> Nodes:
    values = [call.value(name) for name in ROLES]
    eps = call.number("epsilon" if "epsilon" in call.arguments else "eps", 1e-5)
    training = call.name in ALWAYS or (call.name not in NEVER and call.flag("training", True))
    if call.name == "instance_norm":  # with running statistics it is a BatchNorm
        training = call.flag("use_input_stats", True)
        if training is not False or None in values[3:]:
            return _other_norm(call)
    if values[0] is None or eps is None or training is None or (rank(values[0]) or 0) < 2:
        return None
    channels = known(values[0], 1)
    if not all(_is_bias(value, channels) for value in values[1:]):
        return None
    training = training or None in values[3:]
    return [node(call, Op.BATCH_NORM, values, ROLES, eps=eps, training=training)]


def _layer_norm(call: Call) -> Nodes:
    x, weight, bias = (call.value(name) for name in ROLES[:3])
    count = len(call.lengths("normalized_shape") or ())
    if x is None or not count or any(rank(value) not in (None, count) for value in (weight, bias) if value):
        return None
    rms = "rms" in call.name
    return [node(call, Op.LAYER_NORM, [x, weight, bias], ROLES[:3], rms=rms)]


def _other_norm(call: Call) -> Nodes:
    x = call.value("input")
    values = [x, call.value("weight"), call.value("bias")]
    return None if x is None else [node(call, Op.OTHER_NORM, values, ROLES[:3])]


# activations

PLAIN = frozenset(
    {
        "relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid", "tanh", "mish", "selu", "log_sigmoid",
        "softsign", "tanhshrink", "abs", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "erf", "erfc",
        "sin", "cos",
    }
)  # fmt: skip
PARAMETERS = {
    "elu": "alpha", "celu": "alpha", "softplus": "beta", "hardshrink": "lambd", "softshrink": "lambd",
}  # fmt: skip


def _activation(call: Call) -> Nodes:
    x = call.value("self")
    if x is None or x.dtype not in FLOAT_TYPES or x.dtype != call.outputs[0].dtype:
        return None
    homogeneous = call.name in ("relu", "abs")
    if call.name in PARAMETERS:
        alpha = call.number(PARAMETERS[call.name])
        if any(call.number(scale, 1) != 1 for scale in ("scale", "input_scale")):  # a decomposed selu, or its like
            return None
        return [node(call, Op.ACTIVATION, [x], name=call.name, alpha=alpha, homogeneous=False)]
    name = call.name
    if name == "gelu" and call.arguments.get("approximate", "none") != "none":
        name = "gelu_tanh"
    return [node(call, Op.ACTIVATION, [x], name=name, homogeneous=homogeneous)]


def _leaky_relu(call: Call) -> Nodes:
    x, slope = call.value("self"), call.number("negative_slope", 0.01)
    if x is None or slope is None:
        return None
    return [node(call, Op.ACTIVATION, [x], name="leaky_relu", alpha=slope, homogeneous=True)]


def _prelu(call: Call) -> Nodes:
    x, weight = call.value("self"), call.value("weight")
    if x is None or weight is None:
        return None
    slots = ("self", "weight")
    return [node(call, Op.ACTIVATION, [x, weight], slots, name="prelu", homogeneous=True)]


BOUNDS = {"hardtanh": ("min_val", "max_val"), "clamp": ("min", "max"), "clip": ("min", "max")}
ONE_BOUND = {"clamp_min": ("min", None), "clamp_max": (None, "max")}


def _clip(call: Call) -> Nodes:
    x = call.value("self")
    names: tuple[str | None, str | None] = BOUNDS.get(call.name) or ONE_BOUND[call.name]
    defaults = (-1.0, 1.0) if call.name == "hardtanh" else (None, None)
    low, high = (
        None if name is None else call.arguments.get(name, own) for name, own in zip(names, defaults, strict=True)
    )
    if x is None or x.dtype not in FLOAT_TYPES or x.dtype != call.outputs[0].dtype:
        return None
    if not all(bound is None or type(bound) in (int, float) for bound in (low, high)):
        return None
    low, high = (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
    homogeneous = low in (0, -math.inf) and high in (0, math.inf)
    if (low, high) == (0, math.inf):
        return [node(call, Op.ACTIVATION, [x], name="relu", homogeneous=True)]
    if (low, high) == (0, 6):
        return [node(call, Op.ACTIVATION, [x], name="relu6", homogeneous=False)]
    return [node(call, Op.ACTIVATION, [x], name="clip", low=low, high=high, homogeneous=homogeneous)]


# pooling


def _spatial(call: Call) -> int | None:
    """The number of axes that a pooling goes over, where its input is a batch."""
    count = next((int(char) for char in call.name if char.isdecimal()), None)
    x = call.value("self") or call.value("input")
    return count if count is not None and rank(x) == count + 2 else None


def _max_pool(call: Call) -> Nodes:
    return None if _spatial(call) is None else [node(call, Op.MAX_POOL, [call.value("self")])]


def _average_pool(call: Call) -> Nodes:
    if _spatial(call) is None:
        return None
    counted = call.flag("count_include_pad", True) is not False and _any(call, "padding")
    counted = counted or call.arguments.get("divisor_override") is not None
    return [node(call, Op.AVERAGE_POOL, [call.value("self")], counts_padding=counted)]


def _adaptive_average(call: Call) -> Nodes:
    return None if _spatial(call) is None else [node(call, Op.AVERAGE_POOL, [call.value("self")], counts_padding=False)]


def _resize(call: Call) -> Nodes:
    count = _spatial(call)
    if count is None:
        return None
    slot = "self" if "self" in call.arguments else "input"
    return [node(call, Op.RESIZE, [call.value(slot)], (slot,), axes=tuple(range(2, count + 2)))]


# reductions

REDUCTIONS = {"mean": Op.REDUCE_MEAN, "sum": Op.REDUCE_SUM, "amax": Op.REDUCE_MAX, "max": Op.REDUCE_MAX}


def _reduce(call: Call) -> Nodes:
    x = call.value("self")
    if x is None or (call.name == "max" and "other" in call.arguments):
        return None
    over = axes(call.lengths("dim"), rank(x))
    keep = call.flag("keepdim", False)
    found = promoted(call, [x], call.outputs[0].dtype)
    if over is None or keep is None or found is None:
        return None
    (x,), casts = found
    return [*casts, node(call, REDUCTIONS[call.name], [x], (None,) if casts else (), axes=over, keepdims=keep)]


# arithmetic

ARITHMETIC = {
    "add": Op.ADD, "sub": Op.SUBTRACT, "subtract": Op.SUBTRACT, "mul": Op.MULTIPLY, "multiply": Op.MULTIPLY,
    "div": Op.DIVIDE, "divide": Op.DIVIDE, "true_divide": Op.DIVIDE, "rsub": Op.SUBTRACT, "pow": Op.POWER,
}  # fmt: skip


def _arithmetic(call: Call) -> Nodes:
    """self ∘ alpha * other; of rsub other - alpha * self. Numbers become values, narrower types are cast first."""
    names = ("self", "exponent" if call.name == "pow" else "other")
    dtype, alpha = call.outputs[0].dtype, call.number("alpha", 1)
    if call.arguments.get("rounding_mode") is not None or alpha is None or dtype not in FLOAT_TYPES:
        return None
    values: list[Value] = []
    for name in names:
        number, value = call.number(name), call.value(name)
        if number is not None:
            value = literal(call, name, number, dtype)
        if value is None:
            return None
        values.append(value)
    found = promoted(call, values, dtype)
    if found is None:
        return None
    operands, before = found
    turned = call.name == "rsub"
    scaled = 0 if turned else 1
    if alpha != 1:
        factor = literal(call, "alpha", alpha, dtype)
        before.append(part(call, Op.MULTIPLY, [operands[scaled], factor], operands[scaled].shape))
        operands[scaled] = before[-1].y
    result = node(call, ARITHMETIC[call.name], operands[::-1] if turned else operands, names[::-1] if turned else names)
    if any(own is not value and not is_stored(value) for own, value in zip(operands, values, strict=True)):
        result.fixed = result.fixed or PART
    return [*before, result]


UNARY = {"neg": Op.NEGATE, "negative": Op.NEGATE, "sqrt": Op.SQRT, "rsqrt": Op.RSQRT, "reciprocal": Op.RECIPROCAL}


def _unary(call: Call) -> Nodes:
    x = call.value("self")
    if x is None or x.dtype not in FLOAT_TYPES or x.dtype != call.outputs[0].dtype:
        return None
    return [node(call, UNARY[call.name], [x])]


def _square(call: Call) -> Nodes:
    x = call.value("self")
    if x is None or x.dtype not in FLOAT_TYPES:
        return None
    return [node(call, Op.POWER, [x, literal(call, "exponent", 2.0, x.dtype)], ("self", None))]


def _named(translator: Translator, names: str | Iterable[str]) -> dict[str, Translator]:
    return dict.fromkeys(names.split() if isinstance(names, str) else names, translator)


TABLE: dict[str, Translator] = {
    **_named(_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_named(_convolution, "convolution _convolution"),
    **_named(_linear, "linear"),
    **_named(_matmul, MATRICES),
    **_named(_addmm, "addmm baddbmm"),
    **_named(_batch_norm, "batch_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit"),
    **_named(_batch_norm, "_native_batch_norm_legit_functional instance_norm"),
    **_named(_batch_norm, (*ALWAYS, *NEVER)),
    **_named(_layer_norm, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    **_named(_other_norm, "group_norm native_group_norm"),
    **_named(_activation, (*PLAIN, *PARAMETERS, "gelu")),
    **_named(_leaky_relu, "leaky_relu"),
    **_named(_prelu, "prelu _prelu_kernel"),
    **_named(_clip, (*BOUNDS, *ONE_BOUND)),
    **_named(_max_pool, "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices"),
    **_named(_max_pool, "max_pool1d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **_named(_average_pool, "avg_pool1d avg_pool2d avg_pool3d"),
    **_named(_adaptive_average, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    **_named(_adaptive_average, "_adaptive_avg_pool2d _adaptive_avg_pool3d"),
    **_named(_resize, "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d"),
    **_named(_resize, "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d"),
    **_named(_resize, "upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    **_named(_reduce, REDUCTIONS),
    **_named(_arithmetic, ARITHMETIC),
    **_named(_unary, UNARY),
    **_named(_square, "square"),
}
