"""`inspect` from Python: what it takes, and that it leaves a live module alone."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import normdoctor as nd

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_one_word_or_several() -> None:
    path = FIXTURES / "slow_momentum_module.pt"
    one = nd.inspect(path, select="S", layer="bn1")
    assert {(f.code, f.layer) for f in one.findings} == {("S104", "bn1")}
    assert {f.layer for f in nd.inspect(path, select="S,A", layer=["bn1", "layer1.*"]).findings} == {
        "bn1",
        "layer1.0.bn1",
        "layer1.0.bn2",
    }


def test_a_live_module_stays_as_it_is(nets: ModuleType) -> None:
    net = torch.load(FIXTURES / "mixed_mode_module.pt", weights_only=False)
    modes = {name: module.training for name, module in net.named_modules()}
    tensors = {name: (tensor.clone(), tensor._version) for name, tensor in net.state_dict(keep_vars=True).items()}
    report = nd.inspect(net)
    stored = nd.inspect(FIXTURES / "mixed_mode_module.pt")
    assert {(f.code, f.layer) for f in report.findings} == {
        (f.code, f.layer) for f in stored.findings if f.code != "F901"
    }
    assert modes == {name: module.training for name, module in net.named_modules()}
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, tensors[name][0]) and tensor._version == tensors[name][1]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module_has_nothing_to_say_yet() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    assert nd.inspect(net).layers == ()


def test_reports_and_findings_print_in_a_line_each() -> None:
    report = nd.inspect(FIXTURES / "slow_momentum_module.pt", select="S104")
    lines = str(report).splitlines()
    assert len(lines) == 1 + 9
    assert lines[1].startswith("error S104 warmup-residue bn1: 81 % of")
    assert len(repr(report.findings[0])) < 300


def test_not_a_model() -> None:
    with pytest.raises(nd.InputError, match="cannot inspect a dict"):
        nd.inspect({"weight": 1})


def test_a_layer_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(nd.UsageError, match="no layer matches 'layer9"):
        nd.inspect(FIXTURES / "healthy.pt", layer="layer9.*")
    assert len(nd.inspect(FIXTURES / "healthy.pt", layer="layer1.*").layers) == 2
