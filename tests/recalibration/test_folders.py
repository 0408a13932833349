"""Folders of shards come back whole: the changed buffers and their checksums differ, every other byte is the same."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from normdoctor import writing
from normdoctor.errors import InputError, RefusedError, UsageError
from normdoctor.readers import open_checkpoint
from normdoctor.recalibration import folders
from normdoctor.recalibration.folders import write_folder
from normdoctor.recalibration.write_back import Change
from normdoctor.writing import check_output, replace_in_place

State = Mapping[str, torch.Tensor]
INDEX = {"safetensors": "model.safetensors.index.json"}
FIELDS = ("running_mean", "running_var", "num_batches_tracked")


def make_state(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)).to(dtype)
    for norm in (net[1], net[3]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(5)
    return {f"net.{name}": tensor.contiguous() for name, tensor in net.state_dict().items()}


def halves(state: State) -> list[State]:
    """Every other tensor: the mean and the variance of a norm lie in different shards."""
    names = list(state)
    return [{name: state[name] for name in names[start::2]} for start in (0, 1)]


def deflate(path: Path) -> None:
    """The same zip, compressed."""
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def make_folder(folder: Path, shards: Sequence[State], kind: str = "safetensors") -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / ".gitattributes").write_bytes(b"*.bin filter=lfs\r\n")
    (folder / "tokenizer" / "vocab.txt").write_bytes(os.urandom(100))
    places = {}
    for number, state in enumerate(shards, start=1):
        suffix = "safetensors" if kind == "safetensors" else "bin"
        path = folder / f"model-{number:05}-of-{len(shards):05}.{suffix}"
        if kind == "safetensors":
            safetensors.torch.save_file(dict(state), path)
        else:
            torch.save(dict(state), path, _use_new_zipfile_serialization=kind != "legacy")
        if kind == "deflated":
            deflate(path)
        places |= dict.fromkeys(state, path.name)
    index = folder / INDEX.get(kind, "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict(sorted(places.items()))}))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model-*")):
        state |= safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    return state


def new_values(state: State) -> dict[str, Any]:
    """Of every norm: the mean one higher, half the variance, a counter of 7."""
    changed: dict[str, Any] = {}
    for name, tensor in state.items():
        leaf = name.rpartition(".")[2]
        if leaf in FIELDS:
            values = tensor.double().numpy().reshape(-1)
            changed[name] = {"running_mean": values + 1, "running_var": values / 2}.get(leaf, np.array([7]))
    return changed


def repair(path: Path, output: Path, values: Mapping[str, Any]) -> tuple[str, ...]:
    with open_checkpoint(path) as checkpoint:
        changes = [
            Change(layer, name, values[f"{layer.name}.{name}"])
            for layer in checkpoint.layers
            for name in FIELDS
            if f"{layer.name}.{name}" in values
        ]
        assert len(changes) == len(values)
        return write_folder(checkpoint, changes, output)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_repaired(state: State, found: State) -> None:
    values = new_values(state)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        expected = torch.tensor(values[name]).reshape(tensor.shape).to(tensor.dtype) if name in values else tensor
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0, equal_nan=True)


KINDS = ["safetensors", "zip", "deflated", "legacy"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_changed_buffers_differ(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = make_state(dtype)
    sick = make_folder(tmp_path / "sick", halves(state), kind)
    before = contents(sick)
    assert repair(sick, tmp_path / "fixed", new_values(state)) == ()
    assert contents(sick) == before and names(tmp_path) == ["fixed", "sick"]
    after = contents(tmp_path / "fixed")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {n for n in after if n.startswith("model-")}
    assert_repaired(state, load(tmp_path / "fixed"))
    # The changed values are the only bytes that differ, with two checksums (or three) for each record of a zip.
    changed = sum(state[name].nbytes for name in new_values(state))
    for kind_of_checksum, most in (("legacy", 0), ("safetensors", 0), ("zip", 12 * 6)):
        if kind == kind_of_checksum:
            shards = [name for name in after if name.startswith("model-")]
            differ = sum(
                int((np.frombuffer(before[n], np.uint8) != np.frombuffer(after[n], np.uint8)).sum()) for n in shards
            )
            assert 0 < differ <= changed + most
    for path in (tmp_path / "fixed").glob("*.bin"):
        if kind != "legacy":
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None


def test_a_shard_without_changes_is_copied_as_it_is(tmp_path: Path) -> None:
    state = make_state()
    shards = [
        {name: tensor for name, tensor in state.items() if name.startswith(f"net.{place}.")} for place in range(4)
    ]
    sick = make_folder(tmp_path / "sick", shards)
    values = {name: value for name, value in new_values(state).items() if name.startswith("net.3.")}
    repair(sick / INDEX["safetensors"], tmp_path / "fixed", values)  # the index stands for its folder
    before, after = contents(sick), contents(tmp_path / "fixed")
    assert [name for name in after if after[name] != before[name]] == ["model-00004-of-00004.safetensors"]


def test_shards_in_a_subfolder(tmp_path: Path) -> None:
    state = make_state()
    sick = make_folder(tmp_path / "sick", [state])
    (sick / "parts").mkdir()
    (sick / "model-00001-of-00001.safetensors").rename(sick / "parts" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(state, "./parts//a.safetensors")}
    (sick / INDEX["safetensors"]).write_text(json.dumps(index))
    repair(sick, tmp_path / "fixed", new_values(state))
    assert_repaired(state, safetensors.torch.load_file(tmp_path / "fixed" / "parts" / "a.safetensors"))


def test_nan_buffers_are_replaced(tmp_path: Path) -> None:
    state = make_state()
    values = new_values(state)
    state["net.1.running_mean"][:] = torch.nan
    state["net.1.running_var"][2] = -1
    state["net.3.running_var"][0] = torch.inf
    sick = make_folder(tmp_path / "sick", halves(state), "zip")
    repair(sick, tmp_path / "fixed", values)
    fixed = load(tmp_path / "fixed")
    for name, expected in values.items():
        np.testing.assert_array_equal(fixed[name].numpy().reshape(-1), expected.astype(fixed[name].numpy().dtype))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("net.1.running_mean", 1e6, r"net\.1\.running_mean: float16 cannot hold 1e\+06"),
        ("net.1.running_mean", np.nan, r"net\.1\.running_mean: its new values hold NaN"),
        ("net.1.running_var", np.inf, r"net\.1\.running_var: its new values hold NaN or infinity"),
    ],
)
def test_what_a_type_cannot_hold_is_refused(name: str, value: float, words: str, tmp_path: Path) -> None:
    state = make_state(torch.float16)
    sick = make_folder(tmp_path / "sick", halves(state))
    before, values = contents(sick), new_values(state)
    values[name][3] = value
    with pytest.raises(RefusedError, match=words) as caught:
        repair(sick, tmp_path / "fixed", values)
    assert caught.value.hint
    assert names(tmp_path) == ["sick"] and contents(sick) == before


def test_tensors_that_share_their_memory_are_refused(tmp_path: Path) -> None:
    state = make_state()
    state["net.9.other"] = state["net.1.running_mean"]
    make_folder(tmp_path / "sick", [state], "zip")
    values = {name: value for name, value in new_values(state).items() if name != "net.9.other"}
    with pytest.raises(RefusedError, match=r"net\.1\.running_mean: shares its memory with net\.9\.other"):
        repair(tmp_path / "sick", tmp_path / "fixed", values)
    assert names(tmp_path) == ["sick"]


def test_the_same_model_in_another_format_is_pointed_out(tmp_path: Path) -> None:
    state = make_state()
    sick = make_folder(tmp_path / "sick", halves(state))
    other = make_folder(tmp_path / "other", halves(state), "zip")
    for path in other.glob("*model*"):
        path.rename(sick / path.name)
    (note,) = repair(sick, tmp_path / "fixed", new_values(state))
    assert "pytorch_model.bin.index.json" in note and "not changed" in note


class TestLinks:
    """As in the cache of huggingface_hub: a folder of links to files elsewhere."""

    @pytest.fixture
    def snapshot(self, tmp_path: Path) -> Path:
        blobs = make_folder(tmp_path / "blobs", halves(make_state()))
        folder = tmp_path / "hub" / "snapshot"
        folder.mkdir(parents=True)
        for path in blobs.iterdir():
            (folder / path.name).symlink_to(path)
        return folder

    def test_what_they_lead_to_is_copied_and_never_written_to(self, snapshot: Path, tmp_path: Path) -> None:
        before = contents(tmp_path / "blobs")
        repair(snapshot, tmp_path / "fixed", new_values(make_state()))
        assert contents(tmp_path / "blobs") == before
        assert not any(path.is_symlink() for path in (tmp_path / "fixed").rglob("*"))
        assert (tmp_path / "fixed" / "tokenizer" / "vocab.txt").read_bytes() == before["tokenizer/vocab.txt"]
        assert_repaired(make_state(), load(tmp_path / "fixed"))

    def test_one_that_leads_nowhere_stays(self, snapshot: Path, tmp_path: Path) -> None:
        (snapshot / "lost").symlink_to("../gone")
        (snapshot / "itself").symlink_to("itself")
        repair(snapshot, tmp_path / "fixed", {})
        assert [str((tmp_path / "fixed" / name).readlink()) for name in ("lost", "itself")] == ["../gone", "itself"]

    @pytest.mark.parametrize("to", [".", "..", "/"])
    def test_one_that_leads_round_is_refused(self, to: str, snapshot: Path, tmp_path: Path) -> None:
        (snapshot / "loop").symlink_to(to)
        with pytest.raises(RefusedError, match="loop: is a link to a folder that it lies in"):
            repair(snapshot, tmp_path / "fixed", {})
        assert names(tmp_path) == ["blobs", "hub"]

    def test_one_that_leads_to_the_output_is_refused(self, snapshot: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (snapshot / "loop").symlink_to(out)
        with pytest.raises(RefusedError, match="is a link to a folder that it lies in"):
            repair(snapshot, out / "fixed", {})
        assert names(out) == []

    def test_a_bomb_of_links_ends(self, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folders, "MAX_ENTRIES", 200)
        for place in range(20):
            (tmp_path / f"bomb{place}").mkdir()
            for name in "ab":
                (tmp_path / f"bomb{place}" / name).symlink_to(tmp_path / f"bomb{place + 1}")
        (snapshot / "bomb").symlink_to(tmp_path / "bomb0")
        with pytest.raises(RefusedError, match="more than 200 files and folders"):
            repair(snapshot, tmp_path / "fixed", {})
        assert "fixed" not in names(tmp_path)

    def test_a_pipe_is_refused(self, snapshot: Path, tmp_path: Path) -> None:
        os.mkfifo(snapshot / "pipe")
        with pytest.raises(RefusedError, match="pipe: is no ordinary file"):
            repair(snapshot, tmp_path / "fixed", {})
        assert "fixed" not in names(tmp_path)


class TestWholeOrNotAtAll:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
    @pytest.mark.parametrize("exists", [False, True])
    def test_interrupted_at_any_file(
        self, error: BaseException, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sick = make_folder(tmp_path / "sick", halves(make_state()))
        if exists:
            make_folder(tmp_path / "fixed", [make_state()])
        before, expected = contents(tmp_path), names(tmp_path)
        left = [0]

        def fails(descriptor: int) -> None:
            left[0] -= 1
            if not left[0]:
                raise error

        files = len(contents(sick))
        for place in range(1, files + 1):
            left[0] = place
            monkeypatch.setattr(os, "fsync", fails)
            with pytest.raises((KeyboardInterrupt, InputError)):
                repair(sick, tmp_path / "fixed", new_values(make_state()))
            assert contents(tmp_path) == before and names(tmp_path) == expected
        monkeypatch.undo()
        repair(sick, tmp_path / "fixed", new_values(make_state()))
        assert_repaired(make_state(), load(tmp_path / "fixed"))

    @pytest.mark.parametrize("system", ["exchanges", "only renames"])
    def test_an_existing_folder_is_replaced_as_a_whole(
        self, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if system == "only renames":
            monkeypatch.setattr(writing, "_exchange", lambda first, second: False)
        sick = make_folder(tmp_path / "sick", halves(make_state()))
        make_folder(tmp_path / "fixed", [make_state()])
        (tmp_path / "fixed" / "left over").write_text("x")
        repair(sick, tmp_path / "fixed", new_values(make_state()))
        assert names(tmp_path / "fixed") == names(sick) and names(tmp_path) == ["fixed", "sick"]

    def test_an_unreadable_file_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sick = make_folder(tmp_path / "sick", halves(make_state()))
        real = Path.open

        def closed(path: Path, *arguments: Any, **options: Any) -> Any:
            if path == sick / "config.json":
                raise PermissionError(13, "Permission denied")
            return real(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", closed)
        with pytest.raises(InputError, match=r"sick/config\.json: no permission to read"):
            repair(sick, tmp_path / "fixed", {})
        assert names(tmp_path) == ["sick"]

    def test_rights_are_those_of_new_files(self, tmp_path: Path) -> None:
        sick = make_folder(tmp_path / "sick", halves(make_state()))
        for path in sick.glob("model-*"):
            path.chmod(0o444)  # as git-annex and some caches keep them
        repair(sick, tmp_path / "fixed", new_values(make_state()))
        assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "fixed").rglob("*"))


def test_in_place(tmp_path: Path) -> None:
    state = make_state()
    sick = make_folder(tmp_path / "model", halves(state), "zip")
    before = contents(sick)
    backup = replace_in_place(sick, lambda path: repair(sick, path, new_values(state)))
    assert_repaired(state, load(sick))
    assert backup == tmp_path / "model.bak" and contents(backup) == before
    assert names(tmp_path) == ["model", "model.bak"]


class TestOutputs:
    @pytest.fixture
    def sick(self, tmp_path: Path) -> Path:
        (tmp_path / "file").write_text("x")
        (tmp_path / "empty").mkdir()
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.txt").write_text("years of work")
        make_folder(tmp_path / "a" / "other", [make_state()])
        (tmp_path / "link").symlink_to("a/sick")
        return make_folder(tmp_path / "a" / "sick", [make_state()])

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("a/sick", "is the input itself"),
            ("link", "is the input itself"),
            ("a/sick/fixed", "lies in the input or holds it"),
            ("link/fixed", "lies in the input or holds it"),
            ("a", "lies in the input or holds it"),
            ("file", "is a file, and the input is a folder"),
            ("home", "is not one checkpoint"),
            ("none/fixed", "no such folder"),
        ],
    )
    def test_refused_even_with_overwrite(self, name: str, words: str, sick: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=words) as caught:
            check_output(tmp_path / name, sick, overwrite=True, folder=True)
        assert caught.value.hint

    def test_allowed(self, sick: Path, tmp_path: Path) -> None:
        for name in ("new", "empty", "a/sick2"):
            check_output(tmp_path / name, sick, overwrite=False, folder=True)
        with pytest.raises(UsageError, match="exists already"):
            check_output(tmp_path / "a" / "other", sick, overwrite=False, folder=True)
        check_output(tmp_path / "a" / "other", sick, overwrite=True, folder=True)

    def test_a_file_is_not_written_over_a_folder(self, sick: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is a folder"):
            check_output(sick, tmp_path / "file", overwrite=True)

    def test_never_into_the_input(self, sick: Path) -> None:
        before = contents(sick)
        with pytest.raises(UsageError, match="lies in the folder that is copied"):
            repair(sick, sick / "fixed", {})
        assert contents(sick) == before


class Ranks:
    """A distributed checkpoint as several ranks write it, put together by hand from torch's own classes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.tensors: dict[str, Any] = {}
        self.places: dict[MetadataIndex, Any] = {}

    def add(self, name: str, tensor: torch.Tensor, cuts: tuple[int, ...]) -> None:
        entry = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), [])
        self.tensors[name] = entry
        edges = (0, *cuts, len(tensor)) if tensor.dim() else (0, 0)
        for rank, (begin, end) in enumerate(pairwise(edges)):
            chunk = tensor[begin:end].clone() if tensor.dim() else tensor
            start = torch.Size([begin, *[0] * (tensor.dim() - 1)] if tensor.dim() else [])
            entry.chunks.append(ChunkStorageMetadata(start, chunk.size()))
            buffer = io.BytesIO()
            torch.save(chunk, buffer)
            path = self.folder / f"__{rank}_0.distcp"
            with path.open("ab") as file:
                offset = file.tell()
                file.write(buffer.getvalue())
            self.places[MetadataIndex(name, start)] = _StorageInfo(path.name, offset, len(buffer.getvalue()))

    def write(self) -> Path:
        metadata = Metadata(self.tensors, {name: (name,) for name in self.tensors}, self.places)
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))
        return self.folder


def load_distributed(folder: Path, like: State) -> dict[str, torch.Tensor]:
    state = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
    return state


class TestDistributed:
    @pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 5)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_chunk_is_changed_where_it_lies(
        self, cuts: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
    ) -> None:
        state = make_state(dtype)
        ranks = Ranks(tmp_path / "sick")
        for name, tensor in state.items():
            ranks.add(name, tensor, cuts if len(tensor.shape) == 1 else ())
        sick = ranks.write()
        before = contents(sick)
        assert repair(sick, tmp_path / "fixed", new_values(state)) == ()
        assert contents(sick) == before
        after = contents(tmp_path / "fixed")
        assert after[".metadata"] == before[".metadata"] and after.keys() == before.keys()
        assert [len(data) for data in after.values()] == [len(data) for data in before.values()]
        assert_repaired(state, load_distributed(tmp_path / "fixed", state))
        for name, place in ranks.places.items():  # what torch reads checks the checksums; zipfile does too
            raw = after[place.relative_path][place.offset : place.offset + place.length]
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                assert archive.testzip() is None, name

    def test_as_torch_writes_it(self, tmp_path: Path) -> None:
        state = make_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(tmp_path / "sick"))
        repair(tmp_path / "sick", tmp_path / "fixed", new_values(state))
        assert_repaired(state, load_distributed(tmp_path / "fixed", state))

    def test_chunks_on_the_same_bytes_are_refused(self, tmp_path: Path) -> None:
        state = make_state()
        ranks = Ranks(tmp_path / "sick")
        for name, tensor in state.items():
            ranks.add(name, tensor, ())
        start = torch.Size([0])
        ranks.places[MetadataIndex("net.1.running_var", start)] = ranks.places[MetadataIndex("net.1.bias", start)]
        ranks.write()
        values = {"net.1.running_var": np.ones(8)}
        with pytest.raises(RefusedError, match=r"net\.1\.running_var: shares its bytes in __0_0\.distcp"):
            repair(tmp_path / "sick", tmp_path / "fixed", values)
        assert names(tmp_path) == ["sick"]

    @pytest.mark.parametrize("chain", [False, True])
    def test_an_entry_over_many_others_is_noticed(self, chain: bool, tmp_path: Path) -> None:
        """chain: the one that it overlaps begins inside of a third one."""
        state = make_state()
        ranks = Ranks(tmp_path / "sick")
        for name, tensor in {"first": torch.zeros(3), "second": torch.zeros(3), **state}.items():
            ranks.add(name, tensor, ())
        first, second = (ranks.places[MetadataIndex(name, torch.Size([0]))] for name in ("first", "second"))
        (second if chain else first).length = (ranks.folder / "__0_0.distcp").stat().st_size - second.offset
        first.length += 10 if chain else 0
        with pytest.raises(RefusedError, match=r"net\.3\.running_var: shares its bytes"):
            repair(ranks.write(), tmp_path / "fixed", {"net.3.running_var": np.ones(6)})
        assert names(tmp_path) == ["sick"]

    def test_compressed_parts_are_refused_with_a_hint(self, tmp_path: Path) -> None:
        state = make_state()
        ranks = Ranks(tmp_path / "sick")
        for name, tensor in state.items():
            ranks.add(name, tensor, ())
        index = MetadataIndex("net.1.running_var", torch.Size([0]))
        ranks.places[index].transform_descriptors = ["zstd"]
        ranks.write()
        with pytest.raises(InputError, match="compressed or encrypted") as caught:
            repair(tmp_path / "sick", tmp_path / "fixed", {"net.1.running_var": np.ones(8)})
        assert caught.value.hint and names(tmp_path) == ["sick"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_without_changes_is_the_same_to_the_byte(kind: str, tmp_path: Path) -> None:
    sick = make_folder(tmp_path / "sick", halves(make_state()), kind)
    repair(sick, tmp_path / "fixed", {})
    assert contents(tmp_path / "fixed") == contents(sick)


def test_what_changes_while_it_is_copied_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sick = make_folder(tmp_path / "sick", halves(make_state()))
    real: Callable[..., Any] = folders._listed

    def vanishing(folder: Path) -> list[Path]:
        return [path for path in real(folder) if path.name != "model-00002-of-00002.safetensors"]

    monkeypatch.setattr(folders, "_listed", vanishing)
    with pytest.raises(RefusedError, match="vanished while the folder was copied"):
        repair(sick, tmp_path / "fixed", new_values(make_state()))
    assert names(tmp_path) == ["sick"]
