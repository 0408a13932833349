"""New buffer values into a copy of a checkpoint in several files: shards with an index, or a distributed checkpoint.

The payload of the changed tensors and their checksums differ; all other files are copied byte for byte.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from normdoctor.errors import RefusedError, UsageError
from normdoctor.layers import Checkpoint
from normdoctor.readers.arrays import ITEM_SIZES, FileStorage, Source, StoredArray, unreadable
from normdoctor.readers.distributed import METADATA, ChunkedArray, Place
from normdoctor.readers.folders import find_manifest
from normdoctor.readers.sharded import INDEX_NAME
from normdoctor.recalibration.write_back import (
    Change,
    Patch,
    apply,
    check_unshared,
    copy_patched,
    encode_checked,
    patch_of,
)
from normdoctor.writing import replacing_folder

MAX_ENTRIES = 100_000
"""Files and folders below a checkpoint's folder; more are a link that leads too far."""

CHUNK = 1 << 22

OWN_CHUNKS = "Load it and save it again with torch.distributed.checkpoint.save."


@dataclass
class _Work:
    """What is to be done to one file of the folder."""

    whole: list[Patch] = field(default_factory=list)
    """Places in the file itself."""
    archives: dict[Place, list[Patch]] = field(default_factory=dict)
    """Places in archives inside of it."""


def write_folder(checkpoint: Checkpoint, changes: Sequence[Change], output: Path) -> tuple[str, ...]:
    """A copy of the checkpoint's folder as `output`, with the changes in it; whole or not at all. Gives notes.

    Everything in the folder is copied, subfolders and hidden files too, with the rights of new files. Of a link,
    what it leads to is copied; one that leads nowhere stays as it is. A folder that is there is replaced.

    Raises RefusedError where `write_back` would, for chunks that share their bytes with others, and for what
    cannot be copied: pipes, devices, links that lead round and round."""
    path = Path(checkpoint.path)
    folder = path if path.is_dir() else path.parent
    if output.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{output}: lies in the folder that is copied", "Choose another -o.")
    check_unshared(changes, checkpoint.list_references())
    work = _work(changes)
    with replacing_folder(output) as made:
        for source, name in list(_files(folder, _identity(made))):  # what is refused is refused before copying
            target = made / name
            if source.is_dir():
                target.mkdir()
            elif not source.exists():
                target.symlink_to(source.readlink())
            else:
                _copy(source, target, work.pop(source, None))
        if work:
            raise RefusedError(f"{next(iter(work))}: vanished while the folder was copied", "Try again.")
    return _notes(folder, path)


def _work(changes: Sequence[Change]) -> dict[Path, _Work]:
    """File → its patches. Nothing is written yet: what is refused is refused here."""
    work: dict[Path, _Work] = {}
    for change in changes:
        if isinstance(change.array, ChunkedArray):
            for place, patch in _chunk_patches(change, change.array):
                archives = work.setdefault(place.file, _Work()).archives
                archives.setdefault(place, []).append(patch)
            continue
        patch = patch_of(change)
        storage = patch.storage if isinstance(patch.storage, FileStorage) else patch.storage.packed
        work.setdefault(storage.source.path, _Work()).whole.append(patch)
    return work


def _chunk_patches(change: Change, array: ChunkedArray) -> Iterator[tuple[Place, Patch]]:
    """The new bytes of every chunk of a tensor, and the archive it lies in."""
    name = f"{change.layer.name}.{change.field}"
    array.numpy()  # raises where the chunks overlap or leave gaps
    data = np.frombuffer(encode_checked(change), f"V{ITEM_SIZES[array.dtype]}").reshape(array.shape)
    for part in array.slices():
        stored = part.array
        if part.place in array.parts.overlapping:
            raise RefusedError(f"{name}: shares its bytes in {part.place.file.name} with another entry", OWN_CHUNKS)
        if not stored.is_contiguous or not isinstance(stored.storage, FileStorage):
            raise RefusedError(f"{name}: a chunk of it is expanded or strided", OWN_CHUNKS)
        raw = data[part.region].tobytes()
        if stored.big_endian:
            raw = _swapped(raw, stored)
        yield part.place, Patch(stored.storage, stored.offset * stored.item_size, raw)


def _swapped(raw: bytes, array: StoredArray) -> bytes:
    return np.frombuffer(raw, f"u{array.item_size}").byteswap().tobytes()


def _files(folder: Path, made: tuple[int, int]) -> Iterator[tuple[Path, Path]]:
    """Everything below `folder` with its place in it, folders before what they hold.

    made: the folder that the copy goes to, which a link could lead to."""
    entries = 0
    inside: list[tuple[Path, Path, frozenset[tuple[int, int]]]] = [
        (folder, Path(), frozenset({made, _identity(folder)}))
    ]
    above = {_identity(parent) for parent in folder.resolve().parents}
    while inside:
        where, name, entered = inside.pop()
        for path in _listed(where):
            entries += 1
            if entries > MAX_ENTRIES:
                raise RefusedError(
                    f"{folder}: holds more than {MAX_ENTRIES:,} files and folders, links followed",
                    "Copy the checkpoint alone to a folder of its own first.",
                )
            if path.is_dir():
                identity = _identity(path)
                if identity in entered or identity in above:
                    raise RefusedError(f"{path}: is a link to a folder that it lies in", "Remove it first.")
                inside.append((path, name / path.name, entered | {identity}))
            elif path.exists() and not path.is_file():
                raise RefusedError(f"{path}: is no ordinary file, so the folder is not copied", "Remove it first.")
            yield path, name / path.name


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _copy(source: Path, target: Path, work: _Work | None) -> None:
    """A copy of one file, flushed to the disk, with what is to be done to it done."""
    try:
        original = source.open("rb")
    except OSError as error:
        raise unreadable(source, error) from None
    with original:
        if work is not None and work.whole:
            copy_patched(source, target, work.whole)
        else:
            with target.open("xb") as file:
                shutil.copyfileobj(original, file, CHUNK)
    with target.open("rb+") as file:
        if work is not None and work.archives:
            with Source(source) as whole:
                for place, patches in work.archives.items():
                    apply(patches, file, whole.part(place.offset, place.length, "a chunk"), place.offset)
        file.flush()
        os.fsync(file.fileno())


def _notes(folder: Path, path: Path) -> tuple[str, ...]:
    """Says of the same model in another format, which transformers keeps in one folder, that it was not changed."""
    used = find_manifest(folder) if path == folder else path
    others = [entry.name for entry in _listed(folder) if INDEX_NAME.search(entry.name) and entry.name != used.name]
    if used.name == METADATA or not others:
        return ()
    return (f"{', '.join(others)}: another copy of the model in the same folder, which was not changed",)
