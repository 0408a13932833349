"""Flat parameter names → norm layers. What counts as a norm is decided here, for every format with names.

A group is the tensors that share a parent (layer1.0.bn1.*). Names of tensors and shapes decide; the parent's
own name is asked only where shapes cannot tell (a lone 1-D weight is a PReLU as easily as an RMSNorm).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np

from normdoctor.layers import ArrayRef, DetachedArray, Model, NearMiss, NormKind, NormLayer, as_vector
from normdoctor.readers.arrays import FLOAT_TYPES, MAX_ELEMENTS
from normdoctor.readers.finishing import Budget, finish

T = TypeVar("T")

WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_module",
    }
)
"""Path components that DataParallel, torch.compile, FSDP, activation checkpointing and their like insert."""

FLAT_PARAMETER = re.compile(r"(^|[._])_?flat_param(_\d+)?$")

ROLES = {
    "weight": ("weight", "gamma", "scale", "g"),
    "bias": ("bias", "beta", "b"),
    "running_mean": ("running_mean", "moving_mean", "_mean", "mean"),
    "running_var": ("running_var", "moving_variance", "moving_var", "_variance", "variance", "var"),
    "num_batches_tracked": ("num_batches_tracked",),
    "alpha": ("alpha",),
}
"""NormLayer field → the leaf names it goes by: torch, Keras, Paddle, Flax and older conventions."""

# Words of a module's own name: norm1, q_norm, ln_f, input_layernorm, LayerNorm. Not "normalizer".
BATCH_WORDS = frozenset({"bn", "batchnorm", "syncbn", "syncbatchnorm"})
LAYER_WORDS = frozenset({"ln", "layernorm"})
GROUP_WORDS = frozenset({"gn", "groupnorm"})
INSTANCE_WORDS = frozenset({"inorm", "instancenorm"})
RMS_WORDS = frozenset({"rms", "rmsnorm"})
NORM_WORDS = BATCH_WORDS | LAYER_WORDS | GROUP_WORDS | INSTANCE_WORDS | RMS_WORDS
TWO_WORDS = re.compile(r"(batch|layer|group|instance|rms|sync|weight|spectral)_(norm|bn)")

FALSE_FRIENDS = re.compile(
    r"^(grn|prelu|act|relu|affine|scale|ls|layerscale|gate|gates|embed|embedding|embeddings|weightnorm|"
    r"spectralnorm)$"
)

AVERAGE_COUNTER = "n_averaged"
"""Where torch.optim.swa_utils.AveragedModel counts."""

EVO_OR_FRN_MEMBERS = {"v": NormKind.EVO, "tau": NormKind.FILTER_RESPONSE}
INNER_SHIFT_NAMES = ("shift", "s")
DYNAMIC_TANH_EXTRAS = frozenset(INNER_SHIFT_NAMES)


def wrappers_in(name: str) -> tuple[str, ...]:
    """The path components of `name` that wrappers insert, each once.

    >>> wrappers_in("module._orig_mod.layer1.bn1")
    ('module', '_orig_mod')
    """
    return tuple(dict.fromkeys(part for part in name.split(".") if part in WRAPPERS))


def strip_wrappers(name: str) -> str:
    """`name` without the path components that wrappers insert.

    >>> strip_wrappers("module._orig_mod.layer1._fsdp_wrapped_module.bn1")
    'layer1.bn1'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(kw_only=True)
class Group:
    """The tensors of one parent, sorted by role, and what their shapes say."""

    parent: str
    roles: dict[str, ArrayRef] = field(default_factory=dict)
    others: dict[str, ArrayRef] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Role → the leaf name it goes by."""

    @property
    def own_name(self) -> str:
        """The last part of the path that is a word: norm in blocks.0.norm, bn in bn.0."""
        parts = [part for part in self.parent.split(".") if not part.isdigit() and part not in WRAPPERS]
        return parts[-1] if parts else ""

    @cached_property
    def words(self) -> frozenset[str]:
        """The words of the own name: {q, norm}, {ln, f}, {layernorm} for layer_norm."""
        joined = TWO_WORDS.sub(r"\1\2", self.own_name.lower())
        return frozenset(re.findall("[a-z]+", joined))

    @property
    def named_like_norm(self) -> bool:
        return any(
            (word in NORM_WORDS or word.endswith("norm")) and not FALSE_FRIENDS.match(word) for word in self.words
        )

    @property
    def false_friend(self) -> bool:
        """Named like something else that holds vectors, and not like a norm of it (word_embeddings_layernorm)."""
        return not self.named_like_norm and any(FALSE_FRIENDS.match(word) for word in self.words)

    @property
    def patterns(self) -> tuple[str, str]:
        """The path with the numbers in it written #: equal for the same place in repeated blocks; and the same
        with the last word as well, where that is a number. norm1 and norm2 stay apart: a block may mix kinds."""
        above, _, last = strip_wrappers(self.parent).rpartition(".")
        above = re.sub(r"\d+", "#", above)
        return f"{above}.{last}", f"{above}.{'#' if last.isdigit() else last}"


@dataclass(frozen=True)
class Recognised:
    """A norm: its kind, its channels and its tensors by NormLayer field."""

    kind: NormKind
    channels: int
    tensors: Mapping[str, ArrayRef]


def group_of(parent: str, tensors: Mapping[str, ArrayRef]) -> Group:
    """Sort the tensors of one parent by role. Leaf names as stored; the first name of a role wins."""
    group = Group(parent=parent)
    for role, names in ROLES.items():
        for name in names:
            if name in tensors:
                group.roles[role] = tensors[name]
                group.names[role] = name
                break
    statistics = group.roles.keys() & {"running_mean", "running_var"}
    if len(statistics) == 1 and not any(name.startswith(("running_", "moving_")) for name in tensors):
        del group.roles[statistics.pop()]  # "mean" alone is as often an input normaliser's (mean and std)
    taken = {id(tensor) for tensor in group.roles.values()}
    group.others = {name: tensor for name, tensor in tensors.items() if id(tensor) not in taken}
    return group


def recognise(group: Group) -> Recognised | str | None:
    """The norm that `group` is, or why it is not one although it looked like it, or None for anything else."""
    roles, others = group.roles, group.others
    vectors = {role: tensor for role, tensor in roles.items() if _is_vector(tensor)}
    var, mean = vectors.get("running_var"), vectors.get("running_mean")
    if var is not None or mean is not None:
        return _with_statistics(group, vectors)
    weight, bias = vectors.get("weight"), vectors.get("bias")
    if weight is None:
        return _many_dimensional(group)
    if group.false_friend:
        return f"the name {group.own_name} is not a norm's"
    found: Recognised | None = None
    alpha = roles.get("alpha")
    if alpha is not None:
        if size_of(alpha) == 1 and set(others) <= DYNAMIC_TANH_EXTRAS:
            tensors = {**vectors, "alpha": alpha, **inner_shift(group)}
            found = Recognised(NormKind.DYNAMIC_TANH, size_of(weight), tensors)
        elif bias is None or set(others) - EVO_OR_FRN_MEMBERS.keys():
            return "alpha is not the scalar of a DynamicTanh"
    elif others:
        kinds = {EVO_OR_FRN_MEMBERS.get(name) for name in others if name not in ("eps", "eps_l")}
        kind = next(iter(kinds)) if len(kinds) == 1 else None
        if kind is None and group.named_like_norm and all(size_of(tensor) == 1 for tensor in others.values()):
            # A quantised norm has its scale and zero point beside it, an eps may be a buffer.
            kind = _kind_by_name(group, NormKind.LAYER_OR_RMS if bias is None else NormKind.LAYER_OR_GROUP)
        if kind is None:
            return None if any(len(tensor.shape) > 1 for tensor in others.values()) else "other tensors beside it"
        found = Recognised(kind, size_of(weight), vectors)
    elif bias is not None:
        if size_of(bias) != size_of(weight) and not group.named_like_norm:
            return "weight and bias differ in length"
        if size_of(weight) == 1 and not group.named_like_norm:
            return "a single channel and no norm's name"
        found = Recognised(_kind_by_name(group, NormKind.LAYER_OR_GROUP), size_of(weight), vectors)
    elif "bias" in roles:
        return None
    elif group.named_like_norm:
        found = Recognised(_kind_by_name(group, NormKind.LAYER_OR_RMS), size_of(weight), vectors)
    else:
        return "a lone vector without a norm's name (PReLU, LayerScale, gate)"
    return found


def inner_shift(group: Group) -> dict[str, ArrayRef]:
    """The scalar inside Derf by its NormLayer field; nothing where there is none."""
    found = next((group.others[name] for name in INNER_SHIFT_NAMES if name in group.others), None)
    return {"inner_shift": found} if found is not None and is_counter(found) else {}


def stored_names(group: Group, fields: Iterable[str]) -> dict[str, str]:
    """Which of the NormLayer fields have another name than torch's in the file, and which."""
    return {role: group.names[role] for role in fields if group.names.get(role, role) != role}


def _with_statistics(group: Group, vectors: Mapping[str, ArrayRef]) -> Recognised | str:
    if "count" in group.others and "weight" not in vectors:
        return "a running normaliser of observations (mean, var, count), not a layer"
    channels = next(size_of(vectors[role]) for role in ("running_var", "running_mean") if role in vectors)
    tensors: dict[str, ArrayRef] = dict(vectors)
    counter = group.roles.get("num_batches_tracked")
    if counter is not None and is_counter(counter):
        tensors["num_batches_tracked"] = counter
    kind = NormKind.BATCH
    if "v" in group.others:
        kind = NormKind.EVO
    elif group.words & INSTANCE_WORDS:
        kind = NormKind.INSTANCE
    return Recognised(kind, channels, tensors)


def _many_dimensional(group: Group) -> Recognised | str | None:
    """LayerNorm over several axes keeps its affine in their shape: [1, 264]. A convolution's bias never does.

    Norms of channels that come first keep a gain of shape [1, C, 1, 1], and call it g or gamma."""
    weight, bias = group.roles.get("weight"), group.roles.get("bias")
    if weight is None or not _plausible(weight) or group.others:
        return None
    if bias is not None and bias.shape == weight.shape and len(weight.shape) > 1:
        if not group.named_like_norm:
            return "weight and bias of one shape, but no norm's name"
        return Recognised(NormKind.LAYER, size_of(weight), {"weight": weight, "bias": bias})
    one_axis = len(weight.shape) > 1 and max(weight.shape) == size_of(weight)
    if bias is None and one_axis and group.names["weight"] in ("g", "gamma") and group.named_like_norm:
        return Recognised(_kind_by_name(group, NormKind.LAYER_OR_RMS), size_of(weight), {"weight": weight})
    return None


def _kind_by_name(group: Group, otherwise: NormKind) -> NormKind:
    kinds = {
        NormKind.BATCH: BATCH_WORDS,
        NormKind.INSTANCE: INSTANCE_WORDS,
        NormKind.GROUP: GROUP_WORDS,
        NormKind.RMS: RMS_WORDS,
    }
    if otherwise is NormKind.LAYER_OR_GROUP:
        kinds[NormKind.LAYER] = LAYER_WORDS  # a gain alone under this name is as often an RMSNorm (LLaMA)
    return next((kind for kind, words in kinds.items() if group.words & words), otherwise)


def size_of(tensor: ArrayRef) -> int:
    return int(np.prod(tensor.shape, dtype=object)) if tensor.shape else 1


def is_counter(tensor: ArrayRef) -> bool:
    """One number, whole or (averaged, or cast with the rest of the model) not."""
    return size_of(tensor) == 1 and not tensor.dtype.startswith("complex")


def _plausible(tensor: ArrayRef) -> bool:
    return tensor.dtype in FLOAT_TYPES and 0 < size_of(tensor) <= MAX_ELEMENTS


def _is_vector(tensor: ArrayRef) -> bool:
    return len(tensor.shape) == 1 and _plausible(tensor)


def read_names(tensors: Mapping[str, ArrayRef], key: str | None = None, budget: Budget | None = None) -> Model:
    """The norm layers among the tensors of one flat state_dict, in its order.

    key: where in the file the state_dict was found, if the file holds several."""
    sorted_groups = [group_of(parent, leaves) for parent, leaves in by_parent(tensors).items()]
    outcomes = [(group, recognise(group)) for group in sorted_groups]
    layers, misses = [], []
    batch_places = _batch_places(outcomes)
    for group, outcome in outcomes:
        if isinstance(outcome, Recognised):
            kind = outcome.kind
            if kind is NormKind.LAYER_OR_GROUP and batch_places.intersection(group.patterns):
                kind = NormKind.BATCH
            layers.append(
                NormLayer(
                    name=group.parent,
                    path=strip_wrappers(group.parent),
                    kind=kind,
                    channels=outcome.channels,
                    stored_names=stored_names(group, outcome.tensors),
                    wrappers=wrappers_in(group.parent),
                    **cast(dict[str, Any], outcome.tensors),
                )
            )
        elif isinstance(outcome, str):
            shape = group.roles["weight"].shape if "weight" in group.roles else ()
            misses.append(NearMiss(name=group.parent, shape=shape, reason=outcome))
    return finish(key, layers, near_misses=misses, averaged=averaged(tensors), budget=budget)


def by_parent(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """The tensors of each parent by their leaf names."""
    parents: dict[str, dict[str, T]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        parents[parent][leaf] = tensor
    return parents


def possible_norms(names: Iterable[str]) -> set[str]:
    """The names that can belong to a norm layer, or say that a model is an average, whatever their shapes are."""
    possible: set[str] = set()
    known: dict[tuple[str, ...], bool] = {}
    for parent, leaves in by_parent({name: name for name in names}).items():
        kind = (Group(parent=parent).own_name, *leaves)  # a mixture of experts has 100,000 alike
        if kind not in known:
            group = group_of(parent, {leaf: _stand_in(leaf) for leaf in leaves})
            group.others = {leaf: _stand_in("alpha") for leaf in group.others}  # numbers are in no norm's way
            known[kind] = isinstance(recognise(group), Recognised)
        if known[kind]:
            possible.update(leaves.values())
        elif not parent and AVERAGE_COUNTER in leaves:
            possible.add(leaves[AVERAGE_COUNTER])
    return possible


def _stand_in(leaf: str) -> ArrayRef:
    """A tensor of the shape that a norm has under this name."""
    scalar = leaf in ROLES["alpha"] or leaf in ROLES["num_batches_tracked"]
    return DetachedArray(shape=() if scalar else (8,), dtype="float32", nbytes=0, identity=None)


def _batch_places(outcomes: Sequence[tuple[Group, Recognised | str | None]]) -> set[str]:
    """Patterns of paths at which a layer with weight and bias alone is a BatchNorm that lost its buffers.

    No fewer layers at the same place of other blocks have buffers (layer#.#.downsample.1), or by far the most
    layers of one long sequence (features.#): a GroupNorm in a short one must not be taken for it."""
    having: Counter[str] = Counter()
    without: Counter[str] = Counter()
    for group, outcome in outcomes:
        if isinstance(outcome, Recognised):
            if outcome.kind is NormKind.BATCH and "running_var" in outcome.tensors:
                having.update(set(group.patterns))
            elif outcome.kind is NormKind.LAYER_OR_GROUP:
                without.update(set(group.patterns))
    return {
        pattern
        for pattern, count in having.items()
        if "#" in pattern and count >= without[pattern] * (MOST if pattern.endswith("#") else 1)
    }


MOST = 4
"""This many times as many layers with buffers as without make the others lost BatchNorms."""


def why_no_norms(tensors: Mapping[str, ArrayRef]) -> str | None:
    """What the names and shapes say about a state_dict without norm layers, None where they say nothing.

    Folding a BatchNorm leaves its shift behind as a bias, which a convolution in front of a norm goes without."""
    parents = by_parent(tensors).values()
    convolutions = [leaves for leaves in parents if "weight" in leaves and len(leaves["weight"].shape) >= 3]
    if not convolutions:
        return None
    biased, total = sum("bias" in leaves for leaves in convolutions), len(convolutions)
    if 2 * biased >= total:
        return f"probably folded already, or never there: {biased} of {total} convolutions carry a bias"
    return f"{total - biased} of {total} convolutions have no bias, so nothing was folded into them"


def averaged(tensors: Mapping[str, ArrayRef]) -> str | None:
    """What the counter of torch's AveragedModel says, None where there is none or nothing was averaged yet."""
    counter = tensors.get(AVERAGE_COUNTER)
    if counter is None or not is_counter(counter):
        return None
    vector = as_vector(counter)
    assert vector is not None
    return f"n_averaged = {vector[0]:.0f}" if vector[0] > 1 else None
