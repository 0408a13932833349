"""New buffer values into a copy of a checkpoint: the payload of the changed tensors and their checksums differ,
nothing else. No pickle is loaded or written.
"""

from __future__ import annotations

import math
import shutil
import struct
import zipfile
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import InputError, RefusedError
from normdoctor.layers import DEFAULT_EPS, ArrayRef, Checkpoint, NormLayer, Reference
from normdoctor.readers.arrays import FLOAT_TYPES, FileStorage, Part, Source, StoredArray, decode, encode
from normdoctor.readers.distributed import ChunkedArray
from normdoctor.readers.live_module import LiveArray
from normdoctor.readers.torch_pickle import LOCAL_HEADER, DeflatedStorage, ZipRecords
from normdoctor.readers.zip_splices import (
    CENTRAL_HEADER,
    CHUNK,
    END_RECORD,
    check_fits,
    copy_bytes,
    directory_entries,
    record_ends,
)
from normdoctor.recalibration.debias import Repair
from normdoctor.writing import replacing

MOST_CHANGE = 0.01
"""By what share rounding a variance to its type may change what the layer multiplies by."""

WIDER = "Save the model in float32 first."


STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Change:
    """New values for one tensor of one layer."""

    layer: NormLayer
    field: str
    values: NDArray[Any]
    for_all_names: bool = False
    """Whether the values are those of the one module that is stored under several names, wherever it is called."""

    @property
    def array(self) -> ArrayRef:
        array = getattr(self.layer, self.field)
        assert array is not None
        return array  # type: ignore[no-any-return]


def changes_of(repairs: Iterable[Repair]) -> list[Change]:
    """The tensors that the repairs change."""
    changes = []
    for repair in repairs:
        changes.append(Change(repair.layer, "running_mean", repair.running_mean))
        changes.append(Change(repair.layer, "running_var", repair.running_var))
        if repair.counter is not None:
            changes.append(Change(repair.layer, "num_batches_tracked", np.array([repair.counter])))
    return changes


@dataclass(frozen=True)
class Patch:
    """New bytes for a part of a storage."""

    storage: FileStorage | DeflatedStorage
    offset: int
    """Within the storage."""
    data: bytes


def write_back(checkpoint: Checkpoint, changes: Sequence[Change], output: Path) -> None:
    """A copy of the checkpoint's file at `output` with the changes in it; whole or not at all.

    Zip, legacy and safetensors containers; a folder is for `folders.write_folder`. Raises RefusedError, before
    anything is written, where a tensor shares its memory with another name, is expanded, or has a type that
    cannot hold its new values."""
    check_unshared(changes, checkpoint.list_references())
    patches = [patch_of(change) for change in changes]
    with replacing(output) as temporary:
        copy_patched(Path(checkpoint.path), temporary, patches)


def copy_patched(source: Path, target: Path, patches: Sequence[Patch]) -> None:
    """A copy of one file that is no folder's, with the patches in it and the checksums of changed zip records."""
    if any(isinstance(patch.storage, DeflatedStorage) for patch in patches):
        _rewrite_zip(source, target, patches)
        return
    shutil.copyfile(source, target)
    with target.open("rb+") as file, Source(source) as original:
        apply(patches, file, original)


def apply(patches: Sequence[Patch], file: BinaryIO, original: Source, begin: int = 0) -> None:
    """Write the patches into a copy of `original` that lies in `file` from `begin`, none of them compressed.

    Records of a zip, which are known by having a checksum, get their new one."""
    for patch in patches:
        assert isinstance(patch.storage, FileStorage)
        file.seek(begin + patch.storage.offset + patch.offset)
        file.write(patch.data)
    names = {patch.storage.name for patch in patches if patch.storage.crc32 is not None}
    if names:
        _mend_checksums(file, original, begin, names)


def check_unshared(changes: Iterable[Change], references: Iterable[Reference]) -> None:
    """Raise RefusedError where a change would show under another name too, or the tensor repeats elements."""
    by_place: dict[Hashable, list[tuple[_Memory, str]]] = {}
    for reference in references:
        if not isinstance(reference.array, (ChunkedArray, StoredArray, LiveArray)):
            continue  # made of an attribute in an ONNX graph: nothing else lies there
        memory = _memory_of(reference.array)
        by_place.setdefault(memory.place, []).append((memory, reference.name or "training state"))
    for change in changes:
        own, memory = f"{change.layer.name}.{change.field}", _memory_of(change.array)
        aliases = change.layer.aliases
        if aliases and not change.for_all_names:
            raise RefusedError(
                f"{change.layer.name}: the same layer is stored as {', '.join(aliases)} as well",
                "A shared layer sees several distributions; give each place its own layer first.",
            )
        if not memory.is_contiguous:
            raise RefusedError(
                f"{own}: its elements are expanded or strided, so one value cannot be changed alone",
                "Save the model again with contiguous tensors (tensor.clone()).",
            )
        overlapping = [
            name
            for other, name in by_place.get(memory.place, ())
            if other.begin < memory.end and memory.begin < other.end
        ]
        own_names = {f"{name}.{change.field}".removeprefix(".") for name in (change.layer.name, *aliases)}
        others = set(overlapping) - own_names
        if others or (len(overlapping) > 1 and not aliases):
            raise RefusedError(
                f"{own}: shares its memory with {', '.join(sorted(others) or overlapping)}",
                "Save the model again with tensors of their own (tensor.clone()).",
            )


class _Memory(NamedTuple):
    """Where a tensor lies: in what, its first byte and the byte behind its last."""

    place: Hashable
    begin: int
    end: int
    is_contiguous: bool


def _memory_of(array: ArrayRef) -> _Memory:
    place: Hashable
    if isinstance(array, ChunkedArray):  # whether chunks overlap is for who knows their files
        return _Memory(array.identity, 0, array.nbytes, is_contiguous=True)
    if isinstance(array, StoredArray):
        place, begin, strides = array.storage.identity, array.offset * array.item_size, array.element_strides
        item_size, is_contiguous = array.item_size, array.is_contiguous
    else:
        assert isinstance(array, LiveArray)
        tensor = array.tensor
        place, begin, strides = str(tensor.device), int(tensor.data_ptr()), tuple(tensor.stride())
        item_size, is_contiguous = int(tensor.element_size()), bool(tensor.is_contiguous())
    reach = sum((length - 1) * step for length, step in zip(array.shape, strides, strict=True))
    return _Memory(place, begin, begin + (reach + 1) * item_size if array.nbytes else begin, is_contiguous)


def encode_checked(change: Change) -> bytes:
    """The new values in the tensor's own type. What is stored now plays no part: it may be NaN.

    Raises RefusedError for a value that is NaN or infinite, that the type cannot hold, and for a variance that is so
    small for the type that the layer would multiply by something else: by over 1 % more or less. A variance that
    becomes 0 in float16 is no such thing as long as eps is far larger, as it is in dead channels of most models."""
    array, name = change.array, f"{change.layer.name}.{change.field}"
    values = np.asarray(change.values)
    if values.size != math.prod(array.shape):
        raise RefusedError(f"{name}: {values.size} new values for the shape {list(array.shape)}")
    if not np.isfinite(values).all():
        raise RefusedError(
            f"{name}: its new values hold NaN or infinity", "Leave the layer out, or look at the data it was fed."
        )
    big_endian = isinstance(array, StoredArray) and array.big_endian
    try:
        data = encode(values, array.dtype, big_endian)
    except InputError as error:
        raise RefusedError(f"{name}: {error.message}", error.hint) from None
    stored = decode(data, array.dtype, big_endian)
    if not (np.isfinite(stored) if array.dtype in FLOAT_TYPES else stored == values.reshape(-1)).all():
        raise RefusedError(f"{name}: {array.dtype} cannot hold {np.abs(values).max():.3g}", WIDER)
    if change.field == "running_var":
        eps = DEFAULT_EPS if change.layer.eps is None else change.layer.eps
        lost = _change_of_scale(values.reshape(-1), stored, eps) > MOST_CHANGE
        if lost.any():
            smallest = values.reshape(-1)[lost].min()
            raise RefusedError(
                f"{name}: {array.dtype} cannot hold {smallest:.3g} well enough for an eps of {eps:g}", WIDER
            )
    return data


def _change_of_scale(var: NDArray[Any], stored: NDArray[Any], eps: float) -> NDArray[np.float64]:
    """By what share 1 / sqrt(var + eps) changes where a variance is rounded to what is stored; 0 for one below 0."""
    wanted, kept = np.maximum(var, 0.0) + eps, np.maximum(stored.astype(np.float64), 0.0) + eps
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(wanted == kept, 0.0, np.abs(np.sqrt(wanted / kept) - 1.0))


def patch_of(change: Change) -> Patch:
    """Where the bytes of a tensor that lies in one piece go. Raises RefusedError where they cannot be changed there."""
    array = change.array
    assert isinstance(array, StoredArray)
    storage = array.storage
    assert isinstance(storage, (FileStorage, DeflatedStorage))
    if isinstance(storage, FileStorage) and isinstance(storage.source, Part):
        raise RefusedError(
            f"{change.layer.name}.{change.field} lies in an archive inside the file, which has checksums of its own",
            "Load the model with the torch of today and save it again, then repair that file.",
        )
    return Patch(storage, array.offset * array.item_size, encode_checked(change))


# zip


def _mend_checksums(file: BinaryIO, original: Source, base: int, names: set[str]) -> None:
    """Give the changed records their new CRC-32 in the local header (or data descriptor) and the directory."""
    records = ZipRecords(original)
    checksums = {}
    for name in names:
        info = records.infos[name]
        begin = base + records.data_offset(info)
        checksum = _checksum(file, begin, info.file_size)
        checksums[name] = checksum
        raw = struct.pack("<I", checksum)
        if info.flag_bits & 0x08:
            _mend_descriptor(file, begin + info.compress_size, info.CRC, raw)
        else:
            file.seek(base + info.header_offset + 14)
            file.write(raw)
    for entry, name in directory_entries(original.stream()):
        if name in checksums:
            file.seek(base + entry + 16)
            file.write(struct.pack("<I", checksums[name]))


def _checksum(file: BinaryIO, begin: int, count: int) -> int:
    checksum = 0
    file.seek(begin)
    while count:
        part = file.read(min(count, CHUNK))
        checksum = zlib.crc32(part, checksum)
        count -= len(part)
    return checksum


def _mend_descriptor(file: BinaryIO, place: int, old: int, new: bytes) -> None:
    """A record written as a stream has its checksum behind its data, after an optional signature."""
    file.seek(place)
    head = file.read(8)
    for offset in (4, 0) if head[:4] == b"PK\x07\x08" else (0,):
        if head[offset : offset + 4] == struct.pack("<I", old):
            file.seek(place + offset)
            file.write(new)
            return
    raise RefusedError("a zip record has no readable data descriptor", "Save the model again with torch.save.")


def _rewrite_zip(source: Path, target: Path, patches: Sequence[Patch]) -> None:
    """Write the container anew: changed records deflated again, all others copied as they stand."""
    changed: dict[str, list[Patch]] = {}
    for patch in patches:
        changed.setdefault(patch.storage.name, []).append(patch)
    with Source(source) as original, target.open("wb") as file:
        records = ZipRecords(original)
        infos = list(records.infos.values())
        check_fits(source, original.size, len(infos))
        places, sizes = {}, {}
        ends = record_ends(original, infos)
        for info in sorted(infos, key=lambda info: info.header_offset):
            places[info.filename] = file.tell()
            if info.filename in changed:
                sizes[info.filename] = _write_record(file, records, info, changed[info.filename])
            else:
                copy_bytes(original, file, info.header_offset, ends[info.filename])
        _write_directory(file, original, places, sizes)


def _write_record(
    file: BinaryIO, records: ZipRecords, info: zipfile.ZipInfo, patches: Sequence[Patch]
) -> tuple[int, int, int]:
    """One changed record with a header of its own. Gives its checksum, packed size and size."""
    content = bytearray(records.read(info.filename))
    for patch in patches:
        content[patch.offset : patch.offset + len(patch.data)] = patch.data
    checksum = zlib.crc32(content)
    packed = bytes(content)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        machine = zlib.compressobj(wbits=-15)
        packed = machine.compress(packed) + machine.flush()
    source = records.source
    old = LOCAL_HEADER.unpack(source.read_at(info.header_offset, LOCAL_HEADER.size))
    name = source.read_at(info.header_offset + LOCAL_HEADER.size, old[-2])
    header = LOCAL_HEADER.pack(
        old[0], old[1], old[2] & ~0x08, *old[3:6], checksum, len(packed), len(content), len(name), 0
    )
    file.write(header + name + packed)
    return checksum, len(packed), len(content)


def _write_directory(
    file: BinaryIO, source: Source, places: Mapping[str, int], sizes: Mapping[str, tuple[int, int, int]]
) -> None:
    stream = source.stream()
    entries = directory_entries(stream)
    begin = file.tell()
    for place, name in entries:
        header = list(CENTRAL_HEADER.unpack(source.read_at(place, CENTRAL_HEADER.size)))
        tail = source.read_at(place + CENTRAL_HEADER.size, sum(header[10:13]))
        if name in sizes:
            header[3] &= ~0x08
            header[7:10] = sizes[name]
        header[16] = places[name]
        file.write(CENTRAL_HEADER.pack(*header) + tail)
    size = file.tell() - begin
    count = len(entries)
    file.write(END_RECORD.pack(b"PK\x05\x06", 0, 0, count, count, size, begin, 0))
