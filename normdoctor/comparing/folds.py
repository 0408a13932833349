"""Norms that only one side has → the layer of the other side that took them up, by its values or by its new bias."""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from normdoctor.compared import MissingLayer
from normdoctor.comparing.matching import Matches
from normdoctor.comparing.parts import Part
from normdoctor.comparing.weights import tolerance
from normdoctor.layers import DEFAULT_EPS, ArrayRef, NormLayer, Vector, load
from normdoctor.readers.arrays import FLOAT_TYPES
from normdoctor.rules.guards import usable_eps

_Rows = NDArray[np.float32]
"""A weight as (channels, all else)."""

HEAD = 8
"""Channels by whose lengths most weights are told from another."""

READ_BYTES = 256 << 20
"""Of the weights of both sides together, while folds are looked for by their values; what is beyond goes by name."""

LARGEST_WEIGHT = 64 << 20

CLOSE = 1e-4
"""How far a folded row may be from the old one times its factor, relative: exporters fold in float32."""

EPS = (DEFAULT_EPS, 1e-3)
"""Tried where the file does not say it: torch's default and Keras's."""

NEAR_BY_VALUES, NEAR_BY_NAME = 8, 2
"""Weights on each side of a norm in the file that can have taken it up."""

MOST_LOOKS = 50_000_000
"""Lengths of rows that are compared in all: what is beyond goes by name."""

MOST_ALIKE = 8
"""Weights with rows of the same lengths that are looked at in full."""


def missing_layers(
    earlier: Part, later: Part, matches: Matches, eps: float | None = None
) -> tuple[tuple[MissingLayer, ...], frozenset[str]]:
    """The norms that only one side has, with the reason where one is known, and the layers that they went into.

    eps: stands in where a file does not say it."""
    missing, folded = [], set()
    for side, (owner, other) in enumerate(((earlier, later), (later, earlier))):
        if not matches.only[side]:
            continue
        spare = biases(other)
        spare.subtract(biases(owner))
        paths = dict(zip(map(id, owner.layers), owner.paths, strict=True))
        mine = replace(owner, tensors=matches.renamed(side, owner.tensors))
        theirs = replace(other, tensors=matches.renamed(1 - side, other.tensors))
        foldable = _Foldable(mine, theirs, eps)
        # Where a norm's tensors are still there it was not folded, but is no norm to the reader any more.
        parents = {name.rpartition(".")[0] for name in theirs.tensors}
        for layer in matches.only[side]:
            path = paths[id(layer)].removeprefix(matches.prefixes[side])
            into = foldable.into(path, layer)
            reason = None
            if into is not None:
                reason = f"folded into {into}"
                folded.add(into)
            elif spare[layer.channels] > 0 and path not in parents:
                reason = "probably folded (new bias of that length)"
            if reason is not None:
                spare[layer.channels] -= 1
            missing.append(
                MissingLayer(layer=layer.name, kind=layer.kind.value, channels=layer.channels, side=side, reason=reason)
            )
    return tuple(missing), frozenset(folded)


def biases(part: Part) -> Counter[int]:
    """How many vectors of each length belong to no norm."""
    return Counter(ref.shape[0] for ref in part.others.values() if len(ref.shape) == 1)


@dataclass(frozen=True)
class _Candidates:
    """The weights of one shape that a side has, turned so that the channels in question come first."""

    rows: tuple[_Rows, ...]
    dtypes: tuple[str, ...]
    heads: _Rows
    """Lengths of the first rows of each."""
    close: float


class _Foldable:
    """What the norms of a side can have been folded into: its weights by how many channels they give."""

    def __init__(self, owner: Part, other: Part, eps: float | None) -> None:
        self._tensors, self._other, self._eps = owner.tensors, other.tensors, eps
        self._left, self._looks = READ_BYTES, MOST_LOOKS
        self._places: dict[str, int] = {}
        self._weights: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for place, (name, ref) in enumerate(owner.tensors.items()):
            self._places.setdefault(name.rpartition(".")[0], place)
            if id(ref) not in owner.norm_tensors and len(ref.shape) > 1:
                for channels in set(ref.shape[:2]):
                    self._weights[channels].append((place, name))
        self._theirs: dict[tuple[int, ...], list[ArrayRef]] = defaultdict(list)
        self._vectors: dict[int, list[ArrayRef]] = defaultdict(list)
        for ref in other.tensors.values():
            if id(ref) in other.norm_tensors or ref.dtype not in FLOAT_TYPES:
                continue
            if len(ref.shape) > 1:
                self._theirs[ref.shape].append(ref)
            if ref.shape and math.prod(ref.shape) == max(ref.shape):
                self._vectors[max(ref.shape)].append(ref)
        self._candidates: dict[tuple[tuple[int, ...], int], _Candidates] = {}
        self._mine: dict[tuple[str, int], _Rows | None] = {}

    def into(self, path: str, layer: NormLayer) -> str | None:
        """Which convolution or linear layer took up the norm at `path`; None where that cannot be told.

        By its values: a weight of the other side whose rows are the old ones times gamma / sqrt(var + eps). Else by
        name, where it has a bias there and none here."""
        for name in self._near(path, layer.channels, NEAR_BY_VALUES):
            if self._took_up(name, layer):
                return name.rpartition(".")[0] or name
        for name in self._near(path, layer.channels, NEAR_BY_NAME):
            parent = name.rpartition(".")[0]
            bias = f"{parent}.bias"
            same = name in self._other and self._other[name].shape == self._tensors[name].shape
            if same and bias in self._other and bias not in self._tensors:
                return parent
        return None

    def _near(self, path: str, channels: int, count: int) -> list[str]:
        """The weights that give so many channels: so many in front of the norm, nearest first, then those behind."""
        weights = self._weights.get(channels, [])
        here = bisect(weights, (self._places.get(path, len(self._places)), ""))
        return [name for _, name in [*reversed(weights[max(0, here - count) : here]), *weights[here : here + count]]]

    def _took_up(self, name: str, layer: NormLayer) -> bool:
        """Whether some weight of the other side is this one, with each of its rows times the factor of the norm."""
        ref = self._tensors[name]
        said = usable_eps(layer) or self._eps
        for axis in (0, 1):
            if ref.shape[axis] != layer.channels or ref.dtype not in FLOAT_TYPES:
                continue
            old = self._old(name, axis)
            theirs = self._alike(ref.shape, axis)
            self._looks -= theirs.heads.size
            if old is None or not theirs.rows or self._looks < 0:
                continue
            for eps in (said,) if said is not None else EPS:
                factor = layer.numbers.scale(eps)
                if not np.isfinite(factor).all():
                    continue
                for number in _alike(theirs, old, factor):
                    close = _close(theirs.dtypes[number], ref.dtype)
                    if not _is_scaled(old, theirs.rows[number], factor, close):
                        continue
                    # Behind a weight the shift goes into a bias of as many channels; in front of it, into any.
                    if axis == 1 or self._has_bias(name, layer, factor, close):
                        return True
        return False

    def _has_bias(self, name: str, layer: NormLayer, factor: Vector, close: float) -> bool:
        """Whether the other side has the bias that the fold gives: (bias - mean) * factor + beta."""
        ref = self._tensors.get(f"{name.rpartition('.')[0]}.bias")
        old = np.zeros(layer.channels)
        if ref is not None and ref.shape == (layer.channels,) and ref.dtype in FLOAT_TYPES:
            old = np.asarray(ref.numpy(), dtype=np.float64)
        mean = layer.numbers.mean
        moved = old if mean is None else old - mean
        wanted = moved * factor + layer.numbers.shift
        size = np.abs(moved * factor) + np.abs(layer.numbers.shift)
        for vector in self._vectors[layer.channels]:
            found = np.asarray(vector.numpy(), dtype=np.float64).reshape(-1)
            if (np.abs(found - wanted) <= close * (size + size.max(initial=0.0))).all():
                return True
        return False

    def _old(self, name: str, axis: int) -> _Rows | None:
        key = (name, axis)
        if key not in self._mine:
            self._mine[key] = self._rows(self._tensors[name], axis)
        return self._mine[key]

    def _alike(self, shape: tuple[int, ...], axis: int) -> _Candidates:
        """The other side's weights of this shape; of matrices, also those that are stored the other way round."""
        key = (shape, axis)
        if key not in self._candidates:
            found = [(ref, self._rows(ref, axis)) for ref in self._theirs.get(shape, ())]
            if len(shape) == 2 and shape[0] != shape[1]:
                found += [(ref, self._rows(ref, 1 - axis)) for ref in self._theirs.get(shape[::-1], ())]
            read = [(ref.dtype, rows) for ref, rows in found if rows is not None]
            with np.errstate(all="ignore"):
                heads = [np.linalg.norm(rows[:HEAD], axis=1) for _, rows in read]
            self._candidates[key] = _Candidates(
                close=_close(*{ref.dtype for ref, _ in found}),
                rows=tuple(rows for _, rows in read),
                dtypes=tuple(dtype for dtype, _ in read),
                heads=np.stack(heads) if heads else np.zeros((0, 0), dtype=np.float32),
            )
        return self._candidates[key]

    def _rows(self, ref: ArrayRef, axis: int) -> _Rows | None:
        """The weight as (channels, all else); None beyond what is read."""
        size = 4 * math.prod(ref.shape)
        if size > min(LARGEST_WEIGHT, self._left):
            return None
        self._left -= size
        with np.errstate(all="ignore"):
            values = np.moveaxis(np.asarray(load(ref), dtype=np.float32), axis, 0)
        return np.ascontiguousarray(values.reshape(ref.shape[axis], -1))


def _close(*dtypes: str) -> float:
    return max(CLOSE, 2 * tolerance(*dtypes))


def _alike(theirs: _Candidates, old: _Rows, factor: Vector) -> Iterator[int]:
    """Which of the weights have rows as long as they would be, by the first of them."""
    with np.errstate(all="ignore"):
        wanted = np.linalg.norm(old[:HEAD], axis=1) * np.abs(factor[:HEAD])
        off = np.abs(theirs.heads - wanted)
        near = (off <= 4 * theirs.close * wanted.max(initial=0.0)).all(axis=1)
    yield from map(int, np.flatnonzero(near)[:MOST_ALIKE])


def _is_scaled(old: _Rows, new: _Rows, factor: Vector, close: float) -> bool:
    """Each row of `new` is that of `old` times its factor, and not every one of them is 0."""
    if old.shape != new.shape:
        return False
    with np.errstate(all="ignore"):
        wanted = old * factor.astype(np.float32)[:, None]
        lengths = np.linalg.norm(wanted, axis=1)
        off = np.linalg.norm(new - wanted, axis=1)
        return bool(lengths.any() and (off <= close * (lengths + 1e-3 * lengths.max())).all())
