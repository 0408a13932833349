"""What `inspect --data` sees of a model: each field of the record, on nets where the right answer is known."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normdoctor as nd
from normdoctor.data.opening import open_data
from normdoctor.data.options import DataOptions
from normdoctor.errors import InputError, UsageError
from normdoctor.measured import Measured, Measurement
from normdoctor.measurement.measuring import Seen, measure
from normdoctor.measurement.opening import open_walker
from normdoctor.models.opening import RunOptions
from normdoctor.moments import Moments
from normdoctor.readers import open_checkpoint

from .test_lockstep import Residual, build, data_for

FIXTURES = Path(__file__).parents[2] / "fixtures"

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def look(model: Any, data: Any, *, key: str | None = None, trust: bool = False, **options: Any) -> Seen:
    asked = DataOptions(**options)
    with (
        open_checkpoint(model) as checkpoint,
        open_walker(model, checkpoint, RunOptions(key=key, trust=trust)) as opened,
        open_data(data, asked, opened.wanted) as dataset,
    ):
        return measure(opened, dataset, batch_size=asked.batch_size)


def settle(net: nn.Module, data: torch.Tensor) -> nn.Module:
    """The net with the statistics of this data, by torch's own means: cumulative averages of one batch, a norm after
    the other."""
    norms = [inner for inner in net.modules() if isinstance(inner, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    with torch.no_grad():
        net(data)
    for norm in norms:
        norm.momentum = 0.1
        norm.num_batches_tracked.fill_(5000)
    return net.eval()


def photos(count: int = 64, seed: int = 0) -> torch.Tensor:
    """RGB from 0 to 1, orange as a rule."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.tensor([0.8, 0.5, 0.1]).view(1, 3, 1, 1)
    light = 0.04 * torch.randn(count, 1, 1, 1, generator=generator)
    return (colour + light + 0.08 * torch.randn(count, 3, 12, 12, generator=generator)).clamp(0, 1)


def colour_net(data: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    return settle(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)),
        data,
    )


def standard(x: torch.Tensor) -> torch.Tensor:
    return (x - MEAN) / STD


PREPARATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor], str]] = {
    "forgot /255": (lambda x: x, lambda x: 255 * x, "divided by 255"),
    "/255 twice": (lambda x: x, lambda x: x / 255, "times 255"),
    "trained on 0..255": (lambda x: 255 * x, lambda x: x, "times 255"),
    "BGR": (standard, lambda x: standard(x[:, [2, 1, 0]]), ""),  # the mean of the other colour was taken: see below
    "swapped after": (standard, lambda x: standard(x)[:, [2, 1, 0]], "channels swapped (RGB and BGR)"),
    "forgot mean and std": (standard, lambda x: x, "normalised by ImageNet's mean and std"),
    "forgot both": (standard, lambda x: 255 * x, "divided by 255 and normalised by ImageNet's mean and std"),
    "mean and std too much": (lambda x: x, standard, "without a normalisation by ImageNet's mean and std"),
}


@pytest.mark.parametrize("case", PREPARATIONS)
def test_wrong_preprocessing_is_found(case: str) -> None:
    right, wrong, words = PREPARATIONS[case]
    net = colour_net(right(photos()))
    seen = look(net, wrong(photos(seed=1)), batch_size=16).measurement
    tried = {one.words: one.divergence for one in seen.preprocessing}
    assert next(iter(tried)) == "as given"
    best = min(tried, key=lambda name: tried[name])
    if words:
        assert best == words and tried[best] < 0.05 < tried["as given"] / 10
    else:  # the two means differ little, so swapping still comes near
        assert best == "channels swapped (RGB and BGR)" and tried[best] < tried["as given"]
    assert not look(net, right(photos(seed=1)), batch_size=16).measurement.preprocessing


def test_preprocessing_is_found_by_the_rule() -> None:
    net = colour_net(photos())
    report = nd.inspect(net, data=255 * photos(seed=1), batch_size=16)
    (finding,) = [finding for finding in report.findings if finding.code == "D608"]
    assert "255" in finding.message
    assert not [finding for finding in nd.inspect(net, data=photos(seed=1)).findings if finding.code == "D608"]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_preprocessing_beside_broken_buffers(poison: float) -> None:
    net = colour_net(photos())
    net[1].running_mean[2] = poison
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not look(net, photos(seed=1), batch_size=16).measurement.preprocessing
        assert look(net, 255 * photos(seed=1), batch_size=16).measurement.preprocessing


# what each norm saw


def test_the_record_of_a_norm() -> None:
    net, data = build("residual"), data_for("residual", 70)
    seen = look(net, list(data.split(7)))
    inputs: dict[str, list[torch.Tensor]] = {}
    shares: dict[str, list[torch.Tensor]] = {}
    for name, norm in net.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.register_forward_hook(
                lambda _, x, y, name=name: (
                    inputs.setdefault(name, []).append(x[0]) or shares.setdefault(name, []).append(y > 0)
                )
            )
    with torch.no_grad():
        for part in data.split(7):
            net(part)
    assert tuple(inputs) == seen.measurement.order and seen.layers.keys() == inputs.keys()
    for name, parts in inputs.items():
        record, whole = seen.layers[name], Moments.of(torch.cat(parts).numpy())
        assert (record.samples, record.batches, record.calls) == (70, 10, 1)
        np.testing.assert_allclose(record.moments.mean, whole.mean, atol=1e-6)
        np.testing.assert_allclose(record.moments.variance(), whole.variance(), rtol=1e-6)
        of_batches = [Moments.of(part.numpy()) for part in parts]
        assert record.mean_spread is not None and record.var_spread is not None
        np.testing.assert_allclose(record.mean_spread, np.std([m.mean for m in of_batches], axis=0, ddof=1), rtol=1e-4)
        spread = np.std([m.variance() for m in of_batches], axis=0, ddof=1)
        np.testing.assert_allclose(record.var_spread, spread, rtol=1e-4)
        means = torch.cat(parts).flatten(2).mean(2) if parts[0].ndim > 2 else torch.cat(parts)
        effective = 70 * whole.variance() / means.double().numpy().var(0, ddof=1)
        assert record.effective is not None and record.active is not None
        np.testing.assert_allclose(record.effective, np.clip(effective, 1, whole.count), rtol=1e-4)
        positive = torch.cat(shares[name]).transpose(0, 1).flatten(1).double().mean(1)
        np.testing.assert_allclose(record.active, positive, atol=1e-6)


def test_effective_values_are_the_pixels_or_the_samples() -> None:
    """White noise: every pixel tells something new. Images of one colour: only every image does."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(128, 4, 8, 8, generator=generator)
    flat = torch.randn(128, 4, 1, 1, generator=generator).expand(-1, -1, 8, 8)
    net = nn.Sequential(nn.BatchNorm2d(4)).eval()
    for data, wanted in ((noise, 128 * 64), (flat, 128)):
        effective = look(net, data).layers["0"].effective
        assert effective is not None
        assert np.median(effective) == pytest.approx(wanted, rel=0.25)


@pytest.mark.parametrize("name", ["frozen", "synchronised"])
def test_other_classes_are_looked_at_too(name: str) -> None:
    """What is active behind them is found by calling them, which must not stop there again."""
    seen = look(build(name), data_for(name, 40), batch_size=8)
    assert len(seen.layers) == 6
    for record in seen.layers.values():
        assert record.active is not None and ((record.active > 0) & (record.active < 1)).any()


def test_few_samples_leave_things_unsaid() -> None:
    net = build("residual")
    one = look(net, data_for("residual", 1)).layers["bn0"]
    assert one.effective is None and one.mean_spread is None and one.var_spread is None
    assert one.moments.count == 144
    few = look(net, data_for("residual", 12), batch_size=4).layers["bn0"]
    assert few.effective is not None and few.mean_spread is not None


def test_layers_that_are_left() -> None:
    class Partly(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.BatchNorm2d(4)
            self.instance = nn.InstanceNorm2d(3, track_running_stats=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.instance(x))

    seen = look(Partly().eval(), data_for("residual", 8))
    assert seen.measurement.left["spare"] == "never reached with this data"
    assert "InstanceNorm" in seen.measurement.left["instance"]
    assert "spare" not in seen.layers


# outputs


def healthy(nets: ModuleType) -> nn.Module:
    module: nn.Module = torch.load(FIXTURES / "healthy_module.pt", weights_only=False)
    return module


def digits(nets: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    data = nets.load_digits_split()
    return data.test_images.numpy(), data.test_labels.numpy()


def test_disagreement_and_accuracy(nets: ModuleType) -> None:
    net = healthy(nets)
    images, labels = digits(nets)
    batches = [(torch.from_numpy(images[i : i + 64]), torch.from_numpy(labels[i : i + 64])) for i in range(0, 512, 64)]
    seen = look(net, batches).measurement
    other = copy.deepcopy(net).train()
    differing, change = [], []
    with torch.no_grad():
        right = torch.cat([net(x).argmax(1) == y for x, y in batches]).float().mean().item()
        for x, _ in batches:
            before, after = net(x), other(x)
            differing.append((before.argmax(1) != after.argmax(1)).float().mean().item())
            change.append(((before - after).norm() / before.norm()).item())
    assert seen.accuracy == pytest.approx(right)
    assert seen.disagreement == pytest.approx(np.mean(differing), abs=2e-3)
    assert seen.output_change == pytest.approx(np.mean(change), rel=1e-3)
    sick = copy.deepcopy(net)
    sick.bn1.running_var *= 30
    worse = look(sick, batches).measurement
    assert worse.disagreement is not None and worse.output_change is not None
    assert worse.disagreement > 3 * np.mean(differing) and worse.output_change > 2 * np.mean(change)


def test_nets_without_scores() -> None:
    seen = look(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), photos(16)).measurement
    assert seen.disagreement is None and seen.accuracy is None and seen.output_change is not None


def test_nan_on_the_way_is_no_failure() -> None:
    """S101 says what is wrong; the rest is said as far as it can be."""
    net = colour_net(photos())
    net[1].running_mean[2] = torch.nan
    seen = look(net, photos(seed=1), batch_size=8)
    assert np.isfinite(seen.layers["1"].moments.mean).all()
    assert seen.measurement.disagreement == 1.0  # NaN agrees with nothing


def test_order_dependence(tmp_path: Path, nets: ModuleType) -> None:
    """A module that was saved with a norm in training mode gives a sample another output beside other samples."""
    images, _ = digits(nets)
    net = healthy(nets)
    net.bn1.train()
    torch.save(net, tmp_path / "mixed.pt")
    mixed = look(tmp_path / "mixed.pt", torch.from_numpy(images[:64]), trust=True).measurement
    assert mixed.order_dependence is not None and mixed.order_dependence > 1e-3
    torch.save(healthy(nets), tmp_path / "eval.pt")
    assert look(tmp_path / "eval.pt", torch.from_numpy(images[:64]), trust=True).measurement.order_dependence is None
    live = healthy(nets).train()  # its mode is that of the moment
    assert look(live, torch.from_numpy(images[:64])).measurement.order_dependence is None


# norms without statistics


def tokens(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(32, 10, 16, generator=torch.Generator().manual_seed(0))


def record(net: nn.Module, data: torch.Tensor, name: str = "0") -> Measured:
    return look(net, data).layers[name]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_starved_tokens(norm: Any) -> None:
    net = nn.Sequential(norm(16, eps=1e-5), nn.Linear(16, 4)).eval()
    assert record(net, tokens()).starved == 0
    data = tokens()
    data[:8] *= 1e-4  # of variance 1e-8
    found = record(net, data)
    assert found.starved == 0.25 and found.saturated is None
    assert found.input_sd == pytest.approx(data.std().item(), rel=1e-2)


def test_a_layer_norm_of_constant_tokens_is_starved_and_an_rms_norm_is_not() -> None:
    data = torch.full((4, 10, 16), 3.0)
    assert record(nn.Sequential(nn.LayerNorm(16)).eval(), data).starved == 1
    assert record(nn.Sequential(nn.RMSNorm(16)).eval(), data).starved == 0


def test_saturated_tanh(nets: ModuleType) -> None:
    for scale in (0.1, 1.0, 3.0):
        net = nn.Sequential(nets.DynamicTanh(16, alpha=0.5)).eval()
        data = tokens(scale)
        x = 0.5 * data
        wanted = ((1 - torch.tanh(x).square()) < 0.1).float().mean().item()
        found = record(net, data)
        assert found.saturated == pytest.approx(wanted, abs=1e-3) and found.starved is None


def test_layer_norm_is_bent_where_tokens_differ_in_size() -> None:
    """Outliers are pressed down as tanh does it; tokens of one size are only scaled."""
    data = tokens()
    net = nn.Sequential(nn.LayerNorm(16)).eval()
    straight = record(net, data)
    sizes = torch.logspace(-1, 1.5, 32).view(-1, 1, 1)
    bent = record(net, data * sizes)
    assert straight.linear_fit is not None and straight.linear_fit > 0.9
    assert bent.linear_fit is not None and bent.tanh_fit is not None
    assert bent.tanh_fit > bent.linear_fit and bent.linear_fit < 0.8


def test_transformers_of_the_fixtures(nets: ModuleType) -> None:
    images, _ = digits(nets)
    for name in ("transformer_module.pt", "transformer_dyt_module.pt"):
        seen = look(FIXTURES / name, torch.from_numpy(images[:64]), trust=True)
        assert len(seen.layers) == 5 and not seen.measurement.left
        for found in seen.layers.values():
            assert found.calls == 1 and found.samples == 64
            assert (found.saturated is None) == ("dyt" not in name)


# data


def test_data_at_fault() -> None:
    net = build("residual")
    data = data_for("residual", 8)
    data[5, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="5"):
        look(net, data)
    seen = look(net, data, drop_nonfinite=True).measurement
    assert seen.samples == 7 and any("1 sample left out" in note for note in seen.notes)
    with pytest.raises(UsageError, match="uint8"):
        look(net, np.zeros((4, 3, 12, 12), np.uint8))


def test_measurement_says_what_it_saw() -> None:
    seen: Measurement = look(build("residual"), data_for("residual", 40), batch_size=16, samples=30).measurement
    assert seen.samples == 30 and seen.batches == 2 and "3 x 12 x 12" in seen.data
