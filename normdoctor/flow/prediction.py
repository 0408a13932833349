"""What the running_mean of each norm must be, by the norms before it and the weights between: no data needed.

Where buffers and weights belong together, prediction and running_mean agree: exactly where the way between is linear,
closely where activations lie on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from normdoctor.errors import InputError
from normdoctor.flow.affine import Array, Blocked
from normdoctor.flow.constants import Constants
from normdoctor.flow.graph import Graph, Node, Op, Value
from normdoctor.flow.pointwise import pointwise
from normdoctor.flow.reading import Reach
from normdoctor.flow.spread import Spread, rank_of
from normdoctor.flow.spreads import spread_after
from normdoctor.places import Prediction

NO_NORM = "no norm lies before it"


@dataclass(eq=False)
class Forecast:
    """The predictions for one graph."""

    predictions: dict[Node, Prediction] = field(default_factory=dict)
    """For each BatchNorm with statistics that a chain reaches."""
    reasons: dict[Node, str] = field(default_factory=dict)
    """For each other one: what is in the way, as a clause."""
    reaches: dict[Node, Reach] = field(default_factory=dict)
    """What was read of the weights on the way."""


def predict(graph: Graph, constants: Constants) -> Forecast:
    """Carry mean and variance of every norm's output to the norms behind it.

    Each weight between two norms is read once, in chunks; others are not read."""
    forecast = Forecast()
    walk = _Walk(constants, forecast, {node: place for place, node in enumerate(graph.nodes)})
    targets = [node for node in graph.of(Op.BATCH_NORM) if _has_statistics(node, constants)]
    needed = _needed(targets)
    for node in graph.nodes:
        if node in needed or node.op is Op.BATCH_NORM:
            walk.visit(node)
    for node in targets:
        try:
            forecast.predictions[node] = walk.prediction_of(node)
        except Blocked as blocked:
            forecast.reasons[node] = blocked.sentence
        except (ValueError, IndexError):
            forecast.reasons[node] = "the shapes around it do not fit together"
    return forecast


def _has_statistics(node: Node, constants: Constants) -> bool:
    return all(constants.knows(node.given(slot)) for slot in (3, 4))


def _needed(targets: list[Node]) -> set[Node]:
    """The operators between norms."""
    needed: set[Node] = set()
    waiting = [value for target in targets for value in target.inputs[:1]]
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer
        if node is None or node in needed or node.op is Op.BATCH_NORM:
            continue
        needed.add(node)
        waiting += node.inputs
    return needed


class _Walk:
    """What is known of each value so far."""

    def __init__(self, constants: Constants, forecast: Forecast, order: Mapping[Node, int]) -> None:
        self._constants = constants
        self._forecast = forecast
        self._order = order
        self._spreads: dict[Value, Spread] = {}
        self._reasons: dict[Value, str] = {}

    def visit(self, node: Node) -> None:
        """Work out what is known of the outputs of a node."""
        try:
            if node.op is Op.BATCH_NORM:
                self._spreads[node.y] = self._source(node)
                return
            for place, spread in self._behind(node):
                self._spreads[node.outputs[place]] = spread
        except Blocked as blocked:
            self._reasons.update(dict.fromkeys(node.outputs, blocked.sentence))
        except InputError as error:
            self._reasons.update(dict.fromkeys(node.outputs, f"the weights between cannot be read ({error.message})"))
        except (ValueError, IndexError):  # numpy's: a file may declare any shapes
            self._reasons.update(dict.fromkeys(node.outputs, f"the shapes around {node.written} do not fit together"))

    def _behind(self, node: Node) -> list[tuple[int, Spread]]:
        given: list[Spread | None] = []
        for value in node.inputs:
            if value is None or self._constants.knows(value):
                given.append(None)
            elif (known := self._known(value)) is not None:
                given.append(known)
            else:
                raise Blocked("unknown-operator", self._reasons.get(value, NO_NORM))
        if not any(given):
            raise Blocked("unknown-operator", NO_NORM)
        if node.op is Op.MULTIPLY and None not in given:
            spread = pointwise(node, self._spreads, self._constants, self._order)
            if spread is not None:
                return [(0, spread)]
        return spread_after(node, given, self._constants, self._forecast.reaches)

    def _known(self, value: Value) -> Spread | None:
        """What the norms before a value say of it, else the statistics of a norm that takes this very value."""
        if value in self._spreads:
            return self._spreads[value]
        for use in value.uses:
            if use.node.op is Op.BATCH_NORM and use.slot == 0 and _has_statistics(use.node, self._constants):
                return self._observed(use.node)
        return None

    def _source(self, node: Node) -> Spread:
        """The output of a norm: mean beta, variance gamma^2 * v / (v + eps)."""
        weight, bias = self._vector(node, 1, 1.0), self._vector(node, 2, 0.0)
        var = self._vector(node, 4, np.inf)
        with np.errstate(all="ignore"):
            share = np.where(np.isposinf(var), 1.0, var / (var + node.attributes["eps"]))
            mean, variance = np.broadcast_arrays(bias, weight**2 * np.clip(share, 0.0, 1.0))
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise Blocked("not-finite", f"the numbers of {node.label} before it are not finite")
        return Spread.along(1, rank_of(node.y), mean, variance, node.label)

    def _observed(self, node: Node) -> Spread | None:
        mean, variance = self._vector(node, 3, 0.0), self._vector(node, 4, 1.0)
        if not (np.isfinite(mean).all() and np.isfinite(variance).all() and (variance >= 0).all()):
            return None
        try:
            return Spread.along(1, rank_of(node.x), mean, variance, node.label)
        except Blocked:
            return None

    def _vector(self, node: Node, slot: int, absent: float) -> Array:
        value = node.given(slot)
        if value is None:
            return np.full(1, absent)
        if not self._constants.knows(value):
            raise Blocked("computed-weight", f"the parameters of {node.label} before it are computed")
        return np.asarray(self._constants.array(value), np.float64).reshape(-1)

    def prediction_of(self, node: Node) -> Prediction:
        """What the norms before this one say of its input. Raises Blocked with the reason."""
        x = node.x
        spread = self._spreads.get(x)
        if spread is None:
            raise Blocked("unknown-operator", self._reasons.get(x, NO_NORM))
        stored = self._constants.array(node.inputs[3]) if node.inputs[3] is not None else np.zeros(0)
        mean, bias, alone = spread.per_channel()
        channels = stored.size
        if len(mean) not in (1, channels):
            raise Blocked("wrong-axis", "the channels before it do not fit")
        mean, bias = (np.broadcast_to(vector, (channels,)) for vector in (mean, bias))
        if not np.isfinite(mean).all():
            raise Blocked("not-finite", "the weights or norms before it are not finite")
        return Prediction(
            mean=mean,
            bias=bias if bias.any() else None,
            exact=spread.exact,
            even=spread.even and alone,
            sized=spread.sized,
            sources=tuple(sorted(spread.sources)),
            through=spread.through,
        )


def pooled(predictions: list[Prediction]) -> Prediction:
    """Of a norm that is called at several places: its statistics are the mean over the calls."""
    first = predictions[0]
    if len(predictions) == 1:
        return first
    biases = [np.zeros_like(one.mean) if one.bias is None else one.bias for one in predictions]
    bias = np.mean(biases, axis=0)
    return replace(
        first,
        mean=np.mean([one.mean for one in predictions], axis=0),
        bias=bias if bias.any() else None,
        exact=all(one.exact for one in predictions),
        even=all(one.even for one in predictions),
        sized=all(one.sized for one in predictions),
        sources=tuple(sorted(set(_all(one.sources for one in predictions)))),
        through=tuple(dict.fromkeys(_all(one.through for one in predictions))),
    )


def _all(words: Iterator[tuple[str, ...]]) -> Iterator[str]:
    return (word for several in words for word in several)
