"""What torch runs as a subject to fold: a pickled module, an architecture with its weights, a live module.

TorchScript and anything that goes to ONNX is exported first, and the ONNX file is what is folded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normdoctor.flow.graph import Graph, Node
from normdoctor.flow.plan import FoldPlan
from normdoctor.folding.module_feeds import example_for, feeds_of
from normdoctor.folding.module_ways import variants_of
from normdoctor.folding.opening import Request
from normdoctor.folding.subjects import Feed, Subject
from normdoctor.folding.verify import Runnable, Running
from normdoctor.models.inputs import Example
from normdoctor.tracing.sites import unsuitable

if TYPE_CHECKING:
    from normdoctor.exporting.with_torch import NamedRunner
    from normdoctor.folding.with_torch import Runner
    from normdoctor.models.loaded import Loaded
    from normdoctor.tracing.with_torch import Trace


@dataclass
class ModuleSubject:
    """See `Subject`."""

    request: Request
    loaded: Loaded
    example: Example
    trace: Trace
    format: str
    notes: list[str] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        return self.trace.graph

    @property
    def evaluation(self) -> bool:
        return self.loaded.evaluation

    def refused(self, plan: FoldPlan) -> Mapping[Node, tuple[str, str]]:
        """Norms that a plan folds in a way that module code cannot express."""
        return unsuitable(self.trace.sites, plan)

    def feeds(self) -> Iterator[Feed]:
        for feed in feeds_of(self.request, self.loaded, self.example, several=self.trace.any_batch):
            yield feed._replace(variants=variants_of(self.loaded, feed.inputs))

    def original(self) -> Runner:
        from normdoctor.folding.with_torch import Runner

        return Runner(self.loaded, apart=True)

    def build(self, plan: FoldPlan, output: Path | None) -> Any:
        from normdoctor.folding.with_torch import apply, save

        path = self.request.path
        whole = (
            path is not None
            and self.request.arch is None
            and self.request.key is None
            and not (self.loaded.notes or self.loaded.losses)
        )
        if output is not None and plan.changes_nothing and whole and not self.request.state_dict:
            assert path is not None
            shutil.copyfile(path, output)
            return self.loaded.model
        module = apply(plan, self.trace.sites, self.loaded.model)
        if output is not None:
            save(module, output, state_dict=self.request.state_dict)
        return module

    def folded(self, built: Any) -> Runner:
        from normdoctor.folding.with_torch import Runner

        return Runner(replace(self.loaded, model=built), apart=True)


def load_model(request: Request) -> tuple[Loaded, Example]:
    """The model and its example inputs. Raises what `open_model` and `make_example` raise."""
    from normdoctor.models.with_torch import open_model, take

    if request.path is None:
        loaded = take(request.model)
    else:
        loaded = open_model(
            request.path, trust=request.trust, arch=request.arch, arch_args=request.arch_args, key=request.key
        )
    return loaded, example_for(request, loaded)


@contextmanager
def open_module(request: Request) -> Iterator[Subject]:
    """The model that torch makes of the file, or the ONNX file that it becomes."""
    from normdoctor.models.loaded import Kind
    from normdoctor.tracing.with_torch import trace

    loaded, example = load_model(request)
    if request.export is not None:
        with (
            tempfile.TemporaryDirectory(prefix="normdoctor-") as folder,
            _exported(request, loaded, example, Path(folder) / "model.onnx") as subject,
        ):
            yield subject
        return
    if loaded.kind is Kind.SCRIPT:
        from normdoctor.folding.script_subject import open_script

        yield open_script(request, loaded, example)
        return
    traced = trace(loaded, example)
    built = request.arch is not None
    form = f"PyTorch module ({request.arch})" if built else "PyTorch module"
    yield ModuleSubject(request, loaded, example, traced, form, [*loaded.notes, *loaded.losses, *traced.notes])


@dataclass(frozen=True)
class _Beside:
    """The ONNX file in its runtime, compared with what ran in torch."""

    inner: Runnable
    engine: str

    def run(self, inputs: Any) -> Any:
        return self.inner.run(inputs)

    def in_float64(self) -> Running:
        return self.inner.in_float64()

    def float64_seconds(self, seconds: float) -> float:
        return self.inner.float64_seconds(seconds)


@dataclass
class ExportedSubject:
    """An ONNX file made of a model, folded as one, and proven beside the model itself. See `Subject`."""

    request: Request
    inner: Subject
    source: NamedRunner
    format: str
    notes: list[str]

    @property
    def graph(self) -> Graph:
        return self.inner.graph

    @property
    def evaluation(self) -> bool:
        return True  # an export is made in eval mode

    def refused(self, plan: FoldPlan) -> Mapping[Node, tuple[str, str]]:
        return self.inner.refused(plan)

    def feeds(self) -> Iterator[Feed]:
        several = not self.request.static and self.source.exported.any_batch
        for feed in feeds_of(self.request, self.source.loaded, self.source.example, several=several):
            yield Feed(self.source.exported.arrays(feed.inputs), feed.words)

    def original(self) -> Runnable:
        return self.source

    def build(self, plan: FoldPlan, output: Path | None) -> Any:
        return self.inner.build(plan, output)

    def folded(self, built: Any) -> Runnable:
        return _Beside(self.inner.folded(built), self.source.engine)


@contextmanager
def _exported(request: Request, loaded: Loaded, example: Example, path: Path) -> Iterator[Subject]:
    from normdoctor.exporting.with_torch import NamedRunner, export_onnx
    from normdoctor.folding.onnx_subject import open_onnx

    exported = export_onnx(loaded, example, path, opset=request.opset, static=request.static)
    inner = replace(
        request,
        model=path,
        export=None,
        arch=None,
        arch_args=None,
        key=None,
        example_inputs=None,
        input_shape=(),
    )
    with open_onnx(inner) as subject:
        notes = [*subject.notes, *loaded.notes, *loaded.losses, *exported.notes]
        form = f"{subject.format}, exported from {_with_article(loaded.kind.value)}"
        yield ExportedSubject(request, subject, NamedRunner(loaded, example, exported), form, notes)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
