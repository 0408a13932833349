"""The command line as a user meets it: exit codes, streams, widths, goldens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "fixtures"
GOLDENS = sorted(path for path in FIXTURES.glob("*.json") if path.name != "accuracy.json")
CHECKPOINTS = [path.with_suffix("") for path in GOLDENS]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: p.name)
def test_golden_report(path: Path) -> None:
    """Regenerate after a wanted change with: python fixtures/goldens.py"""
    from normdoctor import inspect
    from normdoctor.findings import Survey
    from normdoctor.reports import json as json_report

    report = inspect(path)
    document = json.loads(json_report.render(Survey(reports=(report,))))
    document["files"][0]["path"] = path.name
    for finding in document["files"][0]["findings"]:
        finding["fix"] = finding["fix"].replace(str(path.with_suffix("")), path.stem)
    golden = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
    assert without_sums(document) == without_sums(golden)
    assert sums(document) == pytest.approx(sums(golden), rel=1e-4, abs=1e-6)


SUMS = ("predicted", "shift", "correlation", "slope", "usual_correlation", "usual_slope")
"""What is summed over weights in float32, whose order and so whose last digits are the processor's."""


def without_sums(document: Any) -> Any:
    """The report without these numbers."""
    if isinstance(document, dict):
        return {key: None if key in SUMS else without_sums(value) for key, value in document.items()}
    return [without_sums(value) for value in document] if isinstance(document, list) else document


def sums(document: Any) -> list[float]:
    """These numbers in order."""
    if isinstance(document, dict):
        return [
            number
            for key, value in document.items()
            for number in (np.ravel(value).tolist() if key in SUMS and value is not None else sums(value))
        ]
    return [number for value in document for number in sums(value)] if isinstance(document, list) else []


def test_every_checkpoint_has_its_golden() -> None:
    from normdoctor import find_checkpoints

    assert set(find_checkpoints([FIXTURES]).targets) == set(CHECKPOINTS)


def test_exit_codes(run: Run, tmp_path: Path) -> None:
    assert run("inspect", "healthy.pt").returncode == 0
    assert run("inspect", "nan_statistics.pt").returncode == 1
    assert run("inspect", "nan_statistics.pt", "--fail-on", "never").returncode == 0
    assert run("inspect", "dead_channels.pt").returncode == 0
    assert run("inspect", "dead_channels.pt", "--fail-on", "warning").returncode == 1
    assert run("inspect", "healthy_module.pt", "--fail-on", "info").returncode == 1
    assert run("inspect", "missing.pt").returncode == 2
    assert run("inspect", "healthy.pt", "--no-such-option").returncode == 2


def test_two_wins_over_one_and_the_others_are_still_inspected(run: Run) -> None:
    done = run("inspect", "missing.pt", "nan_statistics.pt", "healthy.pt")
    assert done.returncode == 2
    assert "S101" in done.stdout
    assert "healthy.pt" in done.stdout
    assert done.stderr.startswith("normdoctor: missing.pt: no such file\n  hint: ")
    assert done.stderr.count("\n") == 2


@pytest.mark.parametrize("name", ["slow_momentum_module.pt", "training_checkpoint.pt", "dead_channels.pt"])
@pytest.mark.parametrize("width", [80, 120])
def test_fits_its_width_without_colour_in_a_pipe(run: Run, name: str, width: int) -> None:
    done = run("inspect", name, "--all", "-v", COLUMNS=str(width))
    assert "\x1b" not in done.stdout
    copied_whole = ("fix: normdoctor", "source: https://")
    lines = [line for line in done.stdout.splitlines() if not line.strip().startswith(copied_whole)]
    wide = [line for line in lines if len(line) > width]
    assert wide == []


def test_ascii_terminals_get_ascii(run: Run) -> None:
    done = run("inspect", "slow_momentum_module.pt", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert done.stdout.isascii()


def test_json_is_strict_and_stable(run: Run) -> None:
    first = run("inspect", "nan_statistics.pt", "healthy.onnx", "--format", "json")
    again = run("inspect", "nan_statistics.pt", "healthy.onnx", "--format", "json")
    assert first.stdout == again.stdout

    def refuse(word: str) -> None:
        raise AssertionError(word)

    document = json.loads(first.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    assert [file["path"] for file in document["files"]] == ["nan_statistics.pt", "healthy.onnx"]
    assert document["summary"]["error"] == 1


def test_json_names_what_failed(run: Run) -> None:
    done = run("inspect", "missing.pt", "--format", "json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert document["failed"] == [
        {"path": "missing.pt", "message": "missing.pt: no such file", "hint": "Check the path."}
    ]


def test_output_file(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    done = run("inspect", "healthy.pt", "--format", "json", "-o", target)
    assert done.stdout == ""
    assert json.loads(target.read_text())["summary"]["files"] == 1
    assert run("inspect", "healthy.pt", "-o", tmp_path / "none" / "report.txt").returncode == 2
    assert run("inspect", "healthy.pt", "-o", os.devnull).returncode == 0
    assert Path(os.devnull).exists()


def test_selection(run: Run) -> None:
    def codes(*options: str) -> set[str]:
        document = json.loads(run("inspect", "dead_channels.pt", "--format", "json", *options).stdout)
        return {finding["code"] for finding in document["files"][0]["findings"]}

    everything = codes()
    assert {"S105", "S106"} <= everything
    assert codes("--select", "S") == {code for code in everything if code.startswith("S")}
    assert codes("--select", "S,A", "--ignore", "S106") == {c for c in everything if c[0] in "SA"} - {"S106"}
    assert codes("--layer", "bn1") < everything


def test_layer_selection_keeps_only_those_layers(run: Run) -> None:
    done = run("inspect", "healthy.pt", "--layer", "layer3.*", "--format", "json")
    names = [layer["name"] for layer in json.loads(done.stdout)["files"][0]["layers"]]
    assert names == ["layer3.0.bn1", "layer3.0.bn2", "layer3.0.downsample.1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "healthy.pt", "--select", "S1O4"], "no rule 'S1O4'"),
        (["inspect", "healthy.pt", "--eps", "0"], "eps must be above 0"),
        (["inspect", "healthy.pt", "--momentum", "2"], "momentum must lie between 0 and 1"),
        (["inspect", "healthy.pt", "--threshold", "S104"], "CODE.NAME=VALUE"),
        (["inspect", "healthy.pt", "--threshold", "S104.eror=1"], "no threshold 'eror'"),
        (["inspect", "healthy.pt", "--threshold", "S104=0.9"], "CODE.NAME=VALUE"),
        (["explain", "S999"], "no rule 'S999'"),
        (["recalibrate", "healthy.pt", "--method", "debias", "--momentum", "0.1"], "nothing to debias"),
        (["recalibrate", "slow_momentum.pt", "--method", "debias"], "does not say its momentum"),
    ],
)
def test_one_clear_line_and_a_hint(run: Run, arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("normdoctor: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_thresholds_can_be_set(run: Run) -> None:
    assert run("inspect", "slow_momentum_module.pt").returncode == 1
    done = run("inspect", "slow_momentum_module.pt", "--threshold", "S104.error=0.9", "--fail-on", "error")
    assert done.returncode == 0
    assert "WARNING  S104" in done.stdout


def test_given_momentum_is_no_assumption(run: Run) -> None:
    done = run("inspect", "slow_momentum.pt", "--momentum", "0.001", "--format", "json")
    assert done.returncode == 1
    findings = [f for f in json.loads(done.stdout)["files"][0]["findings"] if f["code"] == "S104"]
    assert len(findings) == 9
    assert all(f["assumed"] == {} and f["severity"] == "error" for f in findings)


def test_from_sick_to_repaired(run: Run, tmp_path: Path) -> None:
    sick = FIXTURES / "slow_momentum_module.pt"
    before = sick.read_bytes()
    fixed = tmp_path / "fixed.pt"
    done = run("recalibrate", sick, "--method", "debias", "-o", fixed)
    assert done.returncode == 0, done.stderr
    assert sick.read_bytes() == before
    assert run("inspect", fixed).returncode == 0
    again = run("recalibrate", fixed, "--method", "debias", "-o", tmp_path / "again.pt")
    assert again.returncode == 2
    assert not (tmp_path / "again.pt").exists()
    assert run("recalibrate", sick, "--method", "debias", "-o", fixed).returncode == 2
    assert run("recalibrate", sick, "--method", "debias", "-o", fixed, "--overwrite").returncode == 0


def test_the_command_a_finding_prints_runs(run: Run, tmp_path: Path) -> None:
    import shlex
    import shutil

    shutil.copy(FIXTURES / "slow_momentum_module.pt", tmp_path / "my model.pt")
    done = run("inspect", "my model.pt", cwd=tmp_path)
    line = next(line for line in done.stdout.splitlines() if "fix: normdoctor" in line)
    command = shlex.split(line.partition("fix: normdoctor ")[2].partition("      (")[0])
    assert run(*command, cwd=tmp_path).returncode == 0
    assert (tmp_path / "my model.recalibrated.pt").exists()


def test_version_and_module(run: Run) -> None:
    from normdoctor import __version__

    assert run("--version").stdout == f"normdoctor {__version__}\n"


def test_hostile_layer_names_cannot_write_to_the_terminal(run: Run, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    name = "bn\x1b[2J\nERROR"
    arrays = {
        f"{name}.{leaf}": np.full(8, np.nan, dtype=np.float32)
        for leaf in ("weight", "bias", "running_mean", "running_var")
    }
    save_file(arrays, tmp_path / "evil.safetensors")
    done = run("inspect", "evil.safetensors", cwd=tmp_path)
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    assert "bn\\x1b[2J\\nERROR" in done.stdout


def test_no_norm_layers_is_said_plainly(run: Run, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"fc.weight": np.zeros((2, 3), dtype=np.float32)}, tmp_path / "plain.safetensors")
    done = run("inspect", "plain.safetensors", cwd=tmp_path)
    assert done.returncode == 0
    assert "No norm layers found." in done.stdout


def test_a_report_never_replaces_a_model(run: Run, tmp_path: Path) -> None:
    import shutil

    for name in ("healthy.pt", "nan_statistics.pt"):
        shutil.copy(FIXTURES / name, tmp_path)
    (tmp_path / "link.pt").symlink_to("healthy.pt")
    before = (tmp_path / "healthy.pt").read_bytes()
    for output in ("healthy.pt", "link.pt", "nan_statistics.pt"):
        done = run("inspect", "healthy.pt", "-o", output, cwd=tmp_path)
        assert done.returncode == 2, output
        assert done.stderr.startswith("normdoctor: ")
    assert (tmp_path / "healthy.pt").read_bytes() == before
    assert run("inspect", "healthy.pt", "-o", "report.txt", cwd=tmp_path).returncode == 0
    assert run("inspect", "healthy.pt", "-o", "report.txt", cwd=tmp_path).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_reader_that_stops_early_is_no_failure() -> None:
    command = f"{sys.executable} -m normdoctor inspect healthy.pt --all -v | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=FIXTURES,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines() == ["healthy.pt", "0"]
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "arguments", ["inspect healthy.pt", "inspect healthy.pt --format json", "rules", "explain S104"]
)
def test_a_full_disk_is_one_line_and_code_two(arguments: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m normdoctor {arguments} > /dev/full"],
        capture_output=True,
        text=True,
        cwd=FIXTURES,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("normdoctor: the output cannot be written")


def test_a_layer_glob_that_matches_nothing(run: Run) -> None:
    done = run("inspect", "healthy.pt", "--layer", "nope*")
    assert done.returncode == 2
    assert "no layer matches 'nope*'" in done.stderr
    done = run("inspect", "healthy.pt", "transformer.pt", "--layer", "layer3.*")
    assert done.returncode == 0
    assert "None of the 5 norm layers matches --layer." in done.stdout


def test_values_that_are_not_used_are_named(run: Run, tmp_path: Path) -> None:
    done = run("inspect", "healthy_module.pt", "--momentum", "0.5")
    assert "--momentum 0.5 is not used: the file says momentum itself" in " ".join(done.stdout.split())
    done = run(
        "recalibrate", "slow_momentum_module.pt", "--method", "debias", "--updates", "9", "-o", tmp_path / "f.pt"
    )
    assert "updates 9 were not used: the file says 216" in done.stdout


def test_a_folder_that_is_no_checkpoint_is_not_repaired(run: Run, tmp_path: Path) -> None:
    done = run("recalibrate", ".", "--method", "debias", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "is a folder" in done.stderr
    assert not (tmp_path / "out").exists()
