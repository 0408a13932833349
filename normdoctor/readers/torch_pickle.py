"""Files written by torch.save: the zip container (torch 1.6 and later) and the older one of five pickles in a row.

Layout of the zip: <root>/data.pkl, <root>/byteorder, <root>/data/<key> for each storage, all uncompressed.
Layout of the older one: magic number, protocol version, system info, the object, the storage keys; then for
each key its element count as 8 bytes and its elements.
"""

from __future__ import annotations

import io
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from normdoctor.errors import InputError
from normdoctor.layers import Checkpoint, Container, Danger
from normdoctor.readers import load_calls
from normdoctor.readers.arrays import ITEM_SIZES, FileStorage, Source, Storage
from normdoctor.readers.pickle_machine import PickleMachine
from normdoctor.readers.pickle_records import Pickled
from normdoctor.readers.torch_contents import describe, find_models, with_unnamed
from normdoctor.readers.torch_tensors import StorageKey, TensorReader, storage_key

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

MAX_BARE_OPCODES = 300_000
"""So much of a plain pickle is looked through for calls; it is not read in any case."""

MAX_INFLATED = 256 << 20
"""The compressed records of a file are inflated up to this size together; torch itself compresses nothing."""

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
END_RECORD = struct.Struct("<4s4H2LH")
ZIP64_LOCATOR = struct.Struct("<4sLQL")
ZIP64_END_RECORD = struct.Struct("<4sQ2H2L4Q")


TRUNCATED = "The file is truncated or was not written completely; copy or download it again."


def is_zip(source: Source) -> bool:
    return source.size >= 4 and source.read_at(0, 4) in (b"PK\x03\x04", b"PK\x05\x06")


def is_legacy(source: Source) -> bool:
    """Whether the file begins with a pickle of torch's magic number, in any protocol."""
    if source.size < 4:
        return False
    head = source.read_at(0, min(source.size, 64))
    if head[:1] not in (b"\x80", b"L", b"\x8a"):
        return False
    try:
        return bool(PickleMachine(io.BytesIO(head), "magic number").run().value == LEGACY_MAGIC)
    except InputError:
        return False


def is_tar(source: Source) -> bool:
    """Whether the file is a tar archive: torch's container before 0.1.10.

    torch looks for one before it looks for a pickle, and the first header can hold both."""
    if source.size < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(source.read_at(0, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def is_bare_pickle(source: Source) -> bool:
    """Whether the file begins like a pickle of protocol 2 to 5."""
    return source.size >= 2 and source.read_at(0, 1) == b"\x80" and source.read_at(1, 1) in b"\x02\x03\x04\x05"


def explain_bare_pickle(source: Source) -> InputError:
    """Why a plain pickle is not read, and what it would do to somebody who loads it."""
    machine = PickleMachine(source.stream(), "pickle", MAX_BARE_OPCODES)
    with suppress(InputError):
        machine.run()
    acting = [call.name for call in load_calls.judge(machine.calls) if call.danger is Danger.OTHER]
    what = f"{source.path}: a plain Python pickle, not written by torch.save"
    if not acting:
        return InputError(
            what,
            "If you trust where it comes from, load it where it was made and save the state_dict with torch.save "
            "or safetensors.",
        )
    names = ", ".join(name[:100] for name in acting[:5]) + (f" and {len(acting) - 5} more" if len(acting) > 5 else "")
    return InputError(
        f"{what}; loading it would call {names}",
        "Do not load it, unless you know what that is for and trust where it comes from.",
    )


# the zip container


class ZipRecords:
    """The records of a zip file by name, each checked against its own header before it is read.

    Raises InputError for what a loader and a scanner could see differently: two records of one name (torch
    looks names up without regard to case), a name with an end of its own, a record whose own header names
    something else, a second directory."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._inflated = 0
        try:
            with zipfile.ZipFile(source.stream()) as archive:
                infos = archive.infolist()
                end, start = self._directory()
                one_directory = archive.start_dir == start
        except (
            zipfile.BadZipFile,
            OSError,
            ValueError,
            struct.error,
            NotImplementedError,
            EOFError,
            OverflowError,
        ) as error:
            raise InputError(f"{source.path}: the zip container is damaged ({error})", TRUNCATED) from None
        if not one_directory and not self._is_end_of_file(end):  # the end of a zip inside, and the outer one is lost
            raise InputError(f"{source.path}: the zip container is damaged: its end is missing", TRUNCATED)
        if not one_directory:
            raise self._misleading("the directory of the zip is not where its end says it is")
        self.infos: dict[str, zipfile.ZipInfo] = {}
        seen: set[str] = set()
        for info in infos:
            # zipfile cuts a name at a zero byte and, from Python 3.12 on, lets an extra field replace it.
            if info.filename.lower() in seen or info.filename != info.orig_filename:
                raise self._misleading(f"two records can be read as {info.filename}")
            seen.add(info.filename.lower())
            self.infos[info.filename] = info

    def _directory(self) -> tuple[int, int | None]:
        """Where the end record lies, and where it says the directory begins.

        zipfile looks in front of the end instead, torch does not: a file with two directories shows them two
        contents."""
        tail_size = END_RECORD.size  # torch writes no comment behind it
        tail = self.source.read_at(self.source.size - tail_size, tail_size)
        if not (tail.startswith(b"PK\x05\x06") and tail.endswith(b"\0\0")):
            tail_size = min(self.source.size, END_RECORD.size + 0xFFFF)
            tail = self.source.read_at(self.source.size - tail_size, tail_size)
        place = tail.rfind(b"PK\x05\x06", 0, tail_size - END_RECORD.size + 4)
        end = self.source.size - tail_size + place
        *_, start, _ = END_RECORD.unpack(self.source.read_at(end, END_RECORD.size))
        locator = end - ZIP64_LOCATOR.size
        if locator < 0 or self.source.read_at(locator, 4) != b"PK\x06\x07":
            return end, int(start)
        _, _, end64, _ = ZIP64_LOCATOR.unpack(self.source.read_at(locator, ZIP64_LOCATOR.size))
        if end64 != locator - ZIP64_END_RECORD.size:
            return end, None
        return end, int(ZIP64_END_RECORD.unpack(self.source.read_at(end64, ZIP64_END_RECORD.size))[-1])

    def _is_end_of_file(self, end: int) -> bool:
        """Whether the end record and its comment are the last that the file has."""
        *_, comment = END_RECORD.unpack(self.source.read_at(end, END_RECORD.size))
        return bool(end + END_RECORD.size + comment == self.source.size)

    def _misleading(self, how: str) -> InputError:
        return InputError(
            f"{self.source.path}: {how}",
            "Loaders disagree on which one counts, so this file was made to mislead; do not load it.",
        )

    @cached_property
    def root(self) -> str | None:
        """The folder that holds data.pkl, with its slash; None where there is no such record."""
        roots = [name.removesuffix("data.pkl") for name in self.infos if name.endswith("data.pkl")]
        roots = [root for root in roots if root.count("/") <= 1]
        if len(roots) > 1:
            raise self._misleading("there are several data.pkl")
        return roots[0] if roots else None

    def data_offset(self, info: zipfile.ZipInfo) -> int:
        """Where the record's bytes begin."""
        header = LOCAL_HEADER.unpack(self.source.read_at(info.header_offset, LOCAL_HEADER.size))
        name_length, extra_length = int(header[-2]), int(header[-1])
        name = self.source.read_at(info.header_offset + LOCAL_HEADER.size, name_length)
        if header[0] != b"PK\x03\x04" or name != info.orig_filename.encode(
            "utf-8" if info.flag_bits & 0x800 else "cp437", "replace"
        ):
            raise self._damaged(info, "has a header of its own that names something else")
        return info.header_offset + LOCAL_HEADER.size + name_length + extra_length

    def storage(self, name: str) -> Storage:
        """The bytes of a record. Raises InputError where there is none, or it is encrypted or too large."""
        info = self.infos.get(name)
        if info is None:
            raise InputError(f"{self.source.path}: the record {name} is missing", "Copy or download the file again.")
        offset = self.data_offset(info)
        if info.flag_bits & 1:
            raise self._damaged(info, "is encrypted")
        if info.compress_type == zipfile.ZIP_STORED:
            if info.compress_size != info.file_size or offset + info.file_size > self.source.size:
                raise self._damaged(info, "claims a size that the file does not have")
            return FileStorage(name, self.source, offset, info.file_size, info.CRC or None)
        if info.compress_type != zipfile.ZIP_DEFLATED:
            raise self._damaged(info, "is compressed in a way torch does not read")
        if info.file_size > MAX_INFLATED:
            raise self._damaged(info, f"is compressed and would take {info.file_size:,} bytes")
        packed = FileStorage(name, self.source, offset, info.compress_size)
        return DeflatedStorage(name, packed, info.file_size, info.CRC, self.inflate)

    def inflate(self, storage: DeflatedStorage) -> bytes:
        """What a compressed record holds. Raises InputError where it is damaged, or the file asks for too much."""
        self._inflated += storage.nbytes
        if self._inflated > MAX_INFLATED:
            raise InputError(
                f"{self.source.path}: its compressed records take more than {MAX_INFLATED:,} bytes",
                "torch compresses nothing; unpack the zip and pack it again without compression.",
            )
        machine = zlib.decompressobj(-15)
        try:
            data = machine.decompress(storage.packed.read(0, storage.packed.nbytes), storage.nbytes + 1)
        except zlib.error:
            data = b""
        if len(data) != storage.nbytes or zlib.crc32(data) != storage.crc32:
            raise self._damaged(self.infos[storage.name], "does not match its checksum")
        return data

    def read(self, name: str) -> bytes:
        storage = self.storage(name)
        if storage.nbytes > MAX_INFLATED:
            raise self._damaged(self.infos[name], f"has {storage.nbytes:,} bytes")
        return storage.read(0, storage.nbytes)

    def _damaged(self, info: zipfile.ZipInfo, how: str) -> InputError:
        return InputError(
            f"{self.source.path}: the record {info.filename} {how}",
            "The file is damaged or was made to mislead; copy or download it again.",
        )


@dataclass(frozen=True)
class DeflatedStorage:
    """A compressed zip record, inflated as a whole when first read. `packed` is its place in the file."""

    name: str
    packed: FileStorage
    nbytes: int
    crc32: int
    inflate: Callable[[DeflatedStorage], bytes]

    @property
    def identity(self) -> tuple[int, int]:
        return (id(self.packed.source), self.packed.offset)

    @cached_property
    def _inflated(self) -> bytes:
        return self.inflate(self)

    def read(self, offset: int, count: int) -> bytes:
        return self._inflated[offset : offset + count]


def read_zip(source: Source, records: ZipRecords) -> Checkpoint:
    """The checkpoint in a torch zip. records.root must not be None."""
    pickled, reader = unpickle_zip(source, records)
    return _checkpoint(source, Container.ZIP, [pickled], pickled, reader)


def unpickle_zip(source: Source, records: ZipRecords, name: str = "data") -> tuple[Pickled, TensorReader]:
    """What a pickle of a torch zip holds, and the reader of its tensors. records.root must not be None."""
    root = records.root or ""
    pickled = PickleMachine(io.BytesIO(records.read(f"{root}{name}.pkl")), f"{source.path}: {name}.pkl").run()
    big_endian = False
    if root + "byteorder" in records.infos:
        big_endian = records.read(root + "byteorder").strip() == b"big"
    storages: dict[str, Storage] = {}

    def storage_of(key: StorageKey) -> Storage:
        if key.key not in storages:
            storages[key.key] = records.storage(f"{root}{name}/{key.key}")
        return storages[key.key]

    return pickled, TensorReader(storage_of, big_endian)


# the older container


def read_legacy(source: Source) -> Checkpoint:
    """The checkpoint in a file of torch before 1.6 (or of _use_new_zipfile_serialization=False)."""
    stream = source.stream()
    pickles = [PickleMachine(stream, f"{source.path}: pickle {n} of 5").run() for n in range(1, 6)]
    magic, protocol, _, _, keys = (pickled.value for pickled in pickles)
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(keys, list):
        raise InputError(f"{source.path}: the headers of the legacy container are damaged", "Download it again.")
    # The system info may say little_endian: False. torch writes and reads the data little-endian all the same:
    # https://github.com/pytorch/pytorch/blob/v2.6.0/torch/csrc/serialization.cpp
    places = _legacy_places(source, stream.tell(), keys, pickles[3])

    def storage_of(key: StorageKey) -> Storage:
        if key.key not in places:
            raise InputError(
                f"{source.path}: the storage {key.key} is missing or cannot be located",
                "The file is damaged or was made to mislead; do not load it.",
            )
        return places[key.key]

    return _checkpoint(source, Container.LEGACY, pickles, pickles[3], TensorReader(storage_of, big_endian=False))


def _legacy_places(source: Source, position: int, keys: list[object], pickled: Pickled) -> dict[str, FileStorage]:
    """Where each storage lies. The file gives counts of elements; their size comes from the pickle alone, so
    behind a storage of unknown type nothing can be located."""
    used = filter(None, map(storage_key, pickled.persistent_ids))
    item_sizes = {key.key: ITEM_SIZES[key.dtype] for key in used}
    places: dict[str, FileStorage] = {}
    for key in keys:
        if not isinstance(key, str) or key not in item_sizes:
            break
        if key in places:
            raise InputError(f"{source.path}: the storage {key} is listed twice", "The file is damaged or hostile.")
        count = int.from_bytes(source.read_at(position, 8), "little", signed=True)
        nbytes = count * item_sizes[key]
        if count < 0 or position + 8 + nbytes > source.size:
            raise InputError(
                f"{source.path}: the storage {key} claims {count:,} elements, more than the file holds",
                "The file is truncated; copy or download it again.",
            )
        places[key] = FileStorage(key, source, position + 8, nbytes)
        position += 8 + nbytes
    return places


# both


def _checkpoint(
    source: Source, container: Container, pickles: list[Pickled], content: Pickled, reader: TensorReader
) -> Checkpoint:
    contents = find_models(content.value, reader)

    words = {Container.ZIP: "zip", Container.LEGACY: "legacy container"}[container]
    return Checkpoint(
        path=str(source.path),
        format=f"PyTorch {describe(content.value, contents.models)} ({words})",
        container=container,
        models=tuple(contents.models),
        notes=tuple(contents.notes),
        list_references=lambda: with_unnamed(contents.references, content.value, reader),
        load_calls=load_calls.judge(call for pickled in pickles for call in pickled.calls),
        bytes_total=source.size,
        count_bytes_read=lambda: source.bytes_read,
        on_close=source.close,
    )


EXPORTED = re.compile(r"serialized_exported_program\.json|[^/]+/(archive_format|data/aotinductor/.*)", re.IGNORECASE)
"""Records by which torch.export.load knows its packages; it looks names up without regard to case."""


def is_exported(records: ZipRecords) -> bool:
    """Whether the records are those of torch.export.save, or of torch's packages of compiled code."""
    return any(map(EXPORTED.fullmatch, records.infos))


def is_torchscript(records: ZipRecords) -> bool:
    """Whether the records are those of torch.jit.save."""
    return records.root is not None and f"{records.root}constants.pkl" in records.infos


OTHER_ZIPS = (
    ("models/model.json", "a package of torch.export without its archive_format"),
    (".npy", "a NumPy archive (.npz)"),
    ("model.weights.h5", "a Keras archive"),
    ("[Content_Types].xml", "an Office document"),
)
"""Endings of record names that tell what else a zip file is."""


def explain_other_zip(path: Path, records: ZipRecords) -> InputError:
    """Why a zip file without data.pkl is not a checkpoint we read."""
    found = "a zip file without a data.pkl"
    for ending, words in OTHER_ZIPS:
        if any(name.endswith(ending) for name in records.infos):
            found = words
            break
    return InputError(
        f"{path}: {found}, not a checkpoint that normdoctor reads",
        "normdoctor reads files of torch.save, torch.jit.save and torch.export.save, safetensors and ONNX.",
    )
