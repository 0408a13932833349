"""Batches of the user's own code: loaders, generators, lists → a Dataset. Each batch keeps its own size."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normdoctor.data import Batch
from normdoctor.data.assigning import Assigned, by_name, in_order, note_on_dropped
from normdoctor.data.conversion import Conversion, Found, chosen, class_labels, conversions, nonfinite
from normdoctor.data.dataset import Dataset, Part
from normdoctor.data.options import MOST_SAMPLES, DataOptions
from normdoctor.data.rows import is_array
from normdoctor.data.samples import fixed_batch
from normdoctor.data.wanted import Wanted, arranged, entry_for, lengths
from normdoctor.errors import InputError, UsageError
from normdoctor.models.architecture import users_code
from normdoctor.readers.live_module import is_tensor

END = object()


def dataset_of(
    origin: str,
    batches: Callable[[], Iterable[Any]],
    options: DataOptions,
    wanted: Sequence[Wanted],
    *,
    source: Any = None,
) -> Dataset:
    """What `batches` gives at each call. The first batch is asked for here, and used in the first pass.

    source: what is behind the batches, a loader or a list; None: what the first call gives.

    Raises InputError where nothing comes or the user's code fails, UsageError for what does not fit the model."""
    if options.labels is not None:
        raise UsageError(f"{origin}: --labels is for files", "Let the code give pairs of input and labels.")
    if options.image_size is not None:
        raise UsageError(f"{origin}: --image-size is for files of images", "Resize them in the code.")
    stream = _Stream(origin=origin, batches=batches, options=options, wanted=wanted)
    with users_code(f"{origin}: batch 0", _HINT):
        begun = batches()
    source = begun if source is None else source
    shared = _sampler(source) == "DistributedSampler"
    total = None if shared else _count(source)
    first = stream.peek(begun)
    limit = options.limit()
    stream.remarks += first.notes
    stream.shared = shared
    dataset = Dataset(
        words=f"{origin}: {first.words}",
        total=total,
        samples=total if total is None or limit is None else min(total, limit),
        has_labels=first.assigned.labels is not None,
        fingerprint=0 if shared else zlib.crc32(repr(_digest(stream.head)).encode()),
        repeatable=_sampler(source) not in ("RandomSampler", "WeightedRandomSampler", "SubsetRandomSampler"),
        remarks=stream.remarks,
        dropped=stream.dropped,
        start=stream.start,
    )
    stream.dataset = dataset
    return dataset


def refuse_single_samples(origin: str, value: object) -> None:
    """Raise UsageError for a data set of torch's, which gives samples and no batches."""
    if any(base.__module__ == "torch.utils.data.dataset" for base in type(value).__mro__):
        raise UsageError(
            f"{origin}: a {type(value).__name__} gives single samples, not batches",
            "Wrap it: torch.utils.data.DataLoader(dataset, batch_size=32).",
        )


def kept(source: Iterator[Any]) -> Callable[[], Iterator[Any]]:
    """An iterator that can be walked once, as often as needed: what it gave is kept, and given as copies."""
    seen: list[Any] = []

    def walk() -> Iterator[Any]:
        place = 0
        while True:
            if place == len(seen):
                item = next(source, END)
                if item is END:
                    return
                seen.append(item)
            yield copied(seen[place])
            place += 1

    return walk


def copied(value: Any) -> Any:
    """With tensors and arrays of its own: a model may write into its input."""
    if is_tensor(value):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {name: copied(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(copied, value)) if isinstance(value, list) else tuple(map(copied, value))
    return value


_HINT = "The exception is that of your code; walk through its batches by themselves to see where."


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A batch of the user's, understood but not converted."""

    assigned: Assigned[Any]
    size: int
    conversions: Mapping[str, Conversion]
    notes: tuple[str, ...]
    words: str


@dataclass(kw_only=True, eq=False)
class _Stream:
    """What the batches are made of."""

    origin: str
    batches: Callable[[], Iterable[Any]]
    options: DataOptions
    wanted: Sequence[Wanted]
    shared: bool = False
    """Every process is given batches of its own already."""
    dataset: Dataset | None = None
    remarks: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    _begun: Iterator[Any] | None = None
    head: Any = END
    _digest: Any = None
    _has_labels: bool = False

    def peek(self, source: Iterable[Any]) -> _Prepared:
        """What the first batch is."""
        with users_code(f"{self.origin}: batch 0", _HINT):
            self._begun = iter(source)
            self.head = next(self._begun, END)
        if self.head is END:
            raise InputError(f"{self.origin}: gives no batches", "It is empty, or was walked through before.")
        prepared = self._prepared(0, self.head)
        self._has_labels = prepared.assigned.labels is not None
        return prepared

    def _raw(self) -> Iterator[Any]:
        """What the user's code gives, anew at each call."""
        begun, head, self._begun, self.head = self._begun, self.head, None, END
        if begun is not None:
            yield head
        place = 1 if begun is not None else 0
        while True:
            with users_code(f"{self.origin}: batch {place}", _HINT):
                begun = iter(self.batches()) if begun is None else begun
                item = next(begun, END)
            if item is END:
                return
            yield item
            place += 1

    def start(self, batch_size: int | None, part: Part | None) -> Iterator[Batch]:
        if part is not None and part[1] > 1 and self.dataset is not None and not self.dataset.repeatable:
            raise UsageError(
                f"{self.origin}: shuffles, so each of {part[1]} processes would see another order",
                "Use shuffle=False, or a torch.utils.data.DistributedSampler.",
            )
        return self._walk(part or (0, 1))

    def _walk(self, part: Part) -> Iterator[Batch]:
        rank, world = part
        limit = self.options.limit()
        if limit is not None and self.shared:
            limit = -(-limit // world)
        fixed, used, came = None, 0, False
        for place, item in enumerate(self._raw()):
            if limit is not None and used >= limit:
                if self.options.samples is None:
                    self._remark(f"only the first {MOST_SAMPLES:,} samples that it gives are used (--samples all: all)")
                break
            if place == 0:
                self._compare(item)
            size = self._sizes(place, item)
            room = size if limit is None else min(size, limit - used)
            used += room
            if place % world != rank and not self.shared:
                continue
            prepared = self._prepared(place, item)
            fixed = fixed_batch([entry_for(name, self.wanted) for name in prepared.assigned.given])
            if fixed is not None and (size > fixed or room != fixed):
                if size > fixed:
                    raise UsageError(
                        f"{self.origin}: batch {place} has {size} samples, the model takes {fixed}",
                        f"Let it give batches of {fixed}.",
                    )
                self.dropped[f"the {room} of batch {place}"] = f"the model takes whole batches of {fixed}"
                continue
            batch = self._batch(place, place * world + rank if self.shared else place, prepared, room, fixed)
            if batch is not None:
                came = True
                yield batch
        if not came and world == 1:
            why = "; ".join(f"{name}: {why}" for name, why in list(self.dropped.items())[:1]) or "it gives no batches"
            raise InputError(f"{self.origin}: no sample is left ({why})", "Check the data.")

    def _compare(self, item: Any) -> None:
        """Whether this pass begins as the last one did."""
        digest = _digest(item)
        if self._digest is not None and digest != self._digest and self.dataset is not None:
            self.dataset.repeatable = False
            self._remark("it gives other batches in every pass: it shuffles or augments")
        self._digest = digest

    def _remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)

    def _assigned(self, place: int, item: Any) -> tuple[Assigned[Any], int]:
        origin = f"{self.origin}: batch {place}"

        def labels(value: Any, of: Any = None) -> bool:
            if not is_array(value) or value.ndim != 1:
                return False
            kind = str(value.dtype).removeprefix("torch.")
            return kind.startswith(("int", "uint")) and (of is None or len(value) == of)

        if is_array(item):
            assigned: Assigned[Any] = in_order(origin, [item], self.wanted, labels)
        elif isinstance(item, Mapping):
            entries = {str(name): value for name, value in item.items()}
            assigned = by_name(origin, entries, self.wanted, labels)
        elif isinstance(item, (list, tuple)):
            first = next((len(value) for value in item if is_array(value) and value.ndim), None)
            assigned = in_order(origin, item, self.wanted, lambda value: labels(value, first))
        else:
            raise UsageError(
                f"{origin} is a {type(item).__name__}", "Let it give tensors, arrays, or tuples or dicts of them."
            )
        nested = [name for name, value in assigned.given.items() if isinstance(value, (list, tuple, Mapping))]
        if nested:
            raise UsageError(
                f"{origin}: {nested[0]} is a {type(assigned.given[nested[0]]).__name__}",
                "Arguments can be tensors, arrays and single values.",
            )
        sizes = {name: len(value) for name, value in assigned.given.items() if is_array(value) and value.ndim}
        if not sizes:
            raise UsageError(f"{origin} holds no tensor", "Let it give tensors, arrays, or tuples or dicts of them.")
        if any(is_tensor(value) and value.is_meta for value in assigned.given.values()):
            raise InputError(f"{origin} is on the meta device and has no values", "Give real data.")
        (first_name, size), *others = sizes.items()
        for name, other in others:
            if other != size:
                raise UsageError(
                    f"{origin}: {first_name} has {size} samples, {name} has {other}",
                    "The first axis must be that of the samples in all of them.",
                )
        if not size:
            raise InputError(f"{origin}: {first_name} is empty", "Give at least one sample.")
        return assigned, size

    def _sizes(self, place: int, item: Any) -> int:
        return self._assigned(place, item)[1]

    def _prepared(self, place: int, item: Any) -> _Prepared:
        assigned, size = self._assigned(place, item)
        origin = f"{self.origin}: batch {place}"
        found = [
            Found(entry_for(name, self.wanted), tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in assigned.given.items()
            if is_array(value)
        ]
        converted = conversions(origin, found, self.options)
        shown = []
        for entry in found:
            done = converted.by_name[entry.wanted.name].words
            shape = lengths(entry.shape)
            shown.append(f"{entry.wanted.name} ({shape} {entry.dtype} a batch)" + (f", {done}" if done else ""))
        return _Prepared(
            assigned=assigned,
            size=size,
            conversions=converted.by_name,
            notes=(*converted.notes, *note_on_dropped(assigned)),
            words="; ".join(shown),
        )

    def _batch(self, place: int, index: int, prepared: _Prepared, room: int, fixed: int | None) -> Batch | None:
        """The first `room` samples of a batch, None where all of them are left out."""
        assigned, size = prepared.assigned, prepared.size
        origin = f"{self.origin}: batch {place}"
        labels = None
        if (assigned.labels is not None) != self._has_labels:
            raise InputError(f"{origin}: labels in some batches only", "Let it give labels always, or never.")
        if assigned.labels is not None:
            labels = class_labels(origin, assigned.labels)
            if len(labels) != size:
                raise InputError(f"{origin}: {size} samples and {len(labels)} labels", "Give one for each sample.")
        values = {
            name: prepared.conversions[name].apply(value) if name in prepared.conversions else value
            for name, value in assigned.given.items()
        }
        keep = np.arange(size) < room
        for name in prepared.conversions:
            if not values[name].ndim:
                continue
            for i in np.flatnonzero(nonfinite(values[name]) & keep).tolist():
                which = f"sample {i} of batch {place}, {name}"
                if not self.options.drop_nonfinite:
                    raise InputError(
                        f"{self.origin}: {which}: has values that are NaN or Inf",
                        "Remove it, or leave such samples out with --drop-nonfinite.",
                    )
                self.dropped[which] = "NaN or Inf"
                keep[i] = False
        if not keep.any() or (fixed is not None and not keep.all()):
            return None
        if not keep.all():
            values = {name: chosen(value, keep) for name, value in values.items()}
            labels = None if labels is None else labels[keep]
        args, kwargs = arranged(values, self.wanted)
        return Batch(args, kwargs, int(keep.sum()), index, labels)


def _sampler(source: Any) -> str:
    """The class of the sampler of a torch DataLoader, empty for anything else."""
    if not _is_loader(source):
        return ""
    own = source.sampler if source.batch_size is not None else getattr(source.batch_sampler, "sampler", None)
    return type(own).__name__


def _is_loader(source: Any) -> bool:
    return any(base.__module__ == "torch.utils.data.dataloader" for base in type(source).__mro__)


def _count(source: Any) -> int | None:
    """How many samples there are, where that is known without walking through them."""
    if isinstance(source, (list, tuple)):
        sizes = [_leading(item) for item in source]
        return None if None in sizes else sum(filter(None, sizes))
    size = getattr(source, "batch_size", None)
    if not _is_loader(source) or not isinstance(size, int) or not hasattr(source.sampler, "__len__"):
        return None
    try:
        count = len(source.sampler)
    except TypeError:  # an iterable data set
        return None
    return count // size * size if source.drop_last else count


def _leading(item: Any) -> int | None:
    """The length of the first axis of the first array."""
    entries = item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else (item,)
    return next((len(entry) for entry in entries if is_array(entry) and entry.ndim), None)


def _digest(item: Any) -> Any:
    """Shapes and sums of a batch: differ where the values do, nearly always."""
    if isinstance(item, Mapping):
        return {str(name): _digest(value) for name, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_digest(value) for value in item]
    if is_tensor(item):
        return tuple(item.shape), str(item.dtype), repr(float(item.double().sum())) if not item.is_complex() else ""
    if isinstance(item, np.ndarray) and item.dtype.kind in "fiub":
        with np.errstate(all="ignore"):
            return item.shape, str(item.dtype), repr(float(item.sum(dtype=np.float64)))
    return None
