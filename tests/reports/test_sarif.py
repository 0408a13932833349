"""SARIF, against the official schema.

sarif-schema-2.1.0.json is the schema that OASIS publishes for SARIF 2.1.0 (oasis-tcs/sarif-spec,
Schemata/sarif-schema-2.1.0.json; copyright OASIS Open, under its IPR policy), as the npm package
@datadog/datadog-ci-plugin-sarif 5.25.0 carries it, in the layout of json.dumps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
import pytest
from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

from normdoctor import __version__
from normdoctor.findings import Failure, Report, Survey
from normdoctor.reports import sarif
from normdoctor.rules import RULES

SCHEMA = json.loads((Path(__file__).parent / "sarif-schema-2.1.0.json").read_text(encoding="utf-8"))
Sick = Callable[..., Report]


@pytest.fixture(scope="session")
def validator() -> Draft7Validator:
    Draft7Validator.check_schema(SCHEMA)
    return Draft7Validator(SCHEMA)


def log_of(survey: Survey) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(sarif.render(survey), parse_constant=refuse)


def run_of(survey: Survey) -> Any:
    (run,) = log_of(survey)["runs"]
    return run


def uris(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "uri")
        for value in node.values():
            yield from uris(value)
    elif isinstance(node, list):
        for value in node:
            yield from uris(value)


def test_schema_is_the_official_one() -> None:
    assert SCHEMA["$id"].endswith("oasis-tcs/sarif-spec/master/Schemata/sarif-schema-2.1.0.json")
    assert len(SCHEMA["definitions"]) == 52 and "physicalLocation" in SCHEMA["definitions"]


def test_valid(
    validator: Draft7Validator, fixtures: Survey, hostile: Survey, known: Callable[[Survey, str], Survey]
) -> None:
    for survey in (fixtures, hostile, known(fixtures, "S104"), Survey(reports=())):
        validator.validate(log_of(survey))


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "unknown property": lambda log: log.update(extra=1),
    "no version": lambda log: log.pop("version"),
    "no tool": lambda log: log["runs"][0].pop("tool"),
    "level": lambda log: log["runs"][0]["results"][0].update(level="info"),
    "no message": lambda log: log["runs"][0]["results"][0].pop("message"),
    "line 0": lambda log: log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"].update(
        startLine=0
    ),
    "rule without id": lambda log: log["runs"][0]["tool"]["driver"]["rules"][0].pop("id"),
    "baselineState": lambda log: log["runs"][0]["results"][0].update(baselineState="known"),
    "role": lambda log: log["runs"][0]["artifacts"][0].update(roles=["model"]),
    "success": lambda log: log["runs"][0]["invocations"][0].pop("executionSuccessful"),
    "an artifact twice": lambda log: log["runs"][0]["artifacts"].append(log["runs"][0]["artifacts"][0]),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_validation_can_fail(validator: Draft7Validator, sick: Sick, mutation: Callable[[Any], Any]) -> None:
    log = log_of(Survey(reports=(sick("bn1"),)))
    validator.validate(log)
    mutation(log)
    with pytest.raises(ValidationError):
        validator.validate(log)


def test_rules() -> None:
    driver = run_of(Survey(reports=()))["tool"]["driver"]
    assert driver["name"] == "normdoctor" and driver["semanticVersion"] == __version__
    assert [entry["id"] for entry in driver["rules"]] == [rule.code for rule in RULES]
    for entry, rule in zip(driver["rules"], RULES, strict=True):
        assert entry["helpUri"] == rule.reference and rule.why in entry["help"]["text"]
        assert entry["defaultConfiguration"]["level"] in ("error", "warning", "note")
        assert entry["properties"]["precision"] in ("low", "medium", "high")
        assert entry["properties"]["problem.severity"] in ("error", "warning", "recommendation")
        # What code scanning shows: more would be cut.
        assert len(entry["shortDescription"]["text"]) <= 1024 and len(entry["fullDescription"]["text"]) <= 1024
        assert len(entry["properties"]["tags"]) <= 20
        assert "{" not in entry["help"]["text"]


def test_results(fixtures: Survey) -> None:
    run = run_of(fixtures)
    assert len(run["results"]) == len(fixtures.findings) > 10
    pairs = [(report, finding) for report in fixtures.reports for finding in report.findings]
    for result, (report, finding) in zip(run["results"], pairs, strict=True):
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"] == finding.code
        (location,) = result["locations"]
        physical = location["physicalLocation"]
        artifact = physical["artifactLocation"]
        assert artifact["uri"] == report.path == run["artifacts"][artifact["index"]]["location"]["uri"]
        assert physical["region"]["startLine"] == 1
        names = [logical["fullyQualifiedName"] for logical in location.get("logicalLocations", [])]
        assert names == ([] if finding.layer is None else [finding.layer])
        assert finding.message in result["message"]["text"] and finding.fix in result["message"]["text"]
        assert result["partialFingerprints"]["normdoctor/v1"] == finding.fingerprint
        assert result["properties"]["channels"] == list(finding.channels)
        assert "baselineState" not in result
    by_code = {result["ruleId"]: result for result in run["results"]}
    assert [by_code[code]["level"] for code in ("S104", "S105", "F901")] == ["error", "warning", "note"]
    assert by_code["S104"]["properties"]["evidence"]["momentum"] == 0.001
    assert by_code["S106"]["properties"]["assumed"] == {"eps": 1e-05}


def test_layers_have_fingerprints_of_their_own(sick: Sick) -> None:
    """All results of a file share its line 1: code scanning tells them apart by the fingerprint alone."""
    results = run_of(Survey(reports=(sick("bn1", "bn2", "bn3"),)))["results"]
    marks = [result["partialFingerprints"]["primaryLocationLineHash"] for result in results]
    assert len(marks) == len(set(marks)) == 3
    again = run_of(Survey(reports=(sick("bn1", "bn2", "bn3", path="other.pt"),)))["results"]
    assert marks == [result["partialFingerprints"]["primaryLocationLineHash"] for result in again]


def test_failures_and_notes(sick: Sick) -> None:
    report = sick("bn1", notes=("a note",))
    assert run_of(Survey(reports=(report,)))["invocations"][0]["executionSuccessful"] is True
    survey = Survey(reports=(report,), failures=(Failure(path="bad.pt", message="cut short", hint="Copy it again."),))
    run = run_of(survey)
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    error, note = invocation["toolExecutionNotifications"]
    assert (error["level"], error["message"]["text"]) == ("error", "cut short Copy it again.")
    assert error["locations"][0]["physicalLocation"]["artifactLocation"] == {"uri": "bad.pt", "index": 1}
    assert (note["level"], note["message"]["text"]) == ("note", "a note")
    assert [artifact["location"]["uri"] for artifact in run["artifacts"]] == ["model.pt", "bad.pt"]


def test_baseline(fixtures: Survey, known: Callable[[Survey, str], Survey]) -> None:
    survey = known(fixtures, "S104")
    run = run_of(survey)
    states = {(result["ruleId"] == "S104", result["baselineState"]) for result in run["results"]}
    assert states == {(True, "unchanged"), (False, "new")}
    assert len(run["results"]) == len(survey.findings)  # what is gone is no result: code scanning would open it
    assert run["invocations"][0]["toolExecutionNotifications"][-1]["message"]["text"].endswith("S106 gone.bn")
    only_gone = replace(known(fixtures, "none"), fixed=("S106 x",))
    assert {result["baselineState"] for result in run_of(only_gone)["results"]} == {"new"}


def test_the_same_file_twice(validator: Draft7Validator, sick: Sick) -> None:
    log = log_of(Survey(reports=(sick("bn1"), sick("bn1"))))
    validator.validate(log)
    assert len(log["runs"][0]["artifacts"]) == 1


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("runs/a b.pt", "runs/a%20b.pt"),
        ("a:b.pt", "a%3Ab.pt"),
        ("a#1?.pt", "a%231%3F.pt"),
        ("50%.pt", "50%25.pt"),
        ("模型.pt", "%E6%A8%A1%E5%9E%8B.pt"),
        ("\udcff.pt", "%FF.pt"),
        ("/tmp/a b.pt", "file:///tmp/a%20b.pt"),
    ],
)
def test_paths(path: str, uri: str) -> None:
    assert sarif.uri(path) == uri


def test_hostile_names(hostile: Survey) -> None:
    run = run_of(hostile)
    for uri in uris(run):
        assert uri.isascii() and uri.isprintable() and " " not in uri
        assert not urlsplit(uri).scheme and not urlsplit(uri).netloc
        unquote_to_bytes(uri)
    said = [result["message"]["text"] for result in run["results"]]
    said += [entry["message"]["text"] for entry in run["invocations"][0]["toolExecutionNotifications"]]
    assert len(said) == 4 * len(hostile.reports)
    for text in said:
        assert text.isprintable()
        assert "](" not in text  # no link
        assert not {"{", "}"} & set(text.replace("{{", "").replace("}}", ""))  # no placeholder
    names = [result["locations"][0]["logicalLocations"][0] for result in run["results"]]
    assert all(name["name"].isprintable() and name["fullyQualifiedName"].isprintable() for name in names)


def test_values_that_json_lacks(sick: Sick) -> None:
    report = sick("bn1")
    odd = {"value": float("nan"), "list": [np.float32("inf"), np.int64(3)], "array": np.arange(2)}
    finding = replace(report.findings[0], evidence=odd)
    (result,) = run_of(Survey(reports=(replace(report, findings=(finding,)),)))["results"]
    assert result["properties"]["evidence"] == {"value": "nan", "list": ["inf", 3], "array": [0, 1]}


def test_many_files(validator: Draft7Validator, sick: Sick) -> None:
    reports = tuple(replace(sick("bn1"), path=f"epoch{number}.pt") for number in range(300))
    log = log_of(Survey(reports=reports))
    validator.validate(log)
    run = log["runs"][0]
    indices = [result["locations"][0]["physicalLocation"]["artifactLocation"]["index"] for result in run["results"]]
    assert sorted(set(indices)) == list(range(300))
