"""The options of `normdoctor inspect` that are about the graph, and what its reports show of it."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHAPE = "2,3,16,16"


def inspect(files: Path, nets: object, *options: str) -> subprocess.CompletedProcess[str]:
    code = str(Path(str(vars(nets)["__file__"])).parent)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{code}", "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "normdoctor", "inspect", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=files, env=environment)


def test_places_in_the_console(files: Path, nets: object) -> None:
    done = inspect(files, nets, "net.pt2", "--all")
    assert done.returncode in (0, 1), done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["layer", "fed", "by", "feeds", "mean", "as", "predicted", "fold"] in rows
    assert ["bn3", "max-pooling(silu(tail.1))", "mean", "-", "forward"] in rows
    assert "max-pooling lies between (bn3)" in " ".join(done.stdout.split())
    table = done.stdout[done.stdout.index("fed by") :]
    assert max(map(len, table.splitlines())) <= 80
    assert "fed by" in inspect(files, nets, "net.pt2").stdout
    assert "fed by" not in inspect(files, nets, "weights.pt").stdout
    assert "need the graph" not in done.stdout


def test_quick_in_the_console(files: Path, nets: object) -> None:
    done = inspect(files, nets, "net.pt2", "--quick", "--verbose")
    words = " ".join(done.stdout.split())
    assert "need the graph: A208" in words and "--trust" in words and "fed by" not in words
    assert "need the graph" in words.rpartition("4 layers")[2]


def test_trust_without_data_traces_the_module(files: Path, nets: object) -> None:
    done = inspect(files, nets, "module.pt", "--trust", "--input-shape", SHAPE, "--all", "--format", "csv")
    rows = {row["layer"]: row for row in csv.DictReader(io.StringIO(done.stdout))}
    assert (rows["bn2"]["fed_by"], rows["bn2"]["feeds"], rows["bn2"]["fold"]) == ("conv2", "addition", "into conv2")
    marked = inspect(files, nets, "weights.pt", "--arch", "placing_nets:Residual", "--input-shape", SHAPE,
                     "--format", "markdown")  # fmt: skip
    assert "| fed by | feeds |" in marked.stdout and "| `conv2` | `addition` |" in marked.stdout
    guessed = inspect(files, nets, "weights.pt", "--format", "markdown")
    assert "fed by" not in guessed.stdout


def test_several_files_with_trust(files: Path, nets: object) -> None:
    """Each as it can: a file that needs no trust is none the worse for it."""
    done = inspect(files, nets, "module.pt", "net.onnx", "weights.pt", "--trust", "--input-shape", SHAPE)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.count("G502 foldable") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("net.onnx", "--quick", "--trust"), "--trust is for the graph, which --quick leaves out"),
        (("net.onnx", "--input-shape", SHAPE), "--input-shape is for models that torch runs"),
        (("module.pt", "--trust", "--input-shape", "a,b"), "no list of lengths"),
        (("module.pt", "--trust", "--input-shape", SHAPE, "--data", "x.npy"), "--input-shape and --data"),
        (("module.pt", "--trust", "--jobs", "2"), "--jobs is not for --trust"),
        (("weights.pt", "--arch", "placing_nets:Residual", "--jobs", "0"), "--jobs is not for --arch"),
        (("module.pt", "--trust", "--samples", "4"), "--samples is for running the model on data"),
        (("module.pt", "--trust", "--device", "cpu"), "--device is for running the model on data"),
        (("module.pt", "--trust"), "shapes of its inputs"),
    ],
)
def test_wrong_options(files: Path, nets: object, options: tuple[str, ...], words: str) -> None:
    done = inspect(files, nets, *options)
    assert done.returncode == 2
    assert words in done.stderr and "hint: " in done.stderr
