"""Nodes that torch.fx recorded → calls of aten operators → the neutral graph. Nothing here imports torch."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from normdoctor.flow.graph import Graph, Shape, Value
from normdoctor.readers.aten import Call, build
from normdoctor.readers.live_module import LiveArray, is_tensor

METADATA = frozenset({"sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "sym_is_contiguous"})
"""Operators that ask for the shape of a tensor, not for its values."""

ASSERTS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range"})
"""Operators that check something and give nothing."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A parameter, buffer or constant of a module that was traced."""

    name: str
    tensor: Any
    is_parameter: bool = False


@dataclass(frozen=True, eq=False)
class Place:
    """Where in the modules an operator was called: `Call.site`."""

    node: str
    """The name of the recorded node."""
    stack: tuple[tuple[str, str], ...]
    """Path and call (bn, then bn@1 of a second call) of each module, the outermost first."""

    @property
    def path(self) -> str:
        """The innermost module."""
        return self.stack[-1][0] if self.stack else ""


@dataclass(eq=False)
class Recording:
    """What a tracer recorded, by values of the neutral graph."""

    graph: Graph
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)
    stored: dict[Value, Stored] = field(default_factory=dict)


def read_recording(nodes: Iterable[Any], stored: Mapping[str, Stored], root: str = "") -> Recording:
    """The graph of the nodes of a torch.fx graph.

    stored: the names of the nodes (placeholders, get_attr) that stand for tensors of the module. root: the path of
    the module that was asked for, within the one that was traced."""
    reader = _Reader(stored, root)
    for node in nodes:
        reader.read(node)
    outside = [*reader.inputs.values(), *reader.stored]
    graph = build(reader.calls, reader.outputs, outside)
    return Recording(graph, reader.inputs, reader.outputs, reader.stored)


class _Reader:
    def __init__(self, stored: Mapping[str, Stored], root: str) -> None:
        self._known = stored
        self._root = root
        self._values: dict[Any, Any] = {}
        """Node → Value, a list of them, or None for what is no tensor."""
        self.calls: list[Call] = []
        self.inputs: dict[str, Value] = {}
        self.outputs: list[Value] = []
        self.stored: dict[Value, Stored] = {}

    def read(self, node: Any) -> None:
        if node.op in ("placeholder", "get_attr"):
            self._values[node] = self._take(node)
        elif node.op == "output":
            self.outputs += self._tensors(node.args)
        elif node.target is operator.getitem:
            self._values[node] = self._item(node)
        elif getattr(node.target, "_schema", None) is not None:
            self._call(node)
        elif any(True for _ in self._tensors((node.args, node.kwargs))):  # control flow, a function of Python's
            given = {str(place): self._plain(value) for place, value in enumerate((*node.args, *node.kwargs.values()))}
            self._add(node, str(node.target), "", given)

    def _take(self, node: Any) -> Value | None:
        found = self._known.get(node.name)
        value = node.meta.get("val")
        if found is not None:
            array = LiveArray(found.tensor)
            made = Value(found.name, array.shape, array.dtype, array)
            self.stored[made] = found
            return made
        if not is_tensor(value):
            return None
        made = _value(node.name, value)
        self.inputs[node.name] = made
        return made

    def _item(self, node: Any) -> Any:
        whole = self._values.get(node.args[0])
        place = node.args[1]
        if isinstance(whole, list) and isinstance(place, int) and -len(whole) <= place < len(whole):
            return whole[place]
        return None

    def _call(self, node: Any) -> None:
        schema = node.target._schema
        namespace, _, name = schema.name.partition("::")
        if name in METADATA or name in ASSERTS:
            return
        names = [argument.name for argument in schema.arguments]
        given = {key: self._plain(value) for key, value in zip(names, node.args, strict=False)}
        given |= {key: self._plain(value) for key, value in node.kwargs.items()}
        self._add(node, name if namespace == "aten" else schema.name, schema.overload_name, given)

    def _add(self, node: Any, name: str, overload: str, given: dict[str, Any]) -> None:
        value = node.meta.get("val")
        several = isinstance(value, (list, tuple))
        outputs = [
            _value(f"{node.name}:{place}" if several else node.name, entry)
            for place, entry in enumerate(value if several else (value,))
        ]
        place = self._place(node)
        self.calls.append(Call(name, overload, given, outputs, place.path or node.name, place))
        self._values[node] = outputs if several else outputs[0]

    def _place(self, node: Any) -> Place:
        stack = []
        for key, entry in (node.meta.get("nn_module_stack") or {}).items():
            path = entry[0]
            inside = not self._root or f"{path}.".startswith(f"{self._root}.")
            if not isinstance(path, str) or not inside:
                continue
            path = path[len(self._root) :].removeprefix(".")
            _, at, number = str(key).rpartition("@")
            stack.append((path, f"{path}@{number}" if at else path))
        return Place(node.name, tuple(stack))

    def _plain(self, value: Any) -> Any:
        """An argument as calls have it: values, numbers, texts, None for lengths that depend on the input."""
        if isinstance(value, (list, tuple)):
            return [self._plain(entry) for entry in value]
        if hasattr(value, "op") and hasattr(value, "target"):  # a node
            return self._values.get(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        return str(value).removeprefix("torch.")  # an element type, a device, a layout

    def _tensors(self, value: Any) -> list[Value]:
        if isinstance(value, (list, tuple)):
            return [found for entry in value for found in self._tensors(entry)]
        if isinstance(value, dict):
            return [found for entry in value.values() for found in self._tensors(entry)]
        found = self._values.get(value) if hasattr(value, "op") else None
        if isinstance(found, list):
            return [entry for entry in found if entry is not None]
        return [] if found is None else [found]


def _value(name: str, value: Any) -> Value:
    if not is_tensor(value):
        return Value(name)
    return Value(name, tuple(map(_length, value.shape)), str(value.dtype).removeprefix("torch."))


def _length(length: Any) -> int | str | None:
    """A number, the name of a length that depends on the input, None for one that is computed from such."""
    if isinstance(length, int) and not hasattr(length, "node"):
        return length
    name = str(length)
    return int(name) if name.isdecimal() else name if name.isidentifier() else None


__all__ = ["Place", "Recording", "Shape", "Stored", "read_recording"]
