"""What the patterns of the fold benchmark have in common: how each is registered, and what is known of it.

A pattern is a small network around one or a few BatchNorms. It says how many of them are there and how many can be
folded without changing what the network computes. Nets (fold_nets*.py, fold_models.py) are modules, saved in every
format that has them; graphs (fold_graph*.py) are ONNX files, many of which no exporter would write.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FORMATS = ("module", "pt2", "pt2-decomposed", "onnx-torchscript", "onnx-dynamo")
"""The ways a net is saved. A graph has the format "onnx" only."""


@dataclass(frozen=True)
class Pattern:
    """One network and what is known of it.

    norms: how many it has. folds: how many of them can be folded exactly in a graph, in_module: in a module, whose code
    stays as it is. least: fewer than folds is fine too, where a fold is more clever than it is expected. kind: plain,
    where the norm sits right behind a convolution or linear layer of its own; hard; trap, where a tool may be tempted.
    written_out: the norms are multiplications and additions."""

    name: str
    kind: str
    norms: int
    folds: int
    in_module: int
    least: int | None
    formats: tuple[str, ...]
    make: Callable[[int], Any]
    written_out: bool = False

    def expected(self, fmt: str) -> int:
        return self.in_module if fmt == "module" else self.folds

    def enough(self, fmt: str) -> int:
        """The fewest folds that nobody would call a miss."""
        return self.expected(fmt) if self.least is None else min(self.least, self.expected(fmt))


def seed_of(name: str, seed: int) -> int:
    return zlib.crc32(f"{name} {seed}".encode())


# Modules -------------------------------------------------------------------------------------------------

NETS: list[Pattern] = []


class Net(nn.Module):
    """A pattern as a module: its class is its name. build() makes the layers and returns the example inputs."""

    kind: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.float32
    body: Callable[..., Any]

    def __init_subclass__(
        cls,
        kind: str = "",
        norms: int = 1,
        folds: int | None = None,
        in_module: int | None = None,
        least: int | None = None,
        formats: tuple[str, ...] = FORMATS,
        without: tuple[str, ...] = (),
        written_out: bool = False,
    ) -> None:
        super().__init_subclass__()
        if not kind:  # torch.export makes subclasses of its own
            return
        folds = (0 if kind == "trap" else norms) if folds is None else folds
        in_module = folds if in_module is None else in_module
        formats = tuple(fmt for fmt in formats if fmt not in without)
        NETS.append(
            Pattern(
                cls.__name__, kind, norms, folds, in_module, least, formats, lambda seed: make(cls, seed), written_out
            )
        )

    def build(self) -> Any:
        raise NotImplementedError

    def finish(self) -> None:
        """What is done after the statistics are set and the module is in eval mode."""

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def make(cls: type[Net], seed: int) -> tuple[Net, tuple[Tensor, ...]]:
    """The module of one pattern with statistics as after training, and its example inputs."""
    torch.manual_seed(seed_of(cls.__name__, seed))
    net = cls()
    inputs = net.build()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                train(module)
            elif isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module.bias is not None:
                module.bias.normal_()
        net.eval().to(cls.dtype)
        net.finish()
    return net, tuple(each.to(cls.dtype) if each.is_floating_point() else each for each in inputs)


def train(norm: Any, positive: bool = False) -> None:
    """Statistics as training leaves them: variances of 0.05 to 20, scales of both signs, some of them zero."""
    count = norm.num_features
    if norm.running_mean is not None:
        norm.running_mean.copy_(torch.randn(count))
        norm.running_var.copy_(0.05 * 400 ** torch.rand(count))
    if norm.affine:
        scale = 0.2 + 1.5 * torch.rand(count)
        if not (positive or getattr(norm, "positive", False)):
            scale *= torch.where(torch.rand(count) < 0.4, -1.0, 1.0)
            if count > 2:
                scale[torch.randint(count, ()).item()] *= torch.rand(()).item() < 0.5
        norm.weight.copy_(scale)
        norm.bias.copy_(torch.randn(count))


def widths(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 9, (count,)).tolist())


def length() -> int:
    return int(torch.randint(7, 11, ()).item())


def images(channels: int, batch: int = 2, dims: int = 2) -> Tensor:
    return torch.randn(batch, channels, *(length() for _ in range(dims)))


def conv(inputs: int, outputs: int, kernel: int = 3, dims: int = 2, **settings: Any) -> nn.Module:
    """Convolutions by number of dimensions; with a bias or without, as it falls."""
    settings.setdefault("bias", torch.rand(()).item() < 0.5)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](inputs, outputs, kernel, **settings)


def deconv(inputs: int, outputs: int, kernel: int = 3, dims: int = 2, **settings: Any) -> nn.Module:
    settings.setdefault("bias", torch.rand(()).item() < 0.5)
    return (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](inputs, outputs, kernel, **settings)


def norm(channels: int, dims: int = 2, positive: bool = False, **settings: Any) -> nn.Module:
    module = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels, **settings)
    if positive:
        module.positive = True
    return module
