"""Torch operators that move, copy, cut or make values without computing with them → nodes of the neutral graph."""

from __future__ import annotations

from collections.abc import Sequence

from normdoctor.flow.graph import Node, Op, Value
from normdoctor.readers.arrays import FLOAT_TYPES, ITEM_SIZES
from normdoctor.readers.aten_calls import Call, Literal, Translator, axis, known, node, part, rank

Nodes = list[Node] | None


def _same(call: Call) -> Nodes:
    """What hands its input on: to another device, into other memory, out of the graph of gradients."""
    x = call.value("self") or call.value("input")
    return None if x is None else [node(call, Op.IDENTITY, [x], (_first(call),))]


def _first(call: Call) -> str:
    return "self" if "self" in call.arguments else "input"


def _dropout(call: Call) -> Nodes:
    probability, train = call.number("p"), call.flag("train", True)
    found = _same(call) if train is False or probability == 0 else None
    if found is not None and probability is not None and 0 <= probability <= 1:
        found[0].attributes["dropout"] = probability
    return found


def _to(call: Call) -> Nodes:
    x, y = call.value("self"), call.outputs[0]
    if x is None or x.dtype is None or y.dtype is None:
        return None
    if x.dtype == y.dtype:
        return _same(call)
    return [node(call, Op.CAST, [x])] if y.dtype in FLOAT_TYPES else None


def _reshape(call: Call) -> Nodes:
    x, y = call.value("self"), call.outputs[0]
    if x is None or x.dtype != y.dtype or "dtype" in call.arguments:
        return None  # view.dtype looks at the same bytes as another type
    return [node(call, Op.RESHAPE, [x])]


def _expand(call: Call) -> Nodes:
    x = call.value("self")
    return None if x is None else [node(call, Op.EXPAND, [x])]


def _repeat(call: Call) -> Nodes:
    x = call.value("self")
    repeats = list(call.lengths("repeats") or call.lengths("dims") or ())
    if x is None or x.shape is None or not repeats:
        return None
    new = len(repeats) - len(x.shape)
    if call.name == "tile" and new < 0:
        repeats, new = [*[1] * -new, *repeats], 0
    if new < 0:
        return None
    before: list[Node] = []
    if new:
        before = [part(call, Op.RESHAPE, [x], (1,) * new + x.shape)]
        x = before[0].y
    repeated = tuple(place for place, count in enumerate(repeats) if count != 1)
    return [*before, node(call, Op.TILE, [x], () if not new else (None,), axes=repeated)]


def _ordered(call: Call, order: Sequence[int | None]) -> Nodes:
    x = call.value("self")
    count = rank(x)
    if x is None or count is None:
        return None
    found = [axis(number, count) for number in order]
    if None in found or sorted(number for number in found if number is not None) != list(range(count)):
        return None
    return [node(call, Op.TRANSPOSE, [x], order=tuple(found))]


def _permute(call: Call) -> Nodes:
    return _ordered(call, call.lengths("dims") or ())


def _swap(call: Call) -> Nodes:
    """Two axes swapped; those of a matrix where none are named."""
    count = rank(call.value("self"))
    if count is None or (call.name == "t" and count > 2):
        return None
    if call.name == "numpy_T":
        return _ordered(call, range(count)[::-1])
    numbers = [call.integer(name) for name in ("dim0", "dim1", "axis0", "axis1") if name in call.arguments]
    order: list[int | None] = list(range(count))
    if count < 2:
        return _ordered(call, order)
    numbers = numbers or [-2, -1]
    if len(numbers) != 2:
        return None
    first, second = (axis(number, count) for number in numbers)
    if first is None or second is None:
        return None
    order[first], order[second] = second, first
    return _ordered(call, order)


def _movedim(call: Call) -> Nodes:
    count = rank(call.value("self"))
    sources, targets = call.lengths("source"), call.lengths("destination")
    if count is None or sources is None or targets is None or len(sources) != len(targets):
        return None
    moved = {axis(target, count): axis(source, count) for source, target in zip(sources, targets, strict=True)}
    if None in moved or len(set(moved.values())) != len(sources) or len(moved) != len(sources):
        return None
    rest = iter(number for number in range(count) if number not in moved.values())
    return _ordered(call, [moved[place] if place in moved else next(rest) for place in range(count)])


# cutting and joining


def _concat(call: Call) -> Nodes:
    values = call.arguments.get("tensors")
    place = axis(call.integer("dim", 0), rank(call.outputs[0]))
    if not isinstance(values, (list, tuple)) or place is None or not values:
        return None
    found = [value for value in values if isinstance(value, Value)]
    plain = all(value.dtype == call.outputs[0].dtype and rank(value) == rank(call.outputs[0]) for value in found)
    if len(found) != len(values) or not plain:  # torch also takes empty tensors of one axis
        return None
    lengths = [known(value, place) for value in (*found, call.outputs[0])]
    if None not in lengths and sum(length or 0 for length in lengths) != 2 * (lengths[-1] or 0):
        return None
    return [node(call, Op.CONCAT, found, ("tensors",) * len(found), axis=place)]


def _stack(call: Call) -> Nodes:
    values = call.arguments.get("tensors")
    place = axis(call.integer("dim", 0), rank(call.outputs[0]))
    if not isinstance(values, (list, tuple)) or place is None:
        return None
    laid: list[Node] = []
    for value in values:
        if not isinstance(value, Value) or value.shape is None or value.dtype != call.outputs[0].dtype:
            return None
        laid.append(part(call, Op.RESHAPE, [value], (*value.shape[:place], 1, *value.shape[place:])))
        laid[-1].y.name += f":{len(laid)}"
    return [*laid, node(call, Op.CONCAT, [own.y for own in laid], (None,) * len(laid), axis=place)]


def _split(call: Call) -> Nodes:
    x = call.value("self")
    place = axis(call.integer("dim", 0), rank(x))
    length = None if x is None or place is None else known(x, place)
    if x is None or x.shape is None or place is None or length is None:
        return None
    sizes = call.lengths("split_sizes" if "split_sizes" in call.arguments else "split_size") or [
        -(-length // (call.integer("chunks") or length or 1))
    ]
    if len(sizes) == 1 and type(call.arguments.get("split_size", 0)) is int and "split_sizes" not in call.arguments:
        step = sizes[0] or length or 1
        sizes = [min(step, length - start) for start in range(0, max(length, 1), step)]
    if len(sizes) != len(call.outputs) or sum(size or 0 for size in sizes) != length:
        return None
    for output, size in zip(call.outputs, sizes, strict=True):
        if output.shape is None:  # one that nobody uses has no description
            output.shape = (*x.shape[:place], size, *x.shape[place + 1 :])
        elif known(output, place) != size:
            return None
    return [node(call, Op.SPLIT, [x], axis=place)]


WHOLE = 1 << 62
"""An end behind that of every tensor: torch writes the largest number for "to the end"."""


def _slice(call: Call) -> Nodes:
    x = call.value("self")
    place = axis(call.integer("dim", 0), rank(x))
    if x is None or x.shape is None or place is None or x.dtype != call.outputs[0].dtype:
        return None
    length, step = known(x, place), call.integer("step", 1)
    if call.name == "narrow":
        start, count = call.integer("start"), call.integer("length")
        end = None if start is None or count is None else start + count
        if start is not None and start < 0 and length is not None and end is not None:
            start, end = start + length, end + length
        unknown = start is None or end is None
    else:
        start = 0 if call.arguments.get("start") is None else call.integer("start")
        end = WHOLE if call.arguments.get("end") is None else call.integer("end")
        unknown = False
    if (start, step) == (0, 1) and end is not None and end >= WHOLE and not unknown:
        end = length
        if length is None:
            return _same(call)
    if length is None:  # no map varies along an axis of unknown length
        return [node(call, Op.SLICE, [x], axis=place, start=None, end=None, step=step)]
    if start is None or end is None or step is None or unknown:
        return None
    start = min(max(start + length if start < 0 else start, 0), length)
    end = min(max(end + length if end < 0 else end, start), length)
    if (start, end, step) == (0, length, 1):
        return _same(call)
    return [node(call, Op.SLICE, [x], axis=place, start=start, end=end, step=step)]


def _select(call: Call) -> Nodes:
    x = call.value("self")
    place = axis(call.integer("dim"), rank(x))
    if x is None or x.shape is None or place is None:
        return None
    length, index = known(x, place), call.integer("index")
    if index is None and length is not None:
        return None
    start = None if index is None or length is None else index % length
    end = None if start is None else start + 1
    shape = (*x.shape[:place], 1, *x.shape[place + 1 :])
    cut = part(call, Op.SLICE, [x], shape, axis=place, start=start, end=end, step=1)
    return [cut, node(call, Op.RESHAPE, [cut.y], (None,))]


def _index_select(call: Call) -> Nodes:
    x, index = call.value("self"), call.value("index")
    place = axis(call.integer("dim"), rank(x))
    if x is None or index is None or place is None or rank(index) != 1:
        return None
    return [node(call, Op.GATHER, [x, index], ("self", "index"), axis=place)]


def _index(call: Call) -> Nodes:
    """One index of one axis among the places that are taken whole."""
    x, indices = call.value("self"), call.arguments.get("indices")
    if x is None or not isinstance(indices, (list, tuple)):
        return None
    given = [place for place, index in enumerate(indices) if index is not None]
    index = indices[given[0]] if len(given) == 1 else None
    if not isinstance(index, Value) or rank(index) != 1 or index.dtype not in ("int64", "int32"):
        return None
    return [node(call, Op.GATHER, [x, index], ("self", None), axis=given[0])]


PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(call: Call) -> Nodes:
    x = call.value("self")
    count = rank(x)
    amounts = call.lengths("pad" if "pad" in call.arguments else "padding")
    if x is None or count is None or amounts is None or len(amounts) % 2 or len(amounts) > 2 * count:
        return None
    mode = call.arguments.get("mode", "constant")
    for ending, own in (("reflection_pad", "reflect"), ("replication_pad", "replicate")):
        mode = own if call.name.startswith(ending) else mode
    value = call.arguments.get("value")
    value = 0 if value is None else value
    if mode not in PAD_MODES or type(value) not in (int, float) or any(n is not None and n < 0 for n in amounts):
        return None
    pairs = {count - 1 - place: pair for place, pair in enumerate(zip(amounts[::2], amounts[1::2], strict=True))}
    padded = tuple(sorted(axis for axis, pair in pairs.items() if pair != (0, 0)))
    if not padded:
        return _same(call)
    pads = tuple(pairs[axis] for axis in padded)
    return [node(call, Op.PAD, [x], mode=PAD_MODES[mode], value=float(value), axes=padded, pads=pads)]


# rearranging channels


def _pixel_shuffle(call: Call) -> Nodes:
    x, block = call.value("self"), call.integer("upscale_factor")
    if x is None or rank(x) != 4 or not block:
        return None
    return [node(call, Op.DEPTH_TO_SPACE, [x], block=block, order="CRD")]


def _channel_shuffle(call: Call) -> Nodes:
    x, groups = call.value("self"), call.integer("groups")
    if x is None or x.shape is None or len(x.shape) < 3 or not groups:
        return None
    batch, _, *rest = x.shape
    channels = known(x, 1)
    if channels is None or channels % groups:
        return None
    apart = part(call, Op.RESHAPE, [x], (batch, groups, channels // groups, *rest))
    order = (0, 2, 1, *range(3, 3 + len(rest)))
    turned = part(call, Op.TRANSPOSE, [apart.y], (batch, channels // groups, groups, *rest), order=order)
    return [apart, turned, node(call, Op.RESHAPE, [turned.y], (None,))]


# making


FILLS = {"zeros": 0.0, "ones": 1.0, "zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}


def _full(call: Call) -> Nodes:
    """A constant, where its shape does not depend on the input."""
    y = call.outputs[0]
    value = FILLS.get(call.name)
    if value is None:
        value = call.number("s" if call.name == "scalar_tensor" else "fill_value")
    shape = tuple(length for length in y.shape or () if isinstance(length, int))
    if value is None or y.shape is None or len(shape) != len(y.shape) or y.dtype not in ITEM_SIZES:
        return None
    if y.dtype not in FLOAT_TYPES and value != int(value):
        return None
    y.array = Literal(value, y.dtype, shape)
    return [node(call, Op.CONSTANT, [], (None,))]


def _shape(call: Call) -> Nodes:
    """What asks for lengths or the type of a tensor alone. (Where it asks for strides, a fold may change them.)"""
    x = call.value("self") or call.value("a")
    if x is None or call.arguments.get("stride") is not None:
        return None
    return [node(call, Op.SHAPE, [x], ("self" if "self" in call.arguments else "a",))]


def _named(translator: Translator, names: str) -> dict[str, Translator]:
    return dict.fromkeys(names.split(), translator)


TABLE: dict[str, Translator] = {
    **_named(_same, "contiguous clone alias detach lift_fresh lift_fresh_copy alias_copy detach_copy positive"),
    **_named(_dropout, "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout"),
    **_named(_to, "to _to_copy type_as"),
    **_named(_reshape, "view view_copy _unsafe_view reshape reshape_as view_as flatten unflatten squeeze squeeze_copy"),
    **_named(_reshape, "unsqueeze unsqueeze_copy ravel _reshape_alias"),
    **_named(_expand, "expand expand_copy expand_as broadcast_to"),
    **_named(_repeat, "repeat tile"),
    **_named(_permute, "permute permute_copy"),
    **_named(_swap, "transpose transpose_copy t t_copy mT numpy_T swapaxes swapdims"),
    **_named(_movedim, "movedim moveaxis"),
    **_named(_concat, "cat concat concatenate"),
    **_named(_stack, "stack"),
    **_named(_split, "split split_with_sizes split_copy split_with_sizes_copy chunk unsafe_split unsafe_chunk"),
    **_named(_slice, "slice slice_copy narrow narrow_copy"),
    **_named(_select, "select select_copy"),
    **_named(_index_select, "index_select"),
    **_named(_index, "index"),
    **_named(_pad, "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d"),
    **_named(_pad, "replication_pad1d replication_pad2d replication_pad3d"),
    **_named(_pixel_shuffle, "pixel_shuffle"),
    **_named(_channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_named(_full, "full ones zeros scalar_tensor full_like ones_like zeros_like new_full new_ones new_zeros"),
    **_named(_shape, "sym_size sym_numel _assert_tensor_metadata"),
}
