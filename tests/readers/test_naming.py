"""Which tensors make a norm: rows of names and shapes, with the friends that only look like one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from normdoctor.errors import InputError
from normdoctor.layers import NormKind, NormLayer
from normdoctor.readers.finishing import Budget
from normdoctor.readers.naming import possible_norms, read_names, strip_wrappers

C = 16


@dataclass(frozen=True, eq=False)
class Stored:
    shape: tuple[int, ...]
    dtype: str = "float32"
    values: Any = field(default=1.0)

    @property
    def nbytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    @property
    def identity(self) -> Hashable:
        return id(self)

    def numpy(self) -> np.ndarray:
        return np.broadcast_to(np.asarray(self.values, dtype=np.float32), self.shape)


def tensors(shapes: Mapping[str, Any], prefix: str = "") -> dict[str, Stored]:
    """{"bn.weight": 16} → references by name; a tuple is a shape, () a scalar."""
    return {prefix + name: Stored((shape,) if isinstance(shape, int) else shape) for name, shape in shapes.items()}


def of(parent: str, **leaves: Any) -> dict[str, Any]:
    return {f"{parent}.{leaf}": shape for leaf, shape in leaves.items()}


STATISTICS = {"running_mean": C, "running_var": C}
AFFINE = {"weight": C, "bias": C}
BATCH, LAYER, GROUP, INSTANCE = NormKind.BATCH, NormKind.LAYER, NormKind.GROUP, NormKind.INSTANCE
OPEN, GAIN, RMS = NormKind.LAYER_OR_GROUP, NormKind.LAYER_OR_RMS, NormKind.RMS

NORMS: dict[str, tuple[dict[str, Any], NormKind]] = {
    "BatchNorm": (of("layer1.0.bn1", **AFFINE, **STATISTICS, num_batches_tracked=()), BATCH),
    "BatchNorm without affine": (of("features.3", **STATISTICS, num_batches_tracked=()), BATCH),
    "BatchNorm before the counter": (of("features.3", **AFFINE, **STATISTICS), BATCH),
    "BatchNorm that lost its variance": (of("bn", **AFFINE, running_mean=C), BATCH),
    "BatchNorm that lost its mean": (of("bn", **AFFINE, running_var=C), BATCH),
    "BatchNorm of one channel": (of("0", weight=1, bias=1, running_mean=1, running_var=1), BATCH),
    "BatchNorm by name alone": (of("blocks.0.bn", **AFFINE), BATCH),
    "Keras": (of("bn", gamma=C, beta=C, moving_mean=C, moving_variance=C), BATCH),
    "Flax": (of("bn", scale=C, bias=C, mean=C, var=C), BATCH),
    "Paddle": (of("bn", weight=C, bias=C, _mean=C, _variance=C), BATCH),
    "InstanceNorm that tracks": (of("inorm", **AFFINE, **STATISTICS, num_batches_tracked=()), INSTANCE),
    "InstanceNorm": (of("enc.0.instance_norm", **AFFINE), INSTANCE),
    "LayerNorm or GroupNorm": (of("stage.4", **AFFINE), OPEN),
    "an unlucky name": (of("visual.pre_layrnorm", **AFFINE), OPEN),
    "LayerNorm": (of("encoder.layer.0.LayerNorm", **AFFINE), LAYER),
    "LayerNorm of GPT-2": (of("h.3.ln_1", **AFFINE), LAYER),
    "LayerNorm of TF-BERT": (of("encoder.LayerNorm", gamma=C, beta=C), LAYER),
    "LayerNorm after an embedding": (of("word_embeddings_layernorm", **AFFINE), LAYER),
    "LayerNorm with axes": (of("norm", weight=(1, 264), bias=(1, 264)), LAYER),
    "LayerNorm of a gate": (of("gate_norm", **AFFINE), OPEN),
    "LayerNorm with channels first": (of("ds.0.fn.norm", g=(1, C, 1, 1), b=(1, C, 1, 1)), LAYER),
    "RMSNorm with channels first": (of("downs.0.2.fn.norm", g=(1, C, 1, 1)), GAIN),
    "RMSNorm of Wan's VAE": (of("decoder.norm_out", gamma=(C, 1, 1, 1)), GAIN),
    "GroupNorm": (of("block.gn2", **AFFINE), GROUP),
    "RMSNorm": (of("layers.0.input_layernorm", weight=C), GAIN),
    "RMSNorm of queries": (of("attn.q_norm", weight=C), GAIN),
    "RMSNorm of T5": (of("block.0.layer.1.layer_norm", weight=C), GAIN),
    "RMSNorm by name": (of("post_rms", weight=C), RMS),
    "RMSNorm with g": (of("layers.0.norm", g=C), GAIN),
    "final norm": (of("model.norm", weight=C), GAIN),
    "ln_f without bias": (of("ln_f", weight=C), GAIN),
    "DyT": (of("norm1", alpha=1, **AFFINE), NormKind.DYNAMIC_TANH),
    "DyT with scalar alpha": (of("blocks.0.norm1", alpha=(), weight=C), NormKind.DYNAMIC_TANH),
    "Derf": (of("norm1", alpha=1, shift=1, **AFFINE), NormKind.DYNAMIC_TANH),
    "EvoNorm-S0": (of("norm", v=C, **AFFINE), NormKind.EVO),
    "EvoNorm-B0": (of("norm", v=C, running_var=C, **AFFINE), NormKind.EVO),
    "FRN with TLU": (of("norm", tau=C, **AFFINE), NormKind.FILTER_RESPONSE),
    "quantised LayerNorm": (of("output.LayerNorm", **AFFINE, scale=(), zero_point=()), LAYER),
    "LayerNorm of I-BERT": (of("output.LayerNorm", **AFFINE, shift=1), LAYER),
    "RMSNorm with eps as a buffer": (of("final_norm", weight=C, eps=()), GAIN),
    "FRN that learns eps": (of("norm", tau=C, eps_l=1, **AFFINE), NormKind.FILTER_RESPONSE),
}


@pytest.mark.parametrize("shapes, kind", NORMS.values(), ids=NORMS)
def test_norms(shapes: dict[str, Any], kind: NormKind) -> None:
    (layer,) = read_names(tensors(shapes)).layers
    assert layer.kind is kind
    assert layer.name == next(iter(shapes)).rpartition(".")[0]
    assert layer.channels == max(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize("shapes", [shapes for shapes, _ in NORMS.values()], ids=NORMS)
def test_names_alone_leave_no_norm_out(shapes: dict[str, Any]) -> None:
    assert possible_norms(shapes) == shapes.keys()


FRIENDS = {
    "PReLU": of("act", weight=C),
    "PReLU without a name": of("features.2", weight=C),
    "PReLU of one channel": of("layer1.0.prelu", weight=1),
    "Linear": of("norm_head", weight=(C, 8), bias=C),
    "Linear of one output": of("fc", weight=(1, C), bias=1),
    "Conv2d": of("bn_conv", weight=(C, 3, 3, 3), bias=C),
    "pointwise depthwise Conv2d": of("bn_conv", weight=(C, 1, 1, 1)),
    "LayerScale with channels first": of("blocks.0", gamma=(C, 1, 1)),
    "depthwise Conv1d": of("conv", weight=(C, 1, 4), bias=C),
    "Embedding": of("embed", weight=(100, C)),
    "1-D Embedding": of("position_embedding", weight=C),
    "LayerScale": of("ls1", gamma=C),
    "LayerScale of ConvNeXt": of("stages.0.blocks.1", gamma=C),
    "LayerScale of DINO": of("layer_scale1", lambda1=C),
    "GRN": of("grn", weight=(1, 1, 1, C), bias=(1, 1, 1, C)),
    "GRN with vectors": of("mlp.grn", weight=C, bias=C),
    "Affine of ResMLP": of("norm1", alpha=C, beta=C),
    "weight_norm": of("conv", weight_g=(C, 1, 1), weight_v=(C, 3, 3), bias=C),
    "weight_norm as a parametrization": of("conv.parametrizations.weight", original0=(C, 1), original1=(C, 4)),
    "spectral_norm": of("conv", weight_orig=(C, 4), weight_u=C, weight_v=4, bias=C),
    "GRU": of("gru", weight_ih_l0=(48, C), weight_hh_l0=(48, C), bias_ih_l0=48, bias_hh_l0=48),
    "MultiheadAttention": of("attn", in_proj_weight=(48, C), in_proj_bias=48, out_proj=(C, C)),
    "tokens": {"cls_token": (1, 1, C), "pos_embed": (1, 9, C), "logit_scale": (), "mask_token": C},
    "RL normaliser": of("obs_rms", mean=C, var=C, count=()),
    "RL normaliser of rl_games": of("running_mean_std", **STATISTICS, count=()),
    "image normaliser": of("preprocess", mean=3, std=3),
    "image normaliser with axes": of("preprocess", mean=(1, 3, 1, 1), std=(1, 3, 1, 1)),
    "scalar statistics": of("value_norm", running_mean=(), running_var=()),
    "quantised PReLU": of("features.2", weight=C, scale=(), zero_point=()),
    "a norm's weight beside something else": of("norm1", **AFFINE, codebook=(8, C)),
    "lengths differ": of("head.2", weight=C, bias=2 * C),
    "Mamba": of("mixer", A_log=(C, 8), D=C, dt_bias=C),
    "one weight, one bias": of("to_logits.0", weight=1, bias=1),
    "whole numbers": {},
}


@pytest.mark.parametrize("shapes", FRIENDS.values(), ids=FRIENDS)
def test_friends_that_are_no_norms(shapes: dict[str, Any]) -> None:
    found = tensors(shapes) or {"quantized.weight": Stored((C,), "int8"), "quantized.bias": Stored((C,), "int8")}
    assert read_names(found).layers == ()


def test_vectors_that_were_looked_at_are_listed_with_a_reason() -> None:
    model = read_names(tensors(of("act", weight=C) | of("ls1", gamma=4) | of("fc", weight=(C, 8), bias=C)))
    said = {miss.name: (miss.shape, miss.reason) for miss in model.near_misses}
    assert said.keys() == {"act", "ls1"}
    assert said["act"] == ((C,), "the name act is not a norm's")


def blocks(count: int, lost: tuple[int, ...] = (), kind: str = "layers.{}.1") -> dict[str, Any]:
    shapes: dict[str, Any] = {}
    for place in range(count):
        shapes |= of(kind.format(place), **AFFINE, **({} if place in lost else STATISTICS))
    return shapes


def test_a_batch_norm_without_buffers_is_recognised_by_its_siblings() -> None:
    kinds = [layer.kind for layer in read_names(tensors(blocks(4, lost=(2,)))).layers]
    assert kinds == [BATCH] * 4
    # Somewhere else in the net it could be anything; and where most lack buffers, one that has them proves nothing.
    others = read_names(tensors(blocks(4) | of("head.1", **AFFINE))).layers
    assert others[-1].kind is OPEN
    assert [layer.kind for layer in read_names(tensors(blocks(3, lost=(1, 2)))).layers] == [BATCH, OPEN, OPEN]


def gains(centre: float, spread: float = 0.1, count: int = 64) -> Stored:
    values = centre + spread * np.random.default_rng(0).standard_normal(count)
    return Stored((count,), values=values)


def flags(named: Mapping[str, Stored]) -> dict[str, bool | None]:
    return {layer.name: layer.zero_centred for layer in read_names(named).layers}


def test_zero_centred_gains_are_seen_in_the_values_of_all_layers_of_a_place() -> None:
    gemma = {f"layers.{i}.input_layernorm.weight": gains(0.05) for i in range(4)}
    assert set(flags(gemma).values()) == {True}
    llama = {f"layers.{i}.input_layernorm.weight": gains(1.0) for i in range(4)}
    assert set(flags(llama).values()) == {False}
    # One sick layer does not turn the convention round, and small positive gains are gains.
    assert set(flags(llama | {"layers.1.input_layernorm.weight": gains(0.0)}).values()) == {False}
    small = {f"layers.{i}.input_layernorm.weight": gains(0.1, spread=0.01) for i in range(4)}
    assert set(flags(small).values()) == {False}
    # Only norms with a gain alone come in both conventions.
    assert flags({"ln.weight": gains(0.0), "ln.bias": gains(0.0)}) == {"ln": None}


def test_both_conventions_in_one_model() -> None:
    """Qwen3-Next: the norm inside linear attention is plain, the others are centred on zero; their names end alike."""
    centred = {f"model.layers.{i}.input_layernorm.weight": gains(0.0) for i in range(3)}
    plain = {f"model.layers.{i}.linear_attn.norm.weight": gains(1.0) for i in range(3)}
    said = flags(centred | plain | {"model.norm.weight": gains(0.0)})
    assert [name for name, flag in said.items() if not flag] == [f"model.layers.{i}.linear_attn.norm" for i in range(3)]


def test_values_that_are_not_finite_decide_nothing() -> None:
    assert flags({"norm.weight": Stored((4,), values=np.nan)}) == {"norm": False}


@pytest.mark.parametrize(
    "name, stripped",
    [
        ("module.a", "a"),
        ("a._orig_mod.b", "a.b"),
        ("module.module.a", "a"),
        ("_forward_module.a._checkpoint_wrapped_module._fsdp_wrapped_module.b", "a.b"),
        ("modules.a", "modules.a"),
        ("", ""),
        ("model.a", "model.a"),
    ],
)
def test_wrappers(name: str, stripped: str) -> None:
    assert strip_wrappers(name) == stripped


def test_names_and_values_have_a_budget() -> None:
    budget = Budget()
    budget.spend_names(1000, 1_000_000)
    with pytest.raises(InputError, match="names"):
        budget.spend_names(100 << 20)
    layer = NormLayer(name="a", path="a", kind=BATCH, channels=1 << 26)
    with pytest.raises(InputError, match="values"):
        Budget().spend_values([layer])


def test_names_that_are_not_torchs_are_kept_with_what_they_were_taken_for() -> None:
    found = read_names(
        tensors(of("a.bn", gamma=C, beta=C, moving_mean=C, moving_variance=C), prefix="module._orig_mod.")
        | tensors(of("b.bn", **AFFINE, **STATISTICS))
    )
    first, second = found.layers
    assert first.stored_names == {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    }
    assert (first.wrappers, first.path) == (("module", "_orig_mod"), "a.bn")
    assert (second.stored_names, second.wrappers) == ({}, ())


@pytest.mark.parametrize("name", ["shift", "s"])
def test_the_shift_of_a_derf_is_a_field_of_its_own(name: str) -> None:
    stored = tensors(of("norm1", alpha=1, **{name: 1}, **AFFINE) | of("norm2", alpha=1, **AFFINE))
    derf, tanh = read_names(stored).layers
    assert derf.inner_shift is stored[f"norm1.{name}"]
    assert tanh.inner_shift is None
