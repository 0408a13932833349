"""Whether a folded file is right: it loads, it computes the same, and fewer norms are left. No line of normdoctor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from fold_doubles import evaluate
from fold_files import Case, load
from onnx import inliner
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST_ERROR = 1e-4
"""Relative to the size of the channel."""
NOISE_FACTOR = 20
"""How many times the error that the original has in its own element type."""
EPSILONS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


class Verdict(Enum):
    RIGHT = "right"
    """Every norm folded that is expected to be, and the same outputs. Where none is: the same outputs."""
    PARTIAL = "partial"
    LEFT = "left"
    WRONG = "wrong"
    CRASH = "crash"
    UNUSABLE = "unusable"


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    folded: int = 0
    error: float = 0.0
    message: str = ""


class UnusableError(Exception):
    """What a tool wrote cannot be loaded, checked or run."""


@dataclass(frozen=True)
class Original:
    """What is measured once of the file that tools are given."""

    norms: int
    products: int
    noise: float
    checked: bool
    runs: bool
    """Whether onnxruntime runs it; otherwise the reference evaluator does."""
    outputs: tuple[str, ...] = ()


def measure(case: Case) -> Original:
    """Raises UnusableError where the file itself does not compute what the pattern does."""
    checked, runs, names = True, True, ()
    if case.is_onnx:
        model = onnx.load(case.path)
        names = tuple(each.name for each in model.graph.output)
        checked = check(model) is None
        try:
            outputs = run_onnx(case.path, case)
        except Exception:
            outputs, runs = evaluate(model, case.inputs), False
        norms, products = count_nodes(model)
    else:
        outputs, norms, products = run_module(case.path, case)
    noise = difference(outputs, case.references)
    if not noise < 0.05:
        raise UnusableError(f"the original is {noise:.1g} off its own reference")
    floor = max((EPSILONS.get(each, 0.0) for each in used_types(case)), default=0.0)
    return Original(norms, products, max(noise, floor), checked, runs, names)


def used_types(case: Case) -> Iterable[str]:
    """Element types of the inputs, and of what a graph casts to."""
    yield from case.dtypes
    if case.is_onnx and any(
        each.data_type == onnx.TensorProto.FLOAT16 for each in onnx.load(case.path).graph.initializer
    ):
        yield "float16"


def judge(case: Case, original: Original, path: Path) -> Judgement:
    """Look at what a tool wrote."""
    try:
        outputs, norms, products = look(case, original, path)
    except UnusableError as error:
        return Judgement(Verdict.UNUSABLE, message=str(error))
    error = difference(outputs, case.references)
    if case.pattern.written_out:
        folded = original.products - products
    else:
        folded = original.norms - norms - max(0, products - original.products)
    if not error <= max(LARGEST_ERROR, NOISE_FACTOR * original.noise):
        return Judgement(Verdict.WRONG, folded, error, f"error {error:.2g}, noise {original.noise:.1g}")
    if folded >= case.expected:
        return Judgement(Verdict.RIGHT, folded, error)
    if folded >= case.enough:
        return Judgement(Verdict.RIGHT if folded > 0 or case.enough == 0 else Verdict.LEFT, folded, error)
    return Judgement(Verdict.PARTIAL if folded > 0 else Verdict.LEFT, folded, error)


def look(case: Case, original: Original, path: Path) -> tuple[list[np.ndarray], int, int]:
    if not path.exists():
        raise UnusableError("no file")
    if not case.is_onnx:
        try:
            return run_module(path, case)
        except Exception as error:
            raise UnusableError(f"{type(error).__name__}: {first_line(error)}") from error
    try:
        model = onnx.load(path)
    except Exception as error:
        raise UnusableError(f"does not load: {first_line(error)}") from error
    if original.checked and (complaint := check(model)):
        raise UnusableError(f"checker: {complaint}")
    if tuple(each.name for each in model.graph.output) != original.outputs:
        raise UnusableError(f"outputs {[each.name for each in model.graph.output]}")
    try:
        outputs = run_onnx(path, case) if original.runs else evaluate(model, case.inputs)
    except Exception as error:
        raise UnusableError(f"does not run: {first_line(error)}") from error
    return outputs, *count_nodes(model)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def difference(outputs: list[np.ndarray], references: tuple[np.ndarray, ...]) -> float:
    """The largest error, relative to the largest value of its channel (or a thousandth of that of the output)."""
    if len(outputs) != len(references):
        return float("inf")
    worst = 0.0
    for output, reference in zip(outputs, references, strict=True):
        if output.shape != reference.shape:
            return float("inf")
        if not np.array_equal(np.isfinite(output), np.isfinite(reference)):
            return float("inf")
        axes = tuple(axis for axis in range(reference.ndim) if axis != 1) if reference.ndim > 1 else None
        size = np.abs(reference).max(axes, keepdims=True)
        size = np.maximum(size, max(1e-3 * float(size.max(initial=0)), 1e-30))
        worst = max(worst, float((np.abs(output - reference) / size).max(initial=0)))
    return worst


# ONNX ----------------------------------------------------------------------------------------------------------


def check(model: onnx.ModelProto) -> str | None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        return first_line(error) or type(error).__name__
    return None


def run_onnx(path: Path, case: Case) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [each.astype(np.float64) for each in session.run(None, case.inputs)]


def count_nodes(model: onnx.ModelProto) -> tuple[int, int]:
    """Norms, and products or quotients of data: what depends on inputs of the graph."""
    if model.functions:
        model = inliner.inline_local_functions(model)
    data = {each.name for each in model.graph.input} - {each.name for each in model.graph.initializer}
    return count_in(model.graph, data)


def count_in(graph: onnx.GraphProto, data: set[str]) -> tuple[int, int]:
    norms = products = 0
    data = {*data, *(each.name for each in graph.input if each.name not in {one.name for one in graph.initializer})}
    for node in graph.node:
        bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        for body in bodies:
            inner = count_in(body, data)
            norms, products = norms + inner[0], products + inner[1]
        if node.op_type not in ("Shape", "Size") and (bodies or any(name in data for name in node.input)):
            data.update(node.output)
            norms += node.op_type == "BatchNormalization"
            products += node.op_type in ("Mul", "Div")
    return norms, products


# Modules -------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Writes down the norms and products that are computed, with a fingerprint of each result."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = 0
        self.products: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.norms += "native_batch_norm" in name
        if name in ("mul", "mul_", "div", "div_") and result.is_floating_point():
            self.products.append(float(result.double().sum()))
        return result


def run_module(path: Path, case: Case) -> tuple[list[np.ndarray], int, int]:
    """Run it twice, on the inputs and on others: what differs is data."""
    inputs = case.tensors
    others = tuple(each * 0.5 + 0.25 if each.is_floating_point() else each for each in inputs)
    watches = Watch(), Watch()
    for watch, given in zip(watches, (others, inputs), strict=True):
        module = load(path)  # anew: a norm in training counts
        with torch.no_grad(), watch:
            outputs = module(*(each.clone() for each in given))
    pairs = zip(*(watch.products for watch in watches), strict=False)
    leaves = [each.double().numpy() for each in pytree.tree_leaves(outputs)]
    return leaves, watches[0].norms, sum(one != two for one, two in pairs)
