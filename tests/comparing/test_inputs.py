"""Input that cannot be compared: a clear line, a hint, exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normdoctor as nd

from .conftest import Save, Training

FIXTURES = Path(__file__).parents[2] / "fixtures"


def norm(channels: int, name: str = "bn") -> dict[str, torch.Tensor]:
    return {f"{name}.{leaf}": tensor for leaf, tensor in nn.BatchNorm2d(channels).state_dict().items()}


def test_no_layer_in_common() -> None:
    with pytest.raises(nd.InputError, match=r"no norm layer in common \(bn1, .* against blocks.0.norm1"):
        nd.compare(FIXTURES / "healthy.pt", FIXTURES / "transformer.pt")


def test_different_channel_counts(save: Save) -> None:
    with pytest.raises(nd.InputError, match=r"bn has 16 channels in .*a.pt and 32 in .*b.pt"):
        nd.compare(save(norm(16), "a.pt"), save(norm(32), "b.pt"))


def test_no_norms_at_all(save: Save) -> None:
    paths = [save({"fc.weight": torch.ones(3, 4)}, f"{name}.pt") for name in "ab"]
    with pytest.raises(nd.InputError, match="no norm layers to compare"):
        nd.compare(*paths)


def test_one_unreadable(save: Save, tmp_path: Path) -> None:
    path = save(norm(16), "a.pt")
    damaged = tmp_path / "b.pt"
    damaged.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(nd.InputError, match=r"b\.pt"):
        nd.compare(path, damaged)
    with pytest.raises(nd.InputError, match="no such file"):
        nd.compare(path, tmp_path / "missing.pt")


def test_vectors_of_different_lengths(save: Save) -> None:
    broken = norm(16) | {"bn.running_var": torch.ones(8)}
    with pytest.raises(nd.InputError, match=r"the vectors of bn differ in length"):
        nd.compare(save(norm(16), "a.pt"), save(broken, "b.pt"))
    # Inspecting goes on without a comparison.
    odd = norm(16) | {"bn.bias": torch.ones(8)}
    report = nd.inspect(save({"model": norm(16) | norm(8, "bn2"), "ema": odd | norm(8, "bn2")}, "both.pt"))
    assert report.comparison is None and any("were not compared" in note for note in report.notes)


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        ([], {}, "name the checkpoints to compare"),
        (["healthy.pt"], {}, "nothing to be compared with"),
        (["healthy.pt", "./healthy.pt"], {}, "is given twice"),
        (["healthy.pt", "slow_momentum.pt"], {"select": "S"}, "none of these rules compares checkpoints: S"),
        (["healthy.pt", "slow_momentum.pt"], {"layer": "layer9.*"}, "no layer matches 'layer9"),
        (["healthy.pt", "slow_momentum.pt"], {"in_file": True}, "the models of one file"),
        (["training_checkpoint.pt"], {"in_file": True, "key": "ema"}, "--key picks one"),
    ],
)
def test_usage(models: list[str], options: dict[str, Any], said: str) -> None:
    with pytest.raises(nd.UsageError, match=said):
        nd.compare(*(FIXTURES / model for model in models), **options)


def test_a_file_of_one_model() -> None:
    with pytest.raises(nd.InputError, match="no two models with the same norms"):
        nd.compare(FIXTURES / "healthy.pt", in_file=True)


def test_not_a_model() -> None:
    with pytest.raises(nd.InputError, match="cannot inspect a int"):
        nd.compare(FIXTURES / "healthy.pt", 3)


def test_the_same_module_twice() -> None:
    net = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16))
    with pytest.raises(nd.UsageError, match="the same Sequential is given twice"):
        nd.compare(net, net)


def test_only_some_layers(training: Training, save: Save) -> None:
    report = nd.compare(
        save(training.epochs[0], "a.pt"), save(training.epochs[1], "b.pt"), layer="layer2.*", select=["X001", "X004"]
    )
    assert report.comparison is not None
    assert [row.layer for row in report.comparison.layers] == [
        "layer2.0.bn1",
        "layer2.0.bn2",
        "layer2.0.downsample.1",
    ]


def test_a_damaged_counter_and_a_lone_surrogate(save: Save) -> None:
    name = "bn\udce9"
    states = [norm(16, name), norm(16, name)]
    states[1][f"{name}.num_batches_tracked"] = torch.tensor(float("nan"))
    states[1][f"{name}.running_var"] = torch.full((16,), float("inf"))
    report = nd.compare(*(save(state, f"{side}.pt") for side, state in zip("ab", states, strict=True)))
    assert report.comparison is not None
    (row,) = report.comparison.layers
    assert row.broken == 16 and row.divergence is None and row.steps is None
