"""What both models are fed with for the proof: random numbers that fit, or the user's own (--data)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normdoctor.data.files import open_arrays
from normdoctor.data.rows import MAX_WHOLE
from normdoctor.data.wanted import Wanted, count_inputs, fits, fitted, listed, numpy_type
from normdoctor.errors import CannotRunError, InputError, UsageError, did_you_mean
from normdoctor.models.inputs import InputSpec

Arrays = dict[str, NDArray[np.generic]]

MAX_BYTES = 1 << 32
"""Of an input that is made up."""

BATCH = 2
"""Length of the first axis where the model leaves it open: one sample would not show a fold over the batch."""

OPEN_LENGTHS = (64, 224, 32, 16, 7, 1)
"""What other open axes are tried with, one after the other, until the model takes it."""


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
                    f"--input-shape is given {len(given)} times, the model has {count_inputs(wanted)}", listed(wanted)
                )
            name = wanted[place].name
        if name not in by_name:
            raise UsageError(f"--input-shape: no input {name!r}", did_you_mean(name, by_name) + listed(wanted))
        if not fits(spec.shape, by_name[name].shape):
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


def load_data(path: Path, wanted: Sequence[Wanted]) -> Arrays:
    """The arrays of a file by input name, or a single one without a name for the only input.

    Raises InputError for a file of no arrays, UsageError for arrays that do not fit the model."""
    arrays = read_data(path, wanted)
    names = [entry.name for entry in wanted]
    for name in arrays:
        if name not in names:
            raise UsageError(f"{path}: the model has no input {name!r}", did_you_mean(name, names) + listed(wanted))
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UsageError(f"{path}: has nothing for input {missing[0]}", listed(wanted))
    return {entry.name: fitted(path, arrays[entry.name], entry) for entry in wanted}


def read_data(path: Path, wanted: Sequence[Wanted]) -> Mapping[str, NDArray[np.generic]]:
    """The arrays of a file by their names; where it has but one without a name, by that of the only input wanted.

    Raises InputError for a file of no arrays, UsageError for a single array where more inputs are wanted."""
    file = open_arrays(path)
    try:
        if "" in file.arrays and len(wanted) != 1:
            raise UsageError(
                f"{path}: one array, and the model has {count_inputs(wanted)}", f"Use .npz. {listed(wanted)}"
            )
        size = sum(math.prod(rows.shape) * numpy_type(rows.dtype).itemsize for rows in file.arrays.values())
        if size > MAX_WHOLE:
            raise InputError(f"{path}: {size:,} bytes of data", "A few samples are enough.")
        return {name or wanted[0].name: rows.whole() for name, rows in file.arrays.items()}
    finally:
        file.close()
