"""A fold as GitHub Markdown. Names come from strangers: none can mention anybody, link anywhere or break a table."""

from __future__ import annotations

from collections.abc import Sequence

from normdoctor.folding.records import FoldReport, FoldRow
from normdoctor.reports.folding_wording import (
    kinds_line,
    left_groups,
    noise_line,
    proof_line,
    proof_rows,
    remarks,
    savings_line,
    verdict_line,
)
from normdoctor.reports.markdown import Column, Page, code_name, code_names, head_of, prose_of, row_maker
from normdoctor.reports.wording import plural

LINES_SHARE, OUTPUTS_SHARE, REASONS_SHARE = 0.2, 0.2, 0.4
"""Of the room that is left: so that however many there are, the norms are seen as well."""

OUTPUTS: list[Column] = [
    ("output", "---", lambda row: code_name(row[0])),
    ("shape", "---", lambda row: row[1]),
    ("error", "---:", lambda row: row[2]),
    ("noise", "---:", lambda row: row[3]),
    ("remark", "---", lambda row: prose_of(row[4])),
]

REASONS: list[Column] = [
    ("reason", "---", lambda group: code_name(group[0]) if group[0] else ""),
    ("norms", "---", lambda group: code_names(group[2])),
    ("why", "---", lambda group: prose_of(group[1])),
]

NORMS: list[Column] = [
    ("norm", "---", lambda row: code_name(row.norm)),
    ("kind", "---", lambda row: prose_of(row.kind)),
    ("what", "---", lambda row: row.verdict),
    ("into", "---", lambda row: code_name(row.code) if row.left and row.code else code_names(row.into)),
    ("through", "---", lambda row: prose_of(", ".join(row.through), 80)),
]


def render(report: FoldReport) -> str:
    """The report in less than 65,536 characters; what had to be left out is counted at the end."""
    page = Page()
    page.add(f"## normdoctor fold: {code_name(report.source)}")
    page.add(prose_of(f"{report.format}, {kinds_line(report.rows)}"))
    page.add(prose_of(verdict_line(report)))
    page.add(f"Proof: {prose_of(proof_line(report.proof))}")
    if rows := proof_rows(report.proof):
        page.add(prose_of(noise_line(report.proof)))
        page.add_rows(head_of(OUTPUTS), rows, row_maker(OUTPUTS), "output", share=OUTPUTS_SHARE)
    lines = [line for line in (savings_line(report), *remarks(report)) if line]
    if lines:
        page.add_rows("Also:\n", lines, lambda line: f"- {prose_of(line)}", "remark", share=LINES_SHARE)
    if groups := left_groups(report.rows):
        page.add_rows(head_of(REASONS), groups, row_maker(REASONS), "reason", share=REASONS_SHARE)
    if report.rows:
        head = f"<details><summary>{plural(len(report.rows), 'norm')}</summary>\n\n{head_of(NORMS)}"
        page.add_rows(head, _worst_first(report.rows), row_maker(NORMS), "norm", tail="\n\n</details>")
    return page.text()


def _worst_first(rows: Sequence[FoldRow]) -> list[FoldRow]:
    """Those that stay, then the others, each in the order of the graph."""
    return sorted(rows, key=lambda row: not row.left)
