"""The neutral graph in the making: values of an ONNX program, and nodes with the way back to where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from normdoctor.flow.constants import Constants
from normdoctor.flow.graph import Fixed, Graph, Node, Op, Shape, Value
from normdoctor.layers import ArrayRef
from normdoctor.readers.onnx_arrays import size
from normdoctor.readers.onnx_graph import SMALL, Place, Program, Scope, Step
from normdoctor.readers.onnx_layers import own_name
from normdoctor.readers.onnx_names import clean, parent
from normdoctor.readers.onnx_records import FunctionKey
from normdoctor.readers.onnx_shapes import Kinds

INITIALIZERS_ARE_INPUTS = 4
"""Below this IR version every initializer must be an input of the graph as well. From it on one that is an input
is a default: whoever runs the model may give another value, so it is no constant."""


SAME_SHAPE = frozenset({Op.BATCH_NORM, Op.LAYER_NORM, Op.OTHER_NORM, Op.ACTIVATION, Op.IDENTITY, Op.CAST})
"""What they give out has the shape of x, whatever the inference makes of it."""


def whole(shape: Shape | None) -> tuple[int, ...] | None:
    """The shape where every length is known."""
    lengths = tuple(length for length in shape or () if isinstance(length, int))
    return lengths if shape is not None and len(lengths) == len(shape) else None


def better(told: Shape | None, found: Shape | None) -> Shape | None:
    """A shape that inference told, with what else was found out of it: lengths first, then names."""
    if told is None or found is None or len(told) != len(found):
        return told or found
    return tuple(b if not isinstance(a, int) and b is not None else a for a, b in zip(told, found, strict=True))


def rank_of(value: Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def positive(axis: int, rank: int | None) -> int | None:
    """The axis counted from the front; None where that takes a rank nobody knows, or there is no such axis."""
    if axis < 0:
        axis = -1 if rank is None else axis + rank
    return axis if axis >= 0 and (rank is None or axis < rank) else None


def positive_axes(axes: Sequence[int], rank: int | None) -> tuple[int, ...] | None:
    placed = [positive(axis, rank) for axis in axes]
    known = tuple(axis for axis in placed if axis is not None)
    return known if len(known) == len(placed) == len(set(known)) else None


@dataclass(frozen=True, eq=False)
class Site:
    """Where a neutral node stands in the file."""

    step: Step
    slots: tuple[int, ...]
    """Index among the node's inputs of each neutral slot, also of absent ones."""
    whole: bool = True
    """Whether the neutral node is all of the ONNX node; several may stand for one."""


def function_of(scope: Scope | None) -> FunctionKey | None:
    """The local function whose body a scope is, or lies in."""
    while scope is not None and scope.function is None:
        scope = scope.parent
    return None if scope is None else scope.function


class Builder:
    """Adds neutral nodes to `graph`, one ONNX node at a time."""

    def __init__(self, program: Program, kinds: Kinds) -> None:
        self.program = program
        self.kinds = kinds
        self.graph = Graph()
        self.pieces: dict[Value, list[Value]] = {}
        """Sequences that a value was cut into, and that only known places are taken from."""
        self.overridable: list[str] = []
        self._values: dict[tuple[int, str], Value] = {}
        self._constants = Constants()

    # values

    def at(self, step: Step, index: int) -> Value | None:
        """The node's input at `index`; None where it is absent."""
        inputs = step.node.inputs
        name = inputs[index] if index < len(inputs) else ""
        if not name:
            return None
        place = self.program.place(step.scope, name)
        # A name that nothing defines (a sparse initializer, a broken file) is still something that flows.
        return self.value(place or Place(step.scope, name))

    def out(self, step: Step, index: int) -> Value:
        """The node's output at `index`; one without a name is nobody's."""
        outputs = step.node.outputs
        if index < len(outputs) and outputs[index]:
            return self.value(Place(step.scope, outputs[index]))
        return Value(name="")

    def value(self, place: Place) -> Value:
        """The value of that name, made when it is first met."""
        key = (id(place.scope), place.name)
        if key not in self._values:
            self._values[key] = self._new(place)
        return self._values[key]

    def _new(self, place: Place) -> Value:
        scope, name = place
        kind = self.kinds.of(scope.graph, name)
        value = Value(name, kind.shape, kind.dtype, is_output=name in scope.outputs)
        tensor = scope.graph.tensors.get(name)
        if tensor is not None:
            if self.is_overridable(place):
                self.overridable.append(name)
                return value
            value.array = self.program.tensors.array(tensor)
        if value.array is not None:
            value.shape, value.dtype = value.array.shape, value.array.dtype
        return value

    def is_overridable(self, place: Place) -> bool:
        """Whether an initializer is only the default of an input."""
        main = place.scope is self.program.main
        if main and self.program.document.ir_version < INITIALIZERS_ARE_INPUTS:
            return False
        return place.name in place.scope.graph.inputs

    def constant(self, step: Step, index: int) -> ArrayRef | None:
        """The input at `index` where its values are known now."""
        place = self.program.operand(step, index)
        if place is None or self.is_overridable(self.program.source(place)):
            return None
        return self.program.constant(place)

    def scalar(self, step: Step, index: int) -> float | None:
        ref = self.constant(step, index)
        return None if ref is None or size(ref) != 1 else self.program.scalar(self.program.operand(step, index))

    def flag(self, step: Step, index: int) -> bool | None:
        """The input at `index`, a single boolean, where it is known."""
        ref = self.constant(step, index)
        return None if ref is None or size(ref) != 1 else bool(ref.numpy().reshape(-1)[0])

    def integers(self, step: Step, name: str | None, index: int | None) -> list[int] | None:
        """Axes or a shape, given as the attribute `name` (old opsets) or as the input at `index`."""
        if name is not None and self.program.attribute(step, name) is not None:
            return self.program.integers(step, name, None) or []
        numbers = None if index is None else self.numbers(step, index)
        return None if numbers is None or numbers.dtype.kind != "i" else [int(number) for number in numbers]

    def numbers(self, step: Step, index: int) -> NDArray[Any] | None:
        """A short list of numbers as the input at `index`, where they are known or can be worked out."""
        value = self.at(step, index)
        if value is None or value.shape is None or len(value.shape) > 1 or not self._constants.knows(value):
            return None
        if not all(isinstance(length, int) and length <= SMALL for length in value.shape):
            return None
        return self._constants.array(value).reshape(-1)

    def is_used(self, step: Step, index: int) -> bool:
        """Whether anybody takes the node's output at `index`."""
        name = step.node.outputs[index] if index < len(step.node.outputs) else ""
        if not name:
            return False
        uses = self.program.consumers(Place(step.scope, name))
        return bool(uses) or name in step.scope.outputs

    # nodes

    def add(
        self,
        step: Step,
        op: Op,
        slots: Sequence[int],
        attributes: Mapping[str, Any] | None = None,
        *,
        inputs: Sequence[Value | None] | None = None,
        outputs: Sequence[Value] | None = None,
        whole: bool = True,
        fixed: Fixed | None = None,
    ) -> Node:
        """Append a neutral node for `step`, whose slots are the ONNX node's inputs at `slots`.

        inputs, outputs: given where they are not simply those of the ONNX node and its first output.
        whole: False for one of several nodes that stand for one ONNX node; those stay as they are."""
        given = [self.at(step, index) for index in slots] if inputs is None else list(inputs)
        made = [self.out(step, 0)] if outputs is None else list(outputs)
        if op in SAME_SHAPE and given[0] is not None and made[0].name:
            made[0].shape = better(made[0].shape, given[0].shape)
        function = function_of(step.scope)
        if fixed is None and function is not None:
            fixed = Fixed(
                "in-function",
                f"it stands in the local function {function[1]}, which was not inlined",
            )
        elif fixed is None and not whole:
            fixed = Fixed("part-of-a-call", f"it is only a part of one {step.node.op} node")
        node = Node(
            op,
            given,
            made,
            dict(attributes or {}),
            written=step.node.origin,
            label=next((value.name for value in made if value.name), step.node.name),
            fixed=fixed,
            site=Site(step, tuple(slots), whole),
        )
        if op in (Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL):
            node.label = self._module(step) or node.label
        return self.graph.add(node)

    def _module(self, step: Step) -> str:
        """What a node with weights is called: the module that people named them after, else the node, else a weight."""
        places = []
        for index in (1, 0, 2):
            value = self.at(step, index)
            place = self.program.operand(step, index)
            if place is not None and value is not None and self._constants.knows(value):
                places.append(place)
                name = own_name(self.program, place)
                if name is not None:
                    return parent(clean(name)) or clean(name)
        return step.node.name or (places[0].name if places else "")

    def other(self, step: Step, fixed: Fixed | None = None) -> None:
        """A node that nothing passes: all inputs, all outputs."""
        slots = [index for index, name in enumerate(step.node.inputs) if name]
        outputs = [self.out(step, index) for index, name in enumerate(step.node.outputs) if name]
        self.add(step, Op.OTHER, slots, outputs=outputs or [Value(name="")], fixed=fixed)

    def extras(self, step: Step, *indices: int) -> bool:
        """Further outputs that somebody uses, as if something unknown made them of x. Whether there are any."""
        used = [self.out(step, index) for index in indices if self.is_used(step, index)]
        if used:
            self.add(step, Op.OTHER, (0,), outputs=used, whole=False)
        return bool(used)

    def sink(self, step: Step, slots: Sequence[int]) -> None:
        """Inputs that are no data and still must not change: a computed shape, a limit."""
        given = [(slot, self.at(step, slot)) for slot in slots]
        open_ = [slot for slot, value in given if value is not None and value.array is None]
        if open_:
            self.add(step, Op.OTHER, open_, outputs=[Value(name="")], whole=False)

    def temporary(self, like: Value, shape: Shape | None) -> Value:
        """A value between two neutral nodes that stand for one."""
        return Value(name="", shape=shape, dtype=like.dtype)
