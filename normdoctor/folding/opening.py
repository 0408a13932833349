"""What the caller asked for → a subject to fold, by the content of its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from normdoctor.errors import UsageError
from normdoctor.folding.subjects import Subject
from normdoctor.layers import Container
from normdoctor.models.inputs import InputSpec, parse_input_shapes
from normdoctor.readers import open_checkpoint
from normdoctor.readers.live_module import is_module

EXPORTED = "torch.export.load"
"""`Checkpoint.loader` of .pt2 packages."""

WEIGHT_SUFFIXES = (".safetensors", ".json", ".bin", "")
"""Names of files that never hold a whole module."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `fold` that say what is folded and where it goes."""

    model: Any
    example_inputs: Any = None
    output: Path | None = None
    export: Literal["onnx"] | None = None
    opset: int | None = None
    static: bool = False
    trust: bool = False
    arch: str | None = None
    arch_args: str | Mapping[str, Any] | None = None
    key: str | None = None
    input_shape: tuple[str, ...] = ()
    data: Path | None = None
    state_dict: bool = False
    seed: int = 0

    @property
    def path(self) -> Path | None:
        """The input file, None for a live module."""
        return Path(self.model) if isinstance(self.model, (str, Path)) else None

    @property
    def source(self) -> str:
        """What messages and reports call the model."""
        return type(self.model).__name__ if self.path is None else str(self.path)

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        """The inputs that --input-shape describes."""
        return parse_input_shapes(self.input_shape)

    @property
    def gives_inputs(self) -> bool:
        """Whether the caller says what the model is run on, so that it is his to correct."""
        return bool(self.data is not None or self.input_shape or self.example_inputs is not None)

    def check(self) -> None:
        """Raise UsageError for options that make no sense together."""
        if self.path is None and not is_module(self.model):
            raise UsageError(
                f"cannot fold a {type(self.model).__name__}", "Give a path or a live torch.nn.Module, no state_dict."
            )
        if self.output is not None and str(self.output) == "-":
            raise UsageError("-: a model is written to a file", "Give its name with -o, or leave -o out.")
        if self.export not in (None, "onnx"):
            raise UsageError(f"no export to {self.export!r}", "The only one is onnx.")
        if self.export is None and (self.opset is not None or self.static):
            raise UsageError(f"{'--opset' if self.opset else '--static'} is for --export onnx", "Add --export onnx.")
        if self.export is not None and self.state_dict:
            raise UsageError("--state-dict and --export onnx exclude each other")
        if self.opset is not None and not 7 <= self.opset <= 99:
            raise UsageError(f"--opset {self.opset}: no such opset", "18 is what most runtimes take.")
        if self.arch is None and self.arch_args is not None:
            raise UsageError("--arch-args without --arch", "Name the class or function with --arch.")
        if self.path is None and (self.arch is not None or self.key is not None):
            raise UsageError("--arch and --key are for files", "Give the live module alone.")
        if self.path is None and self.export is not None and self.output is None:
            raise UsageError("an export of a live module needs a place to go", "Give output='model.onnx'.")
        if self.path is None and self.state_dict and self.output is None:
            raise UsageError("a state_dict of a live module needs a place to go", "Give output='model.pt'.")
        _ = self.specs

    def target(self) -> Path | None:
        """Where the folded model goes: model.pt → model.folded.pt, model.onnx for an export."""
        if self.output is not None or self.path is None:
            return self.output
        path = self.path
        if self.export is not None:
            return path.parent / f"{path.stem}.onnx"
        suffix = path.suffix
        if self.arch is not None and suffix in WEIGHT_SUFFIXES:
            suffix = ".pt"
        return path.parent / f"{path.stem}.folded{suffix}"


class Found(NamedTuple):
    """What the content of a file says it is."""

    container: Container
    loader: str = ""
    form: str = ""
    """The format in words."""


def look_at(request: Request) -> Found:
    """What is to be folded. Raises InputError for what cannot be read, UsageError for options that do not suit it."""
    if request.path is None:
        return Found(Container.MEMORY)
    with open_checkpoint(request.path) as checkpoint:
        found = Found(checkpoint.container, checkpoint.loader, checkpoint.format)
    if found.container is Container.ONNX:
        for name, given in (("--export", request.export), ("--arch", request.arch), ("--key", request.key)):
            if given is not None:
                raise UsageError(f"{request.source}: {name} means nothing for an ONNX file", f"Leave out {name}.")
        if request.state_dict:
            raise UsageError(f"{request.source}: an ONNX file has no state_dict", "Leave out --state-dict.")
    return found


@contextmanager
def open_subject(request: Request, found: Found) -> Iterator[Subject]:
    """The model to fold. Raises InputError, UsageError or RefusedError for what cannot be opened so."""
    if found.container is Container.ONNX:
        from normdoctor.folding import onnx_subject

        with onnx_subject.open_onnx(request) as subject:
            yield subject
    elif found.loader == EXPORTED and request.export is None and request.arch is None:
        from normdoctor.folding import export_subject

        with export_subject.open_export(request, found.form) as subject:
            yield subject
    else:
        from normdoctor.folding import module_subject

        with module_subject.open_module(request) as subject:
            yield subject
