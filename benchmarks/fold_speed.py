"""Time and memory of `normdoctor fold` on a network of 60 million parameters, beside loading and saving it.

    python benchmarks/fold_speed.py [--runs 5] [--python PATH] [--tools NAME ...] [--no-proof] [--write]

Writes a ResNet-152 with 155 norms as an ONNX file (241 MB, random weights) and lets each command read it and write what
it makes of it. Every measurement is a process of its own, start and imports included, one thread, warm file cache; the
commands take turns, after one round that does not count. The table has medians, and the most memory that the
process had in use. The other tools are optional; with --python they run under another interpreter.
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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# numpy and onnx are imported only where the file is built, in a process of its own: what a new process reports as
# its peak memory is never less than what its parent had in use, so this one has to stay small.

INTRODUCTION = """\
# Time and memory of `normdoctor fold`

Written by `python benchmarks/fold_speed.py --write`. A ResNet-152 with random weights, read from one ONNX file and
written to another; each run is a process of its own, start and imports included, one thread. The proof runs the
original and the folded network side by side on two images of 224 by 224.
"""

HERE = Path(__file__).resolve().parent
STAGES = (3, 8, 36, 3)
LOAD_AND_SAVE = "import sys, onnx; onnx.save(onnx.load(sys.argv[1]), sys.argv[2])"
OTHERS = ("onnxruntime", "onnxscript", "onnxslim", "onnxsim", "onnxoptimizer")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1"}


def build(path: Path) -> None:
    """Bottleneck blocks with their shortcuts, on an input of any batch and size 224."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []

    def store(name: str, values: np.ndarray) -> str:
        stored.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv_norm(x: str, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> str:
        scale = (2 / (inputs * kernel * kernel)) ** 0.5
        weight = scale * random.standard_normal((outputs, inputs, kernel, kernel), dtype=np.float32)
        nodes.append(
            helper.make_node(
                "Conv",
                [x, store(f"{name}.weight", weight)],
                [f"{name}.y"],
                name=name,
                strides=[stride] * 2,
                pads=[kernel // 2] * 4,
            )
        )
        parameters = (
            random.uniform(0.3, 0.8, outputs), random.normal(0, 0.2, outputs),
            random.normal(0, 0.2, outputs), random.uniform(0.5, 1.5, outputs),
        )  # fmt: skip
        roles = ("weight", "bias", "running_mean", "running_var")
        names = [store(f"{name}.bn.{role}", values) for role, values in zip(roles, parameters, strict=True)]
        nodes.append(helper.make_node("BatchNormalization", [f"{name}.y", *names], [f"{name}.n"], name=f"{name}.bn"))
        return f"{name}.n"

    def node(op: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, list(inputs), [f"v{len(nodes)}"], **attributes))
        return f"v{len(nodes) - 1}"

    x = node("Relu", conv_norm("x", "stem", 3, 64, 7, 2))
    x = node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inputs = 64
    for stage, blocks in enumerate(STAGES):
        middle, outputs = 64 << stage, 256 << stage
        for block in range(blocks):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            y = node("Relu", conv_norm(x, f"{name}.conv1", inputs, middle, 1))
            y = node("Relu", conv_norm(y, f"{name}.conv2", middle, middle, 3, stride))
            y = conv_norm(y, f"{name}.conv3", middle, outputs, 1)
            x = conv_norm(x, f"{name}.downsample", inputs, outputs, 1, stride) if not block else x
            x, inputs = node("Relu", node("Add", y, x)), outputs
    x = node("Flatten", node("GlobalAveragePool", x))
    names = [store("fc.weight", 0.02 * random.standard_normal((1000, 2048))), store("fc.bias", np.zeros(1000))]
    nodes.append(helper.make_node("Gemm", [x, *names], ["y"], transB=1))
    graph = helper.make_graph(
        nodes,
        "resnet152",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1000])],
        stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


class Cost(NamedTuple):
    seconds: float
    peak: float
    """The most memory in use at a time, in MB."""
    norms: int | None
    """How many are left in what was written."""


class CommandError(Exception):
    pass


def measure(command: Sequence[str], job: str | None, output: Path) -> Cost:
    """Run one command in a process of its own; `job` is what it reads."""
    output.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as given:
        given.write((job or "").encode())
        given.seek(0)
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=given, stdout=subprocess.DEVNULL, stderr=errors, env=ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0 or not output.exists():
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["nothing was written"]
            raise CommandError(f"exit status {process.returncode}: {lines[-1]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return Cost(seconds, peak, norms_in(output))


def norms_in(path: Path) -> int:
    """Every node says its operator once. Read in pieces, to stay small."""
    word, rest, count = b"BatchNormalization", b"", 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            count += (rest + piece).count(word)
            rest = piece[-len(word) + 1 :]
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tools", nargs="*", choices=OTHERS, default=list(OTHERS), metavar="NAME")
    parser.add_argument("--python", default=sys.executable, help="the interpreter for all tools but normdoctor")
    parser.add_argument(
        "--no-proof", action="store_true", help="leave out the fold with its proof, which takes longest"
    )
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/fold_speed.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary) / "resnet152.onnx", Path(temporary) / "folded.onnx"
        builder = multiprocessing.get_context("spawn").Process(target=build, args=(source,))
        builder.start()
        builder.join()
        ours = [sys.executable, "-m", "normdoctor", "fold", str(source), "-o", str(target)]
        job = json.dumps({"source": str(source), "target": str(target)}) + "\n"
        commands: dict[str, tuple[list[str], str | None]] = {
            "onnx: load and save": ([sys.executable, "-c", LOAD_AND_SAVE, str(source), str(target)], None),
            "normdoctor fold --no-verify": ([*ours, "--no-verify"], None),
        }
        if not options.no_proof:
            commands["normdoctor fold"] = (ours, None)
        for name in options.tools:
            commands[name] = ([options.python, str(HERE / "fold_tools.py"), name], job)
        size = f"{source.stat().st_size / 1e6:.0f} MB, {norms_in(source)} norms; medians of {options.runs} runs."
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        failed: dict[str, str] = {}
        for turn in range(options.runs + 1):
            for name, (command, given) in commands.items():
                if name not in failed:
                    try:
                        cost = measure(command, given, target)
                    except CommandError as error:
                        failed[name] = str(error)
                    else:
                        costs[name] += [cost] * (turn > 0)
    base = statistics.median(cost.seconds for cost in costs["onnx: load and save"])
    lines = [INTRODUCTION, size, "", "| command | s | times load and save | peak MB | norms left |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, runs in costs.items():
        if name in failed:
            print(f"  {name} failed: {failed[name]}", file=sys.stderr)
            lines.append(f"| {name} | failed |  |  |  |")
        else:
            seconds = statistics.median(cost.seconds for cost in runs)
            peak = statistics.median(cost.peak for cost in runs)
            lines.append(f"| {name} | {seconds:.2f} | {seconds / base:.2f} | {peak:.0f} | {runs[-1].norms} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    return 1 if any(name.startswith("normdoctor") for name in failed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
