"""torch.onnx with everything switched off that would fold a norm before we see it.

Both exporters fold plain conv + BN by default. They keep it with optimize=False (the one on torch.export) and with
do_constant_folding=False (the older one on TorchScript)."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch.jit._trace import TracerWarning
from torch.utils import _pytree

from normdoctor.errors import InputError, NormDoctorError, UsageError
from normdoctor.exporting.onnx_names import unique_names
from normdoctor.layers import load
from normdoctor.models.architecture import one_line
from normdoctor.models.inputs import Example
from normdoctor.models.loaded import Kind, Loaded, flatten, in_order, named_inputs
from normdoctor.models.with_torch import quiet, run
from normdoctor.readers.live_module import LiveArray

OLDEST_OPSET = 18
"""What the exporter on torch.export writes below it has to be converted afterwards, and often cannot be."""

OLD_EXPORTER_OPSETS = range(7, 21)

INLINE_BYTES = 1 << 30
"""Larger models keep their weights in a file beside; a single protobuf file ends at 2 GB."""

BATCH = "batch"

ENDLESS = 1 << 40
"""No batch has more samples."""

DECIDES = "the code decides by it"

LEAVE_OUT = "Leave --opset out, or give 18 to 20: these always work."

TORCH = f"torch {torch.__version__.partition('+')[0]}"


@dataclass(eq=False)
class Exported:
    """An ONNX file, and how its inputs and outputs are called."""

    path: Path
    inputs: dict[str, Any]
    """Name → the example's tensor, in the order of the graph."""
    outputs: dict[str, str]
    """Name → the name that `run` has for it."""
    lengths: dict[str, int | None]
    """Of the first axis of each output; None where it has none."""
    notes: list[str] = field(default_factory=list)
    any_batch: bool = False
    """Whether the first axis of an input is free."""

    def arrays(self, example: Example) -> dict[str, NDArray[Any]]:
        """The tensors of other arguments of the same form, by name."""
        given = (value for value in (*example.args, *example.kwargs.values()) if isinstance(value, torch.Tensor))
        return {name: load(LiveArray(value)) for name, value in zip(self.inputs, given, strict=True)}


def export_onnx(
    loaded: Loaded, example: Example, path: Path, *, opset: int | None = None, static: bool = False
) -> Exported:
    """The model as an ONNX file with every norm as it is, for any batch size unless `static` or it cannot be.

    Raises CannotRunError for inputs that do not fit, UsageError for an opset that cannot be written, InputError for
    what torch cannot export."""
    _check_opset(opset)
    if loaded.kind is Kind.SCRIPT and opset is not None and opset not in OLD_EXPORTER_OPSETS:
        raise UsageError(f"--opset {opset}: {TORCH} exports TorchScript to {_span(OLD_EXPORTER_OPSETS)}", LEAVE_OUT)
    results = run(loaded, example)
    given = {name: value for name, value in named_inputs(loaded, example).items() if isinstance(value, torch.Tensor)}
    names = unique_names(given)
    outputs = unique_names(results, names)
    exported = Exported(
        path,
        dict(zip(names, given.values(), strict=True)),
        dict(zip(outputs, results, strict=True)),
        {name: len(value) if value.ndim else None for name, value in zip(outputs, results.values(), strict=True)},
    )
    first: Exception | None = None
    modes = {inner: inner.training for inner in loaded.model.modules()} if loaded.kind is Kind.MODULE else {}
    flat = loaded.model.register_forward_hook(_flat) if loaded.kind is Kind.MODULE else None
    try:
        if loaded.kind is not Kind.PROGRAM:
            loaded.model.eval()
        for attempt in _attempts(loaded, example, exported, opset, static):
            exported.notes.clear()
            try:
                with torch.no_grad(), quiet():
                    attempt()
                    _check(path, opset)
            except Exception as error:  # exporters raise anything
                first = first or error
                continue
            _tell_lengths(exported, _batch(example), loaded.kind, static)
            return exported
    finally:
        if flat is not None:
            flat.remove()
        for inner, training in modes.items():
            inner.training = training
    if first is None:
        raise UsageError(f"--opset {opset}: {TORCH} cannot write it", LEAVE_OUT)
    if isinstance(first, NormDoctorError):
        raise first
    raise InputError(
        f"{loaded.name}: torch.onnx cannot export it ({one_line(first)})",
        "Where another opset helps, give it with --opset; else the model has operators that ONNX has not.",
    ) from first


def _check_opset(opset: int | None) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and opset > newest:
        raise UsageError(f"--opset {opset}: the onnx package here knows up to {newest}", LEAVE_OUT)


def _span(opsets: range) -> str:
    return f"opsets {opsets[0]} to {opsets[-1]}"


def _flat(_: Any, given: Any, outputs: Any) -> tuple[torch.Tensor, ...]:
    """A hook: the outputs as one row, whatever they are wrapped in; exporters do not know classes of the user's."""
    return tuple(tensor for _, tensor in flatten(outputs))


def _attempts(
    loaded: Loaded, example: Example, exported: Exported, opset: int | None, static: bool
) -> Iterator[Callable[[], None]]:
    """Ways to write the file, the best first."""
    new = opset is None or opset >= OLDEST_OPSET
    old = opset is None or opset in OLD_EXPORTER_OPSETS
    if loaded.kind is Kind.PROGRAM:
        # Its batch axis is as free as it was when it was exported.
        if new:
            yield partial(_write, loaded.model, exported, opset)
        if old:
            yield partial(_export_old, _as_module(loaded), example, exported, opset, _free_inputs(loaded, exported))
        return
    if new and loaded.kind is Kind.MODULE:
        if not static:
            larger = _two_samples(example)
            for dim in (torch.export.Dim(BATCH), torch.export.Dim.AUTO):
                yield partial(_export, loaded.model, larger, exported, opset, dim, _batch(example))
        yield partial(_export, loaded.model, example, exported, opset)
    if old:
        batch = _batch(example)
        if not static and batch:
            free = {name for name, value in exported.inputs.items() if _has_batch(value, batch)}
            yield partial(_export_old, loaded, example, exported, opset, free)
        yield partial(_export_old, loaded, example, exported, opset)


def _as_module(loaded: Loaded) -> Loaded:
    """A program as what the exporter on TorchScript takes; it has its modes in the graph."""
    module = loaded.module
    module.train = lambda mode=True: module
    module.eval = lambda: module
    return replace(loaded, kind=Kind.MODULE, model=module)


def _free_inputs(loaded: Loaded, exported: Exported) -> set[str]:
    """The inputs of a program whose first axis is free in it."""
    placeholders = {node.name: node.meta.get("val") for node in loaded.model.graph.nodes if node.op == "placeholder"}
    given = [placeholders.get(name) for name in loaded.model.graph_signature.user_inputs if isinstance(name, str)]
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    if len(tensors) != len(exported.inputs):
        return set()
    return {
        name
        for name, value in zip(exported.inputs, tensors, strict=True)
        if value.ndim and not isinstance(value.shape[0], int)
    }


def _two_samples(example: Example) -> Example:
    """A length of 1 would be taken for part of the code."""
    batch = _batch(example)

    def doubled(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if batch == 1 and _has_batch(leaf, 1) else leaf

    args, kwargs = _pytree.tree_map(doubled, (example.args, example.kwargs))
    return Example(tuple(args), dict(kwargs))


def _batch(example: Example) -> int:
    """The length of the first axis of the inputs; 0 where they have none in common."""
    leaves = _pytree.tree_leaves((example.args, example.kwargs))
    lengths = {leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim > 1}
    return int(lengths.pop()) if len(lengths) == 1 else 0


def _has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def _export(
    model: Any, example: Example, exported: Exported, opset: int | None, dim: Any = None, asked: int = 0
) -> None:
    """dim: what the batch axis is, None where it has a length. asked: the length that the caller's example has."""
    shapes = None
    if dim is not None:
        batch = _batch(example)
        if not batch:
            raise ValueError("the inputs have no batch axis in common")

        def free(leaf: Any) -> Any:
            return {0: dim} if _has_batch(leaf, batch) else None

        bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
        shapes = {name: _pytree.tree_map(free, value) for name, value in bound.items()}
    program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
    if dim is not None:
        lengths = program.range_constraints.values()
        least = max((int(length.lower) for length in lengths if length.lower > 2), default=0)
        if not least and not _holds_for_one(program, model, example):
            least = 2
        most = [int(length.upper) for length in lengths if length.upper < ENDLESS]
        if not lengths or least > asked or min(most, default=asked) < asked:
            raise ValueError("the code decides by the length of the batch")  # and may do so otherwise for the example
        bounds = ([f"at least {least}"] if least else []) + ([f"at most {min(most)}"] if most else [])
        if bounds:
            exported.notes.append(f"exported for a batch of {' and '.join(bounds)}: {DECIDES}")
    _write(program, exported, opset, shapes)


def _holds_for_one(program: Any, model: Any, example: Example) -> bool:
    """Whether a program does with one sample what the model does: tracers take every free length to be 2 or more."""
    batch = _batch(example)

    def single(leaf: Any) -> Any:
        return leaf[:1] if _has_batch(leaf, batch) else leaf

    args, kwargs = _pytree.tree_map(single, (example.args, example.kwargs))
    try:
        expected = dict(flatten(model(*args, **kwargs)))
    except Exception:  # the model itself takes no single sample
        return True
    try:
        found = dict(flatten(program.module()(*args, **kwargs)))
    except Exception:
        return False
    return expected.keys() == found.keys() and all(
        value.shape == found[name].shape and torch.allclose(value, found[name], 1e-2, 1e-3, equal_nan=True)
        for name, value in expected.items()
    )


def _write(program: Any, exported: Exported, opset: int | None, shapes: Any = None) -> None:
    """shapes: names of the free axes; without them they are called s77."""
    inputs, outputs = list(exported.inputs), list(exported.outputs)
    options: Mapping[str, Any] = {"opset_version": opset} if opset else {}
    torch.onnx.export(
        program,
        (),
        exported.path,
        dynamo=True,
        optimize=False,
        dynamic_shapes=shapes,
        input_names=inputs,
        output_names=outputs,
        external_data=_is_large(program.state_dict.values()),
        verbose=False,
        **options,
    )


def _export_old(
    loaded: Loaded, example: Example, exported: Exported, opset: int | None, free: Iterable[str] = ()
) -> None:
    """free: the inputs whose first axis gets no length."""
    graph = isinstance(loaded.model, torch.fx.GraphModule)  # a program: its free lengths are free
    inputs, outputs = list(exported.inputs), list(exported.outputs)
    lengths = {len(exported.inputs[name]) for name in free}
    freed = {*free, *(name for name in outputs if exported.lengths[name] in lengths)}
    axes = {name: {0: BATCH} for name in (*inputs, *outputs) if name in freed}
    options: Mapping[str, Any] = {"opset_version": opset} if opset else {}
    with warnings.catch_warnings(), _no_dumps():
        if axes and not graph:  # a length that Python computed with: it would hold for this batch alone
            warnings.simplefilter("error", TracerWarning)
        torch.onnx.export(
            loaded.model,
            tuple(in_order(loaded, example)),
            str(exported.path),
            dynamo=False,
            do_constant_folding=False,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            verbose=False,
            **options,
        )


@contextlib.contextmanager
def _no_dumps() -> Iterator[None]:
    """The older exporter prints the whole graph where it fails, past sys.stdout."""
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log


def _is_large(tensors: Any) -> bool:
    return bool(sum(tensor.numel() * tensor.element_size() for tensor in tensors) > INLINE_BYTES)


def _tell_lengths(exported: Exported, batch: int, kind: Kind, static: bool) -> None:
    """Lengths that the exporter wrote as names ("2") become lengths, and a note says where the batch axis has one."""
    import onnx

    model = onnx.load(str(exported.path), load_external_data=False)
    before = model.SerializeToString()
    batches = {value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input if _rank(value)} - {""}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param.isdecimal():
                axis.dim_value = int(axis.dim_param)
            elif {axis.dim_param} == batches:
                axis.dim_param = "batch"  # torch has a number for it: s77
    after = model.SerializeToString()
    if after != before:
        exported.path.write_bytes(after)
    first = {value.name: list(value.type.tensor_type.shape.dim)[:1] for value in model.graph.input}
    free = {name for name, axes in first.items() if axes and not axes[0].HasField("dim_value")}
    fixed = [name for name in first if name not in free and _has_batch(exported.inputs.get(name), batch)]
    exported.any_batch = bool(free)
    if static or (not fixed and (free or batch)):
        return
    why = "so was the program" if kind is Kind.PROGRAM else DECIDES
    where = f" of {', '.join(fixed)}" if free else ""
    exported.notes.append(
        f"exported for a batch of {batch} alone{where}: {why}"
        if batch
        else "exported for these shapes alone: the inputs have no batch axis in common"
    )


def _rank(value: Any) -> int:
    return len(value.type.tensor_type.shape.dim)


def _check(path: Path, opset: int | None) -> None:
    """Raise where the file is not what was asked for, or breaks the rules of ONNX."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    written = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is not None and written != opset:
        raise UsageError(f"--opset {opset}: the exporter wrote {written}", LEAVE_OUT)


@dataclass(frozen=True, eq=False)
class NamedRunner:
    """The model that was exported, run on arrays by the names of the ONNX file: what its file is compared with."""

    loaded: Loaded
    example: Example
    exported: Exported
    wide: bool = False

    @property
    def engine(self) -> str:
        return f"{TORCH}, the ONNX file in its own runtime"

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by their names in the ONNX file. Raises CannotRunError."""
        replaced = {id(old): self._tensor(inputs[name], old) for name, old in self.exported.inputs.items()}

        def put(leaf: Any) -> Any:
            return replaced.get(id(leaf), leaf)

        args, kwargs = _pytree.tree_map(put, (self.example.args, self.example.kwargs))
        found = run(self.loaded, Example(tuple(args), dict(kwargs)))
        return {name: found[own] for name, own in self.exported.outputs.items() if own in found}

    def _tensor(self, array: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
        tensor = torch.from_numpy(array.copy()).to(like.dtype)
        return tensor.double() if self.wide and tensor.is_floating_point() else tensor

    def in_float64(self) -> NamedRunner:
        """The same in float64. Raises CannotRunError."""
        from normdoctor.models.with_torch import in_float64

        return NamedRunner(in_float64(self.loaded), self.example, self.exported, wide=True)

    def float64_seconds(self, seconds: float) -> float:
        """How long that should take."""
        return 2.0 * seconds
