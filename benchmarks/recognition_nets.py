"""The nets of plain torch that benchmarks/recognition.py shows to normdoctor, with all that looks like a norm.

Everything is small and has random weights. `CASES` are the nets whose norms can be told in every format,
`UNDECIDABLE` those of which a bare state_dict does not say enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import nets
import torch
from torch import Tensor, nn

Inputs = Callable[[], tuple[Tensor, ...]]


class Case(NamedTuple):
    """One model. `inputs` makes what it is called with; None where it is not to be traced and exported."""

    family: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs | None = None


# Norms of users' own -------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """As LLaMA has it; the class has the name of torch's own."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class LayerNormChannelsFirst(nn.Module):
    """LayerNorm over the channels of an image, as in ConvNeXt."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).square().mean(1, keepdim=True)
        return self.weight[:, None, None] * (x - mean) / torch.sqrt(var + self.eps) + self.bias[:, None, None]


class ChannelLayerNorm(nn.Module):
    """The same with an affine of four axes, called g and b, as in the older diffusion models."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1, width, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var = torch.var(x, dim=1, unbiased=False, keepdim=True)
        return (x - x.mean(1, keepdim=True)) / (var + self.eps).sqrt() * self.g + self.b


class LayerNorm2d(nn.LayerNorm):
    """torch's LayerNorm with channels first, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose four vectors are buffers, as in detectron2 and torchvision."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class FilterResponseNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.tau = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + self.eps)
        x = self.weight[:, None, None] * x + self.bias[:, None, None]
        return torch.maximum(x, self.tau[:, None, None])


class L2Norm(nn.Module):
    """The norm of SSD: unit length over the channels, then a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, None, None] * x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


# What is no norm -----------------------------------------------------------------------------------------


class GRN(nn.Module):
    """Global response normalisation of ConvNeXt V2: a gate on the contrast of channels, not a norm layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x + self.weight * x * energy / (energy.mean(-1, keepdim=True) + 1e-6) + self.bias


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Affine(nn.Module):
    """The scale and shift of ResMLP and of frozen features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bias


class NormaliseInput(nn.Module):
    """Subtracts the mean of the data set and divides by its s.d."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(width))
        self.register_buffer("std", torch.rand(width) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class ObservationStatistics(nn.Module):
    """The running normaliser of observations in reinforcement learning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("count", torch.tensor(1e-4))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / (self.var + 1e-8).sqrt()


class SelectiveState(nn.Module):
    """The vectors of Mamba and the codebook of VQ-VAE: one per channel, none of a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(width))
        self.D = nn.Parameter(torch.ones(width))
        self.dt_bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("cluster_size", torch.zeros(width))
        self.register_buffer("inv_freq", torch.rand(width))
        self.logit_scale = nn.Parameter(torch.tensor(2.6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.D * torch.sigmoid(self.dt_bias) * self.A_log.exp()


class LowRank(nn.Linear):
    """A linear layer with LoRA and DoRA's vector of magnitudes beside its weight."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.lora_A = nn.Linear(width, 2, bias=False)
        self.lora_B = nn.Linear(2, width, bias=False)
        self.magnitude = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.magnitude * (super().forward(x) + self.lora_B(self.lora_A(x)))


class NormalizedLinear(nn.Linear):
    """A classifier on the unit sphere; only its name has to do with norms."""

    def forward(self, x: Tensor) -> Tensor:
        unit = nn.functional.normalize
        return nn.functional.linear(unit(x), unit(self.weight), self.bias)


class LayerNormLinear(nn.Linear):
    """A linear layer with the norm in front of it fused in, as in Transformer Engine; no norm module is left."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.layer_norm_weight = nn.Parameter(torch.ones(width))
        self.layer_norm_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias))


class NoNorm(Affine):
    """What MobileBERT has in place of LayerNorm, and calls so."""


class Adversaries(nn.Module):
    """Everything above that is no norm, and torch's own vectors, around one LayerNorm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.norm = nn.LayerNorm(width)
        self.act = nn.PReLU(width)
        self.gamma = nn.Parameter(torch.ones(width))
        self.ls1 = LayerScale(width)
        self.affine = Affine(width)
        self.scale = Affine(width)
        self.state = SelectiveState(width)
        self.adapter = LowRank(width)
        self.obs_rms = ObservationStatistics(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))
        self.head = NormalizedLinear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens) + self.position)
        x = self.act(x.transpose(1, 2)).transpose(1, 2) * self.gamma
        x = self.adapter(self.state(self.scale(self.affine(self.ls1(x)))))
        x = self.obs_rms(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.spectral(x))


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def reparametrised() -> nn.Module:
    """weight_norm and spectral_norm in their older form, with no norm at all beside them."""
    return nn.Sequential(
        old_weight_norm(nn.Conv1d(4, 8, 3)),
        nn.PReLU(8),
        old_weight_norm(nn.ConvTranspose1d(8, 8, 3)),
        nn.utils.spectral_norm(nn.Conv1d(8, 4, 1)),
        nn.LocalResponseNorm(2),
        nn.Softmax(1),
    )


# Nets ----------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    def __init__(self, norm: nets.Norm) -> None:
        super().__init__()
        self.stem = self._double(3, 8, norm)
        self.down = nn.ModuleList([self._double(8, 16, norm), self._double(16, 32, norm)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.merge = nn.ModuleList([self._double(32, 16, norm), self._double(16, 8, norm)])
        self.out = nn.Conv2d(8, 1, 1)

    @staticmethod
    def _double(inputs: int, outputs: int, norm: nets.Norm) -> nn.Sequential:
        return nn.Sequential(*nets.conv_norm(inputs, outputs, norm), *nets.conv_norm(outputs, outputs, norm))

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        for block in self.down:
            skips.append(block(nn.functional.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        return self.out(x)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm with channels last, MLP with or without GRN, LayerScale as a parameter."""

    def __init__(self, width: int, second: bool) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.grn = GRN(4 * width) if second else nn.Identity()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = None if second else nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.grn(nn.functional.gelu(self.pwconv1(y))))
        y = y if self.gamma is None else self.gamma * y
        return x + y.permute(0, 3, 1, 2)


def convnext(second: bool, norm: nets.Norm = LayerNormChannelsFirst) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 4, 4), norm(8)),
        ConvNeXtBlock(8, second),
        ConvNeXtBlock(8, second),
        nn.Sequential(norm(8), nn.Conv2d(8, 16, 2, 2)),
        ConvNeXtBlock(16, second),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 10),
    )


def generator(norm: nets.Norm) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3), norm(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), norm(16), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), norm(8), nn.ReLU()),
        nn.Conv2d(8, 3, 3, padding=1),
        nn.Tanh(),
    )


class Generator(nn.Module):
    """Style transfer with the norms called `inorm`."""

    def __init__(self, **settings: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.inorm1 = nn.InstanceNorm2d(8, **settings)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.inorm2 = nn.InstanceNorm2d(8, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.inorm2(self.conv2(torch.relu(self.inorm1(self.conv1(x)))))


def volumes() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(1, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(8, 8, (1, 3, 3), bias=False), nn.BatchNorm3d(8, affine=False), nn.ReLU()),
        *(nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)), nn.InstanceNorm3d(8, affine=True)),
    )


class Recurrent(nn.Module):
    """An LSTM and a GRU with a LayerNorm behind each, and a cell with norms of its gates."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.ln_rnn = nn.LayerNorm(16)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.ln_gru = nn.LayerNorm(8)
        self.i2h = nn.Linear(8, 32)
        self.ln_i2h = nn.LayerNorm(32)
        self.h2h = nn.Linear(8, 32)
        self.ln_h2h = nn.LayerNorm(32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_gru(self.gru(self.ln_rnn(self.rnn(x)[0]))[0])
        return self.ln_i2h(self.i2h(x)) + self.ln_h2h(self.h2h(x))


class RMSTransformer(nn.Module):
    """Pre-norm blocks with norms of queries and keys, as in Qwen3."""

    def __init__(self, norm: nets.Norm, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, width)
        self.layers = nn.ModuleList(_RMSBlock(norm, width, heads) for _ in range(2))
        self.norm = norm(width)
        self.lm_head = nn.Linear(width, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class _RMSBlock(nn.Module):
    def __init__(self, norm: nets.Norm, width: int, heads: int) -> None:
        super().__init__()
        self.input_layernorm = norm(width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = norm(width // heads), norm(width // heads)
        self.post_attention_layernorm = norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        y = self.input_layernorm(x)
        q, k = self.q_norm(self.q_proj(y).view(shape)), self.k_norm(self.k_proj(y).view(shape))
        v = self.v_proj(y).view(shape)
        mixed = nn.functional.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
        x = x + mixed.transpose(1, 2).reshape(x.shape)
        return x + self.mlp(self.post_attention_layernorm(x))


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalise = NormaliseInput()
        self.conv = nn.Conv2d(3, 8, 3)
        self.l2_norm = L2Norm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2_norm(self.conv(self.normalise(x)))


class SharedTrunk(nn.Module):
    """Two heads on one trunk, and one norm used twice."""

    def __init__(self) -> None:
        super().__init__()
        trunk = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8))
        self.heads = nn.ModuleDict({"a": nn.Sequential(trunk, nn.PReLU(8)), "b": nn.Sequential(trunk, nn.Linear(8, 8))})
        self.out_norm = nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_norm(self.heads["a"](x)) + self.out_norm(self.heads["b"](x))


class Conditional(nn.Module):
    """Norms without tensors of their own, modulated from outside (AdaLN, conditional BatchNorm)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.norm1 = nn.LayerNorm(8, elementwise_affine=False, eps=1e-6)
        self.ada_ln = nn.Linear(8, 16)
        self.bn = nn.BatchNorm1d(8, affine=False)
        self.gamma_embed = nn.Embedding(4, 8)
        self.norm2 = nn.RMSNorm(8, elementwise_affine=False)
        self.norm3 = nn.GroupNorm(2, 8, affine=False)
        self.norm4 = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        scale, shift = self.ada_ln(x).chunk(2, -1)
        x = self.norm1(self.fc1(x)) * (1 + scale) + shift
        return self.norm4(self.norm3(self.norm2(self.bn(x) * self.gamma_embed(label))))


def lazy() -> nn.Module:
    """Lazy norms after their first batch, which gives them their shapes and their classes."""
    net = nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(8, 3), nn.LazyInstanceNorm2d(affine=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        net(torch.randn(2, 3, 8, 8))
    return net


def frozen_backbone() -> nn.Module:
    return nn.Sequential(
        *nets.conv_norm(3, 8, FrozenBatchNorm2d), *nets.conv_norm(8, 8, FrozenBatchNorm2d), *nets.head(8)
    )


def images(channels: int = 3, size: int = 16) -> Inputs:
    return lambda: (torch.randn(2, channels, size, size),)


def digits() -> tuple[Tensor, ...]:
    return (torch.randn(2, 1, 8, 8),)


def vectors() -> tuple[Tensor, ...]:
    return (torch.randn(4, 8),)


def sequence() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, 8),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(20, (2, 5)),)


def encoder_layer(**settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **settings)


CASES = (
    Case("ResNet", "basic blocks", nets.ResNet, digits),
    Case("ResNet", "zero-init, 2 blocks a stage", lambda: nets.ResNet(depth=2, zero_init=True), digits),
    Case("ResNet", "pre-activation", nets.preactivation, digits),
    Case("ResNet", "SyncBatchNorm", lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nets.ResNet())),
    Case("ResNet", "FrozenBatchNorm", frozen_backbone, images()),
    Case("ResNet", "DataParallel", lambda: nn.DataParallel(nets.ResNet())),
    Case("plain CNN", "BatchNorm", nets.plain_cnn, digits),
    Case("plain CNN", "convolutions with bias", lambda: nets.plain_cnn(bias=True), digits),
    Case("plain CNN", "GroupNorm", lambda: nets.plain_cnn(nets.group_norm), digits),
    Case("plain CNN", "InstanceNorm", lambda: nets.plain_cnn(nets.instance_norm), digits),
    Case("plain CNN", "lazy layers", lazy, images()),
    Case("plain CNN", "FilterResponseNorm", lambda: nets.plain_cnn(FilterResponseNorm), digits),
    Case("MobileNet", "inverted residuals", nets.mobilenet, digits),
    Case("VGG", "BatchNorm", nets.vgg, digits),
    Case("VGG", "deeper", lambda: nets.vgg(depth=3), digits),
    Case("DenseNet", "4 layers", nets.densenet, digits),
    Case("ConvNeXt", "V1: LayerScale", lambda: convnext(False), images()),
    Case("ConvNeXt", "V2: GRN", lambda: convnext(True, LayerNorm2d), images()),
    Case("U-Net", "BatchNorm", lambda: UNet(nn.BatchNorm2d), images()),
    Case("U-Net", "GroupNorm", lambda: UNet(nets.group_norm), images()),
    Case("U-Net", "InstanceNorm", lambda: UNet(nets.instance_norm), images()),
    Case("U-Net", "channel LayerNorm", lambda: UNet(lambda width: Holder(ChannelLayerNorm(width))), images()),
    Case("1-D and 3-D", "BatchNorm1d", nets.conv1d, digits),
    Case("1-D and 3-D", "BatchNorm3d, InstanceNorm3d", volumes, lambda: (torch.randn(2, 1, 4, 8, 8),)),
    Case("MLP", "BatchNorm1d", nets.mlp, digits),
    Case("GAN", "InstanceNorm", lambda: generator(nn.InstanceNorm2d), images()),
    Case("GAN", "InstanceNorm, affine", lambda: generator(nets.instance_norm), images()),
    Case("GAN", "InstanceNorm, tracking", lambda: Generator(track_running_stats=True), images()),
    Case("GAN", "InstanceNorm, affine, tracking", lambda: Generator(affine=True, track_running_stats=True), images()),
    Case("Transformer", "nn.Transformer", lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True)),
    Case("Transformer", "nn.TransformerEncoder", lambda: nn.TransformerEncoder(encoder_layer(), 3, nn.LayerNorm(8))),
    Case("Transformer", "pre-norm layer", lambda: encoder_layer(norm_first=True), sequence),
    Case("Transformer", "decoder layer, no bias", lambda: nn.TransformerDecoderLayer(8, 2, 16, bias=False)),
    Case("Transformer", "ViT, LayerNorm", nets.Transformer, digits),
    Case("Transformer", "ViT, RMSNorm", lambda: nets.Transformer(nn.RMSNorm), digits),
    Case("Transformer", "ViT, RMSNorm of 1 + weight", lambda: nets.Transformer(nets.ZeroCentredRMSNorm), digits),
    Case("Transformer", "ViT, DynamicTanh", lambda: nets.Transformer(nets.DynamicTanh), digits),
    Case("Transformer", "ViT, Derf", lambda: nets.Transformer(nets.DynamicErf), digits),
    Case("Transformer", "decoder, nn.RMSNorm", lambda: RMSTransformer(nn.RMSNorm), tokens),
    Case("Transformer", "decoder, own RMSNorm", lambda: RMSTransformer(RMSNorm), tokens),
    Case("recurrent", "LSTM, GRU and LayerNorm", Recurrent, sequence),
    Case("other", "shared trunk", SharedTrunk, vectors),
    Case("other", "norms without tensors", Conditional, lambda: (torch.randn(4, 8), torch.randint(4, (4,)))),
    Case("other", "input normaliser, L2Norm", Detector, images()),
    Case("no norms", "what looks like one", Adversaries, tokens),
    Case("no norms", "norms fused into linear layers", lambda: nn.Sequential(LayerNormLinear(8), LayerNormLinear(8))),
    Case("no norms", "weight_norm, spectral_norm", reparametrised, lambda: (torch.randn(2, 4, 9),)),
)

UNDECIDABLE = (
    Case(
        "weight and bias of one length are a norm's, whatever they are called",
        "Affine",
        lambda: nn.Sequential(Affine(8)),
    ),
    Case("... and all the more under a norm's name", "NoNorm", lambda: Holder(NoNorm(8))),
    Case("a lone vector is a norm's only under a norm's name", "RMSNorm", lambda: nn.Sequential(nn.RMSNorm(8))),
    Case("... and is one under any such name", "PReLU called norm", lambda: Holder(nn.PReLU(8))),
    Case("GroupNorm and LayerNorm store the same", "GroupNorm", lambda: Holder(nn.GroupNorm(2, 8))),
    Case("InstanceNorm with statistics stores what BatchNorm does", "InstanceNorm", lambda: Holder(tracking())),
    Case("without statistics it stores what LayerNorm does", "InstanceNorm", lambda: Holder(nets.instance_norm(8))),
    Case(
        "what is called bn counts as a BatchNorm",
        "GroupNorm called bn",
        lambda: nn.ModuleDict({"bn": nn.GroupNorm(2, 8)}),
    ),
    Case(
        "without statistics it stores what LayerNorm does",
        "BatchNorm",
        lambda: Holder(nn.BatchNorm2d(8, track_running_stats=False)),
    ),
    Case(
        "several axes are a norm's only under a norm's name", "LayerNorm", lambda: nn.Sequential(nn.LayerNorm((4, 8)))
    ),
    Case("... and are one under any such name", "GRN called norm", lambda: Holder(GRN(8))),
)
"""Each with what a bare state_dict does not say."""


class Holder(nn.Module):
    """A module under the name `norm`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.norm = module

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def tracking() -> nn.Module:
    return nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
