"""Patterns of the fold benchmark that are modules: the norm right behind its weight."""

from __future__ import annotations

from typing import Any

import torch
from fold_patterns import Net, conv, deconv, images, norm, widths
from torch import Tensor, nn


class Conv1dNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b, dims=1), norm(b, 1))
        return images(a, dims=1)


class Conv2dNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b, bias=False, padding=1), norm(b))
        return images(a)


class Conv2dBiasNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b, bias=True, stride=2), norm(b), nn.ReLU())
        return images(a)


class Conv3dNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b, dims=3), norm(b, 3))
        return images(a, dims=3)


class DepthwiseConvNorm(Net, kind="plain"):
    def build(self) -> Any:
        (a,) = widths(1)
        self.body = nn.Sequential(conv(a, 2 * a, groups=a), norm(2 * a))
        return images(a)


class GroupedConvNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(2 * a, 2 * b, groups=2, dilation=2), norm(2 * b))
        return images(2 * a)


class ReflectConvNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b, padding=1, padding_mode="reflect"), norm(b))
        return images(a)


class SamePaddedConvNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b, padding="same"), norm(b))
        return images(a)


class Deconv1dNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(deconv(a, b, dims=1, stride=2), norm(b, 1))
        return images(a, dims=1)


class Deconv2dNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(deconv(a, b, 4, stride=2, padding=1, bias=False), norm(b))
        return images(a)


class SquareDeconv2dNorm(Net, kind="plain"):
    """As many channels out as in: a scale along the wrong axis would fit."""

    def build(self) -> Any:
        (a,) = widths(1)
        self.body = nn.Sequential(deconv(a, a, 3, stride=2, padding=1, output_padding=1), norm(a))
        return images(a)


class Deconv3dNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(deconv(a, b, 2, dims=3, stride=2), norm(b, 3))
        return torch.randn(2, a, 3, 4, 3)


class GroupedDeconvNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(deconv(2 * a, 2 * b, groups=2), norm(2 * b))
        return images(2 * a)


class DepthwiseDeconvNorm(Net, kind="plain"):
    def build(self) -> Any:
        (a,) = widths(1)
        self.body = nn.Sequential(deconv(a, a, groups=a, stride=2), norm(a))
        return images(a)


class LinearNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(nn.Linear(a, b), norm(b, 1), nn.ReLU())
        return torch.randn(5, a)


class LinearNoBiasNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(nn.Linear(a, b, bias=False), norm(b, 1))
        return torch.randn(5, a)


class NormWithoutAffine(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b, affine=False))
        return images(a)


class LargeEps(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b, eps=0.1, momentum=None), nn.Hardswish())
        return images(a)


class ZeroScales(Net, kind="plain"):
    """Every scale is zero, as zero-initialised residual branches start."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b))
        return images(a)

    def finish(self) -> None:
        self.body[1].weight.zero_()


class ChannelsLast(Net, kind="plain"):
    """A weight whose strides are not those of its shape."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b))
        return images(a)

    def finish(self) -> None:
        self.to(memory_format=torch.channels_last)


class WeightOfALargerStorage(Net, kind="plain", norms=2):
    """Two weights that are views of one storage without overlap."""

    def build(self) -> Any:
        a, b = widths(2)
        self.first, self.second = conv(a, b, bias=False), conv(a, b, bias=False)
        self.norms = nn.ModuleList([norm(b), norm(b)])
        both = torch.randn(2 * b, a, 3, 3)
        self.first.weight, self.second.weight = nn.Parameter(both[:b]), nn.Parameter(both[b:])
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norms[0](self.first(x))) - torch.sigmoid(self.norms[1](self.second(x)))


class TwoConsumers(Net, kind="plain"):
    """The norm's output is used twice, the convolution's once."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.conv(x))
        return x * torch.sigmoid(x)


class Double(Net, kind="plain"):
    dtype = torch.float64

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b))
        return images(a)


class Half(Net, kind="plain"):
    dtype = torch.float16

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b))
        return images(a)


class Bfloat16(Net, kind="plain"):
    dtype = torch.bfloat16

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b))
        return images(a)


class MixedHalf(Net, kind="hard"):
    """A half convolution, and a norm that was kept in float32."""

    dtype = torch.float16

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b))
        return images(a)

    def finish(self) -> None:
        self.body[1].float()


class SyncNorm(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.SyncBatchNorm(b))
        return images(a)


class NormWithActivation(nn.BatchNorm2d):
    """As timm has it: the norm holds the activation that follows."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class NormHoldsActivation(Net, kind="plain"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), NormWithActivation(b))
        return images(a)
