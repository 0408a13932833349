"""Means, variances and largest weights of convolutions and products, read in runs: against plain definitions."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx import helper as h

from normdoctor.errors import InputError
from normdoctor.flow.affine import Blocked
from normdoctor.flow.constants import Constants
from normdoctor.flow.graph import Node, Op, Value
from normdoctor.flow.reading import MAX_CHANNELS, MAX_COMPUTED, MAX_WHOLE, Reach, reach_of
from normdoctor.layers import ArrayRef, load, rows
from normdoctor.readers.arrays import FileStorage, Source, StoredArray, encode
from normdoctor.readers.aten import Literal
from normdoctor.readers.live_module import LiveArray
from normdoctor.readers.onnx_flow import open_flow
from tests.folding.pt2_tools import flow_of

Array = NDArray[np.float64]
Store = Callable[..., StoredArray]

TOLERANCES = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-5, "bfloat16": 2e-5}
"""Relative to the sum of the absolute products: the weights themselves are read exactly."""


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """Arrays in a file."""
    open_files: list[Source] = []

    def store_(values: Any, dtype: str = "float32", name: str = "w", **view: Any) -> StoredArray:
        path = tmp_path / f"{name}{len(open_files)}"
        path.write_bytes(encode(np.asarray(values), dtype, view.get("big_endian", False)))
        open_files.append(Source(path))
        storage = FileStorage(name, open_files[-1], 0, open_files[-1].size)
        return StoredArray(storage, dtype, view.pop("shape", np.shape(values)), **view)

    yield store_
    for file in open_files:
        file.close()


def node_of(op: Op, ref: ArrayRef | Value, **attributes: Any) -> Node:
    weight = ref if isinstance(ref, Value) else Value("w", ref.shape, ref.dtype, ref)
    return Node(op, [Value("x"), weight, None], [Value("y")], attributes, op.name, "layer")


def reach(op: Op, ref: ArrayRef | Value, expectation: Any = None, spread: Any = None, **more: Any) -> Reach:
    limit = {"limit_bytes": more.pop("limit_bytes")} if "limit_bytes" in more else {}
    return reach_of(node_of(op, ref, **more), Constants(), expectation, spread, **limit)


def defined(op: Op, w: Array, given: Array, groups: int = 1, transpose_b: bool = False) -> tuple[Array, Array, Array]:
    """Sum of the products, sum of their absolute values, largest weight: weight by weight."""
    if op is Op.MATMUL:
        matrix = w if transpose_b else w.T
        return matrix @ given, abs(matrix) @ abs(given), abs(matrix).max(axis=1)
    outputs = w.shape[1] * groups if op is Op.CONV_TRANSPOSE else w.shape[0]
    inputs = w.shape[0] if op is Op.CONV_TRANSPOSE else w.shape[1] * groups
    taps = np.reshape(given, (inputs, -1)) * np.ones(math.prod(w.shape[2:]))
    sums, sizes, largest = np.zeros((3, outputs))
    for o in range(outputs):
        for i in range(inputs):
            if i // (inputs // groups) != o // (outputs // groups):
                continue
            place = (i, o % (outputs // groups)) if op is Op.CONV_TRANSPOSE else (o, i % (inputs // groups))
            sums[o] += w[place].ravel() @ taps[i]
            sizes[o] += abs(w[place].ravel()) @ abs(taps[i])
            largest[o] = max(largest[o], abs(w[place]).max())
    return sums, sizes, largest


def stored_as(values: Array, dtype: str) -> Array:
    return torch.tensor(values).to(getattr(torch, dtype)).double().numpy()


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Op, int, tuple[int, ...]]:
    op = draw(st.sampled_from([Op.CONV, Op.CONV_TRANSPOSE]))
    groups, first, second = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    return op, groups, (first * groups, second, *kernel)


@given(
    convolutions(),
    st.sampled_from(sorted(TOLERANCES)),
    st.integers(1, 2000),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_convolutions(
    tmp_path_factory: pytest.TempPathFactory,
    which: tuple[Op, int, tuple[int, ...]],
    dtype: str,
    limit: int,
    by_tap: bool,
    seed: int,
) -> None:
    op, groups, shape = which
    random = np.random.default_rng(seed)
    weight = random.normal(size=shape)
    path = tmp_path_factory.getbasetemp() / "convolution"
    path.write_bytes(encode(weight, dtype))
    inputs = shape[0] if op is Op.CONV_TRANSPOSE else shape[1] * groups
    of = (inputs, *shape[2:]) if by_tap else (inputs,)
    expectation, spread = random.normal(size=of), random.uniform(size=of)
    with Source(path) as source:
        ref = StoredArray(FileStorage("w", source, 0, source.size), dtype, shape)
        found = reach(op, ref, expectation, spread, groups=groups, limit_bytes=limit)
        only = reach(op, ref, groups=groups, limit_bytes=limit)
    held = stored_as(weight, dtype)
    sums, sizes, largest = defined(op, held, expectation, groups)
    assert found.means is not None and found.variances is not None
    assert (abs(found.means - sums) <= TOLERANCES[dtype] * sizes).all()
    np.testing.assert_array_equal(found.largest, largest)
    sums, sizes, _ = defined(op, held**2, spread, groups)
    assert (abs(found.variances - sums) <= TOLERANCES[dtype] * sizes).all()
    assert only.means is None and only.variances is None
    np.testing.assert_array_equal(only.largest, largest)


LIMITS = [1, 40, 100, 1 << 20]
"""Bytes of a run: a row, some rows with a rest, all."""


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("transpose_b", [False, True])
def test_products(limit: int, transpose_b: bool, store: Store) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(7, 5)).astype(np.float32)
    expectation = random.normal(size=5 if transpose_b else 7)
    found = reach(Op.MATMUL, store(weight), expectation, transpose_b=transpose_b, alpha=-2.0, limit_bytes=limit)
    sums, _, largest = defined(Op.MATMUL, weight.astype(float), expectation, transpose_b=transpose_b)
    np.testing.assert_allclose(found.means, -2 * sums, rtol=1e-5)
    np.testing.assert_array_equal(found.largest, 2 * largest)
    assert found.variances is None
    spread = reach(Op.MATMUL, store(weight), None, abs(expectation), transpose_b=transpose_b, alpha=-2.0)
    sums, _, _ = defined(Op.MATMUL, weight.astype(float) ** 2, abs(expectation), transpose_b=transpose_b)
    np.testing.assert_allclose(spread.variances, 4 * sums, rtol=1e-5)
    assert spread.means is None


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_images_of_one_colour(groups: int, transposed: bool, limit: int) -> None:
    """torch's own convolution of channels that are the same everywhere, where nothing is seen of a border."""
    torch.manual_seed(0)
    weight = torch.randn(6, 12 // groups, 3, 2)
    expectation = torch.randn(6 if transposed else 12)
    image = expectation[None, :, None, None].expand(1, -1, 9, 9)
    function = F.conv_transpose2d if transposed else F.conv2d
    if not transposed:
        expected = function(image, weight, groups=groups)[0, :, 0, 0]
    else:
        expected = function(image, weight, groups=groups)[0, :, 4, 4]
    op = Op.CONV_TRANSPOSE if transposed else Op.CONV
    found = reach(op, LiveArray(weight), expectation.numpy(), groups=groups, limit_bytes=limit)
    np.testing.assert_allclose(found.means, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", [Op.CONV, Op.CONV_TRANSPOSE])
def test_what_is_not_finite_stays_in_its_channel(op: Op, bad: float, limit: int, store: Store) -> None:
    weight = np.ones((4, 4, 3))
    weight[2, 1, 1] = bad
    found = reach(op, store(weight), np.full(4, -1.0), np.ones(4), limit_bytes=limit)
    hit = np.arange(4) == (2 if op is Op.CONV else 1)
    assert found.means is not None and found.variances is not None
    np.testing.assert_array_equal(np.isnan(found.means), hit)
    np.testing.assert_array_equal(np.isnan(found.variances), hit)
    assert (found.largest[~hit] == 1).all()
    np.testing.assert_array_equal(found.largest[hit], [abs(bad)])


# where the weights lie


@pytest.mark.parametrize("limit", LIMITS)
def test_views(limit: int, store: Store) -> None:
    """Of a file: from an offset, big-endian, channels last, and a transposed matrix that has no rows."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(5, 4, 3, 2)).astype(np.float32)
    last = weight.transpose(0, 2, 3, 1)
    refs = [
        store(np.concatenate([[1.0, 2.0], weight.ravel()]), shape=weight.shape, offset=2),
        store(weight, big_endian=True),
        store(last, shape=weight.shape, strides=(24, 1, 8, 4)),
    ]
    expectation = random.normal(size=(4, 3, 2))
    for ref in refs:
        assert ref.has_rows
        np.testing.assert_array_equal(np.concatenate([run for _, run in rows(ref, limit)]), weight)
        found = reach(Op.CONV, ref, expectation, limit_bytes=limit)
        np.testing.assert_allclose(found.means, np.tensordot(weight, expectation, 3), rtol=1e-4)
    turned = store(weight, shape=(24, 5), strides=(1, 24))
    assert not turned.has_rows
    found = reach(Op.MATMUL, turned, expectation.reshape(-1), limit_bytes=limit)
    np.testing.assert_allclose(found.means, weight.reshape(5, 24) @ expectation.reshape(-1), rtol=1e-4)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_rows_are_what_load_gives(dtype: str, limit: int, store: Store) -> None:
    values = np.random.default_rng(0).normal(size=(11, 3))
    tensor = torch.tensor(values).to(getattr(torch, dtype))
    for ref in (store(values, dtype), LiveArray(tensor), LiveArray(tensor.t().contiguous().t())):
        runs = list(rows(ref, limit))
        assert [start for start, _ in runs] == np.cumsum([0, *(len(run) for _, run in runs)])[:-1].tolist()
        np.testing.assert_array_equal(np.concatenate([run for _, run in runs]), load(ref))
        assert all(len(run) == 1 or 4 * run.size <= max(limit, 12) for _, run in runs)


def test_without_rows() -> None:
    """What cannot be cut comes whole: a number, nothing, what the code writes out."""
    scalar, empty = LiveArray(torch.tensor(3.0)), LiveArray(torch.zeros(0, 3))
    assert [(start, run.shape) for start, run in rows(scalar, 1)] == [(0, ())]
    assert sum(len(run) for _, run in rows(empty, 1)) == 0
    found = reach(Op.CONV, Literal(2.0, "float32", (3, 2, 1)), np.ones(2))
    assert found.means is not None and found.means.tolist() == [4.0] * 3


def test_behind_casts_and_transpositions(store: Store) -> None:
    """Nothing is held whole of a weight that is merely cast to more or turned; a rounding is computed."""
    values = np.random.default_rng(0).normal(size=(6, 4))
    half = Value("half", (6, 4), "float16", store(values, "float16"))
    wide, turned, rounded = Value("wide", (6, 4), "float32"), Value("t", (4, 6), "float32"), Value("r", (4, 6), "int64")
    for op, x, y, attributes in (
        (Op.CAST, half, wide, {}),
        (Op.TRANSPOSE, wide, turned, {"order": (1, 0)}),
        (Op.CAST, turned, rounded, {}),
    ):
        y.producer = Node(op, [x], [y], attributes)
    held = stored_as(values, "float16")

    class Unasked(Constants):
        def array(self, value: Value) -> NDArray[Any]:
            raise AssertionError("held whole")

    for transpose_b, expectation in ((False, np.arange(4.0)), (True, np.arange(6.0))):
        node = node_of(Op.MATMUL, turned, transpose_b=transpose_b)
        found = reach_of(node, Unasked(), expectation, limit_bytes=20)
        expected, _, largest = defined(Op.MATMUL, held.T, expectation, transpose_b=transpose_b)
        np.testing.assert_allclose(found.means, expected, rtol=1e-5)
        np.testing.assert_array_equal(found.largest, largest)
    found = reach(Op.MATMUL, rounded, np.arange(4.0))
    np.testing.assert_allclose(found.means, np.trunc(held.T).T @ np.arange(4.0))


def test_files(tmp_path: Path) -> None:
    """ONNX in raw bytes, outside, in typed numbers; .pt2: all from the graph of the file."""
    module = torch.nn.Conv2d(4, 6, 3)
    weight = module.weight.detach().numpy()
    expectation = np.random.default_rng(0).normal(size=(4, 3, 3))
    expected = np.tensordot(weight, expectation, 3)
    tensors = {
        "raw": numpy_helper.from_array(weight, "w"),
        "outside": numpy_helper.from_array(weight, "w"),
        "typed": h.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.ravel()),
        "half": h.make_tensor("w", TensorProto.FLOAT16, weight.shape, weight.ravel()),
    }
    for name, tensor in tensors.items():
        kind = TensorProto.FLOAT16 if name == "half" else TensorProto.FLOAT
        x, y = (h.make_tensor_value_info(label, kind, None) for label in "xy")
        graph = h.make_graph([h.make_node("Conv", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=8)
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path, save_as_external_data=name == "outside", location=f"{name}.data", size_threshold=0)
        with open_flow(path) as flow:
            (node,) = flow.graph.of(Op.CONV)
            found = reach_of(node, Constants(), expectation, limit_bytes=300)
        atol = 0.05 if name == "half" else 1e-5
        np.testing.assert_allclose(found.means, expected, rtol=0, atol=atol)
    torch.export.save(torch.export.export(module, (torch.randn(1, 4, 8, 8),)), tmp_path / "m.pt2")
    (node,) = flow_of(tmp_path / "m.pt2").graph.of(Op.CONV)
    ref = node.inputs[1].array if node.inputs[1] is not None else None
    assert isinstance(ref, StoredArray) and isinstance(ref.storage, FileStorage) and ref.has_rows
    with Source(tmp_path / "m.pt2") as source:
        again = StoredArray(FileStorage("w", source, ref.storage.offset, ref.storage.nbytes), ref.dtype, ref.shape)
        found = reach(Op.CONV, again, expectation, limit_bytes=300)
    np.testing.assert_allclose(found.means, expected, rtol=0, atol=1e-5)


# what is refused


def test_what_does_not_fit(store: Store) -> None:
    ref = store(np.ones((4, 2, 3)))
    conv = [
        ({}, np.ones(3), "wrong-axis"),
        ({}, np.ones((2, 2)), "wrong-axis"),
        ({"groups": 2}, np.ones(2), "wrong-axis"),
        ({"groups": 3}, None, "wrong-axis"),
        ({"groups": 0}, None, "wrong-axis"),
    ]
    for attributes, expectation, code in conv:
        with pytest.raises(Blocked) as caught:
            reach(Op.CONV, ref, expectation, **attributes)
        assert caught.value.code == code
    others = [
        (Op.MATMUL, ref, "wrong-axis"),
        (Op.MATMUL, Value("computed", (3, 3)), "computed-weight"),
        (Op.ADD, ref, "computed-weight"),
        (Op.CONV, store(np.ones((4, 2))), "wrong-axis"),
        (Op.CONV, LiveArray(torch.zeros(4, 0, 3)), "wrong-axis"),
        (Op.CONV, LiveArray(torch.zeros(4, 2, 3, dtype=torch.complex64)), "computed-weight"),
    ]
    for op, weight, code in others:
        with pytest.raises(Blocked) as caught:
            reach(op, weight)
        assert caught.value.code == code
    with pytest.raises(InputError):
        reach(Op.CONV, LiveArray(torch.zeros(4, 2, 3, device="meta")))


def test_a_file_cut_short(tmp_path: Path, store: Store) -> None:
    ref = store(np.ones((4, 2, 3)))
    assert isinstance(ref.storage, FileStorage)
    ref.storage.source.path.write_bytes(b"short")
    with pytest.raises(InputError):
        reach(Op.CONV, ref)


def test_what_is_too_much_to_hold() -> None:
    """Nothing is made of it: a number all over a shape, a single row, a constant computed whole, endless channels."""
    side = math.isqrt(MAX_WHOLE // 4) + 1
    spread = Literal(1.0, "float32", (side, side, 1))
    row = LiveArray(torch.zeros(1).expand(1, 1, MAX_WHOLE // 4 + 1))
    channels = LiveArray(torch.zeros(1).expand(MAX_CHANNELS + 1, 1, 1))
    whole = Value("w", (8, 1, MAX_COMPUTED // 8 + 1), "float32")
    whole.producer = Node(Op.FILL, [Value("shape", (3,), "int64", LiveArray(torch.tensor(whole.shape)))], [whole])
    tracemalloc.start()
    try:
        for weight in (spread, row, channels, whole):
            with pytest.raises(Blocked) as caught:
                reach(Op.CONV, weight)
            assert caught.value.code == "too-large"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", [Op.CONV, Op.CONV_TRANSPOSE, Op.MATMUL])
def test_memory(op: Op, dtype: str, tmp_path: Path) -> None:
    size = 4 if dtype == "float32" else 2
    shape = (1024, (64 << 20) // size // 1024) if op is Op.MATMUL else (1024, (64 << 20) // size // 9216, 3, 3)
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    with Source(path) as source:
        ref = StoredArray(FileStorage("w", source, 0, source.size), dtype, shape)
        inputs = shape[1] if op is Op.CONV else shape[0]
        tracemalloc.start()
        try:
            found = reach(op, ref, np.ones(inputs), np.ones(inputs))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert source.bytes_read == math.prod(shape) * size
    assert peak < 40 << 20, peak
    assert not found.largest.any()
