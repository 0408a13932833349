"""What a model is fed with, as a user writes it: [NAME=]1,3,224,224[:int64]."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from normdoctor.errors import UsageError, did_you_mean

DTYPES = (
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "bool",
    "complex64",
)
"""Element types of inputs, by torch's names."""

SHORT = {"half": "float16", "float": "float32", "double": "float64", "int": "int32", "long": "int64"}

LENGTHS = re.compile(r"\d+([,x]\d+)*,?")

MAX_ELEMENTS = 1 << 30

EXAMPLE = "Write it like 1,3,224,224, tokens=1,128:int64 or scale=: for a single number."


@dataclass(frozen=True)
class InputSpec:
    """One input of a model."""

    shape: tuple[int, ...]
    name: str | None = None
    """The argument of forward (the input of a graph) it goes to; None: by position."""
    dtype: str | None = None
    """None: the float type of the model's own weights."""

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        dtype = f":{self.dtype}" if self.dtype else ""
        return f"{name}{','.join(map(str, self.shape))}{dtype}"


@dataclass(frozen=True, eq=False)
class Example:
    """Arguments for one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        shown = [_words(value) for value in self.args]
        shown += [f"{name} {_words(value)}" for name, value in self.kwargs.items()]
        return ", ".join(shown) or "none"


def _words(value: Any) -> str:
    """The shape of a tensor, the type of anything else."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        dtype = str(value.dtype).removeprefix("torch.")
        shape = "x".join(str(int(length)) for length in value.shape) or "a single number"
        return shape + ("" if dtype == "float32" else f" {dtype}")
    return type(value).__name__


def parse_input_shapes(texts: Iterable[str]) -> tuple[InputSpec, ...]:
    """The inputs that --input-shape describes, in order. Raises UsageError for a wrong one.

    >>> [str(spec) for spec in parse_input_shapes(["1,3,224,224", "ids=2x16:long"])]
    ['1,3,224,224', 'ids=2,16:int64']
    """
    specs = tuple(map(parse_input_shape, texts))
    names = [spec.name for spec in specs if spec.name]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--input-shape gives {name} twice", "Give each input once.")
    unnamed = [place for place, spec in enumerate(specs) if spec.name is None]
    if unnamed and unnamed[-1] >= len(unnamed):
        raise UsageError("--input-shape: an input without a name follows one with a name", "Name all of them.")
    return specs


def parse_input_shape(text: str) -> InputSpec:
    """One input. Raises UsageError where the text is none."""
    name, equals, rest = text.strip().rpartition("=")
    name = name.strip()
    if equals and not re.fullmatch(r"\S+", name):
        raise UsageError(f"--input-shape {text!r}: no name in front of the =", EXAMPLE)
    lengths, colon, word = rest.partition(":")
    lengths = lengths.strip().strip("[]()").replace(" ", "")
    if not (LENGTHS.fullmatch(lengths) or (not lengths and colon)):
        raise UsageError(f"--input-shape {text!r}: {rest or 'nothing'} is no list of lengths", EXAMPLE)
    shape = tuple(int(length) for length in re.split("[,x]", lengths) if length)
    if 0 in shape:
        raise UsageError(f"--input-shape {text!r}: a length of 0", "Every length must be at least 1.")
    if math.prod(shape) > MAX_ELEMENTS:
        raise UsageError(f"--input-shape {text!r}: {math.prod(shape):,} elements", "Give a smaller input.")
    return InputSpec(shape, name or None, _dtype(text, word.strip()) if word.strip() else None)


def _dtype(text: str, word: str) -> str:
    word = word.removeprefix("torch.").lower()
    dtype = SHORT.get(word, word)
    if dtype not in DTYPES:
        raise UsageError(
            f"--input-shape {text!r}: no element type {word!r}",
            f"{did_you_mean(word, DTYPES)}Types are {', '.join(DTYPES)}.",
        )
    return dtype
