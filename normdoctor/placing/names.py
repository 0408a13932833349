"""What feeds a BatchNorm, guessed from the names and shapes in a file without a graph.

Names say what was written together, not what the data goes through: a net of convolution, ReLU and norm has the same
names as one without the ReLU. So only the convolution that a name belongs to is named, and no finding above info may
rest on it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from normdoctor.errors import InputError
from normdoctor.layers import ArrayRef, Checkpoint, Container, NormKind, NormLayer, Vector, as_vector, rows
from normdoctor.places import Neighbour, Place, Producer

NAMED = re.compile(r"(?:bn|norm|batch_?norm)(_?\d{0,6})")
"""bn1 belongs to conv1, batch_norm to conv."""

NUMBERED = re.compile(r"0|[1-9]\d{0,6}")
"""Children of a Sequential."""

CHUNK = 1 << 24
"""Bytes of a weight that are held at a time."""


@dataclass(eq=False)
class _Names:
    """The tensors of a file by the modules that hold them, in file order."""

    leaves: dict[str, dict[str, ArrayRef]] = field(default_factory=lambda: defaultdict(dict))
    uses: Counter[Hashable] = field(default_factory=Counter)
    """Under how many names each tensor is stored."""
    owners: dict[Hashable, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    """Module → the one that stands before it."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Names:
        names = cls()
        listed = [reference for reference in checkpoint.list_references() if reference.name]
        for reference in listed:
            path, _, leaf = reference.name.rpartition(".")
            identity = reference.array.identity
            names.leaves[path][leaf] = reference.array
            names.uses[identity] += 1
            names.owners[identity] = path
        order = list(names.leaves)
        names.before = dict(zip(order[1:], order, strict=False))
        return names


def places_by_names(checkpoint: Checkpoint, *, largest: bool = False) -> dict[str, Place]:
    """The places of the BatchNorms whose names leave no doubt about what belongs to them, by layer.

    largest: read the weights for the largest of each channel."""
    norms = [layer for layer in checkpoint.layers if layer.kind is NormKind.BATCH and not layer.aliases]
    if not norms or checkpoint.container is Container.FOLDER:  # whose other files need not be there
        return {}
    names = _Names.of(checkpoint)
    found = {layer: path for layer in norms if (path := _belongs_to(layer, names)) is not None}
    taken = Counter(found.values())
    places = {
        layer.name: _place(path, names.leaves[path], largest=largest)
        for layer, path in found.items()
        if taken[path] == 1
    }
    return {name: place for name, place in places.items() if place is not None}


def _belongs_to(layer: NormLayer, names: _Names) -> str | None:
    """The module of the convolution or linear layer that belongs to a norm."""
    tensor = layer.running_mean or layer.weight
    if tensor is None or names.uses[tensor.identity] != 1:
        return None
    own = names.owners[tensor.identity]
    last = re.split("[.:]", own)[-1]  # behind a colon where the model has a key and its norm no parent
    parent = own.removesuffix(last)
    named = NAMED.fullmatch(last)
    if NUMBERED.fullmatch(last) and last != "0":
        path = f"{parent}{int(last) - 1}"
    elif named is not None and _is_in_order(names.leaves[own]):
        path = f"{parent}conv{named[1]}"
        if names.before.get(own) != path:  # pre-activation: bn2 stands before conv2, and conv1 feeds it
            return None
    else:
        return None
    return path if path in names.leaves and _fits(names.leaves[path], layer.channels, names) else None


def _is_in_order(leaves: dict[str, ArrayRef]) -> bool:
    """Whether the tensors of a norm stand as its code has them, and not by the alphabet, which knows no data flow."""
    places = {leaf: place for place, leaf in enumerate(leaves)}
    return "weight" in places and "bias" in places and places["weight"] < places["bias"]


def _fits(leaves: dict[str, ArrayRef], channels: int, names: _Names) -> bool:
    """Whether a module has a weight with so many outputs, and nothing beside it but their bias."""
    weight, bias = leaves.get("weight"), leaves.get("bias")
    if weight is None or not leaves.keys() <= {"weight", "bias"}:
        return False
    if any(names.uses[ref.identity] != 1 or "float" not in ref.dtype for ref in leaves.values()):
        return False
    shape = weight.shape
    return 2 <= len(shape) <= 5 and shape[0] == channels and (bias is None or bias.shape == (channels,))


def _place(path: str, leaves: dict[str, ArrayRef], *, largest: bool) -> Place | None:
    """None where the file is damaged in these tensors."""
    weight = leaves["weight"]
    op = "matrix product" if len(weight.shape) == 2 else "convolution"
    # A transposed convolution in a Sequential has its outputs on the second axis: told apart where both differ.
    known = "conv" in path.rpartition(".")[2] or len(weight.shape) == 2 or weight.shape[0] != weight.shape[1]
    try:
        producer = Producer(
            neighbour=Neighbour(op=op, label=path),
            alone=True,
            bias=as_vector(leaves.get("bias")),
            largest=_largest(weight) if largest and known else None,
        )
    except InputError:
        return None
    return Place(producer=producer, before=(producer.neighbour,), inferred=True)


def _largest(weight: ArrayRef) -> Vector | None:
    """Largest |weight| of each output."""
    if not weight.nbytes:
        return None
    parts = (np.abs(part).reshape(len(part), -1).max(axis=1) for _, part in rows(weight, CHUNK))
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN like any other here
        return np.concatenate(list(parts)).astype(np.float64)
