"""A checkpoint → a walker, by what kind of model it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normdoctor.data import Batch
from normdoctor.data.wanted import Wanted, wanted_of
from normdoctor.errors import UsageError
from normdoctor.layers import Checkpoint, Container, NormLayer
from normdoctor.measurement.walks import Walker
from normdoctor.models.norm_modules import find_norms
from normdoctor.models.opening import RunOptions, layers_of, load_for
from normdoctor.placing import Found, in_file, in_loaded

if TYPE_CHECKING:
    from normdoctor.models.loaded import Loaded


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
    find_places: Callable[[Batch], Found] = lambda batch: Found()
    """Where its norms stand, as far as a graph can be had; a batch is what a module is traced with."""
    fixed_batch: int | None = None
    spills: bool = False
    notes: list[str] = field(default_factory=list)


@contextmanager
def open_walker(model: Any, checkpoint: Checkpoint, options: RunOptions) -> Iterator[Opened]:
    """The model of a checkpoint with its norms as stops. model: the path or live module behind it.

    Raises RefusedError where trust or an architecture is needed or a program cannot be followed, UsageError for
    options that do not suit the format, InputError for what does not fit together."""
    if checkpoint.container is Container.ONNX:
        with _open_onnx(checkpoint, options) as opened:
            yield opened
        return
    loaded = load_for(model, checkpoint, options)
    layers = layers_of(checkpoint, options.key)
    with _open_torch(loaded, layers) as opened:
        opened.notes[:0] = loaded.notes
        if options.arch is None and checkpoint.graphs:
            opened.find_places = lambda batch: in_file(checkpoint)
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
            find_places=lambda batch: in_file(checkpoint),
        )
    finally:
        walker.close()


@contextmanager
def _open_torch(loaded: Loaded, layers: Sequence[NormLayer]) -> Iterator[Opened]:
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

        def find_places(batch: Batch) -> Found:
            example = walker.fitted(batch)
            walker.disarm()  # hooks of ours are none of the model's, and its modes are part of its graph
            try:
                return in_loaded(given, example, layers)
            finally:
                walker.arm()

        yield Opened(
            walker=walker,
            layers=tuple(layers),
            wanted=wanted,
            held_bytes=lambda batch: with_torch.held_bytes(walker, batch),
            as_saved=walker.as_saved if any(layer.training for layer in layers) else None,
            find_places=find_places,
            fixed_batch=fixed_batch,
            notes=notes,
        )
