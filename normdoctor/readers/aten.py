"""Calls of torch's tensor operators → nodes of the neutral graph, whoever recorded them: .pt2, fx, TorchScript.

Written for the operators as torch.export records them and for what run_decompositions makes of them. An operator, an
overload or a combination of arguments that is not known becomes `Op.OTHER`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from normdoctor.flow.graph import Fixed, Graph, Node, Op, Value
from normdoctor.readers import aten_compute, aten_layout, aten_statistics
from normdoctor.readers.aten_calls import Call, Literal, Site, Translator, other

__all__ = ["Call", "Literal", "Site", "build", "overwritten_roots", "translate"]

TABLE: dict[str, Translator] = {**aten_layout.TABLE, **aten_compute.TABLE, **aten_statistics.TABLE}
"""Operator, without overload and as if not in place → what makes its nodes, or None for arguments it does not know."""

VIEWS = frozenset(
    {
        "_reshape_alias", "_unsafe_view", "adjoint", "alias", "alpha_dropout", "as_strided", "broadcast_to", "chunk",
        "conj", "contiguous", "detach", "diagonal", "dropout", "dsplit", "expand", "expand_as",
        "feature_alpha_dropout", "feature_dropout", "flatten", "getitem", "hsplit", "imag", "lift_fresh", "mH", "mT",
        "moveaxis", "movedim", "narrow", "numpy_T", "pad", "permute", "positive", "ravel", "real", "reshape",
        "reshape_as", "resolve_conj", "resolve_neg", "select", "slice", "split", "split_with_sizes", "squeeze",
        "swapaxes", "swapdims", "t", "tensor_split", "to", "to_dense", "transpose", "type_as", "unbind", "unflatten",
        "unfold", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze", "view", "view_as",
        "view_as_complex", "view_as_real", "vsplit",
    }
)  # fmt: skip
"""Operators whose result may lie in the memory of their first input."""

WITHOUT_OUTPUT = frozenset({"_assert_tensor_metadata"})

NORMS = (Op.BATCH_NORM, Op.LAYER_NORM, Op.OTHER_NORM)

OVERWRITTEN = Fixed("overwritten", "its input is overwritten in place where it is still used")


def translate(call: Call) -> list[Node]:
    """The nodes of one call, in order; the last one gives its outputs.

    Each has a `Site` with the call and the arguments that its inputs are. A call in place is translated as if it made
    a new tensor: `build` sees to those that somebody else notices."""
    translator = TABLE.get(call.name) if call.outputs or call.name in WITHOUT_OUTPUT else None
    found = None if translator is None else translator(call)
    return [other(call)] if found is None else found


def build(calls: Sequence[Call], outputs: Iterable[Value], outside: Iterable[Value]) -> Graph:
    """The graph of all calls, given in order.

    outputs: the values that leave the program. outside: the inputs of the program and its stored tensors, which
    somebody else sees change."""
    for value in outputs:
        value.is_output = True
    opaque = _written(calls, set(outside))
    graph = Graph()
    for place, call in enumerate(calls):
        for node in _opaque(call) if place in opaque else translate(call):
            graph.add(node)
    return graph


def _opaque(call: Call) -> list[Node]:
    """A call that writes over what others read, or reads it. A norm stays one, so that it is among those that stay."""
    nodes = translate(call)
    if len(nodes) == 1 and nodes[0].op in NORMS:
        nodes[0].fixed = nodes[0].fixed or OVERWRITTEN
        return nodes
    return [other(call)]


def _written(calls: Sequence[Call], outside: Collection[Value]) -> set[int]:
    """The places of calls that overwrite what is read again afterwards, and of those that read it.

    The overwritten values become outputs, and stored ones lose their array: what they hold is not known."""
    if not any(call.in_place for call in calls):
        return set()
    roots = overwritten_roots(calls)
    made = {output: place for place, call in enumerate(calls) for output in call.outputs}
    family: dict[Value, list[Value]] = defaultdict(list)
    readers: dict[Value, list[int]] = defaultdict(list)
    for place, call in enumerate(calls):
        for value in call.tensors:
            readers[value].append(place)
    for value in dict.fromkeys([*roots, *roots.values()]):
        family[roots.get(value, value)].append(value)
    opaque: set[int] = set()
    for place, call in enumerate(calls):
        if not call.in_place or not call.tensors:
            continue
        root = roots.get(call.tensors[0], call.tensors[0])
        before = [value for value in family[root] or [root] if made.get(value, -1) < place]
        after = [reader for value in before for reader in readers[value] if reader > place]
        if not after and root not in outside and not any(value.is_output for value in before):
            continue
        opaque.update((place, *after))
        for value in before:
            value.is_output, value.array = True, None
    return opaque


def overwritten_roots(calls: Sequence[Call], same: Mapping[Value, Value] | None = None) -> dict[Value, Value]:
    """What lies in the memory of another value → the value that the memory was made for.

    same: outputs of calls that are taken to be another value, as if the call were not there."""
    roots: dict[Value, Value] = {}
    same = same or {}
    for call in calls:
        first = call.tensors[0] if call.tensors and (call.in_place or call.name in VIEWS) else None
        for output in call.outputs:
            source = same.get(output, first)
            if source is not None and source is not output:
                roots[output] = roots.get(source, source)
    return roots
