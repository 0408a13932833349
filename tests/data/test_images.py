"""Folders of images: which files, in which orientation and size, and what cannot be decoded."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normdoctor.data import Batch
from normdoctor.data.opening import open_data
from normdoctor.data.options import DataOptions
from normdoctor.data.wanted import Wanted
from normdoctor.errors import InputError, NormDoctorError, UsageError

Image = pytest.importorskip("PIL.Image")

ONE = (Wanted("x", None, loose=True),)


def save(path: Path, values: Any, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path, **how)
    return path


def noise(height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def taken(source: Path, wanted: Any = ONE, **options: Any) -> list[Batch]:
    with open_data(source, DataOptions(**options), wanted) as data:
        return list(data.batches())


def only(source: Path, wanted: Any = ONE, **options: Any) -> np.ndarray:
    (batch,) = taken(source, wanted, **options)
    return np.asarray(batch.args[0])


def test_a_folder(tmp_path: Path) -> None:
    for place, name in enumerate(["b/2.png", "a/1.PNG", "b/c/3.bmp", "4.png"]):
        save(tmp_path / name, np.full((6, 6, 3), place * 10))
    save(tmp_path / ".hidden/5.png", noise())
    (tmp_path / "labels.csv").write_text("1,2")
    np.save(tmp_path / "labels.npy", np.arange(4))  # by the order of the paths: 4, a/1, b/2, b/c/3
    with open_data(tmp_path, DataOptions(labels=str(tmp_path / "labels.npy"), batch_size=3), ONE) as data:
        assert (data.total, data.samples, data.has_labels) == (4, 4, True)
        assert data.words == f"{tmp_path}: 4 images (6 x 6 RGB), 1/255"
        assert data.notes == ("values are in 0..1: add --mean and --std if the model was trained so",)
        batches = list(data.batches())
    assert [batch.args[0].shape for batch in batches] == [(3, 3, 6, 6), (1, 3, 6, 6)]
    values = np.concatenate([batch.args[0] for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])  # type: ignore[misc]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values[:, 0, 0, 0], np.float32([30, 10, 0, 20])[labels] / np.float32(255))
    assert only(tmp_path / "4.png").shape == (1, 3, 6, 6)


def test_values(tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([every, every.T, every[::-1]], axis=-1)
    save(tmp_path / "x.png", pixels)
    plain = only(tmp_path)
    np.testing.assert_array_equal(plain[0], pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(only(tmp_path, scale=1.0)[0], pixels.transpose(2, 0, 1))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with open_data(tmp_path, DataOptions(mean=mean, std=std), ONE) as data:
        assert data.words.endswith("1 image (16 x 16 RGB), 1/255, mean 0.485 0.456 0.406, std 0.229 0.224 0.225")
        assert not data.notes
        (batch,) = data.batches()
    expected = (plain - np.float32(mean)[:, None, None]) / np.float32(std)[:, None, None]
    np.testing.assert_array_equal(batch.args[0], expected)


def test_short_side_and_centre(tmp_path: Path) -> None:
    # left third red, middle green, right third blue: the centre square is green
    wide = np.zeros((30, 90, 3))
    for third in range(3):
        wide[:, third * 30 : third * 30 + 30, third] = 255
    save(tmp_path / "wide" / "x.png", wide)
    found = only(tmp_path / "wide", image_size=10)
    assert found.shape == (1, 3, 10, 10)
    assert (found[0, 1, :, 1:-1] == 1).all() and (found[0, 0, :, 1:-1] == 0).all()
    # antialiased: stripes of one pixel become grey, and do not stay stripes
    stripes = np.zeros((64, 64, 3))
    stripes[:, ::2] = 255
    save(tmp_path / "stripes" / "x.png", stripes)
    assert abs(only(tmp_path / "stripes", image_size=8) - 0.5).max() < 0.02
    same = noise(8, 8)
    save(tmp_path / "same" / "x.png", same)
    np.testing.assert_array_equal(only(tmp_path / "same", image_size=8, scale=1.0)[0], same.transpose(2, 0, 1))
    enlarged = only(tmp_path / "same", image_size=16)
    assert enlarged.shape == (1, 3, 16, 16)


def test_orientation(tmp_path: Path) -> None:
    pixels = noise(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise to be seen
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    found = only(tmp_path, scale=1.0)
    np.testing.assert_array_equal(found[0].transpose(1, 2, 0), np.rot90(pixels, -1))


def test_modes(tmp_path: Path) -> None:
    grey = noise()[:, :, 0]
    save(tmp_path / "grey" / "x.png", grey)
    assert (only(tmp_path / "grey", scale=1.0)[0] == grey).all()
    one = only(tmp_path / "grey", [Wanted("x", ("n", 1, 8, 8))], scale=1.0)
    np.testing.assert_array_equal(one[0, 0], grey)
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep" / "x.png")
    with pytest.raises(InputError, match=r"no sample is left .*no bytes"):  # clipped to 255 otherwise
        taken(tmp_path / "deep")


def test_what_cannot_be_decoded_is_left_out(tmp_path: Path) -> None:
    for place in range(6):
        save(tmp_path / f"{place}.png", noise(seed=place))
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "4.png").write_text("<html>")
    np.save(tmp_path / "y.npy", np.arange(6))
    for options in ({}, {"image_size": 4}):
        with open_data(tmp_path, DataOptions(batch_size=4, labels=tmp_path / "y.npy", **options), ONE) as data:  # type: ignore[arg-type]
            batches = list(data.batches())
            assert sum(batch.size for batch in batches) == 4
            assert sorted(np.concatenate([batch.labels for batch in batches])) == [0, 1, 2, 5]  # type: ignore[misc]
            (note,) = [note for note in data.notes if "left out" in note]
            assert note.startswith("2 samples left out: ") and "3.png" in note and "4.png" in note
    for place in (0, 1, 2, 5):
        (tmp_path / f"{place}.png").unlink()
    for options in ({}, {"image_size": 4}):
        with pytest.raises(InputError, match=r"\d\.png"):
            taken(tmp_path, **options)


def test_sizes(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(8, 8))
    save(tmp_path / "b.png", noise(8, 9))
    with pytest.raises(UsageError, match=r"a.png is 8 x 8, b.png is 9 x 8") as caught:
        taken(tmp_path)
    assert "--image-size" in caught.value.hint
    with pytest.raises(UsageError, match=r"x is 2 x 3 x 4 x 4, the model takes x \(\? x 3 x 8 x 8") as caught:
        taken(tmp_path, [Wanted("x", (None, 3, 8, 8))], image_size=4)
    assert "--image-size 8" in caught.value.hint
    with pytest.raises(UsageError, match="the model has 2 inputs"):
        taken(tmp_path, [ONE[0], Wanted("z", None)])
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no images in this folder"):
        taken(tmp_path / "none")


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        png(50_000, 50_000, zlib.compress(bytes(1 << 20))),
        png(2_000_000, 1, zlib.compress(bytes(100))),
        png(64, 64, b"not deflated"),
        png(64, 64, zlib.compress(bytes(10))),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0" + bytes(100),
        b"GIF89a" + b"\xff" * 50,
        b"II*\0" + b"\xff" * 100,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    ],
)
def test_hostile_images(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    for source in (tmp_path, tmp_path / "x.png"):
        for options in ({}, {"image_size": 32}):
            with pytest.raises(NormDoctorError) as caught:
                taken(source, **options)
            assert caught.value.hint and "\n" not in caught.value.message and "x.png" in caught.value.message


def test_many_pixels_are_not_decoded(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(8000, 7000, zlib.compress(bytes(100))))
    with pytest.raises(InputError, match=r"x.png: 8000 x 7000 pixels"):
        taken(tmp_path, image_size=32)
    save(tmp_path / "x.png", noise(8, 200))
    with pytest.raises(InputError, match=r"x.png: 102400 x 4096 pixels once"):
        taken(tmp_path, image_size=4096)


def test_without_pillow(tmp_path: Path) -> None:
    save(tmp_path / "x.png", noise())
    script = (
        "import sys\nsys.modules['PIL'] = None\nfrom normdoctor.data.opening import open_data\n"
        "from normdoctor.errors import MissingDependencyError\n"
        f"try:\n    open_data({str(tmp_path)!r})\n"
        "except MissingDependencyError as error:\n    print(error.hint, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "pip install 'normdoctor[images]' False\n", done.stderr
