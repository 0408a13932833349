"""What an ONNX file computes, in float64: onnx's reference evaluator with convolutions and norms of torch.

The evaluator's own BatchNormalization is wrong below version 14, its ConvTranspose knows no groups, and its Conv is
slow. No kernel here and no line of normdoctor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def doubled(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which everything that was float16, bfloat16 or float32 is float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    double_values(copy.graph.input)
    double_values(copy.graph.output)
    double_graph(copy.graph)
    for function in copy.functions:
        double_nodes(function.node)
    return copy


def double_graph(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for tensor in graph.initializer:
        double_tensor(tensor)
    double_nodes(graph.node)


def double_values(values: Any) -> None:
    for value in values:
        kind = value.type.tensor_type
        if kind.elem_type in FLOATS:
            kind.elem_type = TensorProto.DOUBLE


def double_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in FLOATS:
        values = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def double_nodes(nodes: Any) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                double_tensor(attribute.t)
            if attribute.HasField("g"):
                double_values(attribute.g.input)
                double_values(attribute.g.output)
                double_graph(attribute.g)
            if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                tensor = numpy_helper.from_array(np.asarray(values, np.float64))
                attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in FLOATS:
                attribute.i = TensorProto.DOUBLE


def evaluate(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs in float64. Raises what the evaluator raises."""
    fed = {name: value.astype(np.float64) if value.dtype.kind not in "biu" else value for name, value in inputs.items()}
    evaluator = ReferenceEvaluator(doubled(model), new_ops=[Conv, ConvTranspose, BatchNormalization])
    return [np.asarray(each) for each in evaluator.run(None, fed)]  # type: ignore[union-attr]


# Operators --------------------------------------------------------------------------------------------------------


def tensors(*arrays: Any) -> list[Any]:
    return [None if each is None else torch.from_numpy(np.array(each, np.float64)) for each in arrays]


def padding(
    auto_pad: str | None, pads: Any, x: Any, kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """Zeros before and after each spatial axis, in the order of F.pad."""
    axes = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * (2 * axes)
        for axis in range(axes):
            size, taps = x.shape[2 + axis], (kernel[axis] - 1) * dilations[axis] + 1
            missing = max((-(-size // strides[axis]) - 1) * strides[axis] + taps - size, 0)
            less, more = missing // 2, missing - missing // 2
            pads[axis], pads[axes + axis] = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    elif auto_pad == "VALID" or not pads:
        pads = [0] * (2 * axes)
    return [side for axis in reversed(range(axes)) for side in (pads[axis], pads[axes + axis])]


class Conv(OpRun):
    op_domain = ""

    def _run(self, x: Any, w: Any, b: Any = None, auto_pad: Any = None, dilations: Any = None, group: Any = None,
             kernel_shape: Any = None, pads: Any = None, strides: Any = None) -> Any:  # fmt: skip
        x, w, b = tensors(x, w, b)
        axes = w.dim() - 2
        strides, dilations = strides or [1] * axes, dilations or [1] * axes
        x = F.pad(x, padding(auto_pad, pads, x, list(w.shape[2:]), strides, dilations))
        function = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        return (function(x, w, b, tuple(strides), 0, tuple(dilations), group or 1).numpy(),)


class ConvTranspose(OpRun):
    op_domain = ""

    def _run(self, x: Any, w: Any, b: Any = None, auto_pad: Any = None, dilations: Any = None, group: Any = None,
             kernel_shape: Any = None, output_padding: Any = None, output_shape: Any = None, pads: Any = None,
             strides: Any = None) -> Any:  # fmt: skip
        if auto_pad not in (None, "NOTSET") or output_shape:
            raise NotImplementedError("auto_pad or output_shape of ConvTranspose")
        x, w, b = tensors(x, w, b)
        axes = w.dim() - 2
        pads = pads or [0] * (2 * axes)
        strides, dilations = strides or [1] * axes, dilations or [1] * axes
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        y = function(x, w, b, tuple(strides), 0, 0, group or 1, tuple(dilations))
        if output_padding:  # what lies behind the last tap is only the bias
            extra = torch.zeros(
                *y.shape[:2], *(size + more for size, more in zip(y.shape[2:], output_padding, strict=True))
            )
            extra = extra.double() + (0 if b is None else b.reshape(-1, *[1] * axes))
            extra[(..., *(slice(size) for size in y.shape[2:]))] = y
            y = extra
        cut = tuple(slice(pads[axis], y.shape[2 + axis] - pads[axes + axis]) for axis in range(axes))
        return (y[(..., *cut)].numpy(),)


class BatchNormalization(OpRun):
    op_domain = ""

    def _run(self, x: Any, scale: Any, shift: Any, mean: Any, var: Any, epsilon: Any = 1e-5, is_test: Any = None,
             momentum: Any = 0.9, spatial: Any = 1, training_mode: Any = 0) -> Any:  # fmt: skip
        epsilon, momentum = 1e-5 if epsilon is None else epsilon, 0.9 if momentum is None else momentum
        count = len(self.onnx_node.output)
        form = (1, *scale.shape) if spatial == 0 else (1, -1, *[1] * (x.ndim - 2))
        if training_mode or count > 3:
            axes = (0, *range(2, x.ndim))
            new_mean, new_var = x.mean(axes), x.var(axes)
            rest = [momentum * mean + (1 - momentum) * new_mean, momentum * var + (1 - momentum) * new_var]
            mean, var = new_mean, new_var
        else:
            rest = [mean, var]
        mean, var, scale, shift = (np.reshape(each, form) for each in (mean, var, scale, shift))
        y = (x - mean) / np.sqrt(var + epsilon) * scale + shift
        return (y, *rest, *rest)[:count]
