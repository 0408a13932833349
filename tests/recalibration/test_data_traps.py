"""Data that would make good statistics bad: prepared otherwise, copies of a few samples, the wrong file."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import normdoctor as nd
from normdoctor.recalibration.records import MeasuredReport

FIXTURES = Path(__file__).parents[2] / "fixtures"
HEALTHY = FIXTURES / "healthy.onnx"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.asarray(np.load(FIXTURES / "digits.npz")["x"])


def report_of(result: nd.Recalibration) -> MeasuredReport:
    assert isinstance(result.report, MeasuredReport)
    return result.report


@pytest.mark.parametrize(
    ("made", "words", "options"),
    [
        (lambda x: x * 255, "divided by 255", "--scale 1/255"),
        (lambda x: x / 255, "times 255", "--scale 255"),
        (lambda x: (x * 0.5 + 0.5) * 255, "divided by 255 and normalised by mean and std 0.5", "--mean 0.5 --std 0.5"),
    ],
)
def test_data_prepared_otherwise_is_refused(
    tmp_path: Path, images: np.ndarray, made: object, words: str, options: str
) -> None:
    np.save(tmp_path / "x.npy", made(images))  # type: ignore[operator]
    with pytest.raises(nd.RefusedError, match=words) as caught:
        nd.recalibrate(HEALTHY, tmp_path / "x.npy", output=tmp_path / "out.onnx")
    assert options in caught.value.hint and not (tmp_path / "out.onnx").exists()
    forced = report_of(nd.recalibrate(HEALTHY, tmp_path / "x.npy", output=tmp_path / "out.onnx", force=True))
    assert "D608" in {finding.code for finding in forced.findings}


def test_the_options_that_are_named_help(tmp_path: Path, images: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", images * 255)
    report = report_of(nd.recalibrate(HEALTHY, tmp_path / "x.npy", scale=1 / 255, output=tmp_path / "out.onnx"))
    assert max(row.shift for row in report.rows) < 0.1


def test_statistics_that_were_never_updated_say_nothing_of_the_data(nets: ModuleType, images: np.ndarray) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3))
    nd.recalibrate(net, images * 255)
    assert float(net[0].running_var) > 10_000


def test_copies_do_not_count(images: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(nd.RefusedError, match="independent values"):
        nd.recalibrate(HEALTHY, np.repeat(images[:8], 50, axis=0), output=tmp_path / "out.onnx")
    report = report_of(
        nd.recalibrate(HEALTHY, np.concatenate([images, images]), output=tmp_path / "out.onnx", samples="all")
    )
    assert "only 512 of 1,024 samples are different" in report.notes
    once = report_of(nd.recalibrate(HEALTHY, images, output=tmp_path / "once.onnx"))
    for twice, alone in zip(report.rows, once.rows, strict=True):
        assert twice.effective == pytest.approx(alone.effective, rel=0.25)  # told from 256 samples


@pytest.mark.parametrize("name", ["data", "labels"])
def test_the_data_is_never_overwritten(tmp_path: Path, images: np.ndarray, name: str) -> None:
    np.save(tmp_path / "data", images)
    np.save(tmp_path / "labels", np.zeros(len(images), np.int64))
    for path in ("data", "labels"):
        (tmp_path / f"{path}.npy").rename(tmp_path / path)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(nd.UsageError, match=f"is the --{name} file"):
        nd.recalibrate(HEALTHY, tmp_path / "data", labels=tmp_path / "labels", output=tmp_path / name, overwrite=True)
    assert (tmp_path / name).read_bytes() == before


def test_the_end_of_the_data_is_no_early_stop(images: np.ndarray, tmp_path: Path) -> None:
    def run(until: float, count: int = 64) -> MeasuredReport:
        return report_of(
            nd.recalibrate(
                HEALTHY, images[:count], method="one-pass", until=until, output=tmp_path / "out.onnx", overwrite=True
            )
        )

    whole = run(1e-6)
    assert (whole.stopped_early, whole.samples) == (False, 64)
    exactly = max(row.standard_error or 0.0 for row in whole.rows) * 1.001
    assert (run(exactly).stopped_early, run(exactly).samples) == (False, 64)
    early = run(0.9, count=128)
    assert early.stopped_early and early.samples == 64


def test_nothing_is_said_of_a_file_that_is_not_written_anew(tmp_path: Path, images: np.ndarray) -> None:
    """fold drops training state and says so; recalibrate keeps it."""
    state = torch.load(FIXTURES / "healthy.pt")
    torch.save({"state_dict": state, "optimizer": {"state": {0: torch.zeros(3)}}}, tmp_path / "run.pt")
    result = nd.recalibrate(tmp_path / "run.pt", images, arch="nets:ResNet")
    assert not any("dropped" in note for note in report_of(result).notes)
    assert result.path is not None and "optimizer" in torch.load(result.path)


def test_sharing_data_is_for_onnx(images: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(nd.UsageError, match="--share-data"):
        nd.recalibrate(FIXTURES / "healthy.pt2", images, share_data=True, output=tmp_path / "out.pt2")
    assert list(tmp_path.iterdir()) == []
