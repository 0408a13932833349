"""A checkpoint → a walker, by what kind of model it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normdoctor.data import Batch
from normdoctor.data.wanted import Wanted, wanted_of
from normdoctor.errors import NormDoctorError, RefusedError, UsageError
from normdoctor.layers import Checkpoint, Container, NormLayer
from normdoctor.measurement.gates import gates_of, gates_of_export, gates_of_onnx
from normdoctor.measurement.modules import find_norms
from normdoctor.measurement.walks import Walker

if TYPE_CHECKING:
    from normdoctor.models.inputs import Example
    from normdoctor.models.loaded import Loaded


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a model is made to run."""

    trust: bool = False
    """torch may load the file, which can run code in it."""
    arch: str | None = None
    arch_args: str | Mapping[str, Any] | None = None
    """What builds the module of these weights."""
    key: str | None = None
    """Which model of the file."""
    device: str | None = None
    """torch's name of where it runs; None: where a live module is, else the CPU."""
    spill: Path | None = None
    """A folder for what does not fit into `memory` bytes, where the format can do that (ONNX)."""
    memory: int | None = None


@dataclass(eq=False)
class Opened:
    """A model that can be walked through."""

    walker: Walker
    layers: tuple[NormLayer, ...]
    """The norms of the file that belong to this model."""
    wanted: tuple[Wanted, ...]
    """Its inputs."""
    held_bytes: Callable[[Batch], int]
    """The most that a walk of a batch holds while it stands in front of a norm."""
    as_saved: Callable[[Batch], dict[str, Any]] | None = None
    """Its outputs in the modes in which its modules were saved, dropout aside; None where that is eval mode."""
    gates: Callable[[Batch], Mapping[str, str]] = lambda batch: {}
    """Layer → the activation that alone takes its output, as far as a graph can be had."""
    fixed_batch: int | None = None
    spills: bool = False
    notes: list[str] = field(default_factory=list)


def layers_of(checkpoint: Checkpoint, key: str | None) -> tuple[NormLayer, ...]:
    """The layers of the model with this key, of all models where none is given."""
    if key is None:
        return checkpoint.layers
    return tuple(layer for model in checkpoint.models if model.key == key for layer in model.layers)


@contextmanager
def open_walker(model: Any, checkpoint: Checkpoint, options: RunOptions) -> Iterator[Opened]:
    """The model of a checkpoint with its norms as stops. model: the path or live module behind it.

    Raises RefusedError where trust or an architecture is needed or a program cannot be followed, UsageError for
    options that do not suit the format, InputError for what does not fit together."""
    if checkpoint.container is Container.ONNX:
        with _open_onnx(checkpoint, options) as opened:
            yield opened
        return
    loaded = _load(model, checkpoint, options)
    layers = layers_of(checkpoint, options.key)
    with _open_torch(loaded, layers, options.key) as opened:
        opened.notes[:0] = loaded.notes
        if checkpoint.container is Container.MEMORY:
            opened.as_saved = None  # its mode is that of the moment
        yield opened


@contextmanager
def _open_onnx(checkpoint: Checkpoint, options: RunOptions) -> Iterator[Opened]:
    from normdoctor.measurement import with_onnx

    for name in ("trust", "arch", "arch_args", "key", "device"):
        if getattr(options, name):
            option = name.replace("_", "-")
            raise UsageError(f"{checkpoint.path}: --{option} means nothing for an ONNX file", f"Leave out --{option}.")

    memory = with_onnx.UNLIMITED if options.memory is None else options.memory
    walker = with_onnx.open_onnx(Path(checkpoint.path), spill=options.spill, memory=memory)
    try:
        yield Opened(
            walker=walker,
            layers=checkpoint.layers,
            wanted=walker.wanted,
            held_bytes=walker.live_bytes,
            fixed_batch=walker.fixed_batch,
            spills=True,
            gates=lambda batch: gates_of_onnx(Path(checkpoint.path)),
        )
    finally:
        walker.close()


def _load(model: Any, checkpoint: Checkpoint, options: RunOptions) -> Loaded:
    from normdoctor.models import with_torch

    if checkpoint.container is Container.MEMORY:
        if options.device is not None:
            raise UsageError("a live module runs where it is", "Move it with .to(), and leave out device.")
        if options.arch is not None or options.key is not None:
            raise UsageError("--arch and --key are for files", "Give the live module alone.")
        if not hasattr(model, "named_modules"):
            raise RefusedError(
                f"a {type(model).__name__} cannot be run: a flat dictionary cannot prove what feeds what",
                "Give the live torch.nn.Module.",
            )
        loaded = with_torch.live(model)
    else:
        loaded = with_torch.open_model(
            Path(checkpoint.path), trust=options.trust, arch=options.arch, arch_args=options.arch_args, key=options.key
        )
    return loaded if options.device is None else with_torch.moved(loaded, options.device)


@contextmanager
def _open_torch(loaded: Loaded, layers: Sequence[NormLayer], key: str | None) -> Iterator[Opened]:
    from normdoctor.looking.with_torch import look_at
    from normdoctor.measurement import with_torch
    from normdoctor.models.loaded import Kind
    from normdoctor.models.with_torch import dtype_of

    fixed_batch: int | None = None
    notes: list[str] = []
    wanted = wanted_of(loaded, str(dtype_of(loaded)).removeprefix("torch."))
    others: dict[str, Any] = {}
    given = loaded
    if loaded.kind is Kind.MODULE:
        found = find_norms(loaded.model, layers)
        norms, left = found.norms, found.left
        others = {name: (module, look_at(module, own)) for name, (module, own) in found.others.items()}
    else:
        from normdoctor.programs.with_torch import unrolled

        program = unrolled(loaded, layers)
        norms, left, fixed_batch = dict(program.norms), dict(program.left), program.fixed_batch
        notes += program.notes
        loaded = with_torch.as_module(loaded, program.module)
    with with_torch.open_module(loaded, norms, left, others) as walker:
        yield Opened(
            walker=walker,
            layers=tuple(layers),
            wanted=wanted,
            held_bytes=lambda batch: with_torch.held_bytes(walker, batch),
            as_saved=walker.as_saved if any(layer.training for layer in layers) else None,
            gates=lambda batch: _gates(given, walker.fitted(batch), norms, layers, key),
            fixed_batch=fixed_batch,
            notes=notes,
        )


def _gates(
    loaded: Loaded, example: Example, norms: Mapping[str, Any], layers: Sequence[NormLayer], key: str | None
) -> dict[str, str]:
    """The activations behind the norms of a model of torch; none where its graph cannot be followed."""
    from normdoctor.models.loaded import Kind

    if loaded.kind is Kind.PROGRAM:
        return gates_of_export(Path(loaded.name), key)
    try:
        if loaded.kind is Kind.SCRIPT:
            from normdoctor.torchscript.with_torch import read_script

            named = {name: layer for layer in layers for name in (layer.name, *layer.aliases)}
            return gates_of(read_script(loaded, example, named).graph)
        from normdoctor.tracing.with_torch import trace

        found = gates_of(trace(loaded, example).graph)
    except NormDoctorError:
        return {}
    modules = dict(loaded.model.named_modules())
    return {
        name: found[path]
        for name, norm in norms.items()
        for path, other in modules.items()
        if other is norm and path in found
    }
