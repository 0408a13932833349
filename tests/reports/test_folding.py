"""What a fold says of itself: console, JSON and Markdown, with every name that a stranger may have chosen."""

from __future__ import annotations

import html
import io
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from markdown_it import MarkdownIt

from normdoctor.folding.records import Difference, FoldReport, FoldRow, Overflow, Proof, ProofState
from normdoctor.reports import folding_json, folding_markdown, write_folding
from normdoctor.reports.folding_wording import left_groups, most_interesting, verdict_line
from normdoctor.reports.text import printable

from .conftest import HOSTILE

REPORT = {
    "schema_version", "source", "format", "output", "unchanged", "dry_run", "norms", "summary", "copies",
    "fp16_overflow", "proof", "notes",
}  # fmt: skip
NORM = {"norm", "kind", "verdict", "into", "through", "code", "reason", "gain"}
SUMMARY = {
    "norms", "folded_backward", "folded_forward", "merged", "decomposed", "left", "parameters_before",
    "parameters_after", "nodes_before", "nodes_after", "largest_gain",
}  # fmt: skip
PROOF = {"state", "reason", "engine", "inputs", "outputs", "noise_reason", "first_norm"}
OUTPUT = {"output", "shape", "dtype", "error", "noise", "channel", "ok", "note"}

OWN_HTML = re.compile(r"</?details>|</?summary>|</?code>")

BEFORE_PADDING = "backward: nothing is in front of it; forward: zeros at the border of the convolution would be shifted"

ROWS = (
    FoldRow(norm="stem.bn", kind="BatchNorm", verdict="left", code="padded-convolution", reason=BEFORE_PADDING),
    FoldRow(norm="layer1.bn1", kind="BatchNorm", verdict="folded backward", into=("layer1.conv1",), gain=1.5),
    FoldRow(
        norm="layer1.bn2",
        kind="BatchNorm",
        verdict="folded forward",
        into=("head.fc",),
        through=("relu", "average pooling", "reshape"),
        gain=312.0,
    ),
    FoldRow(norm="layer1.bn3", kind="BatchNorm", verdict="merged", into=("layer1.bn4",), gain=2.0),
)


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def difference(**changes: Any) -> Difference:
    fields: dict[str, Any] = {
        "output": "logits",
        "shape": (2, 1000),
        "dtype": "float32",
        "error": 1.2e-6,
        "noise": 8.3e-7,
        "channel": 5,
        "ok": True,
    }
    return Difference(**fields | changes)


def report_of(**changes: Any) -> FoldReport:
    proof = Proof(
        state=ProofState.VERIFIED, inputs="random inputs, seed 0", engine="onnxruntime", differences=(difference(),)
    )
    fields: dict[str, Any] = {
        "source": "model.onnx",
        "format": "ONNX opset 17",
        "rows": ROWS,
        "parameters": (1000, 900),
        "nodes": (30, 27),
        "proof": proof,
        "output": "model.folded.onnx",
    }
    return FoldReport(**fields | changes)


def console(report: FoldReport, **options: Any) -> str:
    stream = io.StringIO()
    write_folding(report, "console", stream, **options)
    return stream.getvalue()


def test_console() -> None:
    text = console(report_of())
    assert text.startswith(
        "model.onnx\n"
        "  ONNX opset 17   4 BatchNorm\n"
        "\n"
        "norm        what             into                  through\n"
        "stem.bn     left             (padded-convolution)\n"
        "layer1.bn1  folded backward  layer1.conv1\n"
        "layer1.bn2  folded forward   head.fc               relu, average pooling, resha…\n"
        "layer1.bn3  merged           layer1.bn4\n"
        "\n"
    )
    assert "padded-convolution   1 norm: stem.bn\n  backward: nothing is in front of it; forward: zeros" in text
    assert "4 norms: 1 folded backward, 1 folded forward, 1 merged, 1 left" in text
    assert "1,000 -> 900 stored numbers (-100), 30 -> 27 operators (-3)" in text
    assert "largest gain 312 (layer1.bn2)" in text
    assert "VERIFIED against the original (onnxruntime, random inputs, seed 0)" in text
    assert re.search(r"logits +2x1000 +1\.2e-06 +8\.3e-07", text)
    assert text.endswith("wrote model.folded.onnx\nnext: normdoctor inspect model.folded.onnx\n")


def test_console_shows_what_stays_first_and_everything_when_asked() -> None:
    many = tuple(replace(ROWS[1], norm=f"bn{n}") for n in range(40))
    report = report_of(rows=(*many[:20], ROWS[0], *many[20:]))
    text = console(report)
    assert "stem.bn" in text and "… 31 more norms (--all)" in text
    assert text.index("bn8 ") < text.index("stem.bn ")  # in the order of the graph
    assert all(f"bn{n} " in console(report, every_norm=True) for n in range(40))
    assert most_interesting(report.rows, None) == list(report.rows)
    assert len(most_interesting(report.rows, 10)) == 10


def test_a_failed_proof_is_loud() -> None:
    failed = Proof(
        state=ProofState.FAILED,
        differences=(difference(error=0.3, ok=False), difference(output="aux")),
        reason="output logits is off by 0.3 of its channel's size",
        first_norm="layer1.bn1",
    )
    text = console(report_of(proof=failed, output=None))
    assert "FAILED" in text and "channel 5" in text
    assert "the first norm at which the two part is layer1.bn1" in " ".join(text.split())
    assert text.endswith("nothing was written\n")
    assert folding_markdown.render(report_of(proof=failed)).count("FAILED") == 1


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"rows": ()}, "No norm that could be folded was found"),
        ({"rows": ROWS[:1], "unchanged": True}, "Nothing could be folded, so the output is an unchanged copy."),
        ({"unchanged": True, "rows": ROWS[:1]}, "copied to model.folded.onnx"),
        ({"dry_run": True, "output": None}, "nothing was written (--dry-run)"),
        ({"proof": Proof(state=ProofState.NOT_ASKED, reason="--no-verify")}, "NOT VERIFIED: --no-verify"),
        (
            {"proof": Proof(state=ProofState.UNVERIFIED, reason="no kernel for Foo")},
            "UNVERIFIED: no kernel for Foo",
        ),
        ({"copies": ("fc1", "fc2")}, "2 weights shared with other sites, copied for the fold: fc1, fc2"),
        (
            {"overflows": (Overflow(weight="conv1", channels=(3, 7), largest=1e5),)},
            "float16 cannot hold 2 channels of 1 folded weight",
        ),
        ({"notes": ("one batch size only",)}, "note: one batch size only"),
    ],
)
def test_what_must_be_said(changes: dict[str, Any], expected: str) -> None:
    report = report_of(**changes)
    assert expected in console(report)
    words = expected.replace("UNVERIFIED", "unverified").replace("NOT VERIFIED", "not verified")
    if "copied to" not in expected and "--dry-run" not in expected:
        seen = html.unescape(re.sub(r"<[^>]*>|\u200b", "", rendered(folding_markdown.render(report))))
        assert words in " ".join(seen.replace("\u200b", "").split())


@pytest.mark.parametrize("width", ["80", "120"])
def test_console_fits_its_width(monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    long = "backbone.stages.3.blocks.11.attention.projection.normalisation.batchnorm"
    rows = tuple(replace(row, norm=f"{long}.{row.norm}", into=(f"{long}.conv",) * 9) for row in ROWS)
    text = console(report_of(rows=rows, copies=(long,) * 3, notes=(f"{long} " * 4,)), every_norm=True)
    wide = [line for line in text.splitlines() if len(line) > int(width) and not line.startswith(("next:", "wrote"))]
    assert [line for line in wide if line.count(long) != 1] == []
    assert "\x1b" not in text


def hostile() -> FoldReport:
    rows = tuple(
        FoldRow(norm=name, kind=name, verdict=verdict, into=(name,), through=(name,), code=code, reason=name)
        for name in HOSTILE
        for verdict, code in (("left", name), ("folded backward", ""))
    )
    proof = Proof(
        state=ProofState.FAILED,
        inputs=HOSTILE[0],
        engine=HOSTILE[1],
        differences=tuple(difference(output=name, note=name, ok=False) for name in HOSTILE),
        reason=" ".join(HOSTILE),
        noise_reason=HOSTILE[3],
        first_norm=HOSTILE[4],
    )
    overflows = tuple(Overflow(weight=name, channels=(1,), largest=1e6) for name in HOSTILE)
    return report_of(
        source=HOSTILE[4], format=HOSTILE[5], rows=rows, proof=proof, notes=HOSTILE, copies=HOSTILE, overflows=overflows
    )


def test_console_of_a_stranger() -> None:
    text = console(hostile(), every_norm=True)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\x1b[2J" in text


def test_json_shape() -> None:
    document = json.loads(folding_json.render(report_of()), parse_constant=_refuse)
    assert set(document) == REPORT and document["schema_version"] == 1
    assert all(set(norm) == NORM for norm in document["norms"]) and len(document["norms"]) == 4
    assert set(document["summary"]) == SUMMARY
    assert document["summary"]["largest_gain"] == {"norm": "layer1.bn2", "gain": 312.0}
    assert set(document["proof"]) == PROOF and set(document["proof"]["outputs"][0]) == OUTPUT
    assert document["proof"]["state"] == "verified"
    assert document["norms"][0]["verdict"] == "left" and document["norms"][1]["verdict"] == "folded_backward"
    assert document["norms"][1]["code"] is None


def test_json_is_strict_whatever_comes() -> None:
    proof = Proof(state=ProofState.FAILED, differences=(difference(error=float("inf"), noise=float("nan")),))
    document = json.loads(folding_json.render(replace(hostile(), proof=proof)), parse_constant=_refuse)
    assert document["proof"]["outputs"][0]["error"] == "inf"
    assert document["notes"][0] == HOSTILE[0]
    assert json.loads(folding_json.render(report_of(rows=())))["summary"]["largest_gain"] is None


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


def test_markdown_of_a_stranger() -> None:
    text = folding_markdown.render(hostile())
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for token in [inner for outer in parser.parse(text) for inner in (outer, *(outer.children or ()))]:
        if token.type in ("html_block", "html_inline"):
            assert "<" not in OWN_HTML.sub("", token.content)
        assert token.type not in ("image", "link_open", "em_open", "s_open", "fence", "code_block")
    outside = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<code\b.*?</code>", "", rendered(text), flags=re.DOTALL)))
    assert not re.search(r"@\w|#\d|GH-\d|://|www\.|:\w+:|\x1b|\u202e", outside)
    last = re.findall(r"<table>.*?</table>", rendered(text), re.DOTALL)[-1]
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", last, re.DOTALL)
    ]
    assert {len(row) for row in rows[1:]} == {5}
    names = [html.unescape(re.sub("<[^>]*>", "", row[0])) for row in rows[1:]]
    assert names == [printable(name) for name in HOSTILE] * 2


@pytest.mark.parametrize("name", ["bn", "|" * 4000, "@x" * 3000])
def test_markdown_fits_into_a_comment(name: str) -> None:
    rows = tuple(
        FoldRow(
            norm=f"{name}{n}", kind="BatchNorm", verdict="left", code=f"{n}", reason=f"{name} {n}", into=(name,) * 9
        )
        for n in range(2000)
    )
    proof = Proof(
        state=ProofState.FAILED,
        reason=name,
        differences=tuple(difference(output=f"{name}{n}", note=name) for n in range(900)),
    )
    text = folding_markdown.render(report_of(rows=rows, proof=proof, notes=(name,) * 900))
    assert len(text) < 65_536
    assert "Left out to fit into a comment" in text
    assert text.count("<details>") == text.count("</details>") == 1
    tables = re.findall(r"<table>.*?</table>", rendered(text), re.DOTALL)
    assert len(tables) == 3 and all(table.count("<tr>") > 2 for table in tables)


def test_what_stays_is_grouped_by_its_reason() -> None:
    rows = [replace(ROWS[0], norm=f"bn{n}") for n in range(3)]
    rows += [FoldRow(norm="ln", kind="LayerNorm", verdict="left", code="own-statistics", reason="it has its own")]
    assert left_groups([*rows, *ROWS[1:]]) == [
        ("padded-convolution", BEFORE_PADDING, ["bn0", "bn1", "bn2"]),
        ("own-statistics", "it has its own", ["ln"]),
    ]
    assert verdict_line(report_of(rows=tuple(rows))) == "4 norms: 4 left. Nothing could be folded."
