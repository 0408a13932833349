"""A TorchScript module as a subject to fold: frozen, its graph changed, saved as TorchScript."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normdoctor.flow.graph import Graph, Node
from normdoctor.flow.plan import FoldPlan
from normdoctor.folding.module_feeds import feeds_of
from normdoctor.folding.opening import Request
from normdoctor.folding.subjects import Feed, Subject
from normdoctor.layers import NormLayer
from normdoctor.models.inputs import Example
from normdoctor.readers import open_checkpoint
from normdoctor.rules.wording import plural

if TYPE_CHECKING:
    from normdoctor.folding.with_torch import Runner
    from normdoctor.models.loaded import Loaded
    from normdoctor.torchscript.with_torch import Script


@dataclass
class ScriptSubject:
    """See `Subject`."""

    request: Request
    script: Script
    example: Example
    format: str
    notes: list[str] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        return self.script.graph

    @property
    def evaluation(self) -> bool:
        return self.script.loaded.evaluation

    def refused(self, plan: FoldPlan) -> Mapping[Node, tuple[str, str]]:
        from normdoctor.torchscript.with_torch import unwritable

        return unwritable(plan)

    def feeds(self) -> Iterator[Feed]:
        return feeds_of(self.request, self.script.loaded, self.example, several=self.script.any_batch)

    def original(self) -> Runner:
        from normdoctor.folding.with_torch import Runner

        return Runner(self.script.loaded)

    def build(self, plan: FoldPlan, output: Path | None) -> Any:
        from normdoctor.torchscript.with_torch import FROZEN, apply, save

        if plan.changes_nothing:
            if output is not None and self.request.path is not None:
                shutil.copyfile(self.request.path, output)
            return self.script.loaded.model
        if FROZEN not in self.notes:
            self.notes.append(FROZEN)
        module = apply(plan, self.script)
        if output is not None:
            save(module, output)
        return module

    def folded(self, built: Any) -> Runner:
        from normdoctor.folding.with_torch import Runner

        return Runner(replace(self.script.loaded, model=built))


def open_script(request: Request, loaded: Loaded, example: Example) -> Subject:
    """The graph of a TorchScript module. Raises RefusedError for one that cannot be frozen."""
    from normdoctor.torchscript.with_torch import read_script

    layers = {}
    form = "TorchScript module"
    if request.path is not None:
        with open_checkpoint(request.path) as checkpoint:
            form = checkpoint.format
            layers = {name: layer for layer in checkpoint.layers for name in (layer.name, *layer.aliases)}
    script = read_script(loaded, example, layers)
    return ScriptSubject(request, script, example, form, [*loaded.notes, *_unseen(script.graph, layers)])


def _unseen(graph: Graph, layers: Mapping[str, NormLayer]) -> Iterator[str]:
    """Norms of the file that its graph does not show."""
    seen = {node.layer.name for node in graph.nodes if node.layer is not None}
    names = sorted({layer.name for layer in layers.values()} - seen)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        count = plural(len(names), "norm")
        yield f"{count} of the file left as they are (inside a branch or loop, or unused): {', '.join(names[:5])}{more}"
