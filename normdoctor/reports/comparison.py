"""How the norms of several models differ: the words and columns that all reports share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from normdoctor.compared import Comparison, ComparisonKind, LayerChange, Motion, Trajectory, WeightsChange
from normdoctor.reports.wording import percent, plural, short

NAMED = 3
"""Sides that are named; of more, the first and the last."""

TINY = 0.001
"""Relative changes below are only told from none."""

BARS = "▁▂▃▄▅▆▇█"

BEGINNINGS = {
    ComparisonKind.CHECKPOINTS: "",
    ComparisonKind.MODELS: "models in the file: ",
    ComparisonKind.RANKS: "ranks of one run: ",
}

COMPARISON_COLUMNS: tuple[tuple[str, str, Callable[[LayerChange], str]], ...] = (
    ("layer", "left", lambda row: row.layer),
    ("stats", "left", lambda row: "" if row.statistics is None else row.statistics.value),
    ("KL", "right", lambda row: "nan" if any(row.broken_on) else _short(row.divergence)),
    ("p95", "right", lambda row: _short(row.divergence_p95)),
    ("z", "right", lambda row: _short(row.shift)),
    ("ln var", "right", lambda row: "" if row.log_ratio is None else f"{_short(row.log_ratio)}"),
    ("gamma", "right", lambda row: _percent(row.gamma)),
    ("beta", "right", lambda row: _percent(row.beta)),
    ("steps", "right", lambda row: "" if row.steps is None else f"{row.steps:+,.0f}" if row.steps else "0"),
)
"""Title, alignment, and what stands in the cell: KL as median and 95th percentile over channels, the shift of
running_mean in standard deviations, the logarithm of the ratio of variances, relative changes of gamma and beta, and
the batches counted between the sides."""


def rows_by_divergence(comparison: Comparison) -> list[LayerChange]:
    """The layers with broken statistics first, then those that changed most; those without statistics last, by their
    gamma."""
    return sorted(comparison.layers, key=lambda row: (not any(row.broken_on), -_of(row.divergence), -_of(row.gamma)))


def changed(row: LayerChange) -> bool:
    """Something in the layer is not what it was."""
    return (
        row.statistics in (Motion.MOVED, Motion.ROUNDED)
        or row.affine in (Motion.MOVED, Motion.ROUNDED)
        or row.other_eps
    )


def _of(value: float | None) -> float:
    return -1.0 if value is None else value


def sides_in_words(comparison: Comparison) -> str:
    """before.pt → after.pt; of many, the first and the last and how many stand between."""
    labels = [side.label for side in comparison.sides]
    if len(labels) > NAMED:
        labels = [labels[0], f"{len(labels) - 2} more", labels[-1]]
    arrow = " | " if comparison.kind is ComparisonKind.RANKS else " -> "
    return BEGINNINGS[comparison.kind] + arrow.join(labels)


def comparison_in_words(comparison: Comparison) -> str:
    """What moved and what did not, in a sentence."""
    tracked = comparison.tracked
    moved = sum(row.statistics is Motion.MOVED for row in tracked)
    parts = []
    if tracked:
        parts.append(f"statistics moved in {moved} of {plural(len(tracked), 'layer')}")
    with_affine = [row for row in comparison.layers if row.affine is not None]
    if with_affine:
        changed = sum(row.affine is Motion.MOVED for row in with_affine)
        parts.append(f"gamma or beta in {changed} of {len(with_affine)}")
    other_eps = sum(row.other_eps for row in comparison.layers)
    if other_eps:
        parts.append(f"another eps in {other_eps} of {len(comparison.layers)}")
    parts.append(weights_in_words(comparison.weights))
    if comparison.missing:
        explained = sum(one.reason is not None for one in comparison.missing)
        words = f"{plural(len(comparison.missing), 'norm')} on one side only"
        parts.append(words + (f", {explained} explained" if explained else ""))
    words = "; ".join(parts) + "."
    return words[:1].upper() + words[1:]


def weights_in_words(change: WeightsChange | None) -> str:
    if change is None:
        return "no other weights of the same names to compare"
    if change.motion is Motion.EQUAL:
        return f"the other {plural(change.tensors, 'weight tensor')} bit-equal"
    if change.motion is Motion.ROUNDED:
        return "the other weights equal but for rounding"
    equal = f", {change.equal} of {plural(change.tensors, 'tensor')} bit-equal" if change.equal else ""
    return f"the other weights moved by {percent(change.relative)}{equal}"


def trajectory_of(row: Trajectory | None, bars: str, largest: float) -> str:
    """A bar for each step, as high as its divergence among all layers; a dot where the statistics stood still.

    Nothing for a layer that not all checkpoints have."""
    if row is None:
        return ""
    drawn = []
    for divergence, still in zip(row.divergence, row.still, strict=True):
        if still or divergence is None:
            drawn.append("." if still else " ")
        else:
            share = divergence / largest if largest > 0 else 0.0
            drawn.append(bars[min(len(bars) - 1, int(share**0.5 * len(bars)))])
    return "".join(drawn)


def trajectories_by_divergence(comparison: Comparison) -> list[Trajectory]:
    """In the order of `rows_by_divergence`."""
    place = {row.layer: number for number, row in enumerate(rows_by_divergence(comparison))}
    return sorted(comparison.trajectories, key=lambda row: place.get(row.layer, len(place)))


def largest_step(rows: Sequence[Trajectory]) -> float:
    return max((one for row in rows for one in row.divergence if one is not None), default=0.0)


def _short(value: float | None) -> str:
    return "" if value is None else short(value)


def _percent(value: float | None) -> str:
    if not value:
        return "" if value is None else "0"
    return percent(value) if value >= TINY else f"<{percent(TINY)}"
