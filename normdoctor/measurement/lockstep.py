"""Ways to measure the norms of a model: as its buffers stand, as training mode sees them, and self-consistently.

exact: the running statistics of every norm equal the mean and variance of its inputs over the whole data, with all
norms before it so repaired already. All batches advance together and stop at each norm; what they see is merged, the
norm is given its new statistics, and they go on: one pass over the data. It depends neither on the batch size nor on
what the buffers held. (One norm a pass would give the same in as many passes; all norms at once, again and again,
does not settle before as many sweeps as norms follow each other.)

one-pass: each batch alone, every norm using the statistics of that batch, as in training mode but without dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from normdoctor.data import Batch
from normdoctor.errors import InputError, RefusedError
from normdoctor.measurement.processes import ALONE, Processes
from normdoctor.measurement.tally import Part, Tally
from normdoctor.measurement.walks import Look, Pause, Vector, Walker
from normdoctor.moments import Moments

USE_ONE_PASS = "--method one-pass pools what each call sees."


FIRST_SAMPLES = 256
"""So many tell how many independent values one sample has."""


class Progress(Protocol):
    """Hears how far a measurement is."""

    def __call__(self, done: int, total: int | None, words: str) -> None: ...


def silent(done: int, total: int | None, words: str) -> None:
    """No progress shown."""


@dataclass(eq=False)
class Tallies:
    """What was seen of every norm, in the order in which they were reached."""

    of: dict[str, Tally] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0
    stopped: bool = False
    """Whether one-pass had enough before the data ended."""

    def add(self, norm: str, part: Part) -> None:
        self.of.setdefault(norm, Tally()).add(part)


Settle = Callable[[str, Tally], "tuple[Vector, Vector] | None"]
"""The statistics that a norm gets from what was seen of it: mean and variance; None: those that it has."""

Outputs = Callable[[Batch, dict[str, Any]], None]
"""Hears what the model gives for each batch."""


def _ignored(batch: Batch, outputs: dict[str, Any]) -> None:
    pass


def as_stored(
    walker: Walker,
    batches: Iterable[Batch],
    look: Look,
    *,
    outputs: Outputs = _ignored,
    progress: Progress = silent,
    total: int | None = None,
    tallies: Tallies | None = None,
) -> Tallies:
    """What every norm sees with all statistics as they are. One batch after the other.

    tallies: what was seen before, which is added to."""
    tallies = Tallies() if tallies is None else tallies
    for batch in batches:
        looked = replace(look, samples=look.samples and _among_first(batch))
        for pause in _stops(walker, batch, looked, outputs):
            tallies.add(pause.norm, Part.of(batch.index, batch.size, pause.seen))
        _count(tallies, batch)
        progress(tallies.batches, total, "batches")
    return tallies


def one_pass(
    walker: Walker,
    batches: Iterable[Batch],
    *,
    until: float | None = None,
    only: Container[str] | None = None,
    outputs: Outputs = _ignored,
    progress: Progress = silent,
    total: int | None = None,
    processes: Processes = ALONE,
) -> Tallies:
    """What every norm sees when those before it use the statistics of the batch. One batch after the other.

    until: stop when the standard error of every channel's mean is below this share of its standard deviation.
    only: names of the norms that use the statistics of the batch; None for all.
    Leaves the last batch's statistics in the walker: `restore` it. Raises InputError for values that are not finite."""
    tallies = Tallies()
    for batch in _in_rounds(batches, processes):
        if until is not None and tallies.batches > 1 and _is_settled(tallies, until):
            tallies.stopped = True
            break
        found: list[tuple[str, Part]] = []
        if batch is not None:
            for pause in _stops(walker, batch, Look(samples=_among_first(batch)), outputs):
                moments = pause.seen.moments
                check_finite(walker, pause.norm, moments)
                if only is None or pause.norm in only:
                    walker.put(pause.norm, moments.mean, moments.variance())
                found.append((pause.norm, Part.of(batch.index, batch.size, pause.seen)))
        for others in processes.gather(found):
            for norm, part in others:
                tallies.add(norm, part)
        _recount(tallies)
        progress(tallies.batches, total, "batches")
    return tallies


def exact(
    walker: Walker,
    batches: Sequence[Batch],
    *,
    settle: Settle | None = None,
    outputs: Outputs = _ignored,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Tallies:
    """The self-consistent statistics. All batches are on their way at once and hold their activations.

    settle: what a norm gets instead of the mean and the (format's) variance of what it saw.

    Leaves the new statistics in the walker. Raises RefusedError where the batches reach the norms in different
    orders and where a norm is reached twice; InputError for values that are not finite."""
    tallies = Tallies()
    norms = walker.norms
    with ExitStack() as stack:
        walks = [
            stack.enter_context(closing(walker.start(batch, Look(samples=_among_first(batch))))) for batch in batches
        ]
        under_way = list(zip(batches, walks, strict=True))
        while True:
            found: list[tuple[str | None, Part | None]] = []
            for batch, walk in under_way:
                stop = walk.advance()
                part = None if stop is None else Part.of(batch.index, batch.size, stop.seen)
                found.append((None if stop is None else stop.norm, part))
            under_way.reverse()  # what the last one holds is still in the processor's cache
            everywhere = [one for others in processes.gather(found) for one in others]
            everywhere.sort(key=lambda one: -1 if one[1] is None else one[1].index)
            names = {norm for norm, _ in everywhere}
            if not names:
                raise InputError("there is no data", "Check --data.")
            if len(names) > 1:
                raise _parted(walker, everywhere)
            norm = names.pop()
            if norm is None:
                break
            if norm in tallies.of:
                raise RefusedError(
                    f"{norm}: is called several times in one pass, and no one mean and variance is right for all",
                    USE_ONE_PASS,
                )
            for _, part in everywhere:
                assert part is not None
                tallies.add(norm, part)
            moments = tallies.of[norm].total()
            check_finite(walker, norm, moments)
            new = (moments.mean, stored_variance(moments, walker.ddof))
            chosen = new if settle is None else settle(norm, tallies.of[norm])
            if chosen is not None:
                walker.put(norm, *chosen)
            progress(len(tallies.of), len(norms), "norms")
        for batch, walk in zip(batches, walks, strict=True):
            outputs(batch, walk.outputs)
    _recount(tallies)
    return tallies


def _among_first(batch: Batch) -> bool:
    """Whether the batch is among those whose samples are looked at one by one."""
    return batch.index == 0 or batch.index * batch.size < FIRST_SAMPLES


def stored_variance(moments: Moments, ddof: int) -> Any:
    """What goes into running_var: unbiased (ddof 1, torch) or not (0, ONNX); of a single value its variance, 0."""
    return moments.variance(ddof if moments.count > ddof else 0)


def check_finite(walker: Walker, norm: str, moments: Moments) -> None:
    """Raise InputError where a norm was given NaN or Inf."""
    bad = np.flatnonzero(~(np.isfinite(moments.mean) & np.isfinite(moments.m2)))
    if bad.size:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if bad.size > 5 else "")
        raise InputError(
            f"{walker.name}: NaN or Inf arrives at {norm} in {bad.size} of {moments.mean.size} channels ({shown}), "
            "though the data is finite",
            "The weights before it, or the range of their type (float16), are at fault: normdoctor inspect.",
        )


def _stops(walker: Walker, batch: Batch, look: Look, outputs: Outputs) -> Iterator[Pause]:
    """Send one batch through."""
    with closing(walker.start(batch, look)) as walk:
        while (pause := walk.advance()) is not None:
            yield pause
        outputs(batch, walk.outputs)


def _in_rounds(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch | None]:
    """The batches; None for each round in which other processes still have one."""
    waiting = iter(batches)
    while True:
        batch = next(waiting, None)
        if not any(processes.gather(batch is not None)):
            return
        yield batch


def _parted(walker: Walker, found: Sequence[tuple[str | None, Part | None]]) -> RefusedError:
    first = found[0][0]
    place, other = next((i, norm) for i, (norm, _) in enumerate(found) if norm != first)
    return RefusedError(
        f"{walker.name}: batch 0 comes to {first or 'the end'} where batch {place} comes to {other or 'the end'}: its "
        "way depends on the data",
        "--method one-pass takes batches as they come.",
    )


def _count(tallies: Tallies, batch: Batch) -> None:
    tallies.batches += 1
    tallies.samples += batch.size


def _recount(tallies: Tallies) -> None:
    """Of all processes together; a norm that some batches pass by has seen fewer."""
    tallies.batches = max((tally.batches for tally in tallies.of.values()), default=0)
    tallies.samples = max((tally.samples for tally in tallies.of.values()), default=0)


def _is_settled(tallies: Tallies, until: float) -> bool:
    errors = [tally.standard_error() for tally in tallies.of.values()]
    return bool(errors) and all(error is not None and bool((error < until).all()) for error in errors)
