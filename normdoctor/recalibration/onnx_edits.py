"""Changes to a protobuf file as splices: every byte that is not meant stays where and what it is.

A message that grows or shrinks gets a new length in front of it, and so does every message around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from normdoctor.readers.arrays import Source
from normdoctor.readers.onnx_wire import Span, varint

CHUNK = 1 << 20

Piece = bytes | tuple[int, int]
"""New bytes, or a range of the old file."""


class Edits:
    """Replacements in one file, collected first and applied in one pass that copies the rest as it is."""

    def __init__(self, source: Source, root: Span) -> None:
        self._source, self._root = source, root
        self._direct: dict[int, list[tuple[int, int, bytes]]] = {}
        self._inside: dict[int, dict[int, Span]] = {}

    def replace(self, span: Span, start: int, end: int, new: bytes) -> None:
        """Put `new` in the place of the bytes from `start` to `end`, which lie directly in `span`.

        With start == end it is inserted there. Ranges must not overlap."""
        self._direct.setdefault(span.length_at, []).append((start, end, new))
        # Spans are known by where their length stands: the same message may have been walked twice.
        while span.parent is not None:
            self._inside.setdefault(span.parent.length_at, {})[span.length_at] = span
            span = span.parent

    def write(self, target: BinaryIO) -> None:
        """The edited file."""
        for piece in self._pieces(self._root):
            if isinstance(piece, bytes):
                target.write(piece)
                continue
            start, end = piece
            while start < end:
                count = min(CHUNK, end - start)
                target.write(self._source.read_at(start, count))
                start += count

    def _pieces(self, span: Span) -> list[Piece]:
        return list(self._merge(span))

    def _merge(self, span: Span) -> Iterator[Piece]:
        changes: list[tuple[int, int, list[Piece]]] = [
            (start, end, [new]) for start, end, new in self._direct.get(span.length_at, [])
        ]
        for child in self._inside.get(span.length_at, {}).values():
            pieces = self._pieces(child)
            length = sum(len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)
            same = length == child.end - child.start
            # A length that does not change keeps its bytes too: it may be written longer than need be.
            prefix: Piece = (child.length_at, child.start) if same else varint(length)
            changes.append((child.length_at, child.end, [prefix, *pieces]))
        at = span.start
        for start, end, pieces in sorted(changes, key=lambda change: change[:2]):
            yield (at, start)
            yield from pieces
            at = end
        yield (at, span.end)
