"""What is loaded to run the model of a checkpoint, and how it is made to run. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normdoctor.errors import RefusedError, UsageError
from normdoctor.layers import Checkpoint, Container, NormLayer

if TYPE_CHECKING:
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


def layers_of(checkpoint: Checkpoint, key: str | None) -> tuple[NormLayer, ...]:
    """The layers of the model with this key, of all models where none is given."""
    if key is None:
        return checkpoint.layers
    return tuple(layer for model in checkpoint.models if model.key == key for layer in model.layers)


def load_for(model: Any, checkpoint: Checkpoint, options: RunOptions) -> Loaded:
    """The model of a checkpoint that torch runs. model: the path or live module behind it; a live one is not copied.

    Raises RefusedError where trust or an architecture is needed, UsageError for options that do not suit it,
    InputError for what does not fit together."""
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
