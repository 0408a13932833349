"""A recalibration as GitHub Markdown. Names come from strangers: none can mention anybody, link anywhere or break a
table."""

from __future__ import annotations

from collections.abc import Sequence

from normdoctor.recalibration.records import DebiasReport, MeasuredReport
from normdoctor.reports.markdown import Column, Page, code_name, code_names, head_of, prose_of, row_maker
from normdoctor.reports.recalibration_extent import worst_first
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
from normdoctor.reports.text import markdown_code
from normdoctor.reports.wording import plural

LINES_SHARE, REASONS_SHARE = 0.2, 0.4
"""Of the room that is left: so that however many there are, the layers are seen as well."""

LAYERS: list[Column] = [
    ("layer", "---", lambda row: code_name(row.layer)),
    ("channels", "---:", lambda row: f"{row.channels:,}"),
    ("broken", "---:", lambda row: f"**{row.broken:,}**" if row.broken else ""),
    ("shift", "---:", lambda row: number(row.shift)),
    ("max", "---:", lambda row: number(row.worst_shift)),
    ("variance", "---:", lambda row: ratio_words(row.ratio)),
    ("values", "---:", values_cell),
    ("s.e.", "---:", lambda row: number(row.standard_error)),
    ("residual", "---:", residual_cell),
]

REPAIRS: list[Column] = [
    ("layer", "---", lambda repair: code_name(repair.layer.name)),
    ("residue", "---:", lambda repair: repair_cells(repair)[0]),
    ("median running_var", "---:", lambda repair: prose_of(repair_cells(repair)[1])),
    ("updates", "---:", lambda repair: prose_of(repair_cells(repair)[2])),
]

LEFT: list[Column] = [
    ("left", "---", lambda group: code_names(group[2])),
    ("why", "---", lambda group: prose_of(group[1])),
]


def render(report: DebiasReport | MeasuredReport) -> str:
    """The report in less than 65,536 characters; what had to be left out is counted at the end."""
    page = Page()
    page.add(f"## normdoctor recalibrate: {code_name(report.source)}")
    if isinstance(report, DebiasReport):
        _debias(page, report)
    else:
        _measured(page, report)
    return page.text()


def _measured(page: Page, report: MeasuredReport) -> None:
    about = (report.format, data_line(report), method_line(report), time_line(report))
    page.add("\n".join(f"- {prose_of(line)}" for line in about if line))
    if (found := scarcity(report)) is not None:
        page.add(f"**WARNING** {prose_of(found.words)}")
    page.add("\n".join(f"- {label}: {prose_of(words)}" for label, words in judgement_lines(report)))
    page.add(prose_of(" ".join(change_lines(report))))
    lines = [*filter(None, (residual_line(report),)), *(f"note: {note}" for note in report.notes)]
    _add_lines(page, [*lines, *end_lines(report)])
    if (command := next_command(report)) is not None:
        page.add(f"next: {markdown_code(command)}")
    _add_left(page, left_groups(report.left))
    if report.rows:
        page.add_rows(
            f"<details><summary>{plural(len(report.rows), 'layer')}</summary>\n\n{COLUMNS_MEAN}\n\n{head_of(LAYERS)}",
            worst_first(report.rows),
            row_maker(LAYERS),
            "layer",
            tail="\n\n</details>",
        )


def _debias(page: Page, report: DebiasReport) -> None:
    page.add(f"{plural(len(report.repairs), 'layer')} debiased")
    _add_lines(page, [*debias_remarks(report), *end_lines(report)])
    _add_left(page, left_groups((entry.layer.name, entry.reason) for entry in report.untouched))
    page.add_rows(head_of(REPAIRS), largest_residue_first(report.repairs), row_maker(REPAIRS), "layer")


def _add_lines(page: Page, lines: Sequence[str]) -> None:
    if lines:
        page.add_rows("Also:\n", lines, lambda line: f"- {prose_of(line)}", "remark", share=LINES_SHARE)


def _add_left(page: Page, groups: Sequence[tuple[str, str, list[str]]]) -> None:
    if groups:
        page.add_rows(head_of(LEFT), groups, row_maker(LEFT), "reason", share=REASONS_SHARE)
