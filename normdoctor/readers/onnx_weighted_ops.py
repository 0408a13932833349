"""ONNX's convolutions, matrix products, norms and arithmetic as neutral nodes: inputs and attributes by opset."""

from __future__ import annotations

from normdoctor.flow.graph import Fixed, Op
from normdoctor.readers import onnx_geometry
from normdoctor.readers.onnx_builder import Builder, whole
from normdoctor.readers.onnx_graph import Step
from normdoctor.readers.onnx_operators import operator_of, trains

NUMPY_BROADCASTING = 7
"""The opset in which arithmetic began to broadcast as numpy does; before, attributes said how."""

FLOATS = ("float", "bfloat")

DROPOUT_RATIO = 0.5
"""Of a Dropout that does not say it."""


def _kernel(b: Builder, step: Step) -> tuple[int, ...] | None:
    """Lengths of the kernel, None where the weights do not fit the data, the groups or the bias.

    Also makes known how many axes what flows in and out has."""
    weight, x, bias = b.at(step, 1), b.at(step, 0), b.at(step, 2)
    shape = None if weight is None else whole(weight.shape)
    groups = b.program.integer(step, "group", 1)
    if shape is None or len(shape) < 3 or min(*shape, groups) < 1 or shape[0] % groups or x is None:
        return None
    transposed = step.node.op == "ConvTranspose"
    inputs, outputs = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    if bias is not None and whole(bias.shape) not in (None, (outputs,)):
        return None
    y = b.out(step, 0)
    for value, channels in ((x, inputs), (y, outputs)):
        value.shape = value.shape or (None, channels, *[None] * (len(shape) - 2))
        if len(value.shape) != len(shape) or (value.shape[1] not in (channels, None) and _is_length(value.shape[1])):
            return None
    return shape[2:]


def _is_length(length: int | str | None) -> bool:
    return isinstance(length, int)


def convolution(b: Builder, step: Step) -> bool:
    kernel = _kernel(b, step)
    if kernel is None:
        return False
    auto = b.program.text(step, "auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        padded = any(length != 1 for length in kernel)
    else:
        padded = auto != "VALID" and any(b.program.integers(step, "pads", None) or ())
    groups = b.program.integer(step, "group", 1)
    where = onnx_geometry.convolution(b, step, kernel)
    b.add(step, Op.CONV, (0, 1, 2), {"groups": groups, "padded": padded, **where.attributes})
    return True


def transposed_convolution(b: Builder, step: Step) -> bool:
    kernel = _kernel(b, step)
    if kernel is None:
        return False
    stretched = [b.program.integers(step, name, None) or [] for name in ("strides", "output_padding")]
    plain = (
        all(length == 1 for length in (*kernel, *stretched[0]))
        and not any(stretched[1])
        and b.program.attribute(step, "output_shape") is None
    )
    groups = b.program.integer(step, "group", 1)
    where = onnx_geometry.transposed(b, step, kernel)
    b.add(step, Op.CONV_TRANSPOSE, (0, 1, 2), {"groups": groups, "padded": not plain, **where.attributes})
    return True


def _computes_in_floats(b: Builder, step: Step) -> bool:
    values = (b.out(step, 0), b.at(step, 0), b.at(step, 1))
    return all(value is None or value.dtype is None or value.dtype.startswith(FLOATS) for value in values)


def matmul(b: Builder, step: Step) -> bool:
    if not _computes_in_floats(b, step):
        return False
    b.add(step, Op.MATMUL, (0, 1), {"takes_bias": False})
    return True


def _fits_product(b: Builder, step: Step) -> bool:
    """Whether A and B are matrices, and C broadcasts to their product, for all that is known."""
    turned = b.program.integer(step, "transB", 0) != 0
    second, third = b.at(step, 1), b.at(step, 2)
    known = None if second is None else whole(second.shape)
    if known is not None and len(known) != 2:
        return False
    added = None if third is None else whole(third.shape)
    if added is None or known is None:
        return True
    return len(added) <= 2 and (not added or added[-1] in (1, known[0 if turned else 1]))


def gemm(b: Builder, step: Step) -> bool:
    program = b.program
    if not _computes_in_floats(b, step):
        return False
    if step.scope.opset < NUMPY_BROADCASTING and not program.integer(step, "broadcast", 0):
        return False
    if not _fits_product(b, step):
        return False
    b.add(
        step,
        Op.MATMUL,
        (0, 1, 2),
        {
            "transpose_a": program.integer(step, "transA", 0) != 0,
            "transpose_b": program.integer(step, "transB", 0) != 0,
            "alpha": program.number(step, "alpha", 1.0),
            "beta": program.number(step, "beta", 1.0),
            "takes_bias": True,
        },
    )
    return True


def batch_norm(b: Builder, step: Step) -> bool:
    program = b.program
    shapes = {whole(value.shape) for value in (b.at(step, index) for index in range(1, 5)) if value is not None}
    known = shapes - {None}
    x = b.at(step, 0)
    channels = x.shape[1] if x is not None and x.shape is not None and len(x.shape) > 1 else None
    if isinstance(channels, int):
        known.add((channels,))
    if (
        (step.scope.opset < 9 and not program.integer(step, "spatial", 1))
        or len(known) > 1
        or any(shape is not None and len(shape) != 1 for shape in known)
    ):
        # Statistics per channel and place, or parameters that do not fit together.
        b.add(step, Op.OTHER_NORM, range(5))
        return True
    fixed = None
    if b.extras(step, 1, 2, 3, 4):
        fixed = Fixed("statistics-used", "the statistics that it updates are used elsewhere in the graph")
    eps = program.number(step, "epsilon", 1e-5)
    training = trains(program, step)
    b.add(step, Op.BATCH_NORM, range(5), {"eps": eps, "training": training}, fixed=fixed)
    return True


def other_norm(b: Builder, step: Step) -> bool:
    operator = operator_of(step.node)
    if operator is None:
        return False
    x, weight = b.at(step, 0), b.at(step, operator.inputs["weight"])
    own = (0, operator.inputs["weight"], operator.inputs.get("bias", len(step.node.inputs)))
    rest = [index for index in range(len(step.node.inputs)) if index not in own]
    b.extras(step, *range(1, len(step.node.outputs)))
    axis = b.program.integer(step, "axis", -1)
    count = -axis if axis < 0 else None
    if axis >= 0 and x is not None and x.shape is not None:
        count = len(x.shape) - axis
    last_axes = step.node.op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
    if last_axes and weight is not None and weight.shape is not None and len(weight.shape) == count:
        b.add(step, Op.LAYER_NORM, own, {"rms": step.node.op != "LayerNormalization"})
    else:
        b.add(step, Op.OTHER_NORM, (*own, *rest))
    return True


ARITHMETIC = {"Add": Op.ADD, "Sub": Op.SUBTRACT, "Mul": Op.MULTIPLY, "Div": Op.DIVIDE, "Pow": Op.POWER}
UNARY = {"Neg": Op.NEGATE, "Sqrt": Op.SQRT, "Reciprocal": Op.RECIPROCAL}


def arithmetic(b: Builder, step: Step) -> bool:
    op = ARITHMETIC[step.node.op]
    if step.scope.opset >= NUMPY_BROADCASTING:
        b.add(step, op, (0, 1))
        return True
    first, second = b.at(step, 0), b.at(step, 1)
    if first is None or second is None or first.shape is None or second.shape is None:
        return False
    axis = b.program.integer(step, "axis", -1)
    missing = len(first.shape) - len(second.shape)
    if not b.program.integer(step, "broadcast", 0):
        # Equal shapes are required then.
        if missing:
            return False
    elif axis not in (-1, missing):
        # The second operand is laid along the axes from `axis` on.
        behind = missing - axis
        if axis < 0 or behind < 0:
            return False
        laid = b.temporary(second, (*second.shape, *[1] * behind))
        b.add(step, Op.RESHAPE, (1,), outputs=[laid], whole=False)
        b.add(step, op, (0, 1), inputs=[first, laid], whole=False)
        return True
    b.add(step, op, (0, 1))
    return True


def unary(b: Builder, step: Step) -> bool:
    b.add(step, UNARY[step.node.op], (0,))
    return True


def total(b: Builder, step: Step) -> bool:
    """Sum of any number of operands."""
    count = len(step.node.inputs)
    if step.scope.opset < 8 and count > 1:
        shapes = {value.shape for value in (b.at(step, index) for index in range(count)) if value is not None}
        if len(shapes) > 1:
            return False
    if count < 2:
        b.add(step, Op.IDENTITY, (0,))
        return True
    y = b.out(step, 0)
    running = b.at(step, 0)
    for index in range(1, count):
        last = index == count - 1
        target = y if last else b.temporary(y, y.shape)
        b.add(step, Op.ADD, (index - 1, index), inputs=[running, b.at(step, index)], outputs=[target], whole=count == 2)
        running = target
    return True


def dropout(b: Builder, step: Step) -> bool:
    opset = step.scope.opset
    if opset < 7 and not b.program.integer(step, "is_test", 0):
        return False
    if opset >= 12 and b.at(step, 2) is not None and b.flag(step, 2) is not False:
        return False
    if b.is_used(step, 1):
        # All true when nothing is dropped: a constant that has nothing to do with the values of x.
        b.add(step, Op.OTHER, (), outputs=[b.out(step, 1)], whole=False)
    b.add(step, Op.IDENTITY, (0,), _probability(b, step))
    return True


def _probability(b: Builder, step: Step) -> dict[str, float]:
    """What a dropout leaves out in training, as the attribute of its node; nothing where it depends on the input."""
    ratio: float | None = DROPOUT_RATIO
    if step.scope.opset < 12:
        ratio = b.program.number(step, "ratio", DROPOUT_RATIO)
    elif b.at(step, 1) is not None:
        ratio = b.scalar(step, 1)
    return {"dropout": ratio} if ratio is not None and 0 <= ratio <= 1 else {}


def quantised(b: Builder, step: Step) -> bool:
    b.other(step, Fixed("quantised", "it computes in integers, whose scales were chosen for the weights as they are"))
    return True
