"""A folded ONNX file, written whole or not at all; the input and what is beside it are only read.

The new weights are computed one at a time. Those of a large model wait in a file beside the output, so that the
memory has a bound.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import RefusedError
from normdoctor.flow.plan import FoldPlan
from normdoctor.folding.onnx_edits import Surgery
from normdoctor.folding.onnx_layout import Layout
from normdoctor.folding.onnx_storage import NewTensor
from normdoctor.readers.arrays import Source, encode
from normdoctor.readers.onnx_flow import Flow
from normdoctor.readers.onnx_splices import Extent, copy
from normdoctor.writing import folder_beside, replacing

HELD = 1 << 28
"""Bytes of new weights that wait in memory; further ones wait in a file."""


@dataclass(frozen=True)
class Written:
    """What a folded file is beside the original."""

    nodes: tuple[int, int]
    """In the main graph and all bodies, before and after; constants not counted."""
    stored: tuple[int, int]
    """Bytes of the model and its external data, before and after."""
    files: tuple[Path, ...]
    """What was written: the model first, then its data file where it has one."""


def write_folded(flow: Flow, plan: FoldPlan, output: Path) -> Written:
    """The model with `plan` done, at `output`; external data goes to a file of its own beside it.

    `plan.new_inputs()` is gone through once. Where the plan changes nothing the output is a copy of the input.
    Raises InputError where a weight cannot be read, RefusedError for external data of a kind that cannot be moved."""
    if plan.changes_nothing:
        return copy_unchanged(flow, output)
    surgery = Surgery(flow, plan)
    with ExitStack() as stack:
        # Left in reverse order: the data file is in place before the model that needs it.
        model = stack.enter_context(replacing(output))
        spool = stack.enter_context(folder_beside(output)) / "weights"
        with spool.open("wb") as file:
            places = list(_compute(surgery, plan, file))
        surgery.settle()
        with Source(spool) as source:
            for tensor, start, end in places:
                tensor.extent = Extent(source, start, end)
            files = _write(Layout(flow.survey.tensors, surgery, output), model, stack)
    stored = sum(path.stat().st_size for path in files)
    return Written(surgery.count_nodes(), (flow.survey.checkpoint.bytes_total or 0, stored), tuple(files))


def _compute(surgery: Surgery, plan: FoldPlan, spool: BinaryIO) -> Iterator[tuple[NewTensor, int, int]]:
    """Every new tensor whose bytes went to `spool`, and where they are there; the others hold theirs."""
    held = 0
    for tensor, values in _new_tensors(surgery, plan):
        data = encode(np.ravel(values), tensor.dtype)  # rounded once, from float64
        if held + len(data) <= HELD:
            held += len(data)
            tensor.data = data
        else:
            spool.write(data)
            yield tensor, spool.tell() - len(data), spool.tell()


def _new_tensors(surgery: Surgery, plan: FoldPlan) -> Iterator[tuple[NewTensor, NDArray[np.float64]]]:
    for new in plan.new_inputs():
        yield surgery.give(new.node, new.slot, new.values.shape, new.dtype), new.values
    yield from surgery.given_values


def _write(layout: Layout, model: Path, stack: ExitStack) -> list[Path]:
    files = [layout.output]
    with model.open("wb") as file:
        for piece in layout.pieces():
            copy(piece, file)
    if layout.data is not None and not layout.data.empty:
        files.append(layout.output.with_name(layout.data.name))
        with stack.enter_context(replacing(files[1])).open("wb") as file:
            layout.data.write(file)
    return files


def copy_unchanged(flow: Flow, output: Path) -> Written:
    """The input, byte for byte. External data is copied along where the output lies in another folder.

    Raises RefusedError where a file of the data's name is there already."""
    survey = flow.survey
    total = survey.checkpoint.bytes_total or 0
    surgery = Surgery(flow, FoldPlan(flow.graph))
    kept = Layout(survey.tensors, surgery, output).kept
    files = [output]
    with ExitStack() as stack:
        model = stack.enter_context(replacing(output))
        if output.parent.resolve() != flow.path.parent.resolve():
            locations = sorted({tensor.external.get("location", "") for tensor in kept if tensor.is_external})
            data = {location: survey.tensors.external(location) for location in locations}
            for location in locations:
                target = output.parent / location
                if target.exists():
                    raise RefusedError(
                        f"{target}: exists already, and the unchanged copy needs its data under that name",
                        "Choose an output in another folder.",
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(data[location].path, stack.enter_context(replacing(target)))
                files.append(target)
        shutil.copyfile(flow.path, model)
    return Written(surgery.count_nodes(), (total, total), tuple(files))
