"""One small net, saved in every way a reader knows, reads the same."""

from __future__ import annotations

import json
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from normdoctor.layers import VECTORS, Checkpoint, Container, NormKind, NormLayer

Read = Callable[[Any], Checkpoint]


class Unit(nn.Module):
    """Children in an order of its own, a norm of every kind inside."""

    def __init__(self) -> None:
        super().__init__()
        self.z_first = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.02)
        self.a_after = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6, momentum=None, affine=False))
        self.ln = nn.LayerNorm(12, eps=1e-6)
        self.gn = nn.GroupNorm(2, 8)
        self.inorm = nn.InstanceNorm2d(5, affine=True, track_running_stats=True, momentum=0.3)
        self.bare = nn.BatchNorm2d(4, track_running_stats=False)
        self.slope = nn.PReLU(8)
        self.head = nn.Linear(12, 20_000)


TRUTH: dict[str, tuple[NormKind, int]] = {
    "bn": (NormKind.BATCH, 8),
    "a_after.1": (NormKind.BATCH, 6),
    "ln": (NormKind.LAYER, 12),
    "gn": (NormKind.GROUP, 8),
    "inorm": (NormKind.INSTANCE, 5),
    "bare": (NormKind.BATCH, 4),
}
HYPER: dict[str, dict[str, Any]] = {
    "bn": {"eps": 1e-3, "momentum": 0.02, "training": True, "affine": True, "track_running_stats": True},
    "a_after.1": {"eps": 1e-5, "momentum": "cumulative", "training": False, "affine": False, "requires_grad": None},
    "ln": {"eps": 1e-6, "momentum": None, "affine": True, "track_running_stats": None, "requires_grad": False},
    "gn": {"eps": 1e-5, "groups": 2, "momentum": None, "affine": True, "requires_grad": True},
    "inorm": {"eps": 1e-5, "momentum": 0.3, "affine": True, "track_running_stats": True},
    "bare": {"momentum": 0.1, "track_running_stats": False, "running_mean": None, "num_batches_tracked": None},
}
UNSAID = ("eps", "momentum", "training", "affine", "track_running_stats", "requires_grad", "origin", "groups")


def build_net() -> nn.Module:
    """A Unit with random values everywhere, in mixed modes."""
    torch.manual_seed(0)
    net = Unit()
    for tensor in net.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(77))
    net.a_after[1].eval()
    net.ln.requires_grad_(False)
    return net


@pytest.fixture
def net() -> nn.Module:
    return build_net()


class Contract:
    """What every format has to say about the net. Subclasses write it."""

    container: Container
    says_hyper = False

    def write(self, net: nn.Module, folder: Path) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def checkpoint(self, net: nn.Module, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
        """The net as read from what `write` wrote; its class can be imported only while it is written."""
        module = types.ModuleType("vanished_package")
        module.Unit = Unit  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "vanished_package", module)
            patch.setattr(Unit, "__module__", "vanished_package")
            target = self.write(net, tmp_path)
        return read(target)

    @pytest.fixture
    def layers(self, checkpoint: Checkpoint) -> dict[str, NormLayer]:
        return {layer.name: layer for layer in checkpoint.layers}

    def expected_names(self, net: nn.Module) -> list[str]:
        return [name for name, _ in net.named_modules() if name in TRUTH]

    def test_names_in_the_order_of_named_modules(self, checkpoint: Checkpoint, net: nn.Module) -> None:
        assert [layer.name for layer in checkpoint.layers] == self.expected_names(net)
        assert [layer.path for layer in checkpoint.layers] == self.expected_names(net)

    def test_container(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.container is self.container

    def test_channels(self, layers: dict[str, NormLayer]) -> None:
        assert {name: layer.channels for name, layer in layers.items()} == {
            name: channels for name, (_, channels) in TRUTH.items()
        }

    def test_values(self, layers: dict[str, NormLayer], net: nn.Module) -> None:
        for name, layer in layers.items():
            module = net.get_submodule(name)
            for field in (*VECTORS, "num_batches_tracked"):
                tensor, array = getattr(module, field, None), getattr(layer, field)
                assert (tensor is None) == (array is None), f"{name}.{field}"
                if tensor is not None:
                    assert array.dtype == str(tensor.dtype).removeprefix("torch.")
                    np.testing.assert_array_equal(array.numpy(), tensor.detach().numpy(), strict=True)

    def test_what_is_not_said_stays_unknown(self, layers: dict[str, NormLayer]) -> None:
        if self.says_hyper:
            for name, fields in HYPER.items():
                assert {field: getattr(layers[name], field) for field in fields} == fields, name
        else:
            for layer in layers.values():
                assert {getattr(layer, field) for field in UNSAID} == {None}, layer.name

    def test_kinds(self, layers: dict[str, NormLayer]) -> None:
        for name, layer in layers.items():
            assert layer.kind is TRUTH[name][0], name

    def test_every_tensor_is_listed(self, checkpoint: Checkpoint, net: nn.Module) -> None:
        assert {ref.name for ref in checkpoint.list_references()} == set(net.state_dict())

    def test_only_norms_are_read(self, checkpoint: Checkpoint) -> None:
        for layer in checkpoint.layers:
            layer.numbers.load()
        if checkpoint.container is Container.MEMORY:
            assert checkpoint.bytes_total is None
        else:
            path = Path(checkpoint.path)
            files = list(path.iterdir()) if path.is_dir() else [path]
            assert checkpoint.bytes_total == sum(file.stat().st_size for file in files)
            assert 0 < checkpoint.count_bytes_read() < checkpoint.bytes_total / 10


class FromNames(Contract):
    """A state_dict says names and shapes: a BatchNorm without buffers looks like any norm, and its name decides."""

    def test_kinds(self, layers: dict[str, NormLayer]) -> None:
        said = {name: layer.kind for name, layer in layers.items()}
        # Its name says nothing, so "bare" could be a LayerNorm or a GroupNorm as well.
        assert said == {name: kind for name, (kind, _) in TRUTH.items()} | {"bare": NormKind.LAYER_OR_GROUP}


class TestZip(FromNames):
    container = Container.ZIP

    def write(self, net: nn.Module, folder: Path) -> Any:
        torch.save(net.state_dict(), folder / "m.pt")
        return folder / "m.pt"


class TestZipProtocol5(TestZip):
    def write(self, net: nn.Module, folder: Path) -> Any:
        torch.save(net.state_dict(), folder / "m.pt", pickle_protocol=5)
        return folder / "m.pt"


class TestLegacy(FromNames):
    container = Container.LEGACY

    def write(self, net: nn.Module, folder: Path) -> Any:
        torch.save(net.state_dict(), folder / "m.pt", _use_new_zipfile_serialization=False)
        return folder / "m.pt"


class TestSafetensors(FromNames):
    container = Container.SAFETENSORS

    def write(self, net: nn.Module, folder: Path) -> Any:
        safetensors.torch.save_file(net.state_dict(), folder / "m.safetensors")
        return str(folder / "m.safetensors")  # a path may be a str, too

    def expected_names(self, net: nn.Module) -> list[str]:
        return sorted(super().expected_names(net), key=self.place)

    @staticmethod
    def place(name: str) -> tuple[bool, str]:
        """safetensors sorts tensors by element size, largest first, then by name: int64 counters lead."""
        return (name not in ("a_after.1", "bn", "inorm"), name)


class TestSharded(FromNames):
    """Two safetensors shards and an index in the model's order, opened by their folder."""

    container = Container.FOLDER

    def write(self, net: nn.Module, folder: Path) -> Any:
        folder, places = folder / "net", {}
        folder.mkdir()
        state = list(net.state_dict().items())
        for name, items in (("model-1.safetensors", state[:9]), ("model-2.safetensors", state[9:])):
            safetensors.torch.save_file(dict(items), folder / name)
            places |= dict.fromkeys(dict(items), name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return folder


class TestShardedTorch(FromNames):
    """The index is sorted by name, but torch.save keeps the order."""

    container = Container.FOLDER

    def write(self, net: nn.Module, folder: Path) -> Any:
        folder, places = folder / "net", {}
        folder.mkdir()
        state = list(net.state_dict().items())
        for name, items in (("pytorch_model-1.bin", state[:9]), ("pytorch_model-2.bin", state[9:])):
            torch.save(dict(items), folder / name)
            places |= dict.fromkeys(dict(items), name)
        text = json.dumps({"metadata": {}, "weight_map": places}, sort_keys=True)
        (folder / "pytorch_model.bin.index.json").write_text(text)
        return folder


class TestDistributed(FromNames):
    container = Container.FOLDER

    def write(self, net: nn.Module, folder: Path) -> Any:
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no process group: saved by one process, as is meant here
            dcp.save(net.state_dict(), storage_writer=dcp.FileSystemWriter(folder / "net"))
        return folder / "net"


class Module(Contract):
    says_hyper = True


class TestModuleZip(Module):
    container = Container.ZIP

    def write(self, net: nn.Module, folder: Path) -> Any:
        torch.save(net, folder / "m.pt")
        return folder / "m.pt"

    def test_names_of_classes(self, layers: dict[str, NormLayer]) -> None:
        assert layers["bn"].origin == "torch.nn.modules.batchnorm.BatchNorm2d"

    def test_the_class_cannot_be_imported(self, checkpoint: Checkpoint) -> None:
        assert "vanished_package.Unit" in {call.name for call in checkpoint.load_calls}
        with pytest.raises((ModuleNotFoundError, pickle.UnpicklingError)):
            torch.load(checkpoint.path, weights_only=False)


class TestModuleLegacy(TestModuleZip):
    container = Container.LEGACY

    def write(self, net: nn.Module, folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch finds no source text to save along with the vanished class
            torch.save(net, folder / "m.pt", _use_new_zipfile_serialization=False)
        return folder / "m.pt"


class TestLiveModule(Module):
    container = Container.MEMORY

    def write(self, net: nn.Module, folder: Path) -> Any:
        return net

    def test_nothing_in_the_module_changes(self, net: nn.Module, layers: dict[str, NormLayer]) -> None:
        for layer in layers.values():
            layer.numbers.load()
        fresh = build_net()
        assert [m.training for m in net.modules()] == [m.training for m in fresh.modules()]
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(net.state_dict()[name], tensor)
