"""The comparison of several models for people: what moved in a sentence, then the layers that changed most."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from normdoctor.compared import Comparison
from normdoctor.reports.comparison import (
    COMPARISON_COLUMNS,
    changed,
    comparison_in_words,
    largest_step,
    rows_by_divergence,
    sides_in_words,
    trajectories_by_divergence,
    trajectory_of,
    weights_in_words,
)
from normdoctor.reports.terminal import print_columns, print_more, print_paragraph, wrapped

LAYERS_SHOWN = 10
INDENT = 9
MOST_STEPS = 24
"""Steps that a row of bars shows; of more, the last."""


def write(console: Console, comparison: Comparison, bars: str, *, every_layer: bool = False) -> None:
    """bars: eight characters of growing height that the stream can hold."""
    beginning = "compared "
    for line in wrapped(console, sides_in_words(comparison), INDENT):
        console.print(Text(beginning).append(line.strip(), style="bold"))
        beginning = " " * INDENT
    print_paragraph(console, comparison_in_words(comparison), INDENT)
    console.print()
    rows = rows_by_divergence(comparison)
    moved = [row for row in rows if changed(row)]
    shown = rows if every_layer else moved[:LAYERS_SHOWN]
    trajectories = {row.layer: row for row in trajectories_by_divergence(comparison)}
    columns = [(title, [cell(row) for row in shown]) for title, _, cell in COMPARISON_COLUMNS]
    columns = [column for column in columns if column[0] != "p95" or not trajectories]  # makes room for the steps
    if trajectories:
        largest = largest_step(tuple(trajectories.values()))
        title = _title(len(comparison.steps))
        drawn = [trajectory_of(trajectories.get(row.layer), bars, largest) for row in shown]
        columns.append((title, [steps[-MOST_STEPS:] for steps in drawn]))
    if shown:
        right = [title for title, side, _ in COMPARISON_COLUMNS if side == "right"]
        fixed = [title for title, _ in columns[1:]]
        print_columns(console, columns, right=right, fixed=fixed)
    if rows:
        equal = 0 if every_layer else len(rows) - len(moved)
        print_more(console, len(rows) - len(shown) - equal, "layer")
        print_more(console, equal, "equal layer")
        console.print()
    if trajectories:
        _steps(console, comparison, every_layer)


def _title(steps: int) -> str:
    return "KL by step" if steps <= MOST_STEPS else f"last {MOST_STEPS} steps"


def _steps(console: Console, comparison: Comparison, everything: bool) -> None:
    """What the other weights did from each checkpoint to the next."""
    steps: Sequence[int] = range(len(comparison.steps))
    shown = steps if everything else steps[-LAYERS_SHOWN:]
    if len(shown) < len(steps):
        print_more(console, len(steps) - len(shown), "step")
    for place in shown:
        words = weights_in_words(comparison.steps[place]).removeprefix("the other ")
        before, after = (comparison.sides[place + side].label for side in (0, 1))
        print_paragraph(console, f"step {place + 1}  {before} -> {after}: {words}", 0)
    console.print()
