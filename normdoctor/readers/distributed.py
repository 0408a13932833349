"""Folders of torch.distributed.checkpoint: .metadata, and the parts that each rank wrote (*.distcp).

.metadata is a pickle: the tensors by name with element type, size and chunks, and for each chunk the file, offset
and length of a small torch.save archive. Nested state_dicts are flattened by joining their keys with dots;
planner_data keeps the keys apart. https://pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import zipfile
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import InputError
from normdoctor.layers import Checkpoint, Container
from normdoctor.readers import load_calls
from normdoctor.readers.arrays import ITEM_SIZES, MAX_ELEMENTS, Source, StoredArray, path_inside
from normdoctor.readers.finishing import Budget
from normdoctor.readers.pickle_machine import PickleMachine
from normdoctor.readers.pickle_records import Call, Global, OpaqueKey, Pickled
from normdoctor.readers.torch_contents import CONTAINERS, TRAINING_STATE, describe, find_models
from normdoctor.readers.torch_pickle import ZipRecords, is_zip, unpickle_zip
from normdoctor.readers.torch_tensors import StorageKey, Tensor, TensorReader, sizes_in

METADATA = ".metadata"
PART_SUFFIX = ".distcp"
CLASSES = "torch.distributed.checkpoint.metadata"

FORMAT_CLASSES = frozenset(
    {
        *(
            f"{CLASSES}.{name}"
            for name in (
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
    }
)
"""What .metadata itself consists of; the path is that of the folder when it was written."""

MAX_METADATA_OPCODES = 10_000_000
"""A chunk takes about 90: 300 tensors with Adam's state over 64 ranks take 5 million."""
MAX_SLICES = 10_000
"""Chunks of norm layers, each a file of its own: a few seconds of work. 64 ranks with 150 norms come close."""
MAX_OBJECTS = 2000
"""Values that are no tensors, whose pickles are looked through for calls."""
MAX_PICKLE = 1 << 12
"""The pickle of one tensor has 300 bytes."""
MAX_OBJECT_BYTES = 4 << 20
"""What the pickles of all other values may come to."""
MAX_FRAME = 1 << 16
"""A slice is larger than its data by about 1,300 bytes."""


def is_metadata(source: Source) -> bool:
    """Whether the file begins like the pickle of a distributed checkpoint's Metadata."""
    head = source.read_at(0, min(source.size, 256))
    return head[:1] == b"\x80" and CLASSES.encode() in head


def read(source: Source) -> Checkpoint:
    """The checkpoint whose .metadata is given.

    Raises InputError for damaged metadata. Damaged parts are met when a tensor's values are asked for."""
    pickled = PickleMachine(source.stream(), f"{source.path}: the metadata", MAX_METADATA_OPCODES).run()
    parts = _Parts(source, pickled)
    nested = _nested(parts)
    contents = find_models(nested, TensorReader(_no_storage, big_endian=False))
    called, unseen = _calls_of_objects(parts)
    notes = list(contents.notes)
    if unseen:
        notes.append(f"values beside the tensors that could not be looked through for calls on load: {unseen:,}")
    own = [call for call in pickled.calls if not _is_of_format(call)]
    return Checkpoint(
        path=str(source.path),
        format=f"PyTorch distributed {describe(nested, contents.models)} (DCP folder)",
        container=Container.FOLDER,
        models=tuple(contents.models),
        notes=tuple(notes),
        list_references=lambda: tuple(contents.references),
        load_calls=load_calls.judge([*own, *called]),
        loader="torch.distributed.checkpoint.load",
        bytes_total=source.size + parts.total_size(),
        count_bytes_read=lambda: source.bytes_read + parts.bytes_read,
        on_close=source.close,
    )


@dataclass(frozen=True)
class Place:
    """Where the bytes of one chunk or object lie."""

    file: Path
    offset: int
    length: int
    transformed: bool


class _Parts:
    """The metadata's tables, checked as they are used, and the slices they lead to."""

    def __init__(self, source: Source, pickled: Pickled) -> None:
        self.path = source.path
        self.bytes_read = 0
        self._left = MAX_SLICES
        metadata = self.fields(pickled.value, "Metadata")
        self.entries = self._table(metadata, "state_dict_metadata")
        planned = metadata.get("planner_data")
        self.keys: Mapping[Any, Any] = planned if isinstance(planned, dict) else {}
        self._places = self._places_in(self._table(metadata, "storage_data"), pickled)
        self.placed = frozenset(name for name, _ in self._places)

    def _table(self, metadata: Mapping[Any, Any], name: str) -> dict[Any, Any]:
        table = metadata.get(name)
        if not isinstance(table, dict):
            raise self.damaged(f"it has no {name}")
        return table

    def _places_in(self, table: dict[Any, Any], pickled: Pickled) -> dict[tuple[str, tuple[int, ...] | None], Place]:
        """Name and offset of a chunk (None for an object) → its place. The keys are objects, kept by identity."""
        indices = {id(call): call for call in pickled.calls}
        files: dict[str, Path] = {}
        places = {}
        for key, record in table.items():
            call = indices.get(key.identity) if isinstance(key, OpaqueKey) else None
            index, info = self.fields(call, "MetadataIndex"), self.fields(record, "_StorageInfo")
            name, offset, length = index.get("fqn"), _size(info.get("offset")), _size(info.get("length"))
            start = None if index.get("offset") is None else sizes_in(index["offset"])
            if not isinstance(name, str) or offset is None or length is None:
                raise self.damaged("the place of a tensor is malformed")
            relative = info.get("relative_path")
            if not isinstance(relative, str) or relative not in files:
                files[str(relative)] = path_inside(self.path.parent, relative)
            transformed = bool(info.get("transform_descriptors"))
            places[name, start] = Place(files[str(relative)], offset, length, transformed)
        return places

    def fields(self, record: object, name: str) -> Mapping[Any, Any]:
        """The attributes of a record of this class."""
        if isinstance(record, Call) and isinstance(record.function, Global) and isinstance(record.state, dict):
            module = record.function.module
            if record.function.name == name and module.startswith("torch.distributed."):
                return record.state
        raise self.damaged(f"a {name} is malformed")

    def damaged(self, how: str) -> InputError:
        return InputError(f"{self.path}: the metadata is damaged: {how}", "Copy the folder or save the model again.")

    def total_size(self) -> int:
        total = 0
        for file in {place.file for place in self._places.values()}:
            with suppress(OSError, ValueError):
                total += file.stat().st_size
        return total

    def place(self, name: str, start: tuple[int, ...] | None) -> Place:
        """Where a chunk or an object lies. Raises InputError where the metadata does not say."""
        found = self._places.get((name, start))
        if found is None:
            raise self.damaged(f"it does not say where a part of {name} lies")
        return found

    @contextmanager
    def archive(self, name: str, place: Place) -> Iterator[tuple[Source, ZipRecords]]:
        """The torch.save archive at `place`, for as long as its file is open."""
        if place.transformed:
            raise InputError(
                f"{place.file}: {name} is compressed or encrypted by an extension",
                "Load the checkpoint and save it without extensions.",
            )
        with Source(place.file) as source:
            try:
                part = source.part(place.offset, place.length, name)
                records = ZipRecords(part) if is_zip(part) else None
                # Compressed records would make a small file expensive, and torch compresses none.
                stored = records and all(r.compress_type == zipfile.ZIP_STORED for r in records.infos.values())
                if records is None or records.root is None or not stored:
                    raise InputError(f"{part.path}: not a tensor as torch.save writes it", "The file is damaged.")
                yield part, records
            finally:
                self.bytes_read += source.bytes_read

    @contextmanager
    def chunk(self, name: str, start: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> Iterator[StoredArray]:
        """One chunk, for as long as its file is open. Raises InputError where its slice holds anything else."""
        self._left -= 1
        if self._left < 0:
            raise InputError(
                f"{self.path}: its norm layers lie in more than {MAX_SLICES:,} chunks",
                "Convert it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt",
            )
        place = self.place(name, start)
        expected = int(np.prod(shape, dtype=object)) * ITEM_SIZES[dtype]
        if expected <= place.length <= expected + MAX_FRAME:
            with self.archive(name, place) as (part, records):
                if records.infos[f"{records.root}data.pkl"].file_size <= MAX_PICKLE:
                    pickled, reader = unpickle_zip(part, records)
                    tensor = reader.tensor(pickled.value)
                    if tensor is not None and (tensor.array.shape, tensor.array.dtype) == (shape, dtype):
                        assert isinstance(tensor.array, StoredArray)
                        yield tensor.array
                        return
        raise InputError(
            f"{place.file}: what lies at {place.offset:,} is not the chunk of {name} that the metadata describes",
            "The checkpoint is damaged, or parts of two checkpoints were mixed; copy it again.",
        )

    @cached_property
    def overlapping(self) -> frozenset[Place]:
        """Places that share bytes of their file with another one's."""
        found = set()
        widest: Place | None = None
        for place in sorted(self._places.values(), key=lambda place: (str(place.file), place.offset)):
            if widest is not None and place.file == widest.file and place.offset < widest.offset + widest.length:
                found |= {place, widest}
                reach = widest.offset + widest.length
                widest = place if place.offset + place.length > reach else widest
            else:
                widest = place
        return frozenset(found)


@dataclass(frozen=True)
class Slice:
    """One chunk of a tensor, for as long as its file is open."""

    region: tuple[slice, ...]
    """Of the whole tensor."""
    place: Place
    array: StoredArray
    """Its storage is a record of the archive at `place`."""


@dataclass(frozen=True, eq=False)
class ChunkedArray:
    """A tensor that one or several ranks wrote in chunks, joined when its values are asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: object = field(repr=False)
    parts: _Parts = field(repr=False)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * ITEM_SIZES[self.dtype]

    @property
    def identity(self) -> Hashable:
        return (id(self.parts), self.name)

    def numpy(self) -> NDArray[Any]:
        return self._values

    @cached_property
    def _values(self) -> NDArray[Any]:
        size = int(np.prod(self.shape, dtype=object))
        if size > MAX_ELEMENTS:
            raise InputError(f"{self.name} has {size:,} elements: not a norm's", "The metadata is damaged.")
        values: NDArray[Any] | None = None
        filled = np.zeros(self.shape, dtype=bool)
        for part in self.slices():
            if filled[part.region].any():
                raise self.parts.damaged(f"two chunks of {self.name} overlap")
            chunk = part.array.numpy()
            values = np.zeros(self.shape, dtype=chunk.dtype) if values is None else values
            values[part.region], filled[part.region] = chunk, True
        if not filled.all():
            raise self.parts.damaged(f"the chunks of {self.name} do not cover it")
        return np.zeros(self.shape, dtype=np.float32) if values is None else values

    def slices(self) -> Iterator[Slice]:
        """The chunks as they are stored. The file of each is open until the next one is asked for."""
        for start, shape in self._places():
            if 0 in shape:  # a rank that had nothing of it
                continue
            region = tuple(slice(begin, begin + length) for begin, length in zip(start, shape, strict=True))
            with self.parts.chunk(self.name, start, shape, self.dtype) as array:
                yield Slice(region, self.parts.place(self.name, start), array)

    def _places(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Where each chunk begins in the tensor, and its shape. One that several ranks wrote counts once."""
        seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        for record in self.chunks if isinstance(self.chunks, list) else ():
            chunk = self.parts.fields(record, "ChunkStorageMetadata")
            start, shape = sizes_in(chunk.get("offsets")), sizes_in(chunk.get("sizes"))
            if start is None or shape is None or not len(start) == len(shape) == len(self.shape):
                raise self.parts.damaged(f"a chunk of {self.name} is malformed")
            ends = [begin + length for begin, length in zip(start, shape, strict=True)]
            if min((0, *start, *shape)) < 0 or any(e > n for e, n in zip(ends, self.shape, strict=True)):
                raise self.parts.damaged(f"a chunk of {self.name} does not lie in it")
            if (start, shape) not in seen:
                seen.add((start, shape))
                yield start, shape


def _nested(parts: _Parts) -> dict[str, Any]:
    """The state_dict that was saved, with tensors where it had tensors, and nothing where it had anything else."""
    root: dict[str, Any] = {}
    budget = Budget()
    known = [name for name in parts.keys if name in parts.entries]
    for name in dict.fromkeys([*known, *parts.entries]):  # the parts are in the order of ranks
        tensor = _tensor(parts, name)
        if tensor is None:
            continue
        path = _path(name, parts.keys.get(name))
        budget.spend_names(len(name), 4 * len(path))
        level = root
        for key in path[:-1]:
            level = level.setdefault(key, {})
            if not isinstance(level, dict):
                raise parts.damaged(f"{name} lies inside of another tensor")
        if path[-1] in level:
            raise parts.damaged(f"two tensors are stored as {name}")
        level[path[-1]] = Tensor(tensor)
    return root


def _tensor(parts: _Parts, name: object) -> ChunkedArray | None:
    """The tensor of this name; None for what is none, or has an element type of no interest here."""
    entry = parts.entries[name]
    if isinstance(entry, Call) and isinstance(entry.function, Global):
        if entry.function.full_name == f"{CLASSES}.BytesStorageMetadata":
            return None
        attributes = parts.fields(entry, "TensorStorageMetadata")
        shape = sizes_in(attributes.get("size"))
        properties = attributes.get("properties")
        state = properties.state if isinstance(properties, Call) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if isinstance(name, str) and shape is not None and min((0, *shape)) >= 0 and isinstance(dtype, Global):
            if dtype.name not in ITEM_SIZES:
                return None
            if 0 not in shape and name not in parts.placed:  # one entry may go by any number of names
                raise parts.damaged(f"it does not say where {name} lies")
            return ChunkedArray(name, dtype.name, shape, attributes.get("chunks"), parts)
    raise parts.damaged(f"the entry of {str(name)[:200]} is malformed")


def _path(name: str, keys: object) -> tuple[str, ...]:
    """The keys that lead to a tensor. Where they are not stored, leading parts of the name that can only be keys."""
    if isinstance(keys, (tuple, list)) and 0 < len(keys) < 16:
        words = tuple(str(key) for key in keys if isinstance(key, str) or (type(key) is int and 0 <= key < 2**31))
        if len(words) == len(keys) and ".".join(words) == name:
            return words
    head, _, rest = name.partition(".")
    if rest and (CONTAINERS.match(head) or TRAINING_STATE.search(head)):
        return (head, rest)
    return (name,)


def _calls_of_objects(parts: _Parts) -> tuple[list[Call], int]:
    """What loading the values that are no tensors would call, and how many of them could not be looked through."""
    calls: list[Call] = []
    left, unseen = MAX_OBJECT_BYTES, 0
    names = [
        name
        for name, entry in parts.entries.items()
        if isinstance(name, str)
        and isinstance(entry, Call)
        and isinstance(entry.function, Global)
        and entry.function.name == "BytesStorageMetadata"
    ]
    for count, name in enumerate(names):
        if count >= MAX_OBJECTS or left < 0:
            return calls, unseen + len(names) - count
        try:
            with parts.archive(name, parts.place(name, None)) as (part, records):
                left -= records.infos[f"{records.root}data.pkl"].file_size
                if left < 0:
                    unseen += 1
                    continue
                calls += unpickle_zip(part, records)[0].calls
        except InputError:
            unseen += 1
    return calls, unseen


def _is_of_format(call: Call) -> bool:
    return isinstance(call.function, Global) and call.function.full_name in FORMAT_CLASSES


def _size(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _no_storage(key: StorageKey) -> NoReturn:
    raise InputError("the metadata holds a tensor of its own", "The file is damaged or was made to mislead.")
