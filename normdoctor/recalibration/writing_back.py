"""New buffers into a copy of a checkpoint of any format, or into the buffers of a live module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normdoctor.layers import Checkpoint, Container
from normdoctor.recalibration.write_back import STATISTICS, Change


def write_changes(
    checkpoint: Checkpoint, changes: Sequence[Change], output: Path | None, mark: str, *, share_data: bool = False
) -> tuple[str, ...]:
    """Write the changes to `output`, whole or not at all; None: into the live module. Gives notes.

    mark: recorded in ONNX files, which have no counters. share_data: external data of ONNX that does not change is
    referred to, not copied. Raises RefusedError, before anything is written, where a value cannot be stored."""
    if checkpoint.container is Container.MEMORY:
        from normdoctor.recalibration import with_torch

        with_torch.assign(checkpoint, changes)
        return ()
    assert output is not None
    if checkpoint.container is Container.ONNX:
        from normdoctor.recalibration import with_onnx

        values: dict[str, dict[str, object]] = {}
        for change in changes:
            if change.field in STATISTICS:
                values.setdefault(change.layer.name, {})[change.field] = change.values
        with_onnx.write_onnx(Path(checkpoint.path), output, values, mark, share_data=share_data)  # type: ignore[arg-type]
        return ()
    if checkpoint.container is Container.FOLDER:
        from normdoctor.recalibration.folders import write_folder

        return write_folder(checkpoint, changes, output)
    from normdoctor.recalibration.write_back import write_back

    write_back(checkpoint, changes, output)
    return ()
