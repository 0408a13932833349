"""What both models are fed with: random numbers that fit, and the user's own data with clear errors."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normdoctor.data.wanted import Wanted
from normdoctor.errors import CannotRunError, InputError, NormDoctorError, UsageError
from normdoctor.folding.data import OPEN_LENGTHS, load_data, random_inputs, with_shapes
from normdoctor.models.inputs import parse_input_shapes

IMAGE = Wanted("x", ("batch", 3, None, 8))
TOKENS = Wanted("ids", ("batch", 16), "int64")


def test_random_inputs_fit_and_repeat() -> None:
    choices = list(random_inputs([IMAGE, TOKENS], seed=5))
    assert [choice["x"].shape for choice in choices] == [(2, 3, length, 8) for length in OPEN_LENGTHS]
    first = choices[0]
    assert first["ids"].shape == (2, 16) and first["ids"].dtype == np.int64
    assert set(np.unique(first["ids"])) == {0, 1}
    assert first["x"].dtype == np.float32 and 0.9 < first["x"].std() < 1.1
    again = next(random_inputs([IMAGE, TOKENS], seed=5))
    assert all((first[name] == again[name]).all() for name in first)
    assert (next(random_inputs([IMAGE], seed=6))["x"] != first["x"]).any()


def test_one_choice_where_nothing_is_open() -> None:
    assert len(list(random_inputs([Wanted("x", ("n", 3)), Wanted("y", (5, "n"))], 0))) == 1
    assert next(random_inputs([Wanted("x", ("n", 3)), Wanted("y", (5, "n"))], 0))["y"].shape == (5, 2)
    assert next(random_inputs([Wanted("t", ())], 0))["t"].shape == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "bool", "int8", "complex64"])
def test_every_type_can_be_made_up(dtype: str) -> None:
    made = next(random_inputs([Wanted("x", (2, 3), dtype)], 0))["x"]
    assert made.dtype == np.dtype("float32" if dtype == "bfloat16" else dtype)


def test_what_cannot_be_made_up() -> None:
    with pytest.raises(CannotRunError, match="does not say its shape"):
        next(random_inputs([Wanted("x", None)], 0))
    with pytest.raises(CannotRunError, match="too many"):
        next(random_inputs([Wanted("x", (1 << 20, 1 << 20))], 0))
    with pytest.raises(CannotRunError, match="cannot be made up"):
        next(random_inputs([Wanted("x", (2,), "string")], 0))


def test_shapes_by_name_and_by_place() -> None:
    found = with_shapes([IMAGE, TOKENS], parse_input_shapes(["1,3,32,8", "ids=1,16:int64"]))
    assert [entry.shape for entry in found] == [(1, 3, 32, 8), (1, 16)]
    assert with_shapes([IMAGE, TOKENS], parse_input_shapes(["ids=4,16"]))[0] is IMAGE


@pytest.mark.parametrize(
    "texts, message",
    [
        (["nope=1,3,8,8"], "no input 'nope'"),
        (["1,4,8,8"], "does not fit x"),
        (["1,3,8"], "does not fit x"),
        (["1,3,8,8", "1,16", "1"], "given 3 times, the model has 2 inputs"),
        (["1,3,8,8:int64"], "the model takes x"),
    ],
)
def test_shapes_that_do_not_fit(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        with_shapes([IMAGE, TOKENS], parse_input_shapes(texts))
    assert "x (? x 3 x ? x 8, float32)" in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("text", "example"),
    [("5,3,8,8:int64", "x=5,3,8,8:float32"), ("5,4,6,8", "x=5,3,6,8:float32"), ("3,8", "x=2,3,2,8:float32")],
)
def test_the_hint_is_an_example(text: str, example: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_shapes([IMAGE], parse_input_shapes([text]))
    assert caught.value.hint == f"Write --input-shape {example}."


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_data_by_name_in_the_type_of_the_input(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.npz", x=np.ones((4, 3, 5, 8)), ids=np.zeros((4, 16), np.int32))
    found = load_data(path, [IMAGE, TOKENS])
    assert found["x"].dtype == np.float32 and found["ids"].dtype == np.int64


def test_one_array_for_the_only_input(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(24, dtype=np.uint8).reshape(1, 3, 1, 8))
    found = load_data(path, [IMAGE])["x"]
    assert found.dtype == np.float32 and found.max() == 23
    path.unlink()  # not mapped any more
    with pytest.raises(InputError, match="no such file"):
        load_data(path, [IMAGE])
    np.save(path, np.zeros((1, 3, 1, 8)))
    with pytest.raises(UsageError, match="one array, and the model has 2 inputs"):
        load_data(path, [IMAGE, TOKENS])


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"y": np.zeros((1, 3, 1, 8))}, "has no input 'y'"),
        ({}, "has nothing for input x"),
        ({"x": np.zeros((1, 4, 1, 8))}, "x is 1 x 4 x 1 x 8, the model takes x"),
        ({"x": np.zeros((3, 1, 8))}, "x is 3 x 1 x 8"),
        ({"x": np.zeros((0, 3, 1, 8))}, "is empty"),
        ({"x": np.zeros((1, 3, 1, 8), complex)}, "x is complex128"),
        ({"x": np.array([["a"]])}, "x is 1 x 1"),
        ({"x": np.array({}, dtype=object)}, "cannot be read"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(NormDoctorError, match=message) as caught:
        load_data(saved(tmp_path / "d.npz", **arrays), [IMAGE])
    assert caught.value.hint


def with_member(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content)


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zip at all",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 1000,
        header("(1000000, 1000000)"),
        header("(1, 3, 1, -8)"),
        header("(__import__('os').abort(),)"),
        b"PK\x03\x04 cut",
    ],
)
def test_hostile_files(tmp_path: Path, content: bytes) -> None:
    plain, packed = tmp_path / "d.npy", tmp_path / "d.npz"
    plain.write_bytes(content)
    with_member(packed, content)
    for path in (plain, packed):
        with pytest.raises(NormDoctorError):
            load_data(path, [IMAGE])


def test_more_promised_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    with_member(path, header("(5000000000,)") + bytes(1 << 16))
    with pytest.raises(InputError, match="cannot be read"):
        load_data(path, [IMAGE])
