"""Small nets with norms in known places, as ONNX files and as torch saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def norm(name: str, channels: int, seed: int, *, x: str, y: str, scale: float = 1.0) -> tuple[Any, list[Any]]:
    """A BatchNormalization with trained-looking numbers, and its tensors."""
    from onnx import helper, numpy_helper

    generator = np.random.default_rng(seed)
    tensors = {
        "weight": scale * generator.uniform(0.5, 1.5, channels),
        "bias": generator.standard_normal(channels),
        "running_mean": generator.standard_normal(channels),
        "running_var": generator.uniform(0.5, 2.0, channels),
    }
    stored = [numpy_helper.from_array(v.astype(np.float32), f"{name}.{role}") for role, v in tensors.items()]
    node = helper.make_node("BatchNormalization", [x, *(t.name for t in stored)], [y], epsilon=1e-5)
    return node, stored


def chain(path: Path, norms: int = 4, *, keep_last: bool = False, batch: Any = "batch", scale: float = 1.0) -> Path:
    """conv - norm - relu, several times; bn0, bn1, ... keep_last: a norm that nothing can absorb stands at the end."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(1)
    nodes, stored, x = [], [], "x"
    for n in range(norms):
        weight = generator.standard_normal((4, 4 if n else 3, 3, 3)).astype(np.float32) * 0.3
        stored.append(numpy_helper.from_array(weight, f"conv{n}.weight"))
        nodes.append(helper.make_node("Conv", [x, f"conv{n}.weight"], [f"c{n}"], pads=[1, 1, 1, 1]))
        node, tensors = norm(f"bn{n}", 4, n, x=f"c{n}", y=f"n{n}", scale=scale)
        stored += tensors
        nodes += [node, helper.make_node("Relu", [f"n{n}"], [f"r{n}"])]
        x = f"r{n}"
    if keep_last:
        node, tensors = norm("last", 4, 99, x=x, y="y")
        nodes, stored = [*nodes, node], [*stored, *tensors]
    else:
        nodes.append(helper.make_node("Identity", [x], ["y"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4, 8, 8])],
        stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def onnx_chain(tmp_path: Path) -> Path:
    """Four norms behind four convolutions."""
    return chain(tmp_path / "model.onnx")
