"""What both models are fed with for the proof: random numbers that fit, or the user's own (--data)."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import CannotRunError, InputError, UsageError, did_you_mean
from normdoctor.flow.graph import Shape
from normdoctor.models.inputs import InputSpec

Arrays = dict[str, NDArray[np.generic]]

MAX_BYTES = 1 << 32
"""Of all arrays of one --data file together."""

BATCH = 2
"""Length of the first axis where the model leaves it open: one sample would not show a fold over the batch."""

OPEN_LENGTHS = (64, 224, 32, 16, 7, 1)
"""What other open axes are tried with, one after the other, until the model takes it."""


@dataclass(frozen=True)
class Wanted:
    """One input of a model."""

    name: str
    shape: Shape | None
    """None where not even the number of axes is known; whatever is no int in it is an open length."""
    dtype: str = "float32"
    """torch's name of the element type."""

    def __str__(self) -> str:
        lengths = "?" if self.shape is None else " x ".join(str(n) if isinstance(n, int) else "?" for n in self.shape)
        return f"{self.name} ({lengths or 'a single number'}, {self.dtype})"


def with_shapes(wanted: Sequence[Wanted], given: Sequence[InputSpec]) -> tuple[Wanted, ...]:
    """The inputs with the shapes that --input-shape gives them, by name or by place.

    Raises UsageError for a name that is none of theirs and for a shape that the model does not take."""
    by_name = {entry.name: entry for entry in wanted}
    chosen: dict[str, InputSpec] = {}
    for place, spec in enumerate(given):
        name = spec.name
        if name is None:
            if place >= len(wanted):
                raise UsageError(
                    f"--input-shape is given {len(given)} times, the model has {_inputs(wanted)}", _listed(wanted)
                )
            name = wanted[place].name
        if name not in by_name:
            raise UsageError(f"--input-shape: no input {name!r}", did_you_mean(name, by_name) + _listed(wanted))
        if not _fits(spec.shape, by_name[name].shape):
            raise UsageError(f"--input-shape {spec}: does not fit {by_name[name]}", _example(by_name[name], spec))
        if spec.dtype not in (None, by_name[name].dtype):
            raise UsageError(f"--input-shape {spec}: the model takes {by_name[name]}", _example(by_name[name], spec))
        chosen[name] = spec
    return tuple(
        Wanted(entry.name, chosen[entry.name].shape, entry.dtype) if entry.name in chosen else entry for entry in wanted
    )


def _example(wanted: Wanted, given: InputSpec) -> str:
    """What could have been written instead: lengths that the model leaves open as they are given."""
    lengths = given.shape
    if wanted.shape is not None:
        spare = given.shape if len(given.shape) == len(wanted.shape) else (BATCH,) * len(wanted.shape)
        lengths = tuple(n if isinstance(n, int) else other for n, other in zip(wanted.shape, spare, strict=True))
    return f"Write --input-shape {InputSpec(lengths, wanted.name, wanted.dtype)}."


def random_inputs(wanted: Sequence[Wanted], seed: int) -> Iterator[Arrays]:
    """Numbers of every input, for one choice of the open lengths after the other; one where none is open.

    Floats are normally distributed; integers are 0 or 1, which every table of embeddings and every mask has.
    Raises CannotRunError for an input of unknown rank, of an odd type or beyond all memory."""
    for entry in wanted:
        if entry.shape is None:
            raise CannotRunError(
                f"input {entry.name}: the file does not say its shape", f"Add --input-shape {entry.name}=1,3,224,224."
            )
    batch = {entry.shape[0] for entry in wanted if entry.shape}
    is_open = any(
        not isinstance(n, int) and (n is None or n not in batch) for entry in wanted for n in (entry.shape or ())[1:]
    )
    for length in OPEN_LENGTHS if is_open else OPEN_LENGTHS[:1]:
        generator = np.random.default_rng(seed)
        yield {entry.name: _random(entry, length, batch, generator) for entry in wanted}


def _random(
    wanted: Wanted, length: int, batch: set[int | str | None], generator: np.random.Generator
) -> NDArray[np.generic]:
    """batch: the names that open first axes have, which other axes may share."""
    shape = tuple(
        n if isinstance(n, int) else BATCH if place == 0 or (n is not None and n in batch) else length
        for place, n in enumerate(wanted.shape or ())
    )
    if math.prod(shape) * 8 > MAX_BYTES:
        raise CannotRunError(
            f"input {wanted}: {math.prod(shape):,} elements are too many", "Give smaller --input-shape."
        )
    dtype = numpy_type(wanted.dtype)
    if dtype.kind in "iub":
        return generator.integers(0, 2, shape).astype(dtype)
    values = generator.standard_normal(shape)
    return (values + 1j * generator.standard_normal(shape)).astype(dtype) if dtype.kind == "c" else values.astype(dtype)


def numpy_type(dtype: str) -> np.dtype[np.generic]:
    """numpy's type for arrays of torch's `dtype`; bfloat16 and float8 go as float32."""
    if dtype.startswith(("bfloat", "float8")):
        return np.dtype(np.float32)
    try:
        return np.dtype(dtype)
    except TypeError:
        raise CannotRunError(f"an input of type {dtype} cannot be made up", "Give it with --data.") from None


def load_data(path: Path, wanted: Sequence[Wanted]) -> Arrays:
    """The arrays of a .npz file by input name, or of a .npy file for the only input.

    Raises InputError for a file that is neither, UsageError for arrays that do not fit the model."""
    arrays = read_data(path, wanted)
    names = [entry.name for entry in wanted]
    for name in arrays:
        if name not in names:
            raise UsageError(f"{path}: the model has no input {name!r}", did_you_mean(name, names) + _listed(wanted))
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UsageError(f"{path}: has nothing for input {missing[0]}", _listed(wanted))
    return {entry.name: fitted(path, arrays[entry.name], entry) for entry in wanted}


def read_data(path: Path, wanted: Sequence[Wanted]) -> Mapping[str, NDArray[np.generic]]:
    """The arrays of a .npz file by their names, that of a .npy file by the name of the only input wanted.

    Raises InputError for a file that is neither, UsageError for a .npy file where more inputs are wanted."""
    try:
        return _read(path, wanted)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", "Check the path given with --data.") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise _unreadable(path, error) from None
    except (NotImplementedError, RuntimeError, SyntaxError) as error:  # a compression or a password, an odd header
        raise _unreadable(path, error) from None


def _read(path: Path, wanted: Sequence[Wanted]) -> Mapping[str, NDArray[np.generic]]:
    with path.open("rb") as file:
        head = file.read(6)
    if head == b"\x93NUMPY":
        if len(wanted) != 1:
            raise UsageError(f"{path}: one array, and the model has {_inputs(wanted)}", f"Use .npz. {_listed(wanted)}")
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header's shape must be in the file
        _check_size(path, array.nbytes)
        return {wanted[0].name: np.array(array)}
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: neither .npz nor .npy", "Save it with numpy.savez(file, input_name=array).")
    with zipfile.ZipFile(path) as archive:
        _check_size(path, sum(entry.file_size for entry in archive.infolist()))
    with np.load(path, allow_pickle=False) as arrays:
        return {name: _member(arrays, name) for name in arrays.files}


def _member(arrays: Mapping[str, object], name: str) -> NDArray[np.generic]:
    array = arrays[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is no array")
    return array


def _check_size(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size:,} bytes of data", "A few samples are enough.")


def _unreadable(path: Path, error: Exception) -> InputError:
    lines = str(error).splitlines() or [type(error).__name__]
    return InputError(f"{path}: cannot be read as .npz or .npy ({lines[0][:200]})", "Save it with numpy.savez.")


def fitted(path: Path, array: NDArray[np.generic], wanted: Wanted) -> NDArray[np.generic]:
    """The array in the input's own type."""
    found = " x ".join(map(str, array.shape)) or "a single number"
    if not _fits(array.shape, wanted.shape):
        raise UsageError(f"{path}: {wanted.name} is {found}, the model takes {wanted}", "Give data of that shape.")
    dtype = numpy_type(wanted.dtype)
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise UsageError(
            f"{path}: {wanted.name} is {array.dtype}, the model takes {wanted}", f"Convert it to {wanted.dtype} first."
        )
    if not array.size:
        raise UsageError(f"{path}: {wanted.name} is empty ({found})", "Give at least one sample.")
    return array.astype(dtype, order="C")  # a single number stays one


def _fits(shape: Sequence[int], wanted: Shape | None) -> bool:
    if wanted is None:
        return True
    return len(shape) == len(wanted) and all(
        not isinstance(b, int) or a == b for a, b in zip(shape, wanted, strict=True)
    )


def _inputs(wanted: Sequence[Wanted]) -> str:
    return f"{len(wanted)} input{'' if len(wanted) == 1 else 's'}"


def _listed(wanted: Iterable[Wanted]) -> str:
    listed = list(wanted)
    return "The model takes " + ", ".join(map(str, listed[:8])) + (", ..." if len(listed) > 8 else ".")
