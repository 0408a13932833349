"""All norms of an ONNX model as layers: found, told apart from their twins, named, and given their tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np

from normdoctor.layers import ArrayRef, NearMiss, NormKind, NormLayer
from normdoctor.readers.finishing import Budget
from normdoctor.readers.naming import strip_wrappers
from normdoctor.readers.onnx_affine import find_affine
from normdoctor.readers.onnx_arrays import filled, size
from normdoctor.readers.onnx_graph import ARITHMETIC, MAX_CHAIN, PASSING, RESHAPING, Place, Program, Step
from normdoctor.readers.onnx_names import Evidence, choose_names, is_helpful, module_path
from normdoctor.readers.onnx_operators import Found, operator_of, read_operator
from normdoctor.readers.onnx_patterns import absorb_scale, find_written_out, op, regroup

NAME_SCOPES = "pkg.torch.onnx.name_scopes"

ROOTS = ("Sqrt", "Pow")

SHAPE_KEEPING = frozenset(
    {
        "Relu",
        "LeakyRelu",
        "Sigmoid",
        "Tanh",
        "Gelu",
        "Erf",
        "Clip",
        "Dropout",
        "HardSwish",
        "Elu",
        "Add",
        "Mul",
    }
)


@dataclass(frozen=True, eq=False)
class Named:
    """A layer and where it stands in the graph."""

    layer: NormLayer
    found: Found


def find_norms(program: Program) -> tuple[list[Found], list[NearMiss]]:
    """Every norm in the order of its nodes, and what looked like one."""
    order = {(id(step.scope), id(step.node)): index for index, step in enumerate(program.steps)}
    claimed: set[tuple[int, int]] = set()
    norms: list[Found] = []
    misses: list[NearMiss] = []
    for step in program.steps:
        operator = operator_of(step.node)
        found, steps = None, [step]
        if operator is not None:
            found = read_operator(program, step, operator)
            if op(step) == "InstanceNormalization":
                steps += regroup(program, found)
            elif op(step) == "BatchNormalization":
                steps += absorb_scale(program, found)
        elif op(step) in ROOTS:
            written_out = find_written_out(program, step)
            if written_out is not None:
                found, steps = written_out
        if found is not None and (id(found.step.scope), id(found.step.node)) not in claimed:
            norms.append(found)
            claimed.update((id(step.scope), id(step.node)) for step in steps)
    # Scales and shifts last: those that belong to a norm above are taken then.
    for step in program.steps:
        affine = find_affine(program, step, claimed)
        if isinstance(affine, Found):
            norms.append(affine)
        elif affine is not None:
            misses.append(affine)
    norms.sort(key=lambda found: order[id(found.step.scope), id(found.step.node)])
    return norms, misses


def names_behind(program: Program, place: Place) -> Iterator[str]:
    """What a parameter is called on its way back to where it is stored; names that people give come first.

    The node's own input name leads, for exporters let several layers share one initializer through Identity.
    Results of Cast, Reshape and arithmetic are named by exporters and come last."""
    last: list[str] = []
    for _ in range(MAX_CHAIN):
        step = program.producer(place)
        name = op(step)
        if step is None or name in ("Identity", "Constant", "ConstantOfShape", ""):
            yield place.name
        else:
            last.append(place.name)
        if step is None:
            break
        before = None
        if name in PASSING | RESHAPING | {"DequantizeLinear"}:
            before = program.operand(step, 0)
        elif name in ARITHMETIC:
            constants = [(value, program.constant(value)) for value in program.operands(step)]
            before = next((value for value, ref in constants if ref is not None and size(ref) > 1), None)
        if before is None:
            break
        place = before
    yield from last


def own_name(program: Program, place: Place) -> str | None:
    return next(filter(is_helpful, names_behind(program, place)), None)


def _module(program: Program, step: Step) -> str | None:
    return module_path(program.document.metadata_value(step.node.metadata, NAME_SCOPES))


def join_twins(program: Program, norms: list[Found]) -> list[Found]:
    """One norm for all nodes that take the same parameters by the same names: a module called several times.

    Only where a person named them: exporters let equal constants of different modules share one tensor, and
    the module path that torch keeps with a node tells those apart too."""
    first: dict[Hashable, Found] = {}
    result = []
    for found in norms:
        parameters = tuple(sorted((role, _origin_key(place)) for role, place in found.parameters.items()))
        named = all(own_name(program, place) is not None for place in found.parameters.values())
        others = tuple(map(_origin_key, found.named_after))
        key = (found.kind, found.eps, parameters, others, _module(program, found.step))
        if not parameters or not named:
            result.append(found)
        elif key in first:
            first[key].twins.append(found.step)
        else:
            first[key] = found
            result.append(found)
    return result


def _origin_key(place: Place) -> tuple[str, ...]:
    # A constant inside a function is the same at every call of the function.
    scope = place.scope
    return (*(scope.function or (str(id(scope)),)), place.name)


def name_norms(program: Program, norms: list[Found]) -> list[str]:
    """A name for each norm, see onnx_names."""
    evidence = []
    for found in norms:
        # Statistics first: the gain and shift may come from a layer behind, with a name of its own (Caffe).
        roles = sorted(found.parameters, key=lambda role: not role.startswith("running"))
        places = [*(found.parameters[role] for role in roles), *found.named_after]
        names = [own_name(program, place) for place in places]
        evidence.append(
            Evidence(
                parameters=tuple(dict.fromkeys(name for name in names if name is not None)),
                module=_module(program, found.step),
                node=_node_name(found.step),
                output=found.output,
            )
        )
    return choose_names(evidence)


def _node_name(step: Step) -> str:
    """The node's name; inside a function behind the name of the call."""
    caller = step.scope.caller
    own = step.node.name
    return "/".join(filter(None, (caller.node.name, own))) if caller is not None else own


Widths = dict[tuple[int, str], int]
"""Channels of the values that layers give out, by scope and name."""


def build(program: Program, found: Found, name: str, widths: Widths) -> NormLayer:
    """The layer, with references to whatever of it is constant."""
    tensors: dict[str, ArrayRef] = {}
    for role, place in found.parameters.items():
        ref = found.made.get(role) or program.constant(place)
        if ref is not None and not ref.dtype.startswith("complex"):
            tensors[role] = ref
    tensors |= {role: ref for role, ref in found.made.items() if role not in tensors}
    fillers = _fillers(program, found, tensors)
    channels = max((size(ref) for role, ref in tensors.items() if role not in fillers), default=0)
    channels = channels or max((size(ref) for ref in tensors.values() if size(ref) > 1), default=0)
    channels = channels or _width(program, found, widths)
    widths[id(found.step.scope), found.output] = channels
    for role in fillers:
        del tensors[role]
    for role, ref in tensors.items():
        # A filler of one number that is broadcast to the channels, whose count only the others say.
        if size(ref) == 1 and channels > 1:
            tensors[role] = filled(ref, (channels,), ("filled", ref.identity, channels))
    given = found.parameters
    batch = found.kind is NormKind.BATCH
    gain_only = found.kind is NormKind.RMS
    return NormLayer(
        name=name,
        path=strip_wrappers(name),
        kind=found.kind,
        channels=channels,
        origin=found.origin,
        groups=found.groups,
        weight=tensors.get("weight"),
        bias=tensors.get("bias"),
        running_mean=tensors.get("running_mean"),
        running_var=tensors.get("running_var"),
        eps=found.eps,
        momentum=found.momentum,
        training=found.training,
        affine=any(role in given and role not in fillers for role in ("weight", "bias")),
        track_running_stats=True if batch and "running_mean" in tensors else None,
        zero_centred=found.adds_one if gain_only else None,
        # The graph says how the gain is used: nothing to guess from its values.
        zero_centred_by_class=found.adds_one if gain_only or found.adds_one else None,
        aliases=tuple(_node_name(twin) or twin.node.outputs[0] for twin in found.twins),
    )


def _fillers(program: Program, found: Found, tensors: dict[str, ArrayRef]) -> set[str]:
    """weight or bias that an exporter put in because the operator demands one: a nameless constant 1 or 0.

    The layer has no such parameter; its module was built with affine=False or bias=False."""
    named = {role for role, place in found.parameters.items() if own_name(program, place) is not None}
    fillers = set()
    for role, value in (("weight", 1.0), ("bias", 0.0)):
        ref, place = tensors.get(role), found.parameters.get(role)
        if ref is None or place is None or role in named or found.kind is NormKind.AFFINE:
            continue
        made = program.producer(program.source(place)) is not None
        if made and size(ref) <= 1 << 16 and bool((np.asarray(ref.numpy()) == value).all()):
            fillers.add(role)
    if found.kind is NormKind.BATCH and (fillers != {"weight", "bias"} or "running_mean" not in named):
        return set()
    return fillers


def _width(program: Program, found: Found, widths: Widths) -> int:
    """The channels of a norm without parameters, where shapes or the layer before tell them; else 0."""
    place = found.data
    behind = found.kind in (NormKind.LAYER, NormKind.RMS)
    for _ in range(MAX_CHAIN):
        if place is None:
            break
        shape = program.document.shape(place.scope.graph, place.name)
        length = None if not shape else shape[-1] if behind else shape[1] if len(shape) > 1 else None
        length = length or widths.get((id(place.scope), place.name))
        if length:
            return max(length, 0)
        step = program.producer(place)
        if step is None:
            break
        index = {"MatMul": 1, "Gemm": 1, "Conv": 1}.get(op(step), 0)
        if index:
            weight = program.operand(step, 1)
            tensor = None if weight is None else weight.scope.graph.tensors.get(weight.name)
            dims = tensor.dims if tensor is not None else []
            transposed = op(step) == "Conv" or program.integer(step, "transB", 0) != 0
            return dims[0 if transposed else -1] if len(dims) > 1 else 0
        operator = operator_of(step.node)
        if operator is not None:
            scale = program.operand(step, operator.inputs["weight"])
            ref = None if scale is None else program.constant(scale)
            if ref is not None and size(ref) > 1:
                return size(ref)
        elif op(step) not in SHAPE_KEEPING | PASSING:
            break
        place = program.operand(step, 0)
    return 0


def read_layers(program: Program) -> tuple[list[Named], list[NearMiss]]:
    """Every norm layer of the model with its place in the graph, in file order, and the near misses."""
    norms, misses = find_norms(program)
    budget = Budget()
    for found in norms:
        # A function with one long name may be called very often, and every call makes names out of it.
        budget.spend_names(len(found.step.node.name))
    norms = join_twins(program, norms)
    names = name_norms(program, norms)
    widths: Widths = {}
    named = []
    for found, name in zip(norms, names, strict=True):
        layer = build(program, found, name, widths)
        budget.spend_values([layer])
        named.append(Named(layer, found))
    return named, misses
