"""Which classes are norm layers, and what they compute, by class name and attributes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from normdoctor.layers import NormKind
from normdoctor.readers.arrays import MAX_ELEMENTS

KINDS_BY_NAME: tuple[tuple[str, NormKind | None], ...] = (
    (r"Linear$", None),
    (r"RMS_?[Nn]orm|RmsNorm|^SimpleRMS", NormKind.RMS),
    (r"T5LayerNorm$|^(SwitchTransformers|Udop|Pop2Piano|Pix2Struct|Kosmos2_5|ImageGPT|CpmAnt)LayerNorm$", NormKind.RMS),
    (r"BatchNorm|^(InPlace)?ABN(Sync)?$|^InplaceAbn$|^BatchRenorm", NormKind.BATCH),
    (r"InstanceNorm", NormKind.INSTANCE),
    (r"LayerNorm", NormKind.LAYER),
    (r"GroupNorm", NormKind.GROUP),
    (r"^EvoNorm", NormKind.EVO),
    (r"^FilterResponseNorm|^FRN", NormKind.FILTER_RESPONSE),
    (r"^DynamicTanh$|^DyT$|^Derf$|^Dynamic_?[Ee]rf$", NormKind.DYNAMIC_TANH),
)
"""Searched in order in the class's own name: torch, torchvision, timm, detectron2, apex, transformers, the papers.

The LayerNorms of T5 and its like subtract no mean. LayerNormLinear of Transformer Engine is the linear layer, with
a norm in front whose tensors have names of their own."""

NO_NORM_CLASSES = frozenset({"NoNorm"})
"""Classes that are called norms and normalise nothing: MobileBERT's scale and shift."""

FROZEN_CLASS = re.compile(r"Frozen")
"""FrozenBatchNorm2d and its like always use their buffers; their training flag means nothing."""

ZERO_CENTRED_CLASSES = frozenset(
    {
        "GemmaRMSNorm",
        "Gemma2RMSNorm",
        "Gemma3RMSNorm",
        "RecurrentGemmaRMSNorm",
        "T5GemmaRMSNorm",
        "VaultGemmaRMSNorm",
        "Qwen3NextRMSNorm",
        "Qwen3_5RMSNorm",
        "Qwen3_5MoeRMSNorm",
        "Qwen4ExpTextRMSNorm",
        "T5Gemma2RMSNorm",
        "MiniMaxM3VLRMSNorm",
        "MuseGlimmerTextCenteredRMSNorm",
        "MuseSparkTextCenteredRMSNorm",
        "MuseSparkTextInputScaledRMSNorm",
        "Step3p7RMSNorm",
        "VideoPrismLayerNorm",
        "NemotronLayerNorm1P",
    }
)
"""Classes of transformers that multiply by 1 + weight."""

PLAIN_GAIN_CLASSES = frozenset(
    {
        "torch.nn.modules.normalization.RMSNorm",
        "LlamaRMSNorm",
        "MistralRMSNorm",
        "Qwen2RMSNorm",
        "Qwen3RMSNorm",
        "Phi3RMSNorm",
        "Gemma3nRMSNorm",
        "T5LayerNorm",
    }
)
"""Classes that multiply by weight itself; their values are never read as 1 + weight."""

EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "_eps")
ZERO_CENTRED_FLAGS = ("zero_centered_gamma", "add_unit_offset", "unit_offset", "zero_centered")
WIDTH_NAMES = ("num_features", "num_channels", "normalized_shape")


def kind_of_class(class_names: Sequence[str]) -> NormKind | None:
    """The kind of norm that a class (its full name, then those of its bases) implements, None for no norm."""
    for full_name in class_names:
        name = full_name.rpartition(".")[2].removeprefix("Parametrized")
        kind = next((kind for pattern, kind in KINDS_BY_NAME if re.search(pattern, name)), None)
        if kind is not None:
            return kind
    return None


def kind_of_attributes(attributes: Mapping[str, Any]) -> NormKind | None:
    """The kind that only torch's own bases give such attributes; a pickle names no bases (class Ln2d(nn.LayerNorm))."""
    if "normalized_shape" in attributes and "elementwise_affine" in attributes:
        return NormKind.LAYER if "bias" in (attributes.get("_parameters") or ()) else NormKind.RMS
    if {"num_groups", "num_channels", "eps", "affine"} <= attributes.keys():
        return NormKind.GROUP
    return None


def zero_centred_by_class(class_names: Sequence[str], attributes: Mapping[str, Any]) -> bool | None:
    """Whether the class multiplies by 1 + weight; None where neither its name nor a flag says."""
    for flag in ZERO_CENTRED_FLAGS:
        value = attributes.get(flag)
        if isinstance(value, (bool, int, float)) and value in (0, 1):  # one class stores it as what it adds: 1.0
            return bool(value)
    for full_name in class_names:
        short = full_name.rpartition(".")[2]
        if short in ZERO_CENTRED_CLASSES:
            return True
        if short in PLAIN_GAIN_CLASSES or full_name in PLAIN_GAIN_CLASSES:
            return False
    return None


def declared_width(attributes: Mapping[str, Any]) -> int | None:
    """The number of channels that the attributes name: num_features, num_channels or normalized_shape."""
    for name in WIDTH_NAMES:
        value = attributes.get(name)
        lengths = value if isinstance(value, (tuple, list)) else (value,)
        if 0 < len(lengths) <= 8 and all(type(n) is int and 0 < n <= MAX_ELEMENTS for n in lengths):
            width = math.prod(lengths)
            return width if width <= MAX_ELEMENTS else None
    return None
