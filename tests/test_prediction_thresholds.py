"""benchmarks/prediction.md bears out the thresholds of G507 in the code."""

from __future__ import annotations

from pathlib import Path

from normdoctor.rules import rule_of

TABLES = (Path(__file__).parents[1] / "benchmarks" / "prediction.md").read_text(encoding="utf-8")
LIMITS = rule_of("G507").limits
JUDGED = ("Gaussian", "exact")
"""The chains whose predictions say something; the quiet and the uneven ones have rows of their own."""


def rows(heading: str) -> list[dict[str, str]]:
    """The rows of the table under a heading, by the names of its columns."""
    part = TABLES.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def numbers(cell: str) -> list[float]:
    """Smallest, median, largest."""
    return [float(number) for number in cell.split(",")]


def found(row: dict[str, str]) -> float:
    return float(row["found, 95 %"].split()[0])


def test_healthy_layers_stay_far_from_the_limits() -> None:
    """To renew the tables: python benchmarks/prediction.py --write"""
    healthy = {row["chain"]: row for row in rows("Healthy nets: predicted against stored means") if row["net"] == "all"}
    assert numbers(healthy["Gaussian"]["correlation"])[0] > LIMITS["typical_correlation"]
    assert 10 * numbers(healthy["exact"]["shift"])[2] < LIMITS["shift_warning"]
    assert 2 * numbers(healthy["exact, uneven"]["shift"])[2] < LIMITS["shift_uneven"]
    assert int(healthy["Gaussian"]["layers"]) > 200


def test_nothing_above_info_on_healthy_nets() -> None:
    healthy = rows("Healthy nets: findings above info")
    assert {row["rule"] for row in healthy} >= {"A208", "A209", "A210", "G507"}
    assert all(row["findings"] == "0" for row in healthy)


def test_foreign_permuted_and_reset_buffers_are_found() -> None:
    mishaps = [
        row
        for row in rows("Mishaps")
        if row["chain"] in JUDGED and row["buffers"] in ("of another net", "permuted over channels", "reset")
    ]
    assert len(mishaps) == 6
    assert all(found(row) >= 95 for row in mishaps)


def test_healthy_rows_find_nothing() -> None:
    healthy = [row for row in rows("Mishaps") if row["buffers"] == "healthy"]
    assert len(healthy) >= 3
    assert all(found(row) == 0 for row in healthy)
