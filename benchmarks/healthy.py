"""Train healthy nets of many families and see whether normdoctor leaves them alone.

    python benchmarks/healthy.py [--only NAME ...] [--directory DIR] [--write]

Each net of fixtures/nets.py is saved as a state_dict and as a whole module, and both files are inspected. The
bar: no error, and at most one warning rule per net. Exit status 1 if a net misses it.
"""

from __future__ import annotations

import sys

# The nets are beside this folder, not installed.
sys.path.extend(__file__.rpartition("benchmarks")[0] + folder for folder in ("fixtures", ""))

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nets
import torch
from torch import nn

import normdoctor as nd

SEVERITIES = ("ERROR", "WARNING", "INFO")
INTRODUCTION = """\
# What normdoctor says of healthy nets

Written by `python benchmarks/healthy.py --write`. Findings are counted as errors / warnings / infos, one per
layer and rule; the state_dict says less than the module, which also holds eps, momentum and classes.

| net | norm layers | updates | accuracy | state_dict | module | codes |
| --- | ---: | ---: | ---: | :---: | :---: | --- |
"""


def updates(model: nn.Module) -> str:
    """What the counters of the file say; GroupNorm and LayerNorm have none."""
    counts = {int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}
    return ", ".join(map(str, sorted(counts))) or "-"


def severities(report: nd.Report) -> str:
    return " / ".join(str(sum(each.severity.name == name for each in report.findings)) for name in SEVERITIES)


def codes(reports: Sequence[nd.Report]) -> str:
    """Every code with its worst severity, worst first: "S108 warning, F901 info"."""
    worst: dict[str, int] = {}
    for report in reports:
        for each in report.findings:
            place = SEVERITIES.index(each.severity.name)
            worst[each.code] = min(place, worst.get(each.code, place))
    ordered = sorted(worst.items(), key=lambda item: (item[1], item[0]))
    return ", ".join(f"{code} {SEVERITIES[place].lower()}" for code, place in ordered) or "-"


def meets_bar(reports: Sequence[nd.Report]) -> bool:
    findings = [each for report in reports for each in report.findings]
    warnings = {each.code for each in findings if each.severity.name == "WARNING"}
    return not any(each.severity.name == "ERROR" for each in findings) and len(warnings) <= 1


def examine(name: str, directory: Path) -> tuple[str, bool]:
    """Train, save and inspect one net: its row of the table, and whether it meets the bar."""
    model = nets.train_healthy(name)
    plain, whole = directory / f"{name}.pt", directory / f"{name}_module.pt"
    torch.save(model.state_dict(), plain)
    torch.save(model, whole)
    reports = [nd.inspect(plain), nd.inspect(whole)]
    cells = (
        name,
        len(reports[1].layers),
        updates(model),
        f"{nets.accuracy(model):.1%}",
        *map(severities, reports),
        codes(reports),
    )
    return f"| {' | '.join(map(str, cells))} |", meets_bar(reports)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=nets.HEALTHY, default=list(nets.HEALTHY))
    parser.add_argument("--directory", type=Path, help="keep the checkpoints here")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/healthy.md")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the nets are too small to share, and one thread gives the same net every time
    print(INTRODUCTION, end="")
    start = time.monotonic()
    rows: list[str] = []
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            row, fine = examine(name, directory)
            print(row, flush=True)
            rows.append(row)
            if not fine:
                missed.append(name)
    summary = f"{len(rows)} nets; the bar is missed by: {', '.join(missed) or 'none'}."
    print(f"\n{summary}")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    if options.write:
        text = INTRODUCTION + "\n".join(rows) + f"\n\n{summary}\n"
        Path(__file__).with_suffix(".md").write_text(text)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
