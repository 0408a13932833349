"""Norms written out in elementary operators: LayerNorm, RMSNorm and their kin, GroupNorm by way of reshapes.

Everything hangs on one node, the square root in x / sqrt(mean(x²) + eps): from it backwards to what is
normalised, forwards to the division, and from there to the gain and the shift. A square root that does not
come back to divide its own input (a standard deviation that is a feature) is no norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from normdoctor.layers import ArrayRef, NormKind
from normdoctor.readers.onnx_arrays import size
from normdoctor.readers.onnx_graph import PASSING, Place, Program, Step
from normdoctor.readers.onnx_operators import Found
from normdoctor.readers.onnx_records import LOCAL_DOMAINS

MAX_TAIL = 12
"""Nodes looked at behind a norm for its gain and shift."""

MAX_DIMS = 8


def op(step: Step | None) -> str:
    """The node's operator where it is one of ONNX's own, else an empty word."""
    return step.node.op if step is not None and step.node.domain in LOCAL_DOMAINS else ""


def result(step: Step) -> Place:
    """The node's first output."""
    return Place(step.scope, step.node.outputs[0] if step.node.outputs else "")


def only_use(program: Program, place: Place) -> Step | None:
    """The one node that uses a value; None where several do or the value leaves the graph."""
    uses = program.consumers(place)
    return uses[0] if len(uses) == 1 and place.name not in place.scope.outputs else None


def vector_beside(program: Program, step: Step, flow: Place) -> tuple[int, Place, ArrayRef] | None:
    """The constant of several values that a node combines with `flow`: input index, value, reference."""
    if len(step.node.inputs) != 2:
        return None
    for index in (0, 1):
        place, other = program.operand(step, index), program.operand(step, 1 - index)
        if place is None or other != flow:
            continue
        ref = program.constant(place)
        if ref is not None and size(ref) > 1 and len(ref.shape) <= MAX_DIMS:
            return index, place, ref
    return None


@dataclass
class Tail:
    """The gain and the shift behind a norm, as far as the flow does nothing else in between."""

    parameters: dict[str, Place] = field(default_factory=dict)
    inputs: dict[str, tuple[Step, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    adds_one: bool = False
    steps: list[Step] = field(default_factory=list)
    reshaped: bool = False
    """A Reshape stands between the norm and its gain: the norm worked on groups."""


def tail_of(program: Program, flow: Place, through_reshape: bool = False, known: Tail | None = None) -> Tail:
    """What follows `flow`: a Mul by a constant, an Add of a constant, either of them, or nothing.

    known: a gain that was found before, so only the shift is looked for."""
    tail = known or Tail()
    waiting: list[Step] = []
    for _ in range(MAX_TAIL):
        step = only_use(program, flow)
        name = op(step)
        if step is None:
            break
        if name in PASSING or (name == "Reshape" and through_reshape and program.operand(step, 0) == flow):
            waiting.append(step)
            flow = result(step)
            continue
        role = "weight" if name == "Mul" and not tail.parameters else "bias"
        beside = vector_beside(program, step, flow) if name in ("Mul", "Add") else None
        if beside is None or role in tail.parameters or (name == "Mul" and role == "bias"):
            break
        index, place, ref = beside
        several = sum(length != 1 for length in ref.shape) > 1
        if role == "bias" and not (_fits(tail, ref) if "weight" in tail.shapes else not several):
            break  # a table of positions, not a shift
        tail.parameters[role], tail.inputs[role], tail.shapes[role] = place, (step, index), ref.shape
        if role == "weight":
            tail.adds_one = _unpack_one_plus(program, tail)
        tail.reshaped = tail.reshaped or any(op(before) == "Reshape" for before in waiting)
        tail.steps += [before for before in waiting if op(before) == "Reshape"] + [step]
        waiting = []
        flow = result(step)
        if role == "bias":
            break
    return tail


def _fits(tail: Tail, ref: ArrayRef) -> bool:
    return math.prod(tail.shapes["weight"]) == size(ref)


def _unpack_one_plus(program: Program, tail: Tail) -> bool:
    """Gemma's gain 1 + w: the stored w becomes the parameter."""
    step = program.producer(program.source(tail.parameters["weight"]))
    if op(step) != "Add" or step is None:
        return False
    for index in (0, 1):
        if program.scalar(program.operand(step, index)) == 1.0:
            stored = program.operand(step, 1 - index)
            ref = None if stored is None else program.constant(stored)
            if stored is not None and ref is not None and size(ref) > 1:
                tail.parameters["weight"] = stored
                del tail.inputs["weight"]
                return True
    return False


@dataclass(frozen=True)
class _Core:
    """x / sqrt(mean(square) + eps), found."""

    before: tuple[Step, ...]
    last: Step
    data: Place
    centred: bool
    axes: list[int] | None
    eps: float
    weight: tuple[Step, int] | None = None
    """The gain where it is multiplied into 1 / sqrt(...) first."""
    bias: tuple[Step, int] | None = None
    """The shift of TensorFlow's x * inv + (beta - mean * inv)."""


def find_written_out(program: Program, root: Step) -> tuple[Found, list[Step]] | None:
    """The norm that has its square root at `root`, and the nodes that are its gain and shift."""
    core = _core(program, root)
    if core is None:
        return None
    grouped = op(program.producer(program.source(core.data))) == "Reshape"
    tail = Tail()
    for role, given in (("weight", core.weight), ("bias", core.bias)):
        place = None if given is None else program.operand(*given)
        ref = None if place is None else program.constant(place)
        if given is not None and place is not None and ref is not None:
            tail.parameters[role], tail.inputs[role], tail.shapes[role] = place, given, ref.shape
    if core.weight is not None:
        tail.adds_one = _unpack_one_plus(program, tail)
    if core.bias is None:
        tail = tail_of(program, result(core.last), through_reshape=grouped, known=tail)
    kind = _kind(program, core, tail)
    steps = [*core.before, core.last, *tail.steps]
    found = Found(
        step=core.last,
        kind=kind,
        origin="-".join(step.node.op for step in steps if op(step) not in PASSING),
        parameters=tail.parameters,
        inputs=tail.inputs,
        data=core.data,
        output=result(steps[-1]).name,
        eps=core.eps,
        adds_one=tail.adds_one,
        training=True if kind is NormKind.BATCH else None,
    )
    if kind is NormKind.GROUP:
        found.groups = _groups(program, core)
    return found, steps


def _core(program: Program, root: Step) -> _Core | None:
    inverse = False
    if op(root) == "Pow":
        exponent = program.scalar(program.operand(root, 1))
        if exponent not in (0.5, -0.5):
            return None
        inverse = exponent == -0.5
    elif op(root) != "Sqrt":
        return None
    inside = program.operand(root, 0)
    add = None if inside is None else program.producer(program.source(inside))
    if op(add) != "Add" or add is None:
        return None
    for index in (0, 1):
        eps, variance = program.scalar(program.operand(add, index)), program.operand(add, 1 - index)
        mean = None if eps is None or variance is None else _mean(program, variance)
        square = None if mean is None else _squared(program, mean[1])
        if eps is not None and mean is not None and square is not None:
            break
    else:
        return None
    power, base = square
    centre = _centre(program, base)
    x = base if centre is None else centre[2]
    before = (*(() if centre is None else centre[:2]), power, mean[0], add, root)
    division = _division(program, root, inverse, base, x, None if centre is None else centre[0])
    if division is None:
        return None
    between, last, weight, bias = division
    return _Core((*before, *between), last, x, centre is not None, mean[2], eps, weight, bias)


def _mean(program: Program, place: Place) -> tuple[Step, Place, list[int] | None] | None:
    """(node, what it averages, axes) where a value is an average."""
    step = program.producer(program.source(place))
    before = None if step is None else program.operand(step, 0)
    if step is None or before is None:
        return None
    if op(step) == "ReduceMean":
        return step, before, program.integers(step, "axes", 1)
    return (step, before, [2, 3]) if op(step) == "GlobalAveragePool" else None


def _squared(program: Program, place: Place) -> tuple[Step, Place] | None:
    """(node, base) where a value is a square."""
    step = program.producer(program.source(place))
    if step is None:
        return None
    base, other = program.operand(step, 0), program.operand(step, 1)
    if base is None or other is None:
        return None
    if op(step) == "Pow" and program.scalar(other) == 2.0:
        return step, base
    return (step, base) if op(step) == "Mul" and same(program, base, other) else None


def _centre(program: Program, place: Place) -> tuple[Step, Step, Place] | None:
    """(ReduceMean, Sub, x) where a value is x - mean(x)."""
    step = program.producer(program.source(place))
    if op(step) != "Sub" or step is None:
        return None
    x, average = program.operand(step, 0), program.operand(step, 1)
    mean = None if average is None else _mean(program, average)
    return None if x is None or mean is None or not same(program, x, mean[1]) else (mean[0], step, x)


def same(program: Program, one: Place, other: Place) -> bool:
    """Two values are equal up to their type: the same value, or the same difference computed twice."""
    one, other = program.source(one), program.source(other)
    if one == other:
        return True
    first, second = program.producer(one), program.producer(other)
    if first is None or second is None or op(first) != "Sub" or op(second) != "Sub":
        return False
    pairs = zip(program.operands(first), program.operands(second), strict=False)
    return all(program.source(a) == program.source(b) for a, b in pairs)


def _uses(program: Program, place: Place) -> Iterator[tuple[Step, Place]]:
    """Every node that uses a value, also behind Cast and Identity, and the name it uses it under."""
    waiting = [place]
    for _ in range(MAX_TAIL):
        if not waiting:
            return
        place = waiting.pop()
        for step in program.consumers(place)[:64]:
            if op(step) in PASSING:
                waiting.append(result(step))
            else:
                yield step, place


_Division = tuple[tuple[Step, ...], Step, tuple[Step, int] | None, tuple[Step, int] | None]


def _division(
    program: Program, root: Step, inverse: bool, base: Place, x: Place, mean: Step | None
) -> _Division | None:
    """Where the root divides its own input: nodes before, the dividing node, inputs of gain and shift."""
    roots: list[tuple[tuple[Step, ...], Place]] = [((), result(root))] if inverse else []
    for step, deviation in () if inverse else _uses(program, result(root)):
        if op(step) == "Div" and program.operand(step, 1) == deviation:
            top = program.operand(step, 0)
            if top is not None and same(program, top, base):
                return (), step, None, None
            if program.scalar(top) == 1.0:
                roots.append(((step,), result(step)))
        elif op(step) == "Reciprocal":
            roots.append(((step,), result(step)))
    for before, reciprocal in roots:
        for step, factor in _uses(program, reciprocal):
            if op(step) != "Mul":
                continue
            for index in (0, 1):
                other = program.operand(step, 1 - index)
                if other is None or program.operand(step, index) != factor:
                    continue
                if same(program, other, base):
                    return before, step, None, None
                found = _scaled_first(program, step, 1 - index, base, x, mean)
                if found is not None:
                    return (*before, *found[0]), *found[1:]
    return None


def _scaled_first(
    program: Program, scale: Step, index: int, base: Place, x: Place, mean: Step | None
) -> _Division | None:
    """The gain multiplied into 1 / sqrt(...) before that meets the data, as TensorFlow writes it."""
    gain = program.operand(scale, index)
    ref = None if gain is None else program.constant(gain)
    if ref is None or size(ref) < 2:
        return None
    inverse = result(scale)
    for step, factor in _uses(program, inverse):
        if op(step) != "Mul":
            continue
        others = [place for place in program.operands(step) if place != factor]
        if len(others) != 1:
            continue
        if same(program, others[0], base):
            return (scale,), step, (scale, index), None
        if mean is None or not same(program, others[0], x):
            continue
        add = only_use(program, result(step))
        for place in () if add is None or op(add) != "Add" else program.operands(add):
            shift = program.producer(place)
            if op(shift) == "Sub" and shift is not None:
                beta = program.operand(shift, 0)
                if beta is not None and program.constant(beta) is not None and add is not None:
                    return (scale, step), add, (scale, index), (shift, 0)
    return None


def _kind(program: Program, core: _Core, tail: Tail) -> NormKind:
    """Which norm it is: by the axes it averages over and the axis its gain runs along."""
    if tail.reshaped and any(shape[-1:] == (1,) for shape in tail.shapes.values()):
        return NormKind.GROUP
    across = NormKind.LAYER if core.centred else NormKind.RMS
    within = NormKind.INSTANCE if core.centred else NormKind.FILTER_RESPONSE
    axes = core.axes
    if axes is None:
        return across
    shape = next(iter(tail.shapes.values()), None)
    if shape is not None and sum(length != 1 for length in shape) != 1:
        return across
    if shape is None:
        # Spelt from the front, two or more axes behind the channels are an image's; torch spells LayerNorm's
        # from the back.
        return within if len(axes) > 1 and min(axes) >= 2 else across
    place = next(index for index, length in enumerate(shape) if length != 1) - len(shape)
    known = None if core.data is None else program.document.shape(core.data.scope.graph, core.data.name)
    rank = max(len(shape), 2 - place - 1, *(axis + 1 if axis >= 0 else -axis for axis in axes))
    rank = rank if known is None else len(known)
    averaged = {axis % rank for axis in axes} if rank else set()
    channel = place % rank if rank else 0
    if channel not in averaged:
        return NormKind.BATCH if core.centred and 0 in averaged and len(averaged) > 1 else within
    return NormKind.GROUP if core.centred and len(averaged) > 1 and place < -1 else across


def _groups(program: Program, core: _Core) -> int | None:
    """The number of groups: axis 1 of the shape that the norm works on; 1 where there was no reshape."""
    reshape = program.producer(program.source(core.data))
    if op(reshape) != "Reshape" or reshape is None:
        return 1
    shape = program.integers(reshape, "shape", 1)
    return shape[1] if shape is not None and len(shape) > 1 and shape[1] > 0 else None


def regroup(program: Program, found: Found) -> list[Step]:
    """Make an InstanceNormalization between two reshapes the GroupNorm it stands for; give its other nodes.

    torch's exporter writes GroupNorm as Reshape to [N, groups, -1], InstanceNormalization with weight 1 and
    bias 0, Reshape back, Mul, Add."""
    reshape = None if found.data is None else program.producer(program.source(found.data))
    filler = found.parameters.get("weight")
    ref = None if filler is None else program.constant(filler)
    if op(reshape) != "Reshape" or ref is None or size(ref) > 4096 or not (ref.numpy() == 1).all():
        return []
    flow = result(found.step)
    tail = tail_of(program, flow, through_reshape=True)
    back = only_use(program, flow)
    if not tail.reshaped and op(back) != "Reshape":
        return []
    steps = tail.steps if tail.reshaped else []
    found.kind, found.groups = NormKind.GROUP, size(ref)
    found.parameters = tail.parameters if tail.reshaped else {}
    found.inputs = tail.inputs if tail.reshaped else {}
    found.data = program.operand(reshape, 0) if reshape is not None else None
    found.origin = "-".join(["Reshape", found.step.node.op, *(step.node.op for step in steps)])
    if steps:
        found.output = result(steps[-1]).name
    return steps


def absorb_scale(program: Program, found: Found) -> list[Step]:
    """Give a BatchNormalization of gain 1 and shift 0 the Mul and Add behind it; give those nodes.

    Caffe normalises in one layer and scales in the next (BatchNorm, Scale): together they are one BatchNorm."""
    tail = tail_of(program, result(found.step))
    if set(tail.parameters) != {"weight", "bias"}:
        return []
    for role, value in (("weight", 1), ("bias", 0)):
        place = found.parameters.get(role)
        ref = None if place is None else program.constant(place)
        if ref is None or size(ref) not in (1, math.prod(tail.shapes[role])) or (ref.numpy() != value).any():
            return []
    found.parameters |= tail.parameters
    found.inputs |= tail.inputs
    found.output = result(tail.steps[-1]).name
    return tail.steps
