"""Whole architectures with random weights: no norm missed, none invented, names as in named_modules()."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from normdoctor.layers import Checkpoint

NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


class WithSharedTrunk(nn.Module):
    """Two heads on one trunk, everything that looks like a norm and is none beside it."""

    def __init__(self) -> None:
        super().__init__()
        trunk = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.GRU(8, 8))
        self.heads = nn.ModuleDict({"a": nn.Sequential(trunk, nn.PReLU(8)), "b": nn.Sequential(trunk, nn.Linear(8, 1))})
        self.out_norm = nn.RMSNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.spectral = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.weight = nn.Parameter(torch.ones(8))
        self.gamma = nn.Parameter(torch.ones(8))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))


class Unet(nn.Module):
    """Norms under names that say nothing, in the order of their construction."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()) for _ in range(3)])
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
        self.up = nn.ModuleList([nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(3)])
        self.out = nn.Sequential(nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1))


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "nn.Transformer": lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True),
    "nn.TransformerEncoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, nn.LayerNorm(8)
    ),
    "nn.TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(8, 2, 16, bias=False),
    "shared trunk": WithSharedTrunk,
    "U-Net": Unet,
}
FROM_FIXTURES = [
    "plain", "plain-bias", "residual", "residual-zero-init", "preactivation", "dense", "depthwise", "vgg", "mlp",
    "conv1d", "groupnorm", "groupnorm-residual", "instancenorm", "transformer-layernorm", "transformer-rmsnorm",
    "transformer-zero-centred", "transformer-dyt",
]  # fmt: skip


@pytest.fixture(params=[*PLAIN, *FROM_FIXTURES])
def model(request: pytest.FixtureRequest, nets: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    build = PLAIN.get(request.param) or nets.HEALTHY[request.param].build
    built: nn.Module = build()
    return built


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) or type(module).__name__ in ("ZeroCentredRMSNorm", "DynamicTanh")


def true_norms(model: nn.Module, *, with_tensors: bool) -> list[str]:
    return [
        name for name, module in model.named_modules() if is_norm(module) and (module.state_dict() or not with_tensors)
    ]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_state_dict(model: nn.Module, legacy: bool, reread: Callable[..., Checkpoint]) -> None:
    layers = reread(model.state_dict(), legacy=legacy).layers
    assert [layer.name for layer in layers] == true_norms(model, with_tensors=True)


@pytest.mark.parametrize("way", ["zip", "legacy", "live"])
def test_module(model: nn.Module, way: str, save: Callable[..., Path], read: Callable[[Any], Checkpoint]) -> None:
    layers = read(model if way == "live" else save(model, legacy=way == "legacy")).layers
    assert [layer.name for layer in layers] == true_norms(model, with_tensors=False)
    for layer in layers:
        module = model.get_submodule(layer.name)
        assert layer.origin == f"{type(module).__module__}.{type(module).__qualname__}"
        assert layer.kind.value in type(module).__name__
        assert layer.eps == getattr(module, "eps", None)
        assert layer.training is True
