"""Which modules of a network are the norms of its file. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normdoctor.layers import TRACKING_KINDS, NormKind, NormLayer, as_vector
from normdoctor.readers import open_checkpoint
from normdoctor.readers.live_module import LiveModule
from normdoctor.readers.norm_classes import kind_of_class

BUFFERS = ("running_mean", "running_var")

LOOKED_AT = frozenset({NormKind.LAYER, NormKind.RMS, NormKind.DYNAMIC_TANH})
"""Kinds without statistics that have something to show on data."""


@dataclass(eq=False)
class Found:
    """The norms of a module by the names of the file's layers."""

    norms: dict[str, Any] = field(default_factory=dict)
    """Those with running statistics that normalise as modules of their own."""
    others: dict[str, tuple[Any, NormLayer]] = field(default_factory=dict)
    """Those without statistics that have something to show."""
    left: dict[str, str] = field(default_factory=dict)


def find_norms(module: Any, layers: Sequence[NormLayer]) -> Found:
    """The modules behind `layers`, told by their names (as far as wrappers and a common prefix leave them alike)
    and their values."""
    found = Found()
    with open_checkpoint(module) as checkpoint:
        live = checkpoint.layers
    for own in live:
        layer = layer_of(own, layers)
        if layer is None or layer.name in found.norms:
            continue
        if own.kind in LOOKED_AT:
            found.others[layer.name] = (module.get_submodule(own.name), own)
        elif own.kind in TRACKING_KINDS:
            reason = _why_not(own, module)
            if reason is None:
                found.norms[layer.name] = module.get_submodule(own.name)
            else:
                found.left[layer.name] = reason
    for layer in layers:
        if layer.running_mean is not None and layer.name not in found.norms:
            found.left.setdefault(layer.name, "its code is not a module of its own that could be stopped at")
    return found


def _why_not(own: NormLayer, root: Any) -> str | None:
    """Why the statistics of a norm cannot be measured in front of its module; None where they can."""
    module = root.get_submodule(own.name)
    compiled = [name for name in _above(own.name) if type(root.get_submodule(name)).__name__ in COMPILED]
    if compiled:
        return f"{compiled[0] or 'the model'} is compiled code inside a module of Python"
    if any(module._buffers.get(name) is None for name in BUFFERS):
        return "keeps no statistics: it uses those of the batch at hand, also in eval mode"
    if kind_of_class(LiveModule(module).class_names) not in TRACKING_KINDS:
        return f"nothing says that a {type(module).__name__} normalises what it is given, and not something inside"
    if own.kind is NormKind.INSTANCE:
        return "InstanceNorm trains on the statistics of each sample; none of all samples make eval the same function"
    return None


COMPILED = frozenset({"RecursiveScriptModule", "TopLevelTracedModule", "ScriptModule", "TracedModule"})


def _above(name: str) -> Iterator[str]:
    """The paths of a module and of all that it lies in.

    >>> list(_above("a.b"))
    ['', 'a', 'a.b']
    """
    parts = name.split(".") if name else []
    for count in range(len(parts) + 1):
        yield ".".join(parts[:count])


def layer_of(own: NormLayer, layers: Iterable[NormLayer]) -> NormLayer | None:
    """The file's layer that a live one is: of those with its values the one whose name is most like its own.

    Norms that were never updated have the same values, and bn1 is the end of layer1.0.bn1."""
    near: list[tuple[int, int, NormLayer]] = []
    for place, layer in enumerate(layers):
        names = [layer.path, layer.name.rpartition(":")[2], *layer.aliases]
        apart = [abs(len(name) - len(own.path)) for name in names if _alike(own.path, name)]
        if apart and _same_values(own, layer):
            near.append((min(apart), place, layer))
    return min(near, key=lambda one: one[:2])[2] if near else None


def _alike(one: str, other: str) -> bool:
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _same_values(one: NormLayer, other: NormLayer) -> bool:
    for name in (*BUFFERS, "weight", "bias"):
        mine, theirs = as_vector(getattr(one, name)), as_vector(getattr(other, name))
        if mine is not None and theirs is not None and not np.array_equal(mine, theirs, equal_nan=True):
            return False
    return one.channels == other.channels
