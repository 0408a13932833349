"""What is found in folders: every checkpoint once, by its content, and nothing that is none."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from normdoctor.errors import InputError
from normdoctor.readers import folders, open_checkpoint
from normdoctor.readers.folders import find_checkpoints

STATE = {"bn.weight": torch.rand(8), "bn.bias": torch.rand(8)}


def torch_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(STATE, path)
    return path


def tensors_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(STATE, path)
    return path


def sharded(folder: Path, index: str = "model.safetensors.index.json") -> Path:
    stem = index.partition(".index")[0]
    name = f"{stem.rpartition('.')[0]}-1-of-1.{stem.rpartition('.')[2]}"
    (torch_file if name.endswith("bin") else tensors_file)(folder / name)
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(STATE, name)}))
    return folder


def distributed(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(STATE, storage_writer=dcp.FileSystemWriter(folder))
    return folder


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., list[str]]:
    """The targets in the temporary folder (or what is given below it), as paths below it."""

    def find(*given: str) -> list[str]:
        targets = find_checkpoints([tmp_path / name for name in given] or [tmp_path]).targets
        return [str(target.relative_to(tmp_path)) for target in targets]

    return find


Found = Callable[..., list[str]]


class TestByContent:
    def test_every_format(self, tmp_path: Path, found: Found) -> None:
        torch_file(tmp_path / "1-zip.weights")
        torch.save(STATE, tmp_path / "2-legacy", _use_new_zipfile_serialization=False)
        tensors_file(tmp_path / "3-safe.bin")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(nn.BatchNorm1d(3)), tmp_path / "4-script.dat")
            torch.export.save(torch.export.export(nn.BatchNorm1d(3).eval(), (torch.rand(2, 3),)), tmp_path / "5.pt2")
        (tmp_path / "6.onnx").write_bytes(b"\x08\x07\x3a\x00")
        assert found() == ["1-zip.weights", "2-legacy", "3-safe.bin", "4-script.dat", "5.pt2", "6.onnx"]

    def test_everything_else_is_passed_over(self, tmp_path: Path) -> None:
        torch_file(tmp_path / "m.pt")
        np.savez(tmp_path / "a.npz", np.zeros(3))
        np.save(tmp_path / "a.npy", np.zeros(3))
        (tmp_path / "p.pkl").write_bytes(pickle.dumps({"a": 1}))
        (tmp_path / "readme.md").write_text("{")
        (tmp_path / "search.index.json").write_text("{}")
        (tmp_path / "config.json").write_text('{"weight_map": {}}')
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        (tmp_path / "empty.txt").touch()
        (tmp_path / "onnx").write_bytes(b"\x08\x07\x3a\x00")
        with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
            archive.writestr("deep/down/data.pkl", b"")
            archive.writestr("deep/models/model.json", b"")
        os.mkfifo(tmp_path / "pipe.pt")
        result = find_checkpoints([tmp_path])
        assert result.targets == (tmp_path / "m.pt",)
        assert result.passed_over == 11

    def test_training_state(self, tmp_path: Path) -> None:
        names = ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_3.pth", "training_args.bin"]
        names += ["optimizer.bin", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "random_states_0.pkl"]
        for name in (*names, "mp_rank_00_model_states.pt", "my_optimizer.pt"):
            torch_file(tmp_path / name)
        result = find_checkpoints([tmp_path])
        assert [path.name for path in result.targets] == ["mp_rank_00_model_states.pt", "my_optimizer.pt"]
        assert result.passed_over == len(names)

    @pytest.mark.parametrize("name", ["m.pt", "m.safetensors", "pytorch_model.bin", "m.onnx", "m.CKPT"])
    def test_what_is_broken_is_found(self, tmp_path: Path, found: Found, name: str) -> None:
        """An empty file, a pointer and a cut zip under a model's name: opening them says what they are."""
        whole = torch_file(tmp_path / "whole.pt").read_bytes()
        (tmp_path / "whole.pt").unlink()
        for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", whole[:300]):
            (tmp_path / name).write_bytes(content)
            assert found() == [name]
            with pytest.raises(InputError):
                open_checkpoint(tmp_path / name)


class TestFolders:
    def test_order(self, tmp_path: Path, found: Found) -> None:
        for name in ("run10/m.pt", "run2/m.pt", "run2/epoch-9.pt", "run2/epoch-10.pt", "a.pt"):
            torch_file(tmp_path / name)
        assert found() == ["a.pt", "run2/epoch-9.pt", "run2/epoch-10.pt", "run2/m.pt", "run10/m.pt"]

    def test_order_of_what_is_given(self, tmp_path: Path, found: Found) -> None:
        torch_file(tmp_path / "a/m.pt"), torch_file(tmp_path / "b/m.pt")
        assert found("b", "a", "b/m.pt") == ["b/m.pt", "a/m.pt"]

    def test_hidden_unless_given(self, tmp_path: Path, found: Found) -> None:
        for name in (".git/m.pt", "a/.ipynb_checkpoints/m.pt", ".hidden.pt", "a/m.pt"):
            torch_file(tmp_path / name)
        assert found() == ["a/m.pt"]
        assert found(".git") == [".git/m.pt"]
        assert found(".hidden.pt") == [".hidden.pt"]

    def test_links(self, tmp_path: Path, found: Found) -> None:
        torch_file(tmp_path / "a/m.pt")
        (tmp_path / "a/up").symlink_to(tmp_path)
        (tmp_path / "a/self").symlink_to("self")
        (tmp_path / "b").symlink_to("a")
        (tmp_path / "c.pt").symlink_to("a/m.pt")
        (tmp_path / "d.pt").symlink_to("nowhere")
        (tmp_path / "notes.md").symlink_to("nowhere")
        assert found() == ["a/m.pt", "d.pt"]
        assert find_checkpoints([tmp_path]).passed_over == 2  # notes.md and a/self

    def test_a_file_given_is_always_a_target(self, tmp_path: Path, found: Found) -> None:
        (tmp_path / "notes.txt").write_text("no model")
        torch_file(tmp_path / "optimizer.pt")
        assert found("notes.txt", "optimizer.pt", "missing.pt") == ["notes.txt", "optimizer.pt", "missing.pt"]
        assert find_checkpoints([str(tmp_path / "notes.txt")]).passed_over == 0

    @pytest.mark.parametrize("address", ["https://host/m.pt?download=1", "s3://bucket/[a]/*.pt", "hf://x/y"])
    def test_an_address_is_no_path(self, address: str) -> None:
        (target,) = find_checkpoints([address]).targets
        with pytest.raises(InputError, match="URLs are not read") as caught:
            open_checkpoint(target)
        assert "Download" in caught.value.hint

    def test_a_file_whose_path_looks_like_an_address(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        torch_file(tmp_path / "https:/host/m.pt")
        monkeypatch.chdir(tmp_path)
        with open_checkpoint("https://host/m.pt") as checkpoint:
            assert len(checkpoint.layers) == 1

    def test_nothing(self, tmp_path: Path, found: Found) -> None:
        (tmp_path / "notes.txt").write_text("no model")
        with pytest.raises(InputError, match="no checkpoint among 2 files and folders") as caught:
            found()
        assert "safetensors" in caught.value.hint

    @pytest.mark.parametrize("name", ["MAX_TARGETS", "MAX_ENTRIES"])
    def test_far_too_many(self, tmp_path: Path, found: Found, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        for number in range(4):
            torch_file(tmp_path / f"{number}.pt")
        assert len(found()) == 4
        monkeypatch.setattr(folders, name, 3)
        with pytest.raises(InputError, match="more than 3"):
            found()

    def test_a_deep_tree(self, tmp_path: Path, found: Found) -> None:
        deep = tmp_path.joinpath(*["d"] * 300)
        torch_file(deep / "m.pt")
        assert len(found()) == 1

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_permission(self, tmp_path: Path, found: Found) -> None:
        torch_file(tmp_path / "a/m.pt").chmod(0)
        torch_file(tmp_path / "b/m.pt").parent.chmod(0)
        assert found() == ["a/m.pt"]


class TestSeveralFilesInOne:
    def test_shards_are_no_targets(self, tmp_path: Path, found: Found) -> None:
        sharded(tmp_path / "a")
        tensors_file(tmp_path / "a/1_Pooling/model.safetensors")
        torch_file(tmp_path / "a/pooler.bin")
        assert found() == ["a", "a/1_Pooling/model.safetensors", "a/pooler.bin"]
        assert found("a/model-1-of-1.safetensors") == ["a/model-1-of-1.safetensors"]

    def test_distributed(self, tmp_path: Path, found: Found) -> None:
        distributed(tmp_path / "a")
        torch_file(tmp_path / "a/extra.pt")
        distributed(tmp_path / "optimizer_0")
        assert found() == ["a", "a/extra.pt"]
        assert found("optimizer_0") == ["optimizer_0"]
        (tmp_path / "a/.metadata").unlink()
        assert found() == ["a", "a/extra.pt"]
        with pytest.raises(InputError, match=r"without a \.metadata"):
            open_checkpoint(tmp_path / "a")

    def test_several_indexes(self, tmp_path: Path, found: Found) -> None:
        sharded(tmp_path / "a", "model.safetensors.index.json")
        sharded(tmp_path / "a", "pytorch_model.bin.index.json")
        assert found() == ["a/model.safetensors.index.json", "a/pytorch_model.bin.index.json"]
        for target in found():
            with open_checkpoint(tmp_path / target) as checkpoint:
                assert len(checkpoint.layers) == 1

    def test_damaged_index(self, tmp_path: Path, found: Found) -> None:
        sharded(tmp_path / "a")
        (tmp_path / "a/model.safetensors.index.json").write_text('{"weight_map": {')
        assert found() == ["a", "a/model-1-of-1.safetensors"]

    def test_the_cache_of_huggingface_hub(self, tmp_path: Path, found: Found) -> None:
        """The blobs behind the snapshots are not looked at; a revision that changed nothing adds nothing."""
        sharded(tmp_path / "plain")
        model = tmp_path / "hub/models--a--b"
        (model / "blobs").mkdir(parents=True)
        for revision in ("1111", "2222"):
            (model / "snapshots" / revision).mkdir(parents=True)
            for path in (tmp_path / "plain").iterdir():
                blob = model / "blobs" / f"{len(path.name):064}"
                blob.write_bytes(path.read_bytes())
                (model / "snapshots" / revision / path.name).symlink_to(Path("../../blobs") / blob.name)
        assert found("hub") == ["hub/models--a--b/snapshots/1111"]

    def test_a_folder_that_is_none(self, tmp_path: Path) -> None:
        torch_file(tmp_path / "a.pt")
        with pytest.raises(InputError, match="is a folder of one file or folder, not one checkpoint") as caught:
            open_checkpoint(tmp_path)
        assert f"normdoctor inspect {tmp_path}" in caught.value.hint


class TestGlobs:
    @pytest.fixture(autouse=True)
    def tree(self, tmp_path: Path) -> None:
        for name in ("a/1.pt", "a/2.pt", "a/b/3.pt", "c/.hidden/4.pt"):
            torch_file(tmp_path / name)
        (tmp_path / "a/notes.txt").write_text("no model")
        sharded(tmp_path / "s")

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("a/*.pt", ["a/1.pt", "a/2.pt"]),
            ("a/*", ["a/1.pt", "a/2.pt", "a/b/3.pt"]),
            ("a/[2-9].pt", ["a/2.pt"]),
            ("**/*.pt", ["a/1.pt", "a/2.pt", "a/b/3.pt"]),
            ("**/3.pt", ["a/b/3.pt"]),
            ("c/.hid*/*.pt", ["c/.hidden/4.pt"]),
            ("c/.hidden/*.pt", ["c/.hidden/4.pt"]),
            ("?", ["a/1.pt", "a/2.pt", "a/b/3.pt", "s"]),
            ("s/*", ["s/model.safetensors.index.json"]),
            ("**/*", ["a/1.pt", "a/2.pt", "a/b/3.pt", "s"]),
            ("s/*.safetensors", ["s/model-1-of-1.safetensors"]),
        ],
    )
    def test_matches(self, tmp_path: Path, found: Found, pattern: str, names: list[str]) -> None:
        if "c/." not in pattern and pattern == "?":
            (tmp_path / "c/5.txt").touch()
        assert sorted(found(pattern)) == names

    def test_relative(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path / "s")
        assert find_checkpoints(["../a/*.pt"]).targets == (Path("../a/1.pt"), Path("../a/2.pt"))
        monkeypatch.chdir(tmp_path / "a")
        assert find_checkpoints(["*.pt"]).targets == (Path("1.pt"), Path("2.pt"))
        assert find_checkpoints(["."]).targets == (Path("1.pt"), Path("2.pt"), Path("b/3.pt"))

    def test_a_name_with_brackets(self, tmp_path: Path, found: Found) -> None:
        torch_file(tmp_path / "x[1].pt")
        assert found("x[1].pt") == ["x[1].pt"]
        assert found("x*") == ["x[1].pt"]

    @pytest.mark.parametrize("pattern", ["a/*.onnx", "nothing/**/*.pt", "**a/x", "a/notes*"])
    def test_no_match(self, found: Found, pattern: str) -> None:
        with pytest.raises(InputError, match=r"matches nothing|no checkpoint among|cannot be searched"):
            found(pattern)
