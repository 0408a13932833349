"""The report for people: findings worst first, then a table of layers. Reads well at 80 columns without colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normdoctor.compared import ComparisonKind
from normdoctor.findings import DATA_FIELD, GRAPH_FIELD, Finding, Report, Severity, Survey
from normdoctor.layers import NormLayer, Vector
from normdoctor.measured import Drift, DriftVerdict
from normdoctor.reports import comparison_text
from normdoctor.reports.drift import DRIFT_COLUMNS, drift_in_words
from normdoctor.reports.places import fed_by, feeds, fold_in_brief, predicted, why_unpredicted
from normdoctor.reports.terminal import console_for, print_columns, print_paragraph, print_table
from normdoctor.reports.text import printable
from normdoctor.reports.wording import (
    about,
    codes_by_layer,
    grouped,
    kinds_in_words,
    new_findings,
    plural,
    short,
    short_kind,
    size,
    split_fix,
    updates_in_words,
    verdict,
    worst_layers_first,
)

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}
VERDICT_STYLES = {
    DriftVerdict.HEALTHY: "bold green",
    DriftVerdict.NOISY: "bold cyan",
    DriftVerdict.STALE: "bold yellow",
    DriftVerdict.UNKNOWN: "bold",
}
INDENT = 9
LAYERS_SHOWN = 10
CODES_SHOWN = 2
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-=oO0@"
BINS = 5
MIN_NAME, ROOMY_NAME = 12, 24

GRAPH_HINT = (
    "ONNX and .pt2 files have their graph; that of a module is traced with --trust (of weights with --arch "
    "PKG.MODULE:NAME) and --input-shape"
)


def render(survey: Survey, stream: TextIO, *, every_layer: bool = False, verbose: bool = False) -> None:
    """Write the reports to `stream`, coloured only where it is a terminal (NO_COLOR and COLUMNS are honoured)."""
    console = console_for(stream)
    for place, report in enumerate(survey.reports):
        if place:
            console.print()
        _Page(console, report, every_layer, verbose).write()
    if len(survey.reports) > 1:
        console.print()
        print_paragraph(console, f"All {plural(len(survey.reports), 'file')}, {verdict(survey.reports)}")
    if survey.fixed:
        print_paragraph(console, f"No longer found, though in the baseline: {', '.join(survey.fixed)}")


def render_statistics(survey: Survey, stream: TextIO) -> None:
    """How often each rule fired, over all files, in place of the reports."""
    console = console_for(stream)
    counts: dict[str, Counter[Severity]] = {}
    for finding in survey.findings:
        if not finding.known:
            counts.setdefault(finding.code, Counter())[finding.severity] += 1
    names = {finding.code: finding.name for finding in survey.findings}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("code", "name", "errors", "warnings", "infos", "files"):
        table.add_column(title, justify="left" if title in ("code", "name") else "right", no_wrap=True)
    for code in sorted(counts, key=lambda code: (-max(counts[code]), -counts[code].total(), code)):
        files = sum(any(f.code == code and not f.known for f in report.findings) for report in survey.reports)
        levels = (str(counts[code][level] or "") for level in sorted(Severity, reverse=True))
        table.add_row(code, names[code], *levels, str(files))
    if counts:
        print_table(console, table)
    layers = sum(len(report.layers) for report in survey.reports)
    known = sum(finding.known for finding in survey.findings)
    line = f"{plural(len(survey.reports), 'file')}, {plural(layers, 'layer')}; findings are counted by layer"
    line += "" if counts else ": nothing found"
    console.print(line + (f"; {plural(known, 'known finding')} not counted" if known else ""))


class _Page:
    """One file's part of the output."""

    def __init__(self, console: Console, report: Report, every_layer: bool, verbose: bool) -> None:
        self.console = console
        self.report = report
        self.new = new_findings(report)
        self.every_layer = every_layer
        self.verbose = verbose
        encoding = getattr(console.file, "encoding", None) or "utf-8"
        try:
            BARS.encode(encoding)
            self.bars, self.ellipsis = BARS, "…"
        except (UnicodeEncodeError, LookupError):
            self.bars, self.ellipsis = PLAIN_BARS, "..."

    def write(self) -> None:
        self._header()
        for group in grouped(self.new):
            self._finding(group)
        if self.report.drift is not None:
            self._drift(self.report.drift)
        comparison = self.report.comparison
        if comparison is not None:
            comparison_text.write(self.console, comparison, self.bars, every_layer=self.every_layer)
        if self.report.layers and (comparison is None or comparison.kind is not ComparisonKind.CHECKPOINTS):
            self._table()
        self._places()
        if self.verbose:
            self._details()
        self._last_line()

    def _line(self, text: Text | str = "") -> None:
        self.console.print(text)

    def _paragraph(self, words: str, indent: int) -> None:
        print_paragraph(self.console, words, indent)

    def _header(self) -> None:
        report = self.report
        self._line(Text(printable(report.path), style="bold"))
        channels = sum(layer.channels for layer in report.layers)
        parts = [report.format, kinds_in_words(report.layers)]
        if channels:
            parts.append(f"{channels:,} channels")
        if report.bytes_total is not None:
            parts.append(f"read {size(report.bytes_read)} of {size(report.bytes_total)}")
        self._paragraph("   ".join(parts), 2)
        for note in report.notes:
            self._paragraph(f"note: {note}", 2)
        self._line()

    def _finding(self, group: Sequence[Finding]) -> None:
        worst = group[0]
        head = Text()
        head.append(f"{worst.severity.name:<7}", style=STYLES[worst.severity])
        head.append(f"  {worst.code} {worst.name}", style="bold")
        if subject := about(group):
            head.append(f"   {printable(subject)}")
        self._line(head)
        self._paragraph(worst.message, INDENT)
        if worst.severity > Severity.INFO:
            self._paragraph(worst.rule.why, INDENT)
            self._fix(worst.fix, self.report.drift.command if self.report.drift else "")
        self._line(f"{' ' * INDENT}source: {worst.rule.reference}")
        self._line()

    def _fix(self, fix: str, elsewhere: str = "") -> None:
        """A command stays on one line however long, so that it can be copied.

        elsewhere: the command that stands under the verdict on the statistics, and need not be said twice."""
        prose, command = split_fix(fix)
        if command and command == elsewhere:
            prose, command = f"{prose} see drift below".lstrip(), ""
        if prose:
            self._paragraph(f"fix: {prose}", INDENT)
        if not command:
            return
        lead = "     " if prose else "fix: "
        self._line(Text(" " * INDENT + lead).append(printable(command), style="green"))

    def _table(self) -> None:
        report = self.report
        layers = worst_layers_first(report)[: None if self.every_layer else LAYERS_SHOWN]
        codes = codes_by_layer(report)
        columns = [
            ("layer", "left", [printable(layer.name) for layer in layers]),
            ("kind", "left", [short_kind(layer) for layer in layers]),
            ("C", "right", [str(layer.channels) for layer in layers]),
            ("weight", "left", [self._spread(_weight(layer)) for layer in layers]),
            ("running_var", "left", [self._spread(layer.numbers.var) for layer in layers]),
            ("updates", "right", [updates_in_words(layer) for layer in layers]),
            ("findings", "left", [_few(codes.get(layer.name, [])) for layer in layers]),
        ]
        columns = [column for column in columns if column[0] in ("layer", "findings") or any(column[2])]
        self._print_columns(columns, ragged="findings")
        self._hidden(len(report.layers) - len(layers))
        self._line()

    def _places(self) -> None:
        """What feeds each norm and what it feeds, where that is known."""
        layers = [layer for layer in worst_layers_first(self.report) if layer.place is not None]
        guessed = any(layer.place.inferred for layer in layers if layer.place is not None)
        shown = layers[: None if self.every_layer else LAYERS_SHOWN]
        if not shown or (guessed and not (self.every_layer or self.verbose)):
            return
        columns = [
            ("layer", [layer.name for layer in shown]),
            ("fed by", list(map(fed_by, shown))),
            ("feeds", list(map(feeds, shown))),
            ("mean as predicted", list(map(predicted, shown))),
            ("fold", list(map(fold_in_brief, shown))),
        ]
        print_columns(self.console, columns, words=("feeds", "mean as predicted", "fold"))
        self._hidden(len(layers) - len(shown))
        if guessed:
            self._paragraph("a place with ? is inferred from names: the file has no graph", 0)
        if why := why_unpredicted(layers):
            self._paragraph(f"not predicted: {why}", 0)
        self._line()

    def _drift(self, drift: Drift) -> None:
        """The verdict with what it rests on, and the layers that are furthest off."""
        self._line(Text("drift    ").append(drift.verdict.value, style=VERDICT_STYLES[drift.verdict]))
        self._paragraph(drift.meaning, INDENT)
        self._paragraph(drift_in_words(drift), INDENT)
        if drift.command:
            self._fix(drift.command)
        self._line()
        rows = drift.layers[: None if self.every_layer else LAYERS_SHOWN]
        if rows:
            columns = [(title, side, [printable(cell(row)) for row in rows]) for title, side, cell in DRIFT_COLUMNS]
            self._print_columns([column for column in columns if any(column[2])])
            self._hidden(len(drift.layers) - len(rows))
        for name, why in drift.left.items():
            self._paragraph(f"not compared: {name}, {why}", 0)
        self._line()

    def _print_columns(self, columns: Sequence[tuple[str, str, list[str]]], ragged: str = "") -> None:
        """A table in the width of the console: names in the first column give way, `ragged` may take several lines."""
        others = sum(max(len(cell) for cell in (title, *cells)) for title, _, cells in columns[1:])
        gap = 2 if self.console.width - others - 2 * len(columns) >= ROOMY_NAME else 1
        room = max(MIN_NAME, self.console.width - others - gap * len(columns))
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), collapse_padding=True, header_style="bold")
        for title, side, _ in columns:
            table.add_column(title, justify="right" if side == "right" else "left", no_wrap=title != ragged)
        for row in zip(*(cells for _, _, cells in columns), strict=True):
            table.add_row(Text(self._shortened(row[0], room)), *(Text(cell) for cell in row[1:]))
        print_table(self.console, table)

    def _hidden(self, count: int) -> None:
        if count:
            self._line(f"{self.ellipsis} {plural(count, 'more layer')} (--all)")

    def _spread(self, values: Vector | None) -> str:
        """Smallest and largest value with the histogram between them: 0.02 ▁▂▇▅▁ 1.4"""
        if values is None:
            return ""
        finite = values[np.isfinite(values)]
        if not finite.size:
            return "not finite"
        low, high = float(finite.min()), float(finite.max())
        mark = "" if finite.size == values.size else "!"
        if low == high:
            return f"{short(low)}{mark}"
        counts, _ = np.histogram(finite / max(abs(low), abs(high)), bins=BINS)
        levels = np.ceil(counts / counts.max() * (len(self.bars) - 1)).astype(int)
        return f"{short(low)} {''.join(self.bars[level] for level in levels)} {short(high)}{mark}"

    def _shortened(self, name: str, room: int) -> str:
        """The end of a path tells layers apart, so the beginning gives way."""
        return name if len(name) <= room else self.ellipsis + name[-(room - len(self.ellipsis)) :]

    def _details(self) -> None:
        for layer in self.report.layers:
            if layer.aliases:
                self._paragraph(f"tied: {layer.name} is also {', '.join(layer.aliases)}", 2)
        for miss in self.report.near_misses:
            self._paragraph(f"not a norm: {miss.name or '(top level)'} {list(miss.shape)}: {miss.reason}", 2)
        skips = self.report.skips
        without_data = dict.fromkeys(skip.code for skip in skips if DATA_FIELD in skip.missing)
        without_graph = dict.fromkeys(skip.code for skip in skips if GRAPH_FIELD in skip.missing)
        without_graph = {code: None for code in without_graph if code not in without_data}
        if without_graph:
            self._paragraph(f"need the graph: {', '.join(without_graph)}", 2)
            self._paragraph(GRAPH_HINT, 2)
        if without_data:
            self._paragraph(f"need data: {', '.join(without_data)}", 2)
        for skip in skips:
            if skip.code in without_data or skip.code in without_graph:
                continue
            where = skip.layer or "every layer"
            self._paragraph(
                f"skipped: {skip.code} {skip.rule.name} on {where}, for want of {', '.join(skip.missing)}",
                2,
            )
        if self.report.near_misses or self.report.skips:
            self._line()

    def _last_line(self) -> None:
        report = self.report
        if not report.layers and report.layer_names:
            self._paragraph(f"None of the {plural(len(report.layer_names), 'norm layer')} matches --layer.", 0)
            return
        if not report.layers and report.comparison is None:
            line = "No norm layers found."
            if report.near_misses and not self.verbose:
                line += f" {plural(len(report.near_misses), 'tensor')} looked like one: --verbose lists them."
            self._paragraph(line, 0)
            return
        self._paragraph(verdict([report]), 0)


def _weight(layer: NormLayer) -> Vector | None:
    return layer.numbers.gain if layer.weight is not None else None


def _few(codes: Sequence[str]) -> str:
    """The worst two codes and how many more there are."""
    more = f" +{len(codes) - CODES_SHOWN}" if len(codes) > CODES_SHOWN else ""
    return " ".join(codes[:CODES_SHOWN]) + more
