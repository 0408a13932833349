"""A fold plan → a new .pt2: its JSON edited, new tensors as new records, everything else copied. No torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from normdoctor.errors import InputError, RefusedError
from normdoctor.flow.affine import Array
from normdoctor.flow.graph import Node, Op, Value
from normdoctor.flow.plan import FoldPlan, NewInput
from normdoctor.folding.export_program import (
    KEYWORD,
    SCALAR_TYPES,
    ExportProgram,
    Json,
    Stored,
    laid_out,
    names_used,
    tensor,
)
from normdoctor.readers.arrays import Source, encode
from normdoctor.readers.aten import Call, Site, overwritten_roots
from normdoctor.readers.export_flow import MOVED, ExportFlow
from normdoctor.readers.export_graph import DAMAGED, as_dict, as_list, as_text, whole
from normdoctor.readers.torch_export import CONSTANTS, MODELS, WEIGHTS
from normdoctor.readers.torch_pickle import ZipRecords
from normdoctor.readers.zip_splices import ZipSplicer
from normdoctor.writing import replacing

ELEMENTWISE = (Op.ADD, Op.SUBTRACT, Op.MULTIPLY, Op.DIVIDE)
VIEW_ONLY = frozenset({"view", "view_as", "as_strided", "_reshape_alias", "unflatten", "view_as_complex"})
"""Operators that fail where the layout in memory is not the one that they were recorded with."""

CONTIGUOUS = 1
"""torch._export.serde.schema.MemoryFormat."""


@dataclass(frozen=True)
class Counts:
    """What a file holds, before and after."""

    parameters: tuple[int, int]
    """Numbers in all stored tensors."""
    nodes: tuple[int, int]


def write_folded(flow: ExportFlow, plan: FoldPlan, source: Path, output: Path) -> Counts:
    """The package at `source` with the plan in it, at `output`; whole or not at all. A plan without changes gives a
    copy. `plan.new_inputs` is gone through once.

    Raises RefusedError for the layouts of torch 2.8 and earlier, InputError for a damaged graph."""
    try:
        return _write_folded(flow, plan, source, output)
    except RecursionError:
        raise InputError(f"{source}: the graph is nested too deeply", DAMAGED) from None


def _write_folded(flow: ExportFlow, plan: FoldPlan, source: Path, output: Path) -> Counts:
    with replacing(output) as temporary, Source(source) as file:
        records = ZipRecords(file)
        if plan.changes_nothing:
            shutil.copyfile(source, temporary)
            program = _Package(flow, records).program
            counts = _count(program)
            return Counts((counts[0], counts[0]), (counts[1], counts[1]))
        package = _Package(flow, records)
        before = _count(package.program)
        with temporary.open("wb") as target:
            splicer = ZipSplicer(target, records)
            edit = _Edit(flow, plan, package, splicer)
            edit.run()
            for name in records.infos:
                if name in package.changed:
                    splicer.add(name, package.changed[name]())
                elif name not in package.dropped:
                    splicer.copy(name)
            splicer.close()
        after = _count(package.program)
        return Counts((before[0], after[0]), (before[1], after[1]))


def _count(program: ExportProgram) -> tuple[int, int]:
    entries = [as_dict(as_dict(entry).get("tensor_meta")) for config in program.configs for entry in config.values()]
    sizes = (math.prod(whole(size) or 0 for size in as_list(meta.get("sizes"))) for meta in entries)
    return sum(sizes), len(program.flat_nodes())


def _encoded(content: Json) -> bytes:
    return json.dumps(content).encode()


class _Package:
    """The records of one program."""

    def __init__(self, flow: ExportFlow, records: ZipRecords) -> None:
        self.records = records
        name = flow.opened.name
        root, found, key = name.rpartition(MODELS)
        key = key.removesuffix(".json")
        configs = [f"{root}{folder}{key}_{word}_config.json" for folder, word in _FOLDERS]
        if not found or any(config not in records.infos for config in configs):
            raise RefusedError(
                f"{records.source.path}: the layout of torch 2.8 or earlier is not written any more",
                "Load it with torch.export.load and save it again with the torch of today, then fold that file.",
            )
        parsed = [json.loads(records.read(config)) for config in configs]
        self._folders = [root + folder for folder, _ in _FOLDERS]
        tables: list[Any] = [content.get("config", {}) if isinstance(content, dict) else None for content in parsed]
        self.program = ExportProgram(json.loads(records.read(name)), tables)
        for content, tensors in zip(parsed, self.program.configs, strict=True):
            content["config"] = tensors
        self.changed: dict[str, Callable[[], bytes]] = {name: self.program.encoded}
        for config, content in zip(configs, parsed, strict=True):
            self.changed[config] = partial(_encoded, content)
        self.dropped: set[str] = set()
        order = records.infos.get(f"{root}byteorder")
        self.big_endian = order is not None and records.read(order.filename).strip() == b"big"
        self._others = [
            records.read(other)
            for other in records.infos
            if other.endswith("_config.json") and other.startswith(tuple(self._folders)) and other not in configs
        ]
        self._number = 0

    def new_path(self) -> tuple[str, str]:
        """A name for a new record: as the config says it, and in full."""
        while True:
            path = f"weight_{self._number}"
            self._number += 1
            if self._folders[0] + path not in self.records.infos:
                return path, self._folders[0] + path

    def release(self, path: str) -> None:
        """Leave out the record of a tensor that is gone, unless others lie in it too."""
        named = {
            as_text(as_dict(entry).get("path_name")) for config in self.program.configs for entry in config.values()
        }
        if path in named or any(f'"{path}"'.encode() in other for other in self._others):
            return
        self.dropped.update(folder + path for folder in self._folders if folder + path in self.records.infos)


_FOLDERS = ((WEIGHTS, "weights"), (CONSTANTS, "constants"))


class _Edit:
    """One plan on its way into one package."""

    def __init__(self, flow: ExportFlow, plan: FoldPlan, package: _Package, splicer: ZipSplicer) -> None:
        self.flow, self.plan, self.package, self.splicer = flow, plan, package, splicer
        self.program = package.program
        self._names = {value: name for name, value in flow.values.items()}
        self._replaced: set[str] = set()
        """Records whose tensor lies elsewhere now."""
        self._pure = {as_text(_record(package.program, node).get("name")) for node in _pure_nodes(flow)}

    def run(self) -> None:
        """Everything that the plan says."""
        used_before = names_used(self.program)
        for new in self.plan.new_inputs():
            self._put_in(new)
        for node, attributes in self.plan.attributes.items():
            self._set_attributes(node, attributes)
        for node, shift in self.plan.appended.items():
            self._append(node, shift)
        for node, (scale, shift) in self.plan.decomposed.items():
            self._decompose(node, scale, shift)
        for node, slot in self.plan.bypassed.items():
            self._bypass(node, slot)
        self._settle_names()
        for call in self._overwriting():
            record = self._node_of(call)
            if record is not None:
                record["target"] = record["target"].replace(f".{call.operator}.", f".{call.name}.")
        self.program.finish(lambda node: as_text(node.get("name")) in self._pure, used_before)
        self._drop_unused(used_before)

    def _node_of(self, call: Call) -> Json | None:
        """The node of a call, where it is still there as one."""
        record = self.program.nodes[call.site]
        return record if isinstance(record, dict) else None

    # tensors

    def _put_in(self, new: NewInput) -> None:
        """New values for an input: into the tensor behind it where nobody else uses that, else a tensor of its own."""
        call, argument = _argument_of(new.node, new.slot)
        old = new.node.given(new.slot)
        value, values = old, new.values
        while value is not None and value.producer is not None and len(value.uses) == 1 and not value.is_output:
            maker = value.producer
            if maker.op is not Op.TRANSPOSE or self._node_of(maker.site.call) is None:
                break
            value, values = maker.x, values.transpose(np.argsort(maker.attributes["order"]))
        own = value is not None and value.array is not None and self._names.get(value) in self.program.fields
        if value is not None and own and len(value.uses) == 1 and not value.is_output:
            name = self._names[value]
            stored = laid_out(values, new.dtype, value)
            self._replaced.add(self._path_of(name))
            self.program.replace_tensor(name, stored, self._write(stored))
            return
        parent, leaf = self._place_of(new)
        like = self._model_of(new.node, new.slot)
        stored = laid_out(new.values, new.dtype, old)
        name = self._add(parent, leaf, stored, like)
        record = self._node_of(call)
        assert record is not None
        self.program.set_argument(record, argument, tensor(name))
        if new.node.op in ELEMENTWISE:
            self.program.drop_argument(record, "alpha")
            if record["target"].endswith(".Scalar"):
                record["target"] = record["target"].removesuffix("Scalar") + "Tensor"

    def _add(self, parent: str, leaf: str, stored: Stored, like: str | None) -> str:
        name = self.program.new_tensor_name(parent, leaf)
        return self.program.add_tensor(name, stored, self._write(stored), like)

    def _write(self, stored: Stored) -> str:
        """A record with the values. Gives its name in the config."""
        path, full = self.package.new_path()
        self.splicer.add(full, encode(stored.laid, stored.dtype, self.package.big_endian))
        return path

    def _path_of(self, value: str) -> str:
        name = self.program.fields[value]
        entries = (as_dict(config[name]) for config in self.program.configs if name in config)
        return next((as_text(entry.get("path_name")) for entry in entries), "")

    def _place_of(self, new: NewInput) -> tuple[str, str]:
        """The module in which a new tensor of a node belongs, and what it is called there."""
        old = self._model_of(new.node, new.slot, exact=True)
        if old is not None:
            parent, _, leaf = self.program.fields[old].rpartition(".")
            return parent, leaf
        if new.node.op in ELEMENTWISE:
            return "", "folded_constant"
        weight = self._model_of(new.node, new.slot)
        parent, _, leaf = self.program.fields.get(weight or "", "").rpartition(".")
        role = {1: "weight", 2: "bias"}.get(new.slot, "tensor")
        return parent, role if leaf == "weight" else f"folded_{role}"

    def _model_of(self, node: Node, slot: int, exact: bool = False) -> str | None:
        """The value of the stored tensor at the slot, or of another one that the node uses."""
        slots = [slot] if exact else [slot, *range(1, len(node.inputs)), 0]
        for place in slots:
            value = node.given(place)
            while value is not None and value.producer is not None and value.producer.inputs:
                if exact and value.producer.op not in MOVED:
                    break
                value = value.producer.inputs[0]
            name = self._names.get(value) if value is not None else None
            if name in self.program.fields:
                return name
        return None

    # nodes

    def _set_attributes(self, node: Node, attributes: dict[str, object]) -> None:
        record = self._node_of(node.site.call)
        assert record is not None
        if "beta" in attributes:
            self.program.drop_argument(record, "beta")
        given = {entry.get("name") for entry in record["inputs"]}
        if attributes.get("training") is False and "training" in given and node.given(3) is not None:
            self.program.set_argument(record, "training", {"as_bool": False})

    def _append(self, node: Node, shift: Array) -> None:
        """An addition behind a matrix product. It takes over the name of the product's output."""
        call = node.site.call
        record, output = self._node_of(call), self._names[node.y]
        assert record is not None
        parent, leaf = self._place_of(NewInput(node, 2, shift, node.y.dtype or "float32"))
        bias = self._add(parent, leaf, self._constant(node, shift), self._model_of(node, 1))
        if call.name == "mm":
            given = {entry["name"]: entry["arg"] for entry in record["inputs"]}
            inputs = {"self": tensor(bias), "mat1": given["self"], "mat2": given["mat2"]}
            whole = self.program.node_like(record, "addmm.default", inputs, output, as_text(record.get("name")))
            self.program.nodes[call.site] = [whole]
            return
        product = self._new_result(output, "product")
        record["outputs"] = [tensor(product)]
        inputs = {"self": tensor(product), "other": tensor(bias)}
        name = self.program.new_value(f"{output}_biased")
        added = self.program.node_like(record, "add.Tensor", inputs, output, name)
        self.program.nodes[call.site] = [record, added]

    def _decompose(self, node: Node, scale: Array, shift: Array) -> None:
        """A norm as one multiplication and one addition."""
        call, output = node.site.call, self._names[node.y]
        record = self._node_of(call)
        assert record is not None
        like = self._model_of(node, 1)
        parent = self.program.fields.get(like or "", "").rpartition(".")[0]
        factor = self._add(parent, "folded_scale", self._constant(node, scale), like)
        term = self._add(parent, "folded_shift", self._constant(node, shift), like)
        product = self._new_result(output, "scaled")
        inputs = {"self": tensor(self._names[node.x]), "other": tensor(factor)}
        name = self.program.new_value(f"{output}_scaled_node")
        scaled = self.program.node_like(record, "mul.Tensor", inputs, product, product)
        inputs = {"self": tensor(product), "other": tensor(term)}
        shifted = self.program.node_like(record, "add.Tensor", inputs, output, name)
        for other in node.outputs[1:]:
            self.program.metas.pop(self._names.get(other, ""), None)
        self.program.nodes[call.site] = [scaled, shifted]

    def _constant(self, node: Node, values: Array) -> Stored:
        return laid_out(np.ascontiguousarray(values), node.y.dtype or "float32", None)

    def _new_result(self, output: str, suffix: str) -> str:
        """A value like another one."""
        name = self.program.new_value(f"{output}_{suffix}")
        self.program.metas[name] = json.loads(json.dumps(self.program.metas.get(output, {})))
        return name

    def _bypass(self, node: Node, slot: int) -> None:
        """A node goes, its users take its input; where they would notice the difference, a copy of it."""
        data = node.inputs[slot]
        assert data is not None
        call, name, source = node.site.call, self._names[node.y], self._names[data]
        record = self._node_of(call)
        assert record is not None
        stand_in = self._stand_in(node, data, source)
        if stand_in is None:
            self.program.renamed[name] = source
            for output in node.outputs:
                self.program.metas.pop(self._names.get(output, ""), None)
            self.program.nodes[call.site] = None
            return
        target, options = stand_in
        copied = self.program.node_like(record, target, {"self": tensor(source)}, name, as_text(record.get("name")))
        copied["inputs"] += [{"name": own, "arg": given, "kind": KEYWORD} for own, given in options.items()]
        self.program.nodes[call.site] = [copied]

    def _stand_in(self, node: Node, data: Value, source: str) -> tuple[str, dict[str, Json]] | None:
        if data.dtype != node.y.dtype and node.y.dtype in SCALAR_TYPES:
            return "_to_copy.default", {"dtype": {"as_scalar_type": SCALAR_TYPES[node.y.dtype]}}
        metas = self.program.metas
        before, after = (as_dict(metas.get(name)).get("strides") for name in (source, self._names[node.y]))
        if before != after and self._is_viewed(node.y):
            return "clone.default", {"memory_format": {"as_memory_format": CONTIGUOUS}}
        if node.y.is_output and (data.producer is None or data.is_output):
            return "clone.default", {}
        return None

    def _is_viewed(self, value: Value) -> bool:
        """Whether anything computed from it depends on how it lies in memory."""
        waiting, seen = [value], {value}
        while waiting:
            for use in waiting.pop().uses:
                if isinstance(use.node.site, Site) and use.node.site.call.name in VIEW_ONLY:
                    return True
                new = [output for output in use.node.outputs if output not in seen]
                seen.update(new)
                waiting += new
        return False

    def _settle_names(self) -> None:
        """Values that are gone lead to one that is there."""
        renamed = self.program.renamed
        for name in renamed:
            target = renamed[name]
            while target in renamed:
                target = renamed[target]
            renamed[name] = target

    def _overwriting(self) -> Iterator[Call]:
        """The calls in place whose memory is now that of a value in front of a node that is gone: somebody else may
        read that, so they have to make a new tensor."""
        same = {}
        for node, slot in self.plan.bypassed.items():
            data = node.inputs[slot]
            assert data is not None
            same[node.y] = data
        roots = overwritten_roots(self.flow.calls, same)
        touched = {roots.get(value, value) for pair in same.items() for value in pair}
        opaque = {id(node.site.call) for node in self.flow.graph.of(Op.OTHER) if isinstance(node.site, Site)}
        for call in self.flow.calls:
            safe = call.in_place and bool(call.tensors) and id(call) not in opaque
            if safe and roots.get(call.tensors[0], call.tensors[0]) in touched:
                yield call

    # what is left over

    def _drop_unused(self, used_before: set[str]) -> None:
        """Tensors that the fold made useless, and the counters of norms that are gone."""
        program = self.program
        dropped = [name for name in program.fields if name in used_before and name not in program.used]
        parents = {program.fields[name].rpartition(".")[0] for name in dropped}
        gone = {parent for parent in parents if f"{parent}.running_var" in map(program.fields.get, dropped)}
        for name, field in program.fields.items():
            parent, _, leaf = field.rpartition(".")
            if leaf == "num_batches_tracked" and parent in gone and name not in used_before | program.used:
                dropped.append(name)
        for name in dropped:
            path = program.drop_tensor(name)
            if path:
                self._replaced.add(path)
        for path in self._replaced - {""}:
            self.package.release(path)


def _argument_of(node: Node, slot: int) -> tuple[Call, str]:
    """The call of a node, and the argument that its input at `slot` is."""
    assert isinstance(node.site, Site)
    argument = node.site.slots[slot] if slot < len(node.site.slots) else None
    assert argument is not None, node
    return node.site.call, argument


def _record(program: ExportProgram, node: Node) -> Json:
    return as_dict(program.nodes[node.site.call.site])  # type: ignore[return-value]


def _pure_nodes(flow: ExportFlow) -> Iterator[Node]:
    """Nodes that do nothing but compute their outputs."""
    for node in flow.graph.nodes:
        if isinstance(node.site, Site) and node.op is not Op.OTHER and not node.site.call.in_place:
            yield node
