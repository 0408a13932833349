"""Whether the weights moved: told by checksums where the file has them, else by a sample and then chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from normdoctor.compared import Motion, WeightsChange
from normdoctor.layers import ArrayRef, load
from normdoctor.readers.arrays import FLOAT_TYPES, FileStorage, StoredArray, decode

SAMPLES_BYTES = 32 << 20
"""Of each side, for the samples of all tensors together."""

LARGEST_SAMPLE, SMALLEST_SAMPLE = 64 << 10, 4 << 10
"""Bytes of one tensor."""

STRETCHES = 4
"""Runs of neighbours that a sample consists of."""

ENOUGH_FOR_COSINE = 1000
"""Values below which two unrelated sets of weights can look alike by chance."""

CHUNK = 512 << 10
"""Bytes of each side in memory while whole tensors are compared."""

LARGEST_LOADED = 256 << 20
"""A weight that cannot be read in parts is left out beyond this."""

TOLERANCES = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""What storing a number with so few bits moves it by at most, relative; twice half a unit in the last place."""

FLOAT8_TOLERANCE, FINE_TOLERANCE = 2.0**-2, 1e-6


def tolerance(*dtypes: str) -> float:
    """How far apart numbers are that were the same before they were stored in these types, relative."""
    each = (FLOAT8_TOLERANCE if t.startswith("float8") else TOLERANCES.get(t, FINE_TOLERANCE) for t in dtypes)
    return max(each, default=FINE_TOLERANCE)


def weights_change(
    earlier: Mapping[str, ArrayRef], later: Mapping[str, ArrayRef], *, thorough: bool = True
) -> WeightsChange | None:
    """How the floating point tensors of one name and shape went from one side to the other; None without any.

    thorough: tensors whose samples agree are compared to their ends; otherwise the samples decide."""
    floats = {name: ref for name, ref in later.items() if ref.dtype in FLOAT_TYPES and 0 not in ref.shape}
    common = [
        (earlier[name], ref)
        for name, ref in floats.items()
        if name in earlier and earlier[name].shape == ref.shape and earlier[name].dtype in FLOAT_TYPES
    ]
    common = [pair for pair in common if all(map(_is_readable, pair))]
    if not common:
        return None
    sample = max(SMALLEST_SAMPLE, min(LARGEST_SAMPLE, SAMPLES_BYTES // len(common)))
    equal, apart, size, product, later_size, widest = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for old, new in common:
        squares = _squares(old, new, sample)
        if squares is None:
            equal += 1
            continue
        if squares[0] == 0 and _are_equal(old, new, thorough):
            equal += 1
        apart += squares[0]
        size += squares[1]
        product += squares[2]
        later_size += squares[3]
        widest = max(widest, tolerance(old.dtype, new.dtype))
    relative = math.sqrt(apart / size) if size else (math.inf if apart else 0.0)
    motion = _motion(equal == len(common), relative, widest)
    tells = motion is Motion.MOVED and sum(math.prod(new.shape) for _, new in common) >= ENOUGH_FOR_COSINE
    return WeightsChange(
        tensors=len(common),
        equal=equal,
        relative=relative,
        motion=motion,
        unmatched=len(floats) - len(common),
        cosine=_cosine(product, size, later_size) if tells else None,
    )


def _cosine(product: float, size: float, later_size: float) -> float | None:
    lengths = math.sqrt(size) * math.sqrt(later_size)
    return product / lengths if lengths > 0 and math.isfinite(lengths) else None


def _motion(equal: bool, relative: float, widest: float) -> Motion:
    if equal:
        return Motion.EQUAL
    # Nothing apart in the samples, and not equal: it moved where the samples do not look.
    return Motion.ROUNDED if 0 < relative <= widest else Motion.MOVED


def _is_readable(ref: ArrayRef) -> bool:
    return (isinstance(ref, StoredArray) and ref.is_contiguous) or ref.nbytes <= LARGEST_LOADED


def _squares(old: ArrayRef, new: ArrayRef, sample: int) -> tuple[float, float, float, float] | None:
    """Sums of squares of the difference and of the earlier values, of products, and of squares of the later values,
    of the whole tensor as far as a sample of so many bytes tells; None for one and the same tensor."""
    if old.identity == new.identity:
        return None
    count = math.prod(new.shape)
    taken = list(_stretches(count, max(1, sample // max(1, new.nbytes // count))))
    before, after = _values(old, taken), _values(new, taken)
    with np.errstate(all="ignore"):
        sound = np.isfinite(before) & np.isfinite(after)
        difference = np.where(sound, after - before, 0.0)
        apart = float(np.dot(difference, difference))
        kept = np.where(sound, before, 0.0)
        size = float(np.dot(kept, kept))
        others = np.where(sound, after, 0.0)
        product, later_size = float(np.dot(kept, others)), float(np.dot(others, others))
    scale = count / max(len(before), 1)
    if (np.isfinite(before) != np.isfinite(after)).any():
        apart = max(apart, size, 1.0)  # what became NaN or was healed of it did move
    return apart * scale, size * scale, product * scale, later_size * scale


def _stretches(count: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Where the sample lies: (first element, elements), evenly over the tensor."""
    if count <= wanted:
        yield 0, count
        return
    length = max(1, wanted // STRETCHES)
    for place in range(STRETCHES):
        yield (count - length) * place // max(STRETCHES - 1, 1), length


def _values(ref: ArrayRef, taken: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    if isinstance(ref, StoredArray) and ref.is_contiguous:
        parts = [
            decode(
                ref.storage.read((ref.offset + start) * ref.item_size, length * ref.item_size),
                ref.dtype,
                ref.big_endian,
            )
            for start, length in taken
        ]
    else:
        flat = load(ref).reshape(-1)
        parts = [flat[start : start + length] for start, length in taken]
    with np.errstate(invalid="ignore"):
        return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])


def _are_equal(old: ArrayRef, new: ArrayRef, thorough: bool) -> bool:
    """Whether two tensors whose samples agree are equal bit for bit."""
    if old.dtype != new.dtype:
        return False
    sums = _checksum(old), _checksum(new)
    if None not in sums:
        return sums[0] == sums[1]
    if not thorough:
        return True
    if (
        isinstance(old, StoredArray)
        and isinstance(new, StoredArray)
        and (old.is_contiguous, old.big_endian) == (True, new.big_endian)
        and new.is_contiguous
    ):
        return all(before == after for before, after in zip(_chunks(old), _chunks(new), strict=True))
    return load(old).tobytes() == load(new).tobytes()


def _checksum(ref: ArrayRef) -> int | None:
    """The CRC32 of the tensor in the directory of its zip; None where there is none (0: torch was told not to)."""
    if not isinstance(ref, StoredArray) or not isinstance(ref.storage, FileStorage) or not ref.is_contiguous:
        return None
    return ref.storage.crc32 or None if ref.nbytes == ref.storage.nbytes else None


def _chunks(ref: StoredArray) -> Iterator[bytes]:
    start, end = ref.offset * ref.item_size, ref.offset * ref.item_size + ref.nbytes
    for place in range(start, end, CHUNK):
        yield ref.storage.read(place, min(CHUNK, end - place))
