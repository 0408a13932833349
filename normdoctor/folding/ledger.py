"""What a plan comes to: a row per norm, what it saves, and what its new weights do to narrow types."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from normdoctor.flow.graph import Graph, Node, Op, Value
from normdoctor.flow.plan import FoldPlan, NewInput, Outcome
from normdoctor.folding.records import FoldRow, Overflow
from normdoctor.places import Verdict
from normdoctor.readers.arrays import decode, encode

FP16_LARGEST = 65504.0

OVERFLOW = "overflow"
"""Reason code of a norm whose folded weights their own type cannot hold."""


@dataclass(frozen=True)
class Size:
    """What is left of a new weight when its values are gone."""

    elements: int
    dtype: str
    copied: bool


class WatchedPlan(FoldPlan):
    """A plan whose new weights are looked at while somebody writes them, so that they are computed only once."""

    def __init__(self, plan: FoldPlan) -> None:
        vars(self).update(vars(plan))
        self.inner = plan
        self.forget()

    def forget(self) -> None:
        self.sizes: dict[tuple[Node, int], Size] = {}
        self.overflows: list[Overflow] = []
        self.broken: dict[Node, str] = {}
        """Nodes with a weight that its own type cannot hold, and the sentence on it."""

    def new_inputs(self) -> Iterator[NewInput]:
        self.forget()
        for node, shift in self.appended.items():
            self._look_at_constants(node, shift)
        for node, (scale, shift) in self.decomposed.items():
            self._look_at_constants(node, scale, shift)
        for new in self.inner.new_inputs():
            self._look_at(new)
            yield new

    def _look_at_constants(self, node: Node, *arrays: NDArray[np.float64]) -> None:
        dtype = node.y.dtype or "float32"
        extremes = np.array([edge for array in arrays if array.size for edge in (array.min(), array.max())])
        if not all_hold(extremes, dtype):
            self.broken[node] = f"what {node.label} would add or multiply by is beyond what {dtype} holds"

    def _look_at(self, new: NewInput) -> None:
        self.sizes[new.node, new.slot] = Size(new.values.size, new.dtype, new.copied)
        if not new.values.size:
            return
        extremes = np.array([new.values.min(), new.values.max()])
        if not all_hold(extremes, new.dtype):
            what = "are not finite" if not np.isfinite(extremes).all() else f"are beyond what {new.dtype} holds"
            self.broken[new.node] = f"the folded weights of {new.node.label} {what} (up to {_largest(extremes):.3g})"
        elif _largest(extremes) > FP16_LARGEST:
            self.overflows.append(Overflow(weight=new.node.label, channels=beyond(new), largest=_largest(extremes)))


def all_hold(values: NDArray[np.float64], dtype: str) -> bool:
    """Whether all values are finite, also when cast to `dtype`."""
    if not np.isfinite(values).all():
        return False
    return bool(np.isfinite(decode(encode(values, dtype), dtype)).all())


def _largest(extremes: NDArray[np.float64]) -> float:
    return float(np.abs(extremes).max())


def beyond(new: NewInput) -> tuple[int, ...]:
    """The output channels in which float16 would overflow; empty where the tensor has no axis of them."""
    over: NDArray[np.bool_] = np.abs(new.values) > FP16_LARGEST
    node, slot = new.node, new.slot
    if node.op is Op.CONV_TRANSPOSE and slot == 1:
        groups = int(node.attributes.get("groups", 1))
        inputs, outputs = over.shape[:2]
        over = np.asarray(over.reshape(groups, inputs // groups, outputs, -1).any(axis=(1, 3))).reshape(-1)
    elif node.op is Op.CONV and slot == 1:
        over = _any(over, 0)
    elif node.op is Op.MATMUL and slot < 2 and over.ndim > 1:
        turned = bool(node.attributes.get("transpose_b" if slot else "transpose_a", False))
        axis = -2 if turned is bool(slot) else -1  # output columns are those of b, output rows those of a
        over = _any(over, axis)
    elif node.op in (Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL, Op.BATCH_NORM):
        over = _any(over, -1) if over.ndim else over.reshape(1)
    else:
        return ()
    return tuple(int(place) for place in np.flatnonzero(over))


def _any(over: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """Along one axis, whether any element is."""
    return np.asarray(np.moveaxis(over, axis, 0).reshape(over.shape[axis], -1).any(axis=1))


def outcomes_of(broken: Iterable[Node], outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The folds that change one of these nodes."""
    nodes = set(broken)
    return [
        outcome
        for outcome in outcomes
        if outcome.verdict is not Verdict.LEFT and not nodes.isdisjoint((outcome.norm, *outcome.nodes, *outcome.into))
    ]


# rows


def row_of(outcome: Outcome) -> FoldRow:
    """The norm in words."""
    return FoldRow(
        norm=outcome.norm.label,
        kind=kind_of(outcome),
        verdict=outcome.verdict.value,
        into=tuple(dict.fromkeys(node.label for node in outcome.into)),
        through=tuple(_without_repetition(map(words, outcome.through))),
        code=outcome.code,
        reason=outcome.reason,
        gain=float(outcome.gain),
    )


def kind_of(outcome: Outcome) -> str:
    """The kind of layer, or the operators that do its work."""
    norm = outcome.norm
    if norm.layer is not None:
        return norm.layer.kind.value
    if norm.op is Op.BATCH_NORM:
        return "BatchNorm"
    if norm.op is Op.LAYER_NORM:
        return "RMSNorm" if norm.attributes.get("rms", False) else "LayerNorm"
    if norm.op is Op.OTHER_NORM:
        return norm.written or norm.op.value
    return " and ".join(dict.fromkeys(words(node) for node in outcome.nodes or (norm,)))


def words(node: Node) -> str:
    """What a node does, in a word or two."""
    return str(node.attributes.get("name") or node.op.value) if node.op is Op.ACTIVATION else node.op.value


def _without_repetition(found: Iterable[str]) -> Iterator[str]:
    last = None
    for word in found:
        if word != last:
            yield word
        last = word


# counts


@dataclass(frozen=True)
class Tally:
    """What a plan comes to in numbers."""

    parameters: tuple[int, int]
    """Stored numbers, before and after."""
    nodes: tuple[int, int]
    """Operators, before and after."""
    copies: tuple[str, ...]
    """Nodes that get a copy of a weight which somebody else goes on using."""


def tally(graph: Graph, plan: WatchedPlan) -> Tally:
    """The counts of a plan whose new inputs have been looked at."""
    dying = _Dying(graph)
    dying.drop((node, slot) for node, slot in plan.sizes if node.given(slot) is not None)
    for node, data in plan.bypassed.items():
        dying.drop((node, slot) for slot in range(len(node.inputs)) if slot != data)
    for node in plan.decomposed:
        dying.drop((node, slot) for slot in range(1, len(node.inputs)))
    before = _stored(value for node in graph.nodes for value in (*node.inputs, *node.outputs))
    total = sum(entry.elements for entry in before.values())
    gone = sum(entry.elements for entry in before.values() if dying.values.issuperset(entry.values))
    added = sum(size.elements for size in plan.sizes.values())
    added += sum(array.size for array in plan.appended.values())
    added += sum(scale.size + shift.size for scale, shift in plan.decomposed.values())
    operators = [node for node in graph.nodes if node.op is not Op.CONSTANT and not _is_sink(node)]
    left = sum(node not in dying.nodes and node not in plan.bypassed for node in operators)
    copies = (node.label for (node, slot), size in plan.sizes.items() if size.copied and dying.spares(node.given(slot)))
    return Tally(
        (total, total - gone + added),
        (len(operators), left + len(plan.appended) + len(plan.decomposed)),
        tuple(dict.fromkeys(copies)),
    )


def _is_sink(node: Node) -> bool:
    """Whether the node only stands for a part of another one: what uses its shapes and limits."""
    return node.op is Op.OTHER and not any(y.name or y.uses or y.is_output for y in node.outputs) and bool(node.outputs)


class _Dying:
    """Which values and nodes nobody uses any more once some uses are dropped."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: set[Node] = set()
        self.values: set[Value] = set()
        self._dropped: set[tuple[Node, int]] = set()
        self._sinks: dict[object, list[Node]] = {}
        for node in filter(_is_sink, graph.nodes):
            self._sinks.setdefault(_place(node), []).append(node)

    def spares(self, value: Value | None) -> bool:
        """Whether somebody goes on using it."""
        return value is not None and value not in self.values

    def drop(self, uses: Iterable[tuple[Node, int]]) -> None:
        pending = list(uses)
        while pending:
            node, slot = pending.pop()
            value = node.given(slot)
            if value is None or (node, slot) in self._dropped:
                continue
            self._dropped.add((node, slot))
            if value.is_output or not all((use.node, use.slot) in self._dropped for use in value.uses):
                continue
            self.values.add(value)
            maker = value.producer
            if maker is None or maker in self.nodes or not self.values.issuperset(maker.outputs):
                continue
            for dead in (maker, *self._sinks.get(_place(maker), ())):
                self.nodes.add(dead)
                pending += [(dead, place) for place in range(len(dead.inputs))]


def _place(node: Node) -> object:
    """What all nodes have in common that stand for one operator of the file."""
    step = getattr(node.site, "step", None)
    return id(node) if step is None else (id(step.scope), id(step.node))


@dataclass
class _Stored:
    elements: int
    values: list[Value] = field(default_factory=list)


def _stored(values: Iterable[Value | None]) -> dict[object, _Stored]:
    """Each stored tensor of floats once, however many values show it."""
    found: dict[object, _Stored] = {}
    for value in dict.fromkeys(values):
        if value is not None and value.array is not None and "float" in value.array.dtype:
            entry = found.setdefault(value.array.identity, _Stored(math.prod(value.array.shape)))
            entry.values.append(value)
    return found
