"""How two or more checkpoints of one network differ in their norms: records that `comparing` fills, the rules judge
and the reports show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class ComparisonKind(Enum):
    """What the sides are to each other."""

    CHECKPOINTS = "checkpoints"
    """Files in the order given: before and after, epochs of a training, a model and its export."""
    MODELS = "models in one file"
    """The weights and their average."""
    RANKS = "ranks"
    """What the processes of one data-parallel training hold: equal weights."""


class Matching(Enum):
    """What two layers were taken for the same by."""

    NAME = "name"
    VALUES = "values"
    """Other names, and vectors that are equal bit for bit."""
    ORDER = "order"
    """Other names, but the same channels in the same place, and vectors that go together."""


class Motion(Enum):
    """How the values of some tensors went from one side to another."""

    EQUAL = "equal"
    """Bit for bit."""
    ROUNDED = "rounded"
    """No further apart than storing them in fewer bits, or converting them, takes them."""
    MOVED = "moved"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the models that are compared."""

    label: str
    """What tells it from the others: its path, or its key in the file."""
    format: str
    layers: int
    averaged: str | None = None
    """What in the file says that its weights are an average."""
    untrained: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """One norm on two sides, the earlier and the later. Over the channels that carry signal on either side."""

    layer: str
    """Its name on the later side."""
    other: str
    """Its name on the earlier side."""
    matched: Matching
    kind: str
    channels: int
    statistics: Motion | None
    """Of running_mean and running_var; None where a side has none."""
    affine: Motion | None
    """Of gamma and beta; None where a side has none."""
    divergence: float | None
    """Median over channels of KL(later || earlier) of normal distributions with these statistics, in nats."""
    divergence_p95: float | None
    shift: float | None
    """Median of |difference of running_mean| in standard deviations of the earlier side."""
    shift_p95: float | None
    log_ratio: float | None
    """Median of ln(later running_var / earlier)."""
    log_ratio_p95: float | None
    """95th percentile of its size."""
    gamma: float | None
    """|difference of the gains| / |gains of the earlier side|, as lengths of vectors; None without a weight."""
    beta: float | None
    """|difference of the shifts| / |(gains, shifts) of the earlier side|; None without a bias."""
    updates: tuple[float | None, float | None]
    """num_batches_tracked on both sides."""
    eps: tuple[float | None, float | None]
    momentum: tuple[float | str | None, float | str | None]
    gain_by_eps: float | None
    """Median change of 1 / sqrt(running_var + eps) that the other eps alone makes; None where a side has none."""
    as_created: tuple[bool, bool]
    """Whether running_mean is 0 and running_var is 1 throughout, on each side."""
    broken: int
    """Channels left out because their statistics are not finite, or a variance is negative."""
    worst: tuple[int, ...]
    """The channels with the largest divergence, at most five."""
    has_statistics: tuple[bool, bool] = (True, True)
    """Whether each side has running statistics of it."""
    broken_on: tuple[int, int] = (0, 0)
    """How many of `broken` each side has."""
    reordered: bool = False
    """Its statistics are the same numbers on both sides, in another order."""
    gain_by_eps_worst: float | None = None
    """As `gain_by_eps`, of the channel that it changes most."""

    @property
    def steps(self) -> float | None:
        """Batches counted from the earlier side to the later."""
        earlier, later = self.updates
        return None if earlier is None or later is None else later - earlier

    @property
    def still(self) -> bool:
        """Its statistics are the same on both sides."""
        return self.statistics in (Motion.EQUAL, Motion.ROUNDED)

    @property
    def other_eps(self) -> bool:
        """Both sides say its eps, and not the same one."""
        before, after = self.eps
        return before is not None and after is not None and not math.isclose(before, after, rel_tol=1e-4)


@dataclass(frozen=True, kw_only=True)
class WeightsChange:
    """How the weights of all other layers went from one side to the other: those of one name and shape."""

    tensors: int
    """How many were compared."""
    equal: int
    """How many of them are equal bit for bit."""
    relative: float
    """|difference| / |earlier side| as lengths of vectors, estimated on samples."""
    motion: Motion
    unmatched: int = 0
    """Weights of the later side for which the earlier one has none."""
    cosine: float | None = None
    """Of the angle between both sides, on the same samples: near 1 for states of one training and near 0 for weights
    that have nothing to do with each other. None where they did not move, or there is too little to tell."""


@dataclass(frozen=True, kw_only=True)
class MissingLayer:
    """A norm that only one side has."""

    layer: str
    kind: str
    channels: int
    side: int
    """Which side has it."""
    reason: str | None
    """Why the other has not, where that can be told."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One norm over three or more checkpoints."""

    layer: str
    """Its name in the last."""
    divergence: tuple[float | None, ...]
    """Of each step from one checkpoint to the next, in nats; None where its statistics could not be compared."""
    still: tuple[bool | None, ...]
    """Of each step, whether its statistics stayed the same."""
    updates: tuple[float | None, ...]
    """num_batches_tracked in each checkpoint."""

    def falls(self, step: int) -> bool:
        """Its counter is lower after this step than before."""
        before, after = self.updates[step : step + 2]
        return before is not None and after is not None and after < before


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was seen of the same network on several sides. The layers' changes are from the first side to
    the last; of ranks, from the first to the one that differs most."""

    kind: ComparisonKind
    sides: tuple[Side, ...]
    layers: tuple[LayerChange, ...]
    """In the order of the last side."""
    missing: tuple[MissingLayer, ...]
    weights: WeightsChange | None
    """From the first side to the last; None where no weight besides those of norms has a name of its own on both."""
    steps: tuple[WeightsChange | None, ...] = ()
    """From each of three or more checkpoints to the next."""
    trajectories: tuple[Trajectory, ...] = ()
    notes: tuple[str, ...] = ()
    dropped_biases: tuple[str, ...] = ()
    """Biases in front of norms that are 0 or gone on the later side, while the norms' statistics are the same."""
    odd: int | None = None
    """Of three ranks or more, the one whose statistics are others while those of all the rest are equal bit for bit."""

    @property
    def tracked(self) -> tuple[LayerChange, ...]:
        """The layers with running statistics on both sides."""
        return tuple(row for row in self.layers if row.statistics is not None)

    @property
    def falling(self) -> tuple[int, ...]:
        """The steps over which most counters fall while the weights move: the checkpoints are not in their order."""
        return tuple(
            place
            for place, step in enumerate(self.steps)
            if step is not None
            and step.motion is Motion.MOVED
            and not any(side.averaged for side in self.sides[place : place + 2])
            and 2 * sum(row.falls(place) for row in self.trajectories) > len(self.trajectories)
        )

    @property
    def weights_moved(self) -> bool | None:
        """Whether the other weights are others; None where that is not known."""
        return None if self.weights is None else self.weights.motion is Motion.MOVED
