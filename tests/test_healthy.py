"""Healthy networks of a dozen families, trained here, are left alone. The whole list: benchmarks/healthy.py"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

import normdoctor as nd
from normdoctor import Severity

NAMES = (
    "plain",
    "plain-momentum-0.03",
    "residual",
    "residual-zero-init",
    "preactivation",
    "dense",
    "depthwise",
    "vgg",
    "mlp",
    "conv1d",
    "groupnorm",
    "instancenorm",
    "transformer-layernorm",
    "transformer-zero-centred",
    "transformer-derf",
)


@pytest.mark.parametrize("name", NAMES)
def test_no_error_and_at_most_one_warning_rule(name: str, nets: ModuleType, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same net every time
    try:
        model = nets.train_healthy(name)
    finally:
        torch.set_num_threads(threads)
    assert nets.accuracy(model) > 0.9
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "module.pt")
    for path in (tmp_path / "state.pt", tmp_path / "module.pt"):
        report = nd.inspect(path)
        assert report.layers
        assert [f.message for f in report.findings if f.severity is Severity.ERROR] == []
        assert len({f.code for f in report.findings if f.severity is Severity.WARNING}) <= 1
