"""Which modules are the norms of a file, however they are wrapped and named; and why others are left."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normdoctor as nd
from normdoctor.layers import NormLayer
from normdoctor.measurement.lockstep import as_stored
from normdoctor.measurement.opening import open_walker
from normdoctor.measurement.walks import Look
from normdoctor.models.norm_modules import find_norms
from normdoctor.models.opening import RunOptions, layers_of
from normdoctor.readers import open_checkpoint

from .test_lockstep import FrozenBatchNorm2d, batches


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.bn(self.conv(x)))


def trained(seed: int = 0) -> Net:
    """With values that differ from norm to norm and from seed to seed."""
    torch.manual_seed(seed)
    net = Net()
    for norm in (net.bn, net.tail[1]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 2)
    return net.eval()


def layers(target: Any) -> tuple[NormLayer, ...]:
    with open_checkpoint(target) as checkpoint:
        return checkpoint.layers


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module.", "backbone.net."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_the_file(prefix: str) -> None:
    net = trained()
    found = find_norms(net, layers({prefix + name: value for name, value in net.state_dict().items()}))
    assert list(found.norms.values()) == [net.bn, net.tail[1]]
    assert [name.removeprefix(prefix) for name in found.norms] == ["bn", "tail.1"] and not found.left


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: nn.Sequential(OrderedDict(model=net))])
def test_prefixes_of_the_module(wrap: Any) -> None:
    net = trained()
    found = find_norms(wrap(net), layers(net.state_dict()))
    assert found.norms == {"bn": net.bn, "tail.1": net.tail[1]} and not found.left


def test_a_compiled_module_is_walked_as_it_is() -> None:
    net = trained()
    compiled = torch.compile(net, backend="eager")
    with open_checkpoint(compiled) as checkpoint, open_walker(compiled, checkpoint, RunOptions()) as opened:
        assert len(opened.walker.norms) == 2 and not opened.walker.left
        tallies = as_stored(opened.walker, batches(torch.randn(4, 3, 8, 8), 2), Look())
        assert len(tallies.of) == 2


def test_a_data_parallel_module_is_walked() -> None:
    net = nn.DataParallel(trained())
    with open_checkpoint(net) as checkpoint, open_walker(net, checkpoint, RunOptions()) as opened:
        tallies = as_stored(opened.walker, batches(torch.randn(4, 3, 8, 8), 2), Look())
        assert list(tallies.of) == list(opened.walker.norms) and len(tallies.of) == 2


def test_values_tell_models_of_one_file_apart(tmp_path: Path) -> None:
    """Weights and their average have the same names."""
    net, average = trained(0), trained(1)
    torch.save({"state_dict": net.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "m.pt")
    for key, module in (("state_dict", net), ("state_dict_ema", average)):
        with open_checkpoint(tmp_path / "m.pt") as checkpoint:
            own = layers_of(checkpoint, key)
            assert len(checkpoint.layers) == 4 and len(own) == 2
            for wanted in (own, checkpoint.layers):
                found = find_norms(module, wanted)
                assert list(found.norms) == [layer.name for layer in own]
                assert list(found.norms.values()) == [module.bn, module.tail[1]]


def test_one_module_under_two_names() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.bn

    net = Tied()
    found = find_norms(net, layers(net.state_dict()))
    assert set(found.norms.values()) == {net.bn, net.tail[1]}
    assert not found.left


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("order", [sorted, list, lambda names: sorted(names, reverse=True)])
def test_norms_with_the_same_values_are_told_apart_by_their_whole_names(prefix: str, order: Any) -> None:
    """bn is the end of block.bn and of a.bn, and none of the three was ever updated."""
    net = nn.ModuleDict({"block": nn.ModuleDict({"bn": nn.BatchNorm2d(4)}), "bn": nn.BatchNorm2d(4)})
    net["a"] = nn.ModuleDict({"bn": nn.BatchNorm2d(4)})
    state = {prefix + name: value for name, value in net.state_dict().items()}
    found = find_norms(net, layers({name: state[name] for name in order(state)}))
    wanted = {f"{prefix}{name}": net.get_submodule(name) for name in ("block.bn", "bn", "a.bn")}
    assert found.norms == wanted and not found.left


def test_other_values_are_another_norm() -> None:
    net, other = trained(0), trained(1)
    found = find_norms(other, layers(net.state_dict()))
    assert not found.norms and set(found.left) == {"bn", "tail.1"}


def test_broken_values_are_no_obstacle() -> None:
    net = trained()
    net.bn.running_mean[1], net.bn.running_var[2] = torch.nan, torch.inf
    found = find_norms(net, layers(net.state_dict()))
    assert list(found.norms) == ["bn", "tail.1"]


class Functional(nn.Module):
    """Keeps the buffers itself, and calls the function on something that no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(nn.functional.batch_norm(5 * x, self.running_mean, self.running_var, self.weight, self.bias))


def test_what_is_left_and_why() -> None:
    net = nn.Sequential(OrderedDict(
        bn=nn.BatchNorm2d(3),
        batch=nn.BatchNorm2d(3, track_running_stats=False),
        instance=nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        function=Functional(),
        script=torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))),
        frozen=FrozenBatchNorm2d(3),
        group=nn.GroupNorm(1, 3),
    )).eval()  # fmt: skip
    found = find_norms(net, layers(net))
    assert set(found.norms) == {"bn", "function.norm", "frozen"}
    assert "function.norm" not in found.left
    reasons = {
        "batch": "keeps no statistics",
        "instance": "InstanceNorm trains",
        "script": "compiled code",
        "function": "Functional",
    }
    for name, words in reasons.items():
        (why,) = (why for layer, why in found.left.items() if layer.startswith(name))
        assert words in why


def test_a_functional_norm_is_left_and_not_measured_as_something_else() -> None:
    net = nn.Sequential(OrderedDict(function=Functional())).eval()
    with torch.no_grad():
        result = nd.recalibrate(net, torch.randn(64, 3, 8, 8) + 3)
    assert [row.layer for row in result.report.rows] == ["function.norm"]
    assert set(result.report.left) == {"function"}
    assert torch.equal(net.function.running_mean, torch.ones(3))


def test_norms_without_statistics_are_looked_at() -> None:
    net = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8))
    found = find_norms(net, layers(net))
    assert set(found.others) == {"0", "1"} and set(found.norms) == {"3"}


def test_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning puts `model.` before every name; --arch builds what is inside."""
    (tmp_path / "lightning_nets.py").write_text(
        "from torch import nn\n"
        "def build(width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net[1].running_mean.normal_()
    state = {f"model.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.0", "epoch": 3}, tmp_path / "m.ckpt")
    options = RunOptions(arch="lightning_nets:build", arch_args='{"width": 4}')
    with open_checkpoint(tmp_path / "m.ckpt") as checkpoint:
        (layer,) = checkpoint.layers
        with open_walker(tmp_path / "m.ckpt", checkpoint, options) as opened:
            assert list(opened.walker.norms) == [layer.name] and not opened.walker.left
