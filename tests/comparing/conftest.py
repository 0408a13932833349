"""A small net trained for five epochs, as every checkpoint on the way, and what goes wrong with such checkpoints."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Save = Callable[..., Path]

torch.set_num_threads(1)  # for tensors this small more threads only wait for each other

EPOCH = 12
"""Batches of 100."""


def is_buffer(name: str) -> bool:
    return "running" in name or "num_batches" in name


@dataclass(frozen=True)
class Training:
    """State dicts after each epoch, and averages of all steps that were taken in several ways."""

    epochs: tuple[State, ...]
    averages: Mapping[str, State]


def trained(nets: ModuleType, *, frozen_from: int | None = None) -> Training:
    torch.manual_seed(0)
    net = nets.ResNet(widths=(8, 16))
    epochs: list[State] = []
    start = snapshot(net)
    averages = {name: dict(snapshot(net)) for name in ("with buffers", "as timm", "copied", "without")}

    def each_step(progress: Any) -> None:
        for name, value in progress.model.state_dict().items():
            blend(averages["as timm"][name], value)
            if value.is_floating_point():
                blend(averages["with buffers"][name], value)
            else:
                averages["with buffers"][name].copy_(value)
            if is_buffer(name):
                averages["copied"][name].copy_(value)
            else:
                blend(averages["copied"][name], value)
                blend(averages["without"][name], value)
        if progress.step % EPOCH == 0:
            epochs.append(snapshot(progress.model))
            if progress.step // EPOCH == frozen_from:
                for module in progress.model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()

    nets.train(net, epochs=5, batch_size=100, lr=0.05, each_step=each_step)
    assert start.keys() == epochs[0].keys()
    return Training(tuple(epochs), averages)


def blend(average: Tensor, value: Tensor, decay: float = 0.9) -> None:
    """As timm's ModelEmaV2 does: of whole numbers the fraction is cut off."""
    average.copy_(decay * average + (1 - decay) * value)


def snapshot(net: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.fixture(scope="session")
def training(nets: ModuleType) -> Training:
    return trained(nets)


@pytest.fixture(scope="session")
def frozen_training(nets: ModuleType) -> Training:
    """In eval mode from the second epoch on."""
    return trained(nets, frozen_from=2)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(state: Any, name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)
        return path

    return save


@pytest.fixture(scope="session")
def followed(training: Training, nets: ModuleType) -> Callable[..., State]:
    """The state after some batches went through the last epoch's net in training mode, without a step."""

    @functools.cache
    def run(classes: int = 10, seed: int = 0, scale: float = 1.0) -> State:
        net = nets.ResNet(widths=(8, 16))
        net.load_state_dict(copy.deepcopy(training.epochs[-1]))
        data = nets.load_digits_split()
        chosen = (data.train_labels < classes).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed)
        net.train()
        with torch.no_grad():
            for _ in range(30):
                places = torch.randint(0, len(chosen), (64,), generator=generator)
                net(data.train_images[chosen[places]] * scale)
        return snapshot(net)

    return run
