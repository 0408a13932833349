"""Whether weights moved: with and without checksums, beyond the samples, with numbers that are none."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from normdoctor.compared import Motion, WeightsChange
from normdoctor.comparing import weights
from normdoctor.comparing.weights import weights_change
from normdoctor.layers import ArrayRef
from normdoctor.readers import open_checkpoint

BIG = 200_000
"""Elements of float32, of which a sample sees an eighth."""


def state(**changes: float) -> dict[str, torch.Tensor]:
    """Two weights; changes: element → what is added to it in the first."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "conv.weight": torch.randn(BIG // 8, 8, generator=generator),
        "fc.weight": torch.randn(10, 4, generator=generator),
        "steps": torch.tensor(7),
    }
    for place, value in changes.items():
        tensors["conv.weight"].view(-1)[int(place[1:])] += value
    return tensors


def change(folder: Path, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], how: str) -> WeightsChange | None:
    paths = []
    for name, tensors in (("a", old), ("b", new)):
        path = folder / f"{name}.{how}"
        if how == "safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization=how == "zip")
        paths.append(path)
    with open_checkpoint(paths[0]) as first, open_checkpoint(paths[1]) as second:
        tables: list[dict[str, ArrayRef]] = [
            {reference.name: reference.array for reference in one.list_references()} for one in (first, second)
        ]
        return weights_change(tables[0], tables[1])


FORMATS = ("zip", "legacy", "safetensors")


@pytest.mark.parametrize("how", FORMATS)
def test_equal(tmp_path: Path, how: str) -> None:
    found = change(tmp_path, state(), state(), how)
    assert found == WeightsChange(tensors=2, equal=2, relative=0.0, motion=Motion.EQUAL, unmatched=0)


@pytest.mark.parametrize("how", FORMATS)
def test_one_number_that_no_sample_sees(tmp_path: Path, how: str) -> None:
    found = change(tmp_path, state(), state(_30000=1e-3), how)
    assert found is not None
    assert (found.equal, found.relative, found.motion) == (1, 0.0, Motion.MOVED)


@pytest.mark.parametrize("how", FORMATS)
def test_the_relative_change_is_that_of_all_numbers(tmp_path: Path, how: str) -> None:
    new = state()
    new["conv.weight"] = new["conv.weight"] * 1.25
    found = change(tmp_path, state(), new, how)
    apart = np.linalg.norm(new["conv.weight"] - state()["conv.weight"])
    size = np.sqrt(sum(np.square(np.linalg.norm(one)) for one in state().values() if one.is_floating_point()))
    assert found is not None and found.motion is Motion.MOVED
    assert found.relative == pytest.approx(apart / size, rel=1e-3)


def test_what_is_no_number_counts_as_movement(tmp_path: Path) -> None:
    new = state()
    new["fc.weight"][3, 1] = float("nan")
    found = change(tmp_path, state(), new, "zip")
    assert found is not None and found.motion is Motion.MOVED and found.relative > 0
    assert change(tmp_path, new, new, "zip") == change(tmp_path, state(), state(), "zip")


def test_other_shapes_and_names_are_left_out(tmp_path: Path) -> None:
    new = state() | {"fc.weight": torch.zeros(12, 4), "more": torch.ones(3)}
    found = change(tmp_path, state(), new, "zip")
    assert found is not None and (found.tensors, found.equal, found.unmatched) == (1, 1, 2)
    assert change(tmp_path, {"a": torch.ones(2)}, {"b": torch.ones(2)}, "zip") is None


def test_views_that_are_not_contiguous(tmp_path: Path) -> None:
    new = state()
    new["conv.weight"] = new["conv.weight"].t().contiguous().t()
    found = change(tmp_path, state(), new, "zip")
    assert found is not None and found.motion is Motion.EQUAL


def test_equal_checksums_need_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_chunks", lambda ref: pytest.fail("read to its end"))
    found = change(tmp_path, state(), state(), "zip")
    assert found is not None and found.motion is Motion.EQUAL


def test_a_checksum_of_zero_is_none(tmp_path: Path) -> None:
    """torch writes it on request (torch.serialization.set_crc32_options)."""
    found = change(tmp_path, state(), state(_30000=1e-3), "zip")
    with open_checkpoint(tmp_path / "a.zip") as first:
        refs = {reference.name: reference.array for reference in first.list_references()}
        assert weights._checksum(refs["conv.weight"])
        storage = refs["conv.weight"].storage  # type: ignore[attr-defined]
        object.__setattr__(storage, "crc32", 0)
        assert weights._checksum(refs["conv.weight"]) is None
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert all(info.CRC for info in archive.infolist() if info.file_size)
    assert found is not None and found.motion is Motion.MOVED
