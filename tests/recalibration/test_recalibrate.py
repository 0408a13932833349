"""`recalibrate` with data on really trained nets: what it repairs, in every format, and that nothing else changes."""

from __future__ import annotations

import copy
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normdoctor as nd
from normdoctor.readers import open_checkpoint
from normdoctor.recalibration.estimating import raised_counter
from normdoctor.recalibration.records import MeasuredReport
from normdoctor.reports.recalibration_wording import scarcity
from tests.measurement.test_lockstep import Statistics, definition, norms_of, state_of

FIXTURES = Path(__file__).parents[2] / "fixtures"
DATA = FIXTURES / "digits.npz"
ARCH = "nets:ResNet"

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def net(nets: ModuleType) -> nn.Module:
    return load_module("healthy_module.pt")


def load_module(name: str) -> nn.Module:
    loaded: nn.Module = torch.load(FIXTURES / name, weights_only=False)
    return loaded


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.from_numpy(np.load(DATA)["x"])


@pytest.fixture(scope="session")
def of_slow(nets: ModuleType, images: torch.Tensor) -> Statistics:
    """What the fixtures slow_momentum.* should hold."""
    return definition(load_module("slow_momentum_module.pt"), images, double=True, size=512)


def report_of(result: nd.Recalibration) -> MeasuredReport:
    assert isinstance(result.report, MeasuredReport)
    return result.report


@torch.no_grad()
def answers(net: nn.Module, nets: ModuleType) -> np.ndarray:
    """Whether each of the held-out digits comes out right."""
    data = nets.load_digits_split()
    net = copy.deepcopy(net).eval()
    dtype = next(net.parameters()).dtype
    return np.asarray((net(data.test_images.to(dtype)).argmax(1) == data.test_labels).numpy())


def assert_alike(found: np.ndarray, wanted: np.ndarray) -> None:
    """Within two paired standard errors."""
    changed = int((found != wanted).sum())
    assert abs(int(found.sum()) - int(wanted.sum())) <= 2 * math.sqrt(changed)


def reset(net: nn.Module) -> None:
    for norm in norms_of(net).values():
        norm.reset_running_stats()


def with_statistics_of(net: nn.Module, images: torch.Tensor, momentum: float | None, size: int) -> None:
    """As training at this momentum leaves them, weights kept."""
    reset(net)
    for norm in norms_of(net).values():
        norm.momentum = momentum
    net.train()
    with torch.no_grad():
        for part in images.split(size):
            net(part)
    net.eval()


# what is repaired


def slow(net: nn.Module, images: torch.Tensor, nets: ModuleType) -> None:
    with_statistics_of(net, images[:320], 0.001, 32)


def momentum_0(net: nn.Module, images: torch.Tensor, nets: ModuleType) -> None:
    with_statistics_of(net, images, 0.0, 32)


def momentum_none(net: nn.Module, images: torch.Tensor, nets: ModuleType) -> None:
    """A plain average over the whole training: half of it is of weights that were other ones."""
    with_statistics_of(net, 3 * images + 1, None, 32)


def momentum_1(net: nn.Module, images: torch.Tensor, nets: ModuleType) -> None:
    with_statistics_of(net, images[:40], 1.0, 8)


def one_batch(net: nn.Module, images: torch.Tensor, nets: ModuleType) -> None:
    with_statistics_of(net, images[:8], None, 8)
    for norm in norms_of(net).values():
        norm.momentum = 0.1


def poison(mean: float, var: float) -> Callable[[nn.Module, torch.Tensor, ModuleType], None]:
    def poison(net: nn.Module, images: torch.Tensor, nets: ModuleType) -> None:
        for norm in (net.bn1, net.layer2[0].bn2):
            norm.running_mean[3] = mean
            norm.running_var[5] = var

    return poison


def half(net: nn.Module, images: torch.Tensor, nets: ModuleType) -> None:
    slow(net, images, nets)
    net.half()


def averaged(net: nn.Module, images: torch.Tensor, nets: ModuleType) -> None:
    """The mean of the weights of two nets that went different ways, with the buffers of before."""
    others = [nets.train(copy.deepcopy(net).train(), epochs=1, lr=0.2, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.copy_(sum(other.get_parameter(name) for other in others) / 2)


def another_epoch(net: nn.Module, images: torch.Tensor, nets: ModuleType) -> None:
    """Weights went on, buffers stayed."""
    other = nets.train(copy.deepcopy(net).train(), epochs=1, lr=0.2, seed=3)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.copy_(other.get_parameter(name))


BREAKAGES: dict[str, Callable[[nn.Module, torch.Tensor, ModuleType], None]] = {
    "reset": lambda net, images, nets: reset(net),
    "slow momentum": slow,
    "momentum 0": momentum_0,
    "momentum None": momentum_none,
    "momentum 1": momentum_1,
    "one batch": one_batch,
    "nan": poison(torch.nan, torch.nan),
    "inf": poison(torch.inf, torch.inf),
    "negative variance": poison(0.0, -2.0),
    "half precision": half,
    "averaged weights": averaged,
    "another epoch": another_epoch,
}

SILENT = {"averaged weights"}
"""What `inspect` need not see: the buffers of before fit the averaged weights nearly."""

ABOUT_STATISTICS = ("S1", "D6")


def judged(path: Path, images: torch.Tensor) -> set[str]:
    report = nd.inspect(path, data=images, trust=True, batch_size=64)
    codes = {found.code for found in report.findings if found.code.startswith(ABOUT_STATISTICS)}
    return codes - {"D606"}  # how much the data is worth


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_repaired_to_the_accuracy_of_exact_statistics(
    breakage: str, net: nn.Module, nets: ModuleType, images: torch.Tensor, tmp_path: Path
) -> None:
    images = images[:256]
    BREAKAGES[breakage](net, images, nets)
    sick, fixed = tmp_path / "sick.pt", tmp_path / "fixed.pt"
    torch.save(net, sick)
    found = judged(sick, images)
    assert found or breakage in SILENT
    report = report_of(nd.recalibrate(sick, images, output=fixed, trust=True))
    assert report.samples == 256 and len(report.rows) == len(norms_of(net)) and not report.left
    repaired: nn.Module = torch.load(fixed, weights_only=False)
    true = copy.deepcopy(net).float()
    wanted = definition(true, images, double=True, size=256)
    for name, (mean, var) in wanted.items():
        norm, same = norms_of(true)[name], norms_of(repaired)[name]
        norm.running_mean.copy_(torch.from_numpy(mean))
        norm.running_var.copy_(torch.from_numpy(var))
        tolerance = 5e-3 if breakage == "half precision" else 2e-6
        assert (np.abs(same.running_mean.double().numpy() - mean) / np.sqrt(var)).max() <= tolerance
        assert np.abs(np.log(same.running_var.double().numpy() / var)).max() <= tolerance
    assert_alike(answers(repaired, nets), answers(true, nets))
    left = judged(fixed, images) & found
    if breakage == "momentum 0":
        left -= {"S105"}  # momentum 0 stays: the buffers are right now, and would not follow further training
    assert not left
    worst = max(row.residual_shift or 0 for row in report.rows), max(row.residual_ratio or 0 for row in report.rows)
    assert max(worst) < (5e-3 if breakage == "half precision" else 1e-6)


@pytest.mark.parametrize("name", ["slow_momentum.pt", "nan_statistics.pt", "never_updated.pt"])
def test_the_fixtures(name: str, nets: ModuleType, tmp_path: Path) -> None:
    sick, fixed = FIXTURES / name, tmp_path / name
    before = {finding.code for finding in nd.inspect(sick).findings if finding.code.startswith("S1")}
    result = nd.recalibrate(sick, DATA, arch=ARCH, labels="labels", output=fixed)
    after = {finding.code for finding in nd.inspect(fixed).findings}
    assert before and not before & after
    judgement = report_of(result).judgement
    assert judgement is not None and judgement.accuracy is not None
    assert judgement.accuracy.after > judgement.accuracy.before + 0.05


def test_a_healthy_net_changes_little(net: nn.Module, nets: ModuleType) -> None:
    before = answers(net, nets)
    report = report_of(nd.recalibrate(net, DATA))
    assert max(row.shift for row in report.rows) < 0.3
    assert_alike(answers(net, nets), before)


# every format


def changed_bytes(one: Path, other: Path) -> int:
    first, second = np.fromfile(one, np.uint8), np.fromfile(other, np.uint8)
    assert len(first) == len(second)
    return int((first != second).sum())


def tensors(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {reference.name: reference.array.numpy() for reference in checkpoint.list_references()}


def slow_state() -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(FIXTURES / "slow_momentum.pt")
    return state


def write_legacy(path: Path) -> None:
    torch.save(slow_state(), path, _use_new_zipfile_serialization=False)


def write_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(slow_state(), path, metadata={"made": "by somebody"})


def write_module(path: Path) -> None:
    torch.save(load_module("slow_momentum_module.pt"), path)


def write_legacy_module(path: Path) -> None:
    torch.save(load_module("slow_momentum_module.pt"), path, _use_new_zipfile_serialization=False)


def copied(name: str) -> Callable[[Path], object]:
    return lambda path: shutil.copy(FIXTURES / name, path)


FILES: dict[str, tuple[str, Callable[[Path], object], dict[str, Any]]] = {
    "zip": ("m.pt", copied("slow_momentum.pt"), {"arch": ARCH}),
    "legacy": ("m.pth", write_legacy, {"arch": ARCH}),
    "module": ("m.pt", write_module, {"trust": True}),
    "legacy module": ("m.pt", write_legacy_module, {"trust": True}),
    "safetensors": ("m.safetensors", write_safetensors, {"arch": ARCH}),
    "pt2": ("m.pt2", copied("slow_momentum.pt2"), {}),
    "traced": ("m.pt", copied("slow_momentum_traced.pt"), {}),
}


@pytest.mark.parametrize("form", FILES)
def test_only_the_buffers_and_their_checksums_change(form: str, of_slow: Statistics, tmp_path: Path) -> None:
    name, write, options = FILES[form]
    sick, fixed = tmp_path / name, tmp_path / f"fixed{Path(name).suffix}"
    write(sick)
    original = sick.read_bytes()
    result = nd.recalibrate(sick, DATA, output=fixed, **options)
    assert result.path == fixed and result.method == "exact"
    assert sick.read_bytes() == original
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, fixed.name])
    with open_checkpoint(sick) as before, open_checkpoint(fixed) as after:
        assert [layer.name for layer in after.layers] == [layer.name for layer in before.layers]
        payload = 0
        for old, new in zip(before.layers, after.layers, strict=True):
            mean, var = of_slow[old.path]
            assert new.numbers.mean is not None and new.numbers.var is not None
            tolerance = 1e-5 if form in ("pt2", "traced") else 1e-6
            assert (np.abs(new.numbers.mean - mean) / np.sqrt(var)).max() <= tolerance
            assert np.abs(np.log(new.numbers.var / var)).max() <= tolerance
            for field in ("running_mean", "running_var", "num_batches_tracked"):
                array = getattr(old, field)
                payload += 0 if array is None else array.nbytes
            counter = raised_counter(old, None)
            if counter is not None:
                assert new.numbers.updates == counter
            for field in ("weight", "bias"):
                one, other = getattr(old, field), getattr(new, field)
                assert (one is None) == (other is None)
                assert one is None or np.array_equal(one.numpy(), other.numpy())
        records = 2 * 4 * 3 * len(before.layers)  # of a zip: a checksum in front of the record and one in the index
    assert 0 < changed_bytes(sick, fixed) <= payload + (records if zipfile.is_zipfile(sick) else 0)
    if zipfile.is_zipfile(sick):
        with zipfile.ZipFile(fixed) as archive:
            assert archive.testzip() is None
    again = nd.recalibrate(fixed, DATA, dry_run=True, **options)
    assert max(row.worst_shift for row in report_of(again).rows) < 1e-5  # a fixed point


def test_onnx(images: torch.Tensor, tmp_path: Path) -> None:
    sick, fixed = FIXTURES / "slow_momentum.onnx", tmp_path / "fixed.onnx"
    original = sick.read_bytes()
    report = report_of(nd.recalibrate(sick, DATA, labels="labels", output=fixed))
    assert sick.read_bytes() == original and [path.name for path in tmp_path.iterdir()] == ["fixed.onnx"]
    old, new = onnx.load(sick).graph, onnx.load(fixed).graph
    assert [node.op_type for node in old.node] == [node.op_type for node in new.node]
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer} for graph in (old, new)
    )
    inputs = {place: node.input[place] for node in new.node if node.op_type == "BatchNormalization" for place in (3, 4)}
    statistics = {node.input[place] for node in new.node if node.op_type == "BatchNormalization" for place in inputs}
    for name, values in before.items():
        if name not in statistics:
            np.testing.assert_array_equal(after[name], values)
    assert report.judgement is not None and report.judgement.accuracy is not None
    assert report.judgement.accuracy.after > 0.9
    wanted = definition(load_module("slow_momentum_module.pt"), images, double=True, size=512, ddof=0)
    with open_checkpoint(fixed) as checkpoint:
        for layer, (mean, var) in zip(checkpoint.layers, wanted.values(), strict=True):
            assert layer.numbers.mean is not None and layer.numbers.var is not None
            assert (np.abs(layer.numbers.mean - mean) / np.sqrt(var)).max() <= 1e-5
            assert np.abs(np.log(layer.numbers.var / var)).max() <= 1e-5


def test_shards(of_slow: Statistics, tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "net"
    folder.mkdir()
    state = slow_state()
    names = list(state)
    places = {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text("{}")
    original = {path.name: path.read_bytes() for path in folder.iterdir()}
    nd.recalibrate(folder, DATA, arch=ARCH, output=tmp_path / "fixed")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == original
    assert {path.name for path in (tmp_path / "fixed").iterdir()} == original.keys()
    assert (tmp_path / "fixed" / "config.json").read_text() == "{}"
    for name in original:
        if name.endswith(".safetensors"):
            for key, value in load_file(tmp_path / "fixed" / name).items():
                layer, _, leaf = key.rpartition(".")
                if leaf not in BUFFERS:
                    assert torch.equal(value, state[key])
                elif leaf == "running_mean":
                    mean, var = of_slow[layer]
                    assert (np.abs(value.double().numpy() - mean) / np.sqrt(var)).max() <= 1e-6


def test_a_distributed_checkpoint(nets: ModuleType, tmp_path: Path) -> None:
    reset_folder, fixed = tmp_path / "sick", tmp_path / "fixed"
    shutil.copytree(FIXTURES / "healthy_distributed", reset_folder)
    report = report_of(nd.recalibrate(reset_folder, DATA, arch=ARCH, output=fixed))
    assert len(report.rows) == 9 and fixed.is_dir()
    one = {path.name: path.stat().st_size for path in reset_folder.iterdir()}
    assert one == {path.name: path.stat().st_size for path in fixed.iterdir()}
    again = report_of(nd.recalibrate(fixed, DATA, arch=ARCH, dry_run=True))
    assert max(row.worst_shift for row in again.rows) < 1e-5


def test_a_program_with_a_fixed_batch_takes_whole_batches(net: nn.Module, images: torch.Tensor, tmp_path: Path) -> None:
    reset(net)
    torch.export.save(torch.export.export(net, (images[:32],)), tmp_path / "m.pt2")
    report = report_of(nd.recalibrate(tmp_path / "m.pt2", images[:100], output=tmp_path / "f.pt2"))
    assert (report.samples, report.batches) == (96, 3)
    assert any("4 samples left out" in note for note in report.notes)
    with pytest.raises(nd.UsageError, match="takes batches of 32"):
        nd.recalibrate(tmp_path / "m.pt2", images[:20], output=tmp_path / "g.pt2")
    assert not (tmp_path / "g.pt2").exists()


def test_a_script_that_branches_on_its_data(images: torch.Tensor, tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool(x.mean() > 0):
                x = self.norm(x)
            return x

    torch.jit.save(torch.jit.script(Branching().eval()), tmp_path / "m.pt")
    with pytest.raises(nd.RefusedError) as caught:
        nd.recalibrate(tmp_path / "m.pt", torch.cat([images + 3, images - 3]), output=tmp_path / "f.pt")
    assert "one-pass" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_modes_in_a_file_are_kept(nets: ModuleType, tmp_path: Path) -> None:
    nd.recalibrate(FIXTURES / "mixed_mode_module.pt", DATA, trust=True, output=tmp_path / "f.pt")
    modes = [
        [inner.training for inner in torch.load(path, weights_only=False).modules()]
        for path in (FIXTURES / "mixed_mode_module.pt", tmp_path / "f.pt")
    ]
    assert modes[0] == modes[1] and True in modes[0]


def test_onnx_with_external_data(images: torch.Tensor, tmp_path: Path) -> None:
    sick = FIXTURES / "healthy_external.onnx"
    report = report_of(nd.recalibrate(sick, images, output=tmp_path / "f.onnx"))
    assert max(row.residual_shift or 0 for row in report.rows) < 1e-5
    again = report_of(nd.recalibrate(tmp_path / "f.onnx", images, dry_run=True))
    assert max(row.worst_shift for row in again.rows) < 1e-5


def test_counters(net: nn.Module, nets: ModuleType, tmp_path: Path) -> None:
    """Raised to where no residue of the initial values is left, as debias does; or kept."""
    for norm in norms_of(net).values():
        norm.num_batches_tracked.fill_(3)
    torch.save(net.state_dict(), tmp_path / "m.pt")
    for keep in (False, True):
        nd.recalibrate(tmp_path / "m.pt", DATA, arch=ARCH, output=tmp_path / "f.pt", overwrite=True, keep_counters=keep)
        counters = {int(v) for k, v in torch.load(tmp_path / "f.pt").items() if k.endswith("tracked")}
        assert counters == ({3} if keep else {88})  # 0.9^88 < 1e-4


# live modules


@pytest.mark.parametrize("method", ["exact", "one-pass", "blend"])
def test_a_live_module_is_repaired_in_place(method: Any, net: nn.Module, images: torch.Tensor) -> None:
    reset(net)
    net.train()
    net.layer1.eval()
    buffers = {name: id(buffer) for name, buffer in net.named_buffers()}
    modes = [module.training for module in net.modules()]
    weights = {name: weight.clone() for name, weight in net.named_parameters()}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=50)
    result = nd.recalibrate(net, loader, method=method)
    assert result.module is net and result.path is None
    assert {name: id(buffer) for name, buffer in net.named_buffers()} == buffers
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in net.named_parameters())
    assert all(norm.running_mean.abs().sum() > 0 for norm in norms_of(net).values())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_dry_run_changes_nothing(net: nn.Module, images: torch.Tensor, tmp_path: Path) -> None:
    reset(net)
    before = state_of(net)
    report = report_of(nd.recalibrate(net, images, dry_run=True))
    assert report.dry_run and report.judgement is not None and len(report.rows) == 9
    assert state_of(net) == before
    torch.save(net, tmp_path / "m.pt")
    nd.recalibrate(tmp_path / "m.pt", images, dry_run=True, trust=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_some_layers(net: nn.Module, images: torch.Tensor) -> None:
    """The others keep theirs, and what is measured is what they then give."""
    reset(net)
    net.bn1.running_mean.fill_(0.25)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    report = report_of(nd.recalibrate(net, images, layer=["layer3.*", "layer2.0.bn1"]))
    rows = {row.layer for row in report.rows}
    assert rows == {"layer2.0.bn1", "layer3.0.bn1", "layer3.0.bn2", "layer3.0.downsample.1"}
    changed = {n.rpartition(".")[0] for n, buffer in net.named_buffers() if not torch.equal(buffer, before[n])}
    assert changed == rows
    inputs = []
    net.layer3[0].bn1.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    with torch.no_grad():
        net.eval()(images)
    np.testing.assert_allclose(net.layer3[0].bn1.running_mean, inputs[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    with pytest.raises(nd.UsageError, match="no layer matches layer9"):
        nd.recalibrate(net, images, layer="layer9.*")


def test_one_pass_and_until(net: nn.Module, images: torch.Tensor) -> None:
    whole = report_of(nd.recalibrate(copy.deepcopy(net), images, method="one-pass", batch_size=16))
    assert whole.batches == 32 and not whole.stopped_early
    part = report_of(nd.recalibrate(copy.deepcopy(net), images, method="one-pass", batch_size=16, until=0.12))
    assert part.stopped_early and 2 <= part.batches < 32
    assert all(row.standard_error is not None and row.standard_error < 0.12 for row in part.rows)


def test_blend_lies_between(net: nn.Module, images: torch.Tensor) -> None:
    stored, mixed, measured = copy.deepcopy(net), copy.deepcopy(net), copy.deepcopy(net)
    dark = 0.3 * images[:64]
    nd.recalibrate(mixed, dark, method="blend", prior=192)
    nd.recalibrate(measured, dark, force=True)
    for field in ("running_mean", "running_var"):
        old, new, both = (getattr(one.bn1, field) for one in (stored, measured, mixed))
        torch.testing.assert_close(both, 0.75 * old + 0.25 * new, rtol=1e-4, atol=1e-6)


def test_key(net: nn.Module, nets: ModuleType, tmp_path: Path) -> None:
    average = copy.deepcopy(net)
    reset(average)
    torch.save({"model": net.state_dict(), "ema": average.state_dict(), "epoch": 3}, tmp_path / "m.pt")
    with pytest.raises(nd.UsageError, match="holds 2 models") as caught:
        nd.recalibrate(tmp_path / "m.pt", DATA, arch=ARCH, output=tmp_path / "f.pt")
    assert "ema" in caught.value.hint
    assert not (tmp_path / "f.pt").exists()
    result = nd.recalibrate(tmp_path / "m.pt", DATA, arch=ARCH, key="ema", output=tmp_path / "f.pt")
    assert len(report_of(result).rows) == 9 and not report_of(result).left
    content = torch.load(tmp_path / "f.pt")
    assert content["epoch"] == 3
    for name, value in net.state_dict().items():
        assert torch.equal(content["model"][name], value)
    assert content["ema"]["bn1.running_mean"].abs().sum() > 0


# refused, with nothing written


@pytest.fixture
def untouched(tmp_path: Path, net: nn.Module) -> Iterator[Path]:
    """A file that is the only one in its folder, before and after, with the same bytes."""
    folder = tmp_path / "alone"
    folder.mkdir()
    path = folder / "m.pt"
    torch.save(net, path)
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before
    assert [entry.name for entry in folder.iterdir()] == ["m.pt"]


def test_few_samples_are_refused_and_some_are_warned_of(untouched: Path, images: torch.Tensor) -> None:
    with pytest.raises(nd.RefusedError, match=r"layer\S+: saw .* independent values a channel in 8 samples") as caught:
        nd.recalibrate(untouched, images[:8], trust=True)
    assert "--force" in caught.value.hint and "blend" in caught.value.hint
    for count, options in ((8, {"force": True}), (40, {})):
        report = report_of(nd.recalibrate(untouched, images[:count], trust=True, dry_run=True, **options))
        found = scarcity(report)
        assert found is not None and found.severe == (count == 8)


def test_memory_names_the_samples_that_fit(untouched: Path, images: torch.Tensor) -> None:
    with pytest.raises(nd.RefusedError, match="512 samples would hold") as caught:
        nd.recalibrate(untouched, images, trust=True, memory=1_000_000)
    words = caught.value.hint.split()
    fits = int(words[words.index("--samples") + 1].rstrip(","))
    assert 0 < fits < 512
    report = report_of(
        nd.recalibrate(untouched, images, trust=True, memory=1_000_000, samples=fits, dry_run=True, force=True)
    )
    assert report.samples == fits
    with pytest.raises(nd.RefusedError, match=f"{fits + 1} samples"):
        nd.recalibrate(untouched, images, trust=True, memory=1_000_000, samples=fits + 1)
    with pytest.raises(nd.RefusedError) as caught:
        nd.recalibrate(untouched, images, trust=True, memory=100)
    assert "--samples" not in caught.value.hint and "--memory" in caught.value.hint
    nd.recalibrate(untouched, images, trust=True, memory=100, method="one-pass", dry_run=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_data_that_is_not_finite(value: float, untouched: Path, images: torch.Tensor) -> None:
    images = images.clone()
    images[77, 0, 3, 3] = value
    with pytest.raises(nd.InputError, match="77"):
        nd.recalibrate(untouched, images, trust=True)
    report = report_of(nd.recalibrate(untouched, images, trust=True, drop_nonfinite=True, dry_run=True))
    assert report.samples == 511 and any("1 sample left out" in note and "77" in note for note in report.notes)


def test_weights_that_are_not_finite(net: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        net.layer1[0].conv1.weight[2] = torch.nan
    before = state_of(net)
    with pytest.raises(nd.InputError, match=r"NaN or Inf arrives at layer1.0.bn1 in 1 of 8 channels \(2\)"):
        nd.recalibrate(net, images)
    assert str(state_of(net)) == str(before)


def test_nothing_to_recalibrate(images: torch.Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(nd.RefusedError, match="no BatchNorm with running statistics"):
        nd.recalibrate(net, images)


def test_a_dtype_that_cannot_hold_the_value(net: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        net.conv1.weight.mul_(3e3)
    net.half()
    before = state_of(net)
    with pytest.raises(nd.NormDoctorError, match=r"bn1.running_var: .*float16 cannot hold"):
        nd.recalibrate(net, images)
    assert state_of(net) == before


@pytest.mark.parametrize("place", ["measuring", "comparing", "writing"])
def test_interrupted(place: str, untouched: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def progress(done: int, total: int | None, words: str) -> None:
        if done > 1 and (words == "comparing") == (place == "comparing") and place != "writing":
            raise KeyboardInterrupt

    if place == "writing":
        from normdoctor import writing

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(writing.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nd.recalibrate(untouched, images, trust=True, progress=progress)


@pytest.mark.parametrize("place", ["norms", "comparing"])
def test_a_live_module_that_is_interrupted(place: str, net: nn.Module, images: torch.Tensor) -> None:
    net.train()
    before = state_of(net)

    def progress(done: int, total: int | None, words: str) -> None:
        if words == place and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nd.recalibrate(net, images, progress=progress)
    assert state_of(net) == before


def test_significantly_worse(net: nn.Module, untouched: Path, images: torch.Tensor, tmp_path: Path) -> None:
    """The statistics of inverted images make the net worse on the right ones; judged on the data, with labels."""
    inverted = -images
    with torch.no_grad():
        said = net(inverted).argmax(1)  # taken for the labels: any other answer is a loss
    loader = [(x, y) for x, y in zip(inverted.split(64), said.split(64), strict=True)]
    with pytest.raises(nd.VerificationError, match="significantly worse with the new statistics") as caught:
        nd.recalibrate(untouched, loader, trust=True)
    judgement = caught.value.report.judgement
    assert judgement.accuracy.before == 1 and judgement.accuracy.after < 0.9
    fixed = tmp_path / "forced.pt"
    nd.recalibrate(untouched, loader, trust=True, force=True, output=fixed)
    assert fixed.exists()
    live = copy.deepcopy(net)
    before = state_of(live)
    with pytest.raises(nd.VerificationError):
        nd.recalibrate(live, loader)
    assert state_of(live) == before


def test_entropy_is_reported_and_not_judged(net: nn.Module, images: torch.Tensor) -> None:
    report = report_of(nd.recalibrate(net, -images))
    assert report.judgement is not None and report.judgement.accuracy is None
    assert report.judgement.entropy is not None and report.judgement.agreement is not None


def test_ways_that_depend_on_the_data(images: torch.Tensor) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.light, self.dark = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.light(x) if x.mean() > 0 else self.dark(x)

    net = Branching()
    loader = [images[:64], images[64:128] + 9, images[128:192] - 9]
    before = state_of(net)
    with pytest.raises(nd.RefusedError, match="its way depends on the data"):
        nd.recalibrate(net, loader)
    assert state_of(net) == before
    assert len(report_of(nd.recalibrate(net, loader, method="one-pass")).rows) == 2


def test_a_norm_called_twice_is_pooled_in_one_pass(images: torch.Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(2 * self.norm(x) + 1)

    net = Twice()
    with pytest.raises(nd.RefusedError, match="several times") as caught:
        nd.recalibrate(net, images)
    assert "one-pass" in caught.value.hint
    nd.recalibrate(net, images, method="one-pass")
    x = images.double().numpy()
    second = 2 * (x - x.mean()) / x.std() + 1
    assert net.norm.running_mean.item() == pytest.approx(np.concatenate([x, second]).mean(), abs=0.02)


def test_forward_may_write_into_its_input(images: torch.Tensor) -> None:
    """Each batch is run several times: for the memory it takes, to measure, before and after."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.mul_(2))

    given = images.clone()
    for data in (given, list(given.split(64)), given.numpy()):
        net = InPlace()
        (row,) = report_of(nd.recalibrate(net, data)).rows
        assert net.norm.running_mean.item() == pytest.approx(2 * images.double().mean().item(), abs=1e-6)
        assert row.residual_shift is not None and row.residual_shift < 1e-6
        assert torch.equal(given, images)
        assert not nd.inspect(net, data=data, select="D6").findings


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_contexts_around_the_call(context: Any, net: nn.Module, images: torch.Tensor) -> None:
    plain = copy.deepcopy(net)
    nd.recalibrate(plain, images)
    with context():
        inside = copy.deepcopy(net)
        nd.recalibrate(inside, images)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, inside.get_buffer(name))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager"), torch.jit.script])
def test_wrapped_modules(wrap: Any, net: nn.Module, images: torch.Tensor) -> None:
    plain = copy.deepcopy(net)
    nd.recalibrate(plain, images)
    reset(net)
    result = nd.recalibrate(wrap(net), images)
    assert len(report_of(result).rows) == 9
    for (name, buffer), (_, same) in zip(plain.named_buffers(), result.module.named_buffers(), strict=True):
        if not name.endswith("tracked"):
            torch.testing.assert_close(same, buffer, rtol=1e-5, atol=1e-6)


def test_wrong_options(net: nn.Module, images: torch.Tensor, tmp_path: Path) -> None:
    for options, words in (
        ({"method": "exakt"}, "no method"),
        ({"until": 0.1}, "one-pass"),
        ({"until": 2.0, "method": "one-pass"}, "between 0 and 1"),
        ({"prior": 3}, "blend"),
        ({"prior": -3, "method": "blend"}, "--prior"),
        ({"memory": 0}, "--memory"),
        ({"output": tmp_path / "f.pt"}, "in place"),
        ({"in_place": True}, "in place"),
        ({"arch_args": "{}"}, "--arch"),
        ({"key": "ema"}, "for files"),
        ({"device": "cpu"}, "runs where it is"),
        ({"batch_size": 0}, "batch"),
        ({"samples": 0}, "samples"),
        ({"method": "debias"}, "needs no data"),
        ({"layer": "nothing.*"}, "no layer matches"),
    ):
        with pytest.raises(nd.UsageError, match=words):
            nd.recalibrate(net, images, **options)  # type: ignore[arg-type]
    with pytest.raises(nd.UsageError, match="needs data"):
        nd.recalibrate(net)


def test_the_same_bits_every_time(net: nn.Module, images: torch.Tensor) -> None:
    first, second = copy.deepcopy(net), copy.deepcopy(net)
    reset(second)
    for one in (first, second):
        nd.recalibrate(one, images, batch_size=48)
    for name, buffer in first.named_buffers():
        if not name.endswith("tracked"):
            assert torch.equal(buffer, second.get_buffer(name))


def test_batches_of_any_size_are_the_same_to_rounding(net: nn.Module, images: torch.Tensor) -> None:
    wanted = definition(net, images[:37], double=True, size=37)
    for size in (1, 5, 37):
        one = copy.deepcopy(net)
        nd.recalibrate(one, images[:37], batch_size=size, verify=False, force=True)
        for name, (mean, var) in wanted.items():
            norm = norms_of(one)[name]
            assert (np.abs(norm.running_mean.double().numpy() - mean) / np.sqrt(var)).max() <= 1e-6
            assert np.abs(np.log(norm.running_var.double().numpy() / var)).max() <= 1e-6
