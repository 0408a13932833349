"""Every number is the one that torch.load gives, however it is stored."""

from __future__ import annotations

import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normdoctor.layers import ArrayRef, Checkpoint
from normdoctor.readers.arrays import ITEM_SIZES, decode, encode

Read = Callable[[Any], Checkpoint]
Save = Callable[..., Path]

WITH_STORAGE_CLASS = [torch.float16, torch.float32, torch.float64, torch.bfloat16]
WITH_STORAGE_CLASS += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
FNUZ = [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
TYPES = [*WITH_STORAGE_CLASS, *EIGHT_BITS, *FNUZ, torch.uint16, torch.uint32]


def array(checkpoint: Checkpoint, name: str) -> ArrayRef:
    return next(ref.array for ref in checkpoint.list_references() if ref.name == name)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    exact_in_float32 = tensor.dtype is torch.bfloat16 or "float8" in str(tensor.dtype)
    return (tensor.float() if exact_in_float32 else tensor).detach().numpy()


def same(ref: ArrayRef, tensor: torch.Tensor) -> None:
    assert ref.dtype == str(tensor.dtype).removeprefix("torch.")
    assert ref.shape == tuple(tensor.shape)
    assert ref.nbytes == tensor.numel() * tensor.element_size()
    np.testing.assert_array_equal(ref.numpy(), as_numpy(tensor))


def all_codes(dtype: torch.dtype) -> torch.Tensor:
    """Every value of an 8-bit type, 65,536 bit patterns of a wider one, NaN and infinities included."""
    if dtype is torch.bool:
        return torch.tensor([True, False, True])
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = np.random.default_rng(0).integers(0, 256, 65_536 * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(codes).view(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_in_a_zip(dtype: torch.dtype, save: Save, read: Read) -> None:
    same(array(read(save({"t": all_codes(dtype)})), "t"), all_codes(dtype))


@pytest.mark.parametrize("dtype", WITH_STORAGE_CLASS, ids=str)  # torch itself cannot load the others from here
def test_every_type_in_the_legacy_container(dtype: torch.dtype, save: Save, read: Read) -> None:
    same(array(read(save({"t": all_codes(dtype)}, legacy=True)), "t"), all_codes(dtype))


@pytest.mark.parametrize("dtype", [dtype for dtype in TYPES if dtype not in FNUZ], ids=str)
def test_every_type_of_safetensors(dtype: torch.dtype, tmp_path: Path, read: Read) -> None:
    safetensors.torch.save_file({"t": all_codes(dtype)}, tmp_path / "t.safetensors")
    same(array(read(tmp_path / "t.safetensors"), "t"), all_codes(dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_of_a_live_module(dtype: torch.dtype, read: Read) -> None:
    net = nn.LayerNorm(4)
    net.register_buffer("t", all_codes(dtype))
    same(array(read(net), "t"), all_codes(dtype))


SHARED = torch.arange(24.0).reshape(4, 6)
VIEWS = {
    "transposed": SHARED.t(),
    "sliced": SHARED[1:3, ::2],
    "column": SHARED[:, 2],
    "expanded": torch.tensor([3.0]).expand(5),
    "expanded rows": torch.arange(3.0).expand(4, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0),
    "empty rows": torch.empty(3, 0, 2),
    "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    "parameter": nn.Parameter(torch.arange(4.0), requires_grad=False),
    "buffer": nn.Buffer(torch.arange(4.0)),
    "offset": torch.arange(10)[7:],
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_view(legacy: bool, protocol: int, save: Save, read: Read) -> None:
    path = save(VIEWS, legacy=legacy, pickle_protocol=protocol)
    checkpoint, loaded = read(path), torch.load(path, weights_only=False)
    for name in VIEWS:
        same(array(checkpoint, name), loaded[name])


def test_tied_tensors_have_one_identity(save: Save, read: Read) -> None:
    base = torch.rand(12)
    checkpoint = read(save({"a": base[:6], "b": base[:6].clone(), "c": base[:6].detach(), "d": base[6:]}))
    same_as_a = [name for name in "abcd" if array(checkpoint, name).identity == array(checkpoint, "a").identity]
    assert same_as_a == ["a", "c"]


def test_complex_tensors_are_left_out(save: Save, read: Read) -> None:
    net = nn.BatchNorm1d(3)
    wave = torch.ones(3, dtype=torch.complex64)
    tensors = OrderedDict(net.state_dict())
    tensors |= {"wave": wave, "norm.weight": wave, "odd.running_var": wave, "n_averaged": wave[0]}
    assert [layer.name for layer in read(save(tensors)).layers] == [""]
    net.weight, net.num_batches_tracked = nn.Parameter(wave), wave[0]
    for target in (save(net), net):
        (layer,) = read(target).layers
        assert layer.weight is None and layer.num_batches_tracked is None and layer.channels == 3


def big_endian_copy(path: Path) -> Path:
    """A zip of float32 and int64 tensors as a big-endian machine writes it."""
    target = path.with_name("big.pt")
    items = {"0": "f4", "1": "i8", "2": "f2"}
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            key = name.rpartition("/data/")[2]
            if name.endswith("byteorder"):
                data = b"big"
            elif key in items:
                data = np.frombuffer(data, "<" + items[key]).astype(">" + items[key]).tobytes()
            archive.writestr(name, data)
    return target


def test_big_endian_zip(save: Save, read: Read) -> None:
    tensors = {"0": torch.arange(5.0), "1": torch.arange(3) * 1_000_003, "2": torch.arange(4.0).half()}
    path = big_endian_copy(save(tensors))
    checkpoint, loaded = read(path), torch.load(path)
    for name, tensor in tensors.items():
        same(array(checkpoint, name), tensor)
        assert torch.equal(loaded[name], tensor)


def test_legacy_files_are_little_endian_whatever_they_say(save: Save, read: Read) -> None:
    path = save({"t": torch.arange(5.0)}, legacy=True)
    raw = path.read_bytes()
    flag = raw.index(b"\x88", raw.index(b"little_endian"))
    path.write_bytes(raw[:flag] + b"\x89" + raw[flag + 1 :])
    same(array(read(path), "t"), torch.load(path)["t"])


def test_a_legacy_view_starts_inside_its_storage(wrap: Callable[..., Path], read: Read) -> None:
    """Before torch 0.4 a storage could be a view of another: ("storage", type, key, place, count, (view, 3, 2))."""
    pickled = (
        b"\x80\x02}X\x01\x00\x00\x00tctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x05X\x01\x00\x00\x00vK\x03K\x02\x87tQK\x00K\x02\x85K\x01\x85\x89}tRs."
    )
    path = wrap(pickled, {"0": (5, struct.pack("<5f", 0, 1, 2, 3, 4))})
    np.testing.assert_array_equal(array(read(path), "t").numpy(), [3.0, 4.0])


def test_scattered_over_a_large_storage(save: Save, read: Read) -> None:
    """A column of a matrix of 40 MB is gathered, not read whole."""
    matrix = torch.arange(10_000_000, dtype=torch.float32).reshape(100, 100_000)
    checkpoint = read(save({"column": matrix[:, 7]}))
    same(array(checkpoint, "column"), matrix[:, 7])
    assert checkpoint.count_bytes_read() < 100_000


def test_large_and_contiguous_is_read_at_once(save: Save, read: Read) -> None:
    tensor = torch.rand(300, 20_000)
    same(array(read(save({"t": tensor})), "t"), tensor)


WRITTEN = ["float16", "bfloat16", "float32", "float64", "int16", "int32", "int64"]


@pytest.mark.parametrize("dtype", WRITTEN)
@given(data=st.binary(min_size=8, max_size=64), big=st.booleans())
@settings(max_examples=30, deadline=None)
def test_encode_undoes_decode(dtype: str, data: bytes, big: bool) -> None:
    raw = data[: len(data) // 8 * 8]
    values = decode(raw, dtype, big)
    assert values.size * ITEM_SIZES[dtype] == len(raw)
    again = decode(encode(values, dtype, big), dtype, big)
    np.testing.assert_array_equal(again, values)


@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1))
@settings(max_examples=50, deadline=None)
def test_rounding_to_bfloat16_is_that_of_torch(values: list[float]) -> None:
    expected = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decode(encode(np.array(values), "bfloat16"), "bfloat16"), expected)
