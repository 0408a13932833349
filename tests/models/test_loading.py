"""A file, or weights and an architecture, become a module; whatever goes wrong is said in a line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normdoctor as nd
from normdoctor.errors import CannotRunError, MisfitError
from normdoctor.models.architecture import users_code
from normdoctor.models.inputs import parse_input_shapes
from normdoctor.models.loaded import Kind, Loaded
from normdoctor.models.with_torch import dtype_of, make_example, open_model, run

FITTING = ["weights.pt", "legacy.pt", "wrapped.pt", "lightning.ckpt", "module.pt"]


def outputs(loaded: Loaded) -> Any:
    return run(loaded, make_example(loaded, parse_input_shapes(["2,3,6,6"])))["output"]


@pytest.mark.parametrize("name", FITTING)
def test_weights_into_an_architecture(here: Path, name: str) -> None:
    loaded = open_model(here / name, arch="archs:Net")
    expected = torch.load(here / "weights.pt")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.model.state_dict().items())
    assert loaded.evaluation and loaded.kind is Kind.MODULE


@pytest.mark.parametrize("arch", ["archs:Zoo.Deep", "archs.py:Net", "archs:ready", "archs:chatty"])
def test_ways_to_name_it(here: Path, arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(open_model(here / "weights.pt", arch=arch).model, torch.nn.Module)
    assert not capsys.readouterr().out


def test_the_type_of_the_file_is_kept(here: Path) -> None:
    loaded = open_model(here / "half.pt", arch="archs:Net")
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {torch.float16}
    assert dtype_of(loaded) is torch.float16 and outputs(loaded).shape == (2, 5)


def test_the_key_chooses(here: Path) -> None:
    both = torch.load(here / "two.pt")
    loaded = open_model(here / "two.pt", arch="archs:Net", key="state_dict_ema")
    assert torch.equal(loaded.model.head.weight, both["state_dict_ema"]["head.weight"])
    for key in (None, "state_dict_em"):
        with pytest.raises(nd.UsageError) as caught:
            open_model(here / "two.pt", arch="archs:Net", key=key)
        assert "state_dict, state_dict_ema" in caught.value.hint


def test_a_whole_module(here: Path) -> None:
    with pytest.raises(nd.RefusedError, match=r"would execute .* archs\.Net") as caught:
        open_model(here / "module.pt")
    assert "--trust" in caught.value.hint
    loaded = open_model(here / "module.pt", trust=True)
    assert type(loaded.model).__name__ == "Net" and not loaded.evaluation
    chosen = open_model(here / "modules.pt", trust=True, key="ema")
    assert any("optimizer" in note for note in chosen.losses)
    with pytest.raises(nd.UsageError, match="holds 2 models"):
        open_model(here / "modules.pt", trust=True)


def test_a_class_that_is_gone(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "archs", raising=False)
    with pytest.raises(nd.MissingDependencyError, match="archs cannot be imported"):
        open_model(here / "module.pt", trust=True)
    (tmp_path / "archs.py").write_text("")
    monkeypatch.delitem(sys.modules, "archs", raising=False)
    with pytest.raises(nd.InputError, match=r"cannot be loaded .*Can't get attribute 'Net'") as caught:
        open_model(here / "module.pt", trust=True)
    assert "--arch" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "options", "kind", "words", "hint"),
    [
        ("weights.pt", {}, nd.RefusedError, "cannot prove what feeds what", "--arch"),
        ("weights.pt", {"trust": True}, nd.RefusedError, "cannot prove", "--arch"),
        ("weights.pt", {"arch": "archs"}, nd.UsageError, "names no callable", "--arch"),
        ("weights.pt", {"arch": "archs:Nett"}, nd.UsageError, "has no Nett", "Did you mean Net"),
        ("weights.pt", {"arch": "nowhere.py:Net"}, nd.UsageError, "no such file", "--arch"),
        ("weights.pt", {"arch": "nowhere:Net"}, nd.MissingDependencyError, "no module nowhere", "folder"),
        ("weights.pt", {"arch": "archs:CODE"}, nd.UsageError, "has no CODE", ""),
        ("weights.pt", {"arch": "archs:torch"}, nd.UsageError, "not a class or function", ""),
        ("weights.pt", {"arch": "archs:broken"}, nd.InputError, "ValueError: two", "--arch-args"),
        ("weights.pt", {"arch": "archs:stops"}, nd.InputError, "SystemExit: usage", ""),
        ("weights.pt", {"arch": "archs:tuple_of"}, nd.InputError, "gives a tuple", ""),
        ("weights.pt", {"arch": "needs:Net"}, nd.MissingDependencyError, "no_such_package cannot be", "pip install"),
        ("weights.pt", {"arch": "archs:imports_nothing"}, nd.MissingDependencyError, "no_such_package", "pip"),
        ("weights.pt", {"arch": "breaks:Net"}, nd.MissingDependencyError, "zoolibrary .*nms does not exist", "build"),
        ("weights.pt", {"arch": "archs:Net", "arch_args": "[1]"}, nd.UsageError, "JSON list", "num_classes"),
        ("weights.pt", {"arch": "archs:Net", "arch_args": "{1"}, nd.UsageError, "not valid JSON", ""),
        ("weights.pt", {"arch": "archs:Net", "arch_args": '{"clases": 5}'}, nd.UsageError, "clases", "classes=5"),
        ("weights.pt", {"arch_args": "{}"}, nd.UsageError, "without --arch", "--arch"),
        ("nothing.pt", {}, nd.InputError, "no such file", ""),
    ],
)
def test_what_cannot_be_opened(
    here: Path, name: str, options: dict[str, Any], kind: type[nd.NormDoctorError], words: str, hint: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        open_model(here / name, **options)
    assert hint in caught.value.hint and "\n" not in caught.value.message


def test_keys_that_do_not_match_are_listed(here: Path, tmp_path: Path) -> None:
    with pytest.raises(nd.InputError) as caught:
        open_model(here / "weights.pt", arch="archs:Net", arch_args={"classes": 7})
    assert "2 of another shape: head.weight [5, 8] in the file, [7, 8] in the architecture" in caught.value.message
    state = torch.load(here / "weights.pt")
    del state["conv.weight"]
    state |= {f"extra.{n}.weight": torch.ones(3) for n in range(12)}
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(nd.InputError) as caught:
        open_model(tmp_path / "odd.pt", arch="archs:Net")
    assert "1 missing in the file: conv.weight" in caught.value.message
    assert "12 not in the architecture: extra.0.weight" in caught.value.message
    assert "extra.9.weight and 2 more" in caught.value.message


def test_a_tied_weight_need_not_be_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tied.py").write_text(
        "from torch import nn\n"
        "class Tied(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)\n"
        "        self.b.weight = self.a.weight\n"
        "    def forward(self, x):\n"
        "        return self.b(self.a(x))\n"
    )
    monkeypatch.chdir(tmp_path)
    state = {"a.weight": torch.rand(4, 4), "a.bias": torch.rand(4), "b.bias": torch.rand(4)}
    torch.save(state, tmp_path / "tied.pt")
    model = open_model(tmp_path / "tied.pt", arch="tied.py:Tied").model
    assert model.b.weight is model.a.weight and torch.equal(model.a.weight, state["a.weight"])


@pytest.mark.parametrize(
    ("shapes", "kind", "words", "hint"),
    [
        ([], nd.UsageError, r"shapes of its inputs \(image, scale\)", "--input-shape"),
        (["picture=1,3,6,6"], nd.UsageError, "takes no picture", "image, scale"),
        (["1,4,6,6"], CannotRunError, "to have 3 channels, but got 4", "(image, scale)"),
        (["1,3,6,6", "1,9"], CannotRunError, r"on image 1x3x6x6, scale 1x9", "--input-shape"),
        (["1,3,6,6:int64"], CannotRunError, "int64", "--input-shape"),
    ],
)
def test_inputs_that_do_not_fit(
    here: Path, shapes: list[str], kind: type[nd.NormDoctorError], words: str, hint: str
) -> None:
    loaded = open_model(here / "weights.pt", arch="archs:Net")
    with pytest.raises(kind, match=words) as caught:
        run(loaded, make_example(loaded, parse_input_shapes(shapes)))
    assert hint in caught.value.hint and "\n" not in caught.value.message


def test_inputs_by_name(here: Path) -> None:
    loaded = open_model(here / "weights.pt", arch="archs:Net")
    example = make_example(loaded, parse_input_shapes(["image=1,3,6,6", "scale=1,8"]))
    assert set(example.kwargs) == {"image", "scale"}
    assert run(loaded, example)["output"].shape == (1, 5)


@pytest.mark.parametrize(("package", "name"), [("sklearn", "scikit-learn"), ("yaml", "PyYAML"), ("nowhere", "nowhere")])
def test_what_pip_calls_a_missing_package(here: Path, package: str, name: str) -> None:
    with pytest.raises(nd.MissingDependencyError) as caught, users_code("--arch x:Y"):
        raise ModuleNotFoundError(f"No module named '{package}.inner'", name=f"{package}.inner")
    assert caught.value.hint.endswith(f"pip install {name}")


def test_training_state_beside_the_weights_is_said_to_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny_net.py").write_text(
        "from torch import nn\n\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
    )
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, "run.pt")
    report = nd.fold("run.pt", arch="tiny_net:make", input_shape="2,3,8,8").report
    assert any("optimizer" in note for note in report.notes)


def test_the_counter_of_an_average_is_no_part_of_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of AveragedModel opens as what was averaged; what is written again has the counter still."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Path(tmp_path, "averaged_net.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))\n"
    )
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)))
    for _ in range(2):
        average.update_parameters(average.module)
    path, fixed, data = tmp_path / "swa.pt", tmp_path / "fixed.pt", tmp_path / "data.npy"
    torch.save(average.state_dict(), path)
    loaded = open_model(path, arch="averaged_net:net")
    assert torch.equal(loaded.model[0].weight, average.module[0].weight)
    assert [note for note in loaded.notes if "n_averaged" in note]
    np.save(data, np.random.default_rng(0).standard_normal((64, 4), np.float32))
    nd.recalibrate(path, data, arch="averaged_net:net", output=fixed)
    written = torch.load(fixed)
    assert written.keys() == average.state_dict().keys()
    assert int(written["n_averaged"]) == 2 and written["module.1.running_mean"].any()


class NoForward(torch.nn.Module):
    """Only layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)


class Fails(NoForward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize(
    ("kind", "words"),
    [(NoForward, "NotImplementedError: Module .NoForward. is missing"), (Fails, "RuntimeError: broken")],
)
def test_a_module_that_cannot_run_is_an_error(kind: type[torch.nn.Module], words: str) -> None:
    with pytest.raises(MisfitError, match=words) as caught:
        nd.inspect(kind(), input_shape="2,4")
    assert "kernel" not in caught.value.message


def test_an_operator_without_a_kernel_is_not_the_inputs_fault() -> None:
    class Elsewhere(NoForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("Could not run 'aten::nms' with arguments from the 'CPU' backend.")

    loaded = Loaded(Kind.MODULE, Elsewhere(), "Elsewhere")
    with pytest.raises(CannotRunError, match="no kernel here") as caught:
        run(loaded, make_example(loaded, parse_input_shapes(["2,4"])))
    assert not isinstance(caught.value, MisfitError)
