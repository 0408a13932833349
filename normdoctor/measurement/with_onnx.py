"""ONNX models as walkers: the graph is cut in front of every norm, and the pieces run one after the other.

The mean and the variance of a norm are inputs of the piece that it stands in, so new ones cost nothing. As in
models.with_onnx the runtime's graph optimisation is off, and what onnxruntime has no kernels for goes to onnx's own
reference evaluator. Only norms with statistics are stopped at; LayerNorm and its like are not.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.data.wanted import Wanted
from normdoctor.errors import CannotRunError, MisfitError
from normdoctor.layers import NormKind, NormLayer
from normdoctor.measurement.onnx_stages import Cut, Stage, stages, submodel
from normdoctor.measurement.onnx_values import Affine
from normdoctor.measurement.onnx_walks import Engine, Norm, OnnxWalker, Run, Value
from normdoctor.readers.arrays import Source
from normdoctor.readers.onnx import survey
from normdoctor.readers.onnx_flow import Flow, open_flow
from normdoctor.readers.onnx_graph import Step
from normdoctor.readers.onnx_layers import Named

MAX_THREADS = 1000
"""Of all sessions together: every piece has one, and every session threads of its own."""

UNLIMITED = 1 << 62

MAX_MODEL = (1 << 31) - 1
"""Bytes of a model without its external data: protobuf's own limit."""


def open_onnx(
    path: Path,
    layers: Collection[str] | None = None,
    *,
    spill: Path | None = None,
    memory: int = UNLIMITED,
) -> OnnxWalker:
    """The model with its BatchNorms as stops.

    layers: names of those to stop at; None for all. spill: a folder for what walks hold beyond `memory` bytes.

    Raises InputError for a file that cannot be read, CannotRunError for one that cannot be run."""
    with open_flow(path) as flow:
        listed = flow.survey.named
        names = [item.layer.name for item in listed]
        if flow.inlined:
            names = _original_names(path, listed) or names
        model = _load(path, flow)
        norms, cuts, left = _stops(flow, names, model, layers)
    inputs = _inputs(model)
    types = {value.name: value.type for value in inputs}
    for norm in norms.values():
        for name in norm.inputs:
            types[name] = _type_of(norm.dtype)
    engine, pieces = _built(path, model, cuts, [value.name for value in inputs], types, norms)
    return OnnxWalker(
        name=str(path),
        engine=engine,
        pieces=pieces,
        norms=norms,
        left=left,
        wanted=_wanted(path),
        outputs=[value.name for value in model.graph.output],
        spill=spill,
        memory=memory,
    )


def _load(path: Path, flow: Flow) -> Any:
    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    from normdoctor.models.with_onnx import line

    source = flow.survey.document.source
    if source.size > MAX_MODEL:
        raise CannotRunError(f"{path}: more than 2 GB", "Keep the weights in a file beside it (external data).")
    try:
        model = onnx.load_from_string(source.read_at(0, source.size))
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # whatever protobuf and onnx raise
        raise CannotRunError(f"{path}: onnx cannot load it ({line(error)})") from None
    return model


def _wanted(path: Path) -> tuple[Wanted, ...]:
    from normdoctor.models.with_onnx import OnnxModel

    return tuple(Wanted(name, shape, dtype) for name, shape, dtype in OnnxModel(path).inputs())


def _inputs(model: Any) -> list[Any]:
    """What the graph takes, without the inputs that only override a stored tensor."""
    stored = {tensor.name for tensor in model.graph.initializer}
    stored |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in stored]


# norms


def _original_names(path: Path, inlined: Sequence[Named]) -> list[str] | None:
    """The names that the layers have in the file itself, whose functions are not inlined; None where they cannot be
    told. Inlining keeps the order of the nodes."""
    with Source(path) as source:
        found = survey(source)
        with found.checkpoint:
            if [_marks(item) for item in found.named] != [_marks(item) for item in inlined]:
                return None
            return [item.layer.name for item in found.named]


def _marks(item: Named) -> tuple[object, ...]:
    layer = item.layer
    return layer.kind, layer.origin, layer.channels, layer.eps, len(item.found.twins)


def _stops(
    flow: Flow, names: Sequence[str], model: Any, wanted: Collection[str] | None
) -> tuple[dict[str, Norm], list[Cut], dict[str, str]]:
    """The norms that are stopped at, where they stand, and those that are not → why."""
    main = flow.survey.program.main
    places = {id(node): place for place, node in enumerate(main.graph.nodes)}
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    norms: dict[str, Norm] = {}
    cuts: list[Cut] = []
    left: dict[str, str] = {}
    for name, item in zip(names, flow.survey.named, strict=True):
        if item.layer.kind is not NormKind.BATCH or (wanted is not None and name not in wanted):
            continue
        steps = [item.found.step, *item.found.twins]
        why = next(filter(None, (_why_not(item.layer, step, flow) for step in steps)), None)
        if why is not None:
            left[name] = why
            continue
        norms[name] = _norm(name, item.layer, taken)
        cuts += [Cut(places[id(step.node)], name) for step in steps]
    return norms, cuts, left


def _why_not(layer: NormLayer, step: Step, flow: Flow) -> str | None:
    """Why a norm is not stopped at, in words that follow its name."""
    mean, var = layer.running_mean, layer.running_var
    if layer.training:
        return "normalises with the statistics of the batch at hand, whatever is stored"
    if step.node.op != "BatchNormalization":
        return f"is written out in other operators ({layer.origin})"
    if mean is None or var is None:
        return "takes its mean or variance from an input of the model or computes it"
    if math.prod(mean.shape) != max(mean.shape, default=0) or mean.dtype != var.dtype or mean.shape != var.shape:
        return "has statistics per place and not per channel"
    scope, main = step.scope, flow.survey.program.main
    if scope is not main:
        while scope.parent is not None and scope.function is None:
            scope = scope.parent
        return "stands in a local function" if scope.function is not None else "stands in the body of an If or a Loop"
    return None


def _norm(name: str, layer: NormLayer, taken: Collection[str]) -> Norm:
    layer.numbers.load()  # the file is closed before they are wanted
    numbers = layer.numbers
    assert numbers.mean is not None and numbers.var is not None and layer.running_mean is not None
    inputs = []
    for role in ("running_mean", "running_var"):
        own = f"{name}.{role} now"
        while own in taken:
            own += "_"
        inputs.append(own)
    eps = 1e-5 if layer.eps is None else layer.eps
    return Norm(
        affine=Affine(numbers.gain, numbers.shift, eps),
        dtype=_dtype(layer.running_mean.dtype),
        inputs=(inputs[0], inputs[1]),
        stored=(numbers.mean, numbers.var),
    )


def _dtype(name: str) -> np.dtype[Any]:
    from onnx import TensorProto

    from normdoctor.models.with_onnx import numpy_type

    return numpy_type(TensorProto.BFLOAT16) if name == "bfloat16" else np.dtype(name)


def _type_of(dtype: np.dtype[Any]) -> Any:
    from onnx import helper

    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(dtype), None)


# pieces


def _built(
    path: Path,
    model: Any,
    cuts: Sequence[Cut],
    inputs: Sequence[str],
    types: Mapping[str, Any],
    norms: Mapping[str, Norm],
) -> tuple[Engine, list[tuple[Stage, Run | None]]]:
    """The pieces, ready to run: by onnxruntime where it takes all of them."""
    names = {name: norm.inputs for name, norm in norms.items()}

    def build(engine: Engine) -> list[tuple[Stage, Run | None]]:
        together: set[str] = set()
        while True:
            known = dict(types)
            pieces: list[tuple[Stage, Run | None]] = []
            lists: set[str] = set()
            for stage in stages(model.graph, cuts, inputs, together):
                run = None
                if stage.gives:
                    run, found = engine.load(submodel(model, stage, known, names))
                    known.update(found)
                    lists |= {name for name in stage.gives if name in stage.keeps and name not in found}
                if stage.cut is not None and lists:
                    break
                pieces.append((stage, run))
            else:
                return pieces
            together |= lists

    try:
        runtime = _Runtime(len(cuts) + 1)
        if any(kind.tensor_type.elem_type in _nameless() for kind in types.values()):
            raise _UnsupportedError("numpy has no arrays of the type of an input")
        return runtime, build(runtime)
    except _UnsupportedError as error:
        reference = _Reference(str(error))
    except CannotRunError as error:
        raise CannotRunError(f"{path}: {error.message}", error.hint) from None
    try:
        return reference, build(reference)
    except CannotRunError as error:
        raise CannotRunError(f"{path}: onnxruntime: {reference.why}; {error.message}") from None


def _nameless() -> set[int]:
    from onnx import TensorProto

    return {TensorProto.BFLOAT16, *(v for k, v in TensorProto.DataType.items() if k.startswith("FLOAT8"))}


class _UnsupportedError(Exception):
    """onnxruntime does not take a piece of the model."""


class _Runtime:
    """onnxruntime. Values are OrtValues."""

    def __init__(self, sessions: int) -> None:
        from normdoctor.models.with_onnx import line

        try:
            import onnxruntime  # type: ignore[import-untyped]
        except Exception as error:  # missing, or broken in whatever way
            raise _UnsupportedError(f"it cannot be imported ({line(error)})") from None
        self._runtime = onnxruntime
        self.words = f"onnxruntime {onnxruntime.__version__} with graph optimisation off"
        self._threads = 0 if sessions * (os.cpu_count() or 1) <= MAX_THREADS else max(1, MAX_THREADS // sessions)

    def _session(self, model: Any) -> Any:
        from normdoctor.models.with_onnx import FULL_OPTIMISATION_OFF, line

        options = self._runtime.SessionOptions()
        options.graph_optimization_level = getattr(self._runtime.GraphOptimizationLevel, FULL_OPTIMISATION_OFF)
        options.log_severity_level = 4  # what goes wrong is raised as well
        options.intra_op_num_threads = self._threads
        # Every session would keep what it once needed, and its threads turning while another one runs.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return self._runtime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # its errors have no common class
            raise _UnsupportedError(line(error)) from None

    def load(self, model: Any) -> tuple[Run, Mapping[str, Any]]:
        session = self._session(model)
        types = {entry.name: _told(entry.type) for entry in session.get_outputs()}
        return self._running(session, list(types)), {name: kind for name, kind in types.items() if kind is not None}

    def _running(self, session: Any, outputs: list[str]) -> Run:
        from normdoctor.models.with_onnx import line

        def run(inputs: Mapping[str, Value]) -> Sequence[Value]:
            try:
                found: Sequence[Value] = session.run_with_ort_values(outputs, inputs)
            except Exception as error:
                raise MisfitError(f"onnxruntime: {line(error)}") from None
            return found

        return run

    def value(self, array: NDArray[Any]) -> Value:
        return self._runtime.OrtValue.ortvalue_from_numpy(array)

    def array(self, value: Value) -> NDArray[Any]:
        dtype = _stored_as(value.data_type())
        if dtype is None:
            return np.asarray(value.numpy())
        # OrtValue.numpy() would copy.
        count = math.prod(value.shape()) * dtype.itemsize
        raw = (ctypes.c_char * count).from_address(value.data_ptr()) if count else b""
        return np.frombuffer(raw, dtype=dtype).reshape(value.shape())

    def plain(self, value: Value) -> NDArray[Any]:
        from normdoctor.models.with_onnx import plain

        return plain(value.numpy())

    def tidy(self) -> None:
        # The C library would keep several times what walks hold, in holes of its heap.
        with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)

    def is_tensor(self, value: Value) -> bool:
        return bool(value.is_tensor())

    def shape(self, value: Value) -> tuple[int, ...]:
        return tuple(value.shape())

    def nbytes(self, value: Value) -> int:
        dtype = _stored_as(value.data_type())
        return 0 if dtype is None else math.prod(value.shape()) * dtype.itemsize


@cache
def _stored_as(kind: str) -> np.dtype[Any] | None:
    """numpy's type of a tensor of numbers; None for texts, numbers of half a byte, and what is no tensor."""
    from normdoctor.models.with_onnx import numpy_type

    if re.fullmatch(r"tensor\((float|float16|bfloat16|double|bool|u?int(8|16|32|64))\)", kind) is None:
        return None
    return numpy_type(_told(kind).tensor_type.elem_type)


def _told(text: str) -> Any:
    """onnxruntime's word for a type as a TypeProto: tensor(float); None for what is no tensor."""
    from onnx import TensorProto, helper

    found = re.fullmatch(r"tensor\((\w+)\)", text)
    code = None if found is None else dict(TensorProto.DataType.items()).get(found[1].upper())
    return None if code is None else helper.make_tensor_type_proto(code, None)


class _Reference:
    """onnx's reference evaluator. Values are arrays, or lists of them."""

    def __init__(self, why: str) -> None:
        from normdoctor.models.with_onnx import REFERENCE

        self.why = why
        self.words = f"{REFERENCE}, for onnxruntime cannot: {why}"

    def load(self, model: Any) -> tuple[Run, Mapping[str, Any]]:
        from normdoctor.models.with_onnx import evaluated, evaluator_of

        evaluator = evaluator_of(model)

        def run(inputs: Mapping[str, Value]) -> Sequence[Value]:
            return list(evaluated(evaluator, inputs).values())

        # A type is never asked for: arrays know theirs.
        return run, dict.fromkeys(value.name for value in model.graph.output)

    def value(self, array: NDArray[Any]) -> Value:
        return array

    def array(self, value: Value) -> NDArray[Any]:
        return np.asarray(value)

    def plain(self, value: Value) -> NDArray[Any]:
        from normdoctor.models.with_onnx import plain

        return plain(value)

    def tidy(self) -> None:
        pass

    def is_tensor(self, value: Value) -> bool:
        return isinstance(value, np.ndarray | np.generic)

    def shape(self, value: Value) -> tuple[int, ...]:
        return np.shape(value)

    def nbytes(self, value: Value) -> int:
        return int(value.nbytes) if isinstance(value, np.ndarray) else 0
