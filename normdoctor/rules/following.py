"""X: running statistics that did not follow the weights, between checkpoints or in an average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from normdoctor.compared import Comparison, ComparisonKind, Motion, Trajectory
from normdoctor.findings import MEASURE_ANEW, Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, median
from normdoctor.rules.changed_layers import distance_of, evidence_of, some_layers, some_names, weights_relative
from normdoctor.rules.wording import names, number, percent, plural

SEVERAL = 3
"""Layers of which a recalibration does not move just one."""


@rule(
    "X001",
    "buffers-behind-weights",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    scope=Scope.COMPARISON,
    why="Statistics of other weights make eval another function than the one that was trained.",
    fix=f"if the norms were not kept in eval mode on purpose: {MEASURE_ANEW}",
    reference="https://github.com/pytorch/ignite/issues/2590",
    # Healthy averages of small nets, early and late in training: KL of 0.3 to 2.6 times the weights' change squared.
    limits={"behind": 0.05, "excess": 10.0, "counted": 0.5},
)
def buffers_behind_weights(comparison: Comparison, context: Context) -> Iterator[Observation]:
    """The weights moved from one side to the other and the running statistics did not, or the other way round.

    Between checkpoints: statistics that are equal bit for bit beside weights that moved. Error where the counter
    rose all the same: batches went through in training mode, so the buffers are old ones or momentum was 0. A
    warning where gamma and beta moved: either the norms were in eval mode, and all is well, or the weights were
    averaged or loaded without their buffers. Info where gamma and beta stood still as well: frozen by design.

    In a model and its average: error where the average still has the buffers it was created with. Warning where
    most layers are further apart than `behind` nats and than `excess` times the square of the weights' relative
    change, and the average's counter stopped before half of the model's (`counted`; info where it did not). Most
    averages copy the model's buffers or average them too; that is as it should be, and at most an info.

    The reverse, statistics that moved beside equal weights, is what a recalibration leaves (info); an error where they
    went back to the 0 and 1 of a new layer. A warning where no recalibration does it: the same numbers in another
    order, or a single layer of several that moved.

    Whatever the weights did: error where statistics are not finite on the later side alone (info on the earlier). A
    warning where a bias in front of a norm became 0 or is gone and the mean that contains it stayed.

    Example: an average over 444 steps with the buffers it was created with: KL 0.25 nats in the median layer.
    """
    if comparison.kind is ComparisonKind.MODELS:
        yield from _of_average(comparison, context)
    if comparison.kind is not ComparisonKind.CHECKPOINTS:
        return
    yield from _broken(comparison)
    if comparison.dropped_biases:
        yield _without_biases(comparison)
    if comparison.weights_moved is not None:
        yield from _left_behind(comparison) if comparison.weights_moved else _measured_anew(comparison)


def _broken(comparison: Comparison) -> Iterator[Observation]:
    """Statistics that one side alone has as NaN, infinity or a negative variance."""
    rows = comparison.tracked
    for side in (1, 0):
        broken = [row for row in rows if row.broken_on[side] > row.broken_on[1 - side]]
        if not broken:
            continue
        here, there = comparison.sides[-side].label, comparison.sides[side - 1].label
        count = sum(row.broken_on[side] for row in broken)
        yield Observation(
            message=f"running_mean or running_var is NaN, infinite or below 0 in {plural(count, 'channel')} of "
            f"{here}, in {some_layers(broken, rows)}, where {there} has numbers"
            f"{'.' if side else ': repaired?'}",
            evidence=evidence_of(comparison, broken) | {"channels": count},
            severity=Severity.ERROR if side else Severity.INFO,
            confidence=Confidence.HIGH,
            fix=f"find the batch that did it; take the statistics of {there}, or: {MEASURE_ANEW}" if side else "none",
            subject="broken" if side else "repaired",
            rank=float(count),
        )


def _without_biases(comparison: Comparison) -> Observation:
    biases = comparison.dropped_biases
    verb = "is" if len(biases) == 1 else "are"
    return Observation(
        message=f"{names(biases)} {verb} 0 or gone in {comparison.sides[-1].label}, and the norms behind still "
        f"subtract the mean with {'it' if len(biases) == 1 else 'them'}: a conversion that dropped biases?",
        evidence={"biases": list(biases)},
        confidence=Confidence.HIGH,
        fix=f"take the biases of {comparison.sides[0].label} over, or subtract them from running_mean",
        subject="biases",
        rank=float(len(biases)),
    )


def _left_behind(comparison: Comparison) -> Iterator[Observation]:
    """Statistics that stand still while the weights go on, by what the rest of the layer did."""
    rows = comparison.tracked
    still = [row for row in rows if row.still and not all(row.as_created)]
    counted = [row for row in still if (row.steps or 0.0) > 0]
    unfrozen = [row for row in still if row not in counted and row.affine is Motion.MOVED]
    frozen = [row for row in still if row not in counted and row.affine is not Motion.MOVED]
    moved = f"The other weights moved by {percent(weights_relative(comparison))}"
    if counted:
        steps = median(np.array([row.steps or 0.0 for row in counted]))
        yield Observation(
            message=f"{moved} and {number(steps)} batches were counted, but running_mean and running_var are the "
            f"same in {some_layers(counted, rows)}: buffers of an earlier state, or a momentum of 0.",
            evidence=evidence_of(comparison, counted),
            severity=Severity.ERROR,
            confidence=Confidence.HIGH,
            fix=f"take training data, then: {MEASURE_ANEW}",
            subject="counted",
            rank=float(len(counted)),
        )
    if unfrozen:
        cause, fix = _average_of(comparison)
        yield Observation(
            message=f"{moved}, gamma and beta too, but running_mean and running_var are the same in "
            f"{some_layers(unfrozen, rows)}: {cause}.",
            evidence=evidence_of(comparison, unfrozen),
            fix=fix,
            subject="still",
            rank=float(len(unfrozen)),
        )
    folded = any(one.reason is not None for one in comparison.missing)  # that moves weights by itself
    if frozen and not folded:
        yield Observation(
            message=f"{moved}; {some_layers(frozen, rows)} stood still with gamma, beta and statistics: frozen by "
            "design?",
            evidence=evidence_of(comparison, frozen),
            severity=Severity.INFO,
            subject="frozen",
            fix="none if these norms are frozen on purpose",
        )


def _average_of(comparison: Comparison) -> tuple[str, str | None]:
    """Why the weights went on and the buffers did not, and the fix if it is not the usual one: one side may be an
    average of the other, in either order."""
    first, last = comparison.sides[0], comparison.sides[-1]
    if (first.averaged is None) == (last.averaged is None):
        return "kept in eval mode while training, or averaged or loaded without their buffers", None
    average, model = (last, first) if first.averaged is None else (first, last)
    return (
        f"{average.label} is an average ({average.averaged}) with the buffers of {model.label}, not with its own",
        f"nothing for {model.label}; before {average.label} is used: "
        + (MEASURE_ANEW if average is last else f"normdoctor recalibrate {average.label}, with training data"),
    )


def _measured_anew(comparison: Comparison) -> Iterator[Observation]:
    """Statistics that moved beside weights that did not."""
    rows = comparison.tracked
    reset = [row for row in rows if row.as_created == (False, True)]
    if reset:
        yield Observation(
            message=f"The weights are equal, and running_mean and running_var went back to the 0 and 1 of a new layer "
            f"in {some_layers(reset, rows)}: reset, and not measured anew.",
            evidence=evidence_of(comparison, reset),
            severity=Severity.ERROR,
            confidence=Confidence.HIGH,
            fix=f"take the statistics of {comparison.sides[0].label}, or: {MEASURE_ANEW}",
            subject="reset",
        )
    moved = [row for row in rows if row.statistics is Motion.MOVED and row not in reset and row.broken_on == (0, 0)]
    reordered = [row for row in moved if row.reordered]
    if reordered:
        yield Observation(
            message=f"The weights are equal, and running_mean and running_var are the same numbers in another order in "
            f"{some_layers(reordered, rows)}: no recalibration does that.",
            evidence=evidence_of(comparison, reordered),
            severity=Severity.WARNING,
            confidence=Confidence.HIGH,
            fix=f"take the statistics of the side whose order belongs to the weights ({comparison.sides[0].label}, if "
            "it is the original)",
            subject="reordered",
        )
    moved = [row for row in moved if not row.reordered]
    if not moved:
        return
    equal = comparison.weights is not None and comparison.weights.motion is Motion.EQUAL
    weights = "bit-equal" if equal else "equal but for rounding"
    counted = [row.steps for row in moved if (row.steps or 0.0) > 0]
    if len(moved) == 1 and len(rows) >= SEVERAL and not reordered and not reset:
        yield Observation(
            message=f"The weights are {weights}, and statistics moved only in {moved[0].layer} of {len(rows)} layers, "
            f"by {distance_of(moved)} in the median: a recalibration goes over all of them; the buffers of another "
            "state?",
            evidence=evidence_of(comparison, moved),
            severity=Severity.WARNING,
            fix=f"if that was not on purpose: {MEASURE_ANEW}",
            subject="alone",
        )
        return
    how = "measured anew, or the buffers of another state."
    if counted and not any(row.affine is Motion.MOVED for row in moved):
        how = f"{number(median(np.array(counted)))} batches went through in training mode: {how}"
    yield Observation(
        message=f"Statistics moved in {some_layers(moved, rows)}, by {distance_of(moved)} in the median; the weights "
        f"are {weights}: {how}",
        evidence=evidence_of(comparison, moved),
        severity=Severity.INFO,
        confidence=Confidence.HIGH,
        subject="recalibrated",
        fix="none if they were measured anew on purpose",
    )


def _of_average(comparison: Comparison, context: Context) -> Iterator[Observation]:
    """The buffers of an average against those of the model beside it."""
    rows = comparison.tracked
    model, average = (side.label for side in comparison.sides[:2])
    created = [row for row in rows if row.as_created == (False, True)]
    if created:
        yield Observation(
            message=f"{average} still has the buffers it was created with in {some_layers(created, rows)}, mean 0 and "
            f"variance 1, and {model} has others: the average was taken without them.",
            evidence=evidence_of(comparison, created),
            severity=Severity.ERROR,
            confidence=Confidence.HIGH,
            fix=f"copy the buffers of {model} into {average} when saving, or: {MEASURE_ANEW}",
            subject="created",
        )
        return
    copied = [row for row in rows if row.statistics is Motion.EQUAL]
    if copied and comparison.weights_moved:
        yield Observation(
            message=f"{average} has the buffers of {model}, bit for bit, in {some_layers(copied, rows)}, beside "
            f"weights that differ by {percent(weights_relative(comparison))}: copied, as most implementations do.",
            evidence=evidence_of(comparison, copied),
            severity=Severity.INFO,
            confidence=Confidence.HIGH,
            fix="none as long as the average stays near the model",
            subject="copied",
        )
    limits = context.limits
    usual = max(limits["behind"], limits["excess"] * weights_relative(comparison) ** 2)
    behind = [row for row in rows if row.statistics is Motion.MOVED and (row.divergence or 0.0) > usual]
    stopped = [row for row in behind if row.updates[0] and (row.updates[1] or 0.0) < limits["counted"] * row.updates[0]]
    if 2 * len(stopped) > len(rows):
        counted = [f"{median(np.array([row.updates[side] or 0.0 for row in stopped])):,.0f}" for side in (1, 0)]
        yield Observation(
            message=f"{average} has other statistics than {model} in {some_layers(stopped, rows)}, by "
            f"{distance_of(stopped)} in the median, and its counter stopped at {' of '.join(counted)}: the "
            "buffers are those of an early state.",
            evidence=evidence_of(comparison, stopped),
            fix=f"copy the buffers of {model} into {average} when saving, or: {MEASURE_ANEW}",
            subject="behind",
        )
    elif 2 * len(behind) > len(rows):
        yield Observation(
            message=f"{average} has other statistics than {model} in {some_layers(behind, rows)}, by "
            f"{distance_of(behind)} in the median: an average over a long way, or buffers of another state.",
            evidence=evidence_of(comparison, behind),
            severity=Severity.INFO,
            subject="apart",
        )


@rule(
    "X005",
    "stopped-following",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    scope=Scope.COMPARISON,
    why="From that step on eval uses statistics of weights that are no longer there.",
    fix=f"find what put the norms into eval mode there; if that was not on purpose: {MEASURE_ANEW}",
    reference="https://github.com/pytorch/pytorch/issues/4741",
    limits={"gap": 0.001},
)
def stopped_following(comparison: Comparison, context: Context) -> Iterator[Observation]:
    """Over three or more checkpoints: the step after which statistics stand still while the weights go on.

    They moved before, so the layer was in training mode then. Only steps in which the weights moved by more than
    `gap`, relative, count. Error where the counter goes on rising: then not eval mode but something else kept the
    buffers. Not where counters fall from one checkpoint to the next: these are not in the order of the training.

    Harmless where the norms are frozen for the last epochs on purpose, as quantisation-aware training does.

    Example: of five epochs the statistics moved in two, for model.eval() after the second was never undone.
    """
    if comparison.falling:  # no order to stop in
        return
    limits = context.limits
    steps = [
        step is not None and step.motion is Motion.MOVED and step.relative > limits["gap"] for step in comparison.steps
    ]
    groups: dict[tuple[int, bool], list[Trajectory]] = {}
    for row in comparison.trajectories:
        last = _last_moved(row, steps)
        if last is not None:
            rose = (row.updates[-1] or 0.0) > (row.updates[last + 1] or 0.0)
            groups.setdefault((last + 1, rose), []).append(row)
    for (place, rose), rows in sorted(groups.items()):
        counted = "the counter goes on all the same" if rose else "the counter stands still or is not there"
        total = sum(any(still is not None for still in row.still) for row in comparison.trajectories)
        yield Observation(
            message=f"The statistics of {some_names([row.layer for row in rows], total)} stand still after "
            f"{comparison.sides[place].label} while the weights go on; {counted}.",
            evidence={"layers": [row.layer for row in rows], "checkpoint": comparison.sides[place].label},
            severity=Severity.ERROR if rose else None,
            subject=f"{place}",
            rank=float(len(rows)),
        )


def _last_moved(row: Trajectory, weights_moved: Sequence[bool]) -> int | None:
    """The last step in which the statistics moved, if the weights went on after it and they stood still."""
    moved = [place for place, still in enumerate(row.still) if still is False]
    if not moved:
        return None
    after = row.still[moved[-1] + 1 :]
    went_on = any(weights_moved[moved[-1] + 1 :])
    return moved[-1] if after and went_on and all(still is True for still in after) else None


RULES: tuple[Rule, ...] = (buffers_behind_weights, stopped_following)
