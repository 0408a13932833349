"""Modules: what is folded is exact, and what their code does not let us change stays with its reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normdoctor as nd

FOLDED = ("folded backward", "")


def net(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with statistics as after training."""
    torch.manual_seed(3)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
        if isinstance(norm, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm)) and norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            norm.weight.data[::2] *= -1
            if getattr(norm, "bias", None) is not None:
                nn.init.normal_(norm.bias)
    return module.double().eval()


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8, dtype=torch.float64)


class Chain(nn.Module):
    """A net whose forward is a function of its parts."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


class NormAct(nn.BatchNorm2d):
    """As timm has it: dropout and activation inside the norm."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(self.drop(x))


class NormActTwice(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class FrozenBatchNorm2d(nn.Module):
    """As detection libraries write it: multiplication and addition, constants computed on the way."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gain = nn.Parameter(torch.rand(4) + 0.5)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gain)


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight))


class ScaledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class UNet(nn.Module):
    """Registered as conv0, conv1, norm0, norm1; data flows conv0 - norm0 - relu - conv1 - norm1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm0, self.norm1 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(self.norm0(self.conv0(x)).relu()))


def tied() -> nn.Module:
    module = Chain(
        lambda self, x: self.second(self.norm(self.first(x)).relu()),
        first=nn.Conv2d(4, 4, 3),
        norm=nn.BatchNorm2d(4),
        second=nn.Conv2d(4, 4, 3),
    )
    module.second.weight = module.first.weight  # type: ignore[assignment, union-attr]
    return module


def borrowed() -> nn.Module:
    return Chain(
        lambda self, x: self.norm(self.first(x)).relu() + F.conv2d(x, self.first.weight),
        first=nn.Conv2d(4, 4, 3),
        norm=nn.BatchNorm2d(4),
    )


def hooked(which: int) -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4))
    module[which].register_forward_hook(lambda *seen: None)
    return module


def hooked_block() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    block.register_forward_hook(lambda *seen: None)
    return nn.Sequential(block, nn.ReLU())


def old_weight_norm() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    module(torch.randn(1, 3, 8, 8))  # leaves a computed weight behind, which deepcopy does not take
    return module


def two_behind_one(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return self.one(y), self.two(y)


def skip(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.norm(y) + y


def reads(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.conv(x)) * self.norm.num_features


SEVERAL, SHARED = ("left", "several-consumers"), ("left", "shared-module")

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[str, str]], Any]] = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), {"1": FOLDED}, images),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), {"1": FOLDED}, images),
    "grouped transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        {"1": FOLDED},
        lambda: images(4),
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)),
        {"1": FOLDED},
        lambda: torch.randn(3, 5, dtype=torch.float64),
    ),
    "linear over the wrong axis": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
        {"1": ("left", "wrong-axis")},
        lambda: torch.randn(2, 6, 6, dtype=torch.float64),
    ),
    "relu between": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        {"2": ("left", "nonlinear")},
        images,
    ),
    "relu between, then a conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
        {"2": ("folded forward", "")},
        images,
    ),
    "order of registration": (UNet, {"norm0": FOLDED, "norm1": FOLDED}, lambda: images(4)),
    "a conv called twice": (
        lambda: Chain(
            lambda self, x: self.norm(self.conv(self.conv(x))), conv=nn.Conv2d(3, 3, 3), norm=nn.BatchNorm2d(3)
        ),
        {"norm": SHARED},
        images,
    ),
    "a norm called twice": (
        lambda: Chain(
            lambda self, x: self.norm(self.one(x)) + self.norm(self.two(x)),
            one=nn.Conv2d(3, 3, 3),
            two=nn.Conv2d(3, 3, 3),
            norm=nn.BatchNorm2d(3),
        ),
        {"norm": SHARED},
        images,
    ),
    "two norms behind one conv": (
        lambda: Chain(two_behind_one, conv=nn.Conv2d(3, 4, 3), one=nn.BatchNorm2d(4), two=nn.BatchNorm2d(4)),
        {"one": SEVERAL, "two": SEVERAL},
        images,
    ),
    "a skip connection": (
        lambda: Chain(skip, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)),
        {"norm": SEVERAL},
        images,
    ),
    "an attribute that the code reads": (
        lambda: Chain(reads, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)),
        {"norm": ("left", "read-elsewhere")},
        images,
    ),
    "tied weights": (tied, {"norm": FOLDED}, lambda: images(4)),
    "a weight that a function call takes too": (borrowed, {"norm": ("left", "shared-weight")}, lambda: images(4)),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
        {"1": ("left", "computed-weight")},
        images,
    ),
    "weight_norm": (old_weight_norm, {"1": ("left", "computed-weight")}, images),
    "hook on the conv": (lambda: hooked(0), {"2": ("left", "hooks")}, images),
    "hook between": (lambda: hooked(1), {"2": ("left", "graph-output")}, images),
    "hook on the norm": (lambda: hooked(2), {"2": ("left", "hooks")}, images),
    "hook around both": (hooked_block, {"0.1": FOLDED}, images),
    "activation in the norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, nn.SiLU())),
        {"1": FOLDED},
        images,
    ),
    "more than an activation in the norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormActTwice(4, nn.SiLU())),
        {"1": ("left", "functional-call")},
        images,
    ),
    "frozen arithmetic": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)), {"1": FOLDED}, images),
    "functional norm": (FunctionalNorm, {"gain": ("left", "functional-call")}, images),
    "functional conv": (FunctionalConv, {"norm": ("left", "functional-call")}, images),
    "a subclass with a forward of its own": (
        lambda: nn.Sequential(ScaledConv(3, 4, 3), nn.BatchNorm2d(4)),
        {"1": ("left", "functional-call")},
        images,
    ),
    "numbers written in the code": (
        lambda: Chain(lambda self, x: self.norm(self.conv(x) * 3 + 1), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)),
        {"norm": FOLDED},
        images,
    ),
    "no running statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        {"1": ("left", "no-running-statistics")},
        images,
    ),
}


@pytest.mark.parametrize(("make", "expected", "inputs"), CASES.values(), ids=CASES)
def test_exact_or_left(make: Callable[[], nn.Module], expected: dict[str, tuple[str, str]], inputs: Any) -> None:
    module, x = net(make()), inputs()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    folding = nd.fold(module, (x,))
    rows = {row.norm: (row.verdict, row.code) for row in folding.report.rows}
    if list(expected) != list(rows):  # a functional norm has no name of its own
        rows = dict(zip(expected, rows.values(), strict=True))
    assert rows == expected
    with torch.no_grad():
        wanted, found = module(x), folding.module(x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    again = nd.fold(folding.module, (x,))
    assert again.report.folded == 0


def test_every_reason_offers_a_way_that_works() -> None:
    rows = nd.fold(net(FunctionalConv()), (images(),)).report.rows
    assert ".pt2 or ONNX" in rows[0].reason and "weight" in rows[0].reason


def test_a_norm_that_cannot_take_another_one_in() -> None:
    """The constants of a frozen norm are computed by its code: it can go as a whole, and not be changed."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(self.frozen(y)) + y

    module = net(Chain(forward, conv=nn.Conv2d(3, 4, 3), frozen=FrozenBatchNorm2d(4), norm=nn.BatchNorm2d(4)))
    x = images()
    folding = nd.fold(module, (x,))
    assert [row.verdict for row in folding.report.rows] == ["merged", "left"]
    torch.testing.assert_close(folding.module(x), module(x), rtol=1e-10, atol=1e-10)


def test_a_norm_alone_in_a_block_keeps_what_follows_it() -> None:
    module = net(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, nn.Sequential(nn.SiLU(), nn.Hardtanh()))))
    folded = nd.fold(module, (images(),)).module
    assert [type(inner).__name__ for inner in folded.modules() if not list(inner.children())] == [
        "Conv2d",
        "SiLU",
        "Hardtanh",
    ]


def in_place_behind_the_norm(self: Any, x: Tensor) -> Tensor:
    before = self.conv(x).relu()
    y = self.norm(before)
    y += 1.0
    return self.head(y) + before


def in_place_behind_a_view(self: Any, x: Tensor) -> Tensor:
    before = self.conv(x).relu()
    y = self.norm(before)
    y.flatten(2).mul_(2.0)
    return self.head(y) + before


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("forward", [in_place_behind_the_norm, in_place_behind_a_view])
def test_without_the_norm_an_operator_in_place_would_change_what_others_read(
    forward: Callable[..., Any], scripted: bool, tmp_path: Path
) -> None:
    module = net(Chain(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Conv2d(4, 4, 1)))
    x = images()
    if scripted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that TorchScript is deprecated
            torch.jit.save(torch.jit.trace(module, x), tmp_path / "net.pt")
            options: dict[str, Any] = {"trust": True, "input_shape": "2,3,8,8:float64", "verify": False}
            folded = nd.fold(tmp_path / "net.pt", **options)
            result = torch.jit.load(folded.path)(x)
    else:
        folded = nd.fold(module, (x,), verify=False)
        result = folded.module(x)
    torch.testing.assert_close(result, module(x), rtol=1e-9, atol=1e-9)
    assert [row.verdict for row in folded.report.rows] == ["left"]


def test_an_operator_in_place_behind_a_norm_that_alone_reads_the_convolution() -> None:
    relu = nn.ReLU(inplace=True)
    module = net(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), relu, nn.Conv2d(4, 4, 1)))
    folded = nd.fold(module, (images(),))
    assert [row.verdict for row in folded.report.rows] == ["folded backward"]
