"""The modules of the fold benchmark as TorchScript and exported programs: every bit, and every norm by its name.

Traced all of them, else a sample; everything with NORMDOCTOR_FOLD_SUITE=all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fold_files

from normdoctor.models.with_torch import open_model
from normdoctor.programs.with_torch import unrolled
from normdoctor.readers import open_checkpoint

from .conftest import leaves, norms_of, run

SAMPLE = ("Conv2dNorm", "Frozen", "LeftInTraining", "NeverCalled", "SharedConvTwoNorms", "MobileNet")
"""In every way in every run."""

LEFT = {
    "Frozen": "no batch_norm operator",
    "NeverCalled": "no batch_norm operator",
    "LeftInTraining": "training mode",
}
"""Nets with norms that cannot be changed, and why."""


def wanted() -> list[Any]:
    everything = os.environ.get("NORMDOCTOR_FOLD_SUITE") == "all"
    nets = [pattern for pattern in fold_files.patterns() if "module" in pattern.formats]
    return [
        pytest.param(pattern, way, id=f"{way}-{pattern.name}")
        for pattern in nets
        for way in ("trace", "freeze", "pt2", "pt2-decomposed")
        if everything or way == "trace" or pattern.name in SAMPLE
    ]


def save(net: Any, inputs: tuple[Any, ...], way: str, path: Path) -> None:
    if way.startswith("pt2"):
        program = torch.export.export(net, inputs)
        torch.export.save(program.run_decompositions() if way == "pt2-decomposed" else program, path)
        return
    traced: Any = torch.jit.trace(net, inputs, check_trace=False)
    torch.jit.save(torch.jit.freeze(traced, optimize_numerics=False) if way == "freeze" else traced, path)


@pytest.mark.parametrize(("pattern", "way"), wanted())
def test_same_bits_and_names(pattern: Any, way: str, tmp_path: Path) -> None:
    net, inputs = pattern.make(0)
    path = tmp_path / ("net.pt2" if way.startswith("pt2") else "net.pt")
    try:
        save(net, inputs, way, path)
    except RuntimeError as error:  # outputs that tracing cannot have
        assert not way.startswith("pt2"), error
        pytest.skip("cannot be traced")
    with open_checkpoint(path) as checkpoint:
        loaded = open_model(path, trust=True)
        found = unrolled(loaded, checkpoint.layers)
    expected, got = leaves(run(loaded.module, *inputs)), leaves(run(found.module, *inputs))
    assert len(got) == len(expected)
    for own, other in zip(got, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)
    if way == "freeze":  # it may have made norms constants
        assert pattern.name in LEFT or not found.left
        return
    assert bool(found.left) == (pattern.name in LEFT)
    assert all(LEFT[pattern.name] in why for why in found.left.values() if way != "pt2-decomposed")
    named = norms_of(net)
    for name, norm in found.norms.items():
        for tensor in (norm.running_mean, named[name].running_mean):
            tensor += 0.5
        after = leaves(run(found.module, *inputs))
        torch.testing.assert_close(after, leaves(run(net, *inputs)), rtol=1e-3, atol=1e-4, equal_nan=True)
