"""Folders: which of them is one checkpoint, and the checkpoints below those that are not."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from normdoctor.errors import InputError
from normdoctor.readers import READABLE, distributed, sharded, torch_pickle
from normdoctor.readers.arrays import URL, Source
from normdoctor.readers.safetensors import is_safetensors

MAX_TARGETS = 10_000
MAX_ENTRIES = 1_000_000

TRAINING_STATE = re.compile(
    r"^(optimizer|scheduler|lr_scheduler|scaler|rng_state.*|random_states.*|training_args|sampler.*)\.(pt|pth|bin|pkl)$"
    r"|optim_states\.pt$"
)
"""Files that transformers, accelerate and DeepSpeed write beside a model. torch.save wrote them, so that only their
names tell them from models, and an optimizer's file is the largest of all."""

OPTIMIZER_FOLDER = re.compile(r"^optimizer(_\d+)?$")
"""Where accelerate and transformers keep an optimizer as a distributed checkpoint."""

MODEL_SUFFIXES = frozenset({".pt", ".bin", ".pth", ".ckpt", ".safetensors", ".onnx", ".pt2", ".ts", ".jit"})
"""What is empty, a Git LFS pointer, or cannot be opened under such a name is reported, not passed over."""

LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Discovery:
    """The checkpoints that were found, each a path for open_checkpoint."""

    targets: tuple[Path, ...]
    """In the order of what was given, and by name within a folder."""
    passed_over: int
    """Files in searched folders that hold no model."""


@dataclass
class _Search:
    """What a search has met so far."""

    found: list[tuple[Path, Path]] = field(default_factory=list)
    """Each target and the file that stands for it: a folder's index."""
    parts: set[Path] = field(default_factory=set)
    """Shards: parts of a target."""
    given: Path | None = None
    """The folder that was named, if it was one: what it holds is wanted."""
    folders: set[tuple[int, int]] = field(default_factory=set)
    """Device and inode of the folders entered, so that links cannot lead round and round."""
    entries: int = 0
    passed_over: int = 0

    def add(self, target: Path, file: Path) -> None:
        self.found.append((target, file))
        if len(self.found) > MAX_TARGETS:
            raise InputError(f"{target}: more than {MAX_TARGETS:,} checkpoints were found", "Search a smaller folder.")

    def count_entry(self, where: Path) -> None:
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise InputError(f"{where}: more than {MAX_ENTRIES:,} files were met", "Search a smaller folder.")


def find_checkpoints(paths: Iterable[Path | str]) -> Discovery:
    """The checkpoints that files, folders and globs (** included) stand for.

    A file that is named is a target whatever it holds. In folders and in what globs match, the content decides
    (for ONNX, which has no mark, the suffix as well), and hidden files and folders are left out. A sharded or
    distributed checkpoint is one target. A file that is reached in two ways is listed once.

    Raises InputError for a folder or glob that holds no checkpoint, or far too many files."""
    found: dict[Path, Path] = {}
    passed_over = 0
    for given in paths:
        path = Path(given)
        if not os.path.lexists(path) and glob.has_magic(str(given)) and not URL.match(str(given)):
            search = _search(_Search(), _expand(path), str(given))
        elif _is_folder(path):
            search = _search(_Search(given=path), [path], str(given))
        else:
            search = _Search(found=[(path, path)])
        passed_over += search.passed_over
        for target, file in search.found:
            found.setdefault(_resolved(file), target)
    return Discovery(tuple(found.values()), passed_over)


def find_manifest(folder: Path) -> Path:
    """The manifest of a folder that is one checkpoint. Of a model in both formats, the safetensors.

    Raises InputError for a folder that is none, or several."""
    files = _listed(folder)
    listed = _manifests(files)
    safe = [path for path in listed if ".safetensors." in path.name]
    if len(listed) == 2 and len(safe) == 1 and _copy_in_torch(safe[0]) in listed:
        return safe[0]  # as transformers and diffusers choose
    if len(listed) > 1:
        raise InputError(
            f"{folder}: holds {len(listed)} checkpoints: {', '.join(path.name for path in listed)}",
            f"Name one of them, or see them all with: normdoctor inspect {folder}",
        )
    if listed:
        return listed[0]
    if any(path.suffix == distributed.PART_SUFFIX for path in files):
        raise InputError(
            f"{folder}: is a torch distributed checkpoint without a {distributed.METADATA} that can be read",
            "It is written last, so the save was not finished, or a copy left hidden files out.",
        )
    raise InputError(
        f"{folder}: is a folder of {_count(len(files))}, not one checkpoint",
        f"Name a file in it, or inspect all of them: normdoctor inspect {folder} (in Python: nd.find_checkpoints)",
    )


def folder_of(path: Path) -> Path | None:
    """The folder of a checkpoint in several files, named by itself or by its index; None for a checkpoint in one."""
    if _is_folder(path):
        return path
    with suppress(InputError, OSError, ValueError):  # opening it then says what is wrong
        if _is_manifest(path):
            return path.parent
    return None


def _copy_in_torch(index: Path) -> Path:
    """What the index of the same model in torch.save files is called."""
    name = index.name.replace(".safetensors.", ".bin.")
    return index.with_name(f"pytorch_{name}" if name.startswith("model.") else name)


def _manifests(files: Iterable[Path]) -> list[Path]:
    """The indexes of sharded checkpoints and the metadata of a distributed one among the files of a folder."""
    return [path for path in files if _is_manifest(path)]


def _is_manifest(path: Path) -> bool:
    """Whether name and content are those of an index, or of a distributed checkpoint's metadata."""
    if path.name == distributed.METADATA:
        begins = distributed.is_metadata
    elif sharded.INDEX_NAME.search(path.name):
        begins = sharded.is_index
    else:
        return False
    try:
        with Source(path) as source:
            return begins(source)
    except InputError:
        return False


def _listed(folder: Path) -> list[Path]:
    """What lies in a folder, by name; nothing where it may not be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((folder / entry.name for entry in islice(entries, MAX_ENTRIES)), key=_by_name)
    except OSError:
        return []


def _by_name(path: Path) -> tuple[object, ...]:
    return sharded.natural_order(path.name)


def _expand(pattern: Path) -> list[Path]:
    """What a glob matches, by name. Hidden names only where the pattern names them."""
    anchor = Path(pattern.anchor)
    relative = pattern.relative_to(anchor) if pattern.anchor else pattern
    hidden = [part for part in relative.parts if part.startswith(".")]
    try:
        matches = list(islice(anchor.glob(str(relative)), MAX_ENTRIES))
    except (ValueError, OSError, NotImplementedError) as error:
        raise InputError(
            f"{pattern}: cannot be searched ({error})", "Quote it so that the shell leaves it alone."
        ) from None
    shown = [
        path
        for path in matches
        if all(
            any(fnmatchcase(part, wanted) for wanted in hidden)
            for part in path.relative_to(anchor).parts
            if part.startswith(".")
        )
    ]
    return sorted(shown, key=lambda path: sharded.natural_order(str(path)))


def _search(search: _Search, starts: Iterable[Path], given: str) -> _Search:
    """Everything at and below `starts`, added to a new search. Raises InputError where that is nothing."""
    stack = list(starts)[::-1]
    matched = len(stack)
    while stack:
        path = stack.pop()
        search.count_entry(path)
        if _is_folder(path):
            stack += _enter(path, search)[::-1]
        else:
            _look_at(path, search)
    search.found = [(target, file) for target, file in search.found if _absolute(file) not in search.parts]
    if search.found:
        return search
    if not matched:
        raise InputError(f"{given}: matches nothing", "Check the path; ** stands for any number of folders.")
    raise InputError(f"{given}: no checkpoint among {_count(search.entries)}", READABLE)


def _enter(folder: Path, search: _Search) -> list[Path]:
    """Add the checkpoints that the folder itself is; what is to be looked at below it."""
    try:
        status = folder.stat()
    except OSError:
        return []
    if (status.st_dev, status.st_ino) in search.folders:
        return []
    search.folders.add((status.st_dev, status.st_ino))
    inside = _listed(folder)
    names = {path.name for path in inside}
    own = _manifests(inside)
    if own and OPTIMIZER_FOLDER.match(folder.name) and folder != search.given:
        search.passed_over += len(own)
    elif own:
        for manifest in own:
            search.add(folder if len(own) == 1 else manifest, manifest)
            search.parts |= _parts_of(manifest)
    elif any(name.endswith(distributed.PART_SUFFIX) for name in names):
        search.add(folder, folder)  # without its metadata: opening it says so
    if {"blobs", "snapshots"} <= names:
        names.discard("blobs")  # huggingface_hub's cache: all of it is linked to from the snapshots
    return [
        path
        for path in inside
        if path.name in names
        and not path.name.startswith(".")
        and path.suffix != distributed.PART_SUFFIX
        and path not in own
    ]


def _parts_of(manifest: Path) -> set[Path]:
    if manifest.name == distributed.METADATA:
        return set()
    try:
        with Source(manifest) as source:
            return {_absolute(shard) for shard in sharded.read_index(source).values()}
    except InputError:
        return set()  # opening it says why


def _look_at(path: Path, search: _Search) -> None:
    """Add a file that holds a model, count any other."""
    if TRAINING_STATE.search(path.name) or path.suffix == distributed.PART_SUFFIX or not _is_candidate(path):
        search.passed_over += 1
        return
    search.add(path, path)
    if _is_manifest(path):
        search.parts |= _parts_of(path)


def _is_candidate(path: Path) -> bool:
    """Whether a file begins as one that normdoctor reads, or has a model's name and is not what it should be."""
    named = path.suffix.lower() in MODEL_SUFFIXES
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with Source(path) as source:
            if source.size == 0 or source.read_at(0, min(source.size, len(LFS_POINTER))) == LFS_POINTER:
                return named
            if torch_pickle.is_zip(source):
                return _is_zipped_model(source, named)
            return (
                torch_pickle.is_legacy(source)
                or is_safetensors(source)
                or path.suffix.lower() == ".onnx"
                or _is_manifest(path)
            )
    except (InputError, OSError, ValueError):
        return named


def _is_zipped_model(source: Source, named: bool) -> bool:
    try:
        records = torch_pickle.ZipRecords(source)
        return records.root is not None or torch_pickle.is_exported(records)
    except InputError:
        return named  # truncated, or made to mislead: opening it says so


def _count(entries: int) -> str:
    return "one file or folder" if entries == 1 else f"{entries:,} files and folders"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _absolute(path: Path) -> Path:
    return path.absolute()


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links
        return path
