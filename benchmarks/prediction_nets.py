"""Healthy nets of five families with six activations, and what their trainings leave behind on the way. Used by
prediction.py."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nets
import torch
from torch import Tensor, nn

State = dict[str, Tensor]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
}


@dataclass(frozen=True)
class Parts:
    """What a net is made of."""

    activation: Callable[[], nn.Module]
    momentum: float
    bias: bool
    """Whether convolutions have one although a norm follows, as in VGG."""
    stride: int
    """Of the last convolution that may have one."""

    def norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, momentum=self.momentum)

    def conv(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=self.bias)

    def conv_norm(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        return [self.conv(inputs, outputs, size, stride, groups), self.norm(outputs), self.activation()]


class Residual(nn.Module):
    """The block of ResNet-18."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = parts.conv(inputs, outputs, 3, stride), parts.norm(outputs)
        self.conv2, self.norm2 = parts.conv(outputs, outputs), parts.norm(outputs)
        self.inner, self.outer = parts.activation(), parts.activation()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(parts.conv(inputs, outputs, 1, stride), parts.norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.inner(self.norm1(self.conv1(x)))))
        return self.outer(y + self.downsample(x))


class PreActivation(nn.Module):
    """Norms and activations come first (He and others 2016, "Identity Mappings in Deep Residual Networks")."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = parts.norm(inputs), parts.conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = parts.norm(outputs), parts.conv(outputs, outputs)
        self.first, self.second = parts.activation(), parts.activation()
        self.shortcut = parts.conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(self.second(self.norm2(self.conv1(y))))


class Inverted(nn.Module):
    """Expand, filter each channel alone, project without an activation (MobileNetV2)."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * inputs
        expand = parts.conv_norm(inputs, hidden, 1)
        filtered = parts.conv_norm(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*expand, *filtered, parts.conv(hidden, outputs, 1), parts.norm(outputs))
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skips else self.conv(x)


class Branched(nn.Module):
    """Norms behind norms with only a convolution between, of 1x1 and of 3x3, whose beta is trained: it also goes
    another way. (Where a norm's output only goes through 1x1 convolutions to other norms, as in MobileNetV2, its beta
    has no gradient and stays 0.)"""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv, self.norm = parts.conv(inputs, outputs, 3, stride), parts.norm(outputs)
        self.point, self.norm1 = parts.conv(outputs, outputs, 1), parts.norm(outputs)
        self.filter, self.norm2 = parts.conv(outputs, outputs), parts.norm(outputs)
        self.first, self.second, self.third = parts.activation(), parts.activation(), parts.activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.first(x) + self.second(self.norm1(self.point(x))) + self.third(self.norm2(self.filter(x)))


def plain(parts: Parts) -> list[nn.Module]:
    sizes = ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, parts.stride), (48, 64, 1))
    layers = [layer for inputs, outputs, stride in sizes for layer in parts.conv_norm(inputs, outputs, 3, stride)]
    return [*layers, *nets.head(64)]


def residual(parts: Parts) -> list[nn.Module]:
    sizes = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, parts.stride), (48, 48, 1))
    return [*parts.conv_norm(1, 16), *(Residual(parts, *size) for size in sizes), *nets.head(48)]


def preactivation(parts: Parts) -> list[nn.Module]:
    sizes = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, parts.stride))
    blocks = [PreActivation(parts, *size) for size in sizes]
    return [parts.conv(1, 16), *blocks, parts.norm(48), parts.activation(), *nets.head(48)]


def depthwise(parts: Parts) -> list[nn.Module]:
    sizes = ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, parts.stride), (32, 32, 1))
    blocks = [Inverted(parts, *size) for size in sizes]
    return [*parts.conv_norm(1, 16), *blocks, *parts.conv_norm(32, 64, 1), *nets.head(64)]


def branched(parts: Parts) -> list[nn.Module]:
    sizes = ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, parts.stride))
    return [*(Branched(parts, *size) for size in sizes), *nets.head(48)]


FAMILIES: dict[str, Callable[[Parts], list[nn.Module]]] = {
    "plain": plain,
    "residual": residual,
    "preactivation": preactivation,
    "depthwise": depthwise,
    "branched": branched,
}


@dataclass(frozen=True)
class Plan:
    """How one net is made and trained."""

    family: str
    activation: str
    seed: int
    momentum: float
    bias: bool
    pixels: int
    """The digits have 8 in each direction; more are interpolated."""
    batch_size: int
    epochs: int
    lr: float
    schedule: str

    @property
    def name(self) -> str:
        return f"{self.family}-{self.activation}-{self.seed}"

    def build(self) -> nn.Module:
        parts = Parts(ACTIVATIONS[self.activation], self.momentum, self.bias, self.pixels // 8)
        larger = [nn.Upsample(scale_factor=2, mode="bilinear")] if self.pixels > 8 else []
        return nn.Sequential(
            OrderedDict(input=nn.Sequential(*larger), body=nn.Sequential(*FAMILIES[self.family](parts)))
        )


TRAININGS = (
    (0.1, 64, 12, 0.1, "cosine"),
    (0.03, 48, 12, 0.08, "cosine"),
    (0.01, 32, 20, 0.05, "cosine"),
    (0.1, 32, 8, 0.05, "step"),
    (0.03, 100, 24, 0.1, "step"),
)
"""Momentum, batch size, epochs, learning rate and schedule: they go round, so that every family sees all of them."""

LARGER = {"plain": "relu", "residual": "relu6", "preactivation": "gelu", "depthwise": "silu", "branched": "gelu"}


def plans() -> list[Plan]:
    """Each family with each activation, and one more of each family on larger images."""
    found: list[Plan] = []
    for family in FAMILIES:
        for seed, activation in (*((1, name) for name in ACTIVATIONS), (2, LARGER[family])):
            bias = family == "plain" or (family in ("preactivation", "branched") and activation in ("relu", "silu"))
            training = TRAININGS[len(found) % len(TRAININGS)]
            found.append(Plan(family, activation, seed, training[0], bias, 8 * seed, *training[1:]))
    return found


@dataclass
class Trained:
    """A net after its training, and states from before its end."""

    plan: Plan
    model: nn.Module
    accuracy: float
    early: dict[str, State] = field(default_factory=dict)
    """By "step 20", "epoch 1", "epoch 2"."""
    averaged: State = field(default_factory=dict)
    """The mean of its parameters after each epoch of the second half."""


def train(plan: Plan) -> Trained:
    torch.manual_seed(1000 * plan.seed + sum(map(ord, plan.name)))
    model = plan.build()
    trained = Trained(plan, model, 0.0)
    steps = 1200 // plan.batch_size
    wanted = {20: "step 20", steps: "epoch 1", 2 * steps: "epoch 2"}
    tail = [epoch * steps for epoch in range(plan.epochs // 2, plan.epochs + 1)]

    def each_step(progress: nets.Progress) -> None:
        if progress.step in wanted:
            trained.early[wanted[progress.step]] = copy.deepcopy(model.state_dict())
        if progress.step in tail:
            for key, parameter in model.named_parameters():
                trained.averaged[key] = trained.averaged.get(key, 0) + parameter.detach() / len(tail)

    nets.train(
        model,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        lr=plan.lr,
        schedule=plan.schedule,
        seed=plan.seed,
        each_step=each_step,
    )
    trained.accuracy = nets.accuracy(model)
    return trained


def load_or_train(plan: Plan, directory: Path) -> Trained:
    """From the directory where it is there, else trained, and saved there."""
    path = directory / f"{plan.name}.pt"
    if path.exists():
        return torch.load(path, weights_only=False)  # our own
    trained = train(plan)
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(trained, path)
    return trained
