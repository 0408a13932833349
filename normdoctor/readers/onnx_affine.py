"""BatchNorm written out as Sub-Mul-Add, as TensorFlow-born models have it: a scale and a shift per channel.

The layer is y = weight * x + bias, whatever the nodes are: for (x - m) * s + b, bias is b - m * s, which is
what flows on. A file in which the constants of Mul and Add stand alone gives them as stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from normdoctor.layers import ArrayRef, NearMiss, NormKind
from normdoctor.readers.onnx_arrays import computed, reshaped, size
from normdoctor.readers.onnx_graph import PASSING, Place, Program, Step
from normdoctor.readers.onnx_operators import Found, operator_of
from normdoctor.readers.onnx_patterns import MAX_TAIL, only_use, op, result, vector_beside

MOVING = PASSING | {"Transpose"}
"""What may stand between the parts: the layout changes of a converter."""

LEARNT = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})

MOVED = MOVING | {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Resize", "Upsample", "Pad", "Slice"}

NOT_BEFORE_A_NORM = {
    "MatMulInteger": "it turns integers back to floats",
    "ConvInteger": "it turns integers back to floats",
    "Div": "it follows a division, as the gain of a norm in another form does",
    "Log": "it scales features, not activations",
    "Exp": "it scales features, not activations",
}

FEW = 4
"""Up to so many values, a scale and a shift are as often colours or the corners of a box as channels."""


@dataclass(frozen=True)
class _Part:
    """One of Sub, Mul, Div, Add with its constant."""

    step: Step
    index: int
    place: Place
    ref: ArrayRef

    @property
    def axis(self) -> int:
        """Where the channels run, from the back: -1 for [C], -3 for [C, 1, 1]."""
        shape = self.ref.shape
        return next(axis for axis, length in enumerate(shape) if length != 1) - len(shape)


def find_affine(program: Program, scale: Step, claimed: set[tuple[int, int]]) -> Found | NearMiss | None:
    """The layer whose scale is the Mul (or Div) at `scale`; a NearMiss where it is something else.

    claimed: nodes that belong to norms already, as (id of scope, id of node)."""
    if op(scale) not in ("Mul", "Div") or _key(scale) in claimed:
        return None
    factor = _factor(program, scale)
    if factor is None:
        return None
    data = program.operand(scale, 1 - factor.index)
    assert data is not None
    before, moved_before = _backwards(program, data)
    mean = _part(program, before, ("Sub",), size(factor.ref))
    after, flow, moved_after = _forwards(program, result(scale))
    shift = None
    if after is not None and _key(after) not in claimed:
        beside = vector_beside(program, after, flow)
        if beside is not None and _is_vector(beside[2], size(factor.ref)):
            shift = _Part(after, *beside)
            if op(after) not in ("Add", "Sub") or (op(after) == "Sub" and shift.index == 0):
                shift = None
    if mean is not None and only_use(program, result(mean.step)) is None:
        mean = None
    if shift is not None and not moved_after and shift.axis != factor.axis:
        shift = None
    if mean is not None and not moved_before and mean.axis != factor.axis:
        mean = None
    if shift is None and mean is None:
        return None
    source = program.operand(mean.step, 0) if mean is not None else data
    parts = [part for part in (mean, factor, shift) if part is not None]
    assert source is not None
    reason = _why_not(program, source, size(factor.ref))
    if reason is not None:
        return NearMiss(name=factor.place.name, shape=factor.ref.shape, reason=reason)
    claimed.update(_key(part.step) for part in parts)
    return _layer(program, source, mean, factor, shift)


def _key(step: Step) -> tuple[int, int]:
    return id(step.scope), id(step.node)


def _is_vector(ref: ArrayRef, length: int | None = None) -> bool:
    """Several values along one axis, `length` of them."""
    along = [count for count in ref.shape if count != 1]
    return len(along) == 1 and along[0] > 1 and length in (None, along[0])


def _factor(program: Program, scale: Step) -> _Part | None:
    """The vector that a Mul or Div scales by."""
    for index in (1, 0) if op(scale) == "Mul" else (1,):
        data = program.operand(scale, 1 - index)
        beside = None if data is None else vector_beside(program, scale, data)
        if beside is not None and beside[0] == index and _is_vector(beside[2]):
            return _Part(scale, *beside) if data is not None and program.constant(data) is None else None
    return None


def _part(program: Program, step: Step | None, names: tuple[str, ...], length: int) -> _Part | None:
    if step is None or op(step) not in names:
        return None
    place = program.operand(step, 1)
    ref = None if place is None else program.constant(place)
    if place is None or ref is None or not _is_vector(ref, length):
        return None
    return _Part(step, 1, place, ref)


def _backwards(program: Program, place: Place) -> tuple[Step | None, bool]:
    """The node behind layout changes that makes a value, and whether there was a Transpose."""
    moved = False
    for _ in range(MAX_TAIL):
        step = program.producer(place)
        if op(step) not in MOVING or step is None:
            return step, moved
        moved = moved or op(step) == "Transpose"
        before = program.operand(step, 0)
        if before is None:
            break
        place = before
    return None, moved


def _forwards(program: Program, place: Place) -> tuple[Step | None, Place, bool]:
    """The one node beyond layout changes that uses a value, under which name, and whether they moved it."""
    moved = False
    for _ in range(MAX_TAIL):
        step = only_use(program, place)
        if op(step) not in MOVING or step is None:
            return step, place, moved
        moved = moved or op(step) == "Transpose"
        place = result(step)
    return None, place, moved


def _why_not(program: Program, source: Place, channels: int) -> str | None:
    """Why a per-channel scale and shift of `source` is no norm, None where it may well be one."""
    place, learnt = source, False
    for _ in range(4 * MAX_TAIL):
        step = program.producer(place)
        name = op(step)
        if step is None:
            return "it prepares the model's input" if program.constant(place) is None else "its input is constant"
        if name in LEARNT:
            learnt = place == source or _only_moved(program, source, place)
            break
        if operator_of(step.node) is not None and step.node.op != "BatchNormalization":
            return f"it is the affine part of a {step.node.op}"
        if name not in MOVED and not _by_scalar(program, step):
            if name == "Mul" and _normalises(program, step):
                return "it follows a multiplication by 1 / sqrt(...), as the gain of a norm in another form does"
            reason = NOT_BEFORE_A_NORM.get(name)
            if reason is not None:
                return reason
            break
        before = next((p for p in program.operands(step) if program.constant(p) is None), None)
        if before is None:
            break
        place = before
    if channels <= FEW and not learnt:
        return f"{channels} values behind no convolution are rather colours or coordinates"
    return None


def _only_moved(program: Program, source: Place, place: Place) -> bool:
    step, _ = _backwards(program, source)
    return step is not None and step == program.producer(place)


def _by_scalar(program: Program, step: Step) -> bool:
    """Arithmetic with one number, as in x / 255."""
    if op(step) not in ("Mul", "Add", "Sub", "Div"):
        return False
    refs = [program.constant(place) for place in program.operands(step)]
    return any(ref is not None and size(ref) == 1 for ref in refs)


def _normalises(program: Program, step: Step) -> bool:
    for place in program.operands(step):
        root = program.producer(program.source(place))
        if root is not None and op(root) in ("Reciprocal", "Sqrt", "Pow", "Div") and not _by_scalar(program, root):
            return True
        if root is not None and op(root) == "Div" and program.scalar(program.operand(root, 0)) is not None:
            return True
    return False


def _layer(program: Program, source: Place, mean: _Part | None, factor: _Part, shift: _Part | None) -> Found:
    identity = (id(program.document), "affine", factor.step.node.span.start, id(factor.step.scope))
    parts = [part for part in (mean, factor, shift) if part is not None]
    found = Found(
        step=factor.step,
        kind=NormKind.AFFINE,
        origin="-".join(part.step.node.op for part in parts),
        parameters={"weight": factor.place},
        inputs={"weight": (factor.step, factor.index)},
        data=source,
        output=result(parts[-1].step).name,
        named_after=[part.place for part in parts],
    )
    flat = {id(part): _flat(part.ref) for part in parts}
    gain = flat[id(factor)]
    if op(factor.step) == "Div":
        inverse = computed(lambda s: 1 / s, [gain], (*identity, "weight"))
        if inverse is not None:
            gain = found.made["weight"] = inverse
    if shift is not None:
        found.parameters["bias"] = shift.place
        found.inputs["bias"] = (shift.step, shift.index)
    sign = -1.0 if shift is not None and op(shift.step) == "Sub" else 1.0
    bias = None
    if mean is not None and shift is not None:
        operands = [flat[id(shift)], flat[id(mean)], gain]
        bias = computed(lambda b, m, s: sign * b - m * s, operands, (*identity, "bias"))
    elif mean is not None:
        bias = computed(lambda m, s: -m * s, [flat[id(mean)], gain], (*identity, "bias"))
    elif shift is not None and sign < 0:
        bias = computed(lambda b: -b, [flat[id(shift)]], (*identity, "bias"))
    if bias is not None:
        found.made["bias"] = bias
    return found


def _flat(ref: ArrayRef) -> ArrayRef:
    return reshaped(ref, (size(ref),))
