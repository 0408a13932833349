"""Which layer is which: prefixes, other formats, other names, folded norms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normdoctor as nd
from normdoctor.compared import Matching, Motion
from normdoctor.comparing.ranks import rank_groups

from .conftest import Save, Training

FIXTURES = Path(__file__).parents[2] / "fixtures"
SAME_NET = (
    *("healthy.safetensors", "healthy.onnx", "healthy.pt2", "healthy_distributed", "healthy_external.onnx"),
    *("healthy_legacy.pth", "healthy_module.pt", "healthy_scripted.pt"),
)


@pytest.mark.parametrize("name", SAME_NET)
def test_the_same_network_in_every_format(name: str) -> None:
    report = nd.compare(FIXTURES / "healthy.pt", FIXTURES / name)
    comparison = report.comparison
    assert report.findings == () and comparison is not None
    assert len(comparison.layers) == 9 and not comparison.missing
    assert all(row.statistics is Motion.EQUAL and row.affine is Motion.EQUAL for row in comparison.layers)
    assert comparison.weights is not None and comparison.weights.motion is Motion.EQUAL
    assert comparison.weights.tensors == 11


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "backbone.", "ema_model.net."])
def test_prefixes(training: Training, save: Save, prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in training.epochs[4].items()}
    for pair in ((training.epochs[0], wrapped), (wrapped, training.epochs[0])):
        report = nd.compare(*(save(state, f"{side}.pt") for side, state in zip("ab", pair, strict=True)))
        comparison = report.comparison
        assert comparison is not None and len(comparison.layers) == 6 and not comparison.missing
        assert {row.matched for row in comparison.layers} == {Matching.NAME}
        assert comparison.weights is not None and comparison.weights.tensors == 8


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    return {
        f"unit{parents.index(name.rpartition('.')[0])}.{name.rpartition('.')[2]}": tensor
        for name, tensor in state.items()
    }


def test_other_names_with_equal_values(training: Training, save: Save) -> None:
    report = nd.compare(save(training.epochs[4], "a.pt"), save(renamed(training.epochs[4]), "b.pt"))
    assert report.comparison is not None and report.findings == ()
    assert {row.matched for row in report.comparison.layers} == {Matching.VALUES}
    assert [row.other for row in report.comparison.layers][:2] == ["bn1", "layer1.0.bn1"]
    assert any("6 layers have another name" in note for note in report.notes)


def test_other_names_in_the_same_order(training: Training, save: Save) -> None:
    report = nd.compare(save(training.epochs[3], "a.pt"), save(renamed(training.epochs[4]), "b.pt"))
    assert report.comparison is not None and report.findings == ()
    assert {row.matched for row in report.comparison.layers} == {Matching.ORDER}


def test_another_network_of_the_same_shapes_is_not_taken_for_it(training: Training, save: Save) -> None:
    other = renamed(training.epochs[4])
    for name in other:
        if "running_mean" in name:
            other[name] = other[name] + 5
    with pytest.raises(nd.InputError, match="have no norm layer in common"):
        nd.compare(save(training.epochs[3], "a.pt"), save(other, "b.pt"))


def test_folded_norms_are_explained(tmp_path: Path) -> None:
    out = tmp_path / "folded.onnx"
    nd.fold(FIXTURES / "healthy.onnx", output=out, verify=False)
    for first in ("healthy.onnx", "healthy.pt"):
        report = nd.compare(FIXTURES / first, out)
        assert [(str(f.severity), f.code) for f in report.findings] == [("info", "X004")]
        assert report.comparison is not None
        assert {one.layer: one.reason for one in report.comparison.missing}["bn1"] == "folded into conv1"
        assert len(report.comparison.missing) == 9
        assert report.comparison.weights is not None and report.comparison.weights.motion is Motion.EQUAL


def test_folded_where_names_are_lost() -> None:
    report = nd.compare(FIXTURES / "healthy.pt", FIXTURES / "healthy_frozen.pt")
    assert [(str(f.severity), f.code) for f in report.findings] == [("info", "X004")]
    assert "bn1 folded into conv1" in report.findings[0].message  # by its values
    assert report.comparison is not None and all(one.reason for one in report.comparison.missing)


def biased() -> dict[str, torch.Tensor]:
    """Two convolutions with biases and their norms, after a batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    net(torch.rand(64, 1, 9, 9))
    return net.state_dict()


def folded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the formula, under names of an export."""
    out = {}
    for conv, norm in (("0", "1"), ("2", "3")):
        factor = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        out[f"onnx_Conv_{conv}"] = state[f"{conv}.weight"] * factor[:, None, None, None]
        moved = (state[f"{conv}.bias"] - state[f"{norm}.running_mean"]) * factor
        out[f"onnx_Add_{conv}"] = moved + state[f"{norm}.bias"]
    return out


def test_folded_into_what_has_a_bias_already(save: Save) -> None:
    state = biased()
    whole = folded(state)
    report = nd.compare(save(state, "a.pt"), save(whole, "b.pt"))
    assert [(str(f.severity), f.code) for f in report.findings] == [("info", "X004")]
    assert report.comparison is not None
    assert [one.reason for one in report.comparison.missing] == ["folded into 0", "folded into 2"]
    turned = nd.compare(save(whole, "b.pt"), save(state, "a.pt"))
    assert [(str(f.severity), f.subject) for f in turned.findings] == [("info", "explained 1")]


def test_a_fold_with_a_wrong_bias_is_none(save: Save) -> None:
    state = biased()
    wrong = folded(state)
    wrong["onnx_Add_2"] = wrong["onnx_Add_2"] + 0.01
    report = nd.compare(save(state, "a.pt"), save(wrong, "b.pt"))
    assert report.comparison is not None
    assert [one.reason for one in report.comparison.missing] == ["folded into 0", None]
    for name in ("onnx_Conv_0", "onnx_Conv_2"):
        wrong[name] = wrong[name] * torch.linspace(0.9, 1.1, 8)[:, None, None, None]
    with pytest.raises(nd.InputError, match="no norm layers to compare"):
        nd.compare(save(state, "a.pt"), save(wrong, "c.pt"))


def test_a_lost_norm_and_lost_buffers(training: Training, save: Save) -> None:
    state = training.epochs[4]
    without = {name: tensor for name, tensor in state.items() if not name.startswith("layer2.0.bn2.")}
    without = {name: tensor for name, tensor in without.items() if not name.startswith("bn1.running")}
    report = nd.compare(save(state, "a.pt"), save(without, "b.pt"))
    assert [(str(f.severity), f.subject) for f in report.findings] == [
        ("warning", "missing 0"),
        ("warning", "statistics 0"),
    ]
    assert "layer2.0.bn2" in report.findings[0].message and "(bn1)" in report.findings[1].message


def test_rounding_is_no_movement(training: Training, save: Save) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        small = {n: t.to(dtype) if t.is_floating_point() else t for n, t in training.epochs[4].items()}
        report = nd.compare(save(training.epochs[4], "a.pt"), save(small, "b.pt"))
        assert report.findings == () and report.comparison is not None
        assert {row.statistics for row in report.comparison.layers} == {Motion.ROUNDED}
        assert report.comparison.weights is not None and report.comparison.weights.motion is Motion.ROUNDED


def test_another_eps(save: Save) -> None:
    nets = [nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16, eps=eps)) for eps in (1e-5, 1e-3)]
    for net in nets:
        net[1].running_var.fill_(0.01)
    report = nd.compare(*nets, select="X006")
    assert [f.code for f in report.findings] == ["X006"]
    assert "4.6 % smaller" in report.findings[0].message
    expected = np.sqrt((0.01 + 1e-5) / (0.01 + 1e-3)) - 1
    assert report.findings[0].evidence["gain_by_eps"] == pytest.approx(expected, rel=1e-5)


def test_live_modules_and_state_dicts(training: Training) -> None:
    report = nd.compare(training.epochs[0], training.epochs[4])
    assert report.comparison is not None and report.findings == ()
    assert [side.label for side in report.comparison.sides] == ["state_dict 1", "state_dict 2"]


def test_names_that_say_a_rank() -> None:
    paths = [
        *("runs/rank_0.pt", "runs/rank_1.pt", "runs/e3_rank10.pth", "runs/e3_rank2.pth", "runs/e4_rank2.pth"),
        *("x/rank0/model.pt", "x/rank1/model.pt", "x/rank1/optimizer.pt"),
        *("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt", "frank1.pt", "frank2.pt"),
        *("zero_pp_rank_0.pt", "zero_pp_rank_1.pt"),
    ]
    assert [[str(path) for path in group] for group in rank_groups(map(Path, paths))] == [
        ["runs/rank_0.pt", "runs/rank_1.pt"],
        ["runs/e3_rank2.pth", "runs/e3_rank10.pth"],
        ["x/rank0/model.pt", "x/rank1/model.pt"],
    ]


def test_networks_with_no_weight_of_the_same_shape(tmp_path: Path) -> None:
    """The norms of one are looked for in the weights of the other, where there is none to look in."""
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    second = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.LayerNorm(6))
    torch.save(first.state_dict(), tmp_path / "first.pt")
    torch.save(nn.ModuleDict({"head": second}).state_dict(), tmp_path / "second.pt")
    with pytest.raises(nd.InputError, match="in common"):
        nd.compare(tmp_path / "first.pt", tmp_path / "second.pt")
