"""ONNX files run on arrays: by onnxruntime without optimisation, else by the reference evaluator; in float64 too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx import helper as h

from normdoctor.errors import CannotRunError, MisfitError
from normdoctor.models.with_onnx import OnnxModel

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(3)


def tensor(name: str, *shape: int, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(RNG.uniform(0.5, 1.5, shape)).astype(dtype), name)


def value(name: str, shape: Any, kind: int = FLOAT) -> Any:
    return h.make_tensor_value_info(name, kind, shape)


def save(
    path: Path, nodes: list[Any], tensors: list[Any], *, kind: int = FLOAT, opset: int = 17, **more: Any
) -> OnnxModel:
    inputs = more.pop("inputs", [value("x", ("n", 4, 9, 9), kind)])
    graph = h.make_graph(nodes, "g", inputs, [value("y", None, more.pop("out", kind))], tensors)
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=8, **more)
    onnx.save(made, path / "model.onnx")
    return OnnxModel(path / "model.onnx")


def conv_and_norm(dtype: Any = np.float32, **more: Any) -> tuple[list[Any], list[Any]]:
    nodes = [
        h.make_node("Conv", ["x", "w", "b"], ["c"], **more),
        h.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"]),
    ]
    return nodes, [
        tensor("w", 6, 4 // more.get("group", 1), 3, 3, dtype=dtype),
        *(tensor(n, 6, dtype=dtype) for n in "bgmv"),
    ]


def by_torch(x: np.ndarray, tensors: list[Any], **more: Any) -> np.ndarray:
    w, b, g, m, v = (torch.from_numpy(numpy_helper.to_array(t).astype(np.float64)) for t in tensors)
    y = torch.nn.functional.conv2d(torch.from_numpy(x.astype(np.float64)), w, b, **more)
    return torch.nn.functional.batch_norm(y, m, v, g, b).numpy()


CASES = [
    ({}, {}),
    ({"pads": [1, 1, 1, 1]}, {"padding": 1}),
    ({"strides": [2, 1], "dilations": [1, 2]}, {"stride": (2, 1), "dilation": (1, 2)}),
    ({"group": 2, "auto_pad": "SAME_UPPER"}, {"groups": 2, "padding": "same"}),
]


@pytest.mark.parametrize(("attributes", "arguments"), CASES)
def test_onnxruntime_and_the_twin_in_float64_agree_with_torch(
    tmp_path: Path, attributes: dict[str, Any], arguments: dict[str, Any]
) -> None:
    nodes, tensors = conv_and_norm(**attributes)
    model = save(tmp_path, nodes, tensors)
    x = RNG.standard_normal((2, 4, 9, 9)).astype(np.float32)
    expected = by_torch(x, tensors, **arguments)
    got = model.run({"x": x})["y"]
    assert got.dtype == np.float32 and np.abs(got - expected).max() < 1e-4
    assert "onnxruntime" in model.engine and "off" in model.engine
    wide = model.in_float64().run({"x": x})["y"]
    assert wide.dtype == np.float64 and np.abs(wide - expected).max() < 1e-10


def test_the_runtime_folds_nothing_by_itself(tmp_path: Path) -> None:
    """A wrong fold must show: the runtime has to compute what is written."""
    nodes, tensors = conv_and_norm()
    model = save(tmp_path, nodes, tensors)
    import onnxruntime

    options = model._session.get_session_options()
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


@pytest.mark.parametrize(
    ("kind", "opset"), [(TensorProto.DOUBLE, 11), (TensorProto.DOUBLE, 17), (TensorProto.BFLOAT16, 22)]
)
def test_types_without_a_kernel_go_to_the_reference_evaluator(tmp_path: Path, kind: int, opset: int) -> None:
    nodes, tensors = conv_and_norm(h.tensor_dtype_to_np_dtype(kind))
    model = save(tmp_path, nodes, tensors, kind=kind, opset=opset)
    x = RNG.standard_normal((2, 4, 9, 9)).astype(np.float32)
    got = model.run({"x": x})["y"]
    assert "reference evaluator" in model.engine
    narrow = x if kind == TensorProto.DOUBLE else torch.from_numpy(x).bfloat16().float().numpy()
    expected = by_torch(narrow, tensors)
    limit = 1e-10 if kind == TensorProto.DOUBLE else 0.05 * np.abs(expected).max()
    assert np.abs(got - expected).max() < limit
    assert got.dtype == (np.float64 if kind == TensorProto.DOUBLE else np.float32)


def test_what_nothing_can_run_says_why(tmp_path: Path) -> None:
    model = save(tmp_path, [h.make_node("Mystery", ["x"], ["y"], domain="theirs")], [])
    with pytest.raises(CannotRunError, match="Mystery"):
        model.run({"x": np.zeros((1, 4, 9, 9), np.float32)})
    with pytest.raises(CannotRunError):
        model.in_float64().run({"x": np.zeros((1, 4, 9, 9), np.float32)})


def test_inputs_that_do_not_fit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nodes, tensors = conv_and_norm()
    model = save(tmp_path, nodes, tensors)
    for wrong in ({}, {"x": np.zeros((1, 5, 9, 9), np.float32)}, {"x": np.zeros((1, 4, 9, 9))}, {"z": np.zeros(1)}):
        with pytest.raises(MisfitError):
            model.run(wrong)
    assert capfd.readouterr().out == ""


def test_a_damaged_file_is_quietly_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08:\x05\x0a\x03\x0a\x01\xff")
    with pytest.raises(CannotRunError):
        OnnxModel(tmp_path / "model.onnx").run({})
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_every_float_becomes_a_double_in_the_twin(tmp_path: Path) -> None:
    """Constants of every spelling, casts, functions and bodies: one float32 left would show as its rounding."""
    third = np.float32(1 / 3)
    inner = [
        h.make_node("Constant", [], ["k"], value_float=0.1),
        h.make_node("Constant", [], ["ks"], value_floats=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        h.make_node("ConstantOfShape", ["one"], ["z"]),
        h.make_node("Cast", ["x"], ["d"], to=TensorProto.FLOAT16),
        h.make_node("Cast", ["d"], ["e"], to=FLOAT),
        h.make_node("Sum", ["k", "ks", "z", "e"], ["s"]),
        h.make_node("Add", ["s", "third"], ["a"]),
    ]
    graph = h.make_graph(
        [*inner, h.make_node("Same", ["a"], ["y"], domain="mine")],
        "g",
        [value("x", (2, 9))],
        [value("y", (2, 9))],
        [numpy_helper.from_array(third, "third"), numpy_helper.from_array(np.array([1]), "one")],
    )
    function = h.make_function(
        "mine",
        "Same",
        ["a"],
        ["r"],
        [h.make_node("Constant", [], ["q"], value_float=1.0), h.make_node("Mul", ["a", "q"], ["r"])],
        [h.make_opsetid("", 17)],
    )
    imports = [h.make_opsetid("", 17), h.make_opsetid("mine", 1)]
    onnx.save(h.make_model(graph, opset_imports=imports, ir_version=8, functions=[function]), tmp_path / "m.onnx")
    x = RNG.standard_normal((2, 9)).astype(np.float32)
    got = OnnxModel(tmp_path / "m.onnx").in_float64().run({"x": x})["y"]
    floats = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], dtype=np.float32).astype(np.float64)
    expected = np.float64(np.float32(0.1)) + floats + x.astype(np.float64) + np.float64(third)
    assert got.dtype == np.float64 and np.abs(got - expected).max() < 1e-15


def test_quantised_and_huge_models_have_no_twin(tmp_path: Path) -> None:
    nodes = [h.make_node("QuantizeLinear", ["x", "s"], ["q"]), h.make_node("DequantizeLinear", ["q", "s"], ["y"])]
    model = save(tmp_path, nodes, [numpy_helper.from_array(np.float32(0.1), "s")])
    with pytest.raises(CannotRunError, match="integers"):
        model.in_float64()
    with pytest.raises(CannotRunError, match="too large"):
        OnnxModel(model.path, size=1 << 40).in_float64()


def test_inputs_are_described_without_those_that_only_override(tmp_path: Path) -> None:
    nodes, tensors = conv_and_norm()
    half, shape = TensorProto.BFLOAT16, ("batch", None, 4)
    inputs = [
        value("x", ("n", 4, 9, 9)),
        value("w", (6, 4, 3, 3)),
        value("h", shape, half),
        value("i", None, TensorProto.INT64),
    ]
    model = save(tmp_path, nodes, tensors, inputs=inputs)
    assert [tuple(entry) for entry in model.inputs()] == [
        ("x", ("n", 4, 9, 9), "float32"),
        ("h", ("batch", None, 4), "bfloat16"),
        ("i", None, "int64"),
    ]


def test_external_data_is_found_beside_the_model(tmp_path: Path) -> None:
    nodes, tensors = conv_and_norm()
    plain = save(tmp_path, nodes, tensors)
    made = onnx.load(plain.path)
    onnx.save(made, tmp_path / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    x = RNG.standard_normal((1, 4, 9, 9)).astype(np.float32)
    external = OnnxModel(tmp_path / "e.onnx")
    assert (external.run({"x": x})["y"] == plain.run({"x": x})["y"]).all()
    assert np.abs(external.in_float64().run({"x": x})["y"] - by_torch(x, tensors)).max() < 1e-10
