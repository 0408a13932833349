"""Each torch operator and what it is in the neutral graph, as torch.export writes it and decomposed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normdoctor.flow.graph import Node, Op, Value
from normdoctor.readers.aten import Call, Literal, build, translate
from tests.folding.pt2_tools import flow_of

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, when it decomposes

Case = tuple[Callable[[Any, Tensor], Any], Op, dict[str, Any]]

CASES: dict[str, Case] = {
    # (N, 4, 6, 6) → what makes the (first) output
    "conv": (lambda m, x: F.conv2d(x, m.w), Op.CONV, {"groups": 1, "padded": False}),
    "conv-padded": (lambda m, x: F.conv2d(x, m.w, padding=1), Op.CONV, {"padded": True}),
    "conv-grouped": (lambda m, x: F.conv2d(x, m.w[:, :2], groups=2), Op.CONV, {"groups": 2}),
    "conv-transposed": (lambda m, x: F.conv_transpose2d(x, m.w), Op.CONV_TRANSPOSE, {"groups": 1, "padded": True}),
    "conv-pointwise-transposed": (lambda m, x: F.conv_transpose2d(x, m.p), Op.CONV_TRANSPOSE, {"padded": False}),
    "batch_norm": (lambda m, x: F.batch_norm(x, m.v, m.v, eps=0.5), Op.BATCH_NORM, {"eps": 0.5, "training": False}),
    "batch_norm-of-batch": (lambda m, x: F.batch_norm(x, None, None, training=True), Op.BATCH_NORM, {"training": True}),
    "layer_norm": (lambda m, x: F.layer_norm(x, (6,), m.six), Op.LAYER_NORM, {"rms": False}),
    "group_norm": (lambda m, x: F.group_norm(x, 2, m.v), Op.OTHER_NORM, {}),
    "relu": (lambda m, x: F.relu(x), Op.ACTIVATION, {"name": "relu", "homogeneous": True}),
    "relu6": (lambda m, x: F.relu6(x), Op.ACTIVATION, {"name": "relu6", "homogeneous": False}),
    "clamp-above": (lambda m, x: x.clamp(min=0), Op.ACTIVATION, {"name": "relu", "homogeneous": True}),
    "clamp": (lambda m, x: x.clamp(-1, 2), Op.ACTIVATION, {"name": "clip", "low": -1.0, "high": 2.0}),
    "leaky_relu": (lambda m, x: F.leaky_relu(x, 0.3), Op.ACTIVATION, {"alpha": 0.3, "homogeneous": True}),
    "gelu": (lambda m, x: F.gelu(x, approximate="tanh"), Op.ACTIVATION, {"name": "gelu_tanh"}),
    "max_pool": (lambda m, x: F.max_pool2d(x, 2), Op.MAX_POOL, {}),
    "avg_pool": (lambda m, x: F.avg_pool2d(x, 2), Op.AVERAGE_POOL, {"counts_padding": False}),
    "avg_pool-padded": (lambda m, x: F.avg_pool2d(x, 3, 1, 1), Op.AVERAGE_POOL, {"counts_padding": True}),
    "avg_pool-without": (
        lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        Op.AVERAGE_POOL,
        {"counts_padding": False},
    ),
    "avg_pool-divisor": (
        lambda m, x: F.avg_pool2d(x, 2, divisor_override=3),
        Op.AVERAGE_POOL,
        {"counts_padding": True},
    ),
    "mean": (lambda m, x: x.mean((-1, -2)), Op.REDUCE_MEAN, {"axes": (2, 3), "keepdims": False}),
    "amax": (lambda m, x: x.amax(1, keepdim=True), Op.REDUCE_MAX, {"axes": (1,), "keepdims": True}),
    "sum": (lambda m, x: x.sum(), Op.REDUCE_SUM, {"axes": (0, 1, 2, 3), "keepdims": False}),
    "cat": (lambda m, x: torch.cat([x, x], -3), Op.CONCAT, {"axis": 1}),
    "chunk": (lambda m, x: x.chunk(2, 1)[0], Op.SPLIT, {"axis": 1}),
    "split": (lambda m, x: torch.split(x, [1, 3], 1)[0], Op.SPLIT, {"axis": 1}),
    "slice": (lambda m, x: x[:, -3:-1], Op.SLICE, {"axis": 1, "start": 1, "end": 3, "step": 1}),
    "slice-of-batch": (lambda m, x: x[1:], Op.SLICE, {"axis": 0, "start": None, "end": None}),
    "narrow": (lambda m, x: x.narrow(1, -2, 2), Op.SLICE, {"axis": 1, "start": 2, "end": 4}),
    "select": (lambda m, x: x[:, -1], Op.RESHAPE, {}),
    "pad": (lambda m, x: F.pad(x, (1, 0, 0, 0), value=2.0), Op.PAD, {"mode": "constant", "value": 2.0, "axes": (3,)}),
    "crop": (lambda m, x: F.pad(x, (-1, 0)), Op.OTHER, {}),
    "permute": (lambda m, x: x.permute(0, 2, 3, 1), Op.TRANSPOSE, {"order": (0, 2, 3, 1)}),
    "transpose": (lambda m, x: x.transpose(-1, 1), Op.TRANSPOSE, {"order": (0, 3, 2, 1)}),
    "movedim": (lambda m, x: x.movedim(1, -1), Op.TRANSPOSE, {"order": (0, 2, 3, 1)}),
    "flatten": (lambda m, x: x.flatten(1), Op.RESHAPE, {}),
    "unsqueeze": (lambda m, x: x.unsqueeze(1), Op.RESHAPE, {}),
    "expand": (lambda m, x: x[:, :, :1].expand(-1, -1, 5, -1), Op.EXPAND, {}),
    "repeat": (lambda m, x: x.repeat(1, 2, 1, 1), Op.TILE, {"axes": (1,)}),
    "view-as-other-type": (lambda m, x: x.view(torch.int32).float(), Op.CAST, {}),
    "dropout": (lambda m, x: F.dropout(x, 0.5, False) + 1, Op.ADD, {}),
    "to": (lambda m, x: x.double(), Op.CAST, {}),
    "clone": (lambda m, x: x.clone(), Op.IDENTITY, {}),
    "add": (lambda m, x: x + m.v[:, None, None], Op.ADD, {}),
    "divide-and-floor": (lambda m, x: torch.div(x, 2, rounding_mode="floor"), Op.OTHER, {}),
    "minus": (lambda m, x: -x, Op.NEGATE, {}),
    "power": (lambda m, x: x**3, Op.POWER, {}),
    "linear": (lambda m, x: F.linear(x[:, :, 0, 0], m.s, m.v), Op.MATMUL, {"takes_bias": True}),
    "matmul": (lambda m, x: x[:, :, 0, 0] @ m.s, Op.MATMUL, {"takes_bias": False}),
    "cumsum": (lambda m, x: x.cumsum(1), Op.OTHER, {}),
    "zeros": (lambda m, x: torch.zeros(3, 4), Op.CONSTANT, {}),
}

ONLY_EXPORTED: dict[str, Case] = {
    # what decompositions write in more elementary operators
    "conv-of-one-image": (lambda m, x: F.conv2d(x.sum(0), m.w), Op.OTHER, {}),
    "prelu": (lambda m, x: F.prelu(x, m.v), Op.ACTIVATION, {"name": "prelu", "homogeneous": True}),
    "stack": (lambda m, x: torch.stack([x, x], 1), Op.CONCAT, {"axis": 1}),
    "baddbmm": (
        lambda m, x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2], beta=2, alpha=3),
        Op.MATMUL,
        {"alpha": 3.0, "beta": 2.0},
    ),
    "same": (lambda m, x: F.conv2d(x, m.w, padding="same"), Op.CONV, {"padded": True}),
    "valid": (lambda m, x: F.conv2d(x, m.w, padding="valid"), Op.CONV, {"padded": False}),
    "rms_norm": (lambda m, x: F.rms_norm(x, (6,), m.six), Op.LAYER_NORM, {"rms": True}),
    "instance_norm": (lambda m, x: F.instance_norm(x, None, None, m.v, m.v), Op.OTHER_NORM, {}),
    "hardswish": (lambda m, x: F.hardswish(x), Op.ACTIVATION, {"name": "hardswish", "homogeneous": False}),
    "elu": (lambda m, x: F.elu(x, 0.5), Op.ACTIVATION, {"name": "elu", "alpha": 0.5}),
    "adaptive_max_pool": (lambda m, x: F.adaptive_max_pool2d(x, 1), Op.MAX_POOL, {}),
    "adaptive_avg_pool": (lambda m, x: F.adaptive_avg_pool2d(x, 2), Op.AVERAGE_POOL, {"counts_padding": False}),
    "reflect": (lambda m, x: F.pad(x, (1, 1, 0, 0), "reflect"), Op.PAD, {"mode": "reflect", "axes": (3,)}),
    "replicate": (lambda m, x: F.pad(x, (1, 1, 0, 1), "replicate"), Op.PAD, {"mode": "edge", "axes": (2, 3)}),
    "circular": (lambda m, x: F.pad(x, (1, 1, 0, 1), "circular"), Op.PAD, {"mode": "wrap", "axes": (2, 3)}),
    "interpolate": (lambda m, x: F.interpolate(x, scale_factor=2), Op.RESIZE, {"axes": (2, 3)}),
    "bilinear": (lambda m, x: F.interpolate(x, (3, 9), mode="bilinear"), Op.RESIZE, {"axes": (2, 3)}),
    "pixel_shuffle": (lambda m, x: F.pixel_shuffle(x, 2), Op.DEPTH_TO_SPACE, {"block": 2, "order": "CRD"}),
    "rsub": (lambda m, x: torch.rsub(x, 1.0), Op.SUBTRACT, {}),
    "dropout": (lambda m, x: F.dropout(x, 0.5, False), Op.IDENTITY, {}),
    "dropout-in-training": (lambda m, x: F.dropout(x, 0.5, True), Op.OTHER, {}),
}


class Zoo(nn.Module):
    """All cases at once."""

    def __init__(self, cases: dict[str, Case]) -> None:
        super().__init__()
        self.cases = [function for function, _, _ in cases.values()]
        shapes = {"w": (4, 4, 3, 3), "p": (4, 4, 1, 1), "s": (4, 4), "v": (4,), "six": (6,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.rand(*shape))

    def forward(self, x: Tensor) -> Any:
        found = []
        for function in self.cases:
            y = function(self, x)
            found.append(y[0] if isinstance(y, tuple) else y)
        return tuple(found)


def makers(path: Path, cases: dict[str, Case], decomposed: bool) -> dict[str, Node]:
    """The node that makes the output of each case."""
    torch.manual_seed(0)
    program = torch.export.export(
        Zoo(cases).eval(), (torch.randn(5, 4, 6, 6),), dynamic_shapes=({0: torch.export.Dim("n", min=4)},)
    )
    torch.export.save(program.run_decompositions() if decomposed else program, path)
    flow = flow_of(path)
    outputs = [entry["as_tensor"]["name"] for entry in flow.opened.record["graph_module"]["graph"]["outputs"]]
    found = [flow.values[name].producer for name in outputs]
    return {name: node for name, node in zip(cases, found, strict=True) if node is not None}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Node]:
    return makers(tmp_path_factory.mktemp("zoo") / "zoo.pt2", ONLY_EXPORTED | CASES, False)


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Node]:
    return makers(tmp_path_factory.mktemp("zoo") / "zoo.pt2", CASES, True)


def agrees(node: Node, case: Case) -> None:
    _, op, attributes = case
    assert (node.op, {name: node.attributes.get(name) for name in attributes}) == (op, attributes)


@pytest.mark.parametrize("name", ONLY_EXPORTED | CASES)
def test_as_exported(name: str, exported: dict[str, Node]) -> None:
    agrees(exported[name], (ONLY_EXPORTED | CASES)[name])


@pytest.mark.parametrize("name", CASES)
def test_decomposed(name: str, decomposed: dict[str, Node]) -> None:
    agrees(decomposed[name], CASES[name])


def test_lengths_that_depend_on_the_input_have_names(exported: dict[str, Node]) -> None:
    assert exported["relu"].y.shape == (*(exported["relu"].x.shape or ())[:1], 4, 6, 6)
    assert isinstance((exported["relu"].y.shape or ())[0], str)
    assert exported["repeat"].y.shape == (*(exported["relu"].y.shape or ())[:1], 8, 6, 6)


# calls by hand


def values(*shapes: tuple[int, ...], dtype: str = "float32") -> Iterator[Value]:
    return (Value(f"v{place}", shape, dtype) for place, shape in enumerate(shapes))


def literal_of(node: Node, slot: int) -> float:
    value = node.given(slot)
    assert value is not None and isinstance(value.array, Literal)
    return value.array.value


def test_alpha_scales_the_other_operand() -> None:
    x, y = values((2, 3), (2, 3))
    (node,) = translate(Call("sub", "Scalar", {"self": x, "other": 2.0}, [y]))
    assert node.op is Op.SUBTRACT and literal_of(node, 1) == 2.0
    scaled, node = translate(
        Call("add", "Tensor", {"self": x, "other": y, "alpha": 3}, [Value("z", (2, 3), "float32")])
    )
    assert scaled.op is Op.MULTIPLY and scaled.x is y and literal_of(scaled, 1) == 3.0
    assert node.inputs == [x, scaled.y] and node.fixed is not None


def test_alpha_of_rsub_scales_what_is_subtracted() -> None:
    x, y = values((2, 3), (2, 3))
    scaled, node = translate(Call("rsub", "Scalar", {"self": x, "other": 5.0, "alpha": 2}, [y]))
    assert scaled.x is x and literal_of(scaled, 1) == 2.0
    assert literal_of(node, 0) == 5.0 and node.inputs[1] is scaled.y


def test_narrower_operands_are_cast() -> None:
    (x,), (w, y) = values((2, 3), dtype="float16"), values((3,), (2, 3))
    cast, node = translate(Call("mul", "Tensor", {"self": x, "other": w}, [y]))
    assert (cast.op, cast.y.dtype) == (Op.CAST, "float32") and node.inputs == [cast.y, w]


@pytest.mark.parametrize(
    "call",
    [
        Call("frobnicate", "", {"self": Value("x")}, [Value("y")]),
        Call("mylib.conv2d", "", {"input": Value("x")}, [Value("y")]),
        Call("relu", "", {}, [Value("y")]),
        Call("relu", "", {"self": Value("x", (2,), "int64")}, [Value("y", (2,), "int64")]),
        Call("cat", "", {"tensors": [Value("x", (2, 3), "float32")], "dim": 5}, [Value("y", (2, 3), "float32")]),
        Call("permute", "", {"self": Value("x", (2, 3)), "dims": [0, 0]}, [Value("y", (2, 3))]),
        Call("mean", "dim", {"self": Value("x", None, "float32"), "dim": [1]}, [Value("y", None, "float32")]),
    ],
    ids=lambda call: call.operator,
)
def test_what_is_not_understood_stops_everything(call: Call) -> None:
    (node,) = translate(call)
    assert node.op is Op.OTHER and node.inputs == call.tensors and node.outputs == call.outputs


def chain(*operators: str) -> tuple[list[Value], list[Call]]:
    """Operators of one input in a row, on x."""
    known = list(values(*[(2, 3)] * (len(operators) + 1)))
    calls = [Call(name, "", {"self": known[n]}, [known[n + 1]]) for n, name in enumerate(operators)]
    return known, calls


def test_in_place_without_another_reader_is_as_any_other() -> None:
    known, calls = chain("exp", "relu_", "neg")
    graph = build(calls, [known[-1]], [known[0]])
    assert [node.op for node in graph.nodes] == [Op.ACTIVATION, Op.ACTIVATION, Op.NEGATE]
    assert [value.is_output for value in known] == [False, False, False, True]


@pytest.mark.parametrize("through", ["relu_", "view then relu_"])
def test_in_place_that_somebody_else_notices(through: str) -> None:
    known, calls = chain("exp", *(("view", "relu_") if " " in through else ("relu_",)))
    seen = Value("seen", (2, 3), "float32")
    calls.append(Call("neg", "", {"self": known[1]}, [seen]))
    graph = build(calls, [known[-1], seen], [known[0]])
    ops = [node.op for node in graph.nodes]
    assert ops[0] is Op.ACTIVATION and ops[-2:] == [Op.OTHER, Op.OTHER] and known[1].is_output


def test_in_place_on_an_input_or_a_stored_tensor() -> None:
    known, calls = chain("add_", "neg")
    calls[0].arguments["other"] = 1.0
    known[0].array = Literal(1.0, "float32", (2, 3))
    graph = build(calls, [known[-1]], [known[0]])
    assert [node.op for node in graph.nodes] == [Op.OTHER, Op.NEGATE] and known[0].array is None
