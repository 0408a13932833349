"""A file of arrays → its arrays by name. The content decides how it is read; nothing in it is executed.

Stored arrays are read sample by sample, through the same bounds-checked door as checkpoints.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from normdoctor.data.rows import Rows, StoredRows
from normdoctor.errors import InputError
from normdoctor.readers import open_checkpoint
from normdoctor.readers.arrays import ITEM_SIZES, FileStorage, Source, Storage, StoredArray
from normdoctor.readers.torch_pickle import MAX_INFLATED, ZipRecords, is_zip

MAX_HEADER = 10_000
"""Bytes in front of the values of a .npy file; numpy's own limit."""

READABLE = "Give .npy, .npz, .pt of tensors, .safetensors, a folder of images or package.module:callable."


@dataclass(frozen=True, eq=False)
class ArrayFile:
    """The arrays of a file, open for reading. The name is empty where there is but one, without a name."""

    path: Path
    arrays: Mapping[str, Rows]
    close: Callable[[], None]


def open_arrays(path: Path) -> ArrayFile:
    """Open it; to be closed. Raises InputError for what holds no arrays."""
    source = Source(path)
    try:
        found = _read(path, source)
    except BaseException:
        source.close()
        raise
    if found is not None:
        return ArrayFile(path, found, source.close)
    source.close()
    return _open_tensors(path)


def is_numpy(source: Source) -> bool:
    """Whether it is a .npy file."""
    return source.size >= 6 and source.read_at(0, 6) == b"\x93NUMPY"


def _read(path: Path, source: Source) -> dict[str, Rows] | None:
    """What numpy has written; None for any other file."""
    if is_numpy(source):
        return {"": _array(path, "", FileStorage("the file", source, 0, source.size))}
    if not is_zip(source):
        return None
    try:
        records = ZipRecords(source)
    except InputError as error:
        raise _unreadable(path, error.message) from None
    members = [name for name in records.infos if name.endswith(".npy")]
    if records.infos and not members:
        return None
    packed = sum(info.file_size for info in records.infos.values() if info.compress_type)
    if packed > MAX_INFLATED:
        raise InputError(
            f"{path}: {packed:,} bytes of compressed arrays",
            "Save it with numpy.savez: then only the samples that are used are read.",
        )
    found: dict[str, Rows] = {}
    for member in members:
        name = member.removesuffix(".npy")
        try:
            storage = records.storage(member)
        except InputError as error:
            raise _unreadable(path, error.message) from None
        found[name] = _array(path, name, storage)
    return found


def _array(path: Path, name: str, storage: Storage) -> StoredRows:
    """The array that a .npy record holds. Raises InputError for a header that lies or is none."""
    what = f"{path}: {name}" if name else str(path)
    try:
        head = io.BytesIO(storage.read(0, min(storage.nbytes, MAX_HEADER + 64)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a header of Python 2
            version = np.lib.format.read_magic(head)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of the format")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = read(head, max_header_size=MAX_HEADER)
    except (ValueError, TypeError, SyntaxError, EOFError, RecursionError, MemoryError, OverflowError) as error:
        raise _unreadable(what, str(error)) from None
    if dtype.name not in ITEM_SIZES:
        kind = "Python objects, which loading would execute" if dtype.hasobject else f"{dtype.name}, no plain numbers"
        shown = " x ".join(map(str, shape)) or "a single value"
        raise _unreadable(f"{path}: {name or 'it'} is {shown} of {kind}", "")
    steps = np.cumprod([1, *(max(length, 1) for length in shape[:-1])]).tolist() if columns_first else None
    start = head.tell()
    values = _Behind(storage, start)
    try:
        big_endian = dtype.byteorder == ">"
        strides = tuple(steps) if steps is not None and shape else None
        return StoredRows(StoredArray(values, dtype.name, tuple(shape), 0, strides, big_endian), what)
    except InputError as error:
        raise _unreadable(what, error.message) from None


@dataclass(frozen=True)
class _Behind:
    """A record without its header."""

    record: Storage
    start: int

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def nbytes(self) -> int:
        return self.record.nbytes - self.start

    @property
    def identity(self) -> tuple[object, int]:
        return (self.record.identity, self.start)

    def read(self, offset: int, count: int) -> bytes:
        if count == self.nbytes:  # as a whole, so that its checksum is looked at
            return self.record.read(0, self.record.nbytes)[self.start :]
        return self.record.read(self.start + offset, count)


def _unreadable(what: Path | str, why: str) -> InputError:
    why = (why.splitlines() or [""])[0].removeprefix(f"{what}: ")[:200]
    return InputError(f"{what}: cannot be read" + (f" ({why})" if why else ""), "Save it with numpy.savez.")


def _open_tensors(path: Path) -> ArrayFile:
    """The tensors of a file that torch or safetensors has written."""
    try:
        checkpoint = open_checkpoint(path)
    except InputError as error:
        why = error.message.removeprefix(f"{path}: ")
        raise InputError(f"{path}: holds no data that normdoctor reads ({why})", READABLE) from None
    try:
        references = checkpoint.list_references()
        named = {reference.name: reference.array for reference in references if reference.name}
        unnamed = [reference.array for reference in references if not reference.name]
        if not named and len(unnamed) > 1:
            raise InputError(
                f"{path}: {len(unnamed)} tensors without names", "Save a dict of them: torch.save({'x': x}, file)."
            )
        if not named and not unnamed:
            raise InputError(f"{path}: holds no tensors", READABLE)
        arrays = named or {"": unnamed[0]}
        rows = {name: StoredRows(array, f"{path}: {name}" if name else str(path)) for name, array in arrays.items()}
        return ArrayFile(path, rows, checkpoint.close)
    except BaseException:
        checkpoint.close()
        raise
