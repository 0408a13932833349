"""Trees of nn.Module, pickled or live, → norm layers. Both are seen through the same small record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast

from normdoctor.layers import ArrayRef, Model, NearMiss, NormKind, NormLayer, Reference
from normdoctor.readers.arrays import FLOAT_TYPES, MAX_ELEMENTS
from normdoctor.readers.finishing import Budget, finish, with_aliases
from normdoctor.readers.naming import (
    Recognised,
    averaged,
    group_of,
    inner_shift,
    is_counter,
    recognise,
    size_of,
    stored_names,
    strip_wrappers,
    wrappers_in,
)
from normdoctor.readers.norm_classes import (
    EPS_NAMES,
    FROZEN_CLASS,
    NO_NORM_CLASSES,
    declared_width,
    kind_of_attributes,
    kind_of_class,
    zero_centred_by_class,
)


class ModuleRecord(Protocol):
    """One module of a tree, whatever it is stored in."""

    @property
    def identity(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The full class name, then those of its bases where they are known."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Plain attributes: eps, momentum, training, ..."""

    @property
    def tensors(self) -> Mapping[str, ArrayRef]:
        """Its own parameters and buffers by leaf name."""

    @property
    def trainable(self) -> bool | None:
        """requires_grad of its own parameters: False where none of them has it, None where it cannot be told."""

    def children(self) -> Iterable[tuple[str, ModuleRecord]]: ...


LAZY = "a lazy norm that has seen no batch and has no values yet"
"""Why a LazyBatchNorm2d is no layer."""

FLOAT_LIMIT = 2**1023
"""An int beyond it has no float."""


@dataclass
class _Walk:
    layers: list[NormLayer] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    """Identity of a norm module → its place in layers."""
    aliases: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Place in layers → the further names of the module there."""
    others: set[int] = field(default_factory=set)
    """Identities of the modules that are no norms."""
    averaged: str | None = None


def read_modules(
    root: ModuleRecord, key: str | None = None, budget: Budget | None = None
) -> tuple[Model, tuple[Reference, ...]]:
    """The norm layers of a module tree, in the order of named_modules(), and all of its tensors by name.

    A module used in several places is one layer with aliases."""
    walk = _Walk()
    references: list[Reference] = []
    budget = budget or Budget()
    for name, module in _named_modules(root):
        prefix = f"{name}." if name else ""
        budget.spend_names((len(key or "") + len(prefix)) * (1 + len(module.tensors)), 1 + len(module.tensors))
        references += [Reference(prefix + leaf, array) for leaf, array in module.tensors.items()]
        if module.identity in walk.places:
            walk.aliases[walk.places[module.identity]].append(name)
        elif module.identity not in walk.others:
            _look_at(name, module, walk)
            if module.identity not in walk.places:
                walk.others.add(module.identity)
    layers = with_aliases(walk.layers, walk.aliases)
    model = finish(key, layers, near_misses=walk.misses, averaged=walk.averaged, budget=budget)
    return model, tuple(references)


def notes_on_lazy(models: Iterable[Model]) -> Iterator[str]:
    """A note on the lazy norms that have no values yet; nothing where there are none."""
    names = [miss.name for model in models for miss in model.near_misses if miss.reason == LAZY]
    if names:
        count = "1 lazy norm has" if len(names) == 1 else f"{len(names):,} lazy norms have"
        first = names[0] or "the module itself"
        yield f"{count} seen no batch and no values to judge (the first is {first}): run one batch first"


def _named_modules(root: ModuleRecord) -> Iterator[tuple[str, ModuleRecord]]:
    """Depth first, in order, without recursion: a hostile file nests a hundred thousand deep. A module that
    has children of its own is entered once, a leaf is met under each of its names."""
    yield "", root
    entered: set[int] = {root.identity}
    stack = [("", iter(root.children()))]
    while stack:
        prefix, children = stack[-1]
        found = next(children, None)
        if found is None:
            stack.pop()
            continue
        name, module = prefix + found[0], found[1]
        yield name, module
        if module.identity not in entered:
            entered.add(module.identity)
            stack.append((f"{name}.", iter(module.children())))


def _look_at(name: str, module: ModuleRecord, walk: _Walk) -> None:
    tensors, attributes, class_names = module.tensors, module.attributes, module.class_names
    walk.averaged = walk.averaged or averaged(tensors)
    kind = kind_of_class(class_names) or kind_of_attributes(attributes)
    width = declared_width(attributes)
    group = group_of(name, tensors)
    found = recognise(group) if tensors else None
    if kind is None:
        if isinstance(found, str):
            weight = tensors.get("weight")
            walk.misses.append(NearMiss(name=name, shape=weight.shape if weight else (), reason=found))
        # An unknown class is taken for a norm only with running statistics or a norm's own name.
        own = class_names[0].rpartition(".")[2]
        named = "norm" in own.lower() and own not in NO_NORM_CLASSES
        if not isinstance(found, Recognised) or not (named or "running_var" in found.tensors):
            return
        kind, channels, fields = found.kind, found.channels, dict(found.tensors)
    else:
        fields = {role: ref for role, ref in group.roles.items() if usable(role, ref)}
        if kind is NormKind.DYNAMIC_TANH:
            fields |= inner_shift(group)
        elif "alpha" in fields:
            del fields["alpha"]
        sizes = [size_of(fields[role]) for role in ("running_var", "weight", "running_mean") if role in fields]
        channels = sizes[0] if sizes else width or 0
        if not channels:
            if class_names[0].rpartition(".")[2].startswith("Lazy"):
                walk.misses.append(NearMiss(name=name, shape=(), reason=LAZY))
            return  # a module that only holds a norm, or Conv2dNormActivation: the norm itself comes below
    layer = _layer(name, module, kind, channels, fields)
    walk.layers.append(replace(layer, stored_names=stored_names(group, fields)))
    walk.places[module.identity] = len(walk.layers) - 1


def usable(role: str, ref: ArrayRef) -> bool:
    """Whether a tensor can be what a norm layer has under this name."""
    if role in ("num_batches_tracked", "alpha"):
        return is_counter(ref)
    if ref.dtype not in FLOAT_TYPES or size_of(ref) > MAX_ELEMENTS:
        return False
    return len(ref.shape) >= 1 or role in ("weight", "bias")


def _layer(name: str, module: ModuleRecord, kind: NormKind, channels: int, fields: dict[str, ArrayRef]) -> NormLayer:
    attributes, class_names = module.attributes, module.class_names
    origin = class_names[0]
    frozen = bool(FROZEN_CLASS.search(origin.rpartition(".")[2]))
    groups = attributes.get("num_groups")
    affine = attributes.get("affine", attributes.get("elementwise_affine"))
    training = attributes.get("training")
    tracks = attributes.get("track_running_stats")
    return NormLayer(
        name=name,
        path=strip_wrappers(name),
        wrappers=wrappers_in(name),
        kind=kind,
        channels=channels,
        origin=origin,
        groups=groups if type(groups) is int else None,
        eps=_number(attributes, EPS_NAMES),
        momentum=_momentum(kind, attributes),
        training=training if isinstance(training, bool) and not frozen else None,
        affine=affine if isinstance(affine, bool) else None,
        track_running_stats=tracks if isinstance(tracks, bool) else None,
        requires_grad=module.trainable,
        zero_centred_by_class=zero_centred_by_class(class_names, attributes),
        **cast(dict[str, Any], fields),
    )


def _number(attributes: Mapping[str, Any], names: Iterable[str]) -> float | None:
    for name in names:
        value = attributes.get(name)
        if isinstance(value, float) or (type(value) is int and abs(value) < FLOAT_LIMIT):
            return float(value)
    return None


def _momentum(kind: NormKind, attributes: Mapping[str, Any]) -> float | Literal["cumulative"] | None:
    """momentum as the module has it; its None is torch's word for a plain average."""
    if kind not in (NormKind.BATCH, NormKind.INSTANCE):
        return None
    if "momentum" in attributes and attributes["momentum"] is None:
        return "cumulative"
    return _number(attributes, ("momentum",))
