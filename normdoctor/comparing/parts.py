"""What is compared: one model of a checkpoint with its norms and all its tensors, under names without wrappers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from normdoctor.compared import Side
from normdoctor.errors import InputError, UsageError, did_you_mean
from normdoctor.layers import VECTORS, ArrayRef, Checkpoint, Model, NormLayer
from normdoctor.readers.naming import strip_wrappers

AVERAGE_WORDS = re.compile(r"(^|_)(ema|swa|averaged|avg|polyak)(_|$)", re.IGNORECASE)
"""Of a submodule that holds an average beside the model itself: ema_model, averaged_model."""

OTHER_TENSORS = ("num_batches_tracked", "alpha", "inner_shift")


@dataclass(frozen=True, eq=False)
class Part:
    """One side of a comparison, while its file is open."""

    side: Side
    layers: tuple[NormLayer, ...]
    paths: tuple[str, ...]
    """What each layer is matched by."""
    tensors: Mapping[str, ArrayRef]
    """Every tensor by its name as `paths` are written, norms included, in file order."""
    norm_tensors: frozenset[int] = field(default_factory=frozenset)
    """id() of those that belong to norms."""

    @property
    def others(self) -> dict[str, ArrayRef]:
        """The tensors that belong to no norm."""
        return {name: ref for name, ref in self.tensors.items() if id(ref) not in self.norm_tensors}


def whole(checkpoint: Checkpoint, key: str | None = None, label: str | None = None) -> Part:
    """The model of a checkpoint that is to be compared: that of the key, else the first that is no average.

    Raises UsageError for a key that the file does not have, InputError for a file without norm layers."""
    model = chosen(checkpoint, key)
    layers = model.layers
    paths = tuple(_plain(layer.path) for layer in layers)
    tensors = _named_tensors(checkpoint, model)
    return _part(checkpoint, model, label or checkpoint.path, layers, paths, tensors)


def within(checkpoint: Checkpoint) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The model in a file and its average, in this order, and the names of what else could be compared; nothing
    where the file does not hold both."""
    models = [model for model in checkpoint.models if model.layers]
    averages = [model for model in models if model.averaged is not None and model.key is not None]
    plain = [model for model in models if model.averaged is None and model.key is not None]
    pairs = [(one, other) for other in averages for one in plain if _alike(one, other)]
    if pairs:
        first, second = pairs[0]
        parts = tuple(
            _part(
                checkpoint,
                model,
                model.key or "",
                model.layers,
                tuple(_plain(layer.path) for layer in model.layers),
                _named_tensors(checkpoint, model),
            )
            for model in (first, second)
        )
        return parts, tuple(dict.fromkeys(other.key or "" for _, other in pairs[1:] if other is not second))
    if len(models) == 1:
        return _by_submodule(checkpoint, models[0]), ()
    return (), ()


def any_two(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """The first two models of a file that have norms of the same names, whatever they are to each other."""
    models = [model for model in checkpoint.models if model.layers]
    for place, first in enumerate(models):
        for second in models[place + 1 :]:
            if _alike(first, second):
                return tuple(whole(checkpoint, model.key, model.key) for model in (first, second))
    return ()


def chosen(checkpoint: Checkpoint, key: str | None) -> Model:
    """The model of this key, without one the first that is no average. Raises UsageError for an unknown key."""
    models = [model for model in checkpoint.models if model.layers]
    if key is not None:
        found = [model for model in models if model.key == key]
        known = [model.key for model in models if model.key is not None]
        if not found:
            hint = did_you_mean(key, known) + (f"It has: {', '.join(known)}." if known else "It holds one model.")
            raise UsageError(f"{checkpoint.path}: no model under the key {key!r}", hint)
        return found[0]
    plain = [model for model in models if model.averaged is None]
    return next(iter(plain or models), checkpoint.models[0] if checkpoint.models else Model(key=None, layers=()))


def _alike(one: Model, other: Model) -> bool:
    """At least half of the layers of each have a namesake with as many channels, and no namesake has others."""
    mine = {_plain(layer.path): layer.channels for layer in one.layers}
    theirs = {_plain(layer.path): layer.channels for layer in other.layers}
    both = mine.keys() & theirs.keys()
    return 2 * len(both) >= max(len(mine), len(theirs)) and all(mine[name] == theirs[name] for name in both)


def _by_submodule(checkpoint: Checkpoint, model: Model) -> tuple[Part, ...]:
    """A model and its average as submodules of one module: online_model.* and ema_model.*"""
    groups: dict[str, dict[str, NormLayer]] = {}
    for layer in model.layers:
        first, _, rest = _plain(layer.path).partition(".")
        groups.setdefault(first, {})[rest] = layer
    for average in filter(AVERAGE_WORDS.search, groups):
        for other, layers in groups.items():
            both = layers.keys() & groups[average].keys()
            if other == average or not both or 2 * len(both) < max(len(layers), len(groups[average])):
                continue
            if any(layers[name].channels != groups[average][name].channels for name in both):
                continue
            tensors = _named_tensors(checkpoint, model)
            return tuple(
                _part(
                    checkpoint,
                    model,
                    prefix,
                    tuple(groups[prefix].values()),
                    tuple(groups[prefix]),
                    _below(tensors, f"{prefix}."),
                    averaged,
                )
                for prefix, averaged in ((other, None), (average, f"stored under {average}"))
            )
    return ()


def _below(tensors: Mapping[str, ArrayRef], prefix: str) -> dict[str, ArrayRef]:
    return {name.removeprefix(prefix): ref for name, ref in tensors.items() if name.startswith(prefix)}


def _part(
    checkpoint: Checkpoint,
    model: Model,
    label: str,
    layers: Sequence[NormLayer],
    paths: Sequence[str],
    tensors: Mapping[str, ArrayRef],
    averaged: str | None = None,
) -> Part:
    for layer in layers:
        if not layer.lengths_agree:
            lengths = ", ".join(f"{name} {count}" for name, count in layer.lengths.items())
            raise InputError(
                f"{checkpoint.path}: the vectors of {layer.name} differ in length ({lengths})",
                f"normdoctor inspect {checkpoint.path} says more.",
            )
    refs = (getattr(layer, name) for layer in layers for name in (*VECTORS, *OTHER_TENSORS))
    places = {ref.identity for ref in refs if ref is not None}
    return Part(
        side=Side(
            label=label,
            format=checkpoint.format,
            layers=len(layers),
            averaged=averaged or model.averaged,
            untrained=model.untrained,
        ),
        layers=tuple(layers),
        paths=tuple(paths),
        tensors=tensors,
        norm_tensors=frozenset(id(ref) for ref in tensors.values() if ref.identity in places),
    )


def _named_tensors(checkpoint: Checkpoint, model: Model) -> dict[str, ArrayRef]:
    """The tensors of one model of the file under plain names."""
    prefix = f"{model.key}:" if model.key else ""
    dropped = _dropped(model)
    named: dict[str, ArrayRef] = {}
    for reference in checkpoint.list_references():
        if reference.name and reference.name.startswith(prefix):
            plain = _plain(strip_wrappers(reference.name.removeprefix(prefix))).removeprefix(dropped)
            named.setdefault(plain, reference.array)
    return named


def _dropped(model: Model) -> str:
    """The beginning that the paths of the layers were freed from: `model.`, or nothing."""
    for layer in model.layers:
        full = strip_wrappers(layer.name.removeprefix(f"{model.key}:" if model.key else ""))
        if full.endswith(layer.path):
            return _plain(full.removesuffix(layer.path) + "x").removesuffix("x")
    return ""


def _plain(name: str) -> str:
    """`name` with dots between its parts, as torch writes it."""
    return name.replace("/", ".").strip(".")
