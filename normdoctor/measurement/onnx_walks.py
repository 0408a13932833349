"""A graph of ONNX in pieces as a walker: see measurement.with_onnx, which makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from normdoctor.data import Batch
from normdoctor.data.wanted import Wanted, fits, lengths, listed, named, numpy_type
from normdoctor.errors import CannotRunError, MisfitError, RefusedError
from normdoctor.measurement.onnx_stages import Cut, Stage
from normdoctor.measurement.onnx_values import Affine, Shelf, Shelved, look_at
from normdoctor.measurement.walks import Look, Pause, Seen, Vector

Value = Any
"""A value of the graph as an engine holds it."""

Run = Callable[[Mapping[str, Value]], Sequence[Value]]
"""Inputs by name → the outputs of a piece in order."""

ROLES = ("running_mean", "running_var")


class Engine(Protocol):
    """What runs the pieces."""

    words: str
    """What it is."""

    def load(self, model: Any) -> tuple[Run, Mapping[str, Any]]:
        """A piece, and the TypeProtos of its outputs as far as they are tensors."""

    def value(self, array: NDArray[Any]) -> Value: ...

    def array(self, value: Value) -> NDArray[Any]:
        """In its own type, as long as the value is there."""

    def plain(self, value: Value) -> NDArray[Any]:
        """What numpy has no type for as float32."""

    def tidy(self) -> None:
        """Give memory that is not used back."""

    def is_tensor(self, value: Value) -> bool: ...

    def shape(self, value: Value) -> tuple[int, ...]: ...

    def nbytes(self, value: Value) -> int: ...


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm that is stopped at."""

    affine: Affine
    dtype: np.dtype[Any]
    """Of its statistics."""
    inputs: tuple[str, str]
    """What its mean and its variance are called in the pieces."""
    stored: tuple[Vector, Vector]


@dataclass(eq=False)
class _Statistics:
    """What a norm uses at the moment."""

    mean: Vector
    var: Vector
    values: tuple[Value, Value]


class OnnxWalker:
    """See `Walker`. Made by `open_onnx`; `close` it."""

    ddof = 0

    def __init__(
        self,
        name: str,
        engine: Engine,
        pieces: Sequence[tuple[Stage, Run | None]],
        norms: Mapping[str, Norm],
        left: Mapping[str, str],
        wanted: Sequence[Wanted],
        outputs: Sequence[str],
        spill: Path | None,
        memory: int,
    ) -> None:
        self.name = name
        self.left = left
        self.wanted = tuple(wanted)
        """What the model takes."""
        self.engine = engine.words
        """What runs it, in words."""
        self._engine = engine
        self._pieces = list(pieces)
        self._norms = norms
        self._outputs = tuple(outputs)
        self._shelf = None if spill is None else Shelf(spill)
        self._memory = memory
        self._held: dict[int, int] = {}
        """Bytes that walks hold in memory, by id."""
        self._walks: dict[int, OnnxWalk] = {}
        self._peaks: dict[tuple[tuple[int, ...], ...], int] = {}
        self._now: dict[str, _Statistics] = {}
        self.restore()

    @property
    def norms(self) -> Mapping[str, int]:
        return {name: norm.stored[0].size for name, norm in self._norms.items()}

    @property
    def fixed_batch(self) -> int | None:
        """How many samples a batch must have; None where any number will do."""
        return self.wanted[0].fixed_batch if self.wanted else None

    def start(self, batch: Batch, look: Look) -> OnnxWalk:
        """Raises MisfitError where the model does not take the batch."""
        if not self._pieces:
            raise CannotRunError(f"{self.name}: is closed")
        walk = OnnxWalk(self, batch, look)
        self._walks[id(walk)] = walk
        return walk

    def put(self, norm: str, mean: Vector, var: Vector) -> None:
        """Raises RefusedError for a value that the type of the statistics cannot hold."""
        known = self._norms[norm]
        arrays = []
        for role, values in zip(ROLES, (mean, var), strict=True):
            wide = np.asarray(values, dtype=np.float64)
            with np.errstate(all="ignore"):
                array = wide.astype(known.dtype)
            if (np.isfinite(wide) & ~np.isfinite(array.astype(np.float64))).any():
                raise RefusedError(
                    f"{norm}.{role}: {known.dtype} cannot hold {np.abs(wide).max():.3g}",
                    "Convert the model to float32 first.",
                )
            arrays.append(array)
        self._set(norm, arrays[0], arrays[1])
        if len(self._walks) > 1:  # all of them have come to the norm
            self._engine.tidy()

    def restore(self) -> None:
        for name, norm in self._norms.items():
            with np.errstate(all="ignore"):
                self._set(name, *(stored.astype(norm.dtype) for stored in norm.stored))

    def _set(self, norm: str, mean: NDArray[Any], var: NDArray[Any]) -> None:
        self._now[norm] = _Statistics(
            mean.astype(np.float64), var.astype(np.float64), (self._engine.value(mean), self._engine.value(var))
        )

    def close(self) -> None:
        """Ends all walks and lets go of the model."""
        for walk in list(self._walks.values()):
            walk.close()
        self._pieces.clear()

    def live_bytes(self, batch: Batch) -> int:
        """The most that a walk of this batch holds while it stands in front of a norm, in bytes, its inputs included.

        Sends the batch through where none of its shape went through before."""
        given = self._bound(batch)
        shapes = _shapes(given)
        if shapes not in self._peaks:
            with closing(self.start(batch, Look())) as walk:
                while walk.go() is not None:
                    pass
        return self._peaks[shapes]

    def _bound(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """The arrays of a batch by input, in the types that the model takes."""
        given = named(batch, self.wanted)
        known = {entry.name: entry for entry in self.wanted}
        for name in given:
            if name not in known:
                raise MisfitError(f"{self.name}: has no input {name}", listed(self.wanted))
        for name in known:
            if name not in given:
                raise MisfitError(f"{self.name}: the data has nothing for input {name}", listed(self.wanted))
        return {name: self._fitted(known[name], value) for name, value in given.items()}

    def _fitted(self, wanted: Wanted, value: Any) -> NDArray[Any]:
        if hasattr(value, "detach"):  # a tensor
            value = value.detach().cpu()
            value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
        array = np.asarray(value)
        if not fits(array.shape, wanted.shape):
            raise MisfitError(
                f"{self.name}: {wanted.name} is {lengths(array.shape)}, the model takes {wanted}",
                "Give data of that shape.",
            )
        dtype = numpy_type(wanted.dtype)
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise MisfitError(
                f"{self.name}: {wanted.name} is {array.dtype}, the model takes {wanted}",
                f"Convert it to {wanted.dtype} first.",
            )
        return np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)

    def _account(self, walk: OnnxWalk) -> None:
        """A walk has stopped: count what it holds, and put some of it on disk where all together hold too much.

        The walk that stopped last is the last one to go on, so nothing that is wanted sooner is put away."""
        engine, live = self._engine, walk.live
        sizes = {name: engine.nbytes(value) for name, value in live.items() if not isinstance(value, Shelved)}
        held = sum(sizes.values())
        walk.peak = max(walk.peak, held + sum(value.nbytes for value in live.values() if isinstance(value, Shelved)))
        excess = held + sum(count for key, count in self._held.items() if key != id(walk)) - self._memory
        if self._shelf is not None:
            for name in sorted(sizes, key=lambda name: -sizes[name]):
                if excess <= 0 or not sizes[name]:
                    break
                live[name] = self._shelf.put(engine.array(live[name]))
                held -= sizes[name]
                excess -= sizes[name]
        self._held[id(walk)] = held

    def _forget(self, walk: OnnxWalk) -> None:
        self._held.pop(id(walk), None)
        self._walks.pop(id(walk), None)

    def _seen(self, cut: Cut, x: Value, samples: int, look: Look) -> Seen:
        norm, now, engine = self._norms[cut.norm], self._now[cut.norm], self._engine
        shape = engine.shape(x)
        channels = norm.stored[0].size
        if len(shape) < 2 or shape[1] != channels or 0 in shape:
            raise MisfitError(f"{self.name}: {lengths(shape)} arrives at {cut.norm}, which has {channels} channels")
        return look_at(engine.array(x), samples, look, now.mean, now.var, norm.affine)


class OnnxWalk:
    """See `Walk`."""

    def __init__(self, walker: OnnxWalker, batch: Batch, look: Look) -> None:
        self._walker, self._look, self._samples = walker, look, max(batch.size, 1)
        self._stage = 0
        self._ended = False
        self._outputs: dict[str, NDArray[Any]] = {}
        given = walker._bound(batch)
        self._shapes = _shapes(given)
        self.live: dict[str, Value | Shelved] = {name: walker._engine.value(array) for name, array in given.items()}
        self.peak = 0
        walker._account(self)

    def advance(self) -> Pause | None:
        stop = self.go()
        if stop is None:
            return None
        cut, x = stop
        return Pause(cut.norm, self._walker._seen(cut, x, self._samples, self._look))

    def go(self) -> tuple[Cut, Value] | None:
        """On to the next norm, without a look at its input."""
        walker = self._walker
        if self._ended:
            return None
        stage, run = walker._pieces[self._stage]
        self._stage += 1
        wanted = {name: self._taken(name) for name in stage.takes}
        for cut in stage.norms:
            wanted.update(zip(walker._norms[cut.norm].inputs, walker._now[cut.norm].values, strict=True))
        fresh = {} if run is None else dict(zip(stage.gives, run(wanted), strict=True))
        del wanted
        if stage.cut is None:
            self._outputs = self._finished(fresh)
            walker._peaks[self._shapes] = max(self.peak, walker._peaks.get(self._shapes, 0))
            self.close()
            return None
        x = fresh[stage.x] if stage.x in fresh else self._taken(stage.x)
        for name in [name for name in self.live if name not in stage.keeps]:
            _drop(self.live.pop(name))
        self.live.update((name, value) for name, value in fresh.items() if name in stage.keeps)
        walker._account(self)
        return stage.cut, x

    def _finished(self, fresh: Mapping[str, Value]) -> dict[str, NDArray[Any]]:
        names = [name for name in self._walker._outputs if name in fresh or name in self.live]
        values = {name: fresh[name] if name in fresh else self._taken(name) for name in names}
        engine = self._walker._engine
        return {name: engine.plain(value) for name, value in values.items() if engine.is_tensor(value)}

    def _taken(self, name: str) -> Value:
        value = self.live[name]
        return self._walker._engine.value(value.read()) if isinstance(value, Shelved) else value

    @property
    def outputs(self) -> dict[str, NDArray[Any]]:
        return self._outputs

    def close(self) -> None:
        self._ended = True
        for value in self.live.values():
            _drop(value)
        self.live.clear()
        self._walker._forget(self)


def _shapes(given: Mapping[str, NDArray[Any]]) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in given.values())


def _drop(value: Value | Shelved) -> None:
    if isinstance(value, Shelved):
        value.drop()
