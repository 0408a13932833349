"""Time and memory of `normdoctor compare` on two large checkpoints, in every format that torch and safetensors write.

    python benchmarks/compare_speed.py [--size-gb 1] [--runs 3] [--directory DIR] [--write]

Three pairs for each format: bit-identical copies, another epoch (every tensor differs), and the same weights with
other running statistics (a recalibration). Each run is a process of its own, start and imports included, with a warm
file cache; the table has medians. Plain torch, loading both files and comparing tensor by tensor, is the yardstick.
--write renews compare_speed.md beside this script. Exit status 1 if a command failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FORMATS = {"torch zip": "pt", "torch legacy": "pth", "safetensors": "safetensors"}
PAIRS = {"identical": "same", "other epoch": "epoch", "recalibrated": "recalibrated"}
CHANNELS = 512
BY_TORCH = """
import sys, torch
from safetensors.torch import load_file
load = load_file if sys.argv[1].endswith("safetensors") else torch.load
a, b = map(load, sys.argv[1:])
print(sum(torch.equal(a[name], b[name]) for name in a))
"""


class Run(NamedTuple):
    seconds: float
    peak_mb: float
    said: str


def build(folder: Path, size: float) -> None:
    """first.* and its three partners in every format; a convolution of 9.4 MB and a BatchNorm again and again."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    first: dict[str, torch.Tensor] = {}
    for number in range(max(1, round(size / (CHANNELS * CHANNELS * 9 * 4)))):
        first[f"layers.{number}.conv.weight"] = 0.02 * random(CHANNELS, CHANNELS, 3, 3)
        first[f"layers.{number}.bn.weight"] = 1 + 0.1 * random(CHANNELS)
        first[f"layers.{number}.bn.bias"] = 0.1 * random(CHANNELS)
        first[f"layers.{number}.bn.running_mean"] = random(CHANNELS)
        first[f"layers.{number}.bn.running_var"] = 0.5 + torch.rand(CHANNELS, generator=generator)
        first[f"layers.{number}.bn.num_batches_tracked"] = torch.tensor(5000)
    save_in_every_format(first, folder, "first", torch, save_file)
    save_in_every_format(first, folder, "same", torch, save_file)
    for name, tensor in first.items():
        if "running" in name:
            tensor *= 1.05
    save_in_every_format(first, folder, "recalibrated", torch, save_file)
    for name, tensor in first.items():
        if "num_batches" not in name:
            tensor *= 1.01
    save_in_every_format(first, folder, "epoch", torch, save_file)


def save_in_every_format(state, folder: Path, stem: str, torch, save_file) -> None:  # type: ignore[no-untyped-def]
    torch.save(state, folder / f"{stem}.pt")
    torch.save(state, folder / f"{stem}.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / f"{stem}.safetensors")


def timed(command: list[str]) -> Run:
    """One process: seconds, peak memory, the line of its output that says what was found."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment())
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        said = output.read().decode()
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return Run(seconds, usage.ru_maxrss / 1000, said)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def measured(folder: Path, runs: int) -> Iterator[tuple[str, str, float, float, float, float]]:
    for format_name, suffix in FORMATS.items():
        for pair, partner in PAIRS.items():
            files = [str(folder / f"{stem}.{suffix}") for stem in ("first", partner)]
            ours = [timed([sys.executable, "-m", "normdoctor", "compare", *files]) for _ in range(runs + 1)][1:]
            theirs = timed([sys.executable, "-c", BY_TORCH, *files])
            yield (
                format_name,
                pair,
                statistics.median(run.seconds for run in ours),
                max(run.peak_mb for run in ours),
                theirs.seconds,
                theirs.peak_mb,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--write", action="store_true", help="renew compare_speed.md")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="compare-speed-", dir=options.directory))
    try:
        # In a process of its own: a child's peak memory is never less than what its parent had in use.
        builder = multiprocessing.get_context("spawn").Process(target=build, args=(folder, options.size_gb * 1e9))
        builder.start()
        builder.join()
        if builder.exitcode:
            raise SystemExit("the files could not be built")
        lines = [
            "| format | pair | normdoctor compare, s | peak MB | torch, s | peak MB |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for name, pair, seconds, peak, by_torch, torch_peak in measured(folder, options.runs):
            lines.append(f"| {name} | {pair} | {seconds:.2f} | {peak:.0f} | {by_torch:.2f} | {torch_peak:.0f} |")
            print(lines[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    table = "\n".join(lines) + "\n"
    if options.write:
        text = (
            "# Time and memory of `normdoctor compare`\n\nWritten by `python benchmarks/compare_speed.py --write`: two "
            f"checkpoints of {options.size_gb:g} GB each, warm file cache, medians of {options.runs} runs, each a "
            "process of its own with start and imports. torch: both files loaded and compared tensor by tensor, "
            "once.\n\n"
            "Zip files carry a checksum of each tensor, so equal weights are told without reading them. The other "
            "formats have none: equal weights are read to their ends, weights that differ only as far as samples.\n\n"
        )
        Path(__file__).with_suffix(".md").write_text(text + table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
