"""One call of a torch operator, as every source hands it over, and what its translators share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.flow.graph import Fixed, Node, Op, Shape, Value
from normdoctor.readers.arrays import FLOAT_TYPES, ITEM_SIZES

PART = Fixed("part-of-a-call", "it is only a part of what one operator computes")


@dataclass(eq=False)
class Call:
    """One operator at one place."""

    operator: str
    """Without namespace and overload: conv2d, relu_ in place. One that is not torch's own with its namespace."""
    overload: str
    """Empty or "default" where there is one only."""
    arguments: dict[str, Any]
    """Name in the schema → Value, list of Value and None, int, float, bool, str, None, or a list of int in which None
    stands for a length that depends on the input. What is not given has the schema's default."""
    outputs: list[Value]
    """All of them in order, those of a split too, whether used or not."""
    label: str = ""
    site: Any = None
    """What the source needs to find the call again."""
    fixed: Fixed | None = None

    @property
    def in_place(self) -> bool:
        """Whether it overwrites its first argument."""
        return self.operator.endswith("_") and not self.operator.endswith("__")

    @property
    def name(self) -> str:
        """The operator as if it did not overwrite anything."""
        return self.operator[:-1] if self.in_place else self.operator

    @property
    def written(self) -> str:
        """As reports name the operator."""
        return self.operator if "::" in self.operator or "." in self.operator else f"aten.{self.operator}"

    def value(self, name: str) -> Value | None:
        """A tensor argument; None where it is absent or no tensor."""
        found = self.arguments.get(name)
        return found if isinstance(found, Value) else None

    def integer(self, name: str, default: int | None = None) -> int | None:
        """A whole number; None for one that depends on the input."""
        found = self.arguments.get(name, default)
        return found if type(found) is int else None

    def number(self, name: str, default: float | None = None) -> float | None:
        found = self.arguments.get(name, default)
        return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None

    def flag(self, name: str, default: bool) -> bool | None:
        found = self.arguments.get(name, default)
        return found if isinstance(found, bool) else None

    def lengths(self, name: str, default: Sequence[int] | None = None) -> list[int | None] | None:
        """A list of whole numbers, one of them as a list of one; None where it is absent."""
        found = self.arguments.get(name)
        found = default if found is None else found
        if type(found) is int:
            return [found]
        if not isinstance(found, (list, tuple)):
            return None
        return [length if type(length) is int else None for length in found]

    @property
    def tensors(self) -> list[Value]:
        """Every tensor among the arguments, in order."""
        found: list[Value] = []
        for argument in self.arguments.values():
            entries = argument if isinstance(argument, (list, tuple)) else (argument,)
            found += [entry for entry in entries if isinstance(entry, Value)]
        return found


@dataclass(frozen=True, eq=False)
class Site:
    """`Node.site` of every node that comes from a call."""

    call: Call
    slots: tuple[str | None, ...] = ()
    """The name of the argument behind each input of the node, also of those that it leaves empty (a bias); None where
    there is none. Of an addition it may be a number, or be multiplied with another argument, alpha: whoever puts
    another tensor in its place drops alpha."""


Translator = Callable[[Call], "list[Node] | None"]


@dataclass(frozen=True, eq=False)
class Literal:
    """An array that the code writes out: a number, or one number all over a shape."""

    value: float
    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def identity(self) -> Hashable:
        return ("literal", self.value, self.dtype, self.shape)

    def numpy(self) -> NDArray[Any]:
        dtype = self.dtype if self.dtype in np.sctypeDict else "float32"
        return np.broadcast_to(np.asarray(self.value).astype(dtype), self.shape)


def literal(call: Call, name: str, value: float, dtype: str | None) -> Value:
    """A number among the arguments as a value."""
    array = Literal(value, dtype if dtype in ITEM_SIZES else "float64")
    return Value(f"{call.outputs[0].name}:{name}", (), array.dtype, array)


def other(call: Call) -> Node:
    """A call that is not understood: nothing moves through it."""
    return Node(Op.OTHER, list(call.tensors), call.outputs, {}, call.written, call.label, call.fixed, Site(call))


def node(
    call: Call, op: Op, inputs: Sequence[Value | None], slots: Sequence[str | None] = (), **attributes: Any
) -> Node:
    """The node that gives the outputs of the call. slots: the argument that each input is, by default "self" alone."""
    site = Site(call, tuple(slots or ("self",)))
    return Node(op, list(inputs), call.outputs, attributes, call.written, call.label, call.fixed, site)


def part(call: Call, op: Op, inputs: Sequence[Value | None], shape: Shape | None, **attributes: Any) -> Node:
    """A node in front of the last one of a call, with an output that the source does not know."""
    x = inputs[0]
    result = Value(f"{call.outputs[0].name}:{op.name.lower()}", shape, x.dtype if x is not None else None)
    return Node(op, list(inputs), [result], attributes, call.written, call.label, PART, Site(call))


def rank(value: Value | None) -> int | None:
    """The number of axes; None where it is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def known(value: Value, place: int) -> int | None:
    """A length of a value; None where it depends on the input."""
    length = value.shape[place] if value.shape is not None and place < len(value.shape) else None
    return length if isinstance(length, int) else None


def is_stored(value: Value | None, depth: int = 6) -> bool:
    """Whether a value is a stored tensor, or computed from such alone in a few steps."""
    if value is None or value.array is not None:
        return True
    maker = value.producer
    return depth > 0 and maker is not None and bool(maker.inputs) and all(is_stored(x, depth - 1) for x in maker.inputs)


def axis(number: int | None, count: int | None) -> int | None:
    """A dimension as torch writes it, which may count from the end, among `count`."""
    if number is None or count is None or not -count <= number < count:
        return None
    return number % count


def axes(numbers: Sequence[int | None] | None, count: int | None) -> tuple[int, ...] | None:
    """Dimensions in rising order; none given means all."""
    if count is None:
        return None
    if not numbers:
        return tuple(range(count))
    found = [axis(number, count) for number in numbers]
    known = {number for number in found if number is not None}
    return tuple(sorted(known)) if len(known) == len(found) else None


def promoted(call: Call, values: Sequence[Value], dtype: str | None) -> tuple[list[Value], list[Node]] | None:
    """The operands in the type in which torch computes the call, and the casts for it.

    None where a type is not known or none of floating point."""
    if dtype not in FLOAT_TYPES:
        return None
    operands, casts = [], []
    for value in values:
        if value.dtype is None:
            return None
        if value.dtype != dtype:
            cast = part(call, Op.CAST, [value], value.shape)
            cast.y.dtype = dtype
            casts.append(cast)
            value = cast.y
        operands.append(value)
    return operands, casts
