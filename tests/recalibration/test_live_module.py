"""A live module is repaired in place: all of it or nothing, and never what somebody else looks at as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normdoctor as nd


def norm(updates: int = 50, **options: Any) -> nn.BatchNorm1d:
    torch.manual_seed(updates)
    made = nn.BatchNorm1d(4, momentum=0.001, **options)
    for _ in range(updates):
        made(torch.randn(32, 4) * 2 + 1)
    return made


def change(**buffers: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A healthy layer to repair, then one with other buffers."""
    odd = norm()
    for name, function in buffers.items():
        setattr(odd, name, function(getattr(odd, name)))
    return nn.Sequential(norm(), odd)


def shared_buffer() -> nn.Module:
    first, second = norm(), norm()
    second.running_var = first.running_var
    return nn.Sequential(first, second)


def aliased() -> nn.Module:
    first = norm()
    return nn.Sequential(first, nn.ReLU(), first)


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        odd = norm()
    return nn.Sequential(norm(), odd)


def interleaved() -> nn.Module:
    odd = norm()
    memory = torch.stack([odd.running_mean, odd.running_var], 1)
    odd.running_mean, odd.running_var = memory[:, 0], memory[:, 1]
    return nn.Sequential(norm(), odd)


REFUSED = {
    "aliased": (aliased, "0: the same layer is stored as 2"),
    "a shared buffer": (shared_buffer, "0.running_var: shares its memory with 1.running_var"),
    "expanded": (lambda: change(running_mean=lambda b: torch.zeros(1).expand(4)), "1.running_mean: its elements are"),
    "interleaved": (interleaved, "1.running_mean: its elements are expanded or strided"),
    "too large for half": (
        lambda: change(running_mean=lambda b: torch.full((4,), 6e4).half()),
        "1.running_mean: float16 cannot hold",
    ),
    "a counter of 8 bits": (lambda: change(num_batches_tracked=lambda b: b.to(torch.int8)), "cannot be written"),
    "float8": (lambda: change(running_var=lambda b: b.to(torch.float8_e5m2)), "float8_e5m2 cannot be written"),
    "inference mode": (in_inference_mode, "1.running_mean: was made in inference mode"),
    "no word of momentum": (lambda: nn.Sequential(norm(), Silent()), "1: the file does not say its momentum"),
}


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, buffer in norm().named_buffers():
            self.register_buffer(name, buffer)


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changes(make: Callable[[], nn.Module], words: str) -> None:
    net = make()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(nd.NormDoctorError) as caught:
        nd.recalibrate(net, method="debias")
    assert words in caught.value.message and caught.value.hint
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_counter_too_small_for_what_it_must_hold() -> None:
    net = norm()
    net.momentum, net.num_batches_tracked = 1e-4, net.num_batches_tracked.to(torch.int16)
    net.running_var.fill_(1.5)
    with pytest.raises(nd.RefusedError, match="int16 cannot hold"):
        nd.recalibrate(net, method="debias")


def test_in_inference_mode_inference_tensors_are_changed() -> None:
    with torch.inference_mode():
        assert len(nd.recalibrate(in_inference_mode(), method="debias").report.repairs) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_buffers_keep_their_type(dtype: torch.dtype) -> None:
    net, exact = norm().to(dtype), norm().double()
    nd.recalibrate(exact, method="debias")
    nd.recalibrate(net, method="debias")
    assert net.running_var.dtype is dtype and net.num_batches_tracked.dtype is torch.int64
    # One rounding of what was stored, magnified by 1 / (1 - q).
    torch.testing.assert_close(net.running_mean.double(), exact.running_mean, rtol=torch.finfo(dtype).eps * 2, atol=0)


def test_parameters_and_settings_are_not_touched() -> None:
    net = nn.Sequential(nn.Linear(4, 4), norm()).eval()
    before = {name: tensor.clone() for name, tensor in net.named_parameters()}
    nd.recalibrate(net, method="debias", keep_counters=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.named_parameters())
    assert net[1].num_batches_tracked == 50 and net[1].momentum == 0.001 and not net[1].training
    with pytest.raises(nd.UsageError, match="in place"):
        nd.recalibrate(net, method="debias", output="x.pt")
