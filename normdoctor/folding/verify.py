"""The proof of a fold: the original and the folded model side by side on the same inputs.

For each output, with channels along axis 1 (an output of fewer than two axes is one channel):

    size(c)  = max(rms of the original over channel c, 1e-3 * rms of the whole output)
    error    = max over c and all elements of c of |folded - original| / size(c)
    noise    = the same of the original in its own type beside the original in float64

The floor of the size keeps a dead channel, whose few values are rounding itself, from deciding. Integers have no
size: their error is the share of elements that differ.

A fold fails where the error is above 1e-4 and above 20 times the noise. Where a run in float64 would take too long,
the noise is estimated by what moving every input by one rounding does to the outputs of the original: the roundings
inside come on top of that, so it is no overestimate. Where neither is possible the noise counts as none. Where folds
change or pass float16 or bfloat16 it counts as at least the distance from 1 to the next number of that type. An error
above 0.1 that only the noise excuses proves nothing either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import CannotRunError
from normdoctor.folding.records import Difference, Proof, ProofState

Arrays = Mapping[str, NDArray[np.generic]]

LIMIT = 1e-4
"""Share of a channel's size that a fold may change it by."""

TIMES_NOISE = 20.0
"""How many times the noise a fold may add."""

INCONCLUSIVE = 0.1
"""An error that only such noise excuses proves nothing: the output is little else than rounding."""

CHANNEL_FLOOR = 1e-3
"""A channel smaller than this share of the whole output is measured as if it were as large."""

INTEGER_LIMIT = 0.01
"""Share of the elements of an integer output (an argmax) that a near tie may turn over."""

EPSILONS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Types so coarse that their rounding alone passes LIMIT: the distance from 1 to the next number."""

NOISE_SECONDS = 60.0
"""Where the run in float64 would take longer than this, the noise is estimated."""


class Running(Protocol):
    """A model that runs."""

    def run(self, inputs: Any) -> Arrays:
        """Outputs by name, bfloat16 as float32; inputs as the subject's feeds have them.

        Raises CannotRunError where it cannot be done here, MisfitError where the inputs are at fault."""


class Runnable(Running, Protocol):
    """A model that can be run in its own type and, it may be, in float64."""

    @property
    def engine(self) -> str:
        """What runs it, in words; the name ends at the first comma."""

    def in_float64(self) -> Running:
        """The same model with every number in float64. Raises CannotRunError for the reason why there is none."""

    def float64_seconds(self, seconds: float) -> float:
        """How long a run in float64 should take where one in the model's own type took `seconds`."""


class Reference(NamedTuple):
    """The original's outputs, and how much of them is rounding."""

    outputs: Arrays
    exact: Arrays | None
    """The same in float64, or with every input moved by one rounding; None where neither was computed."""
    why_not: str
    """Why they were not."""
    engine: str
    too_slow: bool = False
    """Whether it is time that float64 lacks, so that smaller inputs would help."""

    @property
    def noise(self) -> float:
        """The largest noise of any output of floats, 0 where it was not measured."""
        if self.exact is None:
            return 0.0
        pairs = [(before, self.exact.get(name)) for name, before in self.outputs.items()]
        noises = [
            relative_error(before, exact)[0]
            for before, exact in pairs
            if exact is not None and exact.shape == before.shape and before.dtype.kind in "fc"
        ]
        return max((noise for noise in noises if np.isfinite(noise)), default=0.0)


def run_original(original: Runnable, inputs: Any) -> Reference:
    """The original's outputs on `inputs` in its own type and, where that is quick enough, in float64.

    Raises CannotRunError where the original cannot be run here at all."""
    begin = time.perf_counter()
    outputs = original.run(inputs)
    seconds = time.perf_counter() - begin
    expected = original.float64_seconds(seconds)
    if expected > NOISE_SECONDS:
        why = f"a run in float64 would take about {expected:.0f} s"
        nudged = _nudged(inputs)
        if nudged is None:
            return Reference(outputs, None, why, original.engine, too_slow=True)
        why += "; estimated by moving every input by one rounding"
        return Reference(outputs, original.run(nudged), why, original.engine, too_slow=True)
    try:
        return Reference(outputs, original.in_float64().run(inputs), "", original.engine)
    except CannotRunError as error:
        return Reference(outputs, None, error.message, original.engine)


def _nudged(inputs: Any) -> Arrays | None:
    """Arrays by name with every float moved to about the next number, up or down at random; None where none is one."""
    if not isinstance(inputs, Mapping) or not any(np.asarray(array).dtype.kind == "f" for array in inputs.values()):
        return None
    random = np.random.default_rng(0)

    def moved(array: NDArray[Any]) -> NDArray[np.generic]:
        if array.dtype.kind != "f":
            return array
        step = np.finfo(array.dtype).eps * random.choice([-1.0, 1.0], size=array.shape)
        return np.asarray(array * (1 + step)).astype(array.dtype)

    return {name: moved(np.asarray(array)) for name, array in inputs.items()}


def coarsest(dtypes: Iterable[str]) -> str:
    """The type with the largest distance from 1 to the next number; float32 where none is coarser.

    >>> coarsest(["float32", "bfloat16", "float16"])
    'bfloat16'
    """
    return max(dtypes, key=lambda dtype: EPSILONS.get(dtype, 0.0), default="float32")


def compare(reference: Reference, folded: Arrays, precision: str) -> tuple[Difference, ...]:
    """The outputs of the folded model beside those of the original.

    precision: the coarsest type of what the folds change or pass; its rounding is noise in any case."""
    differences = []
    for name, before in reference.outputs.items():
        after = folded.get(name)
        if after is None:
            differences.append(_broken(name, before, "the folded model has no such output"))
        elif after.shape != before.shape:
            lengths = " x ".join(map(str, after.shape)) or "a single number"
            differences.append(_broken(name, before, f"the folded model gives {lengths}"))
        else:
            exact = None if reference.exact is None else reference.exact.get(name)
            differences.append(_compare_output(name, before, after, exact, precision))
    return tuple(differences)


def judge(reference: Reference, differences: tuple[Difference, ...], inputs: str, seconds: float) -> Proof:
    """What the differences prove."""
    failed = [difference for difference in differences if not difference.ok]
    empty = [difference for difference in differences if difference.note in (NOTHING_FINITE, ONLY_ROUNDING)]
    state, reason = ProofState.VERIFIED, ""
    if failed:
        worst = max(failed, key=lambda difference: difference.error)
        state, reason = ProofState.FAILED, f"output {worst.output} is off by {worst.error:.2g} of its channel's size"
        if worst.note and not np.isfinite(worst.error):
            reason = f"output {worst.output}: {worst.note}"
    elif not differences:
        state, reason = ProofState.UNVERIFIED, "the model has no output that could be compared"
    elif empty:
        state = ProofState.UNVERIFIED
        reason = f"output {empty[0].output}: {empty[0].note}, so it proves nothing; give real inputs with --data"
    return Proof(
        state=state,
        inputs=inputs,
        engine=reference.engine,
        differences=differences,
        reason=reason,
        noise_reason=reference.why_not,
        seconds=seconds,
    )


NOTHING_FINITE = "not a single finite value to compare"
ONLY_ROUNDING = "rounding alone moves it by as much"


def _broken(name: str, before: NDArray[np.generic], note: str) -> Difference:
    return Difference(
        output=name,
        shape=before.shape,
        dtype=str(before.dtype),
        error=float("inf"),
        noise=None,
        channel=None,
        ok=False,
        note=note,
    )


def _compare_output(
    name: str,
    before: NDArray[np.generic],
    after: NDArray[np.generic],
    exact: NDArray[np.generic] | None,
    precision: str,
) -> Difference:
    if exact is not None and exact.shape != before.shape:
        exact = None  # its size depends on values that rounding decides
    measure: Callable[[NDArray[np.generic], NDArray[np.generic]], tuple[float, int | None]]
    inexact = before.dtype.kind in "fc"
    measure = relative_error if inexact else _unequal_share
    error, channel = measure(before, after)
    noise = None if exact is None else measure(before, exact)[0]
    if noise is not None and not np.isfinite(noise):
        noise = None  # float64 has no Inf where the narrow type overflowed
    # A runtime may leave out a rounding to float16 that the folded model cannot: the noise is at least that.
    least = EPSILONS.get(precision, 0.0)
    noisy = least if noise is None else max(noise, least)
    limit = max(LIMIT, TIMES_NOISE * noisy)
    if not inexact:
        limit = INTEGER_LIMIT
    note = ""
    if inexact and before.size:
        odd = int(before.size - np.isfinite(before).sum())
        if odd == before.size:
            note = NOTHING_FINITE
        elif not np.isfinite(error):
            note = "NaN or Inf where the original has none, or the other way round"
        elif odd:
            note = f"{odd:,} of {before.size:,} values are NaN or Inf, in both"
        if noise is not None and np.isfinite(error) and INCONCLUSIVE < error <= limit:
            note = ONLY_ROUNDING
    elif not inexact and error:
        note = "of integers: the share of elements that differ"
    return Difference(
        output=name,
        shape=before.shape,
        dtype=str(before.dtype),
        error=error,
        noise=noise,
        channel=channel,
        ok=error <= limit,
        note=note,
    )


def relative_error(before: NDArray[np.generic], after: NDArray[np.generic]) -> tuple[float, int | None]:
    """The largest |after - before| relative to the size of its channel, and that channel.

    inf where one has NaN or Inf and the other has not; where both have them alike, the rest is compared.

    >>> relative_error(np.array([[1.0, 100.0]]), np.array([[1.5, 100.0]]))
    (0.5, 0)
    """
    if not before.size:
        return 0.0, None
    wide = np.complex128 if "c" in (before.dtype.kind, after.dtype.kind) else np.float64
    old: NDArray[Any] = _by_channel(before.astype(wide))
    new: NDArray[Any] = _by_channel(after.astype(wide))
    finite = np.isfinite(old)
    odd_old, odd_new = old[~finite], new[~finite]
    alike = np.array_equal(odd_old, odd_new, equal_nan=True)
    several = before.ndim > 1
    if not alike or not np.isfinite(new[finite]).all():
        broken = (finite != np.isfinite(new)) | (~finite & (old != new) & ~(np.isnan(old) & np.isnan(new)))
        return float("inf"), int(broken.any(axis=1).argmax()) if several else None
    old, new = np.where(finite, old, 0), np.where(finite, new, 0)
    scale = float(np.abs(old).max())
    if scale == 0:
        error = np.abs(new).max(axis=1)  # all zeros have no size: absolute then
    else:
        counts = np.maximum(finite.sum(axis=1), 1)
        squares = (np.abs(old / scale) ** 2).sum(axis=1)  # divided first: 1e200 has no square
        whole = np.sqrt(squares.sum() / counts.sum())
        size = np.maximum(np.sqrt(squares / counts), CHANNEL_FLOOR * whole)
        error = (np.abs(new - old) / scale).max(axis=1) / size
    return float(error.max()), int(error.argmax()) if several else None


def _by_channel(values: NDArray[Any]) -> NDArray[Any]:
    """One row per channel."""
    if values.ndim < 2:
        return values.reshape(1, -1)
    return values.swapaxes(0, 1).reshape(values.shape[1], -1)


def _unequal_share(before: NDArray[np.generic], after: NDArray[np.generic]) -> tuple[float, int | None]:
    """The share of elements that differ."""
    return (float((before != after).mean()) if before.size else 0.0), None


def first_failing(count: int, fails: Callable[[int], bool]) -> int:
    """The smallest k in 1..count for which `fails(k)`, k being how many folds are done; by halving.

    Said to fail for `count` and to pass for 0.

    >>> first_failing(9, lambda k: k >= 4)
    4
    """
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if fails(middle):
            high = middle
        else:
            low = middle
    return high
