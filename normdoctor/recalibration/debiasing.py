"""`recalibrate --method debias`: the repair of a whole checkpoint that needs no data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from normdoctor.errors import RefusedError
from normdoctor.layers import Checkpoint, Container, NormLayer
from normdoctor.readers.sharded import cut_layers
from normdoctor.recalibration.debias import Repair, is_weak, plan
from normdoctor.recalibration.records import DebiasReport
from normdoctor.recalibration.write_back import changes_of
from normdoctor.recalibration.writing_back import write_changes
from normdoctor.rules.guards import exported
from normdoctor.rules.wording import plural

FOLDED = re.compile("folded already|folded in;")
"""How readers say of a file that its BatchNorms are gone."""

MARK = "debias"
"""Recorded in an ONNX file, which has no counter to show that it was debiased already."""


def debias(
    checkpoint: Checkpoint,
    wanted: Sequence[NormLayer],
    *,
    momentum: float | None,
    updates: int | None,
    keep_counters: bool,
    output: Path | None,
    share_data: bool,
    dry_run: bool,
) -> DebiasReport:
    """Take the initial 0 and 1 out of the wanted layers, and write that (None: into the live module).

    Raises RefusedError, with nothing written, where the arithmetic would be wrong."""
    _refuse_repetition(checkpoint)
    refuse_what_is_folded(checkpoint, "debias")
    cut = cut_layers(checkpoint)
    repairs, untouched = plan(wanted, momentum=momentum, updates=updates, keep_counters=keep_counters, cut=cut.names)
    written: tuple[str, ...] = ("a dry run: nothing was written",)
    if not dry_run:
        written = write_changes(checkpoint, changes_of(repairs), output, MARK, share_data=share_data)
    return DebiasReport(
        source=checkpoint.path,
        repairs=tuple(repairs),
        untouched=tuple(untouched),
        notes=(
            *(() if cut.names else cut.notes),
            *_unused(repairs, momentum, updates),
            *_doubts(repairs),
            *written,
        ),
        recognisable=checkpoint.container is Container.ONNX or all(repair.counter is not None for repair in repairs),
    )


def _unused(repairs: list[Repair], momentum: float | None, updates: int | None) -> Iterator[str]:
    if momentum is not None and all(repair.momentum != momentum for repair in repairs):
        yield f"momentum {momentum:g} was not used: the file says {repairs[0].momentum:g}"
    if updates is not None and all(repair.updates != updates for repair in repairs):
        yield f"updates {updates:,} were not used: the file says {repairs[0].updates:,}"


def _doubts(repairs: Sequence[Repair]) -> Iterator[str]:
    weak = sum(map(is_weak, repairs))
    if weak:
        yield (
            f"in {weak} of {plural(len(repairs), 'layer')} the residue would be the smaller part of running_var: "
            "buffers computed anew over that many batches (update_bn, precise BN) look the same as residue; if these "
            "were, keep the original: compare the accuracy of both"
        )
    recorded = sum(repair.layer.training is True and exported(repair.layer) for repair in repairs)
    if recorded:
        were, use = ("1 layer was", "uses") if recorded == 1 else (f"{recorded:,} layers were", "use")
        yield (
            f"{were} recorded in training mode and {use} the batch at hand, whatever the buffers hold (C301): export "
            "again in eval mode"
        )


def refuse_what_is_folded(checkpoint: Checkpoint, method: str) -> None:
    """A file whose BatchNorms went into its convolutions is named as that."""
    having = any(layer.running_mean is not None or layer.running_var is not None for layer in checkpoint.layers)
    if having or not any(FOLDED.search(note) for note in checkpoint.notes):
        return
    raise RefusedError(
        f"{checkpoint.path}: nothing to {method}: no layer has running statistics; the BatchNorms are gone or folded "
        "into other layers, if there were any",
        "Repair the model that it was made from, then freeze or export that again.",
    )


def _refuse_repetition(checkpoint: Checkpoint) -> None:
    if checkpoint.container is not Container.ONNX:
        return
    from normdoctor.recalibration import with_onnx

    mark = with_onnx.recorded_mark(Path(checkpoint.path))
    if mark is not None:
        raise RefusedError(
            f"{checkpoint.path}: was recalibrated before ({mark})",
            "Debiasing it would take out a residue that is gone.",
        )
