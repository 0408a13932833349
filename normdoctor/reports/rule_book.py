"""The rules as a table, as JSON and as single explanations: all taken from the rules themselves."""

from __future__ import annotations

import json
from typing import TextIO

from rich.table import Table
from rich.text import Text

from normdoctor.findings import Rule
from normdoctor.reports.terminal import console_for, print_paragraph, print_table
from normdoctor.reports.wording import example_fix
from normdoctor.rules import RULES


def write_table(stream: TextIO) -> None:
    console = console_for(stream)
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for title in ("code", "name", "severity", "what it says"):
        table.add_column(title, no_wrap=title != "what it says")
    for rule in RULES:
        table.add_row(rule.code, rule.name, str(rule.severity), Text(rule.title))
    print_table(console, table)
    console.print("\nnormdoctor explain CODE says more about each.")


def as_markdown() -> str:
    """A table for READMEs: code, name, severity and first line of each rule."""
    rows = [f"| {rule.code} | {rule.name} | {rule.severity} | {rule.title} |" for rule in RULES]
    return "\n".join(["| code | name | severity | what it says |", "| --- | --- | --- | --- |", *rows]) + "\n"


def as_json() -> str:
    entries = [
        {
            "code": rule.code,
            "name": rule.name,
            "severity": str(rule.severity),
            "confidence": str(rule.confidence),
            "evidence_level": rule.evidence_level.value,
            "kinds": sorted(kind.value for kind in rule.kinds),
            "needs": list(rule.needs),
            "thresholds": dict(rule.limits),
            "title": rule.title,
            "why": rule.why,
            "fix": rule.fix,
            "reference": rule.reference,
            "documentation": rule.documentation,
        }
        for rule in RULES
    ]
    return json.dumps({"schema_version": 1, "rules": entries}, indent=2, ensure_ascii=False) + "\n"


def write_explanation(rule: Rule, stream: TextIO) -> None:
    console = console_for(stream)
    console.print(Text(f"{rule.code} {rule.name}", style="bold"))
    needs = f" ({', '.join(rule.needs)})" if rule.needs else ""
    print_paragraph(console, f"{rule.severity}, confidence {rule.confidence}, needs {rule.evidence_level.value}{needs}")
    console.print()
    for paragraph in rule.documentation.split("\n\n"):
        print_paragraph(console, " ".join(paragraph.split()))
        console.print()
    print_paragraph(console, f"Why: {rule.why}")
    print_paragraph(console, f"Fix: {example_fix(rule)}")
    if rule.limits:
        shown = ", ".join(f"{name} {value:g}" for name, value in rule.limits.items())
        print_paragraph(console, f"Thresholds: {shown}  (--threshold {rule.code}.NAME=VALUE)")
    console.print(f"Source: {rule.reference}")
