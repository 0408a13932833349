"""What a folded .pt2 shares with the original byte by byte, and what becomes of the rest."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normdoctor as nd
from normdoctor.errors import InputError, NormDoctorError, RefusedError, UsageError
from normdoctor.folding import export_edits
from normdoctor.readers import torch_export
from normdoctor.readers.arrays import Source
from normdoctor.readers.torch_pickle import ZipRecords

from .pt2_tools import close, flow_of, fold, run, save, trained

X = (torch.randn(2, 3, 8, 8),)

GRAPH = "models/model.json"


def net() -> nn.Module:
    torch.manual_seed(0)
    return trained(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pt2") / "net.pt2", net(), X)


def records_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def edited(original: Path, path: Path, edit: Callable[[Any], object]) -> Path:
    """The file with another graph."""
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith(GRAPH):
                record = json.loads(content)
                edit(record)
                content = json.dumps(record).encode()
            target.writestr(info.filename, content)
    return path


def test_other_records_stay(original: Path, tmp_path: Path) -> None:
    before, after = records_of(original), records_of(fold(original, tmp_path / "folded.pt2").path)
    changed = {"models/model.json", "data/weights/model_weights_config.json"}
    assert all(after[name] == before[name] for name in before.keys() & after.keys() - changed)
    # conv.weight and conv.bias lie in new records; those and the norm's five are gone
    assert len(after.keys() - before.keys()) == 2 and len(before.keys() - after.keys()) == 7
    config = json.loads(after["data/weights/model_weights_config.json"])["config"]
    assert {f"data/weights/{entry['path_name']}" for entry in config.values()} <= after.keys()
    assert list(config) == ["0.weight", "0.bias", "3.weight", "3.bias", "4.weight", "4.bias"]


def test_graph_changes_where_it_must(original: Path, tmp_path: Path) -> None:
    before = json.loads(records_of(original)[GRAPH])
    after = json.loads(records_of(fold(original, tmp_path / "folded.pt2").path)[GRAPH])
    first, second = before["graph_module"]["graph"], after["graph_module"]["graph"]
    kept = [node for node in first["nodes"] if node["name"] != "batch_norm"]
    kept[1]["inputs"][0]["arg"] = {"as_tensor": {"name": "conv2d"}}
    assert second["nodes"] == kept
    for record in (before, after):
        record["graph_module"].pop("graph")
        record["graph_module"].pop("signature")
    assert before == after


def test_data_of_records_is_aligned(original: Path, tmp_path: Path) -> None:
    with Source(fold(original, tmp_path / "folded.pt2").path) as source:
        records = ZipRecords(source)
        assert {records.data_offset(info) % 64 for info in records.infos.values()} == {0}


def test_inspect_reads_what_was_written(original: Path, tmp_path: Path) -> None:
    report = nd.inspect(fold(original, tmp_path / "folded.pt2").path)
    assert [layer.name for layer in report.layers] == ["4"]


def test_nothing_to_fold_gives_the_same_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pt2", trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), X)
    folded = fold(path)
    assert folded.path.read_bytes() == path.read_bytes()
    assert folded.counts.parameters == (112, 112) and folded.counts.nodes == (2, 2)


def test_the_input_is_not_touched_and_a_failure_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = original.read_bytes()

    def fails(*_: object) -> bytes:
        raise InputError("no")

    monkeypatch.setattr(export_edits, "encode", fails)
    with pytest.raises(InputError):
        fold(original, tmp_path / "folded.pt2")
    assert list(tmp_path.iterdir()) == [] and original.read_bytes() == before


def test_training_mode_meant_for_inference(tmp_path: Path) -> None:
    module = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    expected = [module(*X).detach()]
    path = save(tmp_path / "net.pt2", module.train(), X)
    folded = fold(path, evaluation=True)
    assert folded.gone == ["1"] and folded.left == ["3"]
    assert close(expected, run(torch.export.load(folded.path), X))


def test_several_programs(tmp_path: Path) -> None:
    from torch.export.pt2_archive._package import load_pt2, package_pt2

    programs = {name: torch.export.export(net(), X) for name in ("first", "second")}
    path = tmp_path / "both.pt2"
    package_pt2(str(path), exported_programs=programs)
    with pytest.raises(UsageError, match="several programs") as caught:
        flow_of(path)
    assert "first, second" in caught.value.hint
    folded = fold(path, key="second")
    loaded = load_pt2(str(folded.path)).exported_programs
    expected = run(programs["first"], X)
    assert all(close(expected, run(loaded[name], X)) for name in programs)
    counts = [sum("batch_norm" in str(node.target) for node in loaded[name].graph.nodes) for name in programs]
    assert counts == [1, 0]


def test_the_layout_of_older_torch(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            if not info.filename.endswith("weights_config.json"):
                target.writestr(info.filename, source.read(info))
    with pytest.raises(RefusedError, match=r"torch 2\.8"):
        fold(path)


DAMAGE: dict[str, Callable[[Any], object]] = {
    "used before it is made": lambda graph: graph["nodes"].reverse(),
    "made twice": lambda graph: graph["nodes"].append(graph["nodes"][-1]),
    "inputs that do not fit": lambda graph: graph["inputs"].pop(),
    "no arguments": lambda graph: graph["nodes"][0].pop("inputs"),
    "nested": lambda graph: graph["nodes"][2]["inputs"].append(
        {"name": "z", "arg": {"as_ints": json.loads("[" * 400 + "]" * 400)}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_graphs(original: Path, tmp_path: Path, damage: str) -> None:
    path = edited(original, tmp_path / "bad.pt2", lambda record: DAMAGE[damage](record["graph_module"]["graph"]))
    try:
        fold(path)
    except NormDoctorError as error:
        assert isinstance(error, InputError) and error.hint
        assert not path.with_suffix(".folded.pt2").exists()
    else:
        assert damage == "nested"


@pytest.mark.parametrize("groups", [0, 3, -1, 1 << 40, "x", None])
def test_arguments_that_no_convolution_takes(original: Path, tmp_path: Path, groups: object) -> None:
    def edit(record: Any) -> None:
        record["graph_module"]["graph"]["nodes"][0]["inputs"].append(
            {"name": "groups", "arg": {"as_int": groups}, "kind": 2}
        )

    assert fold(edited(original, tmp_path / "bad.pt2", edit)).gone == []


def test_nothing_here_needs_torch() -> None:
    assert not hasattr(export_edits, "torch") and not hasattr(torch_export, "torch")
