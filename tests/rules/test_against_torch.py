"""What the rules claim about torch, compared with torch itself: never with a second copy of a formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from normdoctor.findings import Confidence, Severity
from normdoctor.layers import NormKind
from normdoctor.rules.decay import USUAL_MOMENTA, floors

MOMENTA = st.sampled_from([0.1, 0.05, 0.03, 0.02, 0.01, 0.003, 0.001])


def only(report: Any, code: str) -> Any:
    """The one finding of that rule, or None."""
    found = [finding for finding in report.findings if finding.code == code]
    assert len(found) <= 1
    return found[0] if found else None


@settings(max_examples=40, deadline=None)
@given(momentum=MOMENTA, updates=st.integers(1, 400), seed=st.integers(0, 10**6), known=st.booleans())
def test_a_channel_that_never_varied_is_found_and_tells_the_momentum(
    momentum, updates, seed, known, judge, trained, as_overrides
) -> None:
    dead = (seed % 16, (seed // 16) % 16)
    norm = trained(momentum=momentum, updates=updates, constant=dead, seed=seed, batch=4)
    given_to_rule = as_overrides(norm) | ({} if known else {"momentum": None})
    finding = only(judge(given_to_rule, codes={"S105"}), "S105")
    if norm.running_var.min() >= 0.99:
        return  # one update of momentum 0.001: everything is still 1, and nothing can be told
    assert finding is not None
    assert set(finding.channels) == set(dead)
    shown = finding.evidence["momentum_shown"]
    assert (1 - shown) ** updates == pytest.approx((1 - momentum) ** updates, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    momentum=st.floats(0.0005, 0.3),
    updates=st.integers(1, 300),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 0.1, 1.0, 30.0]),
)
def test_a_channel_that_varied_is_never_taken_for_one_that_did_not(
    momentum, updates, seed, scale, judge, trained, as_overrides
) -> None:
    norm = trained(momentum=momentum, updates=updates, seed=seed, scale=scale, batch=32)
    assert only(judge(as_overrides(norm), codes={"S105"}), "S105") is None


@pytest.mark.parametrize("momentum", USUAL_MOMENTA)
def test_the_floor_of_a_decay_is_where_torch_stops(momentum, judge, as_overrides) -> None:
    step = 2.0**-149
    norm = torch.nn.BatchNorm1d(16, momentum=momentum)
    norm.running_var[3] = 3000 * step
    before = -1.0
    with torch.no_grad():
        batch = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        batch[:, 3] = 0.5
        while float(norm.running_var[3]) != before:
            before = float(norm.running_var[3])
            norm(batch)
    assert round(before / step) in floors(momentum)
    finding = only(judge(as_overrides(norm) | {"momentum": None}, codes={"S105"}), "S105")
    assert list(finding.channels) == [3]
    assert round(before / step) in floors(finding.evidence["momentum_shown"])


@settings(max_examples=30, deadline=None)
@given(momentum=st.floats(0.002, 0.5), updates=st.integers(1, 60))
def test_the_residue_is_what_torch_leaves_of_the_initial_one(momentum, updates, judge, as_overrides, trained) -> None:
    kept = trained(momentum=momentum, updates=updates, constant=(0,)).running_var[0].item()
    norm = trained(momentum=momentum, updates=updates)
    finding = only(judge(as_overrides(norm), codes={"S104"}), "S104")
    if kept < 0.00101:
        return
    assert finding.evidence["residue"] == pytest.approx(kept, rel=1e-5)
    expected = Severity.ERROR if kept >= 0.05 else Severity.WARNING if kept >= 0.01 else Severity.INFO
    assert finding.severity == expected


@settings(max_examples=30, deadline=None)
@given(momentum=st.floats(0.001, 0.5), updates=st.integers(1, 200), seed=st.integers(0, 99))
def test_buffers_that_started_at_one_never_contradict_their_momentum(
    momentum, updates, seed, judge, trained, as_overrides
) -> None:
    norm = trained(momentum=momentum, updates=updates, seed=seed, scale=0.05, constant=(1,))
    assert only(judge(as_overrides(norm), codes={"S115"}), "S115") is None


@settings(max_examples=20, deadline=None)
@given(momentum=st.sampled_from([0.001, 0.003, 0.01]), updates=st.integers(5, 60), seed=st.integers(0, 99))
def test_a_counter_that_was_reset_is_a_contradiction(momentum, updates, seed, judge, trained, as_overrides) -> None:
    norm = trained(momentum=0.3, updates=100, seed=seed, scale=0.1)  # the buffers now hold about 0.01
    given_to_rule = as_overrides(norm) | {"momentum": momentum, "num_batches_tracked": updates}
    report = judge(given_to_rule, codes={"S104", "S115"})
    finding = only(report, "S115")
    assert finding is not None and only(report, "S104") is None
    needed = finding.evidence["momentum_needed"]
    assert (1 - needed) ** updates == pytest.approx(float(norm.running_var.min()), rel=1e-4)


def slopes(norm: torch.nn.BatchNorm1d, eps: float) -> np.ndarray:
    """What an eval-mode BatchNorm multiplies each channel by, from its outputs."""
    arguments = (norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, eps)
    with torch.no_grad():
        double = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
        ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, norm.num_features)
        low, high = functional.batch_norm(ends, *double)
    return (high - low).numpy()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), channel=st.integers(0, 15), gain=st.floats(2.0, 50.0))
def test_gains_named_in_messages_are_those_of_torch(seed, channel, gain, judge, trained, as_overrides) -> None:
    norm = trained(updates=50, seed=seed)
    with torch.no_grad():
        norm.running_var[channel] = 3e-7
        norm.weight[channel] = gain
    report = judge(as_overrides(norm), codes={"S106", "A205"})
    below, huge = only(report, "S106"), only(report, "A205")
    assert below.evidence["worst_channel"] == channel
    assert below.evidence["gain"] == pytest.approx(slopes(norm, 1e-5)[channel], rel=1e-5)
    assert below.evidence["gain_with_other_eps"] == pytest.approx(slopes(norm, 1e-3)[channel], rel=1e-5)
    assert list(huge.channels) == [channel]
    assert huge.evidence["largest"] == pytest.approx(np.abs(slopes(norm, 1e-5)).max(), rel=1e-5)
    assert huge.evidence["median"] == pytest.approx(np.median(np.abs(slopes(norm, 1e-5))), rel=0.5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), wrong_by=st.sampled_from([0.0, 0.02, 0.2]))
def test_a_neutralised_norm_returns_its_input(seed, wrong_by, judge, trained, as_overrides) -> None:
    norm = trained(updates=50, seed=seed)
    with torch.no_grad():
        norm.weight.copy_((norm.running_var + norm.eps).sqrt() * (1 + wrong_by))
        norm.bias.copy_(norm.running_mean)
        inputs = torch.randn(64, 16) * norm.running_var.sqrt() + norm.running_mean
        off = (norm(inputs) - inputs).abs().max() / norm.running_var.sqrt().max()
    finding = only(judge(as_overrides(norm), codes={"A207"}), "A207")
    assert (finding is not None) == (wrong_by < 0.05)
    assert (float(off) < 1e-4) == (wrong_by == 0.0)
    if finding is not None:
        assert finding.evidence["neutralisation_index"] == pytest.approx(wrong_by, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_fp16_overflow_is_where_half_gives_infinity(data, judge) -> None:
    # Between 65504 and 65520 half() still rounds down: not asked for.
    value = st.one_of(st.floats(1.0, 65504.0, width=32), st.floats(2.0**17, 2.0**100, width=32))
    variances = np.array(data.draw(st.lists(value, min_size=16, max_size=16)), dtype=np.float32)
    becomes_infinite = torch.from_numpy(variances).half().isinf().numpy()
    finding = only(judge({"running_var": variances}, codes={"N401"}, precision="fp16"), "N401")
    assert (list(finding.channels) if finding else []) == list(np.flatnonzero(becomes_infinite))


@settings(max_examples=30, deadline=None)
@given(exponents=st.lists(st.integers(-40, 0), min_size=16, max_size=16), eps=st.sampled_from([1e-5, 1e-12]))
def test_fp16_underflow_is_where_half_gives_zero(exponents, eps, judge) -> None:
    variances = np.exp2(np.array(exponents, dtype=float))
    # 2^-25 is the tie between 0 and the smallest number: neither answer is wrong there.
    variances[variances == 2.0**-25] = 1.0
    half = torch.from_numpy(variances).half()
    finding = only(judge({"running_var": variances, "eps": eps}, codes={"N402"}, precision="fp16"), "N402")
    lost = np.flatnonzero((half == 0).numpy())
    assert (list(finding.channels) if finding else []) == list(lost)
    divides_by_zero = bool(((half + torch.tensor(eps).half()) == 0).any())
    assert (finding is not None and finding.severity is Severity.ERROR) == divides_by_zero


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), precision=st.sampled_from(["fp16", "bf16"]))
def test_a_mean_that_is_not_named_survives_rounding(seed, precision, judge) -> None:
    generator = np.random.default_rng(seed)
    mean = generator.standard_normal(16) * 10 ** generator.uniform(-1, 3, 16)
    var = generator.uniform(0.5, 2.0, 16)
    layer = {"running_mean": mean, "running_var": var}
    finding = only(judge(layer, codes={"N403"}, precision=precision), "N403")
    named = set(finding.channels) if finding else set()
    single = torch.from_numpy(mean.astype(np.float32))
    rounded = single.half() if precision == "fp16" else single.bfloat16()
    shift = ((rounded.double() - single.double()).abs() / torch.from_numpy(var).sqrt()).numpy()
    assert all(shift[channel] <= 0.05 for channel in range(16) if channel not in named)
    if finding is not None:
        assert shift.max() <= finding.evidence["largest_shift"] * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_a_cast_down_and_up_again_is_seen(seed, dtype, judge) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(64, generator=generator).to(dtype).float().numpy()
    var = (0.1 + torch.rand(64, generator=generator)).to(dtype).float().numpy()
    finding = only(judge({"channels": 64, "running_mean": mean, "running_var": var}, codes={"S113"}), "S113")
    assert (finding is not None) == (dtype is not torch.float32)
    if finding is not None:
        assert finding.evidence["fits"] == str(dtype).removeprefix("torch.")


def test_a_flag_changed_afterwards_leaves_the_buffers_in_use_but_not_updated(trained) -> None:
    """What C301 says of track_running_stats=False beside existing buffers."""
    norm = trained(updates=30)
    inputs = torch.randn(8, 16)
    before, kept = norm(inputs), norm.running_mean.clone()
    norm.track_running_stats = False
    assert torch.equal(norm(inputs), before), "eval uses the buffers"
    norm.train()(inputs + 5)
    assert torch.equal(norm.running_mean, kept), "training does not move them"


def test_without_buffers_the_answer_depends_on_the_batch() -> None:
    norm = torch.nn.BatchNorm1d(16, track_running_stats=False).eval()
    one = torch.randn(1, 16)
    assert not torch.allclose(norm(torch.cat([one, one + 1]))[0], norm(torch.cat([one, one - 3]))[0])


def test_mixed_types_are_refused_on_a_cpu(trained) -> None:
    """What C313 says."""
    norm = trained(updates=3)
    norm.weight.data, norm.bias.data = norm.weight.data.half(), norm.bias.data.half()
    with pytest.raises(RuntimeError, match="mixed dtype"):
        norm(torch.randn(4, 16))


def test_a_cumulative_average_restarts_when_the_counter_is_zero(trained) -> None:
    """What S111 says of momentum=None."""
    norm = trained(updates=30)
    norm.momentum, norm.num_batches_tracked = None, torch.tensor(0)
    batch = torch.randn(8, 16) + 40
    norm.train()(batch)
    assert torch.allclose(norm.running_mean, batch.mean(0), rtol=1e-5)


@settings(max_examples=5, deadline=None)
@given(momentum=st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_large_momentum_keeps_the_noise_of_one_batch(momentum, judge) -> None:
    """The share of a batch's noise that C303 names, against a simulated average."""
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.BatchNorm1d(4000, momentum=momentum, affine=False)
    for _ in range(40):
        norm(torch.randn(4, 4000, generator=generator))
    of_one_batch = 1 / 4
    finding = only(judge({"momentum": momentum}, codes={"C303"}), "C303")
    assert finding.evidence["noise_share"] == pytest.approx(float(norm.running_mean.var()) / of_one_batch, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), eps=st.sampled_from([0.05, 0.1, 0.5]))
def test_the_effect_of_another_eps_is_what_torch_computes(seed, eps, judge, trained, as_overrides) -> None:
    norm = trained(updates=60, seed=seed)
    layer = as_overrides(norm)
    report = judge(*[layer | {"eps": 1e-5} for _ in range(3)], layer | {"eps": eps}, codes={"C305"})
    changes = np.abs(slopes(norm, 1e-5) / slopes(norm, eps))
    finding = only(report, "C305")
    assert finding.layer == "bn3"
    # The rule takes the median of the logarithms: between the two middle channels that is nearly the same.
    middle = np.sort(changes)[7:9] - 1
    assert middle[0] * 0.999 <= finding.evidence["gain_change"] <= middle[1] * 1.001


def test_the_other_eps_for_a_keras_model_is_torchs(judge, trained, as_overrides) -> None:
    norm = trained(updates=50)
    with torch.no_grad():
        norm.running_var[3] = 5e-4
    finding = only(judge(as_overrides(norm) | {"eps": 1e-3}, codes={"S106"}), "S106")
    assert finding.evidence["gain"] == pytest.approx(slopes(norm, 1e-3)[3], rel=1e-5)
    assert finding.evidence["gain_with_other_eps"] == pytest.approx(slopes(norm, 1e-5)[3], rel=1e-5)


ADVERSARIAL = st.sampled_from(["one", "all but one", "two opposite", "random", "huge"])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    width=st.sampled_from([16, 33, 64]),
    kind=st.sampled_from([NormKind.LAYER, NormKind.RMS, NormKind.LAYER_OR_RMS]),
    zero_centred=st.booleans(),
    inputs=ADVERSARIAL,
)
def test_no_input_leaves_the_bound(seed, width, kind, zero_centred, inputs, judge) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, generator=generator, dtype=torch.float64)
    bias = torch.randn(width, generator=generator, dtype=torch.float64) if kind is NormKind.LAYER else None
    layer = {"kind": kind, "channels": width, "weight": weight.numpy(), "bias": None if bias is None else bias.numpy()}
    if kind is not NormKind.LAYER:
        layer["zero_centred"] = zero_centred
    finding = only(judge(layer, codes={"T711"}, precision="int8"), "T711")
    gain = weight + 1 if layer.get("zero_centred") else weight
    x = {
        "one": 1e3 * torch.eye(width, dtype=torch.float64),
        "all but one": 1e3 * (1 - torch.eye(width, dtype=torch.float64)),
        "two opposite": torch.eye(width, dtype=torch.float64) - torch.eye(width, dtype=torch.float64).roll(1, 1),
        "random": torch.randn(width, width, generator=generator, dtype=torch.float64),
        "huge": 1e9 * torch.randn(width, width, generator=generator, dtype=torch.float64),
    }[inputs]
    x = torch.cat([x, -x])
    if kind is NormKind.LAYER:
        outputs = functional.layer_norm(x, (width,), gain, bias, eps=0)
    else:
        outputs = functional.rms_norm(x, (width,), gain, eps=0)
    largest = float(outputs.abs().max())
    assert largest <= finding.evidence["largest"] * (1 + 1e-6)
    if inputs == "one":  # all the variance in one feature: the bound is reached
        assert largest >= finding.evidence["largest"] * (1 - 1e-6)


def test_a_group_of_one_is_an_instance_norm_and_constant_on_a_single_pixel(judge) -> None:
    """What T710 says."""
    group, instance = torch.nn.GroupNorm(16, 16), torch.nn.InstanceNorm2d(16, affine=True)
    with torch.no_grad():
        for norm in (group, instance):
            norm.weight.copy_(torch.linspace(0.5, 2, 16))
            norm.bias.copy_(torch.linspace(-1, 1, 16))
        maps, pixels = torch.randn(4, 16, 5, 5), 7 * torch.randn(4, 16, 1, 1)
        assert torch.allclose(group(maps), instance(maps), atol=1e-5)
        assert torch.allclose(group(pixels)[:, :, 0, 0], group.bias.expand(4, 16), atol=1e-2)
    assert only(judge({"kind": NormKind.GROUP, "groups": group.num_groups}, codes={"T710"}), "T710") is not None


def test_a_tracking_instance_norm_is_a_batch_norm_in_eval_and_not_in_training() -> None:
    """What C308 says."""
    norm = torch.nn.InstanceNorm2d(8, track_running_stats=True)
    images = torch.randn(4, 8, 6, 6) * torch.linspace(0.5, 4, 4).view(4, 1, 1, 1)
    trained_output = norm(images)
    norm.eval()
    as_batch_norm = functional.batch_norm(images, norm.running_mean, norm.running_var)
    assert torch.allclose(norm(images), as_batch_norm, atol=1e-6)
    assert not torch.allclose(norm(images), trained_output, atol=0.1)
    norm.track_running_stats = False
    assert torch.allclose(norm(images), trained_output, atol=1e-5), "the buffers are passed over"


def test_momentum_none_is_a_plain_average(trained) -> None:
    """What C304 says."""
    norm = torch.nn.BatchNorm1d(16, momentum=None)
    batches = torch.randn(20, 8, 16) + torch.linspace(0, 5, 20).view(20, 1, 1)
    for batch in batches:
        norm(batch)
    assert torch.allclose(norm.running_mean, batches.mean((0, 1)), atol=1e-5)


def test_no_gradient_does_not_hold_the_statistics(trained) -> None:
    """What C307 says."""
    norm = trained(updates=30).requires_grad_(False).train()
    before = norm.running_mean.clone()
    norm(torch.randn(8, 16) + 5)
    assert not torch.allclose(norm.running_mean, before, atol=0.1)


def test_a_synchronised_norm_computes_the_same_in_eval(trained) -> None:
    """What C309 says."""
    norm = trained(updates=30)
    inputs = torch.randn(8, 16)
    expected = norm(inputs)
    assert torch.equal(torch.nn.SyncBatchNorm.convert_sync_batchnorm(norm).eval()(inputs), expected)


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(1.5, 3.5), sign=st.sampled_from([-1, 1]), alpha=st.floats(0.1, 2.0))
def test_the_slope_that_a_shift_leaves_is_that_of_torch(shift, sign, alpha, judge) -> None:
    layer = {"kind": NormKind.DYNAMIC_TANH, "alpha": alpha, "inner_shift": sign * shift}
    finding = only(judge(layer, codes={"T709"}), "T709")
    x = torch.tensor([0.0, -sign * shift / alpha], dtype=torch.float64, requires_grad=True)
    torch.erf(alpha * x + sign * shift).sum().backward()
    at_zero, steepest = x.grad.tolist()
    assert finding.evidence["slope"] == pytest.approx(at_zero / steepest, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), updates=st.integers(2, 60), channels=st.sampled_from([8, 16, 40]))
def test_measured_statistics_are_never_taken_for_placeholders(seed, updates, channels, judge, trained, as_overrides):
    norm = trained(updates=updates, seed=seed, channels=channels)
    assert only(judge(as_overrides(norm), codes={"S107"}), "S107") is None


class Stack(torch.nn.Sequential):
    def __init__(self, spread: float) -> None:
        """Three norms whose inputs have standard deviations from `spread` to twice that."""
        linear = [torch.nn.Linear(16, 16) for _ in range(3)]
        with torch.no_grad():
            for layer in linear:
                layer.weight.copy_(torch.linalg.qr(torch.randn(16, 16)).Q * spread * torch.linspace(1, 2, 16)[:, None])
        super().__init__(*(m for layer in linear for m in (layer, torch.nn.BatchNorm1d(16))))

    def as_layers(self, as_overrides) -> list[dict]:
        return [as_overrides(module) for module in self if isinstance(module, torch.nn.BatchNorm1d)]


@pytest.mark.parametrize("spread", [0.1, 0.7, 3.0])
def test_buffers_that_update_bn_computed_are_no_sure_residue(spread, judge, as_overrides) -> None:
    """update_bn takes a plain average over 20 batches, counts them and puts momentum 0.1 back."""
    torch.manual_seed(0)
    net = Stack(spread)
    torch.optim.swa_utils.update_bn(torch.randn(20, 32, 16), net)
    layers = net.as_layers(as_overrides)
    assert {(layer["momentum"], int(layer["num_batches_tracked"])) for layer in layers} == {(0.1, 20)}
    found = judge(*layers, codes={"S104", "S115"}).findings
    if spread == 0.1:
        assert {finding.code for finding in found} == {"S115"}, "a variance below 0.9 ** 20 shows it"
        assert all("update_bn" in finding.message for finding in found)
    else:
        assert {(finding.code, finding.confidence) for finding in found} == {("S104", Confidence.MEDIUM)}


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_a_momentum_out_of_range_leaves_no_average(momentum) -> None:
    """What C315 says."""
    norm = torch.nn.BatchNorm1d(4, momentum=momentum)
    batch = 10 * torch.randn(8, 4) + 100
    norm(batch)
    mean = batch.mean(0)
    between = (norm.running_mean >= 0) & (norm.running_mean <= mean)
    assert not between.any()
