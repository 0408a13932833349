"""How far the statistics of a model moved, over its layers, and whether the data was enough to tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import Enum

from normdoctor.recalibration.records import LayerChange
from normdoctor.rules import rule_of

LITTLE_SHIFT, LITTLE_RATIO = 0.05, 1.1
"""A layer changed little where its median mean moved by less than this share of a standard deviation, and its median
variance by less than this factor."""

FEW_SHARE = 0.1
"""Up to this share of its layers a model that changed little may have that changed more."""

LEAST, ENOUGH = (rule_of("D606").limits[name] for name in ("least", "enough"))
"""Independent values a channel: under these nothing can be said, and small shifts are not seen."""


class Extent(Enum):
    """How much of a model changed."""

    NOTHING = "nothing"
    LITTLE = "little"
    SOME = "some layers"
    MUCH = "much"


def log_ratio(row: LayerChange) -> float:
    """|ln| of the median variance ratio; infinite for one that is no positive number."""
    return abs(math.log(row.ratio)) if math.isfinite(row.ratio) and row.ratio > 0 else math.inf


def size(value: float) -> float:
    """For sorting: what is no number is off without limit."""
    return value if math.isfinite(value) else math.inf


def worst_first(rows: Iterable[LayerChange]) -> list[LayerChange]:
    """Layers by broken channels, then by how far their statistics moved; in the order of forward among equals."""
    return sorted(rows, key=lambda row: (-row.broken, -max(size(row.shift), log_ratio(row)), -size(row.worst_shift)))


def is_little(row: LayerChange) -> bool:
    """Whether the median channel hardly moved, and none held what is no number."""
    return not row.broken and row.shift < LITTLE_SHIFT and log_ratio(row) < math.log(LITTLE_RATIO)


def extent_of(rows: Sequence[LayerChange]) -> Extent:
    """How much changed over all."""
    moved = sum(not is_little(row) for row in rows)
    if not rows:
        return Extent.NOTHING
    if not moved:
        return Extent.LITTLE
    return Extent.SOME if moved <= FEW_SHARE * len(rows) and not broken_channels(rows) else Extent.MUCH


def broken_channels(rows: Iterable[LayerChange]) -> int:
    return sum(row.broken for row in rows)


def median_layer(rows: Sequence[LayerChange]) -> tuple[float, float]:
    """Shift and variance ratio in the middle of all layers, each by itself; the larger of two."""
    shifts, ratios = sorted(size(row.shift) for row in rows), sorted(size(row.ratio) for row in rows)
    return shifts[len(rows) // 2], ratios[len(rows) // 2]


def known_values(rows: Iterable[LayerChange]) -> dict[str, float]:
    """Layer → independent values a channel, where that is known."""
    return {row.layer: row.effective for row in rows if row.effective is not None and math.isfinite(row.effective)}


def scarce_layers(rows: Iterable[LayerChange]) -> int:
    """Layers for which the data holds, as far as known, too few independent values."""
    return sum(values < ENOUGH for values in known_values(rows).values())
