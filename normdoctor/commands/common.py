"""What every command shares: options of a few words, lines on stderr, a report to stdout or into a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from normdoctor.errors import NormDoctorError, UsageError, did_you_mean

if TYPE_CHECKING:
    from normdoctor.findings import Failure

WIDEST_METAVAR = 24
"""Where the help would break words at 80 columns."""


def choice(name: str, words: type[StrEnum], help: str, panel: str | None = None) -> Any:
    """The option `name`, which takes one of `words` and guesses what was meant by any other."""

    def parse(given: str) -> StrEnum:
        try:
            return words(given)
        except ValueError:
            known = ", ".join(words)
            hint = did_you_mean(given, words).strip()
            raise UsageError(f"{name}: {given!r} is not one of {known}", hint) from None

    metavar = "|".join(words)
    if len(metavar) > WIDEST_METAVAR:
        metavar, help = "NAME", f"{help} One of: {', '.join(words)}."
    return typer.Option(name, parser=parse, metavar=metavar, help=help, rich_help_panel=panel)


def complain(error: NormDoctorError | Failure) -> None:
    """The error and its hint, on stderr."""
    note(error.message, error.hint)


def note(message: str, hint: str = "") -> None:
    """A line on stderr, and what to do about it."""
    from normdoctor.reports.text import printable

    line = f"normdoctor: {printable(message)}"
    with suppress(OSError):  # nobody reads stderr; the exit code still tells
        print(line + (f"\n  hint: {printable(hint)}" if hint else ""), file=sys.stderr, flush=True)


@contextmanager
def stdout() -> Iterator[TextIO]:
    """sys.stdout to write to. A reader that stops early (| head) is no failure; a full disk is."""
    if sys.stdout is None:
        raise NormDoctorError("there is no stdout to write to", "Add -o FILE.")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise NormDoctorError(f"the output cannot be written ({error.strerror or error})", "") from None


@contextmanager
def written(output: Path | None) -> Iterator[TextIO]:
    """A stream whose content becomes the file `output` when it is whole; stdout where there is none."""
    if output is None:
        with stdout() as stream:
            yield stream
        return
    import io

    from normdoctor.writing import replacing

    buffer = io.StringIO()
    yield buffer
    with replacing(output) as temporary:
        temporary.write_text(buffer.getvalue(), encoding="utf-8", newline="")  # CSV has line ends of its own
