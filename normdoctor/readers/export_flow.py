"""The program of a .pt2 → the neutral graph. Nothing in the file is executed and no weight is read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normdoctor.errors import InputError
from normdoctor.flow.graph import Fixed, Graph, Node, Op, Shape, Value
from normdoctor.layers import ArrayRef, NormKind, NormLayer
from normdoctor.readers import export_graph
from normdoctor.readers.aten import Call, Site, build
from normdoctor.readers.export_graph import DAMAGED, MAX_STEPS, SPECS, as_dict, as_list, as_text, whole
from normdoctor.readers.export_layers import KINDS
from normdoctor.readers.torch_export import DTYPES, Opened

ROLES = ("weight", "bias", "running_mean", "running_var")
NORMS = (Op.BATCH_NORM, Op.LAYER_NORM, Op.OTHER_NORM)
WEIGHTED = (Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL)
MOVED = frozenset({Op.IDENTITY, Op.CAST, Op.RESHAPE, Op.EXPAND, Op.TRANSPOSE, Op.TILE, Op.SPLIT, Op.SLICE})
"""What may lie between a stored tensor and the operator that uses it."""

MAX_PARTS = 50
"""Values between a constant and the stored tensors in it."""

SYMBOL = re.compile(r"Symbol\('(\w+)'[^()]*\)")
PRODUCT = re.compile(r"Mul\((?:(?:Integer\(\d+\)|Symbol\([^()]*\))(?:, )?)+\)")
NO_VALUE = frozenset(
    {
        "as_none", "as_device", "as_scalar_type", "as_layout", "as_memory_format", "as_graph", "as_operator",
        "as_custom_obj", "as_complex",
    }
)  # fmt: skip
"""Arguments that are neither a tensor nor a number."""

INSIDE = Fixed("inside-a-branch", "it lies in a graph inside another operator, which is left as it is")
OP_OF = {NormKind.BATCH: Op.BATCH_NORM, NormKind.LAYER: Op.LAYER_NORM, NormKind.RMS: Op.LAYER_NORM}


@dataclass(frozen=True)
class ExportFlow:
    """The graph of an exported program, and the way back into its JSON."""

    graph: Graph
    opened: Opened
    values: Mapping[str, Value]
    """Of the main graph, by name."""
    calls: Sequence[Call]
    """One for each node of the JSON, in order; `Call.site` is its place there."""


def read_flow(opened: Opened) -> ExportFlow:
    """The graph of a program.

    The body of a branch or loop stays inside its operator: what it takes is used by an operator that is not known.
    Raises InputError where a value is used before it is made, or made twice."""
    try:
        return _read_flow(opened)
    except RecursionError:
        raise InputError(f"{opened.name}: the graph is nested too deeply", DAMAGED) from None


def _read_flow(opened: Opened) -> ExportFlow:
    module = as_dict(opened.record.get("graph_module"))
    graph, signature = as_dict(module.get("graph")), as_dict(module.get("signature"))
    values = _Values(as_dict(graph.get("tensor_values")))
    outside = [value for entry in as_list(graph.get("inputs")) for value in values.inside(as_dict(entry))]
    stored: dict[Value, str] = {}
    for _, field, spec in stored_specs(signature):
        value = values.of(as_text(as_dict(spec.get("arg")).get("name")))
        name = spec[field]
        if name in opened.tensors.arrays:
            _store(value, opened.tensors.arrays[name])
            stored[value] = name
    kept = [value for entry in as_list(graph.get("outputs")) for value in values.inside(as_dict(entry))]
    for entry in map(as_dict, as_list(signature.get("output_specs"))):
        for spec in entry.values():
            kept += values.inside(as_dict(as_dict(spec).get("arg")))
    nodes = [export_graph.Node(as_dict(node), _NO_GRAPH) for node in as_list(graph.get("nodes"))]
    calls = [_call(node, as_dict(record), place, values) for place, (node, record) in enumerate(_paired(nodes, graph))]
    _check_order(opened.name, outside, calls)
    flow = build(calls, dict.fromkeys(kept), outside)
    _forget_mutated(signature, values)
    _label(flow, opened.model.layers, stored, nodes)
    _add_inner_norms(flow, opened)
    return ExportFlow(flow, opened, values.known, calls)


_NO_GRAPH = export_graph.Graph({}, {})


class _Values:
    """The values of the main graph by name."""

    def __init__(self, metas: Mapping[str, Any]) -> None:
        self.known: dict[str, Value] = {}
        self._metas = metas

    def of(self, name: str) -> Value:
        if name not in self.known:
            meta = as_dict(self._metas.get(name))
            dtype = meta.get("dtype")
            self.known[name] = Value(name, _shape(meta), DTYPES.get(dtype) if isinstance(dtype, int) else None)
        return self.known[name]

    def inside(self, argument: Mapping[str, Any]) -> list[Value]:
        """Those in a tagged argument, in order."""
        return list(_flat(_argument(argument, self.of)))


def _shape(meta: Mapping[str, Any]) -> Shape | None:
    """Lengths that depend on the input by the name of their symbol, or the expression as it is written. A product is
    left open: whoever splits or joins axes works it out."""
    sizes = meta.get("sizes")
    return tuple(map(_length, sizes)) if isinstance(sizes, list) else None


def _length(size: object) -> int | str | None:
    number = whole(size)
    if number is not None:
        return number
    text = as_text(as_dict(as_dict(size).get("as_expr")).get("expr_str"))
    symbol = SYMBOL.fullmatch(text)
    if symbol is not None:
        return symbol[1]
    return None if not text or PRODUCT.fullmatch(text) else text


def _store(value: Value, array: ArrayRef) -> None:
    """A stored tensor. What the graph says of it must be what the file holds."""
    if value.shape is not None and value.shape != array.shape:
        return
    value.shape, value.dtype, value.array = array.shape, array.dtype, array


def stored_specs(signature: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Kind, name of the field with the tensor's name, and content of each input that is a stored tensor."""
    for entry in map(as_dict, as_list(signature.get("input_specs"))):
        for kind, field in SPECS:
            spec = as_dict(entry.get(kind))
            if isinstance(spec.get(field), str):
                yield kind, field, spec


def _forget_mutated(signature: Mapping[str, Any], values: _Values) -> None:
    """A buffer or parameter that every call changes is no constant; for a norm that trains, its own statistics are."""
    changed: set[object] = set()
    for entry in map(as_dict, as_list(signature.get("output_specs"))):
        for kind, spec in entry.items():
            new = values.of(as_text(as_dict(as_dict(spec).get("arg")).get("name")))
            if kind.endswith("_mutation") and (new.producer is None or new.producer.op is not Op.BATCH_NORM):
                changed.update(name for name in as_dict(spec).values() if isinstance(name, str))
    for _, field, spec in stored_specs(signature):
        if spec[field] in changed:
            values.of(as_text(as_dict(spec.get("arg")).get("name"))).array = None


def _flat(found: object) -> Iterator[Value]:
    """The values in what `_argument` gives."""
    for entry in found if isinstance(found, list) else [found]:
        if isinstance(entry, list):
            yield from _flat(entry)
        elif isinstance(entry, Value):
            yield entry


def _argument(tagged: Mapping[str, Any], value_of: Callable[[str], Value]) -> Any:
    """A tagged argument as `Call.arguments` has it."""
    for tag, content in tagged.items():
        if tag in NO_VALUE:
            return None
        if tag == "as_string_to_argument":
            return [_argument(as_dict(entry), value_of) for entry in as_dict(content).values()]
        if tag == "as_float" and content in ("Infinity", "-Infinity", "NaN"):
            return float(content)
        return _entry(content, value_of)
    return None


def _entry(content: Any, value_of: Callable[[str], Value]) -> Any:
    """A tensor, a number or a symbol, or a list of them."""
    if isinstance(content, list):
        return [_entry(entry, value_of) for entry in content]
    if not isinstance(content, dict):
        return content
    name = content.get("name", content.get("as_name"))
    return value_of(name) if isinstance(name, str) else _argument(content, value_of)


def _paired(nodes: Sequence[export_graph.Node], graph: Mapping[str, Any]) -> Iterator[tuple[export_graph.Node, Any]]:
    return zip(nodes, as_list(graph.get("nodes")), strict=True)


def _call(node: export_graph.Node, record: Mapping[str, Any], place: int, values: _Values) -> Call:
    operator = node.operator
    overload = node.target.rpartition(".")[2] if operator else ""
    if not operator:  # of another library, or a control-flow operator
        operator, _, overload = node.target.removeprefix("torch.ops.").rpartition(".")
    arguments = {name: _argument(tagged, values.of) for name, tagged in node.arguments}
    outputs = [value for entry in as_list(record.get("outputs")) for value in values.inside(as_dict(entry))]
    label = outputs[0].name if outputs else node.target
    return Call(operator, overload, arguments, outputs, label, place)


def _check_order(what: str, outside: Sequence[Value], calls: Sequence[Call]) -> None:
    known = set(outside)
    for call in calls:
        wrong = next((value for value in call.tensors if value not in known), None)
        wrong = wrong or next((value for value in call.outputs if value in known), None)
        if wrong is not None:
            raise InputError(f"{what}: {wrong.name[:60]!r} is used before it is made, or made twice", DAMAGED)
        known.update(call.outputs)


# names


def _label(flow: Graph, layers: Sequence[NormLayer], stored: Mapping[Value, str], nodes: Any) -> None:
    """Name norms as the reader of layers does, and what has weights after them."""
    index = _Index(layers)
    for node in flow.nodes:
        assert isinstance(node.site, Site)
        if node.op in NORMS:
            own = [_stored_behind(node.given(slot)) for slot in range(1, 5)]
            path = nodes[node.site.call.site].module[0]
            node.layer = index.find(own, path, node.y.name)
            parents = [stored[value].rpartition(".")[0] for value in own if value is not None and value in stored]
            node.label = node.layer.name if node.layer is not None else next(iter(parents), path) or node.label
        elif node.op in WEIGHTED:
            slots = (1, 0) if node.op is Op.MATMUL else (1,)
            found = (stored.get(value) for slot in slots if (value := _stored_behind(node.given(slot))) is not None)
            name = next((name for name in found if name is not None), None)
            node.label = name.removesuffix(".weight") if name else node.label
    _label_written_out(flow, layers)


def _label_written_out(flow: Graph, layers: Sequence[NormLayer]) -> None:
    """Give norms that are written out in arithmetic to the multiplication or addition that their parameters enter."""
    named = {node.layer for node in flow.nodes if node.layer is not None}
    owners: dict[Hashable, NormLayer] = {}
    for layer in layers:
        if layer not in named:
            arrays = (getattr(layer, role) for role in ROLES)
            owners.update((array.identity, layer) for array in arrays if array is not None)
    if not owners:
        return
    computed: set[Value | None] = set()
    for node in flow.nodes:
        if not node.inputs or any(_is_computed(value, computed) for value in node.inputs):
            computed.update(node.outputs)
    for node in flow.of(Op.MULTIPLY, Op.ADD, Op.SUBTRACT, Op.DIVIDE):
        constants = [value for value in node.inputs if not _is_computed(value, computed)]
        if len(constants) != 1:
            continue
        owner = next((owners[array] for array in _stored_within(constants[0]) if array in owners), None)
        if owner is not None and owner not in named:
            named.add(owner)
            node.layer, node.label = owner, owner.name


def _is_computed(value: Value | None, computed: Collection[Value | None]) -> bool:
    return value is not None and value.array is None and (value.producer is None or value in computed)


def _stored_within(value: Value | None) -> list[Hashable]:
    """The identities of the stored tensors that a constant is computed from."""
    found: list[Hashable] = []
    waiting, seen = [value], 0
    while waiting and seen < MAX_PARTS:
        value, seen = waiting.pop(), seen + 1
        if value is not None and value.array is not None:
            found.append(value.array.identity)
        elif value is not None and value.producer is not None:
            waiting += value.producer.inputs
    return found


def _stored_behind(value: Value | None) -> Value | None:
    """The stored tensor that a value is, behind casts and views; None where it is computed."""
    for _ in range(MAX_STEPS):
        if value is None or value.producer is None:
            return value
        if value.producer.op not in MOVED:
            return None
        value = value.producer.x
    return None


class _Index:
    """Finds the layer that a node is: by its tensors, and by the path of its module where it has none."""

    def __init__(self, layers: Sequence[NormLayer]) -> None:
        self._by_tensors: dict[Hashable, list[NormLayer]] = defaultdict(list)
        self._by_name: dict[str, NormLayer] = {}
        for layer in layers:
            arrays = [getattr(layer, role) for role in ROLES]
            self._by_tensors[tuple(array.identity if array is not None else None for array in arrays)].append(layer)
            self._by_name[layer.path] = self._by_name[layer.name.rpartition(":")[2]] = layer
            self._by_name[layer.name] = layer

    def find(self, values: Sequence[Value | None], path: str, output: str) -> NormLayer | None:
        arrays = [None if value is None else value.array for value in values]
        key = tuple(None if array is None else array.identity for array in arrays)
        if any(key):
            found = self._by_tensors.get(key, [])
            return next((layer for layer in found if layer.name == path), next(iter(found), None))
        layer = self._by_name.get(f"{path}:{output}") or self._by_name.get(path)
        return layer if layer is not None and all(getattr(layer, role) is None for role in ROLES) else None


def _add_inner_norms(flow: Graph, opened: Opened) -> None:
    """The norms inside branches and loops, so that they are among those that stay."""
    nodes = opened.program.nodes
    layers = {layer.name: layer for layer in opened.model.layers}
    for node in nodes:
        if node.operator not in KINDS or node.graph is nodes[0].graph:
            continue
        parents = [name.rpartition(".")[0] for role in ROLES if (name := node.graph.parameter(node.tensor(role)))]
        layer = next((layers[name] for name in (node.module[0], *parents) if name in layers), None)
        label = layer.name if layer is not None else next(iter(parents), node.module[0])
        op = OP_OF.get(KINDS[node.operator], Op.OTHER_NORM)
        flow.add(
            Node(
                op, [Value("")], [Value(next(iter(node.outputs), ""))], {"eps": 0.0}, f"aten.{node.operator}",
                label, INSIDE, None, layer,
            )
        )  # fmt: skip
