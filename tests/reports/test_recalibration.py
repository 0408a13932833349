"""What a recalibration says of itself: console, JSON and Markdown, with every name that a stranger may have chosen."""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from normdoctor.findings import Finding, Severity
from normdoctor.layers import NormLayer
from normdoctor.recalibration.debias import Repair, Untouched
from normdoctor.recalibration.judging import Accuracy, Entropy, Judgement
from normdoctor.recalibration.records import DebiasReport, LayerChange, MeasuredReport
from normdoctor.reports import recalibration_json, recalibration_markdown, write_recalibration
from normdoctor.reports.recalibration_extent import Extent, extent_of, worst_first
from normdoctor.reports.recalibration_wording import left_groups, scarcity
from normdoctor.reports.text import printable
from normdoctor.rules.calibration_data import recalibration_hurts

from .conftest import HOSTILE

OWN_HTML = re.compile(r"</?details>|</?summary>|</?code>")

BOTH = {
    "schema_version", "source", "method", "layers", "left", "summary", "notes", "dry_run", "output", "backup",
}  # fmt: skip
MEASURED = BOTH | {"format", "prior", "data", "judgement", "findings"}
DEBIAS = BOTH | {"recognisable"}
SUMMARY = {
    "layers", "left", "broken_channels", "changed", "changed_layers", "median_shift", "median_ratio", "furthest_layer",
    "fewest_values", "layers_with_too_little_data", "not_finite",
}  # fmt: skip

HEALTHY = "The stored statistics fit this data: the model was healthy on it."


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def row(name: str = "bn1", **changes: Any) -> LayerChange:
    values: dict[str, Any] = {
        "channels": 64,
        "broken": 0,
        "shift": 0.011,
        "worst_shift": 0.12,
        "ratio": 1.02,
        "effective": 2345.6,
        "standard_error": 0.021,
        "residual_shift": 3.1e-7,
        "residual_ratio": 8.2e-8,
    }
    return LayerChange(layer=name, **values | changes)


STALE = row("layer4.bn2", shift=1.3, worst_shift=6.2, ratio=0.25)

ACCURACY = Accuracy(samples=3000, before=0.841, after=0.873, gained=140, lost=44)
WORSE = Accuracy(samples=3000, before=0.873, after=0.841, gained=44, lost=140)


def judged(**changes: Any) -> Judgement:
    values: dict[str, Any] = {
        "samples": 3000,
        "scores": "logits",
        "why_no_scores": "",
        "accuracy": ACCURACY,
        "entropy": Entropy(0.5, 0.46),
        "agreement": 0.9127,
        "output_change": 0.183,
        "broken_before": 0,
        "broken_after": 0,
    }
    return Judgement(**values | changes)


def report_of(*rows: LayerChange, **changes: Any) -> MeasuredReport:
    values: dict[str, Any] = {
        "source": "model.pt",
        "format": "PyTorch module (zip)",
        "method": "exact",
        "data": "calib.npz (3x32x32 float32)",
        "options": "--data calib.npz --trust",
        "samples": 3000,
        "batches": 94,
        "stopped_early": False,
        "prior": None,
        "rows": rows or (row("stem.bn"), row("layer1.bn1", shift=0.02), STALE),
        "judgement": judged(),
        "seconds": 12.0,
        "output": "fixed.pt",
    }
    return MeasuredReport(**values | changes)


def console(report: DebiasReport | MeasuredReport, **options: Any) -> str:
    stream = io.StringIO()
    write_recalibration(report, "console", stream, **options)
    return stream.getvalue()


def said(report: DebiasReport | MeasuredReport) -> str:
    """The console's words in one line, so that it does not matter where lines break."""
    return " ".join(console(report).split())


def markdown(report: DebiasReport | MeasuredReport) -> str:
    stream = io.StringIO()
    write_recalibration(report, "markdown", stream)
    return stream.getvalue()


def document(report: DebiasReport | MeasuredReport) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    stream = io.StringIO()
    write_recalibration(report, "json", stream)
    stream.getvalue().encode()  # no lone surrogates
    found: dict[str, Any] = json.loads(stream.getvalue(), parse_constant=refuse)
    return found


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


def seen(report: DebiasReport | MeasuredReport) -> str:
    """What a reader of the Markdown sees, in one line."""
    text = html.unescape(re.sub(r"<[^>]*>", " ", rendered(markdown(report)))).replace("\u200b", "")
    return " ".join(text.split())


def test_console_at_a_glance() -> None:
    text = console(report_of(left={"head.bn": "never reached with this data"}, notes=("float64 is cast",)))
    lines = text.splitlines()
    assert lines[:5] == [
        "model.pt",
        "  PyTorch module (zip)",
        "  calib.npz (3x32x32 float32); 3,000 samples in 94 batches",
        "  exact: self-consistent, every norm measured with those before it repaired",
        "  measured in 12 s, 250 samples/s",
    ]
    assert lines[6].split() == ["layer", "C", "shift", "max", "variance", "values", "s.e.", "residual"]
    assert [line.split()[0] for line in lines[7:10]] == ["layer4.bn2", "layer1.bn1", "stem.bn"]
    assert lines[7].split()[1:] == ["64", "1.3", "6.2", "0.25", "2,346", "0.021", "3e-7"]
    assert "left   1 norm: head.bn\n  never reached with this data\n" in text
    assert "\naccuracy: 84.1 % -> 87.3 % (+3.2 +/- 0.4 points, p 7e-13, 3,000 samples):\nsignificantly better" in text
    assert "\nentropy: 0.5 -> 0.46 nats (-8 %; reported, not judged)\n" in text
    assert "\nsame answer: 91.3 % of 3,000 samples" in text
    assert "\noutputs: moved by 18 % of their size" in text
    assert "note: float64 is cast\n" in text and "WARNING" not in text and "broken" not in lines[6]
    assert text.index("wrote fixed.pt\n") < text.index("next: normdoctor inspect fixed.pt --data calib.npz --trust\n")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rows": (row(residual_shift=0.0, residual_ratio=0.0),)}, "every norm sees exactly these"),
        ({"rows": (row(residual_shift=math.nan),)}, "means by at most nan s.d."),
        ({"judgement": judged(entropy=Entropy(1.7, 1.7))}, "entropy: 1.7 nats before and after"),
        ({"judgement": judged(output_change=5.13)}, "outputs: moved by 5.1 times their size"),
        ({"stopped_early": True}, "94 batches; stopped early, --until was reached"),
        ({"batches": 1, "samples": 1}, "1 sample in 1 batch"),
        ({"method": "one-pass"}, "one-pass: what training mode sees, with dropout off"),
        ({"method": "one-pass"}, "--method exact makes it 0"),
        ({"method": "blend", "prior": 16.0}, "the stored count as 16 samples beside 3,000"),
        ({"seconds": 0.25}, "measured in 0.25 s, 12,000 samples/s"),
        ({"seconds": 7500.0}, "measured in 2 h 5 min, 0.4 samples/s"),
        ({"judgement": None}, "not compared (--no-verify)"),
        ({"judgement": judged(accuracy=None)}, "accuracy: not judged, the data has no labels (--labels)"),
        (
            {"judgement": judged(accuracy=None, scores=None, why_no_scores="no output is of a float type")},
            "accuracy: not judged, no output is of a float type",
        ),
        ({"judgement": judged(entropy=None)}, "entropy: not known, a score is NaN or infinite"),
        ({"judgement": judged(entropy=Entropy(0.0, 0.1))}, "entropy: 0 -> 0.1 nats (reported, not judged)"),
        ({"judgement": judged(agreement=0.99999)}, "same answer: more than 99.9 % of 3,000 samples"),
        ({"judgement": judged(agreement=1.0, accuracy=None)}, "same answer: 100 % of 3,000 samples"),
        (
            {"judgement": judged(accuracy=replace(ACCURACY, after=0.841, gained=0, lost=0))},
            "84.1 % before and after: no answer of 3,000 samples became right or wrong",
        ),
        ({"judgement": judged(accuracy=WORSE)}, "significantly worse"),
        ({"judgement": judged(accuracy=WORSE)}, "wrote fixed.pt, though it is worse"),
        (
            {"judgement": judged(accuracy=replace(ACCURACY, samples=9000, after=0.8412, gained=4, lost=2))},
            "84.10 % -> 84.12 % (+0.02 +/- 0.03 points, p 0.69, 9,000 samples): no significant difference",
        ),
        (
            {"judgement": judged(accuracy=Accuracy(samples=9999, before=0.1, after=0.9, gained=7999, lost=0))},
            "p below 1e-300",
        ),
        ({"judgement": judged(output_change=0.0)}, "outputs: moved by nothing"),
        ({"judgement": judged(output_change=1300.0)}, "outputs: moved by 1300 times their size"),
        ({"judgement": judged(output_change=None)}, "outputs: how far they moved cannot be told"),
        (
            {"judgement": judged(output_change=None, broken_before=1024)},
            "NaN or Inf: 1,024 values of the outputs before, 0 after",
        ),
        ({"judgement": judged(broken_after=1)}, "NaN or Inf: 0 values of the outputs before, 1 after"),
        ({"dry_run": True, "output": None}, "nothing was written (--dry-run)"),
        ({"output": None}, "no file was written"),
        ({"output": "a b.pt", "backup": "a b.pt.orig"}, "wrote a b.pt what was there before is kept as a b.pt.orig"),
        ({"notes": ("one sample was dropped",)}, "note: one sample was dropped"),
        ({"rows": ()}, "No norm was measured."),
    ],
)
def test_what_must_be_said(changes: dict[str, Any], expected: str) -> None:
    report = replace(report_of(), **changes)
    assert expected in said(report)
    assert expected in seen(report)


def test_a_command_can_be_copied() -> None:
    name = f"my {'long ' * 30}model.pt"
    assert f"next: normdoctor inspect '{name}' --data calib.npz --trust\n" in console(report_of(output=name))
    assert "next:" not in console(report_of(output=None)) + console(report_of(output=None, dry_run=True))


def test_worst_first_and_everything_when_asked() -> None:
    rows = [row(f"bn{n}", shift=0.001 * n) for n in range(30)]
    rows[3] = replace(rows[3], broken=1)
    rows[4] = replace(rows[4], broken=2, shift=math.inf, worst_shift=math.inf, ratio=math.inf)
    rows[5] = replace(rows[5], ratio=0.1)
    rows[6] = replace(rows[6], ratio=math.nan)
    rows[7] = replace(rows[7], shift=1.5)
    text = console(report_of(*rows))
    shown = re.findall(r"^(bn\d+) ", text, re.MULTILINE)
    assert shown[:6] == ["bn4", "bn3", "bn6", "bn5", "bn7", "bn29"] and len(shown) == 10
    assert re.search(r"^bn4 +64 +2 +inf +inf +inf ", text, re.MULTILINE) and " nan " in text
    assert "… 20 more layers (--all)" in text
    everything = console(report_of(*rows), every_norm=True)
    assert len(re.findall(r"^bn\d+ ", everything, re.MULTILINE)) == 30 and "--all" not in everything
    assert "3 channels of 2 layers held NaN, infinite or negative statistics." in said(report_of(*rows))
    assert [found.layer for found in worst_first([row("a"), row("b")])] == ["a", "b"]


class TestHowMuchChanged:
    def test_little(self) -> None:
        words = said(report_of(row("a", shift=0.0301), row("b", ratio=0.96), row("c", ratio=1.03), judgement=None))
        assert "changed little: no layer's median mean moved by more than 0.031 s.d., nor its median variance" in words
        assert "by more than 4.2 %" in words and HEALTHY in words
        assert "Single channels" not in words

    def test_little_with_a_channel_far_off(self) -> None:
        words = said(report_of(row("a"), row("b", worst_shift=7.0), judgement=None))
        assert HEALTHY in words and "Single channels moved further: by up to 7 s.d. in b." in words

    @pytest.mark.parametrize(
        "changes",
        [
            {"method": "blend", "prior": 1000.0},
            {"judgement": judged(accuracy=WORSE)},
            {"judgement": judged(accuracy=ACCURACY)},
            {"judgement": judged(accuracy=None, broken_before=3)},
        ],
    )
    def test_nobody_is_called_healthy_without_reason(self, changes: dict[str, Any]) -> None:
        words = said(replace(report_of(row(), judgement=None), **changes))
        assert "changed little" in words and HEALTHY not in words

    @pytest.mark.parametrize("judgement", [None, judged(accuracy=None), judged(accuracy=replace(ACCURACY, gained=44))])
    def test_healthy(self, judgement: Judgement | None) -> None:
        assert HEALTHY in said(report_of(row(), judgement=judgement))

    @pytest.mark.parametrize(
        ("changes", "little"),
        [
            ({"shift": 0.049}, True),
            ({"shift": 0.051}, False),
            ({"ratio": 1.09}, True),
            ({"ratio": 1.11}, False),
            ({"ratio": 0.92}, True),
            ({"ratio": 0.9}, False),
            ({"broken": 1}, False),
            ({"shift": math.nan}, False),
            ({"shift": math.inf}, False),
            ({"ratio": math.inf}, False),
            ({"ratio": 0.0}, False),
            ({"ratio": math.nan}, False),
        ],
    )
    def test_limits(self, changes: dict[str, Any], little: bool) -> None:
        report = report_of(row(**changes))
        assert ("changed little" in said(report)) is little
        assert document(report)["summary"]["changed"] == ("little" if little else "much")

    def test_more_than_little(self) -> None:
        rows = [row(f"bn{n}") for n in range(19)]
        some, much = report_of(*rows, STALE), report_of(*rows[:3], STALE)
        assert extent_of(some.rows) is Extent.SOME and extent_of(much.rows) is Extent.MUCH
        assert "changed little but in 1 of 20 layers, where the median" in said(some)
        assert "changed: in 1 of 4 layers the median" in said(much)
        for report in (some, much):
            words = said(report)
            assert "Typical layer: 0.011 s.d., variance ratio 1.02" in words and HEALTHY not in words
            assert "furthest layer4.bn2: 1.3 s.d., ratio 0.25." in words
        assert extent_of((*rows, row("x", broken=1))) is Extent.MUCH


class TestTooLittleData:
    def test_is_loud(self) -> None:
        text = console(report_of(row("a", effective=449.0), row("b", effective=100.0), row("c"), samples=1000))
        words = " ".join(text.split())
        assert "WARNING too little data: it is worth 100 independent values a channel in b, and fewer than" in words
        assert "fewer than 450 in 2 of 3 layers" in words
        assert "A variance is then uncertain by about 14 %, a mean by 0.1 s.d." in words  # sqrt(2 / 100), 1 / sqrt(100)
        assert "Give about 4,500 samples" in words and "--method blend" in words
        assert text.index("WARNING") < text.index("layer  ")
        assert "**WARNING** too little data" in markdown(report_of(row(effective=100.0)))

    def test_enough_is_silent(self) -> None:
        report = report_of(row(effective=450.0))
        assert scarcity(report) is None
        assert "WARNING" not in console(report) + markdown(report)

    @pytest.mark.parametrize(
        ("report", "severe", "expected"),
        [
            (report_of(row(effective=31.9)), True, "it is worth 32 independent"),
            (report_of(row(effective=33.0)), False, "it is worth 33 independent"),
            (report_of(row(effective=0.0)), True, "it is worth 0 independent"),
            (report_of(row(effective=math.nan)), False, "cannot be told in 1 of 1 layer"),
            (report_of(row(effective=None), samples=1), True, "cannot be told in 1 of 1 layer"),
            (report_of(row("a", effective=None), row("b")), False, "cannot be told in 1 of 2 layers"),
            (report_of(row(effective=20.0), method="blend", prior=9.0), True, "What is stored softens this"),
        ],
    )
    def test_how_bad(self, report: MeasuredReport, severe: bool, expected: str) -> None:
        found = scarcity(report)
        assert found is not None and found.severe is severe and expected in found.words
        assert expected in said(report) and expected in seen(report)
        document(report)

    def test_counts_in_json(self) -> None:
        summary = document(report_of(row("a", effective=20.0), row("b", effective=None), row("c")))["summary"]
        assert summary["fewest_values"] == 20.0 and summary["layers_with_too_little_data"] == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    report = report_of(row("a", broken=1), row("b", effective=9.0), judgement=judged(accuracy=WORSE, broken_after=2))
    coloured = Terminal()
    write_recalibration(report, "console", coloured)
    red = re.findall(r"^\x1b\[1;31m([\w ]+?) *\x1b\[0m", coloured.getvalue(), re.MULTILINE)
    assert red == ["WARNING", "a", "accuracy", "NaN or Inf"]
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    write_recalibration(report, "console", plain)
    assert "31m" not in plain.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured.getvalue()) == console(report)


def test_a_stream_without_unicode() -> None:
    binary = io.BytesIO()
    stream = io.TextIOWrapper(binary, encoding="ascii")
    write_recalibration(report_of(*(row(f"{'long.' * 30}bn{n}") for n in range(20))), "console", stream)
    stream.flush()
    assert b"... 10 more layers" in binary.getvalue()


LONG = "backbone.stages.3.blocks.11.attention.projection.normalisation.batchnorm"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", [LONG, "ノルム層の名前" * 9, "e\u0301" * 60])
def test_console_fits_its_width(monkeypatch: pytest.MonkeyPatch, width: int, name: str) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(width))
    widest = {"shift": 1.5e-7, "worst_shift": 1.2e-300, "ratio": 1.3e300, "effective": 123456789.0, "broken": 4096}
    rows = tuple(row(f"{name}.bn{n}", channels=4096, **widest) for n in range(12))
    text = console(report_of(*rows), every_norm=True)
    table = [line for line in text.splitlines() if "123,456,789" in line]
    assert len(table) == 12 and all(f"bn{n} " in line for n, line in enumerate(table))
    assert all(cell_len(line) <= width for line in table)
    kept = console(report_of(row("bn1"), STALE, left={LONG: "never reached " * 20}, notes=(f"{LONG} " * 4,)))
    wide = [line for line in kept.splitlines() if len(line) > width]
    assert [line for line in wide if line.count(LONG) != 1] == []
    assert "\x1b" not in text + kept


def hostile() -> MeasuredReport:
    rows = tuple(row(name, broken=1, effective=9.0) for name in HOSTILE)
    return report_of(
        *rows,
        source=HOSTILE[4],
        format=HOSTILE[5],
        data=HOSTILE[16],
        left={f"{name}{n}": name for n, name in enumerate(HOSTILE)},
        judgement=judged(accuracy=None, scores=None, why_no_scores=" ".join(HOSTILE)),
        notes=HOSTILE,
        output=HOSTILE[4],
        backup=HOSTILE[23],
    )


def hostile_debias(make_layer: Callable[..., NormLayer]) -> DebiasReport:
    return debias_report(
        repairs=tuple(repair_of(make_layer(name=name)) for name in HOSTILE),
        untouched=tuple(Untouched(layer=make_layer(name=name), reason=name) for name in HOSTILE),
        source=HOSTILE[4],
        notes=HOSTILE,
        output=HOSTILE[23],
    )


def check_console(text: str) -> None:
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\x1b[2J" in text


def check_markdown(text: str) -> None:
    """Nothing but our own HTML, no links or images, nothing that GitHub would make one of; and whole tables."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for token in [inner for outer in parser.parse(text) for inner in (outer, *(outer.children or ()))]:
        if token.type in ("html_block", "html_inline"):
            assert "<" not in OWN_HTML.sub("", token.content)
        assert token.type not in ("image", "link_open", "em_open", "s_open", "fence", "code_block")
    outside = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<code\b.*?</code>", "", rendered(text), flags=re.DOTALL)))
    assert not re.search(r"@\w|#\d|GH-\d|://|www\.|:\w+:|\x1b|\u202e", outside)
    last = re.findall(r"<table>.*?</table>", rendered(text), re.DOTALL)[-1]
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", found, re.DOTALL) for found in re.findall(r"<tr>(.*?)</tr>", last, re.DOTALL)
    ]
    titles = last.count("<th")
    assert {len(cells) for cells in rows[1:]} == {titles - 1}  # <thead> counts as one
    names = [html.unescape(re.sub("<[^>]*>", "", cells[0])) for cells in rows[1:]]
    assert names == [printable(name) for name in HOSTILE]


def test_names_of_a_stranger(make_any_layer: Callable[..., NormLayer]) -> None:
    for report in (hostile(), hostile_debias(make_any_layer)):
        check_console(console(report, every_norm=True))
        check_console(console(replace(report, source="\x1b[2J")))
        check_markdown(markdown(report))
        layers = document(report)["layers"]
        assert [layer["layer"] for layer in layers][:-3] == list(HOSTILE)[:-3]
        assert layers[-3]["layer"] == "no utf-8 \\ud800"


@pytest.mark.parametrize("name", ["bn", "|" * 4000, "@x" * 3000])
def test_markdown_fits_into_a_comment(name: str) -> None:
    rows = tuple(row(f"{name}{n}", broken=1, effective=3.0) for n in range(2000))
    left = {f"{name}{n}": f"{name} {n}" for n in range(900)}
    report = report_of(*rows, left=left, notes=(name,) * 900, data=name, format=name)
    text = markdown(report)
    assert len(text) < 65_536
    assert "Left out to fit into a comment" in text
    assert text.count("<details>") == text.count("</details>") == 1
    tables = re.findall(r"<table>.*?</table>", rendered(text), re.DOTALL)
    assert len(tables) == 2 and all(table.count("<tr>") > 2 for table in tables)


class TestJson:
    def test_shape(self) -> None:
        found = document(report_of(left={"head.bn": "never reached"}))
        assert set(found) == MEASURED and found["schema_version"] == recalibration_json.SCHEMA_VERSION == 1
        assert set(found["layers"][0]) == {field.name for field in fields(LayerChange)} | {"not_finite"}
        assert [layer["layer"] for layer in found["layers"]] == ["stem.bn", "layer1.bn1", "layer4.bn2"]  # as forward
        assert set(found["summary"]) == SUMMARY
        assert found["summary"]["furthest_layer"] == "layer4.bn2" and found["summary"]["changed_layers"] == 1
        assert found["left"] == [{"layer": "head.bn", "reason": "never reached"}]
        assert set(found["judgement"]) == {field.name for field in fields(Judgement)}
        accuracy = found["judgement"]["accuracy"]
        assert set(accuracy) == {field.name for field in fields(Accuracy)} | {"standard_error", "p_value", "verdict"}
        assert accuracy["verdict"] == "better" and accuracy["p_value"] == ACCURACY.p_value
        assert found["judgement"]["entropy"] == {"before": 0.5, "after": 0.46, "change_percent": pytest.approx(-8)}
        assert document(report_of(judgement=None))["judgement"] is None
        assert document(report_of(judgement=judged(accuracy=None, entropy=None)))["judgement"]["entropy"] is None

    def test_numbers_that_json_lacks(self) -> None:
        odd = row("a", shift=math.inf, worst_shift=np.float64("inf"), ratio=math.nan, residual_shift=None)
        found = document(report_of(odd, row("b"), row("c", shift=math.inf)))
        first, second, _ = found["layers"]
        assert first["not_finite"] == {"shift": "inf", "worst_shift": "inf", "ratio": "nan"}
        assert first["shift"] is first["worst_shift"] is first["ratio"] is first["residual_shift"] is None
        assert second["not_finite"] == {} and second["shift"] == 0.011
        assert found["summary"]["median_shift"] is None and found["summary"]["not_finite"] == {"median_shift": "inf"}

    def test_nothing_measured(self) -> None:
        summary = document(replace(report_of(), rows=()))["summary"]
        assert summary["changed"] == "nothing" and summary["furthest_layer"] is summary["median_shift"] is None


HURTS = Finding(
    rule=recalibration_hurts,
    severity=Severity.WARNING,
    confidence=recalibration_hurts.confidence,
    evidence_level=recalibration_hurts.evidence_level,
    layer=None,
    channels=(),
    message="It is worse.",
    evidence={"before": 0.9},
    assumed={},
    fix="use other data",
)

ANOTHER: dict[str, Any] = {
    "source": "other.pt",
    "format": "ONNX",
    "method": "one-pass",
    "data": "other.npy",
    "options": "--data other.npy",
    "samples": 17,
    "batches": 2,
    "stopped_early": True,
    "prior": 3.0,
    "rows": (row("other"),),
    "left": {"other": "never reached"},
    "judgement": None,
    "findings": (HURTS,),
    "notes": ("another",),
    "seconds": 99.0,
    "dry_run": True,
    "output": "other.pt",
    "backup": "other.orig",
}

ANOTHER_ROW: dict[str, Any] = {
    "layer": "other",
    "channels": 7,
    "broken": 2,
    "shift": 0.3,
    "worst_shift": 3.0,
    "ratio": 2.0,
    "effective": 777.0,
    "standard_error": 0.5,
    "residual_shift": 0.7,
    "residual_ratio": 0.8,
}

ANOTHER_JUDGEMENT: dict[str, Any] = {
    "samples": 2999,
    "scores": None,
    "accuracy": None,
    "entropy": None,
    "agreement": 0.5,
    "output_change": 0.5,
    "broken_before": 1,
    "broken_after": 1,
}


def test_no_field_is_forgotten() -> None:
    """Whatever changes in the records is seen in every format."""
    base = report_of(STALE)
    assert set(ANOTHER) == {field.name for field in fields(MeasuredReport)}
    assert set(ANOTHER_ROW) == {field.name for field in fields(LayerChange)}
    judgement_fields = {field.name for field in fields(Judgement)} - {"why_no_scores"}  # tried above
    assert set(ANOTHER_JUDGEMENT) == judgement_fields
    others = [replace(base, **{name: value}) for name, value in ANOTHER.items()]
    others += [replace(base, rows=(replace(STALE, **{name: value}),)) for name, value in ANOTHER_ROW.items()]
    others += [replace(base, judgement=judged(**{name: value})) for name, value in ANOTHER_JUDGEMENT.items()]
    for show in (console, markdown, lambda report: json.dumps(document(report))):
        shown = show(base)
        assert [other for other in others if show(other) == shown] == []


# --- debias ---


def repair_of(layer: NormLayer, **changes: Any) -> Repair:
    values: dict[str, Any] = {
        "running_mean": np.zeros(layer.channels),
        "running_var": np.full(layer.channels, 0.25),
        "residue": 0.806,
        "momentum": 0.001,
        "updates": 216,
        "counter": 9206,
    }
    return Repair(layer=layer, **values | changes)


def debias_report(**changes: Any) -> DebiasReport:
    values: dict[str, Any] = {
        "source": "model.pt",
        "repairs": (),
        "untouched": (),
        "notes": (),
        "recognisable": True,
        "output": "fixed.pt",
    }
    return DebiasReport(**values | changes)


class TestDebias:
    def test_console(self, make_any_layer: Callable[..., NormLayer]) -> None:
        layers = [make_any_layer(name=f"bn{n}", running_var=np.full(16, 0.864)) for n in range(15)]
        repairs = tuple(repair_of(layer, residue=0.1 + n / 100) for n, layer in enumerate(layers))
        untouched = (Untouched(layer=make_any_layer(name="head"), reason="the residue is below 0.0001"),)
        report = debias_report(repairs=repairs, untouched=untouched, notes=("one",), recognisable=False)
        text = console(report)
        lines = text.splitlines()
        assert lines[0] == "model.pt: 15 layers debiased"
        assert lines[2].split() == ["layer", "residue", "median", "running_var", "updates"]
        assert lines[3].split() == ["bn14", "24.0%", "0.864", "->", "0.25", "216", "->", "9,206"]
        assert "\nand 3 more\n" in text and len(re.findall(r"^bn", text, re.MULTILINE)) == 12
        assert text.endswith(
            "\nleft alone: 1 layer (head): the residue is below 0.0001\nnote: one\n"
            "note: no counter was raised; do not debias the result again\n"
            "wrote fixed.pt\nnext: normdoctor inspect fixed.pt\n"
        )
        assert len(re.findall(r"^bn", console(report, every_norm=True), re.MULTILINE)) == 15
        words = seen(report)
        for expected in ("15 layers debiased", "the residue is below 0.0001", "note: one", "wrote fixed.pt"):
            assert expected in words
        assert "0.864 -> 0.25" in words and "216 -> 9,206" in words

    def test_in_memory_and_in_place(self, make_any_layer: Callable[..., NormLayer]) -> None:
        report = debias_report(repairs=(repair_of(make_any_layer(), counter=None),), output=None)
        text = console(report)
        assert text.startswith("model.pt: 1 layer debiased\n") and "wrote" not in text and "next" not in text
        assert "written" not in text and "->" in text and "216 ->" not in text
        kept = console(replace(report, output="model.pt", backup="model.pt.orig"))
        assert "wrote model.pt\nwhat was there before is kept as model.pt.orig\nnext: " in kept

    def test_json(self, make_any_layer: Callable[..., NormLayer]) -> None:
        layer = make_any_layer(name="bn", running_var=np.full(16, 0.75))
        report = debias_report(repairs=(repair_of(layer),), untouched=(Untouched(layer=layer, reason="why"),))
        found = document(report)
        assert set(found) == DEBIAS and found["method"] == "debias" and found["dry_run"] is False
        assert found["layers"] == [
            {
                "layer": "bn",
                "channels": 16,
                "residue": 0.806,
                "momentum": 0.001,
                "updates": 216,
                "counter": 9206,
                "median_var_before": 0.75,
                "median_var_after": 0.25,
                "not_finite": {},
            }
        ]
        assert found["left"] == [{"layer": "bn", "reason": "why"}] and found["summary"] == {"layers": 1, "left": 1}


def test_what_stays_is_grouped_by_its_reason() -> None:
    left = {"a": "never reached", "b": "constants", "c": "constants"}
    assert left_groups(left) == [("", "constants", ["b", "c"]), ("", "never reached", ["a"])]
    assert recalibration_markdown.render(report_of(left=left)).count("| `a` | never reached |") == 1
