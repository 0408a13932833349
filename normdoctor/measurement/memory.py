"""How much the self-consistent statistics take: the activations of all data at one norm."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from normdoctor.data import Batch
from normdoctor.data.dataset import Dataset, Part
from normdoctor.errors import RefusedError
from normdoctor.measurement.measuring import cut, whole_batches
from normdoctor.measurement.opening import Opened

SHARE = 0.7
"""Of the free memory that is used where nobody says how much."""

OTHERWISE = "or use --method one-pass, which holds one batch at a time"


def free_bytes() -> int:
    """What this machine (or its container) has left; a huge number where it does not say."""
    found = [1 << 62]
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    with suppress(OSError, ValueError, AttributeError):
        if len(found) == 1:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(min(found), 0)


def held_batches(opened: Opened, data: Dataset, memory: int | None, part: Part | None) -> list[Batch]:
    """All batches, if what they hold on their way fits into memory; where a model spills to disk they may not.

    Raises RefusedError, before they are all read where their number is known, with the number of samples that fits."""
    limit = int(SHARE * free_bytes()) if memory is None else memory
    batches: list[Batch] = []
    each = samples = 0
    for batch in whole_batches(data, opened.fixed_batch, part):
        if not batches and not opened.spills:
            one = batch if opened.fixed_batch else cut(batch, 1)
            each = -(-opened.held_bytes(one) // one.size)
            _check(each, (data.samples or 0) // (part[1] if part else 1), limit)
        batches.append(batch)
        samples += batch.size
        _check(each, samples, limit)
    return batches


def _check(each: int, samples: int, limit: int) -> None:
    if each * samples <= limit:
        return
    fits = limit // each
    hint = f"Take --samples {fits}, {OTHERWISE}, or raise --memory." if fits else f"Raise --memory, {OTHERWISE}."
    raise RefusedError(
        f"{samples:,} samples would hold {size(each * samples)} at one norm ({size(each)} each), and {size(limit)} is "
        "to be used",
        hint,
    )


def size(count: float) -> str:
    """Bytes in words.

    >>> size(1_500_000)
    '1.5 MB'
    """
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def total(arrays: Iterable[Any]) -> int:
    """Bytes of arrays or tensors."""
    return sum(int(getattr(array, "nbytes", 0)) for array in arrays)
