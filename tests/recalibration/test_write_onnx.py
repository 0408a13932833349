"""New statistics in a copy of an ONNX file: the right layer gets them, no other does, no other byte moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from onnx import helper as h

from normdoctor.errors import RefusedError
from normdoctor.layers import NormLayer
from normdoctor.readers.arrays import Source
from normdoctor.readers.onnx import read
from normdoctor.recalibration import with_onnx
from normdoctor.recalibration.with_onnx import MARK_KEY, recorded_mark, write_onnx

LEAVES = ("weight", "bias", "running_mean", "running_var")
CHANNELS = 5
EPS = 1e-5

Changes = dict[str, dict[str, np.ndarray]]


def vector(seed: int, count: int = CHANNELS) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, count).astype(np.float32)


def tensor(name: str, values: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def value(name: str, shape: Any = (2, CHANNELS), kind: int = TensorProto.FLOAT) -> Any:
    return h.make_tensor_value_info(name, kind, shape)


def norm(prefix: str, x: str, y: str, names: tuple[str, ...] | None = None) -> Any:
    inputs = names or tuple(f"{prefix}.{leaf}" for leaf in LEAVES)
    return h.make_node("BatchNormalization", [x, *inputs], [y], name=prefix, epsilon=EPS)


def tensors_of(prefix: str, seed: int = 0) -> list[TensorProto]:
    return [tensor(f"{prefix}.{leaf}", vector(seed + index)) for index, leaf in enumerate(LEAVES)]


def make(
    nodes: list[Any],
    tensors: list[Any],
    *,
    opset: int = 17,
    ir_version: int = 8,
    inputs: list[Any] | None = None,
    functions: list[Any] = (),  # type: ignore[assignment]
) -> onnx.ModelProto:
    graph = h.make_graph(nodes, "g", inputs or [value("x")], [value("y")], tensors)
    opsets = [h.make_opsetid("", opset)]
    if functions:
        opsets.append(h.make_opsetid("local", 1))
    made = h.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))
    made.doc_string = "a model"
    onnx.checker.check_model(made)
    return made


def new(*names: str) -> Changes:
    return {
        name: {"running_mean": vector(100 + 2 * i), "running_var": vector(101 + 2 * i)} for i, name in enumerate(names)
    }


def layers_of(path: Path) -> dict[str, NormLayer]:
    with Source(path) as source, read(source) as checkpoint:
        for layer in checkpoint.layers:
            layer.numbers.load()
        return {layer.name: layer for layer in checkpoint.layers}


def run(path: Path, **more: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": INPUT, **more})
    return np.asarray(got)


INPUT = np.random.default_rng(1).normal(size=(2, CHANNELS)).astype(np.float32)


def applied(x: np.ndarray, layer: NormLayer, stats: dict[str, np.ndarray] | None = None) -> np.ndarray:
    numbers = layer.numbers
    mean = numbers.mean if stats is None else stats["running_mean"]
    var = numbers.var if stats is None else stats["running_var"]
    assert mean is not None and var is not None
    return np.asarray((x - mean) / np.sqrt(var + EPS) * numbers.gain + numbers.shift)


def check_written(path: Path, before: dict[str, NormLayer], changes: Changes, tolerance: float = 0.0) -> None:
    """The model is valid, the named layers hold the new numbers and all others the old ones."""
    onnx.checker.check_model(str(path))
    after = layers_of(path)
    assert list(after) == list(before)
    for name, layer in after.items():
        for leaf in LEAVES:
            got = getattr(layer, leaf).numpy().reshape(-1)
            wanted = changes.get(name, {}).get(leaf, getattr(before[name], leaf).numpy().reshape(-1))
            np.testing.assert_allclose(got, wanted, rtol=tolerance, err_msg=f"{name}.{leaf}")
    assert recorded_mark(path) == "debias"


def check_runs(path: Path, before: dict[str, NormLayer], changes: Changes, order: list[str]) -> None:
    x: np.ndarray = INPUT.astype(np.float64)
    for name in order:
        x = applied(x, before[name], changes.get(name))
    np.testing.assert_allclose(run(path), x, rtol=2e-5, atol=1e-6)


def write(tmp_path: Path, made: onnx.ModelProto, changes: Changes) -> tuple[Path, Path, dict[str, NormLayer]]:
    source, output = tmp_path / "model.onnx", tmp_path / "fixed.onnx"
    data = made.SerializeToString()
    source.write_bytes(data)
    before = layers_of(source)
    write_onnx(source, output, changes, "debias")
    assert source.read_bytes() == data
    assert files_in(tmp_path) == ["fixed.onnx", "model.onnx"]
    return source, output, before


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def differing(one: bytes, other: bytes) -> int:
    return sum(a != b for a, b in zip(one, other, strict=False))


@pytest.mark.parametrize("home", ["raw", "float_data", "Constant", "Identity"])
def test_only_the_payload_and_the_mark_differ(tmp_path: Path, home: str) -> None:
    tensors, nodes = tensors_of("bn1"), []
    if home == "float_data":
        for made in tensors:
            numbers = numpy_helper.to_array(made).tolist()
            made.ClearField("raw_data")
            made.float_data.extend(numbers)
    elif home == "Constant":
        nodes = [h.make_node("Constant", [], [made.name], value=made) for made in tensors]
        tensors = []
    elif home == "Identity":
        for made in tensors:
            nodes.append(h.make_node("Identity", [f"stored {made.name}"], [made.name]))
            made.name = f"stored {made.name}"
    nodes += [norm("bn1", "x", "h"), norm("bn2", "h", "y")]
    made = make(nodes, tensors + tensors_of("bn2", 10))
    changes = new("bn1")
    source, output, before = write(tmp_path, made, changes)
    check_written(output, before, changes)
    check_runs(output, before, changes, ["bn1", "bn2"])
    old, fixed = source.read_bytes(), output.read_bytes()
    tail = fixed[len(old) :]
    assert onnx.ModelProto.FromString(tail).metadata_props[0].key == MARK_KEY
    for leaf, stats in (("running_mean", 2), ("running_var", 3)):
        place = old.index(vector(stats).tobytes())
        assert fixed[place : place + 4 * CHANNELS] == changes["bn1"][leaf].tobytes()
    assert differing(old, fixed) <= 2 * 4 * CHANNELS


def test_a_second_mark_replaces_the_first(tmp_path: Path) -> None:
    source, output, _ = write(tmp_path, make([norm("bn", "x", "y")], tensors_of("bn")), new("bn"))
    assert recorded_mark(source) is None
    again = tmp_path / "again.onnx"
    write_onnx(output, again, new("bn"), "debias twice")
    onnx.checker.check_model(str(again))
    assert recorded_mark(again) == "debias twice"
    assert len(onnx.load(again).metadata_props) == 1


def test_initializers_that_layers_share_through_identity_are_given_copies(tmp_path: Path) -> None:
    """The exporter's trap: writing to the shared tensor would change the sibling."""
    names = ["bn1", "bn2", "bn3"]
    nodes = [h.make_node("Identity", [f"bn1.{leaf}"], [f"{name}.{leaf}"]) for name in names[1:] for leaf in LEAVES]
    nodes += [norm("bn1", "x", "a"), norm("bn2", "a", "b"), norm("bn3", "b", "y")]
    changes = new("bn1", "bn3")
    _, output, before = write(tmp_path, make(nodes, tensors_of("bn1")), changes)
    check_written(output, before, changes)
    check_runs(output, before, changes, names)
    names_after = {made.name for made in onnx.load(output).graph.initializer}
    assert {"bn1.running_mean_2", "bn3.running_mean_2"} <= names_after


@pytest.mark.parametrize("ir_version", [3, 8])
def test_tensors_used_directly_by_two_layers_are_given_copies(tmp_path: Path, ir_version: int) -> None:
    shared = ("a.weight", "a.bias", "all.running_mean", "all.running_var")
    other = ("b.weight", "b.bias", *shared[2:])
    nodes = [norm("a", "x", "h", shared), norm("b", "h", "y", other)]
    tensors = [tensor(name, vector(i)) for i, name in enumerate((*shared, *other[:2]))]
    inputs = [value("x"), *(value(made.name, [CHANNELS]) for made in tensors)] if ir_version < 4 else None
    made = make(nodes, tensors, opset=8 if ir_version < 4 else 17, ir_version=ir_version, inputs=inputs)
    source = tmp_path / "named.onnx"
    onnx.save(made, source)
    first, second = layers_of(source)
    source.unlink()
    changes = new(second)
    _, output, before = write(tmp_path, made, changes)
    check_written(output, before, changes)
    check_runs(output, before, changes, [first, second])


@pytest.mark.parametrize("home", ["ConstantOfShape", "Cast", "value_floats"])
def test_what_has_no_payload_of_its_own_gets_one(tmp_path: Path, home: str) -> None:
    tensors = tensors_of("bn")
    stats, tensors = tensors[2:], tensors[:2]
    nodes = []
    for made in stats:
        if home == "ConstantOfShape":
            nodes.append(h.make_node("ConstantOfShape", ["shape"], [made.name], value=tensor("", [0.5])))
        elif home == "Cast":
            nodes.append(h.make_node("Cast", [f"{made.name} in half"], [made.name], to=TensorProto.FLOAT))
            tensors.append(tensor(f"{made.name} in half", numpy_helper.to_array(made), np.float16))
        elif home == "value_floats":
            nodes.append(h.make_node("Constant", [], [made.name], value_floats=numpy_helper.to_array(made).tolist()))
    tensors.append(tensor("shape", [CHANNELS], np.int64))
    nodes += [norm("bn", "x", "y")]
    changes = new("bn")
    _, output, before = write(tmp_path, make(nodes, tensors), changes)
    check_written(output, before, changes)
    check_runs(output, before, changes, ["bn"])


def test_half_precision_in_int32_data_gets_raw_data(tmp_path: Path) -> None:
    """Numbers of varying length cannot be overwritten in place."""
    tensors = []
    for made in tensors_of("bn"):
        halves = numpy_helper.to_array(made).astype(np.float16)
        typed = TensorProto(name=made.name, data_type=TensorProto.FLOAT16, dims=[CHANNELS])
        typed.int32_data.extend(int(bits) for bits in halves.view(np.uint16))
        tensors.append(typed)
    half = TensorProto.FLOAT16
    graph = h.make_graph([norm("bn", "x", "y")], "g", [value("x", kind=half)], [value("y", kind=half)], tensors)
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    changes = new("bn")
    _, output, before = write(tmp_path, made, changes)
    check_written(output, before, changes, tolerance=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_are_written_in_the_tensors_own_type(tmp_path: Path, dtype: Any) -> None:
    tensors = [tensor(made.name, numpy_helper.to_array(made), dtype) for made in tensors_of("bn")]
    kind = tensors[0].data_type
    graph = h.make_graph([norm("bn", "x", "y")], "g", [value("x", kind=kind)], [value("y", kind=kind)], tensors)
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    changes = new("bn")
    _, output, before = write(tmp_path, made, changes)
    rounded = {
        "bn": {leaf: array.astype(dtype).astype(np.float64) for leaf, array in changes["bn"].items()},
    }
    check_written(output, before, rounded)


def test_a_value_that_the_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    tensors = [tensor(made.name, numpy_helper.to_array(made), np.float16) for made in tensors_of("bn")]
    half = TensorProto.FLOAT16
    graph = h.make_graph([norm("bn", "x", "y")], "g", [value("x", kind=half)], [value("y", kind=half)], tensors)
    path = tmp_path / "m.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(RefusedError, match=r"bn\.running_var: float16 cannot hold 1e\+05"):
        write_onnx(path, tmp_path / "out.onnx", {"bn": {"running_var": np.full(CHANNELS, 1e5)}}, "m")
    assert not (tmp_path / "out.onnx").exists()


def test_inside_bodies(tmp_path: Path) -> None:
    """One branch owns its tensors, the other uses those of the graph around it, shared with a third layer."""
    inner = h.make_graph([norm("inner", "x", "out")], "then", [], [value("out")], tensors_of("inner"))
    names = tuple(f"outer.{leaf}" for leaf in LEAVES)
    sharing = h.make_graph(
        [h.make_node("Identity", [name], [f"body.{name}"]) for name in names]
        + [norm("sharing", "x", "out", tuple(f"body.{name}" for name in names))],
        "else",
        [],
        [value("out")],
    )
    nodes = [
        h.make_node("If", ["c"], ["h"], then_branch=inner, else_branch=sharing),
        norm("outer", "h", "y"),
    ]
    made = make(nodes, tensors_of("outer", 10), inputs=[value("x"), value("c", [], TensorProto.BOOL)])
    changes = new("inner", "body.outer")
    _, output, before = write(tmp_path, made, changes)
    check_written(output, before, changes)
    for condition, name in ((True, "inner"), (False, "body.outer")):
        expected = applied(applied(INPUT.astype(np.float64), before[name], changes[name]), before["outer"])
        np.testing.assert_allclose(run(output, c=np.array(condition)), expected, rtol=2e-5, atol=1e-6)


def function_model(*prefixes: str) -> onnx.ModelProto:
    inside = norm("inside", "a", "out", ("w", "b", "m", "v"))
    function = h.make_function("local", "Norm", ["a", "w", "b", "m", "v"], ["out"], [inside], [h.make_opsetid("", 17)])
    flow = ["x", *(f"h{i}" for i in range(len(prefixes) - 1)), "y"]
    nodes, tensors = [], {}
    for index, prefix in enumerate(prefixes):
        names = [f"{prefix}.{leaf}" for leaf in LEAVES]
        if prefix == "shared":
            names[:2] = [f"own{index}.weight", f"own{index}.bias"]
        nodes.append(h.make_node("Norm", [flow[index], *names], [flow[index + 1]], name=f"call{index}", domain="local"))
        tensors |= {name: tensor(name, vector(10 * index + i)) for i, name in enumerate(names)}
    return make(nodes, list(tensors.values()), functions=[function])


def test_parameters_passed_to_a_function_are_patched_where_they_are_stored(tmp_path: Path) -> None:
    made = function_model("bn1", "bn2")
    changes = new("bn2")
    _, output, before = write(tmp_path, made, changes)
    check_written(output, before, changes)
    check_runs(output, before, changes, ["bn1", "bn2"])


def test_sharing_inside_a_function_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(function_model("shared", "shared"), path)
    name = next(iter(layers_of(path)))
    with pytest.raises(RefusedError, match="inside a local function") as caught:
        write_onnx(path, tmp_path / "out.onnx", new(name), "m")
    assert "inline" in caught.value.hint
    assert files_in(tmp_path) == ["m.onnx"]


def test_a_module_called_twice_is_changed_once(tmp_path: Path) -> None:
    made = make([norm("bn", "x", "h"), norm("bn", "h", "y")], tensors_of("bn"))
    made.graph.node[1].name = "again"
    changes = new("bn")
    source, output, before = write(tmp_path, made, changes)
    check_written(output, before, changes)
    check_runs(output, before, changes, ["bn", "bn"])
    assert differing(source.read_bytes(), output.read_bytes()) <= 2 * 4 * CHANNELS


def test_bytes_that_we_do_not_understand_survive(tmp_path: Path) -> None:
    """A length written longer than need be, a field from the future: a rewrite through protobuf loses them."""
    made = make([norm("a", "x", "h"), norm("b", "h", "y")], tensors_of("a") + tensors_of("b", 10))
    graph = made.graph.SerializeToString()
    made.ClearField("graph")
    unknown = bytes([0xA2, 0x1F, 3]) + b"new"  # field 500
    length = len(graph) + len(unknown)
    padded = bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14 | 0x80, 0])
    data = made.SerializeToString() + b"\x3a" + padded + graph + unknown
    source, output = tmp_path / "m.onnx", tmp_path / "out.onnx"
    source.write_bytes(data)
    write_onnx(source, output, new("a"), "debias")
    fixed = output.read_bytes()
    assert padded in fixed and unknown in fixed
    assert differing(data, fixed[: len(data)]) <= 2 * 4 * CHANNELS


# external data


def external(folder: Path, tensors: list[TensorProto] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    made = make([norm("bn1", "x", "h"), norm("bn2", "h", "y")], tensors or tensors_of("bn1") + tensors_of("bn2", 10))
    onnx.save(made, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return folder / "model.onnx"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_external_data_is_copied_and_patched(tmp_path: Path, elsewhere: bool) -> None:
    source = external(tmp_path / "a")
    folder = tmp_path / "b" if elsewhere else tmp_path / "a"
    folder.mkdir(exist_ok=True)
    data = (source.parent / "model.onnx.data").read_bytes()
    model = source.read_bytes()
    before = layers_of(source)
    changes = new("bn2")
    write_onnx(source, folder / "fixed.onnx", changes, "debias")
    name = "model.onnx.data" if elsewhere else "fixed.onnx.data"
    assert (source.parent / "model.onnx.data").read_bytes() == data and source.read_bytes() == model
    copied = (folder / name).read_bytes()
    assert len(copied) == len(data) and 0 < differing(copied, data) <= 2 * 4 * CHANNELS
    if elsewhere:
        fixed = (folder / "fixed.onnx").read_bytes()
        assert fixed.startswith(model)
        assert files_in(folder) == ["fixed.onnx", "model.onnx.data"]
    else:
        assert files_in(folder) == ["fixed.onnx", "fixed.onnx.data", "model.onnx", "model.onnx.data"]
    check_written(folder / "fixed.onnx", before, changes)
    check_runs(folder / "fixed.onnx", before, changes, ["bn1", "bn2"])


def test_external_bytes_that_two_tensors_share_are_left_alone(tmp_path: Path) -> None:
    source = external(tmp_path / "a")
    made = onnx.load(source, load_external_data=False)
    places = {t.name: {e.key: e for e in t.external_data} for t in made.graph.initializer}
    for leaf in LEAVES[2:]:
        places[f"bn2.{leaf}"]["offset"].value = places[f"bn1.{leaf}"]["offset"].value
    source.write_bytes(made.SerializeToString())
    before = layers_of(source)
    changes = new("bn1")
    write_onnx(source, tmp_path / "a" / "fixed.onnx", changes, "debias")
    check_written(tmp_path / "a" / "fixed.onnx", before, changes)
    # bn1 has tensors of its own in the model now, so the data is as it was and shared with the original
    assert files_in(tmp_path / "a") == ["fixed.onnx", "model.onnx", "model.onnx.data"]


def test_a_data_file_that_is_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    source = external(tmp_path / "a")
    stranger = tmp_path / "a" / "fixed.onnx.data"
    stranger.write_bytes(b"mine")
    before = layers_of(source)
    write_onnx(source, tmp_path / "a" / "fixed.onnx", new("bn1"), "debias")
    assert stranger.read_bytes() == b"mine"
    check_written(tmp_path / "a" / "fixed.onnx", before, new("bn1"))


def test_data_in_a_subfolder_keeps_its_place(tmp_path: Path) -> None:
    source = external(tmp_path / "a")
    (tmp_path / "a" / "weights").mkdir()
    (tmp_path / "a" / "model.onnx.data").rename(tmp_path / "a" / "weights" / "w.bin")
    made = onnx.load(source, load_external_data=False)
    for made_tensor in made.graph.initializer:
        made_tensor.external_data[0].value = "weights/w.bin"
    source.write_bytes(made.SerializeToString())
    before = layers_of(source)
    (tmp_path / "b").mkdir()
    write_onnx(source, tmp_path / "b" / "fixed.onnx", new("bn1"), "debias")
    assert (tmp_path / "b" / "weights" / "w.bin").is_file()
    check_written(tmp_path / "b" / "fixed.onnx", before, new("bn1"))


@pytest.mark.parametrize("where", ["beside", "above"])
def test_external_data_is_referred_to_where_it_lies(tmp_path: Path, where: str) -> None:
    """What changes moves into the model; no byte of the data is copied or changed."""
    source = external(tmp_path / "a")
    output = tmp_path / "a" / "fixed.onnx" if where == "beside" else tmp_path / "fixed.onnx"
    data = (source.parent / "model.onnx.data").read_bytes()
    before, changes = layers_of(source), new("bn2")
    write_onnx(source, output, changes, "debias", share_data=True)
    assert (source.parent / "model.onnx.data").read_bytes() == data
    assert files_in(source.parent) == [*(["fixed.onnx"] if where == "beside" else []), "model.onnx", "model.onnx.data"]
    check_written(output, before, changes)
    check_runs(output, before, changes, ["bn1", "bn2"])
    made = onnx.load(output, load_external_data=False)
    inside = {t.name for t in made.graph.initializer if t.data_location != TensorProto.EXTERNAL}
    assert inside == {"bn2.running_mean", "bn2.running_var"}
    places = {e.value for t in made.graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {"model.onnx.data" if where == "beside" else "a/model.onnx.data"}


def test_shared_data_is_not_reached_from_elsewhere(tmp_path: Path) -> None:
    source = external(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(RefusedError, match="in its own folder and below") as caught:
        write_onnx(source, tmp_path / "b" / "fixed.onnx", new("bn1"), "debias", share_data=True)
    assert "--share-data" in caught.value.hint
    assert files_in(tmp_path / "b") == []


def test_sharing_data_where_all_of_a_file_changes(tmp_path: Path) -> None:
    """Nothing is left outside; a shared initializer is given away as ever."""
    names = ("a.weight", "a.bias", "all.running_mean", "all.running_var")
    nodes = [norm("a", "x", "h", names), norm("b", "h", "y", ("b.weight", "b.bias", *names[2:]))]
    stored = [tensor(name, vector(i)) for i, name in enumerate((*names, "b.weight", "b.bias"))]
    (tmp_path / "a").mkdir()
    source = tmp_path / "a" / "model.onnx"
    onnx.save(make(nodes, stored), source, save_as_external_data=True, location="w", size_threshold=0)
    before = layers_of(source)
    changes = new(*before)
    write_onnx(source, tmp_path / "a" / "fixed.onnx", changes, "debias", share_data=True)
    check_written(tmp_path / "a" / "fixed.onnx", before, changes)
    check_runs(tmp_path / "a" / "fixed.onnx", before, changes, list(before))
    assert files_in(tmp_path / "a") == ["fixed.onnx", "model.onnx", "w"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_broken_statistics_are_replaced(tmp_path: Path, bad: float) -> None:
    stored = tensors_of("bn")
    stored[2:] = [tensor(made.name, [bad] * CHANNELS) for made in stored[2:]]
    changes = new("bn")
    _, output, before = write(tmp_path, make([norm("bn", "x", "y")], stored), changes)
    check_written(output, before, changes)
    check_runs(output, before, changes, ["bn"])


def test_a_mark_is_replaced_by_the_next(tmp_path: Path) -> None:
    source, output, _ = write(tmp_path, make([norm("bn", "x", "y")], tensors_of("bn")), new("bn"))
    again = tmp_path / "again.onnx"
    write_onnx(output, again, new("bn"), "exact, 512 samples")
    assert recorded_mark(source) is None and recorded_mark(again) == "exact, 512 samples"
    assert len(onnx.load(again).metadata_props) == 1


@pytest.mark.filterwarnings("ignore")  # of torch's exporters
@pytest.mark.parametrize("dynamo", [False, True])
def test_an_exported_net_whose_buffers_were_all_reset(tmp_path: Path, dynamo: bool) -> None:
    """torch's older exporter stores equal buffers once: each norm must get its own all the same."""
    import torch
    from torch import nn

    def layer() -> list[nn.Module]:
        return [nn.Conv1d(CHANNELS, CHANNELS, 1), nn.BatchNorm1d(CHANNELS), nn.ReLU()]

    net = nn.Sequential(*layer(), *layer(), *layer()).eval()
    source, output = tmp_path / "net.onnx", tmp_path / "fixed.onnx"
    options: dict[str, Any] = (
        {"dynamo": True, "optimize": False, "verbose": False, "external_data": False}
        if dynamo
        else {"dynamo": False, "training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    )
    x = torch.randn(2, CHANNELS, 6)
    torch.onnx.export(net, (x,), source, **options)
    before = layers_of(source)
    assert len(before) == 3
    assert any(node.op_type == "Identity" for node in onnx.load(source).graph.node) is not dynamo
    changes = new(*before)
    write_onnx(source, output, changes, "debias")
    check_written(output, before, changes)
    norms = [module for module in net if isinstance(module, nn.BatchNorm1d)]
    for module, values in zip(norms, changes.values(), strict=True):
        module.running_mean = torch.from_numpy(values["running_mean"])
        module.running_var = torch.from_numpy(values["running_var"])
    with torch.no_grad():
        expected = net(x).numpy()
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# refusals and failures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nobody": {"running_mean": vector(0)}}, "nobody: no such layer"),
        ({"bn": {"running_mean": vector(0, 3)}}, "3 new values for 5 channels"),
        ({"bn": {"running_var": vector(0)}}, "not in the file as a constant"),
    ],
)
def test_refusals(tmp_path: Path, changes: Changes, message: str) -> None:
    tensors = tensors_of("bn")[:3]
    made = make([norm("bn", "x", "y")], tensors, inputs=[value("x"), value("bn.running_var", [CHANNELS])])
    path = tmp_path / "m.onnx"
    onnx.save(made, path)
    with pytest.raises(RefusedError, match=message):
        write_onnx(path, tmp_path / "out.onnx", changes, "m")
    assert files_in(tmp_path) == ["m.onnx"]


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = external(tmp_path / "a")
    (tmp_path / "b").mkdir()

    def fail(*_: object) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(with_onnx.Edits, "write", fail)
    with pytest.raises(RuntimeError):
        write_onnx(source, tmp_path / "b" / "fixed.onnx", new("bn1"), "debias")
    assert files_in(tmp_path / "b") == []


def test_a_failure_after_the_data_was_placed_takes_it_away_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = external(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "weights").mkdir()
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target.name == "fixed.onnx":
            raise RuntimeError("no")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RuntimeError):
        write_onnx(source, tmp_path / "b" / "fixed.onnx", new("bn1"), "debias")
    assert files_in(tmp_path / "b") == ["weights"]
