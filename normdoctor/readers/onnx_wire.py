"""Protobuf's wire format, walked where it lies: what a message holds, without loading the big fields.

The rules are those of https://protobuf.dev/programming-guides/encoding/. Only the bytes between big fields are
read, so the cost follows the structure of a model and not its weights; and every length is checked against
the message around it, so a lying file can neither lead us outside itself nor make us allocate.
"""

from __future__ import annotations

import struct
from bisect import bisect_right, insort
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import InputError
from normdoctor.readers.arrays import MAX_ELEMENTS, Source

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

MAX_FIELDS = 4_000_000
"""Fields looked at in one file. 100,000 nodes need fewer; more than this asks for our time."""

MAX_DEPTH = 100
"""Messages inside messages; protobuf itself stops here, so no model that can be loaded is deeper."""

MAX_TEXT = 1 << 16
"""Bytes of a name or a key."""

SMALL_BLOCK, BIG_BLOCK = 256, 1 << 16

KEPT = 8 << 20
"""Bytes of structure kept for a second look, so that nothing is fetched twice."""

Field = tuple[int, int, int, int, int]
"""number, wire type, offset of the length prefix (BYTES) or of the value, start, end of the payload.

For VARINT the place of `start` holds the value itself."""


class Span:
    """A message in the file: the bytes from `start` to `end`, their length written at `length_at`."""

    __slots__ = ("depth", "end", "length_at", "parent", "start")

    def __init__(self, length_at: int, start: int, end: int, parent: Span | None) -> None:
        self.length_at, self.start, self.end, self.parent = length_at, start, end, parent
        self.depth: int = 0 if parent is None else parent.depth + 1


class Wire:
    """Walks the fields of messages through a small buffer over `source`.

    The buffer starts small and grows while reading goes straight on: after a jump over a big field only a few
    hundred bytes are fetched, along a long list of nodes 64 KiB at a time."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.root = Span(0, 0, source.size, None)
        self._data = b""
        self._base = 0
        self._block = SMALL_BLOCK
        self._kept: list[tuple[int, bytes]] = []
        self._kept_bytes = 0
        self._fields_left = MAX_FIELDS

    def inside(self, field: Field, parent: Span) -> Span:
        """The message that a BYTES field of `parent` holds."""
        if parent.depth >= MAX_DEPTH:
            raise self.damaged("messages are nested too deeply")
        return Span(field[2], field[3], field[4], parent)

    def fields(self, span: Span) -> Iterator[Field]:
        """The fields of a message in file order; InputError where the bytes are no fields."""
        at, end = span.start, span.end
        while at < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise self.damaged(f"it has more than {MAX_FIELDS:,} fields")
            # Other messages may have been walked since the last field, so the buffer is looked up each time.
            if at < self._base or at + 20 > self._base + len(self._data):
                self._fetch(at, 20)
            data, base = self._data, self._base
            index = at - base
            # Most tags and lengths are one byte: spelt out here, for this loop is where the time goes.
            try:
                tag = data[index]
                index += 1
                if tag >= 0x80:
                    tag, index = self._varint(data, index - 1)
                number, wire = tag >> 3, tag & 7
                place = start = base + index
                if wire == BYTES:
                    length = data[index]
                    index += 1
                    if length >= 0x80:
                        length, index = self._varint(data, index - 1)
                    start = base + index
                    at = start + length
                elif wire == VARINT:
                    start, index = self._varint(data, index)
                    at = base + index
                elif wire in (FIXED32, FIXED64):
                    at = start + (4 if wire == FIXED32 else 8)
                else:
                    number = 0
            except IndexError:
                raise self.damaged("it ends in the middle of a field") from None
            if number == 0 or number >= 1 << 29:
                raise self.damaged(f"no field begins at byte {at:,}")
            if at > end:
                raise self.damaged(f"a field at byte {place:,} claims to end beyond what holds it")
            yield number, wire, place, start, at

    def _varint(self, data: bytes, index: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            byte = data[index]
            index += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, index
        raise self.damaged("a number is longer than ten bytes")

    def _fetch(self, at: int, count: int) -> None:
        """Make the buffer hold `count` bytes from `at`, fewer at the end of the file."""
        count = min(count, self.source.size - at)
        index = bisect_right(self._kept, at, key=lambda kept: kept[0]) - 1
        if index >= 0:
            base, data = self._kept[index]
            if base + len(data) >= at + count:
                self._base, self._data = base, data
                return
        straight_on = self._base <= at <= self._base + len(self._data)
        self._block = min(2 * self._block, BIG_BLOCK) if straight_on else SMALL_BLOCK
        self._data = self.source.read_at(at, min(max(self._block, count), self.source.size - at))
        self._base = at
        self._kept_bytes += len(self._data)
        if self._kept_bytes <= KEPT:
            insort(self._kept, (at, self._data), key=lambda kept: kept[0])

    def take(self, start: int, end: int) -> bytes:
        """The bytes of a small field, from the buffer where they are in it."""
        if start < self._base or end > self._base + len(self._data):
            if end - start > BIG_BLOCK:
                return self.source.read_at(start, end - start)
            self._fetch(start, end - start)
        return self._data[start - self._base : end - self._base]

    def text(self, start: int, end: int) -> str:
        """A name or a key. Bytes that are no UTF-8 stay visible and distinct."""
        if end - start > MAX_TEXT:
            raise self.damaged(f"a name is {end - start:,} bytes long")
        return self.take(start, end).decode("utf-8", "backslashreplace")

    def float32(self, start: int) -> float:
        """A fixed32 as the shortest decimal that means the same float32: 1e-05, not 9.99999974e-06."""
        return shortest(struct.unpack("<f", self.take(start, start + 4))[0])

    def damaged(self, why: str) -> InputError:
        """The InputError for a file that does not follow the wire format."""
        return InputError(
            f"{self.source.path}: not a readable ONNX model: {why}",
            "The file is truncated or damaged; copy or export it again.",
        )


def shortest(value: float) -> float:
    """The float64 nearest to the shortest decimal that rounds to the float32 `value`."""
    return float(str(np.float32(value)))


def signed(value: int) -> int:
    """A varint read as int64 (negative numbers are written as ten bytes)."""
    return value - (1 << 64) if value >= 1 << 63 else value


def unpack_varints(data: bytes) -> NDArray[np.int64]:
    """A packed run of varints as int64. Vectorised: a million values cost milliseconds.

    Raises ValueError for a run that ends in the middle of a number or has one of more than ten bytes."""
    codes = np.frombuffer(data, dtype=np.uint8)
    last = np.flatnonzero(codes < 0x80)
    if codes.size == 0:
        return np.zeros(0, dtype=np.int64)
    if last.size == 0 or last[-1] != codes.size - 1 or last.size > MAX_ELEMENTS:
        raise ValueError("varints")
    first = np.concatenate(([0], last[:-1] + 1))
    if (last - first).max() > 9:
        raise ValueError("varints")
    shift = 7 * (np.arange(codes.size) - np.repeat(first, last - first + 1))
    parts = (codes & 0x7F).astype(np.uint64) << shift.astype(np.uint64)
    return np.add.reduceat(parts, first).view(np.int64)


def varint(value: int) -> bytes:
    """`value` (not negative) as protobuf writes it."""
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def bytes_field(number: int, payload: bytes) -> bytes:
    """A length-delimited field with its tag and length."""
    return varint(number << 3 | BYTES) + varint(len(payload)) + payload


def varint_field(number: int, value: int) -> bytes:
    """A number field with its tag."""
    return varint(number << 3 | VARINT) + varint(value)
