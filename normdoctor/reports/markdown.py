"""The report as GitHub Markdown, made to fit a comment on a pull request.

Findings come as one table, worst first; the layers of each file stand below, folded away. Names come from
strangers: none of them can mention anybody, link anywhere or break a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from normdoctor.compared import Comparison
from normdoctor.findings import Failure, Finding, Report, Severity, Survey
from normdoctor.layers import NormLayer
from normdoctor.measured import Drift
from normdoctor.reports.comparison import (
    BARS,
    COMPARISON_COLUMNS,
    comparison_in_words,
    largest_step,
    rows_by_divergence,
    sides_in_words,
    trajectory_of,
)
from normdoctor.reports.drift import DRIFT_COLUMNS, drift_in_words
from normdoctor.reports.json import statistics_of
from normdoctor.reports.places import fed_by, feeds
from normdoctor.reports.text import html_code, markdown_code, markdown_text, shortened
from normdoctor.reports.wording import (
    codes_by_layer,
    kinds_in_words,
    many_layers,
    plural,
    ranked,
    severities_in_words,
    short,
    size,
    split_fix,
    updates_in_words,
    verdict,
    worst_layers_first,
)

LIMIT = 65_536
"""Characters that GitHub takes in a comment."""

LAST_SENTENCE = 512
"""Room kept for the sentence on what was left out."""

FAILURES_SHARE = 1 / 3
"""Of the room, for files that could not be examined: however many, the findings are seen as well."""

NAME_ROOM, PROSE_ROOM, NOTE_ROOM = 100, 800, 300
FIXED_SHOWN, NOTES_SHOWN, NAMES_SHOWN = 20, 5, 3

Column = tuple[str, str, Callable[[Any], str]]
"""Title, alignment, and what stands in the cell of an entry."""


def render(survey: Survey) -> str:
    """The whole survey in less than 65,536 characters; what had to be left out is counted at the end."""
    page = Page()
    page.add(f"## normdoctor: {_heading(survey)}")
    page.add(f"{plural(len(survey.reports), 'file')}, {verdict(survey.reports)}")
    if survey.fixed:
        page.add(f"No longer found, though in the baseline: {_listed(survey.fixed)}")
    if survey.failures:
        page.add_rows("Not examined:\n", survey.failures, _failure, "file", share=FAILURES_SHARE)
    if found := ranked(survey.reports):
        columns = _finding_columns(len(survey.reports) > 1)
        page.add_rows(head_of(columns), found, row_maker(columns), "finding")
    for report in survey.reports:
        if report.drift is not None:
            head = "\n\n".join(filter(None, (_drift(report, report.drift), head_of(_drift_columns(report.drift)))))
            page.add_rows(
                head, report.drift.layers, row_maker(_drift_columns(report.drift)), "layer", tail="\n\n</details>"
            )
    for report in survey.reports:
        if report.comparison is not None:
            columns = _comparison_columns(report.comparison)
            head = "\n\n".join(filter(None, (_comparison(report.comparison), head_of(columns))))
            rows = rows_by_divergence(report.comparison)
            page.add_rows(head, rows, row_maker(columns), "layer", tail="\n\n</details>")
    for report in survey.reports:
        if report.layers or report.notes:
            columns = _layer_columns(report)
            head = "\n\n".join(filter(None, (_fold(report), head_of(columns))))
            page.add_rows(head, worst_layers_first(report), row_maker(columns), "layer", tail="\n\n</details>")
    return page.text()


class Page:
    """Blocks of text for as long as there is room."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.room = LIMIT - LAST_SENTENCE
        self.left_out: Counter[str] = Counter()

    def add(self, block: str) -> None:
        self.blocks.append(block)
        self.room -= len(block) + 2

    def add_rows(
        self,
        head: str,
        entries: Sequence[Any],
        row_of: Callable[[Any], str],
        noun: str,
        *,
        tail: str = "",
        share: float = 1.0,
    ) -> None:
        """Rows for as many entries as fit into that share of the room; nothing at all if not even the first does."""
        room = self.room * share - len(head) - len(tail) - 2
        rows: list[str] = []
        for row in map(row_of, entries):
            room -= len(row) + 1
            if room < 0:
                break
            rows.append(row)
        self.left_out[noun] += len(entries) - len(rows)
        if rows or (not entries and room >= 0):
            self.add("\n".join([head, *rows]) + tail)

    def text(self) -> str:
        left = " and ".join(plural(count, noun) for noun, count in self.left_out.items() if count)
        if left:
            self.blocks.append(f"Left out to fit into a comment: {left}. `--format json` has everything.")
        return "\n\n".join(self.blocks) + "\n"


def head_of(columns: Sequence[Column]) -> str:
    """The first two lines of a table; nothing where it has no columns."""
    titles, alignments = [title for title, _, _ in columns], [alignment for _, alignment, _ in columns]
    return f"{_line(titles)}\n{_line(alignments)}" if columns else ""


def row_maker(columns: Sequence[Column]) -> Callable[[Any], str]:
    return lambda entry: _line(cell(entry) for _, _, cell in columns)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _heading(survey: Survey) -> str:
    failed = f"{plural(len(survey.failures), 'file')} not examined" if survey.failures else ""
    return ", ".join(filter(None, (severities_in_words(survey.reports), failed))) or "nothing found"


def _failure(failure: Failure) -> str:
    words = failure.message.removeprefix(f"{failure.path}: ")  # most messages begin with it
    return f"- {code_name(failure.path)}: {prose_of('; '.join(filter(None, (words, failure.hint))))}"


def _finding_columns(several_files: bool) -> list[Column]:
    columns: list[Column] = [
        ("severity", "---", lambda found: _severity(found[1][0].severity)),
        ("rule", "---", lambda found: _rule(found[1][0])),
        ("file", "---", lambda found: code_name(found[0].path)),
        ("layers", "---", lambda found: _about(found[1])),
        ("what", "---", lambda found: _what(found[1][0])),
    ]
    return [column for column in columns if column[0] != "file" or several_files]


def _severity(severity: Severity) -> str:
    return f"**{severity}**" if severity > Severity.INFO else str(severity)


def _rule(finding: Finding) -> str:
    return f"[{finding.code} {finding.name}]({finding.rule.reference})"


def _about(group: Sequence[Finding]) -> str:
    layers = [finding.layer for finding in group if finding.layer is not None]
    if len(layers) > 2:
        return f"{many_layers(group)}, worst {code_name(layers[0])}"
    return ", ".join(map(code_name, layers)) or "the file"


def _what(finding: Finding) -> str:
    if finding.severity is Severity.INFO:
        return prose_of(finding.message)
    prose, command = split_fix(finding.fix)
    fix = " ".join(filter(None, (prose_of(prose), markdown_code(command) if command else "")))
    return f"{prose_of(finding.message)} {prose_of(finding.rule.why)}<br>Fix: {fix}"


def _fold(report: Report) -> str:
    """The beginning of what is folded away: the file, its format, the notes of its reader."""
    read = "" if report.bytes_total is None else f", read {size(report.bytes_read)} of {size(report.bytes_total)}"
    title = f"{html_code(shortened(report.path, NAME_ROOM))}: {plural(len(report.layers), 'layer')}"
    about = f"{prose_of(report.format, NOTE_ROOM)}, {kinds_in_words(report.layers)}{read}"
    notes = [f"- {prose_of(note, NOTE_ROOM)}" for note in report.notes[:NOTES_SHOWN]]
    if len(report.notes) > NOTES_SHOWN:
        notes.append(f"- and {plural(len(report.notes) - NOTES_SHOWN, 'more note')}")
    return "\n\n".join(filter(None, (f"<details><summary>{title}</summary>", about, "\n".join(notes))))


def _drift(report: Report, drift: Drift) -> str:
    """The beginning of what is folded away: the verdict in the title, then what it rests on and what to do."""
    name = html_code(shortened(report.path, NAME_ROOM))
    title = f"{name}: statistics <b>{drift.verdict.value}</b> on this data"
    fix = " ".join(filter(None, (prose_of(drift.meaning), markdown_code(drift.command) if drift.command else "")))
    left = [f"- not compared: {code_name(name)}, {prose_of(why, NOTE_ROOM)}" for name, why in drift.left.items()]
    if len(left) > NOTES_SHOWN:
        left = [*left[:NOTES_SHOWN], f"- and {plural(len(left) - NOTES_SHOWN, 'more layer')}"]
    parts = (f"<details><summary>{title}</summary>", fix, prose_of(drift_in_words(drift)), "\n".join(left))
    return "\n\n".join(filter(None, parts))


def _comparison(comparison: Comparison) -> str:
    """The beginning of what is folded away: the sides in the title, then what moved."""
    title = f"compared {html_code(shortened(sides_in_words(comparison), NAME_ROOM))}"
    missing = [
        f"- {code_name(one.layer)} only in {code_name(comparison.sides[one.side].label)}: "
        f"{prose_of(one.reason or 'nothing explains it', NOTE_ROOM)}"
        for one in comparison.missing[:NOTES_SHOWN]
    ]
    if len(comparison.missing) > NOTES_SHOWN:
        missing.append(f"- and {plural(len(comparison.missing) - NOTES_SHOWN, 'more layer')}")
    parts = (f"<details><summary>{title}</summary>", prose_of(comparison_in_words(comparison)), "\n".join(missing))
    return "\n\n".join(filter(None, parts))


def _comparison_columns(comparison: Comparison) -> list[Column]:
    """The columns of the comparison; over several checkpoints the divergence of each step as well."""
    columns: list[Column] = [("layer", "---", lambda row: code_name(row.layer))]
    columns += [(title, "---:" if side == "right" else "---", cell) for title, side, cell in COMPARISON_COLUMNS[1:]]
    if comparison.trajectories:
        steps = {row.layer: row for row in comparison.trajectories}
        largest = largest_step(comparison.trajectories)
        columns.append(("KL by step", "---", lambda row: trajectory_of(steps.get(row.layer), BARS, largest)))
    return columns if comparison.layers else []


def _drift_columns(drift: Drift) -> list[Column]:
    columns: list[Column] = [("layer", "---", lambda row: code_name(row.layer))]
    columns += [(title, "---:" if side == "right" else "---", cell) for title, side, cell in DRIFT_COLUMNS[1:]]
    return columns if drift.layers else []


def _layer_columns(report: Report) -> list[Column]:
    """Those with something to say about any layer."""
    codes = codes_by_layer(report)
    columns: list[Column] = [
        ("layer", "---", lambda layer: code_name(layer.name)),
        ("kind", "---", lambda layer: layer.kind.value),
        ("channels", "---:", lambda layer: str(layer.channels)),
        ("weight", "---", lambda layer: _spread(layer, "weight")),
        ("running_var", "---", lambda layer: _spread(layer, "running_var")),
        ("updates", "---:", updates_in_words),
        ("fed by", "---", lambda layer: _place(layer, fed_by)),
        ("feeds", "---", lambda layer: _place(layer, feeds)),
        ("findings", "---", lambda layer: " ".join(codes.get(layer.name, []))),
    ]
    return [column for column in columns if any(map(column[2], report.layers))]


def _spread(layer: NormLayer, field: str) -> str:
    """The smallest and the largest finite value, and how many are not finite."""
    stats = statistics_of(layer).get(field)
    if stats is None:
        return ""
    span = "" if "min" not in stats else f"{short(stats['min'])} to {short(stats['max'])}"
    broken = f"{stats['nonfinite']} not finite" if stats["nonfinite"] else ""
    return ", ".join(filter(None, (span, broken)))


def _place(layer: NormLayer, words_of: Callable[[NormLayer], str]) -> str:
    """What a graph says; nothing where it is only guessed."""
    known = layer.place is not None and not layer.place.inferred
    return code_name(words_of(layer)) if known else ""


def _listed(fingerprints: Sequence[str]) -> str:
    more = len(fingerprints) - FIXED_SHOWN
    return ", ".join(map(code_name, fingerprints[:FIXED_SHOWN])) + (f" and {more} more" if more > 0 else "")


def code_name(name: str) -> str:
    return markdown_code(shortened(name, NAME_ROOM))


def code_names(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(map(code_name, names[:NAMES_SHOWN])) + (f" and {more:,} more" if more > 0 else "")


def prose_of(words: str, room: int = PROSE_ROOM) -> str:
    return markdown_text(words if len(words) <= room else f"{words[: room - 1]}…")
