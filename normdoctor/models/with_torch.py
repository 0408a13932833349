"""Models that torch runs: loaded from a file, built from an architecture, or given live; and one run of them."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from normdoctor.errors import (
    CannotRunError,
    InputError,
    MisfitError,
    MissingDependencyError,
    NormDoctorError,
    RefusedError,
    UsageError,
)
from normdoctor.layers import Checkpoint, Container, Danger, load
from normdoctor.models.architecture import build, install, make_importable, one_line, users_code
from normdoctor.models.inputs import Example, InputSpec
from normdoctor.models.loaded import Kind, Loaded, described, flatten, parameters_of
from normdoctor.models.state import Wanted, choose, match, tensors_of
from normdoctor.readers import open_checkpoint
from normdoctor.readers.live_module import LiveArray

TORCHSCRIPT, EXPORTED = "torch.jit.load", "torch.export.load"
"""`Checkpoint.loader` of the two formats that are programs."""

NO_KERNEL = ("Could not run '", "implemented for", "does not exist")
"""In what torch says of an operator without a kernel. A bare NotImplementedError is of the model's own code."""

SEED = 0
"""Of random inputs, and of what a model draws itself while it runs."""


def dtype_of(loaded: Loaded) -> torch.dtype:
    """The float type of the first weight that has one."""
    found = (tensor.dtype for tensor in _tensors(loaded.model) if tensor.is_floating_point())
    return next(found, torch.get_default_dtype())


def device_of(loaded: Loaded) -> torch.device:
    return next((tensor.device for tensor in _tensors(loaded.model)), torch.device("cpu"))


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    if isinstance(model, torch.export.ExportedProgram):
        yield from model.state_dict.values()
    else:
        yield from model.parameters()
        yield from model.buffers()


# opening


def open_model(
    path: Path,
    *,
    trust: bool = False,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Loaded:
    """The model in a file of torch, on the CPU. Nothing of a file is executed without `trust`.

    Raises RefusedError where trust or an architecture is needed, UsageError where `key` must choose, InputError for
    what does not fit together, MissingDependencyError for a package that is not there."""
    with open_checkpoint(path) as checkpoint:
        if checkpoint.container is Container.ONNX:
            raise UsageError(f"{path}: an ONNX file is not loaded by torch", "Leave out what is for PyTorch modules.")
        if arch is not None:
            return _build(checkpoint, arch, arch_args, key)
        if arch_args is not None:
            raise UsageError("--arch-args without --arch", "Name the class or function with --arch.")
        if checkpoint.loader in (TORCHSCRIPT, EXPORTED):
            if checkpoint.load_calls and not trust:
                raise _untrusted(checkpoint)
            if key is not None:
                raise UsageError("--key is for files with several models", "Leave it out.")
            return _load_program(checkpoint)
        if not any(call.danger is Danger.MODULE_CLASS for call in checkpoint.load_calls):
            raise _bare(checkpoint)
        if not trust:
            raise _untrusted(checkpoint)
    return _load_pickle(path, key)


def _untrusted(checkpoint: Checkpoint) -> RefusedError:
    names = [call.name for call in checkpoint.load_calls]
    foreign = [name for name in names if not name.startswith("torch.nn.modules.")] or names
    shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
    return RefusedError(
        f"{checkpoint.path}: {checkpoint.loader} would execute code that the file names: {shown}",
        "Where you trust the file, add --trust.",
    )


def _bare(checkpoint: Checkpoint) -> RefusedError:
    return RefusedError(
        f"{checkpoint.path}: holds tensors alone, and a flat dictionary cannot prove what feeds what",
        "Name the class or function that builds the model: --arch mypkg.nets:resnet18 --arch-args '{...}'.",
    )


def _load_program(checkpoint: Checkpoint) -> Loaded:
    path = checkpoint.path
    script = checkpoint.loader == TORCHSCRIPT
    try:
        with quiet():
            model = (torch.jit.load if script else torch.export.load)(path)
    except Exception as error:  # torch raises anything here, and what is wrong is the file
        raise InputError(
            f"{path}: torch {torch.__version__} cannot load it ({one_line(error)})",
            "Save it again with this version of torch.",
        ) from error
    return Loaded(Kind.SCRIPT if script else Kind.PROGRAM, model, path)


def _load_pickle(path: Path, key: str | None) -> Loaded:
    make_importable()
    try:
        with users_code(str(path)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = _unpickle(path)
    except InputError as error:
        raise InputError(
            error.message,
            "The classes of the model must be importable as they were when it was saved; the folder they are in is "
            "the place to run this. Or give the class with --arch.",
        ) from error
    modules = dict(_modules_in(value))
    if not modules:
        with open_checkpoint(path) as checkpoint:
            raise _bare(checkpoint)
    chosen = choose(modules, key, str(path))
    losses = []
    left = len(modules) - 1
    if isinstance(value, Mapping):
        others = [name for name in value if name != chosen.partition(".")[0]]
        if others:
            shown = ", ".join(map(str, others[:5])) + (", ..." if len(others) > 5 else "")
            losses.append(f"only the model{f' {chosen}' if left else ''} is kept; dropped from the file: {shown}")
    return Loaded(Kind.MODULE, unwrap(modules[chosen]), str(path), losses=losses)


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, AttributeError, EOFError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be loaded ({one_line(error)})", "") from error


def _modules_in(value: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The modules in nested dictionaries, and the keys that lead to them."""
    if isinstance(value, nn.Module):
        yield ".".join(keys), value
    elif isinstance(value, Mapping) and len(keys) < 4:
        for name, inner in value.items():
            yield from _modules_in(inner, (*keys, str(name)))


def unwrap(module: Any) -> Any:
    """The module that torch.compile wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module) if type(module).__name__ == "OptimizedModule" else module


def take(module: nn.Module) -> Loaded:
    """A copy of a live module; what is done to it is not done to the original."""
    module = unwrap(module)
    kind = Kind.SCRIPT if isinstance(module, torch.jit.ScriptModule) else Kind.MODULE
    return Loaded(kind, copied(module), type(module).__name__)


def live(module: nn.Module) -> Loaded:
    """A live module itself, for who puts it back as it was."""
    module = unwrap(module)
    kind = Kind.SCRIPT if isinstance(module, torch.jit.ScriptModule) else Kind.MODULE
    return Loaded(kind, module, type(module).__name__)


def moved(loaded: Loaded, device: str) -> Loaded:
    """The model of a file on another device. Raises UsageError for one that is not there."""
    if loaded.kind is Kind.PROGRAM:
        raise UsageError(f"{loaded.name}: an exported program stays where it was exported", "Leave out --device.")
    try:
        loaded.model.to(device)
    except Exception as error:  # torch raises anything for a name or a device it does not know
        raise UsageError(f"--device {device}: {one_line(error)}", "Give cpu, cuda or cuda:1.") from None
    return loaded


def copied(model: Any, *, parameters: bool = True) -> Any:
    """A deep copy. Tensors that were computed (the weight of weight_norm) are copied as values.

    parameters: of these too; else the copy has them in common with the original."""
    if isinstance(model, torch.jit.ScriptModule):
        stream = io.BytesIO()
        load_again: Any = torch.jit.load
        with quiet():
            torch.jit.save(model, stream)
            return load_again(io.BytesIO(stream.getvalue()))
    memo: dict[int, Any] = {} if parameters else {id(tensor): tensor for tensor in model.parameters()}
    for inner in model.modules():
        for value in vars(inner).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__}: cannot be copied ({one_line(error)})",
            "What a module holds beside its tensors must survive copy.deepcopy.",
        ) from error


def _build(checkpoint: Checkpoint, arch: str, arguments: str | Mapping[str, Any] | None, key: str | None) -> Loaded:
    tensors = tensors_of(checkpoint, key)
    module = build(arch, arguments)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"--arch {arch}: gives a {type(module).__name__}, not a torch.nn.Module", "Name what builds the model."
        )
    wanted = {
        name: Wanted(tuple(tensor.shape), _identity(tensor))
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor) and not nn.parameter.is_lazy(tensor)
    }
    found, notes = match(tensors, wanted, f"--arch {arch}")
    values = {}
    for name, array in found.items():
        # reshape: numpy makes one element of a single number
        value = torch.from_numpy(np.array(load(array))).reshape(array.shape)
        values[name] = value.to(getattr(torch, array.dtype))
    _retype(module, values)
    with users_code(f"--arch {arch}"), torch.no_grad():
        module.load_state_dict(values, strict=False)
    losses = []
    if any(not reference.name for reference in checkpoint.list_references()):
        losses.append("only the model is written: training state in the file (of an optimizer) is dropped")
    return Loaded(Kind.MODULE, module, checkpoint.path, evaluation=True, notes=notes, losses=losses)


def _identity(tensor: torch.Tensor) -> object:
    return LiveArray(tensor).identity


def _retype(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """The float type of each tensor as the file has it, so that nothing is rounded and half stays half."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        value = values.get(name)
        if value is not None and value.is_floating_point() and isinstance(tensor, torch.Tensor):
            tensor.data = tensor.data.to(value.dtype)


# inputs


def make_example(loaded: Loaded, specs: Sequence[InputSpec], *, seed: int = SEED) -> Example:
    """Random inputs of these shapes: normal numbers, and whole numbers that every embedding of the model takes.

    Raises UsageError where there are none, or a name is no argument of forward."""
    if loaded.kind is Kind.PROGRAM and not specs:
        given = loaded.model.example_inputs
        if given is not None:
            return Example(tuple(given[0]), dict(given[1]))
    takes = parameters_of(loaded)
    if not specs:
        raise UsageError(
            f"{loaded.name}: running it needs the shapes of its inputs ({', '.join(takes) or 'none named'})",
            "Give --input-shape 1,3,224,224, once for each input, or --data with the inputs themselves.",
        )
    generator = torch.Generator().manual_seed(seed)
    high = min(_embedding_sizes(loaded.model), default=2)
    args, kwargs = [], {}
    for spec in specs:
        value = _random(spec, loaded, generator, high)
        if spec.name is None:
            args.append(value)
            continue
        if takes and spec.name not in takes and not any(name.startswith("**") for name in takes):
            raise UsageError(
                f"--input-shape {spec}: {loaded.name} takes no {spec.name}", f"It takes {', '.join(takes)}."
            )
        kwargs[spec.name] = value
    return Example(tuple(args), kwargs)


def _embedding_sizes(model: Any) -> Iterator[int]:
    if isinstance(model, nn.Module):
        for module in model.modules():
            count = getattr(module, "num_embeddings", None)
            if isinstance(count, int) and count > 0:
                yield count


def _random(spec: InputSpec, loaded: Loaded, generator: torch.Generator, high: int) -> torch.Tensor:
    dtype = dtype_of(loaded) if spec.dtype is None else getattr(torch, spec.dtype)
    if dtype is torch.bool:
        value = torch.rand(spec.shape, generator=generator) < 0.5
    elif dtype.is_floating_point or dtype.is_complex:
        value = torch.randn(spec.shape, generator=generator)
    else:
        value = torch.randint(0, min(high, 100), spec.shape, generator=generator)
    return value.to(dtype).to(device_of(loaded))


# running


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that torch has to say in the block reaches stdout, stderr or the log: warnings, progress, hints."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def run(loaded: Loaded, example: Example) -> dict[str, NDArray[Any]]:
    """The outputs of one call in eval mode, by name; bfloat16 as float32. The modes are put back.

    Raises CannotRunError for inputs that do not fit and for operators that do not run here."""
    module = loaded.module
    modes = {inner: inner.training for inner in module.modules()} if loaded.kind is Kind.MODULE else {}
    devices = [device_of(loaded)] if device_of(loaded).type == "cuda" else []
    try:
        with contextlib.suppress(NotImplementedError):  # an exported program has its modes in the graph
            module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices), quiet():
            torch.manual_seed(SEED)
            outputs = module(*copy.deepcopy(example.args), **copy.deepcopy(example.kwargs))
    except (Exception, SystemExit) as error:
        raise cannot_run(loaded, example, error) from error
    finally:
        for inner, training in modes.items():
            inner.training = training
    return {name: LiveArray(tensor).load() for name, tensor in flatten(outputs)}


def cannot_run(
    loaded: Loaded, example: Example, error: BaseException, options: str = "--input-shape or --data"
) -> NormDoctorError:
    """What became of a call, in words. options: those that say what it was called with."""
    text = one_line(error)
    if "out of memory" in text or "t allocate memory" in text or isinstance(error, MemoryError):
        return InputError(
            f"{loaded.name}: out of memory on {described(loaded, example)}",
            "Take a smaller --batch-size, fewer --samples, or --method one-pass, which holds one batch at a time.",
        )
    if any(words in text for words in NO_KERNEL):
        return CannotRunError(
            f"{loaded.name}: an operator has no kernel here ({text})", "Run it where the operator is at home."
        )
    if isinstance(error, ImportError):
        missing = (error.name or "a package").partition(".")[0]
        return MissingDependencyError(f"{loaded.name}: running it needs {missing} ({text})", install(missing))
    if isinstance(error, NotImplementedError):
        return MisfitError(
            f"{loaded.name}: its code has nothing to run there ({text})",
            "Name a class with a forward of its own.",
        )
    takes = ", ".join(name for name in parameters_of(loaded) if not name.startswith("*"))
    integers = any(not dtype.is_floating_point for dtype in _types(example))
    return MisfitError(
        f"{loaded.name}: cannot be run on {described(loaded, example)} ({text})",
        f"Check {options} against what the model expects{f'; it takes ({takes})' if takes else ''}."
        + (" Where it takes floats, --scale makes them of integers." if integers and options == "--data" else ""),
    )


def _types(example: Example) -> Iterator[torch.dtype]:
    """The element types of the tensors among the arguments."""
    for value in (*example.args, *example.kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value.dtype


def in_float64(loaded: Loaded) -> Loaded:
    """A copy with every float tensor in float64. Types written in its code stay, and may then not fit."""
    model = loaded.module if loaded.kind is Kind.PROGRAM else copied(loaded.model)
    return replace(loaded, model=model.double(), kind=Kind.SCRIPT if loaded.kind is Kind.SCRIPT else Kind.MODULE)


def example_in_float64(example: Example) -> Example:
    """The inputs with every float tensor in float64."""
    return Example(
        tuple(_double(value) for value in example.args), {name: _double(v) for name, v in example.kwargs.items()}
    )


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: _double(inner) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_double, value))
    return value
