"""A fold plan on ONNX's own nodes and names: what goes, what changes, what is new, what becomes dead by it."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from normdoctor.flow.graph import Node as FlowNode
from normdoctor.flow.graph import Op
from normdoctor.flow.plan import FoldPlan
from normdoctor.folding.onnx_frames import Frame, Key, frames_of
from normdoctor.folding.onnx_storage import NewTensor
from normdoctor.readers.onnx_builder import INITIALIZERS_ARE_INPUTS, Site
from normdoctor.readers.onnx_flow import Flow
from normdoctor.readers.onnx_records import Document, Node
from normdoctor.readers.onnx_weighted_ops import NUMPY_BROADCASTING
from normdoctor.readers.onnx_wire import FIXED32, bytes_field, varint, varint_field

FLOAT_ATTRIBUTE, INT_ATTRIBUTE = 1, 2
"""AttributeProto.type"""


@dataclass(eq=False)
class Change:
    """What becomes of one node that stays; what is None stays too."""

    frame: Frame
    node: Node
    inputs: list[str | NewTensor]
    outputs: list[str]
    numbers: dict[str, float] = field(default_factory=dict)
    """Attributes that get a new number."""
    dropped: set[str] = field(default_factory=set)
    """Attributes that go."""
    becomes: list[tuple[str, int]] = field(default_factory=list)
    """The operators that take its place, one after the other; each with the index of its second operand among
    `extra`, or -1. Empty: the node itself stays."""
    extra: list[NewTensor] = field(default_factory=list)
    legacy: bool = False
    """Whether its opset broadcasts by attribute."""


class Surgery:
    """All that changes in the graphs, decided; nothing of it needs the values of the new tensors."""

    def __init__(self, flow: Flow, plan: FoldPlan) -> None:
        self.document: Document = flow.survey.document
        self.plan = plan
        self.frames = frames_of(self.document)
        self.frame_of = {id(node): frame for frame in self.frames for node in frame.graph.nodes}
        self.makers: dict[Key, Node] = {
            (frame, name): node for frame in self.frames for node in frame.graph.nodes for name in node.outputs if name
        }
        self.names = {name for frame in self.frames for name in frame.names}
        self.hidden = {name for frame in self.frames for name in frame.hides()}
        """Names that mean one thing in a graph and another in a body of it."""
        self.removed: set[int] = set()
        self.changes: dict[int, Change] = {}
        self.stands_for: dict[Key, Key] = {}
        """The output of a node that goes → the value that takes its place."""
        self.taken: dict[Key, str] = {}
        """A value → the name of a promised value that it takes over."""
        self.dead_tensors: set[Key] = set()
        self.vanished: set[Key] = set()
        self.given_values: list[tuple[NewTensor, NDArray[np.float64]]] = []
        """New constants whose values the plan itself holds."""
        self._lost: list[Key] = []
        self._decide()

    # what the plan says, on ONNX's own nodes

    def _decide(self) -> None:
        plan = self.plan
        for flow_node in plan.graph.nodes:
            if flow_node in plan.bypassed:
                self._bypass(flow_node, plan.bypassed[flow_node])
        for flow_node, (scale, shift) in plan.decomposed.items():
            change, dtype = self.change(flow_node), self._dtype(flow_node)
            self._lose_inputs(change, 1)
            change.becomes = [("Mul", 0), ("Add", 1)]
            change.legacy = flow_node.site.step.scope.opset < NUMPY_BROADCASTING
            for suffix, values in (("scale", scale), ("shift", shift)):
                values = values.reshape(-1) if change.legacy else values
                change.extra.append(self._tensor(change, f"{flow_node.label}.{suffix}", values.shape, dtype))
                self.given_values.append((change.extra[-1], values))
        for flow_node, values in plan.appended.items():
            change = self.change(flow_node)
            change.becomes = [("", -1), ("Add", 0)]
            change.legacy = flow_node.site.step.scope.opset < NUMPY_BROADCASTING
            values = values.reshape(-1) if change.legacy else values
            change.extra.append(self._tensor(change, f"{flow_node.label}.bias", values.shape, self._dtype(flow_node)))
            self.given_values.append((change.extra[-1], values))
        for flow_node, attributes in plan.attributes.items():
            if id(flow_node.site.step.node) in self.frame_of and flow_node.fixed is None:
                self._set(flow_node, attributes)

    def _dtype(self, node: FlowNode) -> str:
        weight = node.given(1)
        return node.y.dtype or node.x.dtype or (weight.dtype if weight is not None else None) or "float32"

    def _bypass(self, flow_node: FlowNode, slot: int) -> None:
        site: Site = flow_node.site
        node, index = site.step.node, site.slots[slot]
        frame = self.frame_of[id(node)]
        assert site.whole, f"{flow_node}: only a part of a node goes"
        y: Key = (frame, node.outputs[0])
        source = self.root(frame.find(node.inputs[index]))
        promised = frame.promises(y[1])
        hidden = source[1] in self.hidden or y[1] in self.hidden
        maker = self.makers.get(source)
        if not hidden and not promised:
            self.stands_for[y] = source
        elif (
            not hidden
            and maker is not None
            and source[0] is frame
            and not frame.promises(source[1])
            and source not in self.taken
        ):
            self.stands_for[y] = source
            self.taken[source] = y[1]
            self.vanished.add(source)
        else:
            change = self.change(flow_node)
            self._lose_inputs(change, 0, index)
            change.inputs = [change.inputs[index]]
            change.becomes = [("Identity", -1)]
            return
        self.removed.add(id(node))
        if not promised:
            self.vanished.add(y)
        self._lost += [frame.find(name) for place, name in enumerate(node.inputs) if name and place != index]

    def root(self, key: Key) -> Key:
        """The value that stands there in the end."""
        while key in self.stands_for:
            key = self.stands_for[key]
        return key

    def name(self, frame: Frame, name: str) -> str:
        """What the value called `name` in `frame` is called in the end."""
        key = self.root(frame.find(name))
        return self.taken.get(key, key[1])

    def change(self, flow_node: FlowNode) -> Change:
        """The change of the node behind a neutral node."""
        node: Node = flow_node.site.step.node
        if id(node) not in self.changes:
            frame = self.frame_of[id(node)]
            self.changes[id(node)] = Change(frame, node, list(node.inputs), list(node.outputs))
        return self.changes[id(node)]

    def _lose_inputs(self, change: Change, first: int, but: int = -1) -> None:
        node = change.node
        self._lost += [
            change.frame.find(name)
            for place, name in enumerate(node.inputs)
            if name and place >= first and place != but
        ]

    def _set(self, flow_node: FlowNode, attributes: dict[str, object]) -> None:
        change = self.change(flow_node)
        for name, value in attributes.items():
            if name in ("alpha", "beta") and isinstance(value, float | int):
                change.numbers[name] = float(value)
            elif name == "training" and not value and not change.becomes:
                change.dropped.add("training_mode")
                # Before opset 14 it is the further outputs that make it train; after, they must not be there.
                change.outputs = change.outputs[:1]
            elif not change.becomes:
                raise AssertionError(f"{flow_node}: attribute {name}")

    def _tensor(
        self, change: Change, name: str, shape: tuple[int, ...], dtype: str, old: Key | None = None
    ) -> NewTensor:
        main = self.document.ir_version < INITIALIZERS_ARE_INPUTS
        return NewTensor(self.frames[0] if main else change.frame, name, shape, dtype, old)

    # new constants

    def give(self, flow_node: FlowNode, slot: int, shape: tuple[int, ...], dtype: str) -> NewTensor:
        """A new constant for the input at `slot`; its values come later."""
        change = self.change(flow_node)
        site: Site = flow_node.site
        index = site.slots[slot]
        change.inputs += [""] * (index + 1 - len(change.inputs))
        own = change.node.inputs[index] if index < len(change.node.inputs) else ""
        old = change.frame.find(own) if own else None
        if old is not None:
            self._lost.append(old)
        role = {1: "weight", 2: "bias"}.get(slot, "constant")
        base = own or f"{flow_node.label}.{role if flow_node.op is not Op.ADD else 'shift'}"
        tensor = self._tensor(change, base, shape, dtype, old)
        change.inputs[index] = tensor
        return tensor

    def new_tensors(self) -> Iterator[NewTensor]:
        """Every new constant of the file, in the order of the nodes."""
        for change in self.changes.values():
            yield from (entry for entry in change.inputs if isinstance(entry, NewTensor))
            yield from change.extra

    # what nobody uses any more, and the names that this sets free

    def settle(self) -> None:
        """After all new constants are given: drop what became dead, and name what is new."""
        uses: Counter[Key] = Counter()
        for frame in self.frames:
            for node in frame.graph.nodes:
                if id(node) not in self.removed:
                    uses.update(self.root(frame.find(name)) for name in self._inputs(frame, node))
        pending = [self.root(key) for key in self._lost]
        while pending:
            frame, name = key = pending.pop()
            if uses[key] or frame.promises(name) or key in self.taken or key in self.dead_tensors:
                continue
            if name in frame.graph.tensors and not self._is_interface(frame, name):
                self.dead_tensors.add(key)
                self.vanished.add(key)
                continue
            maker = self.makers.get(key)
            if maker is None or id(maker) in self.removed or id(maker) in self.changes:
                continue
            outputs: list[Key] = [(frame, output) for output in maker.outputs if output]
            if any(uses[out] or frame.promises(out[1]) for out in outputs) or self._has_bodies(maker):
                continue
            self.removed.add(id(maker))
            self.vanished.update(outputs)
            for given in maker.inputs:
                if given:
                    operand = self.root(frame.find(given))
                    uses[operand] -= 1
                    pending.append(operand)
        self._name_tensors()

    def _inputs(self, frame: Frame, node: Node) -> list[str]:
        """The values of the old file that the node takes in the end."""
        change = self.changes.get(id(node))
        if change is None:
            return [name for name in node.inputs if name]
        given = change.inputs[:1] if change.becomes and change.becomes[0][0] else change.inputs
        return [entry for entry in given if isinstance(entry, str) and entry]

    def _is_interface(self, frame: Frame, name: str) -> bool:
        return name in frame.graph.inputs and self.document.ir_version >= INITIALIZERS_ARE_INPUTS

    def _has_bodies(self, node: Node) -> bool:
        return any(attribute.graphs for attribute in self.document.attributes(node).values())

    def _name_tensors(self) -> None:
        free = set(self.vanished)
        for tensor in self.new_tensors():
            old = tensor.old
            if old is not None and old in free and old[0] is tensor.frame and old[1] not in self.hidden:
                stored = old[0].graph.tensors.get(old[1])
                if stored is None or (tuple(stored.dims) == tensor.shape and stored.data_type == tensor.data_type):
                    free.discard(old)
                    self.vanished.discard(old)
                    self.dead_tensors.discard(old)
                    tensor.name = old[1]
                    tensor.in_place_of = stored
                    continue
            tensor.name = self.unique(tensor.name)

    def unique(self, base: str) -> str:
        """A name that no value has."""
        name, number = base or "folded", 1
        while name in self.names:
            number += 1
            name = f"{base}_{number}"
        self.names.add(name)
        return name

    def count_nodes(self) -> tuple[int, int]:
        """Nodes of the main graph and all bodies, before and after; constants are not counted."""
        nodes = [node for frame in self.frames for node in frame.graph.nodes if node.op != "Constant"]
        left = sum(id(node) not in self.removed for node in nodes)
        # Each change that makes nodes has one of its own in the sum, the node itself or the first that replaces it.
        return len(nodes), left + sum(len(change.becomes) - 1 for change in self.changes.values() if change.becomes)

    # the bytes of a node

    def encode_node(self, op: str, inputs: list[str], outputs: list[str], name: str, attributes: bytes = b"") -> bytes:
        """A NodeProto as a field of its graph."""
        body = b"".join(bytes_field(1, entry.encode()) for entry in inputs)
        body += b"".join(bytes_field(2, entry.encode()) for entry in outputs)
        body += bytes_field(3, name.encode()) if name else b""
        return bytes_field(1, body + bytes_field(4, op.encode()) + attributes)

    def successors(self, change: Change) -> list[bytes]:
        """The nodes that take the place of a changed node, or follow it, as fields of its graph."""
        final = self.name(change.frame, change.node.outputs[0])
        made = []
        running = ""
        if change.becomes[0][0]:
            first = change.inputs[0]
            assert isinstance(first, str)
            running = self.name(change.frame, first)
        else:
            running = change.outputs[0] = self.unique(f"{final}.product")
        steps = [step for step in change.becomes if step[0]]
        for place, (op, index) in enumerate(steps):
            last = place == len(steps) - 1
            target = final if last else self.unique(f"{final}.scaled")
            inputs = [running] if index < 0 else [running, change.extra[index].name]
            attributes = b""
            if change.legacy and index >= 0:
                axis = 1 if change.node.op == "BatchNormalization" else -1
                attributes = int_attribute("broadcast", 1) + (int_attribute("axis", 1) if axis == 1 else b"")
            name = change.node.name if op == "Identity" or not change.node.name else f"{change.node.name}/{op}"
            made.append(self.encode_node(op, inputs, [target], name, attributes))
            running = target
        return made


def int_attribute(name: str, value: int) -> bytes:
    """An AttributeProto with a number, as a field of its node."""
    return bytes_field(5, bytes_field(1, name.encode()) + varint_field(3, value) + varint_field(20, INT_ATTRIBUTE))


def float_attribute(name: str, value: float) -> bytes:
    """The payload of an AttributeProto with a number."""
    number = varint(2 << 3 | FIXED32) + struct.pack("<f", value)
    return bytes_field(1, name.encode()) + number + varint_field(20, FLOAT_ATTRIBUTE)
