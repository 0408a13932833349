"""Two or more open checkpoints of one network → a Comparison of their norms, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from normdoctor.compared import (
    Comparison,
    ComparisonKind,
    LayerChange,
    Matching,
    Motion,
    Side,
    WeightsChange,
)
from normdoctor.comparing.changes import layer_change
from normdoctor.comparing.dropped import dropped_biases
from normdoctor.comparing.folds import missing_layers
from normdoctor.comparing.matching import match, odd_one
from normdoctor.comparing.parts import Part, any_two, whole, within
from normdoctor.comparing.weights import weights_change
from normdoctor.errors import InputError, NormDoctorError
from normdoctor.layers import Checkpoint, NormLayer
from normdoctor.readers import open_checkpoint

UNRELATED = 0.1
"""Cosine of the angle between two sets of weights below which they have nothing in common: -0.001 for a small net
trained from two seeds, 0.63 to 0.93 from the first to the eighth epoch of nineteen such nets."""

__all__ = ["compare_parts", "models_compared", "of_ranks", "ranks_compared", "whole", "with_comparison"]


def compare_parts(
    earlier: Part,
    later: Part,
    *,
    kind: ComparisonKind = ComparisonKind.CHECKPOINTS,
    eps: float | None = None,
    thorough: bool = True,
) -> Comparison:
    """How the later side differs from the earlier. eps: stands in where a file does not say it.

    thorough: weights whose samples agree are read to their ends.

    Raises InputError where no norm of one side is one of the other, nor explained by folding, and where namesakes
    have different numbers of channels."""
    matches = match(earlier, later)
    missing, folded = missing_layers(earlier, later, matches, eps)
    if not matches.pairs and not folded and (not missing or any(one.reason is None for one in missing)):
        raise _nothing_in_common(earlier, later)
    rows = tuple(layer_change(pair, eps) for pair in matches.pairs)
    before, after = (matches.renamed(side, part.others) for side, part in enumerate((earlier, later)))
    # A fold writes the norm into these.
    dropped = dropped_biases(earlier, later, matches, rows)
    weights = weights_change(
        {name: ref for name, ref in before.items() if name.rpartition(".")[0] not in folded and name not in dropped},
        after,
        thorough=thorough,
    )
    return Comparison(
        kind=kind,
        sides=(earlier.side, later.side),
        layers=rows,
        missing=missing,
        weights=weights,
        notes=tuple(_notes(earlier.side, later.side, rows, weights)),
        dropped_biases=dropped,
    )


def models_compared(
    checkpoint: Checkpoint, *, eps: float | None = None, thorough: bool = False, anyhow: bool = False
) -> Comparison | None:
    """The model in a file against its average in the same file; None where the file does not hold both.

    anyhow: of a file without an average, the first two models that have the same norms."""
    parts, others = within(checkpoint)
    if not parts and anyhow:
        parts = any_two(checkpoint)
    if not parts:
        return None
    found = compare_parts(parts[0], parts[1], kind=ComparisonKind.MODELS, eps=eps, thorough=thorough)
    notes = [f"not compared: {', '.join(others)}, further averages in the file"] if others else []
    return replace(found, notes=(*found.notes, *notes))


def with_comparison(checkpoint: Checkpoint, eps: float | None = None) -> Checkpoint:
    """The checkpoint with the comparison of the model and the average in it, if it holds both."""
    try:
        found = models_compared(checkpoint, eps=eps)
    except InputError as error:  # inspecting goes on without
        return replace(checkpoint, notes=(*checkpoint.notes, f"its models were not compared: {error.message}"))
    return checkpoint if found is None else replace(checkpoint, comparison=found)


def of_ranks(parts: Sequence[Part], eps: float | None = None) -> Comparison | None:
    """What the processes of one training hold, from the first to the one that differs most, layer by layer; None
    where their weights differ: then they hold parts of a model, or are no ranks of one run."""
    rows: dict[str, LayerChange] = {}
    first: WeightsChange | None = None
    for other in parts[1:]:
        pair = compare_parts(parts[0], other, kind=ComparisonKind.RANKS, eps=eps)
        if pair.weights_moved is not False or pair.missing or any(row.affine is Motion.MOVED for row in pair.layers):
            return None
        first = first or pair.weights
        for row in pair.layers:
            path = row.other
            if path not in rows or (row.divergence or 0.0) > (rows[path].divergence or 0.0) or rows[path].still:
                rows[path] = row
    return Comparison(
        kind=ComparisonKind.RANKS,
        sides=tuple(part.side for part in parts),
        layers=tuple(rows.values()),
        missing=(),
        weights=first,
        odd=odd_one(parts),
    )


def ranks_compared(paths: Sequence[Path], eps: float | None = None) -> Comparison | None:
    """`of_ranks` of files; None also where one of them cannot be read or is another network."""
    with ExitStack() as stack:
        try:
            return of_ranks([whole(stack.enter_context(open_checkpoint(path))) for path in paths], eps)
        except NormDoctorError:
            return None


def _nothing_in_common(earlier: Part, later: Part) -> InputError:
    for part in (earlier, later):
        if not part.layers:
            return InputError(
                f"{part.side.label}: no norm layers to compare", f"normdoctor inspect {part.side.label} says more."
            )
    return InputError(
        f"{earlier.side.label} and {later.side.label} have no norm layer in common "
        f"({_first(earlier.layers)} against {_first(later.layers)})",
        "Compare checkpoints of the same network.",
    )


def _first(layers: Iterable[NormLayer]) -> str:
    return ", ".join(layer.name for _, layer in zip(range(2), layers, strict=False))


def _notes(earlier: Side, later: Side, rows: Sequence[LayerChange], weights: WeightsChange | None) -> Iterable[str]:
    """What a reader of the numbers has to know, in sentences."""
    by_values = [row for row in rows if row.matched is Matching.VALUES]
    by_order = [row for row in rows if row.matched is Matching.ORDER]
    for found, how in ((by_values, "equal values"), (by_order, "their place and near values")):
        if found:
            example = f"{found[0].other} is {found[0].layer}"
            count = "1 layer has" if len(found) == 1 else f"{len(found):,} layers have"
            yield f"{count} another name and went together by {how}: {example}"
    backwards = [row for row in rows if row.steps is not None and row.steps < 0]
    averaged = earlier.averaged is not None or later.averaged is not None
    unrelated = weights is not None and weights.cosine is not None and weights.cosine < UNRELATED
    if weights is not None and unrelated and not earlier.untrained and not later.untrained:
        yield (
            f"the weights of {earlier.label} and {later.label} are no more alike than those of two unrelated trainings "
            f"(relative change {100 * weights.relative:.0f} %): what is said here holds for states of one training"
        )
    if backwards and not averaged and (weights is None or weights.motion is Motion.MOVED):
        yield (
            f"{later.label} has seen fewer batches than {earlier.label}: the changes read from the later state of the "
            "training to the earlier"
        )
