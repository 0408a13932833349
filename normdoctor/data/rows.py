"""Samples by their place, wherever they lie: only those that are asked for are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import InputError
from normdoctor.layers import ArrayRef, load
from normdoctor.readers.arrays import StoredArray, decode
from normdoctor.readers.live_module import is_tensor

WHOLE = 64 << 20
"""An array of up to so many bytes is read as a whole, which also checks the checksum that a file may have of it."""

MAX_WHOLE = 1 << 30
"""Where the samples of an array are scattered over the file it must be read as a whole, up to so many bytes."""


class Rows(Protocol):
    """An array along its first axis."""

    @property
    def lost(self) -> Mapping[int, str]:
        """Places that could not be read → why; known once they were taken."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """torch's name of the element type."""

    def take(self, places: Sequence[int]) -> NDArray[Any]:
        """The samples at these places, in this order, as an array of its own; lost ones are zeros."""

    def whole(self) -> NDArray[Any]:
        """All of it; for arrays without a first axis too."""

    def name_of(self, place: int) -> str:
        """A sample, for messages."""


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """Those of an array in memory."""

    array: NDArray[Any]
    dtype: str
    lost: Mapping[int, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def take(self, places: Sequence[int]) -> NDArray[Any]:
        values: NDArray[Any] = self.array[np.asarray(places, dtype=np.intp)]
        return values

    def whole(self) -> NDArray[Any]:
        return np.array(self.array)

    def name_of(self, place: int) -> str:
        return f"sample {place}"


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Those of an array in a file. what: the file and the array, for messages."""

    ref: ArrayRef
    what: str
    lost: Mapping[int, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    @property
    def dtype(self) -> str:
        return self.ref.dtype

    def take(self, places: Sequence[int]) -> NDArray[Any]:
        ref = self.ref
        if ref.nbytes <= WHOLE or not isinstance(ref, StoredArray) or not ref.is_contiguous:
            return self._whole.take(places)
        row = replace(ref, shape=ref.shape[1:], strides=ref.element_strides[1:])
        step = ref.element_strides[0]
        sample = np.zeros((len(places), *ref.shape[1:]), decode(b"", ref.dtype, ref.big_endian).dtype)
        for i, place in enumerate(places):
            sample[i] = replace(row, offset=ref.offset + place * step).load()
        return sample

    @cached_property
    def _whole(self) -> ArrayRows:
        return ArrayRows(self.whole(), self.dtype)

    def whole(self) -> NDArray[Any]:
        """All of it. Raises InputError where it is too large for that."""
        if self.ref.nbytes > MAX_WHOLE:
            raise InputError(
                f"{self.what}: {self.ref.nbytes:,} bytes that can only be read as a whole",
                "Save it with its samples one after the other (numpy.ascontiguousarray, tensor.contiguous()).",
            )
        return load(self.ref)

    def name_of(self, place: int) -> str:
        return f"sample {place}"


def rows_of(value: Any) -> Rows:
    """A live array or tensor; on a GPU it is copied from there, bfloat16 and float8 as float32."""
    if not is_tensor(value):
        array = np.asarray(value)
        return ArrayRows(array, str(array.dtype))
    tensor, dtype = value.detach().cpu(), str(value.dtype).removeprefix("torch.")
    if dtype.startswith(("bfloat", "float8")):
        tensor = tensor.float()
    return ArrayRows(tensor.numpy(), dtype)


def is_array(value: object) -> bool:
    """Whether it is a tensor or a numpy array."""
    return isinstance(value, np.ndarray) or is_tensor(value)
