"""Patterns of the fold benchmark that are modules: blocks of well-known networks, small."""

from __future__ import annotations

from typing import Any

import torch
from fold_patterns import Net, conv, deconv, images, length, norm
from torch import Tensor, nn


def conv_norm(
    a: int, b: int, kernel: int = 3, dims: int = 2, act: nn.Module | None = None, **settings: Any
) -> nn.Module:
    settings.setdefault("padding", kernel // 2)
    layers = [conv(a, b, kernel, dims, bias=False, **settings), norm(b, dims)]
    return nn.Sequential(*layers, *([act] if act is not None else []))


class ResidualBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(a, b, stride=stride, padding=1, bias=False), norm(b)
        self.conv2, self.bn2 = conv(b, b, padding=1, bias=False), norm(b)
        self.downsample = conv_norm(a, b, 1, stride=stride) if stride > 1 or a != b else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + skip)


class ResNet(Net, kind="plain", norms=6):
    def build(self) -> Any:
        self.body = nn.Sequential(
            conv_norm(3, 6, 7, act=nn.ReLU(), stride=2),
            nn.MaxPool2d(3, 2, 1),
            ResidualBlock(6, 6),
            ResidualBlock(6, 9, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(9, 4),
        )
        return torch.randn(2, 3, 24, 24)


class PreActivationBlock(nn.Module):
    def __init__(self, a: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = norm(a), conv(a, a, padding=1, bias=False)
        self.bn2, self.conv2 = norm(a), conv(a, a, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


class PreActivationResNet(Net, kind="hard", norms=4, folds=2):
    """The first norm of each block stands before an activation, and its input goes on."""

    def build(self) -> Any:
        self.body = nn.Sequential(conv(3, 5, padding=1, bias=False), PreActivationBlock(5), PreActivationBlock(5))
        return images(3)


class MobileNetBlock(nn.Module):
    def __init__(self, a: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(a, hidden, 1, act=nn.ReLU6()),
            conv_norm(hidden, hidden, 3, act=nn.ReLU6(), groups=hidden),
            conv_norm(hidden, a, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class MobileNet(Net, kind="plain", norms=7):
    def build(self) -> Any:
        self.body = nn.Sequential(
            conv_norm(3, 4, act=nn.ReLU6(), stride=2),
            MobileNetBlock(4, 8),
            MobileNetBlock(4, 12),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4, 3),
        )
        return images(3)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, a: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(a, 2, 1), nn.SiLU(), nn.Conv2d(2, a, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.body(x)


class EfficientNet(Net, kind="plain", norms=4):
    def build(self) -> Any:
        self.body = nn.Sequential(
            conv_norm(3, 4, act=nn.SiLU(), stride=2),
            conv_norm(4, 8, 1, act=nn.SiLU()),
            conv_norm(8, 8, act=nn.SiLU(), groups=8),
            Gate(8),
            conv_norm(8, 4, 1),
        )
        return images(3)


class Vgg(Net, kind="plain", norms=3):
    def build(self) -> Any:
        layers: list[nn.Module] = []
        for a, b in ((3, 5), (5, 5), (5, 7)):
            layers += [conv(a, b, padding=1, bias=True), norm(b), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2, padding=1)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))
        return images(3)


class Perceptron(Net, kind="plain", norms=2):
    def build(self) -> Any:
        self.body = nn.Sequential(
            nn.Linear(6, 8),
            norm(8, 1),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(8, 5),
            norm(5, 1),
            nn.Tanh(),
            nn.Linear(5, 2),
        )
        return torch.randn(5, 6)


class Generator(Net, kind="plain", norms=3):
    """DCGAN's: transposed convolutions from a vector to an image."""

    def build(self) -> Any:
        self.body = nn.Sequential(
            deconv(6, 8, 4, bias=False), norm(8), nn.ReLU(True),
            deconv(8, 5, 4, stride=2, padding=1, bias=False), norm(5), nn.ReLU(True),
            deconv(5, 4, 4, stride=2, padding=1, bias=False), norm(4), nn.ReLU(True),
            deconv(4, 3, 4, stride=2, padding=1), nn.Tanh(),
        )  # fmt: skip
        return torch.randn(2, 6, 1, 1)


class Discriminator(Net, kind="plain", norms=2):
    def build(self) -> Any:
        self.body = nn.Sequential(
            conv(3, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            conv(4, 6, 4, stride=2, padding=1, bias=False), norm(6), nn.LeakyReLU(0.2),
            conv(6, 8, 4, stride=2, padding=1, bias=False), norm(8), nn.LeakyReLU(0.2),
            conv(8, 1, 4), nn.Flatten(),
        )  # fmt: skip
        return torch.randn(2, 3, 32, 32)


class UNet(Net, kind="plain", norms=5):
    def build(self) -> Any:
        self.down1, self.down2 = conv_norm(3, 4, act=nn.ReLU()), conv_norm(4, 6, act=nn.ReLU())
        self.middle = conv_norm(6, 6, act=nn.ReLU())
        self.up = nn.Sequential(deconv(6, 4, 2, stride=2), norm(4), nn.ReLU())
        self.last, self.pool = conv_norm(8, 5, act=nn.ReLU()), nn.MaxPool2d(2)
        return torch.randn(2, 3, 8, 8)

    def forward(self, x: Tensor) -> Any:
        skip = self.down1(x)
        x = self.up(self.middle(self.down2(self.pool(skip))))
        return self.last(torch.cat([skip, x], dim=1))


class Inception(Net, kind="plain", norms=6):
    def build(self) -> Any:
        self.one = conv_norm(4, 3, 1, act=nn.ReLU())
        self.three = nn.Sequential(conv_norm(4, 2, 1, act=nn.ReLU()), conv_norm(2, 3, act=nn.ReLU()))
        self.five = nn.Sequential(conv_norm(4, 2, 1, act=nn.ReLU()), conv_norm(2, 3, 5, act=nn.ReLU()))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm(4, 3, 1, act=nn.ReLU()))
        return images(4)

    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class DenseLayer(nn.Module):
    def __init__(self, a: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(a), conv(a, 6, 1, bias=False)
        self.norm2, self.conv2 = norm(6), conv(6, growth, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(y)))], dim=1)


class DenseNet(Net, kind="hard", norms=5, folds=3):
    """Stem and bottlenecks fold; what normalises the growing stack does not."""

    def build(self) -> Any:
        self.body = nn.Sequential(conv_norm(3, 4, act=nn.ReLU()), DenseLayer(4, 3), DenseLayer(7, 3))
        return images(3)


class ShuffleUnit(Net, kind="plain", norms=3):
    def build(self) -> Any:
        self.branch = nn.Sequential(
            conv_norm(4, 4, 1, act=nn.ReLU()), conv_norm(4, 4, groups=4), conv_norm(4, 4, 1, act=nn.ReLU())
        )
        return images(8)

    def forward(self, x: Tensor) -> Any:
        one, two = x.chunk(2, dim=1)
        x = torch.cat([one, self.branch(two)], dim=1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class RepVgg(Net, kind="plain", norms=3, folds=2):
    """Three branches; that of the input itself has only a norm."""

    def build(self) -> Any:
        self.three, self.one, self.same = conv_norm(5, 5), conv_norm(5, 5, 1), norm(5)
        return images(5)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.three(x) + self.one(x) + self.same(x))


class ConvMixerBlock(nn.Module):
    def __init__(self, a: int) -> None:
        super().__init__()
        self.depth = nn.Sequential(conv(a, a, 3, groups=a, padding=1), nn.GELU(), norm(a))
        self.point = nn.Sequential(conv(a, a, 1), nn.GELU(), norm(a))

    def forward(self, x: Tensor) -> Tensor:
        return self.point(x + self.depth(x))


class ConvMixer(Net, kind="hard", norms=3, folds=1):
    """Norms behind the activation: only the last one, before pooling and the classifier, has somewhere to go."""

    def build(self) -> Any:
        self.body = nn.Sequential(
            conv(3, 5, 2, stride=2), nn.GELU(), norm(5), ConvMixerBlock(5),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
        )  # fmt: skip
        return images(3)


class TemporalConv(Net, kind="plain", norms=2):
    def build(self) -> Any:
        self.body = nn.Sequential(
            conv_norm(4, 5, 3, 1, nn.ReLU(), dilation=1), conv_norm(5, 5, 3, 1, nn.ReLU(), dilation=2, padding=2)
        )
        return images(4, dims=1)

    def forward(self, x: Tensor) -> Any:
        return self.body(x).transpose(1, 2)


class SpeakerNet(Net, kind="hard", norms=3):
    """TDNN layers are conv, ReLU, norm; statistics pooled into a linear layer and a norm."""

    def build(self) -> Any:
        self.frames = nn.Sequential(conv(4, 5, dims=1), nn.ReLU(), norm(5, 1), conv(5, 6, dims=1), nn.ReLU())
        self.pooled = norm(6, 1)
        self.embed = nn.Sequential(nn.Linear(6, 5), norm(5, 1))
        return torch.randn(2, 4, 16)

    def forward(self, x: Tensor) -> Any:
        return self.embed(self.pooled(self.frames(x)).mean(dim=2))


class Projector(Net, kind="hard", norms=3):
    """BYOL's head behind a backbone that ends in a norm."""

    def build(self) -> Any:
        self.body = nn.Sequential(
            conv(3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(4, 1), nn.Linear(4, 8), norm(8, 1),
            nn.ReLU(), nn.Linear(8, 5, bias=False), norm(5, 1, affine=False),
        )  # fmt: skip
        return images(3, batch=4)


class PointNet(Net, kind="hard", norms=3):
    """Pointwise convolutions, the maximum over all points, a classifier."""

    def build(self) -> Any:
        self.points = nn.Sequential(conv(3, 5, 1, 1), norm(5, 1), nn.ReLU(), conv(5, 7, 1, 1), norm(7, 1))
        self.head = nn.Sequential(nn.Linear(7, 4), norm(4, 1), nn.ReLU(), nn.Linear(4, 2))
        return torch.randn(3, 3, 20)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.points(x).amax(dim=2))


class Conformer(Net, kind="hard"):
    """The convolution module: gated pointwise convolution, a depthwise one and its norm, between transpositions."""

    def build(self) -> Any:
        self.first, self.last = conv(4, 8, 1, 1), conv(4, 4, 1, 1)
        self.depth, self.norm, self.pre = conv(4, 4, 3, 1, groups=4, padding=1), norm(4, 1), nn.LayerNorm(4)
        return torch.randn(2, length(), 4)

    def forward(self, x: Tensor) -> Any:
        y = nn.functional.glu(self.first(self.pre(x).transpose(1, 2)), dim=1)
        return x + self.last(nn.functional.silu(self.norm(self.depth(y)))).transpose(1, 2)


class VisionStem(Net, kind="hard", norms=3):
    """LeViT's: linear layers and norms over flattened tokens, between them attention."""

    def build(self) -> Any:
        self.stem = conv_norm(3, 4, act=nn.Hardswish(), stride=2)
        self.linear, self.norm1 = nn.Linear(4, 12, bias=False), norm(12, 1)
        self.project, self.norm2 = nn.Linear(4, 4, bias=False), norm(4, 1)
        return torch.randn(2, 3, 8, 8)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).flatten(2).transpose(1, 2)
        y = self.linear(x)
        q, k, v = self.norm1(y.flatten(0, 1)).reshape(y.shape).split(4, dim=2)
        y = self.project(torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v)
        return x + self.norm2(y.flatten(0, 1)).reshape(y.shape)


class Detector(Net, kind="plain", norms=5):
    """Two levels, an upsampled path between them, outputs in a dictionary."""

    def build(self) -> Any:
        self.low, self.high = conv_norm(3, 4, act=nn.SiLU()), conv_norm(4, 6, act=nn.SiLU(), stride=2)
        self.side, self.merge = conv_norm(6, 4, 1, act=nn.SiLU()), conv_norm(8, 5, act=nn.SiLU())
        self.up, self.head = (
            nn.Upsample(scale_factor=2),
            nn.Sequential(conv_norm(6, 6, act=nn.SiLU()), nn.Conv2d(6, 2, 1)),
        )
        return torch.randn(2, 3, 8, 8)

    def forward(self, x: Tensor) -> Any:
        low = self.low(x)
        high = self.high(low)
        merged = self.merge(torch.cat([low, self.up(self.side(high))], dim=1))
        return {"boxes": merged, "scores": torch.sigmoid(self.head(high))}
