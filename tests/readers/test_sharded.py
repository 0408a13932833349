"""Checkpoints in shards: read as one model, only as far as norms can be, and never outside of their folder."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from normdoctor.errors import InputError, RefusedError
from normdoctor.inspection import inspect
from normdoctor.layers import Checkpoint, DetachedArray, NormKind
from normdoctor.readers import open_checkpoint
from normdoctor.readers.naming import Recognised, group_of, possible_norms, recognise
from normdoctor.readers.sharded import natural_order
from normdoctor.recalibration import recalibrate
from normdoctor.recalibration.records import DebiasReport
from normdoctor.reports import write_recalibration
from normdoctor.rules.runner import fill_in

Read = Callable[[Any], Checkpoint]
State = Mapping[str, torch.Tensor]

INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def write_shards(folder: Path, shards: Sequence[State], kind: str = "safetensors", in_order: bool = False) -> Path:
    """The shards and their index, sorted by name as transformers writes it; gives the index."""
    folder.mkdir(exist_ok=True)
    places = {}
    for number, state in enumerate(shards, start=1):
        stem = "model" if kind == "safetensors" else "pytorch_model"
        path = folder / f"{stem}-{number:05}-of-{len(shards):05}.{kind}"
        if kind == "safetensors":
            safetensors.torch.save_file(dict(state), path)
        else:
            torch.save(dict(state), path)
        places |= dict.fromkeys(state, path.name)
    return write_index(folder / INDEX[kind], places if in_order else dict(sorted(places.items())))


def write_index(path: Path, places: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=2))
    return path


def split(state: State, sizes: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    items = list(state.items())
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [dict(items[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def llama(layers: int = 12) -> dict[str, torch.Tensor]:
    """Names as in a LLaMA: its norms have gains alone, its projections no biases."""
    generator = torch.Generator().manual_seed(0)
    state = {"model.embed_tokens.weight": torch.randn(40, 8, generator=generator)}
    for place in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{place}.{name}.weight"] = 1 + 0.2 * torch.randn(8, generator=generator)
        state[f"model.layers.{place}.mlp.up_proj.weight"] = torch.randn(16, 8, generator=generator)
    state["model.norm.weight"] = torch.full((8,), 1.5)
    state["lm_head.weight"] = torch.randn(40, 8, generator=generator)
    return state


def by_shard(state: State) -> list[dict[str, torch.Tensor]]:
    """Norms in the first and the third of three shards."""
    names = [[], [], []]  # type: list[list[str]]
    for place, name in enumerate(state):
        names[(0 if place < len(state) / 2 else 2) if "norm" in name else 1].append(name)
    return [{name: state[name] for name in group} for group in names]


def test_shards_read_as_the_whole(tmp_path: Path, read: Read) -> None:
    state = llama()
    safetensors.torch.save_file(state, tmp_path / "whole.safetensors")
    write_shards(tmp_path / "parts", split(state, (9, 11, len(state) - 20)))
    whole, parts = read(tmp_path / "whole.safetensors"), read(tmp_path / "parts")
    said = {layer.name: (layer.kind, layer.channels, layer.zero_centred, layer.path) for layer in whole.layers}
    assert {layer.name: (layer.kind, layer.channels, layer.zero_centred, layer.path) for layer in parts.layers} == said
    assert len(said) == 25


def test_order_of_an_index_sorted_by_name(tmp_path: Path, read: Read) -> None:
    state = llama()
    write_shards(tmp_path, split(state, (20, len(state) - 20)))
    names = [layer.name for layer in read(tmp_path).layers]
    assert names == [name.removesuffix(".weight") for name in state if "norm" in name]


def test_zero_centred_gains_are_decided_on_the_whole_model(tmp_path: Path, read: Read) -> None:
    """One norm of a Gemma has gains that could be either: alone it would count as plain."""
    gemma = {f"model.layers.{n}.input_layernorm.weight": torch.linspace(-0.3, 0.4, 8) for n in range(3)}
    gemma["model.norm.weight"] = torch.linspace(0.1, 0.4, 8)
    write_shards(tmp_path, split(gemma, (3, 1)))
    assert {layer.name: layer.zero_centred for layer in read(tmp_path).layers} == dict.fromkeys(
        [name.removesuffix(".weight") for name in gemma], True
    )
    alone = read(tmp_path / "model-00002-of-00002.safetensors")
    assert [layer.zero_centred for layer in alone.layers] == [False]


def bytes_for_the_norms(path: Path) -> int:
    """All that is read on the way to every number of every norm, what is read twice counted twice."""
    with open_checkpoint(path) as checkpoint:
        for layer in checkpoint.layers:
            layer.numbers.load()
        return checkpoint.count_bytes_read()


@pytest.mark.parametrize("what", ["garbage", "missing"])
def test_shards_without_norms_are_not_opened(tmp_path: Path, read: Read, what: str) -> None:
    write_shards(tmp_path, by_shard(llama()))
    before = inspect(tmp_path)
    other = tmp_path / "model-00002-of-00003.safetensors"
    read = bytes_for_the_norms(tmp_path)
    other.write_bytes(b"\x80garbage") if what == "garbage" else other.unlink()
    after = inspect(tmp_path)
    assert [layer.name for layer in after.layers] == [layer.name for layer in before.layers]
    assert after.findings == before.findings
    assert after.notes == before.notes
    assert any(note.startswith("2 of 3 shards were opened") for note in after.notes)
    assert bytes_for_the_norms(tmp_path) == read


def test_tied_layers(tmp_path: Path, read: Read) -> None:
    state = {"a.bn.weight": torch.rand(8), "a.bn.bias": torch.rand(8)}
    state |= {"b.bn.weight": state["a.bn.weight"], "b.bn.bias": state["a.bn.bias"]}
    write_shards(tmp_path, [state, {"c.bn.weight": torch.rand(8), "c.bn.bias": torch.rand(8)}], "bin")
    assert {layer.name: layer.aliases for layer in read(tmp_path).layers} == {"a.bn": ("b.bn",), "c.bn": ()}


def test_a_layer_that_lies_in_two_shards(tmp_path: Path, read: Read) -> None:
    body = nn.ModuleDict({"bn": nn.BatchNorm2d(8), "other": nn.BatchNorm2d(8)})
    state = {f"body.{name}": tensor for name, tensor in body.state_dict().items()}
    index = write_shards(tmp_path, split(state, (2, 8)))
    checkpoint = read(index)
    joined, whole = checkpoint.layers
    assert joined.kind is NormKind.BATCH
    assert None not in (joined.weight, joined.bias, joined.running_mean, joined.running_var, joined.num_batches_tracked)
    assert whole.name == "body.other"
    assert fill_in("look at {path}", checkpoint) == f"look at {index}"


def test_recalibrate_writes_the_folder(tmp_path: Path) -> None:
    state = {f"bn.{name}": tensor for name, tensor in norms(1).items()}
    state = {name.replace("net.bn0.", ""): tensor for name, tensor in state.items()}
    write_shards(tmp_path / "net", [state, {"head.weight": torch.rand(3, 8)}])
    for place, target in enumerate((tmp_path / "net", tmp_path / "net" / INDEX["safetensors"])):
        output = tmp_path / f"out{place}"
        recalibrate(target, method="debias", momentum=0.001, output=output)
        assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "net").iterdir()}
        second = "model-00002-of-00002.safetensors"
        assert (output / second).read_bytes() == (tmp_path / "net" / second).read_bytes()


def norms(count: int = 3) -> dict[str, torch.Tensor]:
    """BatchNorms that still hold 81 % of their initial values, in the model's order."""
    torch.manual_seed(0)
    state = {}
    for place in range(count):
        norm = nn.BatchNorm1d(16, momentum=0.001)
        for _ in range(216):
            norm(torch.randn(32, 16) * 2 + 1)
        state |= {f"net.bn{place}.{name}": tensor for name, tensor in norm.state_dict().items()}
    return state


CUT_AT = [7, 8, 9]
"""In the second of three layers with five tensors: behind its bias, its mean, its var."""


class TestOneShardAlone:
    """What pre-commit and globs pass: the shards of a good model one by one."""

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    @pytest.mark.parametrize("cut", CUT_AT)
    def test_a_layer_cut_in_two_is_not_judged(self, tmp_path: Path, kind: str, cut: int) -> None:
        index = write_shards(tmp_path, split(norms(), (cut, 15 - cut)), kind)
        assert len(inspect(index).layers) == 3
        for number, name in ((1, "net.bn0"), (2, "net.bn2")):
            report = inspect(next(tmp_path.glob(f"*-{number:05}-of-*")))
            assert [layer.name for layer in report.layers] == [name]
            assert not {"S116", "S117"} & {finding.code for finding in report.findings}
            said = f"shard {number} of 2: net.bn1 lies partly in another shard, so not judged here; inspect the folder"
            assert report.notes == (() if (cut, number) == (9, 2) else (said,))  # a lone counter is no layer

    @pytest.mark.parametrize("cut", [7, 8])
    def test_without_an_index(self, tmp_path: Path, cut: int) -> None:
        write_shards(tmp_path, split(norms(), (cut, 15 - cut))).unlink()
        for number, own in ((1, "net.bn0"), (2, "net.bn2")):
            report = inspect(next(tmp_path.glob(f"*-{number:05}-of-*")))
            assert not {"S117"} & {finding.code for finding in report.findings}
            assert own in [layer.name for layer in report.layers]
            assert len(report.notes) == 1 and "without an index that lists it" in report.notes[0]

    def test_other_names_of_shards(self, tmp_path: Path, read: Read) -> None:
        parts = split(norms(), (8, 7))
        for name, state in zip(("first.safetensors", "second.safetensors"), parts, strict=True):
            safetensors.torch.save_file(state, tmp_path / name)
        alone = read(tmp_path / "first.safetensors")
        assert [layer.name for layer in alone.layers] == ["net.bn0", "net.bn1"] and alone.notes == ()
        places = dict.fromkeys(parts[0], "first.safetensors") | dict.fromkeys(parts[1], "second.safetensors")
        write_index(tmp_path / INDEX["safetensors"], places)
        cut = read(tmp_path / "first.safetensors")
        assert [layer.name for layer in cut.layers] == ["net.bn0"]
        assert cut.notes == ("a shard: net.bn1 lies partly in another shard, so not judged here; inspect the folder",)

    def test_an_index_of_other_files_says_nothing(self, tmp_path: Path, read: Read) -> None:
        write_shards(tmp_path, split(norms(), (8, 7)))
        (tmp_path / "other.index.json").write_text('{"weight_map": {')
        torch.save(split(norms(), (8, 7))[0], tmp_path / "mine.bin")
        checkpoint = read(tmp_path / "mine.bin")
        assert len(checkpoint.layers) == 2 and checkpoint.notes == ()

    @pytest.mark.parametrize(
        "content",
        ['{"weight_map": {"a": "NAME"', '{"weight_map": {"a": "NAME", "b": "../x"}}', '{"weight_map": ["NAME"]}'],
    )
    def test_a_broken_index_is_a_note(self, tmp_path: Path, content: str) -> None:
        index = write_shards(tmp_path, split(norms(), (8, 7)))
        name = "model-00001-of-00002.safetensors"
        index.write_text(content.replace("NAME", name))
        report = inspect(tmp_path / name)
        assert [layer.name for layer in report.layers] == ["net.bn0"]
        assert any("layers may lie partly in another shard" in note for note in report.notes)
        assert any("shard 1 of 2, without an index that lists it" in note for note in report.notes)

    def test_many_half_layers_are_no_matter_of_shards(self, tmp_path: Path) -> None:
        state = {name: tensor for name, tensor in norms(4).items() if not name.endswith("running_var")}
        safetensors.torch.save_file(state, tmp_path / "m-00001-of-00002.safetensors")
        report = inspect(tmp_path / "m-00001-of-00002.safetensors")
        assert [finding.code for finding in report.findings].count("S117") == 4
        assert len(report.notes) == 1

    def test_one_of_one_is_whole(self, tmp_path: Path) -> None:
        state = norms(1)
        del state["net.bn0.running_var"]
        safetensors.torch.save_file(state, tmp_path / "m-00001-of-00001.safetensors")
        report = inspect(tmp_path / "m-00001-of-00001.safetensors")
        assert "S117" in {finding.code for finding in report.findings} and report.notes == ()


class TestRecalibrateShards:
    @pytest.mark.parametrize(("cut", "index"), [(7, True), (8, True), (9, True), (8, False)])
    def test_a_layer_cut_in_two_is_named_as_left_alone(self, tmp_path: Path, cut: int, index: bool) -> None:
        path = write_shards(tmp_path / "net", split(norms(), (cut, 15 - cut)))
        if not index:
            path.unlink()
        for number, own in ((1, "net.bn0"), (2, "net.bn2")):
            shard = tmp_path / "net" / f"model-{number:05}-of-00002.safetensors"
            output = tmp_path / f"{number}.safetensors"
            result = recalibrate(shard, method="debias", momentum=0.001, output=output).report
            assert isinstance(result, DebiasReport)
            repaired, left = [r.layer.name for r in result.repairs], [u.layer.name for u in result.untouched]
            assert (repaired, left) == ([own], [] if (cut, number) == (9, 2) else ["net.bn1"])
            if left:
                assert "lies partly in another shard" in result.untouched[0].reason
                stream = io.StringIO()
                write_recalibration(result, "console", stream)
                assert "left alone: 1 layer (net.bn1): lies partly in another shard" in stream.getvalue()

    def test_nothing_else_to_repair(self, tmp_path: Path) -> None:
        write_shards(tmp_path / "net", split(norms(1), (3, 2)))
        for number in (1, 2):
            shard = tmp_path / "net" / f"model-{number:05}-of-00002.safetensors"
            with pytest.raises(RefusedError, match="nothing to debias: lies partly in another shard") as caught:
                recalibrate(shard, method="debias", momentum=0.001, output=tmp_path / "out.safetensors")
            assert "folder" in caught.value.hint
        assert not (tmp_path / "out.safetensors").exists()

    def test_half_a_layer_of_any_file(self, tmp_path: Path) -> None:
        state = norms(2)
        del state["net.bn1.running_mean"]
        safetensors.torch.save_file(state, tmp_path / "m.safetensors")
        result = recalibrate(tmp_path / "m.safetensors", method="debias", momentum=0.001).report
        assert isinstance(result, DebiasReport)
        (left,) = result.untouched
        assert (left.layer.name, left.reason) == ("net.bn1", "has a running_var, but no running_mean in this file")

    def test_a_folder_is_repaired_whole_where_a_layer_is_cut(self, tmp_path: Path) -> None:
        write_shards(tmp_path / "net", split(norms(), (8, 7)))
        result = recalibrate(tmp_path / "net", method="debias", momentum=0.001)
        assert isinstance(result.report, DebiasReport)
        assert [repair.layer.name for repair in result.report.repairs] == ["net.bn0", "net.bn1", "net.bn2"]
        assert result.path == tmp_path / "net.recalibrated"
        assert {path.name for path in result.path.iterdir()} == {path.name for path in (tmp_path / "net").iterdir()}

    def test_nothing_to_repair_in_a_folder(self, tmp_path: Path) -> None:
        write_shards(tmp_path / "net", by_shard(llama()))
        with pytest.raises(RefusedError, match="no layer has running statistics"):
            recalibrate(tmp_path / "net", method="debias", momentum=0.001)


def test_the_cache_of_huggingface_hub(tmp_path: Path, read: Read) -> None:
    """Every file of a snapshot is a link to a blob; the names are those of the snapshot."""
    write_shards(tmp_path / "plain", by_shard(llama()))
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.move(path, blobs / f"{number:064}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064}")
    checkpoint = read(snapshot)
    assert len(checkpoint.layers) == 25
    assert checkpoint.path == str(snapshot)


def test_index_and_shards_that_disagree(tmp_path: Path, read: Read) -> None:
    state = {"a.bn.weight": torch.rand(8), "a.bn.bias": torch.rand(8), "extra.bn.weight": torch.rand(8)}
    index = write_shards(tmp_path, [state])
    shard = "model-00001-of-00001.safetensors"
    write_index(index, {"a.bn.weight": shard, "a.bn.bias": shard, "b.bn.weight": shard, "b.bn.bias": shard})
    checkpoint = read(tmp_path)
    assert [layer.name for layer in checkpoint.layers] == ["a.bn"]
    notes = " / ".join(checkpoint.notes)
    assert "not in their shard, so that layers are judged without them: 2 (the first is b.bn.weight" in notes
    assert "in the shards but not in the index, and not judged: 1 (the first is extra.bn.weight)" in notes


def test_calls_of_all_shards(tmp_path: Path, read: Read) -> None:
    class Gadget:
        def __reduce__(self) -> Any:
            return print, ("never",)

    index = write_shards(tmp_path, [{"bn.weight": torch.rand(8)}, {"ln.weight": torch.rand(8)}], "bin")
    torch.save({"ln.weight": torch.rand(8), "x": Gadget()}, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert {call.name for call in read(index).load_calls} == {"__builtin__.print"}


class TestWhichIndex:
    def test_safetensors_before_bin(self, tmp_path: Path, read: Read) -> None:
        state = llama(1)
        write_shards(tmp_path, [state])
        write_shards(tmp_path, [state], "bin")
        assert read(tmp_path).format == "safetensors state_dict (1 shard)"

    @pytest.mark.parametrize("variant", ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"])
    def test_a_variant_has_to_be_named(self, tmp_path: Path, read: Read, variant: str) -> None:
        index = write_shards(tmp_path, [llama(1)])
        shutil.copy(index, tmp_path / variant)
        with pytest.raises(InputError, match=r"holds 2 checkpoints: .*fp16") as caught:
            open_checkpoint(tmp_path)
        assert "normdoctor inspect" in caught.value.hint
        assert len(read(tmp_path / variant).layers) == 3


def refused(path: Path, words: str) -> InputError:
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(path)
    assert caught.value.hint
    return caught.value


class TestHostile:
    def test_missing_shard(self, tmp_path: Path) -> None:
        index = write_shards(tmp_path, by_shard(llama()))
        (tmp_path / "model-00003-of-00003.safetensors").unlink()
        assert str(index) in refused(tmp_path, "shard model-00003-of-00003.safetensors is missing").message

    def test_git_lfs_pointer(self, tmp_path: Path) -> None:
        write_shards(tmp_path, [llama(1)])
        (tmp_path / "model-00001-of-00001.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert "git lfs pull" in refused(tmp_path, "00001.safetensors: a Git LFS pointer").hint

    @pytest.mark.parametrize(
        "name", ["../m.safetensors", "/etc/passwd", "a/../../m", "..", "", ".", "C:\\m.pt", "..\\m.pt", "\\\\host\\m"]
    )
    def test_shard_outside_of_the_folder(self, tmp_path: Path, name: str) -> None:
        safetensors.torch.save_file({"bn.weight": torch.rand(8)}, tmp_path / "m.safetensors")
        (tmp_path / "inner").mkdir()
        index = write_index(tmp_path / "inner" / INDEX["safetensors"], {"bn.weight": name})
        refused(index, "does not lie in its folder")

    @pytest.mark.parametrize("name", ["m\0.safetensors", "\ud800", "x" * 5000, "sub/none.safetensors"])
    def test_names_that_cannot_be(self, tmp_path: Path, name: str) -> None:
        refused(write_index(tmp_path / INDEX["bin"], {"bn.weight": name}), "missing|cannot be read")

    @pytest.mark.parametrize(
        "content",
        [
            b'{"weight_map": 3}',
            b'{"weight_map": null}',
            b'{"weight_map": ["a"]}',
            b'{"weight_map": {"bn.weight": 3}}',
            b'{"weight_map": {"bn.weight": {}}}',
            b'{"weight_map": {"a": "b", "a": "c"}}',
            b'{"weight_map": {"bn.weight": "m.safetensors"',
            b'{"weight_map": \xff}',
            b'{"weight_map": ' + b"9" * 10_000 + b"}",
            b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b'{"weight_map": ' + b'{"":' * 900 + b"1" + b"}" * 901,
            b'{"weight_map": [' + b"0," * 3_000_000 + b"0]}",
            b'{"weight_map": {"a": "' + b"x" * (33 << 20) + b'"}}',
        ],
    )
    def test_damaged_index(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / INDEX["safetensors"]
        path.write_bytes(content)
        refused(path, "index is damaged")

    def test_index_that_is_its_own_shard(self, tmp_path: Path) -> None:
        index = tmp_path / INDEX["safetensors"]
        refused(write_index(index, {"bn.weight": index.name}), "not a model file")

    def test_shard_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").write_bytes(b"\0" * 100)
        refused(write_index(tmp_path / INDEX["safetensors"], {"bn.weight": "m.safetensors"}), "not a model file")

    def test_empty_index(self, tmp_path: Path, read: Read) -> None:
        assert read(write_index(tmp_path / INDEX["safetensors"], {})).layers == ()

    def test_many_names_take_little_time(self, tmp_path: Path, read: Read) -> None:
        """As many as the largest mixtures of experts have, and none in a shard that is there."""
        names = [f"model.layers.{layer}.mlp.experts.{n}.up_proj.weight" for layer in range(60) for n in range(2000)]
        safetensors.torch.save_file({"norm.weight": torch.rand(8)}, tmp_path / "m.safetensors")
        index = write_index(
            tmp_path / INDEX["safetensors"], {"norm.weight": "m.safetensors", **dict.fromkeys(names, "x.safetensors")}
        )
        assert len(read(index).layers) == 1


LEAVES = ("weight", "bias", "running_mean", "running_var", "mean", "var", "num_batches_tracked", "gamma", "beta", "g")
LEAVES = (*LEAVES, "alpha", "v", "tau", "shift", "eps", "count", "weight_v")
SHAPES = ((), (1,), (8,), (16,), (1, 8), (8, 8), (1, 8, 1, 1), (8, 3, 3, 3))


@given(
    st.sampled_from(["bn", "x.q_norm", "x.prelu", "x.ls1", "fc", "a.0", "group_norm", "affine", "x.layer_norm.1", ""]),
    st.dictionaries(st.sampled_from(LEAVES), st.sampled_from(SHAPES), min_size=1, max_size=5),
)
def test_names_that_may_be_a_norm_include_every_norm(parent: str, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {leaf: DetachedArray(shape, "float32", 0, None) for leaf, shape in shapes.items()}
    names = {f"{parent}.{leaf}" if parent else leaf for leaf in shapes}
    if isinstance(recognise(group_of(parent, tensors)), Recognised):
        assert possible_norms(names) == names


def test_names_that_cannot_be_a_norm() -> None:
    assert possible_norms(["embed.weight", "fc.kernel", "ls1.gamma", "n_averaged"]) == {"n_averaged"}


def test_natural_order() -> None:
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "layers.02.a", "9" * 5000]
    assert sorted(names, key=natural_order)[1:] == ["layers.2.a", "layers.02.a", "layers.2.b", "layers.10.a"]


def test_values_come_from_their_shards(tmp_path: Path, read: Read) -> None:
    state = llama(2)
    write_shards(tmp_path, by_shard(state))
    for layer in read(tmp_path).layers:
        assert layer.weight is not None
        np.testing.assert_array_equal(layer.weight.numpy(), state[f"{layer.name}.weight"].numpy())
