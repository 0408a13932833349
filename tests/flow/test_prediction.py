"""Predicted means against what torch's own BatchNorm measures in training mode on normal data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normdoctor.flow.constants import Constants
from normdoctor.flow.graph import Op
from normdoctor.flow.prediction import Forecast, predict
from normdoctor.places import Prediction
from normdoctor.readers.arrays import Source
from normdoctor.readers.export_flow import read_flow
from normdoctor.readers.torch_export import open_program
from normdoctor.readers.torch_pickle import ZipRecords


def measured(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """The net in eval mode, its statistics those of one batch, its gains and shifts far from the defaults."""
    for norm in (each for each in net.modules() if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)):
        norm.momentum = 1.0
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.3, 1.5)
            nn.init.normal_(norm.bias, std=0.7)
            with torch.no_grad():
                norm.weight[::3] *= -1
    net.double().train()
    with torch.no_grad():
        net(x.double())
    return net.eval()


def forecast_of(net: nn.Module, x: torch.Tensor, folder: Path) -> tuple[Forecast, dict[str, Any]]:
    path = folder / "net.pt2"
    torch.export.save(torch.export.export(measured(net, x), (x.double(),)), path)
    with Source(path) as source:
        graph = read_flow(open_program(source, ZipRecords(source))).graph
        named = {node.label: node for node in graph.of(Op.BATCH_NORM)}
        return predict(graph, Constants()), named


def check(net: nn.Module, x: torch.Tensor, folder: Path, name: str, within: float) -> Prediction:
    """The prediction for one norm, which is within so many standard deviations of what was measured."""
    forecast, named = forecast_of(net, x, folder)
    node = named[name]
    assert node in forecast.predictions, forecast.reasons.get(node)
    prediction = forecast.predictions[node]
    norm = net.get_submodule(name)
    off = np.abs(prediction.mean - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy())
    assert off.max() < within, off
    return prediction


def images(size: int = 6, count: int = 4000) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count, 3, size, size) * torch.tensor([1.0, 2.0, 0.5]).reshape(1, 3, 1, 1) + 0.3


class Residual(nn.Module):
    """norm → add → 1 x 1 convolution → norm: nothing on the way but what is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.bn1(self.conv1(x))
        return self.bn3(self.conv3(first + self.bn2(self.conv2(torch.relu(first)))))


def test_linear_ways_are_exact(tmp_path: Path) -> None:
    torch.manual_seed(1)
    prediction = check(Residual(), images(count=64), tmp_path, "bn3", within=1e-9)
    assert prediction.exact and prediction.even
    assert prediction.sources == ("bn1", "bn2")
    assert prediction.through == ("addition", "convolution")


ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(8, init=0.3),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "clip": nn.Hardtanh(-0.5, 1.5),
    "elu": nn.ELU(0.7),
    "selu": nn.SELU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
}

SAMPLING = 0.02
"""Standard deviations that a mean over 100,000 values and more may be off, summed over its inputs."""


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_normal_inputs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), ACTIVATIONS[name], nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
    )
    prediction = check(net, images(), tmp_path, "4", within=SAMPLING)
    assert not prediction.exact
    assert prediction.through == (name, "convolution")


class WrittenOut(nn.Module):
    """Activations as exporters leave them behind a norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x))
        if self.kind == "silu":
            y = y * torch.sigmoid(y)
        elif self.kind == "hardswish":
            y = y * torch.clamp(y + 3, 0, 6) / 6
        elif self.kind == "gelu":
            y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        elif self.kind == "mish":
            y = y * torch.tanh(F.softplus(y))
        else:
            y = y * torch.sigmoid(self.conv1(x).mean((2, 3), keepdim=True))
        return self.bn2(self.conv2(y))


@pytest.mark.parametrize("kind", ["silu", "hardswish", "gelu", "mish"])
def test_activations_that_are_written_out(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    prediction = check(WrittenOut(kind), images(), tmp_path, "bn2", within=SAMPLING)
    assert kind in prediction.through


def test_a_gate_from_elsewhere_breaks_the_chain(tmp_path: Path) -> None:
    torch.manual_seed(3)
    forecast, named = forecast_of(WrittenOut("gate"), images(count=64), tmp_path)
    assert named["bn2"] not in forecast.predictions
    assert forecast.reasons[named["bn2"]]


class Shortcut(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        return torch.cat([branch(y) for branch in self.branches], dim=1)


LINEAR = {
    "padding": nn.Conv2d(8, 16, 3, padding=1, bias=False),
    "padding with a stride": nn.Conv2d(8, 16, 3, stride=2, padding=1),
    "padding on one side": nn.Sequential(nn.ZeroPad2d((0, 2, 1, 0)), nn.Conv2d(8, 16, 3)),
    "dilation": nn.Conv2d(8, 16, 3, padding=2, dilation=2),
    "groups": nn.Conv2d(8, 16, 3, padding=1, groups=4),
    "depthwise": nn.Conv2d(8, 16, 5, padding=2, groups=8),
    "transposed": nn.ConvTranspose2d(8, 16, 3, stride=2, padding=1, output_padding=1),
    "transposed in groups": nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1, groups=2),
    "average pooling": nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 1)),
    "shuffled channels": nn.Sequential(nn.ChannelShuffle(2), nn.Conv2d(8, 16, 1)),
    "two convolutions": nn.Sequential(nn.Conv2d(8, 12, 1), nn.Conv2d(12, 16, 3, padding=1)),
}


@pytest.mark.parametrize("way", LINEAR)
def test_linear_operators_with_borders(way: str, tmp_path: Path) -> None:
    """The values are independent of the position, so all that is off is the sampling of the border."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), LINEAR[way], nn.BatchNorm2d(16))
    prediction = check(net, images(), tmp_path, "3", within=SAMPLING)
    assert prediction.exact


def test_a_border_is_not_forgotten(tmp_path: Path) -> None:
    """On small maps the share of taps in bounds is most of the story."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 5, padding=2), nn.BatchNorm2d(16))
    with torch.no_grad():
        net[2].weight.abs_()
    prediction = check(net, images(size=3), tmp_path, "3", within=SAMPLING)
    whole = net[2].weight.detach().sum((2, 3)) @ net[1].bias.detach() + net[2].bias.detach()
    assert np.abs(whole.numpy() - prediction.mean).max() > 0.4
    assert not prediction.even


def test_concatenated_branches_keep_their_channels(tmp_path: Path) -> None:
    torch.manual_seed(6)
    parts = [nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Identity()]
    net = nn.Sequential(Shortcut(*parts), nn.Conv2d(20, 16, 1), nn.BatchNorm2d(16))
    prediction = check(net, images(), tmp_path, "2", within=SAMPLING)
    assert "concatenation" in prediction.through


def test_linear_layers(tmp_path: Path) -> None:
    torch.manual_seed(7)
    net = nn.Sequential(
        nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 24), nn.BatchNorm1d(24)
    )
    net[3].p = 0.0  # what flows in training is not thinned out here
    check(net, torch.randn(200_000, 3), tmp_path, "5", within=SAMPLING)


def test_global_pooling_then_linear_is_exact(tmp_path: Path) -> None:
    torch.manual_seed(8)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.BatchNorm1d(16),
    )
    prediction = check(net, images(count=64), tmp_path, "5", within=1e-9)
    assert prediction.exact and prediction.even


def test_the_bias_just_before_is_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(9)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    prediction = check(net, images(), tmp_path, "4", within=SAMPLING)
    assert prediction.bias is not None
    np.testing.assert_allclose(prediction.bias, net[3].bias.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("between", "said"),
    [
        (nn.MaxPool2d(2), "max-pooling"),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()), "variance"),
        (nn.AvgPool2d(3, padding=1), "padding"),
        (nn.GroupNorm(2, 8), "norm"),
    ],
)
def test_what_breaks_the_chain_is_said(between: nn.Module, said: str, tmp_path: Path) -> None:
    torch.manual_seed(10)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), between, nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    forecast, named = forecast_of(net, images(count=64), tmp_path)
    assert named["4"] not in forecast.predictions
    assert said in forecast.reasons[named["4"]]
    assert "norm" in forecast.reasons[named["1"]]


class PreActivation(nn.Module):
    """The trunk is never normalised itself: what is known of it are the statistics of the norms that look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trunk = self.stem(x)
        return self.bn2(trunk + self.conv1(torch.relu(self.bn1(trunk))))


def test_a_trunk_without_norms(tmp_path: Path) -> None:
    torch.manual_seed(11)
    prediction = check(PreActivation(), images(), tmp_path, "bn2", within=SAMPLING)
    assert prediction.sources == ("bn1",)


def test_weights_that_no_norm_needs_are_not_read(tmp_path: Path) -> None:
    torch.manual_seed(12)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 1),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(16 * 36, 9),
    )
    forecast, named = forecast_of(net, images(count=16), tmp_path)
    assert len(forecast.reaches) == 1
    assert named["3"] in forecast.predictions
