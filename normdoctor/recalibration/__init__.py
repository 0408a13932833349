"""`recalibrate`: running statistics that fit the weights again, written back without touching anything else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normdoctor.errors import NormDoctorError, UsageError, did_you_mean
from normdoctor.findings import repaired_path
from normdoctor.layers import Container
from normdoctor.measurement.processes import ALONE, Processes
from normdoctor.processes import are_several
from normdoctor.readers import open_checkpoint
from normdoctor.readers.folders import folder_of
from normdoctor.recalibration.records import METHODS, DebiasReport, MeasuredReport, Method, Recalibration
from normdoctor.selection import check_momentum, matches, several
from normdoctor.writing import check_output, replace_in_place, same_file

if TYPE_CHECKING:
    from normdoctor.measurement.lockstep import Progress

__all__ = ["DebiasReport", "MeasuredReport", "Recalibration", "recalibrate"]


def recalibrate(
    model: Any,
    data: Any = None,
    *,
    method: Method | None = None,
    output: str | Path | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    layer: str | Iterable[str] = (),
    samples: int | Literal["all"] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    scale: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    drop_nonfinite: bool = False,
    labels: str | Path | None = None,
    until: float | None = None,
    prior: float | None = None,
    trust: bool = False,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    key: str | None = None,
    device: str | None = None,
    memory: int | None = None,
    momentum: float | None = None,
    updates: int | None = None,
    keep_counters: bool = False,
    share_data: bool = False,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Recalibration:
    """Repair the running statistics of a checkpoint (into a copy) or of a live torch.nn.Module (in place).

    data: what the norms are to see: a path (.npy, .npz, .pt, .safetensors, a folder of images),
    "package.module:callable", or what such a callable gives (a tensor, an array, a loader, batches).
    method: "exact" (default), the self-consistent statistics of all data; "one-pass", as training mode sees the data,
    for more of it than can be held; "blend", stored statistics counted as `prior` samples mixed with those of the
    data; "debias", which needs no data: it takes the known share of initial 0 and 1 out of the buffers (rule S104).
    output: the repaired file, MODEL.recalibrated.EXT by default. in_place: the input is replaced, with a backup.
    layer: globs; only matching layers are changed. key: which model of the file.
    samples, batch_size, seed, scale, mean, std, image_size, drop_nonfinite, labels: see `DataOptions`.
    until: one-pass stops when the standard error of every mean is below this share of its standard deviation.
    trust: torch may load the file, which can run code in it. arch, arch_args: what builds the module of weights.
    device: where to run it. memory: bytes that activations may take; by default most of what is free.
    momentum, updates: of debias, where the file does not say them. keep_counters: leave num_batches_tracked, which is
    otherwise raised to where the residue of its momentum is below 1e-4, for what was repaired holds none.
    share_data: external data of an ONNX file that does not change is referred to, not copied.
    verify: run the result beside the original. force: write also what is significantly worse, or rests on too few
    samples. dry_run: measure and judge, write nothing. progress: hears (done, total, what).

    Raises VerificationError, with nothing written, where labels show that the result is significantly worse;
    RefusedError where the statistics would be wrong or cannot be measured, and where trust or an architecture is
    needed; InputError for what cannot be read or is not finite; UsageError for options and data that do not fit."""
    method = _method(method, data)
    if updates is not None and updates < 1:
        raise UsageError(f"updates must be at least 1, not {updates}")
    momentum = check_momentum(momentum)
    live = not isinstance(model, (str, Path))
    target = None if live or dry_run else _target(Path(model), output, in_place, overwrite)
    if live and (output is not None or in_place):
        raise UsageError("what is in memory is repaired in place", "Leave out output, and save it with torch.save.")
    for name, path in (("data", data), ("labels", labels)):
        if target is not None and isinstance(path, (str, Path)) and same_file(target, Path(path)):
            raise UsageError(f"{target}: is the --{name} file, which is never overwritten", "Choose another -o.")
    globs = several(layer)

    def work(target: Path | None, processes: Processes) -> DebiasReport | MeasuredReport:
        with open_checkpoint(model, cut_layers=True) as checkpoint:
            wanted = [found for found in checkpoint.layers if not globs or matches(found, globs)]
            if globs and not wanted:
                raise UsageError(f"no layer matches {', '.join(globs)}", "normdoctor inspect --all lists them.")
            if share_data and checkpoint.container is not Container.ONNX:
                raise UsageError("--share-data is for ONNX models with external data", "Leave it out.")
            if method == "debias":
                from normdoctor.recalibration.debiasing import debias

                return debias(
                    checkpoint,
                    wanted,
                    momentum=momentum,
                    updates=updates,
                    keep_counters=keep_counters,
                    output=target,
                    share_data=share_data,
                    dry_run=dry_run,
                )
            from normdoctor.measurement.calibration import calibration
            from normdoctor.recalibration.estimating import Order, estimate

            asked = calibration(
                data,
                samples=samples,
                batch_size=batch_size,
                seed=seed,
                scale=scale,
                mean=mean,
                std=std,
                image_size=image_size,
                drop_nonfinite=drop_nonfinite,
                labels=labels,
                trust=trust,
                arch=arch,
                arch_args=arch_args,
                key=key,
                device=device,
                progress=progress if processes.speaks else None,
            )
            order = Order(
                method=method,
                until=until,
                prior=prior,
                memory=memory,
                momentum=momentum,
                keep_counters=keep_counters,
                share_data=share_data,
                verify=verify,
                force=force,
                dry_run=dry_run,
            )
            return estimate(model, checkpoint, wanted, asked, order, target, processes)

    report: DebiasReport | MeasuredReport
    with _processes(method) as processes:
        if target is None or processes.rank:
            report = work(None, processes)
        elif in_place:
            made: list[DebiasReport | MeasuredReport] = []
            backup = replace_in_place(target, lambda path: made.append(work(path, processes)))
            report = replace(made[0], backup=str(backup))
        else:
            report = work(target, processes)
        speaks = processes.speaks
    if target is not None:
        report = replace(report, output=str(target))
    return Recalibration(
        source=report.source, method=method, report=report, path=target, module=model if live else None, speaks=speaks
    )


@contextmanager
def _processes(method: Method) -> Iterator[Processes]:
    """This process alone, or together with those that torchrun started beside it; an error of one is one of all."""
    if method == "debias" or not are_several(os.environ):
        yield ALONE
        return
    from normdoctor.processes.with_torch import open_processes

    with open_processes(os.environ) as processes:
        try:
            yield processes
        except NormDoctorError as error:
            error.told_elsewhere = not processes.speaks
            raise


def _method(method: Method | None, data: Any) -> Method:
    if method is None:
        if data is None:
            raise UsageError(
                "recalibrating needs data that the norms are to see",
                "Give --data FILE; or --method debias, which takes the initial 0 and 1 out of young buffers.",
            )
        return "exact"
    if method not in METHODS:
        raise UsageError(f"no method {method!r}", f"{did_you_mean(method, METHODS)}One of: {', '.join(METHODS)}.")
    if method == "debias" and data is not None:
        raise UsageError("--method debias needs no data", "Leave out --data, or --method.")
    if method != "debias" and data is None:
        raise UsageError(f"--method {method} needs --data", "Give a file, a folder of images or mypkg.data:loader.")
    return method


def _target(source: Path, output: str | Path | None, in_place: bool, overwrite: bool) -> Path:
    """Where the result goes. Raises UsageError where it cannot go there."""
    if output is not None and str(output) == "-":
        raise UsageError("-: a checkpoint is written to a file", "Give its name with -o, or leave -o out.")
    if in_place:
        if output is not None:
            raise UsageError("--in-place and -o exclude each other")
        return folder_of(source) or source
    folder = folder_of(source)
    named = folder if folder is None or folder.name not in ("", "..") else folder.resolve()
    target = repaired_path(named or source) if output is None else Path(output)
    check_output(target, folder or source, overwrite, folder=folder is not None)
    return target
