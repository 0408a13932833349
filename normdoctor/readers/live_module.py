"""A live nn.Module, or its state_dict, → Checkpoint. The caller has torch; nothing here imports it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from normdoctor.errors import InputError
from normdoctor.layers import ArrayRef, Checkpoint, Container, Reference
from normdoctor.readers.modules import ModuleRecord, notes_on_lazy, read_modules
from normdoctor.readers.naming import read_names, why_no_norms


def is_module(target: object) -> bool:
    """Whether `target` is a torch.nn.Module, told without importing torch."""
    return any(
        base.__module__ == "torch.nn.modules.module" and base.__name__ == "Module" for base in type(target).__mro__
    )


def is_state_dict(target: object) -> bool:
    """Whether `target` is a flat mapping of names to tensors; what is no tensor in it may be an extra state."""
    return (
        isinstance(target, Mapping)
        and all(isinstance(name, str) for name in target)
        and any(map(is_tensor, target.values()))
    )


def read(module: Any) -> Checkpoint:
    """The norm layers of a live module, with its values at the moment each is first asked for."""
    model, references = read_modules(LiveModule(module))
    return Checkpoint(
        path=type(module).__name__,
        format="live PyTorch module",
        container=Container.MEMORY,
        models=(model,),
        notes=tuple(notes_on_lazy([model])),
        list_references=lambda: references,
    )


def read_state_dict(state: Mapping[str, Any]) -> Checkpoint:
    """The norm layers of a state_dict in memory. What lies a level deeper in it is not read, and noted."""
    tensors = {name: LiveArray(value) for name, value in state.items() if is_tensor(value) and not _is_lazy(value)}
    model = read_names(tensors)
    inside = [name for name, value in state.items() if isinstance(value, Mapping)]
    why = None if model.layers else why_no_norms(tensors)
    notes = [f"no norm layers: {why}"] if why else []
    if inside:
        count = "1 mapping" if len(inside) == 1 else f"{len(inside):,} mappings"
        notes.append(f"not looked into: {count} inside this one ({inside[0]}); inspect each by itself")
    return Checkpoint(
        path="state_dict",
        format="live PyTorch state_dict",
        container=Container.MEMORY,
        models=(model,),
        notes=tuple(notes),
        list_references=lambda: tuple(Reference(name, array) for name, array in tensors.items()),
    )


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch.Tensor, told without importing torch."""
    return any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in type(value).__mro__)


def _is_lazy(tensor: object) -> bool:
    """A lazy module's tensors have neither shape nor values before its first batch."""
    return type(tensor).__name__.startswith("Uninitialized")


@dataclass(frozen=True, eq=False)
class LiveArray:
    """A torch tensor as an ArrayRef."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        return int(self.tensor.numel() * self.tensor.element_size())

    @property
    def identity(self) -> Hashable:
        tensor = self.tensor
        place = tensor.data_ptr() or id(tensor)  # on the meta device all pointers are 0
        return (str(tensor.device), place, self.dtype, self.shape, tuple(tensor.stride()))

    def numpy(self) -> NDArray[Any]:
        return self._values

    @cached_property
    def _values(self) -> NDArray[Any]:
        return self.load()

    def load(self) -> NDArray[Any]:
        """The values, copied anew."""
        return _values_of(self.tensor.detach(), self.dtype).copy()

    @property
    def has_rows(self) -> bool:
        return bool(self.shape)

    def load_rows(self, start: int, stop: int) -> NDArray[Any]:
        """The values of a part of the first axis; they may lie in the memory of the tensor."""
        return _values_of(self.tensor.detach()[start:stop], self.dtype)


def _values_of(tensor: Any, dtype: str) -> NDArray[Any]:
    if tensor.is_meta:
        raise InputError("a norm parameter is on the meta device and has no values", "Load the weights first.")
    tensor = tensor.cpu()
    if dtype.startswith(("bfloat", "float8")):
        tensor = tensor.float()
    values: NDArray[Any] = tensor.numpy()
    return values


@dataclass(frozen=True)
class LiveModule:
    """A live nn.Module as a ModuleRecord."""

    module: Any

    @property
    def identity(self) -> int:
        return id(self.module)

    @property
    def class_names(self) -> tuple[str, ...]:
        bases = [base for base in type(self.module).__mro__ if base is not object]
        return tuple(f"{base.__module__}.{base.__qualname__}" for base in bases)

    @property
    def attributes(self) -> Mapping[str, Any]:
        attributes: Mapping[str, Any] = vars(self.module)
        return attributes

    @cached_property
    def _own(self) -> dict[str, Any]:
        module = self.module
        tables = {**module._parameters, **module._buffers}
        return {name: tensor for name, tensor in tables.items() if tensor is not None and not _is_lazy(tensor)}

    @cached_property
    def tensors(self) -> Mapping[str, ArrayRef]:
        return {name: LiveArray(tensor) for name, tensor in self._own.items()}

    @property
    def trainable(self) -> bool | None:
        flags = [bool(p.requires_grad) for p in self.module._parameters.values() if p is not None]
        return any(flags) if flags else None

    def children(self) -> Iterable[tuple[str, ModuleRecord]]:
        for name, child in self.module._modules.items():
            if child is not None:
                yield name, LiveModule(child)
