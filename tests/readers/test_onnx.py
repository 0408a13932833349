"""ONNX files: what is found in them, under which name and with which values; and what hostile ones achieve."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx import helper as h

from normdoctor.errors import InputError
from normdoctor.layers import Checkpoint, Container, NormKind, NormLayer
from normdoctor.readers.arrays import ITEM_SIZES, Source
from normdoctor.readers.onnx import is_onnx, read
from normdoctor.readers.onnx_arrays import DTYPES
from normdoctor.readers.onnx_wire import bytes_field, varint, varint_field

FLOAT = TensorProto.FLOAT
VECTORS = ("weight", "bias", "running_mean", "running_var")


def vector(seed: int, count: int = 6, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, count).astype(dtype)


def tensor(name: str, values: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def value(name: str, shape: Any = ("n", 6, "h", "w"), kind: int = FLOAT) -> Any:
    return h.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[Any],
    tensors: list[Any] = (),  # type: ignore[assignment]
    *,
    opset: int = 17,
    inputs: Any = None,
    outputs: tuple[str, ...] = ("y",),
    functions: list[Any] = (),  # type: ignore[assignment]
    check: bool = True,
    infos: list[Any] = (),  # type: ignore[assignment]
    **others: Any,
) -> onnx.ModelProto:
    graph = h.make_graph(
        nodes,
        "g",
        [value("x")] if inputs is None else inputs,
        [value(name, None) for name in outputs],
        list(tensors),
        value_info=list(infos),
    )
    domains = {node.domain for node in nodes if node.domain} | {function.domain for function in functions}
    opsets = [h.make_opsetid("", opset), *(h.make_opsetid(domain, 1) for domain in sorted(domains))]
    others.setdefault("ir_version", 8 if opset < 21 else 10)
    made = h.make_model(graph, opset_imports=opsets, functions=list(functions), **others)
    if check:
        for output in made.graph.output:  # the checker wants a shape
            output.type.tensor_type.shape.SetInParent()
        onnx.checker.check_model(made)
    return made


def batch_norm(
    prefix: str = "layer1.0.bn1",
    x: str = "x",
    y: str = "y",
    leaves: tuple[str, ...] = VECTORS,
    separator: str = ".",
    **attributes: Any,
) -> tuple[Any, list[TensorProto]]:
    names = [f"{prefix}{separator}{leaf}" for leaf in leaves]
    node = h.make_node("BatchNormalization", [x, *names], [y], name=f"/{prefix}/BatchNormalization", **attributes)
    return node, [tensor(name, vector(seed)) for seed, name in enumerate(names)]


@pytest.fixture
def open_model(tmp_path: Path) -> Iterator[Callable[..., Checkpoint]]:
    opened: list[Checkpoint] = []

    def open_(made: onnx.ModelProto | bytes, name: str = "model.onnx", **save: Any) -> Checkpoint:
        path = tmp_path / name
        if isinstance(made, bytes):
            path.write_bytes(made)
        else:
            onnx.save(made, path, **save)
        opened.append(read_path(path))
        return opened[-1]

    yield open_
    for checkpoint in opened:
        checkpoint.close()


def read_path(path: Path) -> Checkpoint:
    source = Source(path)
    try:
        assert is_onnx(source)
        return read(source)
    except BaseException:
        source.close()
        raise


def only(checkpoint: Checkpoint) -> NormLayer:
    (layer,) = checkpoint.layers
    return layer


def values_of(layer: NormLayer) -> list[np.ndarray | None]:
    return [None if (ref := getattr(layer, name)) is None else ref.numpy() for name in VECTORS]


def assert_vectors(layer: NormLayer, *seeds: int | None) -> None:
    for name, got, seed in zip(VECTORS, values_of(layer), seeds, strict=True):
        if seed is None:
            assert got is None, name
        else:
            assert got is not None, name
            np.testing.assert_array_equal(got.reshape(-1), vector(seed), err_msg=name)


# one BatchNormalization, every way to write it


def test_a_batch_norm_and_its_file(open_model: Callable[..., Checkpoint]) -> None:
    node, tensors = batch_norm(epsilon=1e-3, momentum=0.99)
    checkpoint = open_model(model([node], tensors))
    layer = only(checkpoint)
    assert (checkpoint.format, checkpoint.container) == ("ONNX opset 17", Container.ONNX)
    assert (layer.name, layer.path, layer.origin) == ("layer1.0.bn1", "layer1.0.bn1", "BatchNormalization")
    assert (layer.kind, layer.channels, layer.eps, layer.momentum) == (NormKind.BATCH, 6, 1e-3, 0.01)
    assert (layer.training, layer.affine, layer.track_running_stats) == (False, True, True)
    assert layer.num_batches_tracked is None
    assert not checkpoint.notes
    assert_vectors(layer, 0, 1, 2, 3)
    names = {reference.name for reference in checkpoint.list_references()}
    assert names == {f"layer1.0.bn1.{leaf}" for leaf in VECTORS}


def test_defaults_of_the_specification(open_model: Callable[..., Checkpoint]) -> None:
    layer = only(open_model(model(*_one(batch_norm()))))
    assert (layer.eps, layer.momentum, layer.training) == (1e-5, 0.1, False)


def _one(pair: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
    return [pair[0]], pair[1]


@pytest.mark.parametrize(
    ("opset", "attributes", "outputs", "training"),
    [
        (6, {"is_test": 1}, 1, False),
        (6, {}, 1, False),
        (6, {}, 5, True),
        (6, {"is_test": 1}, 5, False),
        (7, {}, 1, False),
        (9, {}, 1, False),
        (9, {}, 5, True),
        (13, {}, 5, True),
        (14, {}, 1, False),
        (14, {"training_mode": 1}, 3, True),
        (15, {"training_mode": 1}, 1, True),
        (21, {"training_mode": 0}, 1, False),
    ],
)
def test_training_by_opset(
    open_model: Callable[..., Checkpoint], opset: int, attributes: dict[str, int], outputs: int, training: bool
) -> None:
    node, tensors = batch_norm(**attributes)
    node.output.extend(f"more{i}" for i in range(outputs - 1))
    inputs = [value("x")]
    if opset < 9:
        inputs += [value(t.name, list(t.dims)) for t in tensors]
    ir_version = 3 if opset < 9 else 8 if opset < 21 else 10
    made = model([node], tensors, opset=opset, inputs=inputs, ir_version=ir_version)
    assert only(open_model(made)).training is training


def test_opset_6_with_consumed_inputs_and_parameters_per_activation(open_model: Callable[..., Checkpoint]) -> None:
    node, tensors = batch_norm(spatial=0, is_test=1)
    node.attribute.append(h.make_attribute("consumed_inputs", [0, 0, 0, 1, 1]))
    for made in tensors:
        del made.dims[:]
        made.dims.extend([3, 2])
    layer = only(open_model(model([node], tensors, opset=6, check=False)))
    assert layer.channels == 6
    assert_vectors(layer, 0, 1, 2, 3)


@pytest.mark.parametrize("dtype", sorted(set(DTYPES.values()) & set(ITEM_SIZES)))
@pytest.mark.parametrize("home", ["raw", "typed", "external"])
def test_every_element_type(tmp_path: Path, open_model: Callable[..., Checkpoint], dtype: str, home: str) -> None:
    if dtype.startswith("complex"):
        pytest.skip("complex numbers are never a norm's parameters")
    number = next(number for number, name in DTYPES.items() if name == dtype)
    native = {"float8_e5m2": ml_dtypes.float8_e5m2, "bfloat16": ml_dtypes.bfloat16}.get(dtype)
    if native is None:
        native = getattr(ml_dtypes, dtype) if dtype.startswith("float8") else np.dtype(dtype)
    wanted = np.array([1, 0, 2, 1, 4, 1]).astype(native)
    if dtype == "float8_e8m0fnu":
        wanted = np.array([1, 0.5, 2, 1, 4, 1]).astype(native)
    raw = wanted.tobytes()
    made = TensorProto(name="ln.weight", data_type=number, dims=[6])
    if home == "raw":
        made.raw_data = raw
    elif home == "external":
        (tmp_path / "w.bin").write_bytes(b"\xff" * 24 + raw)
        made.data_location = TensorProto.EXTERNAL
        for key, text in {"location": "w.bin", "offset": "24", "length": str(len(raw))}.items():
            made.external_data.add(key=key, value=text)
    elif dtype in ("float32", "float64"):
        getattr(made, "float_data" if dtype == "float32" else "double_data").extend(wanted.tolist())
    elif dtype in ("int64", "uint64", "uint32"):
        getattr(made, "int64_data" if dtype == "int64" else "uint64_data").extend(wanted.tolist())
    else:
        bits = {1: np.uint8, 2: np.uint16}.get(ITEM_SIZES[dtype])
        whole = dtype.startswith(("int", "uint", "bool"))
        numbers = wanted.astype(np.int32) if whole or bits is None else wanted.view(bits)
        made.int32_data.extend(int(number) for number in numbers)
    node = h.make_node("LayerNormalization", ["x", "ln.weight"], ["y"])
    layer = only(open_model(model([node], [made], check=False)))
    assert layer.weight is not None
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.nbytes) == (dtype, (6,), len(raw))
    np.testing.assert_array_equal(layer.weight.numpy().astype(np.float64), wanted.astype(np.float64))


def test_parameters_from_everything_that_is_constant(open_model: Callable[..., Checkpoint]) -> None:
    shape = tensor("shape", [6], np.int64)
    nodes = [
        h.make_node("Constant", [], ["bn.weight"], value=tensor("", vector(0))),
        h.make_node("ConstantOfShape", ["shape"], ["filled"], value=tensor("", [0.25])),
        h.make_node("Identity", ["filled"], ["bn.bias"]),
        h.make_node("Constant", [], ["c2"], value_floats=vector(2).tolist()),
        h.make_node("Cast", ["c2"], ["double"], to=TensorProto.DOUBLE),
        h.make_node("Cast", ["double"], ["single"], to=FLOAT),
        h.make_node("Unsqueeze", ["single", "axis"], ["column"]),
        h.make_node("Transpose", ["column"], ["row"], perm=[1, 0]),
        h.make_node("Reshape", ["row", "minus"], ["bn.running_mean"]),
        h.make_node("Mul", ["standard deviation", "standard deviation"], ["square"]),
        h.make_node("Identity", ["square"], ["bn.running_var"]),
        h.make_node("BatchNormalization", ["x", *(f"bn.{leaf}" for leaf in VECTORS)], ["y"]),
    ]
    tensors = [
        shape,
        tensor("axis", [1], np.int64),
        tensor("minus", [-1], np.int64),
        tensor("standard deviation", vector(3)),
    ]
    layer = only(open_model(model(nodes, tensors)))
    weight, bias, mean, var = values_of(layer)
    assert layer.name == "bn"
    np.testing.assert_array_equal(weight, vector(0))
    np.testing.assert_array_equal(bias, np.full(6, 0.25, np.float32))
    np.testing.assert_array_equal(mean, vector(2))
    np.testing.assert_allclose(var, vector(3).astype(np.float64) ** 2, rtol=1e-7)
    assert layer.lengths == dict.fromkeys(VECTORS, 6)


def test_bfloat16_by_cast_and_dequantized_weights(open_model: Callable[..., Checkpoint]) -> None:
    nodes = [
        h.make_node("Cast", ["half"], ["ln.weight"], to=TensorProto.BFLOAT16),
        h.make_node("DequantizeLinear", ["ln.bias_quantized", "scale", "zero"], ["bias"]),
        h.make_node("LayerNormalization", ["x", "ln.weight", "bias"], ["y"]),
    ]
    tensors = [
        tensor("half", vector(0)),
        tensor("ln.bias_quantized", [0, 1, 2, 3, 4, 200], np.uint8),
        tensor("scale", 0.5),
        tensor("zero", 2, np.uint8),
    ]
    layer = only(open_model(model(nodes, tensors, check=False)))
    assert layer.weight is not None and layer.bias is not None
    assert layer.weight.dtype == "bfloat16"
    expected = vector(0).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(layer.weight.numpy(), expected)
    np.testing.assert_array_equal(layer.bias.numpy(), [-1, -0.5, 0, 0.5, 1, 99])
    assert layer.name == "ln"


def test_parameters_that_are_inputs_stay_none_and_are_noted(open_model: Callable[..., Checkpoint]) -> None:
    node, tensors = batch_norm()
    inputs = [value("x"), value(tensors[0].name, [6]), value(tensors[2].name, [6])]
    checkpoint = open_model(model([node], [tensors[0], tensors[1], tensors[3]], inputs=inputs))
    layer = only(checkpoint)
    assert layer.name == "layer1.0.bn1"
    assert_vectors(layer, 0, 1, None, 3)  # an input with an initializer is a parameter
    assert layer.channels == 6
    assert checkpoint.notes == (
        "parameters of 1 layers are graph inputs or computed, so not in the file: layer1.0.bn1",
    )


# names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bn0_gamma", "bn0_beta", "bn0_moving_mean", "bn0_moving_var"], "bn0"),
        (["m/bn/gamma:0", "m/bn/beta:0", "m/bn/moving_mean:0", "m/bn/moving_variance:0"], "m/bn"),
        (
            [f"m/bn/{part}" for part in ("ReadVariableOp:0", "ReadVariableOp_1:0")]
            + [f"m/bn/FusedBatchNormV3/{part}" for part in ("ReadVariableOp:0", "ReadVariableOp_1:0")],
            "m/bn",
        ),
        (["batch_norm_0.w_0", "batch_norm_0.b_0", "batch_norm_0.w_1", "batch_norm_0.w_2"], "batch_norm_0"),
        (["gpu_0/c_bn_s_0", "gpu_0/c_bn_b_0", "gpu_0/c_bn_rm_0", "gpu_0/c_bn_riv_0"], "gpu_0/c_bn"),
        (["c1_bn_scale", "c1_bn_offset", "c1_bn_mean", "c1_bn_variance"], "c1_bn"),
        (["a.norm.sc", "a.norm.sh", "a.norm.me", "a.norm.va"], "a.norm"),
        (["onnx::Mul_1", "onnx::Mul_2", "bn7.running_mean", "bn7.running_var"], "bn7"),
        (["onnx::BN_1", "onnx::BN_2", "onnx::BN_3", "onnx::BN_4"], "the node"),
        (["12", "13", "14", "15"], "the node"),
        (["conv2d_12", "conv2d_13", "conv2d_14", "conv2d_15"], "the node"),
        (["weight", "bias", "running_mean", "running_var"], "the node"),
        (["module.bn.weight", "module.bn.bias", "module.bn.running_mean", "module.bn.running_var"], "module.bn"),
    ],
)
def test_names(open_model: Callable[..., Checkpoint], names: list[str], expected: str) -> None:
    node = h.make_node("BatchNormalization", ["x", *names], ["y"], name="the node")
    layer = only(open_model(model([node], [tensor(name, vector(i)) for i, name in enumerate(names)])))
    assert layer.name == expected
    assert layer.path == expected.removeprefix("module.")


def test_a_nameless_node_is_called_after_its_output_and_names_are_unique(
    open_model: Callable[..., Checkpoint],
) -> None:
    names = ["1", "2", "3", "4"]
    nodes = [
        h.make_node("BatchNormalization", ["x", *names], ["first"]),
        h.make_node("BatchNormalization", ["first", *names], ["second"], name="same"),
        h.make_node("BatchNormalization", ["second", *names], ["y"], name="same"),
    ]
    checkpoint = open_model(model(nodes, [tensor(name, vector(i)) for i, name in enumerate(names)]))
    assert [layer.name for layer in checkpoint.layers] == ["first", "same", "same#2"]


def test_equal_initializers_shared_through_identity_keep_layers_apart(
    open_model: Callable[..., Checkpoint],
) -> None:
    first, tensors = batch_norm("bn1", y="h")
    second, _ = batch_norm("bn2", x="h")
    sharing = [h.make_node("Identity", [f"bn1.{leaf}"], [f"bn2.{leaf}"]) for leaf in VECTORS]
    checkpoint = open_model(model([*sharing, first, second], tensors))
    assert [(layer.name, layer.aliases) for layer in checkpoint.layers] == [("bn1", ()), ("bn2", ())]
    assert_vectors(checkpoint.layers[1], 0, 1, 2, 3)


def test_some_initializers_shared_directly_do_not_decide_the_name(open_model: Callable[..., Checkpoint]) -> None:
    first, tensors = batch_norm("a.bn1", y="h")
    second = h.make_node(
        "BatchNormalization", ["h", "a.bn2.weight", "a.bn1.bias", "a.bn1.running_mean", "a.bn1.running_var"], ["y"]
    )
    checkpoint = open_model(model([first, second], [*tensors, tensor("a.bn2.weight", vector(7))]))
    assert [layer.name for layer in checkpoint.layers] == ["a.bn1", "a.bn2"]


def test_module_paths_left_by_torch_tell_layers_with_merged_tensors_apart(
    open_model: Callable[..., Checkpoint],
) -> None:
    nodes = []
    for index, path in enumerate(["blocks.0.ln", "blocks.1.ln"]):
        node = h.make_node("LayerNormalization", [f"h{index}", "blocks.0.ln.weight"], [f"h{index + 1}"])
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', 'blocks', '{path}', 'layer_norm']")
        nodes.append(node)
    made = model(
        nodes,
        [tensor("blocks.0.ln.weight", vector(0))],
        inputs=[value("h0")],
        outputs=("h2",),
        check=False,
    )
    layers = open_model(made).layers
    assert [(layer.name, layer.aliases) for layer in layers] == [("blocks.0.ln", ()), ("blocks.1.ln", ())]


def test_one_module_called_twice_is_one_layer(open_model: Callable[..., Checkpoint]) -> None:
    first, tensors = batch_norm("bn", y="h")
    second, _ = batch_norm("bn", x="h")
    second.name = "again"
    layer = only(open_model(model([first, second], tensors)))
    assert (layer.name, layer.aliases) == ("bn", ("again",))


# the other operators


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "opset", "kind", "eps"),
    [
        ("InstanceNormalization", ["x", "n.weight", "n.bias"], {"epsilon": 1e-3}, 6, NormKind.INSTANCE, 1e-3),
        ("InstanceNormalization", ["x", "n.weight", "n.bias"], {}, 22, NormKind.INSTANCE, 1e-5),
        ("LayerNormalization", ["x", "n.weight", "n.bias"], {"axis": -1}, 17, NormKind.LAYER, 1e-5),
        ("LayerNormalization", ["x", "n.weight"], {"epsilon": 1e-6}, 17, NormKind.LAYER, 1e-6),
        ("GroupNormalization", ["x", "n.weight", "n.bias"], {"num_groups": 6}, 18, NormKind.GROUP, 1e-5),
        ("GroupNormalization", ["x", "n.weight", "n.bias"], {"num_groups": 3}, 21, NormKind.GROUP, 1e-5),
        ("RMSNormalization", ["x", "n.weight"], {}, 23, NormKind.RMS, 1e-5),
        ("SimplifiedLayerNormalization", ["x", "n.weight"], {"epsilon": 1e-6}, 17, NormKind.RMS, 1e-6),
        ("com.microsoft.SkipLayerNormalization", ["x", "x", "n.weight", "n.bias"], {}, 17, NormKind.LAYER, 1e-12),
        ("com.microsoft.SkipLayerNormalization", ["x", "x", "n.weight", "", "b"], {}, 17, NormKind.LAYER, 1e-12),
        (
            "com.microsoft.SkipSimplifiedLayerNormalization",
            ["x", "x", "n.weight"],
            {"epsilon": 1e-5},
            17,
            NormKind.RMS,
            1e-5,
        ),
        (
            "com.microsoft.EmbedLayerNormalization",
            ["i", "", "w", "p", "", "n.weight", "n.bias"],
            {},
            17,
            NormKind.LAYER,
            1e-12,
        ),
        ("com.microsoft.GroupNorm", ["x", "n.weight", "n.bias"], {"groups": 2}, 17, NormKind.GROUP, 1e-5),
    ],
)
def test_operators(
    open_model: Callable[..., Checkpoint],
    operator: str,
    inputs: list[str],
    attributes: dict[str, Any],
    opset: int,
    kind: NormKind,
    eps: float,
) -> None:
    domain, _, name = operator.rpartition(".")
    node = h.make_node(name, inputs, ["y"], domain=domain, **attributes)
    tensors = [tensor("n.weight", vector(0)), tensor("n.bias", vector(1)), tensor("b", vector(9))]
    layer = only(open_model(model([node], tensors, opset=opset, check=False)))
    assert (layer.name, layer.kind, layer.origin, layer.eps) == ("n", kind, operator, eps)
    assert layer.channels == 6
    assert layer.groups == attributes.get("num_groups", attributes.get("groups"))
    assert (layer.momentum, layer.training, layer.track_running_stats) == (None, None, None)
    assert_vectors(layer, 0, 1 if "n.bias" in inputs else None, None, None)


def test_layer_norm_over_two_axes(open_model: Callable[..., Checkpoint]) -> None:
    node = h.make_node("LayerNormalization", ["x", "n.weight", "n.bias"], ["y"], axis=-2)
    tensors = [tensor("n.weight", vector(0).reshape(1, 6)), tensor("n.bias", vector(1).reshape(1, 6))]
    layer = only(open_model(model([node], tensors)))
    assert layer.weight is not None and layer.weight.shape == (1, 6)
    assert layer.channels == 6


def test_an_operator_of_a_stranger_is_no_norm(open_model: Callable[..., Checkpoint]) -> None:
    node = h.make_node("LayerNormalization", ["x", "n.weight"], ["y"], domain="my.ops")
    assert not open_model(model([node], [tensor("n.weight", vector(0))])).layers


def test_fillers_for_parameters_that_the_module_does_not_have(open_model: Callable[..., Checkpoint]) -> None:
    norm = h.make_node("BatchNormalization", ["x", "val_3", "val_4", "bn.running_mean", "bn.running_var"], ["h"])
    nodes = [
        h.make_node("Constant", [], ["val_1"], value_floats=[1.0]),
        h.make_node("Shape", ["x"], ["n"], start=1, end=2),
        h.make_node("Expand", ["val_1", "n"], ["val_3"]),
        h.make_node("Constant", [], ["val_4"], value=tensor("", np.zeros(6))),
        norm,
        h.make_node("LayerNormalization", ["h", "val_3"], ["y"], name="ln"),
    ]
    tensors = [tensor("bn.running_mean", vector(2)), tensor("bn.running_var", vector(3))]
    batch, layer = open_model(model(nodes, tensors, inputs=[value("x", ["n", 6])])).layers
    assert (batch.name, batch.affine, batch.channels) == ("bn", False, 6)
    assert_vectors(batch, None, None, 2, 3)
    assert (layer.name, layer.affine, layer.weight, layer.channels) == ("ln", False, None, 6)


def test_caffes_pair_of_batch_norm_and_scale_is_one_layer(open_model: Callable[..., Checkpoint]) -> None:
    node, tensors = batch_norm("conv1/bn", y="h", separator="_")
    tensors[0], tensors[1] = tensor(tensors[0].name, np.ones(6)), tensor(tensors[1].name, np.zeros(6))
    nodes = [
        node,
        h.make_node("Mul", ["h", "conv1/scale_w"], ["s"]),
        h.make_node("Add", ["s", "conv1/scale_b"], ["y"]),
    ]
    tensors += [
        tensor("conv1/scale_w", vector(4).reshape(6, 1, 1)),
        tensor("conv1/scale_b", vector(5).reshape(6, 1, 1)),
    ]
    layer = only(open_model(model(nodes, tensors)))
    assert (layer.name, layer.kind, layer.origin) == ("conv1/bn", NormKind.BATCH, "BatchNormalization")
    assert_vectors(layer, 4, 5, 2, 3)


# bodies and functions


def _body(name: str, nodes: list[Any], tensors: list[Any] = ()) -> Any:  # type: ignore[assignment]
    return h.make_graph(nodes, name, [], [value("out", ["n", 6, "h", "w"])], list(tensors))


def test_bodies_see_the_tensors_around_them(open_model: Callable[..., Checkpoint]) -> None:
    inner, inner_tensors = batch_norm("inner", y="out")
    outer, outer_tensors = batch_norm("outer", y="out")
    loop_norm, loop_tensors = batch_norm("loop", x="carried", y="next")
    loop_body = h.make_graph(
        [h.make_node("Identity", ["going"], ["still"]), loop_norm],
        "loop body",
        [value("i", [], TensorProto.INT64), value("going", [], TensorProto.BOOL), value("carried")],
        [value("still", [], TensorProto.BOOL), value("next", ["n", 6, "h", "w"])],
    )
    nodes = [
        h.make_node(
            "If",
            ["going_on"],
            ["h"],
            then_branch=_body("then", [inner], inner_tensors),
            else_branch=_body("else", [outer]),
        ),
        h.make_node("Loop", ["trips", "going_on", "h"], ["y"], body=loop_body),
    ]
    tensors = [*outer_tensors, *loop_tensors, tensor("trips", 2, np.int64)]
    inputs = [value("x"), value("going_on", [], TensorProto.BOOL)]
    checkpoint = open_model(model(nodes, tensors, inputs=inputs))
    # onnx.helper sorts attributes, so the other branch stands first in the file
    assert [layer.name for layer in checkpoint.layers] == ["outer", "inner", "loop"]
    for layer in checkpoint.layers:
        assert_vectors(layer, 0, 1, 2, 3)


def _function(name: str, nodes: list[Any], inputs: list[str], **others: Any) -> Any:
    return h.make_function("local", name, inputs, ["out"], nodes, [h.make_opsetid("", 17)], **others)


def test_a_function_is_read_at_each_of_its_calls(open_model: Callable[..., Checkpoint]) -> None:
    norm = h.make_node("LayerNormalization", ["a", "w", "b"], ["out"], name="inside")
    norm.attribute.append(onnx.AttributeProto(name="epsilon", type=onnx.AttributeProto.FLOAT, ref_attr_name="eps"))
    function = _function("Norm", [norm], ["a", "w", "b"], attributes=["eps"])
    calls = [("x", "ln1", "h", 1e-3), ("h", "ln2", "g", 1e-4), ("g", "ln1", "y", 1e-3)]
    nodes = [
        h.make_node("Norm", [x, f"{n}.weight", f"{n}.bias"], [y], name=f"call {y}", domain="local", eps=eps)
        for x, n, y, eps in calls
    ]
    tensors = [tensor(f"ln{i}.{leaf}", vector(10 * i + j)) for i in (1, 2) for j, leaf in enumerate(VECTORS[:2])]
    first, second = open_model(model(nodes, tensors, functions=[function])).layers
    assert (first.name, first.eps, first.aliases) == ("ln1", 1e-3, ("call y/inside",))
    assert (second.name, second.eps, second.aliases) == ("ln2", 1e-4, ())
    assert_vectors(first, 10, 11, None, None)
    assert_vectors(second, 20, 21, None, None)


def test_default_attributes_of_functions(open_model: Callable[..., Checkpoint]) -> None:
    norm = h.make_node("LayerNormalization", ["a", "w"], ["out"])
    norm.attribute.append(onnx.AttributeProto(name="epsilon", type=onnx.AttributeProto.FLOAT, ref_attr_name="eps"))
    function = _function("Norm", [norm], ["a", "w"], attribute_protos=[h.make_attribute("eps", 0.125)])
    node = h.make_node("Norm", ["x", "ln.weight"], ["y"], domain="local")
    layer = only(open_model(model([node], [tensor("ln.weight", vector(0))], functions=[function], ir_version=9)))
    assert layer.eps == 0.125


def test_a_norm_split_over_functions_is_seen_through(open_model: Callable[..., Checkpoint]) -> None:
    square = _function("Square", [h.make_node("Mul", ["a", "a"], ["out"])], ["a"])
    nodes = [
        h.make_node("Square", ["x"], ["q"], domain="local"),
        h.make_node("ReduceMean", ["q"], ["m"], axes=[-1]),
        h.make_node("Add", ["m", "eps"], ["e"]),
        h.make_node("Sqrt", ["e"], ["s"]),
        h.make_node("Div", ["x", "s"], ["d"]),
        h.make_node("Mul", ["d", "rms.weight"], ["y"]),
    ]
    tensors = [tensor("eps", 1e-6), tensor("rms.weight", vector(0))]
    layer = only(open_model(model(nodes, tensors, functions=[square])))
    assert (layer.name, layer.kind, layer.eps) == ("rms", NormKind.RMS, 1e-6)


# written out


def written_out(
    square: str = "Pow",
    divide: str = "Div",
    centred: bool = True,
    cast: bool = False,
    bias: bool = True,
    axes: list[int] | None = None,
    gain_shape: tuple[int, ...] = (6,),
) -> tuple[list[Any], list[TensorProto]]:
    """x → (x - mean) / sqrt(var + eps) * n.weight + n.bias, in the spellings of several exporters."""
    axes = [-1] if axes is None else axes
    node = h.make_node
    nodes = [node("Cast", ["x"], ["h"], to=FLOAT)] if cast else [node("Identity", ["x"], ["h"])]
    base = "h"
    if centred:
        nodes += [node("ReduceMean", ["h"], ["mean"], axes=axes), node("Sub", ["h", "mean"], ["d"])]
        base = "d"
    if square == "Sub twice":
        nodes += [node("Sub", ["h", "mean"], ["d2"]), node("Pow", ["d2", "two"], ["q"])]
    else:
        nodes.append(node("Pow", [base, "two"], ["q"]) if square == "Pow" else node("Mul", [base, base], ["q"]))
    nodes += [node("ReduceMean", ["q"], ["var"], axes=axes), node("Add", ["eps", "var"], ["ve"])]
    if divide == "Pow":
        nodes += [node("Pow", ["ve", "minus_half"], ["r"]), node("Mul", [base, "r"], ["z"])]
    else:
        nodes.append(node("Sqrt", ["ve"], ["s"]))
        if divide == "Div":
            nodes.append(node("Div", [base, "s"], ["z"]))
        elif divide == "Reciprocal":
            nodes += [node("Reciprocal", ["s"], ["r"]), node("Mul", ["r", base], ["z"])]
        elif divide == "1 / s":
            nodes += [node("Div", ["one", "s"], ["r"]), node("Mul", [base, "r"], ["z"])]
        elif divide == "gain first":
            nodes += [
                node("Reciprocal", ["s"], ["r"]),
                node("Mul", ["r", "n.weight"], ["g"]),
                node("Mul", [base, "g"], ["m"]),
            ]
        elif divide == "TensorFlow":
            nodes += [
                node("Reciprocal", ["s"], ["r"]),
                node("Mul", ["r", "n.weight"], ["g"]),
                node("Mul", ["h", "g"], ["a"]),
                node("Mul", ["mean", "g"], ["b"]),
                node("Sub", ["n.bias", "b"], ["c"]),
                node("Add", ["a", "c"], ["out"]),
            ]
    flow = "out" if divide == "TensorFlow" else "m"
    if divide not in ("gain first", "TensorFlow"):
        if cast:
            nodes.append(node("Cast", ["z"], ["z2"], to=FLOAT))
        nodes.append(node("Mul", ["n.weight", "z2" if cast else "z"], ["m"]))
    if bias and divide != "TensorFlow":
        nodes.append(node("Add", ["m", "n.bias"], ["out"]))
        flow = "out"
    nodes.append(node("Relu", [flow], ["y"]))
    tensors = [
        tensor("two", 2.0),
        tensor("one", 1.0),
        tensor("minus_half", -0.5),
        tensor("eps", 1e-6),
        tensor("n.weight", vector(0).reshape(gain_shape)),
        tensor("n.bias", vector(1).reshape(gain_shape)),
    ]
    return nodes, tensors


@pytest.mark.parametrize("divide", ["Div", "Reciprocal", "1 / s", "Pow", "gain first", "TensorFlow"])
@pytest.mark.parametrize("square", ["Pow", "Mul", "Sub twice"])
@pytest.mark.parametrize("cast", [False, True])
def test_layer_norm_written_out(open_model: Callable[..., Checkpoint], divide: str, square: str, cast: bool) -> None:
    layer = only(open_model(model(*written_out(square, divide, cast=cast), opset=13)))
    assert (layer.name, layer.kind, layer.channels, layer.eps) == ("n", NormKind.LAYER, 6, 1e-6)
    assert layer.origin is not None and layer.origin.startswith("ReduceMean-Sub-")
    assert layer.affine is True
    assert_vectors(layer, 0, 1, None, None)


@pytest.mark.parametrize("divide", ["Div", "Reciprocal", "1 / s", "Pow", "gain first"])
@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("bias", [False, True])
def test_rms_norm_written_out(open_model: Callable[..., Checkpoint], divide: str, square: str, bias: bool) -> None:
    made = model(*written_out(square, divide, centred=False, bias=bias and divide != "gain first"), opset=13)
    layer = only(open_model(made))
    assert (layer.name, layer.kind, layer.eps) == ("n", NormKind.RMS, 1e-6)
    assert (layer.zero_centred, layer.zero_centred_by_class) == (False, False)
    assert_vectors(layer, 0, 1 if bias and divide != "gain first" else None, None, None)


def test_the_gain_1_plus_w_gives_the_stored_w(open_model: Callable[..., Checkpoint]) -> None:
    nodes, tensors = written_out(centred=False, bias=False)
    nodes[-2].input[0] = "1+w"
    nodes.insert(0, h.make_node("Add", ["n.weight", "one"], ["1+w"]))
    layer = only(open_model(model(nodes, tensors, opset=13)))
    assert (layer.name, layer.kind, layer.zero_centred) == ("n", NormKind.RMS, True)
    assert_vectors(layer, 0, None, None, None)
    np.testing.assert_allclose(layer.numbers.gain, 1 + vector(0).astype(np.float64), rtol=1e-7)


@pytest.mark.parametrize(
    ("axes", "shape", "centred", "kind"),
    [
        ([-1], (6,), True, NormKind.LAYER),
        ([2], (6,), True, NormKind.LAYER),
        ([1], (6, 1, 1), True, NormKind.LAYER),  # ConvNeXt's LayerNorm of a channels-first image
        ([1], (1, 6, 1, 1), True, NormKind.LAYER),
        ([2, 3], (6, 1, 1), True, NormKind.INSTANCE),
        ([-1, -2], (1, 6, 1, 1), True, NormKind.INSTANCE),
        ([1, 2, 3], (6, 1, 1), True, NormKind.GROUP),
        ([0, 2, 3], (6, 1, 1), True, NormKind.BATCH),
        ([-2, -1], (2, 3), True, NormKind.LAYER),
        ([-1], (6,), False, NormKind.RMS),
        ([2, 3], (1, 6, 1, 1), False, NormKind.FILTER_RESPONSE),
    ],
)
def test_axes_decide_the_kind(
    open_model: Callable[..., Checkpoint],
    axes: list[int],
    shape: tuple[int, ...],
    centred: bool,
    kind: NormKind,
) -> None:
    nodes, tensors = written_out(axes=axes, gain_shape=shape, centred=centred)
    rank = 2 if shape == (2, 3) else 3 if axes == [2] and shape == (6,) else 4
    layer = only(open_model(model(nodes, tensors, opset=13, inputs=[value("x", [None] * rank)], check=False)))
    assert layer.kind is kind
    assert layer.training is (True if kind is NormKind.BATCH else None)
    assert_vectors(layer, 0, 1, None, None)


def test_axes_as_an_input(open_model: Callable[..., Checkpoint]) -> None:
    nodes, tensors = written_out()
    for node in nodes:
        if node.op_type == "ReduceMean":
            del node.attribute[:]
            node.input.append("axes")
    layer = only(open_model(model(nodes, [*tensors, tensor("axes", [-1], np.int64)], opset=18)))
    assert layer.kind is NormKind.LAYER


def test_a_standard_deviation_that_is_a_feature_is_no_norm(open_model: Callable[..., Checkpoint]) -> None:
    nodes = [
        h.make_node("ReduceMean", ["x"], ["mean"], axes=[-1]),
        h.make_node("Sub", ["x", "mean"], ["d"]),
        h.make_node("Mul", ["d", "d"], ["q"]),
        h.make_node("ReduceMean", ["q"], ["var"], axes=[-1]),
        h.make_node("Add", ["var", "eps"], ["ve"]),
        h.make_node("Sqrt", ["ve"], ["s"]),
        h.make_node("Concat", ["mean", "s"], ["y"], axis=-1),
    ]
    assert not open_model(model(nodes, [tensor("eps", 1e-6)], opset=13)).layers


def test_a_norm_without_gain_does_not_take_its_neighbours_constants(
    open_model: Callable[..., Checkpoint],
) -> None:
    nodes, tensors = written_out(bias=False)
    nodes[-2].input[0] = "positions"
    tensors.append(tensor("positions", np.ones((4, 6))))
    # a Mul by a table is the layer's gain only as far as anybody can tell; an Add of one never is its shift
    nodes[-2].op_type = "Add"
    layer = only(open_model(model(nodes, tensors, opset=13, check=False)))
    assert (layer.affine, layer.weight, layer.bias) == (False, None, None)


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_by_way_of_instance_norm(open_model: Callable[..., Checkpoint], affine: bool) -> None:
    nodes = [
        h.make_node("Reshape", ["x", "split"], ["r"]),
        h.make_node("Constant", [], ["ones"], value=tensor("", np.ones(3))),
        h.make_node("Constant", [], ["zeros"], value=tensor("", np.zeros(3))),
        h.make_node("InstanceNormalization", ["r", "ones", "zeros"], ["i"], epsilon=1e-4, name="gn/norm"),
        h.make_node("Shape", ["x"], ["shape"]),
        h.make_node("Reshape", ["i", "shape"], ["b"]),
    ]
    tensors = [tensor("split", [0, 3, -1], np.int64)]
    if affine:
        nodes += [
            h.make_node("Unsqueeze", ["gn.weight", "axes"], ["w"]),
            h.make_node("Mul", ["b", "w"], ["m"]),
            h.make_node("Add", ["m", "gn.bias"], ["out"]),
        ]
        tensors += [
            tensor("axes", [1, 2], np.int64),
            tensor("gn.weight", vector(0)),
            tensor("gn.bias", vector(1).reshape(6, 1, 1)),
        ]
    nodes.append(h.make_node("Relu", ["out" if affine else "b"], ["y"]))
    layer = only(open_model(model(nodes, tensors)))
    assert (layer.kind, layer.groups, layer.eps, layer.affine) == (NormKind.GROUP, 3, 1e-4, affine)
    assert (layer.name, layer.channels) == (("gn", 6) if affine else ("gn/norm", 6))
    assert_vectors(layer, *((0, 1) if affine else (None, None)), None, None)


# affine: BatchNorm as a scale and a shift


def conv(y: str = "c", channels: int = 6) -> tuple[Any, TensorProto]:
    return h.make_node("Conv", ["x", "conv.weight"], [y]), tensor("conv.weight", np.ones((channels, 6, 1, 1)))


def test_mul_add_behind_a_convolution(open_model: Callable[..., Checkpoint]) -> None:
    first, weight = conv()
    nodes = [first, h.make_node("Mul", ["c", "bn/mul"], ["m"]), h.make_node("Add", ["bn/add", "m"], ["y"])]
    tensors = [weight, tensor("bn/mul", vector(0).reshape(6, 1, 1)), tensor("bn/add", vector(1).reshape(6, 1, 1))]
    layer = only(open_model(model(nodes, tensors)))
    assert (layer.name, layer.kind, layer.origin, layer.channels) == ("bn", NormKind.AFFINE, "Mul-Add", 6)
    assert (layer.eps, layer.training, layer.running_mean) == (None, None, None)
    assert_vectors(layer, 0, 1, None, None)


@pytest.mark.parametrize("form", ["Sub-Mul-Add", "Sub-Div-Add", "Sub-Mul-Sub", "Sub-Mul", "Mul-Sub"])
def test_the_layer_is_weight_times_x_plus_bias(
    open_model: Callable[..., Checkpoint], tmp_path: Path, form: str
) -> None:
    """Against onnx's reference evaluator, through Transpose and Cast as in TensorFlow-born models."""
    from onnx.reference import ReferenceEvaluator

    first, weight = conv()
    nodes = [first, h.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]), h.make_node("Cast", ["t"], ["f0"], to=1)]
    for index, op in enumerate(form.split("-")):
        nodes.append(h.make_node(op, [f"f{index}", f"bn/c{index}"], [f"f{index + 1}"]))
    count = form.count("-") + 1
    nodes += [h.make_node("Transpose", [f"f{count}"], ["y"], perm=[0, 3, 1, 2])]
    tensors = [weight, *(tensor(f"bn/c{index}", vector(index)) for index in range(count))]
    made = model(nodes, tensors, outputs=("y", "c"))
    layer = only(open_model(made))
    assert (layer.kind, layer.origin) == (NormKind.AFFINE, form)
    x = np.random.default_rng(9).normal(size=(2, 6, 3, 3)).astype(np.float32)
    got, before = ReferenceEvaluator(made).run(None, {"x": x})
    gain, shift = layer.numbers.gain.reshape(6, 1, 1), layer.numbers.shift.reshape(6, 1, 1)
    np.testing.assert_allclose(got, before * gain + shift, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("bias alone", None),
        ("scalar scale", None),
        ("preprocessing", "input"),
        ("preprocessing in NHWC", "input"),
        ("box corners", "coordinates"),
        ("unknown norm", "division"),
        ("unknown rsqrt norm", "sqrt"),
        ("dequantization", "integers"),
        ("lengths differ", None),
        ("axes differ", None),
    ],
)
def test_what_is_no_affine_layer(open_model: Callable[..., Checkpoint], what: str, reason: str | None) -> None:
    node = h.make_node
    first, weight = conv()
    scale, shift = vector(0).reshape(6, 1, 1), vector(1).reshape(6, 1, 1)
    nodes: list[Any] = [first]
    data = "c"
    if what == "bias alone":
        scale = np.float32(2.0)
        nodes.append(node("Relu", ["c"], ["r"]))
        data = "r"
    elif what == "scalar scale":
        scale = np.float32(0.5)
    elif what.startswith("preprocessing"):
        nodes = [node("Div", ["x", "s255"], ["c0"])]
        data = "c0"
        if what.endswith("NHWC"):
            nodes.append(node("Transpose", ["c0"], ["c1"], perm=[0, 3, 1, 2]))
            data = "c1"
    elif what == "box corners":
        nodes = [node("Relu", ["x"], ["boxes"])]
        scale, shift, data = vector(0, 4), vector(1, 4), "boxes"
    elif what == "unknown norm":
        nodes += [node("ReduceMax", ["c"], ["top"]), node("Div", ["c", "top"], ["n"])]
        data = "n"
    elif what == "unknown rsqrt norm":
        nodes += [
            node("ReduceMax", ["c"], ["top"]),
            node("Sqrt", ["top"], ["root"]),
            node("Reciprocal", ["root"], ["r"]),
            node("Mul", ["c", "r"], ["n"]),
        ]
        data = "n"
    elif what == "dequantization":
        nodes = [node("ConvInteger", ["x8", "w8"], ["i"]), node("Cast", ["i"], ["f"], to=1)]
        data = "f"
    elif what == "lengths differ":
        shift = vector(1, 3).reshape(3, 1, 1)
    elif what == "axes differ":
        shift = vector(1).reshape(6)
    nodes += [node("Mul", [data, "k.scale"], ["m"]), node("Add", ["m", "k.shift"], ["y"])]
    tensors = [weight, tensor("k.scale", scale), tensor("k.shift", shift), tensor("s255", 255.0)]
    checkpoint = open_model(model(nodes, tensors, check=False))
    assert not checkpoint.layers
    misses = checkpoint.models[0].near_misses
    if reason is None:
        assert not misses
    else:
        (miss,) = misses
        assert reason in miss.reason
        assert (miss.name, miss.shape) == ("k.scale", np.shape(scale))


def test_the_gain_of_a_written_out_norm_is_not_taken_twice(open_model: Callable[..., Checkpoint]) -> None:
    checkpoint = open_model(model(*written_out(), opset=13))
    assert [layer.kind for layer in checkpoint.layers] == [NormKind.LAYER]
    assert not checkpoint.models[0].near_misses


# no norm left


def test_why_there_are_no_norms(open_model: Callable[..., Checkpoint]) -> None:
    first, weight = conv("y")
    with_bias = h.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["y"])
    bias = tensor("conv.bias", vector(0))
    (note,) = open_model(model([with_bias], [weight, bias])).notes
    assert "probably folded already, or never there (1 of 1 convolutions carry a bias" in note
    (note,) = open_model(model([first], [weight])).notes
    assert "none of the 1 convolutions carries a bias" in note
    (note,) = open_model(model([h.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", np.eye(6))])).notes
    assert "nothing suggests that there ever were any (its layers: 1 MatMul)" in note


# external data and cost


def external_model(tmp_path: Path, location: str, **entries: str) -> Path:
    node, tensors = batch_norm()
    for made in tensors:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        for key, text in {"location": location, "offset": "0", "length": "24", **entries}.items():
            made.external_data.add(key=key, value=text)
    path = tmp_path / "model.onnx"
    path.write_bytes(model([node], tensors, check=False).SerializeToString())
    return path


def test_external_data(open_model: Callable[..., Checkpoint], tmp_path: Path) -> None:
    node, tensors = batch_norm()
    checkpoint = open_model(model([node], tensors), save_as_external_data=True, location="sub.data", size_threshold=0)
    assert checkpoint.format == "ONNX opset 17, external data"
    assert_vectors(only(checkpoint), 0, 1, 2, 3)
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "sub.data")]
    assert checkpoint.bytes_total == sum(sizes)
    assert 0 < checkpoint.count_bytes_read() <= sum(sizes)


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("/etc/hostname", {}, "outside the model's folder"),
        ("../w.data", {}, "outside the model's folder"),
        ("sub/../../w.data", {}, "outside the model's folder"),
        ("sub/../w.data", {}, "outside the model's folder"),
        ("C:\\w.data", {}, "outside the model's folder"),
        ("\\\\host\\share\\w.data", {}, "outside the model's folder"),
        ("", {}, "outside the model's folder"),
        ("w.data\0", {}, "outside the model's folder"),
        ("x" * 5000, {}, "InputError"),
        ("link.data", {}, "outside the model's folder"),
        ("loop.data", {}, "outside the model's folder"),
        ("pipe.data", {}, "is no file"),
        ("folder", {}, "is no file"),
        ("missing.data", {}, "is missing"),
        ("w.data", {"offset": "90"}, "beyond the end"),
        ("w.data", {"offset": "-4"}, "gives its offset as '-4'"),
        ("w.data", {"offset": "9" * 30}, "gives its offset"),
        ("w.data", {"offset": "9" * 18}, "beyond the end"),
        ("w.data", {"length": "20"}, "has 20 bytes for a shape of 24"),
        ("w.data", {"length": "0x18"}, "gives its length"),
        ("w.data", {"offset": "²"}, "gives its offset"),
    ],
)
def test_hostile_external_data(tmp_path: Path, location: str, entries: dict[str, str], message: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "w.data").write_bytes(bytes(100))
    (folder / "sub").mkdir()
    (folder / "folder").mkdir()
    (folder / "link.data").symlink_to(tmp_path / "w.data")
    (folder / "loop.data").symlink_to(folder / "loop.data")
    os.mkfifo(folder / "pipe.data")
    path = external_model(folder, location, **entries)
    with pytest.raises(InputError) as caught:
        read_path(path).close()
    assert caught.value.hint
    assert message == "InputError" or message in caught.value.message


def test_links_within_the_folder_and_beside_a_linked_model_are_fine(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "abc").write_bytes(vector(0).tobytes())
    external_model(blobs, "m.data").rename(blobs / "def")
    (snapshot / "model.onnx").symlink_to(blobs / "def")
    (snapshot / "m.data").symlink_to(blobs / "abc")
    with read_path(snapshot / "model.onnx") as checkpoint:
        assert_vectors(only(checkpoint), 0, 0, 0, 0)


def test_missing_external_data_that_no_norm_needs_is_noted(tmp_path: Path) -> None:
    node, tensors = batch_norm(x="c")
    first, weight = conv()
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="gone.data")
    path = tmp_path / "model.onnx"
    path.write_bytes(model([first, node], [weight, *tensors], check=False).SerializeToString())
    with read_path(path) as checkpoint:
        assert_vectors(only(checkpoint), 0, 1, 2, 3)
        assert checkpoint.notes == ("external data 'gone.data' is missing; no norm's tensor is in it",)


@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_reading_costs_what_norms_cost_and_not_weights(open_model: Callable[..., Checkpoint], place: str) -> None:
    nodes: list[Any] = []
    tensors: list[Any] = []
    for index in range(8):
        name, big = f"conv{index}.weight", tensor("", np.zeros((64, 6, 64, 64)))
        if place == "initializer":
            big.name = name
            tensors.append(big)
        else:
            nodes.append(h.make_node("Constant", [], [name], value=big))
        node, more = batch_norm(f"bn{index}", x=f"c{index}", y=f"x{index + 1}")
        nodes += [h.make_node("Conv", [f"x{index}", name], [f"c{index}"]), node]
        tensors += more
    made = model(nodes, tensors, inputs=[value("x0")], outputs=("x8",), check=False)
    checkpoint = open_model(made)
    for layer in checkpoint.layers:
        assert_vectors(layer, 0, 1, 2, 3)
    assert len(checkpoint.layers) == 8
    assert checkpoint.bytes_total is not None and checkpoint.bytes_total > 50_000_000
    assert checkpoint.count_bytes_read() < 40_000


def test_reading_imports_neither_onnx_nor_torch(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    node, tensors = batch_norm()
    onnx.save(model([node], tensors), path)
    script = (
        "import sys; from pathlib import Path; from normdoctor.readers.arrays import Source; "
        "from normdoctor.readers import onnx; s = Source(Path(sys.argv[1])); assert onnx.is_onnx(s); "
        "c = onnx.read(s); c.layers[0].running_var.numpy(); c.close(); "
        "print([m for m in ('torch', 'onnx', 'google.protobuf', 'onnxruntime') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# recognition and damage


def small_model() -> bytes:
    inner, inner_tensors = batch_norm("inner", y="out")
    norm = h.make_node("LayerNormalization", ["a", "w"], ["out"])
    nodes, tensors = written_out()
    for made in nodes:
        made.input[:] = ["x0" if name == "h" else name for name in made.input]
    nodes[0].input[0], nodes[0].output[0] = "g", "x0"
    branch = h.make_node(
        "If",
        ["c"],
        ["h"],
        then_branch=_body("then", [inner], inner_tensors),
        else_branch=_body("else", [h.make_node("Identity", ["x"], ["out"])]),
    )
    call = h.make_node("Norm", ["h", "ln.weight"], ["g"], domain="local")
    made = model(
        [branch, call, *nodes],
        [*tensors, tensor("ln.weight", vector(0))],
        inputs=[value("x"), value("c", [], TensorProto.BOOL)],
        functions=[_function("Norm", [norm], ["a", "w"])],
        producer_name="test",
    )
    return made.SerializeToString()


def attempt(path: Path) -> int:
    """Recognise, read, and read all values; InputError is a fine outcome, anything else a defect."""
    with Source(path) as source:
        is_onnx(source)
        try:
            with read(source) as checkpoint, np.errstate(invalid="ignore"):  # signalling NaNs warn when widened
                for layer in checkpoint.layers:
                    layer.numbers.load()
                return len(checkpoint.layers)
        except InputError as error:
            assert error.message
            return -1


def test_truncated_at_any_byte(tmp_path: Path) -> None:
    whole = small_model()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole)
    assert attempt(path) == 3
    for count in range(len(whole)):
        path.write_bytes(whole[:count])
        attempt(path)


def test_flipped_bytes(tmp_path: Path) -> None:
    whole = small_model()
    path = tmp_path / "m.onnx"
    rng = random.Random(4)
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(data)
        attempt(path)


def recognised(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    with Source(path) as source:
        return is_onnx(source)


def test_recognition(tmp_path: Path) -> None:
    import io
    import pickle

    import torch

    path = tmp_path / "file"
    node, tensors = batch_norm()
    made = model([node], tensors)
    assert recognised(path, made.SerializeToString())
    opsets = made.opset_import[:]
    del made.opset_import[:]
    backwards = b"".join(bytes_field(8, opset.SerializeToString()) for opset in opsets) + made.SerializeToString()
    assert recognised(path, backwards)
    saved = io.BytesIO()
    torch.save({"a": torch.ones(3)}, saved)
    legacy = io.BytesIO()
    torch.save({"a": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    whole = made.SerializeToString()
    assert all(recognised(path, whole[:count]) for count in range(20, len(whole), 50))  # it will say "truncated"
    strangers = [
        b"",
        b"\n",
        b"a text file\nwith lines\n",
        b"{}",
        saved.getvalue(),
        legacy.getvalue(),
        bytes(1000),
        b"\x08\x07",
        b"\x08\x07\x12\x01",
        b"\x08\x07\x3a",
        b"\x3a\x7fjunk",
        (24).to_bytes(8, "little") + b'{"__metadata__":{}}     ',
        *(pickle.dumps({"a": [1, 2.5, "x"]}, protocol) for protocol in range(6)),
    ]
    assert not any(recognised(path, content) for content in strangers)
    rng = random.Random(0)
    assert not any(recognised(path, rng.randbytes(rng.randrange(1, 4000))) for _ in range(3000))


def raw_model(graph: bytes, more: bytes = b"") -> bytes:
    return varint_field(1, 8) + bytes_field(7, graph) + bytes_field(8, varint_field(2, 17)) + more


def raw_node(op: str, inputs: list[str], outputs: list[str], domain: str = "", more: bytes = b"") -> bytes:
    names = b"".join(bytes_field(1, name.encode()) for name in inputs)
    names += b"".join(bytes_field(2, name.encode()) for name in outputs)
    return bytes_field(1, names + bytes_field(4, op.encode()) + bytes_field(7, domain.encode()) + more)


def raw_tensor(name: str, dims: list[int], more: bytes, kind: int = 1) -> bytes:
    shape = b"".join(varint_field(1, length) for length in dims)
    return bytes_field(5, shape + varint_field(2, kind) + bytes_field(8, name.encode()) + more)


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        body = bytes_field(1, b"then_branch") + bytes_field(6, graph)
        graph = bytes_field(1, bytes_field(4, b"If") + bytes_field(5, body))
    return graph


def doubling(depth: int) -> bytes:
    """Functions that each call the next one twice."""
    result = b""
    for index in range(depth):
        calls = b"".join(
            bytes_field(7, bytes_field(4, f"f{index + 1}".encode()) + bytes_field(7, b"l")) for _ in range(2)
        )
        result += bytes_field(25, bytes_field(1, f"f{index}".encode()) + calls + bytes_field(10, b"l"))
    return result


NORM = raw_node("BatchNormalization", ["x", "w", "w", "w", "w"], ["y"])

HOSTILE = {
    "nesting": raw_model(nested(30_000)),
    "empty nodes": raw_model(b"\x0a\x00" * 400_000),
    "a length of 2^63": varint_field(1, 8) + b"\x42\x00\x3a" + varint(1 << 63) + b"\x0a\x00",
    "a number of eleven bytes": varint_field(1, 8) + b"\x08" + b"\xff" * 11,
    "huge shape": raw_model(NORM + raw_tensor("w", [1 << 62, 4], b"")),
    "huge shape with data": raw_model(NORM + raw_tensor("w", [1 << 31, 1 << 31], bytes_field(9, b"1234"))),
    "negative shape": raw_model(NORM + raw_tensor("w", [(1 << 64) - 5], bytes_field(9, b"1234"))),
    "many dimensions": raw_model(NORM + raw_tensor("w", [1] * 5000, bytes_field(9, b"1234"))),
    "short typed data": raw_model(NORM + raw_tensor("w", [8], bytes_field(5, b"\1\2"), kind=10)),
    "typed data cut": raw_model(NORM + raw_tensor("w", [2], bytes_field(5, b"\1\x82"), kind=10)),
    "endless shape": raw_model(
        raw_node("Constant", [], ["s"], more=bytes_field(5, bytes_field(1, b"value_int") + varint_field(3, 1 << 40)))
        + raw_node("ConstantOfShape", ["s"], ["w"])
        + NORM
    ),
    "a name of 9 MB": raw_model(raw_node("A" * 9_000_000, [], [])),
    "one long name at very many calls": raw_model(
        raw_node("f", ["x"], ["y"], "l") * 90_000,
        bytes_field(
            25,
            bytes_field(1, b"f")
            + bytes_field(7, bytes_field(3, b"n" * 60_000) + bytes_field(4, b"LayerNormalization"))
            + bytes_field(10, b"l"),
        ),
    ),
    "many norms of many channels": raw_model(
        raw_node("Constant", [], ["s"], more=bytes_field(5, bytes_field(1, b"value_int") + varint_field(3, 1 << 23)))
        + b"".join(
            raw_node("ConstantOfShape", ["s"], [f"w{i}"]) + raw_node("LayerNormalization", ["x", f"w{i}"], [f"y{i}"])
            for i in range(50)
        )
    ),
    "a constant that needs itself": raw_model(raw_node("Add", ["w", "w"], ["w"]) + NORM),
    "external without location": raw_model(NORM + raw_tensor("w", [1], varint_field(14, 1))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_cost_little(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(HOSTILE[name])
    start = time.process_time()
    attempt(path)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "functions",
    [
        doubling(40),
        bytes_field(
            25, bytes_field(1, b"f0") + raw_node("f0", [], [], "l").replace(b"\x0a", b"\x3a", 1) + bytes_field(10, b"l")
        ),
    ],
    ids=["doubling", "recursive"],
)
def test_functions_that_multiply_are_cut_short_and_noted(tmp_path: Path, functions: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(raw_model(raw_node("f0", ["x"], ["y"], "l"), functions))
    with read_path(path) as checkpoint:
        assert any("functions were not looked into" in note for note in checkpoint.notes)


def test_a_graph_in_two_parts_is_one_graph(tmp_path: Path) -> None:
    """As protobuf merges it: a scanner that saw only one part would miss what the runtime runs."""
    node, tensors = batch_norm()
    whole = model([node], tensors).SerializeToString()
    extra, more = batch_norm("hidden")
    part = onnx.GraphProto(node=[extra], initializer=more)
    data = whole + bytes_field(7, part.SerializeToString())
    assert len(onnx.ModelProto.FromString(data).graph.node) == 2
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with read_path(path) as checkpoint:
        assert [layer.name for layer in checkpoint.layers] == ["layer1.0.bn1", "hidden"]


# exporters


def exported(tmp_path: Path, net: Any, x: Any, **options: Any) -> Checkpoint:
    import warnings

    import torch

    path = tmp_path / "exported.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), str(path), verbose=False, **options)
    return read_path(path)


@pytest.mark.parametrize(
    "options",
    [
        {"dynamo": False, "opset_version": 11, "do_constant_folding": False},
        {"dynamo": False, "opset_version": 17, "do_constant_folding": False},
        {"dynamo": True, "opset_version": 18, "optimize": False},
        {"dynamo": True, "opset_version": 23, "optimize": False},
    ],
    ids=["script 11", "script 17", "dynamo 18", "dynamo 23"],
)
def test_what_torch_exports_reads_as_the_module_it_came_from(tmp_path: Path, options: dict[str, Any]) -> None:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=False)
            self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
            self.blocks = nn.Sequential(
                nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8), nn.BatchNorm2d(8, affine=False)
            )
            self.inorm = nn.InstanceNorm2d(8, affine=True)
            self.norm = nn.LayerNorm(8, eps=1e-6)
            self.plain = nn.LayerNorm(8, bias=False)

        def forward(self, x: Any) -> Any:
            x = self.inorm(self.blocks(self.bn(self.conv(x)))).mean((2, 3))
            return self.plain(self.norm(x))

    torch.manual_seed(0)
    net = Net().eval()
    kinds = {
        "bn": NormKind.BATCH,
        "blocks.0": NormKind.BATCH,
        "blocks.2": NormKind.GROUP,
        "blocks.3": NormKind.BATCH,
        "inorm": NormKind.INSTANCE,
        "norm": NormKind.LAYER,
        "plain": NormKind.LAYER,
    }
    with exported(tmp_path, net, torch.randn(2, 3, 6, 6), **options) as checkpoint:
        layers = {layer.name: layer for layer in checkpoint.layers}
        assert {name: layer.kind for name, layer in layers.items()} == kinds
        for name, layer in layers.items():
            module = net.get_submodule(name)
            assert layer.eps == pytest.approx(module.eps, rel=1e-6)
            assert layer.channels == 8
            assert layer.affine is (getattr(module, "weight", None) is not None)
            for leaf, got in zip(VECTORS, values_of(layer), strict=True):
                wanted = getattr(module, leaf, None)
                assert (got is None) == (wanted is None), (name, leaf)
                if wanted is not None:
                    np.testing.assert_array_equal(got.reshape(-1), wanted.detach().numpy())
        assert layers["bn"].momentum == 0.01
        assert layers["blocks.2"].groups == 2


def test_exported_in_training_mode(tmp_path: Path) -> None:
    import torch
    from torch import nn

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    mode = torch.onnx.TrainingMode.TRAINING
    with exported(tmp_path, net, torch.randn(2, 3, 6, 6), dynamo=False, training=mode) as checkpoint:
        layer = only(checkpoint)
        assert (layer.name, layer.training, layer.momentum) == ("1", True, 0.1)


# published models


def corpus(name: str) -> Path:
    root = Path(os.environ.get("NORMDOCTOR_CORPUS", "/nowhere"))
    found = sorted(root.rglob(name)) if root.is_dir() else []
    if not found:
        pytest.skip(f"{name} has not been fetched (see .ci/run)")
    return found[0]


@pytest.mark.corpus
@pytest.mark.parametrize(
    ("name", "batch", "layer"),
    [
        ("ch_ppocr_mobile_v2.0_cls_infer.onnx", 35, 0),
        ("ch_PP-OCRv4_rec_infer.onnx", 6, 5),
        ("ch_PP-OCRv4_det_infer.onnx", 3, 0),
    ],
)
def test_published_text_recognisers(name: str, batch: int, layer: int) -> None:
    with read_path(corpus(name)) as checkpoint:
        kinds = [found.kind for found in checkpoint.layers]
        assert (kinds.count(NormKind.BATCH), kinds.count(NormKind.LAYER), len(kinds)) == (batch, layer, batch + layer)
        assert all(np.isfinite(found.numbers.gain).all() for found in checkpoint.layers)
        assert all("_norm" in found.name or found.name.endswith("_bn") for found in checkpoint.layers)
        assert all(found.eps in (1e-5, 1e-6) and found.training in (None, False) for found in checkpoint.layers)
        assert not checkpoint.notes


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["silero_vad.onnx", "silero_vad_half.onnx", "silero_vad_op18_ifless.onnx"])
def test_published_models_with_folded_norms(name: str) -> None:
    with read_path(corpus(name)) as checkpoint:
        assert not checkpoint.layers
        assert "probably folded already" in checkpoint.notes[0]
