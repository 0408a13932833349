"""Records → text, in one file for each format. Renderers decide nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, TextIO

from normdoctor.findings import Survey

if TYPE_CHECKING:
    from normdoctor.folding.records import FoldReport
    from normdoctor.recalibration.records import DebiasReport, MeasuredReport


def write(
    survey: Survey,
    output_format: str,
    stream: TextIO,
    *,
    every_layer: bool = False,
    verbose: bool = False,
    statistics: bool = False,
) -> None:
    """Write the survey to `stream` in a format, which is the name of a module here.

    every_layer, verbose, statistics: what the console shows; the other formats always hold everything."""
    if output_format != "console":
        stream.write(import_module(f"normdoctor.reports.{output_format}").render(survey))
        return
    from normdoctor.reports import console

    if statistics:
        console.render_statistics(survey, stream)
    else:
        console.render(survey, stream, every_layer=every_layer, verbose=verbose)


def write_folding(report: FoldReport, output_format: str, stream: TextIO, *, every_norm: bool = False) -> None:
    """Write what a fold did: console, json or markdown.

    every_norm: what the console shows; the other formats always hold everything."""
    if output_format != "console":
        stream.write(import_module(f"normdoctor.reports.folding_{output_format}").render(report))
        return
    from normdoctor.reports import folding_text

    folding_text.write(report, stream, every_norm=every_norm)


def write_recalibration(
    report: DebiasReport | MeasuredReport, output_format: str, stream: TextIO, *, every_norm: bool = False
) -> None:
    """Write what a recalibration changed: console, json or markdown.

    every_norm: what the console shows; the other formats always hold everything."""
    if output_format != "console":
        stream.write(import_module(f"normdoctor.reports.recalibration_{output_format}").render(report))
        return
    from normdoctor.reports import recalibration_text

    recalibration_text.write(report, stream, every_norm=every_norm)
