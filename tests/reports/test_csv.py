"""The table of layers as CSV."""

from __future__ import annotations

import csv as reader
import io
from collections.abc import Callable

import numpy as np
import pytest

from normdoctor.findings import Report, Survey
from normdoctor.layers import NormKind, NormLayer
from normdoctor.reports import csv
from normdoctor.reports.text import printable

from .conftest import report_of

Sick = Callable[..., Report]
Build = Callable[..., NormLayer]


def table(survey: Survey) -> list[dict[str, str]]:
    return list(reader.DictReader(io.StringIO(csv.render(survey), newline=""), strict=True))


def row(layer: NormLayer) -> dict[str, str]:
    (only,) = table(Survey(reports=(report_of(layer),)))
    return only


def test_one_row_per_layer(fixtures: Survey) -> None:
    rows = table(fixtures)
    assert [(row["file"], row["layer"]) for row in rows] == [
        (report.path, layer.name) for report in fixtures.reports for layer in report.layers
    ]
    assert all(set(row) == set(csv.COLUMNS) for row in rows)
    first = rows[0]
    assert first["kind"] == "BatchNorm" and first["origin"] == "torch.nn.modules.batchnorm.BatchNorm2d"
    assert (first["channels"], first["momentum"], first["eps"]) == ("8", "0.001", "1e-05")
    assert (first["training"], first["affine"], first["num_batches_tracked"]) == ("false", "true", "216")
    assert (first["severity"], first["codes"]) == ("error", "S104")


def test_lines_end_as_the_rfc_says(fixtures: Survey) -> None:
    text = csv.render(fixtures)
    assert text.count("\r\n") == text.count("\n") == 1 + sum(len(report.layers) for report in fixtures.reports)


def test_numbers_read_back_exactly(make_layer: Build) -> None:
    layer = make_layer(eps=0.1 + 0.2)
    found = row(layer)
    assert float(found["eps"]) == 0.1 + 0.2
    for name, values in (("weight", layer.numbers.gain), ("running_var", layer.numbers.var)):
        assert values is not None
        assert float(found[f"{name}_min"]) == values.min()
        assert float(found[f"{name}_median"]) == np.median(values)
        assert float(found[f"{name}_max"]) == values.max()


def test_negative_numbers_stay_numbers(make_layer: Build) -> None:
    assert float(row(make_layer())["bias_min"]) == pytest.approx(-0.2)


def test_what_the_file_does_not_say_is_empty(make_layer: Build) -> None:
    silent = row(make_layer(kind=NormKind.LAYER, bias=None, eps=None, training=None, affine=None))
    empty = ("origin", "groups", "eps", "momentum", "training", "affine", "track_running_stats")
    empty += ("num_batches_tracked", "bias_min", "running_mean_median", "running_var_max", "severity", "codes")
    assert {name: silent[name] for name in empty} == dict.fromkeys(empty, "")
    assert silent["weight_min"] and silent["nonfinite"] == "0"


def test_values_that_are_no_numbers(make_layer: Build) -> None:
    variance = np.full(16, np.nan)
    variance[2:] = np.inf
    found = row(make_layer(running_var=variance, momentum="cumulative"))
    assert (found["running_var_min"], found["running_var_max"], found["nonfinite"]) == ("", "", "16")
    assert found["momentum"] == "cumulative"


def test_known_findings_are_left_out(sick: Sick, known: Callable[[Survey, str], Survey]) -> None:
    survey = Survey(reports=(sick("bn1"),))
    (before,) = table(survey)
    assert (before["severity"], before["codes"]) == ("error", "S102")
    (after,) = table(known(survey, "S102"))
    assert (after["severity"], after["codes"]) == ("", "")


def test_nothing_but_the_header() -> None:
    assert csv.render(Survey(reports=())) == ",".join(csv.COLUMNS) + "\r\n"


def test_hostile_names(hostile: Survey) -> None:
    for found, report in zip(table(hostile), hostile.reports, strict=True):
        assert found["layer"].removeprefix("'") == printable(report.layers[0].name)
        assert found["file"].removeprefix("'") == printable(report.path)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "＝1", "=cmd|' /C calc'!A0"])
def test_no_formula(make_layer: Build, name: str) -> None:
    survey = Survey(reports=(report_of(make_layer(name=name, origin=name), path=name),))
    (found,) = table(survey)
    assert found["layer"] == found["origin"] == found["file"] == f"'{name}"
    assert row(make_layer(name="a=1"))["layer"] == "a=1"
