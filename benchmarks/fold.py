"""See how many norms `normdoctor fold` folds right, beside the other tools that fold, over patterns and traps.

    python benchmarks/fold.py [--tools NAME ...] [--only TEXT ...] [--format NAME ...] [--python PATH] [--write]

Builds every pattern (fold_patterns.py tells what that is) in every format it can be saved in, lets each tool fold the
file in a process of its own, and judges what it wrote (fold_judge.py): does it load and run, does it compute the same
as the original in float64, how many norms are left. The other tools are optional; with --python they run under another
interpreter, where they are installed. Exit status 1 if normdoctor is wrong, crashes, or folds less than is expected.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the patterns are beside this file, not installed

import argparse
import json
import os
import select
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnxruntime
import torch
from fold_files import Case, NotExported, build, patterns
from fold_judge import Judgement, Original, UnusableError, Verdict, judge, measure
from fold_patterns import FORMATS, Pattern
from fold_tools import TOOLS, Tool

OURS = "normdoctor"
BOTH = (OURS, f"{OURS} --no-verify")
"""Ours as it is by default, and without the proof, so that what the proof would stop is seen."""
ALL_FORMATS = ("onnx", *FORMATS[3:], *FORMATS[:3])
BAD = (Verdict.WRONG, Verdict.CRASH, Verdict.UNUSABLE)
PATIENCE = 90.0
"""Seconds until a tool that says nothing counts as hanging."""

INTRODUCTION = """\
# What folds, and what folds it

Written by `python benchmarks/fold.py --write`. Every pattern is a small network around one or a few norms, with
random weights and statistics as training leaves them, in every format it can be saved in. Each tool folds the file in a
process of its own, with its defaults. What it writes is judged by what it computes, at runtime without graph
optimisation, against the original in float64: more than 1e-4 of the channel's size and more than 20 times the error of
the original in its own element type is wrong.
"""

NOTES = """
Notes:

- right: every norm that can be folded exactly is, and the outputs are the same. partial and left: some and none of
  them are, and the outputs are the same. wrong: the outputs are others. crash: the tool raised (a refusal that is an
  exception counts), died, or was silent for 90 seconds. unusable: what it wrote does not load, does not pass
  onnx.checker where the original does, does not run, or has lost an output's name.
- Foldable files have something that can be folded exactly. All others are traps: right is what computes the same.
- A norm turned into a multiplication and an addition does not count as folded.
- plain: the norm stands right behind a convolution or linear layer of its own.
- In a pickled module a norm counts where it can be folded without changing the module's code.
"""


# Running --------------------------------------------------------------------------------------------------------


class Worker:
    """One tool in a process of its own, started anew after it died."""

    def __init__(self, tool: Tool, python: str) -> None:
        self.tool, self.python = tool, python
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""
        self.version: str | None = None
        self.missing: str | None = None

    def start(self) -> None:
        command = [self.python, str(Path(__file__).with_name("fold_tools.py")), self.tool.name]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self.buffer = b""
        first = self.listen()
        self.version = first.get("version")
        self.missing = None if self.version else first.get("missing") or first.get("error")

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            self.start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "died"}
        return self.listen()

    def listen(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                return {"error": f"silent for {PATIENCE:.0f} s"}
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                status = self.process.wait()
                return {"error": f"died with status {status}"}
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        return dict(json.loads(line))

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()
            self.process = None


def run_tool(worker: Worker, case: Case, original: Original) -> tuple[Judgement, float | None]:
    tool = worker.tool
    target = case.path.with_name(f"{case.path.stem}.{tool.name.replace(' ', '-')}{tool.suffix or case.path.suffix}")
    shapes = [list(each.shape) for each in case.inputs.values()]
    reply = worker.ask({"source": str(case.path), "target": str(target), "shapes": shapes, "dtypes": case.dtypes})
    seconds = reply.get("seconds")
    if seconds is None:
        said = reply.get("error", "no answer").replace(f"{target.parent}{os.sep}", "")
        return Judgement(Verdict.CRASH, message=said), None
    try:
        return judge(case, original, target), seconds
    finally:
        for part in target.parent.glob(f"{target.name}*"):
            part.unlink()


@dataclass
class Record:
    """What all tools made of one file."""

    case: Case
    original: Original
    judgements: dict[str, Judgement] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def foldable(self) -> bool:
        return self.case.enough > 0

    @property
    def best_of_others(self) -> int:
        """The most norms that another tool folds right."""
        return max((each.folded for each in self.others.values() if each.verdict not in BAD), default=0)

    @property
    def others(self) -> dict[str, Judgement]:
        return {name: each for name, each in self.judgements.items() if name not in BOTH}

    @property
    def ours(self) -> list[Judgement]:
        return [self.judgements[name] for name in BOTH if name in self.judgements]

    @property
    def behind(self) -> bool:
        """Whether ours is not right, or less than what another tool does."""
        return any(each.verdict != Verdict.RIGHT or each.folded < self.best_of_others for each in self.ours)


@dataclass
class Run:
    records: list[Record] = field(default_factory=list)
    not_exported: dict[str, list[str]] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)


def run(wanted: Iterable[tuple[Pattern, str]], workers: list[Worker], directory: Path, seed: int) -> Run:
    result = Run(workers=workers)
    for pattern, fmt in wanted:
        try:
            case = build(pattern, fmt, directory, seed)
            record = Record(case, measure(case))
        except (NotExported, UnusableError) as error:
            result.not_exported.setdefault(fmt, []).append(pattern.name)
            print(f"  {fmt}/{pattern.name} is not exported: {error}", file=sys.stderr)
            continue
        for worker in workers:
            if case.path.suffix in worker.tool.takes and not worker.missing:
                judgement, seconds = run_tool(worker, case, record.original)
                record.judgements[worker.tool.name] = judgement
                if seconds is not None:
                    record.seconds[worker.tool.name] = seconds
                if judgement.verdict in BAD or (worker.tool.name in BOTH and judgement.verdict != Verdict.RIGHT):
                    what = f"{judgement.verdict.value} ({judgement.folded} of {case.expected}) {judgement.message}"
                    print(f"  {case.name}, {worker.tool.name}: {what}", file=sys.stderr, flush=True)
        case.path.unlink()
        result.records.append(record)
    return result


# Tables ---------------------------------------------------------------------------------------------------------


def row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def counts(records: Sequence[Record], name: str) -> dict[str, int]:
    """What one tool made of these files."""
    judged = [(record, record.judgements[name]) for record in records if name in record.judgements]
    tally = Counter(judgement.verdict for _, judgement in judged)
    foldable = [(record, judgement) for record, judgement in judged if record.foldable]
    right = [record for record, judgement in foldable if judgement.verdict == Verdict.RIGHT]
    return {
        "files": len(judged),
        "foldable": len(foldable),
        "folded right": len(right),
        "plain": sum(record.case.pattern.kind == "plain" for record in right),
        "other": sum(record.case.pattern.kind != "plain" for record in right),
        "partial": tally[Verdict.PARTIAL],
        "left": tally[Verdict.LEFT],
        "wrong": tally[Verdict.WRONG],
        "crash": tally[Verdict.CRASH],
        "unusable": tally[Verdict.UNUSABLE],
    }


def table(title: str, records: Sequence[Record], workers: Sequence[Worker]) -> list[str]:
    """One line per tool, one for all tools but ours together."""
    names = [worker for worker in workers if any(worker.tool.name in record.judgements for record in records)]
    if not names:
        return []
    foldable = [record for record in records if record.foldable]
    plain = sum(record.case.pattern.kind == "plain" for record in foldable)
    columns = list(counts([], ""))
    head = [
        "tool",
        "version",
        *columns[:3],
        f"plain of {plain}",
        f"other of {len(foldable) - plain}",
        *columns[5:],
        "s",
    ]
    lines = ["", f"## {title}", "", row(head), row(["---", "---", *["---:"] * (len(head) - 2)])]
    for worker in names:
        name = worker.tool.name
        seconds = statistics.median([each.seconds[name] for each in records if name in each.seconds] or [0.0])
        lines.append(row([name, worker.version, *counts(records, name).values(), f"{seconds:.3f}"]))
    others = [worker.tool.name for worker in names if worker.tool.name not in BOTH]
    if others:
        union = [
            record
            for record in foldable
            if any(record.judgements[name].verdict == Verdict.RIGHT for name in others if name in record.judgements)
        ]
        plain = sum(record.case.pattern.kind == "plain" for record in union)
        cells = [len(records), len(foldable), len(union), plain, len(union) - plain]
        lines.append(row(["all others together", "", *cells, *[""] * 6]))
    return lines


GROUPS = {
    "ONNX files": ("onnx", "onnx-torchscript", "onnx-dynamo"),
    "ONNX files written by hand": ("onnx",),
    "ONNX files of the TorchScript-based exporter, nothing folded": ("onnx-torchscript",),
    "ONNX files of the dynamo exporter, nothing optimised": ("onnx-dynamo",),
    "Pickled modules": ("module",),
    "Exported programs": ("pt2", "pt2-decomposed"),
}


def summarise(result: Run) -> list[str]:
    lines: list[str] = []
    for title, formats in GROUPS.items():
        lines += table(title, [record for record in result.records if record.case.fmt in formats], result.workers)
    missing = [f"{worker.tool.name} ({worker.missing})" for worker in result.workers if worker.missing]
    if missing:
        lines += ["", f"Not installed: {'; '.join(missing)}."]
    for fmt, names in result.not_exported.items():
        lines += ["", f"Not written by the exporter, or written wrong ({fmt}): {', '.join(names)}."]
    return lines


def bad(result: Run) -> list[str]:
    """What is wrong, by tool."""
    lines = ["", "## Wrong, crashed, unusable", "", row(["tool", "what", "files"]), row(["---"] * 3)]
    for worker in result.workers:
        for verdict in BAD:
            names = [
                record.case.name
                for record in result.records
                if worker.tool.name in record.judgements and record.judgements[worker.tool.name].verdict == verdict
            ]
            if names:
                lines.append(row([worker.tool.name, verdict.value, ", ".join(names)]))
    return lines


def behind(result: Run) -> list[str]:
    """Where ours folds less than is expected, and where another tool folds more."""
    less, more = [], []
    for record in result.records:
        if not record.behind:
            continue
        ours = min(record.ours, key=lambda each: (each.verdict == Verdict.RIGHT, each.folded))
        better = [name for name, each in record.others.items() if each.verdict not in BAD and each.folded > ours.folded]
        also = f"; {record.best_of_others} by {', '.join(better)}" if better else ""
        line = f"- {record.case.name}: {ours.verdict.value}, {ours.folded} of {record.case.expected}{also}"
        line += f" {ours.message}" if ours.message else ""
        (more if ours.verdict == Verdict.RIGHT else less).append(line)
    return [
        "", "## Where normdoctor folds less than is expected", "", *(less or ["Nowhere."]),
        "", "## Where another tool folds what need not be", "", *(more or ["Nowhere."]),
    ]  # fmt: skip


def cell(record: Record | None) -> str:
    """How many norms ours folds, and how many of the other tools are right."""
    if record is None:
        return ""
    judgement = record.ours[0] if record.ours else None
    others = [each.verdict == Verdict.RIGHT for each in record.others.values()]
    ours = ""
    if judgement is not None:
        ours = f"{judgement.folded}" if judgement.verdict == Verdict.RIGHT else judgement.verdict.value
    return f"{ours} ({sum(others)}/{len(others)})" if others else ours


DETAILS = """
## Every pattern

How many norms normdoctor folds, and in brackets how many of the other tools are right. Expected: how many can be
folded exactly; in brackets in a module, where that is another number.
"""


def details(result: Run) -> list[str]:
    rows: dict[str, dict[str, Record]] = {}
    for record in result.records:
        rows.setdefault(record.case.pattern.name, {})[record.case.fmt] = record
    formats = [fmt for fmt in ALL_FORMATS if any(fmt in each for each in rows.values())]
    lines = [DETAILS, row(["pattern", "kind", "norms", "expected", *formats])]
    lines.append(row(["---", "---", "---:", "---:", *["---:"] * len(formats)]))
    for name, records in rows.items():
        pattern = next(iter(records.values())).case.pattern
        least = f"{pattern.least} to " if pattern.least is not None and pattern.least < pattern.folds else ""
        expected = f"{least}{pattern.folds}"
        if pattern.in_module != pattern.folds:
            expected += f" ({pattern.in_module})"
        lines.append(row([name, pattern.kind, pattern.norms, expected, *(cell(records.get(fmt)) for fmt in formats)]))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=[tool.name for tool in TOOLS], metavar="NAME", help="all of them")
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="patterns with TEXT in their names")
    parser.add_argument("--format", nargs="+", choices=ALL_FORMATS, default=ALL_FORMATS, metavar="NAME")
    parser.add_argument("--kind", nargs="+", choices=("plain", "hard", "trap"), default=("plain", "hard", "trap"))
    parser.add_argument("--seed", type=int, default=0, help="other shapes and numbers")
    parser.add_argument("--python", default=sys.executable, help="the interpreter for all tools but normdoctor")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/fold.md")
    parser.add_argument("--output", type=Path, help="or to another file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(4)
    wanted = [
        (pattern, fmt)
        for pattern in patterns()
        for fmt in pattern.formats
        if fmt in options.format
        and pattern.kind in options.kind
        and any(text.lower() in pattern.name.lower() for text in options.only)
    ]
    suffixes = {{"module": ".pt", "pt2": ".pt2", "pt2-decomposed": ".pt2"}.get(fmt, ".onnx") for _, fmt in wanted}
    workers = [
        Worker(tool, sys.executable if tool.name in BOTH else options.python)
        for tool in TOOLS
        if (options.tools is None or tool.name in options.tools) and suffixes & set(tool.takes)
    ]
    start = time.monotonic()
    try:
        for worker in workers:
            worker.start()
            if worker.missing:
                print(f"  {worker.tool.name} is left out: {worker.missing}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as temporary:
            result = run(wanted, workers, Path(temporary), options.seed)
    finally:
        for worker in workers:
            worker.stop()
    built = f"{len(result.records)} files of {len({each.case.pattern.name for each in result.records})} patterns"
    made = f"{built}; torch {torch.__version__}, seed {options.seed}."
    summary = [INTRODUCTION, made, *summarise(result), NOTES, *behind(result)]
    text = "\n".join([*summary, *bad(result), *details(result)]) + "\n"
    print("\n".join(summary))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    output = Path(__file__).with_suffix(".md") if options.write else options.output
    if output is not None:
        output.write_text(text, encoding="utf-8")
    ours = [record.judgements[name] for record in result.records for name in BOTH if name in record.judgements]
    return 1 if any(each.verdict != Verdict.RIGHT for each in ours) else 0


if __name__ == "__main__":
    raise SystemExit(main())
