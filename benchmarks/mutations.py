"""Ten thousand damaged files of every format: no traceback, no hang, no memory, nothing executed, nothing written.

    python benchmarks/mutations.py [--count 10000] [--seed 0] [--jobs 2] [--keep FOLDER]

Each file is one of the checkpoints in fixtures/ with one to four mutations: bits, bytes, runs, numbers that
readers trust, cuts, splices with another file; for zips also inside a record, with its checksum made right
again, and for JSON and Python text also word by word. Each is inspected in a process that notes its time, its
memory and, through an audit hook, every attempt to execute, import, connect or write. Exits with 1 if anything
went wrong; --keep saves those files.
"""

from __future__ import annotations

import argparse
import codecs
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures"
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".onnx", ".pt2", ".ts")

MAX_SECONDS = 5.0
MAX_MEGABYTES = 500.0

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
WORDS = (
    b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b'""', b"[]", b"{}", b"18446744073709551616", b'"../../x"',
    b"[[[[[[[[[[]]]]]]]]]]", b'"s0*2**99"', b'"__import__"', b"9" * 400,
)  # fmt: skip

CODECS = (
    "ascii", "cp437", "latin-1", "unicode_escape", "raw_unicode_escape", "utf-8-sig", "utf-16", "utf-16-be",
    "utf-16-le", "utf-32", "utf-32-be", "utf-32-le",
)  # fmt: skip

FORBIDDEN = (
    "exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen",
    "ctypes.", "socket.", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
    "shutil.", "pickle.find_class", "marshal.",
)  # fmt: skip
"""Audit events (https://docs.python.org/3/library/audit_events.html) that inspecting a file must never raise."""


@dataclass(frozen=True)
class Seed:
    """A checkpoint to damage: a file, or one file of a folder that is a checkpoint."""

    target: Path
    damaged: Path

    @property
    def name(self) -> str:
        return str(self.damaged.relative_to(FIXTURES))


def seeds() -> list[Seed]:
    """Every checkpoint in fixtures/, folders once for each file in them."""
    found = []
    for path in sorted(FIXTURES.iterdir()):
        if path.is_dir() and not path.name.startswith("__"):
            found += [Seed(path, inner) for inner in sorted(path.rglob("*")) if inner.is_file()]
        elif path.suffix in SUFFIXES:
            found.append(Seed(path, path))
    return found


# mutations


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """`data` with one to four mutations; `other` is what splices come from."""
    if zipfile.is_zipfile(io.BytesIO(data)) and rng.random() < 0.6:
        return _inside_zip(data, other, rng)
    for _ in range(rng.randint(1, 4)):
        data = _once(data, other, rng)
    return data


def _once(data: bytes, other: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(9)
    if not data:
        return other[: rng.randrange(64)]
    at = _place(data, rng)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.randbytes(1) + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at + rng.randint(1, 64) :]
    if kind == 4:
        return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]
    if kind == 5:
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(NUMBERS) & (1 << 8 * width) - 1
        return data[:at] + number.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]
    if kind == 6:
        start = rng.randrange(len(other)) if other else 0
        piece = other[start : start + rng.randint(1, 512)]
        return data[:at] + piece + data[at + len(piece) :]
    if kind == 7:
        length = rng.randint(1, 256)
        return data[:at] + data[at : at + length] * rng.randint(2, 40) + data[at + length :]
    words = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"]*"|\btrue\b|\bfalse\b|\bnull\b', data))
    if not words:
        return data
    word = rng.choice(words)
    return data[: word.start()] + rng.choice(WORDS) + data[word.end() :]


def _place(data: bytes, rng: random.Random) -> int:
    """A position, more often near the ends, where formats keep what matters."""
    choice = rng.random()
    if choice < 0.3:
        return rng.randrange(min(len(data), 4096))
    if choice < 0.5:
        return len(data) - 1 - rng.randrange(min(len(data), 4096))
    return rng.randrange(len(data))


def _inside_zip(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One record damaged, and the container sound: checksums, sizes and directory fit."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info, archive.read(info)) for info in archive.infolist()]
    # Tensors are mostly payload: what describes them deserves most of the attention.
    talkative = [n for n, (info, _) in enumerate(records) if info.filename.endswith((".pkl", ".json", ".py", ".pt"))]
    chosen = rng.choice(talkative) if talkative and rng.random() < 0.8 else rng.randrange(len(records))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for place, (info, content) in enumerate(records):
            if place == chosen:
                for _ in range(rng.randint(1, 4)):
                    content = _once(content, other, rng)
            archive.writestr(info.filename, content, info.compress_type)
    return buffer.getvalue()


# one file, watched


@dataclass(frozen=True)
class Outcome:
    """What became of one damaged file."""

    number: int
    seed: str
    kind: str
    """inspected, refused, or what went wrong."""
    seconds: float
    megabytes: float
    detail: str = ""


class _Timeout(BaseException):
    pass


_watched: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = isinstance(mode, str) and set(mode) & set("wax+")
        if writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            _watched.append(f"open {arguments[0]!r} for writing")
    elif event.startswith(FORBIDDEN):
        _watched.append(f"{event} {arguments!r:.200}")


def _on_alarm(signum: int, frame: FrameType | None) -> None:
    raise _Timeout


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def work(numbers: Sequence[int], seed: int, folder: Path, results: Any) -> None:
    """Make and inspect the damaged files of these numbers, one after another."""
    global _watched
    from normdoctor.errors import NormDoctorError
    from normdoctor.findings import Survey
    from normdoctor.inspection import inspect
    from normdoctor.reports import csv, github, json, markdown, sarif

    originals = seeds()
    for name in CODECS:  # everything that is imported late is imported now
        codecs.lookup(name)
    for original in originals:
        try:
            survey = Survey(reports=(inspect(original.target, target="fp16"),))
        except NormDoctorError:
            continue
        for renderer in (json, sarif, markdown, github, csv):
            renderer.render(survey)
    sys.addaudithook(_audit)
    signal.signal(signal.SIGALRM, _on_alarm)
    for number in numbers:
        path, damaged, name = prepare(number, seed, originals, folder)
        before = _peak()
        _watched = []
        began = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, 4 * MAX_SECONDS)
        kind, detail = "inspected", ""
        try:
            report = inspect(path, target="fp16")
            json.render(Survey(reports=(report,)))
        except NormDoctorError as error:
            kind = "refused" if error.message else "refused without a word"
        except _Timeout:
            kind = "hang"
        except Exception:
            kind, detail = "traceback", traceback.format_exc()
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds, grown = time.perf_counter() - began, _peak()
        if _watched:
            kind, detail = "forbidden", "; ".join(_watched[:5])
        _watched = None
        if seconds > MAX_SECONDS:
            kind = "hang"
        if grown > MAX_MEGABYTES and grown > before:
            kind = "memory"
        results.put(Outcome(number, name, kind, seconds, grown, detail))
        if kind in ("inspected", "refused"):
            shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
    results.put(None)


def prepare(number: int, seed: int, originals: Sequence[Seed], folder: Path) -> tuple[Path, Path, str]:
    """Write damaged file `number`: what to inspect, what to remove afterwards, and what it was made from."""
    rng = random.Random(f"{seed}-{number}")
    original = rng.choice(originals)
    other = rng.choice(originals).damaged.read_bytes()
    data = mutate(original.damaged.read_bytes(), other, rng)
    if original.target == original.damaged:
        path = folder / f"{number}{original.target.suffix}"
        path.write_bytes(data)
        return path, path, original.name
    path = folder / f"{number}-{original.target.name}"
    shutil.copytree(original.target, path)
    (path / original.damaged.relative_to(original.target)).write_bytes(data)
    return path, path, original.name


def run(count: int, seed: int, jobs: int, folder: Path) -> Iterator[Outcome]:
    """Damage and inspect `count` files in `jobs` processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=work, args=(range(place, count, jobs), seed, folder, results)) for place in range(jobs)
    ]
    for worker in workers:
        worker.start()
    running = jobs
    while running:
        try:
            outcome = results.get(timeout=60)
        except Exception as error:  # a worker that was killed puts nothing any more
            raise SystemExit(f"a worker died: {[worker.exitcode for worker in workers]}") from error
        if outcome is None:
            running -= 1
        else:
            yield outcome
    for worker in workers:
        worker.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    kinds: Counter[str] = Counter()
    slowest = largest = 0.0
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for outcome in run(options.count, options.seed, options.jobs, folder):
            kinds[outcome.kind] += 1
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.megabytes)
            if outcome.kind not in ("inspected", "refused"):
                wrong.append(outcome)
                print(f"{outcome.kind}: {outcome.number} from {outcome.seed}, {outcome.seconds:.1f} s", file=sys.stderr)
                print(outcome.detail, file=sys.stderr)
    print(f"{sum(kinds.values()):,} damaged files: {', '.join(f'{n:,} {kind}' for kind, n in kinds.most_common())}")
    print(f"slowest {slowest:.2f} s, largest {largest:.0f} MB")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
