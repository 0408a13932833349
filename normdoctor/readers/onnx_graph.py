"""Who makes a value and who uses it, across subgraphs and local functions; and what is constant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normdoctor.layers import ArrayRef
from normdoctor.readers.onnx_arrays import DTYPES, MAX_DIMS, Made, Tensors, cast, computed, filled, reshaped, size
from normdoctor.readers.onnx_records import LOCAL_DOMAINS, Attribute, Document, FunctionKey, Graph, Node

MAX_EXPANDED = 100_000
"""Nodes looked at inside functions, counted once per call: functions that call functions multiply."""

MAX_CALLS = 40
"""Functions inside functions."""

MAX_CHAIN = 64
"""Nodes followed from a parameter to the initializer behind it."""

FIRST_INPUTS = 16

SMALL = 64
"""Elements of a shape or a list of axes."""

CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})

PASSING = frozenset({"Identity", "Cast", "CastLike"})
"""Ops that hand their first input on, give or take its element type."""

RESHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand"})

ARITHMETIC: dict[str, np.ufunc] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
}

EVALUATED = PASSING | RESHAPING | ARITHMETIC.keys() | {"ConstantOfShape", "Concat", "Range", "DequantizeLinear"}
"""Ops whose result is a constant when their inputs are."""


@dataclass(eq=False)
class Scope:
    """One graph as it is reached: the main graph, a body of If, Loop or Scan, or a function at one call."""

    graph: Graph
    opsets: dict[str, int]
    parent: Scope | None = None
    caller: Step | None = None
    function: FunctionKey | None = None
    bound: dict[str, Place | None] = field(default_factory=dict)
    """Functions only: each parameter as what the caller passes for it."""
    producers: dict[str, Node] = field(default_factory=dict)
    defined: set[str] = field(default_factory=set)
    uses: dict[str, list[Step]] = field(default_factory=dict)
    aliases: dict[str, Place | None] = field(default_factory=dict)
    """What a call of a local function gives out, as the value inside the function."""
    outputs: set[str] = field(default_factory=set)
    """Values that leave the graph; a function's do not, they are followed to who uses them."""

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators (1 where the file names none)."""
        return self.opsets.get("", 1)


class Step(NamedTuple):
    """A node where it stands."""

    scope: Scope
    node: Node


class Place(NamedTuple):
    """A value: a name and the scope that defines it."""

    scope: Scope
    name: str


class Program:
    """A whole model: every node of every graph in order, functions at each of their calls.

    `notes` says what could not be followed."""

    def __init__(self, document: Document, tensors: Tensors) -> None:
        self.document = document
        self.tensors = tensors
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self._expanded = 0
        self._constants: dict[tuple[int, str], ArrayRef | None] = {}
        self.main = Scope(document.graph, document.opsets)
        self._enter(self.main, ())

    def _enter(self, scope: Scope, calls: tuple[FunctionKey, ...]) -> None:
        graph = scope.graph
        for node in graph.nodes:
            for name in node.outputs:
                scope.producers[name] = node
        scope.defined = {*graph.inputs, *graph.tensors, *scope.producers}
        for node in graph.nodes:
            step = Step(scope, node)
            self.steps.append(step)
            key = ("" if node.domain in LOCAL_DOMAINS else node.domain, node.op, node.overload)
            function = self.document.functions.get(key)
            if function is not None:
                self._call(step, key, function, calls)
                continue
            # A node that only asks for the shape or the type of a value does not stand in its way.
            taken = {"Shape": 0, "Size": 0, "CastLike": 1}.get(node.op, len(node.inputs))
            for name in node.inputs[:taken]:
                self._use(scope, name, step)
            if node.op in CONTROL_FLOW and node.domain in LOCAL_DOMAINS:
                for attribute in self.document.attributes(node).values():
                    for body in attribute.graphs:
                        self._enter(Scope(body, scope.opsets, parent=scope), calls)
        for name in graph.outputs if scope.function is None else ():
            # A body may give out a value of the graph around it; that use shows nowhere else.
            place = self.place(scope, name)
            if place is not None:
                place.scope.outputs.add(place.name)

    def _call(self, step: Step, key: FunctionKey, function: Graph, calls: tuple[FunctionKey, ...]) -> None:
        self._expanded += len(function.nodes)
        if key in calls or len(calls) >= MAX_CALLS or self._expanded > MAX_EXPANDED:
            if not self.notes:
                self.notes.append(
                    f"functions were not looked into at every call (first {key[1]}: too deep or too many)"
                )
            for name in step.node.inputs:
                self._use(step.scope, name, step)
            return
        given = step.node.inputs + [""] * (len(function.inputs) - len(step.node.inputs))
        bound = {name: self.place(step.scope, value) for name, value in zip(function.inputs, given, strict=False)}
        opsets = function.opsets or self.document.opsets
        body = Scope(function, opsets, caller=step, function=key, bound=bound)
        self._enter(body, (*calls, key))
        for name, inside in zip(step.node.outputs, function.outputs, strict=False):
            step.scope.aliases[name] = self.place(body, inside)

    def _use(self, scope: Scope, name: str, step: Step) -> None:
        place = self.place(scope, name)
        if place is not None:
            place.scope.uses.setdefault(place.name, []).append(step)

    def place(self, scope: Scope, name: str) -> Place | None:
        """Where the value called `name` in `scope` comes from; None for an absent optional input."""
        inner: Scope | None = scope
        while inner is not None and name:
            if name in inner.bound:
                return inner.bound[name]
            if name in inner.aliases:
                return inner.aliases[name]
            if name in inner.defined:
                return Place(inner, name)
            inner = inner.parent
        return None

    def operand(self, step: Step, index: int) -> Place | None:
        """The node's input at `index`, or None."""
        inputs = step.node.inputs
        return self.place(step.scope, inputs[index]) if index < len(inputs) else None

    def operands(self, step: Step) -> Iterator[Place]:
        """The node's inputs that are given; of a Concat or Sum of very many only the first."""
        for index in range(min(len(step.node.inputs), FIRST_INPUTS)):
            place = self.operand(step, index)
            if place is not None:
                yield place

    def producer(self, place: Place | None) -> Step | None:
        """The node that makes a value; None for an input or an initializer."""
        if place is None or place.name in place.scope.graph.tensors:
            return None
        node = place.scope.producers.get(place.name)
        return None if node is None else Step(place.scope, node)

    def consumers(self, place: Place) -> list[Step]:
        """The nodes that use a value, once per use."""
        return place.scope.uses.get(place.name, [])

    def attribute(self, step: Step, name: str) -> Attribute | None:
        """The node's attribute; inside a function what the call gives for it, or the function's default."""
        found = self.document.attributes(step.node).get(name)
        if found is None or not found.reference:
            return found
        scope: Scope | None = step.scope
        while scope is not None and scope.caller is None:
            scope = scope.parent
        if scope is None or scope.caller is None:
            return None
        given = self.attribute(scope.caller, found.reference)
        if given is not None:
            return given
        defaults = (self.document.read_attribute(span) for span in scope.graph.defaults)
        return next((default for default in defaults if default.name == found.reference), None)

    def number(self, step: Step, name: str, default: float) -> float:
        found = self.attribute(step, name)
        return default if found is None or found.number is None else found.number

    def integer(self, step: Step, name: str, default: int) -> int:
        found = self.attribute(step, name)
        return default if found is None or found.integer is None else found.integer

    def text(self, step: Step, name: str, default: str) -> str:
        """A short text: a mode."""
        found = self.attribute(step, name)
        if found is None or found.string is None or found.string.end - found.string.start > SMALL:
            return default
        return self.document.wire.text(found.string.start, found.string.end)

    def floats(self, step: Step, name: str) -> list[float] | None:
        """A short list of numbers given as an attribute."""
        found = self.attribute(step, name)
        if found is None or not found.floats:
            return None
        given = self._floats(found, ())
        return None if given.shape[0] > SMALL else [float(value) for value in given.numpy()]

    def integers(self, step: Step, name: str | None, index: int | None) -> list[int] | None:
        """Axes or a shape, given as an attribute (old opsets) or as the input at `index`."""
        found = None if name is None else self.attribute(step, name)
        if found is not None and found.ints:
            return self.document.integers(found.ints, limit=SMALL)
        place = None if index is None else self.operand(step, index)
        ref = None if place is None else self.constant(place)
        if ref is None or size(ref) > SMALL or not ref.dtype.startswith("int"):
            return None
        return [int(value) for value in ref.numpy().reshape(-1)]

    def scalar(self, place: Place | None) -> float | None:
        """The value of a constant of one element."""
        ref = None if place is None else self.constant(place)
        if ref is None or size(ref) != 1:
            return None
        value = ref.numpy().reshape(-1)[0]
        if value.dtype.kind not in "fiu":
            return None
        # Through its decimal: the float32 1e-05 means 1e-05 and not 9.99999974e-06.
        return float(str(value))

    def source(self, place: Place) -> Place:
        """What stands behind Identity, Cast and CastLike."""
        for _ in range(MAX_CHAIN):
            step = self.producer(place)
            before = None if step is None or step.node.op not in PASSING else self.operand(step, 0)
            if before is None:
                break
            place = before
        return place

    def constant(self, place: Place, depth: int = 0) -> ArrayRef | None:
        """The value as a reference, where it is known without running the model.

        Raises InputError where the file says it is constant and its data is not there."""
        key = (id(place.scope), place.name)
        if key not in self._constants:
            # None while it is being worked out: a value that depends on itself is no constant.
            self._constants[key] = None
            tensor = place.scope.graph.tensors.get(place.name)
            step = self.producer(place)
            if tensor is not None:
                self._constants[key] = self.tensors.array(tensor)
            elif step is not None and depth <= MAX_CHAIN and step.node.domain in LOCAL_DOMAINS:
                self._constants[key] = self._evaluate(step, depth + 1)
        return self._constants[key]

    def _evaluate(self, step: Step, depth: int) -> ArrayRef | None:
        op = step.node.op
        if op == "Constant":
            return self._constant_node(step)
        if op not in EVALUATED:
            return None
        operands = [self.operand(step, index) for index in range(len(step.node.inputs))]
        if op in PASSING | RESHAPING:
            base = self.constant(operands[0], depth) if operands and operands[0] is not None else None
            if base is None:
                return None
            return self._recast(step, base) if op in PASSING else self._reshape(step, base)
        identity = (id(self.document), "made", step.node.span.start, id(step.scope))
        if op == "ConstantOfShape":
            return self._constant_of_shape(step, identity)
        refs = [None if place is None else self.constant(place, depth) for place in operands]
        known = [ref for ref in refs if ref is not None]
        if len(known) != len(refs) or not known:
            return None
        if op == "Range":
            return self._range(known, identity)
        if op == "Concat":
            return self._concat(known, identity)
        if op == "DequantizeLinear":
            return self._dequantized(known, identity) if len(known) in (2, 3) else None
        if len(known) != ARITHMETIC[op].nin:
            return None
        return computed(ARITHMETIC[op], known, identity)

    def _constant_node(self, step: Step) -> ArrayRef | None:
        identity = (id(self.document), "constant", step.node.span.start)
        for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
            given = self.attribute(step, name)
            if given is None:
                continue
            if given.tensor is not None:
                return self.tensors.array(given.tensor)
            if given.number is not None:
                return _known(np.asarray(given.number, dtype=np.float32), identity)
            if given.integer is not None:
                return _known(np.asarray(given.integer, dtype=np.int64), identity)
            if given.ints:
                values = self.document.integers(given.ints, limit=1 << 16)
                return _known(np.asarray(values, dtype=np.int64), identity)
            if given.floats:
                return self._floats(given, identity)
        return None

    def _floats(self, given: Attribute, identity: tuple[Any, ...]) -> Made:
        nbytes = sum(end - start for _, start, end in given.floats)
        read = self.document.source.read_at
        return Made(
            (nbytes // 4,),
            "float32",
            identity,
            lambda: np.frombuffer(b"".join(read(a, b - a) for _, a, b in given.floats)[: nbytes // 4 * 4], "<f4"),
        )

    def _constant_of_shape(self, step: Step, identity: tuple[Any, ...]) -> ArrayRef | None:
        shape = self.integers(step, None, 0)
        if shape is None or min((0, *shape)) < 0:
            return None
        given = self.attribute(step, "value")
        base: ArrayRef | None = _known(np.zeros((), dtype=np.float32), identity)
        if given is not None and given.tensor is not None:
            base = self.tensors.array(given.tensor)
        return None if base is None or size(base) != 1 else filled(reshaped(base, ()), tuple(shape), identity)

    def _recast(self, step: Step, base: ArrayRef) -> ArrayRef | None:
        if step.node.op != "Cast":
            # CastLike takes the type of a value that flows; the stored one says as much about the numbers.
            return base
        return cast(base, DTYPES.get(self.integer(step, "to", 0), ""))

    def _reshape(self, step: Step, base: ArrayRef) -> ArrayRef | None:
        shape = self._new_shape(step, base)
        if shape is None or len(shape) > MAX_DIMS:
            return None
        if step.node.op == "Expand":
            if size(base) == math.prod(shape):
                return reshaped(base, shape)
            identity = (id(self.document), "made", step.node.span.start, id(step.scope))
            return filled(base, shape, identity)
        return reshaped(base, shape) if math.prod(shape) == size(base) else None

    def _new_shape(self, step: Step, base: ArrayRef) -> tuple[int, ...] | None:
        """The shape that a reshaping node gives to `base`, None where it cannot be told or moves values."""
        op, old = step.node.op, base.shape
        if op == "Transpose":
            if sum(length != 1 for length in old) > 1:
                return None
            order = self.integers(step, "perm", None) or list(range(len(old)))[::-1]
            return tuple(old[axis] for axis in order) if sorted(order) == list(range(len(old))) else None
        if op == "Flatten":
            axis = self.integer(step, "axis", 1)
            return (math.prod(old[:axis]), math.prod(old[axis:]))
        if op == "Expand":
            wanted = self.integers(step, None, 1)
            if wanted is None:
                # The exporter's filler for an absent weight: one number, as often as the input needs.
                return old if size(base) == 1 else None
            try:
                return np.broadcast_shapes(old, tuple(wanted))
            except ValueError:
                return None
        given = self.integers(step, "shape" if op == "Reshape" else "axes", 1)
        if op == "Reshape":
            return None if given is None else resolved(given, old)
        if given is None:
            return tuple(length for length in old if length != 1) if op == "Squeeze" else None
        rank = len(old) + (len(given) if op == "Unsqueeze" else 0)
        axes = {axis + rank if axis < 0 else axis for axis in given}
        if any(axis < 0 or axis >= rank for axis in axes) or len(axes) != len(given):
            return None
        if op == "Squeeze":
            return tuple(length for axis, length in enumerate(old) if axis not in axes)
        rest = iter(old)
        return tuple(1 if axis in axes else next(rest) for axis in range(rank))

    def _range(self, refs: list[ArrayRef], identity: tuple[Any, ...]) -> ArrayRef | None:
        if len(refs) != 3 or any(size(ref) != 1 or not ref.dtype.startswith("int") for ref in refs):
            return None
        start, limit, step = (int(ref.numpy().reshape(-1)[0]) for ref in refs)
        if step == 0 or len(range(start, limit, step)) > SMALL:
            return None
        values = np.arange(start, limit, step, dtype=np.int64)
        return _known(values, identity)

    def _concat(self, refs: list[ArrayRef], identity: tuple[Any, ...]) -> ArrayRef | None:
        """A shape put together from its lengths, as exporters do."""
        if sum(map(size, refs)) > SMALL or any(len(ref.shape) != 1 or ref.dtype != "int64" for ref in refs):
            return None
        return _known(np.concatenate([ref.numpy() for ref in refs]), identity)

    def _dequantized(self, refs: list[ArrayRef], identity: tuple[Any, ...]) -> ArrayRef | None:
        stored, scale = refs[0], refs[1]
        if size(scale) != 1 or any(size(ref) != 1 for ref in refs[1:]):
            return None
        zero = refs[2:] or [_known(np.zeros((), dtype=np.float32), ())]
        # computed() rounds to the type of its first operand: the scale's, as DequantizeLinear does.
        scale = reshaped(scale, ())
        return computed(lambda s, x, z: (x - z) * s, [scale, stored, reshaped(zero[0], ())], identity)


def _known(values: NDArray[Any], identity: tuple[Any, ...]) -> Made:
    return Made(values.shape, str(values.dtype), identity, lambda: values)


def resolved(wanted: list[int], old: tuple[int, ...]) -> tuple[int, ...] | None:
    """Reshape's target with its 0 (keep) and -1 (the rest) filled in."""
    shape = [old[axis] if length == 0 and axis < len(old) else length for axis, length in enumerate(wanted)]
    if shape.count(-1) == 1:
        rest = math.prod(length for length in shape if length != -1)
        if rest <= 0 or math.prod(old) % rest:
            return None
        shape[shape.index(-1)] = math.prod(old) // rest
    return tuple(shape) if min((0, *shape)) >= 0 else None
