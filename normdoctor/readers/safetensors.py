"""safetensors files: the JSON header, and then only the byte ranges of the tensors somebody asks for.

Layout: 8 bytes little-endian header length, the header {name: {dtype, shape, data_offsets}}, the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from normdoctor.errors import InputError
from normdoctor.layers import Checkpoint, Container, Reference
from normdoctor.readers.arrays import FileStorage, Source, StoredArray
from normdoctor.readers.naming import read_names, why_no_norms

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}

MAX_HEADER = 100_000_000
"""The limit of the reference implementation."""


def is_safetensors(source: Source) -> bool:
    """Whether the file begins with a plausible header length and a JSON object."""
    if source.size < 10:
        return False
    head = source.read_at(0, 9)
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER


def read(source: Source) -> Checkpoint:
    """The checkpoint in a safetensors file."""
    length = int.from_bytes(source.read_at(0, 8), "little")
    if 8 + length > source.size:
        raise _damaged(source, f"its header claims {length:,} bytes, more than the file has")
    header = _header(source, source.read_at(8, length))
    header.pop("__metadata__", None)
    arrays = {name: _array(source, name, entry, 8 + length) for name, entry in header.items()}
    _check_apart(source, header)
    tensors = {name: array for name, array in arrays.items() if array is not None}
    model = read_names(tensors)
    why = None if model.layers else why_no_norms(tensors)
    return Checkpoint(
        path=str(source.path),
        format="safetensors state_dict",
        container=Container.SAFETENSORS,
        models=(model,),
        notes=(f"no norm layers: {why}",) if why else (),
        list_references=lambda: tuple(Reference(name, array) for name, array in tensors.items()),
        bytes_total=source.size,
        count_bytes_read=lambda: source.bytes_read,
        on_close=source.close,
    )


def _header(source: Source, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(source, "its header is not a JSON object")
    return header


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers disagree on which of two equal names counts, so there must be none."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _array(source: Source, name: str, entry: Any, start: int) -> StoredArray | None:
    """The tensor of one header entry, None for an element type of no interest here (4-bit floats)."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (begin, end, *shape)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) > 64 or not isinstance(dtype, str):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise _damaged(source, f"the entry of {name} is malformed") from None
    if begin > end or start + end > source.size:
        raise _damaged(source, f"{name} lies beyond the end of the file")
    if dtype not in DTYPES:
        return None
    array = StoredArray(FileStorage(name, source, start + begin, end - begin), DTYPES[dtype], tuple(shape))
    if array.nbytes != end - begin:
        raise _damaged(source, f"{name} has {end - begin:,} bytes for the shape {shape} of {dtype}")
    return array


def _check_apart(source: Source, header: dict[str, Any]) -> None:
    """The format allows no overlap; a change to one tensor would change the other."""
    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    filled = [span for span in spans if span[0] < span[1]]
    for (_, end, first), (begin, _, second) in pairwise(filled):
        if begin < end:
            raise _damaged(source, f"{first} and {second} overlap")


def _damaged(source: Source, how: str) -> InputError:
    return InputError(
        f"{source.path}: {how}",
        "The safetensors file is truncated or damaged; copy or download it again.",
    )
