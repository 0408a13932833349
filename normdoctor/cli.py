"""The command line: options → one API call → one renderer → an exit code.

0: nothing at or above --fail-on. 1: findings at or above it. 2: could not do it. 2 wins over 1 wins over 0.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from normdoctor import __version__
from normdoctor.errors import NormDoctorError, UsageError

if TYPE_CHECKING:
    from normdoctor.findings import Failure, Report, Survey

# What each command needs is imported inside it: --help and errors must not pay for numpy or rich tables.

app = typer.Typer(
    name="normdoctor",
    help="Inspect, judge and repair the norm layers of trained PyTorch and ONNX models.",
    epilog="Exit codes: 0 fine, 1 findings at or above --fail-on, 2 could not do it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class InspectFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"


class ListFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"
    MARKDOWN = "markdown"


class FailOn(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    NEVER = "never"


class TargetPrecision(StrEnum):
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class Method(StrEnum):
    DEBIAS = "debias"


def main() -> None:
    """The console script."""
    try:
        app()
    except NormDoctorError as error:
        complain(error)
        sys.exit(2)


def complain(error: NormDoctorError | Failure) -> None:
    """The error and its hint, on stderr."""
    from normdoctor.reports.text import printable

    line = f"normdoctor: {printable(error.message)}"
    with suppress(OSError):  # nobody reads stderr; the exit code still tells
        print(line + (f"\n  hint: {printable(error.hint)}" if error.hint else ""), file=sys.stderr, flush=True)


@contextmanager
def stdout() -> Iterator[TextIO]:
    """sys.stdout to write to. A reader that stops early (| head) is no failure; a full disk is."""
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise NormDoctorError(f"the output cannot be written ({error.strerror or error})", "") from None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normdoctor {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command()
def inspect(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Model files; the content decides the format.")
    ],
    output_format: Annotated[
        InspectFormat, typer.Option("--format", help="How to write the report.")
    ] = InspectFormat.CONSOLE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the report here instead of stdout.")
    ] = None,
    select: Annotated[
        str, typer.Option(metavar="CODES", help="Only these rules: S,A2,S104 (beginnings of codes).")
    ] = "",
    ignore: Annotated[str, typer.Option(metavar="CODES", help="Not these rules.")] = "",
    layer: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only layers of this name; repeatable.")
    ] = None,
    fail_on: Annotated[FailOn, typer.Option(help="Exit with 1 from this severity upward.")] = FailOn.ERROR,
    eps: Annotated[float | None, typer.Option(help="eps where the file does not say it.")] = None,
    momentum: Annotated[float | None, typer.Option(help="momentum where the file does not say it.")] = None,
    no_assume: Annotated[
        bool, typer.Option("--no-assume", help="Skip rather than assume torch's default eps and momentum.")
    ] = False,
    target: Annotated[
        TargetPrecision | None, typer.Option(help="Judge the numbers for this precision as well.")
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE.NAME=VALUE", help="Set a rule's threshold, as S104.error=0.2; repeatable."),
    ] = None,
    every_layer: Annotated[bool, typer.Option("--all", help="Show every layer in the table.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="List skips, tied layers and tensors not taken for norms.")
    ] = False,
) -> None:
    """Judge every norm layer of model files. Nothing in a file is executed; torch is not imported."""
    from normdoctor import inspection
    from normdoctor.findings import Failure, Survey

    limits = parse_thresholds(threshold or [])
    selected, ignored = split_codes(select), split_codes(ignore)
    inspection.choose_rules(selected, ignored)  # a misspelt option stops before any file is read
    inspection.checked_limits(limits)
    if output == Path("-"):
        output = None
    if output is not None:
        from normdoctor.writing import check_text_output

        check_text_output(output, files)
    reports: list[Report] = []
    failures: list[Failure] = []
    for path in files:
        try:
            reports.append(
                inspection.inspect(
                    path,
                    select=selected,
                    ignore=ignored,
                    layer=layer or (),
                    eps=eps,
                    momentum=momentum,
                    assume=not no_assume,
                    target=target.value if target else None,
                    limits=limits,
                )
            )
        except UsageError:
            raise
        except NormDoctorError as error:
            failures.append(Failure(path=str(path), message=error.message, hint=error.hint))
    if layer and reports and not any(report.layers for report in reports) and any(r.layers_in_file for r in reports):
        raise UsageError(
            f"no layer matches {', '.join(layer)}",
            "normdoctor inspect --all lists the layers; quote a glob: 'layer4.*'",
        )
    survey = Survey(reports=tuple(reports), failures=tuple(failures))
    if reports or output_format is InspectFormat.JSON:
        write_survey(survey, output_format, output, every_layer, verbose)
    for failure in failures:
        complain(failure)
    raise typer.Exit(2 if failures else exit_code(survey, fail_on))


def split_codes(codes: str) -> list[str]:
    return [code for code in codes.split(",") if code.strip()]


def parse_thresholds(items: list[str]) -> dict[str, dict[str, float]]:
    """["S104.error=0.2"] → {"S104": {"error": 0.2}}."""
    limits: dict[str, dict[str, float]] = {}
    for item in items:
        key, _, value = item.partition("=")
        code, _, name = key.partition(".")
        try:
            if not name.strip():
                raise ValueError
            limits.setdefault(code.strip(), {})[name.strip()] = float(value)
        except ValueError:
            raise UsageError(
                f"--threshold {item!r} is not CODE.NAME=VALUE", "Example: --threshold S104.error=0.2"
            ) from None
    return limits


def write_survey(
    survey: Survey, output_format: InspectFormat, output: Path | None, every_layer: bool, verbose: bool
) -> None:
    import io

    if output_format is InspectFormat.CONSOLE and output is None:
        from normdoctor.reports import console

        with stdout() as stream:
            console.render(survey, stream, every_layer=every_layer, verbose=verbose)
        return
    if output_format is InspectFormat.JSON:
        from normdoctor.reports import json

        text = json.render(survey)
    else:
        from normdoctor.reports import console

        buffer = io.StringIO()
        console.render(survey, buffer, every_layer=every_layer, verbose=verbose)
        text = buffer.getvalue()
    if output is None:
        with stdout() as stream:
            stream.write(text)
        return
    from normdoctor.writing import replacing

    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def exit_code(survey: Survey, fail_on: FailOn) -> int:
    from normdoctor.findings import Severity

    if fail_on is FailOn.NEVER or survey.worst is None:
        return 0
    return int(survey.worst >= Severity[fail_on.name])


@app.command()
def rules(
    output_format: Annotated[ListFormat, typer.Option("--format", help="How to write the list.")] = ListFormat.CONSOLE,
) -> None:
    """List every rule: code, name, severity and what it says."""
    from normdoctor.reports import rule_book

    with stdout() as stream:
        if output_format is ListFormat.JSON:
            stream.write(rule_book.as_json())
        elif output_format is ListFormat.MARKDOWN:
            stream.write(rule_book.as_markdown())
        else:
            rule_book.write_table(stream)


@app.command()
def explain(
    code: Annotated[str, typer.Argument(help="A rule's code or name: S104, warmup-residue.")],
) -> None:
    """Explain one rule: what it means, when it is harmless, what to do, where it comes from."""
    from normdoctor.inspection import find_rule
    from normdoctor.reports import rule_book

    rule = find_rule(code)
    with stdout() as stream:
        rule_book.write_explanation(rule, stream)


@app.command()
def recalibrate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint whose running statistics are off.")],
    method: Annotated[Method, typer.Option(help="debias: take the initial 0 and 1 out of the buffers; needs no data.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The repaired file; FILE.recalibrated.EXT by default.")
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="momentum where the file does not say it.")] = None,
    updates: Annotated[int | None, typer.Option(help="Training steps, where the file has no counter (ONNX).")] = None,
    layer: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only layers of this name; repeatable.")
    ] = None,
    keep_counters: Annotated[bool, typer.Option("--keep-counters", help="Leave num_batches_tracked as it is.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Repair running statistics into a copy of the file; the input is never touched."""
    from normdoctor.recalibration import recalibrate as repair
    from normdoctor.reports import repair_text

    result = repair(
        file,
        method="debias",
        output=output,
        momentum=momentum,
        updates=updates,
        layer=layer or (),
        keep_counters=keep_counters,
        overwrite=overwrite,
    )
    with stdout() as stream:
        repair_text.write(result, stream)
