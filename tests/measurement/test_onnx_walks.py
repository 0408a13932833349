"""ONNX models stopped in front of their norms: what is seen is what the definition says, whatever the graph."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx import helper as h
from torch import nn

from normdoctor.data import Batch
from normdoctor.errors import CannotRunError, MisfitError, RefusedError
from normdoctor.measurement.lockstep import as_stored, exact, one_pass
from normdoctor.measurement.onnx_stages import Cut, stages
from normdoctor.measurement.onnx_values import Affine, active, seen
from normdoctor.measurement.onnx_walks import OnnxWalker
from normdoctor.measurement.walks import Look
from normdoctor.measurement.with_onnx import open_onnx
from normdoctor.models.with_onnx import OnnxModel
from normdoctor.moments import Moments

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's exporters

TOLERANCE = 1e-5
"""Between what float32 gives and the definition, in standard deviations and in |log variance ratio|."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 2, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.down, self.bnd = nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16)
        self.fc, self.head = nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + self.bnd(self.down(x)))
        return self.head(self.fc(x.mean((2, 3))))


def plain(rank: int) -> nn.Module:
    """A stack with a dense, a depthwise, a pointwise and a grouped convolution."""
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    norm: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
    return nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8), nn.ReLU(),
        conv(8, 8, 3, padding=1, groups=8), norm(8), nn.ReLU6(),
        conv(8, 12, 1), norm(12), nn.Hardswish(),
        conv(12, 12, 3, groups=4), norm(12), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


def export(net: nn.Module, shape: Sequence[int], path: Path, dynamo: bool = False) -> Path:
    """The net in eval mode, its buffers reset, its gains and shifts random: equal buffers share an initializer."""
    net.eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.zeros(2, *shape)
    net(x)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.weight.data = 0.5 + torch.rand(module.weight.shape, generator=generator)
            module.bias.data = 0.3 * torch.randn(module.bias.shape, generator=generator)
    if dynamo:
        batch = torch.export.Dim("batch")
        torch.onnx.export(
            net, (x,), path, dynamo=True, dynamic_shapes=({0: batch},), optimize=False, verbose=False,
            external_data=False,
        )  # fmt: skip
    else:
        torch.onnx.export(
            net, (x,), path, dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
            input_names=["x"], dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
    return path


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return (2 * np.random.default_rng(seed).normal(size=shape) + 1).astype(np.float32)


def batches(data: np.ndarray, size: int) -> list[Batch]:
    parts = [data[begin : begin + size] for begin in range(0, len(data), size)]
    return [Batch((part,), {}, len(part), index) for index, part in enumerate(parts)]


def definition(path: Path, inputs: dict[str, np.ndarray], folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of the inputs of every norm in float64, in the order of the nodes, one norm at a time: each
    over all data, with all norms before it using their own."""
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    for node in nodes:
        if node.input[0] not in {value.name for value in model.graph.output}:
            model.graph.output.append(onnx.ValueInfoProto(name=node.input[0]))
    found = []
    for index, node in enumerate(nodes):
        copy = folder / f"one-{index}.onnx"
        onnx.save(model, copy)
        x = OnnxModel(copy).in_float64().run(inputs)[node.input[0]]
        channels = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
        found.append((channels.mean(axis=1), channels.var(axis=1)))
        for place, values in zip((3, 4), found[-1], strict=True):
            tensor = numpy_helper.from_array(values, f"new {index} {place}")
            model.graph.initializer.append(tensor)
            node.input[place] = tensor.name
    return found


def distance(moments: Sequence[Moments], wanted: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """The largest mean shift in standard deviations or |log variance ratio|."""
    pairs = list(zip(moments, wanted, strict=True))
    shifts = [np.abs(one.mean - mean) / np.sqrt(var) for one, (mean, var) in pairs]
    ratios = [np.abs(np.log(one.variance() / var)) for one, (mean, var) in pairs]
    return float(max(map(np.max, shifts + ratios)))


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[OnnxWalker]:
    with closing(open_onnx(path, **options)) as walker:
        yield walker


def stops(walker: OnnxWalker, batch: Batch, look: Look | None = None) -> list[Any]:
    with closing(walker.start(batch, look or Look())) as walk:
        return list(iter(walk.advance, None))


def totals(tallies: Any) -> list[Moments]:
    return [tally.total() for tally in tallies.of.values()]


# nets of torch's exporters


NETS: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "residual": (Residual, (3, 12, 12), False),
    "residual, dynamo": (Residual, (3, 12, 12), True),
    "1d": (lambda: plain(1), (3, 20), False),
    "2d": (lambda: plain(2), (3, 9, 9), False),
    "3d": (lambda: plain(3), (3, 6, 6, 6), False),
}


@pytest.mark.filterwarnings("ignore")  # of torch's exporters
@pytest.mark.parametrize("net", NETS)
def test_exact_is_the_definition_at_any_batch_size(tmp_path: Path, net: str) -> None:
    torch.manual_seed(0)
    make, shape, dynamo = NETS[net]
    path = export(make(), shape, tmp_path / "net.onnx", dynamo)
    data = numbers(15, *shape)
    with opened(path) as walker:
        assert not walker.left and walker.engine.startswith("onnxruntime")
        wanted = definition(path, {walker.wanted[0].name: data}, tmp_path)
        assert min(abs(mean).max() for mean, _ in wanted) > 0.01  # it matters what comes before
        for size in (1, 7, 15):
            tallies = exact(walker, batches(data, size))
            assert list(tallies.of) == list(walker.norms)
            assert distance(totals(tallies), wanted) < TOLERANCE
            walker.restore()


@pytest.mark.filterwarnings("ignore")
def test_walks_compute_what_the_whole_model_does(tmp_path: Path) -> None:
    path = export(Residual(), (3, 12, 12), tmp_path / "net.onnx")
    data = numbers(4, 3, 12, 12)
    with opened(path) as walker:
        seen_outputs: list[dict[str, Any]] = []
        tallies = as_stored(walker, batches(data, 4), Look(), outputs=lambda _, out: seen_outputs.append(out))
        expected = OnnxModel(path).run({"x": data})
        assert seen_outputs[0].keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(seen_outputs[0][name], values)
        # Other statistics change what comes behind them, and only that; `restore` puts all back.
        walker.put("bn1", np.full(16, 5.0), np.full(16, 0.1))
        changed = [stop.seen.moments.mean for stop in stops(walker, batches(data, 4)[0])]
        before = [one.mean for one in totals(tallies)]
        same = [bool((a == b).all()) for a, b in zip(changed, before, strict=True)]
        assert dict(zip(walker.norms, same, strict=True)) == {
            "bn0": True, "bn1": True, "bn2": False, "bnd": True, "head": False,
        }  # fmt: skip
        walker.restore()
        again = [stop.seen.moments.mean for stop in stops(walker, batches(data, 4)[0])]
        assert all((a == b).all() for a, b in zip(again, before, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_one_pass_is_training_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Residual()
    path = export(net, (3, 12, 12), tmp_path / "net.onnx")
    data = numbers(16, 3, 12, 12)
    with opened(path) as walker:
        found = one_pass(walker, batches(data, 8))
    seen_there: dict[str, list[torch.Tensor]] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda _, x, name=name: seen_there.setdefault(name, []).append(x[0]))
    net.train()
    with torch.no_grad():
        for batch in batches(data, 8):
            net(torch.from_numpy(batch.args[0]))
    for name, tally in found.of.items():
        wanted = Moments.of(torch.cat(seen_there[name]).numpy())
        assert distance([tally.total()], [(wanted.mean, wanted.variance())]) < TOLERANCE


# graphs made by hand


CHANNELS = 4
LEAVES = ("weight", "bias", "running_mean", "running_var")


def tensor(name: str, values: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values).astype(dtype), name)


def tensors(prefix: str, dtype: Any = np.float32, seed: int = 0) -> list[TensorProto]:
    generator = np.random.default_rng(seed)
    return [tensor(f"{prefix}.{leaf}", generator.uniform(0.5, 1.5, CHANNELS), dtype) for leaf in LEAVES]


def norm(prefix: str, x: str, y: str, **attributes: Any) -> Any:
    inputs = [x, *(f"{prefix}.{leaf}" for leaf in LEAVES)]
    return h.make_node("BatchNormalization", inputs, [y], name=prefix, **attributes)


def value(name: str, shape: Any = ("n", CHANNELS, 3), kind: int = TensorProto.FLOAT) -> Any:
    return h.make_tensor_value_info(name, kind, shape)


def save(
    folder: Path,
    nodes: list[Any],
    stored: list[TensorProto],
    *,
    opset: int = 17,
    ir_version: int = 8,
    inputs: list[Any] | None = None,
    outputs: list[Any] | None = None,
    functions: list[Any] = (),  # type: ignore[assignment]
) -> Path:
    graph = h.make_graph(nodes, "g", inputs or [value("x")], outputs or [value("y")], stored)
    opsets = [h.make_opsetid("", opset), *([h.make_opsetid("local", 1)] if functions else [])]
    made = h.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))
    onnx.checker.check_model(made)
    path = folder / "model.onnx"
    onnx.save(made, path)
    return path


def chain(folder: Path, dtype: Any = np.float32, kind: int = TensorProto.FLOAT, **options: Any) -> Path:
    nodes = [norm("a", "x", "h"), h.make_node("Relu", ["h"], ["r"]), norm("b", "r", "y")]
    ends = {"inputs": [value("x", kind=kind)], "outputs": [value("y", kind=kind)]}
    return save(folder, nodes, tensors("a", dtype) + tensors("b", dtype, 1), **ends, **options)


X = numbers(6, CHANNELS, 3)


@pytest.mark.parametrize("opset", [7, 9, 14, 15, 22])
def test_opsets(tmp_path: Path, opset: int) -> None:
    path = chain(tmp_path, opset=opset, ir_version=8 if opset < 22 else 10)
    with opened(path) as walker:
        assert walker.norms == {"a": CHANNELS, "b": CHANNELS} and walker.engine.startswith("onnxruntime")
        moments = totals(exact(walker, batches(X, 4)))
    assert distance(moments, definition(path, {"x": X}, tmp_path)) < TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"),
    [
        (np.float64, TensorProto.DOUBLE, 1e-12),
        (np.float16, TensorProto.FLOAT16, 1e-2),
        ("bfloat16", TensorProto.BFLOAT16, 5e-2),
    ],
)
def test_types(tmp_path: Path, dtype: Any, kind: int, tolerance: float) -> None:
    """float32 arrays are given in all cases; bfloat16 goes to the reference evaluator."""
    own = np.dtype(h.tensor_dtype_to_np_dtype(kind))
    path = chain(tmp_path, own, kind)
    with opened(path) as walker:
        assert ("reference" in walker.engine) == (dtype == "bfloat16")
        moments = totals(exact(walker, batches(X, 4)))
        wanted = definition(path, {"x": X.astype(own).astype(np.float32)}, tmp_path)
        assert distance(moments, wanted) < tolerance
        # What is put is rounded to the type of the statistics, and refused where that cannot hold it.
        if dtype == np.float16:
            with pytest.raises(RefusedError, match=r"b\.running_var: float16 cannot hold 1e\+05"):
                walker.put("b", np.zeros(CHANNELS), np.full(CHANNELS, 1e5))


def test_broken_statistics_are_replaced(tmp_path: Path) -> None:
    stored = tensors("a") + tensors("b", seed=1)
    stored[2] = tensor("a.running_mean", [np.nan, 1, 2, np.inf])
    stored[3] = tensor("a.running_var", [1, -5, np.nan, np.inf])
    path = save(tmp_path, [norm("a", "x", "h"), norm("b", "h", "y")], stored)
    with opened(path) as walker:
        moments = totals(exact(walker, batches(X, 4)))
        assert distance(moments, definition(path, {"x": X}, tmp_path)) < TOLERANCE
        walker.restore()
        assert np.isnan(stops(walker, batches(X, 6)[0])[1].seen.moments.mean).any()


def test_values_that_live_on_are_kept_and_no_others(tmp_path: Path) -> None:
    """x is needed at the end, h once, r never again; an output of the middle is given too."""
    nodes = [
        norm("a", "x", "h"), h.make_node("Exp", ["h"], ["r"]), norm("b", "r", "s"),
        h.make_node("Shape", ["x"], ["lengths"]), h.make_node("Reshape", ["s", "lengths"], ["t"]),
        h.make_node("Add", ["t", "x"], ["y"]),
    ]  # fmt: skip
    path = save(tmp_path, nodes, tensors("a") + tensors("b", seed=1), outputs=[value("y"), value("r")])
    graph = onnx.load(path).graph
    first, second, last = stages(graph, [Cut(0, "a"), Cut(2, "b")], ["x"])
    assert first.keeps == {"x", "lengths"} and first.gives == ("lengths",)
    assert second.keeps == {"x", "lengths", "r"} and second.takes == ("x",)
    assert set(last.takes) == {"r", "x", "lengths"} and last.gives == ("y",)
    with opened(path) as walker, closing(walker.start(batches(X, 6)[0], Look())) as walk:
        while walk.advance() is not None:
            pass
        expected = OnnxModel(path).run({"x": X})
        assert list(walk.outputs) == ["y", "r"]
        for name, values in expected.items():
            np.testing.assert_array_equal(walk.outputs[name], values)


def test_norms_that_are_not_stopped_at_are_named(tmp_path: Path) -> None:
    inner = h.make_graph([norm("inner", "h", "out")], "then", [], [value("out")], tensors("inner"))
    other = h.make_graph([h.make_node("Relu", ["h"], ["out"])], "else", [], [value("out")])
    nodes = [
        norm("a", "x", "h"), norm("trains", "h", "t", training_mode=1),
        h.make_node("If", ["c"], ["i"], then_branch=inner, else_branch=other),
        h.make_node("Add", ["t", "i"], ["s"]), norm("given", "s", "g"), norm("last", "g", "y"),
    ]  # fmt: skip
    nodes[1].output.extend(["new mean", "new var"])
    stored = [t for p in ("a", "trains", "given", "last") for t in tensors(p) if t.name != "given.running_var"]
    inputs = [value("x"), value("c", [], TensorProto.BOOL), value("given.running_var", [CHANNELS])]
    path = save(tmp_path, nodes, stored, inputs=inputs)
    arguments = {"c": np.array(True), "given.running_var": np.ones(CHANNELS, np.float32)}
    with opened(path) as walker:
        assert list(walker.norms) == ["a", "last"]
        assert {name: why.split()[0] for name, why in walker.left.items()} == {
            "trains": "normalises", "inner": "stands", "given": "takes",
        }  # fmt: skip
        outputs: dict[str, Any] = {}
        batch = Batch((X,), arguments, len(X), 0)
        found = as_stored(walker, [batch], Look(), outputs=lambda _, out: outputs.update(out))
        assert list(found.of) == ["a", "last"]
        np.testing.assert_array_equal(outputs["y"], OnnxModel(path).run({"x": X, **arguments})["y"])
    with opened(path, layers={"last"}) as walker:
        assert list(walker.norms) == ["last"] and not walker.left


def test_norms_in_local_functions(tmp_path: Path) -> None:
    inside = norm("inside", "a", "out")
    inside.input[1:] = ["w", "b", "m", "v"]
    block = h.make_function(
        "local", "Block", ["a", "w", "b", "m", "v"], ["y"],
        [inside, h.make_node("Relu", ["out"], ["y"])], [h.make_opsetid("", 17)],
    )  # fmt: skip
    calls = [
        h.make_node("Block", [x, *(f"{name}.{leaf}" for leaf in LEAVES)], [y], name=f"call {name}", domain="local")
        for name, x, y in (("a", "x", "h"), ("b", "h", "y"))
    ]
    path = save(tmp_path, calls, tensors("a") + tensors("b", seed=1), functions=[block])
    with opened(path) as walker:
        assert list(walker.norms) == ["a", "b"] and not walker.left  # as `inspect` names them
        moments = totals(exact(walker, batches(X, 4)))
    flat = chain(tmp_path)
    onnx.save(onnx.load(flat), tmp_path / "flat.onnx")
    assert distance(moments, definition(flat, {"x": X}, tmp_path)) < TOLERANCE


def test_a_norm_that_is_called_twice(tmp_path: Path) -> None:
    nodes = [norm("a", "x", "h"), h.make_node("Exp", ["h"], ["r"]), norm("a", "r", "y")]
    path = save(tmp_path, nodes, tensors("a"))
    with opened(path) as walker:
        assert walker.norms == {"a": CHANNELS}
        assert [stop.norm for stop in stops(walker, batches(X, 6)[0])] == ["a", "a"]
        with pytest.raises(RefusedError, match="called several times"):
            exact(walker, batches(X, 4))
        pooled = one_pass(walker, batches(X, 6)).of["a"].measured()
    assert pooled.calls == 2 and pooled.moments.count == 2 * 6 * 3


def test_layers_that_share_their_statistics_are_two_norms(tmp_path: Path) -> None:
    nodes = [h.make_node("Identity", [f"a.{leaf}"], [f"b.{leaf}"]) for leaf in LEAVES]
    nodes += [norm("a", "x", "h"), h.make_node("Exp", ["h"], ["r"]), norm("b", "r", "y")]
    path = save(tmp_path, nodes, tensors("a"))
    with opened(path) as walker:
        moments = totals(exact(walker, batches(X, 4)))
        assert list(walker.norms) == ["a", "b"]
    assert distance(moments, definition(path, {"x": X}, tmp_path)) < TOLERANCE


def test_lists_of_tensors_do_not_outlive_a_norm(tmp_path: Path) -> None:
    """What takes them stands where they are made."""
    nodes = [
        h.make_node("SplitToSequence", ["x"], ["parts"], axis=2),
        h.make_node("SequenceAt", ["parts", "zero"], ["first"]), norm("a", "first", "h"),
        h.make_node("SequenceAt", ["parts", "one"], ["second"]), h.make_node("Add", ["h", "second"], ["s"]),
        norm("b", "s", "y"),
    ]  # fmt: skip
    stored = [*tensors("a"), *tensors("b", seed=1), tensor("zero", 0, np.int64), tensor("one", 1, np.int64)]
    path = save(tmp_path, nodes, stored, outputs=[value("y", ("n", CHANNELS, 1))])
    with opened(path) as walker:
        assert walker.engine.startswith("onnxruntime")
        outputs: dict[str, Any] = {}
        as_stored(walker, batches(X, 6), Look(), outputs=lambda _, out: outputs.update(out))
        np.testing.assert_array_equal(outputs["y"], OnnxModel(path).run({"x": X})["y"])
    nodes[3].input[1] = "place"
    nodes.insert(3, h.make_node("Cast", ["sum"], ["place"], to=TensorProto.INT64))
    nodes.insert(3, h.make_node("ReduceSum", ["h"], ["sum"], keepdims=0))
    path = save(tmp_path, nodes, stored, outputs=[value("y", ("n", CHANNELS, 1))])
    with pytest.raises(CannotRunError, match="parts is a list of tensors that lives on past a norm"):
        open_onnx(path)


def test_constants_and_random_numbers(tmp_path: Path) -> None:
    """What is the same in every run each piece computes for itself; what is random is drawn once."""
    nodes = [
        h.make_node("Exp", ["stored"], ["fixed"]), h.make_node("Add", ["x", "fixed"], ["p"]), norm("a", "p", "h"),
        h.make_node("RandomNormalLike", ["x"], ["noise"]), h.make_node("Add", ["p", "noise"], ["q"]),
        norm("b", "q", "s"), h.make_node("Sub", ["q", "noise"], ["d"]), h.make_node("Add", ["d", "fixed"], ["y"]),
        h.make_node("Identity", ["s"], ["z"]),
    ]  # fmt: skip
    stored = [*tensors("a"), *tensors("b", seed=1), tensor("stored", numbers(CHANNELS, 3))]
    path = save(tmp_path, nodes, stored, outputs=[value("y"), value("z")])
    with opened(path) as walker:
        outputs: dict[str, Any] = {}
        found = as_stored(walker, batches(X, 6), Look(), outputs=lambda _, out: outputs.update(out))
        assert list(found.of) == ["a", "b"]
    fixed = np.exp(numbers(CHANNELS, 3))
    np.testing.assert_allclose(outputs["y"], X + 2 * fixed, rtol=1e-4, atol=1e-4)


def test_a_norm_that_nobody_needs_is_measured_too(tmp_path: Path) -> None:
    nodes = [norm("dead", "x", "unused"), h.make_node("Exp", ["x"], ["r"]), norm("a", "r", "y")]
    with opened(save(tmp_path, nodes, tensors("dead") + tensors("a"))) as walker:
        assert [stop.norm for stop in stops(walker, batches(X, 6)[0])] == ["dead", "a"]


# what is seen


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ((300, 6), np.float32, 1e-6),
        ((40, 6, 2, 2), np.float32, 1e-6),
        ((9, 6, 7, 7), np.float32, 1e-6),
        ((3, 6, 40, 41), np.float32, 1e-6),
        ((2, 3, 30011), np.float32, 5e-6),
        ((9, 6, 7, 7), np.float64, 1e-9),
        ((9, 6, 7, 7), np.float16, 1e-6),
    ],
)
def test_moments_are_right_far_from_zero(shape: tuple[int, ...], dtype: Any, tolerance: float, offset: float) -> None:
    generator = np.random.default_rng(5)
    x = generator.normal(size=shape) + offset
    x[:, 0] *= 1e-3  # a channel that is off where the others are not
    x[:, 0] += 1
    x[0] += 3
    x = x.astype(dtype)
    found, means = seen(x)
    wide = x.astype(np.float64)
    wanted = np.moveaxis(wide, 1, 0).reshape(shape[1], -1)
    assert found.count == wanted.shape[1]
    assert distance([found], [(wanted.mean(axis=1), wanted.var(axis=1))]) < tolerance
    of_rows = wide.reshape(*shape[:2], -1).mean(axis=2)
    assert (np.abs(means - of_rows) / np.sqrt(wanted.var(axis=1))).max() < tolerance


def test_moments_out_of_the_range_of_float32() -> None:
    found, _ = seen(np.array([[[1e30, -1e30]], [[3e30, 1e30]]], np.float32))
    assert found.m2[0] == pytest.approx(8e60, rel=1e-6)
    assert np.isnan(seen(np.array([[[1.0, np.nan]]], np.float32))[0].mean).all()


def test_share_above_zero() -> None:
    x = numbers(50, 6, 8)
    affine = Affine(np.array([1.0, -2.0, 0.0, 0.0, 1e-3, 1.0]), np.array([0.3, 0.4, 1.0, -1.0, 0.0, 0.1]), 1e-5)
    mean, var = np.linspace(-1, 1, 6), np.array([1.0, 2.0, 0.0, 1.0, 3.0, -1.0])
    with np.errstate(invalid="ignore"):
        scale = (affine.gain / np.sqrt(var + affine.eps))[:, None]
        behind = (x - mean[:, None]) * scale + affine.shift[:, None]
    expected = (behind > 0).mean(axis=(0, 2))
    expected[5] = np.nan
    np.testing.assert_allclose(active(x, mean, var, affine), expected, atol=1e-12)


def test_what_is_looked_at(tmp_path: Path) -> None:
    path = chain(tmp_path)
    with opened(path) as walker:
        batch = batches(X, 6)[0]
        plain_stop = stops(walker, batch)[0].seen
        assert plain_stop.sample_means is None and plain_stop.active is None
        first, second = stops(walker, batch, Look(samples=True, active=True))
        np.testing.assert_allclose(first.seen.sample_means, X.mean(axis=2), rtol=1e-6)
        model = onnx.load(path)
        model.graph.output.append(onnx.ValueInfoProto(name="h"))
        onnx.save(model, tmp_path / "h.onnx")
        behind = OnnxModel(tmp_path / "h.onnx").run({"x": X})["h"]
        np.testing.assert_allclose(first.seen.active, (behind > 0).mean(axis=(0, 2)))
        # Two rows for each sample, as where time was moved into the batch.
        halves = next(iter(stops(walker, Batch((X,), {}, 3, 0), Look(samples=True)))).seen.sample_means
        np.testing.assert_allclose(halves, X.reshape(3, 2, CHANNELS, 3).mean(axis=(1, 3)), rtol=1e-6)
        assert next(iter(stops(walker, Batch((X,), {}, 4, 0), Look(samples=True)))).seen.sample_means is None
        assert second.norm == "b"


# inputs, memory, ends


def test_inputs_by_place_and_by_name(tmp_path: Path) -> None:
    nodes = [h.make_node("Add", ["x", "z"], ["s"]), norm("a", "s", "y")]
    inputs = [value("x", (6, CHANNELS, 3)), value("z", (6, CHANNELS, 3))]
    with opened(save(tmp_path, nodes, tensors("a"), inputs=inputs)) as walker:
        assert walker.fixed_batch == 6
        given = stops(walker, Batch((torch.from_numpy(X),), {"z": X.astype(np.float64)}, 6, 0))
        np.testing.assert_allclose(given[0].seen.moments.mean, 2 * X.mean(axis=(0, 2)), rtol=1e-6)
        for batch, message in (
            (Batch((X,), {}, 6, 0), "nothing for input z"),
            (Batch((X, X, X), {}, 6, 0), "has no input input_2"),
            (Batch((X, X[:3]), {}, 6, 0), r"z is 3 x 4 x 3, the model takes z \(6 x 4 x 3, float32\)"),
            (Batch((X.astype(np.complex64), X), {}, 6, 0), "x is complex64"),
        ):
            with pytest.raises(MisfitError, match=message):
                walker.start(batch, Look())
    with opened(chain(tmp_path)) as walker:
        assert walker.fixed_batch is None


def test_walks_wait_on_disk_beyond_the_memory(tmp_path: Path) -> None:
    path = chain(tmp_path)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with opened(path) as walker:
        wanted = totals(exact(walker, batches(X, 2)))
        each = walker.live_bytes(batches(X, 2)[0])
        assert each == 2 * CHANNELS * 3 * 4  # one value at a time
    with opened(path, spill=shelf, memory=each) as walker:
        walks = [walker.start(batch, Look()) for batch in batches(X, 2)]
        assert len(list(shelf.iterdir())) == 2  # one of three fits
        walks[0].advance()
        walks[0].close()
        walks[1].close()
        assert len(list(shelf.iterdir())) == 1
        walker.close()
        assert not list(shelf.iterdir())
    with opened(path, spill=shelf, memory=each) as walker:
        found = totals(exact(walker, batches(X, 2)))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.mean, other.mean)
        np.testing.assert_array_equal(one.m2, other.m2)
    assert not list(shelf.iterdir())


def test_a_walk_that_is_closed_and_a_walker_that_is(tmp_path: Path) -> None:
    walker = open_onnx(chain(tmp_path))
    walk = walker.start(batches(X, 6)[0], Look())
    assert walk.advance() is not None
    walk.close()
    walk.close()
    assert walk.advance() is None and walk.outputs == {}
    walker.close()
    with pytest.raises(CannotRunError, match="is closed"):
        walker.start(batches(X, 6)[0], Look())


def test_data_that_the_graph_does_not_take(tmp_path: Path) -> None:
    nodes = [norm("a", "x", "h"), h.make_node("Reshape", ["h", "six"], ["r"]), norm("b", "r", "y")]
    stored = [*tensors("a"), *tensors("b"), tensor("six", [6, CHANNELS, 3], np.int64)]
    with opened(save(tmp_path, nodes, stored)) as walker:
        with closing(walker.start(batches(X, 5)[0], Look())) as walk:
            assert walk.advance() is not None
            with pytest.raises(MisfitError, match=r"onnxruntime: .*Reshape"):
                walk.advance()
        with pytest.raises(MisfitError, match="x is 6 x 3 x 3, the model takes x"):
            walker.start(batches(X[:, :3], 6)[0], Look())


def test_an_operator_without_a_kernel(tmp_path: Path) -> None:
    nodes = [norm("a", "x", "h"), h.make_node("Unheard", ["h"], ["y"], domain="other")]
    graph = h.make_graph(nodes, "g", [value("x")], [value("y")], tensors("a"))
    opsets = [h.make_opsetid("", 17), h.make_opsetid("other", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(h.make_model(graph, opset_imports=opsets, ir_version=8), path)
    with pytest.raises(CannotRunError, match="Unheard"):
        open_onnx(path)


# published models


@pytest.mark.corpus
def test_a_published_model(tmp_path: Path) -> None:
    folder = os.environ.get("NORMDOCTOR_CORPUS")
    found = sorted(Path(folder).rglob("ch_ppocr_mobile_v2.0_cls_infer.onnx")) if folder else []
    if not found:
        pytest.skip("ch_ppocr_mobile_v2.0_cls_infer.onnx has not been fetched (NORMDOCTOR_CORPUS)")
    data = numbers(4, 3, 48, 96) / 3
    with opened(found[0]) as walker:
        assert len(walker.norms) == 35 and not walker.left
        outputs: dict[str, Any] = {}
        as_stored(walker, batches(data, 4), Look(), outputs=lambda _, out: outputs.update(out))
        for name, values in OnnxModel(found[0]).run({"x": data}).items():
            np.testing.assert_array_equal(outputs[name], values)
        tallies = exact(walker, batches(data, 3))
    moments = totals(tallies)[:6]
    wanted = first_norms(found[0], data, tmp_path, 6)
    assert distance(moments, wanted) < TOLERANCE


def first_norms(path: Path, data: np.ndarray, folder: Path, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The definition for the first norms alone: all 35 take a minute."""
    model = onnx.load(path)
    norms = [place for place, node in enumerate(model.graph.node) if node.op_type == "BatchNormalization"]
    del model.graph.node[norms[count - 1] + 1 :]
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=model.graph.node[-1].output[0]))
    onnx.save(model, folder / "head.onnx")
    return definition(folder / "head.onnx", {"x": data}, folder)
