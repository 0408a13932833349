"""ONNX tensors as array references: raw, typed or external data where it lies, and small values computed from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import InputError
from normdoctor.layers import ArrayRef
from normdoctor.readers.arrays import (
    ITEM_SIZES,
    MAX_ELEMENTS,
    FileStorage,
    Source,
    StoredArray,
    decode,
    encode,
    unreadable,
)
from normdoctor.readers.onnx_records import (
    DOUBLE_DATA,
    FLOAT_DATA,
    INT32_DATA,
    INT64_DATA,
    UINT64_DATA,
    Document,
    Tensor,
)
from normdoctor.readers.onnx_wire import BYTES, FIXED32, FIXED64, VARINT

DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    24: "float8_e8m0fnu",
}
"""TensorProto.DataType to torch's names. Left out: strings and the types of less than a byte."""

TYPED_HOMES = {
    "float32": FLOAT_DATA,
    "complex64": FLOAT_DATA,
    "float64": DOUBLE_DATA,
    "complex128": DOUBLE_DATA,
    "int64": INT64_DATA,
    "uint32": UINT64_DATA,
    "uint64": UINT64_DATA,
}
"""The number field that holds an element type when raw_data does not; int32_data for all others."""

MAX_DIMS = 32
"""Dimensions of an array; numpy 1 ends here too."""

MAX_TYPED = 1 << 20
"""Elements decoded one by one from numbers of varying length."""


@dataclass(frozen=True, eq=False)
class Made:
    """An array that no single place in the file holds: filled, cast, or computed from constants.

    `make` is called when values are asked for, never for more than MAX_ELEMENTS of them."""

    shape: tuple[int, ...]
    dtype: str
    identity: Hashable
    make: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    def numpy(self) -> NDArray[Any]:
        return self._values

    @cached_property
    def _values(self) -> NDArray[Any]:
        _check_count(math.prod(self.shape))
        return np.asarray(self.make()).reshape(self.shape)


def _check_count(count: int) -> None:
    if count > MAX_ELEMENTS:
        raise InputError(
            f"a constant has {count:,} elements: not a norm's",
            "The file is damaged or was made to mislead; copy or export it again.",
        )


def size(ref: ArrayRef) -> int:
    """Number of elements."""
    return math.prod(ref.shape)


def filled(base: ArrayRef, shape: tuple[int, ...], identity: Hashable) -> Made:
    """`base`, broadcast to `shape`."""
    return Made(shape, base.dtype, identity, lambda: np.broadcast_to(base.numpy(), shape))


def reshaped(base: ArrayRef, shape: tuple[int, ...]) -> ArrayRef:
    """The same values in the same order under another shape; stays a view of the file where it is one."""
    if isinstance(base, StoredArray) and base.is_contiguous:
        return replace(base, shape=shape, strides=None)
    return Made(shape, base.dtype, ("reshaped", base.identity, shape), lambda: base.numpy().reshape(shape))


def cast(base: ArrayRef, dtype: str) -> ArrayRef | None:
    """`base` rounded to another element type; None for a type that nothing is written in."""
    if dtype == base.dtype:
        return base
    if dtype not in {"float16", "bfloat16", "float32", "float64", "int16", "int32", "int64"}:
        return None

    def make() -> NDArray[Any]:
        with np.errstate(invalid="ignore"):
            return decode(encode(base.numpy().reshape(-1), dtype), dtype)

    return Made(base.shape, dtype, ("cast", base.identity, dtype), make)


def computed(
    function: Callable[..., NDArray[Any]], operands: Sequence[ArrayRef], identity: Hashable
) -> ArrayRef | None:
    """`function` of constants, in float64 and rounded once to the first operand's type; None where shapes clash."""
    try:
        shape = np.broadcast_shapes(*(operand.shape for operand in operands))
    except ValueError:
        return None
    wide = Made(
        shape,
        "float64",
        identity,
        lambda: np.broadcast_to(_quietly(function, operands), shape),
    )
    return cast(wide, operands[0].dtype)


def _quietly(function: Callable[..., NDArray[Any]], operands: Sequence[ArrayRef]) -> NDArray[Any]:
    for operand in operands:
        _check_count(size(operand))
    with np.errstate(all="ignore"):
        return function(*(np.asarray(operand.numpy(), dtype=np.float64) for operand in operands))


class Tensors:
    """Turns TensorProtos into array references; owns the external files it opens."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.folder = document.source.path.parent
        self._by_location: dict[str, Source] = {}
        self._by_path: dict[Path, Source] = {}

    @property
    def files(self) -> list[Source]:
        """The external data files opened so far, each once."""
        return list(self._by_path.values())

    def close(self) -> None:
        for file in self.files:
            file.close()

    def external(self, location: str) -> Source:
        """The open data file that `location` names.

        Raises InputError as `locate` does, and where the file is missing or cannot be read."""
        if location not in self._by_location:
            path = self.locate(location)
            try:
                if path.exists() and not path.is_file():
                    raise InputError(f"{path}: the external data is no file", "Export the model again.")
                real = path.resolve()
            except OSError as error:
                raise unreadable(path, error) from None
            if not path.exists():
                raise InputError(
                    f"{self.document.source.path}: its external data {location!r} is missing",
                    "Put the data file beside the model, under the name that the model gives it.",
                )
            if real not in self._by_path:
                self._by_path[real] = Source(path)
            self._by_location[location] = self._by_path[real]
        return self._by_location[location]

    def locate(self, location: str) -> Path:
        """The path of an external data file, which must lie in the model's folder.

        Raises InputError for an absolute path, one with `..`, or a link that leads elsewhere. (A model and its
        data may both be links into one other folder, as in the cache of huggingface_hub: then that counts.)"""
        model = self.document.source.path
        windows = PureWindowsPath(location)
        inside = bool(location) and "\0" not in location and not windows.drive and not windows.root
        path = self.folder / location if inside else self.folder
        if inside and ".." not in windows.parts:
            try:
                real = path.resolve()
                homes = (self.folder.resolve(), model.resolve().parent)
                inside = any(real.is_relative_to(home) for home in homes)
            except (OSError, RuntimeError):  # too long a name; a loop of links (Python below 3.13)
                inside = False
            if inside:
                return path
        raise InputError(
            f"{model}: external data {location!r} points outside the model's folder",
            "Nothing was read from there. Get the model from a source you trust, with its data files beside it.",
        )

    def array(self, tensor: Tensor) -> ArrayRef | None:
        """A reference to the tensor's values; None for element types that no norm has (strings, int4).

        Raises InputError where the values are not there or do not fill the shape."""
        dtype = DTYPES.get(tensor.data_type)
        if dtype is None:
            return None
        shape = tuple(tensor.dims)
        if min((0, *shape)) < 0 or len(shape) > MAX_DIMS:
            raise self._wrong(tensor, f"has the impossible shape {list(shape[:MAX_DIMS])}")
        nbytes = math.prod(shape) * ITEM_SIZES[dtype]
        place = self.place(tensor, dtype, nbytes)
        if place is not None:
            source, offset, count = place
            if count != nbytes:
                raise self._wrong(tensor, f"has {count:,} bytes for a shape of {nbytes:,}")
            if offset + count > source.size:
                raise self._wrong(tensor, f"lies beyond the end of {source.path.name}")
            return StoredArray(FileStorage(tensor.name or "a constant", source, offset, count), dtype, shape)
        identity = (id(self.document), "typed", tensor.span.start)
        return Made(shape, dtype, identity, lambda: self._typed(tensor, dtype, math.prod(shape)))

    def place(self, tensor: Tensor, dtype: str, nbytes: int) -> tuple[Source, int, int] | None:
        """File, offset and length of the values where they lie in one piece; None where they do not."""
        if tensor.is_external:
            if "location" not in tensor.external:
                raise self._wrong(tensor, "says that its data is external and not where")
            offset = self._number(tensor, "offset", 0)
            return self.external(tensor.external["location"]), offset, self._number(tensor, "length", nbytes)
        if tensor.raw is not None:
            return self.document.source, tensor.raw.start, tensor.raw.end - tensor.raw.start
        runs = tensor.typed.get(TYPED_HOMES.get(dtype, INT32_DATA), [])
        if dtype in ("float32", "float64", "complex64", "complex128") and len(runs) == 1:
            wire, start, end = runs[0]
            # Packed little-endian numbers without gaps: the same bytes as raw_data.
            return (self.document.source, start, end - start) if wire in (BYTES, FIXED32, FIXED64) else None
        return None

    def _number(self, tensor: Tensor, key: str, default: int) -> int:
        text = tensor.external.get(key)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise self._wrong(tensor, f"gives its {key} as {text[:40]!r}")
        return int(text)

    def _typed(self, tensor: Tensor, dtype: str, count: int) -> NDArray[Any]:
        """The values of a tensor whose elements are written as numbers."""
        home = TYPED_HOMES.get(dtype, INT32_DATA)
        runs = tensor.typed.get(home, [])
        if home in (FLOAT_DATA, DOUBLE_DATA):
            allowed = (BYTES, FIXED32 if home == FLOAT_DATA else FIXED64)
            taken = [(start, end) for wire, start, end in runs if wire in allowed]
            raw = b""
            if sum(end - start for start, end in taken) == count * ITEM_SIZES[dtype]:
                raw = b"".join(self.document.source.read_at(start, end - start) for start, end in taken)
            values = decode(raw, dtype)
        else:
            if count > MAX_TYPED or sum(end - start for wire, start, end in runs if wire != VARINT) > 10 * count:
                raise self._wrong(tensor, f"has {count:,} elements written one by one: not a norm's")
            numbers = np.array(self.document.integers(runs, limit=MAX_TYPED), dtype=np.int64)
            if dtype.startswith(("float", "bfloat")):
                bits = numbers.astype(np.uint16 if ITEM_SIZES[dtype] == 2 else np.uint8)
                values = decode(bits.astype(bits.dtype.newbyteorder("<")).tobytes(), dtype)
            else:
                values = numbers.astype(dtype)
        if values.size != count:
            raise self._wrong(tensor, f"has {values.size:,} values for a shape of {count:,}")
        return values

    def _wrong(self, tensor: Tensor, what: str) -> InputError:
        return InputError(
            f"{self.document.source.path}: tensor {tensor.name or 'of a constant'} {what}",
            "The file is damaged or was made to mislead; copy or export it again.",
        )
