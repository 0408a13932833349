"""Bytes in files and the arrays seen in them: everything is bounds-checked, nothing is read before it is asked for."""

from __future__ import annotations

import io
import math
import re
import stat
import zlib
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import InputError

ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element of the element types that checkpoints hold, by torch's names."""

FLOAT_TYPES = frozenset(name for name in ITEM_SIZES if name.startswith(("float", "bfloat")))

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How an address begins, also one of whose two slashes a Path has kept one. A drive is a single letter."""

MAX_SPAN = 16 << 20
"""A strided view over more bytes than this is gathered element by element instead of read whole."""

MAX_GATHERED = 1 << 16

MAX_ELEMENTS = 1 << 24
"""No norm layer has more channels; a file that claims so is asking for our memory."""


class Source:
    """A file open for reading that counts the bytes it gives.

    Reads instead of a memory map: a file cut short while we look at it then raises instead of killing the
    process, and only what was asked for counts as memory."""

    def __init__(self, path: Path) -> None:
        try:
            kind = path.stat().st_mode
            if stat.S_ISDIR(kind):
                raise InputError(f"{path}: is a folder", "Name the checkpoint file inside it.")
            if stat.S_ISFIFO(kind):  # would wait for its writer, and cannot be read twice
                raise InputError(f"{path}: is a pipe", "Save it to a file first.")
            self._file = path.open("rb", buffering=0)
            self.size = self._file.seek(0, io.SEEK_END)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise unreadable(path, error) from None
        self.path = path
        self.bytes_read = 0

    def read_at(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes from `offset`; InputError where the file ends before."""
        self._check_within(offset, count)
        parts = []
        try:
            self._file.seek(offset)
            while count:
                part = self._file.read(count)
                if not part:
                    raise InputError(f"{self.path}: the file became shorter while it was read", "Try again.")
                self.bytes_read += len(part)
                count -= len(part)
                parts.append(part)
        except OSError as error:
            raise unreadable(self.path, error) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_within(self, offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise InputError(
                f"{self.path}: bytes {offset:,} to {offset + count:,} lie beyond the end ({self.size:,} bytes)",
                "The file is truncated or damaged; copy or download it again.",
            )

    def part(self, offset: int, size: int, name: str) -> Source:
        """`size` bytes from `offset` as a file of its own: an archive that lies in another one."""
        return Part(self, offset, size, name)

    def stream(self, offset: int = 0, size: int | None = None) -> io.BufferedReader:
        """A buffered, seekable view of `size` bytes from `offset` (to the end of the file when None)."""
        return io.BufferedReader(_Window(self, offset, self.size - offset if size is None else size))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Part(Source):
    """A run of bytes of another source, read like a file. Closing it leaves the other open."""

    def __init__(self, whole: Source, offset: int, size: int, name: str) -> None:
        if min(offset, size) < 0 or offset + size > whole.size:
            raise InputError(
                f"{whole.path}: {name} lies beyond the end of the file",
                "The file is truncated or damaged; copy or download it again.",
            )
        self._whole, self._offset = whole, offset
        self.size = size
        self.path = whole.path / name
        self.bytes_read = 0

    def read_at(self, offset: int, count: int) -> bytes:
        self._check_within(offset, count)
        return self._whole.read_at(self._offset + offset, count)

    def close(self) -> None:
        pass


def path_inside(folder: Path, name: object) -> Path:
    """The file that a checkpoint names as lying in `folder`. A link there may lead anywhere, as those of
    huggingface_hub's cache do. Raises InputError for a name that leaves the folder."""
    named = name if isinstance(name, str) else ""
    for kind in (PurePosixPath, PureWindowsPath):
        pure = kind(named)
        if not pure.parts or pure.anchor or ".." in pure.parts:
            raise InputError(
                f"{folder}: the checkpoint names the file {str(name)[:200]!r}, which does not lie in its folder",
                "The checkpoint is damaged or was made to mislead; do not load it.",
            )
    return folder / PurePosixPath(named)


def unreadable(path: Path, error: OSError | ValueError) -> InputError:
    """The InputError for what opening or reading `path` raised, with a hint that fits its kind."""
    if isinstance(error, FileNotFoundError):
        if URL.match(str(path)):
            return InputError(f"{path}: URLs are not read", "Download the file first, then give its path.")
        return InputError(f"{path}: no such file", "Check the path.")
    if isinstance(error, PermissionError):
        return InputError(f"{path}: no permission to read", "Check the file's owner and mode.")
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path}: cannot be read ({reason})", "Check the path and the disk.")


class _Window(io.RawIOBase):
    def __init__(self, source: Source, start: int, size: int) -> None:
        self._source, self._start, self._size, self._at = source, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            buffer[:count] = self._source.read_at(self._start + self._at, count)
            self._at += count
        return count


class Storage(Protocol):
    """A run of bytes that tensors are views of."""

    @property
    def name(self) -> str:
        """What the file calls it."""

    @property
    def nbytes(self) -> int: ...

    @property
    def identity(self) -> Hashable: ...

    def read(self, offset: int, count: int) -> bytes: ...


@dataclass(frozen=True)
class FileStorage:
    """`nbytes` bytes of a file from `offset`. A whole reading is checked against `crc32` where there is one."""

    name: str
    source: Source
    offset: int
    nbytes: int
    crc32: int | None = None

    @property
    def identity(self) -> Hashable:
        return (id(self.source), self.offset)

    def read(self, offset: int, count: int) -> bytes:
        data = self.source.read_at(self.offset + offset, count)
        if self.crc32 is not None and count == self.nbytes and zlib.crc32(data) != self.crc32:
            raise InputError(
                f"{self.source.path}: record {self.name} does not match its checksum",
                "The file is damaged; copy or download it again.",
            )
        return data


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A strided view of a storage. offset and strides count elements, as torch's do."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None
    """None means contiguous."""
    big_endian: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZES:
            raise InputError(
                f"a tensor in {self.storage.name} has the unknown element type {self.dtype}",
                "Convert the model to float32 first.",
            )
        strides = self.element_strides
        if len(strides) != len(self.shape) or min((0, self.offset, *self.shape, *strides)) < 0:
            raise self._beyond()
        if self.size and (self.offset + self._reach + 1) * self.item_size > self.storage.nbytes:
            raise self._beyond()

    def _beyond(self) -> InputError:
        return InputError(
            f"a tensor of shape {list(self.shape)} does not fit its storage {self.storage.name} "
            f"({self.storage.nbytes:,} bytes)",
            "The file is damaged or was made to mislead; do not load it.",
        )

    @property
    def item_size(self) -> int:
        return ITEM_SIZES[self.dtype]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.item_size

    @cached_property
    def element_strides(self) -> tuple[int, ...]:
        if self.strides is not None:
            return self.strides
        strides, step = [], 1
        for length in reversed(self.shape):
            strides.append(step)
            step *= max(length, 1)
        return tuple(reversed(strides))

    @property
    def _reach(self) -> int:
        """Distance in elements between the first element and the last."""
        return sum((length - 1) * stride for length, stride in zip(self.shape, self.element_strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Every element once, in order, without gaps: what can be overwritten in place."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.element_strides), strict=True):
            if length != 1 and stride != expected:
                return False
            expected *= length
        return True

    @property
    def identity(self) -> Hashable:
        return (self.storage.identity, self.dtype, self.offset, self.shape, self.element_strides)

    def numpy(self) -> NDArray[Any]:
        return self._values

    @cached_property
    def _values(self) -> NDArray[Any]:
        if self.size > MAX_ELEMENTS:
            raise InputError(
                f"a tensor in {self.storage.name} has {self.size:,} elements: not a norm's",
                "The file is damaged or was made to mislead; do not load it.",
            )
        return self.load()

    @property
    def has_rows(self) -> bool:
        """Whether each row lies behind the one before it."""
        if len(self.shape) == 0 or not self.size:
            return False
        row = self._reach - (self.shape[0] - 1) * self.element_strides[0] + 1
        return self.shape[0] == 1 or row <= self.element_strides[0]

    def load_rows(self, start: int, stop: int) -> NDArray[Any]:
        """As `load`, of a part of the first axis."""
        offset = self.offset + start * self.element_strides[0]
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=offset, strides=self.element_strides).load()

    def load(self) -> NDArray[Any]:
        """The values of a tensor of any size, not kept. Repeated elements are bounded: no file holds those."""
        if not self.size:
            return np.zeros(self.shape, dtype=np.float32)
        if self.is_contiguous:
            raw = self.storage.read(self.offset * self.item_size, self.nbytes)
            return decode(raw, self.dtype, self.big_endian).reshape(self.shape)
        span = (self._reach + 1) * self.item_size
        if span <= max(MAX_SPAN, 2 * self.nbytes):
            raw = self.storage.read(self.offset * self.item_size, span)
            flat = decode(raw, self.dtype, self.big_endian)
            steps = tuple(stride * flat.itemsize for stride in self.element_strides)
            return np.lib.stride_tricks.as_strided(flat, self.shape, steps).copy()
        if self.size > MAX_GATHERED:
            raise InputError(
                f"a tensor in {self.storage.name} has {self.size:,} elements scattered over {span:,} bytes",
                "Save the model again with contiguous tensors (tensor.clone()).",
            )
        places = sum(
            np.arange(length).reshape((-1,) + (1,) * (len(self.shape) - 1 - axis)) * stride
            for axis, (length, stride) in enumerate(zip(self.shape, self.element_strides, strict=True))
        )
        size = self.item_size
        raw = b"".join(self.storage.read((self.offset + int(place)) * size, size) for place in np.ravel(places))
        return decode(raw, self.dtype, self.big_endian).reshape(self.shape)


def decode(raw: bytes, dtype: str, big_endian: bool = False) -> NDArray[Any]:
    """Bytes as a flat array; bfloat16 and float8 become float32, which holds each of their values exactly."""
    order: Literal["<", ">"] = ">" if big_endian else "<"
    if dtype == "bfloat16":
        bits = np.frombuffer(raw, dtype=order + "u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if dtype == "float8_e5m2":  # the upper byte of a float16
        return (np.frombuffer(raw, dtype=np.uint8).astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype.startswith("float8"):
        return _FLOAT8[dtype]()[np.frombuffer(raw, dtype=np.uint8)]
    if dtype == "complex32":
        pairs = np.frombuffer(raw, dtype=order + "f2").astype(np.float32)
        return pairs.view(np.complex64)
    return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder(order))


def encode(values: NDArray[Any], dtype: str, big_endian: bool = False) -> bytes:
    """The inverse of `decode` for the types that buffers are stored in, rounding to nearest even.

    Raises InputError for a type nothing is written in (float8, complex)."""
    order: Literal["<", ">"] = ">" if big_endian else "<"
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype(order + "u2").tobytes()
    if dtype not in {"float16", "float32", "float64", "int16", "int32", "int64"}:
        raise InputError(f"buffers of type {dtype} cannot be written", "Convert the model to float32 first.")
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.dtype(dtype).newbyteorder(order)).tobytes()


def _small_float_table(mantissa_bits: int, bias: int, nan_codes: tuple[int, ...]) -> NDArray[np.float32]:
    """All 256 values of an 8-bit float with one sign bit and no infinities."""
    codes = np.arange(256)
    exponent = (codes & 0x7F) >> mantissa_bits
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1.0 + mantissa, exponent - bias))
    table = np.where(codes & 0x80, -magnitude, magnitude)
    table[list(nan_codes)] = np.nan
    return table.astype(np.float32)


def _power_table() -> NDArray[np.float32]:
    table = np.ldexp(1.0, np.arange(256) - 127)
    table[255] = np.nan
    return table.astype(np.float32)


# Built when first met. Layouts: OCP 8-bit floating point specification 1.0; fnuz: https://arxiv.org/abs/2206.02915
_FLOAT8 = {
    "float8_e4m3fn": lambda: _small_float_table(3, 7, (0x7F, 0xFF)),
    "float8_e4m3fnuz": lambda: _small_float_table(3, 8, (0x80,)),
    "float8_e5m2fnuz": lambda: _small_float_table(2, 16, (0x80,)),
    "float8_e8m0fnu": _power_table,
}
