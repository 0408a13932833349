"""ONNX models: the norm layers of the graph, without onnx, torch or a runtime, and without loading the weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from normdoctor.errors import InputError
from normdoctor.layers import Checkpoint, Container, Model, Reference
from normdoctor.readers.arrays import Source
from normdoctor.readers.finishing import settle_gains, shorten_paths
from normdoctor.readers.onnx_arrays import Tensors
from normdoctor.readers.onnx_graph import Program
from normdoctor.readers.onnx_layers import Named, read_layers
from normdoctor.readers.onnx_patterns import op
from normdoctor.readers.onnx_records import Document, Tensor
from normdoctor.readers.onnx_wire import BYTES, VARINT, Wire

TOP_FIELDS = {
    1: VARINT,
    2: BYTES,
    3: BYTES,
    4: BYTES,
    5: VARINT,
    6: BYTES,
    7: BYTES,
    8: BYTES,
} | dict.fromkeys((14, 20, 25, 26), BYTES)
"""The fields of a ModelProto and how each is written."""

LAST_FIELD = 1000
"""Numbers above this are nobody's future field of a ModelProto."""

MAX_TOP_FIELDS = 100_000

CONVOLUTIONS = ("Conv", "ConvTranspose")
LINEAR = ("Gemm", "MatMul")
RECURRENT = ("LSTM", "GRU", "RNN")


def is_onnx(source: Source) -> bool:
    """The bytes are a ModelProto: known fields in any order, one of them a graph, up to the end of the file.

    Also true where a file that begins like one breaks off inside its graph, so that reading it can say so."""
    wire = Wire(source)
    seen: Counter[int] = Counter()
    reached = 0
    try:
        for number, kind, _, start, end in wire.fields(wire.root):
            seen[number] += 1
            reached = end
            if TOP_FIELDS.get(number, kind) != kind or number > LAST_FIELD or seen.total() > MAX_TOP_FIELDS:
                return False
            if number == 1 and not 0 < start < 1000:
                return False
            if number == 7 and end > start and not _begins_graph(wire.take(start, start + 1)):
                return False
    except InputError:
        return seen[1] == 1 and set(seen) <= TOP_FIELDS.keys() and (seen[7] > 0 or _graph_breaks_off(wire, reached))
    return seen[7] > 0 and (seen[1] > 0 or seen[8] > 0)


def _begins_graph(first: bytes) -> bool:
    """A GraphProto's first byte: all its fields are messages or text (1, 2, 5, 10 to 16)."""
    return first[0] & 7 == BYTES and first[0] >> 3 in (1, 2, 5, 10, 11, 12, 13, 14, 15)


def _graph_breaks_off(wire: Wire, at: int) -> bool:
    """A graph's tag and length stand at `at`, and at least the beginning of a graph behind them."""
    head = wire.take(at, min(at + 12, wire.source.size))
    length = next((index for index, byte in enumerate(head[1:], 1) if byte < 0x80), len(head))
    return head[:1] == b"\x3a" and len(head) > length + 2 and _begins_graph(head[length + 1 :])


@dataclass(frozen=True, eq=False)
class Survey:
    """An ONNX file as far as its norms are concerned; what both reading and writing back start from."""

    document: Document
    tensors: Tensors
    program: Program
    named: list[Named]
    checkpoint: Checkpoint


def read(source: Source) -> Checkpoint:
    """The norm layers of an ONNX file.

    Raises InputError for a damaged file and for external data that is missing or points outside its folder."""
    return survey(source).checkpoint


def survey(source: Source) -> Survey:
    """`read`, with the graph. Raises what it raises."""
    document = Document(source)
    tensors = Tensors(document)
    try:
        program = Program(document, tensors)
        named, misses = read_layers(program)
        layers = settle_gains(shorten_paths([item.layer for item in named]))
        named = [replace(item, layer=layer) for item, layer in zip(named, layers, strict=True)]
        external, missing = _external_files(tensors, program)
    except BaseException:
        tensors.close()
        raise
    notes = [*_unknown_parameters(program, named), *program.notes, *missing]
    if not layers:
        notes.append(_why_no_norms(program))

    def close() -> None:
        tensors.close()
        source.close()

    total = source.size + sum(external.values())

    def bytes_read() -> int:
        # Structure that is looked at twice is read twice; of a small file that can be more than all of it.
        return min(total, source.bytes_read + sum(file.bytes_read for file in tensors.files))

    version = document.opsets.get("")
    checkpoint = Checkpoint(
        path=str(source.path),
        format=("ONNX" if version is None else f"ONNX opset {version}") + (", external data" if external else ""),
        container=Container.ONNX,
        models=(Model(key=None, layers=tuple(layers), near_misses=tuple(misses)),),
        notes=tuple(notes),
        list_references=lambda: _references(program),
        graphs={None: lambda: _graph(found)},
        bytes_total=total,
        count_bytes_read=bytes_read,
        on_close=close,
    )
    found = Survey(document, tensors, program, named, checkpoint)
    return found


def _graph(found: Survey) -> object:
    from normdoctor.readers.onnx_flow import read_graph

    return read_graph(found)


def all_tensors(program: Program) -> list[Tensor]:
    """Every initializer of every graph, and the tensors of Constant nodes, each once."""
    found: dict[int, Tensor] = {}
    for scope in {id(step.scope): step.scope for step in program.steps}.values():
        found.update((tensor.span.start, tensor) for tensor in scope.graph.tensors.values())
    for step in program.steps:
        if op(step) == "Constant":
            for attribute in program.document.attributes(step.node).values():
                if attribute.tensor is not None:
                    found[attribute.tensor.span.start] = attribute.tensor
    found.update((tensor.span.start, tensor) for tensor in program.main.graph.tensors.values())
    return list(found.values())


def _external_files(tensors: Tensors, program: Program) -> tuple[dict[str, int], list[str]]:
    """Sizes of the external data files by real path, and notes on those that are missing.

    A missing file is an error only where a norm needs it (then reading has failed already); a location
    outside the folder always is one."""
    sizes: dict[str, int] = {}
    notes = []
    locations = {tensor.external.get("location", "") for tensor in all_tensors(program) if tensor.is_external}
    for location in sorted(locations):
        path = tensors.locate(location)
        try:
            sizes[str(path.resolve())] = path.stat().st_size
        except OSError:
            notes.append(f"external data {location!r} is missing; no norm's tensor is in it")
            sizes[location] = 0
    return sizes, notes


def _references(program: Program) -> tuple[Reference, ...]:
    references = []
    for tensor in all_tensors(program):
        ref = program.tensors.array(tensor)
        if ref is not None:
            references.append(Reference(tensor.name, ref))
    return tuple(references)


def _unknown_parameters(program: Program, named: list[Named]) -> list[str]:
    """A note on norms whose parameters are inputs of the graph or computed in it."""
    open_ = [
        item.layer.name
        for item in named
        if any(
            program.constant(place) is None and role not in item.found.made
            for role, place in item.found.parameters.items()
        )
    ]
    if not open_:
        return []
    names = ", ".join(open_[:3]) + (", ..." if len(open_) > 3 else "")
    return [f"parameters of {len(open_)} layers are graph inputs or computed, so not in the file: {names}"]


def _why_no_norms(program: Program) -> str:
    """What the other layers say about norms that are no longer there."""
    counts: Counter[str] = Counter()
    with_bias = 0
    for step in program.steps:
        counts[op(step)] += 1
        if op(step) in CONVOLUTIONS:
            with_bias += len(step.node.inputs) > 2 and bool(step.node.inputs[2])
    convolutions = sum(counts[name] for name in CONVOLUTIONS)
    others = [f"{counts[name]} {name}" for name in (*LINEAR, *RECURRENT) if counts[name]]
    if not convolutions:
        have = f" (its layers: {', '.join(others)})" if others else ""
        return f"no norm layers, and without convolutions nothing suggests that there ever were any{have}"
    if not with_bias:
        return (
            f"no norm layers; none of the {convolutions} convolutions carries a bias, so no norm was folded into "
            "them either"
        )
    return (
        f"no norm layers: probably folded already, or never there ({with_bias} of {convolutions} convolutions carry "
        "a bias, where "
        "folding leaves a norm's shift, and none is followed by a normalisation)"
    )
