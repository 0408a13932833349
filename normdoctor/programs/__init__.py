"""Exported programs and TorchScript as modules of Python, whose norms can be stopped at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Unrolled:
    """A program whose every step is a call of Python's, in one thread, its norms modules of their own."""

    module: Any
    """nn.Module, called like the original, in eval mode. It shares all tensors with the original but those of the
    norms."""
    norms: Mapping[str, Any]
    """Name of a layer → its `with_torch.Norm`, called as a module; it may be called several times."""
    left: Mapping[str, str]
    """The layers with running statistics that are no such module → why."""
    fixed_batch: int | None = None
    """How many samples a batch must have; None where that is free."""
    smallest_batch: int = 1
    largest_batch: int | None = None
    notes: tuple[str, ...] = ()
