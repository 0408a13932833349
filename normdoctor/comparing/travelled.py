"""The norms of three or more checkpoints of one training, gathered step by step so that few files are open at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from normdoctor.compared import Comparison, LayerChange, Side, Trajectory, WeightsChange


class Travelled:
    """The norms over three or more checkpoints, gathered from one step after another."""

    def __init__(self) -> None:
        self.weights: list[WeightsChange | None] = []
        self.sides: list[Side] = []
        self._rows: dict[str, list[LayerChange]] = {}

    def add(self, step: Comparison) -> None:
        """The step from the last checkpoint so far to the next."""
        self.sides = [*(self.sides or step.sides[:1]), step.sides[1]]
        self.weights.append(step.weights)
        self._rows = {
            row.layer: [*self._rows.get(row.other, []), row]
            for row in step.layers
            if row.other in self._rows or len(self.weights) == 1
        }

    def over(self, whole_way: Comparison) -> Comparison:
        """The comparison of the first with the last checkpoint, with the steps between."""
        found = replace(
            whole_way,
            sides=tuple(self.sides),
            missing=tuple(replace(one, side=one.side and len(self.sides) - 1) for one in whole_way.missing),
            steps=tuple(self.weights),
            trajectories=tuple(_trajectory(name, rows) for name, rows in self._rows.items()),
        )
        falls = [f"{found.sides[place].label} -> {found.sides[place + 1].label}" for place in found.falling]
        if not falls or len(falls) == len(found.steps):  # backwards throughout: said of the whole way
            return found
        note = (
            f"the counters fall at {', '.join(falls[:3])}: give the checkpoints in the order of the training "
            "(X005, which follows it, was left out)"
        )
        return replace(found, notes=(*found.notes, note))


def _trajectory(name: str, rows: Sequence[LayerChange]) -> Trajectory:
    return Trajectory(
        layer=name,
        divergence=tuple(row.divergence for row in rows),
        still=tuple(None if row.statistics is None else row.still for row in rows),
        updates=(rows[0].updates[0], *(row.updates[1] for row in rows)),
    )
