"""Outputs of a model as scores over classes, and how two runs of it compare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def scores_of(outputs: Arrays, samples: int) -> NDArray[Any] | None:
    """The scores over classes, shape (samples, classes): the only float output of that shape, None where none or
    several have it."""
    found = [
        array
        for array in outputs.values()
        if array.ndim == 2 and array.shape[0] == samples and array.shape[1] > 1 and array.dtype.kind == "f"
    ]
    return found[0] if len(found) == 1 else None


def hits(scores: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the largest score is the label's; a sample with NaN misses."""
    finite = np.isfinite(scores).all(axis=1)
    return np.asarray((np.where(finite[:, None], scores, 0).argmax(axis=1) == labels) & finite)


def disagreeing(one: NDArray[Any], other: NDArray[Any]) -> int:
    """How many samples have another largest score; NaN agrees with nothing."""
    finite = np.isfinite(one).all(axis=1) & np.isfinite(other).all(axis=1)
    same = (np.nan_to_num(one).argmax(axis=1) == np.nan_to_num(other).argmax(axis=1)) & finite
    return int((~same).sum())


def changed(before: Arrays, after: Arrays) -> float | None:
    """||after - before|| / ||before|| over all float outputs together; None where there are none."""
    difference = size = 0.0
    for name, array in before.items():
        other = after.get(name)
        if other is None or array.dtype.kind != "f" or array.shape != other.shape:
            continue
        wide = array.astype(np.float64)
        difference += float(np.square(other - wide).sum())
        size += float(np.square(wide).sum())
    if size == 0:
        return None
    return math.sqrt(difference / size) if math.isfinite(difference) and math.isfinite(size) else math.inf
