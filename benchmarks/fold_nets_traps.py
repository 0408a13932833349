"""Patterns of the fold benchmark that are modules: what does not commute, and what is no constant map."""

from __future__ import annotations

from typing import Any

import torch
from fold_patterns import Net, conv, deconv, images, length, norm, train, widths
from torch import Tensor, nn

# What does not commute -----------------------------------------------------------------------------------------


class ConvReluNorm(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.ReLU(), norm(b))
        return images(a)


class ConvReluNormPaddedConv(Net, kind="trap"):
    """Zeros at the border are not what the norm would give."""

    def build(self) -> Any:
        a, b, c = widths(3)
        self.body = nn.Sequential(conv(a, b), nn.ReLU(), norm(b), conv(b, c, padding=1))
        return images(a)


class NormPaddedConv(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(norm(a), conv(a, b, padding=1))
        return images(a)


class NormDeconv(Net, kind="trap"):
    """Outputs near the border see fewer taps."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(norm(a), deconv(a, b, 3, stride=2))
        return images(a)


class ThroughMaxPool(Net, kind="trap"):
    """Scales of both signs: the largest becomes the smallest."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.MaxPool2d(2), norm(b))
        return images(a)

    def finish(self) -> None:
        self.body[2].weight.copy_(torch.linspace(-1.5, 1.0, self.body[2].num_features))


class ThroughCountedPadding(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.AvgPool2d(3, 1, padding=1), norm(b))
        return images(a)


class ThroughZeroPad(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.ZeroPad2d(1), norm(b))
        return images(a)


class ThroughRelu6(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.ReLU6(), norm(b, positive=True))
        return images(a)


class AddOfInput(Net, kind="trap"):
    def build(self) -> Any:
        (a,) = widths(1)
        self.conv, self.norm = conv(a, a, padding=1), norm(a)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(x + self.conv(x)))


class ConcatOfInput(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b, padding=1), norm(a + b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(torch.cat([x, self.conv(x)], dim=1)))


class ProductOfConvs(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.one, self.two, self.norm = conv(a, b), conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.one(x) * self.two(x))


class LinearWrongAxis(Net, kind="trap"):
    """Linear gives (N, L, C) with L = C; the norm is over L."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(nn.Linear(a, b), norm(b, 1))
        return torch.randn(3, b, a)


class MatMulWrongAxis(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.weight, self.norm = nn.Parameter(torch.randn(a, b)), norm(b, 1)
        return torch.randn(3, b, a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x @ self.weight)


class FlattenSpace(Net, kind="trap"):
    """Every pixel is a feature of its own: one scale per channel is not enough."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b, 5), nn.Flatten(), norm(9 * b, 1))
        return torch.randn(3, a, 7, 7)


class TransposedConv(Net, kind="trap"):
    """The norm is over what was the width."""

    def build(self) -> Any:
        (a,) = widths(1)
        self.conv, self.norm = conv(a, a, padding=1), norm(a)
        return torch.randn(2, a, a, a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x).transpose(1, 3))


class NormOfRecurrence(Net, kind="trap", formats=("module", "pt2", "onnx-torchscript")):
    def build(self) -> Any:
        a, b = widths(2)
        self.lstm, self.norm = nn.LSTM(a, b, batch_first=True), norm(b, 1)
        return torch.randn(2, length(), a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.lstm(x)[0].transpose(1, 2))


# No map that is the same for every input -------------------------------------------------------------------------


class LeftInTraining(Net, kind="trap", formats=("module", "pt2")):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b))
        return images(a, batch=4)

    def finish(self) -> None:
        self.body[1].train()


class NoRunningStatistics(Net, kind="trap", without=("onnx-torchscript", "onnx-dynamo")):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b, track_running_stats=False))
        return images(a, batch=4)


class InstanceNormAfterConv(Net, kind="trap", norms=0):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), nn.InstanceNorm2d(b, affine=True), nn.GroupNorm(1, b))
        return images(a)


class DynamicScale(Net, kind="trap", norms=1, folds=0):
    """Scale and shift come from another input (FiLM): only the norm's own part is constant, and there is none."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm, self.linear = conv(a, b), norm(b, affine=False, track_running_stats=True), nn.Linear(3, b)
        return images(a), torch.randn(2, 3)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        scale = self.linear(y)[:, :, None, None]
        return self.norm(self.conv(x) * scale)


class HalfOverflow(Net, kind="trap", without=("pt2-decomposed",)):
    """Folded, the weight would be larger than float16 can hold."""

    dtype = torch.float16

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b, bias=False), norm(b))
        return images(a)

    def finish(self) -> None:
        first, second = self.body
        first.weight.mul_(300).clamp_(-300, 300)
        second.running_var.fill_(1.0)
        second.weight.fill_(0.5)
        # One channel whose scale is 2000: its inputs are small, the norm makes them ordinary again.
        first.weight[0].copy_(first.weight[0].sign() * 40)
        second.weight[0], second.running_var[0], second.running_mean[0] = 20.0, 0.0001, 0.0

    def forward(self, x: Tensor) -> Any:
        return self.body(x * 0.0005)


class RareStatistics(Net, kind="trap", folds=1, in_module=1):
    """A channel that never moved, one with an enormous variance, one whose scale is nothing."""

    def build(self) -> Any:
        a, _ = widths(2)
        self.body = nn.Sequential(conv(a, 4), norm(4))
        return images(a)

    def finish(self) -> None:
        train(self.body[1])
        self.body[1].running_var.copy_(torch.tensor([0.0, 1e8, 1.0, 1e-12]))
        self.body[1].weight.copy_(torch.tensor([0.01, 1.0, 1e-30, -0.02]))
