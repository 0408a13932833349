"""A folder with the code of a small net and its weights in every kind of file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, image, scale=None):
        x = self.norm(self.conv(image)).relu().mean((2, 3))
        return self.head(x if scale is None else x * scale)


class Zoo:
    class Deep(Net):
        pass


def broken():
    raise ValueError("two\\nlines")


def stops():
    raise SystemExit("usage: train.py")


def tuple_of():
    return Net(), 3


def chatty():
    print("building")
    return Net()


def imports_nothing():
    import no_such_package


ready = Net()
"""

BROKEN_PACKAGE = "raise RuntimeError('operator zoo::nms does not exist')\n"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder."""
    import torch

    folder = tmp_path_factory.mktemp("workplace")
    (folder / "archs.py").write_text(CODE)
    (folder / "breaks.py").write_text("import zoolibrary\n")
    (folder / "needs.py").write_text("import no_such_package\n")
    package = folder / "site-packages" / "zoolibrary"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN_PACKAGE)
    sys.path.insert(0, str(folder))
    try:
        import archs
    finally:
        sys.path.remove(str(folder))
    torch.manual_seed(0)
    nets = [archs.Net(), archs.Net()]
    for net in nets:
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
        net.eval()
    state, other = (net.state_dict() for net in nets)
    torch.save(nets[0], folder / "module.pt")
    torch.save({"model": nets[0], "ema": nets[1], "epoch": 3, "optimizer": {"state": {}}}, folder / "modules.pt")
    torch.save(state, folder / "weights.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, folder / "wrapped.pt")
    lightning = {f"net.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": lightning, "epoch": 1}, folder / "lightning.ckpt")
    torch.save({"state_dict": state, "state_dict_ema": other}, folder / "two.pt")
    torch.save({name: tensor.half() for name, tensor in state.items()}, folder / "half.pt")
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder as the working directory; its modules are forgotten afterwards."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", [str(workplace / "site-packages"), *sys.path])
    yield workplace
    for name in ("archs", "breaks", "needs", "zoolibrary"):
        sys.modules.pop(name, None)
