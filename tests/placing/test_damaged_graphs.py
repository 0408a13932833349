"""Graphs that make no sense: a note or an InputError, and never anything else."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import defs, helper, numpy_helper

from normdoctor.errors import InputError
from normdoctor.inspection import inspect

OPS = sorted(schema.name for schema in defs.get_all_schemas() if schema.domain == "")
NUMBERS = (0, 1, -1, 7, 2**40, 2**62, -(2**62))
ATTRIBUTES = ("axis", "axes", "group", "pads", "strides", "kernel_shape", "dilations", "perm", "to", "epsilon")
VALUES = ([2**62] * 4, [-1] * 3, 5, -7, [0], [1] * 8, 2**40)


def damaged(model: onnx.ModelProto, chance: random.Random) -> onnx.ModelProto:
    """The model with one to six things wrong in its graph."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    names = [name for node in graph.node for name in node.output] + [tensor.name for tensor in graph.initializer]
    for _ in range(chance.randint(1, 6)):
        node = chance.choice(graph.node)
        kind = chance.randrange(7)
        if kind == 0:
            node.op_type = chance.choice(OPS)
        elif kind == 1 and node.input:
            node.input[chance.randrange(len(node.input))] = chance.choice([*names, ""])
        elif kind == 2:
            del node.input[chance.randrange(3) :]
        elif kind == 3:
            dims = chance.choice(graph.initializer).dims
            if dims:
                dims[chance.randrange(len(dims))] = chance.choice(NUMBERS)
        elif kind == 4:
            lengths = chance.choice([*graph.input, *graph.output]).type.tensor_type.shape.dim
            if lengths:
                chance.choice(lengths).dim_value = chance.choice(NUMBERS)
        elif kind == 5:
            name, value = chance.choice(ATTRIBUTES), chance.choice(VALUES)
            kept = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])
        else:
            values = numpy_helper.from_array(np.array(chance.choice([[2**62] * 2, [-1], [0], [1, 2]])), "made")
            if node.input and "made" not in names:
                graph.initializer.append(values)
                names.append("made")
                node.input[chance.randrange(len(node.input))] = "made"
    return made


@pytest.mark.parametrize("seed", range(6))
def test_damaged_graphs(files: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    model = onnx.load(files / "net.onnx")
    outcomes = set()
    for _ in range(40):
        onnx.save(damaged(model, chance), tmp_path / "damaged.onnx")
        start = time.perf_counter()
        try:
            report = inspect(tmp_path / "damaged.onnx", target="fp16")
        except InputError:
            outcomes.add("refused")
        else:
            noted = any("graph could not be read" in note for note in report.notes)
            outcomes.add("noted" if noted else "placed")
        assert time.perf_counter() - start < 5
    assert outcomes >= {"refused", "placed"}
