"""What the weights of a convolution or a matrix product make of the means of its inputs, read in runs of rows.

No more than a run is held at a time, whatever the size of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.flow.affine import Array, Blocked
from normdoctor.flow.constants import Constants
from normdoctor.flow.graph import Node, Op, Value
from normdoctor.flow.weights import WEIGHTED, whole_shape
from normdoctor.layers import ArrayRef, Sliceable, Vector, rows

RUN = 1 << 20
"""Bytes of a run: few enough to stay in the cache of the processor while all is worked out of them, and for OpenBLAS
not to share out the product (above 460,800 elements), whose threads cost ten times as much where a core is busy."""

MAX_WHOLE = 1 << 26
"""Bytes of a weight, or of a single row, that cannot be read in parts."""

MAX_CHANNELS = 1 << 22
"""No operator before a norm has more."""

MAX_COMPUTED = 1 << 23
"""Elements of a weight that is computed from stored tensors: it is held whole, in float64."""

MAX_MOVES = 8
"""Casts and transpositions between a stored tensor and the operator that uses it."""

WIDTHS = {"float8": 1, "float16": 2, "bfloat16": 2, "float32": 3, "float64": 4}
"""Types of floating point in the order in which a cast loses nothing; the two of 16 bits hold no other."""


@dataclass(frozen=True, eq=False)
class Reach:
    """What the weights of one operator do to each of its output channels."""

    means: Vector | None
    """Sum over inputs and taps of weight * expectation; NaN where it is not finite. None where none was given."""
    largest: Vector
    """Largest |weight|; NaN where there is a NaN among them."""
    variances: Vector | None = None
    """Sum of weight^2 * spread; NaN where it is not finite. None where no spread was given."""


def reach_of(
    node: Node, constants: Constants, expectation: Array | None, spread: Array | None = None, limit_bytes: int = RUN
) -> Reach:
    """The weights of a convolution, of either kind, or of a matrix product of data with a constant matrix.

    expectation: mean of the input that each weight sees: (input channels) or (input channels, *kernel) of a
    convolution, (features) of a product. spread: its variance, of inputs that do not depend on each other. alpha of a
    product counts, bias and beta do not. Raises Blocked, and InputError where the weights cannot be read."""
    layout = _layout_of(node, constants)
    _check_size(layout)
    sides = [None if given is None else layout.spread_out(np.asarray(given)) for given in (expectation, spread)]
    totals = _Totals(layout, *sides)
    with np.errstate(all="ignore"):
        for start, run in _runs(layout, constants, limit_bytes):
            totals.take(start, run.reshape(len(run), -1))
    return totals.result(float(node.attributes.get("alpha", 1.0)) if node.op is Op.MATMUL else 1.0)


@dataclass(frozen=True, eq=False)
class _Layout:
    """A weight as a stack of rows: one for each output channel, or one for each input."""

    value: Value
    array: ArrayRef | None
    """Where it is stored; None: computed."""
    by_input: bool
    """Whether a row is an input channel, as in (in, out/groups, *kernel)."""
    groups: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def spread_out(self, given: NDArray[Any]) -> Array:
        """One number for each input and tap: (inputs, taps)."""
        if given.shape not in ((self.inputs,), (self.inputs, *self.kernel)):
            raise Blocked(
                "wrong-axis", f"its input has {list(given.shape)} channels where the weights have {self.inputs}"
            )
        flat = given.reshape(self.inputs, -1).astype(np.float64, copy=False)
        return np.broadcast_to(flat, (self.inputs, self.taps))


def _layout_of(node: Node, constants: Constants) -> _Layout:
    value = node.given(1)
    what = node.label or node.y.name
    if node.op not in WEIGHTED or value is None or not constants.knows(value):
        raise Blocked("computed-weight", f"the weights of {what} are computed")
    shape = whole_shape(value)
    stored, turned = _stored_behind(value)
    if stored is not None and stored.shape != (shape[::-1] if turned else shape):
        stored, turned = None, False
    if stored is not None and stored.dtype.startswith("complex"):
        raise Blocked("computed-weight", f"the weights of {what} are complex numbers")
    if node.op is Op.MATMUL:
        if len(shape) != 2 or 0 in shape:
            raise Blocked("wrong-axis", f"weights of the shape {list(shape)} are no matrix")
        by_input = not node.attributes.get("transpose_b")
        inputs, outputs = shape if by_input else shape[::-1]
        return _Layout(value, stored, by_input != turned, 1, inputs, outputs)
    groups = int(node.attributes.get("groups", 1))
    if len(shape) < 3 or groups < 1 or shape[0] % groups or 0 in shape:
        raise Blocked("wrong-axis", f"weights of the shape {list(shape)} fit no convolution of {groups} groups")
    by_input = node.op is Op.CONV_TRANSPOSE
    inputs, outputs = (shape[0], shape[1] * groups) if by_input else (shape[1] * groups, shape[0])
    return _Layout(value, stored, by_input, groups, inputs, outputs, shape[2:])


def _stored_behind(value: Value) -> tuple[ArrayRef | None, bool]:
    """Where the weights are stored, and whether as the transpose of a matrix; None where more is computed."""
    turned = False
    for _ in range(MAX_MOVES):
        if value.array is not None:
            return value.array, turned
        node = value.producer
        if node is None:
            break
        if node.op is Op.TRANSPOSE and tuple(node.attributes["order"]) == (1, 0):
            turned = not turned
        elif node.op is not Op.IDENTITY and not (node.op is Op.CAST and _loses_nothing(node.x.dtype, value.dtype)):
            break
        value = node.x
    return None, False


def _loses_nothing(before: str | None, after: str | None) -> bool:
    if before is None or before == after:
        return before == after
    widths = [WIDTHS.get("float8" if name.startswith("float8") else name, 0) for name in (before, after or "")]
    return 0 < widths[0] < widths[1]


def _check_size(layout: _Layout) -> None:
    ref, name = layout.array, layout.value.name
    if max(layout.inputs, layout.outputs) > MAX_CHANNELS:
        raise Blocked("too-large", f"the weights {name} have too many channels")
    if ref is None:
        if math.prod(whole_shape(layout.value)) > MAX_COMPUTED:
            raise Blocked("too-large", f"the weights {name} are computed, from too many elements")
        return
    apart = ref.shape[0] if isinstance(ref, Sliceable) and ref.has_rows else 1
    if 4 * math.prod(ref.shape) // apart > MAX_WHOLE:
        raise Blocked("too-large", f"the weights {name} cannot be read in parts, and are too many")


def _runs(layout: _Layout, constants: Constants, limit_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """The weights in runs of rows, each with the index of its first."""
    if layout.array is None:
        return iter([(0, constants.array(layout.value))])
    return rows(layout.array, limit_bytes)


class _Totals:
    """What is known of each output channel after some runs."""

    def __init__(self, layout: _Layout, expectation: Array | None, spread: Array | None) -> None:
        self._layout = layout
        self._given = (expectation, spread)
        self._cast: dict[tuple[int, np.dtype[Any]], NDArray[Any]] = {}
        self._largest = np.zeros(layout.outputs)
        self._sums = np.zeros((2, layout.outputs))

    def take(self, start: int, run: NDArray[Any]) -> None:
        """A run of rows, flat, the first of which is the row `start`."""
        wide = run.dtype.kind == "f" and run.dtype.itemsize == 8
        run = run.astype(np.float64 if wide else np.float32, copy=False)
        take = self._take_inputs if self._layout.by_input else self._take_outputs
        take(start, run)

    def result(self, alpha: float) -> Reach:
        means, variances = (
            None if given is None else np.where(np.isfinite(sums), factor * sums, np.nan)
            for given, sums, factor in zip(self._given, self._sums, (alpha, alpha**2), strict=True)
        )
        return Reach(means, abs(alpha) * self._largest, variances)

    def _factors(self, place: int, dtype: np.dtype[Any]) -> NDArray[Any] | None:
        """Expectation (0) or spread (1) in the type of the weights: (inputs, taps)."""
        given = self._given[place]
        if given is not None and (place, dtype) not in self._cast:
            self._cast[place, dtype] = np.ascontiguousarray(given, dtype)
        return self._cast.get((place, dtype))

    def _take_outputs(self, start: int, run: NDArray[Any]) -> None:
        stop = start + len(run)
        self._largest[start:stop] = np.maximum(run.max(axis=1), -run.min(axis=1))
        for place in (0, 1):
            factors = self._factors(place, run.dtype)
            if factors is not None:
                powers = np.square(run) if place else run
                self._sums[place, start:stop] = self._by_group(start, powers, factors)

    def _by_group(self, start: int, run: NDArray[Any], factors: NDArray[Any]) -> NDArray[Any]:
        """Each row times the inputs of its group."""
        groups, each = self._layout.groups, self._layout.outputs // self._layout.groups
        factors = factors.reshape(groups, -1)
        if groups == 1:
            return np.asarray(run @ factors[0])
        found = np.empty(len(run), run.dtype)
        place = 0
        while place < len(run):
            group, inside = divmod(start + place, each)
            whole = 0 if inside else (len(run) - place) // each
            if whole:
                stop = place + whole * each
                stacked = run[place:stop].reshape(whole, each, -1)
                found[place:stop] = (stacked @ factors[group : group + whole, :, None]).reshape(-1)
            else:
                stop = min(place + each - inside, len(run))
                found[place:stop] = run[place:stop] @ factors[group]
            place = stop
        return found

    def _take_inputs(self, start: int, run: NDArray[Any]) -> None:
        layout = self._layout
        each, outputs, taps = layout.inputs // layout.groups, layout.outputs // layout.groups, layout.taps
        first, last = start // each, (start + len(run) - 1) // each
        begins = np.maximum(np.arange(first, last + 1) * each - start, 0)
        of_groups = slice(first * outputs, (last + 1) * outputs)
        high, low = (_reduced(function, run, begins) for function in (np.maximum, np.minimum))
        largest = np.maximum(high, -low).reshape(-1, taps).max(axis=1)
        self._largest[of_groups] = np.maximum(self._largest[of_groups], largest)
        for place in (0, 1):
            factors = self._factors(place, run.dtype)
            if factors is None:
                continue
            own = factors[start : start + len(run)]
            powers = np.square(run) if place else run
            if taps == layout.groups == 1:
                self._sums[place] += own[:, 0] @ powers
            else:
                products = (powers.reshape(len(run), outputs, taps) @ own[:, :, None])[..., 0]
                self._sums[place, of_groups] += np.add.reduceat(products, begins, axis=0, dtype=np.float64).reshape(-1)


def _reduced(function: np.ufunc, run: NDArray[Any], begins: NDArray[Any]) -> NDArray[Any]:
    """Over the rows from each of `begins` on."""
    if len(begins) == 1:
        return np.asarray(function.reduce(run, axis=0))
    return np.asarray(function.reduceat(run, begins, axis=0))
