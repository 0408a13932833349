"""The operators with weights: which affine maps they can take in, and their weights with the maps in them.

For a map behind the operator ("out"): W' = scale * W and bias' = scale * bias + shift, per output channel. For a map in
front of it ("in"): W' = W * scale per input channel and bias' = bias + W applied to the shift. Jacob et al. 2018
(arXiv:1712.05877, section 3.2) give the first; the second follows from linearity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from normdoctor.flow.affine import Affine, Array, Blocked
from normdoctor.flow.graph import Node, Op, Value

WEIGHTED = frozenset({Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL})

AFFINE_NORMS = frozenset({Op.BATCH_NORM, Op.LAYER_NORM, Op.OTHER_NORM})

Side = Literal["out", "in"]


@dataclass(frozen=True, eq=False)
class Absorption:
    """One map that a node takes in: one number per channel of the side it is on."""

    side: Side
    scale: Array
    shift: Array


def take_behind(node: Node, affine: Affine, weight_slot: int) -> Absorption:
    """The absorption of a map on the node's output. Raises Blocked where the weights have no such channels."""
    axis, length = _output_channels(node, affine.rank, weight_slot)
    return Absorption("out", *affine.vectors(axis, length))


def take_in_front(node: Node, affine: Affine, weight_slot: int) -> Absorption:
    """The absorption of a map on the node's data input. Raises Blocked."""
    weight = node.inputs[weight_slot]
    assert weight is not None
    shape = whole_shape(weight)
    if node.op is Op.MATMUL:
        data_axis = _contracted(node, 1 - weight_slot, affine.rank)
        scale, shift = affine.vectors(data_axis, shape[_contracted(node, weight_slot, len(shape))])
        if shift.any() and len(shape) != 2:
            raise Blocked("unknown-shape", "a stack of matrices has no single bias")
        return Absorption("in", scale, shift)
    groups = node.attributes.get("groups", 1)
    length = shape[0] if node.op is Op.CONV_TRANSPOSE else shape[1] * groups
    scale, shift = affine.vectors(1, length)
    if shift.any() and node.attributes.get("padded"):
        what = "a transposed convolution" if node.op is Op.CONV_TRANSPOSE else "the next convolution"
        reason = "sees fewer taps at the border" if node.op is Op.CONV_TRANSPOSE else "pads with zeros"
        raise Blocked("padding", f"{what} {reason}, so a shift before it is not a bias behind it")
    return Absorption("in", scale, shift)


def _output_channels(node: Node, rank: int, weight_slot: int) -> tuple[int, int]:
    """Axis of the output that the weights own, and its length."""
    weight = node.inputs[weight_slot]
    assert weight is not None
    shape = whole_shape(weight)
    if node.op is Op.CONV:
        return 1, shape[0]
    if node.op is Op.CONV_TRANSPOSE:
        return 1, shape[1] * int(node.attributes.get("groups", 1))
    data = node.inputs[1 - weight_slot]
    if len(shape) < 2 or (weight_slot == 0 and (data is None or data.shape is None or len(data.shape) < 2)):
        raise Blocked("wrong-axis", "a product with a vector has no output channels")
    own = _free(node, weight_slot, len(shape))
    return (rank - 1 if weight_slot == 1 else rank - 2), shape[own]


def _is_turned(node: Node, slot: int) -> bool:
    return bool(node.attributes.get("transpose_a" if slot == 0 else "transpose_b"))


def _contracted(node: Node, slot: int, rank: int) -> int:
    """The axis of a matrix factor that is summed over. A vector has only that one."""
    if rank == 1:
        return 0
    last = (slot == 0) != _is_turned(node, slot)
    return rank - 1 if last else rank - 2


def _free(node: Node, slot: int, rank: int) -> int:
    """The axis of a matrix factor that the output keeps."""
    return rank - 1 if _contracted(node, slot, rank) == rank - 2 else rank - 2


def whole_shape(value: Value) -> tuple[int, ...]:
    """The shape of a constant. Raises Blocked where the graph does not know it."""
    shape = value.array.shape if value.array is not None else value.shape
    lengths = tuple(length for length in shape or () if isinstance(length, int))
    if shape is None or len(lengths) != len(shape):
        raise Blocked("unknown-shape", f"the shape of {value.name} is not known")
    return lengths


@dataclass(eq=False)
class Weights:
    """Weight and bias of one node in float64 while maps are taken in, in order."""

    node: Node
    slot: int
    weight: NDArray[Any]
    bias: Array | None

    def take(self, absorption: Absorption) -> None:
        """Take in one map."""
        if self.node.op is Op.MATMUL:
            self._take_matrix(absorption)
        elif absorption.side == "out":
            self._take_out(absorption.scale, absorption.shift)
        else:
            self._take_in(absorption.scale, absorption.shift)

    def _take_out(self, scale: Array, shift: Array) -> None:
        if self.node.op is Op.CONV:
            self.weight = self.weight * _column(scale, self.weight.ndim, 0)
        else:
            # (in, out/groups, ...): the input channels come group by group, and so do the output channels.
            groups = self.node.attributes.get("groups", 1)
            inputs, outputs = self.weight.shape[:2]
            per_input = np.repeat(scale.reshape(groups, outputs), inputs // groups, axis=0)
            self.weight = self.weight * per_input.reshape(inputs, outputs, *[1] * (self.weight.ndim - 2))
        if self.bias is not None:
            self.bias = scale * self.bias + shift
        elif shift.any():
            self.bias = shift.copy()

    def _take_in(self, scale: Array, shift: Array) -> None:
        groups = self.node.attributes.get("groups", 1)
        summed = self.weight.reshape(*self.weight.shape[:2], -1).sum(axis=2)
        if self.node.op is Op.CONV:
            outputs, inputs = summed.shape
            per_output = np.repeat(shift.reshape(groups, inputs), outputs // groups, axis=0)
            added = (summed * per_output).sum(axis=1)
            factors = np.repeat(scale.reshape(groups, inputs), outputs // groups, axis=0)
            self.weight = self.weight * factors.reshape(outputs, inputs, *[1] * (self.weight.ndim - 2))
        else:
            inputs, outputs = summed.shape
            products = (summed * shift[:, None]).reshape(groups, inputs // groups, outputs)
            added = products.sum(axis=1).reshape(-1)
            self.weight = self.weight * _column(scale, self.weight.ndim, 0)
        self._add(added)

    def _take_matrix(self, absorption: Absorption) -> None:
        rank = self.weight.ndim
        axis = (_free if absorption.side == "out" else _contracted)(self.node, self.slot, rank)
        scale, shift = absorption.scale, absorption.shift
        if absorption.side == "in":
            alpha = self.node.attributes.get("alpha", 1.0)
            # The product of the weights with the shift, one number per output channel.
            moved = alpha * np.moveaxis(self.weight, axis, -1) @ shift if shift.any() else np.zeros(1)
            self.weight = self.weight * _column(scale, rank, axis)
            if moved.any():
                self._add(self._as_bias(moved))
            return
        self.weight = self.weight * _column(scale, rank, axis)
        if self.bias is not None:
            self.bias = self._as_bias(scale) * self.bias + self._as_bias(shift)
        elif shift.any():
            self.bias = self._as_bias(shift)

    def _as_bias(self, vector: Array) -> Array:
        """One number per output channel, in the shape that broadcasts over the product."""
        return vector if self.slot == 1 else vector[:, None]

    def _add(self, added: Array) -> None:
        if self.bias is not None:
            self.bias = self.bias + added
        elif added.any():
            self.bias = added


def _column(vector: Array, rank: int, axis: int) -> Array:
    return vector.reshape((1,) * axis + (-1,) + (1,) * (rank - axis - 1))
