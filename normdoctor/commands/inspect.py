"""`normdoctor inspect`. 0: nothing at or above --fail-on. 1: findings at or above it. 2: could not do it."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normdoctor.commands import calibrating
from normdoctor.commands.calibrating import DATA, RUNNING, Given
from normdoctor.commands.common import choice, complain, note, stdout, written
from normdoctor.commands.progress import progress
from normdoctor.errors import UsageError

if TYPE_CHECKING:
    from normdoctor.configuration import Configuration
    from normdoctor.findings import Survey
    from normdoctor.measurement.calibration import Calibration
    from normdoctor.measurement.lockstep import Progress
    from normdoctor.placing import PlaceOptions

JUDGED, OUTPUT, GATE = "What is judged", "The report", "In CI"
"""The parts of the help of `inspect`."""

TRACING = ("trust", "arch", "arch_args", "key")
"""Options of --data that say without it how the graph of a module is come by."""


class InspectFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"
    SARIF = "sarif"
    MARKDOWN = "markdown"
    GITHUB = "github"
    CSV = "csv"


class FailOn(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    NEVER = "never"


class TargetPrecision(StrEnum):
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


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
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out the rules that need the graph.", rich_help_panel=JUDGED)
    ] = False,
    data: calibrating.DataOption = None,
    train_batch: Annotated[
        int | None,
        typer.Option("--train-batch", metavar="N", help="Batch size of the training.", rich_help_panel=DATA),
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
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            "--input-shape",
            metavar="SHAPE",
            help="What its graph is traced with, [NAME=]1,3,224,224[:int64]; repeatable.",
            rich_help_panel=RUNNING,
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
    """Judge every norm layer of model files. Nothing in a file is executed without --data, --trust or --arch."""
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
    given.check_unused(TRACING)
    graph = _graph(given, input_shape or [], quick)
    runs = next((f"--{name}" for name in ("data", "arch", "trust") if getattr(given, name)), None)
    if runs is not None and jobs != 1:
        raise UsageError(f"--jobs is not for {runs}: torch uses all cores by itself", "Leave out --jobs.")
    with progress() as shown:
        survey = examined(files, config, layer or [], jobs, write_baseline, given, train_batch, shown, graph, quick)
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
    files: list[str],
    config: Configuration,
    layer: list[str],
    jobs: int,
    write_baseline: Path | None,
    given: Given,
    train_batch: int | None,
    shown: Progress | None,
    graph: PlaceOptions | None,
    quick: bool,
) -> Survey:
    """All files judged as the settings say, against the baseline if there is one."""
    from normdoctor import baseline, inspection, selection

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
        train_batch=train_batch,
        calibration=_calibration(given, shown),
        graph=graph,
        quick=quick,
    )
    for sentence in selection.layers_not_found(config.per_layer_ignores, survey) if not layer else ():
        note(sentence)
    if accepted is None:
        return survey
    chosen = {rule.code for rule in selection.choose_rules(config.select, config.ignore)}
    return baseline.compare(
        survey,
        accepted,
        lambda code, name: code in chosen and (not layer or any(fnmatchcase(name, glob) for glob in layer)),
    )


def _graph(given: Given, input_shape: list[str], quick: bool) -> PlaceOptions | None:
    """How the graph of a module is come by. Raises UsageError for an option that would mean nothing."""
    if given.data is not None:
        if input_shape:
            raise UsageError("--input-shape and --data exclude each other", "The inputs are those of the data.")
        return None
    asked = {name: value for name in TRACING if (value := getattr(given, name))}
    asked |= {"input_shape": input_shape} if input_shape else {}
    if not asked:
        return None
    if quick:
        option = f"--{next(iter(asked)).replace('_', '-')}"
        raise UsageError(f"{option} is for the graph, which --quick leaves out", f"Leave out --quick or {option}.")
    from normdoctor.placing import place_options

    return place_options(**asked)


def _calibration(given: Given, shown: Progress | None) -> Calibration | None:
    if given.data is None:
        return None
    from normdoctor.measurement.calibration import calibration

    parsed = dict(given.parsed())
    return calibration(parsed.pop("data"), **parsed, progress=shown)


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
