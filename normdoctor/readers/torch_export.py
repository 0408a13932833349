"""Packages of torch.export.save (.pt2), without torch: the tensors, the graph, and what loading would run.

Layout since torch 2.8: <root>/models/<model>.json is the graph, <root>/data/weights/<model>_weights_config.json
says which record holds which tensor (data/constants the same), all uncompressed. Before: the same graph in
serialized_exported_program.json, the tensors in files of torch.save within the zip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from normdoctor.errors import InputError, UsageError
from normdoctor.layers import ArrayRef, Checkpoint, Container, Danger, LoadCall, Model, Reference
from normdoctor.readers import load_calls
from normdoctor.readers.arrays import FileStorage, Source, Storage, StoredArray
from normdoctor.readers.export_calls import judge_program, printable
from normdoctor.readers.export_graph import (
    DAMAGED,
    Evaluated,
    JsonReader,
    Program,
    as_dict,
    as_list,
    as_text,
    read_program,
    whole,
)
from normdoctor.readers.export_layers import Tensors, read_layers
from normdoctor.readers.finishing import Budget
from normdoctor.readers.naming import why_no_norms
from normdoctor.readers.pickle_machine import PickleMachine
from normdoctor.readers.pickle_records import Call
from normdoctor.readers.torch_contents import with_key
from normdoctor.readers.torch_pickle import ZipRecords, is_zip, unpickle_zip
from normdoctor.readers.torch_tensors import TensorReader

OLD_PROGRAM = "serialized_exported_program.json"
MODELS = "models/"
WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
SAMPLES = "data/sample_inputs/"
COMPILED = "data/aotinductor/"

DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    9: "complex32",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
    31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu",
    34: "uint32",
    35: "uint64",
}
"""torch._export.serde.schema.ScalarType → torch's names."""

STRIDED = 7
"""The one layout in which a tensor is its elements at strides; the others are sparse or a library's own."""

MAX_PICKLES = 4 << 20
"""The pickles of a package come to this many bytes together; one with weights in them to a tenth."""

LEGACY_PICKLES = 5

LOADER = "torch.export.load"


@dataclass
class _Package:
    """A package open for reading, and what was found in it so far."""

    source: Source
    records: ZipRecords
    root: str
    json: JsonReader = field(default_factory=JsonReader)
    calls: list[Call] = field(default_factory=list)
    """Of all its pickles."""
    found: list[LoadCall] = field(default_factory=list)
    """Beside those of pickles."""
    notes: list[str] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget)
    pickled: int = 0
    torch_version: str = ""
    big_endian: bool = False

    def __post_init__(self) -> None:
        # torch looks records up without regard to case.
        self._names = {name.lower(): name for name in self.records.infos}

    def record(self, name: str) -> str | None:
        """The full name of a record below the root, None where there is none."""
        return self._names.get((self.root + name).lower())

    def below(self, folder: str) -> list[str]:
        """The names of the records in a folder, without root and folder."""
        prefix = (self.root + folder).lower()
        return [name[len(prefix) :] for name in self.records.infos if name.lower().startswith(prefix)]


def _root(records: ZipRecords) -> str:
    """The folder of the first record, with its slash: what torch takes for the root."""
    first = next(iter(records.infos), "")
    return first[: first.find("/") + 1]


@dataclass(frozen=True)
class Opened:
    """One program of a package, with all that is known of it."""

    record: dict[str, Any]
    """The JSON as it lies in the file."""
    name: str
    """The record that holds the JSON, with the root."""
    program: Program
    tensors: Tensors
    model: Model


def read(source: Source, records: ZipRecords) -> Checkpoint:
    """The exported programs of a package. Raises InputError for a damaged one and for compiled code alone."""
    package, keys = _open(source, records)
    compiled = package.below(COMPILED)
    package.found += [LoadCall(f"native code {printable(name)}", Danger.OTHER) for name in compiled if "." in name]
    programs = [_read_program(package, key, several=len(keys) > 1) for key in keys]
    judged = [*load_calls.judge(package.calls), *package.found]
    version = f" of torch {package.torch_version}" if package.torch_version else ""
    return Checkpoint(
        path=str(source.path),
        format=f"torch.export package{version} (zip)",
        container=Container.ZIP,
        models=tuple(opened.model for opened in programs),
        notes=tuple(dict.fromkeys(package.notes)),
        list_references=lambda: tuple(package.references),
        graphs={opened.model.key: partial(_graph, opened) for opened in programs},
        load_calls=tuple(sorted(dict.fromkeys(judged), key=lambda call: (-call.danger.value, call.name))),
        loader=LOADER,
        bytes_total=source.size,
        count_bytes_read=lambda: source.bytes_read,
        on_close=source.close,
    )


def _graph(opened: Opened) -> object:
    from normdoctor.readers.export_flow import read_flow

    return read_flow(opened).graph


def open_program(source: Source, records: ZipRecords, key: str | None = None) -> Opened:
    """One program with its graph and the names of its tensors. key: which, where there are several.

    Raises InputError as `read` does, UsageError where the key fits none."""
    package, keys = _open(source, records)
    names = [name for name in keys if name is not None]
    if key is None and len(keys) == 1:
        return _read_program(package, keys[0], several=False)
    if key not in names:
        listed = ", ".join(map(printable, names[:20])) or "one without a name"
        what = "holds several programs" if key is None else f"has no program {printable(key)}"
        raise UsageError(f"{source.path}: {what}", f"Choose with --key one of: {listed}.")
    return _read_program(package, key, several=len(keys) > 1)


def _open(source: Source, records: ZipRecords) -> tuple[_Package, list[str | None]]:
    """The package and the names of its programs; None for the one of torch 2.7 or earlier, which has no name."""
    if records.root is not None:
        raise InputError(
            f"{source.path}: a package of torch.export and a file of torch.save at once",
            "Which of the two counts depends on who loads it, so it was made to mislead; do not load it.",
        )
    old = OLD_PROGRAM in records.infos
    package = _Package(source, records, "" if old else _root(records))
    order = package.record("byteorder")
    package.big_endian = order is not None and records.read(order).strip() == b"big"
    names = [] if old else package.below(MODELS)
    if not old and not names:
        raise InputError(
            f"{source.path}: a model compiled by AOTInductor: machine code, not layers",
            "Inspect the torch.export package, the state_dict or the module that it was compiled from.",
        )
    return package, [None] if old else [name.removesuffix(".json") for name in names]


def _read_program(package: _Package, key: str | None, several: bool) -> Opened:
    return _read_old(package) if key is None else _read_model(package, key, several)


def _read_model(package: _Package, key: str, several: bool) -> Opened:
    """The program models/<key>.json with its tensors."""
    arrays: dict[str, ArrayRef] = {}
    trainable: dict[str, bool] = {}
    for folder, words in ((WEIGHTS, "weights"), (CONSTANTS, "constants")):
        whole_file = package.record(f"{folder}{key}.pt")
        config = package.record(f"{folder}{key}_{words}_config.json")
        if whole_file is not None:  # torch 2.8 and earlier
            _take_state(_unpickle(package, whole_file), arrays, trainable)
        elif config is not None:
            _take_config(package, folder, config, arrays, trainable)
        else:
            package.notes.append(f"the record {folder}{key}_{words}_config.json is missing: its tensors are not read")
    samples = package.record(f"{SAMPLES}{key}.pt")
    if samples is not None:
        _unpickle(package, samples)
    graph = package.record(f"{MODELS}{key}.json") or package.record(MODELS + key) or ""
    return _finish(package, graph, Tensors(arrays, trainable), printable(key) if several else None)


def _read_old(package: _Package) -> Opened:
    """The program of a package of torch 2.7 or earlier."""
    arrays: dict[str, ArrayRef] = {}
    trainable: dict[str, bool] = {}
    for stem in ("serialized_state_dict", "serialized_constants", "serialized_example_inputs"):
        for ending in (".pt", ".json"):  # of torch 2.1, a file of torch.save as well
            record = package.record(stem + ending)
            if record is not None:
                state = _unpickle(package, record)
                if stem != "serialized_example_inputs":
                    _take_state(state, arrays, trainable)
    return _finish(package, OLD_PROGRAM, Tensors(arrays, trainable), None)


def _finish(package: _Package, graph: str, tensors: Tensors, key: str | None) -> Opened:
    """The model of a graph and its tensors."""
    evaluated = Evaluated()
    path = package.source.path
    record = package.json.parse(package.records.read(graph), f"{path}: {graph}", evaluated)
    program = read_program(record)
    package.torch_version = printable(as_text(record.get("torch_version")))
    package.found += judge_program(evaluated, program)
    model, notes = read_layers(program, tensors, key, package.budget)
    if not model.layers:
        why = why_no_norms(tensors.arrays)
        notes += [f"no norm layers: {why}"] if why else []
    package.notes += [f"{key}: {note}" if key else note for note in notes]
    prefix = f"{key}:" if key else ""
    package.references += [Reference(prefix + name, ref) for name, ref in tensors.arrays.items()]
    return Opened(record, graph, program, tensors, with_key(model, key))


# tensors


def _take_config(
    package: _Package, folder: str, config: str, arrays: dict[str, ArrayRef], trainable: dict[str, bool]
) -> None:
    """The tensors that a config names, each a view of the bytes of a record."""
    what = f"{package.source.path}: {config}"
    entries = package.json.parse(package.records.read(config), what).get("config")
    dtypes: dict[str, object] = {}
    left_out = []
    for name, entry in as_dict(entries).items():
        entry = as_dict(entry)
        path, meta = as_text(entry.get("path_name")), as_dict(entry.get("tensor_meta"))
        record = package.record(folder + path)
        package.budget.spend_names(len(name))
        if record is None:
            raise InputError(f"{what} names {printable(path)} for {printable(name)}, and there is none", DAMAGED)
        if entry.get("use_pickle") or path.startswith(("custom_obj_", "opaque_obj_")):
            array = _pickled_tensor(package, record)
        else:
            # torch takes the type of a record from the first tensor in it.
            array = _view(package.records.storage(record), meta, dtypes.setdefault(path, meta.get("dtype")), package)
        if array is None:
            left_out.append(name)
            continue
        arrays[name] = array
        if entry.get("is_param") is True and isinstance(meta.get("requires_grad"), bool):
            trainable[name] = meta["requires_grad"]
    if left_out:
        shown = ", ".join(map(printable, left_out[:3])) + (", ..." if len(left_out) > 3 else "")
        package.notes.append(f"{len(left_out)} objects are no plain tensors and are not read: {shown}")


def _view(storage: Storage, meta: Mapping[str, Any], dtype: object, package: _Package) -> StoredArray | None:
    """The tensor with this description. None for a layout that is not strided, and where the record is empty."""
    name = DTYPES.get(dtype) if isinstance(dtype, int) else None
    shape = [whole(size) for size in as_list(meta.get("sizes"))]
    strides = [whole(stride) for stride in as_list(meta.get("strides"))]
    offset = whole(meta.get("storage_offset"))
    if name is None or meta.get("layout") != STRIDED or (storage.nbytes == 0 and 0 not in shape):
        return None
    if len(shape) > 64 or None in shape or None in strides or offset is None:
        raise InputError(f"a tensor in {storage.name} has no sensible shape", DAMAGED)
    return StoredArray(
        storage=storage,
        dtype=name,
        shape=tuple(size for size in shape if size is not None),
        offset=offset,
        strides=tuple(stride for stride in strides if stride is not None),
        big_endian=package.big_endian,
    )


def _pickled_tensor(package: _Package, record: str) -> ArrayRef | None:
    value, reader = _unpickle(package, record)
    tensor = reader.tensor(value) if reader is not None else None
    return None if tensor is None else tensor.array


def _take_state(
    state: tuple[object, TensorReader | None], arrays: dict[str, ArrayRef], trainable: dict[str, bool]
) -> None:
    """The tensors of a pickled dictionary."""
    value, reader = state
    items = value.items if isinstance(value, Call) else value
    if reader is None or not isinstance(items, dict):
        return
    for name, record in items.items():
        tensor = reader.tensor(record)
        if tensor is not None and isinstance(name, str):
            arrays[name] = tensor.array
            if tensor.requires_grad is not None:
                trainable[name] = tensor.requires_grad


# pickles


def _unpickle(package: _Package, record: str) -> tuple[object, TensorReader | None]:
    """What a record of torch.save or a bare pickle holds, and the reader of its tensors; its calls are noted."""
    storage = package.records.storage(record)
    if storage.nbytes == 0:
        return None, None
    if not isinstance(storage, FileStorage):
        raise InputError(
            f"{package.source.path}: {record} is compressed",
            "torch compresses nothing; unpack the zip and pack it again without compression.",
        )
    part = package.source.part(storage.offset, storage.nbytes, record)
    if not is_zip(part):
        _spend(package, part.size)
        value: object = None
        for pickled in _bare_pickles(part):
            package.calls += pickled[1]
            value = pickled[0] if value is None else value
        return value, None
    inner = ZipRecords(part)
    if inner.root is None:
        raise InputError(f"{part.path}: not a file of torch.save", DAMAGED)
    _spend(package, inner.infos[inner.root + "data.pkl"].file_size)
    if inner.root + "constants.pkl" in inner.infos:
        package.found.append(LoadCall(f"torch.jit.load of {record}", Danger.OTHER))
    content, reader = unpickle_zip(part, inner)
    package.calls += content.calls
    return content.value, reader


def _spend(package: _Package, count: int) -> None:
    package.pickled += count
    if package.pickled > MAX_PICKLES:
        raise InputError(
            f"{package.source.path}: its pickles take more than {MAX_PICKLES:,} bytes",
            "The file was made to exhaust memory; do not load it.",
        )


def _bare_pickles(part: Source) -> Iterator[tuple[object, list[Call]]]:
    """The pickles in a row of which an older file of torch.save is made; a file of pickle.dump has one."""
    stream = part.stream()
    for place in range(LEGACY_PICKLES):
        if place and not stream.peek(1):
            return
        pickled = PickleMachine(stream, f"{part.path}: pickle {place + 1}").run()
        yield pickled.value, pickled.calls
