"""Annotations for GitHub Actions: workflow commands that put a finding on the page of a pull request.

GitHub shows ten errors, ten warnings and ten notices of a step, so there is one for each rule and file, not one
for each layer, and the worst come first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normdoctor.findings import Failure, Finding, Report, Severity, Survey
from normdoctor.reports.text import printable
from normdoctor.reports.wording import about, plural, ranked, verdict

COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def render(survey: Survey) -> str:
    """One workflow command for each failure and each group of new findings, and a last line with the counts."""
    lines = [_failure(failure) for failure in survey.failures]
    lines += [_annotation(report, group) for report, group in ranked(survey.reports)]
    return "\n".join([*lines, _last_line(survey)]) + "\n"


def _failure(failure: Failure) -> str:
    return _command("error", failure.path, "file not examined", [failure.message, failure.hint])


def _annotation(report: Report, group: Sequence[Finding]) -> str:
    worst = group[0]
    subject = about(group)
    message = f"{subject}: {worst.message}" if subject else worst.message
    fix = f"fix: {worst.fix}" if worst.severity > Severity.INFO else ""
    lines = [message, fix, f"source: {worst.rule.reference}"]
    return _command(COMMANDS[worst.severity], report.path, f"{worst.code} {worst.name}", lines)


def _command(command: str, path: str, title: str, lines: Sequence[str]) -> str:
    message = "\n".join(printable(line) for line in lines if line)
    return f"::{command} file={_property(Path(path).as_posix())},title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    """Escaped as @actions/core does it: a line break would end the command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(printable(text)).replace(":", "%3A").replace(",", "%2C")


def _last_line(survey: Survey) -> str:
    line = f"{plural(len(survey.reports), 'file')}, {verdict(survey.reports)}"
    if survey.fixed:
        line += f"; {plural(len(survey.fixed), 'finding')} of the baseline gone"
    if survey.failures:
        line += f"; {plural(len(survey.failures), 'file')} not examined"
    return f"normdoctor: {line}"
