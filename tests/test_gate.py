"""What a build gate uses: settings files, baselines, folders and globs, several processes, every format."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "fixtures"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of three checkpoints, one of them sick, and things that are none."""
    inner = tmp_path / "epochs" / "last"
    inner.mkdir(parents=True)
    shutil.copy(FIXTURES / "healthy.pt", tmp_path / "epochs" / "first.pt")
    shutil.copy(FIXTURES / "nan_statistics.pt", inner / "sick.pt")
    shutil.copy(FIXTURES / "healthy.safetensors", inner / "model.safetensors")
    (tmp_path / "epochs" / "log.txt").write_text("epoch 1\n")
    return tmp_path


def outcome(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    return json.loads(done.stdout)


def paths(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [file["path"] for file in json.loads(done.stdout)["files"]]


def test_folders_and_globs(run: Run, models: Path) -> None:
    everything = ["epochs/first.pt", "epochs/last/model.safetensors", "epochs/last/sick.pt"]
    assert paths(run("inspect", "epochs", "--format", "json", cwd=models)) == everything
    assert paths(run("inspect", "epochs/**/*.pt", "--format", "json", cwd=models)) == [everything[0], everything[2]]
    assert run("inspect", "epochs", cwd=models).returncode == 1
    twice = run("inspect", "epochs", "epochs/first.pt", "--format", "json", cwd=models)
    assert paths(twice) == everything


def test_a_folder_without_a_checkpoint(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    done = run("inspect", str(tmp_path))
    assert done.returncode == 2
    assert "hint: " in done.stderr
    assert run("inspect", "nowhere/*.pt").returncode == 2


def test_jobs_change_nothing(run: Run, models: Path) -> None:
    one = run("inspect", "epochs", "missing.pt", "--format", "json", cwd=models)
    two = run("inspect", "epochs", "missing.pt", "--format", "json", "--jobs", 2, cwd=models)
    assert (one.returncode, two.returncode) == (2, 2)
    assert outcome(one) == outcome(two)
    assert (
        run("inspect", "epochs", "--all", "-v", cwd=models).stdout
        == run("inspect", "epochs", "--all", "-v", "-j", 0, cwd=models).stdout
    )
    assert run("inspect", "epochs", "--jobs", -1, cwd=models).returncode == 2


def test_statistics(run: Run, models: Path) -> None:
    done = run("inspect", "epochs", "--statistics", cwd=models)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].split() == ["code", "name", "errors", "warnings", "infos", "files"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("S101"))
    assert row.split()[:3] == ["S101", "nonfinite-stats", "1"]
    assert "3 files" in done.stdout
    assert run("inspect", "epochs", "--statistics", "--format", "csv", cwd=models).returncode == 2
    summary = json.loads(run("inspect", "epochs", "--statistics", "--format", "json", cwd=models).stdout)["summary"]
    assert summary["rules"]["S101"] == 1


def test_every_format_has_every_file(run: Run, models: Path) -> None:
    for name in ("sarif", "markdown", "github", "csv"):
        done = run("inspect", "epochs", "--format", name, cwd=models)
        assert done.returncode == 1, (name, done.stderr)
        assert "sick.pt" in done.stdout, name
        assert "Traceback" not in done.stderr
        target = models / f"report.{name}"
        assert run("inspect", "epochs", "--format", name, "-o", target, cwd=models).returncode == 1
        assert target.read_text(encoding="utf-8", newline="") if name == "never" else target.stat().st_size
    rows = list(csv.DictReader(io.StringIO(run("inspect", "epochs", "--format", "csv", cwd=models).stdout)))
    assert {row["file"] for row in rows} == {
        "epochs/first.pt",
        "epochs/last/model.safetensors",
        "epochs/last/sick.pt",
    }


def test_baseline(run: Run, models: Path) -> None:
    sick = "epochs/last/sick.pt"
    assert run("inspect", sick, cwd=models).returncode == 1
    written = run("inspect", sick, "--write-baseline", "known.json", cwd=models)
    assert written.returncode == 0
    assert "--baseline known.json" in written.stdout
    known = run("inspect", sick, "--baseline", "known.json", "--fail-on", "info", cwd=models)
    assert known.returncode == 0
    assert "S101" not in known.stdout
    assert "in the baseline" in known.stdout
    cured = run("inspect", "epochs/first.pt", "--baseline", "known.json", cwd=models)
    assert cured.returncode == 0
    assert "No longer found" in cured.stdout and "S101" in cured.stdout
    as_json = outcome(run("inspect", sick, "--baseline", "known.json", "--format", "json", cwd=models))
    assert all(finding["known"] for finding in as_json["files"][0]["findings"])
    assert run("inspect", "epochs", "--baseline", "none.json", cwd=models).returncode == 2
    assert run("inspect", sick, "--write-baseline", sick, cwd=models).returncode == 2


def test_a_baseline_leaves_no_file_out(run: Run, models: Path) -> None:
    done = run("inspect", "epochs/first.pt", "missing.pt", "--write-baseline", "known.json", cwd=models)
    assert done.returncode == 2
    assert not (models / "known.json").exists()


def test_settings_file(run: Run, models: Path) -> None:
    settings = models / "pyproject.toml"
    settings.write_text('[tool.normdoctor]\nignore = ["S101"]\nfail-on = "info"\n')
    below = models / "epochs"
    assert "S101" not in run("inspect", "last/sick.pt", cwd=below).stdout
    assert "S101" in run("inspect", "last/sick.pt", "--no-settings", cwd=below).stdout
    assert "S101" in run("inspect", "last/sick.pt", "--ignore", "S106", cwd=below).stdout
    shown = run("inspect", "--show-settings", "--select", "S", cwd=below)
    assert shown.returncode == 0
    assert 'ignore = ["S101"]  # pyproject.toml' in shown.stdout
    assert 'select = ["S"]  # --select' in shown.stdout
    settings.write_text("[tool.normdoctor]\nignor = []\n")
    wrong = run("inspect", "last/sick.pt", cwd=below)
    assert wrong.returncode == 2
    assert "Did you mean ignore?" in wrong.stderr
    assert run("inspect", "last/sick.pt", "--settings", settings, "--no-settings", cwd=below).returncode == 2


def test_per_layer_ignores(run: Run, models: Path) -> None:
    (models / "normdoctor.toml").write_text(
        '[per-layer-ignores]\n"*" = { ignore = ["S101"], reason = "known since May" }\n"heed.*" = ["S"]\n'
    )
    done = run("inspect", "epochs/last/sick.pt", cwd=models)
    assert done.returncode == 0
    assert "ERROR" not in done.stdout
    assert "left out by the settings: known since May" in " ".join(done.stdout.split())
    assert "per-layer-ignores: 'heed.*' matches no layer" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--select", "S99"], "normdoctor rules"),
        (["--ignore", "warmup-rezidu"], "warmup-residue"),
        (["--format", "jsn"], "json"),
        (["--fail-on", "warn"], "warning"),
        (["--target", "fp-16"], "fp16"),
        (["--threshold", "S104.eror=1"], "error"),
        (["--layer", "layr1.*"], "layer1.*"),
        (["--layer", "layer1.*", "--layer", "layer1.0.bn9"], "layer1.0.bn"),
        (["--fomat", "json"], "--format"),
    ],
)
def test_did_you_mean(run: Run, arguments: list[str], hint: str) -> None:
    done = run("inspect", "healthy.pt", *arguments)
    assert done.returncode == 2
    assert hint in done.stderr
    assert done.stdout == ""


def test_did_you_mean_elsewhere(run: Run) -> None:
    assert "inspect" in run("inspct", "healthy.pt").stderr
    assert "S104" in run("explain", "S14").stderr
    assert "markdown" in run("rules", "--format", "markdwn").stderr
    assert "debias" in run("recalibrate", "healthy.pt", "--method", "debais").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--select", "S", "--ignore", "S"], "no rule is left"),
        (["--select", ""], "no rule ''"),
        (["--select", "S999", "--select", "S"], "no rule 'S999'"),
        (["--threshold", "S104.error=nan"], "must be a number, not nan"),
        (["--baseline", "/dev/zero"], "is not an ordinary file"),
        (["--settings", "/dev/zero"], "is not an ordinary file"),
        (["--write-baseline", "/dev/full"], "is not an ordinary file"),
    ],
)
def test_what_makes_no_sense(run: Run, arguments: list[str], said: str) -> None:
    done = run("inspect", "healthy.pt", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_path_is_not_this_folder(run: Run) -> None:
    done = run("inspect", "")
    assert done.returncode == 2
    assert "an empty path" in done.stderr


def test_codes_add_up_and_names_are_codes(run: Run) -> None:
    done = run("inspect", "nan_statistics.pt", "--ignore", "S101", "--ignore", "S102,S103", "--format", "json")
    assert "S101" not in outcome(done)["summary"]["rules"]
    done = run("inspect", "nan_statistics.pt", "--select", "nonfinite-stats", "--format", "json")
    assert set(outcome(done)["summary"]["rules"]) == {"S101"}


def test_a_baseline_of_one_call_does_not_accept_another(run: Run, tmp_path: Path) -> None:
    for name, call in (("first", "posix\nsystem"), ("second", "posix\npopen")):
        with zipfile.ZipFile(tmp_path / f"{name}.pt", "w") as archive:
            archive.writestr("a/data.pkl", f"c{call}\n(S'true'\ntR.".encode())
            archive.writestr("a/version", "3\n")
    assert run("inspect", "first.pt", "--write-baseline", "known.json", cwd=tmp_path).returncode == 0
    assert run("inspect", "first.pt", "--baseline", "known.json", cwd=tmp_path).returncode == 0
    assert run("inspect", "second.pt", "--baseline", "known.json", cwd=tmp_path).returncode == 1


def test_many_files_have_a_last_line(run: Run, models: Path) -> None:
    done = run("inspect", "epochs", cwd=models)
    assert "\n\nAll 3 files, 27 layers: 1 error" in done.stdout
    assert max(map(len, done.stdout.partition("All 3 files")[2].splitlines())) <= 80


def test_no_blanks_at_the_ends_of_lines(run: Run) -> None:
    for arguments in (["inspect", "dead_channels.pt"], ["rules"], ["explain", "S104"]):
        assert [line for line in run(*arguments).stdout.splitlines() if line != line.rstrip()] == []


def test_nobody_reads_the_rules_to_the_end(run: Run) -> None:
    for command in ("rules", "explain S104", "inspect dead_channels.pt --all"):
        shell = f"set -o pipefail; {sys.executable} -m normdoctor {command} | head -1"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=FIXTURES, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), command


def test_without_a_stdout(run: Run) -> None:
    command = f"{sys.executable} -m normdoctor inspect healthy.pt >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=FIXTURES, timeout=60)
    assert done.returncode == 2
    assert "no stdout" in done.stderr
    assert "Traceback" not in done.stderr
