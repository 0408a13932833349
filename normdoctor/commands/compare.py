"""`normdoctor compare`. 0: nothing at or above --fail-on. 1: findings at or above it. 2: could not do it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normdoctor.commands.common import choice, written
from normdoctor.commands.inspect import (
    GATE,
    JUDGED,
    OUTPUT,
    FailOn,
    InspectFormat,
    exit_code,
    parse_thresholds,
    split_codes,
)


def compare(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE...",
            help="Before and after, epochs in their order, or the ranks of one run; or a folder or glob of them.",
        ),
    ] = None,
    in_file: Annotated[
        bool, typer.Option("--in-file", help="Compare the models inside one file: weights and their EMA.")
    ] = False,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="Which model of files that hold several.")] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="CODES", help="Only these rules: X001,X003.", rich_help_panel=JUDGED),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="CODES", help="Not these rules.", rich_help_panel=JUDGED)
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only layers of this name; repeatable.", rich_help_panel=JUDGED),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(metavar="EPS", help="eps where a file does not say it.", rich_help_panel=JUDGED),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE.NAME=X", help="Set a rule's threshold, as X002.noise=0.1; repeatable.", rich_help_panel=JUDGED
        ),
    ] = None,
    output_format: Annotated[
        InspectFormat, choice("--format", InspectFormat, "How to write the report.", OUTPUT)
    ] = InspectFormat.CONSOLE,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the report here, not to stdout.", rich_help_panel=OUTPUT
        ),
    ] = None,
    every_layer: Annotated[
        bool, typer.Option("--all", help="Show every layer in the table.", rich_help_panel=OUTPUT)
    ] = False,
    fail_on: Annotated[
        FailOn, choice("--fail-on", FailOn, "Exit with 1 from this severity upward (error).", GATE)
    ] = FailOn.ERROR,
) -> None:
    """Compare the norms of two or more checkpoints of one network: what moved, what stood still, what is stale."""
    from normdoctor import comparison, reports
    from normdoctor.findings import Survey

    models = comparison.expanded(files or [])
    output = None if output == Path("-") else output
    if output is not None:
        from normdoctor.writing import check_text_output

        check_text_output(output, map(Path, models))
    report = comparison.compare(
        *models,
        in_file=in_file,
        key=key,
        select=split_codes(select) if select else (),
        ignore=split_codes(ignore) if ignore else (),
        layer=layer or [],
        eps=eps,
        limits=parse_thresholds(threshold) if threshold else None,
    )
    survey = Survey(reports=(report,))
    with written(output) as stream:
        reports.write(survey, output_format, stream, every_layer=every_layer)
    raise typer.Exit(exit_code(survey, fail_on.value))
