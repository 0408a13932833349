"""What is known of the distribution of a value without any data: a mean and a variance for each channel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from normdoctor.flow.affine import Affine, Array, Blocked
from normdoctor.flow.graph import Node, Value
from normdoctor.flow.passing import after


@dataclass(frozen=True, eq=False)
class Spread:
    """What is known of a value's distribution without data. Arrays are float64 and broadcast against the value."""

    mean: Array
    variance: Array | None
    """None behind a weighted sum: how the channels depend on each other is not known."""
    bias: Array
    """What of the mean was added as a constant since the last weighted sum or activation."""
    exact: bool = True
    """No activation lies on the way."""
    even: bool = True
    """Every position of the sources counts alike."""
    sized: bool = True
    """No border of a map of unknown size lies on the way."""
    sources: frozenset[str] = frozenset()
    through: tuple[str, ...] = ()
    """Words for the operators on the way, in order, each once."""

    @property
    def rank(self) -> int:
        return int(self.mean.ndim)

    @classmethod
    def along(cls, axis: int, rank: int, mean: Array, variance: Array, source: str) -> Spread:
        """From one number per channel."""
        known = Affine.along(axis, rank, variance, mean)
        return cls(known.shift, known.scale, np.zeros((1,) * rank), sources=frozenset((source,)))

    def moved(self, node: Node, slot: int = 0) -> list[tuple[int, Spread]]:
        """Behind an operator that moves values: output and what is known of it. Raises Blocked."""

        def move(array: Array) -> dict[int, Array]:
            steps = after(node, slot, Affine(array, np.zeros((1,) * array.ndim)))
            return {place: affine.scale for place, affine in steps}

        means, biases = move(self.mean), move(self.bias)
        variances = None if self.variance is None else move(self.variance)
        return [
            (
                place,
                replace(
                    self,
                    mean=mean,
                    variance=None if variances is None else variances[place],
                    bias=biases[place],
                    # Positions that become features have their own means, of which nothing is known.
                    even=self.even and mean.size <= self.mean.size,
                ),
            )
            for place, mean in means.items()
        ]

    def per_channel(self, axis: int = 1) -> tuple[Array, Array, bool]:
        """Mean and bias as one number per element of `axis`, and whether they vary along no other axis."""
        length = max(self.mean.shape[axis], self.bias.shape[axis])
        others = tuple(place for place in range(self.rank) if place != axis)
        alone = all(self.mean.shape[place] == 1 for place in others)
        mean, bias = (
            np.broadcast_to(array.mean(axis=others), (length,)).astype(np.float64) for array in (self.mean, self.bias)
        )
        return mean, bias, alone

    def scaled(self, factor: Array) -> Spread:
        """Multiplied by a constant."""
        variance = None if self.variance is None else self.variance * factor**2
        return replace(self, mean=self.mean * factor, variance=variance, bias=self.bias * factor)

    def activated(self, mean: Array, variance: Array, name: str) -> Spread:
        """Behind an activation that gives these moments."""
        flat = np.zeros((1,) * self.rank)
        return replace(self, mean=mean, variance=variance, bias=flat, exact=False).told(name)

    def told(self, word: str) -> Spread:
        """With the name of an operator on the way."""
        return self if word in self.through else replace(self, through=(*self.through, word))


def rank_of(value: Value) -> int:
    """How many axes a value has. Raises Blocked where that is not known."""
    if value.shape is None:
        raise Blocked("unknown-shape", f"the shape of {value.name} is not known")
    return len(value.shape)
