"""`fold` on what torch makes: a live module, a pickled one, weights with an architecture, .pt2, and the way to ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normdoctor as nd
from normdoctor.errors import RefusedError, UsageError
from normdoctor.flow.plan import FoldPlan, NewInput
from normdoctor.folding.records import ProofState

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.bn3, self.fc = nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(self.bn3(x).mean((2, 3)))
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A trained-looking net in eval mode, whose class can be imported as fold_nets.Net."""
    import sys

    (tmp_path / "fold_nets.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("fold_nets", None)
    import fold_nets  # type: ignore[import-not-found]

    torch.manual_seed(0)
    made: nn.Module = fold_nets.Net()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return made.eval()


SHAPE = "1,3,12,12"


def folded_of(net: nn.Module, form: str, **options: Any) -> nd.Folding:
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    if form == "live":
        return nd.fold(net, x, **options)
    if form == "module":
        torch.save(net, "net.pt")
        return nd.fold("net.pt", trust=True, input_shape=SHAPE, **options)
    if form == "arch":
        torch.save(net.state_dict(), "weights.pt")
        return nd.fold("weights.pt", arch="fold_nets:Net", arch_args={"classes": 5}, input_shape=SHAPE, **options)
    if form == "pt2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(torch.export.export(net, (x,)), "net.pt2")
        return nd.fold("net.pt2", **options)
    torch.save(net, "net.pt")
    return nd.fold("net.pt", trust=True, input_shape=SHAPE, export="onnx", **options)


@pytest.mark.parametrize("form", ["live", "module", "arch", "pt2", "onnx"])
def test_every_form_folds_the_same_and_is_proven(net: nn.Module, form: str) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = folded_of(net, form)
    report = result.report
    assert [(row.norm.rpartition("/")[2], row.verdict) for row in report.rows] == [
        ("bn1", "folded backward"),
        ("bn2", "folded backward"),
        ("bn3", "folded forward"),
    ]
    assert report.rows[2].into == ("fc",) and report.rows[2].through == ("mean",)
    assert report.proof.state is ProofState.VERIFIED
    assert report.proof.error is not None and 0 < report.proof.error < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    names = {"module": "net.folded.pt", "arch": "weights.folded.pt", "pt2": "net.folded.pt2", "onnx": "net.onnx"}
    assert result.path == (Path(names[form]) if form in names else None)
    x = torch.randn(2, 3, 12, 12)
    if form in ("live", "module", "arch"):
        module = result.module if form == "live" else torch.load(names[form], weights_only=False)
        assert not [inner for inner in module.modules() if isinstance(inner, nn.BatchNorm2d)]
        torch.testing.assert_close(module(x), net(x), rtol=1e-4, atol=1e-4)
        assert form == "live" or result.module is None
    if form == "pt2":
        torch.testing.assert_close(torch.export.load(names[form]).module()(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["live", "module", "pt2", "onnx"])
def test_a_wrong_fold_is_found_in_every_form(net: nn.Module, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[[FoldPlan], Iterator[NewInput]] = FoldPlan.new_inputs

    def new_inputs(self: FoldPlan) -> Iterator[NewInput]:
        for new in original(self):
            yield replace(new, values=new.values + 0.01) if new.node.label == "conv2" else new

    monkeypatch.setattr(FoldPlan, "new_inputs", new_inputs)
    with pytest.raises(nd.VerificationError, match="bn2"):
        folded_of(net, form)
    assert not list(Path.cwd().glob("*folded*")) and not Path("net.onnx").exists()


def test_only_the_state_dict(net: nn.Module) -> None:
    result = folded_of(net, "module", state_dict=True)
    assert result.path is not None
    state = torch.load(result.path, weights_only=True)
    assert "conv1.bias" in state and "bn1.weight" not in state


def test_a_live_module_can_be_written_too(net: nn.Module) -> None:
    result = folded_of(net, "live", output="mine.pt")
    assert result.path == Path("mine.pt") and result.path.is_file()
    assert isinstance(result.module, nn.Module)


def test_what_torch_would_execute_needs_trust(net: nn.Module) -> None:
    torch.save(net, "net.pt")
    with pytest.raises(RefusedError, match=r"fold_nets\.Net") as caught:
        nd.fold("net.pt", input_shape=SHAPE)
    assert "--trust" in caught.value.hint


def test_weights_alone_need_an_architecture(net: nn.Module) -> None:
    torch.save(net.state_dict(), "weights.pt")
    with pytest.raises(RefusedError, match="a flat dictionary cannot prove what feeds what"):
        nd.fold("weights.pt", input_shape=SHAPE)
    with pytest.raises(UsageError, match="shapes of its inputs"):
        nd.fold("weights.pt", arch="fold_nets:Net")


def test_a_live_module_needs_a_place_for_files(net: nn.Module) -> None:
    with pytest.raises(UsageError, match="needs a place to go"):
        nd.fold(net, torch.zeros(1, 3, 12, 12), export="onnx")
    with pytest.raises(UsageError, match="are for files"):
        nd.fold(net, torch.zeros(1, 3, 12, 12), key="ema")
