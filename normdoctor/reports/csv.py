"""The table of layers as CSV (RFC 4180), one row per layer over all files, for spreadsheets and data frames.

An empty cell means that the file does not say. What is wrong with a file as a whole, and files that could not be
examined, have no row here."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from normdoctor.compared import LayerChange
from normdoctor.findings import Finding, Report, Survey
from normdoctor.layers import VECTORS, NormLayer
from normdoctor.measured import LayerDrift
from normdoctor.reports.json import statistics_of, updates_of
from normdoctor.reports.places import fed_by, feeds, fold_of
from normdoctor.reports.text import printable
from normdoctor.reports.wording import new_findings

MEASURES = ("min", "median", "max")

COLUMNS = (
    *("file", "layer", "kind", "origin", "channels", "groups", "eps", "momentum", "training", "affine"),
    *("track_running_stats", "num_batches_tracked"),
    *(f"{name}_{measure}" for name in VECTORS for measure in MEASURES),
    *("nonfinite", "severity", "codes"),
    *("drift_kl", "drift_kl_p95", "drift_z", "drift_z_p95", "drift_var_ratio", "drift_beyond", "effective_samples"),
    *("fed_by", "feeds", "fold"),
    *("compare_kl", "compare_kl_p95", "compare_z", "compare_log_var", "compare_gamma", "compare_beta", "compare_steps"),
)
"""min, median and max are of the finite values; nonfinite is how many others the layer has. severity is that of
its worst finding, codes are those of all; findings that the baseline knows are left out. drift_* are filled where
the model was run on data: medians and 95th percentiles over channels. fed_by, feeds and fold are filled where the
graph is known, compare_* where there was another model to compare with."""

DRIFT_FIELDS = ("divergence", "divergence_p95", "shift", "shift_p95", "ratio", "beyond", "effective")
"""Of LayerDrift, in the order of their columns."""

COMPARE_FIELDS = ("divergence", "divergence_p95", "shift", "log_ratio", "gamma", "beta", "steps")
"""Of LayerChange, in the order of their columns."""

FORMULA = "=+-@＝＋－＠"
"""What makes a spreadsheet take the rest of a cell for a formula, in either width."""


def render(survey: Survey) -> str:
    """The table with its header; lines end in CR LF."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(COLUMNS)
    for report in survey.reports:
        writer.writerows(_rows(report))
    return stream.getvalue()


def _rows(report: Report) -> Iterator[list[str]]:
    findings: dict[str | None, list[Finding]] = {}
    for finding in new_findings(report):
        findings.setdefault(finding.layer, []).append(finding)
    drifts = {row.layer: row for row in report.drift.layers} if report.drift is not None else {}
    changes = {row.layer: row for row in report.comparison.layers} if report.comparison is not None else {}
    for layer in report.layers:
        name = layer.name
        yield _row(report.path, layer, findings.get(name, []), drifts.get(name), changes.get(name))


def _row(
    path: str, layer: NormLayer, findings: list[Finding], drift: LayerDrift | None, change: LayerChange | None
) -> list[str]:
    stats = statistics_of(layer)
    measured = [stats.get(name, {}).get(measure) for name in VECTORS for measure in MEASURES]
    return [
        _text(path),
        _text(layer.name),
        layer.kind.value,
        _text(layer.origin or ""),
        _value(layer.channels),
        _value(layer.groups),
        _value(layer.eps),
        _value(layer.momentum),
        _value(layer.training),
        _value(layer.affine),
        _value(layer.track_running_stats),
        _value(updates_of(layer)),
        *map(_value, measured),
        _value(sum(of["nonfinite"] for of in stats.values())),
        str(max(finding.severity for finding in findings)) if findings else "",
        " ".join(dict.fromkeys(finding.code for finding in findings)),
        *(_value(None if drift is None else getattr(drift, name)) for name in DRIFT_FIELDS),
        *(_text(words(layer)) for words in (fed_by, feeds, fold_of)),
        *(_value(None if change is None else getattr(change, name)) for name in COMPARE_FIELDS),
    ]


def _text(words: str) -> str:
    """Text from the file: one that a spreadsheet would compute gets an apostrophe in front."""
    words = printable(words)
    return f"'{words}" if words.lstrip().startswith(tuple(FORMULA)) else words


def _value(value: float | str | None) -> str:
    """A number so short that it still reads back the same, true or false, or nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)) if isinstance(value, float) else str(value)
