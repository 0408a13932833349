"""ONNX's messages as light records over the wire format: graphs, nodes, attributes, tensors. No onnx, no protobuf.

Field numbers are those of onnx.proto. Where protobuf merges (a message or a number given twice) these records
merge the same way, so a file cannot show us one model and the runtime another. Tensors keep places in the
file, never values; attributes are parsed only for the nodes that somebody asks about.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from normdoctor.readers.arrays import MAX_ELEMENTS, Source
from normdoctor.readers.onnx_wire import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    Field,
    Span,
    Wire,
    signed,
    unpack_varints,
)

MAX_RECORDS = 200_000
"""Nodes and tensors in one file."""

FLOAT_DATA, INT32_DATA, INT64_DATA, DOUBLE_DATA, UINT64_DATA = TYPED_FIELDS = 4, 5, 7, 10, 11
"""The fields of a TensorProto that hold values as numbers instead of raw bytes."""

EXTERNAL = 1
"""TensorProto.data_location of values in another file."""

LOCAL_DOMAINS = ("", "ai.onnx")
"""The two spellings of ONNX's own operator set."""

Run = tuple[int, int, int]
"""Part of a repeated number field: wire type, start and end. A single varint has its value as start."""


@dataclass(slots=True, eq=False)
class Tensor:
    """A TensorProto: what it claims, and where in the file its values lie."""

    span: Span
    name: str = ""
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    raw: Span | None = None
    typed: dict[int, list[Run]] = field(default_factory=dict)
    is_external: bool = False
    external: dict[str, str] = field(default_factory=dict)
    """location, offset and length as written."""
    location: Span | None = None
    """Where the text of `location` stands, for those who must change it."""


@dataclass(slots=True, eq=False)
class Attribute:
    """An AttributeProto, its big values still in the file."""

    name: str = ""
    reference: str = ""
    """Inside a function: the attribute of the calling node that this one stands for."""
    number: float | None = None
    integer: int | None = None
    ints: list[Run] = field(default_factory=list)
    floats: list[Run] = field(default_factory=list)
    string: Span | None = None
    """Where a text lies; it may be long."""
    tensor: Tensor | None = None
    graphs: list[Graph] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Node:
    """A NodeProto. `document.attributes(node)` has its attributes."""

    span: Span
    op: str = ""
    domain: str = ""
    overload: str = ""
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: list[Span] = field(default_factory=list)
    metadata: list[Span] = field(default_factory=list)
    parsed: dict[str, Attribute] | None = None

    @property
    def origin(self) -> str:
        """The operator as written: BatchNormalization, com.microsoft.SkipLayerNormalization."""
        return self.op if self.domain in LOCAL_DOMAINS else f"{self.domain}.{self.op}"


@dataclass(slots=True, eq=False)
class Graph:
    """A GraphProto, or the body of a FunctionProto."""

    spans: list[Span]
    nodes: list[Node] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sparse: int = 0
    values: list[Span] = field(default_factory=list)
    """The ValueInfoProtos that say something about shapes."""
    shapes: dict[str, tuple[int | None, ...]] | None = None
    opsets: dict[str, int] = field(default_factory=dict)
    """Functions only: the operator sets of the body."""
    defaults: list[Span] = field(default_factory=list)
    """Functions only: attributes with a default value."""


FunctionKey = tuple[str, str, str]
"""domain, name, overload"""


class Document:
    """A ModelProto. Everything is read when the document is made, except weights, attributes and shapes.

    Raises InputError for bytes that are no such message."""

    def __init__(self, source: Source) -> None:
        self.wire = Wire(source)
        self.source = source
        self.ir_version = 0
        self.producer = ""
        self.opsets: dict[str, int] = {}
        self.functions: dict[FunctionKey, Graph] = {}
        self.metadata: list[Span] = []
        self._records_left = MAX_RECORDS
        bodies: list[Span] = []
        root = self.wire.root
        for item in self.wire.fields(root):
            number, wire, _, start, end = item
            if wire == VARINT and number == 1:
                self.ir_version = signed(start)
            if wire != BYTES:
                continue
            if number == 2:
                self.producer = self.wire.text(start, end)
            elif number == 7:
                bodies.append(self.wire.inside(item, root))
            elif number == 8:
                self._opset(self.wire.inside(item, root), self.opsets)
            elif number == 14:
                self.metadata.append(self.wire.inside(item, root))
            elif number == 25:
                self._function(self.wire.inside(item, root))
        if not bodies:
            raise self.wire.damaged("it holds no graph")
        self.graph = self.read_graph(bodies)

    def _count(self) -> None:
        self._records_left -= 1
        if self._records_left < 0:
            raise self.wire.damaged(f"it has more than {MAX_RECORDS:,} nodes and tensors")

    def _opset(self, span: Span, opsets: dict[str, int]) -> None:
        domain, version = "", 0
        for number, wire, _, start, end in self.wire.fields(span):
            if number == 1 and wire == BYTES:
                domain = self.wire.text(start, end)
            elif number == 2 and wire == VARINT:
                version = signed(start)
        opsets["" if domain in LOCAL_DOMAINS else domain] = version

    def read_graph(self, spans: list[Span]) -> Graph:
        """One graph, from one or more GraphProtos that protobuf would merge."""
        graph = Graph(spans)
        for span in spans:
            for item in self.wire.fields(span):
                number = item[0]
                if item[1] != BYTES:
                    continue
                if number == 1:
                    graph.nodes.append(self._node(self.wire.inside(item, span)))
                elif number == 5:
                    tensor = self.read_tensor(self.wire.inside(item, span))
                    graph.tensors[tensor.name] = tensor
                elif number in (11, 12):
                    value = self.wire.inside(item, span)
                    (graph.inputs if number == 11 else graph.outputs).append(self.value_name(value))
                    graph.values.append(value)
                elif number == 13:
                    graph.values.append(self.wire.inside(item, span))
                elif number == 15:
                    graph.sparse += 1
        return graph

    def _function(self, span: Span) -> None:
        graph = Graph([span])
        name = domain = overload = ""
        for item in self.wire.fields(span):
            number, wire, _, start, end = item
            if wire != BYTES:
                continue
            if number == 1:
                name = self.wire.text(start, end)
            elif number == 4:
                graph.inputs.append(self.wire.text(start, end))
            elif number == 5:
                graph.outputs.append(self.wire.text(start, end))
            elif number == 7:
                graph.nodes.append(self._node(self.wire.inside(item, span)))
            elif number == 9:
                self._opset(self.wire.inside(item, span), graph.opsets)
            elif number == 10:
                domain = self.wire.text(start, end)
            elif number == 11:
                graph.defaults.append(self.wire.inside(item, span))
            elif number == 12:
                graph.values.append(self.wire.inside(item, span))
            elif number == 13:
                overload = self.wire.text(start, end)
        self.functions[("" if domain in LOCAL_DOMAINS else domain, name, overload)] = graph

    def _node(self, span: Span) -> Node:
        self._count()
        node = Node(span)
        text = self.wire.text
        for item in self.wire.fields(span):
            number, wire, _, start, end = item
            if wire != BYTES:
                continue
            if number == 1:
                node.inputs.append(text(start, end))
            elif number == 2:
                node.outputs.append(text(start, end))
            elif number == 3:
                node.name = text(start, end)
            elif number == 4:
                node.op = text(start, end)
            elif number == 5:
                node.attributes.append(self.wire.inside(item, span))
            elif number == 7:
                node.domain = text(start, end)
            elif number == 8:
                node.overload = text(start, end)
            elif number == 9:
                node.metadata.append(self.wire.inside(item, span))
        return node

    def attributes(self, node: Node) -> dict[str, Attribute]:
        """The node's attributes by name, parsed once. Of two with one name the first counts, as in onnx."""
        if node.parsed is None:
            node.parsed = {}
            for span in node.attributes:
                attribute = self.read_attribute(span)
                node.parsed.setdefault(attribute.name, attribute)
        return node.parsed

    def read_attribute(self, span: Span) -> Attribute:
        attribute = Attribute()
        body: list[Span] = []
        for item in self.wire.fields(span):
            number, wire, _, start, end = item
            if wire == BYTES:
                if number == 1:
                    attribute.name = self.wire.text(start, end)
                elif number == 4:
                    attribute.string = self.wire.inside(item, span)
                elif number == 5:
                    attribute.tensor = self.read_tensor(self.wire.inside(item, span), attribute.tensor)
                elif number == 6:
                    body.append(self.wire.inside(item, span))
                elif number == 11:
                    attribute.graphs.append(self.read_graph([self.wire.inside(item, span)]))
                elif number == 21:
                    attribute.reference = self.wire.text(start, end)
            if number == 2 and wire == FIXED32:
                attribute.number = self.wire.float32(start)
            elif number == 3 and wire == VARINT:
                attribute.integer = signed(start)
            elif number == 7 and wire in (BYTES, FIXED32):
                attribute.floats.append((wire, start, end))
            elif number == 8 and wire in (BYTES, VARINT):
                attribute.ints.append((wire, start, end))
        if body:
            attribute.graphs.insert(0, self.read_graph(body))
        return attribute

    def read_tensor(self, span: Span, tensor: Tensor | None = None) -> Tensor:
        """A TensorProto, or what `tensor` becomes when it is given a second time."""
        self._count()
        tensor = tensor or Tensor(span)
        for item in self.wire.fields(span):
            number, wire, _, start, end = item
            if number == 1 and wire in (BYTES, VARINT):
                tensor.dims += self.integers([(wire, start, end)], limit=64)
            elif number in TYPED_FIELDS and wire in (BYTES, VARINT, FIXED32, FIXED64):
                tensor.typed.setdefault(number, []).append((wire, start, end))
            elif number == 2 and wire == VARINT:
                tensor.data_type = signed(start)
            elif number == 8 and wire == BYTES:
                tensor.name = self.wire.text(start, end)
            elif number == 9 and wire == BYTES:
                tensor.raw = self.wire.inside(item, span)
            elif number == 13 and wire == BYTES:
                self._external_entry(tensor, self.wire.inside(item, span))
            elif number == 14 and wire == VARINT:
                tensor.is_external = start == EXTERNAL
        return tensor

    def _external_entry(self, tensor: Tensor, span: Span) -> None:
        key, place = read_entry(self.wire, span)
        if place is not None and key in ("location", "offset", "length"):
            tensor.external[key] = self.wire.text(place.start, place.end)
            if key == "location":
                tensor.location = place

    def metadata_value(self, spans: list[Span], key: str) -> str | None:
        """The value of the last entry of that key in a list of metadata_props."""
        found = None
        for span in spans:
            name, value = read_entry(self.wire, span)
            if name == key:
                found = "" if value is None else self.wire.text(value.start, value.end)
        return found

    def value_name(self, span: Span) -> str:
        """The name of a ValueInfoProto or a TensorAnnotation."""
        name = ""
        for number, wire, _, start, end in self.wire.fields(span):
            if number == 1 and wire == BYTES:
                name = self.wire.text(start, end)
        return name

    def integers(self, runs: list[Run], limit: int = MAX_ELEMENTS) -> list[int]:
        """A repeated integer field; InputError beyond `limit` values."""
        values: list[int] = []
        for wire, start, end in runs:
            if wire == VARINT:
                values.append(signed(start))
            elif wire == BYTES:
                if end - start > 10 * limit:
                    raise self.wire.damaged("a list of numbers is too long")
                values += self.unpack(start, end).tolist()
        if len(values) > limit:
            raise self.wire.damaged("a list of numbers is too long")
        return values

    def unpack(self, start: int, end: int) -> NDArray[np.int64]:
        """A packed run of varints."""
        try:
            return unpack_varints(self.wire.take(start, end))
        except ValueError:
            raise self.wire.damaged(f"no numbers at byte {start:,}") from None

    def shape(self, graph: Graph, name: str) -> tuple[int | None, ...] | None:
        """What the graph's value_info, inputs and outputs say of a value's shape; unknown lengths are None."""
        if graph.shapes is None:
            graph.shapes = {}
            for span in graph.values:
                value, shape = self._value_info(span)
                if shape is not None:
                    graph.shapes[value] = shape
        return graph.shapes.get(name)

    def _value_info(self, span: Span) -> tuple[str, tuple[int | None, ...] | None]:
        name, shape = "", None
        for item in self.wire.fields(span):
            if item[1] != BYTES:
                continue
            if item[0] == 1:
                name = self.wire.text(item[3], item[4])
            elif item[0] == 2:
                # TypeProto.tensor_type = 1, its shape = 2, its dims = 1, their dim_value = 1
                for tensor in self._messages(item, span, 1):
                    for field_, outer in self._fields_of(tensor, 2):
                        dims = [self._dim(dim) for dim in self._messages(field_, outer, 1)]
                        shape = tuple(dims)
        return name, shape

    def _fields_of(self, span: Span, number: int) -> list[tuple[Field, Span]]:
        return [(item, span) for item in self.wire.fields(span) if item[0] == number and item[1] == BYTES]

    def _messages(self, item: Field, parent: Span, number: int) -> list[Span]:
        inner = self.wire.inside(item, parent)
        return [self.wire.inside(found, inner) for found, _ in self._fields_of(inner, number)]

    def _dim(self, span: Span) -> int | None:
        value = None
        for number, wire, _, start, _ in self.wire.fields(span):
            if number == 1 and wire == VARINT:
                value = signed(start)
        return value


def read_entry(wire: Wire, span: Span) -> tuple[str, Span | None]:
    """The key of a StringStringEntryProto and where its value lies (it may be long)."""
    key, value = "", None
    for item in wire.fields(span):
        if item[0] == 1 and item[1] == BYTES:
            key = wire.text(item[3], item[4])
        elif item[0] == 2 and item[1] == BYTES:
            value = wire.inside(item, span)
    return key, value
