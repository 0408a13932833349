"""TorchScript, step by step in Python: the same bits as the original, and norms that can be changed by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from normdoctor.errors import RefusedError
from normdoctor.models.loaded import Kind, Loaded
from normdoctor.models.with_torch import take
from normdoctor.programs import Unrolled
from normdoctor.programs.with_torch import unrolled
from normdoctor.readers import live_module, open_checkpoint

from .conftest import alive, leaves, norms_of, run, same, trained


def opened(path: Path) -> tuple[Any, Unrolled]:
    with open_checkpoint(path) as checkpoint:
        script: Any = torch.jit.load(path)
        return script, unrolled(Loaded(Kind.SCRIPT, script, str(path)), checkpoint.layers)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.norm(self.conv(x))) + x


class Named(NamedTuple):
    features: Tensor
    scores: Tensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.head = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def features(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            y = block(y)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.features(x).mean((2, 3))))


class Tuple(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = self.features(x)
        parts = list(torch.chunk(y, 2, 1))
        parts.append(y[:, 0])
        parts[0] = parts[0] * 2
        return y, parts


class Dictionary(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {"x": x}
        for name in ["a", "b"]:
            found[name] = self.features(found["x"]) * len(found)
        if "a" in found:
            found.pop("x")
        return found


class Record(Net):
    def forward(self, x: Tensor) -> Named:
        y = self.features(x)
        return Named(y, self.head(y.mean((2, 3))))


class Branches(Net):
    """Ways that the shape, a value and an argument decide."""

    def forward(self, x: Tensor, scale: float = 2.0, again: bool = False, shift: Tensor | None = None) -> Tensor:
        if x.dim() == 3:
            x = x.unsqueeze(0)
        y = self.norm(self.stem(x))
        if x.shape[-1] > 8 and x.shape[0] != 1:  # noqa: SIM108
            y = y[:, :, ::2] * scale
        else:
            y = y + y.mean()
        if bool(y.sum() > 0):
            z = y * 2
        elif shift is not None:
            z = y + shift
        else:
            z = -y
        return self.blocks[0](z) if again else z


class Loops(Net):
    """Loops whose length is known only when they run."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        total = torch.zeros_like(y[0])
        for i in range(x.shape[0]):
            total = total + y[i] * i
            if i > 1:
                continue
            total += 1
        count = 0
        while float(total.abs().max()) > 1.0:
            total = total / 2
            count += 1
        return total * count


class Dropping(Net):
    """Dropout that is on in eval mode too, and modes that are asked for."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.dropout(self.features(x), 0.3, True)
        y = nn.functional.dropout(y, 0.3, self.training)
        return nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(self.stem(x)).relu())


class Functional(nn.Module):
    """A norm that is a call of a function, on buffers with names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("var", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, eps=1e-3)


class Typed(Net):
    """Types, devices and numbers on their way through tensors."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x.to(torch.float32))
        ones = torch.ones([y.shape[0], 1], dtype=y.dtype, device=y.device)
        size = torch.tensor(y.size(2) // 2)
        pooled = nn.functional.adaptive_avg_pool2d(y, int(size))
        return torch.cat([pooled.flatten(1), ones.expand(-1, 2)], dim=1).softmax(-1)


class Containers(Net):
    """Lists in lists that are changed under another name, dictionaries, words."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [1, 2, 3]

    def forward(self, x: Tensor) -> tuple[Tensor, list[list[Tensor]], int, str]:
        z = self.features(x)
        nested: list[list[Tensor]] = [[z], []]
        nested[1].append(z * 2)
        nested[1].insert(0, z + 1)
        other = nested[0]
        other.append(z.sum())
        other.extend([z, z])
        doubled = [size * 2 for size in self.sizes]
        doubled.sort(reverse=True)
        found: dict[str, list[int]] = {"a": [1]}
        found["a"].append(3)
        found["b"] = doubled
        count = 0
        for key, entries in found.items():
            count += len(entries) + entries[0] + len(key)
        for i, (u, v) in enumerate(list(zip(doubled, self.sizes))):  # noqa: B905
            count += i * u * v
        y = z[:, 1:3, ::2].clone()
        y[:, 0] = 3.0
        y += 1
        return y, nested, count, f"{count}:" + "a,b".split(",")[1] + " %d" % (self.sizes[1],)  # noqa: SIM905, UP031


class Early(Net):
    """Left in the middle of a loop."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        for _ in range(3):
            z = self.norm(z)
            if bool(z.mean() > 0.1):
                return self.blocks[0](z)
            z = z + 0.3
        while True:
            z = z * 0.5
            if float(z.abs().max()) < 0.1:
                break
        return self.blocks[1](z)


class Sizes(Net):
    """Whole numbers, rounding, and tensors made of them."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        padded = nn.functional.pad(x, [0, (w * 3) % 5, 0, int(-(-h // 4) * 4 - h)])
        z = nn.functional.interpolate(self.features(padded), size=(h, w), mode="bilinear", align_corners=False)
        scale = max(h, w) / min(h, w)
        places = torch.arange(h, device=x.device)[None, :]
        places = torch.where(places > 2, places, -places).to(torch.float32)
        z = z * scale + round(scale * 3.7) + min([h, w, 3]) + places.sum() + torch.tensor([h, w]).sum() + float(h**2)
        return z + (z.argmax(1, keepdim=True) == 1).float()


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, after = self.lstm(self.features(x).mean(3).transpose(1, 2), state)
        return self.attention(y, y, y)[0], after


class Kinds(Net):
    """Types that are asked for, gradients switched off, and what waits for another thread."""

    def forward(self, x: Tensor, y: int | float | None = 3) -> Tensor:
        waiting = torch.jit.fork(torch.relu, x)
        with torch.no_grad():
            z = self.features(torch.jit.wait(waiting))
        if isinstance(y, int):
            return z * y
        return z


NETS: list[Callable[[], nn.Module]] = [
    *(Net, Tuple, Dictionary, Record, Branches, Loops, Dropping, Twice, Typed, Functional),
    *(Containers, Early, Sizes, Recurrent, Kinds),
    lambda: nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU()),
    lambda: nn.Sequential(nn.BatchNorm2d(3)),
]
LENGTHS = [1, 4]


@pytest.mark.parametrize("make", NETS, ids=lambda make: getattr(make, "__name__", "sequential"))
@pytest.mark.parametrize("way", ["script", "trace", "freeze"])
def test_same_bits_and_names(way: str, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = trained(make())
    flat = isinstance(module, nn.Sequential) and len(module) > 1
    inputs = [torch.randn(n, 8) if flat else torch.randn(n, 3, 12, 12) for n in LENGTHS]
    script: Any
    if way == "trace":
        if make in (Branches, Loops, Record, Containers, Early, Sizes, Kinds):
            pytest.skip("tracing takes one way")
        strict = make is not Dictionary
        script = torch.jit.trace(module, (inputs[1],), check_trace=False, strict=strict)
    else:
        script = torch.jit.script(module)
    if way == "freeze":
        script = torch.jit.freeze(script, optimize_numerics=False)
    torch.jit.save(script, tmp_path / "net.pt")
    original, found = opened(tmp_path / "net.pt")
    assert not found.notes
    for x in inputs:
        before = x.clone()
        expected = run(original, x)
        assert same(run(found.module, x), expected)
        assert torch.equal(x, before)
    if way == "freeze" or make is Functional:
        assert len(found.norms) and not found.left  # by their order
        return
    named = norms_of(module)
    assert found.norms.keys() | found.left.keys() == named.keys()
    for name, norm in found.norms.items():
        before = run(found.module, inputs[1])
        norm.running_mean += 1.0
        named[name].running_mean.add_(1.0)
        after = run(found.module, inputs[1])
        torch.testing.assert_close(leaves(after), leaves(run(module, inputs[1])))
        assert make in (Branches, Early) or not same(before, after)  # not every block is come to there
    uncalled = {Branches: {"blocks.1.norm"}, Loops: {"blocks.0.norm", "blocks.1.norm"}}
    uncalled[Twice] = uncalled[Loops]
    assert set(found.left) == uncalled.get(make, set())


def test_other_arguments(tmp_path: Path) -> None:
    torch.jit.script(trained(Branches())).save(str(tmp_path / "net.pt"))
    original, found = opened(tmp_path / "net.pt")
    x = torch.randn(2, 3, 12, 12)
    for args, kwargs in [
        ((x, 3.0), {}),
        ((x,), {"scale": 5}),
        ((x[0],), {}),
        ((x[:, :, :8, :8],), {"again": True}),
        ((-x,), {"shift": torch.tensor(2.0)}),
        ((x,), {"shift": None, "again": True}),
    ]:
        assert same(run(found.module, *args, **kwargs), run(original, *args, **kwargs)), (args, kwargs)
    for args, kwargs in [((), {}), ((x,), {"other": 1}), ((x, 1.0, False, None, 2), {}), ((x,), {"x": x}), ((3,), {})]:
        with pytest.raises(TypeError):
            run(found.module, *args, **kwargs)
    with pytest.raises(RuntimeError):
        run(found.module, torch.randn(2, 4, 12, 12))


def test_one_norm_called_twice_is_one_module(tmp_path: Path) -> None:
    torch.jit.script(trained(Twice())).save(str(tmp_path / "net.pt"))
    _, found = opened(tmp_path / "net.pt")
    seen: list[Tensor] = []
    found.norms["norm"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(found.module, torch.randn(2, 3, 8, 8))
    assert len(seen) == 2 and set(found.norms) == {"norm"}
    assert set(found.left) == {"blocks.0.norm", "blocks.1.norm"}
    assert all("no batch_norm operator" in why for why in found.left.values())


def test_norms_as_created_keep_their_names(tmp_path: Path) -> None:
    """Equal statistics, which freezing would make one constant."""
    torch.manual_seed(0)
    module = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))).eval()
    torch.jit.script(module).save(str(tmp_path / "net.pt"))
    _, found = opened(tmp_path / "net.pt")
    assert list(found.norms) == ["1", "3", "5", "7"]
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        found.norms["5"].running_mean += 1
        module[5].running_mean.add_(1)
    assert same(run(found.module, x), run(module, x))


def test_the_original_stays_as_it_is(tmp_path: Path) -> None:
    torch.jit.script(trained(Net())).save(str(tmp_path / "net.pt"))
    original, found = opened(tmp_path / "net.pt")
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    for norm in found.norms.values():
        for tensor in norm.buffers():
            tensor.fill_(7)
    assert found.module.train() is found.module and not any(norm.training for norm in found.norms.values())
    run(found.module, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_live_module(training: bool) -> None:
    script: Any = torch.jit.script(trained(Net()).train(training))
    found = unrolled(take(script), live_module.read(script).layers)
    assert set(found.norms) == {"norm", "blocks.0.norm", "blocks.1.norm"}
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(run(found.module, x), run(script.eval(), x), rtol=0, atol=0)


class Training(Net):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        y = nn.functional.batch_norm(self.stem(x), norm.running_mean, norm.running_var, training=True)
        return self.blocks[0](y) * self.blocks[0].norm.running_mean.sum()


def test_what_is_left_has_a_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = trained(nn.Sequential(Training(), nn.InstanceNorm2d(4, track_running_stats=True)))
    torch.jit.script(module).save(str(tmp_path / "net.pt"))
    _, found = opened(tmp_path / "net.pt")
    assert not found.norms
    assert "training mode" in found.left["0.norm"]
    assert "other operators" in found.left["0.blocks.0.norm"]
    assert "no batch_norm operator" in found.left["0.blocks.1.norm"]
    assert "InstanceNorm" in found.left["1"]


class Remembering(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.features(x) * self.seen


def test_state_that_forward_changes_is_said(tmp_path: Path) -> None:
    torch.jit.script(trained(Remembering())).save(str(tmp_path / "net.pt"))
    _, found = opened(tmp_path / "net.pt")
    assert found.notes == ("forward changes seen, so that outputs depend on the batches before",)


class Assigning(Net):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.features(x) * self.count


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    torch.jit.script(trained(Assigning())).save(str(tmp_path / "net.pt"))
    with pytest.raises(RefusedError, match="prim::SetAttr") as caught:
        opened(tmp_path / "net.pt")
    assert "ONNX" in caught.value.hint


@pytest.mark.parametrize("way", ["straight", "inside", "each"])
def test_values_are_let_go_of(way: str, tmp_path: Path) -> None:
    """In front of every norm of a chain nothing is held but its input."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(4)])
            self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            for conv, norm in zip(self.convs, self.norms, strict=True):
                y = torch.relu(norm(conv(y)))
            return y

    class Inside(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            if bool(y.sum() < 1e9):
                for conv, norm in zip(self.convs, self.norms):  # noqa: B905
                    y = torch.relu(norm(conv(y)))
            return y

    class Each(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            for conv, norm in zip(self.convs, self.norms):  # noqa: B905
                if bool(y.sum() < 1e9):
                    y = norm(conv(y))
                    y = torch.relu(y)
                for _ in range(y.shape[0]):
                    y = y + 1
            return y

    source = {"straight": Chain, "inside": Inside, "each": Each}[way]()
    x = torch.randn(2, 3, 7, 9)
    script: Any = torch.jit.trace(source.eval(), x) if way == "straight" else torch.jit.script(source.eval())
    script.save(str(tmp_path / "net.pt"))
    _, found = opened(tmp_path / "net.pt")
    counts: list[int] = []
    before = alive((2, 3, 7, 9))
    for norm in found.norms.values():
        norm.register_forward_pre_hook(lambda *_: counts.append(alive((2, 3, 7, 9)) - before))
    run(found.module, x)
    assert counts == [1, 1, 1, 1]
