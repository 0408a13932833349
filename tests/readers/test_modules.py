"""Modules, pickled and live: the class decides what a layer is, and says what a state_dict cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normdoctor.errors import InputError
from normdoctor.inspection import inspect
from normdoctor.layers import Checkpoint, NormKind, NormLayer
from normdoctor.readers.norm_classes import declared_width, kind_of_class, zero_centred_by_class

Read = Callable[[Any], Checkpoint]
Save = Callable[..., Path]


class Gain(nn.Module):
    """What classes of norms without a kind of their own in torch have in common."""

    def __init__(self, width: int = 6, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        for name, value in attributes.items():
            setattr(self, name, value)


def make(name: str, base: type = Gain, **parameters: torch.Tensor) -> type:
    """A class of this name that can be pickled (it is found in this module)."""

    def init(self: Any, *args: Any, **attributes: Any) -> None:
        base.__init__(self, *args, **attributes)
        for leaf, tensor in parameters.items():
            setattr(self, leaf, nn.Parameter(tensor))

    made = type(name, (base,), {"__init__": init, "__module__": __name__})
    globals()[name] = made
    return made


SIX = torch.ones(6)
GemmaRMSNorm, LlamaRMSNorm, T5LayerNorm = make("GemmaRMSNorm"), make("LlamaRMSNorm"), make("T5LayerNorm")
FrozenBatchNorm2d = make("FrozenBatchNorm2d", nn.BatchNorm2d)
InPlaceABNSync, BatchNormAct2d = make("InPlaceABNSync", nn.BatchNorm2d), make("BatchNormAct2d", nn.BatchNorm2d)
EvoNorm2dS0, FilterResponseNormTlu2d = make("EvoNorm2dS0", v=SIX, bias=SIX), make("FilterResponseNormTlu2d", tau=SIX)
DynamicTanh = make("DynamicTanh", alpha=torch.ones(1), bias=SIX)
Bn = make("Bn", nn.BatchNorm2d)
LayerNorm2d, GroupNorm1 = make("LayerNorm2d", nn.LayerNorm), make("GroupNorm1", nn.GroupNorm)
NoNorm = make("NoNorm", bias=SIX)
LayerNormLinear = make("LayerNormLinear", nn.Linear, layer_norm_weight=SIX, layer_norm_bias=SIX)
MyFancyNorm, NormalizedLinear = make("MyFancyNorm", bias=SIX), make("NormalizedLinear")
Block = make("NormFreeBlock", nn.Identity)

KINDS = [
    (nn.BatchNorm1d(6), NormKind.BATCH),
    (nn.BatchNorm2d(6, affine=False, track_running_stats=False), NormKind.BATCH),
    (nn.BatchNorm3d(6), NormKind.BATCH),
    (nn.SyncBatchNorm(6), NormKind.BATCH),
    (FrozenBatchNorm2d(6), NormKind.BATCH),
    (InPlaceABNSync(6), NormKind.BATCH),
    (BatchNormAct2d(6), NormKind.BATCH),
    (Bn(6), NormKind.BATCH),
    (nn.InstanceNorm1d(6), NormKind.INSTANCE),
    (nn.InstanceNorm3d(6, affine=True), NormKind.INSTANCE),
    (nn.LayerNorm(6), NormKind.LAYER),
    (nn.LayerNorm((2, 3), bias=False), NormKind.LAYER),
    (nn.LayerNorm((2, 3), elementwise_affine=False), NormKind.LAYER),
    (LayerNorm2d(6), NormKind.LAYER),
    (nn.GroupNorm(3, 6), NormKind.GROUP),
    (GroupNorm1(1, 6, affine=False), NormKind.GROUP),
    (nn.RMSNorm(6), NormKind.RMS),
    (LlamaRMSNorm(), NormKind.RMS),
    (T5LayerNorm(), NormKind.RMS),
    (make("MT5LayerNorm")(), NormKind.RMS),
    (make("ImageGPTLayerNorm")(), NormKind.RMS),
    (make("CohereLayerNorm")(), NormKind.LAYER),
    (EvoNorm2dS0(), NormKind.EVO),
    (FilterResponseNormTlu2d(), NormKind.FILTER_RESPONSE),
    (DynamicTanh(), NormKind.DYNAMIC_TANH),
    (MyFancyNorm(), NormKind.LAYER_OR_GROUP),
    (make("Ln2d", nn.LayerNorm)(6), NormKind.LAYER),
    (make("Scale", nn.RMSNorm)(6), NormKind.RMS),
    (make("Gn32", nn.GroupNorm)(2, 6), NormKind.GROUP),
]


@pytest.fixture(params=["pickled", "live"])
def look(request: pytest.FixtureRequest, save: Save, read: Read) -> Callable[[nn.Module], tuple[NormLayer, ...]]:
    return lambda module: read(save(module) if request.param == "pickled" else module).layers


@pytest.mark.parametrize("module, kind", KINDS, ids=lambda value: type(value).__name__)
def test_kinds(module: nn.Module, kind: NormKind, look: Callable[..., tuple[NormLayer, ...]]) -> None:
    (layer,) = look(nn.Sequential(module))
    assert (layer.name, layer.kind, layer.channels) == ("0", kind, 6)
    assert layer.origin == f"{type(module).__module__}.{type(module).__qualname__}"


NO_NORMS = [
    nn.PReLU(6), nn.Embedding(6, 6), nn.Linear(6, 1), nn.Conv1d(6, 6, 3), nn.GRU(6, 6), nn.MultiheadAttention(6, 2),
    nn.utils.spectral_norm(nn.Linear(6, 6)), NormalizedLinear(), Block(), NoNorm(),
    LayerNormLinear(6, 6), nn.LocalResponseNorm(2), nn.Softmax(),
]  # fmt: skip


@pytest.mark.parametrize("module", NO_NORMS, ids=lambda module: type(module).__name__)
def test_modules_that_are_no_norms(module: nn.Module, look: Callable[..., tuple[NormLayer, ...]]) -> None:
    assert look(nn.Sequential(module)) == ()


def test_old_weight_norm_and_parametrizations(look: Callable[..., tuple[NormLayer, ...]], read: Read) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.Conv1d(6, 6, 3))
    assert look(nn.Sequential(old)) == ()
    assert read(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))).layers == ()
    bounded = nn.BatchNorm1d(6)
    nn.utils.parametrize.register_parametrization(bounded, "weight", nn.Softplus(), unsafe=True)
    (layer,) = read(bounded).layers
    assert (layer.kind, layer.origin) == (NormKind.BATCH, "torch.nn.utils.parametrize.ParametrizedBatchNorm1d")


SETTINGS: list[tuple[nn.Module, dict[str, Any]]] = [
    (nn.BatchNorm2d(6), {"eps": 1e-5, "momentum": 0.1, "training": True, "affine": True, "track_running_stats": True}),
    (nn.BatchNorm2d(6, momentum=None).eval(), {"momentum": "cumulative", "training": False}),
    (nn.BatchNorm2d(6, momentum=0).train(), {"momentum": 0.0}),
    (nn.BatchNorm2d(6, track_running_stats=False), {"track_running_stats": False, "running_var": None}),
    (FrozenBatchNorm2d(6), {"training": None, "eps": 1e-5}),
    (nn.GroupNorm(3, 6, eps=1e-6), {"groups": 3, "eps": 1e-6, "momentum": None, "affine": True}),
    (nn.LayerNorm(6, elementwise_affine=False), {"affine": False, "weight": None, "channels": 6}),
    (nn.RMSNorm(6), {"eps": None, "zero_centred": False}),  # torch then takes the dtype's own epsilon
    (LlamaRMSNorm(variance_epsilon=1e-6), {"eps": 1e-6, "zero_centred": False}),
    (GemmaRMSNorm(eps=1e-6), {"eps": 1e-6, "zero_centred": True}),
    (make("VideoPrismLayerNorm", nn.LayerNorm)(6), {"kind": NormKind.LAYER, "zero_centred": True}),
    (make("RMSNorm")(zero_centered_gamma=True, _eps=1e-4), {"eps": 1e-4, "zero_centred": True}),
    (nn.LayerNorm(6).requires_grad_(False), {"requires_grad": False}),
    (nn.LayerNorm(6), {"requires_grad": True}),
    (nn.BatchNorm1d(6, affine=False), {"requires_grad": None, "affine": False}),
]


@pytest.mark.parametrize("module, said", SETTINGS, ids=lambda value: type(value).__name__)
def test_settings(module: nn.Module, said: dict[str, Any], look: Callable[..., tuple[NormLayer, ...]]) -> None:
    (layer,) = look(module)
    assert {name: getattr(layer, name) for name in said} == said


def test_odd_settings_are_not_trusted(look: Callable[..., tuple[NormLayer, ...]], save: Save) -> None:
    """What a pickle claims about itself may be anything; no rule may fall over it either."""
    odd = [10**400, -(10**400), "0.1", math.nan, math.inf, -1.0, 0, True, None, [1e-5], {"a": 1}, b"x", 1e308, 5e-324]
    for value in odd:
        module = nn.BatchNorm1d(6)
        module(torch.randn(8, 6))
        for name in ("eps", "momentum", "num_features", "affine", "track_running_stats", "training", "num_groups"):
            setattr(module, name, value)
        (layer,) = look(module)
        assert layer.eps is None or isinstance(layer.eps, float)
        assert layer.momentum in (None, "cumulative") or isinstance(layer.momentum, float)
        assert layer.training in (None, True) and layer.affine in (None, True)
        inspect(save(module))


@pytest.mark.parametrize("width", [10**400, 10**18, [10**9, 10**9], [1] * 10**5, "6", 0, -3, None, [], [2.5]], ids=repr)
def test_odd_widths_of_layers_without_tensors(width: Any, save: Save) -> None:
    module = nn.InstanceNorm2d(6)
    module.num_features = width
    assert inspect(save(module)).layers == ()


def test_order_and_names_are_those_of_named_modules(look: Callable[..., tuple[NormLayer, ...]]) -> None:
    net = nn.Module()
    net.z = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net.a = nn.LayerNorm(3)
    net.m = nn.TransformerEncoderLayer(8, 2, 16)
    net.b = nn.ModuleDict({"k": nn.ModuleList([nn.RMSNorm(4)]), "none": nn.Identity()})
    net.register_module("absent", None)
    expected = [name for name, module in net.named_modules() if "Norm" in type(module).__name__]
    assert [layer.name for layer in look(net)] == expected


def test_meta_tensors_have_no_values(read: Read) -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    layers = read(net).layers
    assert [layer.name for layer in layers] == ["0", "1"]
    with pytest.raises(InputError, match="meta") as caught:
        layers[0].numbers.load()
    assert caught.value.hint


def test_names_of_classes() -> None:
    assert kind_of_class(["my.own.Thing", "torch.nn.modules.batchnorm.BatchNorm2d"]) is NormKind.BATCH
    assert kind_of_class(["torch.nn.modules.batchnorm.ParametrizedBatchNorm2d"]) is NormKind.BATCH
    assert kind_of_class(["a.LayerNormLSTM"]) is NormKind.LAYER  # harmless: it has no weight of its own
    for name in ("a.NormFreeBlock", "a.Normalize", "a.WeightNorm", "a.SpectralNorm", "a.Standardize", "?"):
        assert kind_of_class([name]) is None


def test_conventions_of_classes() -> None:
    assert zero_centred_by_class(["transformers.models.gemma.modeling_gemma.GemmaRMSNorm"], {}) is True
    assert zero_centred_by_class(["torch.nn.modules.normalization.RMSNorm"], {}) is False
    assert zero_centred_by_class(["megatron.RMSNorm"], {}) is None
    assert zero_centred_by_class(["megatron.RMSNorm"], {"zero_centered_gamma": False}) is False
    assert zero_centred_by_class(["MoonshineStreamingLayerNorm"], {"unit_offset": 1.0}) is True
    assert zero_centred_by_class(["a.Norm"], {"unit_offset": 0.5}) is None


def test_declared_widths() -> None:
    assert declared_width({"num_features": 3}) == 3
    assert declared_width({"normalized_shape": (2, 3)}) == 6
    assert declared_width({"num_channels": True}) is None
    assert declared_width({}) is None


@pytest.mark.parametrize("form", ["live", "zip", "legacy"])
def test_lazy_norms_without_values_are_noted(form: str, read: Read, save: Save) -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(4), nn.LazyInstanceNorm2d())
    checkpoint = read(net if form == "live" else save(net, legacy=form == "legacy"))
    assert [layer.name for layer in checkpoint.layers] == ["2"]
    assert [note for note in checkpoint.notes if note.startswith("2 lazy norms have seen no batch")]
    net(torch.rand(2, 3, 8, 8))
    checkpoint = read(net if form == "live" else save(net, legacy=form == "legacy"))
    assert [layer.name for layer in checkpoint.layers][:2] == ["1", "2"]
    assert not any("1 (" in note or "(the first is 1)" in note for note in checkpoint.notes)


class TestStateDictInMemory:
    def test_as_its_file(self, read: Read, save: Save) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.LayerNorm(6)))
        for state in (
            net.state_dict(),
            dict(net.state_dict()),
            dict(net.named_parameters()) | dict(net.named_buffers()),
        ):
            live, stored = inspect(state), inspect(save(net.state_dict()))
            assert [(one.name, one.kind, one.channels) for one in live.layers] == [
                (one.name, one.kind, one.channels) for one in stored.layers
            ]
            # a fix names the file, or the call of the API
            assert [replace(one, fix="") for one in live.findings] == [replace(one, fix="") for one in stored.findings]
        assert live.format == "live PyTorch state_dict"
        assert read(net.state_dict()).notes == ()

    def test_tied_tensors(self, read: Read) -> None:
        state = {f"a.bn.{name}": tensor for name, tensor in nn.BatchNorm2d(4).state_dict().items()}
        state |= {name.replace("a.", "b."): tensor for name, tensor in state.items()}
        (layer,) = read(state).layers
        assert layer.aliases == ("b.bn",)

    def test_what_is_no_tensor_in_it(self, read: Read) -> None:
        state = {f"bn.{name}": tensor for name, tensor in nn.BatchNorm2d(4).state_dict().items()}
        extra = {"fc._extra_state": b"x", "epoch": 3, "ema": dict(state), "lazy.weight": nn.UninitializedParameter()}
        checkpoint = read(state | extra)
        assert [layer.name for layer in checkpoint.layers] == ["bn"]
        assert [note for note in checkpoint.notes if "not looked into: 1 mapping" in note and "(ema)" in note]

    def test_other_mappings_are_refused(self) -> None:
        for target in (
            {"state_dict": nn.BatchNorm2d(4).state_dict()},
            {0: torch.rand(3)},
            {},
            {"a": 1},
            [torch.rand(3)],
        ):
            with pytest.raises(InputError, match="cannot inspect a") as caught:
                inspect(target)
            assert "state_dict" in caught.value.hint
