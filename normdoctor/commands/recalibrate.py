"""`normdoctor recalibrate`. 0: written, or a dry run. 1: significantly worse, nothing written. 2: could not do it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from normdoctor.commands import calibrating
from normdoctor.commands.calibrating import Given, parse_bytes
from normdoctor.commands.common import choice, complain, stdout
from normdoctor.commands.progress import progress
from normdoctor.errors import VerificationError

ESTIMATE, DEBIAS, RESULT = "The statistics", "Of --method debias", "The result"
"""The parts of the help."""


class Method(StrEnum):
    EXACT = "exact"
    ONE_PASS = "one-pass"
    BLEND = "blend"
    DEBIAS = "debias"


class RecalibrateFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"
    MARKDOWN = "markdown"


def recalibrate(
    file: Annotated[
        str, typer.Argument(metavar="MODEL", help="ONNX, .pt2, TorchScript, a pickled module, weights, a folder.")
    ],
    data: calibrating.DataOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The repaired file; MODEL.recalibrated.EXT by default.",
            show_default=False,
        ),
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace the input, and keep it as MODEL.bak.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and compare, write nothing.")] = False,
    method: Annotated[
        Method | None,
        choice(
            "--method",
            Method,
            "exact (default): self-consistent. one-pass: as training sees it, for much data. blend: few samples. "
            "debias: no data.",
            ESTIMATE,
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only layers of this name; repeatable.", rich_help_panel=ESTIMATE),
    ] = None,
    until: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="one-pass: stop at this standard error, in s.d.: 0.01.", rich_help_panel=ESTIMATE
        ),
    ] = None,
    prior: Annotated[
        float | None,
        typer.Option(metavar="N", help="blend: samples that what is stored counts for.", rich_help_panel=ESTIMATE),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For activations: 4GB; most of what is free.", rich_help_panel=ESTIMATE),
    ] = None,
    keep_counters: Annotated[
        bool,
        typer.Option("--keep-counters", help="Leave num_batches_tracked as it is.", rich_help_panel=ESTIMATE),
    ] = False,
    momentum: Annotated[
        float | None,
        typer.Option(metavar="M", help="momentum where the file does not say it.", rich_help_panel=DEBIAS),
    ] = None,
    updates: Annotated[
        int | None,
        typer.Option(metavar="N", help="Training steps where the file has no counter.", rich_help_panel=DEBIAS),
    ] = None,
    samples: calibrating.SamplesOption = None,
    batch_size: calibrating.BatchSizeOption = 32,
    seed: calibrating.SeedOption = 0,
    scale: calibrating.ScaleOption = None,
    mean: calibrating.MeanOption = None,
    std: calibrating.StdOption = None,
    image_size: calibrating.ImageSizeOption = None,
    drop_nonfinite: calibrating.DropOption = False,
    labels: calibrating.LabelsOption = None,
    trust: calibrating.TrustOption = False,
    arch: calibrating.ArchOption = None,
    arch_args: calibrating.ArchArgsOption = None,
    key: calibrating.KeyOption = None,
    device: calibrating.DeviceOption = None,
    share_data: Annotated[
        bool,
        typer.Option("--share-data", help="ONNX: refer to external data that stays the same.", rich_help_panel=RESULT),
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not run the result beside the original.", rich_help_panel=RESULT)
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Write also what is worse or rests on little data.", rich_help_panel=RESULT),
    ] = False,
    output_format: Annotated[
        RecalibrateFormat, choice("--format", RecalibrateFormat, "How to write the report.", RESULT)
    ] = RecalibrateFormat.CONSOLE,
    every_norm: Annotated[
        bool, typer.Option("--all", help="Show every norm in the table.", rich_help_panel=RESULT)
    ] = False,
) -> None:
    """Measure what every BatchNorm really sees and write it into its buffers; the input is never touched."""
    from normdoctor.recalibration import recalibrate as repair
    from normdoctor.reports import write_recalibration

    given = Given(
        data=data,
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
    )
    given.check_unused()
    failure = None
    report: Any
    try:
        with progress() as shown:
            result = repair(
                Path(file),
                method=None if method is None else method.value,
                output=output,
                in_place=in_place,
                overwrite=overwrite,
                layer=layer or (),
                until=until,
                prior=prior,
                memory=None if memory is None else parse_bytes(memory),
                momentum=momentum,
                updates=updates,
                keep_counters=keep_counters,
                share_data=share_data,
                verify=not no_verify,
                force=force,
                dry_run=dry_run,
                progress=shown,
                **given.parsed(),
            )
        report, speaks = result.report, result.speaks
    except VerificationError as error:
        report, failure, speaks = error.report, error, not error.told_elsewhere
    if speaks:
        with stdout() as stream:
            write_recalibration(report, output_format.value, stream, every_norm=every_norm)
        if failure is not None:
            complain(failure)
    if failure is not None:
        raise typer.Exit(1)
