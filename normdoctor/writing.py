"""Files are written once and whole: beside the target under another name, flushed, then renamed."""

from __future__ import annotations

import filecmp
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from normdoctor.errors import InputError, UsageError


def check_output(output: Path, source: Path | None, overwrite: bool, *, folder: bool = False) -> None:
    """Raise UsageError where writing `output` would touch the input or something that exists without a word for it.

    folder: a folder is to be written, from the folder `source`. With overwrite one that exists is replaced as a
    whole, so it must be empty or a checkpoint: a home folder is not lost by a slip."""
    try:
        if source is not None and output.exists() and source.exists() and output.samefile(source):
            raise UsageError(f"{output}: is the input itself, which is never overwritten", "Choose another -o.")
        if folder:
            _check_folder(output, source, overwrite)
        elif output.is_dir():
            raise UsageError(f"{output}: is a folder", "Give the name of a file with -o.")
        elif output.is_file() and not overwrite:
            raise UsageError(f"{output}: exists already", "Choose another -o, or add --overwrite.")
        if not output.parent.is_dir():
            raise UsageError(f"{output.parent}: no such folder", "Create it first.")
    except OSError as error:  # a folder that may not be searched, a name too long
        raise _unwritable(output, error) from None


def _check_folder(output: Path, source: Path | None, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file, and the input is a folder", "Give the name of a folder with -o.")
    if source is not None:
        inner, outer = output.resolve(), source.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise UsageError(
                f"{output}: lies in the input or holds it, and the input is never changed", "Choose another -o."
            )
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{output}: exists already", "Choose another -o, or add --overwrite.")
    from normdoctor.readers.folders import find_manifest

    try:
        find_manifest(output)
    except InputError:
        raise UsageError(
            f"{output}: is not one checkpoint, and --overwrite replaces a folder with all that is in it",
            "Choose another -o, or remove the folder yourself.",
        ) from None


def same_file(one: Path, other: Path) -> bool:
    """Whether both are names of one file that is there."""
    with suppress(OSError, ValueError):
        return one.samefile(other)
    return False


def check_text_output(output: Path, sources: Iterable[Path]) -> None:
    """Raise UsageError where a report would replace one of the files it is about, or anything that is no text."""
    for source in sources:
        check_output(output, source, overwrite=True)
    try:
        with output.open("rb") as file:
            is_text = not output.is_file() or b"\0" not in file.read(4096)
    except OSError:
        return  # nothing there to lose
    if not is_text:
        raise UsageError(f"{output}: exists and is not a report", "Choose another -o.")


def read_small(path: Path, most: int) -> bytes:
    """The bytes of a settings file or baseline. Raises UsageError for what is no ordinary file of that size."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: is not an ordinary file", "Give the path of a text file.")
        if path.stat().st_size > most:
            raise UsageError(f"{path}: has more than {most:,} bytes", "This is not the file that was meant.")
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file", "Check the path.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})", "Check it.") from None


def _unwritable(output: Path, error: OSError) -> InputError:
    return InputError(
        f"{output}: cannot be written ({error.strerror or error})",
        "Check the name, the permissions of the folder and the space left on the disk.",
    )


@contextmanager
def folder_beside(output: Path) -> Iterator[Path]:
    """A folder on the same disk as `output` that is gone, with all that is in it, when the block ends."""
    try:
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=".normdoctor-")
    except OSError as error:
        raise _unwritable(output, error) from None
    with folder as name:
        yield Path(name)


@contextmanager
def replacing_folder(output: Path) -> Iterator[Path]:
    """As `replacing` for a folder: an empty one, which takes the place of `output` with all that is in that."""
    with folder_beside(output) as around:
        made, old = around / "new", around / "old"
        try:
            made.mkdir()
            yield made
            if not os.path.lexists(output):
                made.rename(output)
            elif not _exchange(made, output):
                _replace_in_turn(made, output, old)
        except OSError as error:
            raise _unwritable(output, error) from None


def replace_in_place(source: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make the file or folder `source` anew at the path it is given, and put that in its place.

    What was there is kept: gives its path, NAME.bak, or NAME.bak2, ... where that is taken. A link stays one, and
    what it leads to is replaced. Rights are kept. Files that `write` puts beside the new one (external data of an
    ONNX model) replace theirs too if they differ, with backups of the same ending: to go back, rename all of them.

    The input is there whole at any moment, also when the process is killed: a folder changes places with the new
    one in one step where the system has such a step (Linux), else in two renames; several files are renamed one
    after the other, the model last. Where anything fails, nothing has changed and nothing is left over."""
    real = source.resolve()
    with folder_beside(real) as around:
        # External data is found from the name that was given, which may be a link to elsewhere.
        made = around / (source.name if real.is_file() else real.name)
        write(made)
        try:
            backup = _exchange_folders(made, real) if made.is_dir() else _exchange_files(around, made, source)
        except OSError as error:
            raise _unwritable(source, error) from None
    return source.with_name(backup.name) if backup.parent == source.parent.resolve() else backup


def _exchange_files(around: Path, made: Path, source: Path) -> Path:
    """Put everything below `around` in its place, `made` last. Gives the backup of `source`."""
    places = {path: source.parent / path.relative_to(around) for path in sorted(around.rglob("*")) if path.is_file()}
    places = {path: place.resolve() for path, place in places.items() if not _same_content(path, place)}
    model = source.resolve()
    places.pop(made, None)
    ending = _free_ending([*places.values(), model])
    done: list[tuple[Path, Path | None]] = []
    try:
        for path, place in [*places.items(), (made, model)]:
            place.parent.mkdir(parents=True, exist_ok=True)
            backup = place.with_name(place.name + ending) if place.exists() else None
            if backup is not None:
                _keep_rights(place, path)
                _back_up(place, backup)
            done.append((place, backup))
            path.replace(place)
    except BaseException:
        for place, kept in reversed(done):
            if kept is None:
                place.unlink(missing_ok=True)
                continue
            kept.replace(place)
            kept.unlink(missing_ok=True)  # two names of one file: then the line above does nothing
        raise
    return model.with_name(model.name + ending)


def _exchange_folders(made: Path, folder: Path) -> Path:
    """Put a folder in the place of another one. Gives the new place of that."""
    for path in (made, *made.rglob("*")):
        _keep_rights(folder / path.relative_to(made), path)
    backup = folder.with_name(folder.name + _free_ending([folder]))
    # The new one goes to the backup's name first, so that the exchange is the last step and leaves both in place.
    new = made.stat().st_ino
    try:
        made.rename(backup)
        if _exchange(backup, folder):
            return backup
        backup.rename(made)
        _replace_in_turn(made, folder, backup)
    except BaseException:
        if folder.exists() and folder.stat().st_ino == new:
            _exchange(backup, folder)
        if backup.exists() and backup.stat().st_ino == new:
            backup.rename(made)
        raise
    return backup


def _replace_in_turn(made: Path, output: Path, old: Path) -> None:
    """Rename `output` to `old` and `made` to `output`, both or none."""
    try:
        output.rename(old)
        made.rename(output)
    except BaseException:
        if not os.path.lexists(output) and os.path.lexists(old):
            old.rename(output)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change names in one step; False where the system or the disk has no such step."""
    import ctypes

    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # a C library before 2018
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    names = [os.fsencode(path) for path in (first, second)]
    return bool(renameat2(here, names[0], here, names[1], ctypes.c_uint(exchange)) == 0)


def _free_ending(places: Iterable[Path]) -> str:
    """.bak, .bak2, ...: the first that none of the paths has a file with."""
    known = list(places)
    for number in count(1):
        ending = ".bak" if number == 1 else f".bak{number}"
        if not any(os.path.lexists(place.with_name(place.name + ending)) for place in known):
            return ending
    raise AssertionError


def _back_up(path: Path, backup: Path) -> None:
    """A second name for the file, or a copy where the disk knows no such names."""
    try:
        try:
            backup.hardlink_to(path)
        except FileExistsError:
            raise
        except OSError:
            with path.open("rb") as source, backup.open("xb") as target:
                shutil.copyfileobj(source, target)
                os.fsync(target.fileno())
            shutil.copystat(path, backup)
    except FileExistsError:  # of somebody else, in this moment
        raise
    except BaseException:
        backup.unlink(missing_ok=True)
        raise


def _keep_rights(old: Path, new: Path) -> None:
    """Give the new file the owner, as far as that is allowed, and the mode of the old one, if there is one."""
    with suppress(FileNotFoundError):
        status = old.stat()
        with suppress(OSError, AttributeError):  # AttributeError: not on Windows
            os.chown(new, status.st_uid, status.st_gid)
        new.chmod(stat.S_IMODE(status.st_mode))


def _same_content(first: Path, second: Path) -> bool:
    return second.is_file() and filecmp.cmp(first, second, shallow=False)


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A temporary path that becomes `output` when the block ends well and vanishes when it does not."""
    try:
        handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name[:40]}.", suffix=".part")
    except OSError as error:
        raise _unwritable(output, error) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if output.exists() and not output.is_file():  # a device or a pipe: renaming would replace it
            with temporary.open("rb") as source, output.open("wb") as target:
                shutil.copyfileobj(source, target)
            return
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp gives 0600; the user expects an ordinary file
        temporary.replace(output)
    except OSError as error:
        raise _unwritable(output, error) from None
    finally:
        temporary.unlink(missing_ok=True)
