"""The one runner: a Checkpoint and a selection of rules → a Report.

Skips, assumptions, the cap on assumed findings and the placeholders of a fix are dealt with here, so that a
check is only ever called with what it needs and says only what it sees.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from normdoctor.compared import Comparison
from normdoctor.findings import (
    ASSUMABLE_FIELDS,
    DATA_FIELD,
    DEBIAS_COMMAND,
    FOLD,
    GRAPH_FIELD,
    MEASURE_ANEW,
    Context,
    Finding,
    Observation,
    Precision,
    Report,
    Rule,
    Scope,
    Severity,
    Skip,
    repaired_path,
)
from normdoctor.layers import (
    DEFAULT_EPS,
    DEFAULT_MOMENTUM,
    TRACKING_KINDS,
    VECTORS,
    Checkpoint,
    Container,
    Danger,
    Model,
    NormLayer,
)
from normdoctor.measured import Drift
from normdoctor.rules.calibration_data import INSPECT_AGAIN, input_scale
from normdoctor.rules.drift import stat_divergence
from normdoctor.rules.verdict import drift_of

PROGRAMS = ("torch.jit.load", "torch.export.load")
"""`Checkpoint.loader` of files that hold all that it takes to run."""

DEFAULTS = {"eps": DEFAULT_EPS, "momentum": DEFAULT_MOMENTUM}

# A field that is absent because the file says there is none is not a gap in our knowledge.
DECLARED_ABSENT: Mapping[str, Callable[[NormLayer], bool]] = {
    "weight": lambda layer: layer.affine is False,
    "bias": lambda layer: layer.affine is False,
    "running_mean": lambda layer: layer.track_running_stats is False,
    "running_var": lambda layer: layer.track_running_stats is False,
    "num_batches_tracked": lambda layer: layer.track_running_stats is False,
    # Where these are not said there is nothing to say: only a module has a class and gradients, only Derf a shift.
    "origin": lambda layer: True,
    "requires_grad": lambda layer: True,
    "inner_shift": lambda layer: True,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to examine. eps and momentum fill what the file does not say and are then no assumption."""

    eps: float | None = None
    momentum: float | None = None
    assume: bool = True
    precision: Precision | None = None
    train_batch: int | None = None
    """Samples in a batch of the training, where that is known."""
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Thresholds by rule code and name, where they differ from the rule's own."""


def examine(
    checkpoint: Checkpoint,
    rules: Iterable[Rule],
    settings: Settings | None = None,
    wanted: Callable[[NormLayer], bool] = lambda layer: True,
) -> Report:
    """Apply every rule to every layer of `checkpoint` that is `wanted`.

    Rules that compare layers still see the unwanted siblings; only what they say about them is dropped."""
    settings = settings or Settings()
    unused = unused_values(checkpoint, settings)
    models = [_with_given(model, settings) for model in checkpoint.models]
    shown = {layer.name for model in models for layer in model.layers if wanted(layer)}
    drifts = {model.key: drift for model in models if (drift := _drift(model, settings)) is not None}
    comparison = None if checkpoint.comparison is None else _of_wanted_layers(checkpoint.comparison, shown)
    findings: list[Finding] = []
    skips: list[Skip] = []
    stood_in: dict[str, float] = {}
    variants: Variants = {}
    silent = frozenset(layer.name for layer in checkpoint.layers if layer.momentum is None)
    for rule in rules:
        run = _Run(rule, checkpoint, settings, variants, silent, drifts)
        if rule.scope is Scope.FILE:
            run.on_file()
        elif rule.scope is Scope.COMPARISON:
            run.on_comparison(comparison)
        else:
            for model in models:
                run.on_model(model)
        findings += [f for f in run.findings if f.layer is None or f.layer in shown]
        skips += run.skips_of(shown)
        stood_in |= run.assumed
    layers = tuple(layer for model in models for layer in model.layers if layer.name in shown)
    for layer in layers:
        layer.numbers.load()
    findings.sort(key=lambda f: (-f.severity, f.code, f.layer is not None, -f.rank))
    return Report(
        path=checkpoint.path,
        format=checkpoint.format,
        layers=layers,
        layer_names=tuple(layer.name for layer in checkpoint.layers),
        findings=tuple(findings),
        skips=tuple(skips),
        assumed={name: stood_in[name] for name in sorted(stood_in)},
        notes=(*checkpoint.notes, *unused),
        near_misses=tuple(miss for model in models for miss in model.near_misses),
        bytes_read=checkpoint.bytes_read,
        bytes_total=checkpoint.bytes_total,
        drift=next(
            (
                _of_wanted(drift, {layer.name for layer in checkpoint.layers} - shown, checkpoint)
                for drift in drifts.values()
            ),
            None,
        ),
        comparison=comparison,
    )


def _drift(model: Model, settings: Settings) -> Drift | None:
    limits, prepared = (
        {**each.limits, **settings.limits.get(each.code, {})} for each in (stat_divergence, input_scale)
    )
    return drift_of(model, limits, settings.train_batch, prepared)


def _of_wanted_layers(comparison: Comparison, wanted: Collection[str]) -> Comparison:
    """The rows of the layers that are wanted."""
    return replace(
        comparison,
        layers=tuple(row for row in comparison.layers if row.layer in wanted),
        trajectories=tuple(row for row in comparison.trajectories if row.layer in wanted),
    )


def _of_wanted(drift: Drift, unwanted: Collection[str], checkpoint: Checkpoint) -> Drift:
    """The verdict on the whole model, the rows of the layers that are wanted, the file's name in the command."""
    return replace(
        drift,
        layers=tuple(row for row in drift.layers if row.layer not in unwanted),
        left={name: why for name, why in drift.left.items() if name not in unwanted},
        command=fill_in(drift.command, checkpoint),
    )


Variants = dict[tuple[Any, ...], NormLayer]


class _Run:
    """One rule going over one file."""

    def __init__(
        self,
        rule: Rule,
        checkpoint: Checkpoint,
        settings: Settings,
        variants: Variants,
        silent: frozenset[str],
        drifts: Mapping[str | None, Drift],
    ) -> None:
        self.rule = rule
        self._drifts = drifts
        self._silent = silent
        self._variants = variants
        self.checkpoint = checkpoint
        self.settings = settings
        self.limits = {**rule.limits, **settings.limits.get(rule.code, {})}
        self.findings: list[Finding] = []
        self.assumed: dict[str, float] = {}
        self._vectors = set(rule.needs).intersection(VECTORS)
        self._missing: dict[str, tuple[str, ...]] = {}
        self._applied = False

    def on_file(self) -> None:
        self._applied = True
        empty = Model(key=None, layers=())
        for observation in self.rule.check(self.checkpoint, self._context(empty)):
            self._record(observation, None, {})

    def on_comparison(self, comparison: Comparison | None) -> None:
        """Nothing to say, and nothing skipped, where there is nothing to compare with."""
        self._applied = True
        if comparison is None:
            return
        for observation in self.rule.check(comparison, self._context(Model(key=None, layers=()))):
            self._record(observation, None, {})

    def on_model(self, model: Model) -> None:
        if model.untrained and not self.rule.even_untrained:
            return
        ready: list[tuple[NormLayer, dict[str, float]]] = []
        for layer in model.layers:
            missing = self._gaps(layer)
            if missing is None:
                continue
            if self._vectors and not layer.lengths_agree:
                missing = (*missing, "equal lengths")  # C311 says it; nobody else can calculate with them
            assumed = {}
            if self.rule.assumes and self.settings.assume:
                assumed = {name: DEFAULTS[name] for name in missing if name in ASSUMABLE_FIELDS}
                missing = tuple(name for name in missing if name not in assumed)
            if DATA_FIELD in missing and model.measurement is not None:
                continue  # it was run, and this layer could not be measured: more data does not help
            if missing:
                self._missing[layer.name] = missing
                continue
            self.assumed |= assumed
            ready.append((self._variant(layer, assumed), assumed))
        if not ready:
            return
        self._applied = True
        context = self._context(model)
        if self.rule.scope is Scope.LAYER:
            for layer, assumed in ready:
                for observation in self.rule.check(layer, context):
                    self._record(observation, layer, assumed, _inferred(layer))
        else:
            everything = {name: value for _, assumed in ready for name, value in assumed.items()}
            by_name = {layer.name: assumed for layer, assumed in ready}
            for observation in self.rule.check(tuple(layer for layer, _ in ready), context):
                about = observation.layer
                guessed = any(map(_inferred, [about] if about else [layer for layer, _ in ready]))
                self._record(observation, about, by_name.get(about.name, {}) if about else everything, guessed)

    def _gaps(self, layer: NormLayer) -> tuple[str, ...] | None:
        """The needed fields the file does not say; None where the rule is not about such a layer at all."""
        if layer.kind not in self.rule.kinds:
            return None
        missing = tuple(name for name in self.rule.needs if getattr(layer, name) is None)
        if GRAPH_FIELD in self.rule.needs and _inferred(layer) and not self.rule.guesses:
            missing = (*missing, GRAPH_FIELD)
        for name in missing:
            if name in DECLARED_ABSENT and (DECLARED_ABSENT[name](layer) or _never_has(name, layer)):
                return None
        return missing

    def _variant(self, layer: NormLayer, assumed: Mapping[str, float]) -> NormLayer:
        """The layer with what is assumed of it, made once for all rules that assume the same."""
        if not assumed:
            return layer
        key = (id(layer), *assumed)
        if key not in self._variants:
            self._variants[key] = _filled(layer, assumed)
        return self._variants[key]

    def _context(self, model: Model) -> Context:
        return Context(
            model=model,
            limits=self.limits,
            precision=self.settings.precision,
            train_batch=self.settings.train_batch,
            drift=self._drifts.get(model.key),
        )

    def _record(
        self, seen: Observation, layer: NormLayer | None, assumed: Mapping[str, float], inferred: bool = False
    ) -> None:
        rule = self.rule
        severity = rule.severity if seen.severity is None else seen.severity
        message = seen.message
        if assumed:
            severity = min(severity, Severity.WARNING)
            values = " and ".join(f"{name} {value:g}" for name, value in assumed.items())
            options = " ".join(f"--{name}" for name in assumed)
            message += f" Assumes torch's default {values}; {options} replaces it."
        if inferred and GRAPH_FIELD in rule.needs:
            severity = Severity.INFO
            message += " Inferred from names."
        evidence = dict(seen.evidence)
        if self.limits:
            evidence["limits"] = dict(self.limits)
        self.findings.append(
            Finding(
                rule=rule,
                severity=severity,
                confidence=rule.confidence if seen.confidence is None else seen.confidence,
                evidence_level=rule.evidence_level,
                layer=layer.name if layer else None,
                channels=tuple(int(channel) for channel in seen.channels),
                message=message,
                evidence=evidence,
                assumed=dict(assumed),
                fix=self._fix(rule.fix if seen.fix is None else seen.fix, layer),
                rank=seen.rank,
                subject=seen.subject,
            )
        )

    def _fix(self, fix: str, layer: NormLayer | None) -> str:
        return fill_in(fix, self.checkpoint, self._momentum_option(layer), layer)

    def _momentum_option(self, layer: NormLayer | None) -> str:
        """What a command about this layer must add because the file does not say its momentum."""
        if layer is None or layer.name not in self._silent:
            return ""
        given = self.settings.momentum
        return f" --momentum {'VALUE' if given is None else f'{given:g}'}"

    def skips_of(self, shown: set[str]) -> Iterator[Skip]:
        """One Skip for the file where the rule came to no layer at all, else one for each layer."""
        missing = {name: fields for name, fields in self._missing.items() if name in shown}
        if not missing:
            return
        if not self._applied:
            fields = tuple(dict.fromkeys(name for names in missing.values() for name in names))
            yield Skip(rule=self.rule, layer=None, missing=fields)
        elif not {DATA_FIELD, GRAPH_FIELD} & set(self.rule.needs):  # why a layer was not measured is in Report.drift
            for name, names in missing.items():
                yield Skip(rule=self.rule, layer=name, missing=names)


def _inferred(layer: NormLayer) -> bool:
    """Its place is guessed from names."""
    return layer.place is not None and layer.place.inferred


def _never_has(name: str, layer: NormLayer) -> bool:
    """Kinds that have no such tensor by definition lack nothing when it is not there."""
    if name == "bias":
        return layer.weight is not None
    if name.startswith("running_") or name == "num_batches_tracked":
        return layer.kind not in TRACKING_KINDS
    return False


def _with_given(model: Model, settings: Settings) -> Model:
    """The model with the user's eps and momentum wherever the file is silent."""
    given = {name: getattr(settings, name) for name in ASSUMABLE_FIELDS if getattr(settings, name) is not None}
    if not given:
        return model
    layers = tuple(
        _filled(layer, {name: value for name, value in given.items() if getattr(layer, name) is None})
        for layer in model.layers
    )
    return replace(model, layers=layers)


def unused_values(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """A sentence for each value the user gave that no layer takes, since the file says another itself."""
    notes = []
    for name in sorted(ASSUMABLE_FIELDS):
        given = getattr(settings, name)
        said = {getattr(layer, name) for layer in checkpoint.layers if name == "eps" or layer.kind in TRACKING_KINDS}
        if given is not None and said and None not in said and said != {given}:
            notes.append(f"--{name} {given:g} is not used: the file says {name} itself")
    return notes


def _filled(layer: NormLayer, values: Mapping[str, float]) -> NormLayer:
    if not values:
        return layer
    filled = replace(layer, **values)  # type: ignore[arg-type]
    filled.__dict__["numbers"] = layer.numbers  # the tensors are the same: keep what was read
    return filled


def fill_in(fix: str, checkpoint: Checkpoint, momentum: str = "", layer: NormLayer | None = None) -> str:
    """Put the file's name into a fix: {path} as the shell wants it, {fixed} for a sensible output, {momentum} for
    the option that a file without one needs, {data} for the data that was given, {opening} for the options without
    which the model cannot be opened. A live module is repaired through the API instead."""
    if checkpoint.container is Container.MEMORY:
        fix = fix.replace(DEBIAS_COMMAND, 'normdoctor.recalibrate(module, method="debias")')
        fix = fix.replace(MEASURE_ANEW, "normdoctor.recalibrate(module, data)")
        for option, argument in (" --dry-run", ", dry_run=True"), (" --layernorm", ", layernorm=True"), ("", ""):
            fix = fix.replace(FOLD + option, f"normdoctor.fold(module, example_inputs{argument})")
        fix = fix.partition(f", then: {INSPECT_AGAIN}")[0]  # its data is prepared in the user's own code
    path = Path(checkpoint.path)
    words = {"{path}": str(path), "{fixed}": str(repaired_path(path)) if path.name else "fixed"}
    for placeholder, word in words.items():
        word = f"./{word}" if word.startswith("-") else word  # or the shell's next program takes it for an option
        fix = fix.replace(placeholder, shlex.quote(word))
    seen = next((model.measurement for model in checkpoint.models if model.measurement is not None), None)
    data = "" if seen is None else seen.options
    fix = fix.replace("{opening}", f" {_how_it_runs(checkpoint)}".rstrip())
    return fix.replace("{momentum}", momentum).replace("{data}", f" {data or f'{_how_it_runs(checkpoint)}--data DATA'}")


def _how_it_runs(checkpoint: Checkpoint) -> str:
    """The options without which a model of this kind cannot be run, and a blank."""
    if checkpoint.container is Container.ONNX or checkpoint.loader in PROGRAMS:
        return ""
    has_classes = any(call.danger is Danger.MODULE_CLASS for call in checkpoint.load_calls)
    return "--trust " if has_classes else "--arch PKG.MODULE:NAME "
