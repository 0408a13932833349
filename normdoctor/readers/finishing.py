"""The last steps that every reader shares: tied layers joined, paths shortened, gains settled → a Model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from normdoctor.errors import InputError
from normdoctor.layers import Model, NearMiss, NormKind, NormLayer, as_vector, median

MAX_NAME_BYTES = 64 << 20
MAX_VALUES = 1 << 25
"""What the names in a file and the values of its norm layers may come to; the largest models need a tenth."""


class Budget:
    """Counts what the names and the norm layers of one file take.

    A pickle can give one long key, one table of tensors, or one number seen with stride 0 to any number of
    modules at next to no cost of its own."""

    def __init__(self) -> None:
        self._name_bytes = MAX_NAME_BYTES
        self._values = MAX_VALUES

    def spend_names(self, characters: int, names: int = 1) -> None:
        """Raises InputError when more is spent than any model needs."""
        self._name_bytes -= characters + 64 * names
        self._check(self._name_bytes, "the names of its tensors and modules")

    def spend_values(self, layers: Iterable[NormLayer]) -> None:
        """Raises InputError when the layers have more values than those of any model."""
        self._values -= sum(layer.channels + sum(layer.lengths.values()) for layer in layers)
        self._check(self._values, "the values of its norm layers")

    def _check(self, left: int, what: str) -> None:
        if left < 0:
            raise InputError(
                f"{what} take more memory than those of any model",
                "The file is damaged or was made to exhaust memory; do not load it.",
            )


COMMON_PREFIXES = ("model", "net")
"""Path components that are dropped for matching when every name of a model begins with them."""


def finish(
    key: str | None,
    layers: Iterable[NormLayer],
    *,
    near_misses: Iterable[NearMiss] = (),
    averaged: str | None = None,
    budget: Budget | None = None,
) -> Model:
    """A Model of these layers: tied ones joined, paths shortened for matching, zero-centred gains settled.

    Raises InputError where they hold more values than the norm layers of any model."""
    tied = join_tied(list(layers))
    (budget or Budget()).spend_values(tied)
    joined = settle_gains(shorten_paths(tied))
    return Model(key=key, layers=tuple(joined), near_misses=tuple(near_misses), averaged=averaged)


def join_tied(layers: Sequence[NormLayer]) -> list[NormLayer]:
    """One layer for each set of layers whose tensors are all the same memory; the other names as aliases."""
    by_tensors: dict[Hashable, int] = {}
    aliases: dict[int, list[str]] = defaultdict(list)
    result: list[NormLayer] = []
    for layer in layers:
        refs = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        identity = tuple(None if ref is None else ref.identity for ref in refs)
        if any(identity) and identity in by_tensors:
            aliases[by_tensors[identity]].append(layer.name)
            continue
        by_tensors[identity] = len(result)
        result.append(layer)
    return with_aliases(result, aliases)


def with_aliases(layers: Sequence[NormLayer], aliases: Mapping[int, Sequence[str]]) -> list[NormLayer]:
    """The layers, each with the further names given for its place."""
    return [
        replace(layer, aliases=(*layer.aliases, *aliases[place])) if place in aliases else layer
        for place, layer in enumerate(layers)
    ]


def shorten_paths(layers: Sequence[NormLayer]) -> list[NormLayer]:
    """Drop a leading `model.` or `net.` from the paths where all of them have it."""
    for prefix in COMMON_PREFIXES:
        if len(layers) > 1 and all(layer.path.startswith(prefix + ".") for layer in layers):
            return [replace(layer, path=layer.path.removeprefix(prefix + ".")) for layer in layers]
    return list(layers)


GAIN_ONLY = frozenset({NormKind.RMS, NormKind.LAYER_OR_RMS})


def settle_gains(layers: Sequence[NormLayer]) -> list[NormLayer]:
    """Decide for norms with a gain alone whether weight means gamma or gamma - 1.

    The class decides where the file names one. Otherwise the values do, never of a single layer: those of
    the same place (layers.*.q_norm, layers.*.linear_attn.norm) are looked at together, and a place whose
    values could be either follows the rest of the file."""
    places: dict[str, list[NormLayer]] = defaultdict(list)
    for layer in layers:
        if layer.kind in GAIN_ONLY and layer.weight is not None and layer.zero_centred_by_class is None:
            places[".".join(part for part in layer.path.split(".") if not part.isdigit())].append(layer)
    votes = {place: _centred_on_zero(group) for place, group in places.items()}
    usual = sum(1 if vote else -1 for vote in votes.values() if vote is not None) > 0
    centred = {
        id(layer)
        for place, group in places.items()
        for layer in group
        if (usual if votes[place] is None else votes[place])
    }
    return [
        replace(layer, zero_centred=layer.zero_centred_by_class or id(layer) in centred)
        if layer.kind in GAIN_ONLY or layer.zero_centred_by_class is not None
        else layer
        for layer in layers
    ]


def _centred_on_zero(layers: Sequence[NormLayer]) -> bool | None:
    """True where the values spread around 0, False around 1, None where they could be either.

    A gamma at or below 0 is rare, a gamma - 1 above 0.5 in most channels as well."""
    values = np.concatenate([vector for layer in layers if (vector := as_vector(layer.weight)) is not None])
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    middle, below = abs(median(values)), float((values <= 0).mean())
    if middle < 0.5 and below >= 0.1:
        return True
    return None if middle < 0.5 or below >= 0.1 else False
