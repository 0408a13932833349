"""Where convolutions look, and what dropouts leave out, as each format says it: against the shapes that torch and
ONNX Runtime give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx import helper as h
from torch import nn

from normdoctor.flow.graph import Graph, Node, Op, Value
from normdoctor.models.inputs import Example
from normdoctor.models.loaded import Kind, Loaded
from normdoctor.readers.aten import Call, translate
from normdoctor.readers.onnx_flow import open_flow
from normdoctor.torchscript.with_torch import read_script
from normdoctor.tracing.with_torch import trace
from tests.folding.pt2_tools import flow_of

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

Array = NDArray[np.float32]


def output(node: Node, x: Array, weight: Array) -> Array:
    """What the node computes, from its attributes alone: every product by itself."""
    a = node.attributes
    axes = range(x.ndim - 2)
    kernel = weight.shape[2:]
    spans = [a["dilations"][i] * (kernel[i] - 1) + 1 for i in axes]
    lengths = x.shape[2:]
    if node.op is Op.CONV:
        padded = np.pad(x, [(0, 0), (0, 0), *a["pads"]])
        made = [(lengths[i] + sum(a["pads"][i]) - spans[i]) // a["strides"][i] + 1 for i in axes]
        y = np.zeros((len(x), len(weight), *made))
        for tap in np.ndindex(*kernel):
            start = [tap[i] * a["dilations"][i] for i in axes]
            cut = tuple(slice(start[i], start[i] + (made[i] - 1) * a["strides"][i] + 1, a["strides"][i]) for i in axes)
            y += np.einsum("nc...,oc->no...", padded[(..., *cut)], weight[(..., *tap)])
        return y.astype(np.float32)
    whole = [(lengths[i] - 1) * a["strides"][i] + spans[i] for i in axes]
    # What is cut off may be less than nothing: then zeros are added.
    y = np.pad(np.zeros((len(x), weight.shape[1], *whole)), [(0, 0), (0, 0), *[(0, 9)] * len(whole)])
    for tap in np.ndindex(*kernel):
        start = [tap[i] * a["dilations"][i] for i in axes]
        cut = tuple(slice(start[i], start[i] + (lengths[i] - 1) * a["strides"][i] + 1, a["strides"][i]) for i in axes)
        y[(..., *cut)] += np.einsum("nc...,co->no...", x, weight[(..., *tap)])
    kept = tuple(slice(a["pads"][i][0], whole[i] - a["pads"][i][1]) for i in axes)
    return y[(..., *kept)].astype(np.float32)


def conv_of(graph: Graph) -> Node:
    (node,) = graph.of(Op.CONV, Op.CONV_TRANSPOSE)
    return node


# ONNX

SAME = {"auto_pad": "SAME_UPPER"}
LOWER = {"auto_pad": "SAME_LOWER"}

ONNX_CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    # kind, lengths of the input, kernel, attributes
    "plain": ("Conv", (7, 8), (3, 3), {}),
    "asymmetric": ("Conv", (7, 8), (3, 2), {"pads": [0, 1, 2, 3], "strides": [2, 1]}),
    "dilated": ("Conv", (9, 8), (3, 2), {"dilations": [2, 3], "pads": [1, 0, 0, 2]}),
    "1d": ("Conv", (9,), (4,), {"strides": [3], "pads": [2, 1]}),
    "3d": ("Conv", (4, 5, 6), (2, 3, 1), {"strides": [1, 2, 3], "pads": [0, 1, 0, 1, 1, 2]}),
    "valid": ("Conv", (7, 8), (3, 2), {"auto_pad": "VALID", "strides": [2, 2]}),
    "upper": ("Conv", (7, 8), (3, 2), SAME),
    "lower": ("Conv", (7, 8), (4, 2), LOWER),
    "upper-strided": ("Conv", (7, 8), (4, 3), {**SAME, "strides": [2, 3]}),
    "lower-strided": ("Conv", (7, 8), (4, 3), {**LOWER, "strides": [2, 3]}),
    "upper-apart": ("Conv", (7, 8), (1, 2), {**SAME, "strides": [3, 3]}),
    "up": ("ConvTranspose", (4, 5), (3, 2), {"strides": [2, 3]}),
    "up-cut": ("ConvTranspose", (4, 5), (3, 3), {"strides": [2, 1], "pads": [0, 1, 2, 1]}),
    "up-added": ("ConvTranspose", (4, 5), (3, 3), {"strides": [2, 3], "pads": [1] * 4, "output_padding": [1, 2]}),
    "up-dilated": ("ConvTranspose", (4,), (3,), {"strides": [2], "dilations": [2], "pads": [1, 0]}),
    "up-3d": ("ConvTranspose", (2, 3, 2), (2, 2, 1), {"strides": [2, 1, 3], "output_padding": [0, 0, 1]}),
    "up-upper": ("ConvTranspose", (4, 5), (3, 4), {**SAME, "strides": [2, 1]}),
    "up-lower": ("ConvTranspose", (4, 5), (3, 4), {**LOWER, "strides": [2, 1]}),
    "up-upper-added": ("ConvTranspose", (4, 5), (4, 4), {**SAME, "strides": [2, 3], "output_padding": [1, 1]}),
    "up-lower-added": ("ConvTranspose", (4, 5), (3, 4), {**LOWER, "strides": [3, 2], "output_padding": [1, 1]}),
    "up-shape": ("ConvTranspose", (4, 5), (3, 3), {"output_shape": [8, 9], "strides": [2, 2]}),
    "up-shape-upper": ("ConvTranspose", (4, 5), (3, 3), {**SAME, "output_shape": [8, 10], "strides": [2, 2]}),
}  # fmt: skip


def onnx_model(
    kind: str, lengths: tuple[Any, ...], kernel: tuple[int, ...], attributes: dict[str, Any], weight: Array
) -> Any:
    x = h.make_tensor_value_info("x", TensorProto.FLOAT, (2, 2, *lengths))
    y = h.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = h.make_node(kind, ["x", "w"], ["y"], **attributes)
    graph = h.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=8)


def onnx_conv(path: Path, model: Any) -> Node:
    onnx.save(model, path)
    with open_flow(path) as flow:
        return conv_of(flow.graph)


@pytest.mark.parametrize("name", ONNX_CASES)
def test_onnx(name: str, tmp_path: Path) -> None:
    kind, lengths, kernel, attributes = ONNX_CASES[name]
    random = np.random.default_rng(0)
    weight = random.normal(size=(2, 2, *kernel)).astype(np.float32)
    model = onnx_model(kind, lengths, kernel, attributes, weight)
    node = onnx_conv(tmp_path / "m.onnx", model)
    x = random.normal(size=(2, 2, *lengths)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    found = output(node, x, weight)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_onnx_says_the_numbers(tmp_path: Path) -> None:
    kind, lengths, kernel, attributes = ONNX_CASES["asymmetric"]
    node = onnx_conv(tmp_path / "m.onnx", onnx_model(kind, lengths, kernel, attributes, np.zeros((2, 2, 3, 2), "f4")))
    known = {name: node.attributes[name] for name in ("strides", "dilations", "pads")}
    assert known == {"strides": (2, 1), "dilations": (1, 1), "pads": ((0, 2), (1, 3))}


@pytest.mark.parametrize(
    ("kind", "attributes", "pads"),
    [
        ("Conv", {**SAME, "strides": [2, 2]}, None),
        ("Conv", {**SAME, "strides": [1, 1]}, ((1, 1), (1, 1))),
        ("Conv", {**SAME, "dilations": [2, 1]}, ((2, 2), (1, 1))),
        ("Conv", {"pads": [1, 0, 0, 0]}, ((1, 0), (0, 0))),
        ("ConvTranspose", {**SAME, "strides": [2, 2]}, ((0, 1), (0, 1))),
        ("ConvTranspose", {**SAME, "strides": [4, 4]}, None),
        ("ConvTranspose", {"output_shape": [9, 9]}, None),
    ],
)
def test_onnx_input_of_unknown_size(kind: str, attributes: dict[str, Any], pads: object, tmp_path: Path) -> None:
    model = onnx_model(kind, ("h", "w"), (3, 3), attributes, np.zeros((2, 2, 3, 3), "f4"))
    assert onnx_conv(tmp_path / "m.onnx", model).attributes["pads"] == pads


@pytest.mark.parametrize(
    ("attributes", "unknown"),
    [
        ({"strides": [1]}, "strides"),
        ({"strides": [0, 1]}, "strides"),
        ({"dilations": [1, -1]}, "dilations"),
        ({"pads": [1, 1]}, "pads"),
        ({"pads": [1, -1, 0, 0]}, "pads"),
        ({"auto_pad": "SOMEHOW"}, "pads"),
    ],
)
def test_what_no_convolution_has(attributes: dict[str, Any], unknown: str, tmp_path: Path) -> None:
    model = onnx_model("Conv", (7, 8), (3, 3), attributes, np.zeros((2, 2, 3, 3), "f4"))
    assert onnx_conv(tmp_path / "m.onnx", model).attributes[unknown] is None


@pytest.mark.parametrize(
    ("opset", "attributes", "inputs", "probability"),
    [
        (6, {"ratio": 0.25, "is_test": 1}, [], 0.25),
        (10, {"ratio": 0.125}, [], 0.125),
        (10, {}, [], 0.5),
        (13, {}, ["ratio"], 0.75),
        (13, {}, [], 0.5),
        (13, {}, ["free"], None),
        (10, {"ratio": 7.0}, [], None),
    ],
)
def test_onnx_dropout(opset: int, attributes: Any, inputs: list[str], probability: object, tmp_path: Path) -> None:
    x = h.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3))
    free = h.make_tensor_value_info("free", TensorProto.FLOAT, ())
    y = h.make_tensor_value_info("y", TensorProto.FLOAT, None)
    ratio = numpy_helper.from_array(np.float32(0.75), "ratio")
    graph = h.make_graph([h.make_node("Dropout", ["x", *inputs], ["y"], **attributes)], "g", [x, free], [y], [ratio])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=8), tmp_path / "m.onnx")
    with open_flow(tmp_path / "m.onnx") as flow:
        (node,) = (node for node in flow.graph.nodes if node.y.name == "y")
    assert node.op is Op.IDENTITY and node.attributes.get("dropout") == probability


# torch: .pt2 as exported and decomposed, a traced module, TorchScript


TORCH_CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(2, 2, 3), (7, 8)),
    "numbers": (nn.Conv2d(2, 2, 3, stride=2, padding=1, dilation=2), (9, 8)),
    "each-axis": (nn.Conv2d(2, 2, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 3)), (9, 8)),
    "same": (nn.Conv2d(2, 2, (4, 3), padding="same", dilation=(1, 2)), (9, 8)),
    "valid": (nn.Conv2d(2, 2, 3, padding="valid"), (9, 8)),
    "1d": (nn.Conv1d(2, 2, 4, stride=3, padding=2), (9,)),
    "3d": (nn.Conv3d(2, 2, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 2)), (4, 5, 3)),
    "up": (nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1), (4, 5)),
    "up-dilated": (nn.ConvTranspose2d(2, 2, (3, 2), stride=(3, 2), dilation=(1, 2), output_padding=(2, 0)), (4, 5)),
    "up-1d": (nn.ConvTranspose1d(2, 2, 3, stride=2, padding=2), (6,)),
    "up-3d": (nn.ConvTranspose3d(2, 2, 2, stride=(2, 1, 2), output_padding=(0, 0, 1)), (2, 3, 2)),
}


def agrees(node: Node, module: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected = (module(x) - module.bias.reshape(-1, *[1] * (x.ndim - 2))).numpy()
    data = x.numpy()
    if node.x.producer is not None:  # a decomposition pads by itself what a convolution cannot
        assert node.x.producer.op is Op.PAD
        assert node.x.shape is not None and all(isinstance(length, int) for length in node.x.shape)
        more = [(0, after - before) for before, after in zip(data.shape, node.x.shape, strict=True)]
        data = np.pad(data, more)  # the odd one comes after
    found = output(node, data, module.weight.detach().numpy())
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def loaded(kind: Kind, module: nn.Module) -> Loaded:
    return Loaded(kind, torch.jit.script(module) if kind is Kind.SCRIPT else module, "net", evaluation=True)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", TORCH_CASES)
def test_torch(name: str, tmp_path: Path) -> None:
    module, lengths = TORCH_CASES[name]
    net = nn.Sequential(module, nn.Dropout(0.25)).eval()
    x = torch.randn(3, 2, *lengths)
    program = torch.export.export(net, (x,))
    for file, saved in (("exported", program), ("decomposed", program.run_decompositions())):
        torch.export.save(saved, tmp_path / f"{file}.pt2")
        agrees(conv_of(flow_of(tmp_path / f"{file}.pt2").graph), module, x)
    graphs = [
        flow_of(tmp_path / "exported.pt2").graph,
        trace(loaded(Kind.MODULE, net), Example((x,), {})).graph,
        read_script(loaded(Kind.SCRIPT, net), Example((x,), {}), {}).graph,
    ]
    for graph in graphs:
        agrees(conv_of(graph), module, x)
    left_out = [[node.attributes.get("dropout") for node in graph.of(Op.IDENTITY)] for graph in graphs]
    assert left_out[:2] == [[0.25]] * 2  # freezing takes it out of TorchScript
    assert left_out[2] in ([], [0.25])


def test_convolution_written_in_a_word() -> None:
    x, w, y = (Value(name, shape, "float32") for name, shape in (("x", (1, 2, 9)), ("w", (4, 2, 4)), ("y", None)))
    for padding, pads in (("same", ((4, 5),)), ("valid", ((0, 0),)), ("else", None), ([None], None), (3, ((3, 3),))):
        arguments = {"input": x, "weight": w, "padding": padding, "dilation": [3]}
        (node,) = translate(Call("conv1d", "padding", arguments, [y]))
        assert (node.attributes["pads"], node.attributes["dilations"], node.attributes["strides"]) == (pads, (3,), (1,))


@pytest.mark.parametrize(
    ("name", "more", "probability"),
    [
        ("dropout", {"p": 0.5, "train": False}, 0.5),
        ("dropout", {"p": 0, "train": True}, 0.0),
        ("feature_dropout", {"p": 0.1, "train": False}, 0.1),
        ("alpha_dropout", {"p": 0.2, "train": False}, 0.2),
        ("native_dropout", {"p": 0.3, "train": False}, 0.3),
        ("dropout", {"p": None, "train": False}, None),
        ("dropout", {"p": float("nan"), "train": False}, None),
    ],
)
def test_torch_dropout(name: str, more: dict[str, Any], probability: float | None) -> None:
    x, y = Value("x", (2, 3), "float32"), Value("y", (2, 3), "float32")
    (node,) = translate(Call(name, "", {"input": x, **more}, [y]))
    assert node.op is Op.IDENTITY and node.attributes.get("dropout") == probability
