"""ONNX's ops that move values about, cut and join them, as neutral nodes."""

from __future__ import annotations

import contextlib
import math

import numpy as np

from normdoctor.flow.graph import Op, Shape, Value
from normdoctor.readers.onnx_builder import Builder, better, positive, positive_axes, rank_of, whole
from normdoctor.readers.onnx_graph import Place, Step, resolved

MAX_PARTS = 1000
"""Parts of a value that is split to a sequence."""


def concat(b: Builder, step: Step) -> bool:
    slots = range(len(step.node.inputs))
    rank = next(filter(None, map(rank_of, (b.out(step, 0), *(b.at(step, index) for index in slots)))), None)
    axis = positive(b.program.integer(step, "axis", 1), rank)
    if axis is None or not all(step.node.inputs):
        return False
    b.add(step, Op.CONCAT, slots, {"axis": axis})
    return True


def split(b: Builder, step: Step) -> bool:
    x = b.at(step, 0)
    axis = positive(b.program.integer(step, "axis", 0), rank_of(x))
    if axis is None or x is None:
        return False
    outputs = [b.out(step, index) for index in range(len(step.node.outputs))]
    lengths = b.integers(step, "split", 1 if step.scope.opset >= 13 else None)
    if lengths and len(lengths) == len(outputs) and x.shape is not None:
        for value, length in zip(outputs, lengths, strict=True):
            value.shape = value.shape or (*x.shape[:axis], length, *x.shape[axis + 1 :])
    b.add(step, Op.SPLIT, (0,), {"axis": axis}, outputs=outputs)
    return True


def split_to_sequence(b: Builder, step: Step) -> bool:
    """A split whose parts are then taken by SequenceAt: how exporters write chunk."""
    x, place = b.at(step, 0), Place(step.scope, step.node.outputs[0])
    axis = positive(b.program.integer(step, "axis", 0), rank_of(x))
    given = b.integers(step, None, 1)
    if x is None or x.shape is None or axis is None or not given or place.name in step.scope.outputs:
        return False
    whole_length = x.shape[axis]
    if not isinstance(whole_length, int) or min(given) < 1:
        return False
    split_at = b.at(step, 1)
    if split_at is not None and split_at.shape == ():
        given = [min(given[0], whole_length - start) for start in range(0, whole_length, given[0])]
    for taker in b.program.consumers(place):
        at = b.program.integers(taker, None, 1)
        if taker.node.op != "SequenceAt" or at is None or not -len(given) <= at[0] < len(given):
            return False
    if sum(given) != whole_length or len(given) > MAX_PARTS:
        return False
    parts = [b.temporary(x, (*x.shape[:axis], part, *x.shape[axis + 1 :])) for part in given]
    b.pieces[b.out(step, 0)] = parts
    b.add(step, Op.SPLIT, (0,), {"axis": axis}, outputs=parts, whole=False)
    return True


def sequence_at(b: Builder, step: Step) -> bool:
    sequence, at = b.at(step, 0), b.program.integers(step, None, 1)
    parts = None if sequence is None else b.pieces.get(sequence)
    if parts is None or at is None:
        return False
    b.add(step, Op.IDENTITY, (0,), inputs=[parts[at[0]]], whole=False)
    return True


def _bound(value: int, length: object, low: int, high: int) -> int | None:
    """A start or an end, counted from the front and within the length."""
    if not isinstance(length, int):
        # Not beyond the front, for all that is known; how far the axis goes is not.
        return 0 if value == 0 else None
    return min(max(value + length if value < 0 else value, low), length + high)


def slice_(b: Builder, step: Step) -> bool:
    x, y = b.at(step, 0), b.out(step, 0)
    old = step.scope.opset < 10
    starts, ends, axes, steps = (
        b.integers(step, name if old else None, None if old else index)
        for index, name in enumerate(("starts", "ends", "axes", "steps"), 1)
    )
    given = step.node.inputs
    if axes is None and not (old or len(given) < 4 or not given[3]):
        return False
    if axes is None:
        count = len(starts or ends or ())
        axes = list(range(count))
    placed = positive_axes(axes, rank_of(x))
    if x is None or not placed or (not old and len(given) > 4 and given[4] and steps is None):
        return False
    running = x
    for place, axis in enumerate(placed):
        stride = steps[place] if steps and place < len(steps) else 1
        length = running.shape[axis] if running.shape is not None else None
        start = starts[place] if starts and place < len(starts) else None
        end = ends[place] if ends and place < len(ends) else None
        if stride > 0:
            start = None if start is None else _bound(start, length, 0, 0)
            end = None if end is None else _bound(end, length, 0, 0)
        else:
            start = None if start is None else _bound(start, length, 0, -1)
            end = None if end is None else _bound(end, length, -1, -1)
            end = None if end == -1 else end
        last = place == len(placed) - 1
        cut = _cut(running, axis, start, end, stride)
        target = y if last else b.temporary(x, cut)
        target.shape = better(target.shape, cut)
        attributes = {"axis": axis, "start": start, "end": end, "step": stride}
        b.add(step, Op.SLICE, (0,), attributes, inputs=[running], outputs=[target], whole=len(placed) == 1)
        running = target
    return True


def _cut(value: Value, axis: int, start: int | None, end: int | None, stride: int) -> Shape | None:
    if value.shape is None:
        return None
    known = start is not None and end is not None and stride > 0
    length = len(range(start or 0, end or 0, stride)) if known else None
    return (*value.shape[:axis], length, *value.shape[axis + 1 :])


def pad(b: Builder, step: Step) -> bool:
    old = step.scope.opset < 11
    x = b.at(step, 0)
    mode = b.program.text(step, "mode", "constant")
    name = "paddings" if step.scope.opset < 2 else "pads"
    pads = b.integers(step, name if old else None, None if old else 1)
    given = b.integers(step, None, 3)
    if pads is None or (b.at(step, 3) is not None and given is None) or len(pads) % 2:
        return False
    count = len(pads) // 2
    rank = rank_of(x) if given is not None else count
    axes = positive_axes(given if given is not None else range(count), rank)
    if axes is None or len(axes) != count or min((0, *pads)) < 0:
        return False
    amounts = {axis: (pads[place], pads[count + place]) for place, axis in enumerate(axes)}
    padded = tuple(sorted(axis for axis, amount in amounts.items() if any(amount)))
    filler: float | None = 0.0
    if mode == "constant":
        if old:
            filler = b.program.number(step, "value", 0.0)
        elif b.at(step, 2) is not None:
            filler = b.scalar(step, 2)
    if filler is None or mode not in ("constant", "reflect", "edge", "wrap"):
        return False
    if not padded:
        b.add(step, Op.IDENTITY, (0,))
    else:
        given_to = tuple(amounts[axis] for axis in padded)
        b.add(step, Op.PAD, (0,), {"mode": mode, "value": filler, "axes": padded, "pads": given_to})
    return True


def transpose(b: Builder, step: Step) -> bool:
    rank = rank_of(b.at(step, 0))
    order = b.program.integers(step, "perm", None)
    if order is None:
        if rank is None:
            return False
        order = list(range(rank))[::-1]
    if sorted(order) != list(range(len(order))):
        return False
    b.add(step, Op.TRANSPOSE, (0,), {"order": tuple(order)})
    return True


def reshape(b: Builder, step: Step) -> bool:
    """Reshape, Flatten, Squeeze, Unsqueeze: the shape of the output says all."""
    x, y = b.at(step, 0), b.out(step, 0)
    if step.node.op == "Reshape" and x is not None and x.shape is not None and whole(y.shape) is None:
        wanted = b.integers(step, "shape", 1)
        if wanted is not None and not b.program.integer(step, "allowzero", 0):
            y.shape = better(y.shape, _reshaped(x.shape, wanted))
    b.add(step, Op.RESHAPE, (0,))
    return True


def _reshaped(old: Shape, wanted: list[int]) -> Shape | None:
    """The target of a Reshape, 0 (keep) and -1 (the rest) filled in; a single open length may be that rest."""
    known = whole(old)
    if known is not None:
        return resolved(wanted, known)
    new: list[int | str | None] = [
        old[axis] if length == 0 and axis < len(old) else length for axis, length in enumerate(wanted)
    ]
    left, right = list(old), [length for length in new if length != -1]
    for length in list(right):
        if length in left and length is not None:
            left.remove(length)
            right.remove(length)
    open_ = [length for length in left if not isinstance(length, int)]
    same = math.prod(length for length in left if isinstance(length, int)) == math.prod(
        length for length in right if isinstance(length, int)
    )
    if new.count(-1) != 1 or len(open_) > 1 or not all(isinstance(length, int) for length in right) or not same:
        return tuple(None if length == -1 else length for length in new)
    rest = open_[0] if open_ else 1
    return tuple(rest if length == -1 else length for length in new)


def expand(b: Builder, step: Step) -> bool:
    x, y = b.at(step, 0), b.out(step, 0)
    known = None if x is None else whole(x.shape)
    if known is not None and whole(y.shape) is None:
        wanted = b.integers(step, None, 1)
        with contextlib.suppress(ValueError):
            y.shape = y.shape if wanted is None else np.broadcast_shapes(known, tuple(wanted))
    b.add(step, Op.EXPAND, (0,))
    return True


def tile(b: Builder, step: Step) -> bool:
    repeats = b.integers(step, None, 1) if step.scope.opset >= 6 else None
    if repeats is None:
        return False
    b.add(step, Op.TILE, (0,), {"axes": tuple(axis for axis, times in enumerate(repeats) if times != 1)})
    return True


def resize(b: Builder, step: Step) -> bool:
    program, opset = b.program, step.scope.opset
    x, y = b.at(step, 0), b.out(step, 0)
    rank = rank_of(x) or rank_of(y)
    if rank is None or program.text(step, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return False
    if program.text(step, "mode", "nearest") not in ("nearest", "linear", "cubic", "bilinear"):
        return False
    scales = program.floats(step, "scales")
    index = 2 if step.node.op == "Resize" and opset >= 11 else 1
    given = b.numbers(step, index)
    if scales is None and given is not None and given.size:
        scales = [float(number) for number in given]
    axes = positive_axes(b.integers(step, "axes", None) or range(rank), rank)
    if axes is None:
        return False
    if step.node.op == "Upsample" and opset < 7:
        axes = (2, 3)
    before = x.shape if x is not None and x.shape is not None else (None,) * rank
    sizes = b.integers(step, None, 3) if step.node.op == "Resize" and opset >= 11 else None
    fixed = program.text(step, "keep_aspect_ratio_policy", "stretch") == "stretch"
    if sizes is not None and len(sizes) == len(axes) and fixed:
        by_axis = dict(zip(axes, sizes, strict=True))
        y.shape = better(y.shape, tuple(by_axis.get(axis, length) for axis, length in enumerate(before)))
    after = y.shape if y.shape is not None and len(y.shape) == rank else (None,) * rank
    changed = []
    for place, axis in enumerate(axes):
        same = before[axis] is not None and before[axis] == after[axis]
        if scales is not None and len(scales) == len(axes):
            same = scales[place] == 1
        if not same:
            changed.append(axis)
    b.add(step, Op.RESIZE, (0,), {"axes": tuple(sorted(changed))})
    return True


def depth_to_space(b: Builder, step: Step) -> bool:
    block = b.program.integer(step, "blocksize", 0)
    order = b.program.text(step, "mode", "DCR")
    if block < 1 or order not in ("DCR", "CRD"):
        return False
    b.add(step, Op.DEPTH_TO_SPACE, (0,), {"block": block, "order": order})
    return True


def gather(b: Builder, step: Step) -> bool:
    axis = positive(b.program.integer(step, "axis", 0), rank_of(b.at(step, 0)))
    if axis is None:
        return False
    b.add(step, Op.GATHER, (0, 1), {"axis": axis})
    return True


def shape(b: Builder, step: Step) -> bool:
    x, y = b.at(step, 0), b.out(step, 0)
    rank = rank_of(x)
    start, end = b.program.integer(step, "start", 0), b.program.integer(step, "end", 1 << 62)
    if (start, end) == (0, 1 << 62):
        b.add(step, Op.SHAPE, (0,))
        return True
    lengths = b.temporary(y, None if rank is None else (rank,))
    b.add(step, Op.SHAPE, (0,), outputs=[lengths], whole=False)
    bounds = {"start": _bound(start, rank, 0, 0), "end": _bound(end, rank, 0, 0)}
    b.add(step, Op.SLICE, (), {"axis": 0, "step": 1, **bounds}, inputs=[lengths], whole=False)
    return True


def count(b: Builder, step: Step) -> bool:
    """Size: the number of elements is no use of their values."""
    b.add(step, Op.OTHER, ())
    return True
