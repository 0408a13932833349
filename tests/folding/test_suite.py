"""The patterns of benchmarks/fold.py: nothing wrong, nothing unusable, and as many norms folded as can be.

Folded without the proof, so that nothing but the fold itself keeps it right. Of the slow formats a part is run; all of
them with NORMDOCTOR_FOLD_SUITE=all, and beside the other tools by the benchmark.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # pickled modules are of classes that lie there

import fold_files  # noqa: E402
import fold_judge  # noqa: E402
import torch  # noqa: E402

import normdoctor as nd  # noqa: E402

KNOWN_LEFT: dict[str, int] = {}
"""Files of which fewer norms fold than could: how many do."""

QUICK = {
    "onnx": ("plain", "hard", "trap"),
    "module": ("hard", "trap"),
    "pt2": ("trap",),
    "pt2-decomposed": (),
    "onnx-torchscript": (),
    "onnx-dynamo": (),
}
"""The kinds of patterns that are run in each format."""

SAMPLE = ("Conv2dNorm", "ThroughConcat", "Frozen", "SharedConvTwoNorms", "ConvHasSkip", "ResNet")
"""And these in every format."""


def wanted() -> list[Any]:
    everything = os.environ.get("NORMDOCTOR_FOLD_SUITE") == "all"
    return [
        pytest.param(pattern, fmt, id=f"{fmt}-{pattern.name}")
        for pattern in fold_files.patterns()
        for fmt in pattern.formats
        if everything or pattern.kind in QUICK[fmt] or pattern.name in SAMPLE
    ]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("pattern", "fmt"), wanted())
@pytest.mark.filterwarnings("ignore")  # of torch's exporters and pickles
def test_pattern(pattern: Any, fmt: str, tmp_path: Path) -> None:
    try:
        case = fold_files.build(pattern, fmt, tmp_path)
    except fold_files.NotExported as error:
        pytest.skip(f"not exported: {error}")
    original = fold_judge.measure(case)
    target = case.path.with_stem("folded")
    before = case.path.read_bytes()
    settings: dict[str, Any] = {}
    if fmt == "module":
        shapes = zip(case.inputs.values(), case.dtypes, strict=True)
        shape = [",".join(map(str, values.shape)) + f":{dtype}" for values, dtype in shapes]
        settings = {"trust": True, "input_shape": shape}
    nd.fold(case.path, output=target, verify=False, **settings)
    assert case.path.read_bytes() == before
    judgement = fold_judge.judge(case, original, target)
    if case.name in KNOWN_LEFT:
        assert judgement.verdict in (fold_judge.Verdict.LEFT, fold_judge.Verdict.PARTIAL), judgement
        assert judgement.folded == KNOWN_LEFT[case.name]
    else:
        assert judgement.verdict == fold_judge.Verdict.RIGHT, judgement


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    """A judge that finds everything right would make all of the above pass."""
    import onnx
    from onnx import numpy_helper

    pattern = next(each for each in fold_files.patterns() if each.name == "conv_groups")
    case = fold_files.build(pattern, "onnx", tmp_path)
    original = fold_judge.measure(case)

    def verdict(change: Any) -> Any:
        model = onnx.load(case.path)
        change(model)
        onnx.save(model, tmp_path / "changed.onnx")
        return fold_judge.judge(case, original, tmp_path / "changed.onnx").verdict

    def nudge(model: Any) -> None:
        weight = model.graph.initializer[0]
        values = numpy_helper.to_array(weight).copy()
        values[-1] *= 1.001
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))

    def remove_the_norm(model: Any) -> None:
        norm = model.graph.node.pop()
        model.graph.node[-1].output[0] = norm.output[0]

    def lose_the_name(model: Any) -> None:
        model.graph.node[-1].output[0] = model.graph.output[0].name = "other"

    assert verdict(lambda model: None) == fold_judge.Verdict.LEFT
    assert verdict(nudge) == fold_judge.Verdict.WRONG
    assert verdict(remove_the_norm) == fold_judge.Verdict.WRONG
    assert verdict(lose_the_name) == fold_judge.Verdict.UNUSABLE
    assert verdict(lambda model: model.graph.node.pop(0)) == fold_judge.Verdict.UNUSABLE
    assert fold_judge.judge(case, original, tmp_path / "nothing.onnx").verdict == fold_judge.Verdict.UNUSABLE


def test_there_are_enough_patterns() -> None:
    patterns = fold_files.patterns()
    assert len({pattern.name for pattern in patterns}) == len(patterns) >= 100
    kinds = [pattern.kind for pattern in patterns]
    assert min(kinds.count(kind) for kind in ("plain", "hard", "trap")) >= 40
