"""What a file says about its norm layers: the records that every reader fills and every rule judges.

Nothing here knows a file format, torch or onnx. `None` always means *the file does not say*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from normdoctor.compared import Comparison
from normdoctor.errors import InputError
from normdoctor.measured import Measured, Measurement
from normdoctor.places import Place

Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]

DEFAULT_EPS = 1e-5
"""eps of torch's BatchNorm, LayerNorm, GroupNorm and InstanceNorm when the caller gives none."""

DEFAULT_MOMENTUM = 0.1
"""momentum of torch's BatchNorm and InstanceNorm when the caller gives none."""

LIVE_SHARE_OF_MEDIAN = 1e-4
"""A channel whose running_var is below this share of the layer's median carries no signal worth a ratio."""


DEAD_SHARE_OF_LARGEST = 1e-12
"""A running_var below this share of the layer's largest is no part of the median just named."""


@runtime_checkable
class ArrayRef(Protocol):
    """An array that may still be on disk. Asking for its shape or dtype never reads data."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """torch's name for the element type: float32, bfloat16, float8_e4m3fn, int64, ..."""

    @property
    def nbytes(self) -> int: ...

    @property
    def identity(self) -> Hashable:
        """Equal for two references exactly when they are the same bytes seen the same way (tied tensors)."""

    def numpy(self) -> NDArray[Any]:
        """The values. bfloat16 and float8 come as float32, which holds them exactly.

        Raises InputError where the bytes cannot be read (truncated file, checksum)."""


@runtime_checkable
class Loadable(Protocol):
    """An array reference that also reads what is larger than any norm's."""

    def load(self) -> NDArray[Any]:
        """The values, read anew each time and not kept; otherwise as `ArrayRef.numpy`."""


def load(ref: ArrayRef) -> NDArray[Any]:
    """The values of a weight of any size, read anew where the reference can."""
    return ref.load() if isinstance(ref, Loadable) else ref.numpy()


@runtime_checkable
class Sliceable(Protocol):
    """An array reference that can read a part of what it refers to."""

    @property
    def has_rows(self) -> bool:
        """Whether what lies along the first axis can be read piece by piece, without reading anything twice."""

    def load_rows(self, start: int, stop: int) -> NDArray[Any]:
        """The values from `start` to `stop` along the first axis, within its length; otherwise as `Loadable.load`."""


def rows(ref: ArrayRef, limit_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """The values of a weight of any size, a run of rows after another, each with the index of its first.

    A run has at most `limit_bytes` once it is read, and at least one row. What cannot be read in parts comes whole."""
    if not (isinstance(ref, Sliceable) and ref.has_rows):
        yield 0, load(ref)
        return
    # As in a file, or as the float32 that shorter types become.
    row = max(ref.nbytes, 4 * math.prod(ref.shape)) // max(ref.shape[0], 1)
    count = max(limit_bytes // max(row, 1), 1)
    for start in range(0, ref.shape[0], count):
        yield start, ref.load_rows(start, min(start + count, ref.shape[0]))


@dataclass(frozen=True)
class DetachedArray:
    """What is left of an ArrayRef without its file: everything but the values."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    identity: Hashable

    def numpy(self) -> NDArray[Any]:
        raise InputError("the values were left in the file", "Open the checkpoint again to read them.")


class NormKind(Enum):
    """What a layer computes; the value is how reports name it."""

    BATCH = "BatchNorm"
    INSTANCE = "InstanceNorm"
    LAYER = "LayerNorm"
    GROUP = "GroupNorm"
    RMS = "RMSNorm"
    LAYER_OR_GROUP = "LayerNorm or GroupNorm"
    LAYER_OR_RMS = "LayerNorm or RMSNorm"
    EVO = "EvoNorm"
    FILTER_RESPONSE = "FilterResponseNorm"
    DYNAMIC_TANH = "DynamicTanh"
    AFFINE = "affine"


VECTORS = ("weight", "bias", "running_mean", "running_var")
"""The fields that hold one value per channel."""

TRACKING_KINDS = frozenset({NormKind.BATCH, NormKind.INSTANCE})
"""Kinds that can carry running_mean and running_var."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NormLayer:
    """One norm layer as its file describes it. Tensors are references: nothing is read until asked for.

    weight and bias are the stored gamma and beta of `channels` values; read them through `numbers`, which
    knows that some RMSNorms store gamma - 1. momentum is in torch's sense, the weight of the NEW batch.
    """

    name: str
    """The module path as the user wrote it, wrappers included; `key:path` when a file holds several models."""
    path: str
    """`name` without key and wrappers (module., _orig_mod., ...): what layers are matched by."""
    kind: NormKind
    channels: int
    origin: str | None = None
    """The class or operator as written in the file, e.g. torch.nn.modules.batchnorm.BatchNorm2d."""
    groups: int | None = None
    weight: ArrayRef | None = None
    bias: ArrayRef | None = None
    running_mean: ArrayRef | None = None
    running_var: ArrayRef | None = None
    num_batches_tracked: ArrayRef | None = None
    alpha: ArrayRef | None = None
    """The scalar inside DynamicTanh (gamma * tanh(alpha * x) + beta) and its relatives."""
    inner_shift: ArrayRef | None = None
    """The scalar s inside Derf (gamma * erf(alpha * x + s) + beta)."""
    eps: float | None = None
    momentum: float | Literal["cumulative"] | None = None
    """torch's own momentum=None, a plain average over all batches, is the word "cumulative"."""
    training: bool | None = None
    baked: bool = False
    """`training` is a literal of a recorded graph (traced, exported): neither train() nor eval() changes it."""
    affine: bool | None = None
    track_running_stats: bool | None = None
    requires_grad: bool | None = None
    zero_centred: bool | None = None
    """True where the layer multiplies by 1 + weight (Gemma, Qwen3-Next)."""
    zero_centred_by_class: bool | None = None
    """What the class itself says about `zero_centred`, where the file names one that is known."""
    aliases: tuple[str, ...] = ()
    """Other names under which the same tensors are stored (one module used in several places)."""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """Field → the name that the file has for it, where that is not torch's own (weight → gamma)."""
    measured: Measured | None = None
    """What its inputs were on calibration data, where there is any."""
    place: Place | None = None
    """Where it stands in the graph; None where no graph was looked at, or it is not in it."""
    wrappers: tuple[str, ...] = ()
    """The parts of `name` that a wrapper inserted and `path` is without (module, _orig_mod)."""

    @cached_property
    def lengths(self) -> dict[str, int]:
        """How many values each stored vector has, by field; all equal unless the file is damaged."""
        refs = {name: getattr(self, name) for name in VECTORS}
        return {name: math.prod(ref.shape) for name, ref in refs.items() if ref is not None}

    @cached_property
    def lengths_agree(self) -> bool:
        """All stored vectors have the same number of values, and at least one."""
        return len(set(self.lengths.values())) < 2 and 0 not in self.lengths.values()

    @cached_property
    def numbers(self) -> Numbers:
        """The layer's values per channel in float64, each read once."""
        return Numbers(self)

    def detached(self) -> NormLayer:
        """The layer with its numbers and without its file: what can go to another process."""
        self.numbers.load()
        left: dict[str, Any] = {}
        for name in (entry.name for entry in fields(self)):
            ref = getattr(self, name)
            if isinstance(ref, ArrayRef):
                left[name] = DetachedArray(ref.shape, ref.dtype, ref.nbytes, ref.identity)
        layer = replace(self, **left)
        layer.__dict__["numbers"] = self.numbers.of(layer)
        return layer


class Numbers:
    """A layer's tensors as float64 vectors of `channels` values, read when first asked for and then kept."""

    def __init__(self, layer: NormLayer) -> None:
        self._layer = layer
        self._count = next(iter(layer.lengths.values()), layer.channels)

    @cached_property
    def mean(self) -> Vector | None:
        """running_mean, or None."""
        return as_vector(self._layer.running_mean)

    @cached_property
    def var(self) -> Vector | None:
        """running_var, or None."""
        return as_vector(self._layer.running_var)

    @cached_property
    def gain(self) -> Vector:
        """What the layer multiplies by: weight, 1 + weight for a zero-centred layer, ones without a weight."""
        weight = as_vector(self._layer.weight)
        if weight is None:
            return np.ones(self._count)
        return weight + 1.0 if self._layer.zero_centred else weight

    @cached_property
    def shift(self) -> Vector:
        """What the layer adds: bias, or zeros."""
        bias = as_vector(self._layer.bias)
        return np.zeros(self._count) if bias is None else bias

    @cached_property
    def updates(self) -> float | None:
        """num_batches_tracked as a number (a fraction only where the file stores one), or None."""
        vector = as_vector(self._layer.num_batches_tracked)
        return None if vector is None or vector.size != 1 or not np.isfinite(vector[0]) else float(vector[0])

    @cached_property
    def live(self) -> Mask:
        """Channels that carry signal: finite, and running_var above 1e-4 of the layer's median.

        Without a running_var every channel counts as live."""
        if self.var is None:
            return np.ones(self._count, dtype=bool)
        finite = np.isfinite(self.var) & (self.var > 0)
        if not finite.any():
            return finite
        # Where most channels are dead (34 of 64 in a published face network) they must not be the yardstick.
        moving = self.var[finite & (self.var > DEAD_SHARE_OF_LARGEST * self.var[finite].max())]
        return finite & (self.var > LIVE_SHARE_OF_MEDIAN * median(moving))

    def of(self, layer: NormLayer) -> Numbers:
        """The same numbers as those of `layer`, a copy of the layer that they were read from."""
        numbers = Numbers(layer)
        numbers.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "_layer"}
        return numbers

    def load(self) -> None:
        """Read everything now, so that the values outlive the open file."""
        _ = self.mean, self.var, self.gain, self.shift, self.updates

    def scale(self, eps: float) -> Vector:
        """s = gamma / sqrt(running_var + eps): the factor an eval-mode BatchNorm applies to its input.

        NaN where running_var + eps is negative. (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167)"""
        if self.var is None:
            return self.gain
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.asarray(self.gain / np.sqrt(self.var + eps), dtype=np.float64)

    @cached_property
    def default_statistics(self) -> bool:
        """running_mean is exactly 0 and running_var exactly 1 everywhere: the values a layer is created with."""
        if self.mean is None or self.var is None:
            return False
        return bool((self.mean == 0).all() and (self.var == 1).all())


def median(values: Vector) -> float:
    """The middle value; 0 of nothing.

    np.median costs several times as much on vectors this short, and imports numpy.ma on its first call."""
    size = values.size
    if size == 0:
        return 0.0
    middle = size // 2
    if size % 2:
        return float(np.partition(values, middle)[middle])
    lower, upper = np.partition(values, (middle - 1, middle))[middle - 1 : middle + 1]
    return (float(lower) + float(upper)) / 2


def as_vector(ref: ArrayRef | None) -> Vector | None:
    """The values of `ref` as one flat float64 vector; None stays None."""
    if ref is None:
        return None
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN like any other here
        return np.asarray(ref.numpy(), dtype=np.float64).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class NearMiss:
    """A tensor that looked like a norm's and was not taken for one, with the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """The norm layers of one state_dict, module or graph; a file may hold several (weights and their EMA)."""

    key: str | None
    """Where in the file it was found (state_dict_ema), None where the file holds one model."""
    layers: tuple[NormLayer, ...]
    near_misses: tuple[NearMiss, ...] = ()
    averaged: str | None = None
    """What in the file says that these weights are an average of several (n_averaged = 12, an EMA key)."""
    measurement: Measurement | None = None
    """What was seen of it on calibration data, where there is any."""

    @cached_property
    def untrained(self) -> bool:
        """Every norm layer still holds what it was created with: mean 0, var 1, gain 0 or 1, shift 0.

        Not where a counter says that batches went through: then something kept the layers from learning."""
        stored = [layer for layer in self.layers if layer.weight is not None or layer.running_var is not None]
        return bool(stored) and all(map(_as_created, stored))


def _as_created(layer: NormLayer) -> bool:
    numbers = layer.numbers
    if layer.running_var is not None and not numbers.default_statistics:
        return False
    if numbers.updates:
        return False
    gain = numbers.gain
    return bool(((gain == 0) | (gain == 1)).all() and (numbers.shift == 0).all())


class Danger(Enum):
    """How much a call that torch.load would make deserves attention."""

    MODULE_CLASS = 1
    DATA_CLASS = 2
    OTHER = 3


@dataclass(frozen=True)
class LoadCall:
    """Something that loading the file with torch would call, outside torch's own rebuild functions."""

    name: str
    danger: Danger


class Container(Enum):
    """How a file keeps its bytes: what decides how it can be written back."""

    ZIP = "zip"
    LEGACY = "legacy"
    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    FOLDER = "folder"
    MEMORY = "memory"


@dataclass(frozen=True)
class Reference:
    """A tensor of the file and one name under which it is stored; an empty name for training state."""

    name: str
    array: ArrayRef


@dataclass(kw_only=True)
class Checkpoint:
    """One model file (or live module), open for reading. A context manager: closing it closes the file."""

    path: str
    format: str
    """In words: PyTorch state_dict (zip), ONNX opset 17, ..."""
    container: Container
    models: tuple[Model, ...]
    notes: tuple[str, ...] = ()
    list_references: Callable[[], tuple[Reference, ...]] = field(default=lambda: (), repr=False)
    """Every tensor under every name it has, norm or not: tells whose memory a change would touch."""
    graphs: Mapping[str | None, Callable[[], object]] = field(default_factory=dict, repr=False)
    """Key of a model → what builds its `flow.graph.Graph`, of what was read already and no weights, with the layers of
    the model in its norms. Empty where the file has no graph; raises InputError for one that makes no sense."""
    comparison: Comparison | None = None
    """How its norms differ from those of another model, where there is one to compare with."""
    load_calls: tuple[LoadCall, ...] = ()
    loader: str = "torch.load(weights_only=False)"
    """The call of torch's that would make them."""
    bytes_total: int | None = None
    count_bytes_read: Callable[[], int] = field(default=lambda: 0, repr=False)
    on_close: Callable[[], None] = field(default=lambda: None, repr=False)

    @property
    def bytes_read(self) -> int:
        """So far; what was read twice (a small file, a directory of records) does not make more than the whole."""
        read = self.count_bytes_read()
        return read if self.bytes_total is None else min(read, self.bytes_total)

    @property
    def layers(self) -> tuple[NormLayer, ...]:
        """All norm layers of all models in the file, in file order."""
        return tuple(layer for model in self.models for layer in model.layers)

    def close(self) -> None:
        self.on_close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
