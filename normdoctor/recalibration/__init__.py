"""`recalibrate`: running statistics that fit the weights again, written back without touching anything else."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from normdoctor.errors import RefusedError, UsageError
from normdoctor.findings import repaired_path
from normdoctor.inspection import check_momentum, matches, several
from normdoctor.layers import TRACKING_KINDS, Checkpoint, Container, NormLayer
from normdoctor.readers import open_checkpoint
from normdoctor.readers.sharded import cut_layers
from normdoctor.recalibration.debias import Repair, Untouched, is_weak, plan
from normdoctor.rules.guards import exported
from normdoctor.rules.wording import plural
from normdoctor.writing import check_output

FOLDED = re.compile("folded already|folded in;")
"""How readers say of a file that its BatchNorms are gone."""

MARK = "debias"
"""Recorded in an ONNX file, which has no counter to show that it was debiased already."""


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """What was changed, in which layers, and where the result is."""

    source: str
    method: Literal["debias"]
    repairs: tuple[Repair, ...]
    untouched: tuple[Untouched, ...]
    notes: tuple[str, ...]
    """Values the caller gave that the file says itself, and what speaks against the repair or makes it useless."""
    recognisable: bool
    """Whether a second debias of the result would be refused: by its counters, or by the mark in an ONNX file."""
    path: Path | None = None
    """The repaired file, None for a live module."""
    module: Any = None
    """The repaired live module, the same object that was given."""


def recalibrate(
    model: Any,
    *,
    method: Literal["debias"],
    output: str | Path | None = None,
    momentum: float | None = None,
    updates: int | None = None,
    layer: str | Iterable[str] = (),
    keep_counters: bool = False,
    overwrite: bool = False,
) -> Recalibration:
    """Repair the running statistics of a checkpoint (into a copy) or of a live module (in place).

    method "debias" needs no data: it takes the known share of initial 0 and 1 out of the buffers (rule S104).
    output: the repaired file, MODEL.recalibrated.EXT by default; the input is never touched.
    momentum, updates: used where the file does not say them. Nothing is assumed for a write.
    layer: globs; only matching layers are changed.
    keep_counters: leave num_batches_tracked, which is otherwise raised to where the residue is below 1e-4, so
    that neither `inspect` nor a second debias takes the repaired buffers for biased ones.

    Raises RefusedError, with nothing written, where the arithmetic would be wrong; InputError for a file that
    cannot be read; UsageError for an output that exists."""
    if method != "debias":
        raise UsageError(f"no method {method!r}", "The only method is debias.")
    if updates is not None and updates < 1:
        raise UsageError(f"updates must be at least 1, not {updates}")
    momentum = check_momentum(momentum)
    target = None
    if output is not None and str(output) == "-":
        raise UsageError("-: a checkpoint is written to a file", "Give its name with -o, or leave -o out.")
    if isinstance(model, (str, Path)):
        target = repaired_path(Path(model)) if output is None else Path(output)
        check_output(target, Path(model), overwrite)
    elif output is not None:
        raise UsageError("what is in memory is repaired in place", "Leave out output, and save it with torch.save.")
    globs = several(layer)
    with open_checkpoint(model, cut_layers=True) as checkpoint:
        wanted = [found for found in checkpoint.layers if not globs or matches(found, globs)]
        if globs and not wanted:
            raise UsageError(f"no layer matches {', '.join(globs)}", "normdoctor inspect --all lists them.")
        _refuse_folder(checkpoint, wanted)
        _refuse_repetition(checkpoint)
        _refuse_what_is_folded(checkpoint)
        cut = cut_layers(checkpoint)
        repairs, untouched = plan(
            wanted, momentum=momentum, updates=updates, keep_counters=keep_counters, cut=cut.names
        )
        _write(checkpoint, repairs, target)
    return Recalibration(
        source=checkpoint.path,
        method=method,
        repairs=tuple(repairs),
        untouched=tuple(untouched),
        notes=(*(() if cut.names else cut.notes), *_unused(repairs, momentum, updates), *_doubts(repairs)),
        recognisable=checkpoint.container is Container.ONNX or all(repair.counter is not None for repair in repairs),
        path=target,
        module=model if target is None else None,
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


def _refuse_folder(checkpoint: Checkpoint, wanted: Iterable[NormLayer]) -> None:
    if checkpoint.container is not Container.FOLDER:
        return
    tracking = [layer.name for layer in wanted if layer.kind in TRACKING_KINDS]
    if not tracking:
        return  # nothing to debias, in one file or in several
    files = sorted({checkpoint.files[name] for name in tracking if name in checkpoint.files})
    spread = [name for name in tracking if name not in checkpoint.files]
    if files and not spread:
        others = f" (and {plural(len(files) - 1, 'more shard')})" if len(files) > 1 else ""
        way_out = f"Repair each shard by itself: normdoctor recalibrate {shlex.quote(files[0])} --method debias{others}"
    else:
        one_file = checkpoint.as_one_file.rpartition(" ")[2]
        why = f"{spread[0]} lies in more than one file. " if files else ""
        way_out = f"{why}First {checkpoint.as_one_file}; then: normdoctor recalibrate {one_file} --method debias"
    raise RefusedError(f"{checkpoint.path}: a checkpoint in several files is not written as a whole", way_out)


def _refuse_what_is_folded(checkpoint: Checkpoint) -> None:
    """A file whose BatchNorms went into its convolutions is named as that."""
    having = any(layer.running_mean is not None or layer.running_var is not None for layer in checkpoint.layers)
    if having or not any(FOLDED.search(note) for note in checkpoint.notes):
        return
    raise RefusedError(
        f"{checkpoint.path}: nothing to debias: no layer has running statistics; the BatchNorms are gone or folded "
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
            "A second debias would take out a residue that is gone.",
        )


def _write(checkpoint: Checkpoint, repairs: list[Repair], output: Path | None) -> None:
    if checkpoint.container is Container.MEMORY:
        from normdoctor.recalibration import with_torch

        with_torch.assign(checkpoint, repairs)
        return
    assert output is not None
    if checkpoint.container is Container.ONNX:
        from normdoctor.recalibration import with_onnx

        values = {
            repair.layer.name: {"running_mean": repair.running_mean, "running_var": repair.running_var}
            for repair in repairs
        }
        with_onnx.write_onnx(Path(checkpoint.path), output, values, MARK)
        return
    from normdoctor.recalibration.write_back import changes_of, write_back

    write_back(checkpoint, changes_of(repairs), output)
