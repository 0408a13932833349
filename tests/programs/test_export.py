"""Exported programs as Python modules: the same bits as the original, and norms that can be changed by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from normdoctor.models.loaded import Kind, Loaded
from normdoctor.programs import Unrolled
from normdoctor.programs.with_torch import unrolled
from normdoctor.readers import open_checkpoint

from .conftest import alive, leaves, norms_of, run, same, trained


def opened(path: Path) -> tuple[Any, Unrolled]:
    with open_checkpoint(path) as checkpoint:
        program = torch.export.load(path)
        return program.module(), unrolled(Loaded(Kind.PROGRAM, program, str(path)), checkpoint.layers)


def saved(
    path: Path,
    module: nn.Module,
    args: tuple[Any, ...],
    *,
    batch: Dim | None = None,
    decomposed: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> tuple[Any, Unrolled]:
    shapes = None if batch is None else tuple({0: batch} for _ in args)
    program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    torch.export.save(program.run_decompositions() if decomposed else program, path)
    return opened(path)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm2d(4, affine=False, eps=1e-3)
        self.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.relu(self.norm(self.conv(x)))
        y = self.second(y) + y
        return {"head": self.head(y.mean((2, 3))), "others": (y, y.sum())}


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(self.conv(x)).relu())


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.conv(x)).relu())


class WithoutGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.no_grad():
            y = self.norm(y)
        return self.second(y)


class Conditional(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return torch.cond(x.sum() > 0, lambda y: self.second(y) * 2, lambda y: y - 1, (y,))


class Functional(Net):
    """A norm on buffers that lie elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return nn.functional.batch_norm(self.conv(x), norm.running_mean, norm.running_var, eps=0.1)


@pytest.mark.parametrize(
    ("make", "decomposed"),
    [
        *((make, False) for make in (Net, Twice, Tied, WithoutGrad, Conditional, Functional)),
        *((make, True) for make in (Net, Tied, Conditional)),
    ],
)
def test_same_bits_and_names(make: Callable[[], nn.Module], decomposed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = trained(make()), torch.randn(4, 3, 8, 8)
    original, found = saved(tmp_path / "net.pt2", module, (x,), batch=Dim("batch", min=1), decomposed=decomposed)
    assert not found.notes and found.fixed_batch is None
    for inputs in (x, -x, x[:1], torch.cat([x, x])):
        assert same(run(found.module, inputs), run(original, inputs))
    named = norms_of(module)
    expected = {
        Twice: {"norm"},
        Tied: {"norm"},
        WithoutGrad: {"norm", "second"},
        Conditional: {"norm", "second"},
        Functional: {"norm"},
    }
    used = expected.get(make, set(named))
    assert set(found.norms) == used and set(found.left) == set(named) - used
    for name, norm in found.norms.items():
        before = run(found.module, x), run(found.module, -x)
        norm.running_mean += 1.0
        named[name].running_mean.add_(1.0)
        after = run(found.module, x), run(found.module, -x)
        torch.testing.assert_close(leaves(after), leaves((run(module, x), run(module, -x))))
        assert not same(before, after)


def test_one_norm_called_twice_is_one_module(tmp_path: Path) -> None:
    _, found = saved(tmp_path / "net.pt2", trained(Twice()), (torch.randn(4, 3, 8, 8),))
    seen: list[Tensor] = []
    found.norms["norm"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(found.module, torch.randn(4, 3, 8, 8))
    assert len(seen) == 2 and [name for name, module in found.module.named_modules() if module in found.norms.values()]


def test_norms_as_created_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))).eval()
    x = torch.randn(2, 3, 4, 4)
    _, found = saved(tmp_path / "net.pt2", module, (x,))
    assert list(found.norms) == ["1", "3", "5", "7"]
    with torch.no_grad():
        found.norms["5"].running_mean += 1
        module[5].running_mean.add_(1)
    assert same(run(found.module, x), run(module, x))


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(None, (4, 4, 4)), (Dim("batch", min=1), (None, 1, None)), (Dim("b", min=2, max=9), (None, 2, 9))],
)
def test_batch_sizes(batch: Any, expected: tuple[Any, ...], tmp_path: Path) -> None:
    _, found = saved(tmp_path / "net.pt2", trained(Net()), (torch.randn(4, 3, 8, 8),), batch=batch)
    assert (found.fixed_batch, found.smallest_batch, found.largest_batch) == expected
    if expected[2] is not None:  # what the program says of its inputs is still asked for
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            run(found.module, torch.randn(10, 3, 8, 8))


def test_other_arguments(tmp_path: Path) -> None:
    class Several(Net):
        def forward(self, x: Tensor, *, shift: Tensor, parts: dict[str, Tensor]) -> Tensor:
            return self.norm(self.conv(x)) + shift * parts["a"]

    given = {"shift": torch.tensor(2.0), "parts": {"a": torch.tensor(3.0)}}
    x = torch.randn(4, 3, 8, 8)
    original, found = saved(tmp_path / "net.pt2", trained(Several()), (x,), kwargs=given)
    assert same(run(found.module, x, **given), run(original, x, **given))
    assert found.fixed_batch == 4 and set(found.norms) == {"norm"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    original, found = saved(tmp_path / "net.pt2", trained(Net()).to(dtype), (x,))
    assert len(found.norms) == 3 and found.norms["norm"].running_mean.dtype is dtype
    assert same(run(found.module, x), run(original, x))


class Remembering(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.norm(self.conv(x)) * self.seen


def test_state_that_forward_changes_is_said(tmp_path: Path) -> None:
    _, found = saved(tmp_path / "net.pt2", trained(Remembering()), (torch.randn(4, 3, 8, 8),))
    assert found.notes == ("forward changes seen, so that outputs depend on the batches before",)


class Left(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.train_mode, self.used, self.spare = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.instance, self.computed = nn.InstanceNorm2d(3, track_running_stats=True), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.instance(self.used(self.train_mode(x))) + self.used.running_mean.sum()
        mean = self.computed.running_mean * 2
        return nn.functional.batch_norm(y, mean, self.computed.running_var)


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_what_is_left_has_a_reason(decomposed: bool, tmp_path: Path) -> None:
    module = trained(Left())
    module.train_mode.train()
    x = torch.randn(4, 3, 8, 8)
    original, found = saved(tmp_path / "net.pt2", module, (x,), decomposed=decomposed)
    assert not found.norms
    words = {"train_mode": "training mode", "used": "other operators", "spare": "no batch_norm operator"}
    words |= {"instance": "InstanceNorm", "computed": "computed"}
    for name, word in words.items():
        assert word in found.left[name], (name, found.left[name])
    assert same(run(found.module, x), run(original, x))


def test_values_are_let_go_of(tmp_path: Path) -> None:
    """In front of every norm of a chain nothing is held but its input."""
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())]
    x = torch.randn(2, 3, 7, 9)
    _, found = saved(tmp_path / "net.pt2", nn.Sequential(*layers).eval(), (x,))
    counts: list[int] = []
    before = alive((2, 3, 7, 9))
    for norm in found.norms.values():
        norm.register_forward_pre_hook(lambda *_: counts.append(alive((2, 3, 7, 9)) - before))
    run(found.module, x)
    assert counts == [1, 1, 1, 1]
