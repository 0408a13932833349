"""Inert pickle records → tensors that know where their bytes are. Only torch's own rebuild functions count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from normdoctor.errors import InputError
from normdoctor.layers import ArrayRef
from normdoctor.readers.arrays import ITEM_SIZES, Storage, StoredArray
from normdoctor.readers.pickle_records import Call, Global, PersistentId

STORAGE_TYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
"""torch's storage classes → element types. UntypedStorage counts bytes; its tensors name their own type."""


@dataclass(frozen=True)
class StorageKey:
    """What a persistent id says: which storage, of which element type, how many elements."""

    key: str
    dtype: str
    elements: int
    view_offset: int = 0
    """Legacy files only: a storage that is a view of another one starts at this element of it."""

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Tensor:
    """A tensor found in a pickle, with what its Parameter says of it."""

    array: ArrayRef
    requires_grad: bool | None = None


def storage_key(record: object) -> StorageKey | None:
    """The storage a persistent id names, None where it is not one of torch's."""
    if not isinstance(record, PersistentId) or not isinstance(record.value, tuple):
        return None
    value = record.value
    if len(value) < 5 or value[0] != "storage" or not isinstance(value[1], Global):
        return None
    storage_type, key, elements = value[1], value[2], value[4]
    dtype = STORAGE_TYPES.get(storage_type.name)
    if dtype is None or not storage_type.module.startswith("torch") or not isinstance(key, str):
        return None
    view = value[5] if len(value) > 5 else None
    offset = view[1] if isinstance(view, tuple) and len(view) == 3 else 0
    if not _is_int64(elements) or not _is_int64(offset) or min(elements, offset) < 0:
        return None
    return StorageKey(key, dtype, elements, offset)


class TensorReader:
    """Turns records into tensors. `storage_of` gives the bytes behind a storage, or raises InputError."""

    def __init__(self, storage_of: Callable[[StorageKey], Storage], big_endian: bool) -> None:
        self._storage_of = storage_of
        self._big_endian = big_endian
        self._known: dict[int, Tensor | None] = {}

    def tensor(self, record: object) -> Tensor | None:
        """The tensor that `record` would become, None for anything else.

        Raises InputError where it is one but its shape does not fit its storage."""
        if isinstance(record, Tensor):
            return record
        if not isinstance(record, Call) or not isinstance(record.function, Global):
            return None
        if id(record) not in self._known:
            self._known[id(record)] = self._rebuild(record)
        return self._known[id(record)]

    def _rebuild(self, call: Call) -> Tensor | None:
        name, args = call.function.full_name, call.args
        for _ in range(4):  # a Parameter of a subclass of a Tensor; deeper is not torch's doing
            if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
                inner = self.tensor(args[0]) if args else None
                grad = args[1] if len(args) > 1 and isinstance(args[1], bool) else None
                return None if inner is None else Tensor(inner.array, grad)
            if name == "torch._tensor._rebuild_from_type_v2" and len(args) > 2 and isinstance(args[0], Global):
                name, args = args[0].full_name, args[2] if isinstance(args[2], tuple) else ()
                continue
            break
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return self._strided(args, None)
        if name == "torch._utils._rebuild_tensor_v3" and len(args) > 6 and isinstance(args[6], Global):
            return self._strided(args, args[6].name)
        return None

    def _strided(self, args: tuple[Any, ...], dtype: str | None) -> Tensor | None:
        key = storage_key(args[0]) if len(args) >= 4 else None
        if key is None:
            return None
        offset, shape, strides = args[1], sizes_in(args[2]), sizes_in(args[3])
        if not _is_int64(offset) or shape is None or strides is None:
            raise InputError(f"a tensor in storage {key.key} has no sensible shape", "The file is damaged or hostile.")
        dtype = key.dtype if dtype is None else dtype
        if dtype not in ITEM_SIZES:
            return None
        array = StoredArray(
            storage=self._storage_of(key),
            dtype=dtype,
            shape=shape,
            offset=offset + key.view_offset,
            strides=strides,
            big_endian=self._big_endian,
        )
        return Tensor(array)


def sizes_in(record: object) -> tuple[int, ...] | None:
    """The numbers of a torch.Size, a tuple or a list; None for anything else."""
    if isinstance(record, Call):  # torch.Size(...)
        record = record.args[0] if record.args else None
    if not isinstance(record, (tuple, list)) or len(record) > 64 or not all(map(_is_int64, record)):
        return None
    return tuple(record)


def _is_int64(value: object) -> bool:
    """Beyond 64 bits a product of sizes takes seconds, and Python refuses to print one."""
    return type(value) is int and -(2**63) <= value < 2**63
