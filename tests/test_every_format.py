"""One sick net in every format: the same layers and the same findings, except what a format cannot say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import normdoctor as nd

IMAGES = (2, 3, 8, 8)

NO_HYPER = {"S104"}
"""Findings that need the momentum. (300 updates at the default of 0.1 would leave no residue.)"""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    """Norms of three kinds, with a fault of its own in each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16, momentum=0.001)
        self.blocks = nn.Sequential(Block(16), Block(16), Block(16))
        self.gn = nn.GroupNorm(4, 16)
        self.ln = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.bn1(self.stem(x))))
        return self.fc(self.ln(self.gn(x).mean((2, 3))))


def sick_net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().train()
    with torch.no_grad():
        for _ in range(300):
            net(torch.randn(IMAGES) * 1.7 + 0.3)
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.3)
        tensors = net.state_dict()
        tensors["blocks.0.bn.running_var"][3] = float("nan")
        tensors["blocks.1.bn.running_var"][[2, 5]] = -1e-5
        tensors["blocks.2.bn.weight"][4] = float("inf")
        tensors["gn.weight"][2] = 1e5
        tensors["ln.weight"][1] = float("nan")
    return net.eval()


def exported(net: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(net, (torch.zeros(IMAGES),), dynamic_shapes=({0: batch},))


def write_sharded(net: nn.Module, path: Path) -> None:
    path.mkdir()
    items = list(net.state_dict().items())
    places = {}
    for number, part in enumerate((items[:11], items[11:])):
        safetensors.torch.save_file(dict(part), path / f"{number}.safetensors")
        places |= dict.fromkeys(dict(part), f"{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_distributed(net: nn.Module, path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemWriter, save

    save(net.state_dict(), storage_writer=FileSystemWriter(path))


def write_onnx(net: nn.Module, path: Path) -> None:
    torch.onnx.export(
        net, (torch.zeros(IMAGES),), path, dynamo=False, training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False, opset_version=17,
    )  # fmt: skip


Write = Callable[[nn.Module, Path], Any]

FORMATS: dict[str, tuple[Write, set[str]]] = {
    "zip": (lambda net, path: torch.save(net.state_dict(), path), NO_HYPER),
    "legacy": (
        lambda net, path: torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False),
        NO_HYPER,
    ),
    "safetensors": (lambda net, path: safetensors.torch.save_file(net.state_dict(), path), NO_HYPER),
    "sharded": (write_sharded, NO_HYPER),
    "distributed": (write_distributed, NO_HYPER),
    "module": (lambda net, path: torch.save(net, path), set()),
    "module, legacy": (lambda net, path: torch.save(net, path, _use_new_zipfile_serialization=False), set()),
    "scripted": (lambda net, path: torch.jit.save(torch.jit.script(net), path), set()),
    "traced": (lambda net, path: torch.jit.save(torch.jit.trace(net, torch.zeros(IMAGES)), path), set()),
    "exported": (lambda net, path: torch.export.save(exported(net), path), set()),
    "decomposed": (lambda net, path: torch.export.save(exported(net).run_decompositions(), path), set()),
    # ONNX has the momentum, but no counter.
    "onnx": (write_onnx, NO_HYPER),
}
"""How each is written, and the codes it gives no ground for."""

EXPECTED = {
    ("S104", "bn1", ()),
    ("S101", "blocks.0.bn", (3,)),
    ("S102", "blocks.1.bn", (2, 5)),
    ("A201", "blocks.2.bn", (4,)),
    ("A201", "ln", (1,)),
    ("N401", "gn", (2,)),
}
LAYERS = {
    "bn1": nd.NormKind.BATCH,
    "blocks.0.bn": nd.NormKind.BATCH,
    "blocks.1.bn": nd.NormKind.BATCH,
    "blocks.2.bn": nd.NormKind.BATCH,
    "gn": nd.NormKind.GROUP,
    "ln": nd.NormKind.LAYER,
}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return sick_net()


@pytest.fixture(scope="module")
def live(net: nn.Module) -> nd.Report:
    return nd.inspect(net)


def said(report: nd.Report, without: Collection[str] = ()) -> set[tuple[str, str | None, tuple[int, ...], str]]:
    """What a report says, but for what loading the file would run."""
    return {
        (finding.code, finding.layer, finding.channels, str(finding.severity))
        for finding in report.findings
        if finding.code != "F901" and finding.code not in without
    }


def test_the_live_module_has_every_fault(live: nd.Report) -> None:
    assert {layer.name: layer.kind for layer in live.layers} == LAYERS
    assert {finding[:3] for finding in said(live)} >= EXPECTED


GRAPHS = ("exported", "decomposed", "onnx")
"""Formats that have the graph, which is traced from a live module where there are inputs."""


@pytest.fixture(scope="module")
def traced(net: nn.Module) -> nd.Report:
    return nd.inspect(net, example_inputs=torch.zeros(IMAGES))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(
    name: str, net: nn.Module, live: nd.Report, traced: nd.Report, tmp_path: Path
) -> None:
    write, unsaid = FORMATS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of its older formats
        write(net, tmp_path / "net")
    report = nd.inspect(tmp_path / "net")
    assert {layer.name: layer.kind for layer in report.layers} == LAYERS
    assert [layer.channels for layer in report.layers] == [16] * 6
    assert said(report) == said(traced if name in GRAPHS else live, unsaid)
    if unsaid:
        assert {skip.code for skip in report.skips} or report.assumed
