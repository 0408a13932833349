"""Settings from a project's file: found, read strictly, overridden by options, shown as TOML."""

from __future__ import annotations

from pathlib import Path

import pytest

from normdoctor import configuration
from normdoctor.configuration import Configuration
from normdoctor.errors import UsageError
from normdoctor.findings import LayerIgnore

FULL = """
select = ["S", "a2"]
ignore = "S106,S109"
fail-on = "warning"
eps = 0.001
momentum = 0.03
assume = false
target = "fp16"
baseline = "known.json"

[per-layer-ignores]
"backbone.*" = ["S110"]
"head.bn" = { ignore = ["S104"], reason = "re-estimated \\"on\\" the device" }

[thresholds]
S104 = { error = 0.2 }
"""


def settings(folder: Path, text: str, name: str = "normdoctor.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_key(tmp_path: Path) -> None:
    config = configuration.read(settings(tmp_path, FULL))
    assert config.select == ("S", "A2")
    assert config.ignore == ("S106", "S109")
    assert config.per_layer_ignores == (
        LayerIgnore(glob="backbone.*", codes=("S110",)),
        LayerIgnore(glob="head.bn", codes=("S104",), reason='re-estimated "on" the device'),
    )
    assert config.thresholds == {"S104": {"error": 0.2}}
    assert (config.fail_on, config.eps, config.momentum) == ("warning", 0.001, 0.03)
    assert (config.assume, config.target, config.baseline) == (False, "fp16", tmp_path / "known.json")
    assert set(configuration.READERS) == {name.replace("_", "-") for name in config.origins}


def test_what_is_shown_can_be_read_again(tmp_path: Path) -> None:
    first = configuration.read(settings(tmp_path, FULL))
    again = configuration.read(settings(tmp_path, first.as_toml()))
    assert again == first


def test_defaults_are_shown_as_such() -> None:
    shown = Configuration().as_toml()
    assert 'fail-on = "error"  # default' in shown
    assert "# eps is not set  # default" in shown


@pytest.mark.parametrize("name", ["pyproject.toml", "normdoctor.toml"])
def test_the_table_of_a_shared_file(tmp_path: Path, name: str) -> None:
    path = settings(tmp_path, '[tool.other]\nselect = 1\n[tool.normdoctor]\nselect = ["S"]\n', name)
    assert configuration.read(path).select == ("S",)


def test_nearest_file_that_speaks_of_normdoctor(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    outer = settings(tmp_path, "[tool.normdoctor]\n", "pyproject.toml")
    settings(inner, "[project]\nname = 'x'\n", "pyproject.toml")
    assert configuration.find(inner) == outer
    own = settings(tmp_path / "a", "")
    assert configuration.find(inner) == own
    assert configuration.find(tmp_path) == outer


def test_a_foreign_pyproject_may_be_broken(tmp_path: Path) -> None:
    outer = settings(tmp_path, "", "normdoctor.toml")
    inner = tmp_path / "inner"
    inner.mkdir()
    settings(inner, "this is = = no toml", "pyproject.toml")
    assert configuration.find(inner) == outer


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("selct = ['S']", "unknown key 'selct'", "Did you mean select?"),
        ("select = ['warmup-residu']", "select: no rule 'warmup-residu'", "Did you mean warmup-residue"),
        ("select = 3", "select must be a list of rule codes", "Example"),
        ("fail-on = 'warn'", "fail-on: 'warn' is not one of error, warning, info, never", "Did you mean warning?"),
        ("fail-on = ['error']", "fail-on: ['error'] is not one of", ""),
        ("target = 'fp8'", "target: no precision 'fp8'", "Did you mean fp16"),
        ("eps = 'small'", "eps must be a number", "Example"),
        ("eps = true", "eps must be a number", "Example"),
        ("eps = -1.0", "eps: eps must be above 0", "1e-5"),
        ("momentum = 2", "momentum: momentum must lie between 0 and 1", ""),
        ("assume = 'no'", "assume must be true or false", "Example"),
        ("baseline = 1", "baseline must be the path", "Example"),
        ("thresholds = 1", "thresholds must be a table", "Example"),
        ("[thresholds]\nS104 = 1", "thresholds must be a table", "Example"),
        ("[thresholds]\nS104 = {eror = 1}", "thresholds: rule S104 has no threshold 'eror'", "Did you mean error?"),
        ("[thresholds]\nS104 = {error = 'x'}", "thresholds has a value for error that is no number", "Example"),
        ("[thresholds]\nS999 = {error = 1}", "thresholds: no rule 'S999'", "rules"),
        ("per-layer-ignores = ['S']", "per-layer-ignores must be a table", "Example"),
        ("[per-layer-ignores]\n'a.*' = ['S9']", "per-layer-ignores: no rule 'S9'", ""),
        ("[per-layer-ignores]\n'a.*' = {reason = 'x'}", "does not say what to ignore for 'a.*'", "Example"),
        ("[per-layer-ignores]\n'a' = {ignore = ['S'], reasn = 'x'}", "unknown key 'reasn' for 'a'", "reason"),
        ("[per-layer-ignores]\n'a' = {ignore = ['S'], reason = 1}", "a reason for 'a' that is no text", "Example"),
        ("select = [", "is not valid TOML", "--no-settings"),
        ("tool = {normdoctor = 3}", "tool.normdoctor is not a table", ""),
    ],
)
def test_strict(tmp_path: Path, text: str, said: str, hint: str) -> None:
    path = settings(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        configuration.read(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_a_shared_file_without_the_table(tmp_path: Path) -> None:
    path = settings(tmp_path, "[project]\nname = 'x'\n", "pyproject.toml")
    with pytest.raises(UsageError, match=r"has no \[tool.normdoctor\]"):
        configuration.read(path)
    with pytest.raises(UsageError, match="no such file"):
        configuration.read(tmp_path / "missing.toml")


def test_options_go_before_the_file(tmp_path: Path) -> None:
    config = configuration.read(settings(tmp_path, FULL)).with_options(
        select=("--select", ("N",)),
        fail_on=("--fail-on", None),
        thresholds=("--threshold", {"S104": {"warning": 0.05}, "S109": {"info": 5.0}}),
    )
    assert config.select == ("N",)
    assert config.thresholds == {"S104": {"error": 0.2, "warning": 0.05}, "S109": {"info": 5.0}}
    assert config.fail_on == "warning"
    assert 'select = ["N"]  # --select' in config.as_toml()
    assert 'fail-on = "warning"  # normdoctor.toml' in config.as_toml()
