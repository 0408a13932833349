"""New running statistics into a copy of an ONNX file. The payloads and a mark differ, nothing else, where that can be.

Where it cannot, because exporters let equal initializers of several layers share one tensor, the layer gets a
tensor of its own. The file is edited as bytes (readers.onnx_splices): models beyond protobuf's 2 GB are no harder, and
what this package does not understand survives.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import InputError, RefusedError
from normdoctor.layers import ArrayRef
from normdoctor.readers.arrays import ITEM_SIZES, Source, StoredArray, decode, encode
from normdoctor.readers.onnx import Survey, all_tensors, survey
from normdoctor.readers.onnx_arrays import DTYPES, size
from normdoctor.readers.onnx_graph import MAX_CHAIN, Place, Scope, Step
from normdoctor.readers.onnx_layers import Named
from normdoctor.readers.onnx_records import FunctionKey, Tensor, read_entry
from normdoctor.readers.onnx_splices import Edits, tagged_fields
from normdoctor.readers.onnx_wire import BYTES, Wire, bytes_field, varint_field
from normdoctor.writing import replacing

MARK_KEY = "normdoctor.recalibrated"

INITIALIZERS_ARE_INPUTS = 4
"""Below this IR version every initializer must be an input of the graph as well."""

EXTERNAL_DATA, DATA_LOCATION = 13, 14
"""The fields of a TensorProto that say where its values are."""

DATA_TYPES = {name: number for number, name in DTYPES.items()}

Patch = tuple[int, bytes]
"""Offset in a file and the bytes that go there."""


def recorded_mark(source_path: Path) -> str | None:
    """What an earlier recalibration left in the file's metadata, None where there was none."""
    with Source(source_path) as source:
        wire = Wire(source)
        for item in wire.fields(wire.root):
            if item[0] == 14 and item[1] == BYTES:
                key, value = read_entry(wire, wire.inside(item, wire.root))
                if key == MARK_KEY:
                    return "" if value is None else wire.text(value.start, value.end)
    return None


def write_onnx(
    source_path: Path,
    output: Path,
    changes: Mapping[str, Mapping[str, NDArray[Any]]],
    mark: str,
    *,
    share_data: bool = False,
) -> None:
    """A copy of the model at `output` with new values for the named layers; whole or not at all.

    changes: layer name, as the reader gives it → {"running_mean": values, "running_var": values}, a value per
    channel. mark: kept in the model's metadata, see `recorded_mark`. External data that changes is copied
    beside the output; data that does not is copied only into another folder. share_data: no data file is
    copied; what changes moves into the model itself, and the rest is referred to where it lies.

    Raises RefusedError, with nothing written, for a layer that is not there, whose statistics are computed,
    whose type cannot hold a value, or that shares its statistics inside a local function; with share_data also
    where the data lies neither in the folder of the output nor below it, for a model finds no other."""
    with Source(source_path) as source:
        found = survey(source)
        with found.checkpoint:
            _Writer(found, output, share_data).write(changes, mark)


class _Writer:
    def __init__(self, found: Survey, output: Path, share_data: bool) -> None:
        self.share_data = share_data
        self.program = found.program
        self.document = found.document
        self.tensors = found.tensors
        self.layers = {item.layer.name: item for item in found.named}
        self.output = output
        self.edits = Edits(found.document.source, found.document.wire.root)
        self.patches: dict[Path, list[Patch]] = {}
        """External files to change, by real path."""
        self.taken_in: set[int] = set()
        """External tensors whose values are in the model now, by where they stand."""
        self.all = all_tensors(self.program)
        scopes = list({id(step.scope): step.scope for step in self.program.steps}.values())
        self.calls = Counter(scope.function for scope in scopes if scope.function is not None)
        self.names = {name for scope in scopes for name in scope.defined}

    def write(self, changes: Mapping[str, Mapping[str, NDArray[Any]]], mark: str) -> None:
        for name, new in changes.items():
            item = self.layers.get(name)
            if item is None:
                raise RefusedError(f"{name}: no such layer", "normdoctor inspect --all lists the names.")
            for role, values in new.items():
                self._change(item, role, values)
        self._mark(mark)
        files = self._external_files(self._external_tensors())
        made: list[Path] = []
        try:
            with ExitStack() as stack:
                # Left in reverse order: the data files are in place before the model that needs them.
                model = stack.enter_context(replacing(self.output))
                for real, target in files.items():
                    self._make_folder(target.parent, made)
                    if not target.exists():
                        made.append(target)
                    temporary = stack.enter_context(replacing(target))
                    shutil.copyfile(real, temporary)
                    if real in self.patches:
                        _patch(temporary, self.patches[real])
                with model.open("wb") as file:
                    self.edits.write(file)
        except BaseException:
            for path in reversed(made):
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
            raise

    def _make_folder(self, folder: Path, made: list[Path]) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir()
            made.append(path)

    # one tensor

    def _change(self, item: Named, role: str, values: NDArray[Any]) -> None:
        name = f"{item.layer.name}.{role}"
        ref: ArrayRef | None = getattr(item.layer, role, None)
        place = item.found.parameters.get(role)
        if ref is None or place is None:
            raise RefusedError(
                f"{name}: not in the file as a constant (it is an input or computed)",
                "Change it where it is made.",
            )
        if values.size != size(ref):
            raise RefusedError(f"{name}: {values.size} new values for {size(ref)} channels")
        data = _encode(name, values, ref.dtype)
        tensor = self._own(item, place)
        if tensor is None:
            self._give_copy(item, role, ref.dtype, data)
        elif tensor.is_external and self.share_data:
            self._take_in(tensor, data)
        elif tensor.is_external:
            real, offset, _ = self._extent(tensor)
            self.patches.setdefault(real, []).append((offset, data))
        elif tensor.raw is not None:
            self.edits.replace(tensor.raw, tensor.raw.start, tensor.raw.end, data)
        else:
            (_, start, end) = next(iter(tensor.typed.values()))[0]
            self.edits.replace(tensor.span, start, end, data)

    def _take_in(self, tensor: Tensor, data: bytes) -> None:
        """Give an external tensor its values in the model."""
        span = tensor.span
        for begin, (number, _, _, _, end) in tagged_fields(self.document.wire, span):
            if number in (EXTERNAL_DATA, DATA_LOCATION):
                self.edits.replace(span, begin, end, b"")
        self.edits.replace(span, span.end, span.end, bytes_field(9, data))
        self.taken_in.add(span.start)

    def _own(self, item: Named, place: Place) -> Tensor | None:
        """The tensor behind a parameter, where its bytes lie in one piece and nobody else uses them."""
        users = {_key(step) for step in (item.found.step, *item.found.twins)}
        for _ in range(MAX_CHAIN):
            uses = self.program.consumers(place)
            keys = [_key(step) for step in uses]
            if len(set(keys)) < len(keys) or not users.issuperset(keys):
                return None
            function = _function(place.scope)
            if place.name in place.scope.outputs or (function is not None and self.calls[function] > 1):
                return None
            step = self.program.producer(place)
            if step is None or step.node.op != "Identity":
                return self._stored(place, step)
            before = self.program.operand(step, 0)
            if before is None:
                return None
            users, place = {_key(step)}, before
        return None

    def _stored(self, place: Place, step: Step | None) -> Tensor | None:
        tensor = place.scope.graph.tensors.get(place.name)
        if step is not None and step.node.op == "Constant":
            value = self.program.attribute(step, "value")
            tensor = None if value is None else value.tensor
        if tensor is None or not isinstance(self.tensors.array(tensor), StoredArray):
            return None
        if tensor.is_external and self.share_data:
            told = tensor.location
            # Of one that is written in two parts the second is elsewhere: it cannot be rewritten as one.
            return tensor if told is not None and tensor.span.start < told.start < tensor.span.end else None
        return None if tensor.is_external and self._overlaps(tensor) else tensor

    def _overlaps(self, tensor: Tensor) -> bool:
        """Another tensor lies on the same bytes of an external file."""
        real, start, end = self._extent(tensor)
        for other in self.all:
            if other is not tensor and other.is_external:
                path, first, last = self._extent(other)
                if path == real and first < end and start < last:
                    return True
        return False

    def _extent(self, tensor: Tensor) -> tuple[Path, int, int]:
        """Real path of an external tensor's file, its first byte and the byte behind its last."""
        real = self.tensors.locate(tensor.external.get("location", "")).resolve()
        offset, length = tensor.external.get("offset", "0"), tensor.external.get("length")
        begin = int(offset) if offset.isdigit() else 0
        if length is not None and length.isdigit():
            return real, begin, begin + int(length)
        dtype = DTYPES.get(tensor.data_type)
        # What an unknown type occupies is not known: then all that follows.
        return (
            real,
            begin,
            sys.maxsize if dtype is None else begin + math.prod(tensor.dims) * ITEM_SIZES[dtype],
        )

    def _give_copy(self, item: Named, role: str, dtype: str, data: bytes) -> None:
        """A new initializer for this layer alone, and its nodes pointed to it."""
        name = f"{item.layer.name}.{role}"
        index = item.found.inputs[role][1]
        steps = [item.found.step, *item.found.twins]
        if any(_function(step.scope) is not None for step in steps):
            raise RefusedError(
                f"{name}: is shared with other layers, inside a local function that serves them all",
                "Inline the functions first (onnx.inliner.inline_local_functions).",
            )
        base, number = name, 1
        while name in self.names:
            number += 1
            name = f"{base}_{number}"
        self.names.add(name)
        count = len(data) // ITEM_SIZES[dtype]
        text, kind = name.encode(), DATA_TYPES[dtype]
        tensor = varint_field(1, count) + varint_field(2, kind) + bytes_field(8, text) + bytes_field(9, data)
        graph = self.document.graph.spans[-1]
        self.edits.replace(graph, graph.end, graph.end, bytes_field(5, tensor))
        if self.document.ir_version < INITIALIZERS_ARE_INPUTS:
            shape = bytes_field(1, varint_field(1, count))
            value = bytes_field(1, varint_field(1, kind) + bytes_field(2, shape))
            self.edits.replace(
                graph, graph.end, graph.end, bytes_field(11, bytes_field(1, text) + bytes_field(2, value))
            )
        for step in steps:
            self._point(step, index, text)

    def _point(self, step: Step, index: int, name: bytes) -> None:
        """Give the node another input."""
        wire, node = self.document.wire, step.node
        inputs = [item for item in wire.fields(node.span) if item[0] == 1 and item[1] == BYTES]
        place = wire.inside(inputs[index], node.span)
        self.edits.replace(place, place.start, place.end, name)

    def _mark(self, mark: str) -> None:
        wire, root = self.document.wire, self.document.wire.root
        entry = bytes_field(1, MARK_KEY.encode()) + bytes_field(2, mark.encode())
        for span in self.document.metadata:
            if read_entry(wire, span)[0] == MARK_KEY:  # two entries of one key are not allowed
                self.edits.replace(span, span.start, span.end, entry)
                return
        # A repeated field may come last, so everything before keeps its place.
        self.edits.replace(root, root.end, root.end, bytes_field(14, entry))

    # external data

    def _external_tensors(self) -> dict[Path, list[Tensor]]:
        """The tensors that stay outside the model, by the real path of their file."""
        by_file: dict[Path, list[Tensor]] = {}
        for tensor in self.all:
            if tensor.is_external and tensor.span.start not in self.taken_in:
                by_file.setdefault(self._extent(tensor)[0], []).append(tensor)
        if self.output.resolve() in by_file:
            raise RefusedError(
                f"{self.output}: holds the weights of the input, which is never overwritten", "Choose another -o."
            )
        return by_file

    def _external_files(self, by_file: Mapping[Path, list[Tensor]]) -> dict[Path, Path]:
        """Which external file (by real path) is copied to where; locations are rewritten where names change."""
        here = self.output.parent.resolve() == self.document.source.path.parent.resolve()
        if self.share_data:
            if not here:
                self._refer(by_file)
            return {}
        files: dict[Path, Path] = {}
        taken = {self.output.resolve(), *by_file}
        for real, tensors in by_file.items():
            if not real.is_file() or (here and real not in self.patches):
                continue  # missing, as before; or unchanged and reached from the output as well
            target = self.output.parent / tensors[0].external["location"]
            if here or target.resolve() in taken or target.exists():
                target = self._free_name(taken)
                for tensor in tensors:
                    assert tensor.location is not None
                    place = tensor.location
                    self.edits.replace(place, place.start, place.end, target.name.encode())
            else:
                # Several spellings of one location (./a, a) all reach the copy where the first does.
                for tensor in tensors[1:]:
                    other = self.output.parent / tensor.external["location"]
                    if other.resolve() != target.resolve() and tensor.location is not None:
                        place, spelt = tensor.location, tensors[0].external["location"]
                        self.edits.replace(place, place.start, place.end, spelt.encode())
            taken.add(target.resolve())
            files[real] = target
        return files

    def _refer(self, by_file: Mapping[Path, list[Tensor]]) -> None:
        """Locations that lead from the output to the data of the input."""
        folder = self.output.parent.resolve()
        for real, tensors in by_file.items():
            if not real.is_file():
                continue  # missing, as before
            if not real.is_relative_to(folder):
                raise RefusedError(
                    f"{real}: a model finds external data in its own folder and below, and {self.output} is elsewhere",
                    "Write the output beside the input, or leave out --share-data.",
                )
            spelt = real.relative_to(folder).as_posix().encode()
            for place in (tensor.location for tensor in tensors):
                if place is not None:
                    self.edits.replace(place, place.start, place.end, spelt)

    def _free_name(self, taken: set[Path]) -> Path:
        """OUTPUT.data, or OUTPUT.2.data, ...; a file that is there is only replaced together with the output."""
        number = 1
        while True:
            path = self.output.with_name(
                f"{self.output.name}.data" if number == 1 else f"{self.output.name}.{number}.data"
            )
            if path.resolve() not in taken and (self.output.exists() or not path.exists()):
                return path
            number += 1


def _key(step: Step) -> tuple[int, int]:
    return id(step.scope), id(step.node)


def _function(scope: Scope | None) -> FunctionKey | None:
    """The local function whose body a scope is, or lies in."""
    while scope is not None and scope.function is None:
        scope = scope.parent
    return None if scope is None else scope.function


def _patch(path: Path, patches: list[Patch]) -> None:
    with path.open("rb+") as file:
        for offset, data in patches:
            file.seek(offset)
            file.write(data)


def _encode(name: str, values: NDArray[Any], dtype: str) -> bytes:
    """The values in the tensor's own type. Raises RefusedError where it cannot hold them."""
    try:
        data = encode(np.asarray(values, dtype=np.float64).reshape(-1), dtype)
    except InputError as error:
        raise RefusedError(f"{name}: {error.message}", error.hint) from None
    fits = np.isfinite(decode(data, dtype)) | ~np.isfinite(np.asarray(values, dtype=np.float64).reshape(-1))
    if not fits.all():
        raise RefusedError(
            f"{name}: {dtype} cannot hold {np.abs(values).max():.3g}", "Convert the model to float32 first."
        )
    return data
