"""Tracing a module in eval mode: torch.export, with a free batch axis if it can be; torch.fx where that fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils import _pytree

from normdoctor.errors import InputError
from normdoctor.flow.graph import Graph
from normdoctor.models.architecture import one_line
from normdoctor.models.inputs import Example
from normdoctor.models.loaded import Kind, Loaded, flatten
from normdoctor.models.with_torch import copied, quiet, run
from normdoctor.tracing.recorded import Recording, Stored, read_recording
from normdoctor.tracing.sites import Calls, Sites, mark_sites

ROOT = "model"

NAMED = 5
"""How many names a note gives."""


class _Flat(nn.Module):
    """A module that takes and gives a flat row of tensors, however nested its arguments and outputs are."""

    def __init__(self, model: Any, example: Example) -> None:
        super().__init__()
        self.model = model
        leaves, self._form = _pytree.tree_flatten((example.args, example.kwargs))
        self._others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = tuple(leaves[place] for place in self._places)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self._others)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = _pytree.tree_unflatten(leaves, self._form)
        return tuple(tensor for _, tensor in flatten(self.model(*args, **kwargs)))


@dataclass(frozen=True, eq=False)
class Trace:
    """A module's graph, and how it came about."""

    sites: Sites
    any_batch: bool
    """Whether it holds for every batch size."""
    notes: list[str] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        return self.sites.recording.graph


def trace(loaded: Loaded, example: Example) -> Trace:
    """The neutral graph of a module in eval mode; `Node.fixed` tells what its code does not let us change.

    Norms and dropouts that the module has in training mode have it in the graph too, unless `loaded.evaluation`.
    Raises CannotRunError for inputs that do not fit, InputError where no tracer can follow the code."""
    assert loaded.kind is Kind.MODULE
    modes = {name: module.training for name, module in loaded.model.named_modules()}
    # Code that keeps a tensor in an attribute keeps the tracer's: in a copy.
    loaded = replace(loaded, model=copied(loaded.model, parameters=False))
    calls = _count_calls(loaded, example)
    loaded.model.eval()
    with torch.no_grad(), quiet():
        recording, any_batch = _record(loaded, example)
    for name, module in loaded.model.named_modules():
        module.training = modes.get(name, False)
    notes = [] if any_batch else ["traced for one batch size"]
    notes += _never_called(loaded.model, calls, recording)
    return Trace(mark_sites(recording, loaded.model, calls, evaluation=loaded.evaluation), any_batch, notes)


def _count_calls(loaded: Loaded, example: Example) -> dict[int, Calls]:
    """Run the model and see how often and with what each of its modules is called, and who reads its attributes."""
    calls = {id(module): Calls() for module in loaded.model.modules()}

    def begin(module: nn.Module, *_: Any) -> None:
        calls[id(module)].inside += 1

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen = calls[id(module)]
        seen.inside -= 1
        seen.count += 1
        plain = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor)
        seen.plain = seen.plain and plain

    handles: list[Any] = []
    classes: list[tuple[nn.Module, type]] = []
    try:
        for module in list(loaded.model.modules()):
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end, with_kwargs=True))
            if not isinstance(module, torch.jit.ScriptModule) and (module._parameters or module._buffers):
                classes.append((module, type(module)))
                module.__class__ = _watched(type(module), calls[id(module)])
        run(loaded, example)
    finally:
        for module, kind in classes:
            module.__class__ = kind
        for handle in handles:
            handle.remove()
    return calls


def _never_called(model: nn.Module, calls: Mapping[int, Calls], recording: Recording) -> Iterator[str]:
    """A note with the modules with parameters that no run has seen; of those inside each other the outermost."""
    seen = {id(stored.tensor) for value, stored in recording.stored.items() if value.uses or value.is_output}
    names: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in names) or not any(True for _ in module.parameters()):
            continue
        called = any(calls[id(inner)].count for inner in module.modules() if id(inner) in calls)
        if not called and not any(id(parameter) in seen for parameter in module.parameters()):
            names.append(name)
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"never called with these inputs, so no run has seen them: {', '.join(names[:NAMED])}{more}"


PLAIN = frozenset(dir(nn.Identity())) | frozenset(vars(nn.Identity()))


def _watched(kind: Any, seen: Calls) -> Any:
    """A class like `kind` that takes down what is read from outside of its own calls."""

    def get(self: Any, name: str) -> Any:
        if not seen.inside and name not in PLAIN and not name.startswith("__"):
            seen.read.add(name)
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": get, "__module__": kind.__module__})


def _record(loaded: Loaded, example: Example) -> tuple[Recording, bool]:
    larger = _two_samples(example)
    tries = [(larger, True)] if larger is not None else []
    first: Exception | None = None
    for given, free in [*tries, (example, False)]:
        flat = _Flat(loaded.model, given)
        try:
            exported = torch.export.export(
                flat, flat.tensors, dynamic_shapes=(_free_batch(flat.tensors),) if free else None, strict=False
            )
            recording = read_recording(exported.graph.nodes, dict(_stored_by(exported, flat)), ROOT)
        except Exception as error:  # tracers raise anything; the reason is told when none of them succeeds
            first = first or error
            continue
        return recording, free and any(_is_free(value.shape) for value in recording.inputs.values())
    assert first is not None
    try:
        return _record_fx(_Flat(loaded.model, example)), False
    except Exception:
        raise InputError(
            f"{loaded.name}: torch.export cannot follow its code ({one_line(first)})",
            "Code that decides by the values of tensors has no single graph. Where torch.jit.script(model) takes it, "
            "save that with torch.jit.save and fold the file.",
        ) from first


def _is_free(shape: Sequence[object] | None) -> bool:
    return bool(shape) and not isinstance((shape or [0])[0], int)


def _two_samples(example: Example) -> Example | None:
    """The same inputs with at least two samples; None where they have no common first axis.

    A tracer takes a length of 1 for part of the code."""
    tensors = [leaf for leaf in _pytree.tree_leaves((example.args, example.kwargs)) if isinstance(leaf, torch.Tensor)]
    batch = next((tensor.shape[0] for tensor in tensors if tensor.ndim > 1), None)
    if batch is None or batch == 0:
        return None

    def doubled(leaf: Any) -> Any:
        if batch > 1 or not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or leaf.shape[0] != batch:
            return leaf
        return torch.cat([leaf, leaf])

    args, kwargs = _pytree.tree_map(doubled, (example.args, example.kwargs))
    return Example(tuple(args), dict(kwargs))


def _free_batch(tensors: Sequence[torch.Tensor]) -> tuple[dict[int, Any] | None, ...]:
    batch = next(tensor.shape[0] for tensor in tensors if tensor.ndim > 1)
    return tuple({0: torch.export.Dim.AUTO} if tensor.ndim and tensor.shape[0] == batch else None for tensor in tensors)


def _stored_by(exported: Any, flat: _Flat) -> Iterator[tuple[str, Stored]]:
    parameters = dict(flat.named_parameters(remove_duplicate=False))
    buffers = dict(flat.named_buffers(remove_duplicate=False))
    for spec in exported.graph_signature.input_specs:
        if spec.target is None or not hasattr(spec.arg, "name"):
            continue
        own = spec.target.removeprefix(f"{ROOT}.")
        tensor = parameters.get(spec.target, buffers.get(spec.target))
        if tensor is None:
            tensor = exported.constants.get(spec.target, exported.state_dict.get(spec.target))
        if isinstance(tensor, torch.Tensor):
            yield spec.arg.name, Stored(own, tensor, spec.target in parameters)


def _record_fx(flat: _Flat) -> Recording:
    """By make_fx with fake tensors, which refuses what depends on values as torch.export does."""
    handles = [hook for path, inner in flat.named_modules() for hook in _hook(path, inner)]
    try:
        graph = make_fx(flat, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(*flat.tensors)
    finally:
        for handle in handles:
            handle.remove()
    names = {id(tensor): name for name, tensor in (*flat.named_parameters(), *flat.named_buffers())}
    stored = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(graph, node.target)
            name = names.get(id(tensor), node.target).removeprefix(f"{ROOT}.")
            stored[node.name] = Stored(name, tensor, isinstance(tensor, nn.Parameter))
    return read_recording(graph.graph.nodes, stored, ROOT)


def _hook(path: str, module: nn.Module) -> Iterator[Any]:
    """Hooks that write the path of a module into the nodes recorded while it ran; calls are numbered."""
    before: list[int] = []
    calls = 0

    def nodes() -> list[Any]:
        mode = get_proxy_mode()
        return [] if mode is None else list(mode.tracer.graph.nodes)

    def begin(*_: Any) -> None:
        before.append(len(nodes()))

    def end(*_: Any) -> None:
        nonlocal calls
        key = f"{path}@{calls}" if calls else path
        calls += 1
        for node in nodes()[before.pop() :]:
            node.meta["nn_module_stack"] = {key: (path, ""), **node.meta.get("nn_module_stack", {})}

    yield module.register_forward_pre_hook(begin)
    yield module.register_forward_hook(end)
