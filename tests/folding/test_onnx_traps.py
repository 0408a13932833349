"""ONNX to ONNX: every trap that another folder fell into, run beside the original with graph optimisation off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx import helper as h

from normdoctor.flow.plan import FoldPlan, plan_folds
from normdoctor.folding.onnx_writing import write_folded
from normdoctor.models.with_onnx import OnnxModel
from normdoctor.readers.onnx_flow import open_flow

FLOAT, HALF, DOUBLE, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16
RNG = np.random.default_rng(7)


def tensor(name: str, *shape: int, low: float = -1.0, high: float = 1.0, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(RNG.uniform(low, high, shape)).astype(dtype), name)


def norm(
    x: str, y: str, channels: int = 6, name: str = "", dtype: Any = np.float32, **more: Any
) -> tuple[Any, list[Any]]:
    """A BatchNormalization whose parameters are named after it."""
    name = name or f"{y}_bn"
    names = [f"{name}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
    limits = [(0.5, 2.0), (-1, 1), (-1, 1), (0.5, 2.0)]
    made = [tensor(n, channels, low=a, high=b, dtype=dtype) for n, (a, b) in zip(names, limits, strict=True)]
    return h.make_node("BatchNormalization", [x, *names], [y], **more), made


def value(name: str, shape: Any = None, kind: int = FLOAT) -> Any:
    return h.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[Any],
    tensors: Sequence[Any],
    *,
    inputs: Sequence[Any] = (),
    outputs: Sequence[Any] = ("y",),
    opset: int = 17,
    ir: int = 8,
    kind: int = FLOAT,
    **more: Any,
) -> onnx.ModelProto:
    given = list(inputs) or [value("x", ("n", 4, 9, 9), kind)]
    if ir < 4:
        given += [value(t.name, tuple(t.dims), t.data_type) for t in tensors]
    outs = [name if not isinstance(name, str) else value(name, None, kind) for name in outputs]
    graph = h.make_graph(list(nodes), "g", given, outs, list(tensors), value_info=more.pop("infos", []))
    domains = [h.make_opsetid(d, 1) for d in more.pop("domains", ())]
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", opset), *domains], ir_version=ir, **more)
    # With the shapes of all values in it, as exporters leave them; the checker wants those of the outputs.
    return onnx.shape_inference.infer_shapes(made)


@dataclass
class Folded:
    plan: FoldPlan
    model: onnx.ModelProto
    path: Path
    error: float

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.model.graph.node]

    @property
    def left(self) -> list[str]:
        return [outcome.code for outcome in self.plan.outcomes if outcome.verdict.value == "left"]

    def stored(self, name: str) -> np.ndarray:
        return next(numpy_helper.to_array(t) for t in self.model.graph.initializer if t.name == name)


Fold = Callable[..., Folded]


@pytest.fixture
def fold(tmp_path: Path) -> Fold:
    """Fold a model, check the file, run it beside the original, fold it again."""

    def fold_(made: onnx.ModelProto, *, run: bool = True, save: dict[str, Any] | None = None, **options: Any) -> Folded:
        path, out = tmp_path / "model.onnx", tmp_path / "folded.onnx"
        onnx.save(made, path, **(save or {}))
        before = path.read_bytes()
        with open_flow(path) as flow:
            plan = plan_folds(flow.graph, **options)
            write_folded(flow, plan, out)
        assert path.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
        onnx.checker.check_model(str(out), full_check=True)
        original, folded = OnnxModel(path), OnnxModel(out)
        feeds = {
            entry.name: RNG.standard_normal([n if isinstance(n, int) else 3 for n in entry.shape or ()]).astype(
                "float32" if entry.dtype == "bfloat16" else entry.dtype
            )
            for entry in original.inputs()
        }
        expected, got = original.run(feeds) if run else {}, folded.run(feeds) if run else {}
        assert list(expected) == list(got)
        error = max(
            (
                float(
                    np.abs(got[name].astype(float) - expected[name]).max() / np.abs(expected[name].astype(float)).max()
                )
                for name in expected
                if expected[name].dtype.kind == "f"
            ),
            default=0.0,
        )
        again = tmp_path / "again.onnx"
        with open_flow(out) as flow:
            write_folded(flow, plan_folds(flow.graph, **options), again)
        assert again.read_bytes() == out.read_bytes()
        return Folded(plan, onnx.load(out), out, error)

    return fold_


def conv(x: str = "x", y: str = "c", weight: str = "conv.weight", bias: str | None = None, **more: Any) -> Any:
    return h.make_node("Conv", [x, weight, *([] if bias is None else [bias])], [y], **more)


WEIGHT = ("conv.weight", 6, 4, 3, 3)


def test_the_weight_keeps_its_name_and_the_bias_gets_one_beside_it(fold: Fold) -> None:
    bn, tensors = norm("c", "y")
    done = fold(model([conv(), bn], [tensor(*WEIGHT), *tensors]))
    assert done.ops == ["Conv"] and done.error < 1e-5
    assert [t.name for t in done.model.graph.initializer] == ["conv.weight", "conv.bias"]
    assert list(done.model.graph.node[0].output) == ["y"]


def test_an_optional_bias_given_as_the_empty_name(fold: Fold) -> None:
    bn, tensors = norm("c", "y")
    done = fold(model([conv(bias=""), bn], [tensor(*WEIGHT), *tensors]))
    assert done.error < 1e-5
    assert list(done.model.graph.node[0].input) == [
        "conv.weight" if i == 1 else n for i, n in enumerate(["x", "", "conv.bias"])
    ]


def test_the_bias_of_the_convolution_is_the_beta_of_the_norm(fold: Fold) -> None:
    bn, tensors = norm("c", "y")
    relu = h.make_node("Identity", ["y_bn.bias"], ["b"])
    shared = model([conv(bias="y_bn.bias"), bn, relu], [tensor(*WEIGHT), *tensors], outputs=["y", "b"])
    done = fold(shared)
    assert done.ops == ["Conv", "Identity"] and done.error < 1e-5
    names = [t.name for t in done.model.graph.initializer]
    assert len(names) == len(set(names)) == 3


def test_a_weight_used_at_two_places_gets_a_copy_where_it_is_folded(fold: Fold) -> None:
    bn, tensors = norm("c", "n")
    nodes = [conv(), conv(y="d"), bn, h.make_node("Add", ["n", "d"], ["y"])]
    done = fold(model(nodes, [tensor(*WEIGHT), *tensors]))
    assert done.ops == ["Conv", "Conv", "Add"] and done.error < 1e-5
    first, second = (node.input[1] for node in done.model.graph.node[:2])
    assert {first, second} == {"conv.weight", "conv.weight_2"} and second == "conv.weight"


def test_two_norms_behind_one_shared_weight(fold: Fold) -> None:
    (one, first), (two, second) = norm("c", "n"), norm("d", "m")
    nodes = [conv(), conv(y="d"), one, two, h.make_node("Add", ["n", "m"], ["y"])]
    done = fold(model(nodes, [tensor(*WEIGHT), *first, *second]))
    assert done.ops == ["Conv", "Conv", "Add"] and done.error < 1e-5
    assert len({node.input[1] for node in done.model.graph.node[:2]}) == 2


@pytest.mark.parametrize("outputs", [("y", "c"), ("c", "y")])
def test_a_convolution_whose_output_is_promised_stays_as_it_is(fold: Fold, outputs: tuple[str, ...]) -> None:
    bn, tensors = norm("c", "y")
    made = model([conv(), bn], [tensor(*WEIGHT), *tensors], outputs=outputs)
    done = fold(made)
    assert done.ops == ["Conv", "BatchNormalization"] and done.left
    assert [o.name for o in done.model.graph.output] == list(outputs)


def test_a_second_consumer_of_the_convolution(fold: Fold) -> None:
    bn, tensors = norm("c", "n")
    done = fold(model([conv(), bn, h.make_node("Add", ["n", "c"], ["y"])], [tensor(*WEIGHT), *tensors]))
    assert "BatchNormalization" in done.ops and done.left and done.error < 1e-6


def test_the_output_of_the_graph_keeps_its_name_over_several_nodes(fold: Fold) -> None:
    (one, first), (two, second) = norm("c", "n"), norm("r", "y")
    nodes = [conv(), one, h.make_node("Reshape", ["n", "shape"], ["r"]), two]
    shape = numpy_helper.from_array(np.array([0, 0, 7, 7]), "shape")
    done = fold(model(nodes, [tensor(*WEIGHT), *first, *second, shape]))
    assert "BatchNormalization" not in done.ops
    assert done.model.graph.output[0].name == "y" and done.error < 1e-5


def test_a_norm_between_input_and_output_that_changes_nothing_leaves_an_identity(fold: Fold) -> None:
    bn, tensors = norm("x", "y", 4, epsilon=0.0)
    for stored, number in zip(tensors, (1.0, 0.0, 0.0, 1.0), strict=True):
        stored.CopyFrom(numpy_helper.from_array(np.full(4, number, dtype=np.float32), stored.name))
    done = fold(model([bn], tensors))
    assert done.ops in (["Identity"], ["BatchNormalization"]) and done.error == 0
    assert done.model.graph.output[0].name == "y"


def test_two_promised_outputs_of_one_convolution(fold: Fold) -> None:
    """The first norm's name goes to the convolution; the second norm, an identity, cannot have it too."""
    (one, first), (two, second) = norm("c", "y"), norm("y", "z", epsilon=0.0)
    for stored, number in zip(second, (1.0, 0.0, 0.0, 1.0), strict=True):
        stored.CopyFrom(numpy_helper.from_array(np.full(6, number, dtype=np.float32), stored.name))
    done = fold(model([conv(), one, two], [tensor(*WEIGHT), *first, *second], outputs=["y", "z"]))
    assert done.error < 1e-5 and "Conv" in done.ops


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolutions_scale_the_second_axis_group_by_group(fold: Fold, groups: int) -> None:
    bn, tensors = norm("c", "y", 8)
    node = h.make_node("ConvTranspose", ["x", "up.weight"], ["c"], group=groups, strides=[2, 2])
    done = fold(model([node, bn], [tensor("up.weight", 4, 8 // groups, 3, 3), *tensors]))
    assert done.ops == ["ConvTranspose"] and done.error < 1e-5


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_over_one_and_three_axes(fold: Fold, rank: int) -> None:
    bn, tensors = norm("c", "y")
    inputs = [value("x", ("n", 4, *[7] * rank))]
    done = fold(model([conv(), bn], [tensor("conv.weight", 6, 4, *[3] * rank), *tensors], inputs=inputs))
    assert done.ops == ["Conv"] and done.error < 1e-5


@pytest.mark.parametrize("transposed_a", [0, 1])
@pytest.mark.parametrize("transposed_b", [0, 1])
@pytest.mark.parametrize("c", [None, (6,), (1, 6), (3, 6), (1,), ()])
def test_gemm_in_all_its_forms(fold: Fold, transposed_a: int, transposed_b: int, c: tuple[int, ...] | None) -> None:
    bn, tensors = norm("g", "y")
    weight = tensor("fc.weight", *((6, 5) if transposed_b else (5, 6)))
    bias = [] if c is None else [tensor("fc.bias", *c)]
    node = h.make_node(
        "Gemm",
        ["x", "fc.weight", *(["fc.bias"] if bias else [])],
        ["g"],
        alpha=0.5,
        beta=2.0,
        transA=transposed_a,
        transB=transposed_b,
    )
    inputs = [value("x", (5, 3) if transposed_a else (3, 5))]
    done = fold(model([node, bn], [weight, *bias, *tensors], inputs=inputs))
    assert done.ops == ["Gemm"] and done.error < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_matmul_gets_an_addition(fold: Fold, bias: bool) -> None:
    bn, tensors = norm("m", "y")
    nodes = [h.make_node("MatMul", ["x", "w"], ["p" if bias else "m"])]
    nodes += [h.make_node("Add", ["p", "b"], ["m"])] if bias else []
    done = fold(model([*nodes, bn], [tensor("w", 5, 6), tensor("b", 6), *tensors], inputs=[value("x", ("n", 5))]))
    assert done.ops == ["MatMul", "Add"] and done.error < 1e-5
    assert done.model.graph.output[0].name == "y"


def test_a_linear_layer_over_the_wrong_axis_stays(fold: Fold) -> None:
    """(N, C, L) through a matrix that mixes L, then a norm over C, which happens to be as long."""
    bn, tensors = norm("m", "y")
    nodes = [h.make_node("MatMul", ["x", "w"], ["m"]), bn]
    done = fold(model(nodes, [tensor("w", 6, 6), *tensors], inputs=[value("x", ("n", 6, 6))]))
    assert "BatchNormalization" in done.ops and done.error < 1e-6


def test_a_norm_in_training_mode_stays_unless_it_is_meant_for_inference(fold: Fold) -> None:
    bn, tensors = norm("c", "y", training_mode=1)
    bn.output.extend(["mean_out", "var_out"])
    made = model([conv(), bn], [tensor(*WEIGHT), *tensors])
    done = fold(made)
    assert done.ops == ["Conv", "BatchNormalization"] and done.left
    done = fold(made, run=False, evaluation=True)
    assert done.ops == ["Conv"]


def test_a_norm_in_training_mode_that_cannot_be_folded_is_switched(fold: Fold) -> None:
    bn, tensors = norm("c", "y", training_mode=1)
    bn.output.extend(["mean_out", "var_out"])
    made = model([conv(), h.make_node("Sigmoid", ["c"], ["s"]), bn], [tensor(*WEIGHT), *tensors])
    bn.input[0] = "s"
    done = fold(made, run=False, evaluation=True)
    last = done.model.graph.node[-1]
    assert last.op_type == "BatchNormalization" and list(last.output) == ["y"] and not last.attribute


def test_parameters_behind_constant_and_identity_nodes(fold: Fold) -> None:
    bn, tensors = norm("c", "y")
    names = list(bn.input)
    nodes = [h.make_node("Constant", [], [f"{t.name}"], value=t) for t in tensors[:2]]
    nodes += [h.make_node("Identity", [t.name], [f"{t.name}/same"]) for t in tensors[2:]]
    bn.input[3], bn.input[4] = f"{names[3]}/same", f"{names[4]}/same"
    made = model([*nodes, conv(), bn], [tensor(*WEIGHT), *tensors[2:]])
    done = fold(made)
    assert done.ops == ["Conv"] and done.error < 1e-5
    assert [t.name for t in done.model.graph.initializer] == ["conv.weight", "conv.bias"]


def test_half_precision_convolution_with_a_norm_in_float32_behind_casts(fold: Fold) -> None:
    bn, tensors = norm("f", "n")
    nodes = [
        conv(),
        h.make_node("Cast", ["c"], ["f"], to=FLOAT),
        bn,
        h.make_node("Cast", ["n"], ["y"], to=HALF),
    ]
    made = model(nodes, [tensor(*WEIGHT, dtype=np.float16), *tensors], kind=HALF)
    done = fold(made)
    assert "BatchNormalization" not in done.ops and done.error < 5e-3
    assert {t.data_type for t in done.model.graph.initializer} == {HALF}


@pytest.mark.parametrize("kind", [HALF, DOUBLE, BF16])
def test_other_float_types(fold: Fold, kind: int) -> None:
    dtype = h.tensor_dtype_to_np_dtype(kind)
    bn, tensors = norm("c", "y", dtype=dtype)
    done = fold(model([conv(), bn], [tensor(*WEIGHT, dtype=dtype), *tensors], kind=kind, opset=22, ir=10))
    assert done.ops == ["Conv"]
    assert {t.data_type for t in done.model.graph.initializer} == {kind}
    assert done.error < {HALF: 5e-3, DOUBLE: 1e-12, BF16: 5e-2}[kind]


def branches(one: Any, other: Any) -> Any:
    return h.make_node("If", ["which"], ["y"], then_branch=one, else_branch=other)


def body(name: str, tensors: Sequence[Any], *, outer_weight: bool) -> Any:
    bn, parameters = norm("c", f"{name}_y", name=f"{name}.bn")
    weight = "conv.weight" if outer_weight else f"{name}.weight"
    own = [] if outer_weight else [tensor(weight, 6, 4, 3, 3)]
    return h.make_graph(
        [h.make_node("Conv", ["x", weight], ["c"]), bn], name, [], [value(f"{name}_y")], [*own, *parameters, *tensors]
    )


@pytest.mark.parametrize("which", [True, False])
def test_inside_the_branches_of_an_if(fold: Fold, which: bool) -> None:
    node = branches(body("one", [], outer_weight=True), body("other", [], outer_weight=False))
    start = h.make_node("Constant", [], ["which"], value=numpy_helper.from_array(np.array(which)))
    done = fold(model([start, node], [tensor(*WEIGHT)]))
    for attribute in done.model.graph.node[-1].attribute:
        assert [inner.op_type for inner in attribute.g.node] == ["Conv"]
        assert attribute.g.output[0].name == f"{'one' if 'then' in attribute.name else 'other'}_y"
    assert done.error < 1e-5


def test_a_value_that_only_a_body_uses_is_renamed_there_too(fold: Fold) -> None:
    bn, tensors = norm("c", "n")
    one = h.make_graph([h.make_node("Relu", ["n"], ["a"])], "one", [], [value("a")])
    other = h.make_graph([h.make_node("Neg", ["n"], ["b"])], "other", [], [value("b")])
    start = h.make_node("Constant", [], ["which"], value=numpy_helper.from_array(np.array(True)))
    done = fold(model([start, conv(), bn, branches(one, other)], [tensor(*WEIGHT), *tensors]))
    assert done.ops == ["Constant", "Conv", "If"] and done.error < 1e-5


def test_a_body_that_gives_out_a_value_of_the_graph_around_it(fold: Fold) -> None:
    """The norm's output is a branch's output by name, so the name must survive."""
    bn, tensors = norm("c", "n")
    one = h.make_graph([h.make_node("Identity", ["n"], ["a"])], "one", [], [value("a")])
    other = h.make_graph([h.make_node("Neg", ["c"], ["b"])], "other", [], [value("b")])
    start = h.make_node("Constant", [], ["which"], value=numpy_helper.from_array(np.array(True)))
    done = fold(model([start, conv(), bn, branches(one, other)], [tensor(*WEIGHT), *tensors]))
    assert "BatchNormalization" in done.ops and done.error < 1e-6


def test_inside_a_loop(fold: Fold) -> None:
    bn, tensors = norm("c", "out", 4)
    inner = h.make_graph(
        [
            h.make_node("Conv", ["state", "conv.weight"], ["c"], pads=[1] * 4),
            bn,
            h.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [value("i", (), TensorProto.INT64), value("go", (), TensorProto.BOOL), value("state", ("n", 4, 9, 9))],
        [value("on", (), TensorProto.BOOL), value("out", ("n", 4, 9, 9))],
        tensors,
    )
    count = numpy_helper.from_array(np.array(3), "count")
    node = h.make_node("Loop", ["count", "", "x"], ["y"], body=inner)
    weight = tensor("conv.weight", 4, 4, 3, 3, low=-0.2, high=0.2)
    done = fold(model([node], [weight, count], outputs=[value("y", ("n", 4, 9, 9))]))
    inner = done.model.graph.node[0].attribute[0].g
    assert [n.op_type for n in inner.node] == ["Conv", "Identity"] and done.error < 1e-5


def function(name: str, nodes: Sequence[Any], inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    return h.make_function("mine", name, list(inputs), list(outputs), list(nodes), [h.make_opsetid("", 17)])


def test_functions_with_norms_are_inlined_and_others_stay(fold: Fold) -> None:
    block = function(
        "Block",
        [
            h.make_node("Conv", ["a", "w"], ["c"]),
            h.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"]),
        ],
        ["a", "w", "g", "b", "m", "v"],
        ["n"],
    )
    gate = function("Gate", [h.make_node("Relu", ["a"], ["r"])], ["a"], ["r"])
    _, first = norm("", "", name="one")
    _, second = norm("", "", 5, name="two")
    nodes = [
        h.make_node("Block", ["x", "one.w", *(t.name for t in first)], ["p"], domain="mine"),
        h.make_node("Gate", ["p"], ["q"], domain="mine"),
        h.make_node("Block", ["q", "two.w", *(t.name for t in second)], ["y"], domain="mine"),
    ]
    stored = [tensor("one.w", 6, 4, 3, 3), tensor("two.w", 5, 6, 3, 3), *first, *second]
    done = fold(model(nodes, stored, domains=["mine"], functions=[block, gate]))
    assert done.ops == ["Conv", "Gate", "Conv"] and done.error < 1e-5
    assert any("inlined" in note for note in done.plan.graph.notes)


@pytest.mark.parametrize("everything", [True, False])
def test_external_data_stays_external(fold: Fold, tmp_path: Path, everything: bool) -> None:
    bn, tensors = norm("c", "n", 64)
    nodes = [conv(), bn, conv("n", "y", "second.weight")]
    stored = [tensor("conv.weight", 64, 4, 3, 3), *tensors, tensor("second.weight", 8, 64, 3, 3)]
    save = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0 if everything else 1024}
    done = fold(model(nodes, stored), save=save)
    assert done.ops == ["Conv", "Conv"] and done.error < 1e-5
    plain = onnx.load(done.path, load_external_data=False)
    where = {t.name: {e.key: e.value for e in t.external_data} for t in plain.graph.initializer}
    assert where["conv.weight"]["location"] == where["second.weight"]["location"] == "folded.onnx.data"
    data = (tmp_path / "folded.onnx.data").read_bytes()
    start = int(where["second.weight"]["offset"])
    original = numpy_helper.to_array(stored[-1]).tobytes()
    assert data[start : start + len(original)] == original
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.onnx", "weights.bin", "folded.onnx", "folded.onnx.data", "again.onnx"
    }  # fmt: skip


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 20])
def test_opsets(fold: Fold, opset: int) -> None:
    bn, tensors = norm("c", "y")
    done = fold(model([conv(), bn], [tensor(*WEIGHT), *tensors], opset=opset))
    assert done.ops == ["Conv"] and done.error < 1e-5


def test_old_files_list_their_initializers_as_inputs(fold: Fold) -> None:
    bn, tensors = norm("c", "y")
    done = fold(model([conv(), bn], [tensor(*WEIGHT), *tensors], ir=3, opset=8))
    assert done.ops == ["Conv"] and done.error < 1e-5
    assert [v.name for v in done.model.graph.input] == ["x", "conv.weight", "conv.bias"]


def test_initializers_that_can_be_overridden_are_left_alone(fold: Fold) -> None:
    bn, tensors = norm("c", "y")
    made = model([conv(), bn], [tensor(*WEIGHT), *tensors])
    made.graph.input.append(value("conv.weight", WEIGHT[1:]))
    done = fold(made)
    assert done.ops == ["Conv", "BatchNormalization"]
    assert any("conv.weight" in note for note in done.plan.graph.notes)


def test_decomposed_into_one_multiplication_and_one_addition(fold: Fold) -> None:
    bn, tensors = norm("x", "n", 4)
    nodes = [bn, conv("n", "y", pads=[1] * 4)]
    left = fold(model(nodes, [tensor(*WEIGHT), *tensors]))
    assert left.ops == ["BatchNormalization", "Conv"]
    done = fold(model(nodes, [tensor(*WEIGHT), *tensors]), decompose=True)
    assert done.ops == ["Mul", "Add", "Conv"] and done.error < 1e-5


@pytest.mark.parametrize("count", [2, 3])
def test_concatenated_and_summed_convolutions(fold: Fold, count: int) -> None:
    weights = [tensor(f"c{i}.weight", 6, 4, 3, 3) for i in range(count)]
    convs = [conv("x", f"c{i}", f"c{i}.weight") for i in range(count)]
    names = [f"c{i}" for i in range(count)]
    bn, tensors = norm("t", "y", 6 * count)
    done = fold(model([*convs, h.make_node("Concat", names, ["t"], axis=1), bn], [*weights, *tensors]))
    assert done.ops == ["Conv"] * count + ["Concat"] and done.error < 1e-5
    bn, tensors = norm("t", "y", 6)
    done = fold(model([*convs, h.make_node("Sum", names, ["t"]), bn], [*weights, *tensors]))
    assert done.ops == ["Conv"] * count + ["Sum"] and done.error < 1e-5


def test_gain_and_bias_of_a_layer_norm_move_into_the_next_products(fold: Fold) -> None:
    nodes = [
        h.make_node("LayerNormalization", ["x", "ln.weight", "ln.bias"], ["n"]),
        h.make_node("MatMul", ["n", "q.weight"], ["q"]),
        h.make_node("Gemm", ["n", "k.weight", "k.bias"], ["k"]),
        h.make_node("Add", ["q", "k"], ["y"]),
    ]
    stored = [
        tensor("ln.weight", 8),
        tensor("ln.bias", 8),
        tensor("q.weight", 8, 5),
        tensor("k.weight", 8, 5),
        tensor("k.bias", 5),
    ]
    done = fold(model(nodes, stored, inputs=[value("x", ("n", 8))]), layernorm=True)
    assert done.ops == ["LayerNormalization", "MatMul", "Add", "Gemm", "Add"] and done.error < 1e-5
    assert (done.stored("ln.weight") == 1).all() and (done.stored("ln.bias") == 0).all()
