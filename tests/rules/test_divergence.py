"""Data against buffers: the formula, what is left out, and how sure it is on simulated moving averages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from normdoctor.layers import Model, NormKind, NormLayer
from normdoctor.measured import DriftVerdict, Measured, Measurement
from normdoctor.measurement.tally import Part, Tally
from normdoctor.measurement.walks import Seen
from normdoctor.moments import Moments, divergence
from normdoctor.rules.divergence import Shift, kullback_leibler, shift_of
from normdoctor.rules.verdict import VERDICT_LIMITS, drift_of

CHANNELS, BATCH, PIXELS = 48, 32, 16
ABOUT = Measurement(data="calib.npy", samples=1, batches=1, order=("bn",))


def images(random: np.random.Generator, count: int, shift: float = 0.0) -> np.ndarray:
    """Shape (count, channels, pixels); pixels of an image are alike, as in real maps."""
    common = random.standard_normal((count, CHANNELS, 1))
    return 0.6 * common + 0.8 * random.standard_normal((count, CHANNELS, PIXELS)) + shift


def moving_average(random: np.random.Generator, momentum: float, batch: int, steps: int = 400) -> tuple[Any, Any]:
    """running_mean and running_var as torch keeps them."""
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)
    for _ in range(steps):
        seen = Moments.of(images(random, batch))
        mean += momentum * (seen.mean - mean)
        var += momentum * (seen.variance(1) - var)
    return mean, var


def looked_at(data: np.ndarray) -> Measured:
    tally = Tally()
    for index, batch in enumerate(np.split(data, range(BATCH, len(data), BATCH))):
        tally.add(Part.of(index, len(batch), Seen(Moments.of(batch), batch.mean(2))))
    return tally.measured()


def judged(layer: NormLayer, measured: Measured, train_batch: int | None = None) -> Any:
    model = Model(key=None, layers=(replace(layer, measured=measured),), measurement=ABOUT)
    return drift_of(model, VERDICT_LIMITS, train_batch)


@pytest.fixture(scope="module")
def averaged(make_any_layer) -> NormLayer:
    mean, var = moving_average(np.random.default_rng(0), 0.1, 32)
    return make_any_layer(channels=CHANNELS, running_mean=mean, running_var=var)


def compared(layer: NormLayer, measured: Measured) -> Shift:
    shift = shift_of(replace(layer, measured=measured))
    assert shift is not None
    return shift


def test_the_divergence_is_that_of_two_normal_distributions(averaged: NormLayer) -> None:
    measured = looked_at(images(np.random.default_rng(1), 256, 0.5))
    mean, var = averaged.numbers.mean, averaged.numbers.var
    assert mean is not None and var is not None
    unbiased = replace(measured.moments, m2=measured.moments.variance(1) * measured.moments.count)
    assert compared(averaged, measured).divergence == pytest.approx(divergence(unbiased, mean, var, 1e-5), rel=1e-9)
    assert kullback_leibler(np.array([0.0, 1.0]), np.zeros(2)) == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize("count", [8, 40, 128, 1024])
def test_the_verdict_on_a_healthy_moving_average_is_never_stale(averaged: NormLayer, count: int) -> None:
    """Nor is it noisy; on few images it may be unknown."""
    random = np.random.default_rng(count)
    verdicts = {judged(averaged, looked_at(images(random, count))).verdict for _ in range(12)}
    assert verdicts <= {DriftVerdict.HEALTHY, DriftVerdict.UNKNOWN}
    assert count < 500 or verdicts == {DriftVerdict.HEALTHY}


@pytest.mark.parametrize("shift", [0.12, 0.5])
def test_a_shift_is_stale_where_there_is_data_enough(averaged: NormLayer, shift: float) -> None:
    random = np.random.default_rng(3)
    drift = judged(averaged, looked_at(images(random, 2048, shift)))
    assert drift.verdict is (DriftVerdict.STALE if shift > 0.4 else DriftVerdict.NOISY)
    assert judged(averaged, looked_at(images(random, 8, 0.12))).verdict is not DriftVerdict.STALE


def test_what_is_known_of_the_training_says_whether_noise_explains_it(make_any_layer) -> None:
    mean, var = moving_average(np.random.default_rng(4), 0.5, 2)
    layer = make_any_layer(channels=CHANNELS, running_mean=mean, running_var=var, momentum=0.5)
    measured = looked_at(images(np.random.default_rng(5), 2048))
    assert judged(layer, measured, train_batch=2).verdict is DriftVerdict.NOISY
    assert judged(replace(layer, momentum=0.1), measured).verdict is DriftVerdict.STALE


@pytest.mark.parametrize(("count", "most"), [(64, 2.0), (128, 2.0), (512, 1.25)])
def test_the_noise_of_measuring_is_what_it_is_said_to_be(make_any_layer, count: int, most: float) -> None:
    """Samples of one distribution against its own mean and variance; with few batches more noise is said."""
    random = np.random.default_rng(count)
    whole = Moments.of(images(np.random.default_rng(7), 8_000))
    exact = make_any_layer(channels=CHANNELS, running_mean=whole.mean, running_var=whole.variance(1))
    shifts = [compared(exact, looked_at(images(random, count))) for _ in range(20)]
    seen, said = np.mean([s.divergence for s in shifts]), np.mean([s.noise for s in shifts])
    assert 0.8 * seen <= said <= most * seen


def test_batches_that_differ_do_not_hide_a_shift(averaged: NormLayer) -> None:
    data = images(np.random.default_rng(8), 1024, 0.5)
    in_order = data[np.argsort(data.mean((1, 2)))]
    assert judged(averaged, looked_at(in_order)).verdict is judged(averaged, looked_at(data)).verdict


def test_an_instance_norm_is_compared_within_samples(make_any_layer) -> None:
    data = images(np.random.default_rng(9), 512)
    within = data.var(axis=2, ddof=1).mean(0)
    layer = make_any_layer(
        kind=NormKind.INSTANCE, channels=CHANNELS, running_mean=np.zeros(CHANNELS), running_var=within
    )
    assert np.abs(compared(layer, looked_at(data)).log_ratio).max() < 0.15
    assert np.abs(compared(replace(layer, kind=NormKind.BATCH), looked_at(data)).log_ratio).min() > 0.2


def test_channels_that_come_to_life_count(averaged: NormLayer, make_any_layer) -> None:
    """A variance of 0 in the buffers is left out only where the data has none either."""
    var = np.array(averaged.numbers.var)
    var[5] = 0.0
    layer = make_any_layer(channels=CHANNELS, running_mean=averaged.numbers.mean, running_var=var)
    data = images(np.random.default_rng(10), 256)
    assert 5 in compared(layer, looked_at(data)).channels
    data[:, 5] = 0.25
    assert 5 not in compared(layer, looked_at(data)).channels
