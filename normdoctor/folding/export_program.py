"""The JSON of an exported program while a fold plan is written into it: names, tensors, nodes, signature."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normdoctor.errors import InputError
from normdoctor.flow.affine import Array
from normdoctor.flow.graph import Value
from normdoctor.readers.arrays import StoredArray
from normdoctor.readers.export_flow import stored_specs
from normdoctor.readers.export_graph import DAMAGED, as_dict, as_list, as_text
from normdoctor.readers.torch_export import DTYPES, STRIDED

SCALAR_TYPES = {name: number for number, name in DTYPES.items()}
POSITIONAL, KEYWORD = 1, 2
"""torch._export.serde.schema.ArgumentKind."""

Json = dict[str, Any]


@dataclass
class Stored:
    """One tensor to be written: the record, its bytes in order, and the description of the view."""

    values: Array
    dtype: str
    order: tuple[int, ...]
    """Its axes, outermost in memory first."""
    strides: tuple[int, ...]

    @property
    def laid(self) -> Array:
        """The values in the order of memory."""
        return np.transpose(self.values, self.order)


def laid_out(values: Array, dtype: str, like: Value | None) -> Stored:
    """New values in the layout that the tensor before them had: torch chooses the layout of results by it."""
    array = None if like is None else like.array
    axes = tuple(range(values.ndim))
    if not isinstance(array, StoredArray) or array.shape != values.shape:
        return Stored(values, dtype, axes, _dense(values.shape, axes))
    strides = array.element_strides
    order = tuple(sorted(axes, key=lambda axis: (-strides[axis], axis)))
    dense = _dense(values.shape, order)
    same = all(length == 1 or a == b for length, a, b in zip(values.shape, dense, strides, strict=True))
    return Stored(values, dtype, order, strides if same else dense)


def _dense(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    strides, step = [1] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def description(stored: Stored, like: Mapping[str, Any]) -> Json:
    """The meta of a tensor, on the device of another one."""
    return {
        "dtype": SCALAR_TYPES[stored.dtype],
        "sizes": [{"as_int": length} for length in stored.values.shape],
        "requires_grad": bool(like.get("requires_grad", False)),
        "device": copy.deepcopy(like.get("device", {"type": "cpu", "index": None})),
        "strides": [{"as_int": stride} for stride in stored.strides],
        "storage_offset": {"as_int": 0},
        "layout": STRIDED,
    }


@dataclass
class ExportProgram:
    """One program, parsed anew and changed in place."""

    record: Json
    configs: list[Json]
    """Of weights and constants: name of a tensor → where it lies."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Values that are gone → what their users take instead."""

    def __post_init__(self) -> None:
        module = self.record.get("graph_module")
        parts = as_dict(module)
        self.graph: Json = dict(as_dict(parts.get("graph")))
        self.signature: Json = dict(as_dict(parts.get("signature")))
        self.inputs, self.specs = as_list(self.graph.get("inputs")), as_list(self.signature.get("input_specs"))
        self.nodes: list[Any] = list(as_list(self.graph.get("nodes")))
        """None where one was taken out, a list where there are several now."""
        self.metas: Json = self.graph.setdefault("tensor_values", {})
        self.fields = {as_text(as_dict(spec.get("arg")).get("name")): spec[key] for _, key, spec in self.stored()}
        """Name of a value → name of the tensor."""
        self._check()
        assert isinstance(module, dict)
        module["graph"], module["signature"] = self.graph, self.signature
        self.names = {*self.metas, *(as_text(node.get("name")) for node in self.nodes)}
        self.names.update(name for entry in self.inputs for name in _names(entry))
        self._tensors = {name for config in self.configs for name in config} | set(self.fields.values())
        self._paths = {as_text(as_dict(entry).get("fqn")) for entry in as_list(parts.get("module_call_graph"))}

    def _check(self) -> None:
        """Raise InputError where a part that is going to change is not what torch writes."""
        dicts = [self.record.get("graph_module"), self.metas, *self.configs, *self.specs, *self.nodes]
        dicts += [entry for config in self.configs if isinstance(config, dict) for entry in config.values()]
        lists = [part for node in self.nodes for part in (as_dict(node).get("inputs"), as_dict(node).get("outputs"))]
        lists += [self.graph.get("outputs"), self.signature.get("output_specs")]
        dicts += [entry for node in self.nodes for entry in as_list(as_dict(node).get("inputs"))]
        own = [name for entry in self.inputs for name in _names(entry)]
        sound = all(isinstance(part, dict) for part in dicts) and all(isinstance(part, list) for part in lists)
        stored = set(self.fields)
        if not sound or len(self.inputs) != len(self.specs) or len(set(own)) != len(own) or not stored <= set(own):
            raise InputError("the graph of the program does not fit its signature", DAMAGED)
        texts = [as_dict(node).get("target") for node in self.nodes]
        texts += [as_dict(entry).get("name") for node in self.nodes for entry in as_list(as_dict(node).get("inputs"))]
        if not all(isinstance(text, str) for text in texts):
            raise InputError("a node of the graph has no operator, or an argument no name", DAMAGED)

    def stored(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """The inputs that are stored tensors."""
        return stored_specs(self.signature)

    # names

    def new_value(self, wanted: str) -> str:
        """A name for a value that is not taken."""
        wanted = re.sub(r"\W", "_", wanted)
        name, count = wanted, 0
        while name in self.names:
            count += 1
            name = f"{wanted}_{count}"
        self.names.add(name)
        return name

    def new_tensor_name(self, parent: str, leaf: str) -> str:
        """A name for a tensor that is not taken, in the module `parent`: conv.bias, or conv.folded_bias_1."""
        prefix = f"{parent}." if parent else ""
        name, count = prefix + leaf, 0
        while name in self._tensors or name in self._paths or any(own.startswith(name + ".") for own in self._tensors):
            count += 1
            name = f"{prefix}folded_{leaf.removeprefix('folded_')}_{count}"
        self._tensors.add(name)
        return name

    # tensors

    def replace_tensor(self, value: str, stored: Stored, path: str) -> None:
        """Other contents for a tensor under its own name."""
        name = self.fields[value]
        for config in self.configs:
            if name in config:
                entry = config[name]
                meta = description(stored, as_dict(entry.get("tensor_meta")))
                config[name] = {**entry, "path_name": path, "use_pickle": False, "tensor_meta": meta}
        self.metas[value] = description(stored, as_dict(self.metas.get(value)))

    def add_tensor(self, name: str, stored: Stored, path: str, like: str | None) -> str:
        """A new parameter. like: the value whose device and need of gradients it has. Gives its value's name."""
        value = self.new_value("p_" + name.replace(".", "_"))
        meta = description(stored, as_dict(self.metas.get(like or "")))
        self.configs[0][name] = {"path_name": path, "is_param": True, "use_pickle": False, "tensor_meta": meta}
        place = max((i + 1 for i, spec in enumerate(self.specs) if {"parameter", "token"} & spec.keys()), default=0)
        self.specs.insert(place, {"parameter": {"arg": {"name": value}, "parameter_name": name}})
        self.inputs.insert(place, {"as_tensor": {"name": value}})
        self.metas[value] = copy.deepcopy(meta)
        self.fields[value] = name
        return value

    def drop_tensor(self, value: str) -> str | None:
        """Take a stored tensor that nobody uses out of graph, signature and config. Gives the record it lay in."""
        place = next(i for i, entry in enumerate(self.inputs) if list(_names(entry)) == [value])
        del self.inputs[place], self.specs[place]
        self.metas.pop(value, None)
        name = self.fields.pop(value)
        if name in self.fields.values():
            return None
        for config in self.configs:
            if name in config:
                return as_text(as_dict(config.pop(name)).get("path_name"))
        return None

    # nodes

    def set_argument(self, node: Json, name: str, argument: Json) -> None:
        """Give an argument another value; one that was left out comes behind the others."""
        for entry in node["inputs"]:
            if entry.get("name") == name:
                entry["arg"] = argument
                return
        positional = [entry for entry in node["inputs"] if entry.get("kind", POSITIONAL) != KEYWORD]
        in_order = name == "bias" and bool(positional) and positional[-1].get("name") == "weight"
        place = len(positional) if in_order else len(node["inputs"])
        node["inputs"].insert(place, {"name": name, "arg": argument, "kind": POSITIONAL if in_order else KEYWORD})

    def drop_argument(self, node: Json, name: str) -> None:
        """Back to its default."""
        node["inputs"] = [entry for entry in node["inputs"] if entry.get("name") != name]

    def node_like(self, model: Json, target: str, inputs: Mapping[str, Json], output: str, name: str) -> Json:
        """A new node with one output, in the same module as another one."""
        made = {
            **copy.deepcopy({key: value for key, value in model.items() if key not in ("inputs", "outputs")}),
            "target": f"torch.ops.aten.{target}",
            "inputs": [{"name": own, "arg": argument, "kind": POSITIONAL} for own, argument in inputs.items()],
            "outputs": [tensor(output)],
        }
        if "name" in model:
            made["name"] = name
        return made

    def flat_nodes(self) -> list[Json]:
        """The nodes as they are now."""
        found: list[Json] = []
        for entry in self.nodes:
            found += entry if isinstance(entry, list) else [] if entry is None else [entry]
        return found

    def finish(self, is_pure: Callable[[Json], bool], used_before: set[str]) -> None:
        """Give all users of what is gone its replacement, and drop the nodes that then nobody needs."""
        module = self.record["graph_module"]
        nodes = self.flat_nodes()
        for node in nodes:
            node["inputs"] = [{**entry, "arg": self._renamed(entry.get("arg"))} for entry in node["inputs"]]
        self.graph["outputs"] = self._renamed(self.graph.get("outputs"))
        self.signature["output_specs"] = self._renamed(self.signature.get("output_specs"))
        for call in as_list(module.get("module_call_graph")):
            signature = as_dict(call).get("signature")
            if isinstance(signature, dict):
                for key in ("inputs", "outputs"):
                    signature[key] = self._renamed(signature.get(key))
        used = set(_names([self.graph["outputs"], self.signature["output_specs"]]))
        kept: list[Json] = []
        for node in reversed(nodes):
            outputs = set(_names(node.get("outputs")))
            dead = not outputs & used and bool(outputs & used_before) and is_pure(node)
            if dead:
                for name in outputs:
                    self.metas.pop(name, None)
                continue
            kept.append(node)
            used |= set(_names([entry.get("arg") for entry in node["inputs"]]))
        self.nodes = self.graph["nodes"] = kept[::-1]
        self.used = used

    def _renamed(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self._renamed(entry) for entry in argument]
        if not isinstance(argument, dict) or "as_graph" in argument:
            return argument
        changed = {key: self._renamed(value) for key, value in argument.items()}
        name = argument.get("name")
        if isinstance(name, str) and name in self.renamed:
            changed["name"] = self.renamed[name]
        return changed

    def encoded(self) -> bytes:
        """The JSON as torch writes it."""
        return json.dumps(self.record).encode()


def tensor(name: str) -> Json:
    """An argument that is a tensor."""
    return {"as_tensor": {"name": name}}


def _names(argument: Any) -> Iterator[str]:
    """Every value named anywhere in an argument, but for the insides of another graph."""
    if isinstance(argument, list):
        for entry in argument:
            yield from _names(entry)
    elif isinstance(argument, dict) and "as_graph" not in argument:
        for key, value in argument.items():
            if key in ("name", "as_name") and isinstance(value, str):
                yield value
            else:
                yield from _names(value)


def names_used(program: ExportProgram) -> set[str]:
    """The values that nodes or the program's outputs take."""
    arguments = [entry.get("arg") for node in program.flat_nodes() for entry in node["inputs"]]
    return set(_names([arguments, program.graph.get("outputs"), program.signature.get("output_specs")]))
