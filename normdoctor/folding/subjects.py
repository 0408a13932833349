"""What is folded, whatever it is stored in: a graph, a way to write a plan into it, and a way to run both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from normdoctor.flow.graph import Graph, Node
from normdoctor.flow.plan import FoldPlan
from normdoctor.folding.verify import Runnable


class Feed(NamedTuple):
    """Inputs that the original and the folded model are both given."""

    inputs: Any
    """As the subject's runnables take them."""
    words: str
    """For the report: random numbers of which shapes, or which file."""
    size: int = 0
    """How many numbers they are, where there are several choices."""
    variants: Iterable[Feed] = ()
    """Others, on which the code of a module may take another way; the proof tries them too."""


class Subject(Protocol):
    """A model that can be folded."""

    format: str
    notes: list[str]

    @property
    def graph(self) -> Graph: ...

    @property
    def evaluation(self) -> bool:
        """Whether it is meant for inference whatever its norms say: built from an architecture."""

    def refused(self, plan: FoldPlan) -> Mapping[Node, tuple[str, str]]:
        """Norms that the plan folds in a way that this kind of model cannot express, with code and sentence."""

    def feeds(self) -> Iterator[Feed]:
        """Inputs to try, one after the other until the model takes them.

        Raises UsageError or InputError for data that does not fit, CannotRunError where none can be made up."""

    def original(self) -> Runnable:
        """Raises CannotRunError where it cannot be run here."""

    def build(self, plan: FoldPlan, output: Path | None) -> Any:
        """The folded model: a file at `output` and the files it needs beside it, whole or not at all; a module where
        there is no path. `plan.new_inputs()` is gone through once; a plan without changes gives a copy."""

    def folded(self, built: Any) -> Runnable:
        """What `build` gave, ready to run."""
