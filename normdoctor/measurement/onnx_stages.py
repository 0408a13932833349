"""A graph of ONNX cut in front of its norms into pieces that run one after the other, each a model of its own.

A piece ends with the input of a norm; the norm itself stands in the piece that needs its result, where its mean and
variance are inputs. Nothing is computed before it is needed, and a value is dropped behind its last use: of a network
that is stopped at a norm only the values are held that the rest of it needs.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normdoctor.errors import CannotRunError

RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Operators whose result is another one every time, so that no two pieces may compute it each for itself."""

SHAPES = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Cut:
    """A node that is a norm with statistics."""

    node: int
    """Its place among the nodes of the graph."""
    norm: str
    """The name of the layer; several nodes may be one layer that is called several times."""


@dataclass(frozen=True)
class Stage:
    """One piece."""

    cut: Cut | None
    """The norm that it ends in front of; None for the last piece."""
    x: str
    """The input of that norm."""
    nodes: tuple[int, ...]
    """In an order in which they can be computed."""
    takes: tuple[str, ...]
    """Values from the pieces before, or inputs of the model."""
    norms: tuple[Cut, ...]
    """The norms that stand in it: it takes their mean and variance too."""
    gives: tuple[str, ...]
    """What it computes and others need: the next norm, a later piece, the caller."""
    keeps: frozenset[str]
    """All values, its own and earlier ones, that are needed behind it."""


def stages(graph: Any, cuts: Sequence[Cut], inputs: Collection[str], together: Collection[str] = ()) -> list[Stage]:
    """The pieces of a GraphProto, one for each cut and the rest.

    inputs: names of what the model is fed with. together: values that cannot be handed from piece to piece: who
    takes them stands where they are made. Raises CannotRunError where that is impossible, and for nodes that depend
    on each other in a circle."""
    return _Plan(graph, cuts, inputs, together).stages()


class _Plan:
    def __init__(self, graph: Any, cuts: Sequence[Cut], inputs: Collection[str], together: Collection[str]) -> None:
        self.inputs, self.together = frozenset(inputs), frozenset(together)
        self.uses = [tuple(dict.fromkeys(_used(node))) for node in graph.node]
        self.makes = [tuple(name for name in node.output if name) for node in graph.node]
        self.maker = {name: place for place, names in enumerate(self.makes) for name in names}
        self.ops = [node.op_type for node in graph.node]
        self.outputs = [value.name for value in graph.output]
        self.order = self._sorted()
        rank = {place: index for index, place in enumerate(self.order)}
        self.cuts = sorted(cuts, key=lambda cut: rank[cut.node])
        self.norm_at = {cut.node: cut for cut in cuts}
        self.x = [graph.node[cut.node].input[0] for cut in self.cuts]
        for cut in cuts:  # the statistics come from elsewhere now
            node = graph.node[cut.node]
            self.uses[cut.node] = tuple(dict.fromkeys(name for name in node.input[:3] if name))
        self.fixed = self._fixed(graph)
        self.last = len(cuts)
        self.stage_of = self._assign()

    def _sorted(self) -> list[int]:
        """The nodes, each behind those whose results it takes; as they are listed where that is such an order."""
        waiting = [len({self.maker[name] for name in names if name in self.maker}) for names in self.uses]
        followers: dict[int, list[int]] = {}
        for place, names in enumerate(self.uses):
            for maker in {self.maker[name] for name in names if name in self.maker}:
                followers.setdefault(maker, []).append(place)
        ready = [place for place, count in enumerate(waiting) if not count]
        heapq.heapify(ready)
        order = []
        while ready:
            place = heapq.heappop(ready)
            order.append(place)
            for follower in followers.get(place, ()):
                waiting[follower] -= 1
                if not waiting[follower]:
                    heapq.heappush(ready, follower)
        if len(order) < len(waiting):
            raise CannotRunError("its nodes depend on each other in a circle")
        return order

    def _fixed(self, graph: Any) -> set[int]:
        """Nodes that compute the same whatever the model is fed with: every piece computes them for itself."""
        moving = set(self.inputs)
        fixed = set()
        for place in self.order:
            if graph.node[place].op_type in RANDOM or place in self.norm_at or moving.intersection(self.uses[place]):
                moving.update(self.makes[place])
            else:
                fixed.add(place)
        return fixed

    def _moves(self, name: str) -> bool:
        """Whether a value depends on what the model is fed with."""
        return name in self.inputs or (name in self.maker and self.maker[name] not in self.fixed)

    def _assign(self) -> dict[int, int]:
        """Each node's piece: the first one that needs it."""
        found: dict[int, int] = {}
        wanted = [*([x] for x in self.x), self.outputs]
        for stage, names in enumerate(wanted):
            waiting = [*names]
            while waiting:
                maker = self.maker.get(waiting.pop())
                if maker is not None and maker not in found and maker not in self.fixed:
                    found[maker] = stage
                    waiting += self.uses[maker]
        lengths: set[int] = set()
        for place in self.order:
            if place not in found:
                continue
            tied = [name for name in self.uses[place] if name in self.together and self._moves(name)]
            moving = [self.maker.get(name) for name in self.uses[place] if self._moves(name)]
            if self.ops[place] in SHAPES or (moving and lengths.issuperset(moving)):
                # Lengths are small, and would hold on to the value that they are taken of.
                lengths.add(place)
                found[place] = max((found[maker] for maker in moving if maker is not None), default=0)
            if tied:
                makers = [
                    found[self.maker[name]] for name in self.uses[place] if self._moves(name) and name in self.maker
                ]
                found[place] = max(makers)
                if any(found[self.maker[name]] != found[place] for name in tied if name in self.maker):
                    raise CannotRunError(f"{tied[0]} is a list of tensors that lives on past a norm")
        return found

    def _with_fixed(self, names: Iterable[str]) -> set[int]:
        """The fixed nodes behind some values."""
        found: set[int] = set()
        waiting = [*names]
        while waiting:
            maker = self.maker.get(waiting.pop())
            if maker is not None and maker in self.fixed and maker not in found:
                found.add(maker)
                waiting += self.uses[maker]
        return found

    def stages(self) -> list[Stage]:
        rank = {place: index for index, place in enumerate(self.order)}
        nodes: list[list[int]] = [[] for _ in range(self.last + 1)]
        for place, stage in self.stage_of.items():
            nodes[stage].append(place)
        made: dict[str, int] = dict.fromkeys(self.inputs, -1)
        needed: dict[str, int] = {}
        """Value → the last piece that takes it; outputs beyond all pieces."""
        for stage, members in enumerate(nodes):
            for place in members:
                made.update(dict.fromkeys(self.makes[place], stage))
                for name in self.uses[place]:
                    needed[name] = max(stage, needed.get(name, -1))
        for stage, x in enumerate(self.x):  # also where nobody needs the norm
            needed[x] = max(stage, needed.get(x, -1))
        needed.update(dict.fromkeys(self.outputs, self.last + 1))
        # What is the same in every run is given where it is asked for: a norm's input, an output.
        for stage, x in enumerate(self.x):
            if not self._moves(x):
                made.setdefault(x, stage)
        for name in self.outputs:
            made.setdefault(name, self.last)
        return [self._stage(stage, sorted(members, key=rank.__getitem__), made, needed, rank)
                for stage, members in enumerate(nodes)]  # fmt: skip

    def _stage(
        self,
        stage: int,
        members: list[int],
        made: Mapping[str, int],
        needed: Mapping[str, int],
        rank: Mapping[int, int],
    ) -> Stage:
        is_last = stage == self.last
        used = list(dict.fromkeys(name for place in members for name in self.uses[place]))
        here = [name for name, place in made.items() if place == stage]
        x = "" if is_last else self.x[stage]
        gives = tuple(name for name in here if name == x or needed.get(name, -1) > stage)
        fixed = self._with_fixed([*(name for name in used if not self._moves(name)), *gives])
        return Stage(
            cut=None if is_last else self.cuts[stage],
            x=x,
            nodes=tuple(sorted({*members, *fixed}, key=rank.__getitem__)),
            takes=tuple(name for name in used if self._moves(name) and made.get(name, stage) < stage),
            norms=tuple(self.norm_at[place] for place in members if place in self.norm_at),
            gives=gives,
            keeps=frozenset(name for name, place in made.items() if place <= stage < needed.get(name, -1)),
        )


def _used(node: Any) -> Iterator[str]:
    """What a node takes: its inputs, and what its bodies take from around them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _captured(body)


def _captured(graph: Any) -> Iterator[str]:
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    own |= {name for node in graph.node for name in node.output}
    for node in graph.node:
        yield from (name for name in _used(node) if name not in own)
    yield from (value.name for value in graph.output if value.name not in own)


# models


STORED_APART = 4
"""From this IR version on a stored tensor is no input of the graph."""


def submodel(model: Any, stage: Stage, types: Mapping[str, Any], statistics: Mapping[str, tuple[str, str]]) -> Any:
    """The ModelProto of one piece. Its outputs are `stage.gives`.

    types: TypeProtos of its inputs, those of the statistics included. statistics: layer name → the names of the
    inputs that its mean and its variance are."""
    import onnx

    made = onnx.ModelProto(ir_version=max(model.ir_version, STORED_APART), producer_name="normdoctor")
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    graph = made.graph
    graph.name = "stage"
    places = {cut.node: statistics[cut.norm] for cut in stage.norms}
    for place in stage.nodes:
        node = graph.node.add()
        node.CopyFrom(model.graph.node[place])
        if place in places:
            node.input[3], node.input[4] = places[place]
    inputs = [*stage.takes, *dict.fromkeys(name for pair in places.values() for name in pair)]
    for name in inputs:
        graph.input.add(name=name, type=types.get(name))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in stage.gives)
    wanted = {name for node in graph.node for name in _used(node)} | set(stage.gives)
    wanted -= set(inputs)
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in wanted)
    graph.sparse_initializer.extend(t for t in model.graph.sparse_initializer if t.values.name in wanted)
    return made
