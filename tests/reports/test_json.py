"""The JSON report: its shape is a promise, and it is strict whatever stands in the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from normdoctor.findings import Survey
from normdoctor.layers import Checkpoint, Container, Model, NormLayer
from normdoctor.reports import json as json_report
from normdoctor.rules import RULES
from normdoctor.rules.runner import examine

FILE = {
    "path", "format", "bytes_read", "bytes_total", "layers", "findings", "skips", "assumed", "notes", "near_misses",
    "drift", "comparison",
}  # fmt: skip
LAYER = {
    "name", "kind", "origin", "channels", "groups", "eps", "momentum", "training", "affine", "track_running_stats",
    "zero_centred", "num_batches_tracked", "aliases", "stats", "dtypes", "place",
}  # fmt: skip
FINDING = {
    "code", "name", "severity", "confidence", "evidence_level", "layer", "channels", "message", "evidence",
    "assumed", "fix", "reference", "fingerprint", "known",
}  # fmt: skip


def document(layers: list[NormLayer]) -> Any:
    checkpoint = Checkpoint(
        path="m.pt", format="test", container=Container.MEMORY, models=(Model(key=None, layers=tuple(layers)),)
    )
    text = json_report.render(Survey(reports=(examine(checkpoint, RULES),)))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_shape(make_layer: Callable[..., NormLayer]) -> None:
    report = document([make_layer(running_var=np.full(16, np.nan)), make_layer(name="b", eps=None, momentum=None)])
    assert set(report) == {"schema_version", "files", "failed", "fixed", "summary"}
    file = report["files"][0]
    assert set(file) == FILE
    assert all(set(layer) == LAYER for layer in file["layers"])
    assert file["findings"] and all(set(finding) == FINDING for finding in file["findings"])
    assert all(set(skip) == {"code", "layer", "missing"} for skip in file["skips"])
    counts = {
        "files",
        "failed",
        "passed_over",
        "layers",
        "error",
        "warning",
        "info",
        "known",
        "fixed",
        "skips",
        "rules",
    }
    assert set(report["summary"]) == counts


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["weight", "bias", "running_mean", "running_var"])
def test_no_bare_nan(make_layer: Callable[..., NormLayer], field: str, value: float) -> None:
    vector = np.linspace(0.5, 1.5, 16)
    vector[3] = value
    report = document([make_layer(**{field: vector}), make_layer(name="other")])
    assert report["files"][0]["layers"][0]["stats"][field]["nonfinite"] == 1


def test_names_that_are_no_utf8(make_layer: Callable[..., NormLayer]) -> None:
    layer = replace(make_layer(), name="bn\ud800")
    assert document([layer])["files"][0]["layers"][0]["name"] == "bn\\ud800"


def test_one_finding_per_layer_and_rule(make_layer: Callable[..., NormLayer]) -> None:
    sick = [make_layer(name=f"bn{n}", running_var=np.full(16, -1.0)) for n in range(4)]
    findings = document(sick)["files"][0]["findings"]
    keys = [(finding["code"], finding["layer"]) for finding in findings]
    assert len(keys) == len(set(keys))
    assert [key for key in keys if key[0] == "S102"] == [("S102", f"bn{n}") for n in range(4)]
