"""Runs a neutral graph in float64, as it is or with a fold plan applied: an independent check of the plan.

The operators are torch's own; nothing here knows what an affine map is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from normdoctor.flow.graph import Graph, Node, Op, Value
from normdoctor.flow.plan import FoldPlan, plan_folds


def run(graph: Graph, inputs: Mapping[str, np.ndarray], plan: FoldPlan | None = None) -> dict[str, np.ndarray]:
    """The outputs of the graph; with `plan`, of the folded graph."""
    new = {} if plan is None else {(each.node, each.slot): torch.tensor(each.values) for each in plan.new_inputs()}
    known: dict[Value, torch.Tensor] = {}

    def value(entry: Value | None) -> Any:
        if entry is None:
            return None
        if entry not in known:
            data = inputs[entry.name] if entry.array is None else entry.array.numpy()
            known[entry] = torch.tensor(np.asarray(data))
            if known[entry].is_floating_point():
                known[entry] = known[entry].double()
        return known[entry]

    outputs = {}
    for node in graph.nodes:
        if plan is not None and node in plan.bypassed:
            known[node.y] = value(node.inputs[plan.bypassed[node]])
            continue
        slots = max([len(node.inputs), *(slot + 1 for other, slot in new if other is node)])
        given = [
            new.get((node, slot), None if slot >= len(node.inputs) else value(node.inputs[slot]))
            for slot in range(slots)
        ]
        attributes = node.attributes | (plan.attributes.get(node, {}) if plan is not None else {})
        if plan is not None and node in plan.decomposed:
            scale, shift = map(torch.tensor, plan.decomposed[node])
            results: Any = given[0] * scale + shift
        else:
            results = compute(node, attributes, given)
        if plan is not None and node in plan.appended:
            results = results + torch.tensor(plan.appended[node])
        for output, result in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=True):
            known[output] = result
    for node in graph.nodes:
        for output in node.outputs:
            if output.is_output:
                outputs[output.name] = known[output].numpy()
    return outputs


def compute(node: Node, attributes: Mapping[str, Any], given: list[Any]) -> Any:
    x, *rest = given
    first = rest[0] if rest else None
    match node.op:
        case Op.CONV | Op.CONV_TRANSPOSE:
            name = ("conv" if node.op is Op.CONV else "conv_transpose") + f"{x.ndim - 2}d"
            options = {key: attributes[key] for key in ("stride", "padding", "groups") if key in attributes}
            return getattr(F, name)(x, *[*rest, None][:2], **options)
        case Op.MATMUL:
            a = x.transpose(-1, -2) if attributes.get("transpose_a") else x
            b = first.transpose(-1, -2) if attributes.get("transpose_b") else first
            product = attributes.get("alpha", 1.0) * (a @ b)
            return product if len(rest) < 2 or rest[1] is None else product + attributes.get("beta", 1.0) * rest[1]
        case Op.BATCH_NORM:
            weight, bias, mean, var = rest
            return F.batch_norm(
                x, mean, var, weight, bias, eps=attributes["eps"], training=bool(attributes.get("training"))
            )
        case Op.LAYER_NORM:
            return F.layer_norm(x, first.shape, first, rest[1])
        case Op.OTHER_NORM:
            return F.group_norm(x, 1, first, rest[1])
        case Op.ADD:
            return x + first
        case Op.SUBTRACT:
            return x - first
        case Op.MULTIPLY:
            return x * first
        case Op.DIVIDE:
            return x / first
        case Op.NEGATE:
            return -x
        case Op.ACTIVATION:
            return getattr(F, attributes["name"])(x)
        case Op.MAX_POOL:
            return getattr(F, f"max_pool{x.ndim - 2}d")(x, 2, 1, attributes.get("pad", 0))
        case Op.AVERAGE_POOL:
            return getattr(F, f"avg_pool{x.ndim - 2}d")(x, 2, 1, attributes.get("pad", 0))
        case Op.REDUCE_MEAN:
            return x.mean(attributes["axes"], keepdim=attributes["keepdims"])
        case Op.REDUCE_SUM:
            return x.sum(attributes["axes"], keepdim=attributes["keepdims"])
        case Op.REDUCE_MAX:
            return x.amax(attributes["axes"], keepdim=attributes["keepdims"])
        case Op.CONCAT:
            return torch.cat(given, attributes["axis"])
        case Op.SPLIT:
            return x.split([output.shape[attributes["axis"]] for output in node.outputs], attributes["axis"])
        case Op.SLICE:
            cut = slice(attributes["start"], attributes["end"], attributes["step"])
            return x[(slice(None),) * attributes["axis"] + (cut,)]
        case Op.PAD:
            return F.pad(x, (1, 1) * len(attributes["axes"]), mode="constant", value=attributes.get("value", 0.0))
        case Op.TRANSPOSE:
            return x.permute(attributes["order"])
        case Op.RESHAPE:
            shape = [length if isinstance(length, int) else -1 for length in node.y.shape or ()]
            return x.reshape(shape)
        case Op.EXPAND:
            return x.expand([length if isinstance(length, int) else x.shape[0] for length in node.y.shape or ()])
        case Op.RESIZE:
            return F.interpolate(x, scale_factor=2)
        case Op.DEPTH_TO_SPACE:
            assert attributes["order"] == "CRD"
            return F.pixel_shuffle(x, attributes["block"])
        case Op.IDENTITY | Op.CAST:
            return x
        case Op.SQRT:
            return x.sqrt()
        case Op.GATHER:
            return x.select(attributes["axis"], int(first))
    raise AssertionError(node.op)


@dataclass(frozen=True, eq=False)
class Held:
    """An ArrayRef over values in memory."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> str:
        return str(self.values.dtype)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def identity(self) -> int:
        return id(self.values)

    def numpy(self) -> np.ndarray:
        return self.values


class Net:
    """Builds a graph node by node. Shapes are those that the operators really give, for batches of two and of three."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = Graph()
        self.random = np.random.default_rng(seed)
        self.inputs: dict[str, tuple[int, ...]] = {}
        self._seen: dict[Value, tuple[torch.Tensor, torch.Tensor]] = {}
        self._count = 0

    def input(self, *shape: int, name: str = "x") -> Value:
        """A data input of (n, *shape)."""
        self.inputs[name] = shape
        value = Value(name, ("n", *shape), "float32")
        self._seen[value] = tuple(torch.rand(n, *shape, dtype=torch.float64) for n in (2, 3))  # type: ignore[assignment]
        return value

    def constant(self, values: Any) -> Value:
        array = np.asarray(values)
        self._count += 1
        return Value(f"c{self._count}", array.shape, str(array.dtype), Held(array))

    def normal(self, *shape: int) -> Value:
        return self.constant(self.random.normal(size=shape))

    def op(self, op: Op, *inputs: Value | None, outputs: tuple[int, ...] = (), **attributes: Any) -> Value:
        """Append a node; `shape` in the attributes is the output's where torch needs it to compute."""
        self._count += 1
        shape = attributes.pop("shape", None)
        made = [Value(f"v{self._count}.{place}", shape) for place in range(max(1, len(outputs)))]
        if outputs:
            for value, length in zip(made, outputs, strict=True):
                value.shape = (None,) * attributes["axis"] + (length,)
        node = self.graph.add(
            Node(op, list(inputs), made, attributes, written=op.name, label=f"{op.name}{self._count}")
        )
        results = []
        for batch in (0, 1):
            given = [None if entry is None else self._value(entry, batch) for entry in inputs]
            result = compute(node, attributes, given)
            results.append(result if isinstance(result, tuple) else (result,))
        for value, two, three in zip(made, *results, strict=True):
            self._seen[value] = (two, three)
            lengths = zip(two.shape, three.shape, strict=True)
            value.shape = tuple(a if a == b else "n" if (a, b) == (2, 3) else None for a, b in lengths)
            value.dtype = "float32"
        return made[0]

    def _value(self, entry: Value, batch: int) -> torch.Tensor:
        if entry.array is not None:
            tensor = torch.tensor(entry.array.numpy())
            return tensor.double() if tensor.is_floating_point() else tensor
        return self._seen[entry][batch]

    def conv(self, x: Value, channels: int = 4, kernel: int = 3, bias: bool = True, **options: Any) -> Value:
        rank = len(x.shape or ()) - 2
        groups = options.get("groups", 1)
        weight = self.normal(channels, int((x.shape or ())[1] or 0) // groups, *[kernel] * rank)
        padded = bool(options.get("padding"))
        return self.op(Op.CONV, x, weight, self.normal(channels) if bias else None, padded=padded, **options)

    def linear(self, x: Value, features: int = 5, bias: bool = True) -> Value:
        weight = self.normal(features, int((x.shape or ())[-1] or 0))
        given = self.normal(features) if bias else None
        return self.op(Op.MATMUL, x, weight, given, transpose_b=True, takes_bias=True)

    def norm(self, x: Value, positive: bool = False, **options: Any) -> Value:
        channels = int((x.shape or ())[1] or 0)
        weight = self.random.normal(size=channels)
        var = self.random.uniform(0.05, 4, size=channels)
        parameters = [np.abs(weight) if positive else weight, *self.random.normal(size=(2, channels)), var]
        return self.op(Op.BATCH_NORM, x, *map(self.constant, parameters), eps=1e-5, **options)

    def sample(self, batch: int = 2) -> dict[str, np.ndarray]:
        return {name: self.random.normal(size=(batch, *shape)) for name, shape in self.inputs.items()}

    def finish(self, *outputs: Value) -> Graph:
        """The graph; without `outputs`, everything that nothing uses leaves it."""
        for node in self.graph.nodes:
            for value in node.outputs:
                value.is_output = value in outputs if outputs else not value.uses
        return self.graph

    def check(self, **options: Any) -> FoldPlan:
        """Plan the folds, and hold the folded graph against the original one in float64."""
        plan = plan_folds(self.graph, **options)
        for batch in (2, 5):
            inputs = self.sample(batch)
            before, after = run(self.graph, inputs), run(self.graph, inputs, plan)
            assert before.keys() == after.keys()
            for name, expected in before.items():
                size = max(1.0, float(np.abs(expected).max(initial=0)))
                np.testing.assert_allclose(after[name] / size, expected / size, rtol=0, atol=1e-9)
        return plan


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def nets() -> type[Net]:
    return Net
