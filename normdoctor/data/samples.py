"""Arrays and images: samples that can be taken one by one → a Dataset."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.data import Batch
from normdoctor.data.assigning import Assigned, note_on_dropped
from normdoctor.data.conversion import Conversion, Found, class_labels, conversions, nonfinite
from normdoctor.data.dataset import Dataset, Part
from normdoctor.data.options import DataOptions
from normdoctor.data.rows import Rows
from normdoctor.data.wanted import Wanted, arranged, entry_for, lengths
from normdoctor.errors import InputError, UsageError

DROP = "Remove it, or leave such samples out with --drop-nonfinite."


def dataset_of(
    origin: str,
    assigned: Assigned[Rows],
    options: DataOptions,
    wanted: Sequence[Wanted],
    *,
    labels: NDArray[np.int64] | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> Dataset:
    """The samples of these arrays. A single number goes into every batch as it is.

    labels: instead of those in `assigned`; one for each sample of the data.
    Raises InputError for empty data, UsageError for what does not fit the model."""
    found = [Found(entry_for(name, wanted), rows.shape, rows.dtype) for name, rows in assigned.given.items()]
    total = _total(origin, assigned.given)
    converted = conversions(origin, found, options)
    if labels is None and assigned.labels is not None:
        labels = class_labels(origin, assigned.labels.whole())
    if labels is not None and len(labels) != total:
        raise InputError(f"{origin}: {total:,} samples and {len(labels):,} labels", "Give one label for each sample.")
    limit = options.limit()
    used = total if limit is None else min(limit, total)
    remarks = [*converted.notes, *note_on_dropped(assigned)]
    fixed = fixed_batch([entry.wanted for entry in found if entry.shape])
    if isinstance(options.samples, int) and options.samples > total:
        remarks.append(f"there are {total:,} samples; {options.samples:,} were asked for")
    if fixed is not None:
        if used < fixed:
            raise UsageError(
                f"{origin}: {used:,} samples, and the model takes batches of exactly {fixed}",
                f"Give at least {fixed} samples, or export the model with an open batch axis.",
            )
        if used % fixed:
            remarks.append(f"{used % fixed} samples are not used: the model takes whole batches of {fixed}")
            used -= used % fixed
    samples = _Samples(
        origin=origin,
        rows={name: rows for name, rows in assigned.given.items() if rows.shape},
        single={
            name: converted.by_name[name].apply(rows.whole()) for name, rows in assigned.given.items() if not rows.shape
        },
        conversions=converted.by_name,
        labels=labels,
        places=np.random.default_rng(options.seed).choice(total, used, replace=False),
        fixed=fixed,
        options=options,
        wanted=wanted,
    )
    dataset = Dataset(
        words=_words(origin, found, converted.by_name) + _share(used, total, options),
        total=total,
        samples=used,
        has_labels=labels is not None,
        remarks=remarks,
        dropped=samples.dropped,
        start=samples.start,
        on_close=on_close,
    )
    weakref.finalize(samples, on_close)
    return dataset


def fixed_batch(wanted: Sequence[Wanted]) -> int | None:
    """The only number of samples that a model takes at once, None where it takes any. Raises UsageError where its
    inputs differ in it."""
    fixed = {entry.fixed_batch for entry in wanted} - {None}
    if len(fixed) > 1:
        raise UsageError(
            f"the first axes of the model's inputs are {' and '.join(map(str, sorted(filter(None, fixed))))}",
            "Only inputs whose first axis is that of the samples can be fed from data.",
        )
    return next(iter(fixed), None)


def _total(origin: str, given: Mapping[str, Rows]) -> int:
    sampled = {name: rows.shape for name, rows in given.items() if rows.shape}
    if not sampled:
        raise UsageError(f"{origin}: a single number, no samples", "The first axis must be that of the samples.")
    (first, shape), *others = sampled.items()
    for name, other in others:
        if other[0] != shape[0]:
            raise UsageError(
                f"{origin}: {first} has {shape[0]:,} samples, {name} has {other[0]:,}",
                "The first axis must be that of the samples in all of them.",
            )
    for name, other in sampled.items():
        if 0 in other:
            raise InputError(f"{origin}: {name} is empty ({lengths(other)})", "Give at least one sample.")
    return shape[0]


def _words(origin: str, found: Sequence[Found], conversions: Mapping[str, Conversion]) -> str:
    parts = []
    for entry in found:
        done = conversions[entry.wanted.name].words
        parts.append(f"{entry.wanted.name} ({lengths(entry.shape)} {entry.dtype})" + (f", {done}" if done else ""))
    return f"{origin}: {'; '.join(parts)}"


def _share(used: int, total: int, options: DataOptions) -> str:
    return "" if used == total else f"; {used:,} of {total:,} samples, drawn by seed {options.seed}"


@dataclass(kw_only=True, eq=False)
class _Samples:
    """What the batches are made of."""

    origin: str
    rows: Mapping[str, Rows]
    single: Mapping[str, Any]
    conversions: Mapping[str, Conversion]
    labels: NDArray[np.int64] | None
    places: NDArray[np.int64]
    """The samples used, in the order in which they are used."""
    fixed: int | None
    options: DataOptions
    wanted: Sequence[Wanted]
    dropped: dict[str, str] = field(default_factory=dict)

    def start(self, batch_size: int | None, part: Part | None) -> Iterator[Batch]:
        size = self.fixed or batch_size or self.options.batch_size
        rank, world = part or (0, 1)
        came = False
        for index in range(rank, -(-len(self.places) // size), world):
            batch = self._batch(index, self.places[index * size : (index + 1) * size].tolist())
            if batch is not None:
                came = True
                yield batch
        if not came and world == 1:
            (name, why), *_ = self.dropped.items()
            raise InputError(f"{self.origin}: no sample is left ({name}: {why})", "Check the data.")

    def _batch(self, index: int, places: list[int]) -> Batch | None:
        """The samples at these places, None where all of them are left out."""
        bad = np.zeros(len(places), bool)
        values = {}
        for name, rows in self.rows.items():
            taken = rows.take(places)
            values[name] = self.conversions[name].apply(taken)
            for i, place in enumerate(places):
                if place in rows.lost:
                    bad[i] = True
                    self.dropped[rows.name_of(place)] = rows.lost[place]
            for i in np.flatnonzero(nonfinite(values[name])).tolist():
                bad[i] = True
                why = "NaN or Inf" if nonfinite(taken[i : i + 1]).any() else f"beyond {self.conversions[name].dtype}"
                which = f"{rows.name_of(places[i])} of {name}"
                if not self.options.drop_nonfinite:
                    raise InputError(f"{self.origin}: {which} has values that are {why}", DROP)
                self.dropped[which] = why
        if bad.any() and self.fixed is not None:
            first = next(iter(self.rows.values()))
            for i in np.flatnonzero(~bad).tolist():
                self.dropped[first.name_of(places[i])] = f"in a batch of {self.fixed} that is not whole"
            return None
        if bad.all():
            return None
        kept = {name: value[~bad] if bad.any() else value for name, value in values.items()}
        args, kwargs = arranged({**kept, **self.single}, self.wanted)
        labels = None if self.labels is None else self.labels[places][~bad]
        return Batch(args, kwargs, int((~bad).sum()), index, labels)
