"""ONNX's operators as neutral nodes: attributes by opset, shapes, constants, and who makes and takes a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx import helper as h

from normdoctor.errors import InputError
from normdoctor.flow.graph import Graph, Node, Op
from normdoctor.readers.onnx_flow import open_flow

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

Read = Callable[..., Graph]


def floats(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.ones(shape, dtype=np.float32), name)


def ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def value(name: str, shape: Any = ("n", 4, 8, 8), kind: int = FLOAT) -> Any:
    return h.make_tensor_value_info(name, kind, shape)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The neutral graph of some nodes over the input x."""

    def read_(
        nodes: Sequence[Any],
        tensors: Sequence[Any] = (),
        *,
        opset: int = 18,
        ir: int = 8,
        inputs: Sequence[Any] = (),
        outputs: Sequence[str] = ("y",),
        **more: Any,
    ) -> Graph:
        outs = [value(name, None) for name in outputs]
        graph = h.make_graph(list(nodes), "g", list(inputs) or [value("x")], outs, list(tensors))
        path = tmp_path / "model.onnx"
        imports = [h.make_opsetid("", opset), h.make_opsetid("com.microsoft", 1)]
        onnx.save(h.make_model(graph, opset_imports=imports, ir_version=ir, **more), path)
        with open_flow(path) as flow:
            return flow.graph

    return read_


def only(graph: Graph) -> Node:
    (node,) = (node for node in graph.nodes if node.y.name or node.op is not Op.OTHER)
    return node


def make(op: str, *inputs: str, outputs: Sequence[str] = ("y",), domain: str = "", **attributes: Any) -> Any:
    return h.make_node(op, ["x", *inputs], list(outputs), domain=domain, **attributes)


def having(**values: Any) -> dict[str, Any]:
    return values


LIMITS = [numpy_helper.from_array(np.float32(number), name) for name, number in (("low", 0), ("high", 6))]

ROWS: list[tuple[str, int, Any, list[Any], Op, dict[str, Any]]] = [
    ("plain", 18, make("Conv", "w"), [floats("w", 6, 4, 3, 3)], Op.CONV, having(groups=1, padded=False)),
    ("pads", 18, make("Conv", "w", pads=[0, 0, 1, 0]), [floats("w", 6, 4, 3, 3)], Op.CONV, having(padded=True)),
    ("same", 18, make("Conv", "w", auto_pad="SAME_UPPER"), [floats("w", 6, 4, 3, 3)], Op.CONV, having(padded=True)),
    ("same1", 18, make("Conv", "w", auto_pad="SAME_LOWER"), [floats("w", 6, 4, 1, 1)], Op.CONV, having(padded=False)),
    ("valid", 18, make("Conv", "w", auto_pad="VALID"), [floats("w", 6, 4, 3, 3)], Op.CONV, having(padded=False)),
    ("groups", 18, make("Conv", "w", group=2), [floats("w", 6, 2, 3, 3)], Op.CONV, having(groups=2)),
    ("up", 18, make("ConvTranspose", "w"), [floats("w", 4, 6, 2, 2)], Op.CONV_TRANSPOSE, having(padded=True)),
    ("up1", 18, make("ConvTranspose", "w"), [floats("w", 4, 6, 1, 1)], Op.CONV_TRANSPOSE, having(padded=False)),
    (
        "up1-apart",
        18,
        make("ConvTranspose", "w", strides=[2, 2]),
        [floats("w", 4, 6, 1, 1)],
        Op.CONV_TRANSPOSE,
        having(padded=True),
    ),
    ("clip6", 6, make("Clip", min=0.0, max=6.0), [], Op.ACTIVATION, having(name="relu6", homogeneous=False)),
    ("clip11", 13, make("Clip", "low", "high"), LIMITS, Op.ACTIVATION, having(name="relu6", low=0.0, high=6.0)),
    ("clip-open", 13, make("Clip", "low"), LIMITS, Op.ACTIVATION, having(name="relu", homogeneous=True)),
    ("clip-none", 13, make("Clip"), [], Op.ACTIVATION, having(low=-math.inf, high=math.inf)),
    ("max", 13, make("Max", "low"), LIMITS, Op.ACTIVATION, having(name="relu", homogeneous=True)),
    ("leaky", 16, make("LeakyRelu"), [], Op.ACTIVATION, having(name="leaky_relu", alpha=0.01, homogeneous=True)),
    ("gelu", 20, make("Gelu", approximate="tanh"), [], Op.ACTIVATION, having(name="gelu_tanh", homogeneous=False)),
    ("pool", 18, make("MaxPool", kernel_shape=[2, 2]), [], Op.MAX_POOL, {}),
    (
        "mean",
        18,
        make("AveragePool", kernel_shape=[2, 2], pads=[1] * 4),
        [],
        Op.AVERAGE_POOL,
        having(counts_padding=False),
    ),
    (
        "mean-pad",
        18,
        make("AveragePool", kernel_shape=[2, 2], pads=[1] * 4, count_include_pad=1),
        [],
        Op.AVERAGE_POOL,
        having(counts_padding=True),
    ),
    ("global", 18, make("GlobalAveragePool"), [], Op.AVERAGE_POOL, having(counts_padding=False)),
    ("mean17", 17, make("ReduceMean", axes=[-1, 2]), [], Op.REDUCE_MEAN, having(axes=(2, 3), keepdims=True)),
    (
        "mean18",
        18,
        make("ReduceMean", "a", keepdims=0),
        [ints("a", 2, 3)],
        Op.REDUCE_MEAN,
        having(axes=(2, 3), keepdims=False),
    ),
    ("mean-all", 18, make("ReduceMean"), [], Op.REDUCE_MEAN, having(axes=(0, 1, 2, 3))),
    ("mean-noop", 18, make("ReduceMean", noop_with_empty_axes=1), [], Op.IDENTITY, {}),
    ("sum11", 11, make("ReduceSum", axes=[1]), [], Op.REDUCE_SUM, having(axes=(1,))),
    (
        "slice9",
        9,
        make("Slice", starts=[1], ends=[-1], axes=[-1]),
        [],
        Op.SLICE,
        having(axis=3, start=1, end=7, step=1),
    ),
    (
        "slice10",
        13,
        make("Slice", "s", "e", "a", "t"),
        [ints("s", -1), ints("e", -(1 << 40)), ints("a", 1), ints("t", -1)],
        Op.SLICE,
        having(axis=1, start=3, end=None, step=-1),
    ),
    (
        "pad10",
        10,
        make("Pad", pads=[0, 0, 1, 0, 0, 0, 0, 2]),
        [],
        Op.PAD,
        having(mode="constant", value=0.0, axes=(2, 3)),
    ),
    (
        "pad11",
        13,
        make("Pad", "p", "low", mode="reflect"),
        [ints("p", 0, 0, 1, 1, 0, 0, 1, 1), LIMITS[0]],
        Op.PAD,
        having(mode="reflect", axes=(2, 3)),
    ),
    ("pad18", 18, make("Pad", "p", "", "a"), [ints("p", 1, 1), ints("a", -1)], Op.PAD, having(axes=(3,))),
    ("pad-none", 13, make("Pad", "p"), [ints("p", *[0] * 8)], Op.IDENTITY, {}),
    ("transpose", 18, make("Transpose"), [], Op.TRANSPOSE, having(order=(3, 2, 1, 0))),
    ("concat", 18, make("Concat", "x", axis=-3), [], Op.CONCAT, having(axis=1)),
    ("shuffle", 18, make("DepthToSpace", blocksize=2, mode="CRD"), [], Op.DEPTH_TO_SPACE, having(block=2, order="CRD")),
    ("shuffle-old", 10, make("DepthToSpace", blocksize=2), [], Op.DEPTH_TO_SPACE, having(order="DCR")),
    ("upsample", 9, make("Upsample", "s"), [floats("s", 4)], Op.RESIZE, having(axes=())),
    (
        "resize",
        18,
        make("Resize", "", "s", mode="linear"),
        [numpy_helper.from_array(np.array([1, 1, 2, 2], dtype=np.float32), "s")],
        Op.RESIZE,
        having(axes=(2, 3)),
    ),
    ("sizes", 18, make("Resize", "", "", "s", axes=[2, 3]), [ints("s", 8, 16)], Op.RESIZE, having(axes=(3,))),
    ("dropout7", 9, make("Dropout", ratio=0.3), [], Op.IDENTITY, {}),
    ("dropout12", 13, make("Dropout"), [], Op.IDENTITY, {}),
    ("tile", 18, make("Tile", "r"), [ints("r", 1, 1, 2, 1)], Op.TILE, having(axes=(2,))),
    ("gather", 18, make("Gather", "i", axis=-1), [ints("i", 1)], Op.GATHER, having(axis=3)),
    ("instance", 18, make("InstanceNormalization", "w", "w"), [floats("w", 4)], Op.OTHER_NORM, {}),
    ("layer", 17, make("LayerNormalization", "w"), [floats("w", 8)], Op.LAYER_NORM, having(rms=False)),
    ("layer2", 17, make("LayerNormalization", "w", axis=2), [floats("w", 8, 8)], Op.LAYER_NORM, having(rms=False)),
    ("layer-broadcast", 17, make("LayerNormalization", "w", axis=2), [floats("w", 8)], Op.OTHER_NORM, {}),
    ("rms", 23, make("RMSNormalization", "w"), [floats("w", 8)], Op.LAYER_NORM, having(rms=True)),
    ("spatial", 7, make("BatchNormalization", *"wwww", spatial=0), [floats("w", 4, 8, 8)], Op.OTHER_NORM, {}),
    ("misfit", 15, make("BatchNormalization", *"wwwv"), [floats("w", 4), floats("v", 4, 1)], Op.OTHER_NORM, {}),
    (
        "train14",
        15,
        make("BatchNormalization", *"wwww", training_mode=1),
        [floats("w", 4)],
        Op.BATCH_NORM,
        having(training=True),
    ),
    (
        "train9",
        9,
        make("BatchNormalization", *"wwww", outputs=["y", "m", "v", "a", "b"]),
        [floats("w", 4)],
        Op.BATCH_NORM,
        having(training=True),
    ),
    (
        "test9",
        9,
        make("BatchNormalization", *"wwww"),
        [floats("w", 4)],
        Op.BATCH_NORM,
        having(training=False, eps=1e-5),
    ),
]


@pytest.mark.parametrize(
    ("opset", "node", "tensors", "op", "expected"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS]
)
def test_translation(read: Read, opset: int, node: Any, tensors: list[Any], op: Op, expected: dict[str, Any]) -> None:
    found = only(read([node], tensors, opset=opset, ir=8 if opset > 7 else 4))
    assert found.op is op
    assert {name: found.attributes[name] for name in expected} == expected


REFUSED: list[tuple[str, int, Any, list[Any]]] = [
    ("a limit that is computed", 13, [make("ReduceMax", outputs=["l"], keepdims=0), make("Clip", "l")], []),
    ("dropout that trains", 13, [make("Dropout", "", "t")], [numpy_helper.from_array(np.array(True), "t")]),
    ("dropout of old that trains", 6, [make("Dropout")], []),
    ("where the largest were", 18, [make("MaxPool", kernel_shape=[2, 2], outputs=["p", "y"])], []),
    (
        "extrapolation",
        18,
        [make("Resize", "r", "s", coordinate_transformation_mode="tf_crop_and_resize")],
        [floats("s", 4), floats("r", 8)],
    ),
    ("another domain", 18, [make("Conv", "w", domain="com.microsoft")], [floats("w", 6, 4, 3, 3)]),
    (
        "integers",
        18,
        [make("Cast", to=INT64, outputs=["i"]), h.make_node("MatMul", ["i", "w"], ["y"])],
        [numpy_helper.from_array(np.ones((8, 8), np.int64), "w")],
    ),
    ("cropping", 13, [make("Pad", "p")], [ints("p", 0, 0, -1, 0, 0, 0, 0, 0)]),
]


@pytest.mark.parametrize(("opset", "nodes", "tensors"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_is_not_known_exactly_is_other(read: Read, opset: int, nodes: list[Any], tensors: list[Any]) -> None:
    graph = read(nodes, tensors, opset=opset)
    last = next(node for node in graph.nodes if "y" in [output.name for output in node.outputs])
    assert last.op is Op.OTHER and "x" in [given.name for given in (*last.inputs, *graph.nodes[0].inputs) if given]


def test_quantised_operators_are_fixed(read: Read) -> None:
    nodes = [
        make("QuantizeLinear", "s", outputs=["q"]),
        h.make_node("ConvInteger", ["q", "w"], ["c"]),
        h.make_node("DequantizeLinear", ["c", "s"], ["y"]),
    ]
    weight = numpy_helper.from_array(np.ones((6, 4, 1, 1), np.uint8), "w")
    graph = read(nodes, [numpy_helper.from_array(np.float32(0.1), "s"), weight])
    assert [node.op for node in graph.nodes] == [Op.QUANTIZE, Op.OTHER, Op.DEQUANTIZE]
    assert graph.nodes[1].fixed is not None and graph.nodes[1].fixed.code == "quantised"


def test_a_shape_is_no_use_of_the_values_and_a_computed_one_is_known(read: Read) -> None:
    nodes = [
        make("Shape", outputs=["s"], start=1, end=2),
        h.make_node("Expand", ["zero", "s"], ["b"]),
        make("Conv", "w", "b"),
    ]
    graph = read(nodes, [numpy_helper.from_array(np.float32(0), "zero"), floats("w", 4, 4, 3, 3)])
    assert [node.op for node in graph.nodes] == [Op.SHAPE, Op.SLICE, Op.EXPAND, Op.OTHER, Op.CONV]
    bias = graph.nodes[-1].inputs[2]
    assert bias is not None and bias.shape == (4,)
    # The shape that Expand takes is a use of its own, which nothing passes.
    assert graph.nodes[3].y.name == "" and graph.nodes[3].x.name == "s"


def test_a_slice_over_several_axes_is_several_nodes_that_stay(read: Read) -> None:
    graph = read([make("Slice", "s", "e", "a")], [ints("s", 0, 1), ints("e", 2, 8), ints("a", 1, 2)])
    first, second = graph.nodes
    assert [node.attributes["axis"] for node in graph.nodes] == [1, 2]
    assert first.y is second.x and first.y.shape == ("n", 2, 8, 8) and second.y.shape == ("n", 2, 7, 8)
    assert first.fixed is not None and second.fixed is not None


def test_shapes_have_the_names_of_their_lengths(read: Read) -> None:
    graph = read([make("Conv", "w", outputs=["c"]), h.make_node("Relu", ["c"], ["y"])], [floats("w", 6, 4, 3, 3)])
    assert graph.nodes[1].y.shape == ("n", 6, 6, 6) and graph.nodes[1].y.dtype == "float32"
    odd = read([make("Relu")], inputs=[value("x", ("?", 4, "None", "h"))])
    assert odd.nodes[0].x.shape == (None, 4, None, "h")


def test_weights_are_not_read_and_not_shown_to_the_inference(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    infer = onnx.shape_inference.infer_shapes

    def watched(model: bytes, **options: Any) -> Any:
        seen.append(len(model))
        return infer(model, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", watched)
    graph = read([make("Conv", "w")], [floats("w", 500, 4, 9, 9)])
    assert graph.nodes[0].y.shape == ("n", 500, "unk__0", "unk__1") or graph.nodes[0].y.shape == ("n", 500, 0, 0)
    assert seen and seen[0] < 1000
    weight = graph.nodes[0].inputs[1]
    assert weight is not None and weight.array is not None and weight.array.nbytes == 500 * 4 * 81 * 4


def test_without_inference_the_rank_comes_from_the_weights(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: bytes, **options: Any) -> Any:
        raise RuntimeError("no such luck\nmore of it")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", broken)
    graph = read([make("Conv", "w", group=2)], [floats("w", 6, 2, 3, 3)])
    assert graph.nodes[0].y.shape == (None, 6, None, None)
    assert any("no such luck" in note and "more of it" not in note for note in graph.notes)


def test_initializers_that_are_inputs_too_are_constants_only_in_old_files(read: Read) -> None:
    inputs = [value("x"), value("w", (6, 4, 3, 3))]
    old = read([make("Conv", "w")], [floats("w", 6, 4, 3, 3)], ir=3, opset=8, inputs=inputs)
    new = read([make("Conv", "w")], [floats("w", 6, 4, 3, 3)], ir=4, opset=9, inputs=inputs)
    (kept,), (open_,) = old.nodes, new.nodes
    assert kept.inputs[1] is not None and kept.inputs[1].array is not None
    assert open_.inputs[1] is not None and open_.inputs[1].array is None
    assert "w" in new.notes[0] and not old.notes


def test_bodies_lie_flat_and_share_the_values_around_them(read: Read) -> None:
    one = h.make_graph([h.make_node("Conv", ["r", "w"], ["a"])], "one", [], [value("a", None)])
    other = h.make_graph([h.make_node("Relu", ["r"], ["b"])], "other", [], [value("b", None)])
    nodes = [make("Relu", outputs=["r"]), h.make_node("If", ["c"], ["y"], then_branch=one, else_branch=other)]
    graph = read(nodes, [floats("w", 6, 4, 3, 3)], inputs=[value("x"), value("c", (), TensorProto.BOOL)])
    first, control, *inside = graph.nodes
    conv, relu = sorted(inside, key=lambda node: node.written)
    assert control.op is Op.OTHER and conv.x is relu.x is first.y
    assert [use.node for use in first.y.uses] == inside
    assert conv.y.is_output and relu.y.is_output and conv.y.shape == ("n", 6, 6, 6)


def test_norms_have_the_names_that_inspect_gives(read: Read) -> None:
    leaves = [f"layer1.bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
    nodes = [
        make("Conv", "layer1.conv.weight", outputs=["c"]),
        h.make_node("BatchNormalization", ["c", *leaves], ["y"]),
    ]
    graph = read(nodes, [floats("layer1.conv.weight", 6, 4, 3, 3), *(floats(leaf, 6) for leaf in leaves)])
    assert [node.label for node in graph.nodes] == ["layer1.conv", "layer1.bn"]
    assert graph.nodes[1].layer is not None and graph.nodes[1].layer.name == "layer1.bn"


def test_arithmetic_of_old_opsets_is_laid_along_its_axis(read: Read) -> None:
    graph = read([make("Mul", "w", broadcast=1, axis=1)], [floats("w", 4)], opset=6, ir=4)
    laid, product = graph.nodes
    assert laid.op is Op.RESHAPE and laid.y.shape == (4, 1, 1) and product.inputs[1] is laid.y
    assert product.fixed is not None


def test_nodes_in_any_order_and_in_a_circle(read: Read) -> None:
    relu, tanh = h.make_node("Relu", ["t"], ["y"]), h.make_node("Tanh", ["x"], ["t"])
    assert [node.written for node in read([relu, tanh]).nodes] == ["Tanh", "Relu"]
    with pytest.raises(InputError, match="circle"):
        read([h.make_node("Relu", ["t"], ["y"]), h.make_node("Add", ["x", "y"], ["t"])])
    with pytest.raises(InputError, match="more than once"):
        read([make("Relu"), make("Tanh")])
