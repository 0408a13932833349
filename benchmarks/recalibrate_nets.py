"""The nets of recalibrate.py, what their statistics should be by definition, and what breaks them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nets
import numpy as np
import torch
from torch import Tensor, nn

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance by the name of the norm, float64."""

NORMS = nn.modules.batchnorm._BatchNorm
NOISE = 1.0
"""Standard deviation of what is added to each pixel, whose own is 1."""


def norms_of(net: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in net.named_modules() if isinstance(module, NORMS))


def statistics_of(net: nn.Module) -> Statistics:
    return {name: (norm.running_mean.double(), norm.running_var.double()) for name, norm in norms_of(net)}


def put(net: nn.Module, statistics: Statistics) -> nn.Module:
    """A copy of the net with these statistics."""
    net = copy.deepcopy(net)
    for name, norm in norms_of(net):
        norm.running_mean.copy_(statistics[name][0])
        norm.running_var.copy_(statistics[name][1])
    return net


# by definition


@torch.no_grad()
def definition(net: nn.Module, data: Tensor, *, double: bool, ddof: int = 1) -> Statistics:
    """The self-consistent statistics, one norm a pass over all of the data: two passes over its inputs in float64.

    double: the whole net runs in float64; else in its own type, with float64 for the moments alone."""
    net = copy.deepcopy(net).eval()
    if double:
        net, data = net.double(), data.double()
    found: Statistics = {}
    for name in order_of(net, data[:2]):
        norm = net.get_submodule(name)
        inputs: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0].double()))
        for part in data.split(256):
            net(part)
        handle.remove()
        values = torch.cat(inputs).transpose(0, 1).flatten(1)
        mean = values.mean(1)
        variance = (values - mean[:, None]).square().sum(1) / (values.shape[1] - ddof)
        found[name] = (mean, variance)
        unbiased = variance * (values.shape[1] - ddof) / (values.shape[1] - 1)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(unbiased if ddof else variance)
    return found


def order_of(net: nn.Module, data: Tensor) -> list[str]:
    """The norms as forward reaches them."""
    order: list[str] = []
    handles = [
        norm.register_forward_pre_hook(lambda _, args, name=name: order.append(name)) for name, norm in norms_of(net)
    ]
    net(data)
    for handle in handles:
        handle.remove()
    return order


def distance(found: Statistics, wanted: Statistics) -> tuple[float, float]:
    """The largest shift of a mean in standard deviations, and the largest |ln variance ratio|. A channel that is
    constant has no standard deviation and is left out."""
    shifts, ratios = [0.0], [0.0]
    for name, (mean, variance) in wanted.items():
        live = variance > 1e-12 * (1 + mean.square())
        shifts.append(float(((found[name][0] - mean).abs() / variance.sqrt())[live].max()))
        ratios.append(float((found[name][1] / variance).log().abs()[live].max()))
    return max(shifts), max(ratios)


# the nets of bar 1


class Volume(nn.Module):
    """A digit as a cube of 4 by 4 by 4."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(-1, 1, 4, 4, 4)


def grouped() -> nn.Module:
    layers: list[nn.Module] = [nets.conv3(1, 16), nn.BatchNorm2d(16), nn.ReLU()]
    for stride in (2, 1):
        layers += [nets.conv3(16, 16, stride, groups=4), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, *nets.head(16))


def conv3d() -> nn.Module:
    layers: list[nn.Module] = [Volume()]
    for inputs, outputs in ((1, 8), (8, 16), (16, 16)):
        layers += [nn.Conv3d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, nets.CLASSES))


EXACTNESS: dict[str, Callable[[], nn.Module]] = {
    "plain, 2d": nets.plain_cnn,
    "residual, 2d": nets.ResNet,
    "depthwise, 2d": nets.mobilenet,
    "grouped, 2d": grouped,
    "MLP, 1d of (N, C)": nets.mlp,
    "sequence, 1d of (N, C, L)": nets.conv1d,
    "volumes, 3d": conv3d,
}


def trained(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nets.train(build(), epochs=4)


def export(net: nn.Module, path: Path) -> Path:
    """As ONNX or .pt2, by the name of the path."""
    example = torch.zeros(2, 1, 8, 8)
    if path.suffix == ".onnx":
        torch.onnx.export(
            net.eval(),
            (example,),
            path,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )
    else:
        batch = torch.export.Dim("batch", min=2, max=1024)
        torch.export.save(torch.export.export(net.eval(), (example,), dynamic_shapes=({0: batch},)), path)
    return path


# the peers


def batches_of(data: Tensor, size: int) -> list[Tensor]:
    return list(data.split(size))


def update_bn(net: nn.Module, data: Tensor, size: int = 32) -> nn.Module:
    """torch.optim.swa_utils.update_bn on a copy."""
    net = copy.deepcopy(net)
    torch.optim.swa_utils.update_bn(batches_of(data, size), net)
    return net.eval()


def fvcore(net: nn.Module, data: Tensor, size: int = 32) -> nn.Module:
    """fvcore.nn.precise_bn.update_bn_stats on a copy, which has to be in training mode."""
    from fvcore.nn.precise_bn import update_bn_stats

    net = copy.deepcopy(net).train()
    batches = batches_of(data, size)
    with torch.no_grad():
        update_bn_stats(net, batches, num_iters=len(batches))
    return net.eval()


# what breaks


@dataclass
class Trained:
    """A net after its training, and what its statistics would be by other ways of averaging."""

    name: str
    net: nn.Module
    slow: Statistics
    cumulative: Statistics
    last_batch: Statistics
    earlier: Statistics
    """After a third of the training."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The mean of the weights after each step of the last third."""


class Noise(nn.Module):
    """Makes the digits hard to read, so that accuracies tell nets apart."""

    def forward(self, images: Tensor) -> Tensor:
        return noisy(images)


def noisy(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return images + NOISE * torch.randn(images.shape, generator=generator)


def train_for_repair(name: str, build: Callable[[], nn.Module], seed: int, epochs: int = 10) -> Trained:
    """Train on noisy digits with momentum 1, so that each step leaves the statistics of its batch, and average them in
    other ways."""
    torch.manual_seed(seed)
    net = build()
    for _, norm in norms_of(net):
        norm.momentum = 1.0
    start = statistics_of(net)
    averages = {momentum: dict(start) for momentum in (0.1, 0.001, None)}
    earlier: list[Statistics] = []
    sums: dict[str, Tensor] = {}
    summed, steps = 0, epochs * (1200 // 64)

    def each_step(progress: nets.Progress) -> None:
        nonlocal summed
        batch = statistics_of(net)
        for momentum, average in averages.items():
            share = 1 / progress.step if momentum is None else momentum
            for norm, new in batch.items():
                average[norm] = tuple(
                    old + share * (value - old) for old, value in zip(average[norm], new, strict=True)
                )
        if progress.step == steps // 3:
            earlier.append(dict(averages[0.1]))
        if progress.step > 2 * steps // 3:
            summed += 1
            for key, value in net.named_parameters():
                sums[key] = sums.get(key, 0) + value.detach().double()

    nets.train(nn.Sequential(Noise(), net), epochs=epochs, seed=seed, each_step=each_step)
    last = statistics_of(net)
    net = put(net, averages[0.1])
    with_momentum(net, 0.1)
    for _, norm in norms_of(net):
        norm.num_batches_tracked.fill_(steps)
    weights = {key: (value / summed).float() for key, value in sums.items()}
    return Trained(name, net, averages[0.001], averages[None], last, earlier[0], weights)


def with_momentum(net: nn.Module, momentum: float | None) -> nn.Module:
    for _, norm in norms_of(net):
        norm.momentum = momentum
    return net


def one_batch(net: nn.Module, data: Tensor) -> nn.Module:
    """The statistics of eight images."""
    net = with_momentum(copy.deepcopy(net).train(), 1.0)
    with torch.no_grad():
        net(data[:8])
    return with_momentum(net.eval(), 0.1)


def broken_channel(net: nn.Module, buffer: str, change: Callable[[Tensor], Tensor | float]) -> nn.Module:
    """One channel of the second norm with another value in it."""
    net = copy.deepcopy(net)
    _, norm = list(norms_of(net))[1]
    values = getattr(norm, buffer)
    values[3] = change(values[3])
    return net


def reset(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    for _, norm in norms_of(net):
        norm.reset_running_stats()
    return net


def averaged(found: Trained) -> nn.Module:
    net = copy.deepcopy(found.net)
    net.load_state_dict(found.weights, strict=False)
    return net


BREAKAGES: dict[str, Callable[[Trained, Tensor], nn.Module]] = {
    "healthy": lambda t, data: t.net,
    "reset to 0 and 1": lambda t, data: reset(t.net),
    "momentum 0.001": lambda t, data: with_momentum(put(t.net, t.slow), 0.001),
    "momentum 0": lambda t, data: with_momentum(reset(t.net), 0.0),
    "momentum None": lambda t, data: with_momentum(put(t.net, t.cumulative), None),
    "momentum 1": lambda t, data: with_momentum(put(t.net, t.last_batch), 1.0),
    "one batch of 8": lambda t, data: one_batch(t.net, data),
    "NaN mean in a channel": lambda t, data: broken_channel(t.net, "running_mean", lambda value: float("nan")),
    "Inf variance in a channel": lambda t, data: broken_channel(t.net, "running_var", lambda value: float("inf")),
    "negative variance": lambda t, data: broken_channel(t.net, "running_var", lambda value: -value),
    "half precision, reset": lambda t, data: reset(t.net).half(),
    "averaged weights": lambda t, data: averaged(t),
    "buffers of an earlier epoch": lambda t, data: put(t.net, t.earlier),
}


@torch.no_grad()
def right(net: nn.Module, images: Tensor, labels: Tensor) -> np.ndarray:
    """Which images come out right."""
    dtype = next(net.parameters()).dtype
    return (net.eval()(images.to(dtype)).float().argmax(1) == labels).numpy()


def paired(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[float, float]:
    """The difference of two accuracies on the same images, and its standard error."""
    difference = np.concatenate(one).astype(float) - np.concatenate(other)
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


# the net of bar 3


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nets.conv3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet50(nn.Module):
    """53 norms, 25.6 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, depth in enumerate((3, 4, 6, 3)):
            for index in range(depth):
                blocks.append(Bottleneck(inputs, 64 << stage, 2 if stage and not index else 1))
                inputs = 256 << stage
        self.body = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))
