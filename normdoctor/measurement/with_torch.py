"""Modules of torch as walkers: every batch runs in a greenlet of its own, and hooks stop it in front of each norm.

Greenlets are all in one thread, so grad mode, autocast and the thread pool are as in a plain loop, where paused
threads would each have their own."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import greenlet
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils.weak import WeakTensorKeyDictionary

from normdoctor.data import Batch
from normdoctor.errors import NormDoctorError, RefusedError
from normdoctor.looking.with_torch import active, is_off, seen
from normdoctor.measurement.walks import Look, Pause, Seen, Vector
from normdoctor.models.inputs import Example
from normdoctor.models.loaded import Kind, Loaded, flatten
from normdoctor.models.norm_modules import BUFFERS
from normdoctor.models.with_torch import cannot_run, device_of, dtype_of
from normdoctor.readers.live_module import LiveArray

WIDEST = (torch.float32, torch.float64, torch.bfloat16)
"""Types that can hold every mean and variance that occurs."""


class _Place(greenlet.greenlet):  # type: ignore[misc]
    """Where a batch's forward pass is; hooks know it by this class."""

    look: Look


class ModuleWalk:
    """See `Walk`."""

    def __init__(self, walker: ModuleWalker, batch: Batch, look: Look) -> None:
        self._walker = walker
        self._place = _Place(self._forward)
        self._place.look = look
        self._batch: Batch | None = batch
        self._like = Example((), {})
        """Its arguments without their values, for messages."""
        self._outputs: dict[str, NDArray[Any]] = {}

    def _forward(self) -> None:
        batch, self._batch = self._batch, None  # the arguments live in the frames of forward alone
        assert batch is not None
        example = self._walker.fitted(batch)
        del batch
        self._like = _without_values(example)
        outputs = self._walker.module(*example.args, **example.kwargs)
        self._outputs = {name: LiveArray(tensor).load() for name, tensor in flatten(outputs)}

    def advance(self) -> Pause | None:
        try:
            with torch.no_grad(), self._walker.surroundings():
                pause: Pause | None = self._place.switch()
        except NormDoctorError:
            raise
        except (Exception, SystemExit) as error:
            raise cannot_run(self._walker.loaded, self._like, error, "--data") from error
        return pause

    @property
    def outputs(self) -> dict[str, NDArray[Any]]:
        return self._outputs

    def close(self) -> None:
        if self._place and not self._place.dead:
            with contextlib.suppress(Exception), torch.no_grad():
                self._place.throw(greenlet.GreenletExit)


def _without_values(example: Example) -> Example:
    args, kwargs = _pytree.tree_map(
        lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value, (example.args, example.kwargs)
    )
    return Example(args, kwargs)


class ModuleWalker:
    """See `Walker`. Made by `open_module`, which puts the module back as it was."""

    ddof = 1

    def __init__(
        self,
        loaded: Loaded,
        norms: Mapping[str, nn.Module],
        left: Mapping[str, str],
        others: Mapping[str, tuple[nn.Module, Callable[[torch.Tensor], Seen]]],
    ) -> None:
        self.loaded = loaded
        self.module = loaded.module
        self.name = loaded.name
        self.left = left
        self._modules = dict(norms)
        self._others = others
        self._original = {
            (name, field): tensor for name, module in norms.items() for field, tensor in module._buffers.items()
        }
        self._saved_modes = {inner: inner.training for inner in self.module.modules()}
        self._handles: list[Any] = []
        self._device = device_of(loaded)
        self._dtype = dtype_of(loaded)
        self.modes = mode_stacks()
        self.shifts: dict[str, torch.Tensor] = {}
        """Where the inputs of a norm lie that are far from 0."""

    @property
    def norms(self) -> Mapping[str, int]:
        sizes = {name: module._buffers[BUFFERS[0]] for name, module in self._modules.items()}
        return {name: int(buffer.numel()) for name, buffer in sizes.items() if buffer is not None}

    def start(self, batch: Batch, look: Look) -> ModuleWalk:
        return ModuleWalk(self, batch, look)

    def arm(self) -> None:
        """Put a hook in front of each norm, and the module into eval mode."""
        stops = [(norm, self.stop(name, norm)) for name, norm in self._modules.items()]
        stops += [(other, self.stop(name, None)) for name, (other, _) in self._others.items()]
        for module, stop in stops:
            self._handles.append(module.register_forward_pre_hook(stop, prepend=False, with_kwargs=True))
        with contextlib.suppress(NotImplementedError):  # an exported program has its modes in its graph
            self.module.eval()

    def disarm(self) -> None:
        """Take the hooks away, and give every module the mode that it had."""
        while self._handles:
            self._handles.pop().remove()
        for inner, training in self._saved_modes.items():
            inner.training = training

    def put(self, norm: str, mean: Vector, var: Vector) -> None:
        buffers = self._modules[norm]._buffers
        for name, values in zip(BUFFERS, (mean, var), strict=True):
            old = buffers[name]
            assert old is not None
            new = torch.from_numpy(values).to(device=old.device, dtype=old.dtype, copy=True).reshape(old.shape)
            if old.dtype not in WIDEST and not bool(torch.isfinite(new).all()):
                dtype = str(old.dtype).removeprefix("torch.")
                raise RefusedError(
                    f"{norm}.{name}: {dtype} cannot hold {np.abs(values).max():.3g}", "Save the model in float32 first."
                )
            buffers[name] = new

    def restore(self) -> None:
        for (name, field), tensor in self._original.items():
            self._modules[name]._buffers[field] = tensor

    def fitted(self, batch: Batch) -> Example:
        """The batch as tensors on the model's device. Float arrays take the model's float type."""

        def moved(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(np.ascontiguousarray(value))
                if value.is_floating_point():
                    value = value.to(self._dtype)
            # A copy: forward may write into it, and the batch is needed again.
            return value.to(self._device, copy=True) if isinstance(value, torch.Tensor) else value

        args, kwargs = _pytree.tree_map(moved, (batch.args, batch.kwargs))
        return Example(tuple(args), dict(kwargs))

    def as_saved(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Its outputs in the modes that its modules had before, dropout aside. No statistics change."""
        example = self.fitted(batch)
        evaluating = {inner: inner.training for inner in self.module.modules()}
        try:
            for inner, training in self._saved_modes.items():
                inner.training = training and "Dropout" not in type(inner).__name__
            for norm in self._modules.values():
                for field, tensor in norm._buffers.items():
                    norm._buffers[field] = None if tensor is None else tensor.clone()
            with torch.no_grad(), self.surroundings():
                outputs = self.module(*example.args, **example.kwargs)
        except Exception as error:
            raise cannot_run(self.loaded, example, error, "--data") from error
        finally:
            self.restore()
            for inner, training in evaluating.items():
                inner.training = training
        return {name: LiveArray(tensor).load() for name, tensor in flatten(outputs)}

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """What a walk may change around itself, put back when another one goes on."""
        autocast, dtype, stdout = _autocast(), torch.get_default_dtype(), sys.stdout
        sys.stdout = sys.stderr  # what the code of a model prints is no part of a report
        try:
            yield
        finally:
            sys.stdout = stdout
            torch.set_default_dtype(dtype)
            _set_autocast(autocast)

    def stop(self, name: str, norm: nn.Module | None) -> Callable[..., None]:
        """The hook in front of a norm (None: one without buffers)."""

        def pause(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = greenlet.getcurrent()
            if not isinstance(place, _Place):
                return
            if norm is None and not place.look.others:
                return
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, torch.Tensor):
                return
            if norm is None:
                found = self._others[name][1](x)
            else:
                found = seen(x, samples=place.look.samples, shift=self.shifts.get(name))
                if is_off(found.moments.mean, found.moments.mean**2 + found.moments.variance()):
                    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
                    self.shifts[name] = torch.from_numpy(found.moments.mean).to(device=x.device, dtype=wide)
                if place.look.active:
                    found = Seen(found.moments, found.sample_means, active(x, norm))
            if mode_stacks() != self.modes:
                raise RefusedError(
                    f"{name}: is called inside a context of torch (a device, a mode, inference_mode) that cannot be "
                    "left and entered again",
                    "Take the context out of forward, and put it around the call of the model.",
                )
            del x, args, kwargs
            grad, own, dtype = torch.is_grad_enabled(), _autocast(), torch.get_default_dtype()
            assert place.parent is not None
            place.parent.switch(Pause(name, found))
            torch.set_grad_enabled(grad)
            _set_autocast(own)
            torch.set_default_dtype(dtype)

        return pause


def mode_stacks() -> tuple[int, int, bool]:
    """How many modes of torch are active around the caller, and whether inference_mode is."""
    stacks = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return *stacks, torch.is_inference_mode_enabled()


def _autocast() -> dict[str, tuple[bool, torch.dtype]]:
    return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")}


def _set_autocast(state: Mapping[str, tuple[bool, torch.dtype]]) -> None:
    for kind, (enabled, dtype) in state.items():
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


@contextlib.contextmanager
def open_module(
    loaded: Loaded,
    norms: Mapping[str, nn.Module],
    left: Mapping[str, str],
    others: Mapping[str, tuple[nn.Module, Callable[[torch.Tensor], Seen]]] | None = None,
) -> Iterator[ModuleWalker]:
    """The module in eval mode with a hook in front of each norm; whatever happens, it is put back as it was.

    norms: layer name → the module that normalises, with buffers running_mean and running_var. others: norms
    without buffers, and what looks at their inputs. left: norms that cannot be stopped at → why."""
    others = others or {}
    walker = ModuleWalker(loaded, norms, left, others)
    try:
        walker.arm()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield walker
    finally:
        walker.disarm()
        walker.restore()


def as_module(loaded: Loaded, module: nn.Module) -> Loaded:
    """What a program was unrolled to, in its place."""
    return replace(loaded, kind=Kind.MODULE, model=module)


# memory


class _Living(TorchFunctionMode):
    """Counts the bytes of the tensors that are alive, of those that functions of torch gave while it was on."""

    # A TorchDispatchMode would see more (what lives inside a function), but importing what it needs takes seconds.

    def __init__(self) -> None:
        super().__init__()
        self._made: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._made[tensor] = True
        return results

    def bytes(self) -> int:
        storages = {}
        for tensor in list(self._made.keys()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def held_bytes(walker: ModuleWalker, batch: Batch) -> int:
    """The most that a walk of this batch holds while it stands in front of a norm, in bytes, its inputs included."""
    example = walker.fitted(batch)
    given = [leaf for leaf in _pytree.tree_leaves((example.args, example.kwargs)) if isinstance(leaf, torch.Tensor)]
    most, modes = 0, walker.modes
    with contextlib.closing(walker.start(batch, Look())) as walk, _Living() as living:
        walker.modes = mode_stacks()
        try:
            while walk.advance() is not None:
                with torch._C.DisableTorchFunction():
                    most = max(most, living.bytes())
        finally:
            walker.modes = modes
            walker.shifts.clear()  # what follows is not to depend on the statistics as stored, not in one bit
    return most + sum(tensor.numel() * tensor.element_size() for tensor in given)
