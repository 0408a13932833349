"""What a fold has to say for itself: every norm, the counts, the proof. Plain values, for every renderer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from normdoctor.places import Verdict


@dataclass(frozen=True, kw_only=True)
class FoldRow:
    """One norm and what became of it."""

    norm: str
    """The name that `inspect` gives the layer."""
    kind: str
    """BatchNorm, LayerNorm, or the operators that stand for one."""
    verdict: str
    """A value of `Verdict`: folded backward, folded forward, merged, decomposed, left."""
    into: tuple[str, ...] = ()
    """The weights that absorb it."""
    through: tuple[str, ...] = ()
    """The operators that it passes on the way, in words."""
    code: str = ""
    """Why it stays, in a word; empty where it does not."""
    reason: str = ""
    gain: float = 0.0
    """The largest absolute scale over its channels."""

    @property
    def left(self) -> bool:
        """Whether it is still in the model."""
        return self.verdict == Verdict.LEFT.value


@dataclass(frozen=True, kw_only=True)
class Overflow:
    """A folded weight that float16 cannot hold, although its own type can."""

    weight: str
    channels: tuple[int, ...]
    """Output channels; empty where the weight has no axis of them."""
    largest: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One output of the folded model beside that of the original, on the same inputs."""

    output: str
    shape: tuple[int, ...]
    dtype: str
    error: float
    """The largest error relative to the channel's size; of integers the share of elements that differ."""
    noise: float | None
    """The same measure of the original in its own type against float64; None where it was not taken."""
    channel: int | None
    """Where the largest error is, None for an output without channels."""
    ok: bool
    note: str = ""


class ProofState(Enum):
    """How far the folded model is proven; the value is how reports say it."""

    VERIFIED = "verified"
    FAILED = "failed"
    UNVERIFIED = "unverified"
    """It could not be run here."""
    NOT_ASKED = "not verified"
    """As the caller wished."""
    NOT_NEEDED = "nothing to verify"
    """Nothing was changed, or nothing was to be written."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The original and the folded model run side by side."""

    state: ProofState
    inputs: str = ""
    """What both were given: random numbers and their seed, or a file."""
    engine: str = ""
    """What ran them."""
    differences: tuple[Difference, ...] = ()
    reason: str = ""
    """Why it failed, could not be made or was not asked for."""
    noise_reason: str = ""
    """Why the noise was not measured."""
    first_norm: str = ""
    """Of a failed proof: the first norm at which the two models part."""
    seconds: float = 0.0

    @property
    def error(self) -> float | None:
        """The largest error of any output."""
        return max((difference.error for difference in self.differences), default=None)


@dataclass(frozen=True, kw_only=True)
class FoldReport:
    """Everything about one fold."""

    source: str
    format: str
    rows: tuple[FoldRow, ...]
    """Every norm in the order of the graph."""
    parameters: tuple[int, int] = (0, 0)
    """Numbers stored in the tensors that the graph uses, before and after."""
    nodes: tuple[int, int] = (0, 0)
    """Operators before and after, constants not counted."""
    copies: tuple[str, ...] = ()
    """Weights that were shared and now have a copy of their own at the site of a fold."""
    overflows: tuple[Overflow, ...] = ()
    proof: Proof
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    output: str | None = None
    """The path of the folded model as it was given; None where nothing was written."""
    unchanged: bool = False
    """Whether the output is a copy of the input."""

    def __str__(self) -> str:
        """A line per norm, and one for the proof."""
        lines = [
            f"{row.norm}: {row.verdict}" + (f" into {', '.join(row.into)}" if row.into else f" ({row.code})" * row.left)
            for row in self.rows
        ]
        return "\n".join([*lines, f"proof: {self.proof.state.value}"])

    @property
    def counts(self) -> dict[str, int]:
        """How many norms became what, by the value of `Verdict`; verdicts that none has are 0."""
        found = Counter(row.verdict for row in self.rows)
        return {verdict.value: found[verdict.value] for verdict in Verdict}

    @property
    def folded(self) -> int:
        """How many norms are gone: absorbed or merged."""
        gone = (Verdict.BACKWARD, Verdict.FORWARD, Verdict.MERGED)
        return sum(self.counts[verdict.value] for verdict in gone)

    @property
    def largest_gain(self) -> FoldRow | None:
        """The norm with the largest scale among those that are no longer there as norms."""
        return max((row for row in self.rows if not row.left), key=lambda row: row.gain, default=None)


@dataclass(frozen=True, kw_only=True)
class Folding:
    """The folded model, and the report on it."""

    source: str
    format: str
    report: FoldReport
    path: Path | None = None
    """The folded file; None for a dry run, and for a live module unless an output was named."""
    module: Any = None
    """The folded module, where a live one was given; the original is as it was."""

    def __str__(self) -> str:
        return str(self.report)
