"""rich, set up the way all of normdoctor's output for people wants it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normdoctor.reports.text import printable
from normdoctor.reports.wording import plural

NARROWEST = 10
"""Characters that a column keeps."""

NAMED, REASONS_SHOWN = 8, 10


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


def print_columns(
    console: Console,
    columns: Sequence[tuple[str, Sequence[str]]],
    *,
    fixed: Sequence[str] = (),
    right: Sequence[str] = (),
    words: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> None:
    """Columns of text within the width: the widest that is not fixed gives way, words at the end, names in front.

    Columns without text are left out. fixed, right, words: titles; styles: one for each row."""
    kept = [(title, [printable(cell) for cell in cells]) for title, cells in columns if any(cells)]
    widths = {title: max(map(cell_len, (title, *cells))) for title, cells in kept}
    while sum(widths.values()) + 2 * (len(widths) - 1) > console.width:
        free = [title for title in widths if title not in fixed and widths[title] > NARROWEST]
        if not free:
            break
        widths[max(free, key=lambda title: widths[title])] -= 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, header_style="bold")
    for title, _ in kept:
        table.add_column(title, justify="right" if title in right else "left", no_wrap=True)
    for place, row in enumerate(zip(*(cells for _, cells in kept), strict=True)):
        cells = [
            _shortened(console, cell, widths[title], title in words) for (title, _), cell in zip(kept, row, strict=True)
        ]
        table.add_row(*map(Text, cells), style=styles[place] if styles else None)
    print_table(console, table)


def print_left(console: Console, groups: Sequence[tuple[str, str, Sequence[str]]], everything: bool) -> None:
    """Groups of (title or nothing, reason, names) of norms that stay as they are; the first ten, or everything."""
    for title, reason, names in groups[: None if everything else REASONS_SHOWN]:
        head = Text(printable(title) or "left", style="bold").append(
            f"   {plural(len(names), 'norm')}: ", style="not bold"
        )
        console.print(head.append(printable(_names(names, console.width - len(head.plain))), style="not bold"))
        print_paragraph(console, reason, 2)
    if len(groups) > REASONS_SHOWN and not everything:
        print_more(console, len(groups) - REASONS_SHOWN, "reason")
    if groups:
        console.print()


def print_more(console: Console, count: int, noun: str) -> None:
    """How many are not shown, if any."""
    if count:
        console.print(f"{ellipsis(console)} {plural(count, f'more {noun}')} (--all)")


def _names(names: Sequence[str], room: int) -> str:
    """As many names as fit on the line, at least one."""
    for count in range(min(len(names), NAMED), 0, -1):
        more = f" and {len(names) - count:,} more" if count < len(names) else ""
        line = ", ".join(names[:count]) + more
        if len(printable(line)) <= room:
            return line
    return line


def _shortened(console: Console, text: str, room: int, words: bool) -> str:
    """At most as wide as `room` letters. The end of a name tells it apart, so its beginning gives way."""
    if cell_len(text) <= room:
        return text
    mark = ellipsis(console)
    room -= len(mark)
    kept = text[:room] if words else text[-room:]
    while cell_len(kept) > room:  # some letters are two wide
        kept = kept[:-1] if words else kept[1:]
    return kept + mark if words else mark + kept


def ellipsis(console: Console) -> str:
    """What stands for what is left out, as far as the stream can hold it."""
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    try:
        "…".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "..."
    return "…"
