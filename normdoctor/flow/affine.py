"""Affine maps y = scale * x + shift over whole arrays of values.

In eval mode a BatchNorm is such a map per channel (Ioffe and Szegedy 2015, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Blocked(Exception):
    """The map gets no further, and why: a code of a few words and a sentence."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


@dataclass(frozen=True, eq=False)
class Affine:
    """y = scale * x + shift.

    Both are float64 with as many axes as the value has; the length is 1 where the map does not vary."""

    scale: Array
    shift: Array

    @classmethod
    def along(cls, axis: int, rank: int, scale: Array, shift: Array) -> Affine:
        """From one number per channel."""
        shape = (1,) * axis + (-1,) + (1,) * (rank - axis - 1)
        return cls(np.asarray(scale, np.float64).reshape(shape), np.asarray(shift, np.float64).reshape(shape))

    @property
    def rank(self) -> int:
        return int(self.scale.ndim)

    @property
    def varying(self) -> set[int]:
        """The axes along which the map varies."""
        return {axis for axis in range(self.rank) if self.scale.shape[axis] != 1 or self.shift.shape[axis] != 1}

    def length(self, axis: int) -> int:
        """Its length along an axis: 1, or that of the value."""
        return int(max(self.scale.shape[axis], self.shift.shape[axis]))

    @property
    def is_identity(self) -> bool:
        return not self.has_shift and bool((self.scale == 1).all())

    @property
    def has_shift(self) -> bool:
        return bool((self.shift != 0).any())

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    def then(self, outer: Affine) -> Affine:
        """This map first, `outer` after it."""
        return Affine(outer.scale * self.scale, outer.scale * self.shift + outer.shift)

    def without_shift(self) -> Affine:
        return Affine(self.scale, np.zeros((1,) * self.rank))

    def moved(self, move: Callable[[Array], Array]) -> Affine:
        """Both arrays, moved alike."""
        return Affine(_settled(move(self.scale)), _settled(move(self.shift)))

    def vectors(self, axis: int, length: int) -> tuple[Array, Array]:
        """Scale and shift as one number per element of `axis`. Raises Blocked where they vary along another one."""
        if self.varying - {axis}:
            raise Blocked("wrong-axis", "it varies along an axis that the weights do not have")
        try:
            return (
                np.broadcast_to(self.scale.reshape(-1), (length,)),
                np.broadcast_to(self.shift.reshape(-1), (length,)),
            )
        except ValueError:
            raise Blocked(
                "wrong-axis", f"it has {self.length(axis)} channels where the weights have {length}"
            ) from None


def _settled(array: Array) -> Array:
    """Along an axis where all elements are the same, the length is 1."""
    for axis, length in enumerate(array.shape):
        if length > 1:
            first = array.take([0], axis=axis)
            if (array == first).all():
                array = first
    return array
