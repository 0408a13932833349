"""What a model takes, and whether an array fits it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.data import Batch
from normdoctor.errors import CannotRunError, UsageError
from normdoctor.flow.graph import Shape

if TYPE_CHECKING:
    from normdoctor.models.loaded import Loaded


@dataclass(frozen=True)
class Wanted:
    """One input of a model; one whose name begins with a star stands for any number of them (*args, **kwargs)."""

    name: str
    shape: Shape | None
    """None where not even the number of axes is known; whatever is no int in it is an open length."""
    dtype: str = "float32"
    """torch's name of the element type."""
    optional: bool = False
    """The model runs without it."""
    loose: bool = False
    """`dtype` is only the float type of the model: integers may be meant as they are (tokens, masks)."""

    def __str__(self) -> str:
        lengths = "?" if self.shape is None else " x ".join(str(n) if isinstance(n, int) else "?" for n in self.shape)
        return f"{self.name} ({lengths or 'a single number'}, {self.dtype})"

    @property
    def fixed_batch(self) -> int | None:
        """The one length of the first axis that the model takes, None where it is open."""
        return self.shape[0] if self.shape and isinstance(self.shape[0], int) else None


def wanted_of(loaded: Loaded, dtype: str = "float32") -> tuple[Wanted, ...]:
    """The arguments of a module's forward, nothing where its code does not say them.

    dtype: the float type of its weights."""
    from normdoctor.models.loaded import parameters_of, required_of

    names = parameters_of(loaded)
    required = set(required_of(loaded)) or set(names[:1])
    return tuple(Wanted(name, None, dtype, optional=name not in required, loose=True) for name in names)


def plain(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Those with a name of their own."""
    return [entry for entry in wanted if not entry.name.startswith("*")]


def required(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Those without which the model does not run; the first one where it needs none, since something must go in."""
    named = plain(wanted)
    return [entry for entry in named if not entry.optional] or named[:1]


def by_place(wanted: Sequence[Wanted]) -> list[Wanted]:
    """Those that can be given without a name."""
    found: list[Wanted] = []
    for entry in wanted:
        if entry.name.startswith("*"):
            break
        found.append(entry)
    return found


def takes_any_place(wanted: Iterable[Wanted]) -> bool:
    """Whether there is an *args."""
    return any(entry.name.startswith("*") and not entry.name.startswith("**") for entry in wanted)


def takes_any_name(wanted: Iterable[Wanted]) -> bool:
    """Whether there is a **kwargs."""
    return any(entry.name.startswith("**") for entry in wanted)


def entry_for(name: str, wanted: Sequence[Wanted]) -> Wanted:
    """The input of this name; of one that goes into *args or **kwargs what is known of all inputs."""
    for entry in wanted:
        if entry.name == name:
            return entry
    dtype = wanted[0].dtype if wanted else "float32"
    return Wanted(name, None, dtype, optional=True, loose=True)


def arranged(values: Mapping[str, Any], wanted: Sequence[Wanted]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by place as far as there is no gap (what was exported by place takes no names), the rest by name."""
    rest = dict(values)
    args = []
    for entry in by_place(wanted):
        if entry.name not in rest:
            break
        args.append(rest.pop(entry.name))
    if takes_any_place(wanted) and len(args) == len(by_place(wanted)):
        while f"input_{len(args)}" in rest:
            args.append(rest.pop(f"input_{len(args)}"))
    return tuple(args), rest


def named(batch: Batch, wanted: Sequence[Wanted]) -> dict[str, Any]:
    """The arguments of a batch by the names of the inputs: what onnxruntime is fed with."""
    names = [entry.name for entry in by_place(wanted)]
    given = {names[i] if i < len(names) else f"input_{i}": value for i, value in enumerate(batch.args)}
    return {**given, **batch.kwargs}


def numpy_type(dtype: str) -> np.dtype[np.generic]:
    """numpy's type for arrays of torch's `dtype`; bfloat16 and float8 go as float32."""
    if dtype.startswith(("bfloat", "float8")):
        return np.dtype(np.float32)
    try:
        return np.dtype(dtype)
    except TypeError:
        raise CannotRunError(
            f"an input of type {dtype} cannot be made up, and not be read from --data", "Only numbers can be given."
        ) from None


def fitted(path: Path | str, array: NDArray[np.generic], wanted: Wanted) -> NDArray[np.generic]:
    """The array in the input's own type."""
    if not fits(array.shape, wanted.shape):
        raise wrong_shape(path, array.shape, wanted)
    dtype = numpy_type(wanted.dtype)
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise wrong_type(path, str(array.dtype), wanted)
    if not array.size:
        raise UsageError(f"{path}: {wanted.name} is empty ({lengths(array.shape)})", "Give at least one sample.")
    return array.astype(dtype, order="C")  # a single number stays one


def wrong_shape(path: Path | str, shape: Sequence[int], wanted: Wanted) -> UsageError:
    """Expected against found."""
    return UsageError(
        f"{path}: {wanted.name} is {lengths(shape)}, the model takes {wanted}", "Give data of that shape."
    )


def wrong_type(path: Path | str, dtype: str, wanted: Wanted) -> UsageError:
    """Expected against found."""
    return UsageError(
        f"{path}: {wanted.name} is {dtype}, the model takes {wanted}", f"Convert it to {wanted.dtype} first."
    )


def fits(shape: Sequence[int], wanted: Shape | None) -> bool:
    """Whether an array of this shape is what an input of that one takes."""
    if wanted is None:
        return True
    return len(shape) == len(wanted) and all(
        not isinstance(b, int) or a == b for a, b in zip(shape, wanted, strict=True)
    )


def lengths(shape: Sequence[int]) -> str:
    """A shape in words.

    >>> lengths((2, 3)), lengths(())
    ('2 x 3', 'a single number')
    """
    return " x ".join(map(str, shape)) or "a single number"


def count_inputs(wanted: Sequence[Wanted]) -> str:
    """How many they are, in words."""
    return f"{len(wanted)} input{'' if len(wanted) == 1 else 's'}"


def listed(wanted: Iterable[Wanted]) -> str:
    """A sentence that names them."""
    entries = list(wanted)
    return "The model takes " + ", ".join(map(str, entries[:8])) + (", ..." if len(entries) > 8 else ".")
