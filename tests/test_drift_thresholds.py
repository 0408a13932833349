"""benchmarks/drift.md and the code have the same thresholds, and the tables bear them out."""

from __future__ import annotations

import re
from pathlib import Path

from normdoctor.rules import rule_of

TABLES = (Path(__file__).parents[1] / "benchmarks" / "drift.md").read_text(encoding="utf-8")
LIMITS = {("D601", "warning"), ("D602", "warning"), ("D603", "warning"), ("D603", "model"), ("D603", "beyond")}


def rows(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head."""
    part = TABLES.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return cells[2:]


def first_number(cell: str) -> float:
    return float(cell.split()[0])


def test_thresholds_are_those_of_the_code() -> None:
    """To renew the tables: python benchmarks/drift.py --write"""
    table = {(row[0], row[1]): float(row[7]) for row in rows("The thresholds")}
    assert set(table) == LIMITS
    assert table == {(code, limit): rule_of(code).limits[limit] for code, limit in table}


def test_healthy_nets_stay_below_and_the_mishaps_above() -> None:
    for row in rows("The thresholds"):
        threshold, worst, mildest = float(row[7]), first_number(row[5]), first_number(row[6])
        assert worst < threshold, row
        if row[1] in ("model", "beyond"):
            assert mildest > threshold, row


def test_no_healthy_net_is_called_stale() -> None:
    """On all of the data, and on so little that unknown is the right answer."""
    healthy = [row for row in rows("The verdict on the model") if row[0] == "healthy"]
    assert len(healthy) == 4
    for row in healthy:
        nets, stale, noisy = map(int, row[2:5])
        assert nets >= 30 and stale == 0 and noisy == 0, row
        assert int(row[5]) <= nets / 10 or re.match(r"\d+ held", row[1]), "unknown on few images"


def test_costly_mishaps_are_seen() -> None:
    judged = [row for row in rows("The verdict on the model") if row[8]]
    assert len(judged) > 12
    assert {row[0]: row[8] for row in judged if row[8] != "0"} == {"trained in batches of 2": "1"}, "by one point"
