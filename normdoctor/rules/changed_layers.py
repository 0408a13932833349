"""Layers of a comparison in words and numbers, the same way in every rule about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from normdoctor.compared import Comparison, LayerChange
from normdoctor.layers import median
from normdoctor.rules.wording import names, number, plural


def weights_relative(comparison: Comparison) -> float:
    return comparison.weights.relative if comparison.weights is not None else 0.0


def some_layers(found: Sequence[LayerChange], rows: Sequence[LayerChange]) -> str:
    """5 of 9 layers (bn1, bn2, ...)"""
    return some_names([row.layer for row in found], len(rows))


def some_names(found: Sequence[str], total: int) -> str:
    """The same of names alone."""
    if len(found) == total:
        return f"all {plural(total, 'layer')}" if total > 1 else names(found)
    return f"{len(found)} of {plural(total, 'layer')} ({names(found)})"


def distance_of(rows: Sequence[LayerChange]) -> str:
    """KL 0.02 nats: the median over the layers."""
    return f"KL {number(median(np.array([row.divergence for row in rows if row.divergence is not None])))} nats"


def evidence_of(comparison: Comparison, rows: Sequence[LayerChange]) -> dict[str, object]:
    known = [row.divergence for row in rows if row.divergence is not None]
    return {
        "layers": [row.layer for row in rows],
        "weights_relative": None if comparison.weights is None else comparison.weights.relative,
        "divergence": median(np.array(known)) if known else None,
    }
