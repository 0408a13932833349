"""G507 on layers whose predictions are known: what each kind of wrong buffers looks like to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normdoctor.findings import Confidence, Finding, Severity
from normdoctor.places import Place, Prediction
from tests.rules.conftest import Judge

C = 32
RNG = np.random.default_rng(0)
MEANS = RNG.normal(size=(8, C))
VARIANCE = 0.5 + RNG.random(C)


def predicted(mean: np.ndarray, **more: Any) -> Place:
    given: dict[str, Any] = {
        "bias": None, "exact": False, "even": True, "sized": True, "sources": ("bn1",),
        "through": ("relu", "convolution"),
    }  # fmt: skip
    return Place(prediction=Prediction(mean=mean, **given | more))


def layer(stored: np.ndarray, mean: np.ndarray, var: np.ndarray = VARIANCE, **more: Any) -> dict[str, Any]:
    frozen = more.pop("requires_grad", None)
    counted = {"num_batches_tracked": more.pop("updates")} if "updates" in more else {}
    place = predicted(mean, **more)
    return {
        "channels": len(stored), "running_mean": stored, "running_var": var[: len(stored)], "place": place,
        "weight": None, "bias": None, "affine": False, "requires_grad": frozen, "num_batches_tracked": None,
    } | counted  # fmt: skip


def found(judge: Judge, *layers: dict[str, Any], **limits: float) -> list[Finding]:
    return list(judge(*layers, codes={"G507"}, limits={"G507": limits}).findings)


def test_statistics_of_these_weights_are_fine(judge: Judge) -> None:
    layers = [layer(0.95 * mean + 0.1 * RNG.normal(size=C), mean) for mean in MEANS]
    assert not found(judge, *layers)


def test_statistics_of_other_weights_are_found(judge: Judge) -> None:
    layers = [layer(other, mean) for mean, other in zip(MEANS, MEANS[::-1], strict=True)]
    findings = found(judge, *layers)
    assert len(findings) == len(layers)
    assert {finding.severity for finding in findings} == {Severity.ERROR}
    assert {finding.confidence for finding in findings} == {Confidence.MEDIUM}


@pytest.mark.parametrize("residue", [0.5, 0.8])
def test_a_residue_shows_as_one_slope_everywhere(residue: float, judge: Judge) -> None:
    layers = [
        layer((1 - residue) * (mean + 0.05 * RNG.normal(size=C)), mean, (1 - residue) * VARIANCE + residue)
        for mean in MEANS
    ]
    findings = found(judge, *layers)
    assert len(findings) == len(layers)
    assert {finding.severity for finding in findings} == {Severity.WARNING}
    assert all(f"about {100 * residue:.0f} %" in finding.message for finding in findings)


def test_the_slope_of_one_layer_proves_nothing(judge: Judge) -> None:
    layers = [layer(mean * (0.2 if place == 3 else 1.0), mean) for place, mean in enumerate(MEANS)]
    assert not found(judge, *layers)


def test_the_slope_behind_unknown_borders_proves_nothing(judge: Judge) -> None:
    assert not found(judge, *(layer(0.5 * mean, mean, sized=False) for mean in MEANS))


@pytest.mark.parametrize(("shift", "severity"), [(0.05, None), (0.2, Severity.WARNING), (0.6, Severity.ERROR)])
def test_exact_ways_are_judged_by_the_shift(shift: float, severity: Severity | None, judge: Judge) -> None:
    signs = np.where(np.arange(C) % 2, 1.0, -1.0)
    stored = MEANS[0] + shift * signs * np.sqrt(VARIANCE)
    findings = found(judge, layer(stored, MEANS[0], exact=True), slope=10)
    assert [finding.severity for finding in findings] == ([] if severity is None else [severity])
    if severity is not None:
        assert findings[0].confidence is Confidence.HIGH
        assert findings[0].evidence["shift"] == pytest.approx(shift, rel=0.01)


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_exact_ways_tell_the_residue_of_a_single_layer(size: float, judge: Judge) -> None:
    (finding,) = found(judge, layer(0.7 * size * MEANS[0], size * MEANS[0], exact=True))
    assert "about 30 %" in finding.message
    assert finding.evidence["slope"] == pytest.approx(0.7)


def test_a_counter_that_rules_a_residue_out(judge: Judge) -> None:
    """Momentum 0.1 and 1,000 updates leave nothing initial: a single slope is then an average that lags."""
    (finding,) = found(judge, layer(0.7 * 0.01 * MEANS[0], 0.01 * MEANS[0], exact=True, updates=1000))
    assert finding.severity is Severity.INFO
    assert "no initial zeros" in finding.message
    layers = [layer(0.7 * 0.01 * mean, 0.01 * mean, exact=True, updates=1000) for mean in MEANS]
    assert {each.severity for each in found(judge, *layers)} == {Severity.WARNING}, "as one in all layers"


@pytest.mark.parametrize("slope", [0.85, 0.95, 1.05, 1.7])
def test_an_average_that_lags_a_little_is_nothing(slope: float, judge: Judge) -> None:
    """Healthy nets after a few epochs at a constant learning rate have slopes of 0.83 to 1.76, by 0.001 s.d."""
    assert not found(judge, layer(slope * 0.01 * MEANS[0], 0.01 * MEANS[0], exact=True))


@pytest.mark.parametrize(("residue", "severities"), [(0.02, set()), (0.1, {Severity.WARNING})])
def test_a_small_residue_shows_where_all_exact_ways_agree(
    residue: float, severities: set[Severity], judge: Judge
) -> None:
    layers = [layer((1 - residue) * 0.01 * mean, 0.01 * mean, exact=True) for mean in MEANS]
    assert {finding.severity for finding in found(judge, *layers)} == severities


@pytest.mark.parametrize(("slope", "count"), [(0.4, 2), (0.7, 0)])
def test_two_ways_through_activations_must_be_far_off(slope: float, count: int, judge: Judge) -> None:
    assert len(found(judge, *(layer(slope * mean, mean) for mean in MEANS[:2]))) == count


def test_predictions_of_nothing_prove_nothing(judge: Judge) -> None:
    """Norms with beta 0 predict means of 0 behind them, whatever was stored before rounding."""
    noise = 1e-6 * RNG.normal(size=C)
    assert not found(judge, layer(noise, noise[::-1].copy(), exact=True))
    assert not found(judge, layer(0.02 * MEANS[1], 0.02 * MEANS[0]))


def test_a_bias_does_not_agree_with_itself(judge: Judge) -> None:
    """The same large bias on both sides would make any two vectors alike."""
    bias = 10 * MEANS[2]
    (finding,) = found(judge, layer(MEANS[1] + bias, MEANS[0] + bias, bias=bias))
    assert finding.severity is Severity.ERROR


def test_a_bias_that_was_dropped_is_found(judge: Judge) -> None:
    """The buffers know of a bias that the weights no longer have."""
    bias = 2 * MEANS[2]
    (finding,) = found(judge, layer(MEANS[0] + bias, MEANS[0], exact=True))
    assert finding.severity is Severity.ERROR


def test_frozen_norms_are_judged_one_level_lower(judge: Judge) -> None:
    (finding,) = found(judge, layer(MEANS[1], MEANS[0], requires_grad=False))
    assert finding.severity is Severity.WARNING
    assert "by design" in finding.message


@pytest.mark.parametrize(("channels", "severities"), [(7, []), (12, [Severity.INFO]), (16, [Severity.ERROR])])
def test_few_channels_say_less(channels: int, severities: list[Severity], judge: Judge) -> None:
    stored, mean = -MEANS[0][:channels], MEANS[0][:channels]
    assert [finding.severity for finding in found(judge, layer(stored, mean))] == severities


@pytest.mark.parametrize(
    ("stored", "mean"),
    [
        (np.zeros(C), MEANS[0]),  # reset: S103
        (np.full(C, 0.3), MEANS[0]),  # a placeholder: S107
        (MEANS[0], np.full(C, 0.3)),  # placeholders for weights
    ],
)
def test_what_others_say_and_what_nobody_can_say(stored: np.ndarray, mean: np.ndarray, judge: Judge) -> None:
    assert not found(judge, layer(stored, mean))


def test_dead_channels_do_not_count(judge: Judge) -> None:
    stored, var = MEANS[0].copy(), VARIANCE.copy()
    stored[::2], var[::2] = 50.0, 1e-20
    assert not found(judge, layer(stored, MEANS[0], var))
