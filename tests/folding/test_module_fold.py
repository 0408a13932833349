"""What a folded module keeps: types, devices, modes, attributes; and how the module is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normdoctor as nd
from normdoctor.models.loaded import example_of
from normdoctor.models.with_torch import take
from normdoctor.tracing.with_torch import trace


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    norm: Any = module[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return module.eval()


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_type(dtype: torch.dtype) -> None:
    folded = nd.fold(pair().to(dtype), (IMAGES.to(dtype),)).module
    assert {tensor.dtype for tensor in folded.parameters()} == {dtype} and folded[0].bias is not None


def test_mixed_types() -> None:
    """A float32 norm behind a bfloat16 conv: each weight keeps the type that it has."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = pair()
            self.body[0].to(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.body[1](self.body[0](x.bfloat16()).float())

    folding = nd.fold(Mixed().eval(), (IMAGES,))
    assert folding.module.body[0].weight.dtype is torch.bfloat16
    assert folding.report.proof.state.value in ("verified", "unverified", "nothing to verify")


def test_frozen_weights_stay_frozen() -> None:
    module = pair()
    module[0].weight.requires_grad_(False)
    folded = nd.fold(module, (IMAGES,)).module
    assert not folded[0].weight.requires_grad and not folded[0].bias.requires_grad


def test_training_mode_needs_a_word() -> None:
    module = pair().train()
    assert [row.code for row in nd.fold(module, (IMAGES,)).report.rows] == ["training-mode"]
    folded = nd.fold(module, (IMAGES,), eval=True).module
    assert isinstance(folded[1], nn.Identity) and not any(inner.training for inner in folded.modules())
    assert all(inner.training for inner in module.modules())


def test_one_norm_in_training_mode() -> None:
    module = nn.Sequential(pair(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    module[2].train()
    rows = nd.fold(module, (IMAGES,)).report.rows
    assert {row.norm: row.code for row in rows} == {"0.1": "", "2": "training-mode"}


def test_gains_of_layer_norms_move_on() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.RMSNorm(8), nn.Linear(8, 4, bias=False))
    for norm in (module[0], module[3]):
        nn.init.normal_(norm.weight)
    nn.init.normal_(module[0].bias)
    module, x = module.double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    assert nd.fold(module, (x,)).report.folded == 0
    folded = nd.fold(module, (x,), layernorm=True).module
    assert (folded[0].weight == 1).all() and (folded[0].bias == 0).all() and (folded[3].weight == 1).all()
    assert folded[4].bias is None
    torch.testing.assert_close(folded(x), module(x), rtol=1e-10, atol=1e-10)


def test_a_module_has_nothing_to_decompose_into() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)).eval()
    nn.init.ones_(module[0].bias)
    row = nd.fold(module, (IMAGES,), decompose=True).report.rows[0]
    assert (row.verdict, row.code) == ("left", "module-code")


class Remembers(nn.Module):
    """Keeps a tensor in an attribute, counts its calls, and returns an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pair()
        self.last: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        self.last = self.body(x) * scale
        self.calls += 1
        return {"out": self.last, "parts": (self.last.mean(), None)}


def test_the_original_sees_nothing() -> None:
    module = Remembers()
    folding = nd.fold(module, {"x": IMAGES, "scale": 2.0})
    assert module.last is None and module.calls == 0
    assert [found.output for found in folding.report.proof.differences] == ["out", "parts.0"]
    assert isinstance(folding.module.body[1], nn.Identity)


@pytest.mark.parametrize("works", [True, False], ids=["export", "fx"])
def test_both_tracers_give_the_same_graph(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("not today")

    if not works:
        monkeypatch.setattr(torch.export, "export", fails)
    loaded = take(Remembers().eval())
    traced = trace(loaded, example_of({"x": IMAGES, "scale": 2.0}))
    assert [node.written for node in traced.graph.nodes][:3] == ["aten.conv2d", "aten.batch_norm", "aten.relu"]
    assert [node.label for node in traced.graph.nodes][:3] == ["body.0", "body.1", "body.2"]
    assert all(node.fixed is None for node in traced.graph.nodes[:3]) and traced.any_batch is works


def test_the_batch_axis_is_free_where_it_can_be() -> None:
    class Whole(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.body, self.rows = pair(), rows

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).view(self.rows, -1)

    free = trace(take(pair()), example_of(IMAGES[:1]))
    assert free.any_batch and free.graph.nodes[0].y.shape[0] not in (1, 2)
    fixed = trace(take(Whole(2).eval()), example_of(IMAGES))
    assert not fixed.any_batch and "one batch size" in fixed.notes[0]


def test_a_module_meant_for_inference_comes_back_in_eval_mode() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9)).train()
    folding = nd.fold(module, (torch.randn(2, 3, 8, 8),), eval=True)
    assert [row.verdict for row in folding.report.rows] == ["folded backward"]
    assert not any(part.training for part in folding.module.modules())
    assert all(part.training for part in module.modules())


def test_a_norm_without_running_statistics_says_so() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    folding = nd.fold(module, (torch.randn(2, 3, 8, 8),))
    assert [row.code for row in folding.report.rows] == ["no-running-statistics"]
    assert str(folding) == "1: left (no-running-statistics)\nproof: nothing to verify"
