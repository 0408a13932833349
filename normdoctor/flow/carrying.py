"""Where a map goes: along the graph, backward or forward, until every branch of it has met a weight.

Nothing changes on the way. The result is a `Deed`, which is done as a whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from normdoctor.flow.affine import Affine, Array, Blocked
from normdoctor.flow.constants import Constants
from normdoctor.flow.graph import Graph, Node, Op, Use, Value
from normdoctor.flow.passing import after, before
from normdoctor.flow.weights import (
    AFFINE_NORMS,
    WEIGHTED,
    Absorption,
    take_behind,
    take_in_front,
    whole_shape,
)

MAX_VISITS = 2_000
"""Nodes that one map passes: branches that part and join again multiply."""

MAX_DEPTH = 200
"""Nodes in a row."""

ELEMENTWISE = frozenset({Op.ADD, Op.SUBTRACT, Op.MULTIPLY, Op.DIVIDE})

MAX_OPERAND = 1 << 22
"""Elements of a constant that a map is combined with."""


@dataclass(eq=False)
class Deed:
    """What one fold does."""

    absorptions: list[tuple[Node, Absorption]] = field(default_factory=list)
    replaced: dict[tuple[Node, int], Array] = field(default_factory=dict)
    """Constants of elementwise operators that change."""
    bypassed: dict[Node, int] = field(default_factory=dict)
    into: list[Node] = field(default_factory=list)
    through: list[Node] = field(default_factory=list)

    def add(self, other: Deed) -> Deed:
        """This deed and another one."""
        self.absorptions += other.absorptions
        self.replaced |= other.replaced
        self.bypassed |= other.bypassed
        self.into += [node for node in other.into if node not in self.into]
        self.through += [node for node in other.through if node not in self.through]
        return self


@dataclass(eq=False)
class State:
    """The graph with the folds done so far."""

    graph: Graph
    constants: Constants = field(default_factory=Constants)
    bypassed: dict[Node, int] = field(default_factory=dict)
    absorbed: dict[Node, list[Absorption]] = field(default_factory=dict)
    replaced: dict[tuple[Node, int], Array] = field(default_factory=dict)
    evaluation: bool = False

    def do(self, deed: Deed) -> None:
        """Do one fold."""
        for node, absorption in deed.absorptions:
            self.absorbed.setdefault(node, []).append(absorption)
        self.replaced |= deed.replaced
        self.bypassed |= deed.bypassed

    def source(self, value: Value) -> Value:
        """The value that stands there once the bypassed nodes are gone."""
        while value.producer is not None and value.producer in self.bypassed and value is value.producer.y:
            data = value.producer.inputs[self.bypassed[value.producer]]
            assert data is not None
            value = data
        return value

    def uses(self, value: Value) -> list[Use]:
        """Who takes the value once the bypassed nodes are gone. To ask for a shape is no use."""
        found: list[Use] = []
        waiting = list(value.uses)
        while waiting:
            use = waiting.pop(0)
            if use.node in self.bypassed:
                if use.slot == self.bypassed[use.node]:
                    waiting += use.node.y.uses
            elif use.node.op is not Op.SHAPE:
                found.append(use)
        return found

    def leaves(self, value: Value) -> bool:
        """Whether the value, or what it becomes behind bypassed nodes, is promised to somebody."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if value.is_output:
                return True
            for use in value.uses:
                if use.node in self.bypassed and use.slot == self.bypassed[use.node]:
                    waiting.append(use.node.y)
        return False

    def operand(self, node: Node) -> tuple[int, Array] | None:
        """The slot of the data and the constant of an elementwise operator, with as many axes as its output.

        None where it has no constant, or one that makes the data larger than it is."""
        if node.op not in ELEMENTWISE or len(node.inputs) != 2:
            return None
        for slot in (0, 1):
            data, other = node.inputs[slot], node.inputs[1 - slot]
            if data is None or other is None or not self.constants.knows(other) or self.constants.knows(data):
                continue
            if (node, 1 - slot) in self.replaced:
                return slot, self.replaced[node, 1 - slot]
            if not _keeps_shape(data, other):
                return None
            array = np.asarray(self.constants.array(other), dtype=np.float64)
            rank = array.ndim if data.shape is None else len(data.shape)
            return slot, array.reshape((1,) * (rank - array.ndim) + array.shape)
        return None

    def weight_slot(self, node: Node) -> int:
        """Which input of a weighted operator is its weight. Raises Blocked where the operator cannot take a map in."""
        if node.fixed is not None:
            raise Blocked(*node.fixed)
        slots = (1, 0) if node.op is Op.MATMUL else (1,)
        slot = next((slot for slot in slots if self.constants.knows(node.inputs[slot])), None)
        if slot is None:
            raise Blocked("computed-weight", f"the weight of {node.label or node.written} is computed from the input")
        bias = node.given(2)
        if bias is not None and not self.constants.knows(bias):
            raise Blocked("computed-bias", f"the bias of {node.label or node.written} is computed from the input")
        return slot


def _keeps_shape(data: Value, other: Value) -> bool:
    try:
        shape = whole_shape(other)
    except Blocked:
        return False
    if int(np.prod(shape, dtype=object)) > MAX_OPERAND:
        return False
    if all(length == 1 for length in shape):
        return data.shape is None or len(shape) <= len(data.shape)
    if data.shape is None or len(shape) > len(data.shape):
        return False
    ends = zip(reversed(shape), reversed(data.shape), strict=False)
    return all(length in (1, own) for length, own in ends)


@dataclass(eq=False)
class _Journey:
    """One map on its way; counts the nodes it has seen."""

    state: State
    merge: bool
    """Whether another norm may take the map in."""
    visits: int = 0

    def back(self, value: Value, affine: Affine, depth: int = 0) -> Deed:
        """Do to `value` what `affine` says, by changing what produces it."""
        if affine.is_identity:
            return Deed()
        self._count(depth)
        value = self.state.source(value)
        node = value.producer
        if self.state.leaves(value):
            raise Blocked("graph-output", f"{_named(value)} leaves the network as it is")
        if node is None:
            what = "a constant" if value.array is not None else "an input of the network"
            raise Blocked("graph-input", f"before it comes {what}")
        if len(self.state.uses(value)) != 1:
            users = ", ".join(dict.fromkeys(_called(use.node) for use in self.state.uses(value)))
            raise Blocked("several-consumers", f"{_named(value)} is used elsewhere too ({users})")
        if node.op in WEIGHTED:
            absorption = take_behind(node, affine, self.state.weight_slot(node))
            return Deed([(node, absorption)], into=[node])
        if node.op in AFFINE_NORMS and self.merge:
            return self._into_norm(node, affine, "out")
        if node.op in ELEMENTWISE:
            return self._back_elementwise(node, affine, depth)
        deed = Deed()
        for slot, inner in before(node, node.outputs.index(value), affine):
            entry = node.inputs[slot]
            assert entry is not None
            deed.add(self.back(entry, inner, depth + 1))
        deed.through.insert(0, node)
        return deed

    def _back_elementwise(self, node: Node, affine: Affine, depth: int) -> Deed:
        operand = self.state.operand(node)
        if operand is None:
            return self._back_both(node, affine, depth)
        slot, constant = operand
        data = node.inputs[slot]
        assert data is not None
        if node.op is Op.DIVIDE and slot == 1:
            raise Blocked("nonlinear", "it divides by the data")
        if node.fixed is not None:
            deed = self.back(data, _past(node, slot, constant, affine), depth + 1)
            deed.through.insert(0, node)
            return deed
        place = (node, 1 - slot)
        if node.op in (Op.ADD, Op.SUBTRACT):
            # scale * (x + c) + shift = scale * x + (scale * c + shift), and likewise for x - c and c - x
            sign = -1.0 if node.op is Op.SUBTRACT and slot == 0 else 1.0
            deed = Deed(replaced={place: affine.scale * constant + sign * affine.shift})
            deed.add(self.back(data, affine.without_shift(), depth + 1))
            deed.through.insert(0, node)
            return deed
        with np.errstate(all="ignore"):  # what is not finite is refused below
            factor = 1.0 / constant if node.op is Op.DIVIDE else constant
            whole = Affine(affine.scale * factor, affine.shift)
        try:
            if not whole.is_finite:
                raise Blocked("not-finite", "it would divide by zero")
            deed = Deed(bypassed={node: slot}).add(self.back(data, whole, depth + 1))
            deed.through.insert(0, node)
            return deed
        except Blocked:
            if affine.has_shift or not self.merge:
                raise
        new = constant / affine.scale if node.op is Op.DIVIDE else constant * affine.scale
        if not np.isfinite(new).all():
            raise Blocked("not-finite", "it would divide by zero")
        return Deed(replaced={place: new}, into=[node])

    def _back_both(self, node: Node, affine: Affine, depth: int) -> Deed:
        """Two computed values: of a sum both take the scale and one the shift, of a product one takes the scale."""
        first, second = node.inputs
        if first is None or second is None or (node.op is Op.DIVIDE and affine.has_shift):
            raise Blocked("nonlinear", "it divides one computed value by another")
        plain = affine.without_shift()
        sign = -1.0 if node.op is Op.SUBTRACT else 1.0
        choices: list[tuple[tuple[Value, Affine], ...]] = []
        if node.op in (Op.ADD, Op.SUBTRACT):
            mirrored = Affine(affine.scale, sign * affine.shift)
            choices = [((first, affine), (second, plain)), ((first, plain), (second, mirrored))]
            if not affine.has_shift:
                choices.pop()
        elif affine.has_shift:
            raise Blocked("nonlinear", "a shift cannot pass a product of two computed values")
        else:
            choices.append(((first, plain),))
            if node.op is Op.MULTIPLY:
                choices.append(((second, plain),))
        blocked: Blocked | None = None
        for choice in choices:
            try:
                deed = Deed()
                for value, inner in choice:
                    deed.add(self.back(value, _narrowed(inner, value), depth + 1))
                deed.through.insert(0, node)
                return deed
            except Blocked as error:
                blocked = blocked or error
        assert blocked is not None
        raise blocked

    def _into_norm(self, node: Node, affine: Affine, side: str) -> Deed:
        """Another norm takes the map into its weight and bias."""
        if node.fixed is not None:
            raise Blocked(*node.fixed)
        for slot in (1, 2):
            value = node.given(slot)
            if value is not None and not self.state.constants.knows(value):
                raise Blocked("computed-weight", f"the parameters of {node.label} are computed from the input")
        if node.op is Op.BATCH_NORM:
            trains = node.attributes.get("training") and not self.state.evaluation
            if side == "in" and (trains or node.given(3) is None or node.given(4) is None):
                raise Blocked("training-mode", f"{node.label} takes its statistics from the batch")
        elif side == "in":
            raise Blocked("nonlinear", f"{node.label} takes its statistics from its input")
        known = next((value for slot in (1, 2, 3) if (value := node.given(slot)) is not None), None)
        if known is None:
            raise Blocked("no-parameters", f"{node.label} has neither weight nor bias")
        shape = whole_shape(known)
        if len(shape) != 1 or (node.op is not Op.BATCH_NORM and node.given(1) is None):
            raise Blocked("wrong-axis", f"{node.label} has no weight per channel")
        axis = affine.rank - 1 if node.op is Op.LAYER_NORM else 1
        scale, shift = affine.vectors(axis, shape[0])
        if node.op is not Op.BATCH_NORM and node.given(2) is None and shift.any():
            raise Blocked("no-parameters", f"{node.label} has no bias")
        return Deed([(node, Absorption("out" if side == "out" else "in", scale, shift))], into=[node])

    def forward(self, value: Value, affine: Affine, depth: int = 0) -> Deed:
        """Take from `value` what `affine` gave it, by changing everything that takes the value."""
        if affine.is_identity:
            return Deed()
        if value.is_output:
            raise Blocked("graph-output", f"{_named(value)} leaves the network as it is")
        deed = Deed()
        for use in value.uses:
            node = use.node
            if node.op is Op.SHAPE:
                continue
            self._count(depth)
            if node in self.state.bypassed:
                if use.slot == self.state.bypassed[node]:
                    deed.add(self.forward(node.y, affine, depth + 1))
                continue
            deed.add(self._forward_into(node, use.slot, affine, depth))
        return deed

    def _forward_into(self, node: Node, slot: int, affine: Affine, depth: int) -> Deed:
        if node.op in WEIGHTED:
            weight = self.state.weight_slot(node)
            if slot == weight or slot == 2:
                raise Blocked("computed-weight", f"{_called(node)} takes it as a weight")
            return Deed([(node, take_in_front(node, affine, weight))], into=[node])
        if node.op is Op.BATCH_NORM and slot == 0 and self.merge:
            return self._into_norm(node, affine, "in")
        if node.op in ELEMENTWISE:
            return self._forward_elementwise(node, slot, affine, depth)
        deed = Deed()
        for output, outer in after(node, slot, affine):
            deed.add(self.forward(node.outputs[output], outer, depth + 1))
        deed.through.insert(0, node)
        return deed

    def _forward_elementwise(self, node: Node, slot: int, affine: Affine, depth: int) -> Deed:
        operand = self.state.operand(node)
        scale, shift = affine.scale, affine.shift
        constant = None if operand is None or operand[0] != slot else operand[1]
        if node.op in (Op.ADD, Op.SUBTRACT):
            # What is left of (scale * x + shift) + c is scale * (x + c) + shift + c * (1 - scale).
            sign = -1.0 if node.op is Op.SUBTRACT and slot == 1 else 1.0
            if constant is None and (scale != 1).any():
                raise Blocked("added-to-data", f"{_called(node)} adds it to another computed value")
            added = 0.0 if constant is None else constant * (1 - scale)
            if node.op is Op.SUBTRACT and slot == 0:
                added = -added
            outer = Affine(scale, sign * shift + added)
        elif node.op is Op.DIVIDE and slot == 1:
            raise Blocked("nonlinear", f"{_called(node)} divides by it")
        elif constant is None:
            if affine.has_shift:
                raise Blocked("nonlinear", "a shift cannot pass a product of two computed values")
            outer = affine
        else:
            outer = Affine(scale, shift / constant if node.op is Op.DIVIDE else shift * constant)
        if not outer.is_finite:
            raise Blocked("not-finite", "it would divide by zero")
        rank = len(node.y.shape) if node.y.shape is not None else outer.rank
        if rank != outer.rank:
            raise Blocked("wrong-axis", f"{_called(node)} gives the value more axes")
        deed = self.forward(node.y, outer, depth + 1)
        deed.through.insert(0, node)
        return deed

    def _count(self, depth: int) -> None:
        self.visits += 1
        if self.visits > MAX_VISITS or depth > MAX_DEPTH:
            raise Blocked("too-far", "no weight is near enough")


def _past(node: Node, slot: int, constant: Array, affine: Affine) -> Affine:
    """The map in front of an elementwise operator that does what `affine` does behind it, the constant as it is."""
    scale, shift = affine.scale, affine.shift
    if node.op is Op.ADD:  # scale * (x + c) + shift = (scale * x + shift + (scale - 1) * c) + c
        past = Affine(scale, shift + (scale - 1) * constant)
    elif node.op is Op.SUBTRACT:
        past = Affine(scale, (shift if slot == 0 else -shift) - (scale - 1) * constant)
    elif node.op is Op.DIVIDE:
        past = Affine(scale, shift * constant)
    else:
        with np.errstate(all="ignore"):
            past = Affine(scale, np.where(shift == 0, 0.0, shift / constant))
    if not past.is_finite:
        raise Blocked("not-finite", "it would divide by zero")
    return past


def _narrowed(affine: Affine, value: Value) -> Affine:
    """The map for one term of a sum, which may be broadcast to the sum's shape. Raises Blocked."""
    shape = value.shape
    if shape is None or len(shape) > affine.rank:
        raise Blocked("unknown-shape", f"the shape of {_named(value)} is not known")
    new = affine.rank - len(shape)
    for axis in affine.varying:
        if axis < new or shape[axis - new] != affine.length(axis):
            raise Blocked("wrong-axis", f"{_named(value)} is broadcast along the channels")
    return affine.moved(lambda array: array.reshape(array.shape[new:]))


def carry_back(state: State, value: Value, affine: Affine, merge: bool) -> Deed:
    """How `affine`, applied to `value`, is absorbed by what produces the value. Raises Blocked."""
    return _Journey(state, merge).back(value, affine)


def carry_forward(state: State, value: Value, affine: Affine, merge: bool) -> Deed:
    """How `affine`, which made `value`, is absorbed by all who take the value. Raises Blocked."""
    return _Journey(state, merge).forward(value, affine)


def _called(node: Node) -> str:
    return node.label or node.written or node.op.value


def _named(value: Value) -> str:
    """The value as a reader of the report may know it."""
    if value.producer is not None and value.producer.label:
        return f"the output of {value.producer.label}"
    return value.name
