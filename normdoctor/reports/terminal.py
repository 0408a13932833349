"""rich, set up the way all of normdoctor's output for people wants it."""

from __future__ import annotations

import textwrap
from typing import TextIO

from rich.console import Console
from rich.table import Table

from normdoctor.reports.text import printable


def console_for(stream: TextIO) -> Console:
    """Writes words as they are: colour only on a terminal, no markup, no lines broken by itself."""
    return _Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1, which here means findings


def wrapped(console: Console, words: str, indent: int = 0) -> list[str]:
    """The words in lines of the console's width, without control characters. Long names stay whole."""
    pad = " " * indent
    return textwrap.wrap(
        printable(words),
        max(40, console.width),
        initial_indent=pad,
        subsequent_indent=pad,
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_paragraph(console: Console, words: str, indent: int = 0) -> None:
    """The words in lines of the console's width, as `wrapped` breaks them."""
    for line in wrapped(console, words, indent):
        console.print(line)


def print_table(console: Console, table: Table) -> None:
    """The table within the width of the console, without the blanks that fill up its last column."""
    with console.capture() as captured:
        console.print(table, soft_wrap=False)
    for line in captured.get().splitlines():
        console.file.write(line.rstrip() + "\n")
