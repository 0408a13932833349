"""Before and after on the same samples: exact tests, the same judgement for any batches, and no number made of NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from normdoctor.errors import RefusedError, UsageError
from normdoctor.moments import Moments, merged
from normdoctor.recalibration.fitting import blend, residual
from normdoctor.recalibration.judging import Accuracy, Judge, Judgement, Verdict, mcnemar, scores_of

COUNTS = st.integers(0, 3000)


class TestMcNemar:
    @staticmethod
    def by_definition(gained: int, lost: int) -> float:
        count, few = gained + lost, min(gained, lost)
        term, total = 1, 0
        for number in range(few + 1):
            total += term
            term = term * (count - number) // (number + 1)
        return float(min(Fraction(1), Fraction(2 * total, 2**count)))

    @given(COUNTS, COUNTS)
    @settings(max_examples=60, deadline=None)
    @example(0, 0)
    @example(500, 500)
    @example(500, 501)  # the exact sum ends here
    @example(3000, 0)
    def test_exact(self, gained: int, lost: int) -> None:
        expected = self.by_definition(gained, lost)
        assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9, abs=1e-300)
        assert mcnemar(gained, lost) == mcnemar(lost, gained)

    @given(st.integers(1, 3000), st.integers(0, 1500))
    @settings(deadline=None)
    def test_the_more_uneven_the_smaller(self, count: int, few: int) -> None:
        few = min(few, count // 2)
        if few:
            assert mcnemar(few - 1, count - few + 1) <= mcnemar(few, count - few) <= 1

    def test_a_million_pairs(self) -> None:
        assert mcnemar(500_000, 500_000) == 1.0
        # The normal distribution with half a count off is good to 1e-6 here.
        for few in (499_000, 498_500):
            expected = math.erfc((500_000 - few - 0.5) / math.sqrt(1e6 / 4) / math.sqrt(2))
            assert mcnemar(few, 1_000_000 - few) == pytest.approx(expected, rel=1e-4)
        assert mcnemar(0, 1_000_000) == 0.0
        assert 0.0 <= mcnemar(100_000, 900_000) < 1e-300


class TestAccuracy:
    @pytest.mark.parametrize(
        ("samples", "gained", "lost", "verdict"),
        [
            (1000, 5, 25, Verdict.WORSE),
            (1000, 25, 5, Verdict.BETTER),
            (1000, 5, 15, Verdict.ALIKE),  # p = 0.04
            (1000, 0, 7, Verdict.ALIKE),  # p = 0.016
            (1000, 0, 8, Verdict.WORSE),  # p = 0.008
            (100_000, 100, 300, Verdict.ALIKE),  # p = 6e-24, and not more than 0.2 points
            (100_000, 100, 301, Verdict.WORSE),
            (1000, 0, 0, Verdict.ALIKE),
        ],
    )
    def test_verdict(self, samples: int, gained: int, lost: int, verdict: Verdict) -> None:
        before = 0.5
        found = Accuracy(
            samples=samples, before=before, after=before + (gained - lost) / samples, gained=gained, lost=lost
        )
        assert found.verdict is verdict

    @given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
    def test_standard_error_is_that_of_the_differences(self, pairs: list[tuple[bool, bool]]) -> None:
        differences = np.array([float(after) - float(before) for before, after in pairs])
        found = Accuracy(
            samples=len(pairs),
            before=float(np.mean([before for before, _ in pairs])),
            after=float(np.mean([after for _, after in pairs])),
            gained=int((differences > 0).sum()),
            lost=int((differences < 0).sum()),
        )
        assert found.standard_error == pytest.approx(differences.std() / math.sqrt(len(pairs)), abs=1e-12)
        assert found.after - found.before == pytest.approx((found.gained - found.lost) / len(pairs))


def judge(before: Any, after: Any, labels: Any = None, cuts: Sequence[int] = ()) -> Judgement:
    before, after = ({"out": x} if isinstance(x, np.ndarray) else x for x in (before, after))
    found = Judge()
    edges = [0, *sorted(cuts), len(next(iter(before.values())))]
    for begin, end in pairwise(edges):
        parts = ({name: x[begin:end] for name, x in outputs.items()} for outputs in (before, after))
        found.add(*parts, None if labels is None else labels[begin:end])
    return found.result()


class TestScores:
    @pytest.mark.parametrize(
        ("shapes", "name", "why"),
        [
            ({"a": (2, 10)}, "a", ""),
            ({"a": (2, 10), "b": (2, 1), "c": (2, 3, 4)}, "a", ""),
            ({"a": (2, 10), "b": (2, 3)}, None, "2 outputs could be the scores: a, b"),
            ({"a": (2, 1)}, None, "only scores of shape (N, C) are judged, and a is (N, 1)"),
            ({"a": (2,), "b": (2, 3, 4, 5)}, None, "only scores of shape (N, C) are judged, and a is (N), b is"),
            ({}, None, "no output is of a float type"),
        ],
    )
    def test_which_output(self, shapes: dict[str, Any], name: str | None, why: str) -> None:
        found = scores_of({key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
        assert found[0] == name and found[1].startswith(why)

    def test_whole_numbers_are_no_scores(self) -> None:
        assert scores_of({"classes": np.zeros((4, 5), np.int64), "logits": np.zeros((4, 7), np.float16)})[0] == "logits"
        found = judge({"classes": np.zeros((4, 5), np.int64)}, {"classes": np.ones((4, 5), np.int64)})
        assert (found.scores, found.why_no_scores) == (None, "no output is of a float type")
        assert found.output_change is None

    def test_maps_with_labels_are_not_judged_and_said_so(self) -> None:
        rng = np.random.default_rng(0)
        maps = rng.normal(size=(4, 3, 8, 8))
        found = judge(maps, maps * 1.1, np.zeros((4, 8, 8), np.int64))
        assert found.accuracy is found.entropy is found.agreement is None
        assert found.why_no_scores == "only scores of shape (N, C) are judged, and out is (N, 3, 8, 8)"
        assert found.output_change == pytest.approx(0.1) and found.samples == 4

    def test_outputs_that_change_their_names(self) -> None:
        found = Judge()
        found.add({"a": np.zeros((2, 3))}, {"a": np.zeros((2, 3))})
        found.add({"b": np.zeros((2, 3))}, {"b": np.zeros((2, 3))})
        assert found.result().why_no_scores == "the outputs differ from batch to batch"
        assert found.result().agreement is None

    def test_nothing_at_all(self) -> None:
        found = Judge().result()
        assert found.samples == 0 and found.scores is None and found.output_change is None
        empty = judge(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0, np.int64))
        assert empty.accuracy is empty.entropy is empty.agreement is None

    def test_another_shape_after(self) -> None:
        found = judge({"boxes": np.zeros((2, 4, 4))}, {"boxes": np.zeros((2, 3, 4))})
        assert found.output_change is None
        found = judge(np.zeros((2, 4)), np.zeros((2, 3)), np.zeros(2, np.int64))
        assert found.accuracy is None and found.why_no_scores == "out has another shape after"
        assert judge(np.zeros((2, 4)), {"other": np.zeros((2, 4))}).scores is None


class TestNumbers:
    def test_against_torch(self) -> None:
        torch.manual_seed(0)
        before, after, labels = torch.randn(64, 10), torch.randn(64, 10), torch.randint(10, (64,))
        found = judge(before.numpy(), after.numpy(), labels.numpy())
        assert found.entropy is not None and found.accuracy is not None
        for value, scores in ((found.entropy.before, before), (found.entropy.after, after)):
            expected = torch.distributions.Categorical(logits=scores.double()).entropy().mean()
            assert value == pytest.approx(float(expected), rel=1e-12)
        change = 100 * (found.entropy.after / found.entropy.before - 1)
        assert found.entropy.change == pytest.approx(change)
        right = [(scores.argmax(1) == labels) for scores in (before, after)]
        assert (found.accuracy.before, found.accuracy.after) == tuple(float(r.double().mean()) for r in right)
        assert found.accuracy.gained == int((right[1] & ~right[0]).sum())
        assert found.accuracy.lost == int((right[0] & ~right[1]).sum())
        assert found.agreement == float((before.argmax(1) == after.argmax(1)).double().mean())
        assert found.output_change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-6)
        assert (found.broken_before, found.broken_after) == (0, 0)

    def test_over_all_float_outputs(self) -> None:
        before = {"a": np.array([[3.0, 0.0]]), "b": np.array([[[4.0]]]), "n": np.array([7])}
        after = {"a": np.array([[3.0, 3.0]]), "b": np.array([[[8.0]]]), "n": np.array([9])}
        assert judge(before, after).output_change == pytest.approx(1.0)

    def test_probabilities_are_taken_as_they_are(self) -> None:
        scores = np.random.default_rng(0).normal(0, 3, (20, 5)).astype(np.float32)
        shares = torch.tensor(scores).softmax(1).numpy()
        for other in (shares, shares.astype(np.float16), np.log(shares)):
            found = judge(other, other).entropy
            assert found is not None
            expected = judge(scores, scores).entropy
            assert expected is not None and found.before == pytest.approx(expected.before, rel=1e-3)

    def test_a_class_that_is_ruled_out(self) -> None:
        scores = np.array([[0.0, 0.0, -np.inf]])
        found = judge(scores, scores, np.array([0]))
        assert found.entropy is not None and found.entropy.before == pytest.approx(math.log(2))
        assert found.accuracy is not None and found.accuracy.before == 1.0
        assert (found.broken_before, found.output_change) == (0, None)

    def test_sure_models_have_no_change_in_percent(self) -> None:
        scores = np.array([[1e5, 0.0]])
        found = judge(scores, scores).entropy
        assert found is not None and (found.before, found.change) == (0.0, None)

    def test_outputs_of_zero(self) -> None:
        zeros, ones = np.zeros((2, 3)), np.ones((2, 3))
        assert judge(zeros, zeros).output_change == 0.0
        assert judge(zeros, ones).output_change is None
        assert judge(ones, zeros).output_change == 1.0

    def test_numbers_beyond_range(self) -> None:
        huge = np.full((2, 3), 1e200)
        assert judge(huge, huge * 2).output_change is None


class TestBroken:
    def test_nan_before_is_wrong_and_has_no_entropy(self) -> None:
        before = np.array([[np.nan, 1.0], [np.nan, np.nan], [0.0, 1.0]])
        after = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        found = judge(before, after, np.array([0, 0, 1]))
        assert found.accuracy is not None
        assert (found.accuracy.before, found.accuracy.after) == (pytest.approx(1 / 3), 1.0)
        assert (found.accuracy.gained, found.accuracy.lost) == (2, 0)
        assert found.entropy is found.output_change is None
        assert found.agreement == pytest.approx(1 / 3)
        assert (found.broken_before, found.broken_after) == (3, 0)

    def test_nan_on_both_sides_agrees_with_nothing(self) -> None:
        scores = np.full((4, 3), np.nan)
        found = judge(scores, scores, np.zeros(4, np.int64))
        assert found.agreement == 0.0 and found.accuracy is not None
        assert (found.accuracy.before, found.accuracy.after, found.accuracy.gained) == (0.0, 0.0, 0)

    def test_infinity(self) -> None:
        before, after = np.array([[np.inf, 0.0]]), np.array([[-np.inf, -np.inf]])
        found = judge(before, after, np.array([0]))
        assert found.accuracy is not None and (found.accuracy.before, found.accuracy.after) == (1.0, 0.0)
        assert found.entropy is None and found.broken_before == 1

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            (np.array([0, 3]), "the label 3 is none of the model's 3 classes"),
            (np.array([0, -1]), "the label -1 is none"),
            (np.array([0]), r"labels of shape \[1\]"),
            (np.array([[0], [1]]), r"labels of shape \[2, 1\]"),
            (np.array([0.0, 1.0]), "type float64"),
        ],
    )
    def test_labels_that_do_not_fit(self, labels: Any, words: str) -> None:
        found = Judge()
        with pytest.raises(UsageError, match=words) as caught:
            found.add({"out": np.zeros((2, 3))}, {"out": np.zeros((2, 3))}, labels)
        assert caught.value.hint

    def test_labels_of_some_batches(self) -> None:
        found = Judge()
        scores = np.eye(3)
        found.add({"out": scores}, {"out": scores}, np.array([0, 1, 0]))
        found.add({"out": scores}, {"out": scores})
        result = found.result()
        assert result.samples == 6 and result.accuracy is not None
        assert (result.accuracy.samples, result.accuracy.before) == (3, pytest.approx(2 / 3))


FLOATS = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1.0]), st.floats(0, 1))


@given(
    st.data(),
    st.integers(1, 12),
    st.integers(2, 9),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.sampled_from("CF"),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_batches_give_the_same_bits(
    data: st.DataObject, samples: int, classes: int, dtype: Any, order: Any, odd: bool
) -> None:
    elements = FLOATS if odd else st.floats(-100, 100)

    def draw(*shape: int) -> Any:
        return np.asarray(data.draw(hnp.arrays(np.float64, shape, elements=elements)), dtype=dtype, order=order)

    before, after = ({"out": draw(samples, classes), "map": draw(samples, 2, 3)} for _ in range(2))
    labels = data.draw(hnp.arrays(np.int64, samples, elements=st.integers(0, classes - 1)))
    cuts = data.draw(st.lists(st.integers(0, samples), max_size=4))
    assert judge(before, after, labels, cuts) == judge(before, after, labels)
    assert judge(before, after, labels, range(1, samples)) == judge(before, after, labels)


def test_large_batches_give_the_same_bits() -> None:
    """numpy adds in blocks of 128, and in another way for 8 and more."""
    rng = np.random.default_rng(0)
    before, after = (
        {"out": rng.normal(size=(500, 1000)).astype(np.float32), "map": rng.normal(size=(500, 3, 17))} for _ in range(2)
    )
    labels = rng.integers(0, 1000, 500)
    whole = judge(before, after, labels)
    assert judge(before, after, labels, range(1, 500)) == whole
    assert judge(before, after, labels, (7, 130, 131, 400)) == whole
    assert whole.entropy is not None and whole.accuracy is not None and whole.output_change is not None


VECTORS = hnp.arrays(np.float64, 3, elements=st.floats(-100, 100))
VARIANCES = hnp.arrays(np.float64, 3, elements=st.floats(1e-3, 1e3))


class TestBlend:
    @given(VECTORS, VARIANCES, st.integers(1, 500), st.integers(2, 40), st.integers(0, 10**6))
    @settings(deadline=None)
    def test_lies_between(self, mean: Any, var: Any, prior: int, samples: int, seed: int) -> None:
        moments = Moments.of(np.random.default_rng(seed).normal(3, 2, (samples, 3, 4)))
        for ddof in (0, 1):
            target = moments.variance(ddof)
            new_mean, new_var = blend(mean, var, moments, prior=prior, samples=samples, ddof=ddof)
            share = samples / (prior + samples)
            np.testing.assert_allclose(new_mean, (1 - share) * mean + share * moments.mean, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(new_var, (1 - share) * var + share * target, rtol=1e-12)
            assert (new_var >= np.minimum(var, target) * (1 - 1e-12)).all()
            wider = blend(mean, var, moments, prior=prior, samples=samples, ddof=ddof, pooled=True)
            np.testing.assert_array_equal(wider[0], new_mean)
            assert (wider[1] >= new_var).all()

    def test_pooled_is_the_variance_of_both_together(self) -> None:
        """Where samples hold one value each: the very moments of source and target merged."""
        rng = np.random.default_rng(0)
        source, target = (Moments.of(rng.normal(place, 2, (count, 5))) for place, count in ((0, 40), (3, 24)))
        found = blend(source.mean, source.variance(), target, prior=40, samples=24, ddof=0, pooled=True)
        both = merged([source, target])
        np.testing.assert_allclose(found[0], both.mean, rtol=1e-12)
        np.testing.assert_allclose(found[1], both.variance(), rtol=1e-12)

    def test_no_prior_is_what_was_measured(self) -> None:
        moments = Moments.of(np.random.default_rng(0).normal(size=(9, 4)))
        mean, var = blend(np.full(4, 1e30), np.full(4, 1e30), moments, prior=0, samples=9, ddof=1)
        np.testing.assert_array_equal(mean, moments.mean)
        np.testing.assert_array_equal(var, moments.variance(1))

    def test_samples_count_and_not_pixels(self) -> None:
        values = np.random.default_rng(0).normal(5, 1, (8, 2, 32, 32))
        mean, _ = blend(np.zeros(2), np.ones(2), Moments.of(values), prior=8, samples=8, ddof=1)
        np.testing.assert_allclose(mean, values.mean((0, 2, 3)) / 2)

    def test_channels_without_usable_statistics_take_what_was_measured(self) -> None:
        moments = Moments.of(np.random.default_rng(0).normal(size=(9, 6)))
        mean = np.array([np.nan, 0, 0, 0, -np.inf, 0])
        var = np.array([1, np.nan, np.inf, -1e-9, 1, 0])
        for pooled in (False, True):
            new = blend(mean, var, moments, prior=16, samples=9, ddof=0, pooled=pooled)
            for found, measured in zip(new, (moments.mean, moments.variance()), strict=True):
                np.testing.assert_array_equal(found[:5], measured[:5])
                assert found[5] != measured[5] and np.isfinite(found).all()

    def test_refused(self) -> None:
        moments = Moments.of(np.ones((4, 2)))
        for prior in (-1, np.nan, np.inf):
            with pytest.raises(UsageError, match="prior must be"):
                blend(np.zeros(2), np.ones(2), moments, prior=prior, samples=4, ddof=0)
        with pytest.raises(UsageError, match="no samples"):
            blend(np.zeros(2), np.ones(2), moments, prior=1, samples=0, ddof=0)
        one = Moments.of(np.ones((1, 2)))
        with pytest.raises(RefusedError, match="not finite") as caught:
            blend(np.zeros(2), np.ones(2), one, prior=1, samples=1, ddof=1)
        assert caught.value.hint


class TestResidual:
    @given(VECTORS, VARIANCES, st.integers(0, 10**6))
    @settings(deadline=None)
    def test_divergence_against_torch(self, mean: Any, var: Any, seed: int) -> None:
        moments = Moments.of(np.random.default_rng(seed).normal(3, 2, (20, 3)))
        found = residual(mean, var, moments, ddof=1, eps=0.0)
        data, stored = (
            torch.distributions.Normal(torch.tensor(m), torch.tensor(v).sqrt())
            for m, v in ((moments.mean, moments.variance(1)), (mean, var))
        )
        expected = torch.distributions.kl_divergence(data, stored).numpy()
        np.testing.assert_allclose(found.divergence, expected, rtol=1e-9, atol=1e-12)
        assert (found.divergence >= 0).all()
        np.testing.assert_allclose(np.exp(found.log_ratio), moments.variance(1) / var)
        np.testing.assert_allclose(found.shift, (moments.mean - mean) / np.sqrt(var))

    @pytest.mark.parametrize("eps", [0.0, 1e-5])
    def test_what_was_measured_is_no_distance_away(self, eps: float) -> None:
        moments = Moments.of(np.concatenate([np.random.default_rng(0).normal(size=(9, 4)), np.ones((9, 2))], axis=1))
        found = residual(moments.mean, moments.variance(1), moments, ddof=1, eps=eps)
        for values in (found.shift, found.log_ratio, found.divergence):
            np.testing.assert_array_equal(values, np.zeros(6))

    @given(st.floats(1e-9, 1e-3), st.sampled_from([-1, 1]))
    def test_small_differences_keep_their_digits(self, size: float, sign: int) -> None:
        moments = Moments.of(np.array([[-1.0], [1.0]]))
        ratio = 1 + sign * size
        exact = Fraction(1) / Fraction(ratio) - 1  # of what is stored as a float
        found = residual(np.zeros(1), np.full(1, ratio), moments, ddof=0, eps=0.0)
        assert found.log_ratio[0] == pytest.approx(math.log1p(float(exact)), rel=1e-12)

    def test_very_different_variances(self) -> None:
        moments = Moments(4, np.zeros(3), np.array([4e-30, 4.0, 4e30]))
        found = residual(np.zeros(3), np.ones(3), moments, ddof=0, eps=0.0)
        np.testing.assert_allclose(found.log_ratio, [np.log(1e-30), 0, np.log(1e30)], rtol=1e-12)

    def test_dead_channels(self) -> None:
        """Variances far below eps: what the layer makes of them is the same, so they are no distance away."""
        moments = Moments(10, np.zeros(4), np.array([0.0, 1e-12, 0.0, 0.0]))
        found = residual(np.array([0.0, 0.0, 0.0, 1e-6]), np.array([0.0, 1e-9, 1e-12, 0.0]), moments, ddof=0)
        assert (np.abs(found.log_ratio) < 1e-3).all() and (found.divergence < 1e-6).all()
        assert found.shift[3] == pytest.approx(-1e-6 / math.sqrt(1e-5))

    def test_without_eps(self) -> None:
        moments = Moments(10, np.zeros(4), np.array([0.0, 0.0, 10.0, 0.0]))
        found = residual(np.array([0.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0]), moments, ddof=0, eps=0.0)
        np.testing.assert_array_equal(found.shift, [0, -np.inf, 0, 0])
        np.testing.assert_array_equal(found.log_ratio, [0, 0, np.inf, -np.inf])
        np.testing.assert_array_equal(found.divergence, [0, np.inf, np.inf, np.inf])

    def test_no_statistics_at_all(self) -> None:
        moments = Moments.of(np.random.default_rng(0).normal(size=(9, 5)))
        found = residual(np.array([np.nan, 0, 0, 0, 0]), np.array([1, np.nan, np.inf, -1, 1.0]), moments, ddof=0)
        for values in (found.shift, found.log_ratio, found.divergence):
            assert (values[:4] == np.inf).all() and np.isfinite(values[4])
