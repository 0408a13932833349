"""What `compare` says of really trained checkpoints: healthy ones nothing, sick ones what they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

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
    assert "recalibrated?" in report.findings[0].message


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
