"""A zip file out of another one: records copied as they stand, records left out, records added."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from normdoctor.errors import RefusedError
from normdoctor.readers.arrays import Source
from normdoctor.readers.torch_pickle import LOCAL_HEADER, ZipRecords

CHUNK = 1 << 20
LARGEST = 0xFFFFFFFF
MOST_RECORDS = 0xFFFF
ALIGNMENT = 64
"""torch lays the data of every record at a multiple of that, by a field of padding in front of it."""

PADDING = b"FB"
"""What torch calls that field."""

UTF8 = 0x800

CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
END_RECORD = struct.Struct("<4s4H2IH")


def check_fits(path: Path, size: int, count: int) -> None:
    """Raise RefusedError for what needs the longer fields of a large zip."""
    if size >= LARGEST or count >= MOST_RECORDS:
        raise RefusedError(
            f"{path}: a zip beyond 4 GB or 65,535 records cannot be rewritten",
            "Save it again with torch.save in several files.",
        )


def copy_bytes(source: Source, file: BinaryIO, begin: int, end: int) -> None:
    """A run of bytes, a piece at a time."""
    while begin < end:
        count = min(CHUNK, end - begin)
        file.write(source.read_at(begin, count))
        begin += count


def record_ends(source: Source, infos: Sequence[zipfile.ZipInfo]) -> dict[str, int]:
    """Where each record with all that belongs to it ends: at the next one, or at the directory."""
    with zipfile.ZipFile(source.stream()) as archive:
        directory = archive.start_dir
    ordered = sorted(infos, key=lambda info: info.header_offset)
    starts = [info.header_offset for info in ordered[1:]] + [directory]
    return {info.filename: end for info, end in zip(ordered, starts, strict=True)}


def directory_entries(file: BinaryIO) -> list[tuple[int, str]]:
    """Offset in the file and record name of each entry of the central directory, in order."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        start = archive.start_dir
        infos = archive.infolist()
    entries = []
    for info in infos:
        file.seek(start)
        header = CENTRAL_HEADER.unpack(file.read(CENTRAL_HEADER.size))
        entries.append((start, info.filename))
        start += CENTRAL_HEADER.size + sum(header[10:13])
    return entries


class ZipSplicer:
    """Writes a zip file record by record."""

    def __init__(self, file: BinaryIO, records: ZipRecords) -> None:
        self.records = records
        self._file, self._source = file, records.source
        self._entries: list[bytes] = []
        self._ends = record_ends(self._source, list(records.infos.values()))
        self._places = {name: place for place, name in directory_entries(self._source.stream())}

    def copy(self, name: str) -> None:
        """A record of the old file; its own header changes by the padding that aligns the data."""
        source, info = self._source, self.records.infos[name]
        data, place = self.records.data_offset(info), self._file.tell()
        header = list(LOCAL_HEADER.unpack(source.read_at(info.header_offset, LOCAL_HEADER.size)))
        start = info.header_offset + LOCAL_HEADER.size
        named = source.read_at(start, header[-2])
        extra = source.read_at(start + header[-2], header[-1])
        if extra[:2] == PADDING and len(extra) >= 4 and struct.unpack_from("<H", extra, 2)[0] == len(extra) - 4:
            extra = _padding(place, len(named))
        header[-1] = len(extra)
        self._file.write(LOCAL_HEADER.pack(*header) + named + extra)
        copy_bytes(source, self._file, data, self._ends[name])
        entry = self._places[name]
        central = list(CENTRAL_HEADER.unpack(source.read_at(entry, CENTRAL_HEADER.size)))
        tail = source.read_at(entry + CENTRAL_HEADER.size, sum(central[10:13]))
        central[16] = place
        self._add_entry(CENTRAL_HEADER.pack(*central) + tail)

    def add(self, name: str, data: bytes) -> None:
        """A new record, not compressed."""
        place, named = self._file.tell(), name.encode()
        extra = _padding(place, len(named))
        flags = 0 if name.isascii() else UTF8
        shared = (0, flags, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(named))
        self._file.write(LOCAL_HEADER.pack(b"PK\x03\x04", *shared, len(extra)) + named + extra)
        self._file.write(data)
        self._add_entry(CENTRAL_HEADER.pack(b"PK\x01\x02", 0, *shared, 0, 0, 0, 0, 0, place) + named)

    def _add_entry(self, entry: bytes) -> None:
        self._entries.append(entry)
        check_fits(self._source.path, self._file.tell(), len(self._entries))

    def close(self) -> None:
        """The directory behind all records."""
        begin = self._file.tell()
        directory = b"".join(self._entries)
        self._file.write(directory)
        count = len(self._entries)
        self._file.write(END_RECORD.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), begin, 0))


def _padding(place: int, name_length: int) -> bytes:
    """The field that moves the data of a record at `place` to the next multiple."""
    begin = place + LOCAL_HEADER.size + name_length + 4
    count = -begin % ALIGNMENT
    return PADDING + struct.pack("<H", count) + b"Z" * count
