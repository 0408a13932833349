"""The JSON of an exported program → its graphs: nodes with their arguments, and which input is which tensor.

Written by torch._export.serde. Arguments are tagged: {"as_float": 1e-05}, {"as_tensor": {"name": "x"}}. What
loading would evaluate is collected on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from normdoctor.errors import InputError
from normdoctor.readers.safetensors import unique_names

MAX_BYTES = 64 << 20
MAX_OBJECTS = 800_000
"""Brackets of both kinds. A node takes about 50 of them: enough for models of sixteen thousand nodes."""
MAX_VALUES = 3_000_000
MAX_WIDE = 8 << 20
"""One character beyond ASCII makes Python keep four bytes for every other one; torch writes none."""
MAX_STEPS = 16
"""Nodes between a parameter and the norm that uses it: a cast, a repeat, a view."""

ATEN = "torch.ops.aten."

DAMAGED = "The file is damaged; copy or download it again."

PASSING = frozenset(
    {
        "to", "_to_copy", "type_as", "detach", "detach_", "alias", "clone", "contiguous", "view", "_unsafe_view",
        "reshape", "repeat", "expand", "unsqueeze", "squeeze", "flatten", "lift_fresh_copy", "permute", "copy",
        "view_copy",
    }
)  # fmt: skip
"""Operators whose result holds the values of their first input, in another shape or type."""


@dataclass
class Evaluated:
    """The texts of a program that loading it would evaluate or write into Python code."""

    expressions: dict[str, None] = field(default_factory=dict)
    operators: dict[str, None] = field(default_factory=dict)
    names: dict[str, None] = field(default_factory=dict)
    """Names of values and graphs: torch writes them into the code of the module as they are."""


class JsonReader:
    """Parses the JSON of one package, all of it within one bound."""

    def __init__(self) -> None:
        self._bytes, self._objects, self._values = MAX_BYTES, MAX_OBJECTS, MAX_VALUES

    def parse(self, raw: bytes, what: str, evaluated: Evaluated | None = None) -> dict[str, Any]:
        """The object in `raw`. Raises InputError where it is none, has a name twice, or takes too much memory."""
        self._bytes -= len(raw)
        self._objects -= raw.count(b"{") + raw.count(b"[")
        self._values -= raw.count(b",")
        wide = len(raw) > MAX_WIDE and not raw.isascii()
        if wide or min(self._bytes, self._objects, self._values) < 0:
            raise InputError(
                f"{what} is larger than that of any model",
                "The file was made to exhaust memory; do not load it.",
            )
        found = evaluated or Evaluated()
        tables = {
            "expr_str": found.expressions,
            "target": found.operators,
            "as_operator": found.operators,
            "name": found.names,
            "as_name": found.names,
        }

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            result = unique_names(pairs)
            for key in result.keys() & tables.keys():  # tens of thousands of objects, most of them without
                if isinstance(result[key], str):
                    tables[key][result[key]] = None
            return result

        try:
            value = json.loads(raw, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{what} is not valid JSON ({error})", DAMAGED) from None
        if not isinstance(value, dict):
            raise InputError(f"{what} is not a JSON object", DAMAGED)
        return value


def as_dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def as_text(value: object) -> str:
    return value if isinstance(value, str) else ""


def whole(value: object) -> int | None:
    """An int of 64 bits, plain or as {"as_int": 4}; None for an expression and anything else."""
    value = as_dict(value).get("as_int", value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


class Node:
    """One call of an operator."""

    def __init__(self, record: Mapping[str, Any], graph: Graph) -> None:
        self._record = record
        self.graph = graph
        self.target = as_text(record.get("target"))

    @cached_property
    def operator(self) -> str:
        """batch_norm for torch.ops.aten.batch_norm.default; empty where it is not one of torch's tensor operators."""
        return self.target[len(ATEN) :].partition(".")[0] if self.target.startswith(ATEN) else ""

    @cached_property
    def arguments(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Name and tagged value of each argument."""
        records = map(as_dict, as_list(self._record.get("inputs")))
        return [(as_text(record.get("name")), as_dict(record.get("arg"))) for record in records]

    def argument(self, name: str) -> object:
        """The value of a plain argument, without its tag; None where it is not given or None."""
        for own, value in self.arguments:
            if own == name:
                return None if "as_none" in value else next(iter(value.values()), None)
        return None

    def number(self, name: str) -> float | None:
        value = self.argument(name)
        if isinstance(value, float) or (type(value) is int and abs(value) < 2**63):
            return float(value)
        return None

    def flag(self, name: str) -> bool | None:
        value = self.argument(name)
        return value if isinstance(value, bool) else None

    def tensor(self, name: str) -> str | None:
        """The name of the value that a tensor argument is."""
        return as_text(as_dict(self.argument(name)).get("name")) or None

    @cached_property
    def outputs(self) -> list[str]:
        return [name for record in as_list(self._record.get("outputs")) for name in _values_in(as_dict(record))]

    @cached_property
    def module(self) -> tuple[str, str]:
        """Path and class of the innermost module whose code made the call; empty where the file does not say."""
        stack = as_text(as_dict(self._record.get("metadata")).get("nn_module_stack"))
        _, _, rest = stack.rpartition(";")[-1].partition(",")
        path, _, class_name = rest.rpartition(",")
        for root in ("L['self'].", "_export_root."):
            path = path.removeprefix(root)
        return path, class_name

    @cached_property
    def call_number(self) -> int:
        """0 for the first call of a module, 1 for the second: bn@1."""
        stack = as_text(as_dict(self._record.get("metadata")).get("nn_module_stack"))
        key = stack.rpartition(";")[-1].partition(",")[0]
        number = key.rpartition("@")[-1] if "@" in key else ""
        return int(number) if number.isdecimal() and len(number) < 6 else 0


def _values_in(argument: Mapping[str, Any]) -> Iterator[str]:
    """The names of the values in a tagged argument, in order."""
    for value in argument.values():
        for entry in value if isinstance(value, list) else (value,):
            record = as_dict(entry)
            name = as_text(record.get("name") or record.get("as_name"))
            if name:
                yield name


class Graph:
    """One graph: the main one, or a branch inside a control-flow operator."""

    def __init__(self, record: Mapping[str, Any], stored: Mapping[str, str]) -> None:
        """stored: name of a value → the name under which the file keeps that tensor."""
        self.stored = stored
        self.inputs = [name for entry in as_list(record.get("inputs")) for name in _values_in(as_dict(entry))]
        self.nodes = [Node(as_dict(node), self) for node in as_list(record.get("nodes"))]
        self._metas = as_dict(record.get("tensor_values"))
        self._producers: dict[str, Node] = {name: node for node in self.nodes for name in node.outputs}

    def producer(self, value: str | None) -> Node | None:
        return None if value is None else self._producers.get(value)

    def shape(self, value: str | None) -> list[int | None]:
        """The sizes of a value, None for those that depend on the input."""
        return [whole(size) for size in as_list(as_dict(self._metas.get(value or "")).get("sizes"))]

    def way_back(self, value: str | None) -> Iterator[Node]:
        """The casts, views and repeats in front of a value, last first."""
        for _ in range(MAX_STEPS):
            node = self.producer(value)
            if node is None or node.operator not in PASSING:
                return
            yield node
            value = node.tensor("self")

    def origin(self, value: str | None) -> str | None:
        """The value behind casts, views and repeats."""
        for node in self.way_back(value):
            value = node.tensor("self")
        return value

    def parameter(self, value: str | None) -> str | None:
        """The name under which the file keeps the tensor that `value` is, None where it is computed."""
        return self.stored.get(self.origin(value) or "")


@dataclass
class Program:
    """One exported program."""

    nodes: list[Node] = field(default_factory=list)
    """Of all graphs, those of branches behind the operator that they belong to."""
    modules: dict[str, int] = field(default_factory=dict)
    """The paths of the modules → their place in the order of named_modules()."""
    guards: list[str] = field(default_factory=list)
    trees: list[str] = field(default_factory=list)
    """How inputs and outputs are put together, as JSON in JSON."""
    names: list[str] = field(default_factory=list)
    """What torch writes into code as it stands: the names of the arguments."""
    literals: list[str] = field(default_factory=list)
    """What torch writes into code between quotes: constants among the inputs, names of tensors."""


SPECS = (("parameter", "parameter_name"), ("buffer", "buffer_name"), ("tensor_constant", "tensor_constant_name"))
"""The kinds of inputs that stand for a stored tensor, and where its name is."""


def read_program(record: Mapping[str, Any]) -> Program:
    """The graphs of a parsed program. Parts that are missing or of the wrong type count as empty."""
    program = Program(guards=_texts(as_list(record.get("guards_code"))))
    module = as_dict(record.get("graph_module"))
    graph = as_dict(module.get("graph"))
    stored: dict[str, str] = {}
    inputs = list(map(as_dict, as_list(graph.get("inputs"))))
    for entry in map(as_dict, as_list(as_dict(module.get("signature")).get("input_specs"))):
        for kind, name in SPECS:
            spec = as_dict(entry.get(kind))
            if isinstance(spec.get(name), str):
                stored[as_text(as_dict(spec.get("arg")).get("name"))] = spec[name]
                program.literals.append(spec[name])
        inputs.append(as_dict(as_dict(entry.get("constant_input")).get("value")))
        inputs.append(as_dict(as_dict(entry.get("user_input")).get("arg")))
    for entry in map(as_dict, as_list(as_dict(module.get("signature")).get("output_specs"))):
        inputs += map(as_dict, entry.values())
    for value in inputs:
        program.literals += _texts(value.values())
    for place, entry in enumerate(map(as_dict, as_list(module.get("module_call_graph")))):
        program.modules.setdefault(as_text(entry.get("fqn")), place)
        program.literals.append(as_text(entry.get("fqn")))
        call = as_dict(entry.get("signature"))
        program.trees += _texts((call.get("in_spec"), call.get("out_spec")))
        program.names += _texts(as_list(call.get("forward_arg_names")))
    program.nodes += _all_nodes(graph, stored)
    return program


def _texts(values: Iterable[object]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def _all_nodes(record: Mapping[str, Any], stored: Mapping[str, str]) -> Iterator[Node]:
    stack = [iter(Graph(record, stored).nodes)]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            continue
        yield node
        inner = [as_dict(value["as_graph"]) for _, value in node.arguments if "as_graph" in value]
        if not inner:
            continue
        given = [name for _, value in node.arguments if "as_graph" not in value for name in _values_in(value)]
        for branch in reversed(inner):
            graph = Graph(as_dict(branch.get("graph")), {})
            # The operands of cond, while_loop and the like come last, one for each input of the branch.
            count = len(graph.inputs)
            pairs = zip(graph.inputs, given[len(given) - count :] if count <= len(given) else (), strict=False)
            graph.stored = {own: name for own, value in pairs if (name := node.graph.parameter(value)) is not None}
            stack.append(iter(graph.nodes))
