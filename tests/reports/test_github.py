"""Workflow commands of GitHub Actions, read back as its runner reads them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from normdoctor.findings import Failure, Report, Survey
from normdoctor.reports import github
from normdoctor.reports.text import printable

Sick = Callable[..., Report]
Command = tuple[str, dict[str, str], str]


def commands(text: str) -> tuple[list[Command], str]:
    """The commands and the last line."""
    *lines, last = text.rstrip("\n").split("\n")
    return [command(line) for line in lines], last


def command(line: str) -> Command:
    found = re.fullmatch(r"::(error|warning|notice) ([^:]*)::(.*)", line)
    assert found, line
    properties = dict(item.split("=", 1) for item in found[2].split(","))
    return found[1], {name: unescaped(value) for name, value in properties.items()}, unescaped(found[3])


def unescaped(text: str) -> str:
    for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, char)
    return text


def test_one_for_each_rule_and_file_worst_first(fixtures: Survey) -> None:
    found, last = commands(github.render(fixtures))
    levels = [level for level, _, _ in found]
    assert levels == sorted(levels, key=["error", "warning", "notice"].index)
    failure, first, second = found[:3]
    assert failure == (
        *("error", {"file": "notes.txt", "title": "file not examined"}, "notes.txt: no model file\nName a model."),
    )
    assert first[1] == {"file": "slow_momentum_module.pt", "title": "S104 warmup-residue"}
    assert first[2].startswith("9 layers, worst bn1: 81 % of running_mean") and "\nfix: normdoctor recal" in first[2]
    assert second[1] == {"file": "nan_statistics.pt", "title": "S101 nonfinite-stats"}
    pairs = {(finding.code, report.path) for report in fixtures.reports for finding in report.findings}
    assert len(found) == len(pairs) + 1
    layers = sum(len(report.layers) for report in fixtures.reports)
    assert last.startswith(f"normdoctor: 5 files, {layers} layers: 2 errors, 1 warning, ")
    assert last.endswith("; 1 file not examined")


def test_known_findings_are_left_out(sick: Sick, known: Callable[[Survey, str], Survey]) -> None:
    found, last = commands(github.render(known(Survey(reports=(sick("bn1", "bn2"),)), "S102")))
    assert found == []
    assert last == (
        "normdoctor: 1 file, 2 layers: nothing found; 2 known findings in the baseline; 1 finding of the baseline gone"
    )


def test_nothing_to_say() -> None:
    assert github.render(Survey(reports=())) == "normdoctor: 0 files, 0 layers: nothing found\n"


def test_hostile_names(hostile: Survey) -> None:
    found, _ = commands(github.render(hostile))
    assert len(found) == 2 * len(hostile.reports)
    paths = [properties["file"] for _, properties, _ in found]
    assert paths == 2 * [printable(Path(report.path).as_posix()) for report in hostile.reports]
    layers = [printable(report.layers[0].name) for report in hostile.reports]
    for (level, properties, message), layer in zip(found[len(layers) :], layers, strict=True):
        assert (level, set(properties)) == ("error", {"file", "title"})
        assert message.startswith(f"{layer}: running_var is negative")
        assert message.count("\n") == 2 and f"\nfix: see {layer}\nsource: https://" in message


@pytest.mark.parametrize("evil", ["\n::error::x", "\r\n::stop-commands::x", "%0A::error::x", ",line=3", "::x::"])
def test_no_command_can_be_smuggled_in(evil: str) -> None:
    survey = Survey(reports=(), failures=(Failure(path=evil, message=evil, hint=evil),))
    text = github.render(survey)
    assert len(text.splitlines()) == 2
    (found,), _ = commands(text)
    assert found[1] == {"file": printable(evil), "title": "file not examined"}
    assert found[2] == f"{printable(evil)}\n{printable(evil)}"
