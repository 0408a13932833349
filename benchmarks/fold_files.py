"""The patterns of the fold benchmark as files: one case for each pattern and format, with what it must compute."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fold_graph_bodies
import fold_graph_paths
import fold_graph_sites
import fold_graphs
import fold_models
import fold_nets
import fold_nets_between
import fold_nets_first
import fold_nets_shared
import fold_nets_traps
import numpy as np
import onnx
import torch
from fold_doubles import evaluate
from fold_patterns import NETS, Pattern
from fold_sheets import GRAPHS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SOURCES = (
    fold_graphs, fold_graph_paths, fold_graph_sites, fold_graph_bodies, fold_models,
    fold_nets, fold_nets_between, fold_nets_first, fold_nets_shared, fold_nets_traps,
)  # fmt: skip
"""Imported for the patterns that they register."""

SUFFIXES = {"module": ".pt", "pt2": ".pt2", "pt2-decomposed": ".pt2"}
"""All others are .onnx."""


class NotExported(Exception):
    """The exporter cannot write this pattern, or writes something else."""


@dataclass(frozen=True, eq=False)
class Case:
    """One file, the inputs it is run on, and what it computes in float64.

    inputs: by name for ONNX, in order for modules; with bfloat16 as float32, and dtypes in torch's names."""

    pattern: Pattern
    fmt: str
    path: Path
    inputs: dict[str, np.ndarray]
    dtypes: tuple[str, ...]
    references: tuple[np.ndarray, ...]

    @property
    def is_onnx(self) -> bool:
        return self.path.suffix == ".onnx"

    @property
    def name(self) -> str:
        return f"{self.fmt}/{self.pattern.name}"

    @property
    def expected(self) -> int:
        return self.pattern.expected(self.fmt)

    @property
    def enough(self) -> int:
        return self.pattern.enough(self.fmt)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The inputs for a module."""
        pairs = zip(self.inputs.values(), self.dtypes, strict=True)
        return tuple(torch.from_numpy(value).to(getattr(torch, dtype)) for value, dtype in pairs)


def patterns() -> list[Pattern]:
    return [*GRAPHS, *NETS]


def build(pattern: Pattern, fmt: str, directory: Path, seed: int = 0) -> Case:
    """Write one file. Raises NotExported."""
    folder = directory / fmt
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{pattern.name}{SUFFIXES.get(fmt, '.onnx')}"
    if fmt == "onnx":
        model, inputs = pattern.make(seed)
        onnx.save(model, path)
        dtypes = tuple(str(value.dtype) for value in inputs.values())
        inputs = {
            name: value.astype(np.float32) if value.dtype.kind == "V" else value for name, value in inputs.items()
        }
        return Case(pattern, fmt, path, inputs, dtypes, tuple(evaluate(model, inputs)))
    module, tensors = pattern.make(seed)
    references = tuple(each.numpy() for each in run_in_double(module, tensors))
    with quiet():
        try:
            names = save(module, tensors, fmt, path)
        except Exception as error:
            raise NotExported(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
    dtypes = tuple(str(each.dtype).removeprefix("torch.") for each in tensors)
    arrays = [(each.float() if each.dtype == torch.bfloat16 else each).numpy() for each in tensors]
    return Case(pattern, fmt, path, dict(zip(names, arrays, strict=True)), dtypes, references)


def run_in_double(module: nn.Module, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    copied = copy.deepcopy(module).double()
    with torch.no_grad():
        outputs = copied(*(each.double() if each.is_floating_point() else each for each in tensors))
    return [each.double() for each in pytree.tree_leaves(outputs)]


def save(module: nn.Module, tensors: tuple[Tensor, ...], fmt: str, path: Path) -> list[str]:
    """Write a module in one format. The names of the inputs."""
    names = [f"x{index}" for index in range(len(tensors))]
    if fmt == "module":
        torch.save(module, path)
    elif fmt == "onnx-torchscript":
        torch.onnx.export(
            module, tensors, str(path), dynamo=False, do_constant_folding=False, input_names=names, opset_version=17
        )
        names = keep_used(path, names)
    elif fmt == "onnx-dynamo":
        torch.onnx.export(module, tensors, str(path), dynamo=True, optimize=False, input_names=names, verbose=False,
                          external_data=False)  # fmt: skip
        names = keep_used(path, names)
    else:
        program = torch.export.export(module, tensors)
        torch.export.save(program.run_decompositions() if fmt == "pt2-decomposed" else program, path)
    return names


def keep_used(path: Path, names: list[str]) -> list[str]:
    model = onnx.load(path)
    found = [each.name for each in model.graph.input]
    if found != names:
        raise NotExported(f"inputs {found}")
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print and warn of."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def load(path: Path) -> Any:
    """What can be called: a pickled module, an exported program, or TorchScript."""
    with quiet():
        if path.suffix == ".pt2":
            return torch.export.load(path).module()
        if path.suffix == ".ts":
            return torch.jit.load(path)
        return torch.load(path, weights_only=False)
