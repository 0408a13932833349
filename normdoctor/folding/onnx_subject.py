"""An ONNX file as a subject to fold: its own bytes edited, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from normdoctor.data.wanted import Wanted
from normdoctor.flow.graph import Graph, Node
from normdoctor.flow.plan import FoldPlan
from normdoctor.folding.data import load_data, random_inputs, with_shapes
from normdoctor.folding.onnx_writing import write_folded
from normdoctor.folding.opening import Request
from normdoctor.folding.subjects import Feed, Subject
from normdoctor.folding.verify import Runnable
from normdoctor.readers.onnx_flow import Flow, open_flow

if TYPE_CHECKING:
    from normdoctor.models.with_onnx import OnnxModel


@dataclass
class OnnxSubject:
    """See `Subject`."""

    request: Request
    flow: Flow
    format: str
    notes: list[str] = field(default_factory=list)
    evaluation: bool = False
    _grown: bool = False
    """Whether a note says so."""

    @property
    def graph(self) -> Graph:
        return self.flow.graph

    def refused(self, plan: FoldPlan) -> Mapping[Node, tuple[str, str]]:
        return {}

    def feeds(self) -> Iterator[Feed]:
        request = self.request
        takes = [Wanted(*described) for described in self._original.inputs()]
        if request.data is not None:
            yield Feed(load_data(request.data, with_shapes(takes, request.specs)), str(request.data))
            return
        for inputs in random_inputs(with_shapes(takes, request.specs), request.seed):
            shapes = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in list(inputs.items())[:4])
            more = f" and {len(inputs) - 4} more" if len(inputs) > 4 else ""
            size = sum(array.size for array in inputs.values())
            yield Feed(inputs, f"random numbers of seed {request.seed}: {shapes}{more}", size)

    @cached_property
    def _original(self) -> OnnxModel:
        return self._model(self.flow.path)

    def _model(self, path: Path) -> OnnxModel:
        from normdoctor.models.with_onnx import OnnxModel

        return OnnxModel(path, self.flow.survey.checkpoint.bytes_total or 0)

    def original(self) -> Runnable:
        return self._original

    def folded(self, built: Path) -> Runnable:
        return self._model(built)

    def build(self, plan: FoldPlan, output: Path | None) -> Path:
        assert output is not None
        written = write_folded(self.flow, plan, output)
        before, after = written.stored
        if after > 2 * before and not self._grown:
            self._grown = True
            self.notes.append(
                f"the file grows from {before:,} to {after:,} bytes: weights that were made from a single number when "
                "the model ran are stored"
            )
        return output


@contextmanager
def open_onnx(request: Request) -> Iterator[Subject]:
    """The graph of the file. Raises InputError for one that cannot be read."""
    assert request.path is not None
    with open_flow(request.path) as flow:
        yield OnnxSubject(request, flow, flow.survey.checkpoint.format)
