"""Records and reports for the tests of rules, made in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from normdoctor.compared import Comparison
from normdoctor.findings import Report
from normdoctor.layers import Checkpoint, Container, LoadCall, Model, NormLayer
from normdoctor.measured import Measurement
from normdoctor.rules import RULES
from normdoctor.rules.runner import Settings, examine

Judge = Callable[..., Report]
Build = Callable[..., NormLayer]


@pytest.fixture(scope="session")
def build(make_any_layer: Build) -> Build:
    """make_layer, where a tensor given as {channel: value} changes just these channels of the healthy one.

    dtypes={"weight": "float16"} makes a tensor claim another type."""

    def make(**overrides: Any) -> NormLayer:
        dtypes: Mapping[str, str] = overrides.pop("dtypes", {})
        changes = {n: given for n, given in overrides.items() if isinstance(given, dict) and n != "stored_names"}
        plain = {name: given for name, given in overrides.items() if name not in changes}
        healthy = make_any_layer(**plain)
        for name, given in changes.items():
            array = getattr(healthy, name).numpy().copy()
            for channel, value in given.items():
                array[channel] = value
            plain[name] = array
        layer = make_any_layer(**plain)
        retyped = {name: replace(getattr(layer, name), dtype=dtype) for name, dtype in dtypes.items()}
        return replace(layer, **retyped) if retyped else layer

    return make


@pytest.fixture(scope="session")
def judge(build: Build) -> Judge:
    """Layers (as overrides, or ready) → the Report of all rules, or of those named, on one model of them."""

    def examined(
        *layers: Mapping[str, Any] | NormLayer,
        codes: Iterable[str] | None = None,
        averaged: str | None = None,
        load_calls: tuple[LoadCall, ...] = (),
        measurement: Measurement | None = None,
        comparison: Comparison | None = None,
        wanted: Callable[[NormLayer], bool] = lambda layer: True,
        path: str = "model.pt",
        **settings: Any,
    ) -> Report:
        made = []
        for index, given in enumerate(layers):
            if not isinstance(given, NormLayer):
                given = build(**({"name": f"bn{index}"} if len(layers) > 1 else {}) | dict(given))
            made.append(given)
        checkpoint = Checkpoint(
            path=path,
            format="in memory",
            container=Container.ZIP,
            models=(Model(key=None, layers=tuple(made), averaged=averaged, measurement=measurement),),
            load_calls=load_calls,
            comparison=comparison,
        )
        rules = [rule for rule in RULES if codes is None or rule.code in codes]
        return examine(checkpoint, rules, Settings(**settings), wanted)

    return examined


@pytest.fixture(scope="session")
def trained() -> Callable[..., Any]:
    """torch's own BatchNorm1d after `updates` batches, with the given channels constant all the time."""
    import torch

    def run(
        *,
        momentum: float | None = 0.1,
        updates: int = 100,
        channels: int = 16,
        constant: tuple[int, ...] = (),
        seed: int = 0,
        scale: float = 1.0,
        batch: int = 8,
    ) -> torch.nn.BatchNorm1d:
        generator = torch.Generator().manual_seed(seed)
        norm = torch.nn.BatchNorm1d(channels, momentum=momentum)
        with torch.no_grad():
            norm.weight += 0.2 * torch.randn(channels, generator=generator)
            norm.bias += 0.2 * torch.randn(channels, generator=generator)
            spread = scale * (0.5 + torch.rand(channels, generator=generator))
            for _ in range(updates):
                batch_of = torch.randn(batch, channels, generator=generator) * spread + spread
                batch_of[:, list(constant)] = 0.25
                norm(batch_of)
        return norm.eval()

    return run


@pytest.fixture(scope="session")
def as_overrides() -> Callable[[Any], dict[str, Any]]:
    """What a module pickle says of one of torch's BatchNorms."""

    def of(norm: Any) -> dict[str, Any]:
        return {
            "channels": norm.num_features,
            "weight": norm.weight.detach().numpy(),
            "bias": norm.bias.detach().numpy(),
            "running_mean": norm.running_mean.numpy().copy(),
            "running_var": norm.running_var.numpy().copy(),
            "num_batches_tracked": np.int64(int(norm.num_batches_tracked)),
            "eps": norm.eps,
            "momentum": "cumulative" if norm.momentum is None else norm.momentum,
            "training": norm.training,
        }

    return of
