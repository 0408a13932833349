"""Numbers and channel lists in words, the same way in every rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from normdoctor.findings import MEASURE_ANEW

REESTIMATE = f"take training data, then: {MEASURE_ANEW}"
"""The step that most rules about running statistics end with."""

SHOWN = 5


def where(mask: NDArray[np.bool_]) -> list[int]:
    """The indices at which `mask` is true."""
    return [int(index) for index in np.flatnonzero(mask)]


def some_of(channels: Sequence[int], total: int) -> str:
    """How many channels and which, the first five by number.

    >>> some_of([3, 17], 64)
    '2 of 64 channels (3, 17)'
    >>> some_of([0, 1, 2, 3, 4, 5], 6)
    'all 6 channels'
    """
    if len(channels) == total:
        return "the only channel" if total == 1 else f"all {total} channels"
    listed = ", ".join(str(channel) for channel in channels[:SHOWN])
    more = ", ..." if len(channels) > SHOWN else ""
    noun = "channel" if total == 1 else "channels"
    return f"{len(channels)} of {total} {noun} ({listed}{more})"


def number(value: float) -> str:
    """Three significant digits, without a trailing exponent where the plain number is short.

    >>> number(0.000123), number(1234.5), number(0.8061)
    ('0.000123', '1,230', '0.806')
    """
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def percent(share: float) -> str:
    """A share as a percentage with two significant digits.

    >>> percent(0.8061), percent(0.0123), percent(1.0)
    ('81 %', '1.2 %', '100 %')
    """
    value = 100 * share
    digits = f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
    return f"{digits} %"


def names(listed: Sequence[str]) -> str:
    """The first five names and how many there are.

    >>> names(["bn1", "bn2"])
    'bn1, bn2'
    """
    shown = ", ".join(listed[:SHOWN])
    return f"{shown}, ... ({len(listed)} in all)" if len(listed) > SHOWN else shown


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "layer"), plural(2, "layer")
    ('1 layer', '2 layers')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def both(words: Sequence[str]) -> str:
    """
    >>> both(["weight"]), both(["weight", "bias", "running_var"])
    ('weight', 'weight, bias and running_var')
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
