"""Is a model better or worse with its new statistics? Its outputs before and after, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import UsageError
from normdoctor.layers import Vector

MOST_P = 0.01
"""A difference in accuracy counts as significant below this."""

MOST_LOST = 0.002
"""Accuracy that may be lost however significant: 0.2 points."""

SUMS_TO_ONE = 0.01
"""Rows without a negative value whose sum is this near to 1 are probabilities already, in half precision too."""

Outputs = Mapping[str, NDArray[Any]]


class Verdict(Enum):
    """What a paired test says of two accuracies."""

    WORSE = "significantly worse"
    BETTER = "significantly better"
    ALIKE = "no significant difference"


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test: how often a fair coin would split gained + lost samples at
    least this unevenly. 1 where there are none. (McNemar 1947, https://doi.org/10.1007/BF02295996)

    >>> mcnemar(1, 9)  # 2 * (1 + 10) / 2**10
    0.021484375
    >>> mcnemar(5, 5)
    1.0
    """
    few, count = min(gained, lost), gained + lost
    if 2 * few == count:
        return 1.0
    if count <= 1000:  # whole numbers, and a quotient that is rounded once
        return float(min(1.0, 2 * sum(math.comb(count, number) for number in range(few + 1)) / 2**count))
    largest = math.lgamma(count + 1) - math.lgamma(few + 1) - math.lgamma(count - few + 1) - count * math.log(2)
    below = np.arange(few, 0, -1, dtype=np.float64)  # C(n, k - 1) / C(n, k) = k / (n - k + 1)
    sum_of_shares = 1.0 + float(np.cumprod(below / (count - below + 1)).sum())
    return min(1.0, 2 * math.exp(largest + math.log(sum_of_shares)))


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 accuracy on the same samples before and after, as shares from 0 to 1."""

    samples: int
    before: float
    after: float
    gained: int
    """Samples that were wrong and are right now."""
    lost: int
    """Samples that were right and are wrong now."""

    @property
    def p_value(self) -> float:
        """Of the difference, by McNemar's exact test."""
        return mcnemar(self.gained, self.lost)

    @property
    def standard_error(self) -> float:
        """Of the difference after - before, paired: only samples that changed add to it.

        >>> Accuracy(samples=100, before=0.80, after=0.84, gained=5, lost=1).standard_error
        0.024166091947189144
        """
        difference = (self.gained - self.lost) / self.samples
        return math.sqrt(max((self.gained + self.lost) / self.samples - difference**2, 0.0) / self.samples)

    @property
    def verdict(self) -> Verdict:
        """Worse or better: p below 0.01 and by more than 0.2 points.

        >>> Accuracy(samples=1000, before=0.90, after=0.88, gained=5, lost=25).verdict
        <Verdict.WORSE: 'significantly worse'>
        """
        gain = (self.gained - self.lost) / self.samples
        if abs(gain) <= MOST_LOST or self.p_value >= MOST_P:
            return Verdict.ALIKE
        return Verdict.BETTER if gain > 0 else Verdict.WORSE


@dataclass(frozen=True)
class Entropy:
    """Mean entropy of the predicted classes, in nats."""

    before: float
    after: float

    @property
    def change(self) -> float | None:
        """In percent of that before; None where that is 0.

        >>> Entropy(0.5, 0.75).change
        50.0
        """
        return 100 * (self.after - self.before) / self.before if self.before else None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The outputs of one model with two sets of statistics, side by side."""

    samples: int
    """Rows of the first output."""
    scores: str | None
    """The output that holds a score for each class, shape (N, C)."""
    why_no_scores: str
    """Where there is none; then there is no accuracy, entropy or agreement either."""
    accuracy: Accuracy | None
    """None without labels."""
    entropy: Entropy | None
    """None where a score is NaN or infinite (-inf, for a class that is ruled out, is none of these)."""
    agreement: float | None
    """Share of samples with the largest score in the same class before and after; one with NaN agrees with none."""
    output_change: float | None
    """||after - before|| / ||before|| over all float outputs, in L2; None where one holds NaN or infinity or has
    another shape after, and where they were 0 before and are not now."""
    broken_before: int
    """Values of float outputs that are NaN or infinite; -inf in `scores` is not counted."""
    broken_after: int


def scores_of(outputs: Outputs) -> tuple[str | None, str]:
    """The one output that is a score for each of several classes; or None, and why there is none.

    >>> scores_of({"logits": np.zeros((2, 10)), "features": np.zeros((2, 64, 7, 7))})
    ('logits', '')
    >>> scores_of({"out": np.zeros((2, 21, 64, 64))})
    (None, 'only scores of shape (N, C) are judged, and out is (N, 21, 64, 64)')
    """
    floats = {name: array for name, array in outputs.items() if _is_float(array)}
    found = [name for name, array in floats.items() if array.ndim == 2 and array.shape[1] > 1]
    if len(found) == 1:
        return found[0], ""
    if found:
        return None, f"{len(found)} outputs could be the scores: {', '.join(found)}"
    if not floats:
        return None, "no output is of a float type"
    shown = (f"{name} is ({', '.join(['N', *map(str, array.shape[1:])])})" for name, array in floats.items())
    return None, f"only scores of shape (N, C) are judged, and {', '.join(shown)}"


class Judge:
    """Takes the outputs batch by batch. How the samples are split into batches changes no bit of the judgement."""

    def __init__(self) -> None:
        self._scores: str | None = None
        self._why: str | None = None
        self._samples = 0
        self._answers: list[NDArray[np.int64]] = []
        """Rows of class before, class after, label; -1, -2 and -3 for none."""
        self._entropies: list[Vector] = []
        """Rows of entropy before and after."""
        self._squares: dict[str, list[Vector]] = {}
        """Output → rows of its sum of squares before, and of the change."""
        self._broken = np.zeros(2, np.int64)
        self._comparable = True

    def add(self, before: Outputs, after: Outputs, labels: NDArray[Any] | None = None) -> None:
        """One batch: outputs by name, the first axis the samples; labels: the right classes, shape (N,).

        Raises UsageError for labels that are not one class number for each sample."""
        self._choose(before)
        scored = self._scored(before, after)
        right = None if scored is None or labels is None else _checked(labels, *scored[0].shape)
        self._samples += next((len(array) for array in before.values() if array.ndim), 0)
        for name, old in before.items():
            new = after.get(name)
            if not _is_float(old):
                continue
            self._broken += [0 if array is None else self._count_broken(name, array) for array in (old, new)]
            if new is None or new.shape != old.shape:
                self._comparable = False
            else:
                self._squares.setdefault(name, []).append(_squares(old, new))
        if scored is not None:
            old, new = scored
            right = np.full(len(old), -3) if right is None else right
            self._answers.append(np.stack([_top(old, -1), _top(new, -2), right], axis=1))
            self._entropies.append(np.stack([_entropy(old), _entropy(new)], axis=1))

    def result(self) -> Judgement:
        """All batches so far. What was counted is exact, and sums are taken once, in the order of the samples."""
        accuracy = entropy = agreement = None
        if self._scores is not None and self._answers:
            answers = np.concatenate(self._answers)
            agreement = float(np.mean(answers[:, 0] == answers[:, 1])) if len(answers) else None
            accuracy = _accuracy(answers[answers[:, 2] >= 0])
            means = _column_sums(self._entropies) / max(len(answers), 1)
            entropy = Entropy(*means.tolist()) if np.isfinite(means).all() and len(answers) else None
        return Judgement(
            samples=self._samples,
            scores=self._scores,
            why_no_scores="no samples" if self._why is None else self._why,
            accuracy=accuracy,
            entropy=entropy,
            agreement=agreement,
            output_change=self._output_change(),
            broken_before=int(self._broken[0]),
            broken_after=int(self._broken[1]),
        )

    def __iadd__(self, other: Judge) -> Judge:
        """Take over what another one has seen."""
        if self._why is None:
            self._scores, self._why = other._scores, other._why
        elif other._why is not None and self._scores != other._scores:
            self._scores, self._why = None, other._why or self._why or "the outputs differ from batch to batch"
        self._samples += other._samples
        self._answers += other._answers
        self._entropies += other._entropies
        for name, rows in other._squares.items():
            self._squares.setdefault(name, []).extend(rows)
        self._broken += other._broken
        self._comparable &= other._comparable
        return self

    def _choose(self, outputs: Outputs) -> None:
        name, why = scores_of(outputs)
        if self._why is None:
            self._scores, self._why = name, why
        elif self._scores is not None and name != self._scores:
            self._scores, self._why = None, "the outputs differ from batch to batch"

    def _scored(self, before: Outputs, after: Outputs) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """The scores before and after, None where they are not to be compared."""
        if self._scores is None:
            return None
        old, new = before[self._scores], after.get(self._scores)
        if new is not None and new.shape == old.shape:
            return old, new
        self._scores, self._why = None, f"{self._scores} has another shape after"
        return None

    def _count_broken(self, name: str, array: NDArray[Any]) -> int:
        ruled_out = (array == -np.inf).sum() if name == self._scores else 0
        return int((~np.isfinite(array)).sum() - ruled_out)

    def _output_change(self) -> float | None:
        if not self._comparable or not self._squares:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            size, change = np.sum([_column_sums(rows) for rows in self._squares.values()], axis=0).tolist()
        if not math.isfinite(size) or not math.isfinite(change) or (change and not size):
            return None
        return math.sqrt(change / size) if change else 0.0


def merged_judge(parts: Sequence[Judge]) -> Judge:
    """One that has seen the samples of all parts, in this order."""
    whole = Judge()
    for part in parts:
        whole += part
    return whole


def _is_float(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f"


def _column_sums(rows: list[Vector]) -> Vector:
    """Sums over all rows of all batches, a column after the other: the same bits for any split."""
    whole = np.concatenate(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array([np.ascontiguousarray(column).sum() for column in whole.T])


def _squares(old: NDArray[Any], new: NDArray[Any]) -> Vector:
    """For each sample the sum of squares of the output before, and of its change: shape (N, 2)."""
    rows = (len(old) if old.ndim else 1, math.prod(old.shape[1:]))
    flat = [np.ascontiguousarray(array, dtype=np.float64).reshape(rows) for array in (old, new)]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.stack([np.square(flat[0]).sum(axis=1), np.square(flat[1] - flat[0]).sum(axis=1)], axis=1)


def _checked(labels: NDArray[Any], samples: int, classes: int) -> NDArray[np.int64]:
    given = np.asarray(labels)
    if given.shape != (samples,) or given.dtype.kind not in "iu":
        raise UsageError(
            f"labels of shape {list(given.shape)} and type {given.dtype} for {samples} samples",
            "Give one class number for each sample.",
        )
    unknown = (given < 0) | (given >= classes)
    if unknown.any():
        raise UsageError(
            f"the label {given[unknown][0]} is none of the model's {classes} classes (0 to {classes - 1})",
            "Check that the labels belong to this model and count from 0.",
        )
    return given.astype(np.int64)


def _top(scores: NDArray[Any], none: int) -> NDArray[np.int64]:
    """The class with the largest score, the first of equals; `none` for a sample with NaN, or whose scores are all
    -inf."""
    if not len(scores):
        return np.zeros(0, np.int64)
    unusable = np.isnan(scores).any(axis=1) | (scores == -np.inf).all(axis=1)
    return np.where(unusable, none, scores.argmax(axis=1)).astype(np.int64)


def _entropy(scores: NDArray[Any]) -> Vector:
    """-sum(p ln p) for each sample; p is the softmax of the scores, or the scores where they are probabilities.

    NaN for a sample with NaN or +inf."""
    wide = np.ascontiguousarray(scores, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        powers = np.exp(wide - wide.max(axis=1, keepdims=True, initial=-np.inf))
        given = (wide >= 0).all(axis=1) & (np.abs(wide.sum(axis=1) - 1) < SUMS_TO_ONE)
        parts = np.where(given[:, None], wide, powers)
        shares = parts / parts.sum(axis=1, keepdims=True)
        entropy = np.where(shares == 0, 0.0, -shares * np.log(shares)).sum(axis=1)
    return np.asarray(entropy)


def _accuracy(answers: NDArray[np.int64]) -> Accuracy | None:
    """Of rows of class before, class after and label; None of no rows."""
    if not len(answers):
        return None
    before, after = answers[:, 0] == answers[:, 2], answers[:, 1] == answers[:, 2]
    return Accuracy(
        samples=len(answers),
        before=float(before.mean()),
        after=float(after.mean()),
        gained=int((after & ~before).sum()),
        lost=int((before & ~after).sum()),
    )
