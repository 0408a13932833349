"""New values into the buffers of a live module."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from normdoctor.errors import RefusedError
from normdoctor.layers import Checkpoint
from normdoctor.readers.arrays import decode
from normdoctor.readers.live_module import LiveArray
from normdoctor.recalibration.write_back import Change, check_unshared, encode_checked


def assign(checkpoint: Checkpoint, changes: Sequence[Change]) -> None:
    """Overwrite the buffers in place, in their own type and on their own device; all of them or none.

    Raises RefusedError where write_back would, and for tensors made in inference mode."""
    check_unshared(changes, checkpoint.list_references())
    prepared = []
    for change in changes:
        array = change.array
        assert isinstance(array, LiveArray)
        if array.tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RefusedError(
                f"{change.layer.name}.{change.field}: was made in inference mode and cannot be changed outside",
                "Call recalibrate under torch.inference_mode(), or clone the buffers.",
            )
        values = torch.from_numpy(decode(encode_checked(change), array.dtype).copy())
        prepared.append((array.tensor, values.reshape(array.shape)))
    with torch.no_grad():
        for tensor, values in prepared:
            tensor.copy_(values)
