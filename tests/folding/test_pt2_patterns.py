"""Norms of all sorts in .pt2 files, as exported and decomposed: folded without torch, run with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pt2_tools import Folded, check, trained

pytestmark = [
    pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"]),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch's own, when it decomposes
]

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))

Layers = dict[str, nn.Module]


class Net(nn.Module):
    """A net out of layers and a function of them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def conv(kernel: int = 1, **settings: Any) -> nn.Module:
    return nn.Conv2d(4, 4, kernel, **settings)


def folds(path: Path, net: nn.Module, decomposed: bool, count: int, x: Tensor = X, **options: Any) -> Folded:
    torch.manual_seed(0)
    folded = check(path / "net.pt2", net, (x,), decomposed, **options)
    assert len(folded.gone) == count, [(found.norm.label, found.reason) for found in folded.plan.outcomes]
    return folded


def test_behind_weights_and_in_front(tmp_path: Path, decomposed: bool) -> None:
    net = trained(
        nn.Sequential(
            conv(3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(4, 6, 3, groups=2),
            nn.BatchNorm2d(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5, bias=False),
            nn.BatchNorm1d(5),
            nn.Tanh(),
            nn.BatchNorm1d(5),
            nn.Linear(5, 3),
        )
    )
    folded = folds(tmp_path, net, decomposed, 4)
    assert [found.into[0].label for found in folded.plan.outcomes] == ["0", "3", "7", "11"]
    assert folded.gone == ["1", "4", "8", "10"]
    state = torch.export.load(folded.path).state_dict
    biases = {f"{layer}.bias" for layer in (0, 3, 7, 11)}
    assert set(state) == {f"{layer}.weight" for layer in (0, 3, 7, 11)} | biases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types(tmp_path: Path, decomposed: bool, dtype: torch.dtype) -> None:
    net = trained(nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))).to(dtype)
    folded = folds(tmp_path, net, decomposed, 1, X.to(dtype))
    assert {tensor.dtype for tensor in torch.export.load(folded.path).state_dict.values()} == {dtype}


def test_one_convolution_called_twice(tmp_path: Path, decomposed: bool) -> None:
    net = trained(Net(lambda m, x: m.norm(m.conv(x)) + m.conv(x.abs()), conv=conv(3), norm=nn.BatchNorm2d(4)))
    folded = folds(tmp_path, net, decomposed, 1)
    state = torch.export.load(folded.path).state_dict
    assert {"conv.weight", "conv.bias"} < set(state)
    assert set(state) - {"conv.weight", "conv.bias"} == {"conv.folded_weight_1", "conv.folded_bias_1"}
    assert torch.equal(state["conv.weight"], net.conv.weight)


def test_the_same_pair_twice(tmp_path: Path, decomposed: bool) -> None:
    net = trained(Net(lambda m, x: m.pair(m.pair(x)), pair=nn.Sequential(conv(), nn.BatchNorm2d(4))))
    assert folds(tmp_path, net, decomposed, 2).left == []


def test_nested_modules(tmp_path: Path, decomposed: bool) -> None:
    block = nn.Sequential(conv(bias=False), nn.BatchNorm2d(4))
    net = trained(nn.Sequential(nn.Sequential(block, nn.ReLU()), nn.Sequential(conv(), nn.BatchNorm2d(4))))
    folded = folds(tmp_path, net, decomposed, 2)
    assert set(torch.export.load(folded.path).state_dict) == {"0.0.0.weight", "0.0.0.bias", "1.0.weight", "1.0.bias"}


def test_product_without_a_place_for_a_bias(tmp_path: Path, decomposed: bool) -> None:
    net = Net(lambda m, x: F.relu(m.norm(x @ m.p.weight)), p=nn.Linear(6, 6, bias=False), norm=nn.BatchNorm1d(4))
    folds(tmp_path, trained(net), decomposed, 0, X[:, :, 0])
    net = Net(lambda m, x: F.relu(m.norm(x @ m.p.weight)), p=nn.Linear(4, 4, bias=False), norm=nn.BatchNorm1d(4))
    folded = folds(tmp_path, trained(net), decomposed, 1, X[:, :, 0, 0])
    assert "p.bias" in torch.export.load(folded.path).state_dict


def test_decompose(tmp_path: Path, decomposed: bool) -> None:
    net = trained(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv(3, padding=1)))
    torch.manual_seed(0)
    folded = check(tmp_path / "net.pt2", net, (X,), decomposed, decompose=True)
    targets = [str(node.target) for node in torch.export.load(folded.path).graph.nodes if node.op == "call_function"]
    assert targets[:2] == ["aten.mul.Tensor", "aten.add.Tensor"] and "norm" not in " ".join(targets)
    assert {"0.folded_scale", "0.folded_shift"} < set(torch.export.load(folded.path).state_dict)


def test_layernorm(tmp_path: Path, decomposed: bool) -> None:
    for norm in (nn.LayerNorm(6), nn.RMSNorm(6)):
        net = Net(lambda m, x: (m.a(m.n(x)), m.b(m.n(x))), n=norm, a=nn.Linear(6, 5), b=nn.Linear(6, 3, bias=False))
        folded = check(tmp_path / "net.pt2", trained(net), (X[:, 0],), decomposed, layernorm=True)
        assert len(folded.gone) == 2


# overwriting in place: what a fold leaves out must not make somebody else's tensor be written over


def test_overwritten_behind_a_norm_whose_input_goes_on(tmp_path: Path, decomposed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(F.relu_(m.norm(h))) + h  # type: ignore[no-any-return]

    net = Net(forward, a=conv(), norm=nn.BatchNorm2d(4), b=conv(3, padding=1))
    folds(tmp_path, trained(net, positive=True), decomposed, 1)


def test_input_of_the_network_overwritten_behind_a_norm(tmp_path: Path, decomposed: bool) -> None:
    net = Net(lambda m, x: m.b(F.relu_(m.norm(x))) + x, norm=nn.BatchNorm2d(4), b=conv(3, padding=1))
    folds(tmp_path, trained(net, positive=True), decomposed, 1)


def test_overwritten_after_the_norm_has_read_it(tmp_path: Path, decomposed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        y = m.norm(h)
        z = F.relu_(h)
        return m.b(y) + z  # type: ignore[no-any-return]

    net = Net(forward, a=conv(), norm=nn.BatchNorm2d(4), b=conv())
    folds(tmp_path, trained(net), decomposed, 1)


def test_overwritten_through_a_view(tmp_path: Path, decomposed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(m.norm(h).view(-1, 4, 6, 6).relu_()) + h  # type: ignore[no-any-return]

    net = Net(forward, a=conv(), norm=nn.BatchNorm2d(4), b=conv(3, padding=1))
    folds(tmp_path, trained(net, positive=True), decomposed, 1)


def test_norm_reads_what_was_overwritten_through_a_view(tmp_path: Path, decomposed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h.flatten(2).relu_()
        h[:, 1].mul_(3.0)
        return m.norm(h)  # type: ignore[no-any-return]

    folded = folds(tmp_path, trained(Net(forward, a=conv(), norm=nn.BatchNorm2d(4))), decomposed, 0)
    assert folded.left == ["norm"]


# layout in memory


@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")  # of torch.export.save
def test_layout_that_a_view_relies_on(tmp_path: Path, decomposed: bool) -> None:
    net = Net(
        lambda m, x: m.norm(m.conv(x)).permute(0, 2, 3, 1).view(x.shape[0], -1, 6),
        conv=nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        norm=nn.BatchNorm2d(6),
    )
    folded = folds(tmp_path, trained(net), decomposed, 1)
    weight = torch.export.load(folded.path).state_dict["conv.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


# outputs, branches, state


def test_norm_that_does_nothing_between_input_and_output(tmp_path: Path, decomposed: bool) -> None:
    net = nn.BatchNorm2d(4, eps=0, affine=False).eval()
    folds(tmp_path, nn.Sequential(net), decomposed, 1)
    folds(tmp_path, Net(lambda m, x: (h := m.conv(x), m.norm(h)), conv=conv(), norm=net).eval(), decomposed, 1)


def test_several_names_for_an_output(tmp_path: Path, decomposed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.norm(m.conv(x))
        return {"a": y, "b": [y, y.relu()]}

    folds(tmp_path, trained(Net(forward, conv=conv(), norm=nn.BatchNorm2d(4))), decomposed, 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.cond looks at it
def test_branches(tmp_path: Path, decomposed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.norm(m.conv(x))
        return torch.cond(x.sum() > 0, lambda t: m.inner(t), lambda t: t * 2, (y,))

    inner = nn.Sequential(conv(), nn.BatchNorm2d(4))
    net = trained(Net(forward, conv=conv(), norm=nn.BatchNorm2d(4), inner=inner))
    folded = folds(tmp_path, net, decomposed, 1)
    assert folded.gone == ["norm"] and folded.left == ["inner.1"]
    assert folded.plan.outcomes[-1].code == "inside-a-branch"


def test_buffers_that_change(tmp_path: Path, decomposed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.norm(m.conv(x))
        m.norm.num_batches_tracked.add_(1)
        return y * m.norm.num_batches_tracked

    net = trained(Net(forward, conv=conv(), norm=nn.BatchNorm2d(4)))
    folded = folds(tmp_path, net, decomposed, 1)
    assert set(torch.export.load(folded.path).state_dict) == {"conv.weight", "conv.bias", "norm.num_batches_tracked"}

    def changing(m: Any, x: Tensor) -> Any:
        y = m.norm(m.conv(x))
        m.norm.running_mean.add_(1)
        return y

    assert folds(tmp_path, trained(Net(changing, conv=conv(), norm=nn.BatchNorm2d(4))), decomposed, 0).left == ["norm"]


def test_training_mode(tmp_path: Path, decomposed: bool) -> None:
    net = trained(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False)))
    folded = folds(tmp_path, net.train(), decomposed, 0)
    assert [found.code for found in folded.plan.outcomes] == ["training-mode", "no-running-statistics"]


# written out


class Frozen(nn.Module):
    """detectron2's FrozenBatchNorm2d."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(count) + 0.5, persistent=name != "bias")

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


def test_arithmetic(tmp_path: Path, decomposed: bool) -> None:
    folded = folds(tmp_path, nn.Sequential(conv(), Frozen(4), nn.ReLU()).eval(), decomposed, 1)
    assert folded.gone == ["1"] and folded.counts.nodes[1] == 2
    assert set(torch.export.load(folded.path).state_dict) == {"0.weight", "0.bias"}


def test_numbers_and_constants_in_code(tmp_path: Path, decomposed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = torch.rsub(m.conv(x), 3.0)
        y = y.mul(2).sub(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1), alpha=2)
        return m.norm(y)

    folds(tmp_path, trained(Net(forward, conv=conv(), norm=nn.BatchNorm2d(4))), decomposed, 1)


def test_computed_weights(tmp_path: Path, decomposed: bool) -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(conv())
    folded = folds(tmp_path, trained(nn.Sequential(normed, nn.BatchNorm2d(4))), decomposed, 1)
    assert folded.counts.nodes[1] == 1
