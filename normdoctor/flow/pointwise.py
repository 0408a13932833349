"""Activations that are written out, as exporters leave them: x * sigmoid(x), x * clip(x + 3, 0, 6) / 6.

They are found as what depends elementwise on one single value, and their moments by quadrature over that value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from normdoctor.flow.affine import Array
from normdoctor.flow.constants import Constants
from normdoctor.flow.gaussian import moments_after
from normdoctor.flow.graph import Node, Op, Value
from normdoctor.flow.spread import Spread

MAX_NODES = 16
"""Operators that one written-out activation is made of."""

MAX_CHANNELS = 1 << 16

PANELS, POINTS = 24, 8
WIDTH = 9.0
"""Quadrature over so many standard deviations on both sides, by Gauss and Legendre on panels: a kink inside of one
costs about 1e-4 of a standard deviation."""

ARITHMETIC: dict[Op, Callable[..., Array]] = {
    Op.ADD: np.add,
    Op.SUBTRACT: np.subtract,
    Op.MULTIPLY: np.multiply,
    Op.DIVIDE: np.divide,
    Op.POWER: np.power,
}


NAMES = {"sigmoid": "silu", "hardsigmoid": "hardswish", "clip": "hardswish", "relu6": "hardswish", "erf": "gelu"}
"""What a product with such an inner function is usually called."""


def pointwise(
    node: Node, known: Mapping[Value, Spread], constants: Constants, order: Mapping[Node, int]
) -> Spread | None:
    """What is known behind a product of two computed values; None where both do not come from one value alone."""
    found = written_out(node, constants, order)
    if found is None:
        return None
    spread = known.get(found.base)
    if spread is None or spread.variance is None or spread.mean.size > MAX_CHANNELS:
        return None
    points, weights = _quadrature()
    axis = (-1,) + (1,) * spread.rank
    with np.errstate(all="ignore"):
        values = _evaluated(found, spread.mean + np.sqrt(spread.variance) * points.reshape(axis), constants)
        if values is None:
            return None
        shares = weights.reshape(axis)
        mean = (shares * values).sum(axis=0)
        variance = (shares * (values - mean) ** 2).sum(axis=0)
    return spread.activated(mean, variance, found.name)


class WrittenOut(NamedTuple):
    """An activation in several operators."""

    base: Value
    """What goes in."""
    nodes: list[Node]
    """In the order of the graph; the product comes last."""

    @property
    def name(self) -> str:
        """The activation by its usual name, for reports."""
        inner = [str(one.attributes.get("name")) for one in self.nodes if one.op is Op.ACTIVATION]
        if set(inner) == {"softplus", "tanh"}:
            return "mish"
        return NAMES.get(inner[0], "activation") if len(inner) == 1 else "activation"


def written_out(node: Node, constants: Constants, order: Mapping[Node, int]) -> WrittenOut | None:
    """The single value that a product of computed values depends on, by elementwise operators alone.

    order: place of every node in the graph."""
    nodes = [node]
    ends = set(_computed(node, constants))
    while len(ends) > 1:
        # What is made last cannot be what another end depends on.
        last = max(ends, key=lambda value: -1 if value.producer is None else order[value.producer])
        maker = last.producer
        if maker is None or not _is_elementwise(maker) or len(nodes) == MAX_NODES:
            return None
        nodes.append(maker)
        ends = (ends - {last}) | set(_computed(maker, constants))
    return WrittenOut(ends.pop(), nodes[::-1]) if ends and len(nodes) > 1 else None


def _computed(node: Node, constants: Constants) -> list[Value]:
    return [value for value in node.inputs if value is not None and not constants.knows(value)]


def _is_elementwise(node: Node) -> bool:
    if node.op is Op.ACTIVATION:
        return len(node.inputs) == 1
    return node.op in ARITHMETIC or node.op in (Op.NEGATE, Op.IDENTITY, Op.CAST)


def _evaluated(found: WrittenOut, given: Array, constants: Constants) -> Array | None:
    values: dict[Value, Array] = {found.base: given}
    for node in found.nodes:
        arguments = [_operand(value, values, constants, given.ndim) for value in node.inputs if value is not None]
        known = [argument for argument in arguments if argument is not None]
        if len(known) < len(arguments):
            return None
        result = _applied(node, known)
        if result is None:
            return None
        values[node.y] = result
    return values[found.nodes[-1].y]


def _operand(value: Value, values: Mapping[Value, Array], constants: Constants, rank: int) -> Array | None:
    if value in values:
        return values[value]
    if not constants.knows(value):
        return None
    array = np.asarray(constants.array(value), np.float64)
    return array.reshape((1,) * (rank - array.ndim) + array.shape) if array.ndim < rank else None


def _applied(node: Node, arguments: list[Array]) -> Array | None:
    if node.op in ARITHMETIC:
        return np.asarray(ARITHMETIC[node.op](*arguments))
    if node.op is Op.NEGATE:
        return -arguments[0]
    if node.op is not Op.ACTIVATION:
        return arguments[0]
    parameters = {
        name: node.attributes[name] for name in ("alpha", "low", "high") if node.attributes.get(name) is not None
    }
    found = moments_after(node.attributes["name"], arguments[0], np.zeros(1), **parameters)
    return None if found is None else found[0]  # without any spread the mean is the value itself


def _quadrature() -> tuple[Array, Array]:
    """Points in standard deviations and their shares of a normal variable, together 1."""
    inner, shares = np.polynomial.legendre.leggauss(POINTS)
    edges = np.linspace(-WIDTH, WIDTH, PANELS + 1)
    half = np.diff(edges) / 2
    points = (edges[:-1] + half)[:, None] + half[:, None] * inner
    density = np.exp(-(points**2) / 2) / np.sqrt(2 * np.pi)
    weights = half[:, None] * shares * density
    return points.reshape(-1), (weights / weights.sum()).reshape(-1)
