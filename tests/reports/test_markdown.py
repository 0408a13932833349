"""The Markdown report, read with a Markdown parser: what a pull request would show."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from normdoctor.findings import Failure, Report, Survey
from normdoctor.reports import markdown
from normdoctor.reports.text import markdown_code, markdown_text, printable, shortened

Sick = Callable[..., Report]

OWN_HTML = re.compile(r"</?details>|</?summary>|</?code>|<br>")


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


def plain(cell: str) -> str:
    """What a reader sees of a piece of HTML."""
    return html.unescape(re.sub("<[^>]*>", "", cell))


def tables(text: str) -> list[list[list[str]]]:
    """Each table as rows of cells in HTML, the head first."""
    found = re.findall(r"<table>.*?</table>", rendered(text), re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in found]
    return [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table] for table in rows]


def test_worst_first_one_row_per_rule_and_file(fixtures: Survey) -> None:
    text = markdown.render(fixtures)
    assert text.startswith("## normdoctor: 2 errors, 1 warning, ")
    head, *rows = tables(text)[0]
    assert head == ["severity", "rule", "file", "layers", "what"]
    levels = [plain(row[0]) for row in rows]
    assert levels == sorted(levels, key=["error", "warning", "info"].index)
    pairs = {(finding.code, report.path) for report in fixtures.reports for finding in report.findings}
    assert len(rows) == len(pairs)
    assert plain(rows[0][3]) == "9 layers, worst bn1"
    assert '<a href="https://arxiv.org/abs/1502.03167">S104 warmup-residue</a>' in rows[0][1]
    assert "<code>normdoctor recalibrate " in rows[0][4] and "--method debias" in rows[0][4]
    assert "<li><code>notes.txt</code>: no model file; Name a model.</li>" in rendered(text)


def test_layer_tables_are_folded(fixtures: Survey) -> None:
    text = markdown.render(fixtures)
    assert text.count("<details>") == text.count("</details>") == len(fixtures.reports)
    assert [len(table) - 1 for table in tables(text)[1:]] == [len(report.layers) for report in fixtures.reports]
    second = tables(text)[2]
    assert second[1] == [
        *("<code>layer3.0.bn2</code>", "BatchNorm", "16", "1.1 to 1.4", "0.07 to 0.17, 3 not finite", "216", "S101")
    ]
    assert tables(text)[4][0] == ["layer", "kind", "channels", "weight"]  # a LayerNorm has no more to say


def test_one_file_needs_no_column_for_it(sick: Sick) -> None:
    assert tables(markdown.render(Survey(reports=(sick("bn1"),))))[0][0] == ["severity", "rule", "layers", "what"]


def test_nothing_found() -> None:
    assert markdown.render(Survey(reports=())) == "## normdoctor: nothing found\n\n0 files, 0 layers: nothing found\n"


def test_known_findings_are_counted(sick: Sick, known: Callable[[Survey, str], Survey]) -> None:
    text = markdown.render(known(Survey(reports=(sick("bn1", "bn2"),)), "S102"))
    assert "nothing found; 2 known findings in the baseline" in text
    assert "S102" not in text
    assert "No longer found, though in the baseline: `S106 gone.bn`" in text


def test_notes(sick: Sick) -> None:
    text = markdown.render(Survey(reports=(sick("bn1", notes=tuple(f"note {n}" for n in range(8))),)))
    assert "<li>note 4</li>" in rendered(text) and "<li>and 3 more notes</li>" in rendered(text)
    assert "note 5" not in text


def test_hostile_names(hostile: Survey) -> None:
    text = markdown.render(hostile)
    found = tables(text)
    assert len(found) == 1 + len(hostile.reports)
    for table in found:
        assert len({len(row) for row in table}) == 1
    names = [plain(row[3]) for row in found[0][1:]]
    paths = [plain(row[2]) for row in found[0][1:]]
    layers = [plain(table[1][0]) for table in found[1:]]
    expected = [printable(report.layers[0].name) for report in hostile.reports]
    assert names == layers == expected
    assert paths == [printable(report.path) for report in hostile.reports]


def test_nothing_of_a_stranger_works(hostile: Survey) -> None:
    """No HTML but our own, no links but to the rules, no mention, reference or emoji that GitHub would make."""
    text = markdown.render(hostile)
    reference = hostile.findings[0].rule.reference
    tokens = [inner for token in parsed(text) for inner in (token, *(token.children or ()))]
    for token in tokens:
        if token.type in ("html_block", "html_inline"):
            assert "<" not in OWN_HTML.sub("", token.content)
        assert token.type not in ("image", "em_open", "s_open", "fence", "code_block", "blockquote_open")
        if token.type == "link_open":
            assert token.attrs["href"] == reference
    outside = plain(re.sub(r"<(code|a)\b.*?</\1>", "", rendered(text), flags=re.DOTALL))
    assert "@\u200bsomeone" in outside and "smile" in outside
    assert not re.search(r"@\w|#\d|GH-\d|://|www\.|:\w+:|\x1b|\u202e", outside)


@pytest.mark.parametrize("mark", ["@a", "#1", "GH-1", "gh-1", "http://x", "www.x.y", ":x:", "a@b.c"])
def test_links_are_broken_by_a_character_not_by_an_escape(mark: str) -> None:
    assert html.unescape(markdown_text(mark)).replace("\u200b", "") == mark
    assert "\u200b" in html.unescape(markdown_text(mark))


def test_ordinary_text_stays_readable() -> None:
    said = "running_var is 0.2 (momentum 0.1, 5,000 updates); see torch.load: it would call os.system"
    assert markdown_text(said) == said
    assert markdown_code("module.layer1.0.bn1") == "`module.layer1.0.bn1`"
    assert shortened("abc", 3) == "abc" and shortened("abcd", 3) == "…cd"


def counted(text: str, noun: str) -> int:
    """What the last sentence says of `noun`."""
    found = re.search(rf"Left out to fit into a comment:.* ([\d,]+) {noun}", " " + text.replace(": ", ":  "))
    return int(found[1].replace(",", "")) if found else 0


@pytest.mark.parametrize("name", ["bn", "|" * 4000, "@x" * 3000, "`" * 500])
def test_fits_into_a_comment(sick: Sick, name: str) -> None:
    many = sick(*(f"{name}{n}" for n in range(900)), notes=(name,) * 30)
    files = [replace(sick(f"{name}{n}"), path=f"{name}{n}.pt") for n in range(300)]
    failures = tuple(Failure(path=f"{name}{n}", message=name, hint=name) for n in range(2000))
    for survey in (
        Survey(reports=(many,)),
        Survey(reports=(many, *files), failures=failures, fixed=(name,) * 500),
        Survey(reports=tuple(files), failures=failures),
    ):
        text = markdown.render(survey)
        assert len(text) < 65_536
        assert text.count("<details>") == text.count("</details>")
        found = tables(text)
        findings, layers = found[0], found[1:]
        assert len(findings) > 1
        assert counted(text, "layer") + sum(len(table) - 1 for table in layers) == sum(
            len(report.layers) for report in survey.reports
        )
        rules = sum(len({finding.code for finding in report.findings}) for report in survey.reports)
        assert counted(text, "finding") + len(findings) - 1 == rules
        shown = len(re.findall(r"^- ", text.partition("| severity")[0], re.MULTILINE))
        assert counted(text, "file") + shown == len(survey.failures)


def test_nothing_is_left_out_without_need(fixtures: Survey) -> None:
    assert "Left out" not in markdown.render(fixtures)
