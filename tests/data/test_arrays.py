"""Arrays in files and in memory: which samples are taken, in which order, how converted, and what is refused."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from normdoctor.data import Batch, rows
from normdoctor.data.opening import open_data
from normdoctor.data.options import DataOptions
from normdoctor.data.wanted import Wanted, named
from normdoctor.errors import InputError, NormDoctorError, UsageError

X = Wanted("x", ("n", 3, 4, 4))
LOOSE = (Wanted("x", None, loose=True), Wanted("mask", None, optional=True, loose=True))
IDS = Wanted("ids", ("n", 5), "int64")

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 4)).astype(np.uint8)
FLOATS = np.arange(50 * 48, dtype=np.float32).reshape(50, 3, 4, 4)
CLASSES = np.arange(50) * 7 % 10


def taken(source: Any, wanted: Any = (X,), **options: Any) -> list[Batch]:
    with open_data(source, DataOptions(**options), wanted) as data:
        return list(data.batches())


def joined(batches: list[Batch], place: int = 0) -> np.ndarray:
    return np.concatenate([np.asarray(batch.args[place]) for batch in batches])


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def written(folder: Path, kind: str) -> Path:
    """FLOATS and their labels in a file of this kind; .npy has no labels."""
    path = folder / f"data.{kind}"
    tensors = {"x": torch.from_numpy(FLOATS), "labels": torch.from_numpy(CLASSES)}
    if kind == "npy":
        np.save(path, FLOATS)
    elif kind == "npz":
        np.savez(path, x=FLOATS, labels=CLASSES)
    elif kind == "packed":
        path = folder / "packed.npz"
        np.savez_compressed(path, x=FLOATS, labels=CLASSES)
    elif kind == "pt":
        torch.save(tensors, path)
    elif kind == "legacy":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        save_file(tensors, path)
    return path.rename(folder / "any_suffix.bin")


KINDS = ["npy", "npz", "packed", "pt", "legacy", "safetensors"]


@pytest.mark.parametrize("large", [False, True], ids=["whole", "by sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(tmp_path: Path, kind: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(rows, "WHOLE", 0)
    path = written(tmp_path, kind)
    with open_data(path, DataOptions(batch_size=16), [X]) as data:
        assert (data.total, data.samples, data.repeatable, data.notes) == (50, 50, True, ())
        assert data.words == f"{path}: x (50 x 3 x 4 x 4 float32)"
        assert data.has_labels is (kind != "npy")
        batches = list(data.batches())
        again = list(data.batches())
    assert [batch.size for batch in batches] == [16, 16, 16, 2] and [b.index for b in batches] == [0, 1, 2, 3]
    values = joined(batches)
    assert values.dtype == np.float32
    order = (values[:, 0, 0, 0] / 48).astype(int)
    assert sorted(order) == list(range(50)) and list(order) != list(range(50))
    np.testing.assert_array_equal(values, FLOATS[order])
    np.testing.assert_array_equal(joined(again), values)
    if data.has_labels:
        found = np.concatenate([batch.labels for batch in batches])  # type: ignore[misc]
        np.testing.assert_array_equal(found, CLASSES[order])
        assert found.dtype == np.int64


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("descr", ["<f4", ">f4", "<f2", "<f8", ">f8"])
def test_layouts_of_numpy(tmp_path: Path, descr: str, columns_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = (FLOATS / 16).astype(descr)
    np.save(tmp_path / "x.npy", np.asfortranarray(values) if columns_first else values)
    for whole in (1 << 20, 0):
        monkeypatch.setattr(rows, "WHOLE", whole)
        found = joined(taken(tmp_path / "x.npy"))
        np.testing.assert_array_equal(np.sort(found, axis=0), values.astype(np.float32))


def test_only_what_is_used_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    wide = np.lib.format.open_memmap(path, "w+", np.float32, (100, 1 << 20))
    wide[:, 0] = np.arange(100)
    wide.flush()
    del wide
    assert path.stat().st_size > rows.WHOLE
    tracemalloc.start()
    batches = taken(path, [Wanted("x", None)], samples=3, batch_size=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({float(batch.args[0][0, 0]) for batch in batches}) == 3
    assert peak < 12 * (4 << 20) < 100 * (4 << 20)


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(1, 60), samples=st.integers(1, 70), size=st.integers(1, 70), world=st.integers(1, 5),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_split_gives_the_same_samples(total: int, samples: int, size: int, world: int, seed: int) -> None:
    values = np.arange(total, dtype=np.float32)[:, None]
    with open_data(values, DataOptions(samples=samples, seed=seed), [Wanted("x", ("n", 1))]) as data:
        whole = joined(list(data.batches()))
        assert len(whole) == len(np.unique(whole)) == min(samples, total) == data.samples
        np.testing.assert_array_equal(joined(list(data.batches(size))), whole)
        parts = [list(data.batches(size, (rank, world))) for rank in range(world)]
    assert all(batch.index % world == rank for rank, part in enumerate(parts) for batch in part)
    together = sorted((batch for part in parts for batch in part), key=lambda batch: batch.index)
    assert [batch.index for batch in together] == list(range(-(-len(whole) // size)))
    np.testing.assert_array_equal(joined(together), whole)


def test_the_subset_is_uniform_and_seeded() -> None:
    values = np.arange(20, dtype=np.float32)[:, None]
    wanted = [Wanted("x", ("n", 1))]
    counts, first = np.zeros(20), np.zeros(20)
    for seed in range(2000):
        drawn = joined(taken(values, wanted, samples=5, seed=seed))[:, 0].astype(int)
        counts[drawn] += 1
        first[drawn[0]] += 1
    # Binomial(2000, 1/4) and Binomial(2000, 1/20): five standard deviations are 97 and 49.
    assert abs(counts - 500).max() < 97 and abs(first - 100).max() < 49
    one, same, other = (joined(taken(values, wanted, samples=5, seed=seed)) for seed in (3, 3, 4))
    assert (one == same).all() and (one != other).any()


def test_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((10_500, 1), np.float32)
    for samples, used in ((None, 10_000), ("all", 10_500), (20_000, 10_500), (7, 7)):
        with open_data(values, DataOptions(samples=samples, seed=2), [Wanted("x", None)]) as data:  # type: ignore[arg-type]
            assert (data.total, data.samples) == (10_500, used)
            assert ("drawn by seed 2" in data.words) is (used < 10_500)
            assert bool(data.notes) is (samples == 20_000)


def test_bytes_are_scaled_and_normalised() -> None:
    found = joined(taken(IMAGES, scale=1 / 255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.3, 0.4])
    expected = (IMAGES.astype(np.float32) / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_array_equal(np.sort(found.reshape(-1)), np.sort(expected.reshape(-1)))
    for wanted in ([X], LOOSE):
        with pytest.raises(UsageError, match="x is uint8, the model takes float32") as caught:
            taken(IMAGES, wanted)
        assert "--scale 0.00392157" in caught.value.hint
    # a tensor of the user's own is treated alike
    batch = taken([torch.from_numpy(IMAGES)], scale=1 / 255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))[0]
    np.testing.assert_allclose(batch.args[0].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_types(tmp_path: Path) -> None:
    with open_data(FLOATS.astype(np.float64), wanted=[X]) as data:
        assert data.notes == ("x: float64 is cast to float32",)
        assert next(data.batches()).args[0].dtype == np.float32
    with open_data(FLOATS.astype(np.float16), wanted=[X]) as data:
        assert data.notes == ()
    double = taken(FLOATS, [Wanted("x", None, "float64")])
    assert double[0].args[0].dtype == np.float64
    tokens = np.arange(100).reshape(20, 5)
    assert joined(taken(tokens.astype(np.int32), [IDS])).dtype == np.int64
    assert joined(taken(tokens, LOOSE)).dtype == np.int64
    assert joined(taken(torch.full((4, 3), 0.3, dtype=torch.bfloat16), LOOSE))[0, 0] == np.float32(0.30078125)
    for array, wanted, message in (
        (FLOATS[:, :, 0, 0].astype(np.int16), [Wanted("x", None)], "x is int16"),
        (np.zeros((4, 5)), [IDS], "ids is float64, the model takes ids"),
        (np.zeros((4, 5), complex), LOOSE, "x is complex128"),
        (np.full((4, 5), 1 << 40), [Wanted("ids", None, "int32")], "ids: has an integer beyond int32"),
    ):
        with pytest.raises(NormDoctorError, match=message) as caught:
            taken(array, wanted)
        assert caught.value.hint
    with pytest.raises(UsageError, match="--scale is for floats"):
        taken(tokens, [IDS], scale=2.0)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((5, 4, 4, 4), {}, r"x is 5 x 4 x 4 x 4, the model takes x \(\? x 3 x 4 x 4, float32\)"),
        ((5, 3, 4), {}, "x is 5 x 3 x 4"),
        ((0, 3, 4, 4), {}, "x is empty"),
        ((), {}, "a single number"),
        ((5, 3, 4, 4), {"mean": (1.0, 2.0)}, "--mean has 2 values, x has 3 channels"),
        ((5, 3, 4, 4), {"image_size": 4}, "--image-size is for"),
    ],
)
def test_what_does_not_fit(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(NormDoctorError, match=message) as caught:
        taken(np.zeros(shape, np.float32), **options)
    assert caught.value.hint


def test_names(tmp_path: Path) -> None:
    both = saved(tmp_path / "both.npz", x=FLOATS, ids=np.zeros((50, 5), int), other=np.zeros(3))
    with open_data(both, wanted=[X, IDS]) as data:
        batch = next(data.batches())
        assert list(named(batch, [X, IDS])) == ["x", "ids"] and len(batch.args) == 2
        assert data.notes == ("not used, since the model does not take it: other",)
    second = [Wanted("a", None, optional=True), X]
    batch = taken(saved(tmp_path / "one.npz", x=FLOATS), second)[0]
    assert not batch.args and list(batch.kwargs) == ["x"]
    assert taken(saved(tmp_path / "renamed.npz", images=FLOATS, y=CLASSES))[0].labels is not None
    with_rate = [X, Wanted("rate", (), "int64")]
    batch = taken(saved(tmp_path / "rate.npz", x=FLOATS, rate=np.array(16000)), with_rate)[1]
    assert batch.args[1] == 16000 and batch.args[1].shape == ()
    for arrays, wanted, message in (
        ({"images": FLOATS}, [X, IDS], "has nothing for input x"),
        ({"x": FLOATS}, [X, IDS], "has nothing for input ids"),
        ({}, [X], "has nothing for input x"),
        ({"x": FLOATS, "ids": np.zeros((49, 5), int)}, [X, IDS], "x has 50 samples, ids has 49"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            taken(saved(tmp_path / "no.npz", **arrays), wanted)
        assert caught.value.hint
    np.save(tmp_path / "one.npy", FLOATS)
    with pytest.raises(UsageError, match="one array, and the model has 2 inputs"):
        taken(tmp_path / "one.npy", [X, IDS])
    torch.save((torch.zeros(3), torch.zeros(3)), tmp_path / "two.pt")
    with pytest.raises(InputError, match="2 tensors without names"):
        taken(tmp_path / "two.pt")


def test_labels(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.npz", x=FLOATS, classes=CLASSES)
    np.save(tmp_path / "y.npy", CLASSES[:, None])
    torch.save(torch.from_numpy(CLASSES), tmp_path / "y.pt")
    for name in ("classes", tmp_path / "y.npy", str(tmp_path / "y.pt")):
        for batch in taken(path, labels=name):
            expected = CLASSES[(batch.args[0][:, 0, 0, 0] / 48).astype(int)]
            np.testing.assert_array_equal(batch.labels, expected)  # type: ignore[arg-type]
    np.save(tmp_path / "short.npy", CLASSES[:49])
    np.save(tmp_path / "floats.npy", CLASSES.astype(float))
    for wrong, message in (
        ("clases", "no array of that name"),
        (tmp_path / "short.npy", "50 samples and 49 labels"),
        (tmp_path / "floats.npy", "labels are 50 of float64"),
        (path, "not clear which of 2 arrays"),
    ):
        with pytest.raises(NormDoctorError, match=message):
            taken(path, labels=wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_names_the_sample(value: float) -> None:
    values = FLOATS.copy()
    values[[17, 23], 1, 2, 3] = value
    with pytest.raises(InputError, match=r"sample (17|23) of x has values that are NaN or Inf") as caught:
        taken(values)
    assert "--drop-nonfinite" in caught.value.hint
    with open_data(values, DataOptions(drop_nonfinite=True, batch_size=1), [X]) as data:
        for _ in range(2):
            batches = list(data.batches())
            assert len(batches) == 48 and np.isfinite(joined(batches)).all() and len({b.index for b in batches}) == 48
        assert data.notes[0].startswith("2 samples left out: ") and "sample 17 of x" in data.notes[0]
        assert sum(batch.size for batch in data.batches(7)) == 48
    with pytest.raises(InputError, match="no sample is left"):
        taken(np.full((5, 3, 4, 4), value), drop_nonfinite=True)


def test_beyond_the_type() -> None:
    with pytest.raises(InputError, match="beyond float16"):
        taken(np.full((2, 3), 1e6, np.float32), [Wanted("x", None, "float16")])


def test_a_model_of_whole_batches() -> None:
    fixed = [Wanted("x", (4, 3, 4, 4))]
    with open_data(FLOATS, DataOptions(batch_size=9), fixed) as data:
        assert {batch.size for batch in data.batches(13)} == {4} and data.samples == 48
        assert data.notes == ("2 samples are not used: the model takes whole batches of 4",)
    with pytest.raises(UsageError, match="batches of exactly 4"):
        taken(FLOATS[:3], fixed)
    values = FLOATS.copy()
    values[3] = np.nan
    with open_data(values, DataOptions(drop_nonfinite=True), fixed) as data:
        assert {batch.size for batch in data.batches()} == {4}
        assert len(list(data.batches())) in (11, 12)


def with_member(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", content)


def header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + bytes(200),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70000,
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"(" * 100,
        header("(2500000000,)") + bytes(1000),
        header("(1, 3, 1, -8)"),
        header("(1, 99999999999999999999999999, 0)"),
        header("(__import__('os').abort(),)"),
        header("(4,)", "'|O'") + b"cos\nabort\n(tR.",
        header("(4,)", "[('a', '<f4'), ('b', '|O')]"),
        header("(4,)", "'<U4'") + bytes(64),
        header("(" + "1," * 40 + ")") + bytes(4),
    ],
)
def test_hostile_arrays(tmp_path: Path, content: bytes) -> None:
    plain, packed, deflated = tmp_path / "d.npy", tmp_path / "d.npz", tmp_path / "z.npz"
    plain.write_bytes(content)
    with_member(packed, content)
    with_member(deflated, content, zipfile.ZIP_DEFLATED)
    for path in (plain, packed, deflated):
        with pytest.raises(NormDoctorError) as caught:
            taken(path)
        assert caught.value.hint and "\n" not in caught.value.message and path.name in caught.value.message


def test_what_is_compressed_too_well(tmp_path: Path) -> None:
    class Zeros:
        left = 300 << 20

        def read(self, size: int) -> bytes:
            size = min(size, self.left)
            self.left -= size
            return bytes(size)

    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w") as to,
    ):
        to.write(header("(75, 1048576)"))
        source = Zeros()
        while part := source.read(1 << 22):
            to.write(part)
    with pytest.raises(InputError, match="bytes of compressed arrays") as caught:
        taken(tmp_path / "bomb.npz", [Wanted("x", None)])
    assert "numpy.savez" in caught.value.hint


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.npz", x=np.concatenate([FLOATS, FLOATS]))  # more than is read for the header
    whole = path.read_bytes()
    path.write_bytes(whole[:15_000] + bytes([whole[15_000] ^ 1]) + whole[15_001:])
    with pytest.raises(InputError, match="checksum"):
        taken(path)
    path.write_bytes(whole[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        taken(path)


def test_files_are_closed(tmp_path: Path, opened_files: Callable[[], list[str]]) -> None:
    path = saved(tmp_path / "d.npz", x=FLOATS)
    for _ in range(2):
        data = open_data(path, wanted=[X])
        next(data.batches())
        assert str(path) in opened_files()
        del data
        assert str(path) not in opened_files()
        with pytest.raises(UsageError):
            open_data(path, wanted=[IDS, X])
        assert str(path) not in opened_files()


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for path in (tmp_path / "none.npz", str(tmp_path / "none.npy")):
        with pytest.raises(InputError, match="no such file"):
            taken(path)
    with pytest.raises(InputError, match="URLs are not read"):
        taken("https://example.org/x.npy")
    (tmp_path / "t.txt").write_text("1 2 3\n")
    with pytest.raises(InputError, match="holds no data that normdoctor reads") as caught:
        taken(tmp_path / "t.txt")
    assert ".npz" in caught.value.hint
    with pytest.raises(NormDoctorError):
        taken(Path(__file__).parents[2] / "fixtures" / "healthy.onnx")
