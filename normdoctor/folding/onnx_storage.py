"""Where the tensors of a folded ONNX file lie: in the model itself, or in one data file beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from normdoctor.errors import RefusedError
from normdoctor.folding.onnx_frames import Frame, Key
from normdoctor.readers.arrays import ITEM_SIZES
from normdoctor.readers.onnx_arrays import DTYPES, Tensors
from normdoctor.readers.onnx_records import EXTERNAL, Tensor
from normdoctor.readers.onnx_splices import Extent, Piece, copy, length_of
from normdoctor.readers.onnx_wire import bytes_field, varint, varint_field

DATA_TYPES = {name: number for number, name in DTYPES.items()}

KEPT_INSIDE = 1 << 10
"""Bytes of a tensor that stays in the model although others are external; as onnx does by default."""

PAGE = 4096
"""Large tensors begin on a page, so that runtimes can map them."""

ALIGNMENT = 64

HALF_BYTES = (21, 22, 23)
"""TensorProto types of which two elements share a byte: uint4, int4, float4e2m1."""


@dataclass(eq=False)
class NewTensor:
    """A constant that the folded file has and the original has not."""

    frame: Frame
    """The graph that gets it."""
    name: str
    """What it should be called; what it is called in the end."""
    shape: tuple[int, ...]
    dtype: str
    old: Key | None = None
    """The value whose place it takes at its node."""
    in_place_of: Tensor | None = None
    """The stored tensor whose name and place in the file it gets."""
    extent: Extent | None = None
    """Where its bytes wait, where that is not `data`."""
    data: bytes = b""

    @property
    def data_type(self) -> int:
        return DATA_TYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def pieces(self) -> list[Piece]:
        """Its values as they are stored."""
        return [self.data] if self.extent is None else [self.extent]


class DataFile:
    """A file of tensors in the making: what goes where. Nothing is written before `write`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._entries: list[tuple[int, list[Piece]]] = []
        self._end = 0
        self._known: dict[tuple[int, int, int], tuple[int, int]] = {}

    @property
    def empty(self) -> bool:
        return not self._entries

    def add(self, pieces: list[Piece]) -> bytes:
        """Take a tensor's bytes; returns the fields of its TensorProto that say where they are."""
        length = length_of(pieces)
        # Tensors that share their bytes go on doing so.
        first = pieces[0] if len(pieces) == 1 else None
        known = (id(first.source), first.start, first.end) if isinstance(first, Extent) else None
        if known is not None and known in self._known:
            return _location(self.name, *self._known[known])
        step = PAGE if length >= PAGE else ALIGNMENT
        start = -(-self._end // step) * step
        self._entries.append((start, pieces))
        self._end = start + length
        if known is not None:
            self._known[known] = (start, length)
        return _location(self.name, start, length)

    def write(self, target: BinaryIO) -> None:
        at = 0
        for start, pieces in self._entries:
            target.write(bytes(start - at))
            for piece in pieces:
                copy(piece, target)
            at = start + length_of(pieces)


def _location(name: str, offset: int, length: int) -> bytes:
    entries = (("location", name), ("offset", str(offset)), ("length", str(length)))
    fields = (bytes_field(13, bytes_field(1, key.encode()) + bytes_field(2, value.encode())) for key, value in entries)
    return b"".join(fields)


def stored_extent(tensors: Tensors, tensor: Tensor) -> Extent:
    """Where the values of a tensor lie that is external or raw. Raises InputError where its file is missing,
    RefusedError for a type whose size nobody knows."""
    if not tensor.is_external:
        assert tensor.raw is not None
        return Extent(tensors.document.source, tensor.raw.start, tensor.raw.end)
    dtype = DTYPES.get(tensor.data_type)
    count = math.prod(tensor.dims)
    if dtype is not None:
        nbytes = count * ITEM_SIZES[dtype]
    elif tensor.data_type in HALF_BYTES:
        nbytes = (count + 1) // 2
    elif tensor.external.get("length", "").isdigit():
        nbytes = int(tensor.external["length"])
    else:
        raise RefusedError(
            f"{tensor.name}: external data of the unknown type {tensor.data_type} and without a length",
            "Save the model again with onnx.save(..., save_as_external_data=True).",
        )
    place = tensors.place(tensor, dtype or "uint8", nbytes)
    assert place is not None
    source, offset, length = place
    if offset + length > source.size:
        raise RefusedError(
            f"{tensor.name}: lies beyond the end of {source.path.name}", "Copy the model and its data again."
        )
    return Extent(source, offset, offset + length)


def tensor_field(number: int, tensor: NewTensor, data: DataFile | None) -> list[Piece]:
    """A TensorProto as the field `number` of its graph; its values in `data` where that is given and they are many."""
    name = tensor.name.encode()
    head = b"".join(varint_field(1, length) for length in tensor.shape)
    head += varint_field(2, tensor.data_type) + bytes_field(8, name)
    if data is not None and tensor.nbytes > KEPT_INSIDE:
        return [bytes_field(number, head + data.add(tensor.pieces) + varint_field(14, EXTERNAL))]
    values = tensor.pieces
    head += varint(9 << 3 | 2) + varint(length_of(values))
    return [varint(number << 3 | 2) + varint(len(head) + length_of(values)) + head, *values]


def free_data_name(output: Path, taken: set[Path]) -> Path:
    """OUTPUT.data, or OUTPUT.2.data, ...; a file that is there is only replaced together with the output."""
    number = 1
    while True:
        path = output.with_name(f"{output.name}.data" if number == 1 else f"{output.name}.{number}.data")
        if path.resolve() not in taken and (output.exists() or not path.exists()):
            return path
        number += 1
