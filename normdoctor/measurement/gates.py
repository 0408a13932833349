"""Which activation alone takes a norm's output: a channel that never passes it is dead. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from normdoctor.errors import NormDoctorError
from normdoctor.flow.graph import Graph, Op
from normdoctor.readers.arrays import Source
from normdoctor.readers.export_flow import read_flow
from normdoctor.readers.onnx_flow import open_flow
from normdoctor.readers.torch_export import open_program
from normdoctor.readers.torch_pickle import ZipRecords


def gates_of(graph: Graph) -> dict[str, str]:
    """Layer → the name of the activation behind it, where that is all that its output goes to."""
    return dict(_gates(graph))


def _gates(graph: Graph) -> Iterator[tuple[str, str]]:
    for node in graph.of(Op.BATCH_NORM):
        value = node.y
        if value.is_output or len(value.uses) != 1 or value.uses[0].node.op is not Op.ACTIVATION:
            continue
        name = value.uses[0].node.attributes.get("name")
        if isinstance(name, str):
            yield node.label if node.layer is None else node.layer.name, name


def gates_of_onnx(path: Path) -> dict[str, str]:
    """Those of an ONNX file; none where its graph cannot be followed."""
    try:
        with open_flow(path) as flow:
            return gates_of(flow.graph)
    except NormDoctorError:
        return {}


def gates_of_export(path: Path, key: str | None) -> dict[str, str]:
    """Those of a .pt2 file; none where its graph cannot be followed."""
    try:
        with Source(path) as source:
            return gates_of(read_flow(open_program(source, ZipRecords(source), key)).graph)
    except NormDoctorError:
        return {}
