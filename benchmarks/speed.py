"""Time `normdoctor inspect` against the usual way of loading the same checkpoint.

    python benchmarks/speed.py [--size-gb 1] [--sparse-gb 10] [--runs 5] [--only FORMAT ...] [--directory DIR]

Builds a checkpoint in the manner of ResNet-152 (149 BatchNorm layers, 596 norm vectors beside the counters) in
every format: one full of numbers, and a larger one with holes where most of the convolutions would be, which
takes little of the disk. Each measurement is a fresh process with a warm file cache; the two ways take turns,
after one round that does not count. The table has medians; where the usual way reads all of a file with holes
into memory, it is run only once. Exit status 1 if a command failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

# torch, numpy and onnx are imported only where files are built, in a process of its own: what a new process
# reports as its peak memory is never less than what its parent had in use, so this one has to stay small.

ROOT = Path(__file__).resolve().parents[1]
STAGES = (3, 6, 36, 3)
"""Blocks per stage."""


# Building ------------------------------------------------------------------------------------------------


class HoleyFile:
    """A file to write to that leaves holes for long runs of zeros.

    It has no fileno, or torch would write past it.
    """

    ZEROS = bytes(1 << 20)

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def __enter__(self) -> HoleyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.truncate(self._file.tell())  # for a hole at the end
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), len(self.ZEROS)):
            piece = bytes(view[start : start + len(self.ZEROS)])
            if piece == self.ZEROS:
                self._file.seek(len(piece), os.SEEK_CUR)
            else:
                self._file.write(piece)
        return len(view)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()


def build_net(size: float, holes: bool) -> nn.Module:
    """Bottleneck blocks of plain torch modules, one after another, wide enough for about `size` bytes.

    Nothing adds the shortcuts, whose convolutions stand in the row as well. With `holes`, convolutions are zeros
    that take no memory.
    """
    import numpy as np
    import torch
    from torch import nn

    def numbers(*shape: int) -> Tensor:
        return torch.from_numpy(np.zeros(shape, np.float32)) if holes else 0.02 * torch.randn(shape)

    def conv_norm(inputs: int, outputs: int, kernel: int, suffix: str = "") -> list[tuple[str, nn.Module]]:
        conv = nn.Conv2d(inputs, outputs, kernel, bias=False, device="meta")
        norm = nn.BatchNorm2d(outputs, device=device)
        if device == "cpu":
            conv.weight = nn.Parameter(numbers(outputs, inputs, kernel, kernel))
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.2)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
            norm.num_batches_tracked.fill_(25_000)
        return [(f"conv{suffix}", conv), (f"bn{suffix}", norm)]

    def net(width: int) -> nn.Module:
        parts = conv_norm(3, width, 7, "1")
        inputs = width
        for stage, blocks in enumerate(STAGES):
            middle, outputs = width << stage, 4 * width << stage
            stack: list[nn.Module] = []
            for index in range(blocks):
                block = conv_norm(inputs, middle, 1, "1") + conv_norm(middle, middle, 3, "2")
                block += conv_norm(middle, outputs, 1, "3")
                if index == 0:
                    block.append(("downsample", nn.Sequential(OrderedDict(conv_norm(outputs, outputs, 1)))))
                stack.append(nn.Sequential(OrderedDict(block)))
                inputs = outputs
            parts.append((f"layer{stage + 1}", nn.Sequential(*stack)))
        return nn.Sequential(OrderedDict(parts))

    device = "meta"
    parameters = sum(each.numel() for each in net(64).parameters())
    device = "cpu"
    torch.manual_seed(0)
    return net(round(64 * (size / 4 / parameters) ** 0.5)).eval()


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    names = sorted(state, key=lambda name: -state[name].element_size())  # keeps every number aligned
    header: dict[str, object] = {}
    end = 0
    for name in names:
        value = state[name]
        dtype = "I64" if value.element_size() == 8 else "F32"
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with HoleyFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(state[name].numpy().reshape(-1).data)


def write_onnx(net: nn.Module, path: Path) -> None:
    """Convolutions and norms in a row; what is smaller than 1 kB stays in the model, as onnx does it."""
    import onnx
    from torch import nn

    def initializer(name: str, value: Tensor) -> onnx.TensorProto:
        proto = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=value.shape)
        if value.nbytes < 1024:
            proto.raw_data = value.numpy().tobytes()
            return proto
        proto.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": data_path.name, "offset": data.tell(), "length": value.nbytes}
        for key, text in place.items():
            proto.external_data.add(key=key, value=str(text))
        data.write(value.numpy().reshape(-1).data)
        return proto

    data_path = path.with_name(path.name + ".data")
    layers = [(name, each) for name, each in net.named_modules() if isinstance(each, nn.Conv2d | nn.BatchNorm2d)]
    edges = pairwise(["images", *(f"{name}.out" for name, _ in layers)])
    initializers: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    with HoleyFile(data_path) as data:
        for (name, module), (before, after) in zip(layers, edges, strict=True):
            values = {f"{name}.{key}": value for key, value in module.state_dict().items() if value.ndim}
            initializers += [initializer(*item) for item in values.items()]
            operator = "Conv" if isinstance(module, nn.Conv2d) else "BatchNormalization"
            nodes.append(onnx.helper.make_node(operator, [before, *values], [after], name))
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, 224, 224])
    logits = onnx.helper.make_tensor_value_info(
        f"{layers[-1][0]}.out", onnx.TensorProto.FLOAT, ["batch", None, None, None]
    )
    graph = onnx.helper.make_graph(nodes, "net", [images], [logits], initializers)
    path.write_bytes(onnx.helper.make_model(graph, ir_version=10).SerializeToString())


def write_zip(net: nn.Module, path: Path) -> None:
    import torch

    with HoleyFile(path) as file:
        torch.save(net.state_dict(), file)


def write_legacy(net: nn.Module, path: Path) -> None:
    import torch

    with HoleyFile(path) as file:
        torch.save(net.state_dict(), file, _use_new_zipfile_serialization=False)


def write_module(net: nn.Module, path: Path) -> None:
    import torch

    with HoleyFile(path) as file:
        torch.save(net, file)


def write_torchscript(net: nn.Module, path: Path) -> None:
    import torch

    torch.jit.save(torch.jit.script(net), path)


def write_exported(net: nn.Module, path: Path) -> None:
    import torch

    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 128, 128),)), path)


# Measuring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    suffix: str
    write: Callable[[nn.Module, Path], None]
    usual: str
    """The usual way to load it, as Python code; the file is `path`."""
    maps: bool
    """Whether the usual way leaves the numbers on the disk until they are used."""
    holes: bool = True
    """Whether it can be written with holes; torch's own writers want all of it in memory."""


FORMATS = {
    "zip": Format(".pt", write_zip, "import torch; torch.load(path, mmap=True, weights_only=True)", maps=True),
    "legacy": Format(".pth", write_legacy, "import torch; torch.load(path, weights_only=True)", maps=False),
    "module": Format(".pt", write_module, "import torch; torch.load(path, mmap=True, weights_only=False)", maps=True),
    "safetensors": Format(
        ".safetensors",
        lambda net, path: write_safetensors(net.state_dict(), path),
        "from safetensors.torch import load_file; load_file(path)",
        maps=True,
    ),
    "onnx": Format(".onnx", write_onnx, "import onnx; onnx.load(path)", maps=False),
    "torchscript": Format(".pt", write_torchscript, "import torch; torch.jit.load(path)", maps=False, holes=False),
    "pt2": Format(".pt2", write_exported, "import torch; torch.export.load(path)", maps=False, holes=False),
}


class Cost(NamedTuple):
    seconds: float
    peak: float
    """The most memory in use at a time, in MB."""


class CommandError(Exception):
    pass


# Bytecode may be kept: otherwise a source tree would be compiled in every run, and torch, once installed, in none.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def measure(command: Sequence[str]) -> Cost:
    """Run one command in a process of its own."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT, env=ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise CommandError(f"exit status {process.returncode}: {lines[-1]}")
    return Cost(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)


def compare(commands: Sequence[Sequence[str]], runs: int) -> list[Cost]:
    """Medians of each command; they run one after the other, `runs` times over."""
    rounds = [[measure(command) for command in commands] for _ in range(runs + 1)][1:]
    return [
        Cost(
            statistics.median(cost.seconds for cost in costs),
            statistics.median(cost.peak for cost in costs),
        )
        for costs in zip(*rounds, strict=True)
    ]


def build(kind: str, path: Path, size: float, holes: bool) -> None:
    FORMATS[kind].write(build_net(size, holes), path)


def examine(kind: str, size: float, holes: bool, directory: Path, runs: int, keep: bool) -> str:
    """Build one file and measure both ways: a row of the table."""
    path = directory / f"{kind}-{size / 1e9:g}GB{'-holes' if holes else ''}{FORMATS[kind].suffix}"
    parts = [path, path.with_name(path.name + ".data")]
    if not path.exists():
        builder = multiprocessing.get_context("fork").Process(target=build, args=(kind, path, size, holes))
        builder.start()
        builder.join()
        if builder.exitcode != 0:
            raise CommandError("the file could not be built")
    actual = sum(part.stat().st_size for part in parts if part.exists()) / 1e9
    ours = [sys.executable, "-m", "normdoctor", "inspect", str(path), "--fail-on", "never", "-o", os.devnull]
    usual = [sys.executable, "-c", f"import sys; path = sys.argv[1]; {FORMATS[kind].usual}", str(path)]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    try:
        if FORMATS[kind].maps or not holes:
            costs = compare([ours, usual], runs)
        else:
            costs = compare([ours], runs) + ([measure(usual)] if actual < memory / 2 else [])
    finally:
        if not keep:
            for part in parts:
                part.unlink(missing_ok=True)
    cells = [kind, f"{actual:.2f} GB{', holes' if holes else ''}", f"{costs[0].seconds:.2f}"]
    if len(costs) == 2:
        cells += [f"{costs[1].seconds:.2f}", f"{costs[1].seconds / costs[0].seconds:.1f}"]
        cells += [f"{costs[0].peak:.0f}", f"{costs[1].peak:,.0f}"]
    else:
        cells += ["too large", "", f"{costs[0].peak:.0f}", ""]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=1.0, help="the file full of numbers; 0: without it")
    parser.add_argument("--sparse-gb", type=float, default=10.0, help="the file with holes; 0: without it")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--directory", type=Path, help="keep the files here, and use those that are here")
    options = parser.parse_args()
    failed = False
    print("| format | size | normdoctor (s) | usual (s) | times faster | normdoctor (MB) | usual (MB) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        for gigabytes, holes in ((options.size_gb, False), (options.sparse_gb, True)):
            for kind in options.only if gigabytes else ():
                if holes and not FORMATS[kind].holes:
                    continue
                keep = options.directory is not None
                try:
                    row = examine(kind, gigabytes * 1e9, holes, directory.resolve(), options.runs, keep)
                except CommandError as error:
                    row, failed = f"| {kind} | {gigabytes:g} GB | failed: {error} |||||", True
                print(row, flush=True)
    python = [sys.executable, "-c", "pass"]
    try:
        costs = compare([[sys.executable, "-m", "normdoctor", "--help"], python], options.runs)
        print(f"\n`normdoctor --help`: {costs[0].seconds:.2f} s, {costs[0].peak:.0f} MB", end="")
        print(f" (`python -c pass`: {costs[1].seconds:.2f} s, {costs[1].peak:.0f} MB)")
    except CommandError as error:
        print(f"\n`normdoctor --help` failed: {error}")
        failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
