"""Surveys for the tests of renderers: of fixtures, of layers in memory, and with everything that names can hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normdoctor import inspect
from normdoctor.findings import Failure, Report, Survey
from normdoctor.layers import Checkpoint, Container, Model, NormLayer
from normdoctor.rules import RULES
from normdoctor.rules.runner import examine

FIXTURES = Path(__file__).parents[2] / "fixtures"

HOSTILE = (
    "a|b",
    "a\\|b",
    "`code`",
    "``x`",
    "<script>alert(1)</script>",
    "<!--",
    "</details>",
    "line\nbreak\r\nagain",
    "::error::gone",
    "%0A::error::gone",
    "@someone",
    "#123",
    "GH-123",
    "someone/repo#1",
    "https://evil.example/x",
    "www.evil.example",
    "[text](1)",
    "![image](https://evil.example/x.png)",
    "{0}",
    "*bold* _it_ ~~s~~ $x$ :smile:",
    "=1+1",
    '=HYPERLINK("https://evil.example")',
    '"quoted", and comma',
    "\x1b[2J\x00\x07",
    "\u202etxt.exe",
    "no utf-8 \ud800",
    "back\\slash\\",
    " leading and trailing ",
)


def report_of(*layers: NormLayer, path: str = "model.pt", **changes: Any) -> Report:
    """What S102 (a negative variance, an error) says of one model of these layers."""
    checkpoint = Checkpoint(
        path=path, format="test", container=Container.MEMORY, models=(Model(key=None, layers=layers),)
    )
    return replace(examine(checkpoint, [rule for rule in RULES if rule.code == "S102"]), **changes)


@pytest.fixture(scope="session")
def sick(make_any_layer: Callable[..., NormLayer]) -> Callable[..., Report]:
    """A report of layers of these names, each with a negative variance in channel 3."""

    def made(*names: str, path: str = "model.pt", **changes: Any) -> Report:
        variance = np.linspace(0.3, 2.0, 16)
        variance[3] = -1.0
        return report_of(*(make_any_layer(name=name, running_var=variance) for name in names), path=path, **changes)

    return made


@pytest.fixture(scope="session")
def hostile(sick: Callable[..., Report]) -> Survey:
    """Every bad name as a layer, a path, a message, a note, a failure and a fingerprint."""
    reports = []
    for name in HOSTILE:
        path = name.replace("\ud800", "\udcff")  # what the system makes of a name that is no UTF-8
        report = sick(name, path=path, notes=(name,), format=name)
        findings = tuple(replace(f, message=f"{f.message} {name}", fix=f"see {name}") for f in report.findings)
        reports.append(replace(report, findings=findings))
    failures = tuple(
        Failure(path=report.path, message=f"{name}: {name}", hint=name)
        for name, report in zip(HOSTILE, reports, strict=True)
    )
    return Survey(reports=tuple(reports), failures=failures, fixed=tuple(f"S104 {name}" for name in HOSTILE))


@pytest.fixture(scope="session")
def fixtures() -> Survey:
    """Five really trained nets, four of them with something wrong, and a file that is none."""
    names = (
        *("slow_momentum_module.pt", "nan_statistics.pt", "dead_channels.pt"),
        *("transformer.pt", "healthy.onnx"),
    )
    reports = tuple(replace(inspect(FIXTURES / name), path=name) for name in names)
    failure = Failure(path="notes.txt", message="notes.txt: no model file", hint="Name a model.")
    return Survey(reports=reports, failures=(failure,))


def with_known(survey: Survey, code: str) -> Survey:
    """The survey with the findings of one rule in the baseline, which holds one more that is gone."""
    reports = tuple(
        replace(report, findings=tuple(replace(f, known=f.code == code) for f in report.findings))
        for report in survey.reports
    )
    return replace(survey, reports=reports, fixed=("S106 gone.bn",))


@pytest.fixture(scope="session")
def known() -> Callable[[Survey, str], Survey]:
    return with_known
