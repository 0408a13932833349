"""Faults put into a really trained network, at a random layer and random channels, in several formats: the rule
that names the fault finds it, at that layer and those channels."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normdoctor as nd
from normdoctor.findings import Report, Severity

FIXTURES = Path(__file__).parents[1] / "fixtures"
SEEDS = (0, 1, 2)

FILES = ("zip", "legacy", "safetensors", "module", "legacy module", "onnx", "live")
MODULES = ("module", "legacy module", "live")
STATES = ("zip", "legacy", "safetensors")

Norm = Any
Inject = Callable[[Norm, np.random.Generator], Sequence[int] | None]
"""Damages one BatchNorm in place; gives the channels that must be named, None where the rule names none."""


@dataclass(frozen=True)
class Fault:
    name: str
    code: str
    severity: Severity
    inject: Inject
    formats: tuple[str, ...] = FILES
    options: dict[str, Any] = field(default_factory=dict)
    every_layer: bool = False
    """The fault is put into every layer, and each must be named."""
    of_the_file: bool = False
    """The finding is one about the whole file."""


def some(norm: Norm, rng: np.random.Generator, count: int = 2) -> list[int]:
    return sorted(int(channel) for channel in rng.choice(norm.num_features, count, replace=False))


def put(tensor_name: str, value: float, count: int = 2) -> Inject:
    def inject(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
        channels = some(norm, rng, count)
        getattr(norm, tensor_name).data[channels] = value
        return channels

    return inject


def nan_and_inf(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    """What an overflow in mixed precision leaves: Inf in the mean, NaN in the variance."""
    channels = some(norm, rng)
    norm.running_mean[channels] = float("inf")
    norm.running_var[channels] = float("nan")
    return channels


def reset(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    norm.reset_running_stats()
    return range(norm.num_features)


def slow(norm: Norm, rng: np.random.Generator, momentum: float = 0.001, updates: int = 216) -> None:
    left = (1 - momentum) ** updates
    norm.running_mean *= 1 - left
    norm.running_var.mul_(1 - left).add_(left)
    norm.momentum = momentum
    norm.num_batches_tracked.fill_(updates)


def dead(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    channels = some(norm, rng)
    norm.running_mean[channels] = 0.0
    norm.running_var[channels] = 4 * 2.0**-149
    return channels


def below_eps(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    """A live gain on an input that varies by less than eps."""
    channels = some(norm, rng)
    norm.running_var[channels] = 2e-6
    norm.weight.data[channels] = 1.0
    return channels


def placeholders(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    norm.running_mean.fill_(0.25)
    norm.running_var.fill_(0.5)
    return range(norm.num_features)


def mean_reset(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    norm.running_mean.zero_()
    return range(norm.num_features)


def averaged_counter(norm: Norm, rng: np.random.Generator) -> None:
    norm.num_batches_tracked = norm.num_batches_tracked * 1.5 + 0.25


def without_gradient(norm: Norm, rng: np.random.Generator) -> None:
    norm.requires_grad_(False)


def far_mean(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    channels = some(norm, rng)
    norm.running_mean[channels] = 1000 * norm.running_var[channels].sqrt()
    return channels


def fewer_updates(norm: Norm, rng: np.random.Generator) -> None:
    norm.num_batches_tracked.fill_(150)


def no_counter(norm: Norm, rng: np.random.Generator) -> None:
    norm.num_batches_tracked.zero_()


def half_and_back(norm: Norm, rng: np.random.Generator) -> Sequence[int] | None:
    norm.running_mean.copy_(norm.running_mean.bfloat16().float())
    norm.running_var.copy_(norm.running_var.bfloat16().float())
    return range(norm.num_features)


def too_small_for_its_start(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    norm.momentum = 0.001
    norm.num_batches_tracked.fill_(216)
    return [channel for channel in range(norm.num_features) if norm.running_var[channel] < 0.999**216]


def lose(*names: str) -> Inject:
    def inject(norm: Norm, rng: np.random.Generator) -> None:
        for name in names:
            setattr(norm, name, None)

    return inject


def switched_off(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    channels = some(norm, rng, norm.num_features // 2 + 1)
    norm.weight.data[channels] = 1e-6
    return channels


def zero_gain(norm: Norm, rng: np.random.Generator) -> None:
    norm.weight.data.zero_()


def exploding(norm: Norm, rng: np.random.Generator) -> Sequence[int]:
    channels = some(norm, rng, 1)
    norm.weight.data[channels] = 2000.0
    return channels


def neutral(norm: Norm, rng: np.random.Generator) -> None:
    norm.weight.data.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.data.copy_(norm.running_mean)


def set_attribute(name: str, value: Any) -> Inject:
    def inject(norm: Norm, rng: np.random.Generator) -> None:
        setattr(norm, name, value)

    return inject


def without_statistics(norm: Norm, rng: np.random.Generator) -> None:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def shorter_bias(norm: Norm, rng: np.random.Generator) -> None:
    norm.bias = nn.Parameter(norm.bias.data[:-1].clone())


def other_type(norm: Norm, rng: np.random.Generator) -> None:
    norm.running_var = norm.running_var.half()


ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

FAULTS = (
    Fault("NaN mean", "S101", ERROR, put("running_mean", float("nan"))),
    Fault("infinite variance", "S101", ERROR, put("running_var", float("inf"))),
    Fault("AMP overflow", "S101", ERROR, nan_and_inf),
    Fault("negative variance", "S102", ERROR, put("running_var", -0.25)),
    Fault("eps subtracted", "S102", ERROR, put("running_var", -1e-5)),
    Fault("reset buffers", "S103", ERROR, reset, formats=(*STATES, *MODULES)),
    Fault("reset buffers, no counter", "S103", WARNING, reset, formats=("onnx",)),
    Fault("slow momentum", "S104", ERROR, slow, formats=MODULES, every_layer=True),
    Fault("slow momentum, given", "S104", ERROR, slow, formats=STATES, options={"momentum": 0.001}, every_layer=True),
    Fault(
        "slow momentum, unknown", "S118", WARNING, slow, formats=(*STATES, "onnx"), every_layer=True, of_the_file=True
    ),
    Fault("dead channels", "S105", WARNING, dead),
    Fault("variance below eps", "S106", WARNING, below_eps),
    Fault("placeholders", "S107", WARNING, placeholders),
    Fault("mean reset", "S107", WARNING, mean_reset),
    Fault("far mean", "S108", WARNING, far_mean),
    Fault("counter behind", "S110", WARNING, fewer_updates, formats=(*STATES, *MODULES)),
    Fault("counter lost", "S111", INFO, no_counter, formats=(*STATES, *MODULES)),
    Fault(
        "averaged counter",
        "S112",
        WARNING,
        averaged_counter,
        formats=(*STATES, *MODULES),
        every_layer=True,
        of_the_file=True,
    ),
    Fault("16-bit average", "S113", WARNING, half_and_back),
    Fault("contradiction", "S115", INFO, too_small_for_its_start, formats=MODULES),
    Fault("no buffers", "S116", WARNING, lose("running_mean", "running_var", "num_batches_tracked"), formats=STATES),
    Fault("no weight", "S116", WARNING, lose("weight"), formats=STATES),
    Fault("no weight and no bias", "S116", INFO, lose("weight", "bias"), formats=STATES),
    Fault("mean alone", "S117", ERROR, lose("running_var"), formats=STATES),
    Fault("NaN gamma", "A201", ERROR, put("weight", float("nan"))),
    Fault("infinite beta", "A201", ERROR, put("bias", float("inf"))),
    Fault("switched off", "A202", WARNING, switched_off),
    Fault("zero gain", "A203", WARNING, zero_gain),
    Fault("untouched", "A204", WARNING, lambda norm, rng: (norm.weight.data.fill_(1), norm.bias.data.zero_(), None)[2]),
    Fault("exploding gain", "A205", WARNING, exploding),
    Fault("neutral", "A207", INFO, neutral),
    Fault("track_running_stats off", "C301", WARNING, without_statistics, formats=MODULES),
    Fault("flag off, buffers there", "C301", WARNING, set_attribute("track_running_stats", False), formats=MODULES),
    Fault("exported in training", "C301", ERROR, set_attribute("training", True), formats=("onnx",)),
    Fault("momentum 0", "C302", INFO, set_attribute("momentum", 0.0), formats=(*MODULES, "onnx")),
    Fault("Keras momentum", "C303", WARNING, set_attribute("momentum", 0.99), formats=(*MODULES, "onnx")),
    Fault("momentum in percent", "C315", WARNING, set_attribute("momentum", 10.0), formats=(*MODULES, "onnx")),
    Fault("momentum NaN", "C315", WARNING, set_attribute("momentum", float("nan")), formats=MODULES),
    Fault(
        "plain average",
        "C304",
        INFO,
        set_attribute("momentum", None),
        formats=MODULES,
        every_layer=True,
        of_the_file=True,
    ),
    Fault("odd eps", "C305", WARNING, set_attribute("eps", 0.1), formats=(*MODULES, "onnx")),
    Fault("frozen affine", "C307", INFO, without_gradient, formats=MODULES, every_layer=True, of_the_file=True),
    Fault("one layer training", "C306", INFO, set_attribute("training", True), formats=MODULES),
    Fault(
        "saved in training",
        "C314",
        INFO,
        set_attribute("training", True),
        formats=MODULES,
        every_layer=True,
        of_the_file=True,
    ),
    Fault("lengths differ", "C311", ERROR, shorter_bias, formats=STATES),
    Fault("types differ", "C313", WARNING, other_type, formats=(*STATES, *MODULES)),
    Fault("too large for fp16", "N401", ERROR, put("running_var", 1e6), options={"target": "fp16"}),
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found(fault: Fault, seed: int, healthy: Callable[[], nn.Module], tmp_path: Path) -> None:
    for form in fault.formats:
        rng = np.random.default_rng([seed, zlib.crc32(f"{fault.name} {form}".encode())])
        net = healthy()
        norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
        wide = [name for name, norm in norms.items() if norm.num_features >= 16]
        chosen = list(norms) if fault.every_layer else [str(rng.choice(wide))]
        expected = {name: fault.inject(norms[name], rng) for name in chosen}
        report = inspect(net, form, tmp_path, fault.options)
        for name, channels in expected.items():
            about = None if fault.of_the_file else name
            found = [f for f in report.findings if f.code == fault.code and f.layer == about]
            where = f"{fault.code} at {name} in {form}; said: {[(f.code, f.layer) for f in report.findings]}"
            assert len(found) == 1, where
            assert found[0].severity is fault.severity, where
            if channels is not None:
                assert list(found[0].channels) == list(channels), where
        if not fault.every_layer:
            others = {f.layer for f in report.findings if f.code == fault.code} - set(chosen)
            assert fault.code in ("C306",) or not others, f"{fault.code} also at {others} in {form}"


@pytest.mark.parametrize("form", FILES)
def test_the_healthy_network_has_none_of_them(form: str, healthy: Callable[[], nn.Module], tmp_path: Path) -> None:
    report = inspect(healthy(), form, tmp_path, {})
    assert [f for f in report.findings if f.severity > Severity.INFO] == []


def test_averaged_weights(healthy: Callable[[], nn.Module], tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(healthy())
    for _ in range(3):
        averaged.update_parameters(healthy())
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    report = nd.inspect(tmp_path / "swa.pt")
    assert ("C310", "info") in {(f.code, str(f.severity)) for f in report.findings}


def said(report: Report) -> set[tuple[str, str, str | None]]:
    return {(f.code, str(f.severity), f.layer) for f in report.findings}


@pytest.mark.parametrize("form", FILES)
def test_buffers_of_another_layer(form: str, healthy: Callable[[], nn.Module], tmp_path: Path) -> None:
    net = healthy()
    wide = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and m.num_features == 16]
    (first, source), *_, (last, target) = wide
    target.running_mean.copy_(source.running_mean)
    target.running_var.copy_(source.running_var)
    report = inspect(net, form, tmp_path, {})
    (finding,) = [f for f in report.findings if f.code == "S114"]
    assert {finding.layer, *finding.evidence["same_as"]} == {first, last}
    assert finding.severity is INFO and not finding.evidence["affine_agrees"]


def test_soup_of_two_checkpoints(healthy: Callable[[], nn.Module], tmp_path: Path) -> None:
    one, other = healthy().state_dict(), healthy().state_dict()
    for name in other:
        if name.endswith("num_batches_tracked"):
            other[name] += 1
    torch.save({name: (tensor.double() + other[name]) / 2 for name, tensor in one.items()}, tmp_path / "soup.pt")
    assert ("S112", "warning", None) in said(nd.inspect(tmp_path / "soup.pt"))


@pytest.mark.parametrize(("target", "severity"), [(None, "info"), ("int8", "warning")])
def test_synchronised_norms(target: Any, severity: str, healthy: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.save(nn.SyncBatchNorm.convert_sync_batchnorm(healthy()), tmp_path / "sync.pt")
    assert ("C309", severity, None) in said(nd.inspect(tmp_path / "sync.pt", target=target))


def test_tracking_instance_norm(nets: ModuleType, tmp_path: Path) -> None:
    net = nets.ResNet(lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True))
    net(nets.load_digits_split().train_images[:64])
    torch.save(net.eval(), tmp_path / "instance.pt")
    named = {layer for code, severity, layer in said(nd.inspect(tmp_path / "instance.pt")) if code == "C308"}
    assert named == {name for name, module in net.named_modules() if isinstance(module, nn.InstanceNorm2d)}


def test_names_of_keras_and_wrappers(healthy: Callable[[], nn.Module], tmp_path: Path) -> None:
    keras = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    state, renamed = healthy().state_dict(), {}
    norms = {name.removesuffix(".running_var") for name in state if name.endswith(".running_var")}
    for name, tensor in state.items():
        parent, _, leaf = name.rpartition(".")
        renamed[f"module.{parent}.{keras.get(leaf, leaf) if parent in norms else leaf}"] = tensor
    torch.save(state, tmp_path / "plain.pt")
    torch.save(renamed, tmp_path / "keras.pt")
    assert "C312" not in {f.code for f in nd.inspect(tmp_path / "plain.pt").findings}
    (finding,) = [f for f in nd.inspect(tmp_path / "keras.pt").findings if f.code == "C312"]
    assert finding.layer is None
    assert set(finding.evidence["read_as"]) == {f"{theirs}: {ours}" for ours, theirs in keras.items()}
    assert finding.evidence["wrappers"] == ["module"]


def test_gains_folded_into_the_next_weights(nets: ModuleType, tmp_path: Path) -> None:
    """The fold changes no output; what is left is told from a fault by saying so."""
    net = torch.load(FIXTURES / "transformer_module.pt", weights_only=False).eval()
    images = nets.load_digits_split().test_images[:20]
    before = net(images)
    with torch.no_grad():
        for block in net.blocks:
            for norm, linear in ((block.norm1, block.qkv), (block.norm2, block.mlp[0])):
                linear.bias += linear.weight @ norm.bias
                linear.weight *= norm.weight
                norm.weight.fill_(1)
                norm.bias.zero_()
    assert torch.allclose(net(images), before, atol=1e-4)
    torch.save(net.state_dict(), tmp_path / "folded.pt")
    torch.save(net, tmp_path / "folded_module.pt")
    assert ("T702", "info", None) in said(nd.inspect(tmp_path / "folded_module.pt"))


@pytest.mark.parametrize(("shift", "severity"), [(-2.4, "warning"), (float("nan"), "error")])
def test_shift_inside_the_erf(shift: float, severity: str, nets: ModuleType, tmp_path: Path) -> None:
    net = nets.Transformer(nets.DynamicErf)
    net.blocks[1].norm2.shift.data.fill_(shift)
    torch.save(net, tmp_path / "derf_module.pt")
    torch.save(net.state_dict(), tmp_path / "derf.pt")
    for path in (tmp_path / "derf_module.pt", tmp_path / "derf.pt"):
        report = nd.inspect(path)
        found = {(f.layer, str(f.severity)) for f in report.findings if f.code == "T709"}
        assert found == {("blocks.1.norm2", severity)}


def test_a_group_for_every_channel(nets: ModuleType, tmp_path: Path) -> None:
    torch.save(nets.ResNet(lambda channels: nn.GroupNorm(16, channels), widths=(16, 32)), tmp_path / "groups.pt")
    named = {layer for code, _, layer in said(nd.inspect(tmp_path / "groups.pt")) if code == "T710"}
    assert named == {"bn1", "layer1.0.bn1", "layer1.0.bn2"}


@pytest.fixture
def healthy(nets: ModuleType) -> Callable[[], nn.Module]:
    """Makes a fresh copy of the trained network of fixtures/healthy_module.pt."""

    def make() -> nn.Module:
        net: nn.Module = torch.load(FIXTURES / "healthy_module.pt", weights_only=False)
        return net

    return make


def inspect(net: nn.Module, form: str, folder: Path, options: dict[str, Any]) -> Report:
    if form == "live":
        return nd.inspect(net, **options)
    path = folder / "model"
    if form == "onnx":
        save_onnx(net, path)
    elif form == "safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    else:
        content = net if "module" in form else net.state_dict()
        torch.save(content, path, _use_new_zipfile_serialization="legacy" not in form)
    return nd.inspect(path, **options)


def save_onnx(net: nn.Module, path: Path) -> None:
    """The exported twin of the network with the tensors and settings of `net` in it."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(FIXTURES / "healthy.onnx")
    state = net.state_dict()
    modules = dict(net.named_modules())
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            name = node.input[3].removesuffix(".running_mean")
            norm = modules[name]
            # The exporter lets equal tensors share one initializer; here each layer gets its own.
            for place, leaf in enumerate(("weight", "bias", "running_mean", "running_var"), start=1):
                node.input[place] = f"{name}.{leaf}"
                kept = [i for i in model.graph.initializer if i.name != node.input[place]]
                del model.graph.initializer[:]
                array = state[node.input[place]].numpy()
                model.graph.initializer.extend([*kept, numpy_helper.from_array(array, node.input[place])])
            del node.attribute[:]
            node.attribute.extend(
                [
                    helper.make_attribute("epsilon", float(norm.eps)),
                    helper.make_attribute("momentum", 1.0 - float(norm.momentum)),
                    helper.make_attribute("training_mode", int(norm.training)),
                ]
            )
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("form", [*STATES, "onnx"])
def test_residue_beside_a_first_layer_that_gets_raw_pixels(
    form: str, healthy: Callable[[], nn.Module], tmp_path: Path
) -> None:
    net = healthy()
    first, *others = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    first[1].running_var *= 60
    for _, norm in (first, *others):
        slow(norm, np.random.default_rng(0))
    (finding,) = [f for f in inspect(net, form, tmp_path, {}).findings if f.code == "S118"]
    assert sorted(finding.evidence["layers"]) == sorted(name for name, _ in others)


@pytest.mark.parametrize("form", FILES)
def test_buffers_computed_anew_are_no_residue(
    form: str, healthy: Callable[[], nn.Module], nets: ModuleType, tmp_path: Path
) -> None:
    """20 batches at momentum 0.1 would leave 12 %, had they been a moving average."""
    net = healthy()
    torch.optim.swa_utils.update_bn(nets.load_digits_split().train_images[:640].split(32), net)
    report = inspect(net.eval(), form, tmp_path, {})
    assert [f for f in report.findings if f.severity > Severity.INFO] == []


def test_a_head_trained_on_a_frozen_backbone(healthy: Callable[[], nn.Module], tmp_path: Path) -> None:
    net = healthy()
    *backbone, head = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in backbone:
        norm.requires_grad_(False)
    head.num_batches_tracked.fill_(150)
    (finding,) = [f for f in inspect(net, "module", tmp_path, {}).findings if f.code == "S110"]
    assert finding.severity is INFO and finding.message.endswith("by design?")
