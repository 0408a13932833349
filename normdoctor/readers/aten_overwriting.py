"""Calls that overwrite a tensor in place: a norm between two of them keeps their memories apart.

y = norm(x); y += 1        is harmless;        without the norm it changes x, which others may read.
"""

from __future__ import annotations

from collections.abc import Iterator

from normdoctor.flow.carrying import State
from normdoctor.flow.graph import Fixed, Node, Value
from normdoctor.flow.plan import FoldPlan
from normdoctor.readers.aten import VIEWS, Call

OVERWRITTEN = Fixed("overwritten", "what comes out of it is overwritten in place, and what goes in is read elsewhere")


def overwritten(plan: FoldPlan) -> Iterator[Node]:
    """The nodes that the plan takes out and whose going would let a call overwrite what somebody else reads."""
    for node, slot in plan.bypassed.items():
        data = node.inputs[slot]
        assert data is not None
        if _is_overwritten(node.y, plan.state) and not _is_its_own(data, plan.state):
            yield node


def _is_overwritten(value: Value, state: State) -> bool:
    waiting, seen = [value], {value}
    while waiting:
        value = waiting.pop()
        for use in value.uses:
            call = _call(use.node)
            first = bool(call.tensors) and call.tensors[0] is value
            if use.node in state.bypassed:
                follows = use.slot == state.bypassed[use.node]
            elif first and call.in_place:
                return True
            else:
                follows = first and call.name in VIEWS
            if follows:
                waiting += [output for output in use.node.outputs if output not in seen]
                seen.update(use.node.outputs)
    return False


def _is_its_own(value: Value, state: State) -> bool:
    """Whether the memory of a value was made for it, and only the next node reads it."""
    while True:
        if value.producer is None or state.leaves(value) or len(state.uses(value)) != 1:
            return False
        node = value.producer
        call = _call(node)
        shares = call.in_place or call.name in VIEWS
        if node in state.bypassed:
            source = node.inputs[state.bypassed[node]]
        elif shares and call.tensors:
            source = call.tensors[0]
        else:
            return True
        assert source is not None
        value = source


def _call(node: Node) -> Call:
    call = node.site.call
    assert isinstance(call, Call)
    return call
