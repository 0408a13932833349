"""Places guessed from names and shapes: where there is no doubt, and nowhere else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import normdoctor as nd
from normdoctor.findings import Severity
from normdoctor.placing.names import places_by_names


def sequence(*parts: tuple[str, nn.Module]) -> nn.Module:
    return nn.Sequential(OrderedDict(parts))


def guessed(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Norm → what it is taken to be fed by."""
    with nd.open_checkpoint(dict(state)) as checkpoint:
        places = places_by_names(checkpoint)
    assert all(place.inferred and place.prediction is None and place.fate is None for place in places.values())
    return {name: place.producer.neighbour.label for name, place in places.items() if place.producer is not None}


CONV, WIDE, NORM = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(8)

GUESSED: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "conv1 and bn1": (sequence(("conv1", nn.Conv2d(3, 8, 3)), ("bn1", nn.BatchNorm2d(8))), {"bn1": "conv1"}),
    "conv and norm": (sequence(("conv", nn.Conv1d(3, 8, 3)), ("norm", nn.BatchNorm1d(8))), {"norm": "conv"}),
    "a Sequential": (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), {"1": "0"}),
    "a linear layer": (nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)), {"1": "0"}),
    "one block in another": (
        sequence(("layer1", nn.Sequential(sequence(("conv2", nn.Conv2d(3, 8, 3)), ("bn2", nn.BatchNorm2d(8)))))),
        {"layer1.0.bn2": "layer1.0.conv2"},
    ),
    "pre-activation": (
        sequence(("bn1", nn.BatchNorm2d(8)), ("conv1", nn.Conv2d(8, 8, 3)), ("bn2", nn.BatchNorm2d(8)),
                 ("conv2", nn.Conv2d(8, 8, 3))),
        {},
    ),
    "registered in another order": (
        sequence(("conv0", nn.Conv2d(8, 8, 3)), ("conv1", nn.Conv2d(8, 8, 3)), ("bn0", nn.BatchNorm2d(8)),
                 ("bn1", nn.BatchNorm2d(8))),
        {},
    ),
    "something in between": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), {}),
    "a norm before it": (nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), {}),
    "other channels": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(8)), {}),
    "an index of another name": (
        sequence(("conv1", nn.Conv2d(3, 8, 3)), ("bn2", nn.BatchNorm2d(8))),
        {},
    ),
    "two norms for one convolution": (
        sequence(("conv1", nn.Conv2d(3, 8, 3)), ("bn1", nn.BatchNorm2d(8)), ("norm1", nn.BatchNorm2d(8))),
        {"bn1": "conv1"},
    ),
    "LayerNorm": (nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)), {}),
    "a PReLU in between": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.BatchNorm2d(8)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSED)
def test_guesses(name: str) -> None:
    net, expected = GUESSED[name]
    assert guessed(net.state_dict()) == expected


def test_tied_weights_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    assert guessed(net.state_dict()) == {"1": "0", "3": "2"}
    net[2].weight = net[0].weight
    assert guessed(net.state_dict()) == {}


def test_an_alphabetical_file_says_nothing_about_order(tmp_path: Path) -> None:
    """bn1 before conv1, or the other way round: sorted names are the same for both."""
    net = sequence(("conv", nn.Conv2d(8, 8, 3)), ("norm", nn.BatchNorm2d(8)), ("tail", nn.Conv2d(8, 8, 1)))
    state = net.state_dict()
    assert guessed(state) == {"norm": "conv"}
    assert guessed({name: state[name] for name in sorted(state)}) == {}
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    with nd.open_checkpoint(tmp_path / "net.safetensors") as checkpoint:
        assert places_by_names(checkpoint) == {}


def test_a_wrapped_and_prefixed_model() -> None:
    net = sequence(("conv1", nn.Conv2d(3, 8, 3)), ("bn1", nn.BatchNorm2d(8)))
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    assert guessed(state) == {"module.bn1": "module.conv1"}


def test_two_models_in_one_file(tmp_path: Path) -> None:
    net, other = nn.Sequential(CONV, NORM), nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    torch.save({"model": net.state_dict(), "ema": other.state_dict()}, tmp_path / "two.pt")
    with nd.open_checkpoint(tmp_path / "two.pt") as checkpoint:
        assert len(places_by_names(checkpoint)) == 2


def test_bias_and_largest_weight(tmp_path: Path) -> None:
    net = sequence(("conv1", WIDE), ("bn1", nn.BatchNorm2d(16)))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with nd.open_checkpoint(tmp_path / "net.pt") as checkpoint:
        plain, wide = (places_by_names(checkpoint, largest=largest)["bn1"].producer for largest in (False, True))
    assert plain is not None and wide is not None and plain.largest is None
    assert WIDE.bias is not None
    np.testing.assert_array_equal(wide.bias, WIDE.bias.detach().numpy().astype(np.float64))
    np.testing.assert_array_equal(wide.largest, WIDE.weight.detach().abs().amax((1, 2, 3)).numpy())


def test_a_transposed_convolution_is_not_read_along_the_wrong_axis() -> None:
    """A square weight in a Sequential may be one."""
    net = nn.Sequential(nn.ConvTranspose2d(8, 8, 3), nn.BatchNorm2d(8))
    with nd.open_checkpoint(net.state_dict()) as checkpoint:
        (place,) = places_by_names(checkpoint, largest=True).values()
    assert place.producer is not None and place.producer.largest is None and place.producer.bias is not None


def test_findings_say_that_they_are_inferred() -> None:
    """A bias of 3 standard deviations in front of a norm is worth a warning with a graph at most, never here."""
    torch.manual_seed(0)
    net = sequence(("conv1", nn.Conv2d(3, 8, 3)), ("bn1", nn.BatchNorm2d(8)))
    for _ in range(100):
        net(torch.randn(8, 3, 8, 8))
    report = nd.inspect(net.eval().state_dict(), select="G")
    assert [finding.code for finding in report.findings] == ["G501"]
    assert report.findings[0].severity is Severity.INFO and "nferred from names" in report.findings[0].message
    assert "G502" in {skip.code for skip in report.skips if skip.missing == ("place",)}


def test_a_bias_that_cannot_be_read_costs_nothing_else(tmp_path: Path) -> None:
    """The file is damaged where the convolution's bias lies: the norms are judged as before."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    data = bytearray((tmp_path / "net.pt").read_bytes())
    bias = net[0].bias
    assert isinstance(bias, Tensor)
    place = data.find(bias.detach().numpy().tobytes())
    assert place > 0
    data[place] ^= 0xFF
    (tmp_path / "net.pt").write_bytes(bytes(data))
    report = nd.inspect(tmp_path / "net.pt")
    assert [layer.name for layer in report.layers] == ["1"]
