"""The graph of a .pt2: names of layers, stored tensors, what leaves the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normdoctor as nd
from normdoctor.flow.graph import Graph, Node, Op
from tests.folding.pt2_tools import flow_of, save

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, when it decomposes

X = (torch.randn(2, 4, 6, 6),)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Stateful(Block):
    def forward(self, x: Tensor) -> Any:
        self.norm.num_batches_tracked.add_(1)
        return super().forward(x), x


NORMS = (Op.BATCH_NORM, Op.LAYER_NORM, Op.OTHER_NORM)


def norms(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op in NORMS or node.layer is not None]


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_norms_have_the_names_that_inspect_gives(tmp_path: Path, decomposed: bool) -> None:
    block = Block()
    layers = [block, nn.Sequential(block, nn.GroupNorm(2, 4)), nn.LayerNorm(6), nn.BatchNorm2d(4, affine=False)]
    bare = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    path = save(tmp_path / "net.pt2", nn.Sequential(*layers, nn.RMSNorm(6), bare).eval(), X, decomposed=decomposed)
    found = norms(flow_of(path).graph)
    known = {layer.name for layer in nd.inspect(path).layers}
    assert {node.label for node in found} == known
    assert all(node.layer is not None and node.layer.name == node.label for node in found)
    assert len(found) == len(known) + 1  # one block is called twice


def test_weighted_operators_have_the_names_of_their_weights(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Flatten(), nn.Linear(144, 3)))
    for decomposed in (False, True):
        flow = flow_of(save(tmp_path / "net.pt2", module, X, decomposed=decomposed))
        assert [node.label for node in flow.graph.of(Op.CONV, Op.MATMUL)] == ["0", "1.1"]


def test_stored_tensors_inputs_and_outputs(tmp_path: Path) -> None:
    flow = flow_of(save(tmp_path / "net.pt2", Stateful().eval(), X, dynamic=True))
    conv, norm = next(flow.graph.of(Op.CONV)), next(flow.graph.of(Op.BATCH_NORM))
    weight = conv.given(1)
    assert weight is not None and weight.array is not None and weight.array.shape == (4, 4, 1, 1)
    assert conv.x.array is None and conv.x.is_output and isinstance((conv.x.shape or ())[0], str)
    assert norm.y.is_output and not conv.y.is_output and norm.y.dtype == "float32"
    counter = flow.values["b_norm_num_batches_tracked"]
    assert counter.is_output and counter.array is None  # what it holds depends on the calls before


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.cond looks at it
def test_operands_of_a_branch_are_used_by_what_is_not_understood(tmp_path: Path) -> None:
    class Branches(Block):
        def forward(self, x: Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda t: self.norm(t), lambda t: t + 1, (self.conv(x),))

    flow = flow_of(save(tmp_path / "net.pt2", Branches().eval(), X))
    conv = next(flow.graph.of(Op.CONV))
    assert [use.node.op for use in conv.y.uses] == [Op.OTHER]
    (norm,) = norms(flow.graph)
    assert norm.label == "norm" and norm.fixed is not None and norm.fixed.code == "inside-a-branch"
