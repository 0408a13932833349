"""The fold plan: which norm goes into which weight, through what, and what stays with the reason.

Made on the neutral graph before any weight is touched. The weights themselves are computed one at a time when they
are written (`FoldPlan.new_inputs`), so the memory is that of the largest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from normdoctor.errors import InputError
from normdoctor.flow.affine import Affine, Array, Blocked
from normdoctor.flow.candidates import OWN_STATISTICS, UNASKED_GAIN, Candidate, affine_of, find_candidates
from normdoctor.flow.carrying import Deed, State, carry_back, carry_forward
from normdoctor.flow.graph import Graph, Node, Op
from normdoctor.flow.weights import WEIGHTED, Weights, whole_shape
from normdoctor.places import Verdict


@dataclass(frozen=True, eq=False)
class Outcome:
    """One norm (or one multiplication and addition written out in its place) and what becomes of it."""

    norm: Node
    nodes: tuple[Node, ...]
    """All nodes that make up the affine map; one for a norm operator."""
    verdict: Verdict
    into: tuple[Node, ...] = ()
    """The nodes whose weights absorb it."""
    through: tuple[Node, ...] = ()
    """The nodes that it passes on the way."""
    code: str = ""
    """For LEFT and DECOMPOSED: the reason code, a few words joined by hyphens."""
    reason: str = ""
    """The reason as a sentence."""
    gain: float = 0.0
    """The largest absolute scale over the channels."""


@dataclass(frozen=True, eq=False)
class NewInput:
    """New values for one constant input of a node that stays."""

    node: Node
    slot: int
    """Neutral slot; for a bias that was absent the slot where it goes."""
    values: Array
    """In the layout of the input, in float64: to be cast once to `dtype`."""
    dtype: str
    copied: bool = False
    """Whether the tensor it replaces is used elsewhere too, so that this site gets its own copy."""


@dataclass(eq=False)
class FoldPlan:
    """What to do to a graph, all of it decided."""

    graph: Graph
    outcomes: list[Outcome] = field(default_factory=list)
    bypassed: dict[Node, int] = field(default_factory=dict)
    """Nodes that go: node → the slot of its data input, which takes the place of its output."""
    appended: dict[Node, Array] = field(default_factory=dict)
    """Matrix products without a place for a bias: what must be added to their output, broadcastable to it."""
    decomposed: dict[Node, tuple[Array, Array]] = field(default_factory=dict)
    """Norms that become x * scale + shift, both broadcastable to x."""
    attributes: dict[Node, dict[str, object]] = field(default_factory=dict)
    """Neutral attributes that change: {"beta": 1.0} of a Gemm, {"training": False} of a norm."""
    state: State = field(repr=False, default_factory=lambda: State(Graph()))
    """The folds themselves, from which `new_inputs` computes."""

    @property
    def changes_nothing(self) -> bool:
        """Whether the model stays as it is."""
        return not (self.bypassed or self.decomposed or self.attributes or self.state.absorbed or self.state.replaced)

    def new_inputs(self) -> Iterator[NewInput]:
        """Every constant input that changes, computed one node at a time. May be called again."""
        for (node, slot), values in self.state.replaced.items():
            if node not in self.bypassed:
                yield _new_input(node, slot, values)
        for node in self.state.absorbed:
            if node in self.bypassed or node in self.decomposed:
                continue
            if node.op in WEIGHTED:
                yield from self._new_weights(node)
            else:
                yield from self._new_norm(node)

    def _new_weights(self, node: Node) -> Iterator[NewInput]:
        weights = weights_of(node, self.state)
        if any((absorption.scale != 1).any() for absorption in self.state.absorbed[node]):
            yield _new_input(node, weights.slot, weights.weight)
        if weights.bias is not None and node not in self.appended:
            yield _new_input(node, 2, weights.bias, weights.slot)

    def _new_norm(self, node: Node) -> Iterator[NewInput]:
        weight, bias = _norm_parameters(node, self.state)
        if weight is not None:
            yield _new_input(node, 1, weight, 3)
        if bias is not None:
            yield _new_input(node, 2, bias, 1 if node.given(1) is not None else 3)


def _new_input(node: Node, slot: int, values: Array, like: int | None = None) -> NewInput:
    """The new values of an input; one that was absent has the type of the input `like`."""
    old = node.given(slot)
    model = old or (None if like is None else node.given(like)) or node.x
    others = [use for use in (old.uses if old is not None else ()) if use.node.op is not Op.SHAPE]
    return NewInput(node, slot, values, model.dtype or "float32", copied=len(others) > 1)


def weights_of(node: Node, state: State) -> Weights:
    """Weight and bias of a weighted node with all maps taken in."""
    slot = state.weight_slot(node)
    weight, bias = node.inputs[slot], node.given(2)
    assert weight is not None
    given = None if bias is None else np.asarray(state.constants.array(bias), dtype=np.float64)
    if given is not None and node.op is Op.MATMUL:
        beta = node.attributes.get("beta", 1.0)
        given = beta * given if beta else None
    weights = Weights(node, slot, np.asarray(state.constants.array(weight), dtype=np.float64), given)
    try:
        for absorption in state.absorbed.get(node, ()):
            weights.take(absorption)
    except ValueError as error:
        raise InputError(
            f"{node.label or node.written}: the shapes of its weight and bias do not fit together ({error})",
            "No runtime accepts such a model; export it again.",
        ) from None
    return weights


def _norm_parameters(node: Node, state: State) -> tuple[Array | None, Array | None]:
    """Weight and bias of a norm that stays, with the maps of others taken in."""
    weight, bias = (
        None if value is None else np.asarray(state.constants.array(value), dtype=np.float64)
        for value in (node.given(1), node.given(2))
    )
    if node.op is not Op.BATCH_NORM:
        for absorption in state.absorbed[node]:
            weight = absorption.scale if weight is None else weight * absorption.scale
            if bias is not None:
                bias = bias * absorption.scale + absorption.shift
        return weight, bias
    mean, var = node.given(3), node.given(4)
    channels = len(state.absorbed[node][0].scale)
    center, deviation = np.zeros(channels), np.ones(channels)
    if mean is not None and var is not None:
        center = np.asarray(state.constants.array(mean), dtype=np.float64)
        deviation = np.sqrt(np.asarray(state.constants.array(var), dtype=np.float64) + node.attributes["eps"])
    gain = np.ones(channels) if weight is None else weight
    offset = np.zeros(channels) if bias is None else bias
    for absorption in state.absorbed[node]:
        if absorption.side == "out":
            gain, offset = absorption.scale * gain, absorption.scale * offset + absorption.shift
        else:
            # gain / deviation * (scale * x + shift - center) + offset, as a norm with the same statistics
            new = gain * absorption.scale
            offset = offset + (gain * (absorption.shift - center) + new * center) / deviation
            gain = new
    return gain, offset


def plan_folds(
    graph: Graph,
    *,
    layernorm: bool = False,
    decompose: bool = False,
    evaluation: bool = False,
    excluded: Mapping[Node, tuple[str, str]] | None = None,
) -> FoldPlan:
    """Decide for every norm of `graph` whether and where it folds.

    layernorm: move gain and bias of LayerNorm and RMSNorm into the matrix products that alone consume them.
    decompose: what can be neither absorbed nor merged becomes one multiplication and one addition.
    evaluation: norms saved in training mode are meant for inference.
    excluded: norms that must stay, with code and sentence (found out when the weights were computed).

    Raises InputError where a constant that is needed cannot be read."""
    state = State(graph, evaluation=evaluation)
    planner = _Planner(state, layernorm, dict(excluded or {}))
    candidates = planner.fold_all()
    plan = FoldPlan(graph, bypassed=state.bypassed, state=state)
    for candidate in candidates:
        outcome = planner.outcomes.get(candidate.node)
        if outcome is None and decompose:
            outcome = planner.decompose(candidate, plan)
        if outcome is None:
            outcome = planner.left(candidate)
        if outcome.verdict is not Verdict.LEFT or not candidate.is_run or candidate.node.layer is not None:
            plan.outcomes.append(outcome)
    _list_the_rest(plan, candidates)
    _finish(plan)
    return plan


def _list_the_rest(plan: FoldPlan, candidates: list[Candidate]) -> None:
    """Norms that are written out without a gain of their own: nothing in them could fold. All in order."""
    places = {node: place for place, node in enumerate(plan.graph.nodes)}
    listed = {node for candidate in candidates for node in (candidate.node, *candidate.nodes)}
    for node in plan.graph.nodes:
        if node.layer is not None and node not in listed:
            code, reason = OWN_STATISTICS.code, OWN_STATISTICS.sentence
            plan.outcomes.append(Outcome(node, (node,), Verdict.LEFT, code=code, reason=reason))
    plan.outcomes.sort(key=lambda outcome: places[outcome.norm])


def _finish(plan: FoldPlan) -> None:
    """What follows from the folds for the operators around them."""
    for node in plan.state.absorbed:
        if node.op is not Op.MATMUL or node in plan.bypassed:
            continue
        if node.attributes.get("takes_bias") and node.attributes.get("beta", 1.0) == 1.0:
            continue
        bias = weights_of(node, plan.state).bias
        if bias is None:
            continue
        if node.attributes.get("takes_bias"):
            plan.attributes[node] = {"beta": 1.0}  # what `new_inputs` gives holds beta already
        else:
            plan.appended[node] = bias
    if plan.state.evaluation:
        for node in plan.graph.of(Op.BATCH_NORM):
            if node.attributes.get("training") and node not in plan.bypassed and node not in plan.decomposed:
                plan.attributes[node] = {"training": False}


class _Planner:
    """Folds what can be folded, in passes, and remembers why the rest could not."""

    def __init__(self, state: State, layernorm: bool, excluded: dict[Node, tuple[str, str]]) -> None:
        self.state = state
        self.layernorm = layernorm
        self.excluded = excluded
        self.outcomes: dict[Node, Outcome] = {}
        """What has folded so far."""
        self._reasons: dict[Node, dict[str, Blocked]] = {}

    def fold_all(self) -> list[Candidate]:
        """Fold until nothing folds any more; gives all candidates.

        A fold may bring constants together that are one map then: they are looked for again."""
        found: dict[Node, Candidate] = {}
        folded = -1
        while folded != len(self.outcomes):
            folded = len(self.outcomes)
            left = [each for each in find_candidates(self.state.graph, self.state) if each.node not in self.outcomes]
            found |= {candidate.node: candidate for candidate in left}
            self._fold(left)
        return list(found.values())

    def _fold(self, candidates: list[Candidate]) -> None:
        """Backward into weights where that can be, else forward, else into another norm; again while it helps."""
        passes = (("back", False), ("forward", False), ("forward", True), ("back", True))
        self._reasons |= {candidate.node: {} for candidate in candidates}
        folded = -1
        while folded != len(self.outcomes):
            folded = len(self.outcomes)
            for direction, merge in passes:
                for candidate in candidates:
                    if candidate.node not in self.outcomes:
                        self._try(candidate, direction, merge)

    def _try(self, candidate: Candidate, direction: str, merge: bool) -> None:
        reasons = self._reasons[candidate.node]
        if candidate.is_gain and (direction == "back" or merge):
            return
        try:
            affine = self._movable(candidate)
            if affine.is_identity and candidate.node.op is Op.LAYER_NORM:
                raise Blocked("no-parameters", "its gain is 1 and its bias 0 already")
            if affine.is_identity and candidate.node.op is Op.LAYER_NORM:
                raise Blocked("no-parameters", "its gain is 1 and its bias 0 already")
            if affine.is_identity:
                deed = Deed()
            elif direction == "back":
                deed = carry_back(self.state, candidate.source(self.state), affine, merge)
            else:
                if not self.state.uses(candidate.result) and not candidate.result.is_output:
                    raise Blocked("unused", "nothing uses its output")
                deed = carry_forward(self.state, candidate.result, affine, merge)
                if candidate.is_gain and any(node.op is not Op.MATMUL for node in deed.into):
                    raise Blocked("not-linear-layers", "others than linear layers take its output")
        except Blocked as blocked:
            reasons.setdefault(direction, blocked)
            return
        self._do(candidate, deed, affine, direction)

    def _movable(self, candidate: Candidate) -> Affine:
        if candidate.node in self.excluded:
            raise Blocked(*self.excluded[candidate.node])
        fixed = next((node.fixed for node in candidate.nodes if node.fixed is not None), None)
        if fixed is not None:
            raise Blocked(*fixed)
        if candidate.is_gain and not self.layernorm:
            raise UNASKED_GAIN
        return affine_of(candidate, self.state)

    def _do(self, candidate: Candidate, deed: Deed, affine: Affine, direction: str) -> None:
        if candidate.node.op is Op.LAYER_NORM:
            for slot, neutral in ((1, 1.0), (2, 0.0)):
                value = candidate.node.given(slot)
                if value is not None:
                    deed.replaced[candidate.node, slot] = np.full(whole_shape(value), neutral)
            self.state.absorbed.pop(candidate.node, None)
        else:
            for node in candidate.left(self.state):
                operand = self.state.operand(node) if candidate.is_run else None
                deed.bypassed[node] = operand[0] if operand else 0
        absorbed = all(node.op in WEIGHTED for node in deed.into) and bool(deed.into)
        verdict = Verdict.BACKWARD if direction == "back" else Verdict.FORWARD
        self.state.do(deed)
        self.outcomes[candidate.node] = Outcome(
            candidate.node,
            candidate.nodes,
            verdict if absorbed else Verdict.MERGED,
            tuple(deed.into),
            tuple(deed.through),
            reason="" if deed.into else "its scale is 1 and its shift 0: it changed nothing",
            gain=float(np.abs(affine.scale).max()),
        )

    def decompose(self, candidate: Candidate, plan: FoldPlan) -> Outcome | None:
        """The norm as one multiplication and one addition; None where it cannot be known."""
        if candidate.node.op is not Op.BATCH_NORM:
            return None
        try:
            affine = self._movable(candidate)
        except Blocked:
            return None
        plan.decomposed[candidate.node] = (affine.scale, affine.shift)
        left = self.left(candidate)
        gain = float(np.abs(affine.scale).max())
        return Outcome(left.norm, left.nodes, Verdict.DECOMPOSED, code=left.code, reason=left.reason, gain=gain)

    def left(self, candidate: Candidate) -> Outcome:
        """A norm that stays, with the reason of the direction that says more."""
        reasons = self._reasons[candidate.node]
        back, ahead = reasons.get("back"), reasons.get("forward")
        first = ahead if back is None or (back.code == "graph-input" and ahead is not None) else back
        assert first is not None
        sentence = first.sentence
        if back is not None and ahead is not None and back.sentence != ahead.sentence:
            sentence = f"backward: {back.sentence}; forward: {ahead.sentence}"
        return Outcome(candidate.node, candidate.nodes, Verdict.LEFT, code=first.code, reason=sentence)
