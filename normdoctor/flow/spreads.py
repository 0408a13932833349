"""How each operator changes the mean and the variance of a channel: what flows through the norms without any data.

In training the output of a BatchNorm has the mean beta and the variance gamma^2 in every channel, whatever goes in
(Ioffe and Szegedy 2015, section 3). From there means go exactly through everything that is linear, and through
activations as those of a normal variable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from normdoctor.flow.affine import Array, Blocked
from normdoctor.flow.borders import padding_before, share_inside, shares_of
from normdoctor.flow.constants import Constants
from normdoctor.flow.gaussian import moments_after
from normdoctor.flow.graph import Node, Op, Value
from normdoctor.flow.reading import Reach, reach_of
from normdoctor.flow.spread import Spread, rank_of

MAX_JOINED = 1 << 22
"""Elements of a mean after a concatenation."""

MAX_SEEN = 1 << 23
"""Inputs times taps that one output of a weighted operator sees."""

SMALL_OPERAND = 1 << 20
"""Elements of a constant that is added or multiplied."""


Given = Sequence[Spread | None]
"""What is known of each input of a node, by slot; None for constants."""

Outcome = list[tuple[int, Spread]]
"""Output and what is known of it."""


def spread_after(node: Node, given: Given, constants: Constants, reaches: dict[Node, Reach]) -> Outcome:
    """What is known behind an operator, where it is known of all its computed inputs.

    reaches: what was read of the weights on the way is left there. Raises Blocked with the reason as a clause."""
    step = STEPS.get(node.op)
    if step is None:
        raise Blocked("unknown-operator", f"{_words(node)} lies between")
    return step(_Site(node, given, constants, reaches))


@dataclass(frozen=True, eq=False)
class _Site:
    node: Node
    given: Given
    constants: Constants
    reaches: dict[Node, Reach]

    @property
    def x(self) -> Spread:
        spread = self.given[0]
        if spread is None:
            raise Blocked("unknown-operator", f"{_words(self.node)} lies between")
        return spread

    def constant(self, value: Value) -> Array:
        """A constant operand with as many axes as the output has."""
        array = np.asarray(self.constants.array(value), dtype=np.float64)
        if array.size > SMALL_OPERAND:
            raise Blocked("too-large", f"{_words(self.node)} with a large constant lies between")
        rank = rank_of(self.node.y)
        return array.reshape((1,) * (rank - array.ndim) + array.shape)


def _words(node: Node) -> str:
    name = node.attributes.get("name") if node.op is Op.ACTIVATION else None
    if node.op is Op.OTHER:
        return f"the operator {node.written}" if node.written else "an unknown operator"
    return str(name or node.op.value)


def _merged_words(*spreads: Spread) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for spread in spreads for word in spread.through))


# Moving


def _moved(site: _Site) -> Outcome:
    return site.x.moved(site.node)


def _resized(site: _Site) -> Outcome:
    return [(place, replace(spread, even=False).told(_words(site.node))) for place, spread in site.x.moved(site.node)]


def _sliced(site: _Site) -> Outcome:
    along = site.node.attributes["axis"]
    by_channel = site.x.mean.shape[along] != 1
    return [(place, replace(spread, even=spread.even and by_channel)) for place, spread in site.x.moved(site.node)]


def _averaged(site: _Site) -> Outcome:
    node = site.node
    if node.attributes.get("counts_padding"):
        raise Blocked("padding", "an average pooling that counts its padding lies between")
    lengths = (node.y.shape or (None,) * site.x.rank)[2:]
    everything = node.op is Op.REDUCE_MEAN or all(length == 1 for length in lengths)
    return [
        (place, replace(spread, variance=None, even=spread.even and everything).told(_words(node)))
        for place, spread in site.x.moved(node)
    ]


def _concatenated(site: _Site) -> Outcome:
    node, axis = site.node, site.node.attributes["axis"]
    parts: list[Spread] = []
    for value, spread in zip(node.inputs, site.given, strict=True):
        if spread is None and value is None:
            raise Blocked("unknown-shape", "a concatenation of a value that is missing lies between")
        if spread is None and value is not None:
            array = site.constant(value)
            spread = Spread(array, np.zeros((1,) * array.ndim), array)
        assert spread is not None
        parts.append(spread)
    lengths = [(value.shape or ())[axis] if value and value.shape else None for value in node.inputs]
    rank = parts[0].rank

    def joined(arrays: Sequence[Array]) -> Array:
        common = [max(array.shape[place] for array in arrays) for place in range(rank)]
        whole = []
        for array, length in zip(arrays, lengths, strict=True):
            if not isinstance(length, int):
                raise Blocked("unknown-shape", "a concatenation of unknown lengths lies between")
            common[axis] = length
            if math.prod(common) > MAX_JOINED:
                raise Blocked("too-large", "a concatenation along another axis lies between")
            whole.append(np.broadcast_to(array, common))
        return np.concatenate(whole, axis=axis)

    variances = [part.variance for part in parts]
    known = [variance for variance in variances if variance is not None]
    result = Spread(
        joined([part.mean for part in parts]),
        joined(known) if len(known) == len(parts) else None,
        joined([part.bias for part in parts]),
        all(part.exact for part in parts),
        all(part.even for part in parts),
        all(part.sized for part in parts),
        frozenset().union(*(part.sources for part in parts)),
        _merged_words(*parts),
    )
    return [(0, result.told(_words(node)))]


def _padded(site: _Site) -> Outcome:
    """By the share of positions that are not padding, where the lengths are known."""
    node, spread = site.node, site.x
    if any(spread.mean.shape[axis] != 1 for axis in node.attributes["axes"]):
        raise Blocked("padding", "padding along the channels lies between")
    sized = True
    if node.attributes.get("mode", "constant") == "constant":
        share, filler = share_inside(node), float(node.attributes.get("value", 0.0))
        sized = share is not None
        share = 1.0 if share is None else share
        mean = share * spread.mean + (1 - share) * filler
        variance = None
        if spread.variance is not None:
            variance = share * (spread.variance + (spread.mean - filler) ** 2 * (1 - share))
        spread = replace(spread, mean=mean, variance=variance, bias=share * spread.bias)
    return [(0, replace(spread, even=False, sized=spread.sized and sized).told(_words(node)))]


# Arithmetic


def _added(site: _Site) -> Outcome:
    node = site.node
    sign = -1.0 if node.op is Op.SUBTRACT else 1.0
    first, second = site.given
    if first is not None and second is not None:
        variance = None
        if first.variance is not None and second.variance is not None:
            variance = first.variance + second.variance  # as if the branches were independent
        result = Spread(
            first.mean + sign * second.mean,
            variance,
            first.bias + sign * second.bias,
            first.exact and second.exact,
            first.even and second.even,
            first.sized and second.sized,
            first.sources | second.sources,
            _merged_words(first, second),
        )
        return [(0, result.told(_words(node)))]
    data = first if first is not None else second
    other = node.inputs[1 if first is not None else 0]
    if data is None or other is None:
        raise Blocked("unknown-shape", f"{_words(node)} of a value that is missing lies between")
    constant = site.constant(other)
    if first is None:
        data, constant = (data.scaled(np.full((1,) * data.rank, sign)), constant)
        sign = 1.0
    data = _grown(data, constant)
    return [(0, replace(data, mean=data.mean + sign * constant, bias=data.bias + sign * constant))]


def _grown(spread: Spread, constant: Array) -> Spread:
    if constant.ndim != spread.rank:
        raise Blocked("unknown-shape", "an operand with other axes lies between")
    return spread


def _multiplied(site: _Site) -> Outcome:
    node = site.node
    first, second = site.given
    other = node.inputs[1 if first is not None else 0]
    data = first if first is not None else second
    if (first is not None and second is not None) or data is None or other is None:
        raise Blocked("nonlinear", "a product of two computed values lies between")
    constant = site.constant(other)
    if node.op is Op.DIVIDE:
        if first is None:
            raise Blocked("nonlinear", "a reciprocal lies between")
        with np.errstate(all="ignore"):
            constant = 1.0 / constant
    return [(0, _grown(data, constant).scaled(constant))]


def _negated(site: _Site) -> Outcome:
    return [(0, site.x.scaled(np.full((1,) * site.x.rank, -1.0)))]


# Activations


def _activated(site: _Site) -> Outcome:
    node, spread = site.node, site.x
    attributes = node.attributes
    name = str(attributes.get("name", ""))
    if spread.variance is None:
        raise Blocked("nonlinear", f"the variance before {name} is not known: no norm lies just before it")
    slope = attributes.get("alpha")
    slopes = node.given(1)
    if name == "prelu" and slopes is not None:
        if not site.constants.knows(slopes):
            raise Blocked("computed-weight", "an activation with computed parameters lies between")
        slope = _of_channels(np.asarray(site.constants.array(slopes), np.float64), spread.rank)
    parameters = {key: attributes[key] for key in ("low", "high") if key in attributes}
    found = moments_after(name, spread.mean, np.sqrt(spread.variance), alpha=slope, **parameters)
    if found is None:
        raise Blocked("nonlinear", f"{name or node.written}, whose moments are not known, lies between")
    mean, variance = found
    return [(0, spread.activated(mean, variance, name))]


def _of_channels(slopes: Array, rank: int) -> Array:
    """PReLU's slopes along axis 1: torch stores one axis, ONNX (C, 1, 1)."""
    if slopes.size == 1:
        return slopes.reshape((1,) * rank)
    if slopes.size != max(slopes.shape) or rank < 2:
        raise Blocked("wrong-axis", "an activation with parameters of several axes lies between")
    return slopes.reshape((1, -1) + (1,) * (rank - 2))


# Weights


def _weighted(site: _Site) -> Outcome:
    node = site.node
    if site.given[0] is None or any(spread is not None for spread in site.given[1:]):
        raise Blocked("computed-weight", f"{_words(node)} with computed weights lies between")
    return _product(site) if node.op is Op.MATMUL else _convolved(site)


def _convolved(site: _Site) -> Outcome:
    node, spread = site.node, site.x
    mean, _, alone = spread.per_channel()
    pad = padding_before(node)
    if pad is not None:
        mean = mean / (share_inside(pad) or 1.0)  # the taps say which of the zeros they see
    shares, plain, sized = shares_of(node, pad)
    inputs = _inputs_of(node)
    if inputs * shares.size > MAX_SEEN:
        raise Blocked("too-large", "a convolution over very many inputs lies between")
    expectation = np.multiply.outer(np.broadcast_to(mean, (inputs,)), shares)
    reach = reach_of(node, site.constants, expectation)
    site.reaches[node] = reach
    assert reach.means is not None
    bias = _bias_of(site, 2, len(reach.means))
    shape = (1, -1) + (1,) * (spread.rank - 2)
    result = replace(
        spread,
        mean=(reach.means + bias).reshape(shape),
        variance=None,
        bias=bias.reshape(shape),
        even=spread.even and alone and plain,
        sized=spread.sized and sized,
    )
    return [(0, result.told(_words(node)))]


def _inputs_of(node: Node) -> int:
    weight = node.given(1)
    shape = None if weight is None else weight.shape
    if shape is None or not all(isinstance(length, int) for length in shape):
        raise Blocked("unknown-shape", "a convolution of unknown size lies between")
    groups = int(node.attributes.get("groups", 1))
    first, second = int(shape[0] or 0), int(shape[1] or 0)
    return first if node.op is Op.CONV_TRANSPOSE else second * groups


def _bias_of(site: _Site, slot: int, length: int) -> Array:
    value = site.node.given(slot)
    if value is None:
        return np.zeros(length)
    if not site.constants.knows(value):
        raise Blocked("computed-bias", f"{_words(site.node)} with a computed bias lies between")
    return np.broadcast_to(np.asarray(site.constants.array(value), np.float64).reshape(-1), (length,))


def _product(site: _Site) -> Outcome:
    node, spread = site.node, site.x
    last = spread.rank - 1
    weight = node.given(1)
    if weight is None or weight.shape is None or len(weight.shape) != 2:
        raise Blocked("computed-weight", "a matrix product that is no linear layer lies between")
    mean, _, alone = spread.per_channel(last)
    features = weight.shape[1 if node.attributes.get("transpose_b") else 0]
    if not isinstance(features, int) or node.attributes.get("transpose_a") or features > MAX_SEEN:
        raise Blocked("unknown-shape", "a matrix product of unknown or unusual size lies between")
    reach = reach_of(node, site.constants, np.broadcast_to(mean, (features,)).astype(np.float64))
    site.reaches[node] = reach
    assert reach.means is not None
    bias = _bias_of(site, 2, len(reach.means)) * float(node.attributes.get("beta", 1.0))
    shape = (1,) * last + (-1,)
    result = replace(
        spread,
        mean=(reach.means + bias).reshape(shape),
        variance=None,
        bias=bias.reshape(shape),
        even=spread.even and alone,
    )
    return [(0, result.told(_words(node)))]


STEPS: dict[Op, Callable[[_Site], Outcome]] = {
    **dict.fromkeys(
        (Op.IDENTITY, Op.CAST, Op.TRANSPOSE, Op.RESHAPE, Op.EXPAND, Op.TILE, Op.SPLIT, Op.GATHER),
        _moved,
    ),
    Op.SLICE: _sliced,
    Op.RESIZE: _resized,
    Op.AVERAGE_POOL: _averaged,
    Op.REDUCE_MEAN: _averaged,
    Op.CONCAT: _concatenated,
    Op.PAD: _padded,
    Op.ADD: _added,
    Op.SUBTRACT: _added,
    Op.MULTIPLY: _multiplied,
    Op.DIVIDE: _multiplied,
    Op.NEGATE: _negated,
    Op.ACTIVATION: _activated,
    Op.CONV: _weighted,
    Op.CONV_TRANSPOSE: _weighted,
    Op.MATMUL: _weighted,
}
"""How moments go through each operator. Whatever is not here ends the chain."""
