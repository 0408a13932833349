"""What all reports say of a model that was run on data, and what they say where there was no data."""

from __future__ import annotations

import csv as reader
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from normdoctor.findings import Report, Survey
from normdoctor.layers import Checkpoint, Container, Model, NormKind, NormLayer
from normdoctor.measured import DriftVerdict, Measured, Measurement, Preprocessing
from normdoctor.moments import Moments
from normdoctor.reports import console, csv, github, markdown, sarif
from normdoctor.reports import json as json_report
from normdoctor.rules import RULES
from normdoctor.rules.runner import Settings, examine

Build = Callable[..., NormLayer]
HOSTILE = "</details>|@someone\x1b[2J\ud800`x`"


def run_on_data(
    make: Build, *names: str, off: float = 0.0, container: Container = Container.ZIP, **said: Any
) -> Report:
    """A report of layers whose inputs are `off` standard deviations away from their buffers, the last one most."""
    layers = []
    for place, name in enumerate(names):
        layer = make(name=name)
        mean, var = layer.numbers.mean, layer.numbers.var
        assert mean is not None and var is not None
        z = off * (1 + place / len(names)) * np.where(np.arange(16) % 2, 1, -1)
        seen = Measured(
            moments=Moments(65536, mean + z * np.sqrt(var), var * 65536),
            samples=1024,
            batches=32,
            mean_spread=np.sqrt(var / 128),
            var_spread=var * np.sqrt(2 / 128),
            effective=np.full(16, 4096.0),
        )
        layers.append(replace(layer, measured=seen))
    options = "--data 'my data.npy' --arch nets:ResNet"
    about = {"data": "my data.npy", "samples": 1024, "batches": 32, "order": names, "options": options} | said
    model = Model(key=None, layers=tuple(layers), measurement=Measurement(**about))
    checkpoint = Checkpoint(path="model.pt", format="test", container=container, models=(model,))
    return examine(checkpoint, RULES, Settings())


def shown(report: Report, **options: Any) -> str:
    stream = io.StringIO()
    console.render(Survey(reports=(report,)), stream, **options)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_the_verdict_comes_with_its_numbers_and_the_next_command(make_layer: Build) -> None:
    report = run_on_data(make_layer, "bn1", "bn2", off=0.3, disagreement=0.12, output_change=0.4, accuracy=0.5)
    text = shown(report)
    assert report.drift is not None and report.drift.verdict is DriftVerdict.STALE
    assert "drift    stale" in text
    command = "normdoctor recalibrate model.pt --data 'my data.npy' --arch nets:ResNet -o"
    assert f"{command} model.recalibrated.pt\n" in text, "in one line"
    assert text.count("normdoctor recalibrate") == 1, "under the verdict, once"
    together = " ".join(text.split())
    assert together.count("prepared as for training; then: see drift below") == 3
    assert all(command in finding.fix for finding in report.findings if finding.code[:3] == "D60")
    assert "my data.npy: 1,024 samples in 32 batches; median KL" in together
    assert "12 % of the answers change and the outputs move by 40 %. 50 % of the answers are right." in together
    assert "statistics stale on this data" in together
    rows = [line.split() for line in text.splitlines() if line.startswith("bn")]
    assert [row[0] for row in rows[:2]] == ["bn2", "bn1"], "largest divergence first"
    assert "4,096" in rows[0]


def test_a_healthy_model_is_said_to_be_so(make_layer: Build) -> None:
    report = run_on_data(make_layer, "bn1", "bn2", off=0.01)
    assert report.drift is not None and report.drift.verdict is DriftVerdict.HEALTHY
    text = shown(report)
    assert "drift    healthy" in text and "recalibrate" not in text
    assert not [finding for finding in report.findings if finding.code.startswith("D60")]


def test_the_worst_ten_layers_unless_all_are_wanted(make_layer: Build) -> None:
    names = [f"backbone.stage{place}.with.a.long.name.bn" for place in range(14)]
    report = run_on_data(make_layer, *names, off=0.3)
    few, every = shown(report), shown(report, every_layer=True)
    assert few.count("more layers (--all)") == 2 and "more layers" not in every
    long = [line for line in few.splitlines() if len(line) > 80 and "normdoctor recalibrate" not in line]
    assert not [line for line in long if not line.startswith(("ERROR", "WARNING"))]


def test_layers_that_were_not_wanted_have_no_row(make_layer: Build) -> None:
    report = run_on_data(make_layer, "a", "b", off=0.3)
    layers = tuple(replace(layer) for layer in report.layers)
    model = Model(key=None, layers=layers, measurement=Measurement(data="d", samples=1, batches=1, order=("a", "b")))
    checkpoint = Checkpoint(path="m.pt", format="test", container=Container.ZIP, models=(model,))
    some = examine(checkpoint, RULES, wanted=lambda layer: layer.name == "b")
    assert some.drift is not None and [row.layer for row in some.drift.layers] == ["b"]
    assert some.drift.divergence == report.drift.divergence  # type: ignore[union-attr]


def test_what_was_not_compared_is_named(make_layer: Build) -> None:
    report = run_on_data(make_layer, "bn1", left={"bn9": "never reached"})
    assert "not compared: bn9, never reached" in shown(report)
    assert "not compared: `bn9`, never reached" in markdown.render(Survey(reports=(report,)))


def test_what_cannot_be_measured_asks_for_no_data(make_layer: Build) -> None:
    layers = (make_layer(name="gn", kind=NormKind.GROUP), make_layer(name="ln", kind=NormKind.LAYER))
    seen = Measurement(data="d.npy", samples=64, batches=2, order=())
    survey = Survey(reports=(without_data(*layers, measurement=seen),))
    for text in (shown(survey.reports[0], verbose=True), github.render(survey), markdown.render(survey)):
        assert "data (--data)" not in text and "need data" not in text and "could be compared" not in text
    (file,) = json.loads(json_report.render(survey))["files"]
    assert file["drift"] is None and not [skip for skip in file["skips"] if "measured" in skip["missing"]]


def test_stale_statistics_may_lag_behind(make_layer: Build) -> None:
    report = run_on_data(make_layer, "bn1", off=0.3)
    assert (
        report.drift is not None and "the moving average lags behind weights that still moved" in report.drift.meaning
    )


def test_a_live_module_whose_data_is_prepared_otherwise_gets_no_command(make_layer: Build) -> None:
    tried = (
        Preprocessing(words="as given", divergence=5.0),
        Preprocessing(words="divided by 255", divergence=0.001, options="--scale 1/255"),
    )
    for container, end in ((Container.MEMORY, "was trained"), (Container.ZIP, "--arch nets:ResNet --scale 1/255")):
        report = run_on_data(make_layer, "bn1", off=3.0, container=container, preprocessing=tried)
        (fix,) = (finding.fix for finding in report.findings if finding.code == "D608")
        assert fix.endswith(end)


def test_a_live_module_is_repaired_through_the_api(make_layer: Build) -> None:
    report = run_on_data(make_layer, "bn1", off=0.3, container=Container.MEMORY)
    assert report.drift is not None and report.drift.command == "normdoctor.recalibrate(module, data)"


def test_json_has_the_record_under_its_own_names(make_layer: Build) -> None:
    report = run_on_data(make_layer, "bn1", "bn2", off=0.3, order_dependence=float("nan"), output_change=float("inf"))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    file = json.loads(json_report.render(Survey(reports=(report,))), parse_constant=refuse)["files"][0]
    assert set(file["drift"]) == {
        "data", "samples", "batches", "verdict", "meaning", "command", "divergence", "noise", "beyond", "layers",
        "left", "disagreement", "output_change", "accuracy", "prepared",
    }  # fmt: skip
    assert file["drift"]["verdict"] == "stale" and file["drift"]["output_change"] == "inf"
    assert set(file["drift"]["layers"][0]) == {
        "layer", "channels", "broken", "divergence", "divergence_p95", "shift", "shift_p95", "ratio", "beyond",
        "effective", "worst",
    }  # fmt: skip
    assert file["drift"]["layers"][0]["shift"] == pytest.approx(0.45, rel=1e-3)


def test_csv_has_it_by_layer(make_layer: Build) -> None:
    report = run_on_data(make_layer, "bn1", "bn2", off=0.3)
    rows = list(reader.DictReader(io.StringIO(csv.render(Survey(reports=(report,))), newline="")))
    assert float(rows[0]["drift_z"]) == pytest.approx(0.3, rel=1e-3) and float(rows[1]["effective_samples"]) == 4096
    (row,) = reader.DictReader(io.StringIO(csv.render(Survey(reports=(without_data(make_layer()),))), newline=""))
    assert row["drift_kl"] == "" == row["effective_samples"]


def test_markdown_folds_it_away(make_layer: Build) -> None:
    text = markdown.render(Survey(reports=(run_on_data(make_layer, "bn1", off=0.3),)))
    assert "statistics <b>stale</b> on this data</summary>" in text
    assert "`normdoctor recalibrate model.pt --data 'my data.npy' --arch nets:ResNet -o model.recalibrated.pt`" in text
    assert "| layer | KL | p95 | z | p95 | var ratio | > 6 s.e. | values | worst |" in text
    assert text.count("<details>") == text.count("</details>") == 2


def test_hostile_names_do_no_harm(make_layer: Build) -> None:
    report = run_on_data(make_layer, HOSTILE, off=0.3, data=HOSTILE, left={HOSTILE: HOSTILE})
    survey = Survey(reports=(report,))
    for text in (shown(report), markdown.render(survey), github.render(survey), csv.render(survey)):
        assert "\x1b" not in text and "\ud800" not in text
    text = markdown.render(survey)
    assert text.count("</details>") == 2 and "@someone" not in re.sub("<code>.*?</code>", "", text)
    json.loads(json_report.render(survey))
    json.loads(sarif.render(survey))


def without_data(*layers: NormLayer, codes: str = "", measurement: Measurement | None = None) -> Report:
    """A report of layers of which nothing was measured."""
    model = Model(key=None, layers=layers, measurement=measurement)
    checkpoint = Checkpoint(path="model.pt", format="test", container=Container.ZIP, models=(model,))
    return examine(checkpoint, [rule for rule in RULES if rule.code.startswith(codes)])


def test_without_data_one_line_says_how_many_rules_need_it(make_layer: Build) -> None:
    layers = [make_layer(name=f"bn{place}") for place in range(5)]
    report = without_data(*layers)
    needing = [skip for skip in report.skips if skip.missing == ("measured",)]
    assert {skip.code for skip in needing} == {rule.code for rule in RULES if rule.code.startswith("D")}
    assert len(needing) == len({skip.code for skip in needing}), "one for each rule"
    for text in (shown(report), github.render(Survey(reports=(report,))), markdown.render(Survey(reports=(report,)))):
        assert text.count("11 checks need data (--data)") == 1 and "measured" not in text
    verbose = shown(report, verbose=True)
    assert verbose.count("need data: D601, D602") == 1 and "measured" not in verbose
    mixed = shown(without_data(make_layer(eps=None, momentum=None), codes=""))
    assert "for want of momentum, eps; 11 checks need data" in " ".join(mixed.split())
    assert "1 check needs data" in shown(without_data(make_layer(kind=NormKind.LAYER), codes="T704"))
