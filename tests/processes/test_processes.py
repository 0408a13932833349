"""Two real processes under torchrun: the same values in both, and an end with a clear word where one dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from normdoctor.errors import NormDoctorError, RefusedError, UsageError
from normdoctor.measurement.processes import ALONE
from normdoctor.processes import are_several

ROOT = Path(__file__).parents[2]

BEGIN = """
import os, signal, sys, time
import numpy as np
from normdoctor.errors import NormDoctorError, RefusedError
from normdoctor.moments import Moments, merged
from normdoctor.processes.with_torch import open_processes

def main(work):
    processes = None
    try:
        with open_processes(os.environ, timeout=float(os.environ.get("WAIT", "60"))) as processes:
            work(processes)
    except NormDoctorError as error:
        if processes is None or processes.speaks:
            print(f"error: {type(error).__name__}: {error.message} | {error.hint}", file=sys.stderr, flush=True)
        sys.exit(2)
    os.write(1, f"rank {processes.rank} is done\\n".encode())
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Run:
    """What became of a script that torchrun started twice."""

    def __init__(self, code: int, out: str, err: str, seconds: float) -> None:
        self.code, self.out, self.err, self.seconds = code, out, err, seconds

    @property
    def said(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def torchrun(path: Path, work: str, count: int = 2, **more: str) -> Run:
    script = path / "script.py"
    script.write_text(BEGIN + work + "\nmain(work)\n")
    options = ["--nproc-per-node", str(count), "--master-port", str(free_port())]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(**more),
        cwd=path,
    )
    return Run(done.returncode, done.stdout, done.stderr, time.monotonic() - begin)


def test_all_get_the_same_in_order(tmp_path: Path) -> None:
    done = torchrun(
        tmp_path,
        """
def work(processes):
    values = np.random.default_rng(0).normal(50.0, 2.0, (7, 5, 3))
    own = [(index, Moments.of(values[index])) for index in range(processes.rank, 7, processes.count)]
    everywhere = processes.gather(("norm", own))
    assert [name for name, _ in everywhere] == ["norm", "norm"]
    parts = sorted((pair for _, pairs in everywhere for pair in pairs), key=lambda pair: pair[0])
    total = merged(moments for _, moments in parts)
    np.save(f"rank{processes.rank}.npy", np.stack([total.mean, total.m2]))
    assert processes.gather(processes.rank) == [0, 1]
    assert processes.broadcast("from " + str(processes.rank), 1) == "from 1"
    assert processes.gather(b"x" * (1 << 20 * processes.rank))[1] == b"x" * (1 << 20)
    processes.barrier()
    assert processes.speaks == (processes.rank == 0)
""",
    )
    assert done.code == 0, done.err
    assert sorted(done.out.split("\n")) == ["", "rank 0 is done", "rank 1 is done"]  # and no word of gloo's
    first, second = (np.load(tmp_path / f"rank{rank}.npy") for rank in range(2))
    assert np.array_equal(first, second)
    together = np.random.default_rng(0).normal(50.0, 2.0, (7, 5, 3)).reshape(-1, 3)
    mean = together.mean(axis=0)
    assert first.shape == (2, 3)
    np.testing.assert_allclose(first[0], mean, rtol=1e-12)
    np.testing.assert_allclose(first[1], np.square(together - mean).sum(axis=0), rtol=1e-12)


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    done = torchrun(
        tmp_path,
        """
def work(processes):
    for round in range(5):
        if processes.rank == 1 and round == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.gather(round)
""",
    )
    assert done.code != 0 and done.seconds < 20
    assert len(done.said) == 1 and "rank 1 is gone" in done.said[0], done.err
    assert "nothing was written" in done.said[0] and "is done" not in done.out


def test_an_error_in_one_is_raised_in_all(tmp_path: Path) -> None:
    done = torchrun(
        tmp_path,
        """
def work(processes):
    processes.gather(1)
    if processes.rank == 1:
        raise RefusedError("sample 7: holds NaN", "Drop it.")
    try:
        processes.gather(2)
    except RefusedError:
        open(f"refused{processes.rank}", "w").close()
        raise
""",
    )
    assert done.code != 0
    assert done.said == ["error: RefusedError: rank 1: sample 7: holds NaN | Drop it."]
    assert (tmp_path / "refused0").exists()


# without torchrun, which would end the others itself


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def side_by_side(path: Path, work: str, count: int = 2, started: int = 2, **more: str) -> list[Ended]:
    script = path / "script.py"
    script.write_text(BEGIN + work + "\nmain(work)\n")
    own = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(RANK=str(rank), **own, **more),
            cwd=path,
        )
        for rank in range(started)
    ]
    try:
        return [Ended(process.wait(40), *process.communicate()) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_a_stop_from_outside(tmp_path: Path) -> None:
    """The first is busy when it is stopped, as it is where torchrun finds another one dead; then the second speaks."""
    first, second = side_by_side(
        tmp_path,
        """
def work(processes):
    processes.gather(1)
    if processes.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    processes.gather(2)
""",
    )
    assert first.code == second.code == 2
    assert first.err.startswith("error: NormDoctorError: stopped from outside (SIGTERM)")
    assert second.err.startswith("error: NormDoctorError: rank 0 is gone (")


def test_one_that_never_comes(tmp_path: Path) -> None:
    (first,) = side_by_side(tmp_path, "work = lambda processes: None", started=1, WAIT="2")
    assert first.code == 2 and "did not come together" in first.err and "Traceback" not in first.err


def test_one_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    with_torch = pytest.importorskip("normdoctor.processes.with_torch")
    monkeypatch.setattr(with_torch, "GRACE", 0.0)
    found = with_torch.Together(0, 2, 90.0)._lost(RuntimeError("[unbound_buffer.cc:78] Timed out waiting 90000ms for"))
    assert found.message == "another process said nothing for 1.5 minutes: nothing was written"


def test_a_defect_in_one_is_an_error_in_the_others() -> None:
    with_torch = pytest.importorskip("normdoctor.processes.with_torch")
    error = with_torch._Failure.of(ValueError("a defect")).error(3)
    assert type(error) is NormDoctorError
    assert error.message == "rank 3 failed (ValueError: a defect): nothing was written"
    again = with_torch._Failure.of(UsageError("wrong", "do it so")).error(1)
    assert type(again) is UsageError and (again.message, again.hint) == ("rank 1: wrong", "do it so")


def test_alone() -> None:
    with ALONE as processes:
        assert processes.gather(3) == [3] and processes.broadcast(4) == 4
        processes.barrier()
        assert processes.speaks and processes.count == 1
    with pytest.raises(RefusedError), ALONE:
        raise RefusedError("passes through")


def test_variables() -> None:
    complete = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert are_several(complete) and not are_several({}) and not are_several({"MASTER_ADDR": "here"})
    assert not are_several(complete | {"RANK": "0", "WORLD_SIZE": "1"})
    for wrong in ({"RANK": "2"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}, {"MASTER_PORT": ""}):
        with pytest.raises(UsageError):
            are_several(complete | wrong)
