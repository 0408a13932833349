"""A checkpoint, and where its norms stand: the same from every format, and never the end of an inspection."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import normdoctor as nd
from normdoctor import placing
from normdoctor.errors import MisfitError, RefusedError, UsageError
from normdoctor.findings import GRAPH_FIELD, Survey
from normdoctor.layers import NormLayer
from normdoctor.places import Place
from normdoctor.reports import json as json_report
from normdoctor.reports.places import fed_by, feeds, fold_of

IMAGES, SHAPE = (2, 3, 16, 16), "2,3,16,16"

Inspected = Callable[[Path, nn.Module], nd.Report]

WAYS: dict[str, Inspected] = {
    "onnx": lambda files, net: nd.inspect(files / "net.onnx"),
    "pt2": lambda files, net: nd.inspect(files / "net.pt2"),
    "module": lambda files, net: nd.inspect(files / "module.pt", trust=True, input_shape=SHAPE),
    "script": lambda files, net: nd.inspect(files / "script.pt", trust=True, input_shape=SHAPE),
    "weights": lambda files, net: nd.inspect(files / "weights.pt", arch="placing_nets:Residual", input_shape=SHAPE),
    "live, by shape": lambda files, net: nd.inspect(net, input_shape=SHAPE),
    "live, by example": lambda files, net: nd.inspect(net, example_inputs=torch.zeros(IMAGES)),
    "live, on data": lambda files, net: nd.inspect(net, data=torch.randn(4, 3, 16, 16)),
    "module, on data": lambda files, net: nd.inspect(files / "module.pt", data=torch.randn(4, 3, 16, 16), trust=True),
    "pt2, on data": lambda files, net: nd.inspect(files / "net.pt2", data=torch.randn(4, 3, 16, 16)),
    "onnx, on data": lambda files, net: nd.inspect(
        files / "net.onnx", data=np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    ),
}

SAID = {
    "bn1": ("conv1", "relu", "into conv1"),
    "bn2": ("conv2", "addition", "into conv2"),
    "tail.1": ("tail.0", "silu", "into tail.0"),
    "bn3": ("max-pooling(silu(tail.1))", "mean", "into head"),
}


def place_of(report: nd.Report, name: str) -> Place:
    place = next(layer.place for layer in report.layers if layer.name == name)
    assert place is not None
    return place


def said(layer: NormLayer) -> tuple[str, str, str]:
    return fed_by(layer), feeds(layer), fold_of(layer)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_leads_to_the_same_places(way: str, files: Path, net: nn.Module) -> None:
    report = WAYS[way](files, net)
    assert not [note for note in report.notes if "graph" in note]
    assert {layer.name: said(layer) for layer in report.layers} == SAID
    expected = nd.inspect(net, example_inputs=torch.zeros(IMAGES))
    for name in SAID:
        place, other = place_of(report, name), place_of(expected, name)
        assert not place.inferred
        assert (place.calls, place.positions, place.unpredicted) == (1, 256 if name != "bn3" else 64, other.unpredicted)
        assert (place.activation and place.activation.name) == (other.activation and other.activation.name)
        if name != "bn3":
            assert place.producer is not None and other.producer is not None and place.producer.alone
            assert (place.producer.bias is None) == (name == "bn2")
            np.testing.assert_allclose(place.producer.largest, other.producer.largest, rtol=1e-6)
        if name in ("bn2", "tail.1"):
            assert place.prediction is not None and other.prediction is not None
            assert place.prediction.sources == other.prediction.sources
            np.testing.assert_allclose(place.prediction.mean, other.prediction.mean, rtol=1e-5, atol=1e-6)
    assert not [skip for skip in report.skips if GRAPH_FIELD in skip.missing]


def test_quick_builds_no_graph_and_says_what_is_left_out(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a graph was built")

    monkeypatch.setattr(placing, "placed", refuse)
    report = nd.inspect(files / "net.onnx", quick=True)
    assert all(layer.place is None for layer in report.layers)
    left_out = {skip.code for skip in report.skips if skip.missing == (GRAPH_FIELD,) and skip.layer is None}
    assert {"G501", "G502"} <= left_out
    nd.inspect(files / "net.onnx", select="S,A201")  # none of them needs it
    with pytest.raises(AssertionError, match="a graph was built"):
        nd.inspect(files / "net.onnx", select="G501")


def test_a_live_module_stays_as_it_was(net: nn.Module) -> None:
    made = copy.deepcopy(net).train()
    made.bn1.eval()
    before, modes = copy.deepcopy(made.state_dict()), {name: m.training for name, m in made.named_modules()}
    nd.inspect(made, input_shape=SHAPE)
    assert {name: m.training for name, m in made.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())


def test_numbers_that_were_read_are_kept(files: Path) -> None:
    with nd.open_checkpoint(files / "net.pt2") as checkpoint:
        numbers = [layer.numbers for layer in checkpoint.layers]
        placed = placing.placed(files / "net.pt2", checkpoint, placing.PlaceOptions())
        assert [layer.numbers for layer in placed.layers] == numbers


# what cannot be had


def test_a_graph_that_makes_no_sense_is_noted(files: Path, tmp_path: Path) -> None:
    model = onnx.load(files / "net.onnx")
    model.graph.node.append(helper.make_node("Relu", ["x"], [model.graph.node[0].output[0]]))
    onnx.save(model, tmp_path / "twice.onnx")
    report = nd.inspect(tmp_path / "twice.onnx")
    assert len(report.layers) == 4
    (note,) = [note for note in report.notes if "graph" in note]
    assert "the graph could not be read" in note and "made more than once" in note and "skipped" in note
    assert {"G501", "G502"} <= {skip.code for skip in report.skips if GRAPH_FIELD in skip.missing}


def test_code_that_no_tracer_follows_is_noted(nets: ModuleType) -> None:
    report = nd.inspect(nets.Undecided(), input_shape=SHAPE)
    assert any("the graph could not be read" in note and "torch.export" in note for note in report.notes)
    assert all(layer.place is None for layer in report.layers)


def test_a_norm_that_the_graph_has_not_is_no_skip(files: Path) -> None:
    """A module with a norm that no forward reaches: what can be said of the others is said."""

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.spare = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.bn(self.conv(x)))

    report = nd.inspect(Spare().eval(), input_shape=SHAPE)
    assert {layer.name: layer.place is not None for layer in report.layers} == {"bn": True, "spare": False}
    assert not [skip for skip in report.skips if GRAPH_FIELD in skip.missing]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"trust": True}, UsageError, "shapes of its inputs"),
        ({"trust": True, "input_shape": "2,5,16,16"}, MisfitError, "cannot be run"),
        ({"trust": True, "input_shape": "wide"}, UsageError, "no list of lengths"),
        ({"input_shape": SHAPE}, UsageError, "for models that torch runs"),
        ({"key": "ema"}, UsageError, "for models that torch runs"),
        ({"arch_args": "{}"}, UsageError, "without --arch"),
        ({"trust": True, "input_shape": SHAPE, "example_inputs": 0}, UsageError, "exclude each other"),
        ({"trust": True, "data": torch.zeros(IMAGES), "input_shape": SHAPE}, UsageError, "those of the data"),
    ],
)
def test_options_that_do_not_fit(files: Path, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        nd.inspect(files / "module.pt", **options)


def test_an_architecture_means_nothing_for_onnx(files: Path) -> None:
    with pytest.raises(UsageError, match="ONNX"):
        nd.inspect(files / "net.onnx", arch="placing_nets:Residual")
    assert place_of(nd.inspect(files / "net.onnx", trust=True), "bn1")  # nothing to distrust


def test_a_state_dict_in_memory_cannot_be_traced(net: nn.Module) -> None:
    with pytest.raises(RefusedError, match="flat dictionary"):
        nd.inspect(net.state_dict(), input_shape=SHAPE)


def test_weights_with_trust_alone_are_weights(files: Path) -> None:
    assert place_of(nd.inspect(files / "weights.pt", trust=True), "bn1").inferred


# files


def test_programs_of_one_package_have_graphs_of_their_own(net: nn.Module, tmp_path: Path) -> None:
    """A .pt2 with two programs; the other one has no residual addition."""
    from torch.export import export
    from torch.export.pt2_archive._package import package_pt2

    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    programs = {name: export(made, (torch.zeros(IMAGES),)) for name, made in (("a", net), ("b", other))}
    package_pt2(tmp_path / "two.pt2", exported_programs=programs)
    report = nd.inspect(tmp_path / "two.pt2")
    assert said(next(layer for layer in report.layers if layer.name == "a:bn2"))[:2] == ("conv2", "addition")
    assert said(next(layer for layer in report.layers if layer.name == "b:1"))[:2] == ("0", "relu")


def test_local_functions_are_looked_into(tmp_path: Path) -> None:
    """Each call of a function is a place of its own; nothing is written or inlined for it."""
    weights = [helper.make_tensor(f"w{i}", TensorProto.FLOAT, [4, 4, 1, 1], np.eye(4).ravel()) for i in range(2)]
    vectors = [
        helper.make_tensor(f"{name}{i}", TensorProto.FLOAT, [4], np.full(4, 0.5 + i))
        for i in range(2)
        for name in ("g", "b", "m", "v")
    ]
    body = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    block = helper.make_function("mine", "Block", ["x", "w", "g", "b", "m", "v"], ["y"], body, opsets[:1])
    calls = [
        helper.make_node("Block", [before, *(f"{name}{i}" for name in "wgbmv")], [after], domain="mine")
        for i, before, after in ((0, "x", "h"), (1, "h", "out"))
    ]
    graph = helper.make_graph(
        calls,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 4, 8, 8])],
        [*weights, *vectors],
    )
    onnx.save(helper.make_model(graph, functions=[block], opset_imports=opsets, ir_version=10), tmp_path / "f.onnx")
    report = nd.inspect(tmp_path / "f.onnx")
    assert len(report.layers) == 2
    assert [layer.place is not None and layer.place.activation is not None for layer in report.layers] == [True] * 2


# reports


def test_json_has_predicted_beside_stored(files: Path) -> None:
    document = json.loads(json_report.render(Survey(reports=(nd.inspect(files / "net.pt2"),))))
    layers = {layer["name"]: layer["place"] for layer in document["files"][0]["layers"]}
    bn2 = layers["bn2"]
    assert bn2["producer"] == {
        "op": "convolution", "written": "aten.conv2d", "label": "conv2", "activation": None, "alone": True,
        "bias": False,
    }  # fmt: skip
    assert bn2["joins_branches"] is True and bn2["fold"]["into"] == ["conv2"]
    assert len(bn2["prediction"]["predicted"]) == len(bn2["prediction"]["stored"]) == 8
    assert bn2["prediction"]["sources"] == ["bn1"] and bn2["prediction"]["exact"] is False
    assert layers["bn1"]["activation"] == {
        "name": "relu",
        "low": None,
        "high": None,
        "label": layers["bn1"]["activation"]["label"],
    }
    assert layers["bn1"]["prediction"] is None and layers["bn1"]["unpredicted"]
    quick = json.loads(json_report.render(Survey(reports=(nd.inspect(files / "net.pt2", quick=True),))))
    assert all(layer["place"] is None for layer in quick["files"][0]["layers"])
