"""Where norms stand: what is said of their neighbours, on small nets of known shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from normdoctor.flow.surroundings import places_of
from normdoctor.places import Place
from normdoctor.readers.arrays import Source
from normdoctor.readers.export_flow import read_flow
from normdoctor.readers.onnx import survey as survey_onnx
from normdoctor.readers.torch_export import open_program
from normdoctor.readers.torch_pickle import ZipRecords

Survey = Callable[..., dict[str, Place]]


@pytest.fixture
def survey(tmp_path: Path) -> Survey:
    """A net → the places of its norms, by way of a .pt2 file."""

    def surveyed(net: nn.Module, shape: tuple[int, ...] = (2, 3, 8, 8), **options: bool) -> dict[str, Place]:
        path = tmp_path / "net.pt2"
        torch.manual_seed(0)
        torch.export.save(torch.export.export(net.eval(), (torch.randn(shape),)), path)
        with Source(path) as source:
            return places_of(read_flow(open_program(source, ZipRecords(source))).graph, **options)

    return surveyed


def words(place: Place) -> tuple[str, str]:
    return " < ".join(map(str, place.before)), ", ".join(map(str, place.after))


def test_a_plain_block(survey: Survey) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2))
    place = survey(net)["1"]
    assert words(place) == ("convolution 0", "relu6")
    assert place.producer is not None and place.producer.alone
    np.testing.assert_allclose(place.producer.bias, net[0].bias.detach(), rtol=1e-6)
    np.testing.assert_allclose(place.producer.largest, net[0].weight.detach().abs().amax((1, 2, 3)), rtol=1e-6)
    assert place.activation is not None and place.activation.name == "relu6"
    assert place.positions == 64
    assert place.fate is not None and place.fate.verdict == "folded backward" and place.fate.into == ("0",)
    assert place.fate.saved == 32  # weight, bias and both statistics; the convolution has its bias already
    assert not place.joins_branches and not place.dropouts and place.calls == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.bn3, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(y + self.bn2(self.conv2(y)))
        return self.conv3(self.bn3(y))


def test_a_residual_block(survey: Survey) -> None:
    net = Block()
    nn.init.ones_(net.bn3.bias)  # without a shift there is nothing that the padding would be in the way of
    places = survey(net)
    assert places["bn2"].joins_branches and not places["bn1"].joins_branches
    assert words(places["bn1"])[1] == "relu" and words(places["bn2"])[1] == "addition"
    assert words(places["bn3"]) == ("relu < addition", "convolution conv3")
    assert places["bn3"].padded == ("conv3",) and places["bn1"].padded == ()
    assert places["bn3"].producer is None
    assert places["bn1"].fate is not None and places["bn1"].fate.saved == 24  # the convolution gets a bias
    assert places["bn3"].fate is not None and places["bn3"].fate.verdict == "left"


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        return y * torch.sigmoid(y)


def test_an_activation_that_is_written_out_has_its_name(survey: Survey) -> None:
    place = survey(Gate())["bn"]
    assert words(place)[1] == "silu"
    assert place.activation is not None and place.activation.name == "silu"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(torch.relu(self.bn(self.conv(x)))))


def test_a_norm_that_is_called_twice(survey: Survey) -> None:
    place = survey(Twice())["bn"]
    assert place.calls == 2
    assert place.producer is None and place.activation is None


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Linear(3, 8), nn.BatchNorm1d(8)
        self.drop, self.fc, self.second = nn.Dropout(0.3), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(torch.relu(self.first(self.stem(x))))
        return self.head(torch.relu(self.second(self.fc(y))))


def test_dropouts_before_a_norm(survey: Survey) -> None:
    places = survey(Dropping(), (4, 3))
    assert [probability for _, probability in places["second"].dropouts] == [0.3]
    assert not places["first"].dropouts
    assert places["second"].positions == 1


def test_norms_of_tokens(survey: Survey) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    nn.init.ones_(net[1].bias)
    place = survey(net, (2, 5, 6))["1"]
    assert place.gain_fate is not None and place.gain_fate.verdict == "folded forward"
    assert place.fate is not None and place.fate.code == "own-statistics"
    assert place.positions is None and place.prediction is None


def test_weights_are_left_alone_where_nothing_asks_for_them(survey: Survey) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    places = survey(net, largest=False)
    assert places["1"].producer is not None and places["1"].producer.largest is None
    assert places["3"].producer is not None and places["3"].producer.largest is not None  # read for the prediction


def test_the_network_begins_and_ends(survey: Survey) -> None:
    place = survey(nn.Sequential(nn.BatchNorm2d(3)))["0"]
    assert place.before[0].op == "input" and place.after[0].op == "output"
    assert place.unpredicted == "no norm lies before it"


class WrittenOutNorm(nn.Module):
    """A LayerNorm as decomposed exports have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
def test_a_norm_that_is_written_out(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    net = WrittenOutNorm().eval()
    nn.init.ones_(net.norm.bias)
    torch.onnx.export(net, (torch.randn(2, 6),), path, dynamo=False, opset_version=14)
    with Source(path) as source, survey_onnx(source).checkpoint as checkpoint:
        (name,) = (layer.name for layer in checkpoint.layers)
        place = places_of(checkpoint.graphs[None]())[name]  # type: ignore[arg-type]
    assert words(place) == ("matrix product first", "matrix product last")
