"""Files are written once and whole: beside the target under another name, flushed, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from normdoctor.errors import InputError, UsageError


def check_output(output: Path, source: Path | None, overwrite: bool) -> None:
    """Raise UsageError where writing `output` would touch the input or an existing file without a word for it."""
    try:
        if source is not None and output.exists() and source.exists() and output.samefile(source):
            raise UsageError(f"{output}: is the input itself, which is never overwritten", "Choose another -o.")
        if output.is_dir():
            raise UsageError(f"{output}: is a folder", "Give the name of a file with -o.")
        if output.is_file() and not overwrite:
            raise UsageError(f"{output}: exists already", "Choose another -o, or add --overwrite.")
        if not output.parent.is_dir():
            raise UsageError(f"{output.parent}: no such folder", "Create it first.")
    except OSError as error:  # a folder that may not be searched, a name too long
        raise _unwritable(output, error) from None


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
