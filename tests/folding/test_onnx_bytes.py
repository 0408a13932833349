"""A folded ONNX file keeps every byte that the fold has nothing to do with; and it is written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx import helper as h

import normdoctor as nd
from normdoctor.errors import InputError
from normdoctor.flow.graph import Node
from normdoctor.flow.plan import FoldPlan, NewInput, plan_folds
from normdoctor.folding import onnx_layout, onnx_writing
from normdoctor.folding.onnx_writing import Written, write_folded
from normdoctor.readers.onnx_flow import open_flow

FLOAT = TensorProto.FLOAT


def tensor(name: str, *shape: int, seed: int = 0) -> TensorProto:
    return numpy_helper.from_array(np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32), name)


def value(name: str, shape: Any) -> Any:
    return h.make_tensor_value_info(name, FLOAT, shape)


def net(channels: int = 6) -> onnx.ModelProto:
    """conv, norm, and around them all that a model can carry besides."""
    leaves = ("weight", "bias", "running_mean", "running_var")
    nodes = [
        h.make_node("Conv", ["x", "conv.weight"], ["c"], name="the conv", doc_string="why"),
        h.make_node("BatchNormalization", ["c", *(f"bn.{leaf}" for leaf in leaves)], ["n"], name="the norm"),
        h.make_node("Relu", ["n"], ["r"], name="the relu"),
        h.make_node("Mystery", ["r", "other"], ["y"], domain="their.domain", secret=[1, 2, 3]),
    ]
    nodes[0].metadata_props.add(key="module", value="net.conv")
    stored = [tensor("conv.weight", channels, 4, 3, 3), *(tensor(f"bn.{leaf}", channels) for leaf in leaves)]
    unused = tensor("never used", 5)
    other = tensor("other", 3)
    other.doc_string = "not ours"
    graph = h.make_graph(
        nodes,
        "graph name",
        [value("x", ("batch", 4, 9, 9))],
        [value("y", ("batch", channels, 7, 7))],
        [*stored, other, unused],
        doc_string="of the graph",
        value_info=[value(name, ("batch", channels, 7, 7)) for name in ("c", "n", "r")],
    )
    made = h.make_model(
        graph,
        opset_imports=[h.make_opsetid("", 17), h.make_opsetid("their.domain", 4)],
        ir_version=8,
        producer_name="somebody",
        producer_version="1.2",
        model_version=77,
        doc_string="of the model",
    )
    h.set_model_props(made, {"author": "me", "stride": "32"})
    return made


def written(path: Path, out: Path, **options: Any) -> Written:
    with open_flow(path) as flow:
        return write_folded(flow, plan_folds(flow.graph, **options), out)


@pytest.fixture
def fold(tmp_path: Path) -> Callable[..., onnx.ModelProto]:
    def fold_(made: onnx.ModelProto, **save: Any) -> onnx.ModelProto:
        onnx.save(made, tmp_path / "model.onnx", **save)
        written(tmp_path / "model.onnx", tmp_path / "folded.onnx")
        return onnx.load(tmp_path / "folded.onnx", load_external_data=False)

    return fold_


def test_what_has_nothing_to_do_with_the_fold_stays(fold: Callable[..., onnx.ModelProto]) -> None:
    before, after = net(), fold(net())
    for name in ("ir_version", "producer_name", "producer_version", "model_version", "doc_string"):
        assert getattr(after, name) == getattr(before, name)
    assert after.opset_import == before.opset_import and after.metadata_props == before.metadata_props
    assert after.graph.input == before.graph.input and after.graph.output == before.graph.output
    assert (after.graph.name, after.graph.doc_string) == ("graph name", "of the graph")
    kept = {t.name: t for t in after.graph.initializer}
    for stored in before.graph.initializer:
        if stored.name in ("other", "never used"):
            assert kept[stored.name] == stored
    conv, relu, mystery = after.graph.node
    assert (conv.name, conv.doc_string, conv.metadata_props) == (
        "the conv", "why", before.graph.node[0].metadata_props
    )  # fmt: skip
    assert list(conv.input) == ["x", "conv.weight", "conv.bias"]
    assert mystery == before.graph.node[3] and list(relu.input) == ["c"] and list(relu.output) == ["r"]
    # The value that is gone has left nothing behind.
    assert [info.name for info in after.graph.value_info] == ["c", "r"]
    assert set(kept) == {"conv.weight", "conv.bias", "other", "never used"}


def test_fields_that_nobody_knows_survive(tmp_path: Path) -> None:
    """Unknown fields of a later ONNX, at the top and inside a node that changes."""
    path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    unknown = b"\xc2\x3e\x05later"  # field 1000, five bytes
    path.write_bytes(net().SerializeToString() + unknown)
    written(path, out)
    assert out.read_bytes().endswith(unknown)


def test_a_plan_that_changes_nothing_gives_the_same_bytes(tmp_path: Path) -> None:
    made = net()
    del made.graph.node[1]
    made.graph.node[1].input[0] = "c"
    path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    onnx.save(made, path)
    counts = written(path, out)
    assert out.read_bytes() == path.read_bytes()
    assert counts.nodes == (3, 3)


def test_nodes_and_bytes_are_counted(tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    onnx.save(net(), path)
    counts = written(path, out)
    assert counts.nodes == (4, 3)
    assert counts.stored == (path.stat().st_size, out.stat().st_size) and counts.files == (out,)


def test_an_unchanged_model_takes_its_data_along_to_another_folder(tmp_path: Path) -> None:
    made = net()
    del made.graph.node[1]
    made.graph.node[1].input[0] = "c"
    (tmp_path / "there").mkdir()
    onnx.save(made, tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    counts = written(tmp_path / "model.onnx", tmp_path / "there" / "folded.onnx")
    assert (tmp_path / "there" / "w.bin").read_bytes() == (tmp_path / "w.bin").read_bytes()
    assert [path.name for path in counts.files] == ["folded.onnx", "w.bin"]


def test_tensors_that_share_external_bytes_go_on_sharing_them(tmp_path: Path) -> None:
    made = net(64)
    path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    made.graph.initializer.append(tensor("big", 64, 64))
    made.graph.initializer.append(tensor("same", 64, 64))
    onnx.save(made, path, save_as_external_data=True, location="w.bin", size_threshold=1024)
    loose = onnx.load(path, load_external_data=False)
    by_name = {t.name: t for t in loose.graph.initializer}
    del by_name["same"].external_data[:]
    by_name["same"].external_data.extend(by_name["big"].external_data)
    onnx.save(loose, path)
    written(path, out)
    after = {t.name: t for t in onnx.load(out, load_external_data=False).graph.initializer}
    assert after["same"].external_data == after["big"].external_data
    assert after["big"].external_data != by_name["big"].external_data
    loaded = {t.name: t for t in onnx.load(out).graph.initializer}
    assert (numpy_helper.to_array(loaded["same"]) == numpy_helper.to_array(tensor("big", 64, 64))).all()


def test_data_is_external_also_where_every_external_tensor_changes(tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    onnx.save(net(64), path, save_as_external_data=True, location="w.bin", size_threshold=1024)
    written(path, out)
    after = onnx.load(out, load_external_data=False).graph.initializer
    assert {t.name for t in after if t.data_location == TensorProto.EXTERNAL} == {"conv.weight"}


def test_a_model_too_large_for_one_message_gets_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    made = net(64)
    made.graph.initializer.append(tensor("large", 64, 64))
    onnx.save(made, path)
    written(path, out)
    small = onnx.load(out)
    monkeypatch.setattr(onnx_layout, "LIMIT", 4000)
    written(path, tmp_path / "external.onnx")
    large = onnx.load(tmp_path / "external.onnx", load_external_data=False)
    moved = {t.name for t in large.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert moved == {"conv.weight", "large"}
    loaded = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "external.onnx").graph.initializer}
    for stored in small.graph.initializer:
        assert (loaded[stored.name] == numpy_helper.to_array(stored)).all()


@pytest.mark.parametrize("external", [False, True])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, external: bool) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    save = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0} if external else {}
    onnx.save(net(64), path, **save)
    out.write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())

    class Broken(FoldPlan):
        def new_inputs(self):  # type: ignore[no-untyped-def]
            yield next(iter(super().new_inputs()))
            raise InputError("the disk is gone")

    with open_flow(path) as flow:
        plan = plan_folds(flow.graph)
        broken = Broken(**{name: getattr(plan, name) for name in plan.__dataclass_fields__})
        with pytest.raises(InputError, match="gone"):
            write_folded(flow, broken, out)
    assert sorted(tmp_path.iterdir()) == before and out.read_bytes() == b"precious"


def test_the_data_file_of_the_input_is_never_written_to(tmp_path: Path) -> None:
    """The input's data has the very name that the output's would get."""
    path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    onnx.save(net(64), path, save_as_external_data=True, location="folded.onnx.data", size_threshold=0)
    before = (tmp_path / "folded.onnx.data").read_bytes()
    counts = written(path, out)
    assert (tmp_path / "folded.onnx.data").read_bytes() == before
    assert counts.files[1].name == "folded.onnx.2.data"


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(net(64), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InputError, match=r"w\.bin"):
        written(path, tmp_path / "folded.onnx")


def test_an_attribute_that_is_there_is_replaced_and_one_that_is_not_is_added(tmp_path: Path) -> None:
    """A hand-made plan: beta of one Gemm that has it and of one that has not."""
    gemms = [
        h.make_node("Gemm", ["x", "w", "b"], ["m"], beta=3.0, alpha=2.0, transB=1),
        h.make_node("Gemm", ["m", "w", "b"], ["y"], transB=1),
    ]
    graph = h.make_graph(gemms, "g", [value("x", (2, 4))], [value("y", (2, 4))], [tensor("w", 4, 4), tensor("b", 4)])
    path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)

    class ByHand(FoldPlan):
        changes_nothing = False  # type: ignore[assignment]

        def new_inputs(self):  # type: ignore[no-untyped-def]
            for node in self.graph.nodes:
                yield NewInput(node, 2, np.full(4, 9.0), "float32", copied=True)

    with open_flow(path) as flow:
        nodes: list[Node] = list(flow.graph.nodes)
        write_folded(flow, ByHand(flow.graph, attributes={node: {"beta": 0.5} for node in nodes}), out)
    after = onnx.load(out)
    for node in after.graph.node:
        assert {a.name: h.get_attribute_value(a) for a in node.attribute}["beta"] == 0.5
    assert {a.name for a in after.graph.node[0].attribute} == {"beta", "alpha", "transB"}
    assert sorted(t.name for t in after.graph.initializer) == ["b", "b_2", "w"]
    onnx.checker.check_model(after, full_check=True)


def test_weights_that_wait_in_a_file_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(net(64), path)
    written(path, tmp_path / "held.onnx")
    monkeypatch.setattr(onnx_writing, "HELD", 0)
    written(path, tmp_path / "spooled.onnx")
    assert (tmp_path / "held.onnx").read_bytes() == (tmp_path / "spooled.onnx").read_bytes()


def test_a_file_that_grows_says_why(tmp_path: Path) -> None:
    """Weights that ConstantOfShape makes when the model runs are stored once they are folded into."""
    weight = h.make_node("ConstantOfShape", ["shape"], ["w"], value=h.make_tensor("v", TensorProto.FLOAT, [1], [0.5]))
    nodes = [weight, h.make_node("Conv", ["x", "w"], ["c"]), h.make_node("BatchNormalization", ["c", *"gbmv"], ["y"])]
    numbers = {"g": np.ones(64), "b": np.ones(64), "m": np.ones(64), "v": np.ones(64)}
    stored = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in numbers.items()]
    stored.append(numpy_helper.from_array(np.array([64, 64, 3, 3]), "shape"))
    x = h.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 5, 5])
    y = h.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64, 3, 3])
    graph = h.make_graph(nodes, "g", [x], [y], stored)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    report = nd.fold(tmp_path / "m.onnx").report
    assert report.folded == 1 and any("the file grows" in note for note in report.notes)
