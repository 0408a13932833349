"""A graph → the place of every norm in it: what feeds it, what it feeds, what its mean must be, what a fold would do.

Everything is worked out here, so that neither graph nor weights outlive it: a `Place` is a few names and vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from normdoctor.errors import InputError
from normdoctor.flow.affine import Array, Blocked
from normdoctor.flow.constants import Constants
from normdoctor.flow.graph import Graph, Node, Op, Value
from normdoctor.flow.plan import Outcome, plan_folds
from normdoctor.flow.pointwise import written_out
from normdoctor.flow.prediction import Forecast, pooled, predict
from normdoctor.flow.reading import reach_of
from normdoctor.places import Activation, Fate, Neighbour, Place, Producer, Vector, Verdict

NORMS = (Op.BATCH_NORM, Op.LAYER_NORM, Op.OTHER_NORM)
WEIGHTED = (Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL)

SILENT = frozenset(
    {
        Op.IDENTITY, Op.CAST, Op.RESHAPE, Op.EXPAND, Op.TRANSPOSE, Op.SPLIT, Op.SLICE, Op.TILE, Op.GATHER,
        Op.DEPTH_TO_SPACE,
    }
)  # fmt: skip
"""What only moves or copies values: no neighbour."""

PASSED = frozenset({Op.ACTIVATION, Op.MAX_POOL, Op.AVERAGE_POOL, Op.RESIZE, Op.PAD, Op.NEGATE})
"""Neighbours with another neighbour behind them."""

MAX_BEFORE = 6
"""Neighbours that are told of before a norm."""

MAX_DROPOUTS = 20

MAX_VISITED = 200
"""Operators looked at for what lies before one norm."""

FOLDED = (Verdict.BACKWARD, Verdict.FORWARD, Verdict.MERGED)


def places_of(graph: Graph, *, evaluation: bool = False, largest: bool = True) -> dict[str, Place]:
    """The place of every norm by the name of its layer, or its label where no reader listed it.

    evaluation: norms saved in training mode are meant for inference, as for `plan_folds`. largest: also read the
    weights before a norm that no prediction needs, for `Producer.largest`.
    What cannot be worked out is None in the records; weights that cannot be read are among that."""
    survey = _Survey(graph, evaluation, largest)
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op in NORMS or node.layer is not None:
            found.setdefault(name_of(node), []).append(node)
    return {name: survey.place_of(nodes) for name, nodes in found.items()}


def name_of(node: Node) -> str:
    """What the norm is called: by its layer, else by its label."""
    return node.label if node.layer is None else node.layer.name


@dataclass(eq=False)
class _Survey:
    """One graph, and what is worked out for all of its norms at once."""

    graph: Graph
    evaluation: bool
    largest: bool
    constants: Constants = field(default_factory=Constants)
    forecast: Forecast = field(init=False)
    fates: Mapping[str, Fate] = field(init=False)
    gain_fates: Mapping[str, Fate] = field(init=False)
    order: Mapping[Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = {node: place for place, node in enumerate(self.graph.nodes)}
        self.forecast = predict(self.graph, self.constants)
        self.fates = self._planned(layernorm=False)
        tokens = any(True for _ in self.graph.of(Op.LAYER_NORM)) or any(
            node.layer is not None and node.op not in NORMS for node in self.graph.nodes
        )
        self.gain_fates = self._planned(layernorm=True) if tokens else {}

    def _planned(self, layernorm: bool) -> dict[str, Fate]:
        try:
            plan = plan_folds(self.graph, layernorm=layernorm, evaluation=self.evaluation)
        except InputError:  # a constant that cannot be read: `fold` says so, and which
            return {}
        fates: dict[str, Fate] = {}
        for outcome in plan.outcomes:
            name = name_of(outcome.norm)
            # A norm that is called at several places folds only if it does everywhere.
            if name not in fates or outcome.verdict is Verdict.LEFT:
                fates[name] = _fate(outcome)
        return fates

    def place_of(self, nodes: list[Node]) -> Place:
        """Of the layer that stands at these nodes."""
        node, name = nodes[0], name_of(nodes[0])
        takers = [taker for each in nodes if each.outputs for taker in self._takers(self._exit(each))]
        tokens = node.op is Op.LAYER_NORM or node.op not in NORMS
        predictions = [self.forecast.predictions.get(each) for each in nodes]
        known = [prediction for prediction in predictions if prediction is not None]
        complete = len(known) == len(predictions)
        return Place(
            calls=len(nodes),
            before=tuple(self._before(self._entry(node))) if node.inputs and node.inputs[0] is not None else (),
            after=tuple(dict.fromkeys(map(self._named, takers)))
            or (Neighbour(op="output", label=self._exit(node).name),),
            producer=self._producer(node) if len(nodes) == 1 else None,
            activation=self._activation(takers, nodes),
            positions=_positions(node),
            joins_branches=any(self._joins(taker) for taker in takers),
            padded=tuple(
                dict.fromkeys(
                    taker.label or taker.written
                    for taker in takers
                    if taker.op is Op.CONV and taker.attributes["padded"]
                )
            ),
            dropouts=tuple(self._dropouts(node)),
            prediction=pooled(known) if complete else None,
            unpredicted="" if complete else self._why_not(nodes),
            fate=self.fates.get(name),
            gain_fate=self.gain_fates.get(name) if tokens else None,
        )

    def _why_not(self, nodes: list[Node]) -> str:
        return next((self.forecast.reasons[node] for node in nodes if node in self.forecast.reasons), "")

    # Norms that are written out in arithmetic

    def _entry(self, node: Node) -> Value:
        """What goes into the norm: of (x - mean) / deviation the x."""
        maker = node.x.producer
        if node.op in NORMS or maker is None or maker.op is not Op.SUBTRACT or len(maker.inputs) != 2:
            return node.x
        data, mean = maker.inputs
        if data is None or mean is None:
            return node.x
        averaged = mean.producer is not None and mean.producer.inputs[:1] == [data]
        return data if averaged or self.constants.knows(mean) else node.x

    def _exit(self, node: Node) -> Value:
        """What comes out of it, behind gain and shift."""
        value = node.y
        for _ in range(2 if node.op not in NORMS else 0):
            uses = [use for use in value.uses if use.node.op is not Op.SHAPE]
            if len(uses) != 1 or value.is_output or uses[0].node.op not in (Op.MULTIPLY, Op.ADD):
                break
            others = (other for slot, other in enumerate(uses[0].node.inputs) if slot != uses[0].slot)
            if not all(self.constants.knows(other) for other in others):
                break
            value = uses[0].node.y
        return value

    # What comes before

    def _before(self, value: Value) -> Iterator[Neighbour]:
        told = 0
        for _ in range(MAX_VISITED):
            node = value.producer
            if node is None:
                yield Neighbour(op="input", label=value.name)
                return
            if node.op not in SILENT:
                base = self._inner(node)
                yield self._named(node)
                told += 1
                if told == MAX_BEFORE or (node.op not in PASSED and base is None):
                    return
                value = node.x if base is None else base
            elif node.inputs and node.inputs[0] is not None:
                value = node.x
            else:
                return

    def _inner(self, node: Node) -> Value | None:
        """What goes into an activation that is written out, where the node is the end of one."""
        if node.op is not Op.MULTIPLY:
            return None
        found = written_out(node, self.constants, self.order)
        return None if found is None else found.base

    def _named(self, node: Node) -> Neighbour:
        activation = str(node.attributes.get("name", "")) if node.op is Op.ACTIVATION else ""
        if node.op is Op.MULTIPLY and (found := written_out(node, self.constants, self.order)) is not None:
            return Neighbour(op=Op.ACTIVATION.value, written=node.written, label="", activation=found.name)
        label = name_of(node) if node.op in (*WEIGHTED, *NORMS) or node.layer is not None else ""
        return Neighbour(op=node.op.value, written=node.written, label=label, activation=activation)

    def _producer(self, norm: Node) -> Producer | None:
        if not norm.inputs or norm.inputs[0] is None:
            return None
        value, alone = norm.x, True
        while value.producer is not None and value.producer.op in (Op.IDENTITY, Op.CAST, Op.RESHAPE):
            alone = alone and _is_private(value)
            value = value.producer.x
        node = value.producer
        if node is None or node.op not in WEIGHTED:
            return None
        largest = self._largest(node)
        channels = _channels(norm)
        bias = self._bias(node)
        return Producer(
            neighbour=self._named(node),
            alone=alone and _is_private(value),
            bias=bias if bias is None or len(bias) == channels else None,
            largest=largest if largest is None or len(largest) == channels else None,
        )

    def _largest(self, node: Node) -> Vector | None:
        try:
            if node not in self.forecast.reaches:
                if not self.largest:
                    return None
                self.forecast.reaches[node] = reach_of(node, self.constants, None)
        except (Blocked, InputError):
            return None
        return self.forecast.reaches[node].largest

    def _bias(self, node: Node) -> Vector | None:
        value = node.given(2)
        if value is None or not self.constants.knows(value):
            return None
        try:
            bias: Array = np.asarray(self.constants.array(value), np.float64).reshape(-1)
        except InputError:
            return None
        return bias * float(node.attributes.get("beta", 1.0))

    def _dropouts(self, norm: Node) -> Iterator[tuple[str, float]]:
        waiting: list[Value | None] = [norm.x] if norm.inputs and norm.inputs[0] is not None else []
        seen: set[Node] = set()
        count = 0
        while waiting and len(seen) < MAX_VISITED and count < MAX_DROPOUTS:
            value = waiting.pop()
            node = None if value is None else value.producer
            if node is None or node in seen or node.op in NORMS:
                continue
            seen.add(node)
            probability = node.attributes.get("dropout") if node.op is Op.IDENTITY else None
            if probability:
                count += 1
                yield node.label or node.written, float(probability)
            waiting += node.inputs

    # What comes after

    def _takers(self, value: Value) -> list[Node]:
        """Who uses the values, behind what only moves them."""
        found: list[Node] = []
        waiting = [value]
        seen = 0
        while waiting and seen < MAX_VISITED:
            value, seen = waiting.pop(0), seen + 1
            for use in value.uses:
                if use.node.op in SILENT:
                    waiting += use.node.outputs
                elif use.node.op is not Op.SHAPE and use.node not in found:
                    found.append(use.node)
        written = self._written_out_behind(found)
        return found if written is None else [written]

    def _written_out_behind(self, takers: list[Node]) -> Node | None:
        """The end of an activation that is written out, where that is all that takes a value."""
        for node in takers:
            if node.op is not Op.MULTIPLY:
                continue
            found = written_out(node, self.constants, self.order)
            if found is not None and all(taker in found.nodes for taker in takers):
                return node
        return None

    def _activation(self, takers: list[Node], nodes: list[Node]) -> Activation | None:
        """Behind every call the same one and nothing else."""
        if not takers or any(output.is_output for node in nodes for output in node.outputs[:1]):
            return None
        told = {self._named(taker).activation for taker in takers}
        if len(told) > 1 or "" in told or len(takers) > len(nodes):
            return None
        node = takers[0]
        given = {name: node.attributes.get(name) for name in ("low", "high", "alpha")}
        bounds = {name: float(value) for name, value in given.items() if value is not None}
        return Activation(name=told.pop(), label=node.label, **bounds)

    def _joins(self, taker: Node) -> bool:
        operands = [value for value in taker.inputs if value is not None]
        return (
            taker.op is Op.ADD
            and len(set(operands)) == 2
            and not any(self.constants.knows(value) for value in operands)
        )


def _is_private(value: Value) -> bool:
    uses = [use for use in value.uses if use.node.op is not Op.SHAPE]
    return len(uses) == 1 and not value.is_output


def _see_padding(takers: list[Node]) -> Iterator[str]:
    for taker in takers:
        if taker.op is Op.CONV and taker.attributes["padded"]:
            yield taker.label or taker.written


def _channels(norm: Node) -> int:
    """How many numbers its parameters have; 0 where it has none."""
    shapes = (value.shape for value in norm.inputs[1:] if value is not None)
    return next((shape[0] for shape in shapes if shape and isinstance(shape[0], int)), 0)


def _positions(norm: Node) -> int | None:
    """Values of a channel in one sample."""
    shape = norm.x.shape if norm.inputs and norm.inputs[0] is not None else None
    if shape is None or len(shape) < 2 or norm.op is not Op.BATCH_NORM:
        return None
    lengths = [length for length in shape[2:] if isinstance(length, int)]
    return math.prod(lengths) if len(lengths) == len(shape) - 2 else None


def _fate(outcome: Outcome) -> Fate:
    return Fate(
        verdict=outcome.verdict.value,
        code=outcome.code,
        reason=outcome.reason,
        into=tuple(node.label or node.written for node in outcome.into),
        saved=_saved(outcome),
    )


def _saved(outcome: Outcome) -> int:
    """What the norm holds, without the bias that a weight gets in its place."""
    if outcome.verdict not in FOLDED:
        return 0
    shapes = [
        value.shape
        for node in outcome.nodes
        for value in node.inputs[1:]
        if value is not None and value.array is not None
    ]
    held = sum(math.prod(n for n in shape if isinstance(n, int)) for shape in shapes if shape is not None)
    fresh = sum(_outputs(node) for node in outcome.into if node.op in WEIGHTED and node.given(2) is None)
    return max(held - fresh, 0)


def _outputs(node: Node) -> int:
    """Channels that a weighted operator gives."""
    axis = len(node.y.shape or ()) - 1 if node.op is Op.MATMUL else 1
    length = (node.y.shape or (None, None))[axis]
    return length if isinstance(length, int) else 0
