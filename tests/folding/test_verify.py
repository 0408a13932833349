"""The measure of the proof: what it must see, and what must not disturb it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normdoctor.errors import CannotRunError
from normdoctor.folding.records import ProofState
from normdoctor.folding.verify import (
    LIMIT,
    NOISE_SECONDS,
    NOTHING_FINITE,
    Reference,
    coarsest,
    compare,
    first_failing,
    judge,
    relative_error,
    run_original,
)

RANDOM = np.random.default_rng(3)


def some(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def reference(before: Any, exact: Any = None) -> Reference:
    return Reference({"y": before}, None if exact is None else {"y": exact}, "" if exact is not None else "why", "test")


def proven(before: Any, after: Any, exact: Any = None, precision: str = "float32") -> Any:
    found = reference(before, exact)
    return judge(found, compare(found, {"y": after}, precision), "random", 0.0)


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 7), (3, 5, 2, 2)])
@pytest.mark.parametrize("channel", [0, 4])
def test_one_wrong_channel_is_seen_and_named(shape: tuple[int, ...], channel: int) -> None:
    before = some(*shape)
    after = before.copy()
    after[:, channel] *= 1.001
    error, where = relative_error(before, after)
    assert where == channel
    assert 1e-4 < error < 1e-2
    proof = proven(before, after)
    assert proof.state is ProofState.FAILED
    assert proof.reason.startswith("output y is off by ")


def test_a_small_channel_counts_by_its_own_size() -> None:
    before = some(2, 4, 50)
    before[:, 2] *= 0.01
    after = before.copy()
    after[:, 2] += 1e-4
    assert relative_error(before, after)[0] == pytest.approx(0.01, rel=0.3)
    assert relative_error(before, before + np.float32(1e-6))[0] < 1e-3


def test_a_dead_channel_does_not_decide() -> None:
    before = some(2, 4, 50)
    before[:, 2] = 1e-12
    after = before.copy()
    after[:, 2] = -1e-9
    assert proven(before, after).state is ProofState.VERIFIED
    after[:, 2] = 1e-3
    assert proven(before, after).state is ProofState.FAILED


@given(
    scale=st.floats(1e-30, 1e30),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    seed=st.integers(0, 1000),
    off=st.floats(1e-7, 1e-2),
)
def test_the_error_does_not_depend_on_the_unit(scale: float, shape: list[int], seed: int, off: float) -> None:
    generator = np.random.default_rng(seed)
    before = generator.standard_normal(shape)
    after = before + off * generator.standard_normal(shape)
    plain, scaled = relative_error(before, after)[0], relative_error(before * scale, after * scale)[0]
    assert scaled == pytest.approx(plain, rel=1e-6)


def test_huge_values_have_a_size() -> None:
    before = np.full((2, 3), 1e200)
    assert relative_error(before, before * (1 + 1e-3))[0] == pytest.approx(1e-3)


def test_zeros_are_compared_absolutely() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert relative_error(zeros, zeros) == (0.0, 0)
    assert proven(zeros, zeros + np.float32(1e-7)).state is ProofState.VERIFIED
    assert proven(zeros, zeros + np.float32(0.1)).state is ProofState.FAILED


def test_nothing_and_a_single_number() -> None:
    assert relative_error(np.zeros((0, 3)), np.zeros((0, 3))) == (0.0, None)
    assert relative_error(np.array(2.0), np.array(3.0)) == (0.5, None)


def test_the_same_nan_and_inf_are_no_difference_but_new_ones_are() -> None:
    before = some(2, 3, 4)
    before[0, 0, 0], before[1, 2, 3], before[1, 1, 1] = np.nan, np.inf, -np.inf
    same = proven(before, before.copy())
    assert same.state is ProofState.VERIFIED
    assert same.differences[0].note == "3 of 24 values are NaN or Inf, in both"
    for value in (np.nan, np.inf):
        after = before.copy()
        after[0, 1, 0] = value
        proof = proven(before, after)
        assert proof.state is ProofState.FAILED
        assert proof.differences[0].channel == 1
        assert "NaN or Inf where the original has none" in proof.reason
    turned = before.copy()
    turned[1, 2, 3] = -np.inf
    assert proven(before, turned).state is ProofState.FAILED
    healed = before.copy()
    healed[0, 0, 0] = 0
    assert proven(before, healed).state is ProofState.FAILED


def test_outputs_without_a_finite_value_prove_nothing() -> None:
    nothing = np.full((2, 3), np.nan, np.float32)
    proof = proven(nothing, nothing)
    assert proof.state is ProofState.UNVERIFIED
    assert NOTHING_FINITE in proof.reason


def test_noise_excuses_what_rounding_explains_and_no_more() -> None:
    exact = some(2, 3, 100).astype(np.float64)
    rounded = (exact * (1 + 1e-4)).astype(np.float32)  # a model that is itself off by 1e-4
    after = (exact * (1 + 1e-3)).astype(np.float32)
    proof = proven(rounded, after, exact)
    assert proof.state is ProofState.VERIFIED
    assert 0 < proof.differences[0].noise < proof.differences[0].error
    assert proven(rounded, after).state is ProofState.FAILED, "without the noise 1e-4 alone decides"
    assert proven(rounded, (exact * 1.1).astype(np.float32), exact).state is ProofState.FAILED


def test_what_is_little_but_rounding_proves_nothing() -> None:
    exact = some(2, 3, 100).astype(np.float64)
    rounded, after = (exact * 1.3).astype(np.float32), (exact * 1.2).astype(np.float32)
    proof = proven(rounded, after, exact)
    assert proof.state is ProofState.UNVERIFIED
    assert "rounding alone moves it by as much, so it proves nothing; give real inputs with --data" in proof.reason
    assert reference(rounded, exact).noise > 0.1
    assert reference(rounded).noise == 0.0


def test_noise_without_limits_is_no_excuse() -> None:
    before = np.array([[1.0, np.inf]], np.float16)
    exact = np.array([[1.0, 70000.0]])
    after = np.array([[2.0, np.inf]], np.float16)
    proof = proven(before, after, exact, "float16")
    assert proof.differences[0].noise is None
    assert proof.state is ProofState.FAILED


@pytest.mark.parametrize("precision, allowed", [("float32", 5e-5), ("float16", 0.015), ("bfloat16", 0.12)])
def test_coarse_types_have_their_own_limit_where_there_is_no_noise(precision: str, allowed: float) -> None:
    before = np.ones((2, 3), np.float32)
    assert proven(before, before * np.float32(1 + allowed), precision=precision).state is ProofState.VERIFIED
    assert proven(before, before * np.float32(1 + 3 * allowed), precision=precision).state is ProofState.FAILED


def test_integers_by_the_share_that_differs() -> None:
    before = np.zeros((10, 100), np.int64)
    after = before.copy()
    after[0, 0] = 7
    assert proven(before, after).state is ProofState.VERIFIED
    after[:5] = 7
    proof = proven(before, after)
    assert proof.state is ProofState.FAILED
    assert proof.differences[0].error == pytest.approx(0.5)
    assert proven(before == 0, after == 0).state is ProofState.FAILED


def test_missing_outputs_and_other_shapes_fail() -> None:
    found = reference(some(2, 3))
    for outputs in ({}, {"z": some(2, 3)}, {"y": some(2, 4)}, {"y": some(6)}):
        proof = judge(found, compare(found, outputs, "float32"), "", 0.0)
        assert proof.state is ProofState.FAILED
        assert "the folded model" in proof.reason
    nothing = Reference({}, None, "", "test")
    assert judge(nothing, compare(nothing, {}, "float32"), "", 0.0).state is ProofState.UNVERIFIED


def test_the_worst_of_several_outputs_is_named() -> None:
    outputs = {"a": some(2, 3), "b": some(2, 3), "c": some(2, 3)}
    found = Reference(outputs, None, "", "test")
    off = {"a": outputs["a"], "b": outputs["b"] * np.float32(1.5), "c": outputs["c"] * np.float32(1.01)}
    proof = judge(found, compare(found, off, "float32"), "", 0.0)
    assert proof.reason.startswith("output b ")
    assert [difference.ok for difference in proof.differences] == [True, False, False]


@dataclass
class Model:
    """A model of one line, with what it knows of its own float64 run."""

    seconds: float = 0.0
    wide: Any = "self"
    engine: str = "test"
    runs: list[str] = field(default_factory=list)

    def run(self, inputs: Any) -> Any:
        self.runs.append("run")
        return {"y": inputs * 2}

    def in_float64(self) -> Any:
        if isinstance(self.wide, Exception):
            raise self.wide
        return self

    def float64_seconds(self, seconds: float) -> float:
        return self.seconds


def test_float64_is_run_where_that_is_quick() -> None:
    model = Model()
    assert run_original(model, some(2, 3)).exact is not None
    assert model.runs == ["run", "run"]


def test_float64_is_skipped_where_it_would_take_long_and_that_is_said() -> None:
    model = Model(seconds=NOISE_SECONDS + 30)
    found = run_original(model, some(2, 3))
    assert found.exact is None and model.runs == ["run"]
    assert found.why_not == "a run in float64 would take about 90 s"


def test_where_float64_takes_long_the_noise_is_estimated_by_one_rounding_of_the_inputs() -> None:
    class Doubling(Model):
        def run(self, inputs: Any) -> Any:
            self.runs.append("run")
            return {"y": inputs["x"] * 2, "n": inputs["n"]}

    model = Doubling(seconds=NOISE_SECONDS + 30)
    found = run_original(model, {"x": some(2, 3), "n": np.arange(3)})
    assert found.exact is not None and found.too_slow and model.runs == ["run", "run"]
    assert "estimated" in found.why_not
    assert 2.0**-25 < found.noise < 2.0**-21
    assert (found.exact["n"] == np.arange(3)).all()


def test_no_float64_is_said_and_no_failure() -> None:
    found = run_original(Model(wide=CannotRunError("a cast to float32 stands in its graph")), some(2, 3))
    assert found.exact is None
    assert found.why_not == "a cast to float32 stands in its graph"


def test_the_coarsest_type() -> None:
    assert coarsest([]) == "float32"
    assert coarsest(["float64", "float32"]) in ("float64", "float32")
    assert coarsest(["float16", "float32"]) == "float16"
    assert LIMIT == 1e-4


@given(count=st.integers(1, 200), wanted=st.data())
def test_the_first_failing_fold_is_found_in_few_runs(count: int, wanted: st.DataObject) -> None:
    first = wanted.draw(st.integers(1, count))
    runs = []

    def fails(done: int) -> bool:
        runs.append(done)
        return done >= first

    assert first_failing(count, fails) == first
    assert len(runs) <= 8
