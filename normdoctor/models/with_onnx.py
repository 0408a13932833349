"""ONNX files run on arrays: by onnxruntime as they are written, else by onnx's own reference evaluator.

The runtime's graph optimisation is off: it folds norms itself, and a comparison with it on would always read zero.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import CannotRunError, MisfitError

Arrays = Mapping[str, NDArray[Any]]

REFERENCE = "onnx's reference evaluator"

SLOWER = 40.0
"""How many times as long the reference evaluator takes in float64, about: it has BLAS for its convolutions."""

PER_NODE = 1e-3
"""Seconds that a node costs there at least."""

MAX_TWIN = 1 << 29
"""Bytes of a model of which a copy in float64 is held in memory; it is twice as large."""

FULL_OPTIMISATION_OFF = "ORT_DISABLE_ALL"


class Described(NamedTuple):
    """An input of a model."""

    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: str
    """numpy's name, or bfloat16."""


@dataclass(eq=False)
class OnnxModel:
    """An ONNX file that can be run. Data files are found beside it."""

    path: Path
    size: int = 0
    """Bytes of the model with its external data, where the caller knows them."""

    @property
    def engine(self) -> str:
        """What runs it, in words."""
        if self._session is None:
            return f"{REFERENCE}, for onnxruntime cannot: {self._why_no_session}"
        import onnxruntime  # type: ignore[import-untyped]

        return f"onnxruntime {onnxruntime.__version__} with graph optimisation off"

    @cached_property
    def _why_no_session(self) -> str:
        return ""

    @cached_property
    def _session(self) -> Any:
        try:
            import onnxruntime
        except Exception as error:  # missing, or broken in whatever way
            self._why_no_session = f"it cannot be imported ({line(error)})"
            return None
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, FULL_OPTIMISATION_OFF)
        options.log_severity_level = 4  # what goes wrong is raised as well
        try:
            return onnxruntime.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # its errors have no common class
            self._why_no_session = line(error)
            return None

    @cached_property
    def _evaluator(self) -> Any:
        return evaluator_of(self._load())

    def _load(self) -> Any:
        import onnx

        try:
            return onnx.load(self.path)
        except Exception as error:
            raise CannotRunError(f"{self.path}: onnx cannot load it ({line(error)})") from None

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; bfloat16 as float32.

        Raises CannotRunError where an operator has no kernel, MisfitError where the inputs do not fit."""
        if self._session is not None and not _has_narrow(inputs, self._session):
            names = [output.name for output in self._session.get_outputs()]
            try:
                values = self._session.run(names, dict(inputs))
            except Exception as error:
                raise MisfitError(f"onnxruntime: {line(error)}") from None
            return {name: plain(value) for name, value in zip(names, values, strict=True)}
        return _evaluate(self._evaluator, inputs)

    def in_float64(self) -> OnnxTwin:
        """The same model with every number in float64, for the reference evaluator; onnxruntime has no such
        convolution. Raises CannotRunError where the model is too large or computes in integers."""
        if self.size > MAX_TWIN:
            raise CannotRunError(f"the model is too large for a copy in float64 ({self.size:,} bytes)")
        return OnnxTwin(evaluator_of(_widened(self._load())))

    def float64_seconds(self, seconds: float) -> float:
        """How long a run in float64 should take where one in the model's own type took `seconds`."""
        return SLOWER * seconds + PER_NODE * self._node_count

    @cached_property
    def _node_count(self) -> int:
        import onnx

        with contextlib.suppress(Exception):
            return sum(1 for _ in _nodes(onnx.load(self.path, load_external_data=False).graph))
        return 0

    def inputs(self) -> list[Described]:
        """What the graph takes, without the inputs that only override a stored tensor."""
        import onnx

        try:
            graph = onnx.load(self.path, load_external_data=False).graph
        except Exception as error:
            raise CannotRunError(f"{self.path}: onnx cannot load it ({line(error)})") from None
        stored = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
        return [_described(value) for value in graph.input if value.name not in stored]


@dataclass(eq=False)
class OnnxTwin:
    """A model in float64."""

    evaluator: Any
    engine: str = f"{REFERENCE} in float64"

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """As `OnnxModel.run`."""
        wide = {name: value.astype(np.float64) if value.dtype.kind == "f" else value for name, value in inputs.items()}
        return _evaluate(self.evaluator, wide)

    def in_float64(self) -> None:
        return None

    def float64_seconds(self, seconds: float) -> float:
        return seconds


def line(error: Exception) -> str:
    """The first line of an error, or its class."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def plain(value: Any) -> NDArray[Any]:
    """A result as numpy knows it: what it has no type for as float32."""
    array = np.asarray(value)
    if array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8")):
        return array.astype(np.float32)
    return array


def _has_narrow(inputs: Arrays, session: Any) -> bool:
    """Whether an input is of a type that numpy has no arrays of, so that onnxruntime cannot be given any."""
    return any("bfloat16" in entry.type or "float8" in entry.type for entry in session.get_inputs())


def _described(value: Any) -> Described:
    import onnx

    told = value.type.tensor_type
    shape = None
    if told.HasField("shape"):
        shape = tuple(
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or None
            for dim in told.shape.dim
        )
    try:
        dtype = "bfloat16" if told.elem_type == onnx.TensorProto.BFLOAT16 else numpy_type(told.elem_type).name
    except KeyError:
        dtype = "unknown"
    return Described(value.name, shape, dtype)


def numpy_type(code: int) -> np.dtype[Any]:
    """numpy's type, or that of ml_dtypes, for one of TensorProto's."""
    import onnx

    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code))


# the reference evaluator


def evaluator_of(model: Any) -> Any:
    """onnx's reference evaluator of a ModelProto. Raises CannotRunError for an operator that it does not know."""
    from onnx.reference import ReferenceEvaluator

    try:
        return ReferenceEvaluator(model, new_ops=_own_ops())
    except Exception as error:
        raise CannotRunError(f"{REFERENCE}: {line(error)}") from None


def _evaluate(evaluator: Any, inputs: Arrays) -> dict[str, NDArray[Any]]:
    return {name: plain(value) for name, value in evaluated(evaluator, inputs).items()}


def evaluated(evaluator: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name in their own types. Raises CannotRunError for what the evaluator does not know."""
    given = dict(inputs)
    for value in evaluator.proto_.graph.input:
        if value.name in given and value.type.tensor_type.elem_type:
            with contextlib.suppress(KeyError):
                given[value.name] = given[value.name].astype(numpy_type(value.type.tensor_type.elem_type))
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = evaluator.run(None, given)
    except Exception as error:
        raise CannotRunError(f"{REFERENCE}: {line(error)}") from None
    return dict(zip(evaluator.output_names, values, strict=True))


def _own_ops() -> list[type]:
    """Convolution by BLAS, for onnx's is slow; BatchNormalization, for onnx's is wrong below opset 14."""
    from onnx.reference.op_run import OpRun

    class Conv(OpRun):
        def _run(
            self,
            x: NDArray[Any],
            w: NDArray[Any],
            b: NDArray[Any] | None = None,
            auto_pad: str | None = None,
            dilations: Iterable[int] | None = None,
            group: int | None = None,
            kernel_shape: Iterable[int] | None = None,
            pads: Iterable[int] | None = None,
            strides: Iterable[int] | None = None,
        ) -> tuple[NDArray[Any]]:
            return (_convolved(x, w, b, auto_pad or "NOTSET", dilations, group or 1, pads, strides),)

    class BatchNormalization(OpRun):
        def _run(
            self,
            x: NDArray[Any],
            weight: NDArray[Any],
            bias: NDArray[Any],
            mean: NDArray[Any],
            var: NDArray[Any],
            epsilon: float | None = None,
            training_mode: int | None = None,
            spatial: int | None = None,
            **others: Any,
        ) -> tuple[NDArray[Any]]:
            if training_mode or spatial == 0 or len([name for name in self.onnx_node.output if name]) > 1:
                raise NotImplementedError("BatchNormalization with the statistics of the batch")
            kept = [values.reshape(-1, *[1] * (x.ndim - 2)) for values in (weight, bias, mean, var)]
            wide = np.float64 if x.dtype == np.float64 else np.float32
            gain, shift, center, spread = [np.asarray(values, dtype=wide) for values in kept]
            eps = np.asarray(1e-5 if epsilon is None else epsilon, dtype=wide)
            result = np.subtract(x.astype(wide), center) / np.sqrt(np.add(spread, eps)) * gain
            return (np.add(result, shift).astype(x.dtype),)

    return [Conv, BatchNormalization]


def _convolved(
    x: NDArray[Any],
    w: NDArray[Any],
    b: NDArray[Any] | None,
    auto_pad: str,
    dilations: Iterable[int] | None,
    groups: int,
    pads: Iterable[int] | None,
    strides: Iterable[int] | None,
) -> NDArray[Any]:
    """ONNX's Conv as one matrix product per place in the kernel. float16 and bfloat16 are summed in float32."""
    rank = x.ndim - 2
    kernel = w.shape[2:]
    steps = tuple(strides or [1] * rank)
    apart = tuple(dilations or [1] * rank)
    reach = [(length - 1) * gap + 1 for length, gap in zip(kernel, apart, strict=True)]
    around = list(pads or [0] * (2 * rank))
    if auto_pad.startswith("SAME"):
        for axis in range(rank):
            length = x.shape[2 + axis]
            missing = max((-(-length // steps[axis]) - 1) * steps[axis] + reach[axis] - length, 0)
            less, more = missing // 2, missing - missing // 2
            around[axis], around[rank + axis] = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    elif auto_pad == "VALID":
        around = [0] * (2 * rank)
    wide = np.float64 if x.dtype == np.float64 else np.float32
    padded = np.pad(x.astype(wide), [(0, 0), (0, 0), *((around[a], around[rank + a]) for a in range(rank))])
    counts = [(padded.shape[2 + a] - reach[a]) // steps[a] + 1 for a in range(rank)]
    batch, outputs = x.shape[0], w.shape[0]
    weights = w.astype(wide).reshape(groups, outputs // groups, w.shape[1], *kernel)
    result = np.zeros((batch, groups, outputs // groups, int(np.prod(counts))), dtype=wide)
    for place in np.ndindex(*kernel):
        cuts = tuple(
            slice(place[a] * apart[a], place[a] * apart[a] + (counts[a] - 1) * steps[a] + 1, steps[a])
            for a in range(rank)
        )
        taken = padded[(slice(None), slice(None), *cuts)].reshape(batch, groups, w.shape[1], -1)
        result += weights[(slice(None), slice(None), slice(None), *place)] @ taken
    result = result.reshape(batch, outputs, *counts)
    if b is not None:
        result += b.astype(wide).reshape(-1, *[1] * rank)
    return result.astype(x.dtype)


# float64


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph or a function and of the bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(body)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(body)


INTEGERS_INSIDE = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")


def _widened(model: Any) -> Any:
    """The model with every float in float64."""
    import onnx
    from onnx import TensorProto, numpy_helper

    narrow = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}

    def widen(tensor: Any) -> None:
        if tensor.data_type in narrow:
            values = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    graphs = [*_graphs(model.graph), *(inner for function in model.functions for inner in _graphs(function))]
    for graph in graphs:
        for tensor in getattr(graph, "initializer", ()):
            widen(tensor)
        values = [getattr(graph, name, ()) for name in ("input", "output", "value_info")]
        for value in (value for group in values for value in group if not isinstance(value, str)):
            if value.type.tensor_type.elem_type in narrow:
                value.type.tensor_type.elem_type = TensorProto.DOUBLE
        for node in graph.node:
            if node.op_type in INTEGERS_INSIDE or node.op_type.startswith("QLinear"):
                raise CannotRunError(f"the model computes in integers ({node.op_type}), which float64 does not refine")
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    widen(attribute.t)
                elif attribute.name in ("to", "dtype") and attribute.i in narrow:
                    attribute.i = TensorProto.DOUBLE
                elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                    many = attribute.name == "value_floats"
                    given = np.asarray(list(attribute.floats) if many else attribute.f, dtype=np.float64)
                    attribute.CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(given)))
            if node.op_type in ("ConstantOfShape",) and not node.attribute:
                zero = numpy_helper.from_array(np.zeros(1))
                node.attribute.append(onnx.helper.make_attribute("value", zero))
    return model
