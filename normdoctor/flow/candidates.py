"""What may fold: norms in eval mode, and the multiplications and additions that others write in their place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from normdoctor.flow.affine import Affine, Array, Blocked
from normdoctor.flow.carrying import ELEMENTWISE, State
from normdoctor.flow.constants import MAX_DEPTH
from normdoctor.flow.graph import Graph, Node, Op, Value
from normdoctor.layers import NormKind

SCALING = frozenset({Op.MULTIPLY, Op.DIVIDE})
SHIFTING = frozenset({Op.ADD, Op.SUBTRACT})

OWN_STATISTICS = Blocked("own-statistics", "it normalises with the statistics of its own input, so it is no affine map")

UNASKED_GAIN = Blocked(
    "own-statistics",
    "it normalises with the statistics of its own input; its gain and bias can move into linear layers (--layernorm)",
)

TOKENS = frozenset({NormKind.LAYER, NormKind.RMS, NormKind.LAYER_OR_RMS, NormKind.LAYER_OR_GROUP})
"""Kinds that may be LayerNorm or RMSNorm, whose gain acts on the last axes."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A norm, or a run of elementwise operators with constants, that is an affine map in eval mode."""

    node: Node
    """The one it is reported as."""
    nodes: tuple[Node, ...]
    is_gain: bool = False
    """The gain and bias behind a LayerNorm or RMSNorm: only moved when asked for."""

    @property
    def is_run(self) -> bool:
        """Whether it is written out, so that it can go without a trace."""
        return self.nodes[0].op in ELEMENTWISE

    def left(self, state: State) -> list[Node]:
        """Its nodes without those that the fold of another norm took out."""
        return [node for node in self.nodes if node not in state.bypassed]

    def source(self, state: State) -> Value:
        """What goes in."""
        first = self.left(state)[0]
        operand = state.operand(first) if self.is_run else None
        value = first.inputs[operand[0] if operand else 0]
        assert value is not None
        return value

    @property
    def result(self) -> Value:
        """What comes out."""
        return self.nodes[-1].y


def find_candidates(graph: Graph, state: State) -> list[Candidate]:
    """All norms of the graph in order. Runs that no reader took for a norm are among them."""
    found: list[Candidate] = []
    taken: set[Node] = set()
    for node in graph.nodes:
        if node in state.bypassed:
            continue
        if node.op in (Op.BATCH_NORM, Op.OTHER_NORM, Op.LAYER_NORM):
            found.append(Candidate(node, (node,), is_gain=node.op is Op.LAYER_NORM))
        elif node not in taken and node.op in ELEMENTWISE:
            run = list(_run_from(node, state))
            taken.update(run)
            candidate = _judge_run(run, state) if run else None
            if candidate is not None:
                found.append(candidate)
    return found


def _run_from(node: Node, state: State) -> Iterator[Node]:
    """The elementwise operators with one number per channel (or one for all) that follow each other from `node`."""
    axis: int | None = None
    while True:
        operand = state.operand(node) if node.op in ELEMENTWISE else None
        if operand is None or (node.op is Op.DIVIDE and operand[0] == 1):
            return
        varying = [place for place, length in enumerate(operand[1].shape) if length != 1]
        if len(varying) > 1 or (varying and axis not in (None, varying[0])):
            return
        axis = varying[0] if varying else axis
        yield node
        uses = state.uses(node.y)
        if state.leaves(node.y) or len(uses) != 1:
            return
        node = uses[0].node


def _judge_run(run: list[Node], state: State) -> Candidate | None:
    named = next((node for node in run if node.layer is not None), None)
    scaling = [node for node in run if node.op in SCALING]
    if not scaling:
        return None
    node = named or scaling[0]
    if named is not None and named.layer is not None:
        if named.layer.kind is NormKind.BATCH:
            return Candidate(node, tuple(run))
        return Candidate(node, _from_gain(run, node), is_gain=named.layer.kind in TOKENS)
    first = state.operand(run[0])
    assert first is not None
    before = run[0].inputs[first[0]]
    assert before is not None
    core = _core(state.source(before), state)
    if core is not None and any(_is_vector(node, state) for node in scaling):
        return Candidate(node if core.layer is None else core, tuple(run), is_gain=True)
    if core is not None:
        return None
    # By single numbers: a hard sigmoid, an image brought to 0..1. No norm is written like that.
    vectors = {node.op for node in run if _is_vector(node, state)}
    return Candidate(node, tuple(run)) if vectors & SCALING and vectors & SHIFTING else None


def _from_gain(run: list[Node], node: Node) -> tuple[Node, ...]:
    """The part of a run that begins with the gain."""
    return tuple(run[run.index(node) :])


def _is_vector(node: Node, state: State) -> bool:
    operand = state.operand(node)
    return operand is not None and operand[1].size > 1


def _core(value: Value, state: State) -> Node | None:
    """The quotient or product of two computed values behind a value, as what comes out of a norm's core is."""
    node = value.producer
    for _ in range(MAX_DEPTH):
        if node is None or node.op not in (Op.CAST, Op.IDENTITY, Op.RESHAPE, Op.TRANSPOSE):
            break
        node = state.source(node.x).producer
    return node if node is not None and node.op in SCALING and state.operand(node) is None else None


def affine_of(candidate: Candidate, state: State) -> Affine:
    """The map, with everything that was merged into it. Raises Blocked."""
    node = candidate.node
    if candidate.is_run:
        return _affine_of_run(candidate, state)
    if node.op is Op.OTHER_NORM:
        raise OWN_STATISTICS
    rank = _rank(node)
    for slot in range(1, len(node.inputs)):
        value = node.given(slot)
        if value is not None and not state.constants.knows(value):
            raise Blocked("computed-weight", "its parameters are computed from the input")
    if node.op is Op.LAYER_NORM:
        return _gain_of(node, rank, state)
    if node.given(3) is None or node.given(4) is None:
        raise Blocked("no-running-statistics", "it has no running statistics and normalises with the batch")
    if node.attributes.get("training") and not state.evaluation:
        raise Blocked("training-mode", "it was saved in training mode and normalises with the batch")
    if any(output.uses or output.is_output for output in node.outputs[1:]):
        raise Blocked("statistics-used", "the statistics that it gives out are used")
    scale, shift = batch_norm_vectors(node, state)
    affine = Affine.along(1, rank, scale, shift)
    for absorption in state.absorbed.get(node, ()):
        other = Affine.along(1, rank, absorption.scale, absorption.shift)
        affine = affine.then(other) if absorption.side == "out" else other.then(affine)
    return affine


def _rank(node: Node) -> int:
    shape = node.x.shape if node.x.shape is not None else node.y.shape
    if shape is None:
        raise Blocked("unknown-shape", "how many axes its input has is not known")
    return len(shape)


def _vector(node: Node, slot: int, state: State) -> Array | None:
    value = node.given(slot)
    return None if value is None else np.asarray(state.constants.array(value), dtype=np.float64)


def batch_norm_vectors(node: Node, state: State) -> tuple[Array, Array]:
    """Scale and shift of a BatchNorm in eval mode, one number per channel.

    scale = weight / sqrt(running_var + eps), shift = bias - running_mean * scale. Raises Blocked where they are not
    finite."""
    mean, var = _vector(node, 3, state), _vector(node, 4, state)
    weight, bias = _vector(node, 1, state), _vector(node, 2, state)
    assert mean is not None and var is not None
    try:
        with np.errstate(all="ignore"):
            scale = (1.0 if weight is None else weight) / np.sqrt(var + node.attributes["eps"])
            shift = (0.0 if bias is None else bias) - mean * scale
        scale, shift = np.broadcast_arrays(scale, shift)
    except ValueError:
        raise Blocked("wrong-axis", "its parameters have different lengths") from None
    if scale.ndim != 1 or not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise Blocked("not-finite", "its statistics or parameters hold NaN, infinity or a variance below -eps")
    return scale, shift


def _gain_of(node: Node, rank: int, state: State) -> Affine:
    weight, bias = _vector(node, 1, state), _vector(node, 2, state)
    if weight is None and bias is None:
        raise Blocked("no-parameters", "it has neither gain nor bias")
    first = weight if weight is not None else bias
    assert first is not None
    shape = (1,) * (rank - first.ndim) + first.shape
    scale = np.ones(shape) if weight is None else weight.reshape(shape)
    affine = Affine(scale, np.zeros((1,) * rank) if bias is None else bias.reshape(shape))
    for absorption in state.absorbed.get(node, ()):
        affine = affine.then(Affine.along(rank - 1, rank, absorption.scale, absorption.shift))
    if not affine.is_finite:
        raise Blocked("not-finite", "its gain or bias holds NaN or infinity")
    return affine


def _affine_of_run(candidate: Candidate, state: State) -> Affine:
    affine: Affine | None = None
    for node in candidate.left(state):
        operand = state.operand(node)
        assert operand is not None
        slot, constant = operand
        zero, one = np.zeros((1,) * constant.ndim), np.ones((1,) * constant.ndim)
        if node.op is Op.ADD:
            step = Affine(one, constant)
        elif node.op is Op.SUBTRACT:
            step = Affine(one, -constant) if slot == 0 else Affine(-one, constant)
        else:
            with np.errstate(all="ignore"):
                step = Affine(1.0 / constant if node.op is Op.DIVIDE else constant, zero)
        affine = step if affine is None else affine.then(step)
    if affine is None:
        raise Blocked("taken-out", "the fold of a norm behind it took it out")
    if not affine.is_finite:
        raise Blocked("not-finite", "its constants hold NaN, infinity or a division by zero")
    return affine
