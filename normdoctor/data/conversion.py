"""Values as they lie in the data → values as a model takes them: factor, mean, standard deviation, type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.data.options import DataOptions, scale_words
from normdoctor.data.rows import is_array
from normdoctor.data.wanted import Wanted, lengths, numpy_type, wrong_shape, wrong_type
from normdoctor.errors import InputError, UsageError
from normdoctor.readers.live_module import is_tensor

CASTS = {"float16": "half", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}
"""torch's float types → the method of a tensor that gives it in that type."""

WIDTHS = {"float8": 1, "float16": 2, "bfloat16": 2, "float32": 3, "float64": 4}
"""Float types by what they hold; half precision is two types of which neither holds the other."""


@dataclass(frozen=True)
class Conversion:
    """What is done to the values of one input, in this order."""

    what: str
    """The data and the input, for messages."""
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str | None = None
    """torch's name of the type that it has in the end; None: the one it has."""

    @property
    def words(self) -> str:
        """What was done, for reports; empty for nothing but a type."""
        parts = [scale_words(self.scale)] if self.scale is not None and self.scale != 1 else []
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None:
                parts.append(f"{name} {' '.join(f'{value:g}' for value in values)}")
        return ", ".join(parts)

    def apply(self, values: Any) -> Any:
        """The values of some samples, an array or a tensor, converted. Nothing is done in place."""
        return self._tensor(values) if is_tensor(values) else self._array(values)

    def _array(self, values: NDArray[Any]) -> NDArray[Any]:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked for afterwards
            if self.words or self.scale is not None:
                wide = np.float64 if self.dtype == "float64" else np.float32
                if self.scale is None:
                    values = values.astype(wide)
                elif values.dtype == np.uint8:  # rounded once
                    values = (np.arange(256) * self.scale).astype(wide)[values]
                else:
                    values = (values * np.float64(self.scale)).astype(wide)
                values = values if self.mean is None else values - _along(self.mean, values.ndim).astype(wide)
                values = values if self.std is None else values / _along(self.std, values.ndim).astype(wide)
            if self.dtype is None:
                return values
            converted = values.astype(numpy_type(self.dtype), order="C")
        if values.dtype.kind in "iu" and converted.dtype.kind in "iu" and not (converted == values).all():
            raise InputError(f"{self.what}: has an integer beyond {self.dtype}", "Check the values.")
        return converted

    def _tensor(self, values: Any) -> Any:
        values = values.detach()
        if self.words or self.scale is not None:
            double = self.dtype == "float64" or not values.is_floating_point()
            values = values.double() if double else values.float()
            values = values if self.scale is None else values * self.scale
            values = values if self.dtype == "float64" else values.float()
            for given, sign in ((self.mean, -1), (self.std, 1)):
                if given is not None:
                    each = values.new_tensor(given).reshape(_along(given, values.ndim).shape)
                    values = values - each if sign < 0 else values / each
        return getattr(values, CASTS[self.dtype])() if self.dtype in CASTS else values


def _along(values: Sequence[float], axes: int) -> NDArray[np.float64]:
    return np.array(values).reshape((1, -1) + (1,) * (axes - 2))


@dataclass(frozen=True)
class Found:
    """An input as it lies in the data."""

    wanted: Wanted
    shape: tuple[int, ...]
    """With the axis of samples."""
    dtype: str

    @property
    def kind(self) -> str:
        """numpy's letter: f, i, u, b, c."""
        return numpy_type(self.dtype).kind

    @property
    def scalable(self) -> bool:
        """Whether a factor, a mean and a standard deviation can be meant for it."""
        floats = self.wanted.dtype.startswith(("float", "bfloat"))
        whole = self.kind in "iu" and (self.dtype == "uint8" or not self.wanted.loose)
        return floats and bool(self.shape) and (self.kind == "f" or whole)


@dataclass(frozen=True)
class Conversions:
    """Those of all inputs."""

    by_name: Mapping[str, Conversion]
    notes: tuple[str, ...] = field(default=())


def conversions(origin: str, found: Sequence[Found], options: DataOptions) -> Conversions:
    """What is to be done to each input, and notes on it. A factor, a mean and a standard deviation are for bytes
    where an input is given as bytes, otherwise for all floats.

    Raises UsageError for a shape, a type or a number of channels that does not fit."""
    bytes_ = [entry for entry in found if entry.scalable and entry.dtype == "uint8"]
    meant = [entry.wanted.name for entry in bytes_ or [entry for entry in found if entry.scalable]]
    used = {"--scale": options.scale, "--mean": options.mean, "--std": options.std}
    given = [name for name, value in used.items() if value is not None]
    if given and not meant:
        raise UsageError(f"{origin}: {given[0]} is for floats, and the model takes none here", f"Leave {given[0]} out.")
    result, notes = {}, []
    for entry in found:
        check_shape(origin, entry)
        name = entry.wanted.name
        conversion = _conversion(origin, entry, options if name in meant else DataOptions())
        result[name] = conversion
        if entry.kind == "f" and _width(entry.dtype) > _width(conversion.dtype or entry.dtype):
            notes.append(f"{name}: {entry.dtype} is cast to {conversion.dtype}")
    return Conversions(result, tuple(notes))


def _width(dtype: str) -> int:
    return next((width for name, width in WIDTHS.items() if dtype.startswith(name)), 0)


def check_shape(origin: str, found: Found) -> None:
    """Expected against found, the number of samples left aside. Raises UsageError."""
    wanted, shape = found.wanted, found.shape
    if wanted.shape is None:
        return
    fixed = wanted.shape[1:]
    same = len(shape) == len(wanted.shape) and all(
        not isinstance(b, int) or a == b for a, b in zip(shape[1:], fixed, strict=True)
    )
    if not same:
        error = wrong_shape(origin, shape, wanted)
        if shape[1:] and len(shape) == len(wanted.shape) == 4 and _is_square(fixed) and shape[1] == fixed[0]:
            error.hint = f"Give data of that shape; images are resized by --image-size {fixed[1]}."
        raise error


def _is_square(shape: Sequence[object]) -> bool:
    return len(shape) == 3 and isinstance(shape[1], int) and shape[1] == shape[2]


def _conversion(origin: str, found: Found, options: DataOptions) -> Conversion:
    wanted, kind = found.wanted, found.kind
    what = f"{origin}: {wanted.name}"
    target = numpy_type(wanted.dtype)
    if target.kind == "f" and kind in "iu" and options.scale is None:
        if found.dtype == "uint8":
            raise UsageError(
                f"{what} is uint8, the model takes {wanted.dtype}",
                "Add --scale 0.00392157 (1/255) for values in 0..1, or --scale 1 for 0..255.",
            )
        if not wanted.loose:
            raise UsageError(
                f"{what} is {found.dtype}, the model takes {wanted.dtype}",
                f"Convert it to {wanted.dtype}, or add --scale 1.",
            )
    if wanted.loose and kind in "iub" and options.scale is None:
        return Conversion(what)
    source = numpy_type(found.dtype)
    if not np.can_cast(source, target, "same_kind") or (kind == "f" and target.kind == "c" and not wanted.loose):
        raise wrong_type(origin, found.dtype, wanted)
    for option, values in (("--mean", options.mean), ("--std", options.std)):
        channels = found.shape[1] if len(found.shape) > 1 else 1
        if values is not None and len(values) not in (1, channels):
            raise UsageError(
                f"{origin}: {option} has {len(values)} values, {wanted.name} has {channels} channels "
                f"({lengths(found.shape)})",
                "Give one for each channel (axis 1), or one for all.",
            )
    mean = None if options.mean is None else tuple(options.mean)
    std = None if options.std is None else tuple(options.std)
    return Conversion(what, options.scale, mean, std, wanted.dtype)


def nonfinite(values: Any) -> NDArray[np.bool_]:
    """Which samples of an array or a tensor hold NaN or Inf, shape (samples,)."""
    if is_tensor(values):
        if not (values.is_floating_point() or values.is_complex()) or bool(values.isfinite().all()):
            return np.zeros(len(values), bool)
        return ~np.asarray(values.isfinite().reshape(len(values), -1).all(1).tolist(), bool)
    if values.dtype.kind not in "fc" or np.isfinite(values).all():
        return np.zeros(len(values), bool)
    return np.asarray(~np.isfinite(values).reshape(len(values), -1).all(1))


def chosen(value: Any, keep: NDArray[np.bool_]) -> Any:
    """Some samples of an array or a tensor, a copy; anything else as it is."""
    if not is_array(value) or not value.ndim:
        return value
    return value[np.flatnonzero(keep).tolist()]


def class_labels(origin: str, values: Any) -> NDArray[np.int64]:
    """The right classes of some samples, shape (samples,). Raises InputError for what are none."""
    array = np.asarray(values.detach().cpu().numpy() if is_tensor(values) else values)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.shape[1:] not in ((), (1,)):
        raise InputError(
            f"{origin}: labels are {lengths(array.shape)} of {array.dtype}", "Give one integer for each sample."
        )
    return array.reshape(-1).astype(np.int64)
