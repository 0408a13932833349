"""The law of `Moments`: however values are split, and in whatever order the parts are added, they give the same."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normdoctor.moments import Moments, divergence, merged

CHANNELS = 3


@st.composite
def samples(draw: st.DrawFn) -> np.ndarray:
    """Values of shape (n, CHANNELS), each channel with an offset of up to 1e6 of its standard deviations."""
    count = draw(st.integers(1, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offset = np.array([draw(st.sampled_from([0.0, 1.0, -1e3, 1e6])) for _ in range(CHANNELS)])
    scale = np.array([draw(st.sampled_from([0.0, 1e-6, 1.0, 1e5])) for _ in range(CHANNELS)])
    return np.asarray((generator.standard_normal((count, CHANNELS)) + offset) * scale)


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray]]:
    """Values, and the same in any number of parts, empty ones too, in any order."""
    values = draw(samples())
    cuts = sorted(draw(st.lists(st.integers(0, len(values)), max_size=8)))
    parts = [values[begin:end] for begin, end in pairwise([0, *cuts, len(values)])]
    return values, draw(st.permutations(parts))


def of(part: np.ndarray) -> Moments:
    return Moments.of(part) if len(part) else Moments.none(CHANNELS)


def same(one: Moments, other: Moments) -> None:
    """To rounding: a mean to 1e-15 of the size of the values, a variance to 1e-12 of itself or, where the values lie
    far from 0, to what their own rounding leaves of it."""
    assert one.count == other.count
    size = np.abs(other.mean) + np.sqrt(other.variance())
    assert (np.abs(one.mean - other.mean) <= 1e-14 * size).all()
    rounding = 64 * np.square(2.0**-52 * size) + 1e-12 * other.variance() + 1e-14 * size * np.sqrt(other.variance())
    assert (np.abs(one.variance() - other.variance()) <= rounding).all()


@settings(max_examples=150, deadline=None)
@given(splits())
def test_any_split_in_any_order_gives_the_same(case: tuple[np.ndarray, list[np.ndarray]]) -> None:
    values, parts = case
    same(merged(map(of, parts)), Moments.of(values))
    # Pairs first, as processes that each add up their own do.
    pairs = [merged(map(of, parts[i : i + 2])) for i in range(0, len(parts), 2)]
    same(merged(pairs), Moments.of(values))


@settings(max_examples=100, deadline=None)
@given(samples(), samples(), samples())
def test_addition_is_commutative_and_associative_to_rounding(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    one, two, three = map(Moments.of, (a, b, c))
    # The mean is moved from the first to the second: only rounding tells which came first.
    same(one + two, two + one)
    same((one + two) + three, one + (two + three))
    nothing = Moments.none(CHANNELS)
    for sum_ in (one + nothing, nothing + one):
        assert sum_.count == one.count
        np.testing.assert_array_equal(sum_.mean, one.mean)
        np.testing.assert_array_equal(sum_.m2, one.m2)


def test_the_same_parts_give_the_same_bits() -> None:
    values = np.random.default_rng(0).standard_normal((100, CHANNELS)) + 1e4
    parts = [Moments.of(values[i : i + 7]) for i in range(0, 100, 7)]
    first, second = merged(parts), merged(parts)
    np.testing.assert_array_equal(first.mean, second.mean)
    np.testing.assert_array_equal(first.m2, second.m2)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6, 1e9])
def test_far_from_zero(offset: float) -> None:
    """Against sums of Python's whole numbers, which are exact; E[x^2] - E[x]^2 has no digit left at 1e9."""
    whole = np.random.default_rng(1).integers(-1000, 1000, 500)
    found = merged(Moments.of((whole[i : i + 3] + offset).astype(np.float64)[:, None]) for i in range(0, 500, 3))
    total, squares = int(whole.sum()), int(np.square(whole).sum())
    assert found.mean[0] == pytest.approx(offset + total / 500, rel=1e-15)
    assert found.m2[0] == pytest.approx((500 * squares - total**2) / 500, rel=1e-9)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_channels_lie_along_an_axis(axis: int) -> None:
    values = np.random.default_rng(2).standard_normal((3, 4, 5, 6)).astype(np.float32)
    found = Moments.of(values, axis)
    others = tuple(place for place in range(4) if place != axis)
    np.testing.assert_allclose(found.mean, values.mean(others, dtype=np.float64), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(found.variance(), values.astype(np.float64).var(others), rtol=1e-12)
    assert found.count == values.size // values.shape[axis] and found.mean.dtype == np.float64


def test_variances() -> None:
    two = Moments.of(np.array([[1.0], [3.0]]))
    assert two.variance()[0] == 1.0 and two.variance(1)[0] == 2.0
    one = Moments.of(np.array([[5.0]]))
    assert one.variance()[0] == 0.0
    assert np.isnan(one.variance(1)).all() and np.isnan(Moments.none(2).variance()).all()


def test_divergence_is_that_of_two_normal_distributions() -> None:
    """Against the integral of p ln(p / q)."""
    data = Moments.of(np.array([[-1.0], [1.0], [3.0]]))
    mean, var = np.array([0.3]), np.array([1.7])
    x = np.linspace(-30, 30, 600_001)

    def density(m: float, v: float) -> np.ndarray:
        return np.asarray(np.exp(-np.square(x - m) / (2 * v)) / np.sqrt(2 * np.pi * v))

    p, q = density(float(data.mean[0]), float(data.variance()[0])), density(0.3, 1.7)
    keep = p > 1e-200
    integral = float((p[keep] * np.log(p[keep] / np.maximum(q[keep], 1e-300))).sum() * (x[1] - x[0]))
    assert divergence(data, mean, var)[0] == pytest.approx(integral, rel=1e-9)
    assert divergence(data, data.mean, data.variance())[0] == 0
    assert np.isnan(divergence(data, mean, np.array([-1.0]))).all()
    assert np.isnan(divergence(data, mean, np.array([0.0]))).all()
    assert np.isfinite(divergence(data, mean, np.array([0.0]), eps=1e-5)).all()
