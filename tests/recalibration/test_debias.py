"""The arithmetic of debias against torch's own moving average, and every reason to refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normdoctor.errors import RefusedError
from normdoctor.layers import NormKind, NormLayer
from normdoctor.recalibration.debias import NEGLIGIBLE, Repair, is_weak, plan

MakeLayer = Callable[..., NormLayer]


def debias(*layers: NormLayer, **options: Any) -> list[Repair]:
    known = {"momentum": None, "updates": None, "keep_counters": False} | options
    return plan(layers, **known)[0]


def trained(momentum: float, updates: int, dead: tuple[int, ...] = ()) -> tuple[nn.BatchNorm2d, np.ndarray, np.ndarray]:
    """A BatchNorm after `updates` batches, and the weighted average of the same batches' statistics alone."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, momentum=momentum)
    mean, var, weight = np.zeros(6), np.zeros(6), 0.0
    scale = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 8.0]).view(6, 1, 1)
    for step in range(updates):
        batch = torch.randn(16, 6, 4, 4) * scale + scale
        batch[:, list(dead)] = 0.0
        norm(batch)
        share = momentum * (1 - momentum) ** (updates - 1 - step)
        values = batch.double().transpose(0, 1).reshape(6, -1)
        mean += share * values.mean(1).numpy()
        var += share * values.var(1).numpy()
        weight += share
    return norm, mean / weight, var / weight


@pytest.mark.parametrize(("momentum", "updates"), [(0.1, 5), (0.1, 40), (0.01, 100), (0.001, 216), (0.5, 3)])
def test_equals_the_average_that_never_saw_the_initial_values(
    make_layer: MakeLayer, momentum: float, updates: int
) -> None:
    norm, mean, var = trained(momentum, updates)
    layer = make_layer(
        channels=6,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        num_batches_tracked=updates,
        momentum=momentum,
    )
    (repair,) = debias(layer)
    assert repair.residue == pytest.approx((1 - momentum) ** updates, rel=1e-12)
    np.testing.assert_allclose(repair.running_mean, mean, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(repair.running_var, var, rtol=2e-4, atol=2e-5)


def test_dead_channels_become_exactly_zero(make_layer: MakeLayer) -> None:
    norm, _, _ = trained(0.01, 200, dead=(1, 4))
    layer = make_layer(
        channels=6,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        num_batches_tracked=200,
        momentum=0.01,
    )
    (repair,) = debias(layer)
    assert list(np.flatnonzero(repair.running_var == 0)) == [1, 4]
    assert (repair.running_var >= 0).all()
    assert repair.running_mean[1] == repair.running_mean[4] == 0


def slow(make_layer: MakeLayer, **overrides: Any) -> NormLayer:
    fields: dict[str, Any] = {
        "running_var": np.linspace(0.85, 1.5, 16),
        "momentum": 0.001,
        "num_batches_tracked": 216,
    }
    return make_layer(**(fields | overrides))


def test_counter_is_raised_to_where_nothing_is_left(make_layer: MakeLayer) -> None:
    (repair,) = debias(slow(make_layer))
    assert repair.counter is not None
    assert (1 - 0.001) ** repair.counter < NEGLIGIBLE <= (1 - 0.001) ** (repair.counter - 1)
    (kept,) = debias(slow(make_layer), keep_counters=True)
    assert kept.counter is None


def test_a_second_time_is_refused(make_layer: MakeLayer) -> None:
    (repair,) = debias(slow(make_layer))
    again = slow(make_layer, running_var=repair.running_var, num_batches_tracked=repair.counter)
    with pytest.raises(RefusedError, match="residue is below"):
        debias(again)
    without_counter = slow(make_layer, running_var=repair.running_var)
    with pytest.raises(RefusedError, match=r"below the 0\.806"):
        debias(without_counter)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"momentum": None}, "does not say its momentum"),
        ({"num_batches_tracked": None}, "no update counter"),
        ({"num_batches_tracked": 0}, "num_batches_tracked is 0"),
        ({"num_batches_tracked": 10.5}, "num_batches_tracked is 10.5"),
        ({"running_mean": np.full(16, np.nan)}, "NaN or infinite"),
        ({"running_var": np.linspace(0.5, 1.5, 16)}, "running_var of channel 0 is 0.5"),
        ({"num_batches_tracked": 1, "momentum": 1e-5, "running_var": np.full(16, 1.5)}, "only 1e-05 of its buffers"),
        ({"momentum": 0.1, "num_batches_tracked": 5000}, "residue is below"),
        ({"momentum": "cumulative"}, "plain average"),
        ({"momentum": 0.0}, "no known residue"),
        ({"momentum": 1.0}, "no known residue"),
        ({"running_mean": np.zeros(16), "running_var": np.ones(16)}, "never updated"),
        ({"running_mean": None, "running_var": None}, "no layer has running statistics"),
        ({"running_mean": None}, "has a running_var, but no running_mean"),
        ({"running_var": None}, "has a running_mean, but no running_var"),
        ({"kind": NormKind.LAYER}, "no layer has running statistics"),
    ],
)
def test_refusals(make_layer: MakeLayer, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError, match=words) as caught:
        debias(slow(make_layer, **overrides))
    assert caught.value.hint


def test_the_users_word_fills_what_the_file_does_not_say_and_nothing_else(make_layer: MakeLayer) -> None:
    silent = slow(make_layer, momentum=None, num_batches_tracked=None)
    (repair,) = debias(silent, momentum=0.001, updates=216)
    assert (repair.momentum, repair.updates, repair.counter) == (0.001, 216, None)
    (repair,) = debias(slow(make_layer), momentum=0.5, updates=3)
    assert (repair.momentum, repair.updates) == (0.001, 216)


def test_layers_that_need_nothing_are_named_as_left_alone(make_layer: MakeLayer) -> None:
    healthy = make_layer(name="healthy")
    repairs, untouched = plan([slow(make_layer), healthy], momentum=None, updates=None, keep_counters=False)
    assert [repair.layer.name for repair in repairs] == ["layer1.0.bn1"]
    assert [entry.layer.name for entry in untouched] == ["healthy"]


class TestContradictions:
    """One layer that cannot have started at 0 and 1 speaks for all that went through the same updates."""

    def test_no_layer_of_its_group_is_changed(self, make_layer: MakeLayer) -> None:
        layers = [
            slow(make_layer, name="a"),
            slow(make_layer, name="b", running_var=np.linspace(0.5, 1.5, 16)),
            slow(make_layer, name="c"),
            slow(make_layer, name="other.momentum", momentum=0.0011),
            slow(make_layer, name="other.counter", num_batches_tracked=217),
            slow(make_layer, name="ema:a"),
        ]
        repairs, untouched = plan(layers, momentum=None, updates=None, keep_counters=False)
        assert [repair.layer.name for repair in repairs] == ["other.momentum", "other.counter", "ema:a"]
        assert [entry.layer.name for entry in untouched] == ["a", "b", "c"]
        assert {entry.reason.partition(",")[0] for entry in untouched} == {"b: running_var of channel 0 is 0.5"}

    def test_the_first_one_is_named(self, make_layer: MakeLayer) -> None:
        layers = [slow(make_layer, name=name, running_var=np.linspace(0.5, 1.5, 16)) for name in "ab"]
        with pytest.raises(RefusedError, match=r"a: running_var of channel 0 is 0\.5, .*\(2 of 2 layers\)") as caught:
            debias(*layers)
        assert "started elsewhere" in caught.value.hint and "--layer" in caught.value.hint

    def test_layers_that_are_left_alone_for_other_reasons_say_nothing(self, make_layer: MakeLayer) -> None:
        fresh = slow(make_layer, name="fresh", running_mean=np.zeros(16), running_var=np.ones(16))
        assert len(debias(slow(make_layer), fresh)) == 1


@pytest.mark.parametrize(("low", "weak"), [(1.0, False), (1.55, False), (1.7, True), (30.0, True)])
def test_evidence_is_weak_where_most_of_the_variance_is_data(make_layer: MakeLayer, low: float, weak: bool) -> None:
    """The residue is 0.806, half of a variance of 1.61."""
    (repair,) = debias(slow(make_layer, running_var=np.linspace(low, low * 1.001, 16)))
    assert is_weak(repair) is weak
