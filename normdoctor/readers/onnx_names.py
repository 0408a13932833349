"""What an ONNX layer is called: its module's path as the user wrote it, as far as exporters let it through."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEAF = re.compile(
    r"(?:^|[./:_@-])(?:(?:running_|moving_|batch_|_)?(?:mean|variance|var)|gamma|beta|weight|bias|scale|offset|"
    r"shift|alpha|w|b|g|s(?=_)|rm(?=_)|riv(?=_))(?:_\d+)?$",
    re.IGNORECASE,
)
"""The last part of a parameter's name, with the separator before it: torch, Keras, Paddle, Caffe2, MXNet."""

TAIL = re.compile(
    r"(?::\d+|/read|_(?:de)?quantized|(?:/FusedBatchNorm(?:V\d)?(?:_\d+)?|/batchnorm(?:_\d+)?(?:/(?:mul|add|sub)"
    r"(?:_\d+)?)?)?/ReadVariableOp(?:_\d+)?)$"
)
"""What TensorFlow and quantizers append to a name."""

NAMELESS = re.compile(
    r"^_*$|^[\d_.]+$|^(?:onnx|p2o|pd)[:.]|_output_\d+$|\.tmp_\d+$|constfold|const_fold|const_opt|"
    r"^_*(?:val|v|t|tensor|tmp|const(?:ant)?|ident(?:ity)?|initializer|param|node|output|cast|reshape|transpose|"
    r"getitem|unnamed|attr|lifted_tensor|fill|expand|ones|zeros|cst|add|sub|mul|div|neg|sqrt|rsqrt|pow|reciprocal|"
    r"(?:un)?squeeze|view|permute|clone|type_as|to_copy|scalar_tensor(?:_default)?)(?:[_.:]*\d+)*$",
    re.IGNORECASE,
)
"""Names that exporters number off. They say nothing about the module a tensor belongs to."""

SEPARATORS = "./:_"

QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'")


def is_helpful(name: str) -> bool:
    """A person (or a module path) gave this name.

    >>> is_helpful("layer1.0.bn1.weight"), is_helpful("onnx::BatchNormalization_123")
    (True, False)
    """
    return NAMELESS.search(name) is None


def clean(name: str) -> str:
    """`name` without what TensorFlow and quantizers append.

    >>> clean("model/conv1_bn/gamma:0"), clean("m/bn/FusedBatchNormV3/ReadVariableOp_1:0")
    ('model/conv1_bn/gamma', 'm/bn')
    """
    while (shorter := TAIL.sub("", name)) != name:
        name = shorter
    return name


def parent(name: str) -> str | None:
    """The name without its leaf, None where it has none that is known.

    >>> parent("layer1.bn1.running_var"), parent("batch_norm_0.w_1"), parent("gpu_0/bn_riv_0"), parent("stem.7")
    ('layer1.bn1', 'batch_norm_0', 'gpu_0/bn', None)
    """
    cut = LEAF.sub("", name)
    return cut if cut != name and cut else None


def common_prefix(names: Sequence[str]) -> str | None:
    """What all names begin with, up to a separator; None where only numbers tell them apart."""
    if len(set(names)) < 2:
        return None
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = max((first.rfind(mark, 0, length) for mark in SEPARATORS), default=-1)
    if length <= 0 or all(name[length + 1 :].isdigit() for name in names):
        return None
    return first[:length]


def module_path(name_scopes: str | None) -> str | None:
    """The module that an operation came from, out of the list that torch's exporter keeps with a node.

    >>> module_path("['', 'layer1', 'layer1.bn', 'batch_norm']")
    'layer1.bn'
    """
    parts = QUOTED.findall(name_scopes or "")
    return parts[-2] or None if len(parts) > 1 else None


@dataclass(frozen=True)
class Evidence:
    """All that a layer could be called after."""

    parameters: tuple[str, ...]
    """One name for each parameter: the first on its way to the initializer that is helpful."""
    module: str | None
    """The module path that torch's exporter left in the node's metadata."""
    node: str
    output: str

    @property
    def parents(self) -> list[str | None]:
        return [parent(clean(name)) or (clean(name) if "ReadVariableOp" in name else None) for name in self.parameters]

    @property
    def prefix(self) -> str | None:
        """The common prefix of the parameters' names, None where they disagree."""
        parents = set(self.parents)
        if None in parents:
            return common_prefix([clean(name) for name in self.parameters])
        return parents.pop() if len(parents) == 1 else None


def choose_names(layers: Sequence[Evidence]) -> list[str]:
    """A name for every layer, all different.

    The common prefix of the parameter names. Exporters merge equal initializers, so a prefix may belong to
    another layer: then the module path kept with the node, else a prefix that no other layer has, else the
    name of the node, else of its output."""
    owners = {layer.prefix for layer in layers if layer.prefix and layer.module in (None, layer.prefix)}
    return _unique(_choose(layer, owners) for layer in layers)


def _choose(layer: Evidence, owners: set[str]) -> str:
    prefix = layer.prefix
    if prefix and (layer.module in (None, prefix) or prefix not in owners):
        return prefix
    if layer.module:
        return layer.module
    free = Counter(name for name in layer.parents if name and name not in owners)
    if free:
        return free.most_common(1)[0][0]
    return layer.node or layer.output or "unnamed"


def _unique(names: Iterable[str]) -> list[str]:
    """Later ones of equal names get #2, #3, ..."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        unique = name
        while seen[unique]:
            seen[name] += 1
            unique = f"{name}#{seen[name]}"
        seen[unique] = 1
        result.append(unique)
    return result
