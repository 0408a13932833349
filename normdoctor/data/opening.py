"""Where data comes from: a file of arrays, a folder of images, the user's own code, live objects."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.data import samples, streams
from normdoctor.data.assigning import LABELS, Assigned, by_name, in_order
from normdoctor.data.conversion import class_labels
from normdoctor.data.dataset import Dataset
from normdoctor.data.files import READABLE, open_arrays
from normdoctor.data.images import is_image, open_images
from normdoctor.data.options import DataOptions, scale_words
from normdoctor.data.rows import Rows, is_array, rows_of
from normdoctor.data.wanted import Wanted, count_inputs, listed, required
from normdoctor.errors import UsageError, did_you_mean
from normdoctor.models.architecture import find, users_code
from normdoctor.readers.arrays import Source

FORM = "Write it like --data mypkg.data:loader or --data data.py:loader."

DEFAULTS = DataOptions()

ANYTHING = (Wanted("*inputs", None, optional=True, loose=True),)
"""What a model takes whose code does not say it."""


def open_data(source: Any, options: DataOptions = DEFAULTS, wanted: Sequence[Wanted] = ()) -> Dataset:
    """The data that `source` stands for, ready for a model with the inputs `wanted`; to be closed.

    wanted: nothing where it is not known what the model takes.
    source: the path of .npy, .npz, .pt, .safetensors, of an image or a folder of images; package.module:name or
    file.py:name, a callable without arguments or what it would return; or that itself: a tensor or an array, a dict
    or a tuple of them (cut into batches), a list, a loader, a generator of batches. A callable that returns a
    generator is called again for each pass; what a live generator gave is kept.

    Raises InputError for what cannot be read, UsageError for what does not fit the model or the options,
    MissingDependencyError for images without Pillow."""
    wanted = tuple(wanted) or ANYTHING
    if not isinstance(source, (str, Path)):
        return _live(type(source).__name__, source, options, wanted)
    path = Path(source)
    with suppress(OSError, ValueError):  # opening it as a file then says what is wrong
        if path.is_dir():
            return _images(path, options, wanted)
        if not path.exists() and _names_code(str(source)):
            return _code(str(source), options, wanted)
    with Source(path) as file:
        head = file.read_at(0, min(file.size, 12))
    if path.suffix == ".py":
        raise UsageError(f"{path}: names no callable in it", FORM)
    if is_image(head):
        return _images(path, options, wanted)
    return _arrays(path, options, wanted)


def _names_code(source: str) -> bool:
    """Whether it is written like module:name, and no drive or address."""
    _, colon, name = source.rpartition(":")
    return bool(colon) and "/" not in name and "\\" not in name


def _arrays(path: Path, options: DataOptions, wanted: Sequence[Wanted]) -> Dataset:
    if options.image_size is not None:
        raise UsageError(f"{path}: --image-size is for images", "Leave it out: these are arrays.")
    file = open_arrays(path)
    try:
        entries = dict(file.arrays)
        labels = None
        if options.labels is not None:
            labels = _labels(path, options.labels, entries)
        assigned = _unnamed(path, entries, wanted) or by_name(str(path), entries, wanted, _is_labels)
        return samples.dataset_of(str(path), assigned, options, wanted, labels=labels, on_close=file.close)
    except BaseException:
        file.close()
        raise


def _unnamed(path: Path, entries: Mapping[str, Rows], wanted: Sequence[Wanted]) -> Assigned[Rows] | None:
    """The one array of a file that has no names."""
    if list(entries) != [""]:
        return None
    if len(required(wanted)) > 1:
        raise UsageError(f"{path}: one array, and the model has {count_inputs(wanted)}", f"Use .npz. {listed(wanted)}")
    return in_order(str(path), list(entries.values()), wanted, _is_labels)


def _is_labels(rows: Rows) -> bool:
    return rows.dtype.startswith(("int", "uint")) and (len(rows.shape) == 1 or rows.shape[1:] == (1,))


def _labels(path: Path | str, given: str | Path, entries: dict[str, Rows]) -> NDArray[np.int64]:
    """The labels under this name, taken out of the entries, or of the file of that name."""
    name = str(given)
    if name in entries:
        return class_labels(f"{path}: {name}", entries.pop(name).whole())
    if not Path(given).is_file():
        hint = did_you_mean(name, entries) + (f"The data holds {', '.join(list(entries)[:8])}. " if entries else "")
        raise UsageError(f"--labels {name}: no such file, and no array of that name in {path}", hint + _LABELS)
    file = open_arrays(Path(given))
    try:
        found = [key for key in file.arrays if key.lower() in LABELS] or list(file.arrays)
        if len(found) != 1:
            raise UsageError(f"--labels {name}: it is not clear which of {len(found)} arrays", _LABELS)
        return class_labels(name, file.arrays[found[0]].whole())
    finally:
        file.close()


_LABELS = "Give a .npy or .pt file with one integer for each sample."


def _images(path: Path, options: DataOptions, wanted: Sequence[Wanted]) -> Dataset:
    inputs = required(wanted)
    if len(inputs) > 1:
        raise UsageError(f"{path}: images are one input, the model has {count_inputs(inputs)}", listed(inputs))
    shape = inputs[0].shape if inputs else None
    images = open_images(path, options.image_size, 1 if shape is not None and shape[1:2] == (1,) else 3)
    scale = 1 / 255 if options.scale is None else options.scale
    labels = None if options.labels is None else _labels(path, options.labels, {})
    assigned: Assigned[Rows] = in_order(str(path), [images], wanted, lambda rows: False)
    dataset = samples.dataset_of(str(path), assigned, replace(options, scale=scale), wanted, labels=labels)
    count = len(images.files)
    colours = "grey" if images.channels == 1 else "RGB"
    size = f"{images.width} x {images.height}"
    how = f"{size} {colours}" if images.size is None else f"{size} {colours}, short side resized, centre crop"
    done = [scale_words(scale)] if scale != 1 else []
    done += [f"{name} {' '.join(map('{:g}'.format, v))}" for name, v in _normalised(options) if v is not None]
    used = "" if dataset.samples == count else f"; {dataset.samples:,} of them, drawn by seed {options.seed}"
    dataset.words = f"{path}: {count:,} image{'' if count == 1 else 's'} ({how}), {', '.join(done) or 'bytes'}{used}"
    if options.mean is None and options.std is None and options.scale is None:
        dataset.remarks.append("values are in 0..1: add --mean and --std if the model was trained so")
    return dataset


def _normalised(options: DataOptions) -> Iterable[tuple[str, Sequence[float] | None]]:
    return (("mean", options.mean), ("std", options.std))


def _code(place: str, options: DataOptions, wanted: Sequence[Wanted]) -> Dataset:
    """What a callable of the user's gives, or what lies under that name."""
    what = f"--data {place}"
    target = find(what, place, FORM, "Import it by itself to see where.")
    if not callable(target) or is_array(target):
        return _live(what, target, options, wanted)
    try:
        inspect.signature(target).bind()
    except TypeError as error:
        raise UsageError(f"{what}: {error}", "It is called without arguments: give them defaults.") from None
    except ValueError:
        pass  # no signature to be had
    hint = "It is called without arguments, and is to return batches."

    def call() -> Any:
        with users_code(what, hint):
            return target()

    first = call()
    if not _walks_once(first):
        return _live(what, first, options, wanted)
    calls: list[Any] = [first]
    return streams.dataset_of(what, lambda: calls.pop() if calls else call(), options, wanted)


def _walks_once(value: Any) -> bool:
    return isinstance(value, Iterator) and iter(value) is value


def _live(origin: str, value: Any, options: DataOptions, wanted: Sequence[Wanted]) -> Dataset:
    """An object in memory."""
    streams.refuse_single_samples(origin, value)
    entries: Any = None
    if is_array(value):
        entries = [value]
    elif isinstance(value, Mapping) and all(map(is_array, value.values())):
        entries = {str(name): rows_of(entry) for name, entry in value.items()}
    elif isinstance(value, tuple) and all(map(is_array, value)):
        entries = list(value)
    if entries is not None and len(entries):
        if options.image_size is not None:
            raise UsageError(f"{origin}: --image-size is for files of images", "Leave it out: these are arrays.")
        labels = None
        if isinstance(entries, dict):
            if options.labels is not None:
                labels = _labels(origin, options.labels, entries)
            assigned = by_name(origin, entries, wanted, _is_labels)
        else:
            labels = None if options.labels is None else _labels(origin, options.labels, {})
            rows = [rows_of(entry) for entry in entries]
            first = rows[0].shape[:1]
            assigned = in_order(origin, rows, wanted, lambda entry: _is_labels(entry) and entry.shape[:1] == first)
        return samples.dataset_of(origin, assigned, options, wanted, labels=labels)
    if _walks_once(value):
        return streams.dataset_of(origin, streams.kept(value), options, wanted)
    if isinstance(value, (list, tuple)):
        return streams.dataset_of(origin, lambda: map(streams.copied, value), options, wanted, source=value)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return streams.dataset_of(origin, lambda: value, options, wanted)
    raise UsageError(f"{origin}: a {type(value).__name__} gives no batches", READABLE)
