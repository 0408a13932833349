"""TorchScript archives: what scripted, traced and frozen modules say, and code that is not torch's."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normdoctor as nd
from normdoctor.errors import InputError, RefusedError
from normdoctor.layers import VECTORS, Checkpoint, Container, Danger, NormKind, NormLayer
from normdoctor.readers import torchscript_modules
from normdoctor.readers.torchscript_code import UNKNOWN, Attribute, Constant, evaluate, read_classes
from normdoctor.recalibration import recalibrate
from tests.readers.test_contract import HYPER, Module, Unit, build_net

Read = Callable[[Any], Checkpoint]


def archive(net: nn.Module, path: Path, *examples: torch.Tensor, freeze: bool = False) -> Path:
    """The net scripted, or traced where examples are given, in a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        module: Any = torch.jit.trace(net, examples, check_trace=False) if examples else torch.jit.script(net)
        torch.jit.save(torch.jit.freeze(module) if freeze else module, path)
    return path


def load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        return torch.jit.load(path)


def by_name(checkpoint: Checkpoint) -> dict[str, NormLayer]:
    return {layer.name: layer for layer in checkpoint.layers}


class Flow(Unit):
    """The Unit as a net that runs, so that tracing meets all of it."""

    def forward(self, image: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        image = self.slope(self.gn(self.bn(self.z_first(image))))
        sides = self.a_after(rows[:, :6]).sum() + self.head(self.ln(rows)).sum()
        return sides + self.inorm(image[:, :5]).sum() + self.bare(image[:, :4]).sum()


class TestScripted(Module):
    container = Container.ZIP
    mode_in_code = False

    @pytest.fixture
    def net(self) -> nn.Module:
        net = build_net()
        net.__class__ = Flow
        return net

    def write(self, net: nn.Module, folder: Path) -> Any:
        return archive(net, folder / "m.pt")

    def test_names_of_classes(self, layers: dict[str, NormLayer]) -> None:
        assert layers["bn"].origin == "torch.nn.modules.batchnorm.BatchNorm2d"
        assert layers["bare"].origin == "torch.nn.modules.batchnorm.BatchNorm2d"  # a mangled name in the file

    def test_nothing_is_called_and_nothing_is_noted(self, checkpoint: Checkpoint) -> None:
        assert (checkpoint.load_calls, checkpoint.loader, checkpoint.notes) == ((), "torch.jit.load", ())

    def test_who_decides_the_mode(self, layers: dict[str, NormLayer]) -> None:
        with_mode = {name for name, layer in layers.items() if layer.kind in (NormKind.BATCH, NormKind.INSTANCE)}
        assert {name for name, layer in layers.items() if layer.baked} == (with_mode if self.mode_in_code else set())


class TestTraced(TestScripted):
    """A traced class declares nothing: its calls say what torch recorded."""

    mode_in_code = True

    def write(self, net: nn.Module, folder: Path) -> Any:
        torch.manual_seed(0)
        return archive(net, folder / "m.pt", torch.randn(2, 3, 8, 8), torch.randn(4, 12))

    def test_every_tensor_is_listed(self, checkpoint: Checkpoint, net: nn.Module) -> None:
        named = {ref.name for ref in checkpoint.list_references()}
        assert named == {*net.state_dict(), "CONSTANTS.c0"}  # what the counters are raised by

    def test_what_is_not_said_stays_unknown(self, layers: dict[str, NormLayer]) -> None:
        # momentum=None is recorded in eval mode as 0., which a momentum of 0 is as well
        recorded = {"a_after.1": {"momentum": None}, "bare": {"training": True}}
        for name, fields in HYPER.items():
            said = {field: value for field, value in fields.items() if field != "track_running_stats"}
            said |= recorded.get(name, {})
            assert {field: getattr(layers[name], field) for field in said} == said, name
        assert {layer.track_running_stats for layer in layers.values()} == {None}


# modes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8, eps=1e-3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolution(x)
        for norm in self.norms:
            x = norm(x).relu()
        return x


def trained(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, tensor in net.state_dict().items():
        tensor.copy_(torch.tensor(500) if name.endswith("tracked") else torch.rand(tensor.shape) + 0.5)
    return net


IMAGE = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)


def codes(path: Path) -> dict[str, str]:
    return {finding.code: str(finding.severity) for finding in nd.inspect(path).findings}


def test_a_net_traced_in_training_mode_stays_in_it(tmp_path: Path) -> None:
    path = archive(trained(Block()), tmp_path / "m.pt", IMAGE)
    found = codes(path)
    assert found["C301"] == "error"
    assert not {"C306", "C314"} & found.keys()
    module = load(path).eval()
    together = module(torch.cat([IMAGE, 5 * IMAGE.flip(3)]))
    assert not torch.allclose(together[:1], module(IMAGE), atol=1e-3)  # so much for eval()


def test_a_net_scripted_in_training_mode_can_still_leave_it(tmp_path: Path) -> None:
    found = codes(archive(trained(Block()), tmp_path / "m.pt"))
    assert "C301" not in found and "C314" in found
    net = trained(Block())
    net.norms[1].eval()
    found = codes(archive(net, tmp_path / "m.pt"))
    assert "C306" in found and "C314" not in found


def test_traced_in_eval_mode_is_healthy_in_any_saved_mode(tmp_path: Path) -> None:
    path = archive(trained(Block()).eval(), tmp_path / "m.pt", IMAGE)
    assert not {"C301", "C306", "C314"} & codes(path).keys()


def test_the_recorded_mode_counts_and_the_other_is_noted(tmp_path: Path, read: Read) -> None:
    path = archive(trained(Block()), tmp_path / "m.pt", IMAGE)
    module = load(path).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        torch.jit.save(module, path)
    checkpoint = read(path)
    assert [layer.training for layer in checkpoint.layers] == [True, True]
    assert any("norms.0 and 1 more: the mode in the recorded code counts" in note for note in checkpoint.notes)
    assert codes(path)["C301"] == "error"


# places where the settings stand


class Functional(nn.Module):
    """Norms as functions over parameters of the module's own, and settings as its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first_gain, self.first_shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))
        self.second_gain = nn.Parameter(torch.rand(6))
        self.epsilon = 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x, [6], self.first_gain, self.first_shift, self.epsilon)
        return F.layer_norm(x, [6], self.second_gain, None, 1e-4)

    @torch.jit.export
    def halves(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, [6], self.second_gain * 2, None, 1e-4)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in VECTORS:
            self.register_buffer(name, torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 1e-3)


def test_norms_as_functions(tmp_path: Path, read: Read) -> None:
    checkpoint = read(archive(Functional(), tmp_path / "m.pt"))
    layers = by_name(checkpoint)
    assert {name: (layer.kind, layer.eps, layer.affine) for name, layer in layers.items()} == {
        "forward.layer_norm_1": (NormKind.LAYER, 1e-3, True),
        "forward.layer_norm_2": (NormKind.LAYER, 1e-4, True),
    }
    assert layers["forward.layer_norm_1"].origin == "aten::layer_norm"
    assert any(note.startswith("halves.layer_norm_1: takes tensors that") for note in checkpoint.notes)
    assert {ref.name for ref in checkpoint.list_references()} == {"first_gain", "first_shift", "second_gain"}


def test_a_class_of_the_users_own(tmp_path: Path, read: Read) -> None:
    layer = read(archive(nn.Sequential(Frozen().train()), tmp_path / "m.pt")).layers[0]
    assert (layer.name, layer.kind, layer.eps, layer.channels) == ("0", NormKind.BATCH, 1e-3, 8)
    assert layer.origin is not None and layer.origin.endswith("test_torchscript.Frozen")


class Borrowing(nn.Module):
    """Calls in the code of a parent that take the tensors of its children."""

    def __init__(self, *eps: float) -> None:
        super().__init__()
        self.bn, self.eps = nn.Sequential(nn.BatchNorm2d(3)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bn = self.bn[0]
        for eps in self.eps:
            x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.2, eps)
        return x


def test_calls_recorded_in_the_parent(tmp_path: Path, read: Read) -> None:
    layer = read(archive(Borrowing(1e-3), tmp_path / "one.pt", IMAGE)).layers[0]
    assert (layer.name, layer.eps, layer.momentum, layer.training, layer.baked) == ("bn.0", 1e-3, 0.2, False, True)
    checkpoint = read(archive(Borrowing(1e-3, 1e-2), tmp_path / "two.pt", IMAGE))
    assert [(layer.eps, layer.momentum, layer.training) for layer in checkpoint.layers] == [(None, 0.2, False)]


def test_a_method_for_something_else_does_not_count(tmp_path: Path, read: Read) -> None:
    class Odd(Frozen):
        @torch.jit.export
        def other(self, x: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(x, [8], self.weight, self.bias, 0.5)

    assert [(layer.kind, layer.eps) for layer in read(archive(Odd(), tmp_path / "m.pt")).layers] == [
        (NormKind.BATCH, 1e-3)
    ]


@pytest.mark.parametrize("traced", [False, True])
def test_a_shared_module_is_one_layer(tmp_path: Path, read: Read, traced: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()).eval()
    net.append(net[1])
    checkpoint = read(archive(net, tmp_path / "m.pt", *[IMAGE] * traced))
    assert [(layer.name, layer.aliases, layer.eps) for layer in checkpoint.layers] == [("1", ("3",), 1e-3)]
    assert {ref.name for ref in checkpoint.list_references()} == set(net.state_dict())


def test_every_kind_of_call_with_and_without_defaults(tmp_path: Path, read: Read) -> None:
    net = nn.Sequential(
        nn.GroupNorm(2, 8), nn.GroupNorm(4, 8, eps=1e-3), nn.LayerNorm([8, 8]), nn.LayerNorm(8, 1e-3, bias=False),
        nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-3), nn.InstanceNorm2d(8, affine=True), nn.BatchNorm2d(8, momentum=0.3),
    ).eval()  # fmt: skip
    layers = read(archive(net, tmp_path / "m.pt", torch.randn(1, 8, 8, 8))).layers
    assert [(layer.groups, layer.eps, layer.affine, layer.momentum) for layer in layers] == [
        (2, 1e-5, True, None), (4, 1e-3, True, None), (None, 1e-5, True, None), (None, 1e-3, True, None),
        (None, None, True, None), (None, 1e-3, True, None), (None, 1e-5, True, 0.1), (None, 1e-5, True, 0.3),
    ]  # fmt: skip
    assert [layer.training for layer in layers if layer.baked] == [False]  # an InstanceNorm without buffers has none


def test_a_batchnorm_without_tensors_is_noted(tmp_path: Path, read: Read) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False, track_running_stats=False)).eval()
    scripted, traced = read(archive(net, tmp_path / "s.pt")), read(archive(net, tmp_path / "t.pt", IMAGE))
    assert [(layer.name, layer.channels) for layer in scripted.layers] == [("1", 8)] and not scripted.notes
    assert not traced.layers
    assert traced.notes[0].startswith("1.forward.batch_norm_1: a batch_norm without tensors normalises with the batch")


def test_quantised_layers_and_plain_objects_do_no_harm(tmp_path: Path, read: Read) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.tensors = [torch.ones(2), torch.ones(3, dtype=torch.complex64)]
            self.table = {"a": torch.ones(3, dtype=torch.bool)}
            self.none = None
            self.conv = nn.Conv1d(1, 1, 1)
            self.conv.weight = self.conv.bias = None  # type: ignore[assignment]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    net: Any = Odd()
    del net.conv
    checkpoint = read(archive(net, tmp_path / "m.pt"))
    assert [layer.name for layer in checkpoint.layers] == ["norm"]
    assert sorted(ref.name for ref in checkpoint.list_references()) == ["", "", "", "norm.bias", "norm.weight"]


# frozen


def test_frozen_never_looks_healthy(tmp_path: Path, read: Read) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    checkpoint = read(archive(net, tmp_path / "m.pt", freeze=True))
    assert checkpoint.format == "TorchScript frozen module (zip)" and not checkpoint.layers
    assert "BatchNorms next to convolutions were folded in" in checkpoint.notes[0]
    assert checkpoint.notes[1].startswith("no norm layers: freezing left none")


@pytest.mark.parametrize("traced", [False, True])
def test_frozen_calls_on_constants_are_layers(tmp_path: Path, read: Read, traced: bool) -> None:
    net = trained(Block()).eval()
    path = archive(net, tmp_path / "m.pt", *[IMAGE] * traced, freeze=True)
    checkpoint = read(path)
    layer = by_name(checkpoint)["forward.batch_norm_1"]  # the first was folded
    assert (layer.eps, layer.momentum, layer.training, layer.origin) == (1e-3, 0.1, False, "aten::batch_norm")
    for field in VECTORS:
        np.testing.assert_array_equal(getattr(layer, field).numpy(), getattr(net.norms[1], field).detach().numpy())
    assert {f"{layer.name}.{field}" for field in VECTORS} < {ref.name for ref in checkpoint.list_references()}


# writing


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_repaired_buffers_are_what_torch_loads(tmp_path: Path, kind: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.01)).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(60):
            net(torch.randn(4, 3, 8, 8) * 3)
    path = archive(net.eval(), tmp_path / "m.pt", *[IMAGE] * (kind == "traced"))
    done = recalibrate(path, method="debias", output=tmp_path / "fixed.pt")
    old, new = load(path).state_dict(), load(tmp_path / "fixed.pt").state_dict()
    assert [repair.layer.name for repair in done.report.repairs] == ["1"]
    np.testing.assert_allclose(new["1.running_var"], done.report.repairs[0].running_var, rtol=1e-6)
    assert (new["1.running_var"] > old["1.running_var"]).all()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    assert codes(path)["S104"] and "S104" not in codes(tmp_path / "fixed.pt")


def test_a_constant_that_others_use_is_not_repaired(tmp_path: Path) -> None:
    net = trained(Block()).eval()
    net.norms[1].running_mean.copy_(net.norms[1].bias.detach())  # freezing stores equal values once
    path = archive(net, tmp_path / "m.pt", freeze=True)
    with pytest.raises(RefusedError, match="shares its memory with"):
        recalibrate(path, method="debias", output=tmp_path / "f.pt", updates=20)


# hostile archives


def forge(path: Path, code: str, state: bytes = b"", constants: bytes = pickle.dumps((), 2)) -> Path:
    """An archive of one module, with the opcodes `state` as further attributes of it."""
    with zipfile.ZipFile(path, "w") as file:
        data = b"\x80\x02c__torch__\nNet\n)\x81}(X\x08\x00\x00\x00training\x88" + state + b"ub."
        file.writestr("m/data.pkl", data)
        file.writestr("m/constants.pkl", constants)
        file.writestr("m/code/__torch__.py", code, zipfile.ZIP_DEFLATED)
    return path


HEAD = "class Net(Module):\n  training : bool\n  def forward(self: X,\n    x: Tensor) -> Tensor:\n"
LONG = {
    "brackets": "    " + "(" * 60_000 + "\n",
    "quotes": "    torch.batch_norm(" + '"\\' * 30_000 + "\n",
    "nested calls": "    " + "torch.layer_norm(" * 3_500 + "\n",
    "commas": "    torch.layer_norm(" + "1," * 30_000 + "\n",
    "names": "    " + "a, " * 20_000 + "\n",
    "one line": "    " + "a" * (1 << 20) + "\n",
}


@pytest.mark.parametrize("line", LONG.values(), ids=LONG.keys())
def test_endless_code(tmp_path: Path, read: Read, line: str) -> None:
    checkpoint = read(forge(tmp_path / "m.pt", HEAD + "    a = x_norm\n" + line * ((1 << 20) // len(line) + 1)))
    assert checkpoint.layers == ()


def test_code_beyond_the_limit_is_not_read(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript_modules, "MAX_CODE", 100)
    checkpoint = read(archive(trained(Block()), tmp_path / "m.pt"))
    assert [(layer.name, layer.eps) for layer in checkpoint.layers] == [("norms.0", None), ("norms.1", None)]
    assert any("was not read, since the code takes more than" in note for note in checkpoint.notes)


def test_calls_beyond_the_limit_are_noted(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript_modules, "MAX_CALLS", 3)
    checkpoint = read(forge(tmp_path / "m.pt", HEAD + "    a = torch.layer_norm(x, [1], self.w)\n" * 9))
    assert any("norm operators were read" in note for note in checkpoint.notes)


def test_modules_beyond_the_limit_are_refused(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript_modules, "MAX_MODULES", 2)
    with pytest.raises(InputError, match="more than any model"):
        read(archive(trained(Block()), tmp_path / "m.pt"))


def test_constants_beyond_the_limit_are_refused(tmp_path: Path, read: Read) -> None:
    with pytest.raises(InputError, match=r"constants\.pkl has"):
        read(forge(tmp_path / "m.pt", HEAD, constants=b"\x80\x02" + b"N0" * (1 << 20) + b"N."))


def test_calls_out_of_place_are_listed(tmp_path: Path, read: Read) -> None:
    state = b"X\x01\x00\x00\x00acposix\nsystem\nX\x02\x00\x00\x00ls\x85R"
    found = read(forge(tmp_path / "m.pt", HEAD, state)).load_calls
    assert [(call.name, call.danger) for call in found] == [("posix.system", Danger.OTHER)]
    assert codes(tmp_path / "m.pt")["F901"] == "error"


@pytest.mark.parametrize(
    ("state", "constants"),
    [
        (b"X\x01\x00\x00\x00ac__torch__\nNet\n)\x81K\x05b", pickle.dumps((), 2)),  # a state that is a number
        (b"X\x01\x00\x00\x00ac__torch__.no\nWhere\n)\x81", pickle.dumps("text", 2)),
        (b"K\x01c__torch__.torch.classes.x\nPacked\n)\x81", pickle.dumps([1], 2)),
    ],
)
def test_odd_objects(tmp_path: Path, read: Read, state: bytes, constants: bytes) -> None:
    code = HEAD + "    a = torch.batch_norm(x, CONSTANTS.c0, CONSTANTS.c7, self.a.b.c, self.a, False, 0.1, 0.1, True)\n"
    checkpoint = read(forge(tmp_path / "m.pt", code, state, constants))
    assert checkpoint.layers == () and checkpoint.list_references() == ()


def test_a_loop_of_modules_ends(tmp_path: Path, read: Read) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02c__torch__\nNet\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.")
        file.writestr("m/constants.pkl", pickle.dumps((), 2))
    assert read(tmp_path / "m.pt").layers == ()


@pytest.mark.parametrize("broken", ["data.pkl", "constants.pkl"])
def test_broken_pickles(tmp_path: Path, read: Read, broken: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl"):
            file.writestr(f"m/{name}", b"\x80\x02" if name == broken else pickle.dumps((), 2))
    with pytest.raises(InputError, match=broken):
        read(tmp_path / "m.pt")


# code


def calls_of(body: str) -> list[dict[str, Any]]:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return [dict(call.arguments) for call in read_classes(HEAD + lines, 100)["Net"].calls]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.0000000000000001e-05", 1e-5), ("0.", 0.0), ("-3", -3), ("[6, 8]", (6, 8)), ("(8,)", (8,)), ("[]", ()),
        ("True", True), ("None", None), ("CONSTANTS.c12", Constant(12)), ("self.a.b", Attribute(("a", "b"))),
        ('getattr(self.norms, "0")', Attribute(("norms", "0"))), ("unchecked_cast(Tensor, self.w)", Attribute(("w",))),
        ("annotate(Optional[Tensor], None)", None), ("x", UNKNOWN), ("torch.mul(1, 2)", UNKNOWN), ("1 + 1", UNKNOWN),
        ("[1, x]", UNKNOWN), ("9" * 300, UNKNOWN), ("float(\"inf\")", UNKNOWN), ("", UNKNOWN),
        ("__import__", UNKNOWN), ("self" + ".a" * 100, UNKNOWN),
    ],
)  # fmt: skip
def test_expressions(text: str, value: Any) -> None:
    assert evaluate(text, {"self": Attribute(())}) == value


def test_a_name_with_two_values_says_nothing() -> None:
    branches = "if c:\n  eps = 0.1\nelse:\n  eps = 0.2\n_ = torch.layer_norm(x, [8], None, None, eps)"
    agreeing = branches.replace("0.2", "0.1")
    loop = "n = 2\nfor n in range(3):\n  _ = torch.group_norm(x, n)"
    pair = "n = 2\nn, m, = f(x)\n_ = torch.group_norm(x, n)"
    assert [calls_of(body)[0]["eps"] for body in (branches, agreeing)] == [UNKNOWN, 0.1]
    assert [calls_of(body)[0]["num_groups"] for body in (loop, pair)] == [UNKNOWN, UNKNOWN]
    assert calls_of("_ = torch.group_norm(x, x)")[0]["num_groups"] is UNKNOWN


def test_nested_calls_strings_and_names_of_arguments() -> None:
    found = calls_of('y = torch.group_norm(torch.layer_norm(f(x, ")"), [8], eps=0.5), 4, None, self.b)')
    assert (found[0]["eps"], found[0]["normalized_shape"]) == (0.5, (8,))
    assert (found[1]["num_groups"], found[1]["weight"], found[1]["bias"]) == (4, None, Attribute(("b",)))


def test_text_that_is_no_code() -> None:
    for text in (
        "",
        "\n\n",
        "class",
        "class A(",
        "  def f(self",
        HEAD.replace("\n", "\r"),
        "\0" * 50,
        "  x : Final[int] = 1",
    ):
        assert all(not code.calls for code in read_classes(text, 9).values())
