"""`normdoctor fold` as a user meets it: exit codes, streams, formats."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import chain

Run = Callable[..., subprocess.CompletedProcess[str]]

BROKEN = """
import sys
from dataclasses import replace
from normdoctor.flow.plan import FoldPlan
original = FoldPlan.new_inputs
def new_inputs(self):
    for new in original(self):
        yield replace(new, values=new.values * 1.01) if new.node.label == "conv2" else new
FoldPlan.new_inputs = new_inputs
from normdoctor.cli import main
main()
"""


@pytest.fixture
def fold(run: Run, onnx_chain: Path) -> Run:
    def fold(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return run("fold", *arguments, cwd=onnx_chain.parent, **environment)

    return fold


def test_done(fold: Run, onnx_chain: Path) -> None:
    done = fold("model.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("model.onnx\n  ONNX opset 17")
    assert "4 norms: 4 folded backward" in done.stdout
    assert "VERIFIED against the original (onnxruntime " in done.stdout
    assert done.stdout.endswith("wrote model.folded.onnx\nnext: normdoctor inspect model.folded.onnx\n")
    assert "\x1b" not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    again = fold("model.onnx")
    assert again.returncode == 2 and "model.folded.onnx: exists already" in again.stderr and again.stdout == ""
    assert fold("model.onnx", "--overwrite").returncode == 0
    unchanged = fold("model.folded.onnx", "-o", "twice.onnx")
    assert unchanged.returncode == 0 and "copied to twice.onnx" in unchanged.stdout
    assert (onnx_chain.parent / "twice.onnx").read_bytes() == (onnx_chain.parent / "model.folded.onnx").read_bytes()


def test_a_failed_proof_exits_with_1_and_names_the_norm(onnx_chain: Path) -> None:
    for output_format in ("console", "json", "markdown"):
        done = subprocess.run(
            [sys.executable, "-c", BROKEN, "fold", str(onnx_chain), "--format", output_format],
            capture_output=True,
            encoding="utf-8",
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"normdoctor: {onnx_chain}: the folded model is not the same")
        assert "from the norm bn2 on" in done.stderr
        assert "bn2" in done.stdout
        if output_format == "json":
            proof = json.loads(done.stdout)["proof"]
            assert proof["state"] == "failed" and proof["first_norm"] == "bn2"
    assert [path.name for path in onnx_chain.parent.iterdir()] == ["model.onnx"]


def test_dry_run(fold: Run, onnx_chain: Path) -> None:
    done = fold("model.onnx", "--dry-run", "--format", "json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["dry_run"] is True and document["output"] is None
    assert document["proof"]["state"] == "nothing_to_verify"
    assert [norm["into"] for norm in document["norms"]] == [["conv0"], ["conv1"], ["conv2"], ["conv3"]]
    assert "nothing was written (--dry-run)" in fold("model.onnx", "--dry-run").stdout
    assert [path.name for path in onnx_chain.parent.iterdir()] == ["model.onnx"]


def test_markdown(fold: Run) -> None:
    done = fold("model.onnx", "--format", "markdown", "--no-verify")
    assert done.returncode == 0 and done.stdout.startswith("## normdoctor fold: `model.onnx`\n")
    assert "not verified: --no-verify" in done.stdout


def test_many_norms_are_shown_when_asked(run: Run, tmp_path: Path) -> None:
    chain(tmp_path / "deep.onnx", 14)
    short = run("fold", "deep.onnx", "--dry-run", cwd=tmp_path).stdout
    whole = run("fold", "deep.onnx", "--dry-run", "--all", cwd=tmp_path).stdout
    assert "… 4 more norms (--all)" in short and "bn13 " not in short
    assert all(f"bn{n} " in whole for n in range(14))
    assert "... 4 more norms" in run("fold", "deep.onnx", "--dry-run", cwd=tmp_path, PYTHONIOENCODING="ascii").stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("missing.onnx",), "missing.onnx: no such file"),
        (("model.onnx", "--format", "jsn"), "hint: Did you mean json?"),
        (("model.onnx", "--export", "onx"), "hint: Did you mean onnx?"),
        (("model.onnx", "-o", "model.onnx", "--overwrite"), "is the input itself"),
        (("model.onnx", "-o", "-"), "a model is written to a file"),
        (("model.onnx", "-o", "none/m.onnx"), "none: no such folder"),
        (("model.onnx", "--data", "none.npz"), "none.npz: no such file"),
        (("model.onnx", "--data", "data.npz"), "the model has no input 'image'"),
        (("model.onnx", "--input-shape", "1,4,8,8"), "does not fit x"),
        (("model.onnx", "--opset", "18"), "--opset is for --export onnx"),
        (("cut.onnx",), "cut.onnx"),
        ((".",), ""),
    ],
)
def test_what_cannot_be_done_exits_with_2(
    fold: Run, onnx_chain: Path, arguments: tuple[str, ...], message: str
) -> None:
    folder = onnx_chain.parent
    (folder / "cut.onnx").write_bytes(onnx_chain.read_bytes()[:-700])
    np.savez(folder / "data.npz", image=np.zeros((1, 3, 8, 8)))
    before = sorted(path.name for path in folder.iterdir())
    done = fold(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == "" and done.stderr.startswith("normdoctor: ") and message in done.stderr
    assert "Traceback" not in done.stderr and "\n  hint: " in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


def test_inspecting_and_folding_onnx_need_no_torch(onnx_chain: Path) -> None:
    script = (
        "import sys\nfrom normdoctor.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    for options in (["--dry-run"], ["--no-verify"], ["--overwrite"]):
        done = subprocess.run([sys.executable, "-c", script, "fold", str(onnx_chain), *options], capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can write")
def test_a_folder_in_which_nothing_can_be_written(fold: Run, onnx_chain: Path) -> None:
    done = fold("model.onnx", "-o", "/proc/folded.onnx")
    assert done.returncode == 2 and "cannot be written" in done.stderr
