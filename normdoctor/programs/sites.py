"""The norms that a program has, and which layers of its file they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normdoctor.layers import ArrayRef, NormKind, NormLayer, load
from normdoctor.readers.live_module import LiveArray

OPERATORS: Mapping[str, bool] = {
    "batch_norm": False,
    "_batch_norm_impl_index": True,
    "cudnn_batch_norm": True,
    "miopen_batch_norm": True,
    "native_batch_norm": True,
    "_native_batch_norm_legit": True,
    "_native_batch_norm_legit_no_training": True,
    "_batch_norm_no_update": True,
    "_batch_norm_with_update": True,
    "_native_batch_norm_legit_functional": True,
    "_batch_norm_with_update_functional": True,
}
"""The operators of aten that are a BatchNorm, and whether they give more than its output."""

WITHOUT_TRAINING = frozenset({"_native_batch_norm_legit_no_training", "_batch_norm_no_update"})
ROLES = ("weight", "bias", "running_mean", "running_var")

UNCALLED = "the program has no batch_norm operator that takes its statistics"
TRAINING = "in training mode, whatever eval() says: it normalises with the batch at hand"
COMPUTED = "its statistics are computed or converted before they are used"
ELSEWHERE = "its statistics are used by other operators too"
INSTANCE = "an InstanceNorm with running statistics: these are not those of all values together"
DIFFERENTLY = "called with other parameters at another place"
REMEMBERS = "forward changes {}, so that outputs depend on the batches before"
SHARED = "has its statistics in common with {}"


def unfit(arguments: Mapping[str, Any], operator: str, stored: Sequence[bool]) -> str | None:
    """Why a call of an operator is no norm with statistics of its own. arguments: those that are known, by name;
    stored: whether each of ROLES is a tensor of the program, or None."""
    training = arguments.get("training", arguments.get("train"))
    if training is None:
        training = operator not in WITHOUT_TRAINING
    if training:
        return TRAINING
    fits = all(stored) and arguments.get("running_mean") is not None and arguments.get("running_var") is not None
    return None if fits and eps_of(arguments) is not None else COMPUTED


def eps_of(arguments: Mapping[str, Any]) -> Any:
    """eps among the arguments of any of OPERATORS."""
    return arguments.get("eps", arguments.get("epsilon"))


def identity(tensor: Any) -> Hashable:
    """Equal for two tensors in the same memory."""
    return LiveArray(tensor).identity


@dataclass
class Site:
    """One norm of a program: all calls with the same tensors."""

    norm: Any
    """A module with buffers of its own."""
    stored: frozenset[Hashable]
    """Identities of the program's running_mean and running_var."""
    names: list[str] = field(default_factory=list)
    """The layers that it may be, the likeliest first."""
    why: str | None = None
    """Why its statistics cannot be changed."""


@dataclass
class Sites:
    """The norms of a program in the order in which it comes to them."""

    make: Callable[..., Any]
    """Makes a norm of the tensors of ROLES and eps."""
    by_tensors: dict[Hashable, Site] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """Names of what is a norm and no site → why."""
    changed: list[str] = field(default_factory=list)
    """Tensors of the program that forward changes."""
    nameless: str | None = None
    """Why a norm that nothing names is no site."""

    def all(self) -> list[Site]:
        return list(self.by_tensors.values())

    def add(self, names: Iterable[str], tensors: Sequence[Any], eps: float) -> Any:
        """The norm with these tensors, those of ROLES in order."""
        identities = [None if tensor is None else identity(tensor) for tensor in tensors]
        key = (*identities, eps)
        if key not in self.by_tensors:
            self.by_tensors[key] = Site(self.make(*tensors, eps), frozenset(map(identity, tensors[2:])))
        site = self.by_tensors[key]
        site.names += [name for name in names if name not in site.names]
        return site.norm

    def leave(self, names: Sequence[str], why: str) -> None:
        """These layers, as far as they are layers, cannot be changed."""
        for name in names:
            self.left.setdefault(name, why)
        if not names:
            self.nameless = why

    def note_change(self, name: str) -> None:
        """Forward changes this tensor. That training mode changes the statistics of a norm is no news."""
        if name.rpartition(".")[2] not in (*ROLES, "num_batches_tracked") and name not in self.changed:
            self.changed.append(name)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(REMEMBERS.format(name) for name in self.changed)

    def assign(self, layers: Iterable[NormLayer]) -> tuple[dict[str, Any], dict[str, str]]:
        """Name of a layer → its norm, in the order of the program; and the layers that have none → why."""
        wanted = {layer.name: layer for layer in layers if _tracks(layer)}
        left = {name: INSTANCE for name, layer in wanted.items() if layer.kind is not NormKind.BATCH}
        found = self._matched([layer for name, layer in wanted.items() if name not in left])
        norms: dict[str, Any] = {}
        for site, layer in found:
            if layer.name in norms or layer.name in left or site.why is not None:
                left[layer.name] = site.why or DIFFERENTLY
                norms.pop(layer.name, None)
            else:
                norms[layer.name] = site.norm
        sharing = {name: layer.name for site, layer in found for name in site.names if name != layer.name}
        for name, layer in wanted.items():
            if name not in norms and name not in left:
                said = (self.left[own] for own in (name, *layer.aliases) if own in self.left)
                why = next(said, self.nameless or UNCALLED)
                left[name] = SHARED.format(sharing[name]) if name in sharing else why
        return norms, left

    def _matched(self, layers: Sequence[NormLayer]) -> list[tuple[Site, NormLayer]]:
        known = {name: layer for layer in layers for name in (layer.name, *layer.aliases)}
        found: dict[int, NormLayer] = {}
        for place, site in enumerate(self.all()):
            named = (known[name] for name in site.names if name in known and _fits(site, known[name]))
            layer = next(named, None)
            if layer is not None:
                found[place] = layer
        nameless = [place for place in range(len(self.all())) if place not in found]
        taken = {layer.name for layer in found.values()}
        waiting = [layer for layer in layers if layer.name not in taken and layer.name not in self.left]
        if len(nameless) == len(waiting) and all(
            _fits(self.all()[place], layer) for place, layer in zip(nameless, waiting, strict=True)
        ):
            # a frozen file has forgotten the names, and the reader numbers the calls in its code
            found.update(zip(nameless, waiting, strict=True))
        return [(site, found[place]) for place, site in enumerate(self.all()) if place in found]


def _tracks(layer: NormLayer) -> bool:
    return layer.running_mean is not None or layer.running_var is not None


def _fits(site: Site, layer: NormLayer) -> bool:
    """Whether the layer has these statistics, as far as the file can still be read."""
    pairs = (layer.running_mean, site.norm.running_mean), (layer.running_var, site.norm.running_var)
    return all(ref is not None and _same(ref, tensor) for ref, tensor in pairs)


def _same(ref: ArrayRef, tensor: Any) -> bool:
    if tuple(ref.shape) != tuple(tensor.shape):
        return False
    try:
        stored = load(ref)
    except (ValueError, OSError, NotImplementedError):  # the file is closed
        return True
    return np.array_equal(stored, LiveArray(tensor).load(), equal_nan=True)
