"""The graph of a TorchScript module → steps that Python takes one by one, with every value let go of when it was used
for the last time.

What depends on the module alone (its attributes, its mode, settings) is worked out before; of a branch that it
decides only the way taken is left. Nothing here imports torch: what needs it comes in through `Engine`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from normdoctor.programs.script_values import ATTRIBUTES, BLIND, CONTAINERS, CONTEXTS, FOLDED, PLAIN, Function, nothing

Values = list[Any]
"""What every value of the graph is at the moment, by its number; None where it is not there (any more)."""


class Engine(Protocol):
    """What the steps need of torch."""

    def attribute(self, owner: Any, name: str) -> Any:
        """An attribute of a module: a module, a tensor (the same object each time), a setting."""

    def is_tensor(self, value: Any) -> bool: ...

    def operator(self, node: Any) -> Function | None:
        """What computes an operator, all its arguments given by place; None where nothing does."""

    def norm(self, node: Any, known: Sequence[tuple[bool, Any]]) -> Function | None:
        """A norm in the place of an operator: it is called with all arguments by place, and takes the first. known:
        of every argument whether it is known and what it is. None where the node is no norm on stored statistics."""

    def used(self, node: Any, tensors: Iterable[Any]) -> None:
        """A step that is no norm takes these tensors of the module."""

    def record(self, node: Any) -> Function | None:
        """What makes a tuple whose fields have names; None for other tuples."""

    def refusal(self, kind: str) -> Exception:
        """Why a graph with this operator cannot be followed."""


@dataclass
class Step:
    """One operator."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    function: Function | None = None
    bodies: tuple[Body, ...] = ()
    """The two ways of prim::If, the body of prim::Loop."""
    drops: tuple[int, ...] = ()
    """The values that nobody needs after it."""


@dataclass
class Body:
    """Steps one after the other."""

    steps: list[Step] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    results: tuple[int, ...] = ()
    own: tuple[int, ...] = ()
    """Those of the results that were made inside."""


@dataclass(frozen=True, eq=False)
class Code:
    """A graph, ready to be run."""

    body: Body
    start: Values
    """What is known before it begins."""

    def run(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Give the outputs of the graph. arguments: its inputs in order, the module itself left out."""
        values = list(self.start)
        for place, value in zip(self.body.inputs, arguments, strict=True):
            values[place] = value
        del arguments
        _run(self.body, values)
        return tuple(values[place] for place in self.body.results)


def compile_graph(graph: Any, module: Any, engine: Engine) -> Code:
    """The steps of an inlined graph, whose first input is the module. Raises what `engine.refusal` gives."""
    compiler = _Compiler(engine)
    owner, *inputs = graph.inputs()
    compiler.know(owner, module)
    body = Body(inputs=tuple(map(compiler.number, inputs)))
    compiler.add_all(graph.nodes(), body, inside=False)
    body.results = tuple(map(compiler.number, graph.outputs()))
    _let_go(body, set(compiler.known))
    start: Values = [None] * compiler.count
    for number, value in compiler.known.items():
        start[number] = value
    return Code(body, start)


class _Compiler:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers: dict[str, int] = {}
        self.known: dict[int, Any] = {}
        self.count = 0

    def number(self, value: Any) -> int:
        """The number of a value of the graph."""
        name = value.debugName()
        if name not in self._numbers:
            self._numbers[name] = self.count
            self.count += 1
        return self._numbers[name]

    def know(self, value: Any, content: Any) -> None:
        self.known[self.number(value)] = content

    def add_all(self, nodes: Iterable[Any], body: Body, *, inside: bool) -> None:
        """inside: of a branch or a loop, so that it is not sure that it is ever run."""
        for node in nodes:
            self._add(node, body, inside)

    def _add(self, node: Any, body: Body, inside: bool) -> None:
        kind = node.kind()
        inputs = tuple(map(self.number, node.inputs()))
        if kind == "prim::Constant":
            self.know(node.output(), _constant(node))
        elif kind == "prim::Uninitialized":
            self.number(node.output())  # stays None, but says nothing
        elif kind == "prim::GetAttr" and inputs[0] in self.known:
            self.know(node.output(), self._engine.attribute(self.known[inputs[0]], node.s("name")))
        elif kind == "prim::If":
            self._add_branches(node, inputs[0], body)
        elif kind == "prim::Loop":
            (block,) = node.blocks()
            loop = self._body(block)
            body.steps.append(Step(kind, inputs, tuple(map(self.number, node.outputs())), None, (loop,)))
        else:
            self._add_call(node, kind, inputs, body, inside)

    def _add_branches(self, node: Any, condition: int, body: Body) -> None:
        yes, no = node.blocks()
        if condition not in self.known:
            outputs = tuple(map(self.number, node.outputs()))
            body.steps.append(Step("prim::If", (condition,), outputs, None, (self._body(yes), self._body(no))))
            return
        taken = yes if self.known[condition] else no
        self.add_all(taken.nodes(), body, inside=False)
        for value, inner in zip(node.outputs(), taken.outputs(), strict=True):
            self._numbers[value.debugName()] = self.number(inner)

    def _body(self, block: Any) -> Body:
        made = Body(inputs=tuple(map(self.number, block.inputs())))
        self.add_all(block.nodes(), made, inside=True)
        made.results = tuple(map(self.number, block.outputs()))
        return made

    def _add_call(self, node: Any, kind: str, inputs: tuple[int, ...], body: Body, inside: bool) -> None:
        given = [(number in self.known, self.known.get(number)) for number in inputs]
        norm = self._engine.norm(node, given)
        function = norm or self._function(node, kind, given)
        outputs = list(node.outputs())
        if function is None:
            refusal = self._engine.refusal(kind)
            if not inside:
                raise refusal
            function = _raising(refusal)  # mostly in branches that only say what is wrong with the input
        elif norm is None:
            if self._is_settled(kind, given):
                with suppress(Exception):  # on a way that is never gone
                    self.know(outputs[0], function(*(content for _, content in given)))
                    return
            tensors = [content for known, content in given if known and self._engine.is_tensor(content)]
            self._engine.used(node, tensors)
        body.steps.append(Step(kind, inputs, tuple(map(self.number, outputs)), function))

    def _function(self, node: Any, kind: str, given: Sequence[tuple[bool, Any]]) -> Function | None:
        if kind in ATTRIBUTES:  # of a module only reading is left, and was done before
            return None if given[0][0] else partial(ATTRIBUTES[kind], name=node.s("name"))
        if kind in ("prim::Enter", "prim::Exit"):
            return nothing if node.inputsAt(0).type().str().endswith(CONTEXTS) else None
        if kind in ("prim::ListUnpack", "prim::TupleUnpack"):
            return _unpacking(len(list(node.outputs())))
        if kind == "prim::TupleSlice":
            part = slice(node.i("beg"), node.i("end"))
            return lambda values: values[part]
        if kind == "prim::TupleConstruct":
            return self._engine.record(node) or PLAIN[kind]
        if kind in CONTAINERS and node.inputsSize() and node.inputsAt(0).type().kind() in ("ListType", "DictType"):
            return CONTAINERS[kind]
        return PLAIN.get(kind) or self._engine.operator(node)

    def _is_settled(self, kind: str, given: Sequence[tuple[bool, Any]]) -> bool:
        if kind not in FOLDED or not all(known for known, _ in given):
            return False
        plain = (bool, int, float, str, type(None))
        return kind in BLIND or all(isinstance(content, plain) for _, content in given)


def _constant(node: Any) -> Any:
    if node.mustBeNone():
        return None
    try:
        return node.output().toIValue()
    except RuntimeError:  # a function that was put in where it is called
        return None


def _unpacking(count: int) -> Function:
    def unpack(values: Any) -> Any:
        if len(values) != count:
            raise RuntimeError(f"Expected {count} elements in a list but found {len(values)}")
        return values[0] if count == 1 else values

    return unpack


def _raising(error: Exception) -> Function:
    def fail(*_: Any) -> None:
        raise error

    return fail


# when a value is let go of


def _free(body: Body) -> set[int]:
    """The values from outside that a body takes."""
    found = set(body.results) - set(_made(body))
    for step in body.steps:
        found.update(step.inputs)
        for inner in step.bodies:
            found |= _free(inner)
    return found - set(_made(body))


def _made(body: Body) -> Iterator[int]:
    yield from body.inputs
    for step in body.steps:
        yield from step.outputs


def _let_go(body: Body, kept: set[int]) -> None:
    """Fill in `drops`. kept: the values that are needed after the body, or at any time."""
    live = kept | set(body.results)
    body.own = tuple(set(body.results) & set(_made(body)) - kept)
    for step in reversed(body.steps):
        used = set(step.inputs)
        for inner in step.bodies:
            outside = _free(inner)
            used |= outside
            # a loop comes back to what it takes from outside; a branch does not
            _let_go(inner, live | (outside if step.kind == "prim::Loop" else set()))
        step.drops = tuple(sorted((used | set(step.outputs)) - live))
        live |= used
        live -= set(step.outputs) - kept


# running


def _run(body: Body, values: Values) -> None:
    for step in body.steps:
        if step.function is not None:
            _store(step.outputs, values, step.function(*[values[place] for place in step.inputs]))
        elif step.kind == "prim::If":
            taken = step.bodies[0 if values[step.inputs[0]] else 1]
            _run(taken, values)
            _hand_over(taken, taken.results, step.outputs, values)
        else:
            _loop(step, values)
        for place in step.drops:
            values[place] = None


def _store(outputs: tuple[int, ...], values: Values, result: Any) -> None:
    if len(outputs) == 1:
        values[outputs[0]] = result
    elif outputs:
        for place, value in zip(outputs, result, strict=True):
            values[place] = value


def _hand_over(body: Body, results: Sequence[int], places: Sequence[int], values: Values) -> None:
    """Put the results of a body where they are wanted, and let go of them inside."""
    found = [values[place] for place in results]
    for place in body.own:
        values[place] = None
    for place, value in zip(places, found, strict=True):
        values[place] = value


def _loop(step: Step, values: Values) -> None:
    (body,) = step.bodies
    counter, *carried = body.inputs
    most, going, *first = (values[place] for place in step.inputs)
    for place, value in zip(carried, first, strict=True):
        values[place] = value
    del first
    count = 0
    while going and count < most:
        values[counter] = count
        _run(body, values)
        going = values[body.results[0]]
        _hand_over(body, body.results[1:], carried, values)
        count += 1
    found = [values[place] for place in carried]
    for place in carried:
        values[place] = None
    _store(step.outputs, values, found[0] if len(found) == 1 else found)
