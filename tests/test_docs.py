"""README and code say the same: tables are generated, the session is a real one, commands and options exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SESSION = (
    ("inspect", "slow_momentum_module.pt"),
    ("recalibrate", "slow_momentum_module.pt", "--method", "debias", "-o", "fixed.pt"),
    ("inspect", "fixed.pt"),
)

DATA_SESSION = (
    ("inspect", "slow_momentum.pt", "--arch", "nets:ResNet", "--data", "digits.npz", "--select", "D"),
    ("recalibrate", "slow_momentum.pt", "--arch", "nets:ResNet", "--data", "digits.npz", "--labels", "labels"),
)


def between(name: str) -> str:
    found = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README has no part {name}"
    return found.group(1)


def formats_table() -> str:
    from normdoctor.readers import FORMATS

    rows = [
        f"| {entry.name} | {entry.contents} | {entry.says} | {'yes' if entry.repaired else 'no'} |" for entry in FORMATS
    ]
    return "\n".join(["| format | what | says beyond tensors | repaired |", "| --- | --- | --- | --- |", *rows]) + "\n"


def rules_table() -> str:
    from normdoctor.reports import rule_book

    return rule_book.as_markdown()


def fold_reasons_table() -> str:
    from normdoctor.flow.reasons import REASONS

    rows = [f"| `{code}` | {meaning} |" for code, meaning in REASONS.items()]
    return "\n".join(["| reason | meaning |", "| --- | --- |", *rows]) + "\n"


def session(folder: Path, commands: Sequence[Sequence[str]]) -> str:
    """The commands of one of the README's sessions and what they print; times are always the same there."""
    for name in ("slow_momentum_module.pt", "slow_momentum.pt", "digits.npz", "nets.py"):
        shutil.copy(ROOT / "fixtures" / name, folder)
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    parts = []
    for arguments in commands:
        done = subprocess.run(
            [sys.executable, "-m", "normdoctor", *arguments],
            capture_output=True,
            cwd=folder,
            env=environment,
            encoding="utf-8",
        )
        output = "\n".join(line.rstrip() for line in (done.stdout + done.stderr).splitlines())
        output = re.sub(r"measured in .* s, .* samples/s", "measured in 0.2 s, 2,600 samples/s", output)
        parts.append(f"$ normdoctor {' '.join(arguments)}\n{output}\n")
    return "```console\n" + "\n".join(parts) + "```\n"


GENERATED = {"formats": formats_table, "rules": rules_table, "fold-reasons": fold_reasons_table}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables(name: str) -> None:
    """To renew the parts of the README: NORMDOCTOR_WRITE_README=1 pytest tests/test_docs.py"""
    renew(name, GENERATED[name]())


def test_session(tmp_path: Path) -> None:
    renew("session", session(tmp_path, SESSION))


def test_session_with_data(tmp_path: Path) -> None:
    renew("data-session", session(tmp_path, DATA_SESSION))


def renew(name: str, text: str) -> None:
    if os.environ.get("NORMDOCTOR_WRITE_README"):
        path = ROOT / "README.md"
        whole = path.read_text(encoding="utf-8")
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = whole.partition(start)
        path.write_text(before + start + text + end + rest.partition(end)[2], encoding="utf-8")
    else:
        assert without_rounding(between(name)) == without_rounding(text)


def without_rounding(text: str) -> str:
    """The text without what is rounding of float32, which is another on other processors."""
    text = re.sub(r"^residual: .*?\n\n", "residual: rounding\n\n", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r" +(0|\de-\d+)$", " rounding", text, flags=re.MULTILINE)


def test_every_command_and_option_is_in_the_readme() -> None:
    import typer

    from normdoctor.cli import app

    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert f"normdoctor {name}" in README, name
        for parameter in command.params:
            for option in getattr(parameter, "opts", []):
                if option.startswith("--") and option != "--help":
                    assert f"{option}" in README, f"{name} {option}"


def test_every_public_name_exists() -> None:
    import normdoctor

    for name in normdoctor.__all__:
        assert getattr(normdoctor, name) is not None
    assert set(re.findall(r"\bnd\.(\w+)", README)) <= set(normdoctor.__all__)


def test_readme_accuracies_are_those_of_the_fixtures() -> None:
    import json

    accuracies = json.loads((ROOT / "fixtures" / "accuracy.json").read_text())["slow_momentum_module.pt"]
    assert (
        f"{100 * accuracies['train']:.1f} % of the held-out digits; in eval mode {100 * accuracies['eval']:.1f} %"
        in (README.replace("\n", " "))
    )


def test_doctests() -> None:
    import doctest
    import importlib
    import pkgutil

    import normdoctor

    attempted = 0
    for found in pkgutil.walk_packages(normdoctor.__path__, "normdoctor."):
        if found.name.endswith(("with_torch", "with_onnx", "__main__")):
            continue
        result = doctest.testmod(importlib.import_module(found.name))
        assert result.failed == 0, found.name
        attempted += result.attempted
    assert attempted > 3


def test_the_settings_shown_are_read(tmp_path: Path) -> None:
    from normdoctor import configuration

    shown = README.split("<!-- settings -->\n```toml\n")[1].split("```")[0]
    path = tmp_path / "pyproject.toml"
    path.write_text(shown, encoding="utf-8")
    config = configuration.read(path)
    assert config.origins.keys() == {
        "select",
        "ignore",
        "fail_on",
        "target",
        "baseline",
        "per_layer_ignores",
        "thresholds",
    }
    unshown = configuration.READERS.keys() - {name.replace("_", "-") for name in config.origins}
    assert all(f"`{key}" in README for key in unshown)
