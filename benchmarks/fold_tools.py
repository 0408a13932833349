"""The tools that the fold benchmark runs, each in a process of its own: python fold_tools.py TOOL.

Jobs come in as lines of JSON (source, target, shapes, dtypes), answers go out as lines of JSON. Needs only the tool and
what it is for, so that it can run under another Python than the benchmark.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Job = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """takes: suffixes of the files it is given."""

    name: str
    package: str
    takes: tuple[str, ...]
    prepare: Callable[[], Callable[[Job], None]]
    suffix: str | None = None
    """Of what it writes, if another."""


# ONNX to ONNX ------------------------------------------------------------------------------------------------


def onnxsim() -> Callable[[Job], None]:
    import onnx
    import onnxsim

    def run(job: Job) -> None:
        model, good = onnxsim.simplify(onnx.load(job["source"]))
        if not good:
            raise RuntimeError("its own check failed")
        onnx.save(model, job["target"])

    return run


def onnxslim() -> Callable[[Job], None]:
    import onnx
    import onnxslim

    def run(job: Job) -> None:
        onnx.save(onnxslim.slim(onnx.load(job["source"])), job["target"])

    return run


def onnxoptimizer() -> Callable[[Job], None]:
    import onnx
    import onnxoptimizer

    def run(job: Job) -> None:
        onnx.save(onnxoptimizer.optimize(onnx.load(job["source"])), job["target"])

    return run


def onnxscript() -> Callable[[Job], None]:
    import onnx
    import onnxscript.optimizer
    import onnxscript.rewriter

    def run(job: Job) -> None:
        model = onnxscript.optimizer.optimize(onnx.load(job["source"]))
        onnx.save(onnxscript.rewriter.rewrite(model), job["target"])

    return run


def onnxruntime() -> Callable[[Job], None]:
    import onnxruntime

    def run(job: Job) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = job["target"]
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        onnxruntime.InferenceSession(job["source"], options, providers=["CPUExecutionProvider"])

    return run


# Modules -----------------------------------------------------------------------------------------------------


def torch_module(fold: Callable[[Any, tuple[Any, ...]], Any]) -> Callable[[Job], None]:
    import torch

    torch.set_num_threads(1)

    def run(job: Job) -> None:
        module = torch.load(job["source"], weights_only=False)
        shapes = zip(job["shapes"], job["dtypes"], strict=True)
        inputs = tuple(torch.rand(shape).to(getattr(torch, dtype)) for shape, dtype in shapes)
        with torch.no_grad():
            folded = fold(module, inputs)
            if not isinstance(folded, torch.jit.ScriptModule):
                # torch 2.13 cannot pickle what torch.fx gives: a trace of it computes the same.
                folded = torch.jit.trace(folded, inputs, check_trace=False, strict=False)
        torch.jit.save(folded, job["target"])

    return run


def fx_fuse() -> Callable[[Job], None]:
    from torch.fx.experimental.optimization import fuse

    return torch_module(lambda module, inputs: fuse(module))


def ao_fuse() -> Callable[[Job], None]:
    from torch.ao.quantization.quantize_fx import fuse_fx

    return torch_module(lambda module, inputs: fuse_fx(module))


def jit_freeze() -> Callable[[Job], None]:
    import torch

    return torch_module(
        lambda module, inputs: torch.jit.freeze(torch.jit.trace(module, inputs, check_trace=False, strict=False))
    )


# Ours --------------------------------------------------------------------------------------------------------


def normdoctor(*options: str) -> Callable[[Job], None]:
    """The command line, without starting a new process for each file."""
    import io

    from normdoctor.cli import main

    def run(job: Job) -> None:
        arguments = ["normdoctor", "fold", job["source"], "-o", job["target"], "--overwrite", *options]
        if job["source"].endswith(".pt"):
            arguments.append("--trust")
            for shape, dtype in zip(job["shapes"], job["dtypes"], strict=True):
                suffix = "" if dtype == "float32" else f":{dtype}"
                arguments += ["--input-shape", ",".join(map(str, shape)) + suffix]
        said = io.StringIO()
        sys.argv = arguments
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                main()
        except SystemExit as end:
            if end.code not in (0, None):
                text = " ".join(said.getvalue().split())
                raise RuntimeError(f"exit status {end.code}: {text[-300:]}") from None

    return run


ONNX = (".onnx",)
MODULES = (".pt",)
TOOLS = (
    Tool("normdoctor", "normdoctor", (".onnx", ".pt", ".pt2"), normdoctor),
    Tool("normdoctor --no-verify", "normdoctor", (".onnx", ".pt", ".pt2"), partial(normdoctor, "--no-verify")),
    Tool("onnxscript", "onnxscript", ONNX, onnxscript),
    Tool("onnxruntime", "onnxruntime", ONNX, onnxruntime),
    Tool("onnxslim", "onnxslim", ONNX, onnxslim),
    Tool("onnxsim", "onnxsim", ONNX, onnxsim),
    Tool("onnxoptimizer", "onnxoptimizer", ONNX, onnxoptimizer),
    Tool("torch.jit.freeze", "torch", MODULES, jit_freeze, ".ts"),
    Tool("torch.ao fuse_fx", "torch", MODULES, ao_fuse, ".ts"),
    Tool("torch.fx fuse", "torch", MODULES, fx_fuse, ".ts"),
)


def main() -> int:
    """Answer each job: seconds, or what was raised. The first answer is the version, or why there is none."""
    tool = next(each for each in TOOLS if each.name == sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tools print is not an answer
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parent))  # pickled modules are of classes that lie here
    sys.path.insert(1, str(Path(__file__).parents[1]))

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        run = tool.prepare()
        answer(version=importlib.metadata.version(tool.package))
    except Exception as error:
        answer(missing=f"{type(error).__name__}: {error}")
        return 1
    for line in sys.stdin:
        start = time.perf_counter()
        try:
            run(json.loads(line))
            answer(seconds=time.perf_counter() - start)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            answer(error=f"{type(error).__name__}: {lines[0][:300]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
