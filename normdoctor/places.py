"""Where a norm stands in the graph of its network, and what follows from it: records that `flow` fills and the rules
judge.

No record holds a graph or a weight: only names, and numbers per channel that were worked out from both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An operator near a norm."""

    op: str
    """What it computes, by the value of `flow.graph.Op` (convolution, addition, activation, ...); "input" or "output"
    of the network."""
    written: str = ""
    """The operator as the file or the code has it: Conv, aten.conv2d."""
    label: str = ""
    """What a reader would call it: the path of its module, the name of its weight; empty where it has none."""
    activation: str = ""
    """Of an activation which one: relu, relu6, silu, ..."""

    def __str__(self) -> str:
        words = self.activation or self.op
        return f"{words} {self.label}" if self.label and not self.activation else words


@dataclass(frozen=True, kw_only=True, eq=False)
class Producer:
    """The convolution or matrix product that the norm normalises, with nothing in between that computes."""

    neighbour: Neighbour
    alone: bool
    """Nothing but this norm takes its output."""
    bias: Vector | None = None
    """What it adds to each channel of the norm; None where it has no bias."""
    largest: Vector | None = None
    """Largest |weight| of those that make each channel; None where the weights are not stored or were not read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Activation:
    """The activation that alone takes a norm's output."""

    name: str
    """As `flow.graph.Op.ACTIVATION` names it."""
    low: float = -math.inf
    high: float = math.inf
    """The bounds of a clip."""
    alpha: float | None = None
    """Its slope or scale, where it has one."""
    label: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What the mean of a norm's input must be, worked out from the norms before it and the weights between.

    In training a BatchNorm gives each channel the mean beta and the standard deviation |gamma|, whatever goes in."""

    mean: Vector
    """Per channel."""
    bias: Vector | None
    """What of `mean` is the bias of the operator just before the norm: no evidence of any statistics."""
    exact: bool
    """No activation lies on the way: nothing was assumed about distributions."""
    even: bool
    """Every position of the norms before counts alike: no border, no stride, no kernel. With `exact`, the mean of the
    batch is this, to rounding."""
    sized: bool
    """No border of a map of unknown size lies on the way: the size of `mean` can be trusted, not only its pattern."""
    sources: tuple[str, ...]
    """The norms that it starts from."""
    through: tuple[str, ...]
    """The operators on the way in the order of the data, each once."""


class Verdict(Enum):
    """What becomes of a norm; the value is how reports say it."""

    BACKWARD = "folded backward"
    FORWARD = "folded forward"
    MERGED = "merged"
    """Into another norm or into constants that stay."""
    DECOMPOSED = "decomposed"
    """Into one multiplication and one addition."""
    LEFT = "left"


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What `normdoctor fold` would do to the norm."""

    verdict: str
    """By the value of `Verdict`: folded backward, folded forward, merged, left."""
    code: str = ""
    """Of a norm that is left: why (`flow.reasons.REASONS`)."""
    reason: str = ""
    into: tuple[str, ...] = ()
    """Labels of the operators whose weights take it in."""
    saved: int = 0
    """Parameters and buffers that the model would no longer hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """The surroundings of one norm. What moves or copies values (reshape, identity, cast) is no neighbour."""

    calls: int = 1
    """At how many places of the graph it stands."""
    before: tuple[Neighbour, ...] = ()
    """Nearest first: activations and poolings, then the first operator that mixes or normalises, or the input."""
    after: tuple[Neighbour, ...] = ()
    """One for each that takes its output."""
    producer: Producer | None = None
    activation: Activation | None = None
    """None where several take its output, or something else than an activation does."""
    positions: int | None = None
    """Values of a channel in one sample at its input: H * W of an image, 1 behind global pooling; None: not known."""
    joins_branches: bool = False
    """Its output is added to another computed value: it ends a branch of a residual block."""
    padded: tuple[str, ...] = ()
    """Labels of the convolutions that take its output and see zeros at the border."""
    dropouts: tuple[tuple[str, float], ...] = ()
    """Label and probability of each dropout before it with no norm in between."""
    prediction: Prediction | None = None
    unpredicted: str = ""
    """Why there is no prediction, as a clause: "max-pooling lies between"."""
    fate: Fate | None = None
    gain_fate: Fate | None = None
    """Of LayerNorm and RMSNorm: what `fold --layernorm` would do to gain and bias."""
    inferred: bool = False
    """Guessed from names and shapes, since the file has no graph: nothing above info may rest on it."""
