"""What a fold did, for people. Reads well at 80 columns without colour."""

from __future__ import annotations

import shlex
from typing import TextIO

from rich.console import Console
from rich.text import Text

from normdoctor.folding.records import FoldReport, ProofState
from normdoctor.places import Verdict
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
from normdoctor.reports.terminal import console_for, print_columns, print_left, print_more, print_paragraph, wrapped
from normdoctor.reports.text import printable

ROWS_SHOWN, OUTPUTS_SHOWN = 10, 6
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
        print_left(console, left_groups(report.rows), every_norm)
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
    styles = [STYLES.get(row.verdict, "") for row in rows]
    print_columns(console, columns, fixed=("what",), words=WORDS, styles=styles)
    print_more(console, len(report.rows) - len(rows), "norm")
    console.print()


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
        print_columns(console, columns, fixed=("error", "noise"), right=("error", "noise"), words=WORDS)
        print_more(console, len(rows) - len(shown), "output")
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
