"""A fold plan → the module with the norms in its weights; and modules run for the proof."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree

from normdoctor.data.wanted import Wanted, fitted
from normdoctor.errors import RefusedError
from normdoctor.flow.graph import Fixed
from normdoctor.flow.plan import FoldPlan, NewInput
from normdoctor.models.architecture import one_line
from normdoctor.models.inputs import Example
from normdoctor.models.loaded import Kind, Loaded, parameters_of
from normdoctor.models.with_torch import copied, device_of, dtype_of, example_in_float64, in_float64, quiet, run
from normdoctor.readers.arrays import decode, encode
from normdoctor.tracing.sites import Sites
from normdoctor.writing import replacing


def apply(plan: FoldPlan, sites: Sites, module: nn.Module) -> nn.Module:
    """A copy of the module with the plan done to it: new weights, norms replaced by Identity.

    Where a module held more than its norm (BatchNormAct2d) what followed the norm stays in its place."""
    result: nn.Module = copied(module)
    modules = dict(result.named_modules(remove_duplicate=False))
    for new in plan.new_inputs():
        holder = sites.holder(new.node, new.slot)
        assert not isinstance(holder, Fixed), holder
        path, name = holder
        _assign(modules[path], name, new)
    if plan.state.evaluation:
        result.eval()  # what was proven: also without dropout
    gone: dict[str, tuple[str, ...]] = {}
    for node in plan.bypassed:
        found = sites.replacement(node)
        assert not isinstance(found, Fixed), found
        gone[found[0]] = found[1]
    for path, children in gone.items():
        _replace(result, modules[path], _what_stays(modules[path], children))
    return result


def _assign(module: nn.Module, name: str, new: NewInput) -> None:
    """Give the module new values for a parameter or buffer, in its own type and on its own device."""
    old = module._parameters.get(name, module._buffers.get(name))
    like = old if old is not None else next((one for one in module._parameters.values() if one is not None), None)
    dtype = new.dtype if old is None else str(old.dtype).removeprefix("torch.")
    array = decode(encode(new.values, dtype), dtype).reshape(new.values.shape)
    tensor = torch.from_numpy(np.array(array)).to(getattr(torch, dtype))
    if like is not None:
        tensor = tensor.to(like.device)
    if name in module._buffers:
        module._buffers[name] = tensor
        return
    trained = like is None or like.requires_grad
    module._parameters[name] = nn.Parameter(tensor, requires_grad=trained)
    if old is None and hasattr(module, "affine"):
        vars(module)["affine"] = True


def _what_stays(norm: nn.Module, children: tuple[str, ...]) -> nn.Module:
    stays = OrderedDict((name, norm.get_submodule(name)) for name in children)
    result: nn.Module = nn.Sequential(stays) if stays else nn.Identity()
    vars(result)["training"] = norm.training
    return result


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under every name that it has."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def save(module: nn.Module, output: Path, *, state_dict: bool = False) -> None:
    """Write the whole module, or its state_dict alone; whole or not at all.

    Raises RefusedError for a module that cannot be pickled."""
    with replacing(output) as temporary:
        try:
            with quiet():
                torch.save(module.state_dict() if state_dict else module, temporary)
        except OSError:
            raise
        except Exception as error:
            raise RefusedError(
                f"{type(module).__name__}: torch.save cannot write it ({one_line(error)})",
                "Add --state-dict for its tensors alone, or --export onnx.",
            ) from error


@dataclass(frozen=True, eq=False)
class Runner:
    """A model that can be run on the arguments of an `Example`, for the proof."""

    loaded: Loaded
    wide: bool = False
    """Whether everything is in float64."""
    apart: bool = False
    """Whether each run has a copy of the module: what its code keeps in attributes then stays out of the next."""

    @property
    def engine(self) -> str:
        return f"torch {torch.__version__.partition('+')[0]} ({device_of(self.loaded).type})"

    def run(self, inputs: Example) -> Mapping[str, NDArray[Any]]:
        """Outputs by name. Raises CannotRunError."""
        loaded = replace(self.loaded, model=copied(self.loaded.model, parameters=False)) if self.apart else self.loaded
        return run(loaded, example_in_float64(inputs) if self.wide else inputs)

    def in_float64(self) -> Runner:
        """The same in float64. Raises CannotRunError."""
        return Runner(in_float64(self.loaded), wide=True)

    def float64_seconds(self, seconds: float) -> float:
        """How long that should take: double the bytes; half types are computed in float32 or worse."""
        return 2.0 * seconds


def with_arrays(example: Example, names: Mapping[str, int | str], arrays: Mapping[str, NDArray[Any]]) -> Example:
    """The example with the tensors of these names replaced by arrays, in the types of the tensors.

    names: each name's place in the arguments, or its keyword."""
    args, kwargs = list(example.args), dict(example.kwargs)
    for name, array in arrays.items():
        place = names[name]
        old = args[place] if isinstance(place, int) else kwargs[place]
        tensor = torch.from_numpy(np.array(array)).to(old.dtype).to(old.device)
        if isinstance(place, int):
            args[place] = tensor
        else:
            kwargs[place] = tensor
    return Example(tuple(args), kwargs)


def tensors_of(example: Example) -> list[torch.Tensor]:
    """Every tensor among the arguments, however nested."""
    leaves = _pytree.tree_leaves((example.args, example.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def with_length(example: Example, axis: int, old: int, new: int, *, images: bool = False) -> Example:
    """The example with `new` entries along an axis wherever it has `old`: cut off, or begun again.

    images: only tensors of floats with at least three axes."""

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim <= axis or leaf.shape[axis] != old:
            return leaf
        if images and (leaf.ndim < 3 or not leaf.is_floating_point()):
            return leaf
        return leaf.index_select(axis, torch.arange(new, device=leaf.device) % old)

    args, kwargs = _pytree.tree_map(changed, (example.args, example.kwargs))
    return Example(tuple(args), dict(kwargs))


def argument_of(loaded: Loaded, path: Path, name: str, array: NDArray[Any], dtype: str | None) -> Any:
    """An array of --data as the argument of this name: a tensor, or a number where TorchScript wants one.

    dtype: torch's name; None for the array's own type, or the float type of the model for floats."""
    if dtype is None:
        dtype = str(dtype_of(loaded)).removeprefix("torch.") if array.dtype.kind == "f" else str(array.dtype)
    value = fitted(path, array, Wanted(name, None, dtype))
    if loaded.kind is Kind.SCRIPT and not value.ndim:
        kinds = {entry.name: str(entry.type) for entry in loaded.model.forward.schema.arguments}
        if kinds.get(name) in ("int", "float", "bool", "number"):
            return value.item()
    return torch.from_numpy(np.array(value)).to(getattr(torch, dtype)).to(device_of(loaded))


def named_tensors(loaded: Loaded, example: Example) -> Iterator[tuple[str, int | str, torch.Tensor]]:
    """The tensors among the arguments: name, place or keyword, value."""
    names = [name for name in parameters_of(loaded) if not name.startswith("*")]
    for place, value in enumerate(example.args):
        if isinstance(value, torch.Tensor):
            yield (names[place] if place < len(names) else f"input_{place}"), place, value
    for name, value in example.kwargs.items():
        if isinstance(value, torch.Tensor):
            yield name, name, value
