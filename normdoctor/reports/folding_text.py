"""What a fold did, for people. Reads well at 80 columns without colour."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from normdoctor.flow.plan import Verdict
from normdoctor.folding.records import FoldReport, FoldRow, ProofState
from normdoctor.reports.folding_wording import (
    kinds_line,
    left_groups,
    most_interesting,
    named,
    noise_line,
    proof_line,
    proof_rows,
    remarks,
    savings_line,
    verdict_line,
)
from normdoctor.reports.terminal import console_for, print_paragraph, print_table, wrapped
from normdoctor.reports.text import printable
from normdoctor.reports.wording import plural

ROWS_SHOWN, OUTPUTS_SHOWN, REASONS_SHOWN = 10, 6, 10
NARROWEST = 10
WORDS = ("through", "remark")
"""Columns that hold no names."""

STYLES = {Verdict.LEFT.value: "yellow", Verdict.DECOMPOSED.value: "yellow"}
PROOF_STYLES = {ProofState.VERIFIED: "bold green", ProofState.FAILED: "bold red", ProofState.UNVERIFIED: "bold yellow"}


def write(report: FoldReport, stream: TextIO, *, every_norm: bool = False) -> None:
    """The norms, why some stay, what it saved, the proof and the next command.

    every_norm: the table has all of them; otherwise the ten that most need to be seen."""
    console = console_for(stream)
    console.print(Text(printable(report.source), style="bold"))
    print_paragraph(console, f"{report.format}   {kinds_line(report.rows)}", 2)
    console.print()
    if report.rows:
        _norms(console, report, every_norm)
        _reasons(console, report.rows, every_norm)
    print_paragraph(console, verdict_line(report))
    for line in filter(None, (savings_line(report), *remarks(report))):
        print_paragraph(console, line)
    _proof(console, report, every_norm)
    _end(console, report)


def _norms(console: Console, report: FoldReport, every_norm: bool) -> None:
    rows = most_interesting(report.rows, None if every_norm else ROWS_SHOWN)
    columns = [
        ("norm", [row.norm for row in rows]),
        ("what", [row.verdict for row in rows]),
        ("into", [f"({row.code})" if row.left else named(row.into) for row in rows]),
        ("through", [", ".join(row.through) for row in rows]),
    ]
    _table(console, columns, fixed=("what",), styles=[STYLES.get(row.verdict, "") for row in rows])
    if len(rows) < len(report.rows):
        console.print(f"{_ellipsis(console)} {plural(len(report.rows) - len(rows), 'more norm')} (--all)")
    console.print()


def _table(
    console: Console,
    columns: Sequence[tuple[str, Sequence[str]]],
    *,
    fixed: Sequence[str] = (),
    right: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> None:
    """Columns of text within the width: the widest that is not fixed gives way, words at the end, names in front."""
    kept = [(title, [printable(cell) for cell in cells]) for title, cells in columns if any(cells)]
    widths = {title: max(map(len, (title, *cells))) for title, cells in kept}
    while sum(widths.values()) + 2 * (len(widths) - 1) > console.width:
        free = [title for title in widths if title not in fixed and widths[title] > NARROWEST]
        if not free:
            break
        widths[max(free, key=lambda title: widths[title])] -= 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, header_style="bold")
    for title, _ in kept:
        table.add_column(title, justify="right" if title in right else "left", no_wrap=True)
    for place, row in enumerate(zip(*(cells for _, cells in kept), strict=True)):
        cells = [_shortened(console, title, cell, widths[title]) for (title, _), cell in zip(kept, row, strict=True)]
        table.add_row(*map(Text, cells), style=styles[place] if styles else None)
    print_table(console, table)


def _reasons(console: Console, rows: Sequence[FoldRow], every_norm: bool) -> None:
    groups = left_groups(rows)
    for code, reason, names in groups[: None if every_norm else REASONS_SHOWN]:
        head = Text(printable(code) or "left", style="bold").append(
            f"   {plural(len(names), 'norm')}: ", style="not bold"
        )
        console.print(head.append(printable(_names(names, console.width - len(head.plain))), style="not bold"))
        print_paragraph(console, reason, 2)
    if len(groups) > REASONS_SHOWN and not every_norm:
        console.print(f"{_ellipsis(console)} {plural(len(groups) - REASONS_SHOWN, 'more reason')} (--all)")
    if groups:
        console.print()


def _names(names: Sequence[str], room: int) -> str:
    """As many names as fit on the line, at least one."""
    for count in range(min(len(names), 8), 0, -1):
        more = f" and {len(names) - count:,} more" if count < len(names) else ""
        line = ", ".join(names[:count]) + more
        if len(printable(line)) <= room:
            return line
    return line


def _proof(console: Console, report: FoldReport, every_norm: bool) -> None:
    proof = report.proof
    if proof.state is ProofState.NOT_NEEDED:
        return
    console.print()
    state = proof.state.value
    first, *others = wrapped(console, state.upper() + proof_line(proof).removeprefix(state))
    head = Text(first)
    head.stylize(PROOF_STYLES.get(proof.state, "bold"), 0, len(state))
    for line in (head, *others):
        console.print(line)
    rows = proof_rows(proof)
    shown = rows[: None if every_norm else OUTPUTS_SHOWN]
    if shown:
        titles = ("output", "shape", "error", "noise", "remark")
        columns = [(title, [row[place] for row in shown]) for place, title in enumerate(titles)]
        _table(console, columns, fixed=("error", "noise"), right=("error", "noise"))
        if len(shown) < len(rows):
            console.print(f"{_ellipsis(console)} {plural(len(rows) - len(shown), 'more output')} (--all)")
        print_paragraph(console, noise_line(proof))


def _end(console: Console, report: FoldReport) -> None:
    """Where the result is. A command stays on one line however long, so that it can be copied."""
    if report.dry_run:
        console.print("nothing was written (--dry-run)")
    elif report.proof.state is ProofState.FAILED:
        console.print("nothing was written")
    elif report.output is not None:
        console.print(f"{'copied to' if report.unchanged else 'wrote'} {printable(report.output)}")
        console.print(f"next: normdoctor inspect {printable(shlex.quote(report.output))}")


def _shortened(console: Console, title: str, text: str, room: int) -> str:
    """At most `room` characters. The end of a name tells it apart, so its beginning gives way."""
    mark = _ellipsis(console)
    if len(text) <= room:
        return text
    return text[: room - len(mark)] + mark if title in WORDS else mark + text[-(room - len(mark)) :]


def _ellipsis(console: Console) -> str:
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    try:
        "…".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "..."
    return "…"
