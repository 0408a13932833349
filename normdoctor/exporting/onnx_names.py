"""The names that inputs and outputs get in an ONNX file: those of the arguments of forward, and of its outputs."""

from __future__ import annotations

import re
from collections.abc import Iterable


def unique_names(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """The names as identifiers, each once and none of those taken.

    >>> unique_names(["x", "output.0", "mask"], ["mask"])
    ['x', 'output_0', 'mask_1']
    """
    found: list[str] = []
    used = set(taken)
    for name in names:
        plain = re.sub(r"\W", "_", name) or "value"
        number, chosen = 0, plain
        while chosen in used:
            number += 1
            chosen = f"{plain}_{number}"
        used.add(chosen)
        found.append(chosen)
    return found
