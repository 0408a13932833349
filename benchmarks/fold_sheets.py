"""A sheet to write ONNX graphs on by hand, and the register of those written so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from fold_patterns import Pattern, seed_of
from onnx import TensorProto, TensorShapeProto, helper, numpy_helper

GRAPHS: list[Pattern] = []

Write = Callable[["Sheet"], None]


def graph(
    kind: str, norms: int = 1, folds: int | None = None, name: str = "", **known: Any
) -> Callable[[Write], Write]:
    """Register a function that writes one graph; what is known of it as in Pattern, opset and ir as in Sheet."""

    def register(write: Write) -> Write:
        sheet = {key: known.pop(key) for key in ("opset", "ir", "dtype") if key in known}
        expected = (0 if kind == "trap" else norms) if folds is None else folds
        title = name or write.__name__

        def make(seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
            page = Sheet(seed_of(title, seed), **sheet)
            write(page)
            return page.model(), page.data

        known.setdefault("least", None)
        GRAPHS.append(Pattern(title, kind, norms, expected, expected, formats=("onnx",), make=make, **known))
        return write

    return register


class Sheet:
    """One graph while it is written: nodes in order, the constants they use, random inputs with their data."""

    def __init__(self, seed: int, opset: int = 17, ir: int = 8, dtype: int = TensorProto.FLOAT) -> None:
        self.random = np.random.default_rng(seed)
        self.opset, self.ir, self.dtype = opset, ir, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[str] = []
        self.functions: list[onnx.FunctionProto] = []
        self.data: dict[str, np.ndarray] = {}
        self.count = 0
        self.constants_as_nodes = False

    # Numbers

    def widths(self, count: int) -> tuple[int, ...]:
        return tuple(int(each) for each in self.random.integers(3, 9, count))

    def numbers(self, *shape: int) -> np.ndarray:
        return self.random.normal(size=shape)

    def name(self, stem: str = "v") -> str:
        self.count += 1
        return f"{stem}{self.count}"

    # What a graph is made of

    def input(self, *shape: int, name: str = "", dtype: int | None = None, dynamic: bool = True) -> str:
        name = name or self.name("x")
        dtype = self.dtype if dtype is None else dtype
        axes: list[Any] = ["batch" if dynamic else shape[0], *shape[1:]] if shape else []
        self.inputs.append(helper.make_tensor_value_info(name, dtype, axes))
        self.data[name] = self.numbers(*shape).astype(helper.tensor_dtype_to_np_dtype(dtype))
        return name

    def tensor(self, values: Any, name: str, dtype: int | None = None) -> onnx.TensorProto:
        array = np.asarray(values)
        if dtype is None:
            dtype = self.dtype if array.dtype.kind == "f" else TensorProto.INT64
        return numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(dtype)), name)

    def constant(self, values: Any, name: str = "", dtype: int | None = None) -> str:
        """An initializer, or a Constant node where the sheet says so."""
        name = name or self.name("w")
        tensor = self.tensor(values, name, dtype)
        if self.constants_as_nodes:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def weight(self, *shape: int, **settings: Any) -> str:
        return self.constant(self.numbers(*shape), **settings)

    def node(self, op: str, *inputs: str, outputs: Sequence[str] | None = None, **attributes: Any) -> str:
        outputs = [self.name()] if outputs is None else list(outputs)
        self.nodes.append(helper.make_node(op, list(inputs), outputs, **attributes))
        return outputs[0]

    def output(self, *names: str) -> None:
        self.outputs += names

    # What patterns are made of

    def conv(
        self, x: str, inputs: int, outputs: int, kernel: int = 3, bias: bool | None = None, **settings: Any
    ) -> str:
        groups, dims = settings.get("group", 1), settings.pop("dims", 2)
        bias = bool(self.random.random() < 0.5) if bias is None else bias
        weight = self.weight(outputs, inputs // groups, *[kernel] * dims)
        return self.node("Conv", x, weight, *([self.weight(outputs)] if bias else []), **settings)

    def statistics(self, channels: int, positive: bool | None = None) -> list[np.ndarray]:
        """Scale, shift, mean and variance as training leaves them. positive: of all scales; False: not of the first."""
        scale = 0.2 + 1.5 * self.random.random(channels)
        if not positive:
            scale *= np.where(self.random.random(channels) < 0.4, -1, 1)
            scale[self.random.integers(channels)] *= self.random.random() < 0.5
            scale[0] = scale[0] if positive is None else -1.0
        variance = 0.05 * 400 ** self.random.random(channels)
        return [scale, self.numbers(channels), self.numbers(channels), variance]

    def norm(
        self, x: str, channels: int, positive: bool | None = None, outputs: Sequence[str] | None = None, **settings: Any
    ) -> str:
        dtype = settings.pop("parameters", None)
        names = [self.constant(each, dtype=dtype) for each in self.statistics(channels, positive)]
        return self.node("BatchNormalization", x, *names, outputs=outputs, **settings)

    def body(self, outputs: dict[str, int], write: Callable[[], None], inputs: Sequence[Any] = ()) -> onnx.GraphProto:
        """The body of an If or Loop: what `write` adds goes into it. outputs: name → number of axes."""
        outer, self.nodes, self.initializers = (self.nodes, self.initializers), [], []
        write()
        infos = [helper.make_tensor_value_info(name, self.dtype, [None] * axes) for name, axes in outputs.items()]
        graph = helper.make_graph(self.nodes, self.name("body"), list(inputs), infos, self.initializers)
        self.nodes, self.initializers = outer
        return graph

    def model(self) -> onnx.ModelProto:
        outputs = [helper.make_tensor_value_info(name, self.dtype, None) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, outputs, self.initializers)
        domains = {"": self.opset} | {function.domain: 1 for function in self.functions}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        model = helper.make_model(graph, functions=self.functions, opset_imports=opsets, ir_version=self.ir)
        inferred = onnx.shape_inference.infer_shapes(model)
        for output, found in zip(model.graph.output, inferred.graph.output, strict=True):
            output.CopyFrom(found)
            if not output.type.tensor_type.HasField("shape"):
                output.type.tensor_type.shape.dim.extend([TensorShapeProto.Dimension()] * 4)
        return model
