"""What a user asks for with --data and its companions, and a checkpoint with what was seen on that data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from normdoctor.data.opening import open_data
from normdoctor.data.options import DataOptions, scale_words
from normdoctor.errors import UsageError
from normdoctor.layers import Checkpoint, Model
from normdoctor.measurement.lockstep import Progress, silent
from normdoctor.measurement.measuring import Seen, Taken, measure
from normdoctor.measurement.opening import open_walker
from normdoctor.models.opening import RunOptions
from normdoctor.placing import with_places


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Data, and how a model is run on it."""

    source: Any
    """See `open_data`."""
    data: DataOptions
    run: RunOptions
    progress: Progress = silent

    @property
    def taken(self) -> Taken:
        """What is done to the values of the data."""
        images = isinstance(self.source, (str, Path)) and Path(self.source).is_dir()
        return Taken(
            scaled=images or self.data.scale is not None,
            normalised=self.data.mean is not None or self.data.std is not None,
        )

    @property
    def words(self) -> str:
        """The options of a command that does the same, as the shell wants them."""
        return " ".join(f"{name} {shlex.quote(value)}" if value else name for name, value in self._options())

    def _options(self) -> Iterator[tuple[str, str]]:
        run, data = self.run, self.data
        named = isinstance(self.source, (str, Path))
        yield "--data", str(self.source) if named else "DATA"
        if run.trust:
            yield "--trust", ""
        for name, value in (("--arch", run.arch), ("--key", run.key), ("--device", run.device)):
            if value is not None:
                yield name, value
        if run.arch_args is not None:
            yield "--arch-args", run.arch_args if isinstance(run.arch_args, str) else json.dumps(dict(run.arch_args))
        if data.samples is not None:
            yield "--samples", str(data.samples)
        if data.scale is not None:
            words = scale_words(data.scale)
            yield "--scale", words if "/" in words else f"{data.scale:g}"
        for name, numbers in (("--mean", data.mean), ("--std", data.std)):
            if numbers is not None:
                yield name, ",".join(f"{number:g}" for number in numbers)
        if data.image_size is not None:
            yield "--image-size", str(data.image_size)
        if data.labels is not None:
            yield "--labels", str(data.labels)


def calibration(
    source: Any,
    *,
    samples: int | Literal["all"] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    scale: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    drop_nonfinite: bool = False,
    labels: str | Path | None = None,
    trust: bool = False,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    key: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """The options of `inspect` and `recalibrate` that are about data and running. Raises UsageError for wrong ones."""
    if arch is None and arch_args is not None:
        raise UsageError("--arch-args without --arch", "Name the class or function with --arch.")
    return Calibration(
        source=source,
        data=DataOptions(
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            scale=scale,
            mean=mean,
            std=std,
            image_size=image_size,
            drop_nonfinite=drop_nonfinite,
            labels=labels,
        ),
        run=RunOptions(trust=trust, arch=arch, arch_args=arch_args, key=key, device=device),
        progress=progress or silent,
    )


def measured(model: Any, checkpoint: Checkpoint, asked: Calibration, *, placed: bool = False) -> Checkpoint:
    """The checkpoint with what its norms see on the data, for the rules. model: the path or live module behind it.

    placed: also with where they stand in the graph."""
    with ExitStack() as stack:
        opened = stack.enter_context(open_walker(model, checkpoint, asked.run))
        data = stack.enter_context(open_data(asked.source, asked.data, opened.wanted))
        seen = measure(
            opened,
            data,
            batch_size=asked.data.batch_size,
            taken=asked.taken,
            placed=placed,
            progress=asked.progress,
        )
    words = asked.words
    if any(one.calls > 1 for one in seen.layers.values()):
        words += " --method one-pass"  # what is called several times has no exact statistics
    seen = replace(seen, measurement=replace(seen.measurement, options=words))
    models = tuple(_told(model, seen, asked.run.key) for model in checkpoint.models)
    checkpoint = replace(checkpoint, models=models, notes=(*checkpoint.notes, *seen.measurement.notes))
    return with_places(checkpoint, seen.found) if placed else checkpoint


def _told(model: Model, seen: Seen, key: str | None) -> Model:
    layers = []
    for layer in model.layers:
        found = replace(layer, measured=seen.layers.get(layer.name))
        found.__dict__["numbers"] = layer.numbers  # the tensors are the same: keep what was read
        layers.append(found)
    ran = any(layer.measured is not None for layer in layers) or (key is not None and model.key == key)
    return replace(model, layers=tuple(layers), measurement=seen.measurement if ran else None)
