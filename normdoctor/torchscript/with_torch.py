"""A TorchScript module, frozen → the neutral graph; a fold plan → the frozen module without its norms.

torch.jit.freeze makes one graph of a module in eval mode, its parameters constants of it. In a graph every site can
have a weight of its own, so nothing here is as strict as in module code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from normdoctor.errors import RefusedError
from normdoctor.flow.graph import Graph, Node, Op, Shape, Value
from normdoctor.flow.plan import FoldPlan
from normdoctor.layers import NormKind, NormLayer
from normdoctor.models.architecture import one_line
from normdoctor.models.inputs import Example
from normdoctor.models.loaded import Loaded, in_order
from normdoctor.models.with_torch import copied, device_of, quiet, run
from normdoctor.readers.arrays import decode, encode
from normdoctor.readers.aten import Call, Site, build
from normdoctor.readers.aten_overwriting import OVERWRITTEN, overwritten
from normdoctor.readers.live_module import LiveArray
from normdoctor.writing import replacing

METADATA = frozenset(
    {"size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "is_complex", "element_size", "len"}
)
"""Operators of aten that ask for the shape or type of a tensor, not for its values."""

METADATA_PRIMS = frozenset(
    {"prim::dtype", "prim::device", "prim::layout", "prim::is_cuda", "prim::shape", "prim::type"}
)

CONVOLUTION_MODE = "aten::_convolution_mode"
"""Convolutions that say their padding in a word."""

TO_ONNX = "Fold it on its way to ONNX: --export onnx --input-shape ..."

FROZEN = (
    "the folded module is frozen: its parameters are constants, it is in eval mode for good, and .to() does not move "
    "it (torch.jit.load(map_location=...) does)"
)


@dataclass(frozen=True, eq=False)
class Script:
    """The neutral graph of a frozen module."""

    loaded: Loaded
    graph: Graph
    any_batch: bool


def read_script(loaded: Loaded, example: Example, layers: Mapping[str, NormLayer]) -> Script:
    """The graph of a TorchScript module in eval mode. layers: its norms by name, as the reader found them.

    Raises CannotRunError for inputs that do not fit, RefusedError for a module that cannot be frozen."""
    run(loaded, example)
    others = sorted(name for name in loaded.model._c._method_names() if name != "forward" and name[:2] != "__")
    if others:
        raise RefusedError(f"{loaded.name}: has the methods {', '.join(others)} beside forward", TO_ONNX)
    frozen = _freeze(loaded)
    shapes, any_batch = _shapes(frozen, loaded, example)
    reader = _Reader(shapes)
    for place, node in enumerate(frozen.graph.nodes()):
        reader.read(place, node)
    outputs = [found for value in frozen.graph.outputs() for found in reader.tensors(value)]
    graph = build(reader.calls, outputs, reader.outside)
    for node in graph.nodes:
        _name(node, layers)
    _name_in_order(graph, layers)
    for node in graph.of(Op.BATCH_NORM):
        if node.layer is not None and node.layer.training and not loaded.evaluation:
            node.attributes["training"] = True
    return Script(loaded, graph, any_batch)


def _freeze(loaded: Loaded) -> Any:
    module = copied(loaded.model)
    try:
        with quiet(), torch.no_grad():
            frozen = torch.jit.freeze(module.eval(), optimize_numerics=False)
    except Exception as error:
        if any(True for _ in module.parameters()):
            raise RefusedError(f"{loaded.name}: cannot be frozen ({one_line(error)})", TO_ONNX) from error
        frozen = module  # frozen already
    return frozen


def _shapes(frozen: Any, loaded: Loaded, example: Example) -> tuple[dict[str, tuple[Shape, str]], bool]:
    """Shape and type of each tensor of the graph by name, and whether the first axis of the inputs is free.

    The graph is run with all tensors as outputs, with one more sample too: what changes depends on the batch."""
    inputs = in_order(loaded, example)
    try:
        first = _run_all(frozen, inputs)
    except Exception as error:
        raise RefusedError(f"{loaded.name}: its graph cannot be followed ({one_line(error)})", TO_ONNX) from error
    tensors = [value for value in inputs if isinstance(value, torch.Tensor) and value.ndim > 1]
    lengths = {tensor.shape[0] for tensor in tensors}
    found = {name: (tuple(shape), dtype) for name, (shape, dtype) in first.items()}
    if len(lengths) != 1:
        return dict(found), False
    batch = lengths.pop()
    larger = [torch.cat([v, v[:1]]) if isinstance(v, torch.Tensor) and _begins_with(v, batch) else v for v in inputs]
    try:
        second = _run_all(frozen, larger)
    except Exception:  # the code takes no other batch size
        return dict(found), False

    def length(before: int, after: int) -> int | str | None:
        return before if before == after else "batch" if (before, after) == (batch, batch + 1) else None

    free: dict[str, tuple[Shape, str]] = {}
    for name, (shape, dtype) in first.items():
        other = second[name][0]
        if len(other) == len(shape):
            free[name] = tuple(map(length, shape, other)), dtype
    return free, True


def _begins_with(tensor: torch.Tensor, batch: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == batch


def _run_all(frozen: Any, inputs: list[Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    graph = frozen.graph.copy()
    count = len(list(graph.outputs()))
    names = []
    for own, value in zip(_all_values(frozen.graph), _all_values(graph), strict=True):  # a copy has other names
        if value.type().kind() == "TensorType" and not _may_be_nothing(value.node()):
            graph.registerOutput(value)
            names.append(own.debugName())
    graph.makeMultiOutputIntoTuple()
    function = torch._C._create_function_from_graph("every_tensor", graph)
    with quiet(), torch.no_grad():
        results = function(frozen._c, *inputs)
    tensors = results[count:] if isinstance(results, tuple) else (results,)
    return {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in zip(names, tensors, strict=True)
    }


def _may_be_nothing(node: Any) -> bool:
    """Whether a value is never made on some way through the code: one that ends in an exception."""
    made = [node, *(value.node() for block in node.blocks() for value in block.outputs())]
    return any(entry.kind() == "prim::Uninitialized" for entry in made)


def _all_values(graph: Any) -> list[Any]:
    return [*graph.inputs(), *(output for node in graph.nodes() for output in node.outputs())]


class _Reader:
    def __init__(self, shapes: Mapping[str, tuple[Shape, str]]) -> None:
        self._shapes = shapes
        self._values: dict[str, Any] = {}
        """Name → Value, a list of them, a plain argument, None for what depends on the input."""
        self.calls: list[Call] = []
        self.outside: list[Value] = []

    def read(self, place: int, node: Any) -> None:
        kind = node.kind()
        inputs = [self.of(value) for value in node.inputs()]
        outputs = list(node.outputs())
        if kind == "prim::Constant":
            self._values[outputs[0].debugName()] = self._constant(outputs[0])
        elif kind in ("prim::ListConstruct", "prim::TupleConstruct"):
            self._values[outputs[0].debugName()] = inputs
        elif kind in ("prim::ListUnpack", "prim::TupleUnpack") and isinstance(inputs[0], list):
            self._values.update(zip((value.debugName() for value in outputs), inputs[0], strict=False))
        elif kind in METADATA_PRIMS or (kind.startswith("aten::") and kind[6:] in METADATA):
            pass
        elif kind.startswith("aten::"):
            schema = torch._C.parse_schema(node.schema())
            names = [argument.name for argument in schema.arguments]
            given = dict(zip(names, inputs, strict=False))
            name = "conv2d" if kind == CONVOLUTION_MODE else kind[6:]  # of any number of axes
            self._add(place, node, name, schema.overload_name, given)
        else:
            for value in _taken_inside(node):
                for found in self.tensors(value):
                    found.is_output = True
            self._add(place, node, kind, "", {str(number): value for number, value in enumerate(inputs)})

    def of(self, value: Any) -> Any:
        """What a value of TorchScript's is; an input of the graph is met here for the first time."""
        name = value.debugName()
        if name not in self._values and value.type().kind() == "TensorType":
            self._values[name] = self._value(value)
            self.outside.append(self._values[name])
        return self._values.get(name)

    def tensors(self, value: Any) -> Iterator[Value]:
        """The tensors that a value is or holds."""
        waiting = [self.of(value)]
        while waiting:
            found = waiting.pop(0)
            if isinstance(found, Value):
                yield found
            elif isinstance(found, list):
                waiting += found

    def _constant(self, value: Any) -> Any:
        try:
            content = value.toIValue()
        except RuntimeError:  # a value that is never used uninitialised
            return None
        if not isinstance(content, torch.Tensor):
            return content if isinstance(content, (bool, int, float, str, list)) else None
        array = LiveArray(content)
        made = Value(value.debugName().removeprefix("self."), array.shape, array.dtype, array)
        self.outside.append(made)
        return made

    def _value(self, value: Any) -> Value:
        shape, dtype = self._shapes.get(value.debugName(), (None, None))
        return Value(value.debugName(), shape, dtype)

    def _add(self, place: int, node: Any, name: str, overload: str, given: dict[str, Any]) -> None:
        outputs = list(node.outputs())
        made: list[Value] = []
        for value in outputs:
            if value.type().kind() == "TensorType":
                made.append(self._value(value))
                self._values[value.debugName()] = made[-1]
            elif value.type().kind() == "ListType":
                uses = value.uses()
                if len(uses) == 1 and uses[0].user.kind() == "prim::ListUnpack":
                    parts = [self._value(part) for part in uses[0].user.outputs()]
                    made += parts
                    self._values[value.debugName()] = parts
                    continue
                made.append(Value(value.debugName(), is_output=True))
        self.calls.append(Call(name, overload, given, made or [Value(f"nothing{place}")], f"{name}_{place}", place))


def _taken_inside(node: Any) -> Iterator[Any]:
    """The values that the blocks of a node take from outside, and those made inside them."""
    for block in node.blocks():
        yield from block.outputs()
        for inner in block.nodes():
            yield from inner.inputs()
            yield from _taken_inside(inner)


def _name(node: Node, layers: Mapping[str, NormLayer]) -> None:
    stored = next((value for value in node.inputs[1:] if value is not None and value.array is not None), None)
    if stored is None or not stored.name.rpartition(".")[0]:
        return
    path, _, leaf = stored.name.rpartition(".")
    path = path.rpartition(".")[0] if leaf.isdecimal() and path not in layers else path
    if node.op in (Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL, Op.BATCH_NORM, Op.LAYER_NORM, Op.OTHER_NORM):
        node.label, node.layer = path, layers.get(path)


def _name_in_order(graph: Graph, layers: Mapping[str, NormLayer]) -> None:
    """A frozen file has forgotten the names; the reader numbers the calls in its code."""
    norms = list(graph.of(Op.BATCH_NORM))
    found = [layer for layer in dict.fromkeys(layers.values()) if layer.kind is NormKind.BATCH]
    if len(norms) == len(found) and all(node.layer is None for node in norms):
        for node, layer in zip(norms, found, strict=True):
            node.label, node.layer = layer.name, layer


# writing


def unwritable(plan: FoldPlan) -> dict[Node, tuple[str, str]]:
    """The norms whose folds change what is no argument of a call by itself."""
    wrong = {node for node, slot in plan.state.replaced if _argument(node, slot) is None}
    wrong |= {node for node in plan.bypassed if _argument(node, plan.bypassed[node]) is None}
    why = ("computed-weight", "a constant in it is no argument of one operator by itself; --export onnx can do it")
    reasons = dict.fromkeys(wrong, why) | dict.fromkeys(overwritten(plan), (OVERWRITTEN.code, OVERWRITTEN.sentence))
    found: dict[Node, tuple[str, str]] = {}
    for outcome in plan.outcomes:
        for node in {*outcome.nodes, *outcome.into, *outcome.through} & reasons.keys():
            found.setdefault(outcome.norm, reasons[node])
    return found


def _argument(node: Node, slot: int) -> str | None:
    site: Site = node.site
    return site.slots[slot] if slot < len(site.slots) else None


def apply(plan: FoldPlan, script: Script) -> Any:
    """The module, frozen, with the plan done to its graph."""
    frozen = _freeze(script.loaded)
    graph = frozen.graph
    nodes = list(graph.nodes())
    device = device_of(script.loaded)

    def constant(node: Any, values: NDArray[np.float64], dtype: str) -> Any:
        array = decode(encode(values, dtype), dtype).reshape(values.shape)
        tensor = torch.from_numpy(np.array(array)).to(getattr(torch, dtype)).to(device)
        with graph.insert_point_guard(node):
            return graph.insertConstant(tensor)

    def put(node: Node, slot: int, value: Any) -> None:
        own = nodes[node.site.call.site]
        own.replaceInput(_position(own, _argument(node, slot)), value)

    for new in plan.new_inputs():
        put(new.node, new.slot, constant(nodes[new.node.site.call.site], new.values, new.dtype))
    for node, changed in plan.attributes.items():
        own = nodes[node.site.call.site]
        with graph.insert_point_guard(own):
            for name, content in changed.items():
                own.replaceInput(_position(own, name), graph.insertConstant(content))
    for node, shift in plan.appended.items():
        own = nodes[node.site.call.site]
        _follow(graph, own, [("aten::add", constant(own, shift, node.y.dtype or "float32"))])
    for node, (scale, shift) in plan.decomposed.items():
        own = nodes[node.site.call.site]
        dtype = node.y.dtype or "float32"
        steps = [("aten::mul", constant(own, scale, dtype)), ("aten::add", constant(own, shift, dtype))]
        _follow(graph, own, steps, own.inputsAt(0))
        own.destroy()
    for node, slot in plan.bypassed.items():
        own = nodes[node.site.call.site]
        own.output().replaceAllUsesWith(own.inputsAt(_position(own, _argument(node, slot))))
        own.destroy()
    torch._C._jit_pass_dce(graph)
    graph.lint()
    return frozen


def _position(node: Any, argument: str | None) -> int:
    names = [entry.name for entry in torch._C.parse_schema(node.schema()).arguments]
    return names.index(str(argument))


def _follow(graph: Any, node: Any, steps: list[tuple[str, Any]], start: Any = None) -> None:
    """Put operators behind a node, whose output (or `start`) is their first operand; its users then take theirs."""
    value, after = start or node.output(), node
    made = []
    for kind, operand in steps:
        inputs = [value, operand]
        if kind == "aten::add":
            with graph.insert_point_guard(node):
                inputs.append(graph.insertConstant(1))
        step = graph.create(kind, inputs)
        step.insertAfter(after)
        step.output().setType(node.output().type())
        value, after = step.output(), step
        made.append(step)
    node.output().replaceAllUsesWith(value)
    if start is None:
        made[0].replaceInput(0, node.output())


def save(module: Any, output: Path) -> None:
    """Write the module, whole or not at all."""
    with replacing(output) as temporary, quiet():
        torch.jit.save(module, str(temporary))
