"""How far the statistics are from those of the data: the words and columns that all reports share."""

from __future__ import annotations

from collections.abc import Callable

from normdoctor.measured import Drift, LayerDrift
from normdoctor.reports.wording import percent, plural, short

DRIFT_COLUMNS: tuple[tuple[str, str, Callable[[LayerDrift], str]], ...] = (
    ("layer", "left", lambda row: row.layer),
    ("KL", "right", lambda row: short(row.divergence)),
    ("p95", "right", lambda row: short(row.divergence_p95)),
    ("z", "right", lambda row: short(row.shift)),
    ("p95", "right", lambda row: short(row.shift_p95)),
    ("var ratio", "right", lambda row: short(row.ratio)),
    ("> 6 s.e.", "right", lambda row: "" if row.beyond is None else percent(row.beyond)),
    ("values", "right", lambda row: "" if row.effective is None else f"{row.effective:,.0f}"),
    ("worst", "left", lambda row: " ".join(map(str, row.worst[:3]))),
)
"""Title, alignment, and what stands in the cell: KL and z as median and 95th percentile over channels, how many
independent values of a channel there were, and the channels that are furthest off."""


def drift_in_words(drift: Drift) -> str:
    """What the verdict rests on, in one paragraph."""
    words = f"{drift.data}: {plural(drift.samples, 'sample')} in {_batches(drift.batches)}"
    if drift.divergence is not None:
        words += f"; median KL {short(drift.divergence)} nats"
        if drift.noise is not None:
            words += f" ({short(drift.noise)} is to be expected from so many samples)"
    if drift.beyond is not None:
        words += f", {percent(drift.beyond)} of the channels beyond six standard errors"
    words += "."
    said = []
    if drift.disagreement is not None:
        said.append(f"{percent(drift.disagreement)} of the answers change")
    if drift.output_change is not None:
        said.append(f"the outputs move by {percent(drift.output_change)}")
    if said:
        words += f" With the statistics of each batch {' and '.join(said)}."
    if drift.accuracy is not None:
        words += f" {percent(drift.accuracy)} of the answers are right."
    return words


def _batches(count: int) -> str:
    return f"{count:,} batch" + ("" if count == 1 else "es")
