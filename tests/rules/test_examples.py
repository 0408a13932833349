"""Every rule on examples: what sets it off, at which channels and how severely, and what must not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from normdoctor.compared import (
    Comparison,
    ComparisonKind,
    LayerChange,
    Matching,
    MissingLayer,
    Motion,
    Side,
    Trajectory,
    WeightsChange,
)
from normdoctor.findings import Confidence, Severity
from normdoctor.layers import Danger, LoadCall, NormKind
from normdoctor.measured import DriftVerdict, Measured, Measurement, Preprocessing, Recalibrated
from normdoctor.moments import Moments
from normdoctor.places import Activation, Fate, Neighbour, Place, Prediction, Producer
from normdoctor.rules import RULES

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR
NAN, INF = float("nan"), float("inf")

# torch's float32 floor of a decay by momentum 0.1, and an ONNX operator as the reader names it
FLOOR = 4 * 2.0**-149
ONNX = {"origin": "BatchNormalization", "num_batches_tracked": None, "track_running_stats": None}
BARE = dict.fromkeys(("eps", "momentum", "training", "affine", "track_running_stats"))
NO_AFFINE = dict.fromkeys(("weight", "bias"))
GONE = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
FRESH = {
    "weight": np.ones(16),
    "bias": np.zeros(16),
    "running_mean": np.zeros(16),
    "running_var": np.ones(16),
    "num_batches_tracked": 0,
}
SPREAD = np.linspace(0.0, 1.0, 64)
SQUEEZED = {"channels": 64, "num_batches_tracked": 216, "running_var": 0.82 + 0.1 * SPREAD}
SQUEEZED_WITH_NAN = BARE | SQUEEZED | {"running_var": np.r_[NAN, 0.82 + 0.1 * SPREAD[1:]]}
SYNC = "torch.nn.modules.batchnorm.SyncBatchNorm"
TRACKED = {"running_mean": SPREAD[:16], "running_var": 0.5 + SPREAD[:16], "track_running_stats": True}
DERF = {"kind": NormKind.DYNAMIC_TANH, "alpha": 0.5}
GAINS = 1.0 + 0.1 * np.sin(np.arange(64))


@dataclass(frozen=True)
class Row:
    """`layers` (overrides of a healthy BatchNorm) judged by one rule."""

    code: str
    why: str
    layers: list[dict[str, Any]]
    found: dict[str | None, list[int]] = field(default_factory=dict)
    """layer (None for the file) → channels of the finding; empty where the rule must keep silent."""
    severity: Severity | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.code} {self.why}"


def fires(
    code: str,
    why: str,
    *layers: dict[str, Any],
    at: Any,
    severity: Severity,
    **settings: Any,
) -> Row:
    """`at`: the channels of the one layer, or {layer: channels} where there are several."""
    found = at if isinstance(at, dict) else {"layer1.0.bn1": list(at)}
    return Row(code, why, list(layers), found, severity, settings)


def silent(code: str, why: str, *layers: dict[str, Any], **settings: Any) -> Row:
    return Row(code, why, list(layers), {}, None, settings)


def norms(count: int, **overrides: Any) -> list[dict[str, Any]]:
    """That many healthy layers, all with these overrides."""
    return [dict(overrides) for _ in range(count)]


def token_norm(weight: Any, **overrides: Any) -> dict[str, Any]:
    weight = np.asarray(weight, dtype=float)
    return {"kind": NormKind.RMS, "channels": weight.size, "weight": weight, "bias": None} | overrides


def centred(on: float, seed: int = 0) -> np.ndarray:
    return on + 0.1 * np.random.default_rng(seed).standard_normal(64)


STATISTICS = [
    fires("S100", "fresh model", FRESH, FRESH, at={None: []}, severity=INFO),
    fires(
        "S100",
        "a block that starts as the identity",
        FRESH,
        FRESH | {"weight": np.zeros(16)},
        at={None: []},
        severity=INFO,
    ),
    silent("S100", "one layer has learnt", FRESH, {}),
    silent("S100", "batches were counted, so something else is wrong", FRESH | {"num_batches_tracked": 10}),
    fires("S101", "NaN variance", {"running_var": {3: NAN, 11: NAN}}, at=[3, 11], severity=ERROR),
    fires("S101", "infinite mean", {"running_mean": {5: -INF}}, at=[5], severity=ERROR),
    fires("S101", "overflow of AMP", {"running_mean": {2: INF}, "running_var": {2: NAN}}, at=[2], severity=ERROR),
    fires("S101", "in a bare state_dict", BARE | {"running_var": {0: INF}}, at=[0], severity=ERROR),
    silent("S101", "huge but finite", {"running_var": {3: 3e38}}),
    fires("S102", "eps subtracted on conversion", {"running_var": {4: -1e-5, 9: -1e-5}}, at=[4, 9], severity=ERROR),
    fires("S102", "hidden by eps", {"running_var": {4: -5e-6}}, at=[4], severity=ERROR),
    fires("S102", "minus infinity", {"running_var": {4: -INF}}, at=[4], severity=ERROR),
    silent("S102", "zero, and minus zero", {"running_var": {4: 0.0, 5: -0.0}}),
    fires(
        "S103",
        "never updated in a trained model",
        FRESH | {"weight": GAINS[:16]},
        {},
        at={"bn0": range(16)},
        severity=ERROR,
    ),
    fires(
        "S103",
        "momentum 0: counted, not moved",
        FRESH | {"num_batches_tracked": 99, "weight": GAINS[:16]},
        at=range(16),
        severity=ERROR,
    ),
    fires(
        "S103",
        "affine untouched as well, but counted",
        FRESH | {"num_batches_tracked": 99},
        at=range(16),
        severity=ERROR,
    ),
    fires(
        "S103",
        "no counter to confirm it",
        FRESH | {"num_batches_tracked": None, "weight": GAINS[:16]},
        at=range(16),
        severity=WARNING,
    ),
    silent("S103", "one channel differs", FRESH | {"running_var": np.r_[1.5, np.ones(15)], "weight": GAINS[:16]}),
    silent("S103", "fresh model", FRESH, FRESH),
    fires(
        "S104",
        "much left",
        {"momentum": 0.001, "num_batches_tracked": 1000, "running_var": {0: 0.4}},
        at=[],
        severity=ERROR,
    ),
    fires(
        "S104",
        "6 % cost a depthwise net 7 points",
        {"momentum": 0.01, "num_batches_tracked": 280},
        at=[],
        severity=ERROR,
    ),
    fires("S104", "some left", {"momentum": 0.01, "num_batches_tracked": 300}, at=[], severity=WARNING),
    fires("S104", "a trace left", {"momentum": 0.01, "num_batches_tracked": 600}, at=[], severity=INFO),
    fires(
        "S104",
        "frozen, so one level down",
        {"momentum": 0.01, "num_batches_tracked": 150, "requires_grad": False},
        at=[],
        severity=WARNING,
    ),
    silent("S104", "nothing left", {"momentum": 0.1, "num_batches_tracked": 216}),
    silent("S104", "plain average", {"momentum": "cumulative", "num_batches_tracked": 3}),
    silent("S104", "momentum 0 is C302's", {"momentum": 0.0, "num_batches_tracked": 3}),
    silent("S104", "a momentum of 1 leaves nothing", {"momentum": 1, "num_batches_tracked": 3}),
    silent("S104", "nothing counted is S111's", {"momentum": 0.1, "num_batches_tracked": 0}),
    silent("S104", "did not start at 1", {"momentum": 0.001, "num_batches_tracked": 216}),
    silent(
        "S104",
        "another layer of the same momentum and counter did not, so update_bn computed both",
        {"num_batches_tracked": 20},
        {"num_batches_tracked": 20, "running_var": {3: 0.01}},
    ),
    fires(
        "S104",
        "a layer of another counter contradicts nothing",
        {"num_batches_tracked": 20},
        {"num_batches_tracked": 21, "running_var": {3: 0.01}},
        at={"bn0": []},
        severity=ERROR,
    ),
    fires(
        "S104",
        "another momentum neither",
        {"num_batches_tracked": 20},
        {"num_batches_tracked": 20, "momentum": 0.11, "running_var": {3: 0.01}},
        at={"bn0": []},
        severity=ERROR,
    ),
    silent(
        "S104",
        "update_bn in a bare state_dict",
        BARE | {"num_batches_tracked": 20},
        BARE | {"num_batches_tracked": 20, "running_var": {3: 0.01}},
    ),
    silent("S104", "no momentum to compute with", *[{"momentum": m, "num_batches_tracked": 3} for m in (NAN, -0.1, 7)]),
    fires("S105", "the floor of 0.1", {"running_var": {2: FLOOR}}, at=[2], severity=WARNING),
    fires("S105", "the floor of 0.001", {"channels": 64, "running_var": {2: 500 * 2.0**-149}}, at=[2], severity=INFO),
    fires("S105", "flushed to zero", {"channels": 64, "running_var": {7: 0.0}}, at=[7], severity=INFO),
    fires(
        "S105",
        "what 300 updates leave of 1",
        BARE | {"channels": 64, "num_batches_tracked": 300, "running_var": {7: 0.9**300}},
        at=[7],
        severity=INFO,
    ),
    fires(
        "S105",
        "an odd momentum from the file",
        {"channels": 64, "momentum": 0.07, "num_batches_tracked": 100, "running_var": {7: 0.93**100}},
        at=[7],
        severity=INFO,
    ),
    fires(
        "S105",
        "residue of the size of live variances",
        {"momentum": 0.01, "num_batches_tracked": 300, "running_var": {7: 0.99**300}},
        at=[7],
        severity=WARNING,
    ),
    silent("S105", "weights that decayed", {"running_var": {2: 1.9e-14, 5: 1e-8}}),
    silent("S105", "a subnormal that is no floor", {"running_var": {2: 7 * 2.0**-149}}),
    silent(
        "S105",
        "near the residue is not on it",
        {"momentum": 0.01, "num_batches_tracked": 300, "running_var": {7: 0.99**300 * 1.001}},
    ),
    silent(
        "S105",
        "float16 cannot hold it, so 0 proves nothing",
        {"running_var": {2: 0.0}, "dtypes": {"running_var": "float16"}},
    ),
    silent(
        "S105",
        "another channel is below, so the buffers did not start at 1",
        {"momentum": 0.01, "num_batches_tracked": 300, "running_var": {7: 0.99**300, 8: 1e-3}},
    ),
    fires("S106", "carries signal", {"running_var": {6: 2e-7}}, at=[6], severity=WARNING),
    fires(
        "S106",
        "a dead channel beside it is not in the warning",
        {"running_var": {6: 2e-7, 7: FLOOR}},
        at=[6],
        severity=WARNING,
    ),
    fires("S106", "eps assumed", BARE | {"running_var": {6: 2e-7}}, at=[6], severity=WARNING),
    fires("S106", "weights that decayed", {"running_var": {6: 1.9e-14}}, at=[6], severity=INFO),
    fires("S106", "as in published models", {"running_var": {6: FLOOR}, "weight": {6: 1e-3}}, at=[6], severity=INFO),
    fires("S106", "an input, but no gain", {"running_var": {6: 5e-6}, "weight": {6: 1e-4}}, at=[6], severity=INFO),
    fires("S106", "zeros of a converted EfficientNet", {"running_var": {6: 0.0}, "eps": 1e-3}, at=[6], severity=INFO),
    silent("S106", "small, but above eps", {"running_var": {6: 2e-5}}),
    silent("S106", "negative is S102's", {"running_var": {6: -1e-7}}),
    fires(
        "S107",
        "placeholders of a conversion",
        {"running_mean": np.zeros(16), "running_var": np.full(16, 0.5)},
        at=range(16),
        severity=WARNING,
    ),
    fires("S107", "only the mean was reset", {"running_mean": np.zeros(16)}, at=range(16), severity=WARNING),
    fires(
        "S107",
        "the dead channels hold other values",
        {
            "channels": 32,
            "running_mean": np.r_[np.zeros(8), np.full(24, 0.1)],
            "running_var": np.r_[[FLOOR] * 8, [0.5] * 24],
        },
        at=range(8, 32),
        severity=WARNING,
    ),
    silent("S107", "one channel differs", {"running_mean": np.r_[1e-9, np.zeros(15)]}),
    silent("S107", "as created is S103's", FRESH | {"weight": GAINS[:16]}),
    silent("S107", "all dead is S105's", {"running_mean": np.zeros(16), "running_var": np.full(16, FLOOR)}),
    silent(
        "S107",
        "few channels may agree",
        {"channels": 4, "running_mean": np.full(4, 0.5), "running_var": np.full(4, 0.5)},
    ),
    fires("S108", "a large bias", {"running_mean": {1: 30.0}}, at=[1], severity=INFO),
    fires("S108", "inputs that were not normalised", {"running_mean": {1: 300.0}}, at=[1], severity=WARNING),
    silent("S108", "below 5 % of the channels", {"channels": 64, "running_mean": {1: 30.0}}),
    silent(
        "S108", "a dead channel has no spread to compare with", {"running_mean": {1: 5.0}, "running_var": {1: FLOOR}}
    ),
    fires("S109", "an exploding channel", {"running_var": {15: 5e3}}, at=[15], severity=INFO),
    fires("S109", "by six orders", {"running_var": {15: 5e6}}, at=[15], severity=WARNING),
    fires("S109", "a small layer gives a hint", {"channels": 8, "running_var": {7: 5e6}}, at=[7], severity=INFO),
    silent("S109", "a tiny layer gives nothing", {"channels": 4, "running_var": {3: 5e6}}),
    silent("S109", "most channels dead, the rest alike", {"running_var": dict.fromkeys(range(10), FLOOR)}),
    silent("S109", "most channels decayed, the rest alike", {"running_var": dict.fromkeys(range(10), 1e-14)}),
    fires("S110", "frozen for a while", *norms(4), {"num_batches_tracked": 4321}, at={"bn4": []}, severity=WARNING),
    fires("S110", "came pretrained", *norms(4), {"num_batches_tracked": 54321}, at={"bn4": []}, severity=WARNING),
    fires("S110", "exactly half", *norms(4), {"num_batches_tracked": 2500}, at={"bn4": []}, severity=INFO),
    fires(
        "S110",
        "one norm under two names",
        *norms(4),
        {"num_batches_tracked": 10000, "aliases": ("b.bn",)},
        at={"bn4": []},
        severity=INFO,
    ),
    fires(
        "S110",
        "a new layer on a frozen backbone",
        *norms(4, requires_grad=False),
        {"num_batches_tracked": 4321},
        at={"bn4": []},
        severity=INFO,
    ),
    fires(
        "S110",
        "a frozen backbone under many new layers",
        *norms(4),
        {"num_batches_tracked": 54321, "requires_grad": False},
        at={"bn4": []},
        severity=INFO,
    ),
    silent("S110", "called twice per step", *norms(4), {"num_batches_tracked": 10000}),
    silent("S110", "never counted is another rule's", *norms(4), {"num_batches_tracked": 0}),
    fires("S111", "converted", {"num_batches_tracked": 0}, at=[], severity=INFO),
    fires("S111", "no counter at all", BARE | {"num_batches_tracked": None}, at=[], severity=INFO),
    silent("S111", "nothing to lose", FRESH | {"weight": GAINS[:16]}),
    silent("S111", "exported operators have none", ONNX),
    silent("S111", "torch's InstanceNorm never counts", {"kind": NormKind.INSTANCE, "num_batches_tracked": 0}),
    silent(
        "S111",
        "frozen classes have none",
        {"num_batches_tracked": None, "origin": "torchvision.ops.misc.FrozenBatchNorm2d"},
    ),
    fires(
        "S112",
        "a soup of checkpoints",
        *norms(2, num_batches_tracked=np.array(10812.5)),
        at={None: []},
        severity=WARNING,
    ),
    silent("S112", "whole counter stored as a float", {"num_batches_tracked": np.array(41.0)}),
    silent("S112", "no number", {"num_batches_tracked": np.array(NAN)}),
    fires(
        "S114",
        "the wrong key was looked up",
        {},
        {"weight": GAINS[:16]},
        {"running_mean": 0.2 + SPREAD[:16]},
        at={"bn0": range(16)},
        severity=INFO,
    ),
    silent("S114", "one value differs", {}, {"running_var": {3: 0.61}}),
    silent("S114", "as created", *norms(3, **FRESH | {"weight": GAINS[:16]})),
    silent("S114", "placeholders are S107's", *norms(3, running_mean=np.full(16, 0.5), running_var=np.full(16, 0.5))),
    silent("S114", "all dead", *norms(3, running_mean=np.zeros(16), running_var=np.full(16, FLOOR))),
    fires(
        "S113",
        "kept in bfloat16",
        {
            "channels": 64,
            "running_mean": np.round(37 * SPREAD) / 128,
            "running_var": (64 + np.round(63 * SPREAD)) / 128,
        },
        at=range(64),
        severity=WARNING,
    ),
    fires(
        "S113",
        "kept in float16",
        {
            "channels": 64,
            "running_mean": np.round(999 * SPREAD) / 1024,
            "running_var": (1024 + np.round(999 * SPREAD)) / 2048,
        },
        at=range(64),
        severity=WARNING,
    ),
    silent(
        "S113",
        "one value needs more bits",
        {
            "channels": 64,
            "running_mean": np.round(37 * SPREAD) / 128,
            "running_var": np.r_[(64 + np.round(62 * SPREAD[:63])) / 128, 1 / 3],
        },
    ),
    silent(
        "S113",
        "stored in 16 bits anyway",
        {
            "running_mean": np.arange(16.0),
            "running_var": np.arange(1.0, 17.0),
            "dtypes": {"running_mean": "bfloat16", "running_var": "bfloat16"},
        },
    ),
    silent("S113", "placeholders", {"running_mean": np.zeros(16), "running_var": np.full(16, 0.5)}),
    fires(
        "S115",
        "a momentum that was larger once",
        {"momentum": 0.001, "num_batches_tracked": 216},
        at=range(5),
        severity=INFO,
    ),
    silent("S115", "long ago forgotten", {"momentum": 0.1, "num_batches_tracked": 5000, "running_var": {0: 0.0}}),
    silent(
        "S115",
        "float16 rounds the residue to 0",
        {"momentum": 0.1, "num_batches_tracked": 200, "running_var": {0: 0.0}, "dtypes": {"running_var": "float16"}},
    ),
    silent("S115", "negative is S102's", {"momentum": 0.1, "num_batches_tracked": 216, "running_var": {0: -1.0}}),
    silent("S115", "above the bound", {"momentum": 0.1, "num_batches_tracked": 216}),
    silent("S115", "no momentum to compute with", *[{"momentum": m, "num_batches_tracked": 3} for m in (NAN, -0.1, 7)]),
    fires("S116", "statistics dropped", *norms(3, **BARE), BARE | GONE, at={"bn3": []}, severity=WARNING),
    fires("S116", "weight dropped", *norms(3, **BARE), BARE | {"weight": None}, at={"bn3": []}, severity=WARNING),
    fires("S116", "affine=False, or not", *norms(3, **BARE), BARE | NO_AFFINE, at={"bn3": []}, severity=INFO),
    fires("S116", "said affine", *norms(3), NO_AFFINE | {"affine": True}, at={"bn3": []}, severity=WARNING),
    fires("S116", "nothing left", *norms(3, **BARE), BARE | NO_AFFINE | GONE, at={"bn3": []}, severity=WARNING),
    fires("S116", "in all layers of a state_dict", BARE | GONE, at=[], severity=WARNING),
    fires("S116", "only the counter", *norms(3), {"num_batches_tracked": None}, at={"bn3": []}, severity=INFO),
    silent("S116", "declared without affine", *norms(3), {"weight": None, "bias": None, "affine": False}),
    silent("S116", "declared without statistics", *norms(3), GONE | {"track_running_stats": False}),
    silent("S116", "all without counter", *norms(3, num_batches_tracked=None)),
    fires("S117", "no variance", {"running_var": None}, at=[], severity=ERROR),
    fires("S117", "no mean", BARE | {"running_mean": None}, at=[], severity=ERROR),
    silent("S117", "neither", GONE),
    fires("S118", "nothing known", BARE | SQUEEZED | {"num_batches_tracked": None}, at={None: []}, severity=WARNING),
    fires("S118", "updates known", BARE | SQUEEZED, BARE | SQUEEZED, at={None: []}, severity=WARNING),
    fires("S118", "momentum known", SQUEEZED | {"num_batches_tracked": None}, at={None: []}, severity=WARNING),
    silent("S118", "variances as spread as in any trained net", BARE | {"channels": 64}),
    silent("S118", "both known: S104 computes it", SQUEEZED),
    fires(
        "S118",
        "beside a first layer that gets raw pixels",
        BARE | SQUEEZED | {"running_var": 2.4 + 8.6 * SPREAD},
        BARE | SQUEEZED,
        BARE | SQUEEZED,
        at={None: []},
        severity=WARNING,
    ),
    fires("S118", "a NaN is S101's", SQUEEZED_WITH_NAN, at={None: []}, severity=WARNING),
    silent("S118", "alike, but above 1 nothing is left of it", BARE | SQUEEZED | {"running_var": 2.0 + SPREAD}),
    silent("S118", "a third of the layers", BARE | SQUEEZED, *norms(2, **BARE, channels=64, num_batches_tracked=216)),
    silent(
        "S118",
        "few channels in half of the layers",
        BARE | SQUEEZED | {"channels": 16, "running_var": 0.82 + 0.1 * SPREAD[:16]},
        BARE | {"channels": 64, "num_batches_tracked": 216},
    ),
    silent("S118", "as near to 1 as a healthy dense net", BARE | SQUEEZED | {"running_var": 0.294 + 0.75 * SPREAD}),
    silent("S118", "few channels may be alike by chance", BARE | {"running_var": 0.82 + 0.1 * SPREAD[:16]}),
]

AFFINE = [
    fires("A201", "NaN gain", {"weight": {3: NAN}}, at=[3], severity=ERROR),
    fires("A201", "infinite shift of a LayerNorm", {"kind": NormKind.LAYER, "bias": {1: INF}}, at=[1], severity=ERROR),
    silent("A201", "large", {"weight": {3: 1e30}}),
    fires("A202", "a few pruned", {"weight": {3: 0.0, 8: 5e-4}}, at=[3, 8], severity=INFO),
    fires("A202", "small beside the others", {"weight": {3: 0.009}}, at=[3], severity=INFO),
    fires("A202", "half of the layer", {"weight": dict.fromkeys(range(8), 1e-05)}, at=range(8), severity=WARNING),
    fires("A202", "half of a small layer", {"channels": 4, "weight": {0: 1e-5, 1: 1e-5}}, at=[0, 1], severity=INFO),
    silent("A202", "small but in use", {"weight": {3: 0.02}}),
    silent("A202", "all exactly 0 is A203's", {"weight": np.zeros(16)}),
    silent("A202", "1 + weight of about 1", token_norm(centred(0.0), zero_centred=True)),
    fires("A203", "the end of a residual block", {"weight": np.zeros(16)}, {}, at={"bn0": range(16)}, severity=WARNING),
    fires(
        "A203",
        "a GroupNorm, which counts nothing",
        {"kind": NormKind.GROUP, "weight": np.zeros(16)},
        {},
        at={"bn0": range(16)},
        severity=WARNING,
    ),
    silent("A203", "fresh model", FRESH | {"weight": np.zeros(16)}, FRESH),
    silent("A203", "one channel moved", {"weight": np.r_[1e-9, np.zeros(15)]}),
    silent("A203", "never ran at all: S103", FRESH | {"weight": np.zeros(16)}, {}),
    fires(
        "A204",
        "left out of the optimiser",
        {"weight": np.ones(16), "bias": np.zeros(16)},
        {},
        at={"bn0": range(16)},
        severity=WARNING,
    ),
    fires(
        "A204",
        "no gradient by design",
        {"weight": np.ones(16), "bias": np.zeros(16), "requires_grad": False},
        {},
        at={"bn0": range(16)},
        severity=INFO,
    ),
    fires(
        "A204", "no layer ever moved", *norms(3, weight=np.ones(16), bias=np.zeros(16)), at={None: []}, severity=INFO
    ),
    silent("A204", "only the shift moved", {"weight": np.ones(16)}, {}),
    silent("A204", "built without", {"weight": None, "bias": None, "affine": False}, {}),
    fires("A205", "one gain of 300 times the others", {"weight": {3: 300.0}}, at=[3], severity=WARNING),
    fires(
        "A205",
        "a factor of thousands everywhere",
        {"channels": 4, "weight": np.full(4, 4e3)},
        at=range(4),
        severity=WARNING,
    ),
    fires("A205", "a small layer gives a hint", {"channels": 8, "weight": {3: 300.0}}, at=[3], severity=INFO),
    fires("A205", "the input never varies", {"running_var": {3: FLOOR}}, at=[3], severity=INFO),
    fires(
        "A205",
        "a dead channel beside a live one",
        {"running_var": {3: FLOOR}, "weight": {5: 300.0}},
        at=[5],
        severity=WARNING,
    ),
    fires("A205", "variance 0 and eps 0", {"running_var": {3: 0.0}, "eps": 0.0}, at=[3], severity=WARNING),
    silent("A205", "ten times is usual", {"weight": {3: 10.0}}),
    silent("A205", "a dead channel without gain", {"running_var": {3: FLOOR}, "weight": {3: 1e-3}}),
    silent("A205", "most channels dead, the rest alike", {"weight": dict.fromkeys(range(10), 1e-09)}),
    fires(
        "A207",
        "learnt to undo it",
        {
            "weight": np.full(16, 2.0),
            "running_var": np.full(16, 4.0),
            "bias": 0.4 * np.cos(7.0 * SPREAD[:16]),
            "running_mean": 0.4 * np.cos(7.0 * SPREAD[:16]),
        },
        at=range(16),
        severity=INFO,
    ),
    silent(
        "A207",
        "the mean is not put back",
        {"weight": np.full(16, 2.0), "running_var": np.full(16, 4.0), "bias": np.full(16, 3.0)},
    ),
    silent(
        "A207",
        "only half of the channels",
        {
            "weight": dict.fromkeys(range(8), 2.0),
            "running_var": dict.fromkeys(range(8), 4.0),
            "bias": dict.fromkeys(range(8), 0.0),
            "running_mean": dict.fromkeys(range(8), 0.0),
        },
    ),
    silent("A207", "as created, which says nothing", FRESH, {}),
    silent(
        "A207",
        "three channels may do so by chance",
        {
            "channels": 3,
            "weight": np.full(3, 2.0),
            "running_var": np.full(3, 4.0),
            "bias": np.zeros(3),
            "running_mean": np.zeros(3),
        },
    ),
]

SETTINGS = [
    fires("C301", "ONNX node in training mode", ONNX | {"training": True}, at=[], severity=ERROR),
    fires(
        "C301",
        "its full name",
        ONNX | {"origin": "ai.onnx.BatchNormalization", "training": True},
        at=[],
        severity=ERROR,
    ),
    fires("C301", "built without statistics", GONE | {"track_running_stats": False}, at=[], severity=WARNING),
    fires("C301", "buffers removed", GONE, at=[], severity=WARNING),
    fires("C301", "flag changed afterwards", {"track_running_stats": False}, at=[], severity=WARNING),
    silent("C301", "ONNX node in inference mode", ONNX),
    silent("C301", "a module in training mode is C314's", {"training": True}),
    silent("C301", "InstanceNorm has none by design", GONE | {"kind": NormKind.INSTANCE, "track_running_stats": False}),
    fires("C302", "never moved", FRESH | {"weight": GAINS[:16], "momentum": 0.0}, at=[], severity=WARNING),
    fires("C302", "saved in training mode", {"momentum": 0.0, "training": True}, at=[], severity=WARNING),
    fires("C302", "a converted model", {"momentum": 0}, at=[], severity=INFO),
    silent("C302", "small", {"momentum": 1e-4}),
    silent("C302", "plain average", {"momentum": "cumulative"}),
    fires("C303", "Keras's decay", {"momentum": 0.99}, at=[], severity=WARNING),
    fires("C303", "only the last batch", {"momentum": 1.0}, at=[], severity=WARNING),
    silent("C303", "quick but usual", {"momentum": 0.3}),
    silent("C303", "above 1 is C315's", {"momentum": 1.5}, {"momentum": INF}),
    silent("C303", "plain average", {"momentum": "cumulative"}),
    fires("C304", "throughout", *norms(3, momentum="cumulative"), at={None: []}, severity=INFO),
    fires("C304", "in one layer", *norms(3), {"momentum": "cumulative"}, at={None: []}, severity=INFO),
    silent("C304", "a moving average", *norms(3)),
    silent("C304", "not said", BARE),
    fires("C305", "one layer differs, and it shows", *norms(4), {"eps": 0.1}, at={"bn4": []}, severity=WARNING),
    fires("C305", "one layer differs, without effect", *norms(4), {"eps": 1e-3}, at={"bn4": []}, severity=INFO),
    fires("C305", "no framework has it", *norms(2, eps=0.5), at={"bn0": [], "bn1": []}, severity=WARNING),
    fires(
        "C305",
        "LayerNorms differ",
        *norms(3, kind=NormKind.LAYER),
        {"kind": NormKind.LAYER, "eps": 1e-12},
        at={"bn3": []},
        severity=INFO,
    ),
    fires("C305", "no number at all", {"eps": NAN}, at=[], severity=ERROR),
    silent("C305", "Keras's default throughout", *norms(3, eps=1e-3)),
    silent("C305", "1e-5 rounded to float32", *norms(2), {"eps": float(np.float32(1e-5))}),
    silent("C305", "another eps without effect", *norms(3, eps=2e-5)),
    silent("C305", "LayerNorm and BatchNorm may differ", *norms(2), {"kind": NormKind.LAYER, "eps": 1e-6}),
    fires("C306", "one forgotten", *norms(3), {"training": True}, at={"bn3": []}, severity=INFO),
    fires("C306", "one frozen", *norms(3, training=True), {"training": False}, at={"bn3": []}, severity=INFO),
    silent("C306", "all in eval mode", *norms(3)),
    silent("C306", "all in training mode is C314's", *norms(3, training=True)),
    fires("C307", "a frozen backbone", *norms(3, requires_grad=False), {}, at={None: []}, severity=INFO),
    fires("C307", "a LayerNorm", {"kind": NormKind.LAYER, "requires_grad": False}, at={None: []}, severity=INFO),
    silent("C307", "all of them learn", *norms(3, requires_grad=True)),
    silent("C307", "nothing to freeze", {"weight": None, "bias": None, "affine": False}),
    fires("C308", "built so", {"kind": NormKind.INSTANCE, **TRACKED}, at=[], severity=WARNING),
    fires("C308", "in a state_dict", BARE | {"kind": NormKind.INSTANCE, **TRACKED}, at=[], severity=WARNING),
    silent("C308", "none by default", {"kind": NormKind.INSTANCE, "track_running_stats": False}),
    silent("C308", "torch passes over them", {"kind": NormKind.INSTANCE, **TRACKED, "track_running_stats": False}),
    silent("C308", "a BatchNorm is meant to", {}),
    fires("C309", "in a checkpoint", {"origin": SYNC}, {}, at={None: []}, severity=INFO),
    fires("C309", "on its way to int8", {"origin": SYNC}, at={None: []}, severity=WARNING, precision="int8"),
    silent("C309", "the plain class", {"origin": "torch.nn.modules.batchnorm.BatchNorm2d"}),
    silent("C309", "no class said", {}),
    fires("C310", "the file says so", {}, at={None: []}, severity=INFO, averaged="n_averaged = 12"),
    silent("C310", "a counter with a fraction is S112's", {"num_batches_tracked": np.array(41.5)}),
    silent("C310", "no statistics to be old", {"kind": NormKind.LAYER}, averaged="n_averaged = 12"),
    fires("C311", "pruned without its buffers", {"weight": np.ones(12), "bias": np.ones(12)}, at=[], severity=ERROR),
    fires(
        "C311",
        "nothing stored",
        {"channels": 0, "weight": [], "bias": [], "running_mean": [], "running_var": []},
        at=[],
        severity=ERROR,
    ),
    silent(
        "C311",
        "a LayerNorm over two axes",
        {"kind": NormKind.LAYER, "weight": np.ones((4, 4)), "bias": np.ones((4, 4))},
    ),
    fires(
        "C312",
        "Keras",
        *norms(2, stored_names={"weight": "gamma", "running_mean": "moving_mean"}),
        at={None: []},
        severity=INFO,
    ),
    fires("C312", "DataParallel", {"wrappers": ("module",)}, at={None: []}, severity=INFO),
    silent("C312", "torch's own names", *norms(2)),
    fires(
        "C313", "half of the layer cast", {"dtypes": {"weight": "float16", "bias": "float16"}}, at=[], severity=WARNING
    ),
    fires(
        "C313",
        "one layer of many",
        *norms(3),
        {"dtypes": dict.fromkeys(("weight", "bias", "running_mean", "running_var"), "bfloat16")},
        at={"bn3": []},
        severity=INFO,
    ),
    silent(
        "C313",
        "another kind may have another type",
        *norms(3),
        {"kind": NormKind.LAYER, "dtypes": {"weight": "float16", "bias": "float16"}},
    ),
    fires("C315", "meant in percent", {"momentum": 10.0}, at=[], severity=WARNING),
    fires("C315", "just above 1", {"momentum": 1.0001}, at=[], severity=WARNING),
    fires("C315", "negative", {"momentum": -0.1}, at=[], severity=WARNING),
    fires("C315", "NaN", {"momentum": NAN}, at=[], severity=WARNING),
    fires("C315", "infinite", {"momentum": INF}, at=[], severity=WARNING),
    silent("C315", "the ends of the range", {"momentum": 0}, {"momentum": 1.0}),
    silent("C315", "a plain average", {"momentum": "cumulative"}),
    silent("C315", "not said", BARE),
    fires("C314", "forgot eval()", *norms(3, training=True), at={None: []}, severity=INFO),
    silent("C314", "eval mode", *norms(3)),
    silent("C314", "some of them is C306's", *norms(3, training=True), {}),
    silent("C314", "an exported graph is C301's", ONNX | {"training": True}),
]

NUMERICS = [
    fires("N401", "raw inputs", {"running_var": {2: 4.97e5}}, at=[2], severity=ERROR, precision="fp16"),
    fires("N401", "no target", {"running_var": {2: 4.97e5}, "bias": {5: -1e6}}, at=[2, 5], severity=INFO),
    fires(
        "N401",
        "a LayerNorm's gain",
        {"kind": NormKind.LAYER, "weight": {9: 7e4}},
        at=[9],
        severity=ERROR,
        precision="fp16",
    ),
    silent("N401", "bfloat16 can hold it", {"running_var": {2: 4.97e5}}, precision="bf16"),
    silent("N401", "the largest number", {"running_var": {2: 65504.0}}, precision="fp16"),
    silent("N401", "already infinite is S101's", {"running_var": {2: INF}}, precision="fp16"),
    fires("N402", "a small variance", {"running_var": {2: 1e-8}}, at=[2], severity=WARNING, precision="fp16"),
    fires(
        "N402",
        "eps as well",
        {"running_var": {2: 1e-8, 3: 0.0}, "eps": 1e-12},
        at=[2, 3],
        severity=ERROR,
        precision="fp16",
    ),
    fires("N402", "BERT's eps", {"kind": NormKind.LAYER, "eps": 1e-12}, at=[], severity=WARNING, precision="fp16"),
    fires("N402", "no target", {"running_var": {2: 1e-8}}, at=[2], severity=INFO),
    silent("N402", "bfloat16 can hold it", {"running_var": {2: 1e-8}}, precision="bf16"),
    silent("N402", "eps 1e-5 survives", {}, precision="fp16"),
    silent("N402", "0 stays 0, and eps too", {"running_var": {2: 0.0}}, precision="fp16"),
    fires("N403", "bfloat16", {"running_mean": {0: 20.0}}, at=[0], severity=WARNING, precision="bf16"),
    fires("N403", "float16", {"running_mean": {0: 200.0}}, at=[0], severity=WARNING, precision="fp16"),
    fires("N403", "no target", {"running_mean": {0: 20.0}}, at=[0], severity=INFO),
    silent("N403", "float16 is fine enough", {"running_mean": {0: 20.0}}, precision="fp16"),
    silent("N403", "integers are another matter", {"running_mean": {0: 200.0}}, precision="int8"),
    fires("N407", "decayed", {"running_mean": {1: -FLOOR}, "running_var": {2: FLOOR}}, at=[1, 2], severity=INFO),
    fires("N407", "only a variance", {"running_var": {2: 1e-40}}, at=[2], severity=INFO),
    silent("N407", "zero is no subnormal", {"running_mean": {1: 0.0}, "running_var": {2: 2e-38}}),
]

OUTLIERS = {10: 8.0, 41: -3.0}


def with_outliers(seed: int) -> dict[str, Any]:
    weight = centred(1.0, seed)
    weight[list(OUTLIERS)] = list(OUTLIERS.values())
    return token_norm(weight)


TRANSFORMERS = [
    fires("T701", "the same features everywhere", *map(with_outliers, range(4)), at={None: [10, 41]}, severity=INFO),
    fires(
        "T701", "before int8", *map(with_outliers, range(4)), at={None: [10, 41]}, severity=WARNING, precision="int8"
    ),
    fires("T701", "one gain above its layer", token_norm(np.r_[centred(1.0), 25.0]), at=[64], severity=INFO),
    silent("T701", "two norms may agree by chance", *map(with_outliers, range(2))),
    silent("T701", "each has its own", *[token_norm(np.r_[np.roll(np.r_[4.0, np.ones(63)], n)]) for n in range(8)]),
    silent("T701", "a BatchNorm has no tokens", {"weight": {3: 50.0}}),
    fires(
        "T702",
        "rotated, with norms of queries left",
        *[token_norm(np.ones(64)) for _ in range(4)],
        token_norm(centred(0.8)),
        at={None: []},
        severity=INFO,
    ),
    fires(
        "T702",
        "1 + weight",
        *[token_norm(np.zeros(64), zero_centred=True) for _ in range(4)],
        token_norm(centred(0.1), zero_centred=True),
        at={None: []},
        severity=INFO,
    ),
    silent("T702", "a fresh model", *[token_norm(np.ones(64)) for _ in range(4)]),
    silent("T702", "few of many", *[token_norm(np.ones(64)) for _ in range(3)], *map(with_outliers, range(4))),
    silent("T702", "a shift that learnt", *[token_norm(np.ones(64), bias=centred(0.0)) for _ in range(4)]),
    fires(
        "T703", "Gemma", token_norm(centred(0.0), zero_centred=True, zero_centred_by_class=True), at=[], severity=INFO
    ),
    fires(
        "T703",
        "1 added twice",
        token_norm(centred(1.0), zero_centred=True, zero_centred_by_class=True),
        at=[],
        severity=WARNING,
    ),
    fires(
        "T703",
        "the 1 was lost",
        token_norm(centred(0.0), zero_centred=False, zero_centred_by_class=False),
        at=[],
        severity=WARNING,
    ),
    silent("T703", "an ordinary gain", token_norm(centred(1.0), zero_centred=False)),
    silent(
        "T703",
        "small gains of a first layer",
        token_norm(np.abs(centred(0.05)), zero_centred=False, zero_centred_by_class=False),
    ),
    fires("T707", "zero", {"kind": NormKind.DYNAMIC_TANH, "alpha": 0.0}, at=range(16), severity=ERROR),
    fires("T707", "NaN", {"kind": NormKind.DYNAMIC_TANH, "alpha": NAN}, at=range(16), severity=ERROR),
    fires("T707", "tiny", {"kind": NormKind.DYNAMIC_TANH, "alpha": 1e-3}, at=[], severity=WARNING),
    fires("T707", "huge", {"kind": NormKind.DYNAMIC_TANH, "alpha": -11.0}, at=[], severity=WARNING),
    fires("T707", "past 20 times its start", {"kind": NormKind.DYNAMIC_TANH, "alpha": 10.5}, at=[], severity=WARNING),
    silent("T707", "many times its start", {"kind": NormKind.DYNAMIC_TANH, "alpha": 9.5}),
    fires("T707", "negative", {"kind": NormKind.DYNAMIC_TANH, "alpha": -0.5}, at=[], severity=INFO),
    silent("T707", "as in a 70B model", {"kind": NormKind.DYNAMIC_TANH, "alpha": 0.05}),
    fires("T709", "far off", DERF | {"inner_shift": -2.4}, at=[], severity=WARNING),
    fires("T709", "NaN", DERF | {"inner_shift": NAN}, at=range(16), severity=ERROR),
    fires("T709", "a tenth of the slope is left", DERF | {"inner_shift": 1.6}, at=[], severity=WARNING),
    silent("T709", "small", DERF | {"inner_shift": -1.4}),
    silent("T709", "a DynamicTanh has none", DERF),
    fires("T710", "as many as channels", {"kind": NormKind.GROUP, "groups": 16}, at=[], severity=INFO),
    silent("T710", "two channels each", {"kind": NormKind.GROUP, "groups": 8}),
    silent("T710", "one channel in all", {"kind": NormKind.GROUP, "channels": 1, "groups": 1}),
    fires("T711", "for int8", token_norm(centred(1.0)), at={None: []}, severity=INFO, precision="int8"),
    fires("T711", "for fp16", {"kind": NormKind.LAYER}, at={None: []}, severity=INFO, precision="fp16"),
    silent("T711", "no target", token_norm(centred(1.0))),
    silent("T711", "bf16 has the range of float32", token_norm(centred(1.0)), precision="bf16"),
    silent("T711", "a BatchNorm has no bound", {}, precision="int8"),
    fires(
        "T712",
        "two conventions",
        *[token_norm(centred(0.0, n), zero_centred=True) for n in range(3)],
        token_norm(centred(1.0), zero_centred=False),
        at={"bn3": []},
        severity=INFO,
    ),
    fires(
        "T712",
        "1 added to a single layer",
        *[token_norm(centred(0.0, n), zero_centred=True) for n in range(4)],
        token_norm(centred(1.0), zero_centred=True),
        at={"bn4": []},
        severity=INFO,
    ),
    fires(
        "T712",
        "1 lost from a single layer",
        *[token_norm(centred(1.0, n), zero_centred=False) for n in range(4)],
        token_norm(centred(0.0), zero_centred=False),
        at={"bn4": []},
        severity=INFO,
    ),
    silent(
        "T712",
        "values of both sorts, none alone",
        *[token_norm(centred(0.0, n), zero_centred=True) for n in range(3)],
        *[token_norm(centred(1.0, n), zero_centred=True) for n in range(3)],
    ),
    silent("T712", "one convention", *[token_norm(centred(0.0, n), zero_centred=True) for n in range(4)]),
    silent(
        "T712",
        "a large gain among 1 + weight",
        *[token_norm(centred(0.0, n), zero_centred=True) for n in range(4)],
        token_norm(centred(6.0), zero_centred=True),
    ),
]

MODULE = LoadCall("nets.resnet.ResNet", Danger.MODULE_CLASS)
DATA = LoadCall("omegaconf.dictconfig.DictConfig", Danger.DATA_CLASS)
SYSTEM = LoadCall("posix.system", Danger.OTHER)

FILES = [
    fires("F901", "a pickled module", {}, at={None: []}, severity=INFO, load_calls=(MODULE,)),
    fires("F901", "a configuration", {}, at={None: []}, severity=WARNING, load_calls=(MODULE, DATA)),
    fires("F901", "a command", {}, at={None: []}, severity=ERROR, load_calls=(MODULE, SYSTEM, DATA)),
    silent("F901", "tensors only", {}),
]

CHANNELS = np.linspace(0.0, 1.0, 16)
MEAN, VAR = 0.4 * np.cos(7.0 * CHANNELS), 0.3 + 1.7 * CHANNELS
CALIBRATION = Measurement(data="calib.npy", samples=1024, batches=32, order=("layer1.0.bn1",))


def seen(
    z: Any = 0.0,
    ratio: Any = 1.0,
    *,
    batches: int = 32,
    worth: float = 1.0,
    mean: Any = MEAN,
    var: Any = VAR,
    **more: Any,
) -> Measured:
    """What a healthy layer's inputs are on 1,024 samples, z standard deviations and a factor away from its buffers.

    worth: independent values in a sample."""
    variance = var * ratio
    count, batch = 1024 * 64, 1024 / batches * worth
    effective = np.full(len(var), 1024 * worth)
    spreads = {"mean_spread": np.sqrt(variance / batch), "var_spread": variance * np.sqrt(2 / batch)}
    moments = Moments(count, mean + z * np.sqrt(var), variance * count)
    return Measured(
        **{"moments": moments, "samples": 1024, "batches": batches, "effective": effective} | spreads | more
    )


def measured(*args: Any, **more: Any) -> dict[str, Any]:
    return {"measured": seen(*args, **more)}


def told(**more: Any) -> dict[str, Any]:
    """The measurement of a model, as the test's settings."""
    return {"measurement": replace(CALIBRATION, **more)}


def tried(given: float, *others: float) -> dict[str, Any]:
    words = ("as given", "times 255", "divided by 255")
    pairs = zip(words, (given, *others), strict=False)
    return told(preprocessing=tuple(Preprocessing(words=word, divergence=value) for word, value in pairs))


ALL = list(range(16))
SIGNS = np.where(np.arange(16) % 2, 1.0, -1.0)
FEW_CHANNELS = {"channels": 4} | measured(2.0, mean=MEAN[[0, 5, 10, 15]], var=VAR[[0, 5, 10, 15]])
EIGHT = {"channels": 8, "running_mean": MEAN[::2], "running_var": VAR[::2]}
DEAD = {"running_var": {3: 0.0}, "weight": {7: 1e-5}}

DRIFT = [
    fires("D601", "means a third off", measured(0.35 * SIGNS), at=ALL, severity=WARNING),
    fires("D601", "means far off", measured(0.9 * SIGNS), at=ALL, severity=ERROR),
    fires(
        "D601", "a fifth of the channels", measured(np.where(CHANNELS < 0.2, 0.5, 0.0)), at=[0, 1, 2], severity=WARNING
    ),
    fires("D601", "frozen: by design?", measured(0.9) | {"requires_grad": False}, at=ALL, severity=WARNING),
    fires("D601", "eight channels", EIGHT | measured(0.9, mean=MEAN[::2], var=VAR[::2]), at=range(8), severity=INFO),
    fires(
        "D601", "the data is prepared otherwise", measured(0.9), at=ALL, severity=WARNING, **tried(5.0, 4000.0, 0.001)
    ),
    silent("D601", "healthy", measured(0.1 * SIGNS)),
    silent("D601", "within three standard errors", measured(0.4 * SIGNS, worth=0.02)),
    silent("D601", "too few channels", FEW_CHANNELS),
    silent("D601", "one channel of sixteen", measured(np.where(CHANNELS == 0, 9.0, 0.0))),
    silent("D601", "only dead channels moved", DEAD | measured(np.where(np.isin(np.arange(16), (7,)), 9.0, 0.1))),
    silent("D601", "NaN in the buffers is S101's", {"running_mean": {3: NAN}, "running_var": {9: INF}} | measured()),
    silent("D601", "NaN in the data", measured(np.where(CHANNELS < 0.5, NAN, 0.0))),
    silent("D601", "a LayerNorm has no buffers", {"kind": NormKind.LAYER} | measured(2.0)),
    fires("D602", "half the contrast", measured(0.0, 0.6), at=ALL, severity=WARNING),
    fires("D602", "collapsed", measured(0.0, 2.5), at=ALL, severity=ERROR),
    fires("D602", "frozen", measured(0.0, 2.5) | {"requires_grad": False}, at=ALL, severity=WARNING),
    silent("D602", "healthy", measured(0.0, 1.1)),
    silent("D602", "a quarter of the channels", measured(0.0, np.where(CHANNELS < 0.3, 4.0, 1.0))),
    silent("D602", "within three standard errors", measured(0.0, 1.3, worth=0.1)),
    silent("D602", "a negative variance is S102's", {"running_var": {4: -1e-5}} | measured()),
    silent(
        "D602",
        "an InstanceNorm stores the variance within samples",
        {"kind": NormKind.INSTANCE} | TRACKED | measured(0.0, 2.0, mean=SPREAD[:16], var=0.5 + SPREAD[:16], worth=2.0),
    ),
    fires(
        "D603", "the model is stale", measured(0.2 * SIGNS, 1.15, worth=4.0), at={None: []}, severity=WARNING, **told()
    ),
    fires(
        "D603",
        "layer and model",
        measured(0.9 * SIGNS, 1.5),
        at={None: [], "layer1.0.bn1": ALL},
        severity=ERROR,
        **told(),
    ),
    fires(
        "D603",
        "noisy: a momentum of 0.9 explains it",
        {"momentum": 0.9} | measured(0.2 * SIGNS),
        at={None: []},
        severity=INFO,
        **told(),
    ),
    fires(
        "D603",
        "all frozen: by design?",
        measured(0.2 * SIGNS, 1.15, worth=4.0) | {"requires_grad": False},
        at={None: []},
        severity=INFO,
        **told(),
    ),
    silent("D603", "healthy", measured(0.02 * SIGNS, 1.02), **told()),
    silent("D603", "too little data for a verdict", measured(0.1 * SIGNS, worth=0.05), **told()),
    silent("D603", "never trained", FRESH | measured(0.9), **told()),
    silent("D603", "most inputs are not finite", measured(np.where(CHANNELS < 0.8, NAN, 0.0)), **told()),
    fires(
        "D604",
        "stale, and answers change",
        measured(0.2 * SIGNS, 1.15, worth=4.0),
        at={None: []},
        severity=WARNING,
        **told(disagreement=0.1, output_change=0.3),
    ),
    fires(
        "D604",
        "stale, and many answers change",
        measured(0.9 * SIGNS, worth=2.0),
        at={None: []},
        severity=ERROR,
        **told(disagreement=0.4),
    ),
    fires(
        "D604",
        "healthy: the noise of batches",
        measured(worth=2.0),
        at={None: []},
        severity=INFO,
        **told(disagreement=0.1),
    ),
    silent(
        "D604", "few answers change", measured(0.9 * SIGNS, worth=2.0), **told(disagreement=0.01, output_change=0.05)
    ),
    silent("D604", "a batch is worth too little", measured(0.9 * SIGNS, worth=0.5), **told(disagreement=0.4)),
    silent("D604", "outputs were not compared", measured(0.9 * SIGNS, worth=2.0), **told()),
    fires(
        "D605",
        "fewer right answers",
        measured(),
        at={None: []},
        severity=WARNING,
        **told(accuracy=0.988, recalibrated=Recalibrated(accuracy=0.98, p_value=0.001)),
    ),
    fires(
        "D605",
        "less sure",
        measured(),
        at={None: []},
        severity=INFO,
        **told(recalibrated=Recalibrated(entropy_before=0.4, entropy=0.5)),
    ),
    silent(
        "D605", "by chance", measured(), **told(accuracy=0.9, recalibrated=Recalibrated(accuracy=0.89, p_value=0.2))
    ),
    silent("D605", "better", measured(), **told(accuracy=0.3, recalibrated=Recalibrated(accuracy=0.99, p_value=1e-9))),
    silent("D605", "not tried", measured(), **told(accuracy=0.3)),
    fires("D606", "few samples", measured(worth=0.1), at={None: []}, severity=INFO),
    fires(
        "D606", "nothing is known but their number", measured(samples=20, effective=None), at={None: []}, severity=INFO
    ),
    silent("D606", "enough", measured()),
    fires("D607", "batches of 2", measured(worth=1.5), at=[], severity=WARNING, train_batch=2),
    fires("D607", "batches of 8", measured(worth=1.5), at=[], severity=INFO, train_batch=8),
    fires("D607", "one value", measured(worth=0.5), at=[], severity=WARNING, train_batch=1),
    silent("D607", "batches of 32", measured(), train_batch=32),
    silent("D607", "nobody said", measured()),
    fires("D608", "bytes given", measured(9.0), at={None: []}, severity=ERROR, **tried(5400.0, 9e8, 0.0004)),
    silent("D608", "fits as given", measured(), **tried(0.0005, 0.3, 0.00001)),
    silent("D608", "nothing else fits", measured(9.0), **tried(0.9, 4000.0, 0.4)),
    silent("D608", "nothing was tried", measured(9.0), **told()),
    fires(
        "D609",
        "two dead",
        measured(active=np.where(np.arange(16) < 2, 0.0, 0.4), gate="relu"),
        at=[0, 1],
        severity=WARNING,
    ),
    fires("D609", "all dead", measured(active=np.zeros(16), gate="relu6"), at=ALL, severity=ERROR),
    fires(
        "D609",
        "one of thirty-two",
        {"channels": 32}
        | measured(mean=np.zeros(32), var=np.ones(32), active=np.where(np.arange(32) == 4, 0.0, 0.4), gate="relu"),
        at=[4],
        severity=INFO,
    ),
    silent("D609", "all fire", measured(active=np.full(16, 1e-6), gate="relu")),
    silent("D609", "a NaN mean", {"running_mean": {3: NAN}} | measured(active=np.zeros(16), gate="relu")),
    silent("D609", "a negative variance", {"running_var": {3: -1.0}} | measured(active=np.zeros(16), gate="relu")),
    silent(
        "D609",
        "NaN on the way to it",
        measured(np.where(np.arange(16) < 2, NAN, 0.0), active=np.where(np.arange(16) < 2, 0.0, 0.4), gate="relu"),
    ),
    silent("D609", "stale: dead in appearance", measured(0.9 * SIGNS, active=np.zeros(16), gate="relu"), **told()),
    silent(
        "D609",
        "the data is prepared otherwise",
        measured(0.9, active=np.zeros(16), gate="relu"),
        **tried(5.0, 4000.0, 0.001),
    ),
    fires("D609", "healthy statistics", measured(active=np.zeros(16), gate="relu"), at=ALL, severity=ERROR, **told()),
    fires("D609", "32 samples", measured(samples=32, active=np.zeros(16), gate="relu"), at=ALL, severity=ERROR),
    silent("D609", "31 samples", measured(samples=31, active=np.zeros(16), gate="relu")),
    silent("D609", "no ReLU behind it", measured(active=np.zeros(16), gate="gelu")),
    silent("D609", "switched off is A202's", {"weight": {3: 0.0}} | measured(active=np.arange(16) != 3, gate="relu")),
    fires("D610", "sorted by class", measured(mean_spread=np.sqrt(0.4 * VAR)), at={None: []}, severity=WARNING),
    silent("D610", "shuffled", measured()),
    silent("D610", "batches of one", measured(batches=1024)),
    silent("D610", "nothing known of samples", measured(mean_spread=np.sqrt(0.4 * VAR), effective=None)),
    fires("D611", "statistics of the batch", measured(), at={None: []}, severity=ERROR, **told(order_dependence=0.37)),
    fires("D611", "overflow", measured(), at={None: []}, severity=ERROR, **told(order_dependence=NAN)),
    silent("D611", "rounding", measured(), **told(order_dependence=3e-7)),
    silent("D611", "not tried", measured(), **told()),
]


AVERAGED = [
    fires(
        "C310",
        "shown on data",
        measured(0.2 * SIGNS, 1.15, worth=4.0),
        at={None: []},
        severity=WARNING,
        averaged="n_averaged = 12",
        **told(),
    ),
]


def tokens(**more: Any) -> dict[str, Any]:
    return measured(mean=np.zeros(1), var=np.ones(1), **more)


LAYER_NORM = {"kind": NormKind.LAYER}
DYT = {"kind": NormKind.DYNAMIC_TANH, "alpha": 0.5}

TOKEN_DATA = [
    fires("T704", "eps from another framework", LAYER_NORM | tokens(starved=0.12), at=[], severity=WARNING),
    fires("T704", "eps unknown", token_norm(GAINS, eps=None) | tokens(starved=0.02), at=[], severity=WARNING),
    silent("T704", "a few paddings", LAYER_NORM | tokens(starved=0.005)),
    silent("T704", "not looked at", LAYER_NORM | tokens()),
    fires(
        "T706",
        "a tanh and a line",
        LAYER_NORM | tokens(tanh_fit=0.95, linear_fit=0.8, tanh_alpha=0.4),
        LAYER_NORM | tokens(tanh_fit=0.99, linear_fit=0.99, tanh_alpha=0.01),
        LAYER_NORM | tokens(tanh_fit=0.5, linear_fit=0.3, tanh_alpha=1.0),
        at={None: []},
        severity=INFO,
    ),
    silent("T706", "neither", LAYER_NORM | tokens(tanh_fit=0.5, linear_fit=0.3, tanh_alpha=1.0)),
    silent("T706", "not looked at", LAYER_NORM | tokens()),
    fires("T708", "saturated", DYT | tokens(saturated=0.69, input_sd=9.0), at=[], severity=WARNING),
    fires("T708", "Derf as well", DERF | {"inner_shift": 0.1} | tokens(saturated=0.9), at=[], severity=WARNING),
    silent("T708", "as trained models are", DYT | tokens(saturated=0.4, input_sd=4.0)),
    silent("T708", "not looked at", DYT | tokens()),
]

FOLDED, LEFT = "folded backward", "left"
CONV = Neighbour(op="convolution", written="Conv", label="conv1")
LINEAR = Neighbour(op="matrix product", written="Gemm", label="fc1")
POOL = Neighbour(op="max-pooling", written="MaxPool")


def at_place(**said: Any) -> dict[str, Any]:
    return {"place": Place(**said)}


def after_bias(bias: Any, **said: Any) -> dict[str, Any]:
    return at_place(producer=Producer(neighbour=CONV, alone=True, bias=np.asarray(bias, dtype=float)), **said)


def weighing(largest: Any, bias: Any = None, **said: Any) -> dict[str, Any]:
    """Behind a convolution with these largest weights in the channels of a norm of variance 1 and gain 1."""
    producer = Producer(neighbour=CONV, alone=True, largest=np.asarray(largest, dtype=float), bias=bias)
    size = len(producer.largest)
    plain = {"weight": np.ones(size), "bias": np.zeros(size), "running_mean": np.zeros(size)}
    return {"channels": size, **plain, "running_var": np.full(size, 1.0)} | at_place(producer=producer, **said)


def foreseen(*, turned: bool = False) -> dict[str, Any]:
    """A layer whose running means are what was predicted, or the opposite."""
    means = np.sin(np.arange(16.0))
    prediction = Prediction(
        mean=-means if turned else means,
        bias=None,
        exact=False,
        even=True,
        sized=True,
        sources=("bn1",),
        through=("relu", "convolution"),
    )
    return {"running_mean": means, "running_var": np.ones(16)} | at_place(prediction=prediction)


def fate(verdict: str = FOLDED, **said: Any) -> Fate:
    return Fate(verdict=verdict, **said)


def before(name: str, shift: Any = 0.0, gain: Any = 1.0, **bounds: float) -> dict[str, Any]:
    """A trained norm of 64 channels with that shift and gain, in front of an activation."""
    ones = np.ones(64)
    values = {"channels": 64, "weight": gain * ones, "bias": shift * ones, "running_var": 0.5 + SPREAD}
    return values | at_place(activation=Activation(name=name, **bounds))


def first(count: int, inside: float, outside: float = 0.0) -> np.ndarray:
    return np.where(np.arange(64) < count, inside, outside)


SIGNED = {"weight": {2: -0.2, 5: -0.1}}
NARROW = np.r_[np.ones(15), 0.05]
ENDS_BLOCK = {"weight": np.zeros(16), "bias": np.zeros(16)} | at_place(joins_branches=True)
DROPPED = (("drop1", 0.5),)

PLACES = [
    fires("A208", "dead channels", before("relu", first(32, -4.0)), at=range(32), severity=WARNING),
    fires("A208", "a quarter", before("relu", first(16, -4.0)), at=range(16), severity=INFO),
    fires("A208", "nearly all", before("relu6", first(60, -4.0)), at=range(60), severity=ERROR),
    fires(
        "A208", "below the bound of a clip", before("clip", first(40, -6.0), low=-2.0), at=range(40), severity=WARNING
    ),
    fires("A208", "some of it passes", before("leaky_relu", -4.0), at=range(64), severity=INFO),
    fires("A208", "a soft one", before("gelu", first(9, -4.0)), at=range(9), severity=INFO),
    fires(
        "A208",
        "few channels",
        {"bias": -9.0 * np.ones(8), "channels": 8} | at_place(activation=Activation(name="relu")),
        at=range(8),
        severity=INFO,
    ),
    silent("A208", "just on", before("relu", first(30, -3.0))),
    silent("A208", "switched off is A202's", before("relu", first(9, -4.0), first(9, 1e-4, 1.0))),
    silent("A208", "without variance is S106's", before("relu", first(9, -4.0)) | {"running_var": first(9, 1e-6, 1.0)}),
    silent("A208", "no lower bound", before("clip", -9.0, high=1.0)),
    silent("A208", "an activation that cuts nothing", before("sigmoid", -9.0)),
    silent("A208", "no activation alone takes it", before("relu", -9.0) | at_place()),
    silent(
        "A208", "guessed from names", before("relu", -9.0) | at_place(activation=Activation(name="relu"), inferred=True)
    ),
    silent(
        "A208",
        "a handful of channels",
        {"bias": -9.0 * np.ones(4), "channels": 4} | at_place(activation=Activation(name="relu")),
    ),
    fires("A209", "half are linear", before("relu", first(40, 3.5)), at=range(40), severity=INFO),
    fires(
        "A209", "between both bounds", before("clip", first(40, 4.0), low=0.0, high=8.0), at=range(40), severity=INFO
    ),
    silent("A209", "fewer than half", before("relu", first(30, 3.5))),
    silent("A209", "within 3 deviations", before("relu", 2.9)),
    silent("A209", "the upper bound cuts", before("relu6", 3.5)),
    silent("A209", "not a ReLU", before("silu", 9.0)),
    silent("A209", "switched off", before("relu", first(40, 3.5), first(40, 1e-4, 1.0))),
    fires("A210", "an open gate", before("sigmoid", first(16, 4.0)), at=range(16), severity=WARNING),
    fires("A210", "wide", before("tanh", 0.0, 4.0), at=range(64), severity=WARNING),
    fires("A210", "above 6", before("relu6", first(20, 6.5)), at=range(20), severity=WARNING),
    fires("A210", "both ends", before("clip", 0.0, 4.0, low=-1.0, high=1.0), at=range(64), severity=WARNING),
    fires("A210", "hard form", before("hardsigmoid", first(20, -3.5)), at=range(20), severity=WARNING),
    silent("A210", "fewer than a quarter", before("sigmoid", first(15, 4.0))),
    silent("A210", "mostly steep", before("sigmoid", 3.5)),
    silent("A210", "at 0 of a ReLU6 is A208's", before("relu6", -9.0)),
    silent("A210", "no upper end", before("relu", 9.0)),
    fires("N404", "one narrow channel", weighing(NARROW), at=[15], severity=WARNING, precision="int8"),
    fires("N404", "no target", weighing(NARROW), at=[15], severity=INFO),
    fires("N404", "guessed from names", weighing(NARROW, inferred=True), at=[15], severity=INFO, precision="int8"),
    fires("N404", "narrow on average", weighing(np.r_[1.0, np.full(15, 0.1)]), at=[], severity=INFO),
    silent("N404", "even", weighing(np.ones(16)), precision="int8"),
    silent("N404", "evened out by the norm", weighing(NARROW) | {"weight": 0.1 / NARROW}, precision="int8"),
    silent("N404", "switched off", weighing(NARROW) | {"weight": np.r_[np.ones(15), 1e-4]}),
    silent("N404", "stays", weighing(NARROW, fate=fate(LEFT, code="nonlinear")), precision="int8"),
    silent("N404", "another target", weighing(NARROW), precision="bf16"),
    fires("N405", "weights", weighing(np.r_[7e4, np.ones(15)]), at=[0], severity=ERROR, precision="fp16"),
    fires("N405", "no target", weighing(np.r_[7e4, np.ones(15)]), at=[0], severity=INFO),
    fires(
        "N405",
        "its bias",
        weighing(np.ones(16), bias=1e5 * np.ones(16)),
        at=range(16),
        severity=ERROR,
        precision="fp16",
    ),
    fires(
        "N405",
        "fold leaves it for that",
        weighing(np.r_[7e4, np.ones(15)], fate=fate(LEFT, code="overflow")),
        at=[0],
        severity=ERROR,
        precision="fp16",
    ),
    fires("N405", "subnormal", weighing(np.full(16, 1e-5)), at=range(16), severity=WARNING, precision="fp16"),
    silent("N405", "subnormal, no target", weighing(np.full(16, 1e-5))),
    silent("N405", "a wide one is left", weighing(np.r_[1.0, np.full(15, 1e-5)]), precision="fp16"),
    silent("N405", "the largest number", weighing(np.full(16, 65504.0)), precision="fp16"),
    silent("N405", "bfloat16 can hold it", weighing(np.full(16, 7e4)), precision="bf16"),
    fires("G507", "buffers of another checkpoint", foreseen(turned=True), at=[11, 14, 8, 5, 2], severity=ERROR),
    silent("G507", "buffers of these weights", foreseen()),
    fires("G501", "a bias", after_bias(np.full(16, 0.1)), at=[], severity=INFO),
    fires("G501", "most of the mean", after_bias(np.full(16, 30.0)), at=[], severity=WARNING),
    fires("G501", "guessed from names", after_bias(np.full(16, 30.0), inferred=True), at=[], severity=INFO),
    fires(
        "G501",
        "groups of one",
        {"kind": NormKind.GROUP, "groups": 16} | after_bias(np.ones(16)),
        at=[],
        severity=INFO,
    ),
    silent("G501", "larger groups", {"kind": NormKind.GROUP, "groups": 4} | after_bias(np.ones(16))),
    silent("G501", "a LayerNorm", LAYER_NORM | after_bias(np.ones(16))),
    silent("G501", "no bias", at_place(producer=Producer(neighbour=CONV, alone=True))),
    silent("G501", "others take it too", at_place(producer=Producer(neighbour=CONV, alone=False, bias=np.ones(16)))),
    fires("G502", "all of them", *norms(3, **at_place(fate=fate(saved=64))), at={None: []}, severity=INFO),
    silent("G502", "none", at_place(fate=fate(LEFT, code="nonlinear"))),
    silent("G502", "not planned", at_place()),
    silent("G502", "its own statistics", LAYER_NORM | at_place(fate=fate())),
    fires("G503", "one", at_place(fate=fate(LEFT, code="nonlinear")), at={None: []}, severity=INFO),
    fires(
        "G503", "one operation less", at_place(fate=fate("decomposed", code="padding")), at={None: []}, severity=INFO
    ),
    silent("G503", "all fold", *norms(3, **at_place(fate=fate()))),
    fires("G504", "padding", at_place(fate=fate(LEFT, code="padding"), padded=("conv2",)), at=range(16), severity=INFO),
    silent("G504", "folds backward", at_place(fate=fate(), padded=("conv2",))),
    silent("G504", "no padding", at_place(fate=fate(LEFT, code="nonlinear"))),
    silent("G504", "another reason", at_place(fate=fate(LEFT, code="training-mode"), padded=("conv2",))),
    silent(
        "G504",
        "no shift",
        {"bias": np.zeros(16), "running_mean": np.zeros(16)}
        | at_place(fate=fate(LEFT, code="padding"), padded=("conv2",)),
    ),
    fires("G505", "two in a row", at_place(before=(Neighbour(op="BatchNorm", label="bn0"),)), at=[], severity=INFO),
    fires("G505", "of other kinds", LAYER_NORM | at_place(before=(Neighbour(op="other norm"),)), at=[], severity=INFO),
    silent("G505", "an activation between", at_place(before=(Neighbour(op="activation"), Neighbour(op="BatchNorm")))),
    silent("G505", "the input", at_place(before=(Neighbour(op="input"),))),
    fires("G506", "half of the values", at_place(dropouts=DROPPED, before=(CONV,)), at=[], severity=WARNING),
    fires("G506", "p of 0.3", at_place(dropouts=(("drop1", 0.3),), before=(CONV,)), at=[], severity=WARNING),
    fires("G506", "p of 0.2", at_place(dropouts=(("drop1", 0.2),), before=(CONV,)), at=[], severity=INFO),
    fires("G506", "summed by a matrix", at_place(dropouts=DROPPED, before=(LINEAR,)), at=[], severity=INFO),
    fires("G506", "frozen", {"requires_grad": False} | at_place(dropouts=DROPPED), at=[], severity=INFO),
    silent("G506", "a little", at_place(dropouts=(("drop1", 0.1),), before=(CONV,))),
    silent("G506", "a LayerNorm", LAYER_NORM | at_place(dropouts=DROPPED)),
    fires(
        "G508", "a ReLU", at_place(before=(Neighbour(op="activation", activation="relu"), CONV)), at=[], severity=INFO
    ),
    silent("G508", "a convolution", at_place(before=(CONV,))),
    silent("G508", "further up", at_place(before=(POOL, Neighbour(op="activation", activation="relu")))),
    fires("G509", "before it", SIGNED | at_place(before=(POOL, CONV)), at=[2, 5], severity=INFO),
    fires("G509", "behind it", SIGNED | at_place(after=(POOL,), fate=fate(LEFT)), at=[2, 5], severity=INFO),
    silent("G509", "folds", SIGNED | at_place(after=(POOL,), fate=fate())),
    silent("G509", "one of several", SIGNED | at_place(after=(POOL, CONV))),
    silent("G509", "no negative gain", at_place(before=(POOL, CONV))),
    fires("G510", "one value", at_place(positions=1), at=[], severity=INFO),
    fires("G510", "small batches", at_place(positions=1), at=[], severity=WARNING, train_batch=4),
    fires("G510", "small maps", at_place(positions=4), at=[], severity=INFO, train_batch=2),
    silent("G510", "large batches", at_place(positions=1), train_batch=16),
    silent("G510", "an image", at_place(positions=49)),
    silent("G510", "not known", at_place(), train_batch=1),
    fires("G511", "three calls", at_place(calls=3), at=[], severity=WARNING),
    fires("G511", "frozen", {"requires_grad": False} | at_place(calls=3), at=[], severity=INFO),
    silent("G511", "one call", at_place()),
    silent("G511", "no statistics", LAYER_NORM | at_place(calls=3)),
    fires("G512", "a block", ENDS_BLOCK, {}, at={"bn0": range(16)}, severity=INFO),
    fires("G512", "with a shift", ENDS_BLOCK | {"bias": np.ones(16)}, at=range(16), severity=INFO),
    silent("G512", "no branch", {"weight": np.zeros(16)} | at_place()),
    silent("G512", "a channel works", ENDS_BLOCK | {"weight": np.r_[np.zeros(15), 0.1]}),
    silent("G512", "fresh", FRESH | {"weight": np.zeros(16)} | at_place(joins_branches=True)),
    fires(
        "T705",
        "into linear layers",
        LAYER_NORM | at_place(gain_fate=fate("folded forward")),
        at={None: []},
        severity=INFO,
    ),
    silent("T705", "a shortcut takes it", LAYER_NORM | at_place(gain_fate=fate(LEFT, code="not-linear-layers"))),
    silent("T705", "a BatchNorm", at_place(gain_fate=fate("folded forward"))),
]

FIRST = "layer1.0.bn1"
"""The only layer of a model of one."""


def changed(layer: str = FIRST, **more: Any) -> LayerChange:
    """A layer that went on learning for 100 steps."""
    usual: dict[str, Any] = {
        "layer": layer,
        "other": layer,
        "matched": Matching.NAME,
        "kind": "BatchNorm",
        "channels": 16,
        "statistics": Motion.MOVED,
        "affine": Motion.MOVED,
        "divergence": 0.02,
        "divergence_p95": 0.1,
        "shift": 0.1,
        "shift_p95": 0.3,
        "log_ratio": 0.1,
        "log_ratio_p95": 0.2,
        "gamma": 0.05,
        "beta": 0.05,
        "updates": (1000.0, 1100.0),
        "eps": (1e-5, 1e-5),
        "momentum": (0.1, 0.1),
        "gain_by_eps": 0.0,
        "as_created": (False, False),
        "broken": 0,
        "worst": (),
    }
    return LayerChange(**usual | more)


def still(**more: Any) -> LayerChange:
    return changed(**{"statistics": Motion.EQUAL, "divergence": 0.0} | more)


MOVED_WEIGHTS = WeightsChange(tensors=10, equal=0, relative=0.1, motion=Motion.MOVED)
SAME_WEIGHTS = WeightsChange(tensors=10, equal=10, relative=0.0, motion=Motion.EQUAL)
NUDGED = WeightsChange(tensors=10, equal=0, relative=0.001, motion=Motion.MOVED)


def sides(*labels: str) -> tuple[Side, ...]:
    return tuple(Side(label=label, format="in memory", layers=1) for label in labels)


def compared(*rows: LayerChange, weights: WeightsChange | None = MOVED_WEIGHTS, **more: Any) -> dict[str, Any]:
    """The comparison of two checkpoints, as the test's settings."""
    usual: dict[str, Any] = {
        "kind": ComparisonKind.CHECKPOINTS,
        "sides": sides("before.pt", "after.pt"),
        "layers": rows,
        "missing": (),
        "weights": weights,
    }
    return {"comparison": Comparison(**usual | more)}


def averages(*rows: LayerChange, **more: Any) -> dict[str, Any]:
    return compared(*rows, kind=ComparisonKind.MODELS, **more)


def ranks(*rows: LayerChange, **more: Any) -> dict[str, Any]:
    return compared(*rows, kind=ComparisonKind.RANKS, weights=SAME_WEIGHTS, **more)


def epochs(*steps: tuple[bool, bool], updates: tuple[float, ...]) -> dict[str, Any]:
    """Of each step: the weights moved, the statistics stood still."""
    moved, stood = zip(*steps, strict=True)
    apart = tuple(0.0 if one else 0.02 for one in stood)
    return compared(
        changed(),
        sides=sides(*(f"e{number}.pt" for number in range(len(steps) + 1))),
        steps=tuple(MOVED_WEIGHTS if one else SAME_WEIGHTS for one in moved),
        trajectories=(Trajectory(layer=FIRST, divergence=apart, still=stood, updates=updates),),
    )


def missing(reason: str | None) -> tuple[MissingLayer, ...]:
    return (MissingLayer(layer="bn9", kind="BatchNorm", channels=16, side=0, reason=reason),)


WHOLE: dict[str | None, list[int]] = {None: []}
UNCOUNTED, SAME_COUNT = {"updates": (None, None)}, {"updates": (9.0, 9.0)}
STOPPED = {"divergence": 0.2, "updates": (1000.0, 10.0)}
FROZEN = {"affine": Motion.EQUAL}

COMPARISON = [
    fires("X001", "counted, old buffers", {}, at=WHOLE, severity=ERROR, **compared(still())),
    fires("X001", "in eval mode, or left", {}, at=WHOLE, severity=WARNING, **compared(still(**SAME_COUNT))),
    fires("X001", "no counter", {}, at=WHOLE, severity=WARNING, **compared(still(**UNCOUNTED))),
    fires("X001", "frozen by design", {}, at=WHOLE, severity=INFO, **compared(still(**SAME_COUNT | FROZEN))),
    fires(
        "X001",
        "recalibrated",
        {},
        at=WHOLE,
        severity=INFO,
        **compared(changed(**SAME_COUNT | FROZEN), weights=SAME_WEIGHTS),
    ),
    fires(
        "X001",
        "reset",
        {},
        at=WHOLE,
        severity=ERROR,
        **compared(changed(as_created=(False, True), updates=(9.0, 0.0)), weights=SAME_WEIGHTS),
    ),
    fires("X001", "an average without", {}, at=WHOLE, severity=ERROR, **averages(changed(as_created=(False, True)))),
    fires("X001", "an average with a copy", {}, at=WHOLE, severity=INFO, **averages(still(**SAME_COUNT))),
    fires(
        "X001",
        "an average that stopped",
        {},
        at=WHOLE,
        severity=WARNING,
        **averages(changed(**STOPPED), weights=NUDGED),
    ),
    fires(
        "X001",
        "an average far away",
        {},
        at=WHOLE,
        severity=INFO,
        **averages(changed(**STOPPED | SAME_COUNT), weights=NUDGED),
    ),
    silent("X001", "both moved", {}, **compared(changed())),
    silent("X001", "nothing moved", {}, **compared(still(affine=Motion.EQUAL), weights=SAME_WEIGHTS)),
    silent("X001", "no weights to compare", {}, **compared(still(), weights=None)),
    silent("X001", "the buffers of a new layer are S103's", {}, **compared(still(as_created=(True, True)))),
    silent("X001", "averaged with the buffers", {}, **averages(changed(**SAME_COUNT))),
    silent("X001", "averaged, whole counters cut off", {}, **averages(changed(updates=(1000.0, 3.0)))),
    silent(
        "X001",
        "early: the average is far in its weights too",
        {},
        **averages(changed(divergence=0.5, updates=(22.0, 0.0)), weights=replace(MOVED_WEIGHTS, relative=0.45)),
    ),
    silent("X001", "alone", {}),
    fires("X002", "other data", {}, at=WHOLE, severity=WARNING, **ranks(changed())),
    fires("X002", "noise", {}, at=WHOLE, severity=INFO, **ranks(changed(divergence=0.001))),
    silent("X002", "broadcast", {}, **ranks(still())),
    silent("X002", "two epochs", {}, **compared(changed())),
    fires("X003", "gradients off", {}, at=WHOLE, severity=WARNING, **compared(changed(**FROZEN))),
    silent("X003", "in eval mode too", {}, **compared(still(**SAME_COUNT | FROZEN))),
    silent("X003", "learning", {}, **compared(changed())),
    silent("X003", "recalibrated", {}, **compared(changed(**FROZEN), weights=SAME_WEIGHTS)),
    silent("X003", "no counter", {}, **compared(changed(**UNCOUNTED | FROZEN))),
    silent("X003", "an average", {}, **averages(changed(**FROZEN))),
    fires("X004", "gone", {}, at=WHOLE, severity=WARNING, **compared(changed(), missing=missing(None))),
    fires("X004", "folded", {}, at=WHOLE, severity=INFO, **compared(changed(), missing=missing("folded into conv9"))),
    fires(
        "X004",
        "lost its buffers",
        {},
        at=WHOLE,
        severity=WARNING,
        **compared(changed(statistics=None, has_statistics=(True, False))),
    ),
    silent("X004", "all there", {}, **compared(changed())),
    fires(
        "X005",
        "in eval mode from the second on",
        {},
        at=WHOLE,
        severity=WARNING,
        **epochs((True, False), (True, True), (True, True), updates=(1.0, 2.0, 2.0, 2.0)),
    ),
    fires(
        "X005",
        "counted all the same",
        {},
        at=WHOLE,
        severity=ERROR,
        **epochs((True, False), (True, True), updates=(1.0, 2.0, 3.0)),
    ),
    silent("X005", "always following", {}, **epochs((True, False), (True, False), updates=(1.0, 2.0, 3.0))),
    silent("X005", "the training was over", {}, **epochs((True, False), (False, True), updates=(1.0, 2.0, 2.0))),
    silent("X005", "never following is X001's", {}, **epochs((True, True), (True, True), updates=(1.0, 1.0, 1.0))),
    silent(
        "X005", "it moved again", {}, **epochs((True, False), (True, True), (True, False), updates=(1.0, 2.0, 2.0, 3.0))
    ),
    fires(
        "X006", "converted", {}, at=WHOLE, severity=WARNING, **compared(changed(eps=(1e-5, 1e-3), gain_by_eps=-0.046))
    ),
    silent("X006", "too small to matter", {}, **compared(changed(eps=(1e-5, 1e-6), gain_by_eps=1e-5))),
    fires(
        "X006",
        "seldom noticed",
        {},
        at=WHOLE,
        severity=INFO,
        **compared(changed(eps=(1e-5, 1e-3), gain_by_eps=-0.002, gain_by_eps_worst=-0.04)),
    ),
    silent("X006", "not said", {}, **compared(changed(eps=(None, 1e-3), gain_by_eps=None))),
    fires("X007", "other inputs", {}, at=WHOLE, severity=INFO, **compared(changed(divergence=2.8), weights=NUDGED)),
    silent("X007", "the weights moved as well", {}, **compared(changed(divergence=2.8))),
    silent("X007", "recalibrated", {}, **compared(changed(divergence=2.8), weights=SAME_WEIGHTS)),
    silent("X007", "an average", {}, **averages(changed(divergence=2.8), weights=NUDGED)),
]

ROWS = (
    COMPARISON
    + PLACES
    + STATISTICS
    + AFFINE
    + SETTINGS
    + NUMERICS
    + DRIFT
    + AVERAGED
    + TRANSFORMERS
    + TOKEN_DATA
    + FILES
)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_example(row: Row, judge) -> None:
    report = judge(*row.layers, codes={row.code}, **row.settings)
    found = {finding.layer: list(finding.channels) for finding in report.findings}
    assert found == {layer: list(channels) for layer, channels in row.found.items()}
    assert len(report.findings) == len(found)
    for finding in report.findings:
        assert finding.severity == row.severity, finding.message


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_every_rule_has_an_example_that_fires_and_one_that_does_not(rule) -> None:
    rows = [row for row in ROWS if row.code == rule.code]
    assert any(row.found for row in rows), "no example sets this rule off"
    assert any(not row.found for row in rows), "no example that it must keep silent about"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_the_declared_severity_is_reached_by_an_example(rule) -> None:
    severities = {row.severity for row in ROWS if row.code == rule.code and row.found}
    assert rule.severity in severities


def test_codes_and_names_are_unique() -> None:
    codes = [rule.code for rule in RULES]
    assert len(set(codes)) == len(codes)
    assert len({rule.name for rule in RULES}) == len(codes)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_documentation_says_what_it_means_and_gives_an_example(rule) -> None:
    title, _, rest = rule.documentation.partition("\n")
    assert title.endswith(".") and len(title) <= 110
    assert "Example: " in rest, "an example with numbers"
    assert rule.why.endswith(".") and rule.why.count(". ") == 0, "one sentence"
    assert rule.fix and rule.reference.startswith("https://")


@pytest.mark.parametrize("kind", [NormKind.BATCH, NormKind.LAYER, NormKind.GROUP, NormKind.RMS])
def test_a_healthy_layer_gives_nothing(kind, judge) -> None:
    for given in ({}, BARE, {"channels": 4}, {"channels": 512}):
        assert judge(given | {"kind": kind}).findings == ()


def test_messages_name_the_numbers(judge) -> None:
    said = {
        finding.code: finding.message
        for given in (
            {"running_var": {4: -1e-5, 9: -1e-5}},
            {"running_var": {6: 2e-7, 7: FLOOR}},
            {"momentum": 0.99},
            {"weight": np.ones(12)},
        )
        for finding in judge(given).findings
    }
    assert "down to -1e-05 in channel 4" in said["S102"]
    assert "a converter subtracted it" in said["S102"]
    assert "1 of 16 channels (6)" in said["S106"] and "1 silent channel" in said["S106"]
    assert "momentum of 0.1" in said["S105"]
    assert "torch's 0.01" in said["C303"]
    assert said["C311"].startswith("Lengths differ: ")
    assert "weight 12 values" in said["C311"] and "running_var 16 values" in said["C311"]


def prepared(words: str, options: str = "") -> Measurement:
    """The measurement of a model that fits the data only when it is prepared otherwise."""
    tried = (
        Preprocessing(words="as given", divergence=5.0),
        Preprocessing(words="times 255", divergence=4000.0, options="--scale 255"),
        Preprocessing(words=words, divergence=0.001, options=options),
    )
    return replace(CALIBRATION, preprocessing=tried, options="--data 'my data.npy'", disagreement=0.4)


def test_data_prepared_otherwise_is_prepared_first(judge) -> None:
    """D608 says how, and no other finding about the data offers new statistics."""
    off = {"measured": seen(0.9 * SIGNS, 3.0, worth=4.0)}
    usual = "--scale 1/255 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
    codes = {"D601", "D602", "D603", "D604", "D608"}
    report = judge(off, codes=codes, measurement=prepared("with ImageNet's mean and std", usual), path="my net.pt")
    fixes = {finding.code: finding.fix for finding in report.findings}
    assert set(fixes) == codes - {"D604"}
    command = f"normdoctor inspect 'my net.pt' --data 'my data.npy' {usual}"
    assert fixes.pop("D608") == f"prepare the data as the model was trained, then: {command}"
    assert set(fixes.values()) == {"first prepare the data as the model was trained (D608)"}
    (finding,) = (finding for finding in report.findings if finding.code == "D608")
    assert "with with" not in finding.message and "with ImageNet's mean and std" in finding.message
    assert report.drift is not None and report.drift.verdict is DriftVerdict.UNKNOWN
    assert "with with" not in report.drift.meaning and "with ImageNet's mean and std" in report.drift.meaning
    assert report.drift.command == "" and report.drift.prepared == "with ImageNet's mean and std"


def test_what_no_option_prepares_is_said_in_prose(judge) -> None:
    off = measured(0.9 * SIGNS)
    (finding,) = judge(off, codes={"D608"}, measurement=prepared("channels swapped (RGB and BGR)")).findings
    assert finding.fix == (
        "prepare the data as the model was trained, where it is made: channels swapped (RGB and BGR)"
    )


def test_the_limits_of_the_preparation_hold_for_the_verdict_too(judge) -> None:
    lax = judge(measured(0.9 * SIGNS), measurement=prepared("divided by 255"), limits={"D608": {"given": 100.0}})
    assert "D608" not in {finding.code for finding in lax.findings}
    assert lax.drift is not None and lax.drift.verdict is DriftVerdict.STALE
    (finding,) = (finding for finding in lax.findings if finding.code == "D601")
    assert "normdoctor recalibrate" in finding.fix


def test_one_of_something_has_its_verb(judge) -> None:
    worse = told(accuracy=1.0, samples=1, recalibrated=Recalibrated(accuracy=0.0))
    (finding,) = judge(measured(), codes={"D605"}, **worse).findings
    assert "0 % of 1 sample is right" in finding.message
    (finding,) = judge(LAYER_NORM | tokens(tanh_fit=0.95, linear_fit=0.8, tanh_alpha=0.4), codes={"T706"}).findings
    assert "Of 1 LayerNorm 1 acts like a tanh" in finding.message
    single = {"channels": 1, "running_mean": MEAN[:1], "running_var": VAR[:1]}
    report = judge(single | measured(mean=MEAN[:1], var=VAR[:1]), **told())
    assert report.drift is not None and report.drift.meaning.startswith("Only 1 channel with statistics could")


def test_confidence_follows_the_evidence(judge) -> None:
    fresh_norm = {"kind": NormKind.LAYER, "weight": np.ones(16), "bias": np.zeros(16)}
    (tokens,) = judge(fresh_norm, fresh_norm, codes={"S100"}).findings
    (mixed,) = judge(fresh_norm, FRESH, codes={"S100"}).findings
    assert tokens.confidence < mixed.confidence, "folded gains look like a fresh transformer"
    gone = BARE | GONE
    (alone,) = judge(gone, codes={"S116"}).findings
    (among,) = judge(BARE, BARE, gone, codes={"S116"}).findings
    assert alone.confidence < among.confidence
    assert "track_running_stats=False" in alone.message and "2 of 2 other" in among.message


def test_messages_of_facts_name_what_they_are_about(judge) -> None:
    named = {"stored_names": {"weight": "gamma", "bias": "beta"}, "wrappers": ("module", "_orig_mod")}
    (foreign,) = judge(named, named, codes={"C312"}).findings
    assert foreign.message == (
        "gamma read as weight in 2 layers; beta read as bias in 2 layers; module. and _orig_mod. left out of 2 paths."
    )
    (half,) = judge({"requires_grad": False, "training": True}, {"requires_grad": True}, codes={"C307"}).findings
    assert "1 of 2 norm layers (bn0)" in half.message and "statistics still move" in half.message
    (copied,) = judge({}, {"weight": GAINS[:16]}, {"bias": GAINS[:16]}, codes={"S114"}).findings
    assert copied.evidence["same_as"] == ["bn1", "bn2"] and "differ" in copied.message
    (whole,) = judge({}, {}, codes={"S114"}).findings
    assert "agree as well" in whole.message


def test_an_average_and_its_counter_are_said_once_each(judge) -> None:
    layer = {"num_batches_tracked": np.array(5000.5)}
    assert [f.code for f in judge(layer, layer, averaged="n_averaged = 2").findings if f.code != "S114"] == [
        "S112",
        "C310",
    ]


def test_calls_on_load_are_named_worst_first(judge) -> None:
    (finding,) = judge({}, codes={"F901"}, load_calls=(MODULE, DATA, SYSTEM)).findings
    places = [finding.message.index(call.name) for call in (SYSTEM, DATA, MODULE)]
    assert places == sorted(places)
    assert finding.evidence["other"] == ["posix.system"]


def test_residue_is_certain_only_where_it_dominates(judge) -> None:
    """Nobody gets variances that are mostly residue by chance; buffers computed anew over 20 batches have none."""
    slow = {"momentum": 0.001, "num_batches_tracked": 216, "running_var": 0.82 + 0.1 * SPREAD[:16]}
    (sure,) = judge(slow, codes={"S104"}).findings
    (unsure,) = judge({"num_batches_tracked": 20}, codes={"S104"}).findings
    assert sure.confidence is Confidence.HIGH and "update_bn" not in sure.message
    assert unsure.confidence is Confidence.MEDIUM and unsure.message.endswith("look the same and are right.")
    assert sure.severity == unsure.severity == ERROR
    (averaged,) = judge({"num_batches_tracked": 20}, codes={"S104"}, averaged="n_averaged = 2").findings
    assert averaged.confidence is Confidence.LOW


def test_default_statistics_are_explained_by_the_momentum_of_the_file(judge) -> None:
    counted = FRESH | {"num_batches_tracked": 200, "weight": GAINS[:16]}
    said = {
        momentum: judge(counted | {"momentum": momentum}, codes={"S103"}).findings[0].message
        for momentum in (0.0, 0.1, None, "cumulative")
    }
    assert said[0.0].endswith("200 batches were counted, so momentum was 0.")
    assert said[0.1].endswith("with momentum 0.1, so the buffers were reset or lost afterwards.")
    assert said[None].endswith("so momentum was 0 or the buffers were reset or lost afterwards.")
    assert said["cumulative"].endswith("so the buffers were reset or lost afterwards.")


def test_suspected_layers_are_named(judge) -> None:
    report = judge(BARE | SQUEEZED | {"running_var": 2.4 + 8.6 * SPREAD}, BARE | SQUEEZED, codes={"S118"})
    (finding,) = report.findings
    assert finding.evidence["layers"] == ["bn1"] and "1 of 2 layers (bn1)" in finding.message
    assert finding.evidence["momentum_at_most"] == pytest.approx(1 - 0.82 ** (1 / 216), rel=1e-5)
    open_limits = {"S118": {"share": 0, "channels": 0}}
    assert judge(BARE, codes={"S118"}, limits=open_limits).findings == ()


def test_other_counts_are_guessed_at_not_explained(judge) -> None:
    """After a repair of some layers their counters are larger, whatever else could have raised them."""
    (finding,) = judge(*norms(4, num_batches_tracked=200), {"num_batches_tracked": 4601}, codes={"S110"}).findings
    assert "perhaps" in finding.message and "repair" in finding.message
    frozen_ones = norms(4, requires_grad=False)
    (finding,) = judge(*frozen_ones, {"num_batches_tracked": 4321}, codes={"S110"}).findings
    assert finding.message.endswith("The others are frozen: by design?")
