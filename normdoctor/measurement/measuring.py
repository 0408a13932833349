"""Everything that `inspect` wants to know of a model on the user's data, in as few passes as it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from normdoctor.data import Batch
from normdoctor.data.dataset import Dataset, Part
from normdoctor.errors import CannotRunError, InputError, MisfitError, UsageError
from normdoctor.layers import NormLayer, median
from normdoctor.measured import Measured, Measurement, Preprocessing
from normdoctor.measurement.lockstep import Progress, as_stored, one_pass, silent
from normdoctor.measurement.opening import Opened
from normdoctor.measurement.scores import Arrays, changed, disagreeing, hits, scores_of
from normdoctor.measurement.walks import Look, Walker
from normdoctor.moments import Moments, divergence, merged
from normdoctor.placing import Found
from normdoctor.rules.verdict import PREPARED_LIMITS
from normdoctor.rules.wording import plural

COMPARED = 8
"""Batches that are run once more with the statistics of the batch."""

GLANCED_AT = 8
"""Batches of which the first norm is looked at in other preprocessing."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation per colour that most image models are trained with."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What was measured: of each layer by name, and of the whole."""

    layers: Mapping[str, Measured]
    measurement: Measurement
    found: Found = field(default_factory=Found)
    """Where they stand, where that was looked at."""


class Taken(NamedTuple):
    """What was done to the values of the data already."""

    scaled: bool
    normalised: bool

    def fits(self, options: str) -> bool:
        """Whether options that prepare the data can still be added."""
        return not self.normalised and not (self.scaled and "--scale" in options)


AS_IT_IS = Taken(scaled=False, normalised=False)


def measure(
    opened: Opened,
    data: Dataset,
    *,
    batch_size: int,
    taken: Taken = AS_IT_IS,
    placed: bool = False,
    progress: Progress = silent,
) -> Seen:
    """Walk all data through the model as it is stored, and some of it in other ways.

    placed: where its norms stand in its graph is wanted too.

    Raises InputError for data that is empty or not finite, UsageError and MisfitError for data that does not fit."""
    walker = opened.walker
    first: list[tuple[Batch, Arrays]] = []
    labelled = right = 0

    def listen(batch: Batch, outputs: dict[str, Any]) -> None:
        nonlocal labelled, right
        if len(first) < COMPARED:
            first.append((batch, outputs))
        found = scores_of(outputs, batch.size)
        if batch.labels is not None and found is not None:
            labelled += batch.size
            right += int(hits(found, batch.labels).sum())

    look = Look(samples=True, active=True, others=True)
    batches = whole_batches(data, opened.fixed_batch)
    tallies = as_stored(
        walker,
        batches,
        look,
        outputs=listen,
        progress=progress,
        total=count_batches(data, opened.fixed_batch or batch_size),
    )
    if not tallies.batches:
        raise InputError(f"{data.words}: there are no samples", "Check --data.")
    layers = {name: tally.measured() for name, tally in tallies.of.items()}
    found = Found()
    if first and (placed or any(one.active is not None and not one.active.all() for one in layers.values())):
        found = opened.find_places(first[0][0])
        layers = {name: replace(one, gate=_gate(found, name)) for name, one in layers.items()}
    order = tuple(tallies.of)
    disagreement, change = _gap(walker, first)
    left = dict(walker.left) | {name: "never reached with this data" for name in walker.norms if name not in tallies.of}
    measurement = Measurement(
        data=data.words,
        samples=tallies.samples,
        batches=tallies.batches,
        order=order,
        left=left,
        notes=(*opened.notes, *data.notes),
        disagreement=disagreement,
        output_change=change,
        preprocessing=preparation(opened, [batch for batch, _ in first[:GLANCED_AT]], taken),
        order_dependence=_order_dependence(opened, first),
        accuracy=right / labelled if labelled else None,
    )
    return Seen(layers, measurement, found)


def _gate(found: Found, name: str) -> str | None:
    """The activation behind a norm."""
    place = found.places.get(name)
    return None if place is None or place.activation is None else place.activation.name


def count_batches(data: Dataset, batch_size: int) -> int | None:
    """About how many batches there are to come, where that is known; loaders have sizes of their own."""
    return None if data.samples is None else max(1, math.ceil(data.samples / batch_size))


def whole_batches(data: Dataset, fixed: int | None, part: Part | None = None) -> Iterator[Batch]:
    """The batches; of a model with a fixed batch size those of that size, the rest is left out and noted.

    Raises UsageError where none has the size."""
    if fixed is None:
        yield from data.batches(part=part)
        return
    passed = left = 0
    for batch in data.batches(fixed, part):
        if batch.size == fixed:
            passed += 1
            yield batch
        else:
            left += batch.size
    note = f"the model takes batches of {fixed} only: {plural(left, 'sample')} left out"
    if left and note not in data.remarks:
        data.remarks.append(note)
    if not passed:
        raise UsageError(f"the model takes batches of {fixed}, and there is no such batch", "Give more data.")


# the statistics of the batch


def _gap(walker: Walker, first: Sequence[tuple[Batch, Arrays]]) -> tuple[float | None, float | None]:
    """Share of samples whose largest output is another with the batch's own statistics, and the change of outputs."""
    stored = {batch.index: outputs for batch, outputs in first}
    differing, samples, changes = 0, 0, []

    def listen(batch: Batch, outputs: dict[str, Any]) -> None:
        nonlocal differing, samples
        before = stored[batch.index]
        changes.append(changed(before, outputs))
        one, other = scores_of(before, batch.size), scores_of(outputs, batch.size)
        if one is not None and other is not None:
            samples += batch.size
            differing += disagreeing(one, other)

    whole = [batch for batch, _ in first if batch.size > 1]
    try:
        with suppress(InputError):  # NaN on its way: S101 says so
            one_pass(walker, whole, outputs=listen)
    finally:
        walker.restore()
    finite = [change for change in changes if change is not None and math.isfinite(change)]
    return differing / samples if samples else None, float(np.mean(finite)) if finite else None


def _order_dependence(opened: Opened, first: Sequence[tuple[Batch, Arrays]]) -> float | None:
    """How much the output of a sample changes with the others in its batch, in the modes as saved."""
    if opened.as_saved is None:
        return None
    batch = next((batch for batch, _ in first if batch.size > 2), None)
    if batch is None:
        return None
    half = batch.size // 2
    try:
        together = opened.as_saved(batch)
        alone = opened.as_saved(cut(batch, half))
    except (CannotRunError, MisfitError):
        return None
    shared = {name: array[:half] for name, array in together.items() if array.ndim and len(array) == batch.size}
    return changed(shared, alone)


def cut(batch: Batch, size: int) -> Batch:
    """The first samples of a batch."""
    return _mapped(batch, lambda value: value[:size], size)


def _mapped(batch: Batch, change: Callable[[Any], Any], size: int | None = None) -> Batch:
    """The batch with something done to each of its arguments that has a value for every sample."""

    def mapped(value: Any) -> Any:
        shape = getattr(value, "shape", None)
        return change(value) if shape is not None and len(shape) and shape[0] == batch.size else value

    return replace(
        batch,
        args=tuple(map(mapped, batch.args)),
        kwargs={name: mapped(value) for name, value in batch.kwargs.items()},
        size=batch.size if size is None else size,
    )


# other preprocessing


def preparation(opened: Opened, batches: Sequence[Batch], taken: Taken) -> tuple[Preprocessing, ...]:
    """What the first norm would see of data prepared otherwise; nothing where it sees what it expects, or its
    statistics were never updated."""
    found: list[Preprocessing] = []
    for tried in (_Tried("as given", lambda value: value), *_alternatives(batches)):
        seen = _at_first_norm(opened, batches, tried.change)
        if seen is None:
            return ()
        layer, moments = seen
        divergence = _typical(moments, layer)
        judged = PREPARED_LIMITS["given"] < divergence < math.inf
        if not found and (layer.numbers.default_statistics or not judged):
            return ()
        options = tried.options if taken.fits(tried.options) else ""
        found.append(Preprocessing(words=tried.words, divergence=divergence, options=options))
    return tuple(found)


def _at_first_norm(
    opened: Opened, batches: Sequence[Batch], change: Callable[[Any], Any]
) -> tuple[NormLayer, Moments] | None:
    """What the first norm sees of changed batches; None where they reach none with statistics."""
    layers = {layer.name: layer for layer in opened.layers}
    name, parts = None, []
    for batch in batches:
        with closing(opened.walker.start(_mapped(batch, change), Look())) as walk:
            pause = walk.advance()
        if pause is None or pause.norm not in layers or name not in (None, pause.norm):
            return None
        name = pause.norm
        parts.append(pause.seen.moments)
    return None if name is None else (layers[name], merged(parts))


def _typical(moments: Moments, layer: NormLayer) -> float:
    """The median over live channels of the divergence, in nats; infinite where most of them have none."""
    mean, var, live = layer.numbers.mean, layer.numbers.var, layer.numbers.live
    if mean is None or var is None:
        return 0.0
    found = divergence(moments, mean, var)[live]
    known = found[np.isfinite(found)]
    return median(known) if 2 * known.size > found.size else math.inf


class _Tried(NamedTuple):
    """Another preparation of the data."""

    words: str
    change: Callable[[Any], Any]
    """Of arguments."""
    options: str = ""
    """Of a command that prepares it so."""


def _alternatives(batches: Sequence[Batch]) -> Iterator[_Tried]:
    """What is tried: it applies to arguments of floating point, all others stay."""
    yield _Tried("times 255", _of_floats(lambda value: value * 255), "--scale 255")
    yield _Tried("divided by 255", _of_floats(lambda value: value / 255), "--scale 1/255")
    half = "--mean 0.5 --std 0.5"
    yield _Tried("normalised by mean and std 0.5", _of_floats(lambda value: (value - 0.5) / 0.5), half)
    yield _Tried(
        "divided by 255 and normalised by mean and std 0.5",
        _of_floats(lambda value: (value / 255 - 0.5) / 0.5),
        f"--scale 1/255 {half}",
    )
    yield _Tried("without a normalisation by mean and std 0.5", _of_floats(lambda value: value * 0.5 + 0.5))
    arguments = [value for batch in batches[:1] for value in (*batch.args, *batch.kwargs.values())]
    shapes = [tuple(value.shape) for value in arguments if hasattr(value, "shape")]
    if not any(len(shape) == 4 and shape[1] == 3 for shape in shapes):
        return
    mean, std = IMAGENET
    usual = " ".join(f"{name} {','.join(map(str, values))}" for name, values in (("--mean", mean), ("--std", std)))
    yield _Tried("channels swapped (RGB and BGR)", _of_images(lambda value: value[:, [2, 1, 0]]))
    yield _Tried(
        "normalised by ImageNet's mean and std",
        _of_images(lambda value: (value - _per_colour(value, mean)) / _per_colour(value, std)),
        usual,
    )
    yield _Tried(
        "divided by 255 and normalised by ImageNet's mean and std",
        _of_images(lambda value: (value / 255 - _per_colour(value, mean)) / _per_colour(value, std)),
        f"--scale 1/255 {usual}",
    )
    yield _Tried(
        "without a normalisation by ImageNet's mean and std",
        _of_images(lambda value: value * _per_colour(value, std) + _per_colour(value, mean)),
    )


def _of_floats(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: change(value) if "float" in str(value.dtype) else value


def _of_images(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return _of_floats(lambda value: change(value) if value.ndim == 4 and value.shape[1] == 3 else value)


def _per_colour(value: Any, numbers: Sequence[float]) -> Any:
    shaped = np.asarray(numbers, dtype=np.float32).reshape(1, 3, 1, 1)
    return shaped if isinstance(value, np.ndarray) else value.new_tensor(shaped.tolist())
