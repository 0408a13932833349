"""What many tests need: norm layers made of plain arrays, without a file."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from normdoctor.layers import NormKind, NormLayer

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "fixtures"

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "alpha", "inner_shift")


@dataclass(frozen=True, eq=False)
class Values:
    """An ArrayRef over values in memory; dtype may claim what numpy has no name for."""

    array: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    @property
    def identity(self) -> Hashable:
        return id(self.array)

    def numpy(self) -> np.ndarray:
        return self.array


def values(data: Any, dtype: str | None = None) -> Values:
    array = np.asarray(data)
    if dtype is None:
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
    return Values(array, dtype or str(array.dtype))


def build_layer(**overrides: Any) -> NormLayer:
    """A healthy, trained BatchNorm of 16 channels as a module pickle would give it, with `overrides`.

    Tensors may be given as anything numpy takes; None removes one."""
    kind = overrides.get("kind", NormKind.BATCH)
    channels = overrides.pop("channels", 16)
    spread = np.linspace(0.0, 1.0, channels)
    fields: dict[str, Any] = {
        "name": "layer1.0.bn1",
        "kind": kind,
        "channels": channels,
        "weight": 0.6 + 0.8 * spread,
        "bias": 0.3 - 0.5 * spread,
        "eps": 1e-5,
        "training": False,
        "affine": True,
    }
    if kind in (NormKind.BATCH,):
        fields |= {
            "running_mean": 0.4 * np.cos(7.0 * spread),
            "running_var": 0.3 + 1.7 * spread,
            "num_batches_tracked": 5000,
            "momentum": 0.1,
            "track_running_stats": True,
        }
    fields |= overrides
    fields.setdefault("path", fields["name"])
    for name in TENSORS:
        tensor = fields.get(name)
        if tensor is not None and not isinstance(tensor, Values):
            fields[name] = values(tensor)
    return NormLayer(**fields)


@pytest.fixture
def make_layer() -> Callable[..., NormLayer]:
    return build_layer


@pytest.fixture(scope="session")
def make_any_layer() -> Callable[..., NormLayer]:
    """make_layer for fixtures and property tests, which outlive a single test."""
    return build_layer


@pytest.fixture(scope="session")
def nets() -> ModuleType:
    """fixtures/nets.py under the name that the pickled fixtures know it by."""
    if "nets" not in sys.modules:
        path = Path(__file__).parents[1] / "fixtures" / "nets.py"
        spec = importlib.util.spec_from_file_location("nets", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["nets"] = module
        spec.loader.exec_module(module)
    return sys.modules["nets"]


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in a process of its own, by default in the folder of the fixtures."""

    def run(*arguments: object, cwd: Path = FIXTURES, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        return subprocess.run(
            [sys.executable, "-m", "normdoctor", *map(str, arguments)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=cwd,
            env=clean | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | environment,
            timeout=120,
        )

    return run
