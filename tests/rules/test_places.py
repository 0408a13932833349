"""Rules about a norm's place in the graph: laws of the forecasts, what is said in words, and what a guess may say."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normdoctor.findings import Confidence, Severity
from normdoctor.flow.graph import Op
from normdoctor.layers import Checkpoint, Container, Danger, LoadCall, NormKind
from normdoctor.places import Activation, Fate, Neighbour, Place, Producer, Verdict
from normdoctor.rules import FAMILIES, RULES, rule_of
from normdoctor.rules.foldability import DESTINATIONS, OWN_REASONS, REMAINS
from normdoctor.rules.neighbours import RELU_RATIO
from normdoctor.rules.runner import fill_in

NORMAL = NormalDist()
CONV = Neighbour(op=Op.CONV.value, written="Conv", label="conv1")


def in_front_of(name: str, shift: float, gain: float = 1.0, count: int = 64, **bounds: float) -> dict[str, Any]:
    """A norm of 64 channels, `count` of which have that shift and gain; the others are healthy."""
    moved = np.arange(64) < count
    return {
        "channels": 64,
        "weight": np.where(moved, gain, 1.0),
        "bias": np.where(moved, shift, 0.0),
        "running_var": np.ones(64),
        "place": Place(activation=Activation(name=name, **bounds)),
    }


def upper_tail(z: float) -> float:
    return math.erfc(z / math.sqrt(2)) / 2


# forecasts


@pytest.mark.parametrize("shift", [-3.2, -4.0, -8.0, -20.0])
@pytest.mark.parametrize("gain", [0.5, -2.0])
def test_the_share_that_passes_is_that_of_a_normal_variable(shift: float, gain: float, judge) -> None:
    (finding,) = judge(in_front_of("relu", shift * abs(gain), gain, 8), codes={"A208"}).findings
    assert finding.evidence["on"] == pytest.approx([upper_tail(-shift)] * 8, rel=1e-5)
    assert finding.evidence["share"] == 8 / 64


@settings(max_examples=40, deadline=None)
@given(shift=st.floats(-12, 12), step=st.floats(0.25, 4), gain=st.floats(0.125, 8), high=st.floats(0.5, 6))
def test_a_higher_shift_is_on_more_and_further_up(shift, step, gain, high, judge) -> None:
    """P(on) and the share above an upper bound grow with beta, so no rule turns quiet and loud again on the way."""
    lower, upper = (
        {finding.code for finding in judge(in_front_of("clip", at, gain, low=0.0, high=high)).findings}
        for at in (shift, shift + step)
    )
    assert "A208" in lower or "A208" not in upper
    assert "A210" in upper or "A210" not in lower
    assert not {"A208", "A209"} <= lower and not {"A209", "A210"} <= lower


def test_limits_of_the_dead_are_those_of_the_documentation() -> None:
    assert NORMAL.inv_cdf(rule_of("A208").limits["on"]) == pytest.approx(-3.09, abs=1e-3)
    assert NORMAL.cdf(3.0) == pytest.approx(0.9987, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "bound", "slope"),
    [
        ("sigmoid", 3.637, lambda x: 4 * math.exp(-x) / (1 + math.exp(-x)) ** 2),
        ("tanh", 1.818, lambda x: 1 - math.tanh(x) ** 2),
    ],
)
def test_flat_is_a_slope_below_a_tenth(name, bound, slope, judge) -> None:
    assert slope(bound) == pytest.approx(0.1, abs=1e-3)
    (finding,) = judge(in_front_of(name, bound + 0.5), codes={"A210"}).findings
    beyond = upper_tail(-0.5) + upper_tail(2 * bound + 0.5)
    assert finding.evidence["saturated"] == pytest.approx([beyond] * 64, rel=1e-4)


def test_a_forecast_says_where_and_how_far(judge) -> None:
    (dead,) = judge(in_front_of("relu", -1.9, 0.5, 7), codes={"A208"}).findings
    assert "7 of 64 channels (0, 1, 2, 3, 4, ...)" in dead.message
    assert "beta -1.9, |gamma| 0.5 in channel 0, on for 0.0072 %" in dead.message
    (flat,) = judge(in_front_of("sigmoid", 5.0, 1.0, 20), codes={"A210"}).findings
    assert "beta 5, |gamma| 1 in channel 0, flat for 91 %" in flat.message


def test_an_instance_norm_without_statistics_is_forecast_as_well(judge) -> None:
    layer = in_front_of("relu", -5.0) | {"kind": NormKind.INSTANCE, "running_var": None}
    assert [finding.code for finding in judge(layer, codes={"A208"}).findings] == ["A208"]


# guesses


def test_what_needs_the_graph_is_not_guessed(judge) -> None:
    """Silent, and said to be skipped; three rules may guess, at most as info."""
    place = Place(
        calls=3,
        before=(Neighbour(op=Op.BATCH_NORM.value),),
        producer=Producer(neighbour=CONV, alone=True, bias=np.full(16, 100.0), largest=np.r_[7e4, np.ones(15)]),
        activation=Activation(name="relu"),
        positions=1,
        dropouts=(("drop", 0.5),),
        fate=Fate(verdict="left", code="padding"),
        padded=("conv2",),
        joins_branches=True,
    )
    layer = {"bias": np.full(16, -50.0), "place": place}
    seen = {finding.code for finding in judge(layer, precision="fp16").findings}
    assert {"A208", "G501", "G503", "G504", "G505", "G506", "G510", "G511"} <= seen
    guessed = judge(layer | {"place": replace(place, fate=None, inferred=True)}, precision="fp16")
    found = [finding for finding in guessed.findings if "place" in finding.rule.needs]
    assert {finding.code for finding in found} == {"G501", "N405"}
    assert all(finding.severity is Severity.INFO for finding in found)
    assert all(finding.message.endswith(" Inferred from names.") for finding in found)
    assert {skip.code for skip in guessed.skips if "place" in skip.missing} >= {"A208", "G503", "G511"}
    assert {rule.code for rule in RULES if rule.guesses} == {"G501", "N404", "N405"}


def test_without_a_graph_every_rule_about_it_is_skipped(judge) -> None:
    skipped = {skip.code for skip in judge({}).skips if "place" in skip.missing}
    needing = {rule.code for rule in RULES if "place" in rule.needs and NormKind.BATCH in rule.kinds}
    assert skipped == needing and needing


# summaries of folding


def fated(*fates: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"place": Place(fate=Fate(verdict=verdict, code=code, reason="Because.", into=("conv",), saved=32))}
        for verdict, code in fates
    ]


def test_folding_is_one_line(judge) -> None:
    (every,) = judge(*fated(*[("folded backward", "")] * 3), codes={"G502", "G503"}).findings
    assert every.message == "3 of 3 BatchNorms fold into the weights before; 96 parameters fewer."
    assert every.fix == "normdoctor fold model.pt --arch PKG.MODULE:NAME"
    mixed = fated(
        ("folded backward", ""),
        ("folded forward", ""),
        ("folded backward", ""),
        ("left", "nonlinear"),
        ("left", "several-consumers"),
        ("left", "nonlinear"),
    )
    some, left = judge(*mixed, codes={"G502", "G503"}).findings
    assert some.message.startswith("3 of 6 BatchNorms fold: 2 into the weights before, 1 into the weights behind;")
    assert left.message == "3 of 6 BatchNorms stay: 2 nonlinear (bn3, bn5), 1 several-consumers (bn4)."
    assert left.evidence["layers"] == ["bn3", "bn4", "bn5"] and left.fix.endswith("--dry-run")
    (one,) = judge(*fated(("folded backward", "")), codes={"G502"}).findings
    assert one.message.startswith("1 of 1 BatchNorm folds into")


def test_verdicts_and_reasons_are_those_of_the_plan() -> None:
    from normdoctor.flow.reasons import REASONS

    assert set(REASONS) >= OWN_REASONS
    assert {verdict.value for verdict in Verdict} == REMAINS | set(DESTINATIONS)


def test_a_live_module_folds_through_the_api() -> None:
    live = Checkpoint(path="Net", format="live", container=Container.MEMORY, models=())
    fixes = {code: fill_in(rule_of(code).fix, live) for code in ("G502", "G503", "T705")}
    assert fixes == {
        "G502": "normdoctor.fold(module, example_inputs)",
        "G503": "normdoctor.fold(module, example_inputs, dry_run=True)",
        "T705": "normdoctor.fold(module, example_inputs, layernorm=True)",
    }


def test_the_fold_command_says_how_the_model_opens() -> None:
    onnx = Checkpoint(path="my net.onnx", format="ONNX", container=Container.ONNX, models=())
    assert fill_in(rule_of("G502").fix, onnx) == "normdoctor fold 'my net.onnx'"
    calls = (LoadCall("nets.Net", Danger.MODULE_CLASS),)
    pickled = Checkpoint(path="m.pt", format="module", container=Container.ZIP, models=(), load_calls=calls)
    assert fill_in(rule_of("G503").fix, pickled) == "normdoctor fold m.pt --trust --dry-run"


def test_gains_that_fold_are_one_line(judge) -> None:
    norms = [
        {"kind": NormKind.LAYER, "place": Place(gain_fate=Fate(verdict=verdict, code=code, saved=32))}
        for verdict, code in (("folded forward", ""), ("folded forward", ""), ("left", "not-linear-layers"))
    ]
    (finding,) = judge(*norms, codes={"T705"}).findings
    assert finding.message == (
        "Gain and shift of 2 of 3 norms fold into the linear layers behind (normdoctor fold --layernorm). "
        "The others stay: 1 not-linear-layers."
    )


# neighbours


def test_a_bias_is_measured_in_deviations_of_the_channel(judge) -> None:
    var = np.linspace(1.0, 4.0, 16)
    bias = 0.1 * np.sqrt(var + 1e-5) * np.where(np.arange(16) % 2, 1, -1)
    place = Place(producer=Producer(neighbour=CONV, alone=True, bias=bias))
    (finding,) = judge({"running_var": var, "place": place}, codes={"G501"}).findings
    assert finding.message == (
        "16 biases of convolution conv1 before it: without effect in training, since the norm subtracts the mean. "
        "|bias| / s.d. has the median 0.1 and the 95th percentile 0.1."
    )
    assert finding.evidence["parameters"] == 16
    (live,) = judge({"running_var": var, "place": place, "requires_grad": False}, codes={"G501"}).findings
    assert live.message.endswith("where it trains in eval mode the bias is live.")
    (grouped,) = judge({"kind": NormKind.GROUP, "groups": 16, "place": place}, codes={"G501"}).findings
    assert "s.d." not in grouped.message and grouped.fix == "nothing, or set the bias to 0, which is exact"


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_what_dropout_leaves_of_the_variance_is_that_of_a_simulation(p: float, judge) -> None:
    """Independent values behind a ReLU: the variance without dropout over that with it."""
    (finding,) = judge({"place": Place(dropouts=(("drop", p),))}, codes={"G506"}).findings
    generator = np.random.default_rng(0)
    values = np.maximum(generator.standard_normal(400_000), 0)
    dropped = values * (generator.random(values.size) > p) / (1 - p)
    assert finding.evidence["least"] == pytest.approx(values.var() / dropped.var(), rel=0.02)
    assert pytest.approx(values.mean() ** 2 / values.var(), rel=0.02) == RELU_RATIO


def test_dropout_behind_a_norm_leaves_the_share_that_is_kept(judge) -> None:
    """A GroupNorm, dropout, a convolution, a BatchNorm; for another convolution the norm is none of its business."""
    grouped = {"kind": NormKind.GROUP, "groups": 4, "place": Place(after=(CONV,))}
    behind = {"place": Place(dropouts=(("drop", 0.2),), before=(CONV,))}
    (finding,) = judge(grouped, behind, codes={"G506"}).findings
    assert finding.evidence["least"] == pytest.approx(0.8)
    assert "with mean 0, as behind GroupNorm" in finding.message and "ReLU" not in finding.message
    (other,) = judge(grouped | {"place": Place(after=(Neighbour(op="addition"),))}, behind, codes={"G506"}).findings
    assert other.evidence["least"] < 0.75
    assert "behind a ReLU (80 % where their mean is 0)" in other.message


def test_the_noise_of_a_small_batch(judge) -> None:
    """Against running variances of normal values, as torch keeps them."""
    (finding,) = judge({"place": Place(positions=1), "momentum": 0.1}, codes={"G510"}, train_batch=4).findings
    assert "4 values a channel (1 value of each sample, batches of 4)" in finding.message
    batches = np.random.default_rng(0).standard_normal((300, 4000, 4)).var(axis=2, ddof=1)
    running = np.ones(4000)
    for batch in batches:
        running += 0.1 * (batch - running)
    assert finding.evidence["noise"] == pytest.approx(running.std(), rel=0.05)
    (blind,) = judge({"place": Place(positions=1), "momentum": None}, codes={"G510"}, train_batch=4).findings
    assert blind.evidence["noise"] is None
    (one,) = judge({"place": Place(positions=1)}, codes={"G510"}, train_batch=1).findings
    assert one.message == "In training 1 value a channel (1 value of each sample, batches of 1)."


def test_a_counter_confirms_that_a_norm_is_shared(judge) -> None:
    single, shared = {"place": Place()}, {"place": Place(calls=3), "num_batches_tracked": 15000}
    (sure,) = judge(single, shared, codes={"G511"}).findings
    assert "Its counter is 3 times that of others" in sure.message and sure.confidence is Confidence.MEDIUM
    (other,) = judge(single, shared | {"num_batches_tracked": 5000}, codes={"G511"}).findings
    assert "counter" not in other.message and "siamese" in other.message


def test_the_graph_confirms_a_branch_that_is_off(judge) -> None:
    off = {"weight": np.zeros(16), "bias": np.zeros(16)}
    confirmed = "and in the graph it ends a residual branch."
    for place, said in (
        (Place(joins_branches=True), True),
        (Place(), False),
        (None, False),
        (Place(joins_branches=True, inferred=True), False),
    ):
        (finding,) = judge(off | {"place": place}, codes={"A203"}).findings
        assert finding.message.endswith(confirmed) == said
    identity, constant = (
        judge(off | {"bias": bias, "place": Place(joins_branches=True)}, codes={"G512"}).findings[0].message
        for bias in (np.zeros(16), np.ones(16))
    )
    assert "the block is the identity and can be removed" in identity
    assert "adds a constant" in constant and "identity" not in constant


def test_ranges_after_folding_are_those_of_the_folded_weights(judge) -> None:
    generator = np.random.default_rng(0)
    weights, gain, var = generator.standard_normal((16, 8, 3, 3)), np.linspace(0.1, 2.0, 16), np.linspace(4.0, 0.5, 16)
    folded = np.abs(weights * (gain / np.sqrt(var + 1e-5))[:, None, None, None]).reshape(16, -1).max(1)
    largest = np.abs(weights).reshape(16, -1).max(1)
    place = Place(producer=Producer(neighbour=CONV, alone=True, largest=largest))
    layer = {"weight": gain, "running_var": var, "place": place}
    (finding,) = judge(layer, codes={"N404"}, precision="int8").findings
    assert finding.evidence["least"] == pytest.approx((folded / folded.max()).min(), rel=1e-5)
    assert finding.evidence["mean"] == pytest.approx((folded / folded.max()).mean(), rel=1e-5)
    assert finding.evidence["mean_unfolded"] == pytest.approx((largest / largest.max()).mean(), rel=1e-5)


def test_the_families_are_those_of_the_rules() -> None:
    assert {rule.code[0] for rule in RULES} <= set(FAMILIES) and "NG" in FAMILIES
