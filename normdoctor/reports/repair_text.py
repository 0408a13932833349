"""What a repair changed, for people."""

from __future__ import annotations

import shlex
from collections import defaultdict
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from normdoctor.layers import median
from normdoctor.recalibration import Recalibration
from normdoctor.recalibration.debias import Repair
from normdoctor.reports.text import printable
from normdoctor.reports.wording import plural

SHOWN = 12
NAMED = 4


def write(result: Recalibration, stream: TextIO) -> None:
    """A table of the repaired layers, those left alone with the reason, and the next command."""
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    total = len(result.repairs)
    console.print(f"{printable(result.source)}: {total} layer{'s' if total != 1 else ''} debiased", soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("layer", "residue", "median running_var", "updates"):
        table.add_column(title, justify="left" if title == "layer" else "right", overflow="fold")
    ranked = sorted(result.repairs, key=lambda repair: -repair.residue)
    for repair in ranked[:SHOWN]:
        table.add_row(*(Text(cell) for cell in _row(repair)))
    console.print(table)
    if total > SHOWN:
        console.print(f"and {total - SHOWN} more")
    console.print()
    left: dict[str, list[str]] = defaultdict(list)
    for entry in result.untouched:
        left[entry.reason].append(entry.layer.name)
    for reason, names in left.items():
        which = f" ({', '.join(names)})" if len(names) <= NAMED else ""
        console.print(printable(f"left alone: {plural(len(names), 'layer')}{which}: {reason}"), soft_wrap=True)
    for note in result.notes:
        console.print(f"note: {printable(note)}", soft_wrap=True)
    if not result.recognisable:
        console.print("note: no counter was raised; do not debias the result again", soft_wrap=True)
    if result.path is not None:
        path = printable(str(result.path))
        console.print(f"wrote {path}", soft_wrap=True)
        console.print(f"next: normdoctor inspect {printable(shlex.quote(str(result.path)))}", soft_wrap=True)


def _row(repair: Repair) -> tuple[str, str, str, str]:
    before = repair.layer.numbers.var
    assert before is not None
    updates = f"{repair.updates:,}"
    if repair.counter is not None and repair.counter != repair.updates:
        updates += f" -> {repair.counter:,}"
    change = f"{median(before):.3g} -> {median(repair.running_var):.3g}"
    return printable(repair.layer.name), f"{repair.residue:.1%}", change, updates
