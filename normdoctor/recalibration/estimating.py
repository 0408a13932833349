"""`recalibrate` with data: measure, judge, write."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from normdoctor.data.copies import digests
from normdoctor.data.dataset import Dataset, Part
from normdoctor.data.opening import open_data
from normdoctor.errors import InputError, RefusedError, UsageError, VerificationError
from normdoctor.layers import (
    DEFAULT_EPS,
    DEFAULT_MOMENTUM,
    TRACKING_KINDS,
    Checkpoint,
    Container,
    NormLayer,
    Vector,
    median,
)
from normdoctor.measured import Preprocessing
from normdoctor.measurement.calibration import Calibration
from normdoctor.measurement.lockstep import Tallies, exact, one_pass, stored_variance
from normdoctor.measurement.measuring import GLANCED_AT, count_batches, preparation, whole_batches
from normdoctor.measurement.memory import held_batches
from normdoctor.measurement.opening import Opened, open_walker
from normdoctor.measurement.processes import ALONE, Processes
from normdoctor.measurement.tally import Tally
from normdoctor.measurement.walks import Walker
from normdoctor.models.opening import layers_of
from normdoctor.moments import Moments
from normdoctor.readers import open_checkpoint
from normdoctor.recalibration.comparing import compare, said_of, worse
from normdoctor.recalibration.debias import NEGLIGIBLE
from normdoctor.recalibration.debiasing import refuse_what_is_folded
from normdoctor.recalibration.fitting import blend, residual
from normdoctor.recalibration.records import LayerChange, MeasuredReport, Method
from normdoctor.recalibration.write_back import Change, check_unshared
from normdoctor.recalibration.writing_back import write_changes
from normdoctor.rules.calibration_data import too_little_data
from normdoctor.rules.verdict import PREPARED_LIMITS
from normdoctor.rules.wording import plural
from normdoctor.writing import folder_beside

TOO_FEW = too_little_data.limits["least"]
"""Independent values per channel below which a variance is off by a quarter and more: refused."""

FAR_OFF = 1.0
"""Divergence at the first norm, in nats, that no staleness of its statistics brings about."""

DEFAULT_PRIOR = 16.0
"""Samples that stored statistics count for in a blend where nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be done with the data; see `recalibrate`."""

    method: Method
    until: float | None
    prior: float | None
    memory: int | None
    momentum: float | None
    keep_counters: bool
    share_data: bool
    verify: bool
    force: bool
    dry_run: bool

    def __post_init__(self) -> None:
        if self.until is not None and self.method != "one-pass":
            raise UsageError("--until is for --method one-pass", "Add it, or leave --until out.")
        if self.until is not None and not 0 < self.until < 1:
            raise UsageError(f"--until {self.until:g}: not a share between 0 and 1", "Write it like --until 0.01.")
        if self.prior is not None and self.method != "blend":
            raise UsageError("--prior is for --method blend", "Add it, or leave --prior out.")
        if self.prior is not None and not (math.isfinite(self.prior) and self.prior >= 0):
            raise UsageError(f"--prior {self.prior:g}: not a number of samples", "Give 0 or more.")
        if self.memory is not None and self.memory < 1:
            raise UsageError(f"--memory {self.memory}: not a number of bytes", "Write it like 4GB.")


def estimate(
    model: Any,
    checkpoint: Checkpoint,
    wanted: Sequence[NormLayer],
    asked: Calibration,
    order: Order,
    target: Path | None,
    processes: Processes = ALONE,
) -> MeasuredReport:
    """Measure the wanted norms of a checkpoint on data and write what they should hold to `target` (None: into the
    live module, or nowhere for a dry run, and in all processes but the first). See `recalibrate`."""
    others = {layer.name for layer in checkpoint.layers}.difference(
        layer.name for layer in layers_of(checkpoint, asked.run.key) or checkpoint.layers
    )
    tracking = [
        layer
        for layer in wanted
        if layer.kind in TRACKING_KINDS and layer.running_var is not None and layer.name not in others
    ]
    if not tracking:
        refuse_what_is_folded(checkpoint, "recalibrate")
        raise RefusedError(
            f"{checkpoint.path}: nothing to recalibrate: no BatchNorm with running statistics",
            "Norms without buffers (LayerNorm, GroupNorm) are the same in training and eval mode.",
        )
    with ExitStack() as stack:
        spill = stack.enter_context(_spilling(checkpoint, target))
        run = replace(asked.run, spill=spill, memory=order.memory)
        opened = stack.enter_context(open_walker(model, checkpoint, run))
        data = stack.enter_context(open_data(asked.source, asked.data, opened.wanted))
        job = _Job(checkpoint, opened, data, asked, order, {layer.name: layer for layer in tracking}, processes)
        return job.run(model, target)


@contextmanager
def _spilling(checkpoint: Checkpoint, target: Path | None) -> Iterator[Path | None]:
    """A folder for activations that do not fit into memory, for the format that can keep them there."""
    if checkpoint.container is not Container.ONNX:
        yield None
    elif target is not None:
        with folder_beside(target) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


@dataclass(eq=False)
class _Job:
    """One recalibration under way."""

    checkpoint: Checkpoint
    opened: Opened
    data: Dataset
    asked: Calibration
    order: Order
    wanted: dict[str, NormLayer]
    processes: Processes
    notes: list[str] = field(default_factory=list)

    def run(self, model: Any, target: Path | None) -> MeasuredReport:
        chosen = {name: layer for name, layer in self.wanted.items() if name in self.opened.walker.norms}
        left = {name: self.opened.walker.left.get(name, "is not in the model that runs") for name in self.wanted}
        if not chosen:
            reasons = "; ".join(dict.fromkeys(left.values()))
            raise RefusedError(
                f"{self.checkpoint.path}: none of {plural(len(left), 'norm')} can be recalibrated: {reasons}",
                "Recalibrate the model that the file was made from.",
            )
        tried = self._check_preparation()
        begin = time.perf_counter()
        tallies = self._measure(chosen)
        seconds = time.perf_counter() - begin
        self._check_batches(tallies)
        new = {name: self._settled(name, tallies.of[name]) for name in chosen if name in tallies.of}
        left = {name: why for name, why in left.items() if name not in chosen}
        left |= {name: "never reached with this data" for name in chosen if name not in new}
        if not new:
            raise RefusedError(
                f"{self.checkpoint.path}: the data never reaches a norm", "Check --data, and which way forward takes."
            )
        self._check_enough(new, tallies)
        rows = tuple(self._row(name, tallies.of[name], new[name]) for name in tallies.of if name in new)
        changes = self._changes(new)
        seen = [replace(self.wanted[name], measured=tallies.of[name].measured()) for name in new]
        report = MeasuredReport(
            source=self.checkpoint.path,
            format=self.checkpoint.format,
            method=self.order.method,
            data=self.data.words,
            samples=tallies.samples,
            batches=tallies.batches,
            stopped_early=tallies.stopped,
            prior=self._prior if self.order.method == "blend" else None,
            rows=rows,
            left=left,
            notes=(*self.opened.notes, *self.notes),
            options=self.asked.words,
            seconds=seconds,
            dry_run=self.order.dry_run,
        )
        report = replace(report, findings=said_of(report, None, self.checkpoint, seen, tried))
        if self.checkpoint.container is not Container.ONNX:  # there each norm gets tensors of its own
            check_unshared(changes, self.checkpoint.list_references())
        report = self._judged_and_written(model, report, new, seen, tried, changes, target)
        return replace(report, notes=(*report.notes, *self.data.notes))

    # measuring

    def _measure(self, chosen: Mapping[str, NormLayer]) -> Tallies:
        walker, progress = self.opened.walker, self.asked.progress
        try:
            if self.order.method == "one-pass":
                return one_pass(
                    walker,
                    whole_batches(self.data, self.opened.fixed_batch, self._part),
                    until=self.order.until,
                    only=chosen,
                    progress=progress,
                    total=count_batches(self.data, self.opened.fixed_batch or self.asked.data.batch_size),
                    processes=self.processes,
                )

            def settle(name: str, tally: Tally) -> tuple[Vector, Vector] | None:
                return self._settled(name, tally) if name in chosen else None

            batches = held_batches(self.opened, self.data, self.order.memory, self._part)
            tallies = exact(walker, batches, settle=settle, progress=progress, processes=self.processes)
            different = len(set().union(*self.processes.gather(digests(batches))))
            if 0 < different < tallies.samples:
                for tally in tallies.of.values():
                    tally.share_different = different / tallies.samples
                self.notes.append(f"only {different:,} of {tallies.samples:,} samples are different")
            return tallies
        finally:
            walker.restore()

    @property
    def _part(self) -> Part | None:
        """Which batches are this process's."""
        return None if self.processes.count == 1 else (self.processes.rank, self.processes.count)

    @property
    def _prior(self) -> float:
        return DEFAULT_PRIOR if self.order.prior is None else self.order.prior

    def _settled(self, name: str, tally: Tally) -> tuple[Vector, Vector]:
        """The new running_mean and running_var of a norm."""
        moments, ddof = tally.total(), self.opened.walker.ddof
        layer = self.wanted[name]
        if self.order.method == "blend":
            mean, var = layer.numbers.mean, layer.numbers.var
            assert mean is not None and var is not None
            return blend(mean, var, moments, prior=self._prior, samples=tally.samples, ddof=ddof)
        return moments.mean, stored_variance(moments, ddof)

    def _check_preparation(self) -> tuple[Preprocessing, ...]:
        """Raise RefusedError for data that is plainly prepared otherwise than for the training; what was tried."""
        batches = list(islice(whole_batches(self.data, self.opened.fixed_batch, self._part), GLANCED_AT))
        tried = preparation(self.opened, batches, self.asked.taken)
        if tried and not self.order.force and tried[0].divergence > FAR_OFF:
            best = min(tried[1:], key=lambda one: one.divergence)
            if best.divergence < PREPARED_LIMITS["explained"]:
                way = f"Add {best.options}" if best.options else "Prepare it so"
                raise RefusedError(
                    f"{self.data.words}: is not prepared as for the training: what the first norm sees is "
                    f"{tried[0].divergence:.3g} nats from its statistics as given, and {best.divergence:.2g} with it "
                    f"prepared otherwise: {best.words} (D608)",
                    f"{way}; or --force, where the statistics at the input are what is wrong.",
                )
        return tried

    def _check_batches(self, tallies: Tallies) -> None:
        if not tallies.batches:
            raise InputError(f"{self.data.words}: there are no samples", "Check --data.")
        if len(set(self.processes.gather(self.data.fingerprint))) > 1:
            raise InputError(
                f"{self.data.words}: gives other batches in each process",
                "It must give all of them the same ones in the same order, or those of a DistributedSampler.",
            )

    def _check_enough(self, new: Mapping[str, Any], tallies: Tallies) -> None:
        """Raise RefusedError for statistics of too few independent values. That they are few the report says."""
        values = {name: effective_values(tallies.of[name]) for name in new}
        name = min(values, key=lambda name: values[name])
        if values[name] < TOO_FEW and not self.order.force and self.order.method != "blend":
            raise RefusedError(
                f"{name}: saw {values[name]:.3g} independent values a channel in {plural(tallies.samples, 'sample')}, "
                f"too few for a variance ({TOO_FEW:g} at least, 450 and more to be sure)",
                "Give more data; --method blend mixes few samples with what is stored; --force writes it all the same.",
            )

    # what changes

    def _row(self, name: str, tally: Tally, new: tuple[Vector, Vector]) -> LayerChange:
        layer, (mean, var) = self.wanted[name], new
        old_mean, old_var = layer.numbers.mean, layer.numbers.var
        assert old_mean is not None and old_var is not None
        eps = layer.eps if layer.eps is not None and layer.eps > 0 else DEFAULT_EPS
        sound = np.isfinite(old_mean) & np.isfinite(old_var) & (old_var >= 0)
        with np.errstate(all="ignore"):
            shift = np.abs(mean - old_mean)[sound] / np.sqrt(old_var[sound] + eps)
            ratio = (var[sound] + eps) / (old_var[sound] + eps)
        error = tally.standard_error()
        return LayerChange(
            layer=name,
            channels=len(mean),
            broken=int((~sound).sum()),
            shift=median(shift) if shift.size else math.inf,
            worst_shift=float(shift.max()) if shift.size else math.inf,
            ratio=median(ratio) if ratio.size else math.inf,
            effective=None if error is None else effective_values(tally),
            standard_error=None if error is None else float(error.max()),
        )

    def _changes(self, new: Mapping[str, tuple[Vector, Vector]]) -> list[Change]:
        changes = []
        for name, (mean, var) in new.items():
            layer = self.wanted[name]
            changes.append(Change(layer, "running_mean", mean, for_all_names=True))
            changes.append(Change(layer, "running_var", var, for_all_names=True))
            counter = None if self.order.keep_counters else raised_counter(layer, self.order.momentum)
            if counter is not None:
                changes.append(Change(layer, "num_batches_tracked", np.array([counter]), for_all_names=True))
        return changes

    # judging and writing

    def _judged_and_written(
        self,
        model: Any,
        report: MeasuredReport,
        new: Mapping[str, tuple[Vector, Vector]],
        seen: Sequence[NormLayer],
        tried: Sequence[Preprocessing],
        changes: Sequence[Change],
        target: Path | None,
    ) -> MeasuredReport:
        mark = f"{self.order.method} {report.samples} samples"
        if target is None:
            report = self._judged(report, new, seen, tried, self.opened.walker, both=True)
            self.processes.barrier()
            if not self.order.dry_run and self.checkpoint.container is Container.MEMORY:
                write_changes(self.checkpoint, changes, None, mark)
            return report
        with folder_beside(target) as folder:
            first = folder / target.name
            notes = write_changes(self.checkpoint, changes, first, mark, share_data=False)
            if self.order.verify:
                with open_checkpoint(first) as written, open_walker(first, written, self.asked.run) as after:
                    report = self._judged(report, new, seen, tried, after.walker, both=False)
            self.processes.barrier()  # nothing gets its name where another process is gone
            alone = first.is_file() and len(list(folder.iterdir())) == 1
            if alone:
                from normdoctor.writing import replacing

                with replacing(target) as temporary:
                    first.replace(temporary)
        if not alone:  # a folder, or a model with data in other files, whose names go by where it lies
            notes = write_changes(self.checkpoint, changes, target, mark, share_data=self.order.share_data)
        return replace(report, notes=(*report.notes, *notes))

    def _judged(
        self,
        report: MeasuredReport,
        new: Mapping[str, tuple[Vector, Vector]],
        seen: Sequence[NormLayer],
        tried: Sequence[Preprocessing],
        after: Walker,
        *,
        both: bool,
    ) -> MeasuredReport:
        """The outputs before and after on the same batches, and how far each norm's inputs are from what it holds now.

        both: `after` is the walker of the original too, which gets the new statistics for it. Raises VerificationError
        where labels say that it is significantly worse, or outputs that were finite are not any more."""
        if not self.order.verify:
            return report
        judgement, inputs = compare(
            self.opened.walker,
            after,
            new if both else {},
            whole_batches(self.data, self.opened.fixed_batch, self._part),
            most=report.batches if report.stopped_early else None,
            total=count_batches(self.data, self.opened.fixed_batch or self.asked.data.batch_size),
            progress=self.asked.progress,
            processes=self.processes,
        )
        rows = tuple(self._with_residual(row, inputs.get(row.layer), new[row.layer]) for row in report.rows)
        report = replace(report, rows=rows, judgement=judgement)
        report = replace(report, findings=said_of(report, judgement, self.checkpoint, seen, tried))
        problem = None if self.order.force else worse(judgement)
        if problem is not None:
            raise VerificationError(
                f"{report.source}: {problem}",
                "Nothing was written. Is this the data the model is for? --method blend keeps more of what is stored; "
                "--force writes it all the same.",
                report,
            )
        return report

    def _with_residual(self, row: LayerChange, inputs: Moments | None, new: tuple[Vector, Vector]) -> LayerChange:
        if inputs is None:
            return row
        eps = self.wanted[row.layer].eps or DEFAULT_EPS
        found = residual(*new, inputs, ddof=self.opened.walker.ddof, eps=eps)
        return replace(
            row,
            residual_shift=float(np.abs(found.shift).max()),
            residual_ratio=float(np.abs(found.log_ratio).max()),
        )


def effective_values(tally: Tally) -> float:
    """Independent values per channel, the median over channels; 1 where a single sample tells nothing."""
    error = tally.standard_error()
    return 1.0 if error is None else median(1 / np.square(error))


def raised_counter(layer: NormLayer, momentum: float | None) -> int | None:
    """num_batches_tracked from which no residue of the initial values is left, None where it stays or there is none.

    As for debias: otherwise `inspect` would take the measured statistics for those of a young moving average. An
    averaged counter becomes a whole number."""
    if layer.num_batches_tracked is None:
        return None
    found = layer.momentum if layer.momentum is not None else momentum
    found = DEFAULT_MOMENTUM if found is None else found
    if not isinstance(found, float) or not 0 < found < 1:
        return None
    needed = math.floor(math.log(NEGLIGIBLE) / math.log1p(-found)) + 1
    updates = layer.numbers.updates
    if updates is None or updates < needed:
        return needed
    return None if updates.is_integer() else math.ceil(updates)
