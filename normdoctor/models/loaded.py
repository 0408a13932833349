"""A model that torch has loaded, and how it is called: arguments and outputs by name. Nothing here imports torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from normdoctor.models.inputs import Example
from normdoctor.readers.live_module import is_tensor


class Kind(Enum):
    """What torch made of a file; the value is how messages name it."""

    MODULE = "module"
    PROGRAM = "exported program"
    SCRIPT = "TorchScript module"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that torch can run, ours alone: nobody else sees what is done to it."""

    kind: Kind
    model: Any
    """nn.Module, torch.export.ExportedProgram or torch.jit.ScriptModule."""
    name: str
    """For messages: the path, or the class of a live module."""
    evaluation: bool = False
    """Whether it is meant for inference whatever its modules say: built by --arch, so never trained here."""
    notes: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    """What a file that is written anew from the model would not have any more."""

    @property
    def module(self) -> Any:
        """What can be called."""
        return self.model.module() if self.kind is Kind.PROGRAM else self.model


def parameters_of(loaded: Loaded) -> list[str]:
    """The names of the arguments of forward, as far as they can be told; *args and **kwargs with their stars."""
    if loaded.kind is Kind.SCRIPT:
        return [argument.name for argument in loaded.model.forward.schema.arguments[1:]]
    forward = getattr(loaded.module, "forward", loaded.module)
    try:
        found = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    return [stars.get(parameter.kind.name, "") + parameter.name for parameter in found]


def required_of(loaded: Loaded) -> list[str]:
    """The arguments of forward that have no default; as far as they can be told."""
    if loaded.kind is Kind.SCRIPT:
        return [entry.name for entry in loaded.model.forward.schema.arguments[1:] if not entry.has_default_value()]
    forward = getattr(loaded.module, "forward", loaded.module)
    try:
        found = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [entry.name for entry in found if entry.default is entry.empty and "VAR" not in entry.kind.name]


def example_of(value: Any) -> Example:
    """The example inputs as a caller gives them: a tensor, a tuple of arguments, a dictionary of named ones."""
    if isinstance(value, Example):
        return value
    if isinstance(value, Mapping):
        return Example((), dict(value))
    return Example(tuple(value) if isinstance(value, (list, tuple)) else (value,), {})


def named_inputs(loaded: Loaded, example: Example) -> dict[str, Any]:
    """The arguments by the names of forward's; those that it does not name by their place."""
    names = [name for name in parameters_of(loaded) if not name.startswith("*")]
    found = {names[i] if i < len(names) else f"input_{i}": value for i, value in enumerate(example.args)}
    return {**found, **example.kwargs}


def described(loaded: Loaded, example: Example) -> str:
    """The arguments by name, with their shapes: x 2x3x8x8, sr a single number int64."""
    return str(Example((), named_inputs(loaded, example)))


def in_order(loaded: Loaded, example: Example) -> list[Any]:
    """All arguments by place, those that are not given with their defaults, as far as something is given."""
    names = [name for name in parameters_of(loaded) if not name.startswith("*")][len(example.args) :]
    defaults: dict[str, Any] = {}
    if loaded.kind is Kind.SCRIPT:
        defaults = {argument.name: argument.default_value for argument in loaded.model.forward.schema.arguments}
    values = [*example.args, *(example.kwargs.get(name, defaults.get(name)) for name in names)]
    while loaded.kind is not Kind.SCRIPT and values and values[-1] is None:
        values.pop()
    return values


def flatten(outputs: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor in nested outputs with its name: output for a single one, output.0 in a tuple, keys of a dict."""
    if is_tensor(outputs):
        yield name or "output", outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        for entry in fields(outputs):
            yield from flatten(getattr(outputs, entry.name), f"{name}.{entry.name}" if name else entry.name)
    elif isinstance(outputs, (list, tuple)):
        keys = getattr(outputs, "_fields", range(len(outputs)))
        for key, value in zip(keys, outputs, strict=True):
            yield from flatten(value, f"{name or 'output'}.{key}")
