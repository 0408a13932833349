"""The self-consistent statistics against their definition, one layer at a time; and that nothing is left behind."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normdoctor.data import Batch
from normdoctor.errors import InputError, MisfitError, RefusedError
from normdoctor.measurement.lockstep import Tallies, as_stored, exact, one_pass, stored_variance
from normdoctor.measurement.opening import Opened, open_walker
from normdoctor.measurement.walks import Look
from normdoctor.models.opening import RunOptions
from normdoctor.readers import open_checkpoint

BatchNorm = nn.modules.batchnorm._BatchNorm

TOLERANCE = 1e-6
"""Bar: mean shift in standard deviations and |ln variance ratio|, for fp32 modules."""

Statistics = dict[str, tuple[np.ndarray, np.ndarray]]


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 have it: all four are buffers."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        scale = self.weight.view(shape) * (self.running_var.view(shape) + self.eps).rsqrt()
        return x * scale + (self.bias.view(shape) - self.running_mean.view(shape) * scale)


class Residual(nn.Module):
    """A stem, a block with a projected shortcut, one with a plain one, and a norm behind the pooling."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, 2, padding=1, bias=False), norm(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), norm(12)
        self.down, self.bnd = nn.Conv2d(8, 12, 1, 2, bias=False), norm(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 12, 3, padding=1), norm(12)
        self.head = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + self.bnd(self.down(x)))
        x = torch.relu(x + self.bn3(self.conv3(self.drop(x))))
        return self.head(x.mean((2, 3)))


def stack(rank: int) -> nn.Module:
    """Convolutions that are dense, depthwise, pointwise and grouped."""
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    norm: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
    return nn.Sequential(
        conv(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(), nn.Dropout(0.3),
        conv(8, 8, 3, padding=1, groups=8), norm(8), nn.ReLU6(),
        conv(8, 12, 1), norm(12), nn.SiLU(),
        conv(12, 12, 3, groups=4), norm(12), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(16, 16), nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 12, 12)),
    "2d": (lambda: stack(2), (3, 10, 10)),
    "1d of (N, C, L)": (lambda: stack(1), (3, 24)),
    "1d of (N, C)": (dense, (5,)),
    "3d": (lambda: stack(3), (3, 6, 6, 6)),
    "frozen": (lambda: Residual(FrozenBatchNorm2d), (3, 12, 12)),
    "synchronised": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Residual()), (3, 12, 12)),
}

SIMILAR = {"frozen", "synchronised"}
"""Nets whose sums are those of another one here."""

SAMPLES = 131


def build(name: str, seed: int = 0) -> nn.Module:
    """The net with gains and shifts as if trained, and buffers that belong to something else."""
    torch.manual_seed(seed)
    make, shape = NETS[name]
    net = make().eval()
    with torch.no_grad():
        net(torch.zeros(2, *shape))
        for norm in norms_of(net).values():
            weight, bias = norm.weight, norm.bias
            if weight is not None:
                weight.copy_(0.5 + torch.rand(weight.shape))
                bias.copy_(0.5 * torch.randn(bias.shape))
            norm.running_mean.copy_(torch.randn(norm.running_mean.shape))
            norm.running_var.copy_(0.1 + torch.rand(norm.running_var.shape))
    return net


def data_for(name: str, count: int = SAMPLES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, *NETS[name][1], generator=generator)
    return 2 * x + torch.linspace(-3, 3, count).view(-1, *(1 for _ in x.shape[1:]))  # samples differ in their means


def norms_of(net: nn.Module) -> dict[str, Any]:
    return {name: inner for name, inner in net.named_modules() if "running_mean" in inner._buffers}


def batches(data: torch.Tensor, size: int) -> list[Batch]:
    return [Batch((part,), {}, len(part), index) for index, part in enumerate(data.split(size))]


def order_of(net: nn.Module, data: torch.Tensor) -> list[str]:
    """The norms as forward reaches them."""
    reached: list[str] = []
    handles = [
        norm.register_forward_pre_hook(lambda _, __, name=name: reached.append(name))
        for name, norm in norms_of(net).items()
    ]
    with torch.no_grad():
        net(data[:2])
    for handle in handles:
        handle.remove()
    return reached


def definition(net: nn.Module, data: torch.Tensor, *, double: bool, size: int = 32, ddof: int = 1) -> Statistics:
    """Of each norm, as forward reaches them, the mean and (unbiased) variance in float64 of what it sees of all data
    with the norms before it set already: as many passes as there are norms.

    double: the net in float64 throughout, else its forward is in float32 as the user's is."""
    net = copy.deepcopy(net).eval()
    if double:
        net, data = net.double(), data.double()
    found: Statistics = {}
    for name in order_of(net, data):
        inputs: list[torch.Tensor] = []
        norm = norms_of(net)[name]
        handle = norm.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].detach().double()))
        with torch.no_grad():
            for part in data.split(size):
                net(part)
        handle.remove()
        channels = torch.cat(inputs).transpose(0, 1).flatten(1).numpy()
        mean, var = channels.mean(1), channels.var(1, ddof=ddof)
        found[name] = mean, var
        norm.running_mean.copy_(torch.from_numpy(mean))
        norm.running_var.copy_(torch.from_numpy(var))
    return found


def distance(found: Statistics, wanted: Statistics) -> float:
    """The largest mean shift in standard deviations or |ln variance ratio|."""
    assert list(found) == list(wanted)
    shifts = [np.abs(found[name][0] - mean) / np.sqrt(var) for name, (mean, var) in wanted.items()]
    ratios = [np.abs(np.log(found[name][1] / var)) for name, (mean, var) in wanted.items()]
    return float(max(map(np.max, shifts + ratios)))


@contextlib.contextmanager
def opened(net: nn.Module) -> Iterator[Opened]:
    with open_checkpoint(net) as checkpoint, open_walker(net, checkpoint, RunOptions()) as found:
        yield found


def statistics(tallies: Tallies) -> Statistics:
    totals = {name: tally.total() for name, tally in tallies.of.items()}
    return {name: (moments.mean, stored_variance(moments, 1)) for name, moments in totals.items()}


def measure(net: nn.Module, data: torch.Tensor, size: int, method: Any = exact, **options: Any) -> Statistics:
    with opened(net) as found:
        return statistics(method(found.walker, batches(data, size), **options))


# the definition


@pytest.mark.parametrize("name", NETS)
def test_exact_is_the_definition_at_any_batch_size(name: str) -> None:
    net, data = build(name), data_for(name)
    inside = definition(net, data, double=False)
    doubled = definition(net, data, double=True)
    assert len(doubled) == len(norms_of(net))
    assert distance(definition(net, data * 1.01, double=True), doubled) > 1e-3  # what is compared does tell
    for size in (7, 128) if name in SIMILAR else (1, 2, 7, 128, SAMPLES):
        found = measure(net, data, size)
        assert distance(found, inside) <= TOLERANCE, size
        assert distance(found, doubled) <= TOLERANCE, size


def test_a_single_sample_and_a_single_value() -> None:
    """One value per channel: its variance is 0, not NaN."""
    net, data = build("1d of (N, C)"), data_for("1d of (N, C)", 1)
    for mean, var in measure(net, data, 1).values():
        assert np.isfinite(mean).all()
        np.testing.assert_array_equal(var, 0)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_data_far_from_zero(offset: float) -> None:
    """Offsets that the first convolution hands on to the first norm."""
    net, data = build("2d"), data_for("2d", 40) + offset
    assert distance(measure(net, data, 7), definition(net, data, double=False)) <= TOLERANCE


def test_the_walk_of_a_float64_net_is_the_definition_to_rounding() -> None:
    net, data = build("residual").double(), data_for("residual").double()
    assert distance(measure(net, data, 7), definition(net, data, double=True)) <= 1e-12


@pytest.mark.parametrize("name", ["residual", "1d of (N, C)"])
def test_bitwise_repeatable(name: str) -> None:
    net, data = build(name), data_for(name)
    for method in (exact, one_pass):
        first, second = measure(net, data, 16, method), measure(net, data, 16, method)
        for layer, pair in first.items():
            for one, other in zip(pair, second[layer], strict=True):
                np.testing.assert_array_equal(one, other)


POISON = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 3e38, "negative": -5.0, "zero": 0.0}


@pytest.mark.parametrize("method", [exact, one_pass])
@pytest.mark.parametrize("value", POISON)
def test_what_the_buffers_held_plays_no_part(method: Any, value: str) -> None:
    clean, data = build("residual"), data_for("residual", 40)
    wanted = measure(clean, data, 16, method)
    sick = copy.deepcopy(clean)
    for norm in norms_of(sick).values():
        norm.running_mean.fill_(POISON[value])
        norm.running_var[::2] = POISON[value]
        if isinstance(norm, BatchNorm):
            norm.momentum = None
    found = measure(sick, data, 16, method)
    for name, pair in wanted.items():
        for one, other in zip(pair, found[name], strict=True):
            np.testing.assert_array_equal(one, other)


def test_dropout_is_off_and_modes_do_not_matter() -> None:
    net, data = build("residual"), data_for("residual", 40)
    evaluated, trained = measure(net, data, 16), measure(net.train(), data, 16)
    for name, (mean, _) in evaluated.items():
        np.testing.assert_array_equal(mean, trained[name][0])


def test_stored_order_is_eval_mode() -> None:
    net, data = build("residual"), data_for("residual", 40)
    wanted: Statistics = {}
    inputs: dict[str, list[torch.Tensor]] = {}
    other = copy.deepcopy(net)
    for name, norm in norms_of(other).items():
        norm.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        expected = other(data)
    for name, seen in inputs.items():
        channels = torch.cat(seen).double().transpose(0, 1).flatten(1).numpy()
        wanted[name] = channels.mean(1), channels.var(1, ddof=1)
    outputs: list[np.ndarray] = []
    with opened(net) as found:
        tallies = as_stored(
            found.walker, batches(data, 7), Look(samples=True), outputs=lambda _, out: outputs.append(out["output"])
        )
    assert distance(statistics(tallies), wanted) <= TOLERANCE
    np.testing.assert_allclose(np.concatenate(outputs), expected.numpy(), rtol=1e-4, atol=1e-5)
    assert tallies.samples == 40 and tallies.batches == 6


def test_one_pass_is_training_mode_without_dropout() -> None:
    net, data = build("residual"), data_for("residual", 48)
    inputs: dict[str, list[torch.Tensor]] = {}
    trained = copy.deepcopy(net).train()
    trained.drop.eval()
    for name, norm in norms_of(trained).items():
        norm.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for part in data.split(16):
            trained(part)
    wanted = {}
    for name, seen in inputs.items():
        channels = torch.cat(seen).double().transpose(0, 1).flatten(1).numpy()
        wanted[name] = channels.mean(1), channels.var(1, ddof=1)
    assert distance(measure(net, data, 16, one_pass), wanted) <= TOLERANCE
    # One batch of everything: upstream statistics are those of all data, which is self-consistent too, but for
    # the biased variance.
    assert distance(measure(net, data, 48, one_pass), measure(net, data, 16)) < 1e-2


def test_one_pass_stops_when_every_mean_is_known_well_enough() -> None:
    net, data = build("residual"), data_for("residual")
    with opened(net) as found:
        tallies = one_pass(found.walker, batches(data, 8), until=0.3)
        assert tallies.stopped and 2 <= tallies.batches < 17 and tallies.samples == 8 * tallies.batches
        errors = [tally.standard_error() for tally in tallies.of.values()]
        assert all(error is not None and error.max() < 0.3 for error in errors)
        assert not one_pass(found.walker, batches(data, 8), until=1e-6).stopped


def test_norms_that_keep_their_statistics() -> None:
    """Norms that are not chosen stay as they are stored, and those behind them see that."""
    net, data = build("residual"), data_for("residual", 40)
    frozen = definition(net, data, double=False)
    with opened(net) as found:
        tallies = exact(
            found.walker,
            batches(data, 7),
            settle=lambda name, tally: (
                None if name == "bn0" else (tally.total().mean, stored_variance(tally.total(), 1))
            ),
        )
        partly = statistics(tallies)
    assert distance({"bn0": partly["bn0"]}, {"bn0": frozen["bn0"]}) <= TOLERANCE
    assert distance({"bn1": partly["bn1"]}, {"bn1": frozen["bn1"]}) > 0.01


# how the code of a model may be


class Spanning(Residual):
    """Contexts that a walk stands in while other batches go on."""

    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.context = context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.context():
            return super().forward(x)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def stdout() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "default dtype": default_dtype,
    "stdout": stdout,
}


def surroundings() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_rng_state().sum().item(),
        sys.stdout,
        sys.stderr,
        torch.get_num_threads(),
    )


@pytest.mark.parametrize("method", [exact, one_pass])
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_inside_forward(context: str, method: Any) -> None:
    net, data = build("residual"), data_for("residual", 20)
    other = Spanning(CONTEXTS[context])
    other.load_state_dict(net.state_dict())
    before = surroundings()
    found = measure(other, data, 4, method)
    assert surroundings() == before
    # All at once there is nobody to disturb: every batch is in the context as it would be alone.
    if method is exact:
        wanted = definition(other, data, double=False, size=4)
    else:
        wanted = measure(other, data, 4, method) if context == "autocast" else measure(net, data, 4, method)
    assert distance(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_batch_is_in_its_own_context_when_it_goes_on(context: str) -> None:
    """Whatever the others did while it stood in front of a norm."""

    class Watching(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            around = surroundings()
            x = self.bn0(self.stem(x))
            assert surroundings() == around
            with CONTEXTS[context]():
                inside = surroundings()
                x = self.bnd(self.down(x)).float()
                assert surroundings()[:5] == inside[:5]
            assert surroundings() == around
            return x.mean((2, 3))

    measure(Watching(), data_for("residual", 12), 4)


def test_a_context_around_the_call() -> None:
    """autocast as the user's own evaluation has it."""
    net, data = build("residual"), data_for("residual", 20)
    with torch.autocast("cpu", torch.bfloat16):
        before = surroundings()
        found = measure(net, data, 4)
        assert surroundings() == before
        wanted = definition(net, data, double=False, size=4)
    assert distance(found, wanted) <= TOLERANCE
    assert distance(found, definition(net, data, double=True)) > 1e-4


def test_inference_mode_inside_forward_is_refused() -> None:
    net = Spanning(torch.inference_mode)
    before = surroundings()
    with pytest.raises(RefusedError, match="bn0: is called inside a context of torch"):
        measure(net, data_for("residual", 8), 4)
    assert surroundings() == before


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.mean() > 0 else self.b(x)


class Ending(nn.Module):
    """Leaves early where it is sure."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return y if x.mean() > 0 else self.b(y)


def two_kinds() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 5, generator=generator) + torch.tensor([4.0] * 4 + [-4.0] * 4)[:, None]


@pytest.mark.parametrize(("net", "words"), [(Branching, "comes to a where batch 1 comes to b"), (Ending, "the end")])
def test_ways_that_depend_on_the_data(net: type[nn.Module], words: str) -> None:
    module = net().eval()
    with pytest.raises(RefusedError, match=words) as caught:
        measure(module, two_kinds(), 4)
    assert "one-pass" in caught.value.hint
    with opened(module) as found:
        tallies = one_pass(found.walker, batches(two_kinds(), 4))
    counts = {name: tally.samples for name, tally in tallies.of.items()}
    assert counts == ({"a": 4, "b": 4} if net is Branching else {"a": 8, "b": 4})


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc(self.norm(x)))


def test_a_norm_called_twice() -> None:
    torch.manual_seed(0)
    net, data = Twice().eval(), data_for("1d of (N, C)", 24)
    with pytest.raises(RefusedError, match="norm: is called several times") as caught:
        measure(net, data, 8)
    assert "one-pass" in caught.value.hint
    with opened(net) as found:
        tallies = one_pass(found.walker, batches(data, 24))
    (tally,) = tallies.of.values()
    with torch.no_grad():
        normalised = nn.functional.batch_norm(data, None, None, training=True)
        both = torch.cat([data, net.fc(normalised)]).double().numpy()
    assert tally.samples == 24 and tally.measured().calls == 2
    np.testing.assert_allclose(tally.total().mean, both.mean(0), atol=1e-6)
    np.testing.assert_allclose(tally.total().variance(), both.var(0), rtol=1e-5)


def test_one_norm_under_two_names_is_one_norm() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.BatchNorm1d(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)

    with opened(Tied().eval()) as found:
        assert list(found.walker.norms) == ["a"] and not found.walker.left


def test_hooks_of_the_user_come_first() -> None:
    net, data = build("1d of (N, C)"), data_for("1d of (N, C)", 24)
    handle = net[1].register_forward_pre_hook(lambda _, args: (10 * args[0],))
    tenfold = measure(net, data, 8)["1"]
    handle.remove()
    plain = measure(net, data, 8)["1"]
    np.testing.assert_allclose(tenfold[0], 10 * plain[0], rtol=1e-5)


def test_nothing_is_printed_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    class Talking(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("before")
            y = super().forward(x)
            print("after")
            return y

    measure(Talking(), data_for("residual", 8), 4)
    assert capsys.readouterr().out == ""


# what goes wrong, and that all is as it was


class Failing(Residual):
    """Raises in the middle, in the forward of its second batch or behind every norm."""

    error: BaseException | None = None
    at = 2

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16), default_dtype():
            x = torch.relu(self.bn0(self.stem(x)))
            self.calls += 1
            if self.error is not None and self.calls == self.at:
                raise self.error
            y = torch.relu(self.bn1(self.conv1(x)))
            return self.head((self.bn2(self.conv2(y)) + self.bnd(self.down(x))).float().mean((2, 3)))


def state_of(net: nn.Module) -> list[Any]:
    """Everything that must be as it was: modes, hooks, buffers by object and by value, momenta."""
    found: list[Any] = []
    for name, module in net.named_modules():
        hooks = [len(getattr(module, f"_forward{kind}")) for kind in ("_hooks", "_pre_hooks", "_hooks_with_kwargs")]
        hooks += [len(module._forward_pre_hooks_with_kwargs), len(module._backward_hooks)]
        found.append((name, module.training, hooks, getattr(module, "momentum", "none")))
        for key, buffer in module._buffers.items():
            found.append((name, key, id(buffer), None if buffer is None else (buffer._version, buffer.tolist())))
    return found


def modes(net: nn.Module) -> nn.Module:
    """A net in a mixture of modes, as in fine-tuning."""
    net.train()
    net.bn1.eval()
    net.requires_grad_(False)
    return net


ERRORS: list[tuple[BaseException, type[BaseException]]] = [
    (ValueError("in the middle"), MisfitError),
    (SystemExit(3), MisfitError),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (GeneratorExit(), GeneratorExit),
]


@pytest.mark.parametrize("method", [exact, one_pass, as_stored])
@pytest.mark.parametrize(("error", "raised"), ERRORS, ids=lambda error: getattr(error, "__name__", repr(error)))
def test_everything_is_put_back(method: Any, error: BaseException, raised: type[BaseException]) -> None:
    net, data = modes(Failing()), data_for("residual", 16)
    before, around = state_of(net), surroundings()
    net.error = error
    says = "cannot be run on x 4x3x12x12" if raised is MisfitError else None
    options = {"look": Look(samples=True, active=True)} if method is as_stored else {}
    with pytest.raises(raised, match=says), opened(net) as found:
        method(found.walker, batches(data, 4), **options)
    assert surroundings() == around
    assert state_of(net) == before
    net.error = None
    measure(net, data, 4, exact)
    assert surroundings() == around
    assert state_of(net) == before


@pytest.mark.parametrize("method", [exact, one_pass])
def test_everything_is_put_back_where_all_is_well(method: Any) -> None:
    net, data = modes(build("residual")), data_for("residual", 16)
    before, around = state_of(net), surroundings()
    measure(net, data, 4, method)
    assert state_of(net) == before and surroundings() == around


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of the caller")])
def test_a_caller_that_gives_up(error: BaseException) -> None:
    """The progress of the user raises while all batches stand in front of a norm."""
    net, data = modes(build("residual")), data_for("residual", 16)
    before, around = state_of(net), surroundings()

    def progress(done: int, total: int | None, words: str) -> None:
        if done == 2:
            raise error

    with pytest.raises(type(error)), opened(net) as found:
        exact(found.walker, batches(data, 4), progress=progress)
    assert state_of(net) == before and surroundings() == around


def test_a_walk_may_be_closed_at_any_time() -> None:
    cleaned: list[str] = []

    class Careful(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(x)
            finally:
                cleaned.append("yes")

    net = Careful()
    before = state_of(net)
    with opened(net) as found:
        for steps in range(8):
            walk = found.walker.start(batches(data_for("residual", 4), 4)[0], Look())
            for _ in range(steps):
                walk.advance()
            walk.close()
            walk.close()
            assert len(cleaned) == steps  # one that was never begun has nothing to clean
    assert state_of(net) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    net, data = build("residual"), data_for("residual", 16)
    with torch.no_grad():
        net.conv1.weight[3] = value
    for method in (exact, one_pass):
        with pytest.raises(InputError, match=r"arrives at bn1 in 1 of 12 channels \(3\)"):
            measure(net, data, 4, method)


def test_no_data() -> None:
    with pytest.raises(InputError, match="no data"):
        measure(build("residual"), data_for("residual", 4), 4, lambda walker, _: exact(walker, []))


def test_data_that_does_not_fit() -> None:
    net = build("residual")
    before = state_of(net)
    with pytest.raises(MisfitError, match=r"4x5x12x12|5 channels"):
        measure(net, torch.zeros(4, 5, 12, 12), 4)
    assert state_of(net) == before
