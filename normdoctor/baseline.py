"""What was found before and accepted: a file of fingerprints, so that only new findings count."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from normdoctor.errors import UsageError
from normdoctor.findings import Finding, Severity, Survey
from normdoctor.writing import check_text_output, read_small, replacing

SCHEMA_VERSION = 1

MAX_SIZE = 64 << 20
"""About half a million findings."""

Baseline = Mapping[str, Severity]
"""Fingerprint → the severity that was accepted."""


def write(survey: Survey, path: Path) -> int:
    """Write the findings of all files as a baseline and give their number. An older baseline is replaced.

    Raises UsageError where `path` is one of the files examined, or holds something else."""
    check_text_output(path, [Path(report.path) for report in survey.reports])
    if path.exists():
        read(path)  # whatever is no baseline stays
    entries: dict[str, Finding] = {}
    for finding in survey.findings:
        known = entries.get(finding.fingerprint)
        if known is None or finding.severity > known.severity:
            entries[finding.fingerprint] = finding
    document = {
        "schema_version": SCHEMA_VERSION,
        "findings": [
            {"fingerprint": fingerprint, "severity": str(finding.severity), "name": finding.name}
            for fingerprint, finding in sorted(entries.items())
        ],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return len(entries)


def read(path: Path) -> Baseline:
    """The baseline in a file. Raises UsageError where there is none."""
    if not path.exists():
        raise UsageError(f"{path}: no such baseline", f"Make it with: --write-baseline {path}")
    raw = read_small(path, MAX_SIZE)
    try:
        document = json.loads(raw)
        if document["schema_version"] != SCHEMA_VERSION:
            raise UsageError(f"{path}: a baseline of another version", "Write it again with --write-baseline.")
        return {str(entry["fingerprint"]): Severity[entry["severity"].upper()] for entry in document["findings"]}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: is not a baseline", "--write-baseline makes one.") from None


def compare(
    survey: Survey, baseline: Baseline, covers: Callable[[str, str], bool] = lambda code, layer: True
) -> Survey:
    """The survey with the findings of the baseline marked as known, and the fingerprints of those that are gone.

    A finding that is worse than what was accepted is new. covers: whether this run looked for that code on that
    layer at all; what was not looked for is not gone. Nor is anything while a file could not be examined."""
    reports = tuple(
        replace(report, findings=tuple(replace(f, known=_is_known(f, baseline)) for f in report.findings))
        for report in survey.reports
    )
    found = {finding.fingerprint for finding in survey.findings}
    gone = [] if survey.failures else [mark for mark in baseline if mark not in found]
    fixed = tuple(sorted(mark for mark in gone if covers(*_code_and_layer(mark))))
    return replace(survey, reports=reports, fixed=fixed)


def _is_known(finding: Finding, baseline: Baseline) -> bool:
    accepted = baseline.get(finding.fingerprint)
    return accepted is not None and finding.severity <= accepted


def _code_and_layer(fingerprint: str) -> tuple[str, str]:
    code, _, layer = fingerprint.partition(" ")
    return code, layer
