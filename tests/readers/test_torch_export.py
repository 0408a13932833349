"""Packages of torch.export.save: the same net as its module, and nothing of what loading them could run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._export.serde.serialize import serialize
from torch.export.pt2_archive._package import package_pt2

from normdoctor.errors import InputError, RefusedError
from normdoctor.findings import Severity
from normdoctor.inspection import inspect
from normdoctor.layers import Checkpoint, Container, Danger, NormKind, NormLayer
from normdoctor.readers import open_checkpoint
from normdoctor.recalibration import recalibrate
from tests.readers.test_contract import HYPER, Contract, Unit, build_net

Read = Callable[[Any], Checkpoint]
Edit = Callable[[dict[str, Any]], None]


def export(net: nn.Module, *inputs: torch.Tensor, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own internals
        return torch.export.export(net, inputs, **options)


def decompose(program: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return program.run_decompositions()


def load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(path)


def save_old(program: Any, path: Path) -> Path:
    """As torch 2.6 and 2.7 did."""
    parts = serialize(program)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.20")
        archive.writestr("serialized_exported_program.json", parts.exported_program)
        archive.writestr("serialized_state_dict.pt", parts.state_dict)
        archive.writestr("serialized_constants.pt", parts.constants)
        archive.writestr("serialized_example_inputs.pt", parts.example_inputs)
    return path


# The contract ----------------------------------------------------------------------------------------------


class Applied(Unit):
    """The net of the contract, in use."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.slope(self.gn(self.bn(self.z_first(x))))
        flat = self.a_after(x[:, :6, 0, 0])
        inner = self.inorm(x[:, :5])
        rows = self.ln(x.reshape(-1)[:24].reshape(2, 12))
        return flat, inner, self.bare(x[:, :4]), self.head(rows)


class TestExported(Contract):
    container = Container.ZIP
    says_hyper = True

    def write(self, net: nn.Module, folder: Path) -> Any:
        net.__class__ = Applied
        torch.export.save(self.program(net), folder / "m.pt2")
        return folder / "m.pt2"

    def program(self, net: nn.Module) -> Any:
        return export(net, torch.rand(2, 3, 6, 6))

    @pytest.fixture(scope="class")
    @classmethod
    def once(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return Path(cls().write(build_net(), tmp_path_factory.mktemp("exported")))

    @pytest.fixture
    def net(self) -> nn.Module:
        return build_net()

    @pytest.fixture
    def checkpoint(self, once: Path, read: Read) -> Checkpoint:  # type: ignore[override]
        return read(once)

    def test_what_is_not_said_stays_unknown(self, layers: dict[str, NormLayer]) -> None:
        truth = {name: dict(fields) for name, fields in HYPER.items()}
        truth["a_after.1"]["momentum"] = None  # an export in eval mode writes 0 for a plain average as well
        for name, fields in truth.items():
            assert {field: getattr(layers[name], field) for field in fields} == fields, name
        assert {name: layer.training for name, layer in layers.items()} == {
            "bn": True, "a_after.1": False, "ln": None, "gn": None, "inorm": True, "bare": True,
        }  # fmt: skip
        assert all(layer.baked for layer in layers.values())

    def test_names_of_classes(self, layers: dict[str, NormLayer]) -> None:
        assert layers["bn"].origin == "torch.nn.modules.batchnorm.BatchNorm2d"
        assert layers["ln"].origin == "torch.nn.modules.normalization.LayerNorm"

    def test_nothing_would_be_called(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.load_calls == ()
        assert checkpoint.notes == ()


class TestDecomposed(TestExported):
    def program(self, net: nn.Module) -> Any:
        return decompose(super().program(net))


class TestOldLayout(TestExported):
    def write(self, net: nn.Module, folder: Path) -> Any:
        net.__class__ = Applied
        return save_old(self.program(net), folder / "m.pt2")

    def test_only_norms_are_read(self, checkpoint: Checkpoint) -> None:
        assert 0 < checkpoint.count_bytes_read() < (checkpoint.bytes_total or 0) / 5  # two directories of records


# Kinds of norms --------------------------------------------------------------------------------------------


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class Shifted(nn.Module):
    """Gemma's, under a name that says nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) - 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3) * (1.0 + self.weight.float())


class Centred(nn.Module):
    """A LayerNorm without a shift, under a name that could be an RMSNorm's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-7)


class FrozenBatchNorm2d(nn.Module):
    """detectron2's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + 1e-3).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class Attention(nn.Module):
    """Norms by functions, with parameters of the module's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_weight = nn.Parameter(torch.rand(width))
        self.k_weight = nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape[-1:]
        query = nn.functional.layer_norm(x, shape, self.q_weight, None, 1e-4)
        key = nn.functional.layer_norm(x, shape, self.k_weight, None, 1e-4)
        return query * key + nn.functional.layer_norm(x, shape)


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.bn = nn.BatchNorm2d(8, affine=False)
        self.stem = FrozenBatchNorm2d(8)
        self.inorm = nn.InstanceNorm2d(8)
        self.tracking = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.gn = nn.GroupNorm(4, 8, affine=False)
        self.twice = nn.LayerNorm([6, 6])
        self.again = self.twice
        self.plain = nn.LayerNorm(6, elementwise_affine=False)
        self.rms = nn.RMSNorm(6, eps=1e-6)
        self.llama = LlamaRMSNorm(6, 1e-5)
        self.final_norm = Shifted(6)
        self.mid_norm = Centred(6)
        self.attn = Attention(6)
        self.unused_norm = nn.LayerNorm(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gn(self.tracking(self.inorm(self.stem(self.bn(self.embed(x))))))
        x = self.again(self.twice(self.twice(x)))
        return self.attn(self.mid_norm(self.final_norm(self.llama(self.rms(self.plain(x))))))


@pytest.fixture(scope="session", params=["exported", "decomposed", "strict"])
def kinds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    net = Kinds().eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = export(net, torch.rand(2, 8, 6, 6), dynamic_shapes=shapes, strict=request.param == "strict")
    path = tmp_path_factory.mktemp("kinds") / "kinds.pt2"
    torch.export.save(decompose(program) if request.param == "decomposed" else program, path)
    return net, path


def test_kinds_widths_and_names(kinds: tuple[nn.Module, Path], read: Read) -> None:
    checkpoint = read(kinds[1])
    found = {layer.name: (layer.kind, layer.channels, layer.affine) for layer in checkpoint.layers}
    functions = {name: value for name, value in found.items() if name.startswith("attn")}
    assert {name: value for name, value in found.items() if name not in functions} == {
        "bn": (NormKind.BATCH, 8, False),
        "stem": (NormKind.BATCH, 8, True),
        "inorm": (NormKind.INSTANCE, 8, False),
        "tracking": (NormKind.INSTANCE, 8, True),
        "gn": (NormKind.GROUP, 8, False),
        "twice": (NormKind.LAYER, 36, True),
        "plain": (NormKind.LAYER, 6, False),
        "rms": (NormKind.RMS, 6, True),
        "llama": (NormKind.RMS, 6, True),
        "final_norm": (NormKind.RMS, 6, None),
        "mid_norm": (NormKind.LAYER, 6, None),
        "unused_norm": (NormKind.LAYER_OR_GROUP, 5, None),
    }
    assert list(functions.values()) == [
        (NormKind.LAYER, 6, True), (NormKind.LAYER, 6, True), (NormKind.LAYER, 6, False),
    ]  # fmt: skip
    known = [name for name in found if name not in functions]
    assert known == [name for name, _ in kinds[0].named_modules() if name in known]
    assert checkpoint.load_calls == ()


def test_what_the_graph_says_of_them(kinds: tuple[nn.Module, Path], read: Read) -> None:
    layers = {layer.name: layer for layer in read(kinds[1]).layers}
    assert {name: layers[name].eps for name in ("stem", "rms", "llama", "final_norm", "mid_norm", "unused_norm")} == {
        "stem": 1e-3, "rms": 1e-6, "llama": 1e-5, "final_norm": 1e-3, "mid_norm": 1e-7, "unused_norm": None,
    }  # fmt: skip
    assert (layers["final_norm"].zero_centred, layers["llama"].zero_centred) == (True, False)
    assert layers["final_norm"].numbers.gain == pytest.approx(1 + kinds[0].final_norm.weight.detach().numpy())
    assert (layers["stem"].training, layers["stem"].running_var is not None) == (None, True)
    assert layers["gn"].groups == 4
    assert layers["inorm"].training is None  # by design: it has no buffers
    assert layers["tracking"].training is False
    assert layers["tracking"].num_batches_tracked is not None
    assert "twice@1" in layers["twice"].aliases
    assert len(layers["twice"].aliases) == 2  # "again" is a name of its own except to the strict exporter


def test_a_norm_by_itself(tmp_path: Path, read: Read) -> None:
    torch.export.save(export(nn.BatchNorm1d(3).eval(), torch.rand(2, 3)), tmp_path / "m.pt2")
    (layer,) = read(tmp_path / "m.pt2").layers
    assert (layer.name, layer.origin) == ("", "torch.nn.modules.batchnorm.BatchNorm1d")
    assert layer.num_batches_tracked is not None


def test_a_train_mode_export_is_said_to_be_one(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.BatchNorm2d(8).eval())
    torch.export.save(export(net, torch.rand(2, 3, 6, 6)), tmp_path / "train.pt2")
    report = inspect(tmp_path / "train.pt2")
    said = {finding.layer for finding in report.findings if finding.code == "C301"}
    assert said == {"1"}
    assert "C306" not in {finding.code for finding in report.findings}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.ln = nn.LayerNorm(4)
        self.frozen = nn.LayerNorm(4)
        self.register_buffer("scale", torch.rand(4), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            x = self.frozen(x) * self.scale
        return torch.cond(x.sum() > 0, lambda x: self.bn(x), lambda x: self.ln(x) + 1, (x,))


@pytest.mark.parametrize("strict", [False, True])
def test_norms_in_branches_are_found(strict: bool, tmp_path: Path, read: Read) -> None:
    net = Branches().eval()
    torch.export.save(export(net, torch.rand(3, 4), strict=strict), tmp_path / "m.pt2")
    checkpoint = read(tmp_path / "m.pt2")
    assert [(layer.name, layer.kind) for layer in checkpoint.layers] == [
        ("bn", NormKind.BATCH), ("ln", NormKind.LAYER), ("frozen", NormKind.LAYER),
    ]  # fmt: skip
    assert checkpoint.layers[0].running_var is not None
    assert checkpoint.load_calls == ()
    assert "scale" in {reference.name for reference in checkpoint.list_references()}


# Parts of a package ----------------------------------------------------------------------------------------


class Guarded(nn.Module):
    """A transformer of any length, with a condition on it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] * 2 > 7:
            tokens = tokens + 1
        return self.head(self.block(tokens))


@pytest.fixture(scope="session")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    any_size = torch.export.Dim.AUTO
    program = export(Guarded().eval(), torch.rand(2, 8, 16), dynamic_shapes={"tokens": {0: any_size, 1: any_size}})
    folder = tmp_path_factory.mktemp("transformer")
    torch.export.save(program, folder / "m.pt2")
    package_pt2(folder / "two.pt2", exported_programs={"enc": program, "dec": decompose(program)})
    return folder / "m.pt2"


def test_healthy_dynamic_shapes_and_guards_call_nothing(transformer: Path, read: Read) -> None:
    record = json.loads(zipfile.ZipFile(transformer).read("m/models/model.json"))
    assert record["guards_code"]
    assert "as_expr" in json.dumps(record)
    assert read(transformer).load_calls == ()
    assert not [finding for finding in inspect(transformer).findings if finding.code == "F901"]


def test_several_models_in_one_package(transformer: Path, read: Read) -> None:
    checkpoint = read(transformer.with_name("two.pt2"))
    assert [model.key for model in checkpoint.models] == ["enc", "dec"]
    assert [layer.name for layer in checkpoint.layers] == [
        "enc:block.norm1", "enc:block.norm2", "dec:block.norm1", "dec:block.norm2",
    ]  # fmt: skip
    assert "dec:head.weight" in {reference.name for reference in checkpoint.list_references()}


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, momentum=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A net after 30 updates at momentum 0.01, whose buffers still hold three quarters of 0 and 1."""
    net = Slow()
    for _ in range(30):
        net(torch.rand(4, 3, 8, 8) * 3)
    program = export(net.eval(), torch.rand(2, 3, 8, 8))
    path = tmp_path_factory.mktemp("slow") / "slow.pt2"
    torch.export.save(program, path)
    return path, program


def test_debias_writes_buffers_that_torch_loads(slow: tuple[Path, Any], tmp_path: Path) -> None:
    path, before = slow
    target = tmp_path / "fixed.pt2"
    result = recalibrate(path, method="debias", output=target)
    after = load(target)
    assert "S104" not in {finding.code for finding in inspect(target).findings}
    repair = result.report.repairs[0]
    assert after.state_dict["bn.running_var"].numpy() == pytest.approx(repair.running_var, rel=1e-6)
    assert after.state_dict["bn.running_mean"].numpy() == pytest.approx(repair.running_mean, rel=1e-5, abs=1e-6)
    changed = {name for name, tensor in after.state_dict.items() if not torch.equal(tensor, before.state_dict[name])}
    assert changed == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    x = torch.rand(2, 3, 8, 8)
    net = Slow()
    net.load_state_dict(after.state_dict)
    torch.testing.assert_close(after.module()(x), net.eval()(x))
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None


def test_an_old_package_is_read_and_not_written(slow: tuple[Path, Any], tmp_path: Path) -> None:
    path = save_old(slow[1], tmp_path / "old.pt2")
    assert "S104" in {finding.code for finding in inspect(path).findings}
    with pytest.raises(RefusedError, match="an archive inside the file"):
        recalibrate(path, method="debias", output=tmp_path / "fixed.pt2")
    assert not (tmp_path / "fixed.pt2").exists()


def repack(
    source: Path,
    target: Path,
    edit: Edit | None = None,
    records: dict[str, bytes | None] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A copy of a package with its graph edited and records replaced, added or (None) left out."""
    records = dict(records or {})
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w", compression) as after:
        root = before.namelist()[0].partition("/")[0]
        for name in before.namelist():
            data: bytes | None = before.read(name)
            short = name.removeprefix(f"{root}/")
            if short in records:
                data = records.pop(short)
            elif short == "models/model.json" and edit is not None:
                graph = json.loads(data or b"")
                edit(graph)
                data = json.dumps(graph).encode()
            if data is not None:
                after.writestr(name, data)
        for short, data in records.items():
            if data is not None:
                after.writestr(f"{root}/{short}", data)
    return target


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_weights_and_constants_in_one_file_of_torch_save(slow: tuple[Path, Any], tmp_path: Path, read: Read) -> None:
    path, program = slow
    records = {
        "data/weights/model_weights_config.json": None,
        "data/weights/model.pt": saved(dict(program.state_dict)),
        "data/constants/model_constants_config.json": None,
        "data/constants/model.pt": saved({}),
    }
    checkpoint = read(repack(path, tmp_path / "m.pt2", records=records))
    (layer,) = checkpoint.layers
    assert layer.running_var is not None
    np.testing.assert_array_equal(layer.running_var.numpy(), program.state_dict["bn.running_var"].numpy())
    assert layer.requires_grad is True


def test_a_compressed_package_reads_as_well(slow: tuple[Path, Any], tmp_path: Path) -> None:
    stored = {"data/sample_inputs/model.pt": None}
    path = repack(slow[0], tmp_path / "m.pt2", records=stored, compression=zipfile.ZIP_DEFLATED)
    assert [layer.name for layer in inspect(path).layers] == ["bn"]


def test_compiled_packages_are_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("m/data/aotinductor/model/wrapper.so", b"\x7fELF")
        archive.writestr("m/archive_format", "pt2")
    with pytest.raises(InputError, match="AOTInductor") as caught:
        open_checkpoint(tmp_path / "m.pt2")
    assert "compiled from" in caught.value.hint


def test_tensors_left_out_are_said(slow: tuple[Path, Any], tmp_path: Path, read: Read) -> None:
    missing = repack(slow[0], tmp_path / "a.pt2", records={"data/weights/model_weights_config.json": None})
    checkpoint = read(missing)
    assert any("weights_config.json is missing" in note for note in checkpoint.notes)
    assert any("not in the file: bn" in note for note in checkpoint.notes)
    empty = repack(slow[0], tmp_path / "b.pt2", records={"data/weights/weight_0": b""})
    assert any("no plain tensors" in note for note in read(empty).notes)


# Hostile packages ------------------------------------------------------------------------------------------


def expression(text: str) -> Edit:
    def edit(graph: dict[str, Any]) -> None:
        values = graph["graph_module"]["graph"]["tensor_values"]
        next(iter(values.values()))["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}

    return edit


def everywhere(old: str, new: str) -> Edit:
    def edit(graph: dict[str, Any]) -> None:
        changed = json.loads(json.dumps(graph).replace(json.dumps(old), json.dumps(new)))
        graph.clear()
        graph.update(changed)

    return edit


def put(place: str, value: Any) -> Edit:
    """Put `value` at a path of keys and indices below the program."""

    def edit(graph: dict[str, Any]) -> None:
        inner: Any = graph
        *path, last = (int(part) if part.isdecimal() else part for part in place.split("/"))
        for part in path:
            inner = inner[part]
        inner[last] = value

    return edit


def tree(**context: Any) -> Edit:
    kind = "collections.defaultdict" if "default_factory_module" in context else "builtins.dict"
    dumped: Any = context if "default_factory_module" in context else json.dumps([context])
    spec = json.dumps([1, {"type": kind, "context": dumped, "children_spec": []}])
    return put("graph_module/module_call_graph/0/signature/in_spec", spec)


RUN = "__import__('os').system('echo')"
NODE = "graph_module/graph/nodes/0"

EDITS: dict[str, tuple[Edit, str]] = {
    "a size": (expression(RUN), f"expression {RUN}"),
    "a tower": (expression("9**9**9"), "expression 9**9**9"),
    "a guard": (put("guards_code", [RUN]), f"guard {RUN}"),
    "an operator of torch": (put(f"{NODE}/target", "torch.hub.load"), "operator torch.hub.load"),
    "a function of torch.ops": (put(f"{NODE}/target", "torch.ops.load_library"), "operator torch.ops.load_library"),
    "a dunder of torch.ops": (put(f"{NODE}/target", "torch.ops.a.__init__.__globals__"), "operator torch.ops.a.__i"),
    "an operator of Python": (put(f"{NODE}/target", "_operator.methodcaller"), "operator _operator.methodcaller"),
    "an operator as argument": (
        put(f"{NODE}/inputs/0/arg", {"as_operator": "torch.load"}), "operator torch.load",
    ),
    "the name of an input": (everywhere("x", f"x={RUN}"), f"name x={RUN}"),
    "the name of an argument": (
        put("graph_module/module_call_graph/0/signature/forward_arg_names", [f"x={RUN}"]), f"name x={RUN}",
    ),
    "the name of a parameter": (everywhere("conv.weight", f'a" + {RUN} + "'), f'literal a" + {RUN}'),
    "a constant": (
        put(
            "graph_module/signature/input_specs/0",
            {"constant_input": {"name": "c", "value": {"as_string": f"' + {RUN}"}}},
        ),
        f"literal ' + {RUN}",
    ),
    "an enum": (tree(__enum__=True, fqn="antigravity:X", name="Y"), "antigravity.X"),
    "a default factory": (
        tree(default_factory_module="os", default_factory_name="system", dict_context=[]), "os.system",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit, name", EDITS.values(), ids=EDITS)
def test_what_loading_would_run_is_named(
    edit: Edit, name: str, slow: tuple[Path, Any], tmp_path: Path, read: Read
) -> None:
    path = repack(slow[0], tmp_path / "m.pt2", edit)
    checkpoint = read(path)
    (call,) = checkpoint.load_calls
    assert call.name.startswith(name)
    assert call.danger is Danger.OTHER
    assert len(call.name) < 90
    assert [layer.name for layer in checkpoint.layers] == ["bn"]
    (finding,) = [finding for finding in inspect(path).findings if finding.code == "F901"]
    assert finding.message.startswith(f"torch.export.load would call 1 name: {name}")
    assert finding.severity is Severity.ERROR


@pytest.mark.parametrize("ident, runs", [("a size", True), ("the name of an input", True)])
def test_torch_does_run_them(
    ident: str, runs: bool, slow: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said of these files is true: loading them with this torch executes the text."""
    ran: list[str] = []
    monkeypatch.setattr(os, "system", lambda command: ran.append(command) or 0)
    path = repack(slow[0], tmp_path / "m.pt2", EDITS[ident][0])
    with pytest.raises(Exception):  # noqa: B017 - whatever torch makes of what the text gives
        load(path).module()
    assert bool(ran) is runs


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo",)


def config(**entry: Any) -> bytes:
    return json.dumps({"config": {"k": {"is_param": False, "use_pickle": True, "tensor_meta": None, **entry}}}).encode()


PICKLES: dict[str, dict[str, bytes | None]] = {
    "sample inputs": {"data/sample_inputs/model.pt": saved((Bomb(),))},
    "sample inputs, bare": {"data/sample_inputs/model.pt": pickle.dumps(Bomb())},
    "sample inputs in another case": {
        "data/sample_inputs/model.pt": None, "data/Sample_Inputs/Model.pt": saved((Bomb(),)),
    },
    "a second pickle": {"data/sample_inputs/model.pt": pickle.dumps(1) + pickle.dumps(Bomb())},
    "weights": {"data/weights/model.pt": saved({"a": Bomb()})},
    "constants": {"data/constants/model.pt": saved({"a": Bomb()})},
    "a pickled constant": {
        "data/constants/model_constants_config.json": config(path_name="tensor_0"),
        "data/constants/tensor_0": saved(Bomb()),
    },
    "an opaque object": {
        "data/constants/model_constants_config.json": config(path_name="opaque_obj_0"),
        "data/constants/opaque_obj_0": pickle.dumps(Bomb()),
    },
}  # fmt: skip


@pytest.mark.parametrize("records", PICKLES.values(), ids=PICKLES)
def test_pickles_inside_are_judged(
    records: dict[str, bytes | None], slow: tuple[Path, Any], tmp_path: Path, read: Read
) -> None:
    checkpoint = read(repack(slow[0], tmp_path / "m.pt2", records=records))
    assert [(call.name, call.danger) for call in checkpoint.load_calls] == [
        (f"{os.system.__module__}.system", Danger.OTHER)
    ]
    assert checkpoint.loader == "torch.export.load"


def test_native_code_and_scripts_beside_a_graph_are_named(slow: tuple[Path, Any], tmp_path: Path, read: Read) -> None:
    records: dict[str, bytes | None] = {"data/aotinductor/model/x.so": b"\x7fELF"}
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}))
        archive.writestr("m/constants.pkl", pickle.dumps(()))
    records["data/sample_inputs/model.pt"] = script.getvalue()
    checkpoint = read(repack(slow[0], tmp_path / "m.pt2", records=records))
    assert [call.name.partition(" ")[0] for call in checkpoint.load_calls] == ["native", "torch.jit.load"]


def test_texts_without_end_are_named_and_not_looked_at(slow: tuple[Path, Any], tmp_path: Path, read: Read) -> None:
    sizes = [{"as_expr": {"expr_str": f"s0 + {'1 + ' * 500}{n}"}} for n in range(2000)]
    path = repack(slow[0], tmp_path / "m.pt2", put("graph_module/more", sizes))
    (call,) = read(path).load_calls
    assert call.name.startswith("expressions of 4,0")


def view(**changes: Any) -> bytes:
    meta = {
        "dtype": 7, "sizes": [{"as_int": 8}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "layout": 7,
    } | changes  # fmt: skip
    entry = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": meta}
    return json.dumps({"config": {"bn.weight": entry}}).encode()


CONFIG = "data/weights/model_weights_config.json"

REFUSED: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no JSON": ({"models/model.json": b"{"}, "not valid JSON"),
    "no object": ({"models/model.json": b"[]"}, "not a JSON object"),
    "not UTF-8": ({"models/model.json": b'{"a": "\xff"}'}, "not valid JSON"),
    "a name twice": ({"models/model.json": b'{"a": 1, "a": 2}'}, "twice"),
    "deep": ({"models/model.json": b'{"a":' * 100_000}, "not valid JSON"),
    "many objects": ({"models/model.json": b'{"a": [' + b"{}," * 900_000 + b"{}]}"}, "larger than that of any model"),
    "a number of a million digits": ({"models/model.json": b'{"a": ' + b"9" * 1_000_000 + b"}"}, "not valid JSON"),
    "too large a view": ({CONFIG: view(sizes=[{"as_int": 10**6}])}, "does not fit"),
    "an offset beyond": ({CONFIG: view(storage_offset={"as_int": 10**6})}, "does not fit"),
    "a negative stride": ({CONFIG: view(strides=[{"as_int": -1}])}, "does not fit"),
    "an expression for a size": ({CONFIG: view(sizes=[{"as_expr": {"expr_str": "1"}}])}, "no sensible shape"),
    "a size beyond 64 bits": ({CONFIG: view(sizes=[{"as_int": 2**70}])}, "no sensible shape"),
    "sizes without strides": ({CONFIG: view(strides=[])}, "does not fit"),
    "a record that is not there": ({CONFIG: view().replace(b"weight_0", b"../../etc")}, "there is none"),
    "damaged sample inputs": ({"data/sample_inputs/model.pt": b"\x80\x02abc"}, "unknown opcode|well-formed|middle"),
    "a file of torch.save as well": ({"data.pkl": b"\x80\x02N."}, "torch.save at once"),
    "large pickles": ({"data/sample_inputs/model.pt": b"\x80\x02" + b"N0" * 3_000_000}, "pickles take more"),
}


@pytest.mark.parametrize("records, words", REFUSED.values(), ids=REFUSED)
def test_damaged_packages_are_refused(
    records: dict[str, bytes | None], words: str, slow: tuple[Path, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(repack(slow[0], tmp_path / "m.pt2", records=records))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def places(value: Any, path: str = "") -> list[str]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, child in inner:
        if "/" not in str(key):
            found += [f"{path}{key}", *places(child, f"{path}{key}/")]
    return found


@pytest.mark.parametrize("value", [None, 7, -1.5, "text", [], {}, [[]], {"as_int": "x"}, True], ids=repr)
def test_values_of_the_wrong_type_raise_nothing_else(value: Any, slow: tuple[Path, Any], tmp_path: Path) -> None:
    """Every value of the graph and the config replaced in turn: a report or an InputError."""
    with zipfile.ZipFile(slow[0]) as archive:
        graph = json.loads(archive.read("slow/models/model.json"))
        weights = json.loads(archive.read(f"slow/{CONFIG}"))
    plain = {name for name in places(graph) if not name.startswith("graph_module/graph/tensor_values")}
    for place in sorted(plain)[::3]:
        checked(repack(slow[0], tmp_path / "m.pt2", put(place, value)))
    for place in places(weights)[::7]:
        changed = json.loads(json.dumps(weights))
        put(place, value)(changed)
        checked(repack(slow[0], tmp_path / "m.pt2", records={CONFIG: json.dumps(changed).encode()}))


def checked(path: Path) -> None:
    try:
        with open_checkpoint(path) as checkpoint:
            for layer in checkpoint.layers:
                layer.numbers.load()
    except InputError:
        pass


def test_random_damage_raises_nothing_else(slow: tuple[Path, Any], tmp_path: Path) -> None:
    raw = slow[0].read_bytes()
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(raw)
        for place in random.integers(0, len(raw), 3):
            damaged[place] ^= struct.pack("B", random.integers(1, 256))[0]
        (tmp_path / "m.pt2").write_bytes(damaged)
        checked(tmp_path / "m.pt2")
