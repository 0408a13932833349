"""Norm operators of ONNX and of onnxruntime: which input is what, and what the attributes mean by opset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from normdoctor.layers import ArrayRef, NormKind
from normdoctor.readers.onnx_graph import Place, Program, Step
from normdoctor.readers.onnx_records import LOCAL_DOMAINS, Node

MICROSOFT = "com.microsoft"


@dataclass(kw_only=True, eq=False)
class Found:
    """A norm in a graph, before it has a name. Parameters are still values of the graph, constant or not."""

    step: Step
    """The node that normalises: the operator itself, or the Div or Mul of a norm written out."""
    kind: NormKind
    origin: str
    parameters: dict[str, Place]
    """NormLayer field → the value as the node's own input names it."""
    inputs: dict[str, tuple[Step, int]] = field(default_factory=dict)
    """NormLayer field → the node and the index of the input that takes the value."""
    made: dict[str, ArrayRef] = field(default_factory=dict)
    """NormLayer field → what several constants make together; it stands in for the parameter."""
    named_after: list[Place] = field(default_factory=list)
    """Further constants that belong to the layer and may say its name."""
    data: Place | None = None
    """What is normalised."""
    output: str = ""
    eps: float | None = None
    momentum: float | None = None
    training: bool | None = None
    groups: int | None = None
    adds_one: bool = False
    """The graph multiplies by 1 + weight."""
    twins: list[Step] = field(default_factory=list)
    """Other nodes that do the same with the same parameters: one module called several times."""


@dataclass(frozen=True)
class Operator:
    """One norm operator: the index of each parameter among its inputs."""

    kind: NormKind
    inputs: Mapping[str, int]
    eps: float = 1e-5
    domains: tuple[str, ...] = LOCAL_DOMAINS
    groups: str | None = None
    """The attribute that holds the number of groups."""


WEIGHT_BIAS = {"weight": 1, "bias": 2}
SKIP = 1e-12
"""onnxruntime's own default eps in its Skip* and Embed* operators."""

BOTH = (*LOCAL_DOMAINS, MICROSOFT)

OPERATORS = {
    "BatchNormalization": Operator(NormKind.BATCH, {**WEIGHT_BIAS, "running_mean": 3, "running_var": 4}),
    "InstanceNormalization": Operator(NormKind.INSTANCE, WEIGHT_BIAS),
    "LayerNormalization": Operator(NormKind.LAYER, WEIGHT_BIAS, domains=BOTH),
    "GroupNormalization": Operator(NormKind.GROUP, WEIGHT_BIAS, groups="num_groups"),
    "RMSNormalization": Operator(NormKind.RMS, {"weight": 1}),
    "SimplifiedLayerNormalization": Operator(NormKind.RMS, {"weight": 1}, domains=BOTH),
    "SkipLayerNormalization": Operator(NormKind.LAYER, {"weight": 2, "bias": 3}, SKIP, (MICROSOFT,)),
    "SkipSimplifiedLayerNormalization": Operator(NormKind.RMS, {"weight": 2}, SKIP, (MICROSOFT,)),
    "EmbedLayerNormalization": Operator(NormKind.LAYER, {"weight": 5, "bias": 6}, SKIP, (MICROSOFT,)),
    "GroupNorm": Operator(NormKind.GROUP, WEIGHT_BIAS, domains=(MICROSOFT,), groups="groups"),
    "SkipGroupNorm": Operator(NormKind.GROUP, WEIGHT_BIAS, domains=(MICROSOFT,), groups="groups"),
}


def operator_of(node: Node) -> Operator | None:
    """The norm operator that a node is, or None."""
    known = OPERATORS.get(node.op)
    return known if known is not None and node.domain in known.domains else None


def read_operator(program: Program, step: Step, operator: Operator) -> Found:
    """The norm that one operator node is."""
    parameters, inputs = {}, {}
    for role, index in operator.inputs.items():
        place = program.operand(step, index)
        if place is not None:
            parameters[role] = place
            inputs[role] = (step, index)
    found = Found(
        step=step,
        kind=operator.kind,
        origin=step.node.origin,
        parameters=parameters,
        inputs=inputs,
        data=program.operand(step, 0),
        output=next(iter(step.node.outputs), ""),
        eps=program.number(step, "epsilon", operator.eps),
    )
    if operator.groups is not None:
        found.groups = program.integer(step, operator.groups, 1)
    if step.node.op == "BatchNormalization":
        # ONNX weighs the old value where torch weighs the new one. Rounded, for 1 - 0.9 is not 0.1 in binary.
        found.momentum = round(1.0 - program.number(step, "momentum", 0.9), 9)
        found.training = trains(program, step)
    return found


def trains(program: Program, step: Step) -> bool:
    """Whether the node normalises with the statistics of the batch."""
    if step.scope.opset >= 14:
        return program.integer(step, "training_mode", 0) != 0
    # Before opset 14 asking for the updated statistics is what makes it train; is_test (opset 6) forbids it.
    return program.integer(step, "is_test", 0) == 0 and sum(map(bool, step.node.outputs)) > 1
