"""Changes to a protobuf file as splices: every byte that is not meant stays where and what it is.

A message that grows or shrinks gets a new length in front of it, and so does every message around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from normdoctor.readers.arrays import Source
from normdoctor.readers.onnx_wire import Field, Span, Wire, varint

CHUNK = 1 << 20


class Extent(NamedTuple):
    """A range of bytes of a file."""

    source: Source
    start: int
    end: int


Piece = bytes | Extent
"""New bytes, or bytes that lie in a file."""


def length_of(pieces: Sequence[Piece]) -> int:
    """How many bytes the pieces are together."""
    return sum(len(piece) if isinstance(piece, bytes) else piece.end - piece.start for piece in pieces)


def copy(piece: Piece, target: BinaryIO) -> None:
    """Append a piece to `target`, a megabyte at a time."""
    if isinstance(piece, bytes):
        target.write(piece)
        return
    source, start, end = piece
    while start < end:
        count = min(CHUNK, end - start)
        target.write(source.read_at(start, count))
        start += count


def tagged_fields(wire: Wire, span: Span) -> Iterator[tuple[int, Field]]:
    """The fields of a message, each with the place where its tag begins: from there to its end it can be cut out."""
    at = span.start
    for item in wire.fields(span):
        yield at, item
        at = item[4]


class Edits:
    """Replacements in one file, collected first and applied in one pass that copies the rest as it is."""

    def __init__(self, source: Source, root: Span) -> None:
        self._source, self._root = source, root
        self._direct: dict[int, list[tuple[int, int, Sequence[Piece]]]] = {}
        self._inside: dict[int, dict[int, Span]] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing is to be changed."""
        return not self._direct

    def replace(self, span: Span, start: int, end: int, new: bytes | Sequence[Piece]) -> None:
        """Put `new` in the place of the bytes from `start` to `end`, which lie directly in `span`.

        With start == end it is inserted there, behind what was inserted there before. Ranges must not overlap,
        and nothing may be changed inside what is replaced."""
        pieces = [new] if isinstance(new, bytes) else new
        self._direct.setdefault(span.length_at, []).append((start, end, pieces))
        # Spans are known by where their length stands: the same message may have been walked twice.
        while span.parent is not None:
            self._inside.setdefault(span.parent.length_at, {})[span.length_at] = span
            span = span.parent

    def pieces(self) -> list[Piece]:
        """The edited file in order."""
        return self._pieces(self._root)

    def write(self, target: BinaryIO) -> None:
        """The edited file."""
        for piece in self.pieces():
            copy(piece, target)

    def _pieces(self, span: Span) -> list[Piece]:
        return list(self._merge(span))

    def _merge(self, span: Span) -> Iterator[Piece]:
        changes: list[tuple[int, int, Sequence[Piece]]] = list(self._direct.get(span.length_at, []))
        for child in self._inside.get(span.length_at, {}).values():
            pieces = self._pieces(child)
            length = length_of(pieces)
            same = length == child.end - child.start
            # A length that does not change keeps its bytes too: it may be written longer than need be.
            prefix = Extent(self._source, child.length_at, child.start) if same else varint(length)
            changes.append((child.length_at, child.end, [prefix, *pieces]))
        at = span.start
        for start, end, new in sorted(changes, key=lambda change: change[:2]):
            if at < start:
                yield Extent(self._source, at, start)
            yield from new
            at = end
        if at < span.end:
            yield Extent(self._source, at, span.end)
