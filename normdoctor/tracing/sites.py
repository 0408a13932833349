"""What the code of a module lets us change: for each node of its graph the module it is, or why it must stay.

A graph gives every site a weight of its own. Module code cannot: a weight is an attribute of one module, and whoever
reads that attribute sees the change. So a weight is changed only where one stock module, called once, alone uses it,
and a norm goes only where it is a module of its own. Nothing here imports torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from normdoctor.flow.constants import Constants
from normdoctor.flow.graph import Fixed, Node, Op, Value
from normdoctor.flow.plan import FoldPlan
from normdoctor.layers import NormLayer
from normdoctor.readers import live_module
from normdoctor.readers.aten_overwriting import OVERWRITTEN, overwritten
from normdoctor.readers.norm_classes import FROZEN_CLASS
from normdoctor.tracing.recorded import Place, Recording

WEIGHTED = frozenset({Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL})
NORMS = frozenset({Op.BATCH_NORM, Op.LAYER_NORM, Op.OTHER_NORM})
ELEMENTWISE = frozenset({Op.ADD, Op.SUBTRACT, Op.MULTIPLY, Op.DIVIDE})

STOCK_WEIGHTED = {
    "torch.nn.modules.conv": (
        "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    ),
    "torch.nn.modules.linear": ("Linear",),
}  # fmt: skip
STOCK_NORMS = {
    "torch.nn.modules.batchnorm": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
    "torch.nn.modules.normalization": ("LayerNorm", "GroupNorm", "RMSNorm"),
    "torch.nn.modules.instancenorm": ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
}
"""Modules whose forward hands their own weight and bias to one operator, and does nothing else."""

METHODS = ("forward", "_conv_forward", "__call__", "__getattr__")

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""The first kind sees only what goes in."""

SLOT_NAMES = {
    Op.CONV: {1: "weight", 2: "bias"},
    Op.CONV_TRANSPOSE: {1: "weight", 2: "bias"},
    Op.MATMUL: {1: "weight", 2: "bias"},
    Op.BATCH_NORM: {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
    Op.LAYER_NORM: {1: "weight", 2: "bias"},
    Op.OTHER_NORM: {1: "weight", 2: "bias"},
}
"""Which attribute of a stock module each constant input is."""

OFFER = "; in a .pt2 or ONNX file it can be done"


@dataclass
class Calls:
    """How a module was called in one run of the model."""

    count: int = 0
    plain: bool = True
    """Each time with one tensor alone, giving one tensor."""
    inside: int = 0
    """How many calls are under way."""
    read: set[str] = field(default_factory=set)
    """Attributes that the code of other modules reads, and that an Identity has not."""


class _Memory(NamedTuple):
    """Where a tensor lies: its storage, its first byte there and the byte behind its last."""

    storage: int
    begin: int
    end: int

    def overlaps(self, other: _Memory) -> bool:
        return self.storage == other.storage and self.begin < other.end and other.begin < self.end


@dataclass(frozen=True, eq=False)
class Sites:
    """The modules behind the nodes of one recording."""

    recording: Recording
    modules: Mapping[str, Any]
    """Under every name."""
    calls: Mapping[int, Calls]
    """By the identity of the module."""
    constants: Constants = field(default_factory=Constants)
    inside: dict[str, list[Node]] = field(default_factory=lambda: defaultdict(list))
    """Path of a module → the nodes of its code and of the modules in it."""
    _keys: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Identity of a module → its calls as the tracer numbered them."""
    _foreign: list[_Memory] = field(default_factory=list)
    """Where tensors lie that others take than the modules that hold them as an attribute of their own."""

    def __post_init__(self) -> None:
        for node in self.recording.graph.nodes:
            for path, key in place_of(node).stack:
                self.inside[path].append(node)
                if path in self.modules:
                    self._keys[id(self.modules[path])].add(key)
        for value, stored in self.recording.stored.items():
            own = sum(self._is_own(use.node, stored.tensor) for use in value.uses)
            if own < len(value.uses) or value.is_output:
                self._foreign.append(_memory(stored.tensor))

    # what can be changed

    def holder(self, node: Node, slot: int) -> tuple[str, str] | Fixed:
        """Path of the module and name of the attribute that the constant at `slot` is, or why it cannot be changed."""
        value = node.given(slot)
        path = place_of(node).path
        module: Any = self.modules.get(path)
        stock = is_stock(module, STOCK_NORMS if node.op in NORMS else STOCK_WEIGHTED)
        if value is None:
            name = SLOT_NAMES.get(node.op, {}).get(slot)
            if module is None or not stock or name is None or name not in module._parameters:
                return Fixed("functional-call", f"the code of {_class(module)} has no place for it{OFFER}")
            return self._unshared(path, module) or (path, name)
        stored = self.recording.stored.get(value)
        if stored is None:
            return Fixed("computed-weight", f"its weight is computed by the code (a parametrization, a cast){OFFER}")
        name = _name_of(module, stored.tensor)
        if module is None or name is None or (node.op in WEIGHTED and not stock):
            words = f"{stored.name} is used by a function call in the code of {_class(module)}"
            return Fixed("functional-call", words + OFFER)
        shared = self._unshared(path, module)
        if shared is None and self._is_read_elsewhere(stored.tensor):
            return Fixed("shared-weight", f"{stored.name} is used at other places of the code too{OFFER}")
        return shared or (path, name)

    def _is_own(self, node: Node, tensor: Any) -> bool:
        """Whether a node takes a tensor that its module holds: with a new one there, nobody else sees a change."""
        module = self.modules.get(place_of(node).path)
        if _name_of(module, tensor) is None:
            return False
        return node.op in NORMS or (node.op in WEIGHTED and is_stock(module, STOCK_WEIGHTED))

    def _is_read_elsewhere(self, tensor: Any) -> bool:
        memory = _memory(tensor)
        return any(memory.overlaps(other) for other in self._foreign)

    def unchangeable(self, node: Node, slots: Iterable[int]) -> Fixed | None:
        """Why one of these constants cannot be changed; None where all can."""
        return next((found for slot in slots if isinstance(found := self.holder(node, slot), Fixed)), None)

    def _unshared(self, path: str, module: Any) -> Fixed | None:
        count = max(self.calls.get(id(module), Calls()).count, len(self._keys[id(module)]))
        if count > 1:
            return Fixed(
                "shared-module", f"{path or _class(module)} is called {count} times with the same weights{OFFER}"
            )
        if any(getattr(module, hooks, None) for hooks in HOOKS):
            return Fixed("hooks", f"hooks on {path or _class(module)} see what it takes and gives{OFFER}")
        return None

    # what can go

    def replacement(self, node: Node) -> tuple[str, tuple[str, ...]] | Fixed:
        """Path of the module that a norm is, and the names of the children that stay of it, in order; or why it stays.

        The children are what follows the norm in a module of its own: the activation of timm's BatchNormAct2d."""
        path = place_of(node).path
        module = self.modules.get(path)
        if module is None or not path:
            return Fixed("functional-call", f"it is a function call in the code of {_class(module)}{OFFER}")
        shared = self._unshared(path, module)
        if shared:
            return shared
        inside = [inner for inner in self.inside[path] if not self.constants.knows(inner.y)]
        own = [inner for inner in inside if place_of(inner).path == path]
        if node not in own or not self._is_norm(own):
            return Fixed("functional-call", f"it is a function call in the code of {path} ({_class(module)}){OFFER}")
        seen = self.calls.get(id(module), Calls())
        if seen.read:
            names = ", ".join(f"{path}.{name}" for name in sorted(seen.read))
            return Fixed("read-elsewhere", f"the code reads {names}, which would be gone{OFFER}")
        if not seen.plain:
            return Fixed("custom-module", f"{path} ({_class(module)}) takes or gives more than one tensor{OFFER}")
        children = self._children_behind(path, own[-1].y, inside[len(own) :] if inside[: len(own)] == own else None)
        if children is None:
            return Fixed("custom-module", f"{path} ({_class(module)}) does more than to normalise{OFFER}")
        return path, children

    def _is_norm(self, own: list[Node]) -> bool:
        """Whether the nodes are one norm, or a row of additions and multiplications by constants."""
        if len(own) == 1 and own[0].op in NORMS:
            return True
        for place, node in enumerate(own):
            constant = [self.constants.knows(value) for value in node.inputs]
            if node.op not in ELEMENTWISE or sum(constant) != 1:
                return False
            if place and own[place - 1].y not in node.inputs:
                return False
            if place < len(own) - 1 and (len(node.y.uses) != 1 or node.y.is_output):
                return False
        return bool(own)

    def _children_behind(self, path: str, value: Value, nodes: list[Node] | None) -> tuple[str, ...] | None:
        """The children that the value goes through one after the other; None where it goes another way."""
        if nodes is None:
            return None
        names: list[str] = []
        while nodes:
            name = _child(path, nodes[0])
            count = next((place for place, node in enumerate(nodes) if _child(path, node) != name), len(nodes))
            part, nodes = nodes[:count], nodes[count:]
            made = {output for node in part for output in node.outputs}
            taken = {v for node in part for v in node.inputs if v is not None and v not in made}
            taken = {entry for entry in taken if not self.constants.knows(entry)}
            if name is None or name in names or taken != {value} or value.is_output:
                return None
            if any(use.node not in part for use in value.uses):
                return None
            left = [v for v in made if v.is_output or any(use.node not in part for use in v.uses)]
            if left and left != [part[-1].y]:
                return None
            value = part[-1].y
            names.append(name)
        return tuple(names)


def place_of(node: Node) -> Place:
    """Where in the modules a node comes from."""
    place = node.site.call.site
    assert isinstance(place, Place)
    return place


def is_stock(module: Any, classes: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a module computes what the class of torch.nn does that it is or comes from."""
    kind = type(module)
    base = next((base for base in kind.__mro__ if base.__name__ in classes.get(base.__module__, ())), None)
    if base is None or "forward" in vars(module):
        return False
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in METHODS)


def mark_sites(recording: Recording, module: Any, calls: Mapping[int, Calls], *, evaluation: bool) -> Sites:
    """Write into the nodes what they are in the module: label, layer, mode, and why they must stay."""
    sites = Sites(recording, dict(module.named_modules(remove_duplicate=False)), calls)
    layers = {name: layer for layer in live_module.read(module).layers for name in (layer.name, *layer.aliases)}
    for node in recording.graph.nodes:
        _name(node, sites, layers)
        if not evaluation:
            _set_mode(node, sites)
    _promise_what_hooks_see(sites)
    for node in recording.graph.nodes:
        node.fixed = node.fixed or _why_fixed(node, sites)
    return sites


def _name(node: Node, sites: Sites, layers: Mapping[str, NormLayer]) -> None:
    path = place_of(node).path
    if node.op in NORMS or node.op in WEIGHTED:
        stored = next((sites.recording.stored[v] for v in node.inputs if v in sites.recording.stored), None)
        if stored is not None and _name_of(sites.modules.get(path), stored.tensor) is None:
            path = stored.name.rpartition(".")[0]
        node.layer = layers.get(path)
    node.label = path or node.y.name


def _set_mode(node: Node, sites: Sites) -> None:
    module = sites.modules.get(place_of(node).path)
    frozen = FROZEN_CLASS.search(type(module).__name__)
    if node.op is Op.BATCH_NORM and not frozen and getattr(module, "training", False):
        node.attributes["training"] = True


def _why_fixed(node: Node, sites: Sites) -> Fixed | None:
    if node.op is Op.BATCH_NORM:
        gone = sites.replacement(node)
        return gone if isinstance(gone, Fixed) else None
    if node.op in NORMS:
        return sites.unchangeable(node, [slot for slot in (1, 2) if node.given(slot) is not None])
    constants = [slot for slot, value in enumerate(node.inputs) if sites.constants.knows(value)]
    if node.op in WEIGHTED and constants:
        slots = sorted({*constants, 2} if node.attributes.get("takes_bias", True) else constants)
        return sites.unchangeable(node, slots)
    if node.op in ELEMENTWISE and len(constants) == 1 and isinstance(sites.replacement(node), Fixed):
        code = _class(sites.modules.get(place_of(node).path))
        return Fixed("constant-in-code", f"the constant is written in the code of {code}{OFFER}")
    return None


def _promise_what_hooks_see(sites: Sites) -> None:
    """Values that go into or come out of a module with hooks are seen by them, so they must stay.

    Not those of the modules that are weights and norms themselves: with hooks they cannot be changed anyway."""
    takes, gives = (
        {path for path, module in sites.modules.items() if path and any(getattr(module, h, None) for h in hooks)}
        for hooks in (HOOKS, HOOKS[1:])
    )
    if not takes:
        return
    for node in sites.recording.graph.nodes:
        for value in filter(None, node.inputs):
            made = value.producer
            left = set() if made is None else _hooked(made, gives) - _hooked(node, gives)
            entered = _hooked(node, takes) - (set() if made is None else _hooked(made, takes))
            if (left or entered) and not sites.constants.knows(value):
                value.is_output = True


def _hooked(node: Node, hooked: set[str]) -> set[str]:
    """The calls of modules with hooks that a node is part of."""
    place = place_of(node)
    own = place.path if node.op in WEIGHTED | NORMS else None
    return {key for path, key in place.stack if path in hooked and path != own}


def unsuitable(sites: Sites, plan: FoldPlan) -> dict[Node, Fixed]:
    """The norms whose folds module code cannot express, found out when the whole plan is known."""
    found: dict[Node, Fixed] = {}
    for node in plan.decomposed:
        found[node] = Fixed("module-code", f"in eval mode the module is one multiplication and one addition{OFFER}")
    wrong = {node: why for node in plan.bypassed if (why := _why_not_gone(node, sites, plan)) is not None}
    wrong |= dict.fromkeys(overwritten(plan), OVERWRITTEN)
    merged = [(node, slot) for node in plan.state.absorbed if node.op in NORMS for slot in (1, 2)]
    for node, slot in [*plan.state.replaced, *merged]:
        why = sites.unchangeable(node, (slot,))
        if why is not None and node not in plan.bypassed:
            wrong[node] = why
    for outcome in plan.outcomes:
        for node in {*outcome.nodes, *outcome.into, *outcome.through} & wrong.keys():
            found.setdefault(outcome.norm, wrong[node])
    return found


def _why_not_gone(node: Node, sites: Sites, plan: FoldPlan) -> Fixed | None:
    replaced = sites.replacement(node)
    if isinstance(replaced, Fixed):
        return replaced
    path, _ = replaced
    own = [inner for inner in sites.inside[path] if place_of(inner).path == path]
    if all(inner in plan.bypassed or sites.constants.knows(inner.y) for inner in own):
        return None
    return Fixed("custom-module", f"only a part of what {path} computes would go{OFFER}")


def _child(path: str, node: Node) -> str | None:
    """The name of the direct child of `path` whose code a node is."""
    paths = [own for own, _ in place_of(node).stack]
    place = len(paths) - 1 - paths[::-1].index(path) if path in paths else -1
    if place < 0 or place + 1 >= len(paths):
        return None
    name = paths[place + 1].removeprefix(f"{path}.")
    return None if "." in name or not paths[place + 1].startswith(f"{path}.") else name


def _memory(tensor: Any) -> _Memory:
    try:
        place = tensor.untyped_storage().data_ptr()
    except (RuntimeError, AttributeError, NotImplementedError):  # sparse, a subclass without a storage
        place = 0
    if not place or not tensor.numel():
        return _Memory(id(tensor), 0, 1)
    begin = tensor.storage_offset()
    reach = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    return _Memory(place, begin * size, (begin + reach + 1) * size)


def _name_of(module: Any, tensor: Any) -> str | None:
    """The name under which a module itself holds a tensor."""
    tables = () if module is None else (module._parameters, module._buffers)
    return next((name for table in tables for name, own in table.items() if own is tensor), None)


def _class(module: Any) -> str:
    return "the model" if module is None else type(module).__name__
