"""The graphs of an ONNX file as names see them: each value belongs to the graph that defines it."""

from __future__ import annotations

from dataclasses import dataclass, field

from normdoctor.readers.onnx_records import Document, Graph


@dataclass(eq=False)
class Frame:
    """The main graph or a body, and the graph around it."""

    graph: Graph
    parent: Frame | None = None
    defined: set[str] = field(default_factory=set)
    given_out: set[str] = field(default_factory=set)
    """Values that leave this graph, or a body in it."""

    def find(self, name: str) -> Key:
        """The value that `name` means here. One that nothing defines is taken for one of this graph."""
        frame: Frame | None = self
        while frame is not None:
            if name in frame.defined:
                return frame, name
            frame = frame.parent
        return self, name

    def promises(self, name: str) -> bool:
        """Whether somebody outside the graph counts on that name."""
        return name in self.given_out

    def hides(self) -> set[str]:
        """Names of a graph around this one that mean something else here. onnx's checker forbids it."""
        found: set[str] = set()
        frame = self.parent
        while frame is not None:
            found |= self.defined & frame.defined
            frame = frame.parent
        return found

    @property
    def names(self) -> set[str]:
        """Every name that is written in this graph."""
        nodes = self.graph.nodes
        return {*self.defined, *self.graph.outputs, *(name for node in nodes for name in node.inputs)}


Key = tuple[Frame, str]
"""A value: the graph that defines it, and its name there."""


def frames_of(document: Document) -> list[Frame]:
    """The main graph and all bodies in it, outer ones first. Local functions are left out."""
    frames: list[Frame] = []
    pending: list[tuple[Graph, Frame | None]] = [(document.graph, None)]
    while pending:
        graph, parent = pending.pop(0)
        frame = Frame(graph, parent)
        frame.defined = {*graph.inputs, *graph.tensors, *(name for node in graph.nodes for name in node.outputs)} - {""}
        frames.append(frame)
        for node in graph.nodes:
            for attribute in document.attributes(node).values():
                pending += [(body, frame) for body in attribute.graphs]
    for frame in frames:
        for name in frame.graph.outputs:
            owner, own = frame.find(name)
            owner.given_out.add(own)
    return frames
