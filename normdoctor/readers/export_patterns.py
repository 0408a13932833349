"""Norms that an exported program writes out in plain arithmetic: what the nodes of a module say about them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import cast

from normdoctor.readers.arrays import MAX_ELEMENTS
from normdoctor.readers.export_graph import Node, Program

ROOTS = ("rsqrt", "sqrt", "pow")
MEANS = ("mean", "var", "var_mean")
MAX_EPS = 0.1
"""What is added in front of a root and is larger is no eps."""


def bounded(lengths: list[int | None]) -> int:
    """Their product; 0 where one is unknown or it is no layer's."""
    if not lengths or any(length is None or not 0 < length <= MAX_ELEMENTS for length in lengths):
        return 0
    width = math.prod(cast(list[int], lengths))
    return width if width <= MAX_ELEMENTS else 0


def literal(node: Node) -> float | None:
    """The number that an addition adds."""
    number = node.number("other")
    return node.number("self") if number is None else number


@dataclass
class WrittenOut:
    """What the nodes of one module say about a norm in them."""

    eps: set[float] = field(default_factory=set)
    width: int = 0
    rms: bool = False
    """The mean of squares, of values whose own mean stays in them."""
    adds_one: bool = False


def written_out(program: Program) -> dict[str, WrittenOut]:
    """Paths of modules that divide by the root of a mean square or variance plus a small number."""
    found: dict[str, WrittenOut] = defaultdict(WrittenOut)
    for node in program.nodes:
        if node.operator not in ROOTS or (node.operator == "pow" and abs(node.number("exponent") or 0) != 0.5):
            continue
        adder = node.graph.producer(node.tensor("self"))
        if adder is None or adder.operator != "add":
            continue
        eps, value = literal(adder), adder.tensor("self") or adder.tensor("other")
        mean = node.graph.producer(node.graph.origin(value))
        if eps is None or not 0 < eps < MAX_EPS:
            continue
        if mean is None and node.graph.parameter(value) is not None:
            found[node.module[0]].eps.add(eps)  # a stored variance: FrozenBatchNorm2d
        elif mean is not None and mean.operator in MEANS:
            entry = found[node.module[0]]
            entry.eps.add(eps)
            entry.width = entry.width or bounded(mean.graph.shape(mean.tensor("self"))[-1:])
            entry.rms = entry.rms or (mean.operator == "mean" and not _centred(mean))
    for node in program.nodes:
        if node.operator == "add" and node.module[0] in found and literal(node) == 1:
            value = node.tensor("self") or node.tensor("other")
            if node.graph.parameter(value) is not None:
                found[node.module[0]].adds_one = True
    return dict(found)


def _centred(mean: Node) -> bool:
    """Whether something was subtracted from what is squared and averaged: a variance written out as well."""
    square = mean.graph.producer(mean.tensor("self"))
    base = None if square is None else square.graph.producer(square.graph.origin(square.tensor("self")))
    return base is not None and base.operator == "sub"
