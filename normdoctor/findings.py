"""What we say about norm layers: rules, the findings and skips they give, and the report that holds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, Literal, get_args

from normdoctor.compared import Comparison
from normdoctor.layers import Model, NearMiss, NormKind, NormLayer
from normdoctor.measured import Drift


class Severity(IntEnum):
    """How bad it is if it is true."""

    INFO = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()

    def lowered(self) -> Severity:
        """One level down; info stays info."""
        return Severity(max(self - 1, Severity.INFO))


class Confidence(IntEnum):
    """How sure we are that it is true."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3

    def __str__(self) -> str:
        return self.name.lower()


class Evidence(Enum):
    """What a finding rests on, weakest first."""

    TENSORS = "tensors"
    HYPER = "hyper"
    GRAPH = "graph"
    DATA = "data"


Precision = Literal["fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

RECALIBRATE = "normdoctor recalibrate {path}"
MEASURE_ANEW = RECALIBRATE + "{data} -o {fixed}"
"""The repair by data, as a fix names it."""
DEBIAS_COMMAND = RECALIBRATE + " --method debias{momentum} -o {fixed}"
"""The repair that needs no data, as a fix names it."""
FOLD = "normdoctor fold {path}{opening}"
"""Norms into the weights around them, as a fix names it."""


def repaired_path(source: Path) -> Path:
    """Where a repaired copy goes unless the user says otherwise: model.pt → model.recalibrated.pt"""
    return source.parent / f"{source.stem}.recalibrated{source.suffix}"  # with_name would refuse "."


HYPER_FIELDS = frozenset(
    {
        "eps",
        "momentum",
        "training",
        "affine",
        "track_running_stats",
        "num_batches_tracked",
        "requires_grad",
        "origin",
        "groups",
    }
)
ASSUMABLE_FIELDS = frozenset({"eps", "momentum"})
DATA_FIELD = "measured"
"""What a layer has only when its model was run on data."""
GRAPH_FIELD = "place"
"""What a layer has only when the graph around it is known."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a check yields. The runner turns it into a Finding."""

    message: str
    """One or two sentences with the numbers, about this layer (or this file)."""
    layer: NormLayer | None = None
    """Only for rules that look at all layers of a model at once: the one this is about, None for the file."""
    channels: Sequence[int] = ()
    """Indices of the channels it is about, all of them; the worst ones belong in the message."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """The numbers it rests on: plain ints, floats, strings, or lists of them."""
    severity: Severity | None = None
    """Where it differs from the rule's own."""
    confidence: Confidence | None = None
    rank: float = 0.0
    """Larger is worse: says which of several layers is shown first."""
    fix: str | None = None
    """Where the general fix of the rule is not the right one here."""
    subject: str = ""
    """What a finding about the whole file is about: tells it from another one of the same code."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a check may know beyond its subject."""

    model: Model
    """The layer's siblings."""
    limits: Mapping[str, float]
    """The rule's thresholds, as declared or as the user set them."""
    precision: Precision | None = None
    """The number format the model is meant for (--target), if the user named one."""
    train_batch: int | None = None
    """Samples in a batch of the training, of each process where there were several, if the user said it."""
    drift: Drift | None = None
    """How far the model's statistics are from the data's, where it was run on data."""


Check = Callable[[Any, Context], Iterator[Observation]]


class Scope(Enum):
    """What a check is called with: one layer, a tuple of layers of one model, the whole Checkpoint, or the Comparison
    of several models."""

    LAYER = "layer"
    MODEL = "model"
    FILE = "file"
    COMPARISON = "comparison"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One check with everything that is said about it. Its documentation is the check's docstring."""

    code: str
    name: str
    severity: Severity
    confidence: Confidence
    kinds: frozenset[NormKind]
    needs: tuple[str, ...]
    scope: Scope
    assumes: bool
    guesses: bool
    even_untrained: bool
    why: str
    fix: str
    reference: str
    limits: Mapping[str, float]
    check: Check

    @property
    def documentation(self) -> str:
        return inspect.getdoc(self.check) or ""

    @property
    def title(self) -> str:
        """The first line of the documentation."""
        return self.documentation.partition("\n")[0]

    @property
    def evidence_level(self) -> Evidence:
        """The strongest kind of input the rule needs."""
        if DATA_FIELD in self.needs:
            return Evidence.DATA
        if GRAPH_FIELD in self.needs:
            return Evidence.GRAPH
        return Evidence.HYPER if HYPER_FIELDS & set(self.needs) else Evidence.TENSORS


def rule(
    code: str,
    name: str,
    *,
    severity: Severity,
    confidence: Confidence,
    needs: tuple[str, ...] = (),
    kinds: Iterable[NormKind] = tuple(NormKind),
    scope: Scope = Scope.LAYER,
    assumes: bool = True,
    guesses: bool = False,
    even_untrained: bool = True,
    why: str,
    fix: str,
    reference: str,
    limits: Mapping[str, float] | None = None,
) -> Callable[[Check], Rule]:
    """Make a Rule of a check function; refuse one without documentation or reference.

    needs: NormLayer fields that must be known; a layer that lacks one gives a Skip instead of a call.
    assumes: eps and momentum may be filled with torch's defaults (capping the finding at warning).
    guesses: a place that was only inferred from names will do (capping the finding at info).
    even_untrained: False where a model that was never trained would set it off by design.
    why: one sentence, why it matters. fix: the next command or step; {path}, {fixed}, {momentum}, {data} and {opening}
    are filled in.
    limits: thresholds by name; they appear in the evidence and can be set by the user.
    """

    def make(check: Check) -> Rule:
        if not inspect.getdoc(check) or not reference:
            raise ValueError(f"rule {code} needs a docstring and a reference")
        return Rule(
            code=code,
            name=name,
            severity=severity,
            confidence=confidence,
            kinds=frozenset(kinds),
            needs=needs,
            scope=scope,
            assumes=assumes,
            guesses=guesses,
            even_untrained=even_untrained,
            why=why,
            fix=fix,
            reference=reference,
            limits=dict(limits or {}),
            check=check,
        )

    return make


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule's statement about one layer, or about the file where layer is None."""

    rule: Rule
    severity: Severity
    confidence: Confidence
    evidence_level: Evidence
    layer: str | None
    channels: tuple[int, ...]
    message: str
    evidence: Mapping[str, Any]
    assumed: Mapping[str, float]
    """eps or momentum where the file does not say and torch's default stood in."""
    fix: str
    rank: float = 0.0
    subject: str = ""
    """What it is about where that is no layer."""
    known: bool = False
    """Listed in the baseline: accepted before, so it counts for no exit code."""

    def __str__(self) -> str:
        return f"{self.severity} {self.code} {self.name} {self.layer or 'file'}: {self.message}"

    def __repr__(self) -> str:
        return f"<Finding {self}>"

    @property
    def code(self) -> str:
        return self.rule.code

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def fingerprint(self) -> str:
        """What makes it the same finding in the next checkpoint of the same network: code and layer or subject."""
        return f"{self.code} {self.layer or self.subject}".rstrip()


@dataclass(frozen=True, kw_only=True)
class LayerIgnore:
    """Rules that say nothing about some layers, by the user's wish."""

    glob: str
    codes: tuple[str, ...]
    """Rule codes or their beginnings."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A rule that could not be applied, and what was missing. layer None: to no layer of the file."""

    rule: Rule
    layer: str | None
    missing: tuple[str, ...]

    @property
    def code(self) -> str:
        return self.rule.code


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """Everything said about one file: all that a renderer sees."""

    path: str
    format: str
    layers: tuple[NormLayer, ...]
    """Those that were wanted (--layer)."""
    layer_names: tuple[str, ...]
    """Those of all layers in the file, wanted or not."""
    findings: tuple[Finding, ...]
    """Worst first."""
    skips: tuple[Skip, ...]
    assumed: Mapping[str, float]
    """torch's defaults that stood in for what the file does not say, in rules with and without findings."""
    notes: tuple[str, ...]
    near_misses: tuple[NearMiss, ...]
    bytes_read: int
    bytes_total: int | None
    drift: Drift | None = None
    """Where the model was run on data: how far its statistics are from those of the data."""
    comparison: Comparison | None = None
    """Where there was another model to compare with: how the norms differ."""

    def __repr__(self) -> str:
        return f"<Report {self.path}: {len(self.layers)} norm layers, {len(self.findings)} findings>"

    def __str__(self) -> str:
        """A line for the file and one for each finding."""
        head = f"{self.path} ({self.format}): {len(self.layers)} norm layers, {len(self.findings)} findings"
        return "\n".join([head, *map(str, self.findings)])

    @property
    def worst(self) -> Severity | None:
        """The highest severity among the findings that no baseline knows."""
        return max((finding.severity for finding in self.findings if not finding.known), default=None)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A file that could not be examined."""

    path: str
    message: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The outcome for any number of files: what one run of `inspect` prints."""

    reports: tuple[Report, ...]
    failures: tuple[Failure, ...] = ()
    passed_over: int = 0
    """Files in the folders searched that hold no model."""
    fixed: tuple[str, ...] = ()
    """Fingerprints in the baseline that no finding has any more."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings of all files, file by file."""
        return tuple(finding for report in self.reports for finding in report.findings)

    @property
    def worst(self) -> Severity | None:
        return max((worst for report in self.reports if (worst := report.worst) is not None), default=None)
