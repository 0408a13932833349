"""Patterns of the fold benchmark that are modules: what is used at several places, and who else sees it."""

from __future__ import annotations

from typing import Any

import torch
from fold_patterns import Net, conv, deconv, images, norm, widths
from torch import Tensor, nn

# Used at several places: a graph can give each place its own copy, a module's code cannot -----------------------


class SharedConvOneNorm(Net, kind="trap", folds=1, in_module=0):
    """A head over two levels, one of them with a norm."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a), images(a)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return torch.relu(self.norm(self.conv(x))), torch.relu(self.conv(y))


class SharedConvTwoNorms(Net, kind="trap", norms=2, folds=2, in_module=0):
    """EfficientDet's head: one convolution for all levels, a norm for each."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norms = conv(a, b, padding=1), nn.ModuleList([norm(b), norm(b)])
        return images(a), images(a)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return [torch.relu(norm(self.conv(each))) for each, norm in zip((x, y), self.norms, strict=True)]


class SharedPair(Net, kind="trap", norms=2, folds=2, in_module=2, least=0):
    """Both convolution and norm are called twice."""

    def build(self) -> Any:
        a, b = widths(2)
        self.pair = nn.Sequential(conv(a, b), norm(b))
        return images(a), images(a)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return torch.relu(self.pair(x)), torch.relu(self.pair(y))


class SharedPairRecurrent(Net, kind="trap", norms=2, folds=2, in_module=2, least=0):
    """The pair is applied to its own output."""

    def build(self) -> Any:
        (a,) = widths(1)
        self.pair = nn.Sequential(conv(a, a, padding=1), norm(a), nn.ReLU())
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.pair(self.pair(x))


class SharedNorm(Net, kind="trap", norms=2, folds=2, in_module=2, least=0):
    """One norm behind two convolutions."""

    def build(self) -> Any:
        a, b = widths(2)
        self.one, self.two, self.norm = conv(a, b), conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(self.one(x))) - torch.tanh(self.norm(self.two(x)))


class TiedWeights(Net, kind="trap", norms=1, folds=1, in_module=1):
    """Two modules, one Parameter; a norm behind one of them."""

    def build(self) -> Any:
        a, b = widths(2)
        self.one, self.two, self.norm = conv(a, b), conv(a, b), norm(b)
        self.two.weight = self.one.weight
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(self.one(x))), torch.relu(self.two(x))


class TiedAutoencoder(Net, kind="trap", norms=2, folds=2, in_module=2):
    """Encoder and decoder of one weight."""

    def build(self) -> Any:
        a, b = widths(2)
        self.encoder, self.decoder = conv(a, b), deconv(b, a)
        self.norms = nn.ModuleList([norm(b), norm(a)])
        self.decoder.weight = self.encoder.weight
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norms[1](self.decoder(torch.relu(self.norms[0](self.encoder(x)))))


class BiasIsBeta(Net, kind="trap", folds=1, in_module=1):
    """The convolution's bias is the very Parameter that the norm has."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b, bias=True), norm(b))
        self.body[1].bias = self.body[0].bias
        return images(a)


class TwoNames(Net, kind="trap", folds=1, in_module=1):
    """The same two modules under two paths, called once."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b))
        self.first, self.last = self.body[0], self.body[1]
        return images(a)


class TiedNorms(Net, kind="trap", norms=2, folds=2):
    """Two norms of one scale and one shift."""

    def build(self) -> Any:
        a, b = widths(2)
        self.one, self.two = nn.Sequential(conv(a, b), norm(b)), nn.Sequential(conv(a, b), norm(b))
        self.two[1].weight, self.two[1].bias = self.one[1].weight, self.one[1].bias
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.one(x)) * torch.sigmoid(self.two(x))


class OutOfOrder(Net, kind="trap", norms=2, folds=2):
    """Registered in another order than called: who walks the children folds the wrong pairs."""

    def build(self) -> Any:
        (a,) = widths(1)
        self.conv1, self.norm2 = conv(a, a), norm(a)
        self.conv2, self.norm1 = conv(a, a), norm(a)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))


class NeverCalled(Net, kind="trap", norms=1, folds=1):
    """A norm that is registered behind a convolution and not called; the one that is called stands elsewhere."""

    def build(self) -> Any:
        (a,) = widths(1)
        self.conv1, self.spare, self.conv2, self.norm = conv(a, a), norm(a), conv(a, a), norm(a)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv2(torch.relu(self.conv1(x))))


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


class HookAfterConv(Net, kind="trap", folds=1, least=0):
    """A forward hook doubles what the convolution gives."""

    def build(self) -> Any:
        a, b = widths(2)
        self.body = nn.Sequential(conv(a, b), norm(b))
        self.body[0].register_forward_hook(doubled)
        return images(a)


class WeightIsRead(Net, kind="trap", folds=1, in_module=0):
    """The weight is used outside the convolution, too, in a penalty that is an output."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)), x.mean() + self.conv.weight.square().sum()


class NormIsRead(Net, kind="trap", folds=1, in_module=0):
    """The norm's scale is used outside the norm."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.norm(self.conv(x))), x.mean() + self.norm.weight.abs().sum()


# Somebody else sees what would change --------------------------------------------------------------------------


class ConvIsOutput(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return torch.relu(self.norm(x)), x


class ConvHasSkip(Net, kind="trap"):
    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.norm = conv(a, b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return x + torch.relu(self.norm(x))


class TwoNormsOneOutput(Net, kind="trap", norms=2, folds=0):
    """Two norms behind the same output of one convolution."""

    def build(self) -> Any:
        a, b = widths(2)
        self.conv, self.one, self.two = conv(a, b), norm(b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return torch.relu(self.one(x)) + torch.sigmoid(self.two(x))


class HalfIsOutput(Net, kind="trap", folds=1, least=0):
    """Only the half of the channels that is not normalised leaves the network."""

    def build(self) -> Any:
        a, b = widths(2)
        self.width = b
        self.conv, self.norm = conv(a, 2 * b), norm(b)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return torch.relu(self.norm(x[:, : self.width])), x[:, self.width :]


class NormBeforeSkip(Net, kind="trap"):
    def build(self) -> Any:
        (a,) = widths(1)
        self.norm, self.conv = norm(a), conv(a, a, 1)
        return images(a)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        return x + self.conv(x)
