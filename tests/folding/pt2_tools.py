"""Modules saved as .pt2, folded, and run by torch beside the original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normdoctor.flow.plan import FoldPlan, plan_folds
from normdoctor.folding.export_edits import Counts, write_folded
from normdoctor.places import Verdict
from normdoctor.readers.arrays import Source
from normdoctor.readers.export_flow import ExportFlow, read_flow
from normdoctor.readers.torch_export import open_program
from normdoctor.readers.torch_pickle import ZipRecords

TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5, torch.float64: 1e-12}
"""Of an output, relative to its largest element."""


def trained(module: nn.Module, seed: int = 0, positive: bool = False) -> nn.Module:
    """Statistics and parameters as after training, in eval mode. positive: no shifts, and scales above zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
                count = norm.num_features
                norm.running_mean.copy_(torch.randn(count, generator=generator) * (not positive))
                norm.running_var.copy_(torch.rand(count, generator=generator) + 0.5)
                if norm.affine:
                    sign = 1.0 if positive else torch.sign(torch.randn(count, generator=generator))
                    norm.weight.copy_((torch.rand(count, generator=generator) + 0.5) * sign)
                    norm.bias.copy_(torch.randn(count, generator=generator) * (not positive))
            elif isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
                for parameter in norm.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()


def save(
    path: Path, module: nn.Module, inputs: tuple[Any, ...], *, dynamic: bool = False, decomposed: bool = False
) -> Path:
    """The module as torch.export.save writes it. dynamic: any number of rows of the first axis of each input."""
    shapes = tuple({0: torch.export.Dim("batch", min=2)} for _ in inputs) if dynamic else None
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    torch.export.save(program.run_decompositions() if decomposed else program, path)
    return path


def flow_of(path: Path, key: str | None = None) -> ExportFlow:
    """The graph of a file, which is closed: no tensor of it can be read."""
    with Source(path) as source:
        return read_flow(open_program(source, ZipRecords(source), key))


@dataclass
class Folded:
    """One file and what became of it."""

    path: Path
    plan: FoldPlan
    counts: Counts

    @property
    def left(self) -> list[str]:
        return [found.norm.label for found in self.plan.outcomes if found.verdict is Verdict.LEFT]

    @property
    def gone(self) -> list[str]:
        return [found.norm.label for found in self.plan.outcomes if found.verdict is not Verdict.LEFT]


def fold(path: Path, output: Path | None = None, key: str | None = None, **options: Any) -> Folded:
    """Read, plan and write."""
    output = path.with_suffix(".folded.pt2") if output is None else output
    with Source(path) as source:
        flow = read_flow(open_program(source, ZipRecords(source), key))
        plan = plan_folds(flow.graph, **options)
        counts = write_folded(flow, plan, path, output)
    return Folded(output, plan, counts)


def leaves(found: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def run(program: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return leaves(program.module()(*(x.clone() for x in inputs)))


def close(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether all outputs are the same but for rounding."""
    assert [(a.shape, a.dtype) for a in first] == [(b.shape, b.dtype) for b in second]
    return all(
        bool((a.double() - b.double()).abs().max() <= TOLERANCES[a.dtype] * a.double().abs().max().clamp(min=1e-30))
        for a, b in zip(first, second, strict=True)
    )


def larger(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other numbers, and more rows of them."""
    return tuple(torch.randn(x.shape[0] + 1, *x.shape[1:], dtype=x.dtype) for x in inputs)


def check(path: Path, module: nn.Module, inputs: tuple[Any, ...], decomposed: bool, **options: Any) -> Folded:
    """Fold the module's file, and see that torch opens it, that it computes the same, also after it is saved again
    or decomposed, and that a second fold changes nothing."""
    save(path, module, inputs, dynamic=True, decomposed=decomposed)
    folded = fold(path, **options)
    given = larger(inputs)
    expected = run(torch.export.load(path), given)
    assert close(expected, run(torch.export.load(folded.path), given))
    if decomposed:
        saved = path.with_suffix(".saved.pt2")
        torch.export.save(torch.export.load(folded.path), saved)
        assert close(expected, run(torch.export.load(saved), given))
    else:
        assert close(expected, run(torch.export.load(folded.path).run_decompositions(), given))
    again = fold(folded.path, path.with_suffix(".again.pt2"), **options)
    assert again.path.read_bytes() == folded.path.read_bytes()
    return folded
