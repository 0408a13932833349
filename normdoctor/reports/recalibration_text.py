"""What a recalibration changed, for people. Reads well at 80 columns without colour."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from normdoctor.recalibration.judging import Verdict
from normdoctor.recalibration.records import DebiasReport, MeasuredReport
from normdoctor.reports.recalibration_extent import is_little, worst_first
from normdoctor.reports.recalibration_wording import (
    COLUMNS_MEAN,
    change_lines,
    data_line,
    debias_remarks,
    end_lines,
    judgement_lines,
    largest_residue_first,
    left_groups,
    method_line,
    next_command,
    number,
    ratio_words,
    repair_cells,
    residual_cell,
    residual_line,
    scarcity,
    time_line,
    values_cell,
)
from normdoctor.reports.terminal import (
    console_for,
    print_columns,
    print_left,
    print_more,
    print_paragraph,
    print_table,
    wrapped,
)
from normdoctor.reports.text import printable
from normdoctor.reports.wording import plural

ROWS_SHOWN, REPAIRS_SHOWN = 10, 12
NAMED = 4
VERDICT_STYLES = {Verdict.BETTER: "bold green", Verdict.WORSE: "bold red", Verdict.ALIKE: "bold"}


def write(report: DebiasReport | MeasuredReport, stream: TextIO, *, every_norm: bool = False) -> None:
    """The layers that changed most, those left alone with the reason, whether it is better, and the next command.

    every_norm: the table has all of them."""
    console = console_for(stream)
    if isinstance(report, DebiasReport):
        _debias(console, report, every_norm)
    else:
        _measured(console, report, every_norm)
    _end(console, report)


def _measured(console: Console, report: MeasuredReport, every_norm: bool) -> None:
    console.print(Text(printable(report.source), style="bold"))
    for line in filter(None, (report.format, data_line(report), method_line(report), time_line(report))):
        print_paragraph(console, line, 2)
    console.print()
    if (found := scarcity(report)) is not None:
        _labelled(console, "WARNING", found.words, "bold red" if found.severe else "bold yellow", gap=" ")
        console.print()
    if report.rows:
        _layers(console, report, every_norm)
    print_left(console, left_groups(report.left), every_norm)
    for line in change_lines(report):
        print_paragraph(console, line)
    console.print()
    for label, words in judgement_lines(report):
        _labelled(console, label, words, _style_of(report, label))
    if residual := residual_line(report):
        _labelled(console, "residual", residual, "bold")
    for note in report.notes:
        print_paragraph(console, f"note: {note}")
    console.print()


def _layers(console: Console, report: MeasuredReport, every_norm: bool) -> None:
    rows = worst_first(report.rows)[: None if every_norm else ROWS_SHOWN]
    columns = [
        ("layer", [row.layer for row in rows]),
        ("C", [str(row.channels) for row in rows]),
        ("broken", [str(row.broken or "") for row in rows]),
        ("shift", [number(row.shift) for row in rows]),
        ("max", [number(row.worst_shift) for row in rows]),
        ("variance", [ratio_words(row.ratio) for row in rows]),
        ("values", [values_cell(row) for row in rows]),
        ("s.e.", [number(row.standard_error) for row in rows]),
        ("residual", [residual_cell(row) for row in rows]),
    ]
    numbers = [title for title, _ in columns[1:]]
    styles = ["bold red" if row.broken else "" if is_little(row) else "yellow" for row in rows]
    print_columns(console, columns, fixed=numbers, right=numbers, styles=styles)
    print_more(console, len(report.rows) - len(rows), "layer")
    print_paragraph(console, COLUMNS_MEAN)
    console.print()


def _style_of(report: MeasuredReport, label: str) -> str:
    judgement = report.judgement
    if judgement is not None and judgement.accuracy is not None and label == "accuracy":
        return VERDICT_STYLES[judgement.accuracy.verdict]
    return "bold red" if label == "NaN or Inf" and judgement is not None and judgement.broken_after else "bold"


def _labelled(console: Console, label: str, words: str, style: str, gap: str = ": ") -> None:
    first, *others = wrapped(console, f"{label}{gap}{words}")
    head = Text(first)
    head.stylize(style, 0, len(label))
    for line in (head, *others):
        console.print(line)


def _debias(console: Console, report: DebiasReport, every_norm: bool) -> None:
    total = len(report.repairs)
    console.print(f"{printable(report.source)}: {plural(total, 'layer')} debiased")
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("layer", "residue", "median running_var", "updates"):
        table.add_column(title, justify="left" if title == "layer" else "right", overflow="fold")
    ranked = largest_residue_first(report.repairs)[: None if every_norm else REPAIRS_SHOWN]
    for repair in ranked:
        table.add_row(Text(printable(repair.layer.name)), *map(Text, repair_cells(repair)))
    print_table(console, table)
    if total > len(ranked):
        console.print(f"and {total - len(ranked)} more")
    console.print()
    for _, reason, names in left_groups((entry.layer.name, entry.reason) for entry in report.untouched):
        which = f" ({', '.join(names)})" if len(names) <= NAMED else ""
        console.print(printable(f"left alone: {plural(len(names), 'layer')}{which}: {reason}"))
    for line in debias_remarks(report):
        console.print(printable(line))


def _end(console: Console, report: DebiasReport | MeasuredReport) -> None:
    """Names of files and commands stay on one line however long, so that they can be copied."""
    for line in end_lines(report):
        console.print(Text(printable(line), style="" if report.output else "bold"))
    if (command := next_command(report)) is not None:
        console.print(f"next: {printable(command)}")
