"""What a model is run on: arrays in files, images in folders, batches of the user's own code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples, as they are given to a model."""

    args: tuple[Any, ...]
    """Arguments by place: numpy arrays from files, whatever the user's code gives otherwise (tensors)."""
    kwargs: dict[str, Any]
    """Arguments by name."""
    size: int
    """How many samples, the length of the first axis."""
    index: int
    """The place of the batch among all batches, from 0: moments are merged in this order."""
    labels: NDArray[np.int64] | None = None
    """The right classes, shape (size,)."""
