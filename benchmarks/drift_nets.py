"""Nets with BatchNorm whose trainings leave several sets of statistics behind: the right ones and those of many
mishaps. Used by drift.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nets
import torch
from torch import Tensor, nn

Buffers = dict[str, tuple[Tensor, Tensor]]
"""running_mean and running_var by the name of the norm."""

MOMENTA = (0.9, 0.5, 0.03, 0.01, 0.005, 0.001)
"""Besides the net's own: what moving averages over the same batches would have become."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class Colour(nn.Module):
    """Grey images in three colours, by more for brighter images: what a colour net is given."""

    def forward(self, images: Tensor) -> Tensor:
        light = images.mean((1, 2, 3), keepdim=True)
        tint = torch.tensor([1.0, 0.6, 0.3]).view(1, 3, 1, 1) * (1 + 0.5 * light)
        return images * tint + torch.tensor([0.0, 0.4, -0.3]).view(1, 3, 1, 1)


def in_colour(net: nn.Module) -> nn.Module:
    """The net with a first convolution that takes three colours."""
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    parent = next(module for module in net.modules() if first in module.children())
    name = next(name for name, module in parent.named_children() if module is first)
    wider = nn.Conv2d(3, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False)
    setattr(parent, name, wider)
    return nn.Sequential(Colour(), net)


def with_dropout(net: nn.Sequential, share: float) -> nn.Module:
    """A dropout in front of each convolution but the first."""
    layers: list[nn.Module] = []
    for module in net:
        if isinstance(module, nn.Conv2d) and layers:
            layers.append(nn.Dropout(share))
        layers.append(module)
    return nn.Sequential(*layers)


def more(recipe: nets.Recipe, **changes: Any) -> nets.Recipe:
    return nets.Recipe(**{**recipe.__dict__, **changes})


PLAIN, RESIDUAL = nets.HEALTHY["plain"], nets.HEALTHY["residual"]
HEALTHY: dict[str, nets.Recipe] = {
    **{
        name: recipe
        for name, recipe in nets.HEALTHY.items()
        if any(isinstance(module, NORMS) for module in recipe.build().modules())
    },
    **{
        f"{name}-seed-{seed}": more(nets.HEALTHY[name], seed=seed)
        for name, seed in (
            ("plain", 10),
            ("plain-deep", 11),
            ("residual", 12),
            ("residual-deep", 13),
            ("preactivation", 14),
            ("dense", 15),
            ("depthwise", 16),
            ("vgg", 17),
            ("mlp", 18),
            ("conv1d", 19),
        )
    },
    "plain-batch-8": more(PLAIN, batch_size=8, epochs=4, lr=0.02, seed=20),
    "plain-batch-200": more(PLAIN, batch_size=200, epochs=40, seed=21),
    "residual-batch-8": more(RESIDUAL, batch_size=8, epochs=4, lr=0.02, seed=22),
    "residual-batch-128": more(RESIDUAL, batch_size=128, epochs=24, seed=23),
    "plain-constant-then-cosine": more(PLAIN, epochs=30, lr=0.05, seed=24),
    "colour-plain": more(PLAIN, build=lambda: in_colour(nets.plain_cnn()), seed=25),
    "colour-residual": more(RESIDUAL, build=lambda: in_colour(nets.ResNet()), seed=26),
    "colour-plain-2": more(PLAIN, build=lambda: in_colour(nets.plain_cnn(widths=(24, 32))), seed=27),
    "colour-depthwise": more(nets.HEALTHY["depthwise"], build=lambda: in_colour(nets.mobilenet()), seed=28),
}

DROPOUT = {
    f"dropout-{share:g}-{seed}": more(PLAIN, build=lambda share=share: with_dropout(nets.plain_cnn(), share), seed=seed)
    for share, seed in ((0.3, 30), (0.3, 31), (0.5, 32), (0.5, 33))
}
SMALL_BATCH = {
    "batch-2-plain": more(PLAIN, batch_size=2, epochs=2, lr=0.005, seed=40),
    "batch-2-plain-2": more(PLAIN, batch_size=2, epochs=2, lr=0.005, seed=41),
    "batch-2-residual": more(RESIDUAL, batch_size=2, epochs=2, lr=0.005, seed=42),
    "batch-2-mlp": more(nets.HEALTHY["mlp"], batch_size=2, epochs=2, lr=0.005, seed=43),
}


@dataclass
class Trained:
    """A net after its training, in eval mode with its own statistics, and others that go with it or do not."""

    name: str
    model: nn.Module
    momenta: dict[float, Buffers] = field(default_factory=dict)
    halfway: Buffers = field(default_factory=dict)
    """Its statistics in the middle of the training."""
    averaged: dict[str, Tensor] = field(default_factory=dict)
    """The mean of its weights after each epoch but those of the first quarter."""


def norms_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, NORMS))


def buffers_of(model: nn.Module) -> Buffers:
    return {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms_of(model)}


def put(model: nn.Module, buffers: Buffers) -> nn.Module:
    """A copy of the net with these statistics."""
    model = copy.deepcopy(model)
    for name, norm in norms_of(model):
        norm.running_mean.copy_(buffers[name][0])
        norm.running_var.copy_(buffers[name][1])
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of the net with these weights and its own statistics."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights, strict=False)
    return model


def train(name: str, recipe: nets.Recipe) -> Trained:
    """Train, and keep moving averages of other momenta over the same batches beside the net's own."""
    torch.manual_seed(recipe.seed)
    model = recipe.build()
    trained = Trained(name, model)
    handles = []
    for norm_name, norm in norms_of(model):
        fresh = lambda norm=norm: (torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var))  # noqa: E731
        for momentum in (*MOMENTA, norm.momentum):
            trained.momenta.setdefault(momentum, {})[norm_name] = fresh()
        own, norm.momentum = norm.momentum, 1.0  # so that the buffers hold the batch's statistics after each batch
        norm.own_momentum = own
        handles.append(norm.register_forward_hook(_averaging(trained, norm_name)))
    momentum = own
    steps = 1200 // recipe.batch_size
    last = recipe.epochs * steps
    tail = [step for step in range(steps, last + 1, steps) if step > 0.25 * last]

    def each_step(progress: nets.Progress) -> None:
        if progress.step == last // 2 // steps * steps:
            trained.halfway = {key: (a.clone(), b.clone()) for key, (a, b) in trained.momenta[momentum].items()}
        if progress.step in tail:
            for key, weight in weights_of(model).items():
                trained.averaged[key] = trained.averaged.get(key, 0) + weight / len(tail)

    settings = {"batch_size": recipe.batch_size, "optimizer": recipe.optimizer, "seed": recipe.seed}
    nets.train(model, epochs=recipe.epochs, lr=recipe.lr, schedule=recipe.schedule, each_step=each_step, **settings)
    for handle in handles:
        handle.remove()
    for _, norm in norms_of(model):
        norm.momentum = norm.own_momentum
    trained.model = put(model, trained.momenta[momentum])
    return trained


def one_epoch_on(model: nn.Module) -> nn.Module:
    """The net after an epoch more on noisier images, with the statistics that it had before."""
    further, data = copy.deepcopy(model).train(), nets.load_digits_split()
    generator = torch.Generator().manual_seed(0)
    update = torch.optim.SGD(further.parameters(), lr=0.05, momentum=0.9)
    for indices in torch.randperm(len(data.train_images), generator=generator).split(64):
        images = data.train_images[indices]
        images = images + 0.7 * torch.randn(images.shape, generator=generator)
        update.zero_grad()
        nn.functional.cross_entropy(further(images), data.train_labels[indices]).backward()
        update.step()
    return with_weights(model, weights_of(further))


def _averaging(trained: Trained, name: str) -> Callable[..., None]:
    def average(norm: Any, inputs: Any, output: Any) -> None:
        for momentum, buffers in trained.momenta.items():
            mean, var = buffers[name]
            mean.lerp_(norm.running_mean, momentum)
            var.lerp_(norm.running_var, momentum)

    return average


def load_or_train(name: str, recipe: nets.Recipe, directory: Path | None) -> Trained:
    """From the directory where it is there, else trained, and saved there."""
    if directory is None:
        return train(name, recipe)
    path = directory / f"{name}.pt"
    if path.exists():
        return torch.load(path, weights_only=False)  # our own
    trained = train(name, recipe)
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(trained, path)
    return trained
