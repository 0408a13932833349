"""A model with its stored and with its new statistics, run side by side on the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from normdoctor.data import Batch
from normdoctor.findings import Finding
from normdoctor.layers import Checkpoint, Model, NormLayer, Vector
from normdoctor.measured import Measurement, Preprocessing, Recalibrated
from normdoctor.measurement.lockstep import Progress, Tallies, as_stored
from normdoctor.measurement.processes import Processes
from normdoctor.measurement.walks import Look, Walker
from normdoctor.moments import Moments
from normdoctor.recalibration.judging import Judge, Judgement, Verdict, merged_judge
from normdoctor.recalibration.records import MeasuredReport
from normdoctor.rules.calibration_data import input_scale, recalibration_hurts, too_little_data
from normdoctor.rules.runner import examine


def compare(
    before: Walker,
    after: Walker,
    put: Mapping[str, tuple[Vector, Vector]],
    batches: Iterable[Batch],
    *,
    most: int | None,
    total: int | None,
    progress: Progress,
    processes: Processes,
) -> tuple[Judgement, dict[str, Moments]]:
    """The outputs of both on every batch, and what each norm of `after` has seen, in all processes together.

    put: new statistics, where `after` is the walker `before` itself. most: batches after which it is enough."""
    judge, tallies = Judge(), Tallies()
    try:
        for count, batch in enumerate(batches, 1):
            outputs = _outputs(before, batch)
            for name, (mean, var) in put.items():
                after.put(name, mean, var)
            judge.add(outputs, _outputs(after, batch, tallies), batch.labels)
            if put:
                before.restore()
            progress(count, total, "comparing")
            if count == most:
                break
    finally:
        before.restore()
    seen: dict[str, Moments] = {}
    for others in processes.gather({name: tally.total() for name, tally in tallies.of.items()}):
        for name, moments in others.items():
            seen[name] = seen[name] + moments if name in seen else moments
    return merged_judge(processes.gather(judge)).result(), seen


def _outputs(walker: Walker, batch: Batch, tallies: Tallies | None = None) -> dict[str, Any]:
    """What the model gives for a batch; tallies: where what its norms see is added to."""
    found: dict[str, Any] = {}
    as_stored(walker, [batch], Look(), outputs=lambda _, outputs: found.update(outputs), tallies=tallies)
    return found


def said_of(
    report: MeasuredReport,
    judgement: Judgement | None,
    checkpoint: Checkpoint,
    layers: Iterable[NormLayer],
    tried: Sequence[Preprocessing],
) -> tuple[Finding, ...]:
    """What rules say of new statistics: D606 of how much data they rest on, D608 of how that is prepared, D605 of
    what became of the outputs.

    layers: those that were measured, with what was seen of them. tried: other preparations of the data."""
    accuracy = None if judgement is None else judgement.accuracy
    entropy = None if judgement is None else judgement.entropy
    measurement = Measurement(
        data=report.data,
        samples=report.samples,
        batches=report.batches,
        order=tuple(row.layer for row in report.rows),
        accuracy=None if accuracy is None else accuracy.before,
        options=report.options,
        preprocessing=tuple(tried),
        recalibrated=Recalibrated(
            accuracy=None if accuracy is None else accuracy.after,
            p_value=None if accuracy is None else accuracy.p_value,
            entropy_before=None if entropy is None else entropy.before,
            entropy=None if entropy is None else entropy.after,
        ),
    )
    model = Model(key=None, layers=tuple(layers), measurement=measurement)
    return examine(replace(checkpoint, models=(model,)), [recalibration_hurts, too_little_data, input_scale]).findings


def worse(judgement: Judgement) -> str | None:
    """Why the result is not to be written; None where nothing speaks against it."""
    accuracy = judgement.accuracy
    if judgement.broken_after > judgement.broken_before:
        return f"{judgement.broken_after:,} outputs are NaN or infinite with the new statistics"
    if accuracy is not None and accuracy.verdict is Verdict.WORSE:
        return (
            f"significantly worse with the new statistics (D605): accuracy {accuracy.before:.2%} -> "
            f"{accuracy.after:.2%} (p {accuracy.p_value:.1g}, {accuracy.samples:,} samples)"
        )
    return None
