"""Patterns of the fold benchmark that are modules: something stands between the norm and the weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fold_patterns import Net, conv, images, length, norm, widths
from torch import Tensor, nn


class ThroughDropout(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.Dropout2d(0.3), nn.Identity(), norm(b))
        return images(a)


class ThroughAveragePool(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.AvgPool2d(2), norm(b))
        return images(a)


class ThroughPaddedAveragePool(Net, kind="hard"):
    """Zeros at the border that are not counted."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), norm(b))
        return images(a)


class ThroughGlobalPoolFlatten(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(b, 1))
        return images(a)


class ThroughMean(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b, 1)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x).mean(dim=(2, 3)))


class ThroughPositiveMaxPool(Net, kind="hard"):
    """Every scale is positive, so the largest stays the largest."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.MaxPool2d(3, 2, padding=1), norm(b, positive=True))
        return images(a)


class ThroughPositiveGlobalMaxPool(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.AdaptiveMaxPool2d(1), nn.Flatten(), norm(b, 1, positive=True))
        return images(a)


class ThroughTransposePair(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2))


class TransposedLinear(Net, kind="hard"):
    """Linear over the last axis, and the norm over the same after a transposition."""

    def build(self) -> Any:
        a, b = widths(2)
        self.linear, self.norm = nn.Linear(a, b), norm(b, 1)
        return torch.randn(2, length(), a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


class FlattenedLinear(Net, kind="hard"):
    """Batch and steps made one axis for the norm, as in MoCo-like heads."""

    def build(self) -> Any:
        a, b = widths(2)
        self.linear, self.norm = nn.Linear(a, b), norm(b, 1)
        return torch.randn(2, length(), a)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return self.norm(y.reshape(-1, y.shape[-1])).reshape(y.shape)


class LinearUnsqueezed(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.linear, self.norm = nn.Linear(a, b), norm(b)
        return torch.randn(4, a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(self.linear(x)[:, :, None, None]))


class LinearToImage(Net, kind="hard"):
    """A generator's start: one feature of the norm is sixteen of the linear layer."""

    def build(self) -> Any:
        a, b = widths(2)
        self.width = b
        self.linear, self.norm = nn.Linear(a, 16 * b), norm(b)
        return torch.randn(3, a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(self.linear(x).view(-1, self.width, 4, 4)))


class ThroughSqueeze(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b, (3, 1)), norm(b, 1)
        return torch.randn(2, a, length(), 1)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x).squeeze(-1))


class ThroughView(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b, 1)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x).flatten(2))


class ThroughPixelShuffle(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, 4 * b), nn.PixelShuffle(2), norm(b))
        return images(a)


class ThroughChannelShuffle(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, 2 * b), norm(2 * b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        n, c, h, w = y.shape
        return self.norm(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class ThroughNearest(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.Upsample(scale_factor=2, mode="nearest"), norm(b))
        return images(a)


class ThroughBilinear(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.Upsample(scale_factor=2, mode="bilinear"), norm(b))
        return images(a)


class ThroughReflectPad(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.ReflectionPad2d(1), norm(b))
        return images(a)


class ThroughChunk(Net, kind="hard", norms=2):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.one, self.two = conv(a, 2 * b), norm(b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        one, two = self.conv(x).chunk(2, dim=1)
        return torch.relu(self.one(one)) * torch.tanh(self.two(two))


class ThroughHalfOfChunk(Net, kind="hard"):
    """Only one half is normalised: the other half's scale is one."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, 2 * b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        one, two = self.conv(x).chunk(2, dim=1)
        return torch.relu(self.norm(one)) * torch.sigmoid(two)


class ThroughNegation(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(-self.conv(x))


class ThroughScalars(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x) * 0.5 + 1.25)


class ThroughInPlaceAdd(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        y += 0.75
        return self.norm(y)


class ThroughCast(Net, kind="hard"):
    """A norm that is computed in float64."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def finish(self) -> None:
        self.norm.double()

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(self.conv(x).double()).to(x.dtype))


class ThroughConcat(Net, kind="hard"):
    def build(self) -> Any:
        a, b, c = widths(3)
        self.one, self.two, self.norm = conv(a, b), conv(a, c), norm(b + c)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(torch.cat([self.one(x), self.two(x)], dim=1)))


class ThroughSpatialConcat(Net, kind="hard"):
    """Side by side: both convolutions take the whole scale."""

    def build(self) -> Any:
        a, b = widths(2)
        self.one, self.two, self.norm = conv(a, b), conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(torch.cat([self.one(x), self.two(x)], dim=3))


class ThroughAdd(Net, kind="hard"):
    """Both convolutions take the scale, one of them the shift."""

    def build(self) -> Any:
        a, b = widths(2)
        self.one, self.two, self.norm = conv(a, b, bias=True), conv(a, b, bias=False), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(self.one(x) + self.two(x)))


class ThroughSubtract(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.one, self.two, self.norm = conv(a, b), conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.one(x) - self.two(x))


class NormNorm(Net, kind="hard", norms=2):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b), norm(b))
        return images(a)


class NormNormAlone(Net, kind="hard", norms=2, folds=1):
    """Nothing to fold into, but two make one."""

    def build(self) -> Any:
        (a,) = widths(1)
        self.body = nn.Sequential(norm(a), norm(a))
        return images(a)


class MatMulParameter(Net, kind="hard", in_module=0):
    """A bare Parameter: a graph has no more than a module would, a module's code cannot take a bias."""

    def build(self) -> Any:
        a, b = widths(2)
        self.weight, self.norm = nn.Parameter(torch.randn(a, b)), norm(b, 1)
        return torch.randn(4, a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x @ self.weight)


class FunctionalConv(Net, kind="hard", in_module=0):
    def build(self) -> Any:
        a, b = widths(2)
        self.weight, self.norm = nn.Parameter(torch.randn(b, a, 3, 3)), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(F.conv2d(x, self.weight, None, stride=2))


class FunctionalNorm(Net, kind="hard", in_module=0):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        n = self.norm
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)


class FrozenNorm(nn.Module):
    """The arithmetic of torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", 1.5 * torch.randn(channels))
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", 0.05 + 3 * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        mean, variance = self.running_mean.reshape(1, -1, 1, 1), self.running_var.reshape(1, -1, 1, 1)
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Frozen(Net, kind="hard", in_module=0, written_out=True):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), FrozenNorm(b), nn.ReLU())
        return images(a)


class ScaleAndShift(Net, kind="hard", norms=2, in_module=0, written_out=True):
    """(x - mean) / deviation * scale + shift, written out."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv = conv(a, b)
        for name in ("mean", "scale", "shift"):
            self.register_buffer(name, torch.randn(b, 1, 1))
        self.register_buffer("deviation", 0.2 + 3 * torch.rand(b, 1, 1))
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu((self.conv(x) - self.mean) / self.deviation * self.scale + self.shift)


class WeightNorm(Net, kind="hard", without=("module",)):
    """The weight is computed from two parameters. (torch pickles no such module.)"""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(nn.utils.parametrizations.weight_norm(conv(a, b)), norm(b))
        return images(a)


class StandardizedConv(nn.Conv2d):
    """Weight standardisation: the class computes its weight anew in each call."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / torch.sqrt(w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class StandardizedWeight(Net, kind="hard", in_module=0):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(StandardizedConv(a, b, 3, padding=1), norm(b))
        return images(a)
