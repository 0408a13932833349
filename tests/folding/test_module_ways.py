"""Modules whose code takes another way for other shapes or arguments: the proof must see it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import normdoctor as nd
from normdoctor.errors import VerificationError
from normdoctor.folding import module_ways
from normdoctor.folding.module_ways import variants_of
from normdoctor.models.loaded import example_of
from normdoctor.models.with_torch import take

CODE = """
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.big = nn.Conv2d(3, 4, 3)
        self.small = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.5, 2)
        self.eval()

class BySize(Net):
    def forward(self, x):
        conv = self.big if x.shape[-1] >= 16 else self.small
        return self.bn(conv(x))

class BySquare(Net):
    def forward(self, x):
        assert x.shape[-1] == x.shape[-2]
        conv = self.big if x.shape[-1] >= 16 else self.small
        return self.bn(conv(x))

class ByArgument(Net):
    def forward(self, x, skip=False):
        y = self.small(x)
        return y if skip else self.bn(y)

class ByBatch(Net):
    def forward(self, x):
        return self.bn(self.big(x)).abs() if x.shape[0] > 2 else self.bn(self.small(x))

class Padded(Net):
    def forward(self, x, relu: bool = False):
        if x.shape[-2] % 2:
            x = functional.pad(x, (0, 0, 0, 1))
        y = self.bn(self.small(x))
        return y.relu() if relu else y

class Plain(Net):
    def forward(self, x):
        return self.bn(self.small(x)) + self.big(x).mean()
"""

WAYS = {
    "BySize": ("x 2x3x8x16", "bn"),
    "BySquare": ("x 2x3x16x16", "bn"),
    "ByArgument": ("with skip=True", "bn"),
    "ByBatch": ("x 3x3x8x8", "bn"),
}


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "waynets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import waynets

    torch.manual_seed(0)
    yield waynets
    sys.modules.pop("waynets", None)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", WAYS)
def test_another_way_fails_with_nothing_written(name: str, nets: Any, tmp_path: Path) -> None:
    torch.save(getattr(nets, name)(), tmp_path / "net.pt")
    before = {*tmp_path.glob("*.*"), *tmp_path.glob(".*")}
    with pytest.raises(VerificationError) as raised:
        nd.fold("net.pt", trust=True, input_shape="1,3,8,8")
    words, norm = WAYS[name]
    proof = raised.value.report.proof
    assert words in proof.reason and "takes another way" in proof.reason and proof.first_norm == norm
    assert "--export onnx" in raised.value.hint and "report it" not in raised.value.hint
    assert {*tmp_path.glob("*.*"), *tmp_path.glob(".*")} == before


@pytest.mark.parametrize("name", WAYS)
def test_a_live_module_too(name: str, nets: Any) -> None:
    with pytest.raises(VerificationError, match="takes another way"):
        nd.fold(getattr(nets, name)(), (IMAGES,))


def test_its_export_is_folded(nets: Any, tmp_path: Path) -> None:
    folding = nd.fold(nets.BySize(), (IMAGES,), export="onnx", output=tmp_path / "net.onnx", static=True)
    assert folding.report.folded == 1 and folding.report.proof.state.value == "verified"


def test_a_harmless_way_is_folded(nets: Any) -> None:
    report = nd.fold(nets.Padded(), (IMAGES,)).report
    assert report.folded == 1 and report.proof.state.value == "verified"
    assert re.search(r" and 9 other shapes and 1 other argument$", report.proof.inputs)
    note = "never called with these inputs, so no run has seen them: big"
    assert note in report.notes


def test_what_the_original_does_not_take_is_left_out() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.body(x.reshape(2, 8)))

    report = nd.fold(Fixed().eval(), (torch.ones(2, 8),)).report
    assert report.proof.state.value == "verified" and report.proof.inputs == "the example inputs given"
    assert "traced for one batch size" in report.notes


def test_time_ends_it(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_ways, "SECONDS", -1.0)
    assert nd.fold(nets.BySize(), (IMAGES,)).report.proof.inputs == "the example inputs given"


def test_what_is_tried() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, ids: Tensor, *, flag: bool = True, given: bool = False) -> Tensor:
            return image

    example = example_of({"image": torch.ones(2, 3, 1, 4), "ids": torch.ones(2, 5, dtype=torch.int64), "given": True})
    found = [variant.words.removeprefix("for inputs ") for variant in variants_of(take(Two()), example)]
    assert found == [
        "image 1x3x1x4, ids 1x5",
        "image 2x3x1x2, ids 2x5",
        "image 2x3x1x2, ids 2x5",
        "with flag=False",
        "image 3x3x1x4, ids 3x5",
        "image 5x3x1x4, ids 5x5",
        "image 2x3x2x4, ids 2x5",
        "image 2x3x1x8, ids 2x5",
        "image 2x3x2x8, ids 2x5",
    ]


def test_only_modules_that_nobody_sees_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.by_hand = nn.Conv2d(4, 4, 1)  # its weight is used, it is never called
            self.row = nn.ModuleList([nn.Conv2d(4, 4, 1)])
            self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
            self.empty = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = functional.conv2d(self.norm(self.conv(x)), self.by_hand.weight)
            return self.row[0](x)

    notes = nd.fold(Net().eval(), (IMAGES,)).report.notes
    assert [note for note in notes if "never called" in note] == [
        "never called with these inputs, so no run has seen them: head"
    ]


def test_nothing_is_said_of_a_plain_net(nets: Any) -> None:
    report = nd.fold(nets.Plain(), (IMAGES,)).report
    assert report.proof.state.value == "verified" and report.notes == ()
