"""`normdoctor recalibrate` with data, and `inspect --data`, as a user meets them: exit codes, streams, files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch

import normdoctor.cli

FIXTURES = Path(__file__).parents[2] / "fixtures"
ARCH = ("--arch", "nets:ResNet")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        return " ".join(self.out.split())


Call = Callable[..., Done]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nets: ModuleType) -> Path:
    """The folder in which commands run, with a sick model and data beside it."""
    for name in ("slow_momentum.pt", "slow_momentum_module.pt", "healthy.pt", "healthy.onnx", "digits.npz"):
        shutil.copy(FIXTURES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


@pytest.fixture
def call(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command line in this process, which has torch already."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["normdoctor", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            normdoctor.cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert isinstance(code, int) or code is None
        return Done(code or 0, out, err)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_done(call: Call, here: Path) -> None:
    before = contents(here)
    done = call("recalibrate", "slow_momentum.pt", *ARCH, "--data", "digits.npz", "--labels", "labels")
    assert (done.code, done.err) == (0, "")
    after = contents(here)
    assert after.keys() - before.keys() == {"slow_momentum.recalibrated.pt"}
    assert all(after[name] == content for name, content in before.items())
    assert "512 samples" in done.words and "accuracy" in done.words
    assert "wrote slow_momentum.recalibrated.pt" in done.out
    assert all(len(line) <= 80 or " " not in line.strip() or line.startswith("next") for line in done.out.splitlines())
    inspected = call("inspect", "slow_momentum.recalibrated.pt", *ARCH, "--data", "digits.npz", "--labels", "labels")
    assert inspected.code == 0 and "S104" not in inspected.out and "D60" not in inspected.out
    sick = call("inspect", "slow_momentum.pt", *ARCH, "--data", "digits.npz")
    assert sick.code == 1 and "D60" in sick.out


def test_the_next_command_runs(call: Call, here: Path) -> None:
    done = call("recalibrate", "slow_momentum.pt", *ARCH, "--data", "digits.npz")
    (line,) = [line for line in done.out.splitlines() if line.startswith("next: normdoctor ")]
    assert call(*line.removeprefix("next: normdoctor ").split()).code == 0
    sick = call("inspect", "slow_momentum.pt", *ARCH, "--data", "digits.npz")
    assert "normdoctor recalibrate slow_momentum.pt" in sick.words


def test_output_overwrite_and_in_place(call: Call, here: Path) -> None:
    common = ("recalibrate", "slow_momentum_module.pt", "--trust", "--data", "digits.npz")
    original = (here / "slow_momentum_module.pt").read_bytes()
    assert call(*common, "-o", "fixed.pt").code == 0
    again = call(*common, "-o", "fixed.pt")
    assert again.code == 2 and "fixed.pt: exists already" in again.err and again.out == ""
    assert call(*common, "-o", "fixed.pt", "--overwrite").code == 0
    onto = call(*common, "-o", "slow_momentum_module.pt", "--overwrite")
    assert onto.code == 2 and "is the input itself" in onto.err
    both = call(*common, "-o", "fixed.pt", "--in-place")
    assert both.code == 2 and "exclude each other" in both.err
    assert (here / "slow_momentum_module.pt").read_bytes() == original
    placed = call(*common, "--in-place")
    assert placed.code == 0 and "slow_momentum_module.pt.bak" in placed.words
    assert (here / "slow_momentum_module.pt.bak").read_bytes() == original
    assert (here / "slow_momentum_module.pt").read_bytes() == (here / "fixed.pt").read_bytes()


@pytest.mark.parametrize("form", ["console", "json", "markdown"])
def test_a_dry_run_writes_nothing(form: str, call: Call, here: Path) -> None:
    before = contents(here)
    done = call("recalibrate", "slow_momentum.pt", *ARCH, "--data", "digits.npz", "--dry-run", "--format", form)
    assert done.code == 0 and contents(here) == before
    if form == "json":
        found = json.loads(done.out)
        assert found["output"] is None and len(found["layers"]) == 9
    else:
        assert "layer3.0.bn2" in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "one-pass"), "one-pass"),
        (("--method", "one-pass", "--until", "0.2", "--batch-size", "16"), "--until was reached"),
        (("--method", "blend", "--prior", "32"), "32 samples"),
        (("--samples", "100", "--seed", "3"), "100 samples"),
        (("--layer", "layer3.*"), "3 layers"),
        (("--no-verify",), "--no-verify"),
    ],
)
def test_options(options: tuple[str, ...], words: str, call: Call, here: Path) -> None:
    done = call("recalibrate", "slow_momentum.pt", *ARCH, "--data", "digits.npz", *options)
    assert done.code == 0, done.err
    assert words in done.words or words == "3 layers"
    state, old = torch.load(here / "slow_momentum.recalibrated.pt"), torch.load(here / "slow_momentum.pt")
    changed = {name.rpartition(".")[0] for name in old if not torch.equal(state[name], old[name])}
    assert all(name.startswith("layer3") for name in changed) == (words == "3 layers")


def test_few_samples_are_said_loudly(call: Call, here: Path) -> None:
    refused = call("recalibrate", "healthy.pt", *ARCH, "--data", "digits.npz", "--samples", "8")
    assert refused.code == 2 and "independent values a channel in 8 samples" in refused.err and refused.out == ""
    forced = call("recalibrate", "healthy.pt", *ARCH, "--data", "digits.npz", "--samples", "8", "--force")
    assert forced.code == 0 and "too little data" in forced.words


def test_significantly_worse(call: Call, here: Path) -> None:
    """Inverted images and what the net says of them: any change is a loss."""
    images = -np.load("digits.npz")["x"]
    session = onnxruntime.InferenceSession(here / "healthy.onnx")
    (scores,) = session.run(None, {session.get_inputs()[0].name: images})
    np.savez("inverted.npz", x=images, labels=np.asarray(scores).argmax(1))
    before = contents(here)
    for form in ("console", "json"):
        done = call(
            "recalibrate", "healthy.pt", *ARCH, "--data", "inverted.npz", "--labels", "labels", "--format", form
        )
        assert done.code == 1 and "significantly worse" in done.err
        assert contents(here) == before
    found = json.loads(done.out)
    assert found["output"] is None and found["judgement"]["accuracy"]["before"] == 1
    forced = call("recalibrate", "healthy.pt", *ARCH, "--data", "inverted.npz", "--labels", "labels", "--force")
    assert forced.code == 0 and (here / "healthy.recalibrated.pt").exists()


Prepare = Callable[[Path], object]


def save(name: str, array: np.ndarray) -> Prepare:
    return lambda folder: np.save(folder / name, array)


def broken(value: float) -> Prepare:
    def prepare(folder: Path) -> None:
        images = np.load(folder / "digits.npz")["x"]
        images[41, 0, 2, 2] = value
        np.save(folder / "d.npy", images)

    return prepare


def other_keys(folder: Path) -> None:
    state = torch.load(folder / "healthy.pt")
    state["fc2.weight"] = state.pop("fc.weight")
    torch.save(state, folder / "healthy.pt")


def no_norms(folder: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.GroupNorm(1, 3)), folder / "g.pt")


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


GUARDS: dict[str, tuple[Prepare, tuple[str, ...], tuple[str, ...]]] = {
    "empty": (save("d.npy", floats(0, 1, 8, 8)), ("healthy.pt", *ARCH), ("d.npy", "0 x 1 x 8 x 8", "one sample")),
    "nan": (broken(np.nan), ("healthy.pt", *ARCH), ("NaN", "41", "--drop-nonfinite")),
    "inf": (broken(np.inf), ("healthy.pt", *ARCH), ("inf", "41", "--drop-nonfinite")),
    "shape": (save("d.npy", floats(40, 3, 8, 8)), ("healthy.onnx",), ("40 x 3 x 8 x 8", "? x 1 x 8 x 8")),
    "shape of a module": (save("d.npy", floats(40, 3, 8, 8)), ("healthy.pt", *ARCH), ("1 channels", "3 channels")),
    "rank": (save("d.npy", floats(40, 64)), ("healthy.onnx",), ("40", "64")),
    "uint8": (save("d.npy", np.ones((40, 1, 8, 8), np.uint8)), ("healthy.pt", *ARCH), ("uint8", "--scale")),
    "text": (save("d.npy", np.array(["a", "b"])), ("healthy.pt", *ARCH), ("d.npy",)),
    "no such data": (lambda folder: None, ("healthy.pt", *ARCH), ("d.npy: no such file",)),
    "no norms": (no_norms, ("g.pt", "--trust", "--data", "digits.npz"), ("no BatchNorm with running statistics",)),
    "no trust": (save("d.npy", floats(64, 1, 8, 8)), ("slow_momentum_module.pt",), ("--trust",)),
    "no arch": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.pt",), ("--arch",)),
    "no such package": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.pt", "--arch", "nopkg.x:N"), ("nopkg",)),
    "no such class": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.pt", "--arch", "nets:ResNt"), ("ResNet",)),
    "keys": (lambda folder: (other_keys(folder), save("d.npy", floats(64, 1, 8, 8))(folder)),
             ("healthy.pt", *ARCH), ("fc.weight", "fc2.weight")),
    "other widths": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.pt", *ARCH, "--arch-args", '{"widths": [4, 8]}'),
                     ("--arch",)),
    "memory": (save("d.npy", floats(400, 1, 8, 8)), ("healthy.pt", *ARCH, "--memory", "1MB"), ("--samples", "1 MB")),
    "memory of no size": (save("d.npy", floats(400, 1, 8, 8)), ("healthy.pt", *ARCH, "--memory", "much"), ("4GB",)),
    "no layer": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.pt", *ARCH, "--layer", "x.*"), ("no layer matches",)),
    "no key": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.pt", *ARCH, "--key", "ema"), ("ema",)),
    "labels": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.pt", *ARCH, "--labels", "nothing.npy"), ("nothing.npy",)),
    "labels of another length": (
        lambda folder: (save("d.npy", floats(64, 1, 8, 8))(folder), save("l.npy", np.zeros(63, np.int64))(folder)),
        ("healthy.pt", *ARCH, "--labels", "l.npy"), ("63", "64"),
    ),
    "labels that are no classes": (
        lambda folder: (save("d.npy", floats(64, 1, 8, 8))(folder), save("l.npy", np.full(64, 12))(folder)),
        ("healthy.pt", *ARCH, "--labels", "l.npy"), ("12", "10 classes"),
    ),
    "until of exact": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.pt", *ARCH, "--until", "0.1"), ("one-pass",)),
    "device": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.pt", *ARCH, "--device", "nowhere"), ("nowhere",)),
    "trust of onnx": (save("d.npy", floats(64, 1, 8, 8)), ("healthy.onnx", "--trust"), ("--trust", "ONNX")),
    "not a model": (save("d.npy", floats(64, 1, 8, 8)), ("digits.npz",), ("digits.npz",)),
}  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS)
def test_guards(guard: str, call: Call, here: Path) -> None:
    """Exit code 2, one message that says what is wrong and one hint, nothing on stdout, nothing written."""
    prepare, arguments, words = GUARDS[guard]
    prepare(here)
    before = contents(here)
    data = () if "--data" in arguments else ("--data", "d.npy")
    done = call("recalibrate", *arguments, *data)
    assert done.code == 2 and done.out == ""
    for word in words:
        assert word.lower() in done.err.lower(), done.err
    assert done.err.startswith("normdoctor: ") and "\n  hint: " in done.err and "Traceback" not in done.err
    assert contents(here) == before


def test_options_without_data(call: Call) -> None:
    done = call("recalibrate", "healthy.pt")
    assert done.code == 2 and "needs data" in done.err and "--method debias" in done.err
    for option in (("--samples", "3"), ("--arch", "nets:ResNet"), ("--trust",), ("--labels", "y")):
        done = call("recalibrate", "healthy.pt", "--method", "debias", *option)
        assert done.code == 2 and option[0] in done.err
    for option in (("--samples", "3"), ("--labels", "y")):
        done = call("inspect", "healthy.pt", *option)
        assert done.code == 2 and option[0] in done.err
    done = call("recalibrate", "healthy.pt", "--method", "debias", "--data", "digits.npz")
    assert done.code == 2 and "needs no data" in done.err


CODE = """
import numpy as np, torch
def loader():
    print("loading")
    images = np.load("digits.npz")["x"]
    for begin in range(0, 512, 64):
        yield torch.from_numpy(images[begin:begin + 64]),
def failing():
    yield torch.zeros(4, 1, 8, 8)
    raise ValueError("the disk is gone")
def nothing():
    return []
"""


def test_data_from_code(call: Call, here: Path) -> None:
    (here / "own_data.py").write_text(CODE)
    before = contents(here)
    for name, words in (("failing", "the disk is gone"), ("nothing", "nothing"), ("missing", "missing")):
        failed = call("recalibrate", "healthy.pt", *ARCH, "--data", f"own_data:{name}")
        assert failed.code == 2 and words in failed.err and failed.out == ""
        assert {name for name in contents(here) if "__pycache__" not in name} == before.keys()
    done = call("recalibrate", "healthy.pt", *ARCH, "--data", "own_data:loader", "--format", "json")
    assert (
        done.code == 0 and json.loads(done.out)["data"]["samples"] == 512
    )  # what the code prints is not in the report


def test_interrupted(here: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle: the shell's code for it, and nothing left behind."""
    import normdoctor.measurement.with_torch as walking

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = contents(here)
    monkeypatch.setattr(walking.ModuleWalker, "put", interrupted)
    code: object = None
    try:
        code = call("recalibrate", "healthy.pt", *ARCH, "--data", "digits.npz").code
    except KeyboardInterrupt:
        code = 130
    assert code == 130 and contents(here) == before


def test_in_a_process_of_its_own(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "normdoctor", "recalibrate", "healthy.onnx", "--data", "digits.npz", "--dry-run"],
        capture_output=True,
        encoding="utf-8",
        cwd=here,
        env={"PYTHONPATH": str(FIXTURES.parent), "PATH": "", "NO_COLOR": "1"},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "9 " in done.stdout and "changed little" in " ".join(done.stdout.split())
