"""The norm layers of an exported program: its operators, those written out in its nodes, those that names tell.

Operators first (batch_norm and what run_decompositions makes of it), then norms that a module of a known class
computes with plain arithmetic, then every group of tensors that looks like a norm by its names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from normdoctor.errors import InputError
from normdoctor.layers import ArrayRef, Model, NormKind, NormLayer
from normdoctor.readers.arrays import FLOAT_TYPES, MAX_ELEMENTS
from normdoctor.readers.export_graph import Node, Program, as_list, whole
from normdoctor.readers.export_patterns import WrittenOut, bounded, literal, written_out
from normdoctor.readers.finishing import Budget, finish
from normdoctor.readers.naming import (
    averaged,
    group_of,
    is_counter,
    read_names,
    size_of,
    stored_names,
    strip_wrappers,
    wrappers_in,
)
from normdoctor.readers.norm_classes import kind_of_class, zero_centred_by_class

KINDS = {
    "batch_norm": NormKind.BATCH,
    "native_batch_norm": NormKind.BATCH,
    "cudnn_batch_norm": NormKind.BATCH,
    "miopen_batch_norm": NormKind.BATCH,
    "_native_batch_norm_legit": NormKind.BATCH,
    "_native_batch_norm_legit_functional": NormKind.BATCH,
    "_native_batch_norm_legit_no_training": NormKind.BATCH,
    "_batch_norm_no_update": NormKind.BATCH,
    "_batch_norm_with_update": NormKind.BATCH,
    "_batch_norm_with_update_functional": NormKind.BATCH,
    "instance_norm": NormKind.INSTANCE,
    "layer_norm": NormKind.LAYER,
    "native_layer_norm": NormKind.LAYER,
    "group_norm": NormKind.GROUP,
    "native_group_norm": NormKind.GROUP,
    "rms_norm": NormKind.RMS,
    "_fused_rms_norm": NormKind.RMS,
}
"""Operators of torch.ops.aten, without their overload."""

WITHOUT_TRAINING = ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
PARAMETERS = ("weight", "bias", "running_mean", "running_var")
TRACKING = (NormKind.BATCH, NormKind.INSTANCE)
MAX_CALLS = 10_000
"""Calls of norms in one program; the largest models have a tenth."""


@dataclass(frozen=True)
class Tensors:
    """The stored tensors of one program by name."""

    arrays: Mapping[str, ArrayRef]
    requires_grad: Mapping[str, bool]


@dataclass
class _Walk:
    program: Program
    tensors: Tensors
    layers: list[NormLayer] = field(default_factory=list)
    calls: dict[tuple[object, ...], int] = field(default_factory=dict)
    """What tells a layer apart → its place in layers."""
    names: dict[str, int] = field(default_factory=dict)
    claimed: set[object] = field(default_factory=set)
    """Identities of the tensors that layers have."""
    computed: list[str] = field(default_factory=list)
    """Layers with parameters that the file does not hold."""
    budget: Budget = field(default_factory=Budget)
    found: int = 0
    """Calls of norms met so far."""

    @cached_property
    def groups(self) -> Mapping[str, Mapping[str, ArrayRef]]:
        """Path of a module → its own tensors by leaf name."""
        groups: dict[str, dict[str, ArrayRef]] = defaultdict(dict)
        for name, ref in self.tensors.arrays.items():
            parent, _, leaf = name.rpartition(".")
            groups[parent][leaf] = ref
        return groups


def read_layers(program: Program, tensors: Tensors, key: str | None, budget: Budget) -> tuple[Model, list[str]]:
    """The norm layers in the order of named_modules(), and notes on what could not be read."""
    walk = _Walk(program, tensors, budget=budget)
    classes: dict[str, str] = {}
    for node in program.nodes:
        path, class_name = node.module
        classes.setdefault(path, class_name)
        if node.operator in KINDS:
            walk.found += 1
            if walk.found > MAX_CALLS:
                raise InputError(
                    f"more than {MAX_CALLS:,} calls of norms, several times as many as any model has",
                    "The file is damaged or was made to exhaust memory; do not load it.",
                )
            _add_operator(walk, node)
    written = written_out(program)
    for path, found in written.items():
        _add_written_out(walk, path, classes[path], found)
    misses = _add_named(walk, classes, written)
    order = program.modules
    layers = sorted(walk.layers, key=lambda layer: order.get(layer.name, len(order)))
    model = finish(key, layers, near_misses=misses, averaged=averaged(tensors.arrays), budget=budget)
    notes = []
    if walk.computed:
        shown = ", ".join(walk.computed[:3]) + (", ..." if len(walk.computed) > 3 else "")
        notes.append(f"parameters of {len(walk.computed)} layers are inputs or computed, so not in the file: {shown}")
    return model, notes


# operators


def _add_operator(walk: _Walk, node: Node) -> None:
    values = {role: node.graph.parameter(node.tensor(role)) or "" for role in PARAMETERS}
    arrays = walk.tensors.arrays
    stored = {role: name for role, name in values.items() if name in arrays and _usable(arrays[name])}
    fields: dict[str, Any] = {role: arrays[name] for role, name in stored.items()}
    name, origin = _name_of(walk, node, stored)
    identities = tuple(fields[role].identity if role in fields else None for role in PARAMETERS)
    walk.budget.spend_names(len(name))
    known = walk.calls.get((name, identities))
    if known is None and not any(identities):
        name = _unused(walk, name, node)
    kind = _kind(node, origin)
    if known is not None:
        alias = f"{name}@{node.call_number}"
        layer = walk.layers[known]
        if any(identities) and node.call_number and alias not in layer.aliases:
            walk.layers[known] = replace(layer, aliases=(*layer.aliases, alias))
        return
    if any(node.tensor(role) is not None and role not in fields for role in PARAMETERS):
        walk.computed.append(name)
    training = _training(node)
    momentum = node.number("momentum")
    momentum = node.number("exponential_average_factor") if momentum is None else momentum
    if momentum == 0 and not training:
        momentum = None  # what an export in eval mode writes for momentum=None as well
    eps = node.number("eps")
    tracking = kind in TRACKING
    counter = arrays.get(_below(name, "num_batches_tracked")) if "running_var" in fields else None
    if kind is NormKind.INSTANCE and "running_mean" not in fields:
        training = None  # by design: it has nothing else to normalise with
    groups = [whole(node.argument(argument)) for argument in ("num_groups", "group")]
    walk.calls[name, identities] = walk.names[name] = len(walk.layers)
    walk.claimed.update(identity for identity in identities if identity is not None)
    walk.layers.append(
        NormLayer(
            name=name,
            path=strip_wrappers(name),
            wrappers=wrappers_in(name),
            kind=kind,
            channels=max((size_of(ref) for ref in fields.values()), default=0) or _width(node, kind),
            origin=origin,
            baked=True,
            groups=next((count for count in groups if count is not None), None),
            num_batches_tracked=counter if counter is not None and is_counter(counter) else None,
            eps=node.number("epsilon") if eps is None else eps,
            momentum=momentum if tracking else None,
            training=training if tracking else None,
            affine="weight" in fields or "bias" in fields,
            track_running_stats="running_mean" in fields if tracking else None,
            requires_grad=_trainable(walk.tensors, stored.values()),
            zero_centred_by_class=_adds_one(node, "weight") if kind is NormKind.RMS else None,
            stored_names=_other_names(stored),
            **fields,
        )
    )


def _below(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _usable(ref: ArrayRef) -> bool:
    return ref.dtype in FLOAT_TYPES and size_of(ref) <= MAX_ELEMENTS


def _other_names(stored: Mapping[str, str]) -> dict[str, str]:
    leaves = {role: name.rpartition(".")[2] for role, name in stored.items()}
    return {role: leaf for role, leaf in leaves.items() if leaf != role}


def _name_of(walk: _Walk, node: Node, stored: Mapping[str, str]) -> tuple[str, str]:
    """The path of the layer in the exported module, and what it is an instance of.

    The module whose code made the call, where the parameters are its own; else where they lie."""
    path, class_name = node.module
    roles = sorted(stored, key=lambda role: not role.startswith("running"))
    parent = stored[roles[0]].rpartition(".")[0] if roles else None
    if parent is None:
        return path, class_name or node.target
    if path == parent or _same_tensors(walk.tensors, path, stored):
        name, origin = path, class_name or node.target
    else:
        name, origin = parent, node.target
    other = walk.names.get(name)
    if other is None:
        return name, origin
    own = {walk.tensors.arrays[full].identity for full in stored.values()}
    known = walk.layers[other]
    if own & {ref.identity for role in PARAMETERS if (ref := getattr(known, role)) is not None}:
        return name, origin
    # A second norm with parameters of its own in one module: attn.q_weight.
    return stored[roles[0]].removesuffix("_weight").removesuffix(".weight"), origin


def _same_tensors(tensors: Tensors, path: str, stored: Mapping[str, str]) -> bool:
    """Whether the tensors of `path` are those named, under another name: a module used in several places."""
    for name in stored.values():
        other = tensors.arrays.get(_below(path, name.rpartition(".")[2]))
        if other is None or other.identity != tensors.arrays[name].identity:
            return False
    return True


def _unused(walk: _Walk, name: str, node: Node) -> str:
    """`name`, or with the value behind it where another norm of the module has it already."""
    if name not in walk.names or kind_of_class((node.module[1],)) is not None:
        return name
    return f"{name}:{node.outputs[0] if node.outputs else len(walk.layers)}"


def _kind(node: Node, origin: str) -> NormKind:
    """What the operator computes. An InstanceNorm is decomposed to a BatchNorm of the samples side by side."""
    kind = KINDS[node.operator]
    if kind is NormKind.BATCH:
        repeated = any(before.operator == "repeat" for role in PARAMETERS for before in _before(node, role))
        if repeated or kind_of_class((node.module[1] or origin,)) is NormKind.INSTANCE:
            return NormKind.INSTANCE
    return kind


def _before(node: Node, role: str) -> list[Node]:
    return list(node.graph.way_back(node.tensor(role)))


def _training(node: Node) -> bool | None:
    if node.operator in WITHOUT_TRAINING:
        return False
    if node.operator.startswith("_batch_norm_with_update"):
        return True
    training = node.flag("training")
    return node.flag("use_input_stats") if training is None else training


def _width(node: Node, kind: NormKind) -> int:
    """The channels of a norm without parameters, 0 where the file does not say."""
    if kind in (NormKind.LAYER, NormKind.RMS):
        lengths = [whole(length) for length in as_list(node.argument("normalized_shape"))]
        return bounded(lengths) if len(lengths) <= 8 else 0
    declared = whole(node.argument("C"))
    if declared is not None:
        return bounded([declared])
    value = node.tensor("input")
    if kind is NormKind.INSTANCE and node.operator != "instance_norm":
        view = next(node.graph.way_back(value), None)  # that laid the samples side by side
        value = value if view is None else view.tensor("self")
    return bounded(node.graph.shape(value)[1:2])


def _trainable(tensors: Tensors, names: Any) -> bool | None:
    flags = [tensors.requires_grad[name] for name in names if name in tensors.requires_grad]
    return any(flags) if flags else None


def _adds_one(node: Node, argument: str) -> bool | None:
    """Whether the graph adds 1 to the gain in front of the norm; None where it does something else to it."""
    value = node.graph.origin(node.tensor(argument))
    adder = node.graph.producer(value)
    if adder is None:
        return None if node.tensor(argument) is None else False
    return True if adder.operator == "add" and literal(adder) == 1 else None


# written out in nodes


def _add_written_out(walk: _Walk, path: str, class_name: str, found: WrittenOut) -> None:
    """The norm that a module of a known class computes with plain arithmetic."""
    kind = kind_of_class((class_name,))
    if kind is None or path in walk.names:
        return
    group = group_of(path, walk.groups.get(path, {}))
    fields: dict[str, Any] = {role: ref for role, ref in group.roles.items() if role in PARAMETERS and _usable(ref)}
    channels = max((size_of(ref) for ref in fields.values()), default=found.width)
    counter = group.roles.get("num_batches_tracked")
    walk.names[path] = len(walk.layers)
    walk.claimed.update(ref.identity for ref in fields.values())
    layer = NormLayer(
        name=path,
        path=strip_wrappers(path),
        wrappers=wrappers_in(path),
        kind=kind,
        channels=channels,
        num_batches_tracked=counter if counter is not None and is_counter(counter) else None,
        affine="weight" in fields or "bias" in fields,
        stored_names=stored_names(group, fields),
        **fields,
    )
    walk.layers.append(_informed(walk, layer, class_name, found))


def _informed(walk: _Walk, layer: NormLayer, class_name: str | None, found: WrittenOut | None) -> NormLayer:
    """The layer with what the nodes of its module say."""
    kind = (kind_of_class((class_name,)) if class_name else None) or layer.kind
    if found is not None and kind in (NormKind.LAYER, NormKind.LAYER_OR_RMS, NormKind.LAYER_OR_GROUP):
        kind = NormKind.RMS if found.rms and layer.bias is None else NormKind.LAYER
    centred = zero_centred_by_class((class_name,), {}) if class_name else None
    if found is not None and kind is NormKind.RMS:
        centred = found.adds_one
    names = (_below(layer.name, leaf) for leaf in ("weight", "bias"))
    return replace(
        layer,
        kind=kind,
        origin=class_name or None,
        baked=True,
        eps=next(iter(found.eps)) if found is not None and len(found.eps) == 1 else None,
        requires_grad=_trainable(walk.tensors, names),
        zero_centred=None,
        zero_centred_by_class=centred,
    )


# by their names


def _add_named(walk: _Walk, classes: Mapping[str, str], written: Mapping[str, WrittenOut]) -> tuple[Any, ...]:
    """What looks like a norm by its names and no node uses as one. Gives the near misses."""
    model = read_names(walk.tensors.arrays)
    for layer in model.layers:
        refs = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        if any(ref is not None and ref.identity in walk.claimed for ref in refs):
            continue
        walk.layers.append(_informed(walk, layer, classes.get(layer.name), written.get(layer.name)))
    named = walk.names.keys()
    return tuple(miss for miss in model.near_misses if miss.name not in named)
