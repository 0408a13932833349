"""torch.onnx with everything switched off that would fold a norm before we see it.

Both exporters fold plain conv + BN by default. They keep it with optimize=False (the one on torch.export) and with
do_constant_folding=False (the older one on TorchScript)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch.jit._trace import TracerWarning
from torch.utils import _pytree

from normdoctor.errors import InputError, NormDoctorError, UsageError
from normdoctor.exporting.onnx_names import ONE_BATCH, unique_names
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

TORCH = f"torch {torch.__version__.partition('+')[0]}"


@dataclass(frozen=True, eq=False)
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
        for attempt, note in _attempts(loaded, example, exported, opset, static):
            try:
                with torch.no_grad(), quiet():
                    attempt()
                    _check(path, opset)
            except Exception as error:  # exporters raise anything
                first = first or error
                continue
            exported.notes.extend([note] if note else [])
            return exported
    finally:
        if flat is not None:
            flat.remove()
        for inner, training in modes.items():
            inner.training = training
    if first is None:
        raise UsageError(f"--opset {opset}: {TORCH} cannot write it", "18 to 20 always work.")
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
        raise UsageError(f"--opset {opset}: the onnx package here knows up to {newest}", "18 to 20 always work.")


def _flat(_: Any, given: Any, outputs: Any) -> tuple[torch.Tensor, ...]:
    """A hook: the outputs as one row, whatever they are wrapped in; exporters do not know classes of the user's."""
    return tuple(tensor for _, tensor in flatten(outputs))


Attempt = tuple[Callable[[], None], str]


def _attempts(
    loaded: Loaded, example: Example, exported: Exported, opset: int | None, static: bool
) -> Iterator[Attempt]:
    """Ways to write the file, the best first."""
    new = opset is None or opset >= OLDEST_OPSET
    old = loaded.kind is not Kind.PROGRAM and (opset is None or opset in OLD_EXPORTER_OPSETS)
    if loaded.kind is Kind.PROGRAM:
        # Its batch axis is as free as it was when it was exported.
        yield partial(_write, loaded.model, exported, opset), ""
        return
    if new and loaded.kind is Kind.MODULE:
        if not static:
            larger = _two_samples(example)
            for dim in (torch.export.Dim(BATCH), torch.export.Dim.AUTO):
                yield partial(_export, loaded.model, larger, exported, opset, dim), ""
        yield partial(_export, loaded.model, example, exported, opset, None), "" if static else ONE_BATCH
    if old:
        if not static:
            yield partial(_export_old, loaded, example, exported, opset, free=True), ""
        yield partial(_export_old, loaded, example, exported, opset, free=False), "" if static else ONE_BATCH


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


def _export(model: Any, example: Example, exported: Exported, opset: int | None, dim: Any) -> None:
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
    _write(program, exported, opset, shapes)


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


def _export_old(loaded: Loaded, example: Example, exported: Exported, opset: int | None, *, free: bool) -> None:
    inputs, outputs = list(exported.inputs), list(exported.outputs)
    axes = {}
    if free:
        batch = _batch(example)
        sizes = {name: value for name, value in exported.inputs.items() if _has_batch(value, batch)}
        axes = {name: {0: BATCH} for name in sizes}
        axes |= {name: {0: BATCH} for name in exported.outputs if exported.lengths[name] == batch}
        if not sizes:
            raise ValueError("the inputs have no batch axis in common")
    options: Mapping[str, Any] = {"opset_version": opset} if opset else {}
    with warnings.catch_warnings():
        if free:  # a length that Python computed with: it would hold for this batch alone
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


def _is_large(tensors: Any) -> bool:
    return bool(sum(tensor.numel() * tensor.element_size() for tensor in tensors) > INLINE_BYTES)


def _check(path: Path, opset: int | None) -> None:
    """Raise where the file is not what was asked for, or breaks the rules of ONNX."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    written = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is not None and written != opset:
        raise UsageError(f"--opset {opset}: the exporter wrote {written}", "Leave --opset out.")


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
