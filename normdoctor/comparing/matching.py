"""Which norm of one side is which of the other: by name, then by equal values, then by place and agreement."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from normdoctor.compared import Matching
from normdoctor.comparing.parts import Part
from normdoctor.errors import InputError
from normdoctor.layers import ArrayRef, NormLayer, median
from normdoctor.rules.divergence import kullback_leibler

AGREEMENT = 0.5
"""Median divergence in nats, or relative change of gamma, below which layers in the same place are the same."""

MAX_DEPTH = 32
"""Parts of a name that can be a prefix on the other side."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A norm on both sides."""

    earlier: NormLayer
    later: NormLayer
    matched: Matching


@dataclass(frozen=True, eq=False)
class Matches:
    """Pairs in the order of the later side, what is left on each side, and the prefix that a side has beside."""

    pairs: tuple[Pair, ...]
    only: tuple[tuple[NormLayer, ...], tuple[NormLayer, ...]]
    prefixes: tuple[str, str]

    def renamed(self, side: int, tensors: Mapping[str, ArrayRef]) -> dict[str, ArrayRef]:
        """The tensors of a side under the names that both have."""
        return {name.removeprefix(self.prefixes[side]): ref for name, ref in tensors.items()}


def match(earlier: Part, later: Part) -> Matches:
    """Pair the norms of two sides.

    Raises InputError where a name stands for different numbers of channels, and where nothing goes together."""
    prefixes = _prefixes(earlier.paths, later.paths)
    by_name = {path.removeprefix(prefixes[0]): layer for path, layer in zip(earlier.paths, earlier.layers, strict=True)}
    found: dict[int, Pair] = {}
    left: list[NormLayer] = []
    for path, layer in zip(later.paths, later.layers, strict=True):
        other = by_name.pop(path.removeprefix(prefixes[1]), None)
        if other is None:
            left.append(layer)
            continue
        if other.channels != layer.channels:
            raise InputError(
                f"{layer.name} has {other.channels:,} channels in {earlier.side.label} and {layer.channels:,} in "
                f"{later.side.label}",
                "These are different networks, or one of them was pruned: compare checkpoints of the same one.",
            )
        found[id(layer)] = Pair(other, layer, Matching.NAME)
    others = list(by_name.values())
    for pair in (*_by_values(others, left), *_by_order(others, left)):
        if id(pair.later) not in found:
            found[id(pair.later)] = pair
    taken = {id(pair.earlier) for pair in found.values()}
    return Matches(
        pairs=tuple(found[id(layer)] for layer in later.layers if id(layer) in found),
        only=(
            tuple(layer for layer in earlier.layers if id(layer) not in taken),
            tuple(layer for layer in later.layers if id(layer) not in found),
        ),
        prefixes=prefixes,
    )


def _prefixes(earlier: Sequence[str], later: Sequence[str]) -> tuple[str, str]:
    """What the names of one side have in front that those of the other have not: ("", "backbone.")."""
    votes: Counter[tuple[str, str]] = Counter({("", ""): len(set(earlier) & set(later))})
    for prefix, count in _prefixes_of(later, frozenset(earlier)).items():
        votes["", prefix] += count
    for prefix, count in _prefixes_of(earlier, frozenset(later)).items():
        votes[prefix, ""] += count
    return max(votes, key=lambda pair: (votes[pair], -len(pair[0]) - len(pair[1])))


def _prefixes_of(names: Iterable[str], known: frozenset[str]) -> Counter[str]:
    """How many of the names become a known one without each beginning."""
    counts: Counter[str] = Counter()
    for name in names:
        for cut in [found.end() for found in re.finditer(r"\.", name)][:MAX_DEPTH]:
            if name[cut:] in known:
                counts[name[:cut]] += 1
    return counts


def _by_values(earlier: list[NormLayer], later: list[NormLayer]) -> list[Pair]:
    """Layers whose vectors are equal bit for bit and those of no other layer; they are taken off both lists."""
    before = {id(layer): _signature(layer) for layer in earlier} if later else {}
    after = {id(layer): _signature(layer) for layer in later} if earlier else {}
    counts = Counter(before.values()), Counter(after.values())
    by_values = {before[id(layer)]: layer for layer in earlier} if before else {}
    pairs = [
        Pair(by_values[signature], layer, Matching.VALUES)
        for layer in later
        if (signature := after.get(id(layer))) and counts[0][signature] == counts[1][signature] == 1
    ]
    taken = {id(layer) for pair in pairs for layer in (pair.earlier, pair.later)}
    for listed in (earlier, later):
        listed[:] = [layer for layer in listed if id(layer) not in taken]
    return pairs


def _signature(layer: NormLayer) -> bytes:
    """A digest of the values of a layer; nothing where they are those of any other: constant vectors."""
    numbers = layer.numbers
    vectors = [numbers.mean, numbers.var] if numbers.mean is not None and numbers.var is not None else []
    vectors = [vector for vector in vectors or [numbers.gain, numbers.shift] if vector is not None]
    if all(len(vector) < 2 or (vector == vector[0]).all() for vector in vectors):
        return b""
    digest = blake2b(digest_size=16)
    for vector in vectors:
        digest.update(vector.tobytes())
    return digest.digest()


def odd_one(parts: Sequence[Part]) -> int | None:
    """The place of the one side whose statistics are others while those of all the rest are equal bit for bit."""
    held = [b"".join(map(_signature, part.layers)) for part in parts]
    counts = Counter(held)
    if len(parts) < 3 or len(counts) != 2 or 1 not in counts.values():
        return None
    return next(place for place, one in enumerate(held) if counts[one] == 1)


def _by_order(earlier: Sequence[NormLayer], later: Sequence[NormLayer]) -> list[Pair]:
    """The layers that are left one after another, where their channels say that they can be the same and their
    values that they are."""
    if not earlier or [layer.channels for layer in earlier] != [layer.channels for layer in later]:
        return []
    pairs = [Pair(one, other, Matching.ORDER) for one, other in zip(earlier, later, strict=True)]
    apart = [distance for pair in pairs if (distance := _distance(pair)) is not None]
    return pairs if apart and median(np.asarray(apart)) < AGREEMENT else []


def _distance(pair: Pair) -> float | None:
    """Median divergence of the statistics, else the relative change of the gains; None where neither is there."""
    old, new = pair.earlier.numbers, pair.later.numbers
    with np.errstate(all="ignore"):
        if old.mean is not None and old.var is not None and new.mean is not None and new.var is not None:
            z = np.abs(new.mean - old.mean) / np.sqrt(old.var)
            apart = kullback_leibler(z, np.log(new.var / old.var))
            apart = apart[np.isfinite(apart)]
            return median(apart) if apart.size else None
        if pair.earlier.weight is None or pair.later.weight is None:
            return None
        return float(np.linalg.norm(new.gain - old.gain) / np.linalg.norm(old.gain))
