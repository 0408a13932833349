"""benchmarks/calibration.md and the code have the same thresholds, and the table bears them out."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from normdoctor.findings import Severity
from normdoctor.rules import rule_of

TABLES = (Path(__file__).parents[1] / "benchmarks" / "calibration.md").read_text(encoding="utf-8")
CALIBRATED = {"S107", "S108", "S109", "S118", "A205", "A207", "C303", "N403", "T701", "T702", "T707", "T709", "T712"}


def rows(columns: int) -> list[list[str]]:
    """The rows of the table with that many columns, without its head."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLES.splitlines() if line[:1] == "|"]
    return [row for row in cells if len(row) == columns and re.match(r"[A-Z]\d{3}", row[0])]


def test_thresholds_are_those_of_the_code() -> None:
    """To renew the table: python benchmarks/calibration.py --write"""
    table = {(code, limit): float(threshold) for code, limit, *_, threshold, _ in rows(10)}
    assert {code for code, _ in table} == CALIBRATED
    assert table == {(code, limit): float(rule_of(code).limits[limit]) for code, limit in table}
    doses = {tuple(row[0].split()): float(row[-1]) for row in rows(7) if row[-1] != "-"}
    assert doses == {(code, limit): float(rule_of(code).limits[limit]) for code, limit in doses}


def test_healthy_networks_stay_on_their_side_of_some_limit_of_every_rule() -> None:
    margins: dict[str, list[float]] = defaultdict(list)
    for row in rows(10):
        margins[row[0]].append(float("inf") if row[-1] == "-" else float(row[-1].removeprefix("< ")))
    assert {code: max(found) for code, found in margins.items() if max(found) < 2} == {}


def test_an_error_is_said_no_later_than_where_the_fault_costs_5_points() -> None:
    found = 0
    for row in rows(7):
        code, _, limit = row[0].partition(" ")
        if limit == "error" and rule_of(code).severity is Severity.ERROR:
            found += 1
            assert float(row[-1]) <= float(row[3]), row
    assert found


def test_residue_that_costs_points_is_suspected_without_momentum_and_counter() -> None:
    found = {row[1]: row[2].split(" of ") for row in rows(3)}
    assert found["0%"][0] == "0" and int(found["0%"][1]) > 20
    assert {share: hits == nets for share, (hits, nets) in found.items() if share in ("55%", "67%", "80%")} == {
        "55%": True,
        "67%": True,
        "80%": True,
    }
