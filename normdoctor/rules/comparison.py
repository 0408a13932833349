"""X: what else differs between checkpoints of one network: ranks, frozen norms, missing layers, eps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from normdoctor.compared import Comparison, ComparisonKind, LayerChange, MissingLayer, Motion
from normdoctor.findings import MEASURE_ANEW, Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, median
from normdoctor.rules.changed_layers import distance_of, evidence_of, some_layers
from normdoctor.rules.wording import names, number, percent, plural

NOTICED_GAIN = 0.001
"""Relative change of one channel's gain that an eps is mentioned for."""


@rule(
    "X002",
    "ranks-differ",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    scope=Scope.COMPARISON,
    why="Each process kept statistics of its own part of the data, and only those of one are saved.",
    fix=f"train with SyncBatchNorm or average the buffers before saving; for this file: {MEASURE_ANEW}",
    reference="https://github.com/open-mmlab/mmdetection/issues/2539",
    limits={"noise": 0.01},
)
def ranks_differ(comparison: Comparison, context: Context) -> Iterator[Observation]:
    """The processes of one data-parallel training have equal weights and other running statistics.

    DistributedDataParallel keeps weights together by their gradients, buffers only where broadcast_buffers is on
    and a forward pass follows. Info up to a median divergence of `noise` in nats in the worst layer: that much the
    moving averages over different batches differ anyway. Above it the processes saw different data, and the saved
    rank is not the model that was validated. Of three ranks or more, one that differs from all the others, which agree
    bit for bit, is named. Always a warning: the same numbers in another order, NaN.

    Example: two ranks of a digits net, one of which saw only half of the classes: KL 0.022 nats in the last norm,
    and 0.0004 where both saw all of them.
    """
    if comparison.kind is not ComparisonKind.RANKS:
        return
    rows = comparison.tracked
    moved = [row for row in rows if row.statistics is Motion.MOVED]
    if not moved:
        return
    worst = max(moved, key=lambda row: row.divergence or 0.0)
    reordered = all(row.reordered for row in moved)
    noise = (worst.divergence or 0.0) <= context.limits["noise"]
    cause = "no more than averages over other batches do" if noise else "more than averages over other batches do"
    if any(any(row.broken_on) for row in moved):
        noise, cause = False, "and they are no numbers on one side"
    elif reordered:
        noise, cause = False, "the same numbers in another order"
    if comparison.odd is not None:
        odd = comparison.sides[comparison.odd].label
        sound = comparison.sides[comparison.odd == 0].label
        yield Observation(
            message=f"{odd} alone has other statistics, in {some_layers(moved, rows)}; the other "
            f"{len(comparison.sides) - 1} ranks agree bit for bit. {worst.layer} by KL "
            f"{number(worst.divergence or 0.0)} nats, {cause}.",
            evidence=evidence_of(comparison, moved) | {"odd": odd},
            severity=Severity.INFO if noise else None,
            fix=f"nothing for the others; for {odd} take the buffers of {sound}",
        )
        return
    yield Observation(
        message=f"{plural(len(comparison.sides), 'rank')} with equal weights have other statistics in "
        f"{some_layers(moved, rows)}; {worst.layer} by KL {number(worst.divergence or 0.0)} nats, {cause}.",
        evidence=evidence_of(comparison, moved),
        severity=Severity.INFO if noise else None,
    )


@rule(
    "X003",
    "frozen-but-moving",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    scope=Scope.COMPARISON,
    why="A norm that only lost its gradients still follows each batch, so the frozen part of the network drifts.",
    fix="call eval() on the frozen norms after every model.train(), or use FrozenBatchNorm2d",
    reference="https://github.com/pytorch/pytorch/issues/86590",
)
def frozen_but_moving(comparison: Comparison, context: Context) -> Iterator[Observation]:
    """gamma and beta are equal bit for bit while the counter rose and the statistics moved.

    requires_grad = False freezes gamma and beta only. In training mode the layer still normalises by the batch and
    writes its statistics. Said only where other weights moved, so not of a recalibration.

    Harmless where just that is wanted: adapting the statistics to new data (AdaBN). Example: all gammas
    and betas frozen for 40 steps on inverted images: KL 0.11 nats in the median layer.
    """
    if comparison.kind is not ComparisonKind.CHECKPOINTS:
        return
    rows = comparison.tracked
    found = [
        row for row in rows if row.affine is Motion.EQUAL and row.statistics is Motion.MOVED and (row.steps or 0.0) > 0
    ]
    others = [row for row in comparison.layers if row.affine is Motion.MOVED]
    if not found or not (comparison.weights_moved or others):
        return
    steps = median(np.array([row.steps or 0.0 for row in found]))
    yield Observation(
        message=f"gamma and beta are bit-equal in {some_layers(found, rows)}, but {number(steps)} batches were "
        f"counted there and the statistics moved by {distance_of(found)} in the median: frozen, and not in eval mode.",
        evidence=evidence_of(comparison, found),
        rank=float(len(found)),
    )


@rule(
    "X004",
    "layer-missing",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    scope=Scope.COMPARISON,
    why="A norm that is not loaded stays at its initial values, and strict=False does not say so.",
    fix="load with strict=True, which says what is missing",
    reference="https://github.com/pytorch/pytorch/issues/16793",
)
def layer_missing(comparison: Comparison, context: Context) -> Iterator[Observation]:
    """A norm, or its running statistics, is on one side only.

    Info where the reason shows: the other side has the weight near it times gamma / sqrt(running_var + eps), and the
    bias that belongs to it, or a new bias at that place: the norm was folded. Renamed norms are matched by their
    values or their place, and are not missing.

    Harmless between an architecture and a changed one. Example: an export folded 5 of 5 norms, each into the
    convolution in front of it.
    """
    for explained in (False, True):
        for side in (0, 1):
            found = [one for one in comparison.missing if one.side in _sides(comparison, side)]
            found = [one for one in found if (one.reason is not None) is explained]
            if found:
                yield _missing(comparison, found, side, explained)
    for side, word in ((0, "only the first"), (1, "only the last")):
        lost = [row for row in comparison.layers if _lost_statistics(row, side)]
        if lost:
            yield Observation(
                message=f"{some_layers(lost, comparison.layers)} have running statistics in "
                f"{comparison.sides[-side].label} ({word} of the sides) and none in the other.",
                evidence={"layers": [row.layer for row in lost]},
                subject=f"statistics {side}",
                rank=float(len(lost)),
            )


def _sides(comparison: Comparison, side: int) -> range:
    """The places that count as the first or the last side."""
    return range(1) if side == 0 else range(1, len(comparison.sides))


def _lost_statistics(row: LayerChange, side: int) -> bool:
    return row.has_statistics[side] and not row.has_statistics[1 - side]


def _missing(comparison: Comparison, found: Sequence[MissingLayer], side: int, explained: bool) -> Observation:
    here, there = comparison.sides[-side].label, comparison.sides[side - 1].label
    listed = names([one.layer for one in found])
    if explained:
        return Observation(
            message=f"{plural(len(found), 'norm')} of {here} {_verb(found)} not in {there}: {_reasons(found)}.",
            evidence={"layers": [one.layer for one in found], "reasons": [one.reason for one in found]},
            severity=Severity.INFO,
            fix="none if the norms were folded on purpose",
            subject=f"explained {side}",
        )
    return Observation(
        message=f"{plural(len(found), 'norm')} of {here} {_verb(found)} not in {there}, and nothing there explains it: "
        f"{listed}.",
        evidence={"layers": [one.layer for one in found]},
        subject=f"missing {side}",
        rank=float(len(found)),
    )


def _reasons(found: Sequence[MissingLayer]) -> str:
    """bn1 folded into conv1, bn2 folded into conv2; one reason that all share is said once."""
    shared = {one.reason for one in found}
    if len(shared) == 1:
        return f"{shared.pop()} ({names([one.layer for one in found])})"
    return names([f"{one.layer} {one.reason}" for one in found])


def _verb(found: Sequence[MissingLayer]) -> str:
    return "is" if len(found) == 1 else "are"


@rule(
    "X006",
    "eps-changed",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    scope=Scope.COMPARISON,
    why="Every output of the layer is scaled by a factor that it was not trained with.",
    fix="give the converted layer the eps of the original",
    reference="https://github.com/pytorch/vision/issues/648",
    limits={"gain": 0.01},
)
def eps_changed(comparison: Comparison, context: Context) -> Iterator[Observation]:
    """The same norm has another eps on the other side, and that changes what it computes.

    The factor 1 / sqrt(running_var + eps) changes by more than `gain` in the median channel; info where it is
    less, and a channel changes by 0.1 % or more. Frameworks have other
    defaults (torch 1e-5, Keras 1e-3), and converters forget to carry it over.

    Harmless where variances are far above both. Example: eps 1e-5 became 1e-3 in a layer with variances of 0.01: all
    outputs 4.6 % smaller.
    """
    found = [row for row in comparison.layers if abs(row.gain_by_eps or 0.0) > context.limits["gain"]]
    if not found:
        yield from _little_by_eps(comparison)
        return
    worst = max(found, key=lambda row: abs(row.gain_by_eps or 0.0))
    change = worst.gain_by_eps or 0.0
    side = "larger" if change > 0 else "smaller"
    yield Observation(
        message=f"eps differs in {some_layers(found, comparison.layers)}: {worst.layer} has {worst.eps[1]:g} after "
        f"{worst.eps[0]:g}, which makes its median channel {percent(abs(change))} {side}.",
        evidence={"layers": [row.layer for row in found], "gain_by_eps": change},
        rank=abs(change),
    )


def _little_by_eps(comparison: Comparison) -> Iterator[Observation]:
    """Another eps that changes the outputs by less than what is worth a warning."""
    found = [row for row in comparison.layers if row.other_eps and row.gain_by_eps is not None]
    if not any(abs(row.gain_by_eps_worst or 0.0) >= NOTICED_GAIN for row in found):
        return
    usual = median(np.array([abs(row.gain_by_eps or 0.0) for row in found]))
    worst = max(found, key=lambda row: abs(row.gain_by_eps_worst or 0.0))
    eps = sorted({f"{row.eps[1]:g} after {row.eps[0]:g}" for row in found})
    yield Observation(
        message=f"eps differs in {some_layers(found, comparison.layers)} ({names(eps)}): it changes the median channel "
        f"by {percent(usual)}, and one of {worst.layer} by {percent(abs(worst.gain_by_eps_worst or 0.0))}.",
        evidence={"layers": [row.layer for row in found], "gain_by_eps": usual},
        severity=Severity.INFO,
        subject="little",
        rank=usual,
    )


@rule(
    "X007",
    "statistics-jumped",
    severity=Severity.INFO,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    scope=Scope.COMPARISON,
    why="Statistics go as far as that only when the inputs are others: other data, or data prepared otherwise.",
    fix="compare the preprocessing of both trainings; then `normdoctor inspect` with data of each",
    reference="https://arxiv.org/abs/1603.04779",
    limits={"weights": 0.05, "divergence": 0.5},
)
def statistics_jumped(comparison: Comparison, context: Context) -> Iterator[Observation]:
    """The weights hardly moved, and the statistics of some layers are far away.

    The other weights moved by less than `weights`, relative, and the median channel of a layer by more than
    `divergence` nats. Fine-tuning on other data does that by right; so does a scale forgotten in the preprocessing
    (then the first layer alone, for it normalises the inputs of the others), or buffers loaded from another file.

    Example: 30 small steps on inputs three times as large: weights 0.07 % apart, KL 2.8 nats in the first layer
    and below 0.001 in the others.
    """
    change = comparison.weights
    if comparison.kind is not ComparisonKind.CHECKPOINTS or change is None or change.motion is not Motion.MOVED:
        return
    rows = comparison.tracked
    far = [row for row in rows if (row.divergence or 0.0) > context.limits["divergence"]]
    if not far or change.relative > context.limits["weights"]:
        return
    worst = max(far, key=lambda row: row.divergence or 0.0)
    yield Observation(
        message=f"The weights moved by {percent(change.relative)}, and the statistics far in {some_layers(far, rows)}; "
        f"{worst.layer}: {number(worst.shift or 0.0)} standard deviations, variance times "
        f"{number(float(np.exp(min(worst.log_ratio or 0.0, 700.0))))}.",
        evidence=evidence_of(comparison, far),
    )


RULES: tuple[Rule, ...] = (
    ranks_differ,
    frozen_but_moving,
    layer_missing,
    eps_changed,
    statistics_jumped,
)
