"""The command line: options → one API call → one renderer → an exit code.

0: nothing at or above --fail-on. 1: findings at or above it, or a fold whose proof failed. 2: could not do it.
2 wins over 1 wins over 0.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normdoctor import __version__
from normdoctor.commands.common import choice, complain, note, stdout, written
from normdoctor.commands.fold import fold
from normdoctor.errors import NormDoctorError, UsageError

if TYPE_CHECKING:
    from normdoctor.configuration import Configuration
    from normdoctor.findings import Survey

# What each command needs is imported inside it: --help and errors must not pay for numpy or rich tables.

app = typer.Typer(
    name="normdoctor",
    help="Inspect, judge, repair and fold the norm layers of trained PyTorch and ONNX models.",
    epilog="Exit codes: 0 fine, 1 findings at or above --fail-on or a failed proof, 2 could not do it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


JUDGED, OUTPUT, GATE = "What is judged", "The report", "In CI"
"""The parts of the help of `inspect`."""


class InspectFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"
    SARIF = "sarif"
    MARKDOWN = "markdown"
    GITHUB = "github"
    CSV = "csv"


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
        list[str] | None,
        typer.Argument(metavar="FILE...", help="Model files, folders and globs; the content decides the format."),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODES", help="Only these rules: S,A2,S104 (beginnings of codes).", rich_help_panel=JUDGED
        ),
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
        typer.Option(metavar="EPS", help="eps where the file does not say it.", rich_help_panel=JUDGED),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(metavar="M", help="momentum where the file does not say it.", rich_help_panel=JUDGED),
    ] = None,
    no_assume: Annotated[
        bool,
        typer.Option(
            "--no-assume", help="Skip rather than assume torch's default eps and momentum.", rich_help_panel=JUDGED
        ),
    ] = False,
    target: Annotated[
        TargetPrecision | None,
        choice("--target", TargetPrecision, "Judge the numbers for this precision as well.", JUDGED),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE.NAME=X", help="Set a rule's threshold, as S104.error=0.2; repeatable.", rich_help_panel=JUDGED
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
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="List skips, tied layers and tensors not taken for norms.", rich_help_panel=OUTPUT
        ),
    ] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Only how often each rule fired.", rich_help_panel=OUTPUT)
    ] = False,
    fail_on: Annotated[
        FailOn | None, choice("--fail-on", FailOn, "Exit with 1 from this severity upward (error).", GATE)
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Findings listed here are known and do not count.", rich_help_panel=GATE),
    ] = None,
    write_baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what is found as a baseline, and exit with 0.", rich_help_panel=GATE),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Settings; else the nearest normdoctor.toml or pyproject.toml.", rich_help_panel=GATE
        ),
    ] = None,
    no_settings: Annotated[
        bool, typer.Option("--no-settings", help="Read no settings file.", rich_help_panel=GATE)
    ] = False,
    show_settings: Annotated[
        bool,
        typer.Option("--show-settings", help="Show the settings that hold and their origin.", rich_help_panel=GATE),
    ] = False,
    jobs: Annotated[
        int,
        typer.Option("--jobs", "-j", metavar="N", help="Examine N files at once; 0: all cores.", rich_help_panel=GATE),
    ] = 1,
) -> None:
    """Judge every norm layer of model files. Nothing in a file is executed; torch is not imported."""
    from normdoctor import configuration

    if settings is not None and no_settings:
        raise UsageError("--settings and --no-settings exclude each other")
    found = settings or (None if no_settings else configuration.find(Path.cwd()))
    config = (configuration.read(found) if found else configuration.Configuration()).with_options(
        select=("--select", split_codes(select) if select else None),
        ignore=("--ignore", split_codes(ignore) if ignore else None),
        fail_on=("--fail-on", fail_on and fail_on.value),
        eps=("--eps", eps),
        momentum=("--momentum", momentum),
        assume=("--no-assume", False if no_assume else None),
        target=("--target", target and target.value),
        thresholds=("--threshold", parse_thresholds(threshold) if threshold else None),
        baseline=("--baseline", baseline),
    )
    if show_settings:
        with stdout() as stream:
            stream.write(config.as_toml())
        return
    if not files:
        raise UsageError("name at least one model file", "normdoctor inspect model.pt")
    if statistics and output_format not in (InspectFormat.CONSOLE, InspectFormat.JSON):
        raise UsageError(f"--statistics is not for {output_format}", "Use console, or json (summary.rules).")
    output = None if output == Path("-") else output
    if output is not None:
        from normdoctor.writing import check_text_output

        check_text_output(output, map(Path, files))
    survey = examined(files, config, layer or [], jobs, write_baseline)
    if write_baseline is not None:
        accept(survey, write_baseline)
    elif survey.reports or output_format is not InspectFormat.CONSOLE:
        from normdoctor import reports

        with written(output) as stream:
            reports.write(
                survey, output_format, stream, every_layer=every_layer, verbose=verbose, statistics=statistics
            )
    if survey.passed_over:
        noun = "file holds" if survey.passed_over == 1 else "files hold"
        note(f"{survey.passed_over:,} other {noun} no model: passed over")
    for failure in survey.failures:
        complain(failure)
    raise typer.Exit(exit_code(survey, "never" if write_baseline else config.fail_on))


def split_codes(given: list[str]) -> tuple[str, ...]:
    """["S,A2", "C3"] → ("S", "A2", "C3")."""
    return tuple(code for codes in given for code in codes.split(","))


def parse_thresholds(items: list[str]) -> dict[str, dict[str, float]]:
    """["S104.error=0.2"] → {"S104": {"error": 0.2}}."""
    limits: dict[str, dict[str, float]] = {}
    for item in items:
        key, _, value = item.partition("=")
        code, _, name = key.partition(".")
        try:
            if not name.strip():
                raise ValueError
            limits.setdefault(code.strip().upper(), {})[name.strip()] = float(value)
        except ValueError:
            raise UsageError(
                f"--threshold {item!r} is not CODE.NAME=VALUE", "Example: --threshold S104.error=0.2"
            ) from None
    return limits


def examined(
    files: list[str], config: Configuration, layer: list[str], jobs: int, write_baseline: Path | None
) -> Survey:
    """All files judged as the settings say, against the baseline if there is one."""
    from normdoctor import baseline, inspection

    accepted = baseline.read(config.baseline) if config.baseline and not write_baseline else None
    survey = inspection.survey(
        files,
        jobs=jobs,
        select=config.select,
        ignore=config.ignore,
        layer=layer,
        per_layer_ignores=config.per_layer_ignores,
        eps=config.eps,
        momentum=config.momentum,
        assume=config.assume,
        target=config.target,
        limits=config.thresholds,
    )
    for sentence in inspection.layers_not_found(config.per_layer_ignores, survey) if not layer else ():
        note(sentence)
    if accepted is None:
        return survey
    chosen = {rule.code for rule in inspection.choose_rules(config.select, config.ignore)}
    return baseline.compare(
        survey,
        accepted,
        lambda code, name: code in chosen and (not layer or any(fnmatchcase(name, glob) for glob in layer)),
    )


def accept(survey: Survey, path: Path) -> None:
    """Write the baseline, unless a file is missing from it."""
    from normdoctor import baseline

    if survey.failures:
        note(f"{path}: not written, since not every file could be examined")
        return
    from normdoctor.reports.wording import plural

    count = baseline.write(survey, path)
    with stdout() as stream:
        stream.write(f"wrote {path}: {plural(count, 'finding')}\nnext: normdoctor inspect ... --baseline {path}\n")


def exit_code(survey: Survey, fail_on: str) -> int:
    from normdoctor.findings import Severity

    if survey.failures:
        return 2
    if fail_on == "never" or survey.worst is None:
        return 0
    return int(survey.worst >= Severity[fail_on.upper()])


@app.command()
def rules(
    output_format: Annotated[ListFormat, choice("--format", ListFormat, "How to write the list.")] = ListFormat.CONSOLE,
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
    method: Annotated[
        Method, choice("--method", Method, "debias: take the initial 0 and 1 out of the buffers; needs no data.")
    ],
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


app.command()(fold)
