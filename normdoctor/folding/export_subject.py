"""A .pt2 as a subject to fold: its JSON edited without torch, both programs run by torch for the proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from normdoctor.errors import CannotRunError, RefusedError, UsageError
from normdoctor.flow.graph import Graph, Node
from normdoctor.flow.plan import FoldPlan
from normdoctor.folding.export_edits import write_folded
from normdoctor.folding.opening import Request
from normdoctor.folding.subjects import Feed, Subject
from normdoctor.folding.verify import Runnable
from normdoctor.models.inputs import Example
from normdoctor.readers.arrays import Source
from normdoctor.readers.export_flow import ExportFlow, read_flow
from normdoctor.readers.torch_export import open_program
from normdoctor.readers.torch_pickle import ZipRecords

if TYPE_CHECKING:
    from normdoctor.models.loaded import Loaded


@dataclass
class ExportSubject:
    """See `Subject`."""

    request: Request
    path: Path
    flow: ExportFlow
    format: str
    notes: list[str] = field(default_factory=list)
    evaluation: bool = False

    @property
    def graph(self) -> Graph:
        return self.flow.graph

    def refused(self, plan: FoldPlan) -> Mapping[Node, tuple[str, str]]:
        return {}

    def feeds(self) -> Iterator[Feed]:
        from normdoctor.folding.module_feeds import feeds_of

        return feeds_of(self.request, self._loaded, self._example, several=False)

    @cached_property
    def _loaded(self) -> Loaded:
        """The program as torch opens it. Raises RefusedError where that needs trust."""
        from normdoctor.models.with_torch import open_model

        if self.request.key is not None:
            raise CannotRunError("one program of a package of several is not run here")
        try:
            return open_model(self.path, trust=self.request.trust)
        except RefusedError as error:
            raise RefusedError(
                error.message, f"{error.hint} Or add --no-verify: then torch does not open it."
            ) from None

    @cached_property
    def _example(self) -> Example:
        from normdoctor.folding.module_feeds import example_for

        return example_for(self.request, self._loaded)

    def original(self) -> Runnable:
        from normdoctor.folding.with_torch import Runner

        return Runner(self._loaded)

    def build(self, plan: FoldPlan, output: Path | None) -> Path:
        assert output is not None
        write_folded(self.flow, plan, self.path, output)
        return output

    def folded(self, built: Path) -> Runnable:
        from normdoctor.folding.with_torch import Runner
        from normdoctor.models.with_torch import open_model

        return Runner(open_model(built, trust=self.request.trust))


@contextmanager
def open_export(request: Request, form: str) -> Iterator[Subject]:
    """The graph of the program. form: the file's format in words.

    Raises InputError for a damaged package, UsageError where --key must choose or means nothing."""
    path = request.path
    assert path is not None
    if request.state_dict:
        raise UsageError(f"{path}: a .pt2 is written as a .pt2", "Leave out --state-dict.")
    with Source(path) as source:
        opened = open_program(source, ZipRecords(source), request.key)
        yield ExportSubject(request, path, read_flow(opened), form)
