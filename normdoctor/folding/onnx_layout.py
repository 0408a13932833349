"""The bytes of a folded ONNX file: which of the old ones stay, what takes the place of others, where tensors lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from normdoctor.folding.onnx_edits import Change, Surgery, float_attribute
from normdoctor.folding.onnx_frames import Frame
from normdoctor.folding.onnx_storage import (
    KEPT_INSIDE,
    DataFile,
    NewTensor,
    free_data_name,
    stored_extent,
    tensor_field,
)
from normdoctor.readers.onnx_arrays import Tensors
from normdoctor.readers.onnx_builder import INITIALIZERS_ARE_INPUTS
from normdoctor.readers.onnx_records import EXTERNAL, Document, Graph, Node, Tensor
from normdoctor.readers.onnx_splices import Edits, Piece, length_of, tagged_fields
from normdoctor.readers.onnx_wire import BYTES, Field, Span, bytes_field, varint_field

LIMIT = (1 << 31) - 1
"""Bytes of the largest message that protobuf reads."""

NODE, INITIALIZER, INPUT, VALUE_INFO, ANNOTATION = 1, 5, 11, 13, 14
"""Fields of a GraphProto."""


class Layout:
    """One writing of the model. `data` is the file beside it, once `pieces` has been asked for, or None."""

    def __init__(self, tensors: Tensors, surgery: Surgery, output: Path) -> None:
        self.tensors, self.surgery, self.output = tensors, surgery, output
        self.document: Document = tensors.document
        self.wire = self.document.wire
        self.data: DataFile | None = None
        self.kept = list(self._kept_tensors())

    def pieces(self) -> list[Piece]:
        """The model. External data stays external; a model too large for one message gets some."""
        external = any(tensor.is_external for tensor in (*self.kept, *self._stored()))
        made = self._edits(external, everything=False).pieces()
        if not external and length_of(made) > LIMIT:
            made = self._edits(True, everything=True).pieces()
        return made

    def _edits(self, external: bool, everything: bool) -> Edits:
        edits = Edits(self.document.source, self.wire.root)
        if external:
            locations = {tensor.external.get("location", "") for tensor in (*self.kept, *self._stored())} - {""}
            here = {self.tensors.locate(location).resolve() for location in locations}
            self.data = DataFile(free_data_name(self.output, {self.output.resolve(), *here}).name)
            for tensor in self.kept:
                self._move(edits, self.data, tensor, everything)
        for frame in self.surgery.frames:
            self._graph(edits, frame)
        return edits

    # tensors that stay

    def _stored(self) -> Iterator[Tensor]:
        """The initializers of the original, also those that go: where they were says where new ones belong."""
        for frame in self.surgery.frames:
            yield from frame.graph.tensors.values()

    def _kept_tensors(self) -> Iterator[Tensor]:
        surgery = self.surgery
        replaced = {id(new.in_place_of) for new in surgery.new_tensors() if new.in_place_of is not None}
        for frame in surgery.frames:
            for name, tensor in frame.graph.tensors.items():
                if (frame, name) not in surgery.dead_tensors and id(tensor) not in replaced:
                    yield tensor
            for node in frame.graph.nodes:
                if id(node) not in surgery.removed:
                    yield from self._of_attributes(node)
        pending: list[Graph] = list(self.document.functions.values())
        while pending:
            graph = pending.pop()
            yield from graph.tensors.values()
            for node in graph.nodes:
                yield from self._of_attributes(node)
                pending += [body for entry in self.document.attributes(node).values() for body in entry.graphs]

    def _of_attributes(self, node: Node) -> Iterator[Tensor]:
        for attribute in self.document.attributes(node).values():
            if attribute.tensor is not None:
                yield attribute.tensor

    def _move(self, edits: Edits, data: DataFile, tensor: Tensor, everything: bool) -> None:
        """Let a tensor's values lie in `data`."""
        if tensor.is_external:
            place = data.add([stored_extent(self.tensors, tensor)])
            for begin, item in tagged_fields(self.wire, tensor.span):
                if item[0] == 13 and item[1] == BYTES:
                    edits.replace(tensor.span, begin, item[4], place)
                    place = b""
        elif everything and tensor.raw is not None and tensor.raw.end - tensor.raw.start > KEPT_INSIDE:
            place = data.add([stored_extent(self.tensors, tensor)])
            for begin, item in tagged_fields(self.wire, tensor.span):
                if item[0] in (9, 14):
                    edits.replace(tensor.span, begin, item[4], b"")
            edits.replace(tensor.span, tensor.span.end, tensor.span.end, place + varint_field(14, EXTERNAL))

    # graphs

    def _graph(self, edits: Edits, frame: Frame) -> None:
        surgery, graph = self.surgery, frame.graph
        nodes = {node.span.length_at: node for node in graph.nodes}
        stored = {tensor.span.length_at: (name, tensor) for name, tensor in graph.tensors.items()}
        mine = [tensor for tensor in surgery.new_tensors() if tensor.frame is frame]
        renewed = {id(tensor.in_place_of): tensor for tensor in mine if tensor.in_place_of is not None}
        for span in graph.spans:
            for begin, item in tagged_fields(self.wire, span):
                number, kind, length_at, _, end = item
                if kind != BYTES:
                    continue
                if number == NODE:
                    self._node(edits, frame, nodes[length_at], span, begin)
                elif number == INITIALIZER and length_at in stored:
                    name, tensor = stored[length_at]
                    if id(tensor) in renewed:
                        edits.replace(span, begin, end, tensor_field(INITIALIZER, renewed[id(tensor)], self.data))
                    elif (frame, name) in surgery.dead_tensors:
                        edits.replace(span, begin, end, b"")
                elif number in (VALUE_INFO, ANNOTATION) or (number == INPUT and surgery.dead_tensors):
                    key = (frame, self.document.value_name(self.wire.inside(item, span)))
                    if key in (surgery.dead_tensors if number == INPUT else surgery.vanished):
                        edits.replace(span, begin, end, b"")
        last = graph.spans[-1]
        for new in mine:
            if new.in_place_of is None:
                edits.replace(last, last.end, last.end, tensor_field(INITIALIZER, new, self.data))
                if self.document.ir_version < INITIALIZERS_ARE_INPUTS:
                    edits.replace(last, last.end, last.end, _input_field(new))

    # nodes

    def _node(self, edits: Edits, frame: Frame, node: Node, parent: Span, begin: int) -> None:
        surgery = self.surgery
        change = surgery.changes.get(id(node))
        if id(node) in surgery.removed:
            edits.replace(parent, begin, node.span.end, b"")
            return
        if change is not None and change.becomes and change.becomes[0][0]:
            edits.replace(parent, begin, node.span.end, b"".join(surgery.successors(change)))
            return
        followers = surgery.successors(change) if change is not None and change.becomes else []
        inputs = [self._input(frame, entry) for entry in (node.inputs if change is None else change.inputs)]
        outputs = [
            surgery.taken.get((frame, name), name) for name in (node.outputs if change is None else change.outputs)
        ]
        if inputs != node.inputs or outputs != node.outputs:
            fields = [entry for entry in tagged_fields(self.wire, node.span) if entry[1][1] == BYTES]
            self._names(edits, node, [entry for entry in fields if entry[1][0] == 1], 1, node.inputs, inputs)
            self._names(edits, node, [entry for entry in fields if entry[1][0] == 2], 2, node.outputs, outputs)
        if change is not None:
            self._attributes(edits, change)
        if followers:
            edits.replace(parent, node.span.end, node.span.end, b"".join(followers))

    def _input(self, frame: Frame, entry: str | NewTensor) -> str:
        if isinstance(entry, NewTensor):
            return entry.name
        return self.surgery.name(frame, entry) if entry else ""

    def _names(
        self, edits: Edits, node: Node, fields: list[tuple[int, Field]], number: int, old: list[str], new: list[str]
    ) -> None:
        """Give the node other names of inputs or outputs."""
        for place, (begin, item) in enumerate(fields):
            if place >= len(new):
                edits.replace(node.span, begin, item[4], b"")
            elif new[place] != old[place]:
                span = self.wire.inside(item, node.span)
                edits.replace(span, span.start, span.end, new[place].encode())
        behind = fields[-1][1][4] if fields else node.span.start
        for name in new[len(fields) :]:
            edits.replace(node.span, behind, behind, bytes_field(number, name.encode()))

    def _attributes(self, edits: Edits, change: Change) -> None:
        node = change.node
        missing = dict(change.numbers)
        for begin, item in tagged_fields(self.wire, node.span):
            if item[0] != 5 or item[1] != BYTES:
                continue
            span = self.wire.inside(item, node.span)
            name = self.document.value_name(span)
            if name in change.dropped:
                edits.replace(node.span, begin, item[4], b"")
            elif name in change.numbers:
                edits.replace(span, span.start, span.end, float_attribute(name, change.numbers[name]))
                missing.pop(name, None)
        for name, value in missing.items():
            edits.replace(node.span, node.span.end, node.span.end, bytes_field(5, float_attribute(name, value)))


def _input_field(tensor: NewTensor) -> bytes:
    """A ValueInfoProto among the graph's inputs: old files want one for each initializer."""
    lengths = b"".join(bytes_field(1, varint_field(1, length)) for length in tensor.shape)
    kind = bytes_field(1, varint_field(1, tensor.data_type) + bytes_field(2, lengths))
    return bytes_field(INPUT, bytes_field(1, tensor.name.encode()) + bytes_field(2, kind))
