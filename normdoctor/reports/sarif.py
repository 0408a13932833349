"""SARIF 2.1.0, for GitHub code scanning and other tools that collect results (docs.oasis-open.org/sarif).

Code scanning takes every result for an open problem, whatever its baselineState. So what the baseline lists and
is no longer found stands among the notifications, not as an absent result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from normdoctor import __version__
from normdoctor.findings import Finding, Report, Rule, Severity, Survey
from normdoctor.reports.json import plain
from normdoctor.reports.text import markdown_text, printable
from normdoctor.reports.wording import example_fix
from normdoctor.rules import RULES

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
PROBLEM_SEVERITIES = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "recommendation"}
RULE_PLACES = {rule.code: place for place, rule in enumerate(RULES)}


def render(survey: Survey) -> str:
    """The whole survey as one SARIF log with one run."""
    paths = dict.fromkeys([*(report.path for report in survey.reports), *(f.path for f in survey.failures)])
    places = {path: place for place, path in enumerate(paths)}
    compared = bool(survey.fixed) or any(finding.known for finding in survey.findings)
    run = {
        "tool": {
            "driver": {
                "name": "normdoctor",
                "semanticVersion": __version__,
                "rules": [_rule(rule) for rule in RULES],
            }
        },
        "invocations": [
            {
                "executionSuccessful": not survey.failures,
                "toolExecutionNotifications": _notifications(survey, places),
            }
        ],
        "artifacts": _artifacts(survey, places),
        "results": [
            _result(finding, report.path, places, compared) for report in survey.reports for finding in report.findings
        ],
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(plain(log), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": f"{rule.title} {rule.why}"},
        "help": {"text": _help(rule), "markdown": _help_in_markdown(rule)},
        "helpUri": rule.reference,
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {
            "tags": sorted(kind.value for kind in rule.kinds),
            "precision": str(rule.confidence),
            "problem.severity": PROBLEM_SEVERITIES[rule.severity],
            "needs": list(rule.needs),
            "evidenceLevel": rule.evidence_level.value,
        },
    }


def _paragraphs(rule: Rule) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in rule.documentation.split("\n\n")]


def _help(rule: Rule) -> str:
    return "\n\n".join(
        [*_paragraphs(rule), f"Why: {rule.why}", f"Fix: {example_fix(rule)}", f"Source: {rule.reference}"]
    )


def _help_in_markdown(rule: Rule) -> str:
    said = [markdown_text(paragraph) for paragraph in _paragraphs(rule)]
    why, fix = markdown_text(rule.why), markdown_text(example_fix(rule))
    return "\n\n".join([*said, f"**Why:** {why}", f"**Fix:** {fix}", f"**Source:** <{rule.reference}>"])


def _artifacts(survey: Survey, places: Mapping[str, int]) -> list[dict[str, Any]]:
    """One entry per path, in the order of `places`."""
    artifacts: dict[str, dict[str, Any]] = {
        path: {"location": {"uri": uri(path)}, "roles": ["analysisTarget"]} for path in places
    }
    for report in survey.reports:
        artifacts[report.path] |= {"properties": _about_file(report)}
        if report.bytes_total is not None:
            artifacts[report.path] |= {"length": report.bytes_total}
    return list(artifacts.values())


def _about_file(report: Report) -> dict[str, Any]:
    skipped: dict[str, list[str]] = {}
    for skip in report.skips:
        known = skipped.setdefault(skip.code, [])
        known += [name for name in skip.missing if name not in known]
    return {
        "format": report.format,
        "layers": len(report.layers),
        "assumed": report.assumed,
        "skipped": skipped,
    }


def _result(finding: Finding, path: str, places: Mapping[str, int], compared: bool) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": _artifact_location(path, places),
            # Code scanning refuses a location without a line, and a checkpoint has none.
            "region": {"startLine": 1},
        }
    }
    if finding.layer is not None:
        name = printable(finding.layer)
        location["logicalLocations"] = [
            {"name": name.rpartition(".")[2] or name, "fullyQualifiedName": name, "kind": "module"}
        ]
    result = {
        "ruleId": finding.code,
        "ruleIndex": RULE_PLACES[finding.code],
        "level": LEVELS[finding.severity],
        "message": _message(f"{finding.message} Fix: {finding.fix}"),
        "locations": [location],
        "partialFingerprints": {
            # The only one that code scanning looks at. It would make its own of the line, the same for all layers.
            "primaryLocationLineHash": f"{_digest(finding.fingerprint)}:1",
            "normdoctor/v1": finding.fingerprint,
        },
        "properties": {
            "channels": finding.channels,
            "evidence": finding.evidence,
            "evidenceLevel": finding.evidence_level.value,
            "confidence": str(finding.confidence),
            "assumed": finding.assumed,
        },
    }
    if compared:
        result["baselineState"] = "unchanged" if finding.known else "new"
    return result


def _notifications(survey: Survey, places: Mapping[str, int]) -> list[dict[str, Any]]:
    """Files that could not be examined, notes on those that could, and what is gone of the baseline."""
    said = [("error", " ".join(filter(None, (f.message, f.hint))), f.path) for f in survey.failures]
    said += [("note", note, report.path) for report in survey.reports for note in report.notes]
    notifications: list[dict[str, Any]] = [
        {
            "level": level,
            "message": _message(words),
            "locations": [{"physicalLocation": {"artifactLocation": _artifact_location(path, places)}}],
        }
        for level, words, path in said
    ]
    for fingerprint in survey.fixed:
        words = f"No longer found, though in the baseline: {fingerprint}"
        notifications.append({"level": "note", "message": _message(words)})
    return notifications


def _artifact_location(path: str, places: Mapping[str, int]) -> dict[str, Any]:
    return {"uri": uri(path), "index": places[path]}


def uri(path: str) -> str:
    """A relative path as a relative reference, an absolute one as file:, both percent-encoded.

    >>> uri("runs/a b.pt"), uri("/tmp/a#1.pt")
    ('runs/a%20b.pt', 'file:///tmp/a%231.pt')
    """
    native = Path(path)
    return native.as_uri() if native.is_absolute() else quote(os.fsencode(native.as_posix()), safe="/")


def _message(words: str) -> dict[str, str]:
    """Plain text in which nothing is a placeholder ({0}) or a link ([text](target)), as SARIF 3.11 spells them."""
    words = printable(words).replace("{", "{{").replace("}", "}}")
    return {"text": words.replace("](", "] (")}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
