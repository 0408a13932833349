"""How often each tap of a kernel sees the input: zeros at the border take part in a mean only so far."""

from __future__ import annotations

import numpy as np

from normdoctor.flow.affine import Array, Blocked
from normdoctor.flow.graph import Node, Op

MAX_LENGTH = 1 << 14
"""Of a map, a stride or a border along one axis; nothing longer is worked out, whatever a file declares."""

MAX_TAPS = 1 << 10
"""Of a kernel along one axis."""


def shares_of(node: Node, pad: Node | None = None) -> tuple[Array, bool, bool]:
    """Of each tap of a kernel, the share of output positions at which it sees the input and not padding.

    Of a transposed convolution, how often an output position is reached through the tap. The second value says
    whether all input positions count alike, the third whether the border is known: where it is not, every tap counts
    whole.

    pad: an operator just before that pads with zeros, which then count as those of the convolution itself."""
    weight = node.given(1)
    kernel = () if weight is None or weight.shape is None else tuple(weight.shape[2:])
    if not all(isinstance(length, int) and length <= MAX_TAPS for length in kernel) or len(kernel) > 3:
        raise Blocked("unknown-shape", "a convolution of unknown or unusual size lies between")
    shares, plain, sized = np.ones(()), True, True
    for axis, taps in enumerate(kernel):
        share, alike, known = _shares_along(node, pad, axis, int(taps or 0))
        shares = np.multiply.outer(shares, share)
        plain, sized = plain and alike, sized and known
    return shares, plain, sized


def _shares_along(node: Node, pad: Node | None, axis: int, taps: int) -> tuple[Array, bool, bool]:
    strides, pads, dilations = (node.attributes.get(name) for name in ("strides", "pads", "dilations"))
    stride, (before, behind), step = (
        1 if strides is None else strides[axis],
        (None, None) if pads is None else pads[axis],
        1 if dilations is None else dilations[axis],
    )
    outer = node.x if pad is None else pad.x
    length = None if outer.shape is None else outer.shape[axis + 2]
    if pad is not None and axis + 2 in pad.attributes["axes"] and before is not None and behind is not None:
        more = pad.attributes["pads"][pad.attributes["axes"].index(axis + 2)]
        before, behind = before + more[0], behind + more[1]
    transposed = node.op is Op.CONV_TRANSPOSE
    plain = taps == 1 and strides is not None and stride == 1 and before == behind == 0
    if plain or not isinstance(length, int) or before is None or behind is None:
        # A border of unknown size is left out. A transposed convolution reaches every stride-th position.
        whole = np.full(taps, 1.0 / stride if transposed else 1.0)
        return whole, plain, plain or (before == behind == 0 and not transposed)
    if max(length, before, behind, stride, step) > MAX_LENGTH:
        return np.ones(taps), False, False
    reach = step * (taps - 1)
    if transposed:
        count = (length - 1) * stride + reach + 1 - before - behind
        limit = count
    else:
        count = (length + before + behind - reach - 1) // stride + 1
        limit = length
    if count < 1:
        return np.ones(taps), False, False
    places = np.arange(length if transposed else count)[:, None] * stride + np.arange(taps) * step - before
    inside = ((places >= 0) & (places < limit)).sum(axis=0)
    return inside / count, False, True


def padding_before(node: Node) -> Node | None:
    """An operator that only puts zeros of known number around what a convolution takes."""
    pad = node.x.producer
    if pad is None or pad.op is not Op.PAD or pad.attributes.get("pads") is None:
        return None
    zeros = pad.attributes.get("mode", "constant") == "constant" and pad.attributes.get("value", 0.0) == 0
    return pad if zeros and min(pad.attributes["axes"]) >= 2 and share_inside(pad) else None


def share_inside(pad: Node) -> float | None:
    """Of the positions behind a padding, the share that is not padding; None where the lengths are not known."""
    share = 1.0
    for axis in pad.attributes["axes"]:
        inner, outer = (None if value.shape is None else value.shape[axis] for value in (pad.x, pad.y))
        if not isinstance(inner, int) or not isinstance(outer, int) or outer < 1:
            return None
        share *= inner / outer
    return share
