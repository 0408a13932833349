"""Time and memory of `normdoctor inspect` on files with a graph, with all rules and with --quick.

    python benchmarks/inspect_graph.py [--size-gb 1] [--runs 5] [--only FORMAT ...] [--directory DIR] [--write]

Builds a residual network (64 3x3 convolutions with BatchNorms, ReLUs and additions between them, random weights) as
an ONNX file with its weights inside, as one with external data, and as a .pt2. Each run is a process of its own, start
and imports included, one thread, warm file cache; the commands take turns, after one round that does not count. The
tables have medians. A second one says where the time goes. Exit status 1 if a command failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import speed

if TYPE_CHECKING:
    import numpy as np

# What a new process reports as its peak memory is never less than what its parent had in use: torch, numpy and onnx
# are imported only where files are built, in a process of its own.

HERE = Path(__file__).resolve().parent
CONVOLUTIONS = 64
SIZE = 32
"""Of the images."""

INTRODUCTION = """\
# Time and memory of `normdoctor inspect` with a graph

Written by `python benchmarks/inspect_graph.py --write`. A residual network of 64 3x3 convolutions of {megabytes:.0f} MB
with BatchNorms, ReLUs and additions, random weights; each run is a process of its own, start and imports included, one
thread, warm file cache; medians of {runs} runs. Predicting each running_mean from the norms before takes the sums of
all weights in between, so all of the file is read; `--quick` leaves that out.
"""

STAGES = """
import json, sys, time
start = time.perf_counter()
times = {}
def stage(name):
    global start
    now = time.perf_counter()
    times[name] = now - start
    start = now
from normdoctor.readers import open_checkpoint
from normdoctor import inspection, placing
from normdoctor.rules import RULES
from normdoctor.rules.runner import examine
stage("imports")
checkpoint = open_checkpoint(sys.argv[1])
stage("reading the layers")
if "onnx" in checkpoint.format.lower():
    import onnx.shape_inference
    stage("importing onnx")
graphs = [read() for read in checkpoint.graphs.values()]
stage("graph")
from normdoctor.flow.plan import plan_folds
for graph in graphs:
    plan_folds(graph)
stage("plan of the folds (taken once more below)")
from normdoctor.flow.surroundings import places_of
places = {name: place for graph in graphs for name, place in places_of(graph).items()}
stage("places, with the weights")
report = examine(placing.with_places(checkpoint, placing.Found(places)), RULES)
stage("rules")
assert report.layers and all(layer.place is not None for layer in report.layers), "a norm without a place"
print(json.dumps(times))
"""
"""What `inspect` does, step by step."""


# Building


def numbers(shape: Sequence[int], seed: int) -> np.ndarray:
    import numpy as np

    generator = np.random.default_rng(seed)
    return generator.standard_normal(shape, dtype=np.float32) * np.float32((shape[1] * 9) ** -0.5)


def parameters(width: int) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors by name; those of one convolution at a time."""
    import numpy as np

    generator = np.random.default_rng(0)
    for place in range(CONVOLUTIONS):
        yield f"conv{place}.weight", numbers((width, width if place else 3, 3, 3), place)
        yield f"bn{place}.weight", generator.uniform(0.5, 1.5, width).astype(np.float32)
        yield f"bn{place}.bias", generator.normal(0, 0.2, width).astype(np.float32)
        yield f"bn{place}.running_mean", generator.normal(0, 0.5, width).astype(np.float32)
        yield f"bn{place}.running_var", generator.uniform(0.5, 1.5, width).astype(np.float32)


def varint(number: int) -> bytes:
    written = b""
    while number > 0x7F:
        written += bytes([number & 0x7F | 0x80])
        number >>= 7
    return written + bytes([number])


def field(number: int, length: int) -> bytes:
    """The head of a length-delimited field of a protobuf."""
    return varint(number << 3 | 2) + varint(length)


def onnx_graph(width: int) -> bytes:
    """The GraphProto without its weights."""
    from onnx import TensorProto, helper

    nodes, value = [], "images"
    for place in range(CONVOLUTIONS):
        names = [f"bn{place}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        nodes.append(helper.make_node("Conv", [value, f"conv{place}.weight"], [f"c{place}"], pads=[1] * 4))
        nodes.append(helper.make_node("BatchNormalization", [f"c{place}", *names], [f"b{place}"]))
        value = f"b{place}"
        if place % 2 == 0 and place:
            nodes.append(helper.make_node("Add", [value, f"r{place - 2}"], [f"s{place}"]))
            value = f"s{place}"
        nodes.append(helper.make_node("Relu", [value], [f"r{place}"]))
        value = f"r{place}"
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    logits = helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", width, SIZE, SIZE])
    return helper.make_graph(nodes, "net", [images], [logits]).SerializeToString()


def tensor(name: str, values: np.ndarray) -> bytes:
    """A TensorProto up to its bytes."""
    from onnx import TensorProto

    head = TensorProto(name=name, dims=values.shape, data_type=TensorProto.FLOAT).SerializeToString()
    return head + field(9, values.nbytes)


def write_onnx(width: int, path: Path) -> None:
    """Written piece by piece: protobuf would hold all of it twice."""
    from onnx import helper

    graph = onnx_graph(width)
    heads = [(tensor(name, values), values.nbytes) for name, values in parameters(width)]
    sizes = [len(head) + nbytes for head, nbytes in heads]
    total = len(graph) + sum(len(field(5, size)) + size for size in sizes)
    model = helper.make_model(helper.make_graph([], "", [], []), ir_version=10)
    model.ClearField("graph")
    with path.open("wb") as file:
        file.write(model.SerializeToString() + field(7, total) + graph)
        for (_, values), (head, _), size in zip(parameters(width), heads, sizes, strict=True):
            file.write(field(5, size) + head)
            file.write(values.tobytes())


def write_external(width: int, path: Path) -> None:
    from onnx import GraphProto, TensorProto, helper

    graph = GraphProto.FromString(onnx_graph(width))
    data = path.with_name(path.name + ".data")
    with data.open("wb") as file:
        for name, values in parameters(width):
            stored = TensorProto(name=name, dims=values.shape, data_type=TensorProto.FLOAT)
            stored.data_location = TensorProto.EXTERNAL
            place = {"location": data.name, "offset": file.tell(), "length": values.nbytes}
            for key, value in place.items():
                stored.external_data.add(key=key, value=str(value))
            graph.initializer.append(stored)
            file.write(values.tobytes())
    path.write_bytes(helper.make_model(graph, ir_version=10).SerializeToString())


def write_exported(width: int, path: Path) -> None:
    import torch
    from torch import Tensor, nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for place in range(CONVOLUTIONS):
                conv = nn.Conv2d(width if place else 3, width, 3, padding=1, bias=False, device="meta")
                setattr(self, f"conv{place}", conv)
                setattr(self, f"bn{place}", nn.BatchNorm2d(width))

        def forward(self, x: Tensor) -> Tensor:
            kept = x
            for place in range(CONVOLUTIONS):
                x = getattr(self, f"bn{place}")(getattr(self, f"conv{place}")(x))
                x = torch.relu(x + kept if place % 2 == 0 and place else x)
                kept = x if place % 2 == 0 else kept
            return x

    net = Net().eval()
    for name, values in parameters(width):
        owner, _, leaf = name.partition(".")
        module = net.get_submodule(owner)
        if leaf == "weight" and name.startswith("conv"):
            module.weight = nn.Parameter(torch.from_numpy(values))
        else:
            getattr(module, leaf).data.copy_(torch.from_numpy(values))
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(net, (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


FORMATS: dict[str, tuple[str, Callable[[int, Path], None]]] = {
    "onnx": (".onnx", write_onnx),
    "onnx, external data": (".onnx", write_external),
    "pt2": (".pt2", write_exported),
}


def build(kind: str, path: Path, width: int) -> None:
    if path.exists():
        return
    builder = multiprocessing.get_context("fork").Process(target=FORMATS[kind][1], args=(width, path))
    builder.start()
    builder.join()
    if builder.exitcode != 0:
        raise speed.CommandError("the file could not be built")


# Measuring


def examine(kind: str, path: Path, runs: int) -> str:
    """A row of the first table."""
    inspect = [sys.executable, "-m", "normdoctor", "inspect", str(path), "--fail-on", "never", "-o", os.devnull]
    every, quick = speed.compare([inspect, [*inspect, "--quick"]], runs)
    parts = [path, path.with_name(path.name + ".data")]
    size = sum(part.stat().st_size for part in parts if part.exists()) / 1e9
    return (
        f"| {kind} | {size:.2f} GB | {every.seconds:.2f} | {every.peak:.0f} | {quick.seconds:.2f} | {quick.peak:.0f} |"
    )


def stages(path: Path) -> dict[str, float]:
    """Seconds of each step, the file cache warm."""
    done = subprocess.run(
        [sys.executable, "-c", STAGES, str(path)], capture_output=True, text=True, env=speed.ENVIRONMENT, cwd=speed.ROOT
    )
    if done.returncode:
        raise speed.CommandError((done.stderr.strip().splitlines() or ["no message"])[-1])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--directory", type=Path, help="keep the files here, and use those that are here")
    parser.add_argument("--write", action="store_true", help="write inspect_graph.md beside this file")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        speed.ENVIRONMENT[name] = "1"
    width = round((options.size_gb * 1e9 / CONVOLUTIONS / 36) ** 0.5)
    lines = [INTRODUCTION.format(megabytes=36 * width**2 / 1e6, runs=options.runs)]
    lines += ["| format | size | all rules, s | MB | --quick, s | MB |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    steps: dict[str, dict[str, float]] = {}
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        directory = (options.directory or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        for kind in options.only:
            path = directory / f"{kind.partition(',')[0]}-{len(kind)}-{width}{FORMATS[kind][0]}"
            try:
                build(kind, path, width)
                lines.append(examine(kind, path, options.runs))
                steps[kind] = stages(path)
            except speed.CommandError as error:
                lines.append(f"| {kind} | failed: {error} |||||")
                failed = True
            finally:
                if options.directory is None:
                    for part in (path, path.with_name(path.name + ".data")):
                        part.unlink(missing_ok=True)
    lines += ["", "Where the time goes, in seconds of one run:", "", f"| step | {' | '.join(steps)} |"]
    lines.append(f"| --- |{' ---: |' * len(steps)}")
    for step in dict.fromkeys(step for found in steps.values() for step in found):
        cells = [f"{found[step]:.2f}" if step in found else "" for found in steps.values()]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.write and not failed:
        (HERE / "inspect_graph.md").write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
