"""What is a norm layer of a live model, decided without normdoctor: torch's bases, and class names checked by hand."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor, nn

TORCH_BASES: tuple[tuple[type, str], ...] = (
    (nn.modules.instancenorm._InstanceNorm, "InstanceNorm"),
    (nn.modules.batchnorm._BatchNorm, "BatchNorm"),
    (nn.LayerNorm, "LayerNorm"),
    (nn.GroupNorm, "GroupNorm"),
    (nn.RMSNorm, "RMSNorm"),
)

GAIN_BY_ROOT_MEAN_SQUARE = """
    T5LayerNorm MT5LayerNorm UMT5LayerNorm LongT5LayerNorm SwitchTransformersLayerNorm UdopLayerNorm Pop2PianoLayerNorm
    Pix2StructLayerNorm Kosmos2_5LayerNorm ImageGPTLayerNorm CpmAntLayerNorm L2Norm ZeroCentredRMSNorm
"""
"""Classes that are called something else, and those of our own, that subtract no mean."""

KINDS: dict[str, str] = {
    **dict.fromkeys(GAIN_BY_ROOT_MEAN_SQUARE.split(), "RMSNorm"),
    "DynamicTanh": "DynamicTanh",
    "DynamicErf": "DynamicTanh",
    "FilterResponseNorm": "FilterResponseNorm",
    "ChannelLayerNorm": "LayerNorm",
    "LayerNormChannelsFirst": "LayerNorm",
    "IntLayerNorm": "LayerNorm",  # of I-BERT: LayerNorm in whole numbers
    "Gemma3nAudioCumulativeGroupNorm": "GroupNorm",
}
SUFFIXES = (
    (re.compile(r"RMSNorm(Gated)?$"), "RMSNorm"),
    (re.compile(r"LayerNorm$"), "LayerNorm"),
    (re.compile(r"FrozenBatchNorm2d$"), "BatchNorm"),
)
"""How transformers calls its norms. Its LayerNorms that are none are in KINDS."""

NO_NORMS = frozenset(
    (
        *("_SpectralNorm", "_WeightNorm", "NormalizedLinear", "LayerNormLinear", "NormaliseInput", "NoNorm"),
        "Phi4MultimodalAudioMeanVarianceNormLayer",
    )
)
"""Classes with tensors and "norm" in the name that are no norm layers: NoNorm is MobileBERT's scale and shift, the
last one subtracts the mean of a data set."""

WITHOUT_OWN_CLASS = frozenset({"L2Norm"})
"""Norms of classes that normdoctor cannot know: it may name both kinds that fit."""


class Norm(NamedTuple):
    """One norm layer of a live model, by its first name in named_modules()."""

    name: str
    kind: str
    channels: int
    class_name: str
    has_tensors: bool

    @property
    def unknown_class(self) -> bool:
        return self.class_name in WITHOUT_OWN_CLASS


class UnlistedClass(Exception):
    """A class with "norm" in its name that nobody has looked at."""


def norms_of(model: nn.Module) -> list[Norm]:
    """Every norm layer, as named_modules() has them.

    One without tensors counts where it knows its width, as torch's do; the others say nothing to look at."""
    norms = []
    for name, module in model.named_modules():
        kind = kind_of(module)
        tensors = own_tensors(module).values()
        width = max((tensor.numel() for tensor in tensors), default=0) or declared_width(module)
        if kind is not None and width:
            norms.append(Norm(name, kind, width, type(module).__name__, has_tensors=is_in_state_dict(module)))
    return norms


def kind_of(module: nn.Module) -> str | None:
    name = type(module).__name__
    for base, kind in TORCH_BASES:
        if isinstance(module, base):
            return kind
    if name in NO_NORMS:
        return None
    if name in KINDS:
        return KINDS[name]
    for suffix, kind in SUFFIXES:
        if suffix.search(name):
            return kind
    if "norm" in name.lower() and own_tensors(module) and not list(module.children()):
        raise UnlistedClass(f"{type(module).__module__}.{name}: list it in recognition_truth.py")
    return None


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers, with those that a state_dict leaves out."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def is_in_state_dict(module: nn.Module) -> bool:
    return any("." not in name for name in module.state_dict())


def declared_width(module: nn.Module) -> int:
    width = 1
    for name in ("num_features", "num_channels", "normalized_shape"):
        value = getattr(module, name, None)
        if value is not None:
            for length in value if isinstance(value, (tuple, list)) else (value,):
                width *= length
            return width
    return 0
