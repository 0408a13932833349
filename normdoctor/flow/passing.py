"""How each operator lets an affine map through, backward (`before`) and forward (`after`), or why it does not.

Each operator is taught once. Those with weights, which take a map in for good, are in `weights.py`; sums and products
of two values in `carrying.py`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from normdoctor.flow.affine import Affine, Array, Blocked
from normdoctor.flow.graph import Node, Op, Shape, Value
from normdoctor.flow.shapes import reshape_groups

MAX_EXPANDED = 1 << 24
"""Elements of a map after a reshape has spread it over several axes."""

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})

Steps = list[tuple[int, Affine]]
"""Slot (of the inputs or the outputs) and the map that it takes; slots that are not named take none."""


def before(node: Node, output: int, affine: Affine) -> Steps:
    """The maps of the inputs that together do what `affine` does to one output. Raises Blocked.

    Slots with the identity are left out."""
    step = _BEFORE.get(node.op)
    if step is None:
        raise _blocked_by(node)
    return step(node, output, affine)


def after(node: Node, slot: int, affine: Affine) -> Steps:
    """The maps of the outputs that do what `affine` does to the input at `slot`. Raises Blocked."""
    step = _AFTER.get(node.op)
    if step is None or (slot != 0 and node.op is not Op.CONCAT):
        raise _blocked_by(node)
    return step(node, slot, affine)


NOT_LINEAR = {Op.ACTIVATION, Op.OTHER_NORM, Op.LAYER_NORM, Op.BATCH_NORM, Op.POWER, Op.SQRT, Op.RSQRT, Op.RECIPROCAL}


def _blocked_by(node: Node) -> Blocked:
    named = node.attributes.get("name") if node.op is Op.ACTIVATION else node.written
    if node.op in NOT_LINEAR:
        return Blocked("nonlinear", f"{named or node.op.value} does not commute with a scale and a shift")
    if node.op in (Op.QUANTIZE, Op.DEQUANTIZE):
        return Blocked("quantised", "the values are quantised, on a grid that was chosen with the norm in place")
    return Blocked("unknown-operator", f"nothing is known of what {node.written or node.op.value} does to a channel")


def _lengths(value: Value, what: str) -> Shape:
    if value.shape is None:
        raise Blocked("unknown-shape", f"the shape of {what} is not known")
    return value.shape


def _length(value: Value, axis: int) -> int:
    length = _lengths(value, value.name)[axis]
    if not isinstance(length, int):
        raise Blocked("unknown-shape", f"the length of {value.name} along axis {axis} is not known")
    return length


def _check_apart(affine: Affine, axes: set[int], node: Node) -> None:
    if affine.varying & axes:
        raise Blocked("mixed-channels", f"{node.written or node.op.value} mixes or moves the channels")


# Elementwise, one input


def _same(node: Node, _: int, affine: Affine) -> Steps:
    return [(0, affine)]


def _cast(node: Node, _: int, affine: Affine) -> Steps:
    if not {node.x.dtype, node.y.dtype} <= FLOATS | {None}:
        raise Blocked("nonlinear", f"{node.written or 'Cast'} rounds to whole numbers")
    return [(0, affine)]


def _negate(node: Node, _: int, affine: Affine) -> Steps:
    return [(0, Affine(affine.scale, -affine.shift))]


def _activation(node: Node, _: int, affine: Affine) -> Steps:
    if not node.attributes.get("homogeneous"):
        raise _blocked_by(node)
    if affine.has_shift or (affine.scale < 0).any():
        name = node.attributes.get("name", "an activation")
        raise Blocked("nonlinear", f"{name} lets only positive scales without a shift through")
    return [(0, affine)]


# Pooling, reductions, resizing: means and maxima over axes along which the map does not vary


def _spatial(affine: Affine) -> set[int]:
    return set(range(2, affine.rank))


def _max_pool(node: Node, _: int, affine: Affine) -> Steps:
    _check_apart(affine, _spatial(affine), node)
    _check_rising(node, affine)
    return [(0, affine)]


def _check_rising(node: Node, affine: Affine) -> None:
    if (affine.scale < 0).any():
        count = int((affine.scale < 0).sum())
        raise Blocked("negative-scale", f"{count} scales are negative, and {node.op.value} would become a minimum")


def _average_pool(node: Node, _: int, affine: Affine) -> Steps:
    _check_apart(affine, _spatial(affine), node)
    if affine.has_shift and node.attributes.get("counts_padding"):
        raise Blocked("padding", "the average pooling counts its padding, so a shift is not the same at the border")
    return [(0, affine)]


def _resize(node: Node, _: int, affine: Affine) -> Steps:
    _check_apart(affine, set(node.attributes["axes"]), node)
    return [(0, affine)]


def _reduced(node: Node, affine: Affine, count_of: Value) -> Affine:
    """What a reduction does to the shift."""
    if node.op is Op.REDUCE_MAX:
        _check_rising(node, affine)
    if node.op is not Op.REDUCE_SUM or not affine.has_shift:
        return affine
    count = math.prod(_length(count_of, axis) for axis in node.attributes["axes"])
    return Affine(affine.scale, affine.shift * count)


def _before_reduce(node: Node, _: int, affine: Affine) -> Steps:
    axes = tuple(sorted(node.attributes["axes"]))
    if not node.attributes["keepdims"]:
        affine = affine.moved(lambda array: np.expand_dims(array, axes))
    _check_apart(affine, set(axes), node)
    if node.op is Op.REDUCE_SUM and affine.has_shift:
        count = math.prod(_length(node.x, axis) for axis in axes)
        return [(0, Affine(affine.scale, affine.shift / count))]
    return [(0, _reduced(node, affine, node.x))]


def _after_reduce(node: Node, _: int, affine: Affine) -> Steps:
    axes = tuple(node.attributes["axes"])
    _check_apart(affine, set(axes), node)
    affine = _reduced(node, affine, node.x)
    if not node.attributes["keepdims"]:
        affine = affine.moved(lambda array: array.squeeze(axes))
    return [(0, affine)]


# Moving elements


def _before_transpose(node: Node, _: int, affine: Affine) -> Steps:
    order = np.argsort(node.attributes["order"])
    return [(0, affine.moved(lambda array: array.transpose(order)))]


def _after_transpose(node: Node, _: int, affine: Affine) -> Steps:
    return [(0, affine.moved(lambda array: array.transpose(node.attributes["order"])))]


def _before_reshape(node: Node, _: int, affine: Affine) -> Steps:
    return [(0, _reshape(affine, _lengths(node.y, "a reshape"), _lengths(node.x, "a reshape")))]


def _after_reshape(node: Node, _: int, affine: Affine) -> Steps:
    return [(0, _reshape(affine, _lengths(node.x, "a reshape"), _lengths(node.y, "a reshape")))]


def _reshape(affine: Affine, old: Shape, new: Shape) -> Affine:
    groups = reshape_groups(old, new)
    if groups is None:
        turned = reshape_groups(new, old)  # an unknown length is found from the side that knows it
        groups = None if turned is None else [(second, first) for first, second in turned]
    if groups is None:
        raise Blocked("unknown-shape", "how a reshape moves the channels cannot be told from the known lengths")

    def move(array: Array) -> Array:
        shape: list[int] = []
        for first, second in groups:
            here = [(axis, array.shape[axis]) for axis in first]
            if all(length == 1 for _, length in here):
                shape += [1] * len(second)
                continue
            # One axis that goes on as one axis needs no other length.
            longer = [axis for axis in first if old[axis] != 1]
            targets = [axis for axis in second if new[axis] != 1]
            if len(longer) == len(targets) == 1:
                length = array.shape[longer[0]]
                shape += [length if axis == targets[0] else 1 for axis in second]
                continue
            whole = [old[axis] for axis in first]
            wanted = [new[axis] for axis in second]
            count = _product(whole)
            unknown = [axis for axis, length in enumerate(wanted) if not isinstance(length, int)]
            if count is None or len(unknown) > 1:
                raise Blocked("unknown-shape", "a reshape joins or splits the channels with axes of unknown length")
            if unknown:
                rest = _product([length for length in wanted if isinstance(length, int)]) or 1
                wanted[unknown[0]] = count // rest
            spread = list(array.shape)
            for axis in first:
                spread[axis] = int(old[axis] or 1)
            if math.prod(spread) > MAX_EXPANDED:
                raise Blocked("too-large", "the map would have to be spread over too many elements")
            array = np.broadcast_to(array, spread)
            shape += [int(length or 0) for length in wanted]
        # Groups are in order on both sides, so one reshape moves all of them.
        return array.reshape(shape)

    return affine.moved(move)


def _product(lengths: list[int | str | None]) -> int | None:
    numbers = [length for length in lengths if isinstance(length, int)]
    return math.prod(numbers) if len(numbers) == len(lengths) else None


def _before_expand(node: Node, _: int, affine: Affine) -> Steps:
    shape = _lengths(node.x, "what is expanded")
    new = affine.rank - len(shape)
    grown = {axis for axis in range(affine.rank) if axis < new or shape[axis - new] != affine.length(axis)}
    _check_apart(affine, grown, node)
    return [(0, affine.moved(lambda array: array.reshape(array.shape[new:])))]


def _after_expand(node: Node, _: int, affine: Affine) -> Steps:
    rank = len(_lengths(node.y, "what is expanded"))
    return [(0, affine.moved(lambda array: array.reshape((1,) * (rank - array.ndim) + array.shape)))]


def _tile(node: Node, _: int, affine: Affine) -> Steps:
    _check_apart(affine, set(node.attributes["axes"]), node)
    return [(0, affine)]


def _pad(node: Node, _: int, affine: Affine) -> Steps:
    _check_apart(affine, set(node.attributes["axes"]), node)
    if node.attributes.get("mode", "constant") == "constant":
        value = node.attributes.get("value", 0.0)
        if (affine.scale * value + affine.shift != value).any():
            raise Blocked("padding", "the padding would have to be another number in every channel")
    return [(0, affine)]


def _slice_of(node: Node) -> tuple[int, slice]:
    attributes = node.attributes
    return attributes["axis"], slice(attributes["start"], attributes["end"], attributes["step"])


def _before_slice(node: Node, _: int, affine: Affine) -> Steps:
    axis, cut = _slice_of(node)
    if axis not in affine.varying:
        return [(0, affine)]
    return [(0, _set_in(affine, axis, cut, _length(node.x, axis)))]


def _after_slice(node: Node, _: int, affine: Affine) -> Steps:
    axis, cut = _slice_of(node)
    return [(0, _cut(affine, axis, cut))]


def _cut(affine: Affine, axis: int, cut: slice) -> Affine:
    index = (slice(None),) * axis + (cut,)
    return affine.moved(lambda array: array if array.shape[axis] == 1 else array[index])


def _set_in(affine: Affine, axis: int, cut: slice, length: int) -> Affine:
    """The map on a slice of an axis of `length`, the identity on the rest."""
    count = len(range(length)[cut])

    def fill(array: Array, rest: float) -> Array:
        shape = [*array.shape]
        shape[axis] = length
        whole = np.full(shape, rest)
        part = [*array.shape]
        part[axis] = count
        whole[(slice(None),) * axis + (cut,)] = np.broadcast_to(array, part)
        return whole

    return Affine(fill(affine.scale, 1.0), fill(affine.shift, 0.0))


def _parts(values: list[Value], axis: int) -> list[slice]:
    """Where each value lies when all of them are joined."""
    ends = np.cumsum([0, *(_length(value, axis) for value in values)]).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def _before_concat(node: Node, _: int, affine: Affine) -> Steps:
    axis = node.attributes["axis"]
    values = [value for value in node.inputs if value is not None]
    if axis not in affine.varying:
        return [(slot, affine) for slot in range(len(values))]
    return [(slot, _cut(affine, axis, part)) for slot, part in enumerate(_parts(values, axis))]


def _after_concat(node: Node, slot: int, affine: Affine) -> Steps:
    axis = node.attributes["axis"]
    parts = _parts([value for value in node.inputs if value is not None], axis)
    return [(0, _set_in(affine, axis, parts[slot], parts[-1].stop))]


def _before_split(node: Node, output: int, affine: Affine) -> Steps:
    axis = node.attributes["axis"]
    parts = _parts(node.outputs, axis)
    return [(0, _set_in(affine, axis, parts[output], parts[-1].stop))]


def _after_split(node: Node, _: int, affine: Affine) -> Steps:
    axis = node.attributes["axis"]
    if axis not in affine.varying:
        return [(place, affine) for place in range(len(node.outputs))]
    return [(place, _cut(affine, axis, part)) for place, part in enumerate(_parts(node.outputs, axis))]


def _before_gather(node: Node, _: int, affine: Affine) -> Steps:
    axis = node.attributes["axis"]
    indices = node.inputs[1]
    count = len(_lengths(indices, "the indices")) if indices is not None else 0
    taken = set(range(axis, axis + count))
    _check_apart(affine, taken, node)

    def move(array: Array) -> Array:
        return np.expand_dims(array.reshape(array.shape[:axis] + array.shape[axis + count :]), axis)

    return [(0, affine.moved(move))]


def _after_gather(node: Node, _: int, affine: Affine) -> Steps:
    axis = node.attributes["axis"]
    indices = node.inputs[1]
    count = len(_lengths(indices, "the indices")) if indices is not None else 0
    _check_apart(affine, {axis}, node)
    return [(0, affine.moved(lambda array: array.reshape(array.shape[:axis] + (1,) * count + array.shape[axis + 1 :])))]


def _before_depth_to_space(node: Node, _: int, affine: Affine) -> Steps:
    _check_apart(affine, _spatial(affine) | {0}, node)
    copies = node.attributes["block"] ** 2
    if node.attributes["order"] == "DCR":
        return [(0, affine.moved(lambda array: array if array.shape[1] == 1 else np.tile(array, (1, copies, 1, 1))))]
    return [(0, affine.moved(lambda array: array if array.shape[1] == 1 else np.repeat(array, copies, axis=1)))]


PASSING = {
    Op.IDENTITY: (_same, _same),
    Op.CAST: (_cast, _cast),
    Op.NEGATE: (_negate, _negate),
    Op.ACTIVATION: (_activation, _activation),
    Op.MAX_POOL: (_max_pool, _max_pool),
    Op.AVERAGE_POOL: (_average_pool, _average_pool),
    Op.RESIZE: (_resize, _resize),
    Op.REDUCE_MEAN: (_before_reduce, _after_reduce),
    Op.REDUCE_MAX: (_before_reduce, _after_reduce),
    Op.REDUCE_SUM: (_before_reduce, _after_reduce),
    Op.TRANSPOSE: (_before_transpose, _after_transpose),
    Op.RESHAPE: (_before_reshape, _after_reshape),
    Op.EXPAND: (_before_expand, _after_expand),
    Op.TILE: (_tile, _tile),
    Op.PAD: (_pad, _pad),
    Op.SLICE: (_before_slice, _after_slice),
    Op.CONCAT: (_before_concat, _after_concat),
    Op.SPLIT: (_before_split, _after_split),
    Op.GATHER: (_before_gather, _after_gather),
}
"""How each operator lets a map through: backward, forward."""

_BEFORE = {op: ways[0] for op, ways in PASSING.items()} | {Op.DEPTH_TO_SPACE: _before_depth_to_space}
_AFTER = {op: ways[1] for op, ways in PASSING.items()}
