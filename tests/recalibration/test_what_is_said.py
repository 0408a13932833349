"""What a repair says beside its numbers: doubts, graphs that ignore their buffers, files with nothing to repair."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import normdoctor as nd

IMAGES = torch.zeros(2, 3, 8, 8)


def net(momentum: float = 0.001, updates: int = 216, scale: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16, momentum=momentum))
    with torch.no_grad():
        for _ in range(updates):
            made(torch.randn(8, 3, 8, 8) * scale)
    return made


def traced(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.trace(model, IMAGES, check_trace=False), path)


def exported(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model, (IMAGES,)), path)


def onnx(model: nn.Module, path: Path) -> None:
    torch.onnx.export(
        model, (IMAGES,), path, dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        opset_version=17,
    )  # fmt: skip


@pytest.mark.parametrize("write", [traced, exported, onnx])
@pytest.mark.parametrize("training", [True, False])
def test_graphs_recorded_in_training_mode(write: object, training: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of its older formats
        write(net().train(training), tmp_path / "m")  # type: ignore[operator]
    result = nd.recalibrate(tmp_path / "m", method="debias", updates=230, output=tmp_path / "out")
    said = [note for note in result.report.notes if "C301" in note]
    assert len(result.report.repairs) == 1
    words = "1 layer was recorded in training mode and uses the batch at hand, whatever the buffers hold"
    assert said == ([f"{words} (C301): export again in eval mode"] if training else [])


def test_a_module_in_training_mode_is_none() -> None:
    assert nd.recalibrate(net().train(), method="debias").report.notes == ()


def test_weak_evidence_is_said() -> None:
    """After update_bn over 30 batches, with the momentum set back: nothing initial is left in these buffers."""
    model = net(momentum=0.1, updates=30, scale=20.0)
    (note,) = nd.recalibrate(model, method="debias").report.notes
    assert note.startswith("in 1 of 1 layer the residue would be the smaller part of running_var")
    assert "update_bn" in note and "keep the original: compare the accuracy of both" in note


def test_an_output_of_minus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "m.pt")
    for output in ("-", Path("-")):
        with pytest.raises(nd.UsageError, match="a checkpoint is written to a file"):
            nd.recalibrate("m.pt", method="debias", output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_folded_files_say_so(tmp_path: Path) -> None:
    model = net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.freeze(torch.jit.script(model)), tmp_path / "frozen.pt")
        torch.onnx.export(model, (IMAGES,), tmp_path / "folded.onnx", dynamo=False)
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    torch.save(folded.state_dict(), tmp_path / "folded.pt")
    for name in ("frozen.pt", "folded.onnx", "folded.pt"):
        with pytest.raises(nd.RefusedError, match="the BatchNorms are gone or folded into other layers") as caught:
            nd.recalibrate(tmp_path / name, method="debias")
        assert "Repair the model that it was made from" in caught.value.hint
    torch.save(nn.LayerNorm(3).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(nd.RefusedError, match=r"no layer has running statistics$"):
        nd.recalibrate(tmp_path / "plain.pt", method="debias")


class TestStateDictInMemory:
    def test_is_repaired_in_place(self) -> None:
        model, whole = net(), net()
        state = model.state_dict()
        result = nd.recalibrate(state, method="debias", momentum=0.001)
        nd.recalibrate(whole, method="debias")
        assert result.module is state and result.path is None
        for name, tensor in whole.state_dict().items():
            assert torch.equal(state[name], tensor) and torch.equal(model.state_dict()[name], tensor)

    def test_nothing_is_assumed(self) -> None:
        with pytest.raises(nd.RefusedError, match="does not say its momentum"):
            nd.recalibrate(net().state_dict(), method="debias")

    def test_shared_memory_is_refused(self) -> None:
        state = dict(net().state_dict())
        state["other"] = state["1.running_var"]
        with pytest.raises(nd.RefusedError, match="shares its memory with other"):
            nd.recalibrate(state, method="debias", momentum=0.001)
        with pytest.raises(nd.UsageError, match="in place"):
            nd.recalibrate(state, method="debias", momentum=0.001, output="x.pt")
