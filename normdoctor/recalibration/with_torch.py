"""Repairs into the buffers of a live module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from normdoctor.readers.live_module import LiveArray
from normdoctor.recalibration.debias import Repair


def assign(repairs: Iterable[Repair]) -> None:
    """Overwrite the buffers in place, in their own type and on their own device."""
    for repair in repairs:
        _fill(repair.layer.running_mean, torch.from_numpy(repair.running_mean))
        _fill(repair.layer.running_var, torch.from_numpy(repair.running_var))
        if repair.counter is not None:
            _fill(repair.layer.num_batches_tracked, torch.tensor(repair.counter))


def _fill(array: Any, values: torch.Tensor) -> None:
    assert isinstance(array, LiveArray)
    with torch.no_grad():
        array.tensor.copy_(values.reshape(array.tensor.shape))
