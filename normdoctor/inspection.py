"""`inspect`: open a checkpoint, apply the rules the caller wants, give the report. `survey`: many of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normdoctor.compared import Motion
from normdoctor.errors import NormDoctorError, UsageError
from normdoctor.findings import (
    GRAPH_FIELD,
    Failure,
    Finding,
    LayerIgnore,
    Precision,
    Report,
    Rule,
    Scope,
    Survey,
)
from normdoctor.layers import NormLayer
from normdoctor.readers import open_checkpoint
from normdoctor.rules.runner import Settings, examine
from normdoctor.selection import (
    check_eps,
    check_momentum,
    check_precision,
    check_train_batch,
    checked_limits,
    choose_rules,
    known_code,
    matches,
    near_layers,
    several,
)

if TYPE_CHECKING:
    from normdoctor.measurement.calibration import Calibration
    from normdoctor.placing import PlaceOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `inspect` was asked for, checked."""

    rules: tuple[Rule, ...]
    settings: Settings
    globs: tuple[str, ...]
    ignores: tuple[LayerIgnore, ...]
    calibration: Calibration | None = None
    """Data to run the model on; None: nothing is run."""
    graph: PlaceOptions | None = None
    """How the graph around the norms is come by; None: no rule asks for it."""


def inspect(
    model: Any,
    *,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    layer: str | Iterable[str] = (),
    per_layer_ignores: Iterable[LayerIgnore] = (),
    eps: float | None = None,
    momentum: float | None = None,
    assume: bool = True,
    target: Precision | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    data: Any = None,
    samples: int | Literal["all"] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    scale: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    drop_nonfinite: bool = False,
    labels: str | Path | None = None,
    train_batch: int | None = None,
    trust: bool = False,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    key: str | None = None,
    device: str | None = None,
    input_shape: str | Iterable[str] = (),
    example_inputs: Any = None,
    quick: bool = False,
) -> Report:
    """Judge every norm layer of a checkpoint (str or Path), a live torch.nn.Module or its state_dict.

    Without data, trust and arch nothing in the file is executed or imported. A live module is looked at as it is and
    left so.

    select, ignore: rule codes, their beginnings or names ("S", "A2", "S104"); all are selected by default.
    layer: globs on layer names; only findings about matching layers are kept.
    per_layer_ignores: rules that are not to be heard about some layers; the report notes what was left out.
    eps, momentum: stand in where the file does not say. assume=False: rather skip than assume torch's defaults.
    target: judge the numbers for fp16, bf16 or int8 as well.
    limits: thresholds by rule code and name, {"S104": {"error": 0.2}}.

    data: the model is run on it in eval mode, and the rules that need data are applied: a path (.npy, .npz, .pt,
    .safetensors, a folder of images), "package.module:callable", or what such a callable gives (a tensor, an array, a
    loader, batches). samples, batch_size, seed, scale, mean, std, image_size, drop_nonfinite, labels: see
    `DataOptions`. train_batch: samples in a batch of the training, where that is known.
    trust: torch may load the file, which can run code in it. arch, arch_args: what builds the module of weights.
    key: which model of the file. device: where to run it.
    input_shape ("1,3,224,224", several for several inputs) or example_inputs: what a module is traced with, so that
    the rules about the graph around the norms apply to it. quick: without these rules, whatever the file.

    Raises InputError where the file or the data cannot be read, UsageError for an unknown rule code or threshold, a
    layer glob that matches nothing and data that does not fit, RefusedError where trust or an architecture is
    needed."""
    from normdoctor.measurement.calibration import calibration
    from normdoctor.placing import place_options

    if data is not None and (input_shape or example_inputs is not None):
        raise UsageError("the inputs are those of the data", "Leave out the shapes and examples of inputs.")
    options = check_options(
        select=select,
        ignore=ignore,
        layer=layer,
        per_layer_ignores=per_layer_ignores,
        eps=eps,
        momentum=momentum,
        assume=assume,
        target=target,
        limits=limits,
        train_batch=train_batch,
        calibration=None
        if data is None
        else calibration(
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
        ),
        graph=None
        if data is not None
        else place_options(
            live=not isinstance(model, (str, Path)),
            input_shape=input_shape,
            example_inputs=example_inputs,
            trust=trust,
            arch=arch,
            arch_args=arch_args,
            key=key,
        ),
        quick=quick,
    )
    report = _examine(model, options)
    _check_globs(options.globs, [report])
    return report


def check_options(
    *,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    layer: str | Iterable[str] = (),
    per_layer_ignores: Iterable[LayerIgnore] = (),
    eps: float | None = None,
    momentum: float | None = None,
    assume: bool = True,
    target: Precision | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    train_batch: int | None = None,
    calibration: Calibration | None = None,
    graph: PlaceOptions | None = None,
    quick: bool = False,
) -> Options:
    """The options of `inspect`, ready for any number of files. Raises UsageError for one that makes no sense."""
    rules = tuple(choose_rules(several(select), several(ignore)))
    if quick or not any(GRAPH_FIELD in rule.needs for rule in rules):
        graph = None
    else:
        from normdoctor.placing import PlaceOptions

        graph = replace(graph or PlaceOptions(), largest=target is not None)
    return Options(
        rules=rules,
        settings=Settings(
            eps=check_eps(eps),
            momentum=check_momentum(momentum),
            assume=assume,
            precision=None if target is None else check_precision(target),
            train_batch=check_train_batch(train_batch),
            limits=checked_limits(limits or {}),
        ),
        globs=several(layer),
        ignores=tuple(replace(one, codes=tuple(map(known_code, one.codes))) for one in per_layer_ignores),
        calibration=calibration,
        graph=graph,
    )


def survey(paths: str | Path | Iterable[str | Path], *, jobs: int = 1, **options: Any) -> Survey:
    """`inspect` for any number of files, folders and globs, each file with a report or a failure of its own.

    jobs: how many processes share the work; 0 for one for each core. options: those of `inspect`.

    Raises UsageError for a wrong option, before any file is read, and for a layer glob that matches nothing."""
    checked = check_options(**options)
    targets: list[Path] = []
    failures: list[Failure] = []
    passed_over = 0
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        if not str(path):
            raise UsageError("an empty path", "A variable in the command was probably not set.")
        if os.path.isfile(path):  # noqa: PTH113  Path.is_file raises for names that are too long
            targets.append(Path(path))
            continue
        from normdoctor.readers.folders import find_checkpoints

        try:
            found = find_checkpoints([path])
            targets += found.targets
            passed_over += found.passed_over
        except NormDoctorError as error:
            failures.append(Failure(path=str(path), message=error.message, hint=error.hint))
    reports = []
    for outcome in _outcomes(list(dict.fromkeys(targets)), checked, jobs):
        if isinstance(outcome, Report):
            reports.append(outcome)
        else:
            failures.append(outcome)
    reports = _with_ranks(reports, checked)
    _check_globs(checked.globs, reports)
    return Survey(reports=tuple(reports), failures=tuple(failures), passed_over=passed_over)


def _examine(model: Any, options: Options) -> Report:
    globs = options.globs
    with open_checkpoint(model) as checkpoint:
        if options.calibration is not None:
            from normdoctor.measurement.calibration import measured

            checkpoint = measured(model, checkpoint, options.calibration, placed=options.graph is not None)
        elif options.graph is not None:
            from normdoctor.placing import placed

            checkpoint = placed(model, checkpoint, options.graph)
        if any(rule.scope is Scope.COMPARISON for rule in options.rules):
            from normdoctor.comparing import with_comparison

            checkpoint = with_comparison(checkpoint, options.settings.eps)
        report = examine(checkpoint, options.rules, options.settings, lambda found: not globs or matches(found, globs))
    return _without_ignored(report, options.ignores) if options.ignores else report


def _with_ranks(reports: list[Report], options: Options) -> list[Report]:
    """The reports; that of the first of several ranks of one run also says how they differ, where they do."""
    rules = [rule for rule in options.rules if rule.scope is Scope.COMPARISON]
    if not rules or len(reports) < 2:
        return reports
    from normdoctor.comparing import ranks_compared
    from normdoctor.comparing.ranks import rank_groups

    def wanted(layer: NormLayer) -> bool:
        return not options.globs or matches(layer, options.globs)

    found = {}
    for group in rank_groups(Path(report.path) for report in reports):
        compared = ranks_compared(group, options.settings.eps)
        if compared is None or not any(row.statistics is Motion.MOVED for row in compared.layers):
            continue
        with open_checkpoint(group[0]) as checkpoint:
            checkpoint = replace(checkpoint, comparison=compared)
            found[str(group[0])] = examine(checkpoint, rules, options.settings, wanted)
    return [_joined(report, found[report.path]) if report.path in found else report for report in reports]


def _joined(report: Report, ranks: Report) -> Report:
    """A file's report with what the comparison with its fellow ranks says."""
    findings = sorted((*report.findings, *ranks.findings), key=lambda f: (-f.severity, f.code))
    return replace(report, findings=tuple(findings), comparison=ranks.comparison)


def _outcomes(targets: Sequence[Path], options: Options, jobs: int) -> Iterator[Report | Failure]:
    if jobs < 0:
        raise UsageError(f"jobs must be at least 1, not {jobs}", "0 takes as many as there are cores.")
    jobs = min(jobs or os.cpu_count() or 1, len(targets))
    if jobs <= 1:
        for target in targets:
            yield _outcome(target, options)
        return
    import signal
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from itertools import repeat

    # Ctrl-C reaches every process; the one that waits for the others says so.
    with ProcessPoolExecutor(jobs, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from pool.map(_detached_outcome, targets, repeat(options))
        except BrokenProcessPool:
            raise NormDoctorError("a process of --jobs died, probably for want of memory", "Try --jobs 1.") from None


def _outcome(target: Path, options: Options) -> Report | Failure:
    try:
        return _examine(target, options)
    except NormDoctorError as error:
        return Failure(path=str(target), message=error.message, hint=error.hint)


def _detached_outcome(target: Path, options: Options) -> Report | Failure:
    outcome = _outcome(target, options)
    if isinstance(outcome, Report):
        return replace(outcome, layers=tuple(layer.detached() for layer in outcome.layers))
    return outcome


def _check_globs(globs: Sequence[str], reports: Sequence[Report]) -> None:
    """Raise UsageError for a glob that matches no layer of any file, since it is probably misspelt."""
    every = {name for report in reports for name in report.layer_names}
    for glob in globs if every else ():
        if not any(matches(layer, [glob]) for report in reports for layer in report.layers):
            raise UsageError(f"no layer matches {glob!r}", near_layers(glob, every))


def _without_ignored(report: Report, ignores: Sequence[LayerIgnore]) -> Report:
    """The report without the findings that the user does not want to hear, and with a note on each."""
    layers = {layer.name: layer for layer in report.layers}
    left_out: Counter[LayerIgnore] = Counter()
    kept = []
    for finding in report.findings:
        one = next((one for one in ignores if _is_ignored(finding, layers, one)), None)
        if one is None:
            kept.append(finding)
        else:
            left_out[one] += 1
    notes = []
    for one, count in left_out.items():
        noun = "finding" if count == 1 else "findings"
        why = f": {one.reason}" if one.reason else ""
        notes.append(f"{count} {noun} of {', '.join(one.codes)} on {one.glob} left out by the settings{why}")
    return replace(report, findings=tuple(kept), notes=(*report.notes, *notes))


def _is_ignored(finding: Finding, layers: Mapping[str, NormLayer], one: LayerIgnore) -> bool:
    if finding.layer is None or not finding.code.startswith(one.codes):
        return False
    return finding.layer in layers and matches(layers[finding.layer], [one.glob])
