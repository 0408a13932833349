"""Shapes and element types of all values of an ONNX model, by onnx's own inference on a copy without weights."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from normdoctor.flow.graph import Shape
from normdoctor.readers.onnx_arrays import DTYPES
from normdoctor.readers.onnx_graph import Program
from normdoctor.readers.onnx_records import TYPED_FIELDS, Graph, Tensor
from normdoctor.readers.onnx_splices import Edits, length_of, tagged_fields

KEPT = 1 << 12
"""Bytes of a tensor that stay in the copy: shapes and axes, which inference looks into."""

MAX_SKELETON = 256 << 20
"""Bytes of a model without its weights; inference on more would cost too much memory."""

NAMELESS = re.compile(r"\W*|-?\d+|none|unknown|dynamic|unk|any", re.IGNORECASE)
"""Names of lengths that exporters give to all of them alike, so that equal names say nothing."""


class Kind(NamedTuple):
    """What is known of a value before the model runs."""

    shape: Shape | None = None
    dtype: str | None = None


class Kinds:
    """Kinds of the values of every graph of a model."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], Kind] = {}

    def of(self, graph: Graph, name: str) -> Kind:
        return self._known.get((id(graph), name), Kind())

    def learn(self, graph: Graph, values: Iterable[Any]) -> None:
        """Take what onnx's ValueInfoProtos say."""
        for value in values:
            if value.type.HasField("tensor_type"):
                told = value.type.tensor_type
                shape = tuple(map(_length, told.shape.dim)) if told.HasField("shape") else None
                self._known[id(graph), value.name] = Kind(shape, DTYPES.get(told.elem_type))


def _length(dim: Any) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    name = dim.dim_param
    # Bytes that are no UTF-8 come as bytes.
    return None if not isinstance(name, str) or NAMELESS.fullmatch(name) else name


def infer(program: Program, tensors: Iterable[Tensor]) -> tuple[Kinds, str | None]:
    """The kinds of all values outside local functions, and what went wrong, if anything did.

    tensors: every tensor of the model; their values are left out of what onnx sees, where they are large."""
    import onnx.shape_inference

    kinds = Kinds()
    skeleton = _without_weights(program, tensors)
    if skeleton is None:
        return kinds, "the model is too large for shape inference even without its weights"
    problem = None
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except Exception as error:  # whatever its C++ side raises: then what the file declares has to do
        problem = f"onnx's shape inference failed ({str(error).strip().splitlines()[0][:200]})"
        try:
            inferred = onnx.load_from_string(skeleton)
        except Exception:  # not even protobuf takes it
            return kinds, problem
    _walk(program, program.main.graph, inferred.graph, kinds)
    return kinds, problem


def _without_weights(program: Program, tensors: Iterable[Tensor]) -> bytes | None:
    document = program.document
    edits = Edits(document.source, document.wire.root)
    for tensor in tensors:
        for begin, (number, _, _, _, end) in tagged_fields(document.wire, tensor.span):
            if (number == 9 or number in TYPED_FIELDS) and end - begin > KEPT:
                edits.replace(tensor.span, begin, end, b"")
    if length_of(edits.pieces()) > MAX_SKELETON:
        return None
    target = io.BytesIO()
    edits.write(target)
    return target.getvalue()


def _walk(program: Program, graph: Graph, message: Any, kinds: Kinds) -> None:
    """The message was made from the same bytes, so nodes and bodies stand in the same order."""
    for values in (message.value_info, message.input, message.output):
        kinds.learn(graph, values)
    for node, copy in zip(graph.nodes, message.node, strict=False):
        for given in copy.attribute:
            if given.HasField("g") or given.graphs:
                own = program.document.attributes(node).get(given.name)
                inside = [*([given.g] if given.HasField("g") else []), *given.graphs]
                for body, inner in zip(own.graphs if own else (), inside, strict=False):
                    _walk(program, body, inner, kinds)
