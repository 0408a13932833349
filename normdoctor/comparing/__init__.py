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
    MissingLayer,
    Motion,
    Side,
    WeightsChange,
)
from normdoctor.comparing.changes import layer_change
from normdoctor.comparing.matching import Foldable, Matches, biases, match
from normdoctor.comparing.parts import Part, any_two, whole, within
from normdoctor.comparing.weights import weights_change
from normdoctor.errors import InputError, NormDoctorError
from normdoctor.layers import Checkpoint, NormLayer
from normdoctor.readers import open_checkpoint

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
    missing, folded = _missing(earlier, later, matches)
    if not matches.pairs and (not missing or any(one.reason is None for one in missing)):
        raise _nothing_in_common(earlier, later)
    rows = tuple(layer_change(pair, eps) for pair in matches.pairs)
    before, after = (matches.renamed(side, part.others) for side, part in enumerate((earlier, later)))
    # A fold writes the norm into these.
    weights = weights_change(
        {name: ref for name, ref in before.items() if name.rpartition(".")[0] not in folded}, after, thorough=thorough
    )
    return Comparison(
        kind=kind,
        sides=(earlier.side, later.side),
        layers=rows,
        missing=missing,
        weights=weights,
        notes=tuple(_notes(earlier.side, later.side, rows)),
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
    sides = tuple(part.side for part in parts)
    return Comparison(kind=ComparisonKind.RANKS, sides=sides, layers=tuple(rows.values()), missing=(), weights=first)


def ranks_compared(paths: Sequence[Path], eps: float | None = None) -> Comparison | None:
    """`of_ranks` of files; None also where one of them cannot be read or is another network."""
    with ExitStack() as stack:
        try:
            return of_ranks([whole(stack.enter_context(open_checkpoint(path))) for path in paths], eps)
        except NormDoctorError:
            return None


def _missing(earlier: Part, later: Part, matches: Matches) -> tuple[tuple[MissingLayer, ...], frozenset[str]]:
    """The norms that only one side has, with the reason where one is known, and the layers that they went into."""
    missing, folded = [], set()
    for side, (owner, other) in enumerate(((earlier, later), (later, earlier))):
        spare = biases(other)
        spare.subtract(biases(owner))
        paths = dict(zip(map(id, owner.layers), owner.paths, strict=True))
        mine = replace(owner, tensors=matches.renamed(side, owner.tensors))
        theirs = replace(other, tensors=matches.renamed(1 - side, other.tensors))
        foldable = Foldable(mine)
        # Where a norm's tensors are still there it was not folded, but is no norm to the reader any more.
        parents = {name.rpartition(".")[0] for name in theirs.tensors}
        for layer in matches.only[side]:
            path = paths[id(layer)].removeprefix(matches.prefixes[side])
            into = foldable.into(path, layer.channels, theirs)
            reason = None
            if into is not None:
                reason = f"folded into {into}"
                folded.add(into)
            elif spare[layer.channels] > 0 and path not in parents:
                reason = "probably folded (new bias of that length)"
            if reason is not None:
                spare[layer.channels] -= 1
            missing.append(
                MissingLayer(layer=layer.name, kind=layer.kind.value, channels=layer.channels, side=side, reason=reason)
            )
    return tuple(missing), frozenset(folded)


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


def _notes(earlier: Side, later: Side, rows: Sequence[LayerChange]) -> Iterable[str]:
    """What a reader of the numbers has to know, in sentences."""
    by_values = [row for row in rows if row.matched is Matching.VALUES]
    by_order = [row for row in rows if row.matched is Matching.ORDER]
    for found, how in ((by_values, "equal values"), (by_order, "their place and near values")):
        if found:
            example = f"{found[0].other} is {found[0].layer}"
            count = "1 layer has" if len(found) == 1 else f"{len(found):,} layers have"
            yield f"{count} another name and went together by {how}: {example}"
    backwards = [row for row in rows if row.steps is not None and row.steps < 0]
    if backwards and earlier.averaged is None and later.averaged is None:
        yield (
            f"{later.label} has seen fewer batches than {earlier.label}: the changes read from the later state of the "
            "training to the earlier"
        )
