"""Patterns of the fold benchmark that are modules: the norm comes before the weight."""

from __future__ import annotations

from typing import Any

import torch
from fold_patterns import Net, conv, deconv, images, norm, widths
from torch import Tensor, nn


class NormLinear(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(norm(a, 1), nn.Linear(a, b))
        return torch.randn(5, a)


class NormConv(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(norm(a), conv(a, b, stride=2))
        return images(a)


class NormGroupedConv(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(norm(2 * a), conv(2 * a, 2 * b, groups=2))
        return images(2 * a)


class NormDepthwiseConv(Net, kind="hard"):
    def build(self) -> Any:
        (a,) = widths(1)
        self.body = nn.Sequential(norm(a), conv(a, 2 * a, groups=a, bias=False))
        return images(a)


class NormReflectConv(Net, kind="hard"):
    """What the border sees is the norm's own output."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(norm(a), conv(a, b, padding=1, padding_mode="reflect"))
        return images(a)


class NormPointwiseDeconv(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(norm(a), deconv(a, b, 1))
        return images(a)


class NormFlattenLinear(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        x = images(a)
        self.body = nn.Sequential(norm(a), nn.Flatten(), nn.Linear(x[0].numel(), b))
        return x


class NormPoolLinear(Net, kind="hard"):
    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(norm(a), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(a, b))
        return images(a)


class ReluNormLinear(Net, kind="hard"):
    def build(self) -> Any:
        a, b, c = widths(3)
        self.body = nn.Sequential(nn.Linear(a, b), nn.ReLU(), norm(b, 1), nn.Linear(b, c))
        return torch.randn(5, a)


class ReluNormConv(Net, kind="hard"):
    def build(self) -> Any:
        a, b, c = widths(3)
        self.body = nn.Sequential(conv(a, b, padding=1), nn.ReLU(), norm(b), conv(b, c))
        return images(a)


class ReluNormFlattenLinear(Net, kind="hard"):
    def build(self) -> Any:
        a, b, c = widths(3)
        self.body = nn.Sequential(conv(a, b), nn.LeakyReLU(), norm(b), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(c))
        x = images(a)
        self.body(x)
        return x


class NormTwoLinears(Net, kind="hard"):
    """Queries and keys: everybody who takes the output can absorb it."""

    def build(self) -> Any:
        a, b = widths(2)
        self.norm, self.one, self.two = norm(a, 1), nn.Linear(a, b), nn.Linear(a, b)
        return torch.randn(5, a)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        return self.one(x) * torch.sigmoid(self.two(x))


class BothWays(Net, kind="hard", norms=2):
    def build(self) -> Any:
        a, b, c = widths(3)
        self.body = nn.Sequential(conv(a, b), norm(b), nn.ReLU(), norm(b), conv(b, c, 1))
        return images(a)
