"""Biases in front of a norm that a conversion lost: the norm's mean is still that of what had them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from normdoctor.compared import LayerChange
from normdoctor.comparing.matching import Matches
from normdoctor.comparing.parts import Part
from normdoctor.layers import ArrayRef, NormLayer, Vector, as_vector
from normdoctor.readers.arrays import FLOAT_TYPES

NOTICED = 1e-3
"""Of a standard deviation: a smaller bias is no loss."""


def dropped_biases(earlier: Part, later: Part, matches: Matches, rows: Sequence[LayerChange]) -> tuple[str, ...]:
    """The biases of convolutions and linear layers right in front of a norm, in the order of the file, that are 0 or
    gone on the later side while the norm has the statistics that it had. rows: what became of `matches.pairs`."""
    before, after = (matches.renamed(side, part.tensors) for side, part in enumerate((earlier, later)))
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in before))
    places = {parent: place for place, parent in enumerate(parents)}
    paths = dict(zip(map(id, earlier.layers), earlier.paths, strict=True))
    found = []
    for pair, row in zip(matches.pairs, rows, strict=True):
        place = places.get(paths[id(pair.earlier)].removeprefix(matches.prefixes[0]), 0)
        if not row.still or not place:
            continue
        parent = parents[place - 1]
        weight, name = f"{parent}.weight", f"{parent}.bias"
        kept = weight in before and weight in after and before[weight].shape == after[weight].shape
        if kept and _is_lost(before.get(name), after.get(name), pair.earlier, later):
            found.append(name)
    return tuple(found)


def _is_lost(old: ArrayRef | None, new: ArrayRef | None, norm: NormLayer, later: Part) -> bool:
    shape, var = (norm.channels,), norm.numbers.var
    if old is None or old.shape != shape or old.dtype not in FLOAT_TYPES or var is None:
        return False
    bias = _values(old)
    with np.errstate(all="ignore"):
        if not (np.abs(bias) > NOTICED * np.sqrt(np.abs(var))).any():
            return False
    if new is not None:
        return new.shape == shape and new.dtype in FLOAT_TYPES and not _values(new).any()
    # It may have another name there, as in an export.
    others = (ref for ref in later.others.values() if ref.shape == shape and ref.dtype in FLOAT_TYPES)
    return not any(np.allclose(_values(ref), bias, rtol=1e-2, atol=0.0) for ref in others)


def _values(ref: ArrayRef) -> Vector:
    vector = as_vector(ref)
    assert vector is not None
    return vector
