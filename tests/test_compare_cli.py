"""`normdoctor compare` as a user meets it: exit codes, streams, widths, formats."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

FIXTURES = Path(__file__).parents[1] / "fixtures"
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_two_checkpoints(run: Run) -> None:
    done = run("compare", "healthy.pt", "slow_momentum.pt")
    assert done.returncode == 0, done.stderr
    assert "INFO     X001 buffers-behind-weights" in done.stdout
    assert "compared healthy.pt -> slow_momentum.pt" in done.stdout
    assert "Statistics moved in 9 of 9 layers; gamma or beta in 0 of 9" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("9 layers: 1 info")


def test_exit_codes(run: Run) -> None:
    assert run("compare", "healthy.pt", "slow_momentum.pt", "--fail-on", "info").returncode == 1
    assert run("compare", "healthy.pt", "healthy.onnx", "--fail-on", "info").returncode == 0
    assert run("compare", "healthy.pt", "never_updated.pt").returncode == 1
    for wrong in (["healthy.pt"], ["healthy.pt", "transformer.pt"], ["healthy.pt", "no.pt"], [], ["--in-file"]):
        done = run("compare", *wrong)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("normdoctor: "), wrong
        assert "hint: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ["healthy.pt", "slow_momentum.pt", "nan_statistics.pt"],
        ["training_checkpoint.pt", "--in-file"],
        ["healthy.pt", "healthy_frozen.pt"],
    ],
)
def test_fits_its_width_without_colour_in_a_pipe(run: Run, arguments: list[str], width: int) -> None:
    done = run("compare", *arguments, "--all", COLUMNS=str(width))
    assert done.returncode in (0, 1) and "\x1b" not in done.stdout
    lines = [
        line
        for line in done.stdout.splitlines()
        if not line.strip().startswith(("fix: ", "normdoctor ", "source: https://"))
    ]
    assert [line for line in lines if len(line) > width] == []


def test_many_long_names_are_broken_at_eighty_columns(run: Run, tmp_path: Path) -> None:
    state = torch.load(FIXTURES / "healthy.pt")
    broken = {n: t * float("nan") if "bn1.running_var" in n else t for n, t in state.items()}
    for rank in range(3):
        torch.save(broken if rank == 1 else state, tmp_path / f"rank_{rank}.pt")
    done = run("compare", tmp_path, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "rank_1.pt alone has other statistics" in " ".join(done.stdout.split())
    assert "WARNING  X002" in done.stdout and "they are no numbers on one side" in " ".join(done.stdout.split())
    header = done.stdout[done.stdout.index("compared ranks of one run") :].splitlines()
    assert all(len(line) <= max(80, 12 + len(str(tmp_path / "rank_0.pt"))) for line in header[:3])


def test_steps_are_drawn(run: Run) -> None:
    done = run("compare", "healthy.pt", "slow_momentum.pt", "healthy.safetensors", "--all")
    assert "KL by" in done.stdout
    assert "step 2  slow_momentum.pt -> healthy.safetensors: 11 weight tensors bit-equal" in done.stdout
    assert (
        run("compare", "healthy.pt", "slow_momentum.pt", "healthy.safetensors", PYTHONIOENCODING="ascii").returncode
        == 0
    )


def test_json(run: Run) -> None:
    done = run("compare", "healthy.pt", "slow_momentum.pt", "--format", "json", "--layer", "layer1.*")
    (file,) = json.loads(done.stdout)["files"]
    comparison = file["comparison"]
    assert comparison["kind"] == "checkpoints" and comparison["sides"][0]["label"] == "healthy.pt"
    assert [row["layer"] for row in comparison["layers"]] == ["layer1.0.bn1", "layer1.0.bn2"]
    assert comparison["layers"][0]["statistics"] == "moved" and comparison["layers"][0]["steps"] == 0
    assert comparison["weights"] == {
        "tensors": 11,
        "equal": 11,
        "relative": 0.0,
        "motion": "equal",
        "unmatched": 0,
        "cosine": None,
    }
    assert file["findings"][0]["code"] == "X001" and file["skips"] == []


@pytest.mark.parametrize("output_format", ["markdown", "csv", "github", "sarif"])
def test_other_formats(run: Run, output_format: str, tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = run("compare", "healthy.pt", "slow_momentum.pt", "--format", output_format, "-o", out)
    assert done.returncode == 0 and done.stdout == ""
    text = out.read_text(encoding="utf-8")
    assert "compare_kl" in text if output_format == "csv" else "X001" in text
    if output_format == "markdown":
        assert "compared <code>healthy.pt -&gt; slow_momentum.pt</code>" in text


def test_the_report_does_not_overwrite_a_model(run: Run) -> None:
    done = run("compare", "healthy.pt", "slow_momentum.pt", "-o", "healthy.pt")
    assert done.returncode == 2 and "healthy.pt" in done.stderr


def test_inspecting_a_folder_of_ranks(run: Run, tmp_path: Path) -> None:
    state = torch.load(FIXTURES / "healthy.pt")
    torch.save(state, tmp_path / "rank_0.pt")
    torch.save({n: t * 2 if "running_var" in n else t for n, t in state.items()}, tmp_path / "rank_1.pt")
    for jobs in ("1", "2"):
        done = run("inspect", tmp_path, "--jobs", jobs, "--fail-on", "warning")
        assert done.returncode == 1, done.stderr
        assert "X002 ranks-differ" in done.stdout and "compared ranks of one run" in done.stdout


def test_neither_torch_nor_onnx_is_imported() -> None:
    import sys

    script = (
        "import sys\nfrom normdoctor.cli import app\n"
        "for files in (['healthy.pt', 'healthy.safetensors'], ['healthy.pt', 'healthy.onnx']):\n"
        "    try:\n        app(['compare', *files])\n    except SystemExit as stop:\n        assert stop.code == 0\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=FIXTURES,
        check=True,
        env={"PYTHONPATH": ".."},
    )
    assert done.stdout.splitlines()[-1] == "[]"
