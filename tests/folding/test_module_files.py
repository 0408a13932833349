"""Modules in files: whole, or built by --arch; written whole, as a state_dict, or to ONNX."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normdoctor as nd

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, image, scale=None):
        x = self.norm(self.conv(image)).relu().mean((2, 3))
        x = x if scale is None else x * scale
        return {"logits": self.head(x), "features": (x,)}

class Plain(Net):
    def forward(self, image):
        found = super().forward(image)
        return found["logits"], found["features"][0]

class ByValue(Net):
    def forward(self, image):
        return super().forward(image) if image.sum() > 0 else image

class Unpicklable(Net):
    def __init__(self):
        super().__init__()
        self.function = lambda x: x
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the code of the net, its module and its weights."""
    (tmp_path / "foldnets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import foldnets

    torch.manual_seed(0)
    net = foldnets.Net()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    torch.save(net.eval(), tmp_path / "module.pt")
    torch.save(net.train(), tmp_path / "training.pt")
    torch.save({"model": net, "optimizer": {"state": {}}}, tmp_path / "checkpoint.pt")
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = foldnets.Plain()
        plain.load_state_dict(net.state_dict())
        script = torch.jit.trace(plain.eval(), torch.randn(1, 3, 8, 8))
        torch.jit.save(script, tmp_path / "script.pt")
    yield tmp_path
    sys.modules.pop("foldnets", None)


def outputs(module: Any, **inputs: Any) -> Any:
    with torch.no_grad():
        return module.eval()(torch.ones(3, 3, 8, 8), **inputs)["logits"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("module.pt", {"trust": True}),
        ("weights.pt", {"arch": "foldnets:Net"}),
        ("training.pt", {"trust": True, "eval": True}),
        ("checkpoint.pt", {"trust": True, "eval": True}),
    ],
)
def test_the_output_is_a_whole_module(here: Path, name: str, options: dict[str, Any]) -> None:
    before = (here / name).read_bytes()
    folding = nd.fold(here / name, input_shape="1,3,8,8", **options)
    assert folding.path == here / f"{Path(name).stem}.folded.pt" and folding.report.folded == 1
    assert folding.report.proof.state.value == "verified"
    module = torch.load(folding.path, weights_only=False)
    assert isinstance(module.norm, torch.nn.Identity) and module.conv.bias is not None
    torch.testing.assert_close(outputs(module), outputs(torch.load(here / "module.pt", weights_only=False)))
    assert (here / name).read_bytes() == before
    dropped = [note for note in folding.report.notes if "optimizer" in note]
    assert bool(dropped) == (name == "checkpoint.pt")


def test_training_mode_is_no_inference(here: Path) -> None:
    folding = nd.fold(here / "training.pt", trust=True, input_shape="1,3,8,8")
    assert [row.code for row in folding.report.rows] == ["training-mode"]
    assert folding.path is not None and folding.path.read_bytes() == (here / "training.pt").read_bytes()


def test_a_state_dict_of_the_folded_module(here: Path) -> None:
    folding = nd.fold(here / "weights.pt", arch="foldnets:Net", input_shape="1,3,8,8", state_dict=True)
    state = torch.load(folding.path, weights_only=True)
    assert set(state) == {"conv.weight", "conv.bias", "head.weight", "head.bias"}


def test_what_cannot_be_pickled(here: Path) -> None:
    options: dict[str, Any] = {"arch": "foldnets:Unpicklable", "input_shape": "1,3,8,8"}
    with pytest.raises(nd.RefusedError, match=r"torch\.save cannot write it") as caught:
        nd.fold(here / "weights.pt", **options)
    assert "--state-dict" in caught.value.hint and not list(here.glob("*.folded*"))
    assert nd.fold(here / "weights.pt", **options, state_dict=True).path is not None


def test_code_that_decides_by_values(here: Path) -> None:
    with pytest.raises(nd.InputError, match="cannot follow its code") as caught:
        nd.fold(here / "weights.pt", arch="foldnets:ByValue", input_shape="1,3,8,8")
    assert "torch.jit.script" in caught.value.hint
    assert "\n" not in caught.value.message and not list(here.glob("*.folded*"))


def run_onnx(path: Path, **inputs: Any) -> list[Any]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    return list(onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("module.pt", {"trust": True}),
        ("weights.pt", {"arch": "foldnets:Net", "opset": 13}),
        ("script.pt", {}),
    ],
)
def test_to_onnx(here: Path, name: str, options: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    import onnx

    output = here / "out.onnx"
    folding = nd.fold(here / name, export="onnx", output=output, input_shape="1,3,8,8", **options)
    assert folding.report.folded == 1 and folding.report.proof.state.value == "verified"
    graph = onnx.load(output).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert [value.name for value in graph.input] == ["image"]
    outputs = ["output_0", "output_1"] if name == "script.pt" else ["logits", "features_0"]
    assert [value.name for value in graph.output] == outputs
    images = torch.randn(4, 3, 8, 8)
    expected = torch.load(here / "module.pt", weights_only=False)(images)["logits"].detach()
    np.testing.assert_allclose(run_onnx(output, image=images.numpy())[0], expected, rtol=1e-4, atol=1e-5)
    printed = capfd.readouterr()
    assert not printed.out and not printed.err


def test_to_onnx_for_one_batch_size(here: Path) -> None:
    import onnx

    shapes = ["image=2,3,8,8", "scale=2,8"]
    folding = nd.fold(here / "module.pt", trust=True, export="onnx", static=True, input_shape=shapes)
    assert folding.path == here / "module.onnx"
    inputs = onnx.load(folding.path).graph.input
    lengths = [[axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in inputs]
    assert lengths == [[2, 3, 8, 8], [2, 8]] and [value.name for value in inputs] == ["image", "scale"]


def test_a_live_module_to_onnx(here: Path) -> None:
    module = torch.load(here / "training.pt", weights_only=False)
    folding = nd.fold(module, (torch.randn(2, 3, 8, 8),), export="onnx", output=here / "live.onnx")
    assert folding.report.folded == 1 and module.training and module.norm.training


@pytest.mark.parametrize("opset", [99])
def test_an_opset_that_nothing_writes(here: Path, opset: int) -> None:
    program = torch.export.export(torch.load(here / "module.pt", weights_only=False).eval(), (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, here / "program.pt2")
    with pytest.raises(nd.UsageError, match=f"--opset {opset}: the"):
        nd.fold(here / "program.pt2", export="onnx", opset=opset)


def test_a_program_to_onnx_with_its_weights_beside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normdoctor.exporting import with_torch

    monkeypatch.setattr(with_torch, "INLINE_BYTES", 0)
    module = torch.load(here / "module.pt", weights_only=False)
    images = torch.randn(2, 3, 8, 8)
    torch.export.save(torch.export.export(module, (images,)), here / "program.pt2")
    folding = nd.fold(here / "program.pt2", export="onnx", output=here / "out.onnx")
    assert folding.report.folded == 1 and folding.report.proof.state.value == "verified"
    found = run_onnx(here / "out.onnx", image=images.numpy())[0]
    np.testing.assert_allclose(found, module(images)["logits"].detach(), rtol=1e-4, atol=1e-5)


BRANCHY = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)

class Above2(Base):
    def forward(self, x):
        x = self.norm(self.conv(x))
        return x * 2 if x.shape[0] > 2 else x

class Above1(Base):
    def forward(self, x):
        x = self.norm(self.conv(x))
        return x * 2 if x.shape[0] > 1 else x

class Rate(Base):
    def forward(self, x, sr: int):
        if sr != 16000:
            raise ValueError("only at 16000")
        return self.norm(self.conv(x))
"""


@pytest.fixture
def branchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "branchnets.py").write_text(BRANCHY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import branchnets

    yield branchnets
    sys.modules.pop("branchnets", None)


def first_axes(path: Path) -> list[int | str]:
    """The length of the first axis of every input and output, or its name."""
    import onnx

    graph = onnx.load(path).graph
    axes = [value.type.tensor_type.shape.dim[0] for value in (*graph.input, *graph.output)]
    return [axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in axes]


@pytest.mark.parametrize(
    ("name", "batch", "axes", "notes"),
    [
        ("Above2", 2, [2, 2], ["exported for a batch of 2 alone: the code decides by it"]),
        ("Above2", 1, [1, 1], ["exported for a batch of 1 alone: the code decides by it"]),
        ("Above2", 5, ["free", "free"], ["exported for a batch of at least 3: the code decides by it"]),
        ("Above1", 1, [1, 1], ["exported for a batch of 1 alone: the code decides by it"]),
        ("Above1", 4, ["free", "free"], ["exported for a batch of at least 2: the code decides by it"]),
    ],
)
def test_code_that_decides_by_the_batch(
    branchy: Any, name: str, batch: int, axes: list[Any], notes: list[str], tmp_path: Path
) -> None:
    net = getattr(branchy, name)()
    output = tmp_path / "out.onnx"
    images = torch.randn(batch, 3, 8, 8)
    folding = nd.fold(net, (images,), export="onnx", output=output)
    assert [axis if isinstance(axis, int) else "free" for axis in first_axes(output)] == axes
    assert [note for note in folding.report.notes if "batch" in note] == notes
    expected = net.eval()(images).detach()
    np.testing.assert_allclose(run_onnx(output, x=images.numpy())[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("opset", [None, 17])
def test_a_program_keeps_its_batch_axis(branchy: Any, free: bool, opset: int | None, tmp_path: Path) -> None:
    import onnx

    net = torch.nn.Sequential(*branchy.Base().children()).eval()
    images = torch.randn(2, 3, 8, 8)
    shapes = {"input": {0: torch.export.Dim("batch")}} if free else None
    torch.export.save(torch.export.export(net, (images,), dynamic_shapes=shapes), tmp_path / "program.pt2")
    output = tmp_path / "out.onnx"
    folding = nd.fold(tmp_path / "program.pt2", export="onnx", opset=opset, output=output)
    assert folding.report.folded == 1 and folding.report.proof.state.value == "verified"
    assert onnx.load(output).opset_import[0].version == (opset or 20)
    assert all(isinstance(axis, str) is free for axis in first_axes(output))
    notes = [note for note in folding.report.notes if "batch" in note]
    assert notes == ([] if free else ["exported for a batch of 2 alone: so was the program"])


def test_data_alone_says_the_shapes(branchy: Any, here: Path) -> None:
    np.savez(here / "both.npz", image=np.ones((2, 3, 8, 8)), scale=np.ones((2, 8)))
    folding = nd.fold(here / "weights.pt", arch="foldnets:Net", data=here / "both.npz")
    assert folding.report.proof.state.value == "verified" and "both.npz" in folding.report.proof.inputs
    np.save(here / "one.npy", np.ones((3, 3, 8, 8), np.float32))
    folding = nd.fold(here / "script.pt", data=here / "one.npy", export="onnx", output=here / "out.onnx")
    assert folding.report.folded == 1 and folding.report.proof.state.value == "verified"
    for shapes, words in (["image=1,3,8,8"], "image is 2x3x8x8"), (["picture=1,3"], "picture is not there"):
        with pytest.raises(nd.UsageError, match=words):
            nd.fold(here / "module.pt", trust=True, data=here / "both.npz", input_shape=shapes)
    np.savez(here / "odd.npz", imag=np.ones((2, 3, 8, 8)))
    with pytest.raises(nd.UsageError, match="takes no imag") as caught:
        nd.fold(here / "module.pt", trust=True, data=here / "odd.npz")
    assert "image" in caught.value.hint


def test_the_values_of_data_count(branchy: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(branchy.Rate().eval()), tmp_path / "rate.pt")
    np.savez(tmp_path / "good.npz", x=np.ones((1, 3, 8, 8), np.float32), sr=np.array(16000))
    np.savez(tmp_path / "bad.npz", x=np.ones((1, 3, 8, 8), np.float32), sr=np.array(1))
    folding = nd.fold(tmp_path / "rate.pt", data=tmp_path / "good.npz")
    assert folding.report.folded == 1 and folding.report.proof.state.value == "verified"
    with pytest.raises(nd.NormDoctorError, match=r"only at 16000") as caught:
        nd.fold(tmp_path / "rate.pt", data=tmp_path / "bad.npz", export="onnx", output=tmp_path / "out.onnx")
    assert "TorchScript interpreter" not in caught.value.message and "x 1x3x8x8" in caught.value.message
