"""One small residual net in every format that has a graph, or that a graph can be traced from."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

CODE = """
import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.tail = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.SiLU())
        self.pool = nn.MaxPool2d(2)
        self.bn3 = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.tail(x + self.bn2(self.conv2(x)))
        return self.head(self.bn3(self.pool(x)).mean((2, 3)))


class Undecided(Residual):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)
"""

IMAGES = (2, 3, 16, 16)
SHAPE = "2,3,16,16"


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The code of the nets, importable as `placing_nets`."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "placing_nets.py").write_text(CODE)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("placing_nets")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("placing_nets", None)


@pytest.fixture(scope="session")
def net(nets: ModuleType) -> nn.Module:
    """With statistics of its own, and gains and shifts that differ."""
    torch.manual_seed(0)
    made: nn.Module = nets.Residual().train()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bn" in name or name.startswith("tail.1"):
                parameter.add_(torch.rand_like(parameter) * 0.3)
        for _ in range(10):
            made(torch.randn(IMAGES))
    return made.eval()


@pytest.fixture(scope="session")
def files(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.onnx, net.pt2, module.pt, script.pt and weights.pt."""
    folder = tmp_path_factory.mktemp("files")
    example = (torch.zeros(IMAGES),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of its older formats
        torch.onnx.export(
            net, example, folder / "net.onnx", dynamo=False, training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False, opset_version=17, input_names=["x"], dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
        torch.jit.save(torch.jit.script(net), folder / "script.pt")
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.export.save(torch.export.export(net, example, dynamic_shapes=({0: batch},)), folder / "net.pt2")
    torch.save(net, folder / "module.pt")
    torch.save(net.state_dict(), folder / "weights.pt")
    return folder
