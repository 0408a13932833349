"""`fold` as a whole: what is written and what is not, the proof, the record it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import normdoctor as nd
from normdoctor import folding
from normdoctor.errors import CannotRunError, InputError, MisfitError, UsageError
from normdoctor.flow.plan import FoldPlan, NewInput
from normdoctor.folding.records import ProofState
from normdoctor.models import with_onnx

from .conftest import chain

Break = Callable[..., None]


def outputs(path: Path, batch: int = 2) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(7).standard_normal((batch, 3, 8, 8)).astype(np.float32)
    return session.run(None, {"x": x})[0]


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture
def break_fold(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Makes every plan wrong at the weights of one node."""

    def broken(label: str, factor: float = 1.01) -> None:
        original = FoldPlan.new_inputs

        def new_inputs(self: FoldPlan) -> Iterator[NewInput]:
            for new in original(self):
                yield replace(new, values=new.values * factor) if new.node.label == label else new

        monkeypatch.setattr(FoldPlan, "new_inputs", new_inputs)

    return broken


def test_folds_and_proves(onnx_chain: Path) -> None:
    before = onnx_chain.read_bytes()
    result = nd.fold(onnx_chain)
    assert result.path == onnx_chain.with_name("model.folded.onnx") and result.module is None
    report = result.report
    assert report.counts["folded backward"] == report.folded == len(report.rows) == 4
    assert [row.norm for row in report.rows] == ["bn0", "bn1", "bn2", "bn3"]
    assert report.rows[1].into == ("conv1",)
    proof = report.proof
    assert proof.state is ProofState.VERIFIED and "graph optimisation off" in proof.engine
    [found] = proof.differences
    assert found.output == "y" and found.shape == (2, 4, 8, 8)
    assert 0 < found.error < 1e-5 and found.noise is not None and 0 < found.noise < 1e-5
    assert "BatchNormalization" not in operators(result.path)
    assert np.allclose(outputs(onnx_chain), outputs(result.path), atol=1e-4)
    assert onnx_chain.read_bytes() == before
    assert sorted(path.name for path in onnx_chain.parent.iterdir()) == ["model.folded.onnx", "model.onnx"]


def test_counts_are_those_of_the_files(onnx_chain: Path) -> None:
    result = nd.fold(onnx_chain)

    def stored(path: Path) -> int:
        return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)

    assert result.path is not None
    assert result.report.parameters == (stored(onnx_chain), stored(result.path))
    assert result.report.nodes == (len(operators(onnx_chain)), len(operators(result.path)))


def test_folding_twice_changes_nothing(onnx_chain: Path) -> None:
    first = nd.fold(onnx_chain).path
    assert first is not None
    second = nd.fold(first)
    assert second.path is not None and second.path.read_bytes() == first.read_bytes()
    assert second.report.unchanged and second.report.proof.state is ProofState.NOT_NEEDED


@pytest.mark.parametrize("label", ["conv0", "conv1", "conv3"])
def test_a_wrong_fold_is_found_and_its_norm_named(onnx_chain: Path, break_fold: Break, label: str) -> None:
    break_fold(label)
    with pytest.raises(nd.VerificationError) as caught:
        nd.fold(onnx_chain)
    norm = label.replace("conv", "bn")
    report = caught.value.report
    assert report.proof.state is ProofState.FAILED
    assert report.proof.first_norm == norm and norm in caught.value.message
    assert report.proof.differences[0].error > 1e-4
    assert report.output is None
    assert [path.name for path in onnx_chain.parent.iterdir()] == ["model.onnx"]


def test_a_failed_proof_leaves_an_older_output(onnx_chain: Path, break_fold: Break) -> None:
    target = onnx_chain.with_name("model.folded.onnx")
    target.write_bytes(b"older")
    break_fold("conv2")
    with pytest.raises(nd.VerificationError):
        nd.fold(onnx_chain, overwrite=True)
    assert target.read_bytes() == b"older"


def test_without_a_proof_a_wrong_fold_passes_and_that_is_said(onnx_chain: Path, break_fold: Break) -> None:
    break_fold("conv2")
    result = nd.fold(onnx_chain, verify=False)
    assert result.report.proof.state is ProofState.NOT_ASKED
    assert result.report.proof.reason == "--no-verify"


def test_small_mistakes_are_found_too(onnx_chain: Path, break_fold: Break) -> None:
    break_fold("conv3", 1 + 5e-4)
    with pytest.raises(nd.VerificationError, match="bn3"):
        nd.fold(onnx_chain)


def test_dry_run_writes_and_runs_nothing(onnx_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_onnx.OnnxModel, "run", None)
    existing = onnx_chain.with_name("model.folded.onnx")
    existing.write_bytes(b"mine")
    result = nd.fold(onnx_chain, dry_run=True)
    assert result.path is None and result.report.dry_run and result.report.folded == 4
    assert result.report.parameters[1] < result.report.parameters[0]
    assert existing.read_bytes() == b"mine"


def test_nothing_to_fold_is_a_copy(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
    )
    path = tmp_path / "plain.onnx"
    onnx.save(helper.make_model(graph), path)
    result = nd.fold(path)
    assert result.path is not None and result.path.read_bytes() == path.read_bytes()
    assert result.report.unchanged and result.report.rows == ()


def test_a_norm_that_stays_has_its_reason_unless_decomposed(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", 2, keep_last=True)
    result = nd.fold(path)
    last = result.report.rows[-1]
    assert last.norm == "last" and last.left and last.code and last.reason
    assert result.path is not None and operators(result.path).count("BatchNormalization") == 1
    taken = nd.fold(path, decompose=True, overwrite=True)
    assert taken.report.rows[-1].verdict == "decomposed" and taken.report.proof.state is ProofState.VERIFIED
    assert taken.path is not None and operators(taken.path)[-2:] == ["Mul", "Add"]


def test_weights_that_their_type_cannot_hold_stay_norms(tmp_path: Path) -> None:
    from onnx import numpy_helper

    path = chain(tmp_path / "m.onnx", 3)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).astype(np.float16)
        if tensor.name == "bn1.weight":
            values[:] = 30000
        if tensor.name == "conv1.weight":
            values *= np.float16(20)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, path)
    rows = {row.norm: row for row in nd.fold(path, verify=False).report.rows}
    assert rows["bn0"].verdict == rows["bn2"].verdict == "folded backward"
    assert rows["bn1"].code == "overflow" and "float16" in rows["bn1"].reason
    assert operators(tmp_path / "m.folded.onnx").count("BatchNormalization") == 1
    assert nd.fold(path, dry_run=True).report.rows[1].code == "overflow"


def test_channels_that_float16_could_not_hold_are_listed(tmp_path: Path) -> None:
    report = nd.fold(chain(tmp_path / "m.onnx", 1, scale=1e6)).report
    assert report.proof.state is ProofState.VERIFIED
    weight = report.overflows[0]
    assert weight.weight == "conv0" and weight.channels and weight.largest > 65504
    assert report.largest_gain is not None and report.largest_gain.gain > 1e5


def test_what_cannot_be_run_is_written_unverified(onnx_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, inputs: Any) -> Any:
        raise CannotRunError("no kernel for Foo")

    monkeypatch.setattr(with_onnx.OnnxModel, "run", run)
    result = nd.fold(onnx_chain)
    assert result.report.proof.state is ProofState.UNVERIFIED and result.report.proof.reason == "no kernel for Foo"
    assert result.path is not None and result.path.is_file()


def test_a_result_that_only_the_original_survives_is_a_failure(
    onnx_chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = with_onnx.OnnxModel.run

    def run(self: with_onnx.OnnxModel, inputs: Any) -> Any:
        if self.path != onnx_chain:
            raise CannotRunError("does not load")
        return original(self, inputs)

    monkeypatch.setattr(with_onnx.OnnxModel, "run", run)
    with pytest.raises(nd.VerificationError, match="cannot be run"):
        nd.fold(onnx_chain)


def test_data(onnx_chain: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(0).random((5, 3, 8, 8)))
    proof = nd.fold(onnx_chain, data=data).report.proof
    assert proof.inputs == str(data) and proof.differences[0].shape == (5, 4, 8, 8)
    np.savez(data, x=np.zeros((5, 4, 8, 8)))
    with pytest.raises(UsageError, match="x is 5 x 4 x 8 x 8"):
        nd.fold(onnx_chain, data=data, overwrite=True)


def test_the_seed_and_the_shape_are_the_callers(onnx_chain: Path) -> None:
    proof = nd.fold(onnx_chain, input_shape="7,3,8,8", seed=11).report.proof
    assert proof.differences[0].shape[0] == 7 and "seed 11" in proof.inputs


def test_shapes_that_no_layer_takes_are_the_callers_fault(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", 1)
    model = onnx.load(path)
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for name in ("n", "c", "h", "w"):
        model.graph.input[0].type.tensor_type.shape.dim.add().dim_param = name
    onnx.save(model, path)
    with pytest.raises(MisfitError):
        nd.fold(path, input_shape="1,5,8,8")
    assert nd.fold(path).report.proof.state is ProofState.UNVERIFIED
    assert nd.fold(path, input_shape="1,3,8,8", overwrite=True).report.proof.state is ProofState.VERIFIED


def test_nan_in_the_weights_of_a_norm_leaves_it(tmp_path: Path) -> None:
    from onnx import numpy_helper

    path = chain(tmp_path / "m.onnx", 2)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "bn0.running_var":
            tensor.CopyFrom(numpy_helper.from_array(np.full(4, np.nan, np.float32), tensor.name))
    onnx.save(model, path)
    report = nd.fold(path).report
    assert report.rows[0].left and report.rows[0].code == "not-finite"
    assert report.proof.state is ProofState.UNVERIFIED and "finite value" in report.proof.reason


def test_external_data_comes_along(onnx_chain: Path, tmp_path: Path) -> None:
    model = onnx.load(onnx_chain)
    source = tmp_path / "external.onnx"
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for target in (tmp_path / "out.onnx", elsewhere / "out.onnx"):
        result = nd.fold(source, output=target)
        assert result.report.proof.state is ProofState.VERIFIED
        assert np.allclose(outputs(source), outputs(target), atol=1e-4)
        assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]
    again = nd.fold(source, output=tmp_path / "out.onnx", overwrite=True)
    assert again.path is not None and np.allclose(outputs(source), outputs(again.path), atol=1e-4)
    # A file of the data's name that belongs to somebody else is not touched.
    taken = tmp_path / "new.onnx.data"
    taken.write_bytes(b"mine")
    nd.fold(source, output=tmp_path / "new.onnx")
    assert taken.read_bytes() == b"mine"
    assert np.allclose(outputs(source), outputs(tmp_path / "new.onnx"), atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"export": "onnx"}, "--export means nothing for an ONNX file"),
        ({"arch": "a:b"}, "--arch means nothing"),
        ({"key": "ema"}, "--key means nothing"),
        ({"state_dict": True}, "has no state_dict"),
        ({"arch_args": "{}"}, "--arch-args without --arch"),
        ({"opset": 18}, "--opset is for --export onnx"),
        ({"static": True}, "--static is for --export onnx"),
        ({"export": "onnx", "opset": 3}, "no such opset"),
        ({"export": "tflite"}, "no export to 'tflite'"),
        ({"output": "-"}, "a model is written to a file"),
        ({"input_shape": "a,b"}, "no list of lengths"),
        ({"input_shape": "y=1,3,8,8"}, "no input 'y'"),
        ({"input_shape": "1,3,9,8"}, "does not fit x"),
    ],
)
def test_options_that_make_no_sense(onnx_chain: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        nd.fold(onnx_chain, **options)
    assert caught.value.hint or "exclude" in message
    assert [path.name for path in onnx_chain.parent.iterdir()] == ["model.onnx"]


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot fold a dict"):
        nd.fold({"a": 1})
    with pytest.raises(InputError, match="no such file"):
        nd.fold(tmp_path / "none.onnx")
    assert folding.fold is nd.fold


def test_norms_saved_in_training_mode_fold_when_they_are_meant_for_inference(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", 2, keep_last=True)
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
            name = node.output[0]
            node.output.extend([f"{name}_mean", f"{name}_var"])
    onnx.save(model, path)
    left = nd.fold(path)
    assert [row.code for row in left.report.rows] == ["training-mode"] * 3 and left.report.unchanged
    result = nd.fold(path, eval=True, overwrite=True)
    assert [row.left for row in result.report.rows] == [False, False, True]
    assert result.report.proof.state is ProofState.VERIFIED
    assert result.path is not None
    [norm] = [node for node in onnx.load(result.path).graph.node if node.op_type == "BatchNormalization"]
    assert not [attribute for attribute in norm.attribute if attribute.name == "training_mode" and attribute.i]


def test_a_fold_through_half_precision_may_round_to_it(onnx_chain: Path) -> None:
    """Runtimes leave out the two casts around the norm and their rounding; around nothing they cannot."""
    model = onnx.load(onnx_chain)
    norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    place = list(model.graph.node).index(norm)
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.name in norm.input:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    model.graph.node.insert(place + 1, onnx.helper.make_node("Cast", ["wide"], [norm.output[0]], to=single))
    model.graph.node.insert(place, onnx.helper.make_node("Cast", [norm.input[0]], ["narrow"], to=half))
    norm.input[0], norm.output[0] = "narrow", "wide"
    onnx.save(model, onnx_chain)
    report = nd.fold(onnx_chain).report
    assert report.folded == 4 and report.proof.state is ProofState.VERIFIED
    assert 1e-4 < (report.proof.error or 0) < 0.01
