"""Baselines: what was accepted is known, what is worse or new counts, what is gone is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from normdoctor import baseline
from normdoctor.errors import UsageError
from normdoctor.findings import Confidence, Evidence, Failure, Finding, Report, Severity, Survey
from normdoctor.selection import find_rule


def finding(code: str, layer: str | None, severity: Severity = Severity.WARNING) -> Finding:
    return Finding(
        rule=find_rule(code), severity=severity, confidence=Confidence.HIGH, evidence_level=Evidence.TENSORS,
        layer=layer, channels=(), message="", evidence={}, assumed={}, fix="",
    )  # fmt: skip


def survey(*findings: Finding, failures: tuple[Failure, ...] = ()) -> Survey:
    report = Report(
        path="m.pt", format="test", layers=(), layer_names=(), findings=findings, skips=(), assumed={}, notes=(),
        near_misses=(), bytes_read=0, bytes_total=None,
    )  # fmt: skip
    return Survey(reports=(report,), failures=failures)


S106, S110, F901 = finding("S106", "bn1"), finding("S110", "bn2"), finding("F901", None)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    assert baseline.write(survey(S106, S110, F901), path) == 3
    assert baseline.read(path) == {
        "F901": Severity.WARNING,
        "S106 bn1": Severity.WARNING,
        "S110 bn2": Severity.WARNING,
    }
    compared = baseline.compare(survey(S106, S110, F901), baseline.read(path))
    assert all(found.known for found in compared.findings)
    assert (compared.worst, compared.fixed) == (None, ())


def test_new_fixed_and_known() -> None:
    compared = baseline.compare(survey(S106, F901), {"S106 bn1": Severity.WARNING, "S110 bn2": Severity.WARNING})
    assert [found.known for found in compared.findings] == [True, False]
    assert compared.fixed == ("S110 bn2",)
    assert compared.worst is Severity.WARNING


def test_worse_than_accepted_is_new() -> None:
    accepted = {"S106 bn1": Severity.WARNING}
    worse = survey(finding("S106", "bn1", Severity.ERROR))
    better = survey(finding("S106", "bn1", Severity.INFO))
    assert baseline.compare(worse, accepted).worst is Severity.ERROR
    assert baseline.compare(better, accepted).worst is None


def test_the_worst_of_several_files_is_accepted(tmp_path: Path) -> None:
    several = Survey(reports=(*survey(S106).reports, *survey(finding("S106", "bn1", Severity.ERROR)).reports))
    assert baseline.write(several, tmp_path / "known.json") == 1
    assert baseline.read(tmp_path / "known.json") == {"S106 bn1": Severity.ERROR}


def test_nothing_is_fixed_that_was_not_looked_for() -> None:
    accepted = {"S106 bn1": Severity.INFO, "A202 bn1": Severity.INFO}
    assert baseline.compare(survey(), accepted, lambda code, layer: code == "A202").fixed == ("A202 bn1",)
    failed = survey(failures=(Failure(path="x", message="", hint=""),))
    assert baseline.compare(failed, accepted).fixed == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 1, "findings": [{}]}'])
def test_what_is_no_baseline(tmp_path: Path, text: str) -> None:
    path = tmp_path / "known.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not a baseline"):
        baseline.read(path)
    with pytest.raises(UsageError, match="is not a baseline"):
        baseline.write(survey(S106), path)
    assert path.read_text() == text


def test_other_versions_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    path.write_text(json.dumps({"schema_version": 2, "findings": []}))
    with pytest.raises(UsageError, match="another version"):
        baseline.read(path)
    with pytest.raises(UsageError, match="no such baseline"):
        baseline.read(tmp_path / "none.json")


def test_never_over_a_model(tmp_path: Path) -> None:
    model = tmp_path / "m.pt"
    model.write_bytes(b"PK\x03\x04 and more\0")
    with pytest.raises(UsageError, match="not a report"):
        baseline.write(survey(S106), model)
