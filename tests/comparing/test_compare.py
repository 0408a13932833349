"""What `compare` says of really trained checkpoints: healthy ones nothing, sick ones what they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normdoctor as nd
from normdoctor.compared import ComparisonKind, Motion

from .conftest import Save, State, Training, is_buffer

FIXTURES = Path(__file__).parents[2] / "fixtures"


def said(report: nd.Report) -> list[tuple[str, str, str]]:
    """(severity, code, subject) of every finding."""
    return [(str(finding.severity), finding.code, finding.subject) for finding in report.findings]


def test_epochs_of_a_healthy_training_give_nothing(training: Training, save: Save) -> None:
    paths = [save(state, f"e{number}.pt") for number, state in enumerate(training.epochs)]
    report = nd.compare(*paths)
    assert said(report) == []
    comparison = report.comparison
    assert comparison is not None and comparison.kind is ComparisonKind.CHECKPOINTS
    assert [side.label for side in comparison.sides] == list(map(str, paths))
    assert len(comparison.steps) == 4 and len(comparison.trajectories) == 6
    for row in comparison.trajectories:
        assert row.updates == (12, 24, 36, 48, 60)
        assert row.still == (False,) * 4
    for first, last in ((0, 1), (0, 4), (3, 4)):
        assert said(nd.compare(paths[first], paths[last])) == []


def test_changes_are_those_of_an_independent_reckoning(training: Training, save: Save) -> None:
    old, new = training.epochs[1], training.epochs[3]
    report = nd.compare(save(old, "a.pt"), save(new, "b.pt"))
    assert report.comparison is not None
    row = next(row for row in report.comparison.layers if row.layer == "layer2.0.bn2")
    before, after = (
        {
            name: state[f"layer2.0.bn2.{name}"].double().numpy()
            for name in ("weight", "bias", "running_mean", "running_var")
        }
        for state in (old, new)
    )
    normals = [
        torch.distributions.Normal(torch.tensor(one["running_mean"]), torch.tensor(np.sqrt(one["running_var"] + 1e-5)))
        for one in (after, before)
    ]
    divergence = torch.distributions.kl_divergence(*normals).numpy()
    assert row.divergence == pytest.approx(np.median(divergence), rel=1e-9)
    z = np.abs(after["running_mean"] - before["running_mean"]) / np.sqrt(before["running_var"] + 1e-5)
    assert row.shift == pytest.approx(np.median(z), rel=1e-9)
    assert row.log_ratio == pytest.approx(
        np.median(np.log((after["running_var"] + 1e-5) / (before["running_var"] + 1e-5))), rel=1e-9
    )
    change = np.linalg.norm(after["weight"] - before["weight"]) / np.linalg.norm(before["weight"])
    assert row.gamma == pytest.approx(change, rel=1e-9)
    assert row.worst[0] == int(divergence.argmax())
    assert row.steps == 24
    weights = report.comparison.weights
    names = [name for name in old if "bn" not in name and "downsample.1" not in name]
    apart = sum(float((new[name] - old[name]).double().square().sum()) for name in names)
    size = sum(float(old[name].double().square().sum()) for name in names)
    assert weights is not None and weights.tensors == len(names) and weights.equal == 0
    assert weights.relative == pytest.approx(np.sqrt(apart / size), rel=1e-6)


def test_norms_left_in_eval_mode(frozen_training: Training, save: Save) -> None:
    paths = [save(state, f"e{number}.pt") for number, state in enumerate(frozen_training.epochs, start=1)]
    report = nd.compare(*paths)
    assert said(report) == [("warning", "X005", "1")]
    assert f"after {paths[1]} while the weights go on" in report.findings[0].message
    assert said(nd.compare(paths[1], paths[4])) == [("warning", "X001", "still")]


def test_buffers_of_an_earlier_state(training: Training, save: Save) -> None:
    old, new = training.epochs[0], training.epochs[4]
    mixed = {name: (old if "running" in name else new)[name] for name in new}
    report = nd.compare(save(old, "a.pt"), save(mixed, "b.pt"))
    assert said(report) == [("error", "X001", "counted")]
    assert "48 batches were counted" in report.findings[0].message
    assert report.worst is nd.Severity.ERROR


def test_a_recalibration_reads_as_one(training: Training, save: Save, followed: Callable[..., State]) -> None:
    report = nd.compare(save(training.epochs[-1], "a.pt"), save(followed(), "b.pt"))
    assert said(report) == [("info", "X001", "recalibrated")]
    assert "Statistics moved in all 6 layers" in report.findings[0].message
    assert "the weights are bit-equal: 30 batches went through" in report.findings[0].message


def test_our_own_recalibration_reads_as_one(tmp_path: Path) -> None:
    out = tmp_path / "fixed.pt"
    nd.recalibrate(FIXTURES / "slow_momentum_module.pt", method="debias", output=out)
    report = nd.compare(FIXTURES / "slow_momentum_module.pt", out)
    assert said(report) == [("info", "X001", "recalibrated")]
    assert "measured anew, or the buffers of another state" in report.findings[0].message


def test_buffers_that_were_reset(training: Training, save: Save, nets: ModuleType) -> None:
    fresh = nets.ResNet(widths=(8, 16)).state_dict()
    lost = {name: fresh[name] if is_buffer(name) else tensor for name, tensor in training.epochs[4].items()}
    assert said(nd.compare(save(training.epochs[4], "a.pt"), save(lost, "b.pt"))) == [("error", "X001", "reset")]


def test_frozen_gains_with_moving_statistics(
    training: Training, save: Save, nets: ModuleType, followed: Callable[..., State]
) -> None:
    moved = followed(classes=3)
    moved = {name: tensor * 1.1 if "conv" in name else tensor for name, tensor in moved.items()}
    report = nd.compare(save(training.epochs[4], "a.pt"), save(moved, "b.pt"))
    assert [code for _, code, _ in said(report)] == ["X003"]
    assert "30 batches were counted" in report.findings[0].message


def test_inputs_on_another_scale(training: Training, save: Save, followed: Callable[..., State]) -> None:
    scaled = {name: tensor * 1.001 if "conv" in name else tensor for name, tensor in followed(scale=3.0).items()}
    report = nd.compare(save(training.epochs[4], "a.pt"), save(scaled, "b.pt"), select="X007")
    assert said(report) == [("info", "X007", "")]
    assert "(bn1); bn1:" in report.findings[0].message


def test_the_other_way_round_is_said(training: Training, save: Save) -> None:
    report = nd.compare(save(training.epochs[4], "a.pt"), save(training.epochs[0], "b.pt"))
    assert any("has seen fewer batches" in note for note in report.notes)


def test_nothing_is_read_backwards_beside_equal_weights(training: Training, save: Save) -> None:
    """A recalibration may begin its counters again."""
    state = training.epochs[4]
    counted = {n: torch.tensor(3) if "num_batches" in n else t + 0.1 * ("running" in n) for n, t in state.items()}
    report = nd.compare(save(state, "a.pt"), save(counted, "b.pt"))
    assert report.comparison is not None and report.comparison.layers[0].steps == -57
    assert not any("fewer batches" in note for note in report.notes)


def test_statistics_that_are_no_numbers(training: Training, save: Save) -> None:
    state = training.epochs[4]
    sick = {name: tensor.clone() for name, tensor in state.items()}
    sick["bn1.running_var"][2:5] = float("nan")
    paths = save(state, "a.pt"), save(sick, "b.pt")
    report = nd.compare(*paths)
    assert said(report) == [("error", "X001", "broken")]
    assert f"3 channels of {paths[1]}, in 1 of 6 layers (bn1)" in report.findings[0].message
    assert said(nd.compare(*reversed(paths))) == [("info", "X001", "repaired")]
    assert said(nd.compare(paths[1], save(sick | {"extra": torch.ones(3)}, "c.pt"))) == []  # both: inspect says it


def test_statistics_in_another_order(training: Training, save: Save) -> None:
    state = training.epochs[4]
    mixed = {n: t.flip(0) if n.startswith("layer2.0.bn1.running") else t for n, t in state.items()}
    report = nd.compare(save(state, "a.pt"), save(mixed, "b.pt"))
    assert said(report) == [("warning", "X001", "reordered")]
    assert "1 of 6 layers (layer2.0.bn1)" in report.findings[0].message


def test_a_single_layer_that_moved_is_no_recalibration(
    training: Training, save: Save, followed: Callable[..., State]
) -> None:
    state, other = training.epochs[4], followed()
    mixed = {n: other[n] if n.startswith("bn1.running") else t for n, t in state.items()}
    report = nd.compare(save(state, "a.pt"), save(mixed, "b.pt"))
    assert said(report) == [("warning", "X001", "alone")]
    assert "only in bn1 of 6 layers" in report.findings[0].message


def test_biases_that_a_conversion_dropped(save: Save) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    net(torch.rand(64, 1, 9, 9))
    state = net.state_dict()
    zeroed = {name: torch.zeros(8) if name == "2.bias" else tensor for name, tensor in state.items()}
    gone = {name: tensor for name, tensor in state.items() if name != "2.bias"}
    start = save(state, "a.pt")
    for lost in (zeroed, gone):
        report = nd.compare(start, save(lost, "b.pt"))
        assert said(report) == [("warning", "X001", "biases")]
        assert report.findings[0].message.startswith("2.bias is 0 or gone")
        assert report.comparison is not None and report.comparison.weights is not None
        assert report.comparison.weights.motion is Motion.EQUAL
    subtracted = {
        name: tensor - state["2.bias"] if name == "3.running_mean" else tensor for name, tensor in gone.items()
    }
    found = nd.compare(start, save(subtracted, "c.pt")).comparison
    assert found is not None and found.dropped_biases == ()


@pytest.mark.parametrize("backwards", [False, True])
def test_an_average_in_a_file_of_its_own(training: Training, save: Save, backwards: bool) -> None:
    model = training.epochs[4]
    wrapped = {f"module.{n}": 1.01 * t if not is_buffer(n) else t for n, t in model.items()}
    paths = [save(model, "raw.pt"), save(wrapped | {"n_averaged": torch.tensor(60)}, "ema.pt")]
    (finding,) = nd.compare(*(reversed(paths) if backwards else paths)).findings
    assert (str(finding.severity), finding.subject) == ("warning", "still")
    assert f"{paths[1]} is an average (n_averaged = 60) with the buffers of {paths[0]}" in finding.message
    assert finding.fix is not None and finding.fix.startswith(f"nothing for {paths[0]}; before {paths[1]} is used: ")
    assert f"recalibrate {paths[1]}" in finding.fix


def test_epochs_that_are_out_of_order(frozen_training: Training, save: Save) -> None:
    for number, state in enumerate(frozen_training.epochs, start=1):
        save(state, f"run/e{(1, 2, 8, 9, 10)[number - 1]}.pt")
    folder = save(frozen_training.epochs[0], "run/e1.pt").parent
    shell = [folder / f"e{number}.pt" for number in (1, 9, 2, 8)]
    trained = {n: t + 5 * ("num_batches" in n) for n, t in frozen_training.epochs[3].items()}
    save(trained, "run/e9.pt")
    report = nd.compare(*shell)
    assert said(report) == []
    assert any(f"the counters fall at {shell[1]} -> {shell[2]}" in note for note in report.notes)
    for given in (str(folder), str(folder / "*.pt")):
        sides = nd.compare(given).comparison
        assert sides is not None
        assert [Path(side.label).name for side in sides.sides] == ["e1.pt", "e2.pt", "e8.pt", "e9.pt", "e10.pt"]


def test_another_eps_is_said(save: Save) -> None:
    torch.manual_seed(0)
    nets_ = [nn.Sequential(nn.BatchNorm2d(8, eps=eps)) for eps in (1e-5, 1e-4)]
    for net in nets_:
        net[0].running_var = torch.linspace(0.02, 1.0, 8)
        net[0].running_mean = torch.linspace(-1.0, 1.0, 8)
    report = nd.compare(*(save(net, f"{place}.pt") for place, net in enumerate(nets_)))
    assert said(report) == [("info", "X006", "little")]
    assert "eps differs in 0 (0.0001 after 1e-05)" in report.findings[0].message
    assert "by 0.22 %" in report.findings[0].message  # sqrt((0.02 + 1e-5) / (0.02 + 1e-4)) = 0.9978


def test_two_trainings_are_told_from_one(training: Training, save: Save, nets: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    foreign = {
        n: torch.randn(t.shape, generator=generator) if t.dim() > 1 else t for n, t in training.epochs[4].items()
    }
    start = save(training.epochs[4], "a.pt")
    assert any("unrelated trainings" in note for note in nd.compare(start, save(foreign, "b.pt")).notes)
    assert nd.compare(save(training.epochs[0], "c.pt"), start).notes == ()


# The models in one file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("with buffers", []),
        ("as timm", []),
        ("copied", [("info", "X001", "copied")]),
        ("without", [("error", "X001", "created")]),
    ],
)
def test_averages_in_a_file(training: Training, save: Save, how: str, expected: list[Any]) -> None:
    path = save({"model": training.epochs[4], "model_ema": training.averages[how]}, "both.pt")
    for report in (nd.compare(path, in_file=True), nd.inspect(path, select="X")):
        assert said(report) == expected
        assert report.comparison is not None and report.comparison.kind is ComparisonKind.MODELS
        assert [side.label for side in report.comparison.sides] == ["model", "model_ema"]


def test_an_average_whose_buffers_stayed_behind(training: Training, save: Save) -> None:
    """Its weights follow the model closely, its buffers and their counters are those of the first epoch."""
    model, early = training.epochs[4], training.epochs[0]
    average = {name: early[name] if is_buffer(name) else 1.003 * tensor for name, tensor in model.items()}
    report = nd.compare(save({"model": model, "ema": average}, "both.pt"), in_file=True)
    assert said(report) == [("warning", "X001", "behind")]
    assert "its counter stopped at 12 of 60" in report.findings[0].message
    counted = {name: model[name] if "num_batches" in name else tensor for name, tensor in average.items()}
    report = nd.compare(save({"model": model, "ema": counted}, "both.pt"), in_file=True)
    assert said(report) == [("info", "X001", "apart")]


def test_an_average_as_a_submodule(training: Training, save: Save) -> None:
    flat = {f"online_model.{name}": tensor for name, tensor in training.epochs[4].items()}
    flat |= {f"ema_model.{name}": tensor for name, tensor in training.averages["without"].items()}
    report = nd.inspect(save(flat, "wrapped.pt"), select="X")
    assert said(report) == [("error", "X001", "created")]
    assert report.comparison is not None and report.comparison.weights is not None
    assert report.comparison.weights.tensors == 8


def test_a_second_network_is_no_average(training: Training, save: Save, nets: ModuleType) -> None:
    other = nets.ResNet(widths=(8, 16, 16)).state_dict()
    path = save({"generator": training.epochs[4], "discriminator": other}, "gan.pt")
    assert nd.inspect(path).comparison is None
    path = save({"student": training.epochs[4], "teacher": training.epochs[1]}, "pair.pt")
    assert nd.inspect(path).comparison is None
    assert said(nd.compare(path, in_file=True)) == []


def test_which_model_of_a_file(training: Training, save: Save) -> None:
    both = save({"model": training.epochs[4], "ema": training.averages["copied"]}, "both.pt")
    alone = save(training.epochs[4], "alone.pt")
    report = nd.compare(alone, both)
    assert report.comparison is not None and report.comparison.weights is not None
    assert report.comparison.weights.motion is Motion.EQUAL
    assert any("model is compared; --key takes another" in note for note in report.notes)
    assert len(report.layers) == 6
    other = nd.compare(both, save({"model": training.epochs[3], "ema": training.epochs[4]}, "c.pt"), key="ema")
    assert other.comparison is not None and other.comparison.weights is not None
    assert other.comparison.weights.motion is Motion.MOVED
    with pytest.raises(nd.UsageError, match="no model under the key 'eam'"):
        nd.compare(alone, both, key="eam")


# Ranks ----------------------------------------------------------------------------------------------------


def test_ranks_of_one_run(save: Save, followed: Callable[..., State]) -> None:
    first, near, far = followed(seed=1), followed(seed=2), followed(seed=3, classes=2)
    paths = [save(state, f"run/net_rank{number}.pt") for number, state in enumerate((first, near))]
    report = nd.compare(*reversed(paths))
    assert said(report) == [("info", "X002", "")]
    assert report.comparison is not None and report.comparison.kind is ComparisonKind.RANKS
    save(far, "run/net_rank2.pt")
    survey = nd.survey([paths[0].parent], select="X")
    assert [said(one) for one in survey.reports] == [[("warning", "X002", "")], [], []]
    assert survey.reports[0].path == str(paths[0])


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_the_one_rank_that_differs_is_named(save: Save, followed: Callable[..., State], odd: int) -> None:
    usual, foreign = followed(seed=1), followed(seed=3, classes=2)
    paths = [save(foreign if rank == odd else usual, f"run/net_rank{rank}.pt") for rank in range(3)]
    findings = nd.compare(*paths).findings + nd.survey([paths[0].parent], select="X").findings
    assert [finding.code for finding in findings] == ["X002"] * 2
    for finding in findings:
        assert finding.message.startswith(f"{paths[odd]} alone has other statistics")
        assert finding.fix == f"nothing for the others; for {paths[odd]} take the buffers of {paths[odd == 0]}"


def test_parts_of_a_model_are_no_ranks(training: Training, save: Save) -> None:
    first, second = training.epochs[3], training.epochs[4]
    folder = save(first, "mp/mp_rank_00.pt").parent
    save(second, "mp/mp_rank_01.pt")
    save(first, "mp/net_rank0.pt")
    save(second, "mp/net_rank1.pt")
    assert nd.survey([folder], select="X").findings == ()


def test_equal_ranks_give_nothing(training: Training, save: Save) -> None:
    folder = save(training.epochs[4], "run/rank_0.pt").parent
    save(training.epochs[4], "run/rank_1.pt")
    (first, _) = nd.survey([folder], select="X").reports
    assert first.findings == () and first.comparison is None
