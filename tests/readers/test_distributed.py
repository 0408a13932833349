"""Folders of torch.distributed.checkpoint: chunks are joined, and nothing in the metadata is believed unchecked."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from normdoctor.errors import InputError
from normdoctor.findings import DEBIAS_COMMAND
from normdoctor.inspection import inspect
from normdoctor.layers import Checkpoint, Danger, LoadCall
from normdoctor.readers import distributed, open_checkpoint
from normdoctor.recalibration import recalibrate
from normdoctor.rules.runner import fill_in

Read = Callable[[Any], Checkpoint]


def save(state: Mapping[str, Any], folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group: saved by one process, as is meant here
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder, **options))
    return folder


@dataclass
class Parts:
    """A checkpoint as several ranks write it, put together by hand from torch's own classes."""

    folder: Path
    tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)
    places: dict[MetadataIndex, Any] = field(default_factory=dict)
    keys: dict[str, tuple[Any, ...]] | None = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor, cuts: tuple[int, ...] = ()) -> None:
        """Chunks along the first axis, one rank after the other."""
        entry = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), [])
        self.tensors[name] = entry
        edges = (0, *cuts, tensor.shape[0]) if tensor.dim() else (0, 0)
        for rank, (begin, end) in enumerate(pairwise(edges)):
            chunk = tensor[begin:end].clone() if tensor.dim() else tensor
            start = torch.Size([begin, *[0] * (tensor.dim() - 1)] if tensor.dim() else [])
            entry.chunks.append(ChunkStorageMetadata(start, chunk.size()))
            self.places[MetadataIndex(name, start)] = self.append(rank, chunk)
        if self.keys is not None:
            self.keys[name] = (name,)

    def add_object(self, name: str, value: Any) -> None:
        self.tensors[name] = BytesStorageMetadata()  # type: ignore[assignment]
        self.places[MetadataIndex(name)] = self.append(0, value)

    def append(self, rank: int, value: Any) -> _StorageInfo:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return self.append_bytes(rank, buffer.getvalue())

    def append_bytes(self, rank: int, data: bytes) -> _StorageInfo:
        path = self.folder / f"__{rank}_0.distcp"
        offset = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.write(data)
        return _StorageInfo(path.name, offset, len(data))

    def write(self) -> Path:
        metadata = Metadata(self.tensors, self.keys, self.places)  # type: ignore[arg-type]
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))
        return self.folder


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


def batchnorm(channels: int = 8) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels)
    bn(torch.rand(4, channels, 3, 3))
    return bn


class TestSavedByTorch:
    def test_training_state_is_no_model(self, tmp_path: Path, read: Read) -> None:
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.rand(8, 4)).sum().backward()
        optimizer.step()
        app = {"model": net.state_dict(), "optim": optimizer.state_dict(), "step": 7}
        checkpoint = read(save({"app": app, "rng": torch.get_rng_state()}, tmp_path / "c"))
        assert [(layer.name, layer.channels) for layer in checkpoint.layers] == [("1", 6)]
        assert checkpoint.format == "PyTorch distributed checkpoint (DCP folder)"
        assert checkpoint.load_calls == ()

    def test_several_models(self, tmp_path: Path, read: Read) -> None:
        net, average = batchnorm(), batchnorm()
        checkpoint = read(save({"model": net.state_dict(), "ema": average.state_dict()}, tmp_path / "c"))
        assert {model.key: model.averaged for model in checkpoint.models} == {"model": None, "ema": "stored under ema"}

    def test_one_file_for_each_tensor(self, tmp_path: Path, read: Read) -> None:
        state = nn.ModuleDict({"bn": batchnorm()}).state_dict()
        (layer,) = read(save(state, tmp_path / "c", single_file_per_rank=False)).layers
        assert layer.numbers.var is not None
        np.testing.assert_array_equal(layer.numbers.var, state["bn.running_var"].numpy())

    def test_report_is_that_of_a_plain_file(self, tmp_path: Path) -> None:
        """Findings, and values to the last bit, but for the way to repair it."""
        state = nn.ModuleDict({"bn": batchnorm(), "other": batchnorm()}).state_dict()
        torch.save(state, tmp_path / "m.pt")
        plain, folder = inspect(tmp_path / "m.pt"), inspect(save(state, tmp_path / "c"))
        assert [(f.code, f.layer, f.message) for f in folder.findings] == [
            (f.code, f.layer, f.message) for f in plain.findings
        ]
        assert any(f.code == "S104" for f in folder.findings)

    def test_metadata_by_its_own_name(self, tmp_path: Path, read: Read) -> None:
        folder = save(batchnorm().state_dict(), tmp_path / "c")
        assert len(read(folder / ".metadata").layers) == len(read(folder).layers) == 1

    def test_the_way_to_repair_it(self, tmp_path: Path, read: Read) -> None:
        folder = save(nn.ModuleDict({"bn": batchnorm()}).state_dict(), tmp_path / "a b")
        fix = fill_in(DEBIAS_COMMAND, read(folder), " --momentum 0.1")
        assert fix == (f"normdoctor recalibrate '{folder}' --method debias --momentum 0.1 -o '{folder}.recalibrated'")
        repaired = recalibrate(folder, method="debias", momentum=0.1).path
        assert repaired == tmp_path / "a b.recalibrated"
        (before,), (after,) = read(folder).layers, read(repaired).layers
        assert not np.array_equal(before.numbers.var, after.numbers.var)

    def test_the_conversion_works(self, tmp_path: Path, read: Read) -> None:
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        folder = save(nn.ModuleDict({"bn": batchnorm()}).state_dict(), tmp_path / "c")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_to_torch_save(folder, tmp_path / "model.pt")
        assert [layer.name for layer in read(tmp_path / "model.pt").layers] == ["bn"]


class TestChunks:
    @pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 7), (0, 4, 4, 8)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_joined(self, parts: Parts, read: Read, cuts: tuple[int, ...], dtype: torch.dtype) -> None:
        """0 and 8 as cuts: ranks that had nothing of it."""
        state = nn.ModuleDict({"bn": batchnorm()}).to(dtype).state_dict()
        for name, tensor in state.items():
            parts.add(name, tensor, cuts)
        (layer,) = read(parts.write()).layers
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            array, tensor = getattr(layer, name), state[f"bn.{name}"]
            assert array.dtype == str(tensor.dtype).removeprefix("torch.")
            expected = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
            np.testing.assert_array_equal(array.numpy(), expected, strict=True)

    def test_of_two_axes(self, parts: Parts, read: Read) -> None:
        whole = torch.rand(4, 6)
        parts.add("norm.weight", whole, (2,))
        parts.add("norm.bias", whole + 1)
        (layer,) = read(parts.write()).layers
        assert layer.weight is not None
        np.testing.assert_array_equal(layer.weight.numpy(), whole.numpy())

    def test_only_chunks_of_norms_are_read(self, parts: Parts, read: Read) -> None:
        parts.add("head.weight", torch.rand(1000, 1000), (500,))
        parts.add("norm.weight", torch.rand(64), (32,))
        checkpoint = read(parts.write())
        checkpoint.layers[0].numbers.load()
        assert checkpoint.count_bytes_read() < 20_000
        assert checkpoint.bytes_total == sum(path.stat().st_size for path in parts.folder.iterdir())
        (parts.folder / "__1_0.distcp").unlink()
        with pytest.raises(InputError, match=r"__1_0\.distcp: no such file"):
            inspect(parts.folder)

    def test_a_chunk_that_two_ranks_wrote(self, parts: Parts, read: Read) -> None:
        parts.add("norm.weight", torch.rand(8), (4,))
        parts.tensors["norm.weight"].chunks.append(parts.tensors["norm.weight"].chunks[0])
        assert read(parts.write()).layers[0].numbers.gain.size == 8

    def test_order_is_that_of_the_model(self, parts: Parts, read: Read) -> None:
        """Ranks write in an order of their own; the keys stay in the model's."""
        for name in ("b.norm.weight", "a.norm.weight", "c.norm.weight"):
            parts.add(name, torch.rand(8))
        assert parts.keys is not None
        parts.keys = dict(reversed(parts.keys.items()))
        names = [layer.name for layer in read(parts.write()).layers]
        assert names == ["c.norm", "a.norm", "b.norm"]

    def test_without_keys(self, parts: Parts, read: Read) -> None:
        """Saved by a planner that did not flatten: only the names tell training state from models."""
        parts.keys = None
        parts.add("model.norm.weight", torch.rand(8))
        parts.add("optim.state.norm.weight", torch.rand(8))
        checkpoint = read(parts.write())
        assert [layer.name for layer in checkpoint.layers] == ["norm"]


class Gadget:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


class TestCalls:
    def test_in_an_object(self, parts: Parts, read: Read) -> None:
        parts.add("norm.weight", torch.rand(8))
        parts.add_object("extra", Gadget())
        parts.add_object("fine", {"lr": 0.1, "betas": (0.9, 0.99)})
        checkpoint = read(parts.write())
        assert checkpoint.load_calls == (LoadCall("posix.system", Danger.OTHER),)
        assert checkpoint.loader == "torch.distributed.checkpoint.load"
        assert not Path("hacked").exists()

    def test_in_the_metadata(self, parts: Parts, read: Read) -> None:
        parts.add("norm.weight", torch.rand(8))
        assert parts.keys is not None
        parts.keys["x"] = (Gadget(),)
        assert read(parts.write()).load_calls == (LoadCall("posix.system", Danger.OTHER),)
        assert not Path("hacked").exists()

    def test_objects_that_cannot_be_looked_through_are_counted(self, parts: Parts, read: Read) -> None:
        parts.add("norm.weight", torch.rand(8))
        parts.add_object("bad", 1)
        parts.places[MetadataIndex("bad")] = parts.append_bytes(0, b"PK\x03\x04 garbage")
        parts.tensors["nowhere"] = BytesStorageMetadata()  # type: ignore[assignment]
        notes = read(parts.write()).notes
        assert "values beside the tensors that could not be looked through for calls on load: 2" in notes


def refused(folder: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught, open_checkpoint(folder) as checkpoint:
        for layer in checkpoint.layers:
            layer.numbers.load()
    assert caught.value.hint


class TestHostile:
    @pytest.fixture
    def info(self, parts: Parts) -> _StorageInfo:
        """Where the chunk of the one norm lies."""
        parts.add("norm.weight", torch.linspace(1, 2, 8))
        parts.add("norm.bias", torch.linspace(0, 1, 8))
        return parts.places[MetadataIndex("norm.weight", torch.Size([0]))]

    @pytest.mark.parametrize("name", ["../x.distcp", "/etc/passwd", "a/../../x", "", 3, None, "\\x", "C:x"])
    def test_file_outside_of_the_folder(self, parts: Parts, info: _StorageInfo, name: Any) -> None:
        info.relative_path = name
        refused(parts.write(), "does not lie in its folder")

    @pytest.mark.parametrize("offset", [10**9, 2**62, 4])
    def test_offset(self, parts: Parts, info: _StorageInfo, offset: int) -> None:
        info.offset = offset
        refused(parts.write(), "beyond the end|not a tensor|damaged|lies at")

    @pytest.mark.parametrize("value", [-1, 2**64, 1.5, "0", None, (), True])
    @pytest.mark.parametrize("name", ["offset", "length"])
    def test_numbers_that_are_none(self, parts: Parts, info: _StorageInfo, name: str, value: Any) -> None:
        setattr(info, name, value)
        refused(parts.write(), "place of a tensor is malformed")

    @pytest.mark.parametrize("length", [0, 1, 31, 100, 10**6])
    def test_length(self, parts: Parts, info: _StorageInfo, length: int) -> None:
        info.length = length
        refused(parts.write(), "is not the chunk|not a tensor|damaged|beyond the end")

    @pytest.mark.parametrize(
        "other",
        [torch.rand(9), torch.rand(8, 1), torch.rand(8).half(), {"a": torch.rand(8)}, [1], nn.Linear(2, 4), "text"],
        ids=["length", "shape", "type", "dict", "list", "module", "text"],
    )
    def test_slice_of_something_else(self, parts: Parts, info: _StorageInfo, other: Any) -> None:
        parts.places[MetadataIndex("norm.weight", torch.Size([0]))] = parts.append(0, other)
        refused(parts.write(), "not the chunk of norm.weight")

    def test_compressed_slice(self, parts: Parts, info: _StorageInfo) -> None:
        import zipfile

        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(torch.Size([1])))
            archive.writestr("archive/data/0", bytes(32))
        place = parts.append_bytes(0, buffer.getvalue())
        parts.places[MetadataIndex("norm.weight", torch.Size([0]))] = place
        refused(parts.write(), "not a tensor as torch.save writes it")

    def test_extension(self, parts: Parts, info: _StorageInfo) -> None:
        info.transform_descriptors = ["stream.zstd/1"]
        refused(parts.write(), "compressed or encrypted by an extension")

    @pytest.mark.parametrize(
        ("chunks", "words"),
        [
            ([((0,), (4,))], "do not cover"),
            ([], "do not cover"),
            ([((0,), (8,)), ((4,), (4,))], "overlap"),
            ([((0,), (9,))], "does not lie in it"),
            ([((-4,), (8,))], "does not lie in it"),
            ([((8,), (-4,))], "does not lie in it"),
            ([((2**62,), (2**62,))], "does not lie in it"),
            ([((0, 0), (8, 1))], "is malformed"),
            ([((0,), (8.0,))], "is malformed"),
            ([((), ())], "is malformed"),
            ([("0", "8")], "is malformed"),
            ([((2**70,), (1,))], "is malformed"),
            ([((4,), (4,))], "does not say where a part"),
        ],
    )
    def test_chunks(self, parts: Parts, chunks: list[Any], words: str) -> None:
        parts.add("norm.weight", torch.rand(8), (4,))
        entry = parts.tensors["norm.weight"]
        entry.chunks[:] = [ChunkStorageMetadata(start, shape) for start, shape in chunks]
        for start in ((0,), (4,)):
            if ((0,), (8,)) in chunks:
                parts.places[MetadataIndex("norm.weight", start)] = parts.append(0, torch.rand(8 - start[0]))
        if words.startswith("does not say"):
            del parts.places[MetadataIndex("norm.weight", torch.Size([4]))]
        refused(parts.write(), words)

    @pytest.mark.parametrize("chunks", [None, 3, {}, "x", [None], [3], [[]]])
    def test_chunks_of_another_type(self, parts: Parts, info: _StorageInfo, chunks: Any) -> None:
        parts.tensors["norm.weight"].chunks = chunks
        refused(parts.write(), "do not cover|ChunkStorageMetadata is malformed")

    @pytest.mark.parametrize("size", [(2**40,), (2**62, 2**62), (-8,), (8.0,), None, "8", (1 << 25,), (0,) * 65])
    def test_size(self, parts: Parts, info: _StorageInfo, size: Any) -> None:
        parts.tensors["norm.weight"].size = size
        with pytest.raises(InputError), open_checkpoint(parts.write()) as checkpoint:
            for layer in checkpoint.layers:
                layer.numbers.load()
            raise InputError("no norm any more")  # a size of no norm leaves none to be judged

    @pytest.mark.parametrize("name", ["state_dict_metadata", "storage_data"])
    @pytest.mark.parametrize("value", [None, [], 3, {3: 4}, {"a": None}, {(1, 2): {}}])
    def test_tables_of_another_type(self, parts: Parts, info: _StorageInfo, name: str, value: Any) -> None:
        setattr(parts, {"state_dict_metadata": "tensors", "storage_data": "places"}[name], value)
        refused(parts.write(), "metadata is damaged")

    @pytest.mark.parametrize("keys", [[], 3, {"norm.weight": 3}, {"norm.weight": ()}, {"norm.weight": ("other",)}])
    def test_keys_that_say_something_else(self, parts: Parts, info: _StorageInfo, read: Read, keys: Any) -> None:
        parts.keys = keys
        assert [layer.name for layer in read(parts.write()).layers] == ["norm"]

    def test_a_tensor_inside_of_a_tensor(self, parts: Parts) -> None:
        parts.add("a", torch.rand(8))
        parts.add("a.b", torch.rand(8))
        assert parts.keys is not None
        parts.keys["a.b"] = ("a", "b")
        refused(parts.write(), "inside of another tensor")

    def test_cycle(self, parts: Parts, info: _StorageInfo) -> None:
        """A tensor whose chunks are the table of tensors, and a table that lists itself."""
        parts.tensors["norm.weight"].chunks = parts.tensors  # type: ignore[assignment]
        parts.tensors["self"] = parts.tensors  # type: ignore[assignment]
        refused(parts.write(), "metadata is damaged")

    @pytest.mark.parametrize("cut", [0.2, 0.5, 0.95])
    def test_truncated_metadata(self, parts: Parts, info: _StorageInfo, cut: float) -> None:
        path = parts.write() / ".metadata"
        data = path.read_bytes()
        path.write_bytes(data[: int(cut * len(data))])
        refused(parts.folder, "the metadata")

    def test_no_metadata(self, parts: Parts, info: _StorageInfo) -> None:
        refused(parts.folder, "without a .metadata")
        refused(parts.folder / "__0_0.distcp", "what one rank wrote")

    def test_far_too_many_chunks(self, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distributed, "MAX_SLICES", 3)
        parts.add("norm.weight", torch.rand(8), (2, 4, 6))
        refused(parts.write(), "more than 3 chunks")

    def test_one_chunk_list_for_many_tensors(self, parts: Parts, info: _StorageInfo) -> None:
        """100,000 names for one entry of a thousand chunks: nothing is done for what is not asked for."""
        entry = parts.tensors["norm.weight"]
        entry.chunks *= 1000
        parts.tensors |= dict.fromkeys((f"{n}.norm.weight" for n in range(100_000)), entry)
        refused(parts.write(), "does not say where .*norm.weight lies")

    def test_every_byte_counts(self, parts: Parts, info: _StorageInfo) -> None:
        """Whatever one byte of the metadata is changed to, the answer is a report or an InputError."""
        path = parts.write() / ".metadata"
        data = path.read_bytes()
        generator = np.random.default_rng(0)
        for place in generator.integers(0, len(data), 400):
            path.write_bytes(data[:place] + bytes([generator.integers(256)]) + data[place + 1 :])
            try:
                inspect(path)
            except InputError:
                continue
