"""The moments of an activation of a normal variable, against integration that knows nothing of them, and against
torch's own activations on a million samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scipy import special
from scipy.stats import norm

from normdoctor.flow.gaussian import cdf, moments_after, pdf, probability_above
from normdoctor.flow.graph import Node, Op, Value
from normdoctor.readers.aten_calls import Call
from normdoctor.readers.aten_compute import TABLE
from normdoctor.readers.onnx_flow import open_flow

Array = np.ndarray

# name, what it takes, what it is in numpy and scipy, where it has kinks or jumps
SLOPES = {"alpha": 0.1}
CASES: list[tuple[str, dict[str, float], Callable[[Array], Array], tuple[float, ...]]] = [
    ("relu", {}, lambda x: np.where(x > 0, x, 0), (0,)),
    ("relu6", {}, lambda x: np.minimum(np.where(x > 0, x, 0), 6), (0, 6)),
    ("clip", {"low": -1.0, "high": 2.0}, lambda x: np.maximum(np.minimum(x, 2), -1), (-1, 2)),
    ("clip", {"low": 0.5}, lambda x: np.where(x < 0.5, 0.5, x), (0.5,)),
    ("clip", {"high": 1.0}, lambda x: np.where(x > 1, 1, x), (1,)),
    ("leaky_relu", SLOPES, lambda x: np.where(x < 0, 0.1 * x, x), (0,)),
    ("prelu", {"alpha": -0.3}, lambda x: np.where(x < 0, -0.3 * x, x), (0,)),
    ("abs", {}, lambda x: np.sqrt(x * x), (0,)),
    ("hardsigmoid", {}, lambda x: np.minimum(np.maximum(x + 3, 0), 6) / 6, (-3, 3)),
    ("hardsigmoid", {"alpha": 0.2}, lambda x: np.clip(0.2 * x + 0.5, 0, 1), (-2.5, 2.5)),
    ("hardswish", {}, lambda x: x * np.minimum(np.maximum(x + 3, 0), 6) / 6, (-3, 3)),
    ("hardshrink", {}, lambda x: np.where(np.abs(x) > 0.5, x, 0), (-0.5, 0.5)),
    ("hardshrink", {"alpha": 2.0}, lambda x: np.where(np.abs(x) > 2, x, 0), (-2, 2)),
    ("softshrink", {}, lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0), (-0.5, 0.5)),
    ("thresholded_relu", {"alpha": 1.0}, lambda x: np.where(x > 1, x, 0), (1,)),
    ("silu", {}, lambda x: x * special.expit(x), ()),
    ("silu", {"alpha": 1.7}, lambda x: x * special.expit(1.7 * x), ()),
    ("gelu", {}, lambda x: x * special.ndtr(x), ()),
    ("gelu_tanh", {}, lambda x: x * special.expit(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)), ()),
    ("sigmoid", {}, special.expit, ()),
    ("log_sigmoid", {}, special.log_expit, ()),
    ("tanh", {}, np.tanh, ()),
    ("tanhshrink", {}, lambda x: x - np.tanh(x), ()),
    ("elu", {}, lambda x: np.where(x < 0, np.expm1(np.minimum(x, 0)), x), (0,)),
    ("elu", {"alpha": 1.5}, lambda x: np.where(x < 0, 1.5 * np.expm1(np.minimum(x, 0)), x), (0,)),
    ("celu", {"alpha": 0.3}, lambda x: np.where(x < 0, 0.3 * np.expm1(np.minimum(x, 0) / 0.3), x), (0,)),
    ("selu", {}, lambda x: np.where(x < 0, 1.7580993408473766 * np.expm1(np.minimum(x, 0)), 1.050700987355 * x), (0,)),
    ("softplus", {}, lambda x: np.logaddexp(0, x), ()),
    ("softplus", {"alpha": 2.0}, lambda x: np.logaddexp(0, 2 * x) / 2, ()),
    ("softsign", {}, lambda x: x / (1 + np.abs(x)), (0,)),
    ("mish", {}, lambda x: x * np.tanh(np.logaddexp(0, x)), ()),
    ("erf", {}, special.erf, ()),
    ("erfc", {}, special.erfc, ()),
    ("sin", {}, np.sin, ()),
    ("cos", {}, np.cos, ()),
]  # fmt: skip
IDS = [f"{name} {given}" if given else name for name, given, _, _ in CASES]
WAVES = ("sin", "cos")

POINTS, SHARES = np.polynomial.legendre.leggauss(30)


def integrated(f: Callable[[Array], Array], kinks: tuple[float, ...], mean: float, std: float) -> tuple[float, float]:
    """Mean and variance of f(X) by Gauss and Legendre on panels that end at kinks, are no wider than one standard
    deviation, and are narrow wherever f bends."""
    inner = np.concatenate([np.linspace(0, 20, 41), np.geomspace(20, 2e4, 40)[1:]])
    cuts = [(cut - mean) / std for cut in (*inner, *-inner, *kinks)]
    edges = np.unique([*np.linspace(-9.5, 9.5, 20), *(cut for cut in cuts if abs(cut) < 9.5)])
    half = np.diff(edges)[:, None] / 2
    z = edges[:-1, None] + half * (1 + POINTS)
    share = half * SHARES * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    values = f(mean + std * z)
    center = float((share * values).sum())
    return center, float((share * (values - center) ** 2).sum())


def close(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= 1e-6 * max(1.0, abs(wanted))


def at(name: str, mean: float, std: float, parameters: dict[str, float]) -> tuple[float, float]:
    moments = moments_after(name, np.array([mean]), np.array([std]), **parameters)
    assert moments is not None
    return float(moments[0][0]), float(moments[1][0])


@st.composite
def normals(draw: st.DrawFn) -> tuple[float, float]:
    """Mean and standard deviation: any sizes, near a bend, or many standard deviations from it."""
    std = 10 ** draw(st.floats(-8, 3))
    kind = draw(st.sampled_from(["any", "near", "tail"]))
    if kind == "any":
        return draw(st.floats(-1e3, 1e3)), std
    bend = draw(st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 6.0])) if kind == "near" else 0.0
    return float(np.clip(bend + std * draw(st.floats(-9, 9)), -1e3, 1e3)), std


@pytest.mark.parametrize(("name", "parameters", "f", "kinks"), CASES, ids=IDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(normal=normals())
def test_integration_agrees(
    name: str,
    parameters: dict[str, float],
    f: Callable[[Array], Array],
    kinks: tuple[float, ...],
    normal: tuple[float, float],
) -> None:
    mean, std = normal
    if name in WAVES:
        std = min(std, 1.0)  # what waves to and fro within a panel is not integrated
    center, variance = at(name, mean, std, parameters)
    wanted = integrated(f, kinks, mean, std)
    assert close(center, wanted[0]), (center, wanted[0])
    assert close(variance, wanted[1]), (variance, wanted[1])
    assert variance >= 0


@pytest.mark.parametrize(("name", "parameters", "f", "kinks"), CASES, ids=IDS)
def test_small_variances_keep_their_digits(
    name: str, parameters: dict[str, float], f: Callable[[Array], Array], kinks: tuple[float, ...]
) -> None:
    """Var f(X) is f'(mean)² std² for small std."""
    for mean, std in ((0.7, 1e-6), (1.3, 1e-5), (-0.8, 1e-6)):
        slope = (f(np.array(mean + 1e-5)) - f(np.array(mean - 1e-5))) / 2e-5
        assert at(name, mean, std, parameters)[1] == pytest.approx(float(slope * std) ** 2, rel=1e-4, abs=1e-25)


@pytest.mark.parametrize(("name", "parameters", "f", "kinks"), CASES, ids=IDS)
def test_without_spread_it_is_the_value(
    name: str, parameters: dict[str, float], f: Callable[[Array], Array], kinks: tuple[float, ...]
) -> None:
    means = np.array([-1000.0, -7.3, -2.0, -1.01, -0.2, 0.0, 0.3, 1.7, 5.0, 6.0, 800.0])
    moments = moments_after(name, means, np.zeros_like(means), **parameters)
    assert moments is not None
    np.testing.assert_allclose(moments[0], f(means), rtol=1e-10, atol=1e-10)
    assert not moments[1].any()


TORCH: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, float]]] = {
    "relu": (F.relu, {}),
    "relu6": (F.relu6, {}),
    "clip": (F.hardtanh, {"low": -1.0, "high": 1.0}),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), {"alpha": 0.2}),
    "hardsigmoid": (F.hardsigmoid, {}),
    "hardswish": (F.hardswish, {}),
    "hardshrink": (F.hardshrink, {}),
    "softshrink": (F.softshrink, {}),
    "silu": (F.silu, {}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), {}),
    "sigmoid": (torch.sigmoid, {}),
    "log_sigmoid": (F.logsigmoid, {}),
    "tanh": (torch.tanh, {}),
    "tanhshrink": (F.tanhshrink, {}),
    "elu": (F.elu, {}),
    "celu": (lambda x: F.celu(x, 0.4), {"alpha": 0.4}),
    "selu": (F.selu, {}),
    "softplus": (lambda x: F.softplus(x, 3.0), {"alpha": 3.0}),
    "softsign": (F.softsign, {}),
    "mish": (F.mish, {}),
    "erf": (torch.erf, {}),
    "exp": (torch.exp, {}),
    "exp2": (torch.exp2, {}),
    "expm1": (torch.expm1, {}),
    "sin": (torch.sin, {}),
    "cos": (torch.cos, {}),
}


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", TORCH)
def test_samples_agree(name: str, normal: torch.Tensor) -> None:
    f, parameters = TORCH[name]
    for mean, std in ((0.3, 0.8), (-0.9, 0.5)):
        values = f(mean + std * normal)
        center, variance = at(name, mean, std, parameters)
        off = values - values.mean()
        error = values.std() / 1e3
        assert abs(values.mean() - center) < 5 * error
        assert abs((off**2).mean() - variance) < 5 * (off**2).std() / 1e3


def test_a_formula_of_the_literature() -> None:
    """E[X cdf(X)] = m cdf(m/r) + s²/r pdf(m/r), E[erf(X)] = erf(m / √(1 + 2 s²)), with r = √(1 + s²): elementary."""
    mean, std = np.array([0.4, -2.0, 30.0]), np.array([0.9, 3.0, 200.0])
    r = np.sqrt(1 + std**2)
    gelu, erf = moments_after("gelu", mean, std), moments_after("erf", mean, std)
    assert gelu is not None and erf is not None
    np.testing.assert_allclose(gelu[0], mean * cdf(mean / r) + std**2 / r * pdf(mean / r), rtol=1e-8)
    np.testing.assert_allclose(erf[0], special.erf(mean / np.sqrt(1 + 2 * std**2)), rtol=1e-8)


def test_exponentials() -> None:
    mean, std = np.array([0.0, 1.0, -3.0, 2.0, 800.0]), np.array([1.0, 0.0, 1e-8, 3.0, 1.0])
    moments = moments_after("exp", mean, std)
    assert moments is not None
    np.testing.assert_allclose(moments[0], [math.exp(0.5), math.e, math.exp(-3), math.exp(6.5), math.inf], rtol=1e-12)
    assert moments[1][0] == pytest.approx((math.e - 1) * math.e)
    assert moments[1][1] == 0
    assert moments[1][2] == pytest.approx(math.exp(-6) * 1e-16)
    assert moments[1][4] == math.inf


def test_shapes_broadcast_and_slopes_are_per_channel() -> None:
    mean, std = np.linspace(-1, 1, 12).reshape(3, 4), np.array([0.5, 1.0, 2.0])[:, None]
    slopes = np.array([0.0, 0.1, 0.25])[:, None]
    for name in ("prelu", "elu", "celu", "softplus"):
        given = slopes if name == "prelu" else slopes + 0.5
        moments = moments_after(name, mean, std, alpha=given)
        assert moments is not None
        assert moments[0].shape == moments[1].shape == (3, 4)
        for row, column in ((0, 1), (2, 3)):
            one = at(name, mean[row, column], std[row, 0], {"alpha": given[row, 0]})
            assert moments[0][row, column] == pytest.approx(one[0], abs=1e-12)
            assert moments[1][row, column] == pytest.approx(one[1], abs=1e-12)
    for name in ("relu", "silu", "hardswish"):
        for shape in ((), (0, 1), (2, 1, 3)):
            for width in (0.0, 0.7):
                moments = moments_after(name, 0.3, np.full(shape, width))
                assert moments is not None and moments[0].shape == moments[1].shape == shape


def test_many_channels_are_those_one_by_one() -> None:
    mean, std = np.linspace(-4, 4, 1000), np.geomspace(1e-3, 50, 1000)
    for name in ("silu", "relu6"):
        whole = moments_after(name, mean, std)
        assert whole is not None
        for index in (0, 63, 64, 500, 999):
            assert (whole[0][index], whole[1][index]) == pytest.approx(at(name, mean[index], std[index], {}), abs=1e-13)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("log", {}),
        ("unheard-of", {}),
        ("leaky_relu", {}),
        ("prelu", {}),
        ("thresholded_relu", {}),
        ("celu", {"alpha": -1.0}),
        ("hardshrink", {"alpha": -1.0}),
        ("softplus", {"alpha": 0.0}),
    ],
)
def test_what_is_not_known_is_not_guessed(name: str, parameters: dict[str, float]) -> None:
    assert moments_after(name, np.zeros(2), np.ones(2), **parameters) is None


@pytest.mark.parametrize("name", ["relu", "hardswish", "silu", "erf", "tanh", "exp"])
def test_nan_stays_nan(name: str) -> None:
    moments = moments_after(name, np.array([np.nan, 0.0, 0.0]), np.array([1.0, np.nan, 1.0]))
    assert moments is not None
    for values in moments:
        assert np.isnan(values).tolist() == [True, True, False]
    still = moments_after(name, np.array([np.nan, 0.0]), np.zeros(2))
    assert still is not None
    for values in still:
        assert np.isnan(values).tolist() == [True, False]


def test_a_clip_with_crossed_limits_is_its_upper_one() -> None:
    """As torch and ONNX have it."""
    assert at("clip", 0.0, 1.0, {"low": 3.0, "high": -1.0}) == (-1.0, 0.0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(z=st.floats(-37, 37), mean=st.floats(-1e3, 1e3), std=st.floats(1e-3, 1e3))
def test_tails_keep_their_digits(z: float, mean: float, std: float) -> None:
    threshold = mean + z * std
    exact = (threshold - mean) / std
    assert float(probability_above(threshold, mean, std)) == pytest.approx(norm.sf(exact), rel=1e-9)
    assert float(cdf(exact)) == pytest.approx(norm.cdf(exact), rel=1e-9)


def test_tails_to_the_end_of_float64() -> None:
    assert float(probability_above(37.0, 0.0, 1.0)) == pytest.approx(5.725571222524e-300, rel=1e-6)
    assert float(probability_above(0.0, np.array(-1e300), np.array(1e-300))) == 0


def test_probability_without_spread() -> None:
    mean = np.array([-1.0, 0.0, 1.0, np.nan])
    np.testing.assert_array_equal(probability_above(0.0, mean, np.zeros(4)), [0.0, 0.0, 1.0, np.nan])
    assert probability_above(0.0, mean[:, None], np.ones(5)).shape == (4, 5)


NODES: list[tuple[str, dict[str, Any]]] = [
    ("Elu", {}),
    ("Elu", {"alpha": 0.5}),
    ("Celu", {}),
    ("Celu", {"alpha": 0.3}),
    ("Selu", {}),
    ("HardSigmoid", {}),
    ("HardSigmoid", {"alpha": 0.4}),
    ("HardSwish", {}),
    ("LeakyRelu", {"alpha": 0.3}),
    ("ThresholdedRelu", {}),
    ("ThresholdedRelu", {"alpha": 0.2}),
    ("Softplus", {}),
    ("Softsign", {}),
]


def read(path: Path, op: str, attributes: dict[str, Any]) -> Node:
    """A model of one node as the reader of ONNX files has it."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], **attributes)], "net", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    with open_flow(path) as flow:
        (node,) = flow.graph.nodes
    return node


@pytest.mark.parametrize(("op", "attributes"), NODES, ids=str)
def test_parameters_of_onnx_operators(
    op: str, attributes: dict[str, Any], tmp_path: Path, normal: torch.Tensor
) -> None:
    """What the reader passes on gives the moments of what onnxruntime computes."""
    node = read(tmp_path / "net.onnx", op, attributes)
    assert node.op is Op.ACTIVATION
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    values = session.run(None, {"x": (0.2 + 1.1 * normal[:200_000]).float().numpy()})[0].astype(np.float64)
    parameters = {key: node.attributes[key] for key in ("alpha", "low", "high") if key in node.attributes}
    center, variance = at(node.attributes["name"], 0.2, 1.1, parameters)
    assert abs(values.mean() - center) < 5 * values.std() / math.sqrt(values.size)
    assert values.var() == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize(("op", "attributes"), [("HardSigmoid", {"beta": 0.3}), ("Selu", {"gamma": 1.0})])
def test_operators_with_parameters_of_their_own_are_no_known_activation(
    op: str, attributes: dict[str, Any], tmp_path: Path
) -> None:
    assert read(tmp_path / "net.onnx", op, attributes).op is Op.OTHER


def test_a_scaled_elu_is_no_known_activation() -> None:
    x, y = Value("x", (2, 3), "float32"), Value("y", (2, 3), "float32")
    for arguments, op in (((1.5,), Op.ACTIVATION), ((1.6733, 1.0507, 1.0), None)):
        names = ("alpha", "scale", "input_scale")
        call = Call("elu", "", {"self": x, **dict(zip(names, arguments, strict=False))}, [y])
        found = TABLE["elu"](call)
        assert (found[0].op if found else None) is op
