"""Shapes with names in them: which axes of a reshape stay apart."""

from __future__ import annotations

from collections.abc import Sequence

from normdoctor.flow.graph import Shape

Monomial = tuple[int, tuple[str, ...]]
"""A length as a product: a number and the names of symbolic lengths, sorted."""

Groups = list[tuple[range, range]]
"""Axes before and axes after that hold the same elements in the same order."""

ONE: Monomial = (1, ())


def times(a: Monomial, b: Monomial) -> Monomial:
    return a[0] * b[0], tuple(sorted(a[1] + b[1]))


def over(a: Monomial, b: Monomial) -> Monomial | None:
    """a / b where it is a product again."""
    names = list(a[1])
    for name in b[1]:
        if name not in names:
            return None
        names.remove(name)
    if b[0] == 0 or a[0] % b[0]:
        return None
    return a[0] // b[0], tuple(names)


def product(lengths: Sequence[Monomial]) -> Monomial:
    result = ONE
    for length in lengths:
        result = times(result, length)
    return result


def reshape_groups(before: Shape, after: Shape) -> Groups | None:
    """How the axes of two shapes of the same elements belong together, in the finest pieces.

    A length that is unknown on one side is worked out from the other side; None where that cannot be done.

    >>> reshape_groups(("n", 8, 2, 3), (None, 48))
    [(range(0, 1), range(0, 1)), (range(1, 4), range(1, 2))]
    """
    # An unknown length of the first shape is a symbol of its own: nothing else is known to be equal to it.
    first = [_monomial(length, f"?{axis}") for axis, length in enumerate(before)]
    known = [_monomial(length, "") for length in after if length is not None]
    rest = over(product(first), product(known))
    unknown = sum(length is None for length in after)
    if unknown > 1 or rest is None or (unknown == 0 and rest != ONE):
        return None
    second = [rest if length is None else _monomial(length, "") for length in after]
    ends = _prefixes(second)
    groups: Groups = []
    start, taken = 0, 0
    for end, total in enumerate(_prefixes(first)[1:], start=1):
        found = next((place for place in range(taken, len(ends)) if ends[place] == total), None)
        if found is not None:
            groups.append((range(start, end), range(taken, found)))
            start, taken = end, found
    if start < len(first) or taken < len(second):
        if groups and start == len(first):  # ones at the end belong to what is before them
            last = groups.pop()
            groups.append((last[0], range(last[1].start, len(second))))
        else:
            groups.append((range(start, len(first)), range(taken, len(second))))
    return groups


def _monomial(length: int | str | None, unknown: str) -> Monomial:
    if isinstance(length, int):
        return length, ()
    return 1, (length or unknown,)


def _prefixes(lengths: Sequence[Monomial]) -> list[Monomial]:
    totals = [ONE]
    for length in lengths:
        totals.append(times(totals[-1], length))
    return totals
