"""TorchScript: folded in its frozen graph, where every site can have weights of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normdoctor as nd


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that TorchScript is deprecated
        yield


def trained(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return module.double().eval()


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu_(self.norm(self.conv(x))).mean((2, 3)))


class Shared(Chain):
    """The same conv at two places, a norm behind one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x.relu())


class Skip(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Branch(Chain):
    """A value that the code of a branch sees stays."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        if bool(x.sum() > 1000):
            z = z + y
        return z


class Matrix(nn.Module):
    """A product without a place for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.matmul(x, self.weight))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.one, self.two = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        return torch.cat([self.one(a), self.two(b)], 1)


class Methods(Chain):
    @torch.jit.export
    def features(self, x: Tensor) -> Tensor:
        return self.conv(x)


CASES: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "chain": (Chain, 1, (1, 3, 6, 6)),
    "shared": (Shared, 1, (1, 3, 6, 6)),
    "skip": (Skip, 0, (1, 3, 6, 6)),
    "branch": (Branch, 0, (2, 3, 6, 6)),
    "matrix": (Matrix, 1, (2, 3)),
    "parts": (Parts, 2, (2, 3, 6, 6)),
}


@pytest.mark.parametrize("way", ["script", "trace", "freeze"])
@pytest.mark.parametrize(("make", "folds", "shape"), CASES.values(), ids=CASES)
def test_exact(way: str, make: Callable[[], nn.Module], folds: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    if way == "trace" and make is Branch:
        pytest.skip("tracing takes one branch")
    module, x = trained(make()), torch.randn(*shape, dtype=torch.float64)
    script = torch.jit.trace(module, x) if way == "trace" else torch.jit.script(module)
    if way == "freeze":
        script = torch.jit.freeze(script, optimize_numerics=False)
    path = tmp_path / "model.ts"
    torch.jit.save(script, path)
    folding = nd.fold(path, input_shape=",".join(map(str, shape)) + ":float64")
    assert folding.report.folded == folds, folding.report.rows
    if way != "freeze":  # a frozen file has forgotten the names
        assert {row.norm for row in folding.report.rows} <= {"norm", "one", "two"}
    assert folding.path is not None
    again = torch.jit.load(folding.path)
    larger = torch.cat([x, x, x])
    torch.testing.assert_close(again(larger), module(larger), rtol=1e-10, atol=1e-10)
    if not folds:
        assert folding.path.read_bytes() == path.read_bytes()
    assert any("frozen" in note for note in folding.report.notes) == bool(folds)


def test_decomposed() -> None:
    module = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folding = nd.fold(torch.jit.script(module), (x,), decompose=True)
    assert [row.verdict for row in folding.report.rows] == ["decomposed"]
    torch.testing.assert_close(folding.module(x), module(x), rtol=1e-10, atol=1e-10)
    assert "batch_norm" not in str(folding.module.graph)


def test_training_mode(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(trained(Chain()).train()), tmp_path / "model.pt")
    options: dict[str, Any] = {"input_shape": "2,3,6,6:float64", "overwrite": True}
    assert [row.code for row in nd.fold(tmp_path / "model.pt", **options).report.rows] == ["training-mode"]
    assert nd.fold(tmp_path / "model.pt", eval=True, **options).report.folded == 1


def test_methods_that_freezing_would_lose(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(trained(Methods())), tmp_path / "model.pt")
    with pytest.raises(nd.RefusedError, match="has the methods features beside forward") as caught:
        nd.fold(tmp_path / "model.pt", input_shape="2,3,6,6:float64")
    assert "--export onnx" in caught.value.hint


def test_norms_inside_branches_are_named(tmp_path: Path) -> None:
    class Inside(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if bool(y.sum() > 0):
                y = self.norm(y)
            return self.head(y.mean((2, 3)))

    torch.jit.script(trained(Inside())).save(str(tmp_path / "net.pt"))
    folding = nd.fold(tmp_path / "net.pt", trust=True, input_shape="2,3,8,8:float64")
    assert not folding.report.rows and any("inside a branch" in note for note in folding.report.notes)
