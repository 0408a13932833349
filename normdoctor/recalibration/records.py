"""What a recalibration says of itself: all that renderers see."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from normdoctor.findings import Finding
from normdoctor.recalibration.debias import Repair, Untouched
from normdoctor.recalibration.judging import Judgement

Method = Literal["debias", "exact", "one-pass", "blend"]
METHODS: tuple[Method, ...] = ("exact", "one-pass", "blend", "debias")


@dataclass(frozen=True, kw_only=True)
class DebiasReport:
    """A repair that needed no data."""

    source: str
    repairs: tuple[Repair, ...]
    untouched: tuple[Untouched, ...]
    notes: tuple[str, ...]
    """Values the caller gave that the file says itself, and what speaks against the repair or makes it useless."""
    recognisable: bool
    """Whether a second debias of the result would be refused: by its counters, or by the mark in an ONNX file."""
    method: Method = "debias"
    output: str | None = None
    backup: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """One norm: its statistics as stored beside those measured, and beside the data afterwards.

    Medians and maxima are over its channels; infinite where the stored values were no numbers to compare with."""

    layer: str
    channels: int
    broken: int
    """Channels whose stored mean or variance was NaN, infinite or negative."""
    shift: float
    """Median of |new mean - stored mean| in standard deviations by the stored variance."""
    worst_shift: float
    ratio: float
    """Median of new variance / stored variance."""
    effective: float | None
    """Independent values per channel, median; None where one sample told nothing."""
    standard_error: float | None
    """Of the new means in standard deviations, the largest over the channels."""
    residual_shift: float | None = None
    """Largest |mean - new mean| in standard deviations, when the result was run on the data; None: it was not run."""
    residual_ratio: float | None = None
    """Largest |ln(variance / new variance)| then."""


@dataclass(frozen=True, kw_only=True)
class MeasuredReport:
    """A recalibration from data."""

    source: str
    format: str
    method: Method
    data: str
    """The data in words."""
    options: str
    """What a command about the same model and data must add, as the shell wants it."""
    samples: int
    batches: int
    stopped_early: bool
    """Whether --until was reached before the data ended."""
    prior: float | None
    """Samples that the stored statistics counted for, of blend."""
    rows: tuple[LayerChange, ...]
    """In the order in which forward reaches them."""
    left: dict[str, str] = field(default_factory=dict)
    """Norms with statistics that stay as they are → why."""
    judgement: Judgement | None = None
    """The outputs before and after; None: not judged (--no-verify)."""
    findings: tuple[Finding, ...] = ()
    """What rules say of the result (D605)."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    """Of measuring, without judging and writing."""
    dry_run: bool = False
    output: str | None = None
    """The file that was written."""
    backup: str | None = None
    """Where the input went, with --in-place."""


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """What `recalibrate` gives."""

    source: str
    method: Method
    report: DebiasReport | MeasuredReport
    path: Path | None = None
    """The repaired file, None for a live module."""
    module: Any = None
    """The repaired live module, the same object that was given."""
    speaks: bool = True
    """Whether this process writes the file and tells the user; one of those that torchrun started together does."""

    def __repr__(self) -> str:
        return f"<Recalibration {self.source} by {self.method}: {self.path or 'in place'}>"
