"""Whether the statistics of a whole model are those of the data it was run on: one verdict over all channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from normdoctor.findings import MEASURE_ANEW
from normdoctor.layers import TRACKING_KINDS, Model, NormLayer, Vector, median
from normdoctor.measured import Drift, DriftVerdict, LayerDrift, Preprocessing
from normdoctor.rules.divergence import Shift, shift_of
from normdoctor.rules.guards import FEW
from normdoctor.rules.wording import plural

VERDICT_LIMITS: Mapping[str, float] = {"model": 1.5e-3, "deviations": 6.0, "beyond": 0.2}
"""Median divergence in nats; standard errors, and the share of channels that are further off. benchmarks/drift.md"""

PREPARED_LIMITS: Mapping[str, float] = {"given": 0.01, "better": 10.0, "explained": 0.05}
"""Divergence at the first norm from which the preparation of the data is doubted; how many times another must be
better, and how close to the buffers it must come."""

WORST_SHOWN = 5
TOO_LITTLE = 32
"""Samples below which layers are not judged by themselves."""

MEANINGS = {
    DriftVerdict.HEALTHY: "The stored statistics are those of this data.",
    DriftVerdict.NOISY: "The stored statistics are off by no more than averages over so few values are: momentum is "
    "large or the batches were small. Measured anew they lose that noise.",
    DriftVerdict.STALE: "The stored statistics are not those of this data: they do not belong to these weights, or "
    "the moving average lags behind weights that still moved, or the model was trained on other data. If this is the "
    "data the model is for, measure them anew.",
}


def drift_of(
    model: Model,
    limits: Mapping[str, float],
    train_batch: int | None = None,
    prepared_limits: Mapping[str, float] = PREPARED_LIMITS,
) -> Drift | None:
    """Compare all layers that were measured; None where the model has no statistics or was not run on data.

    limits: those of D603; prepared_limits: those of D608. The command still has its placeholders."""
    seen = model.measurement
    if seen is None or not any(_has_statistics(layer) for layer in model.layers):
        return None
    better = better_prepared(seen.preprocessing, prepared_limits)
    shifts = {layer: shift for layer in model.layers if (shift := shift_of(layer, train_batch)) is not None}
    divergence, noise = _middle([s.divergence for s in shifts.values()]), _middle([s.noise for s in shifts.values()])
    tested = [np.full(len(s.channels), np.nan) if s.tested is None else s.tested for s in shifts.values()]
    beyond = _beyond(np.concatenate(tested) if tested else np.empty(0), limits["deviations"])
    doubt = _doubt(model, shifts, divergence, noise, limits, better)
    verdict = DriftVerdict.UNKNOWN if doubt else _verdict(divergence or 0.0, noise or 0.0, beyond, limits)
    rows = [row for layer, shift in shifts.items() if (row := _row(layer, shift, limits["deviations"])) is not None]
    return Drift(
        data=seen.data,
        samples=seen.samples,
        batches=seen.batches,
        verdict=verdict,
        meaning=doubt or MEANINGS[verdict],
        command=MEASURE_ANEW if verdict in (DriftVerdict.STALE, DriftVerdict.NOISY) else "",
        divergence=divergence,
        noise=noise,
        beyond=beyond,
        layers=tuple(sorted(rows, key=lambda row: -row.divergence)),
        left=dict(seen.left) | dict(_nothing_left(shifts)),
        disagreement=seen.disagreement,
        output_change=seen.output_change,
        accuracy=seen.accuracy,
        prepared="" if better is None else better.words,
    )


def _has_statistics(layer: NormLayer) -> bool:
    return layer.kind in TRACKING_KINDS and layer.running_mean is not None and layer.running_var is not None


def _verdict(divergence: float, noise: float, beyond: float | None, limits: Mapping[str, float]) -> DriftVerdict:
    """Stale where the divergence is above its limit beyond what measuring adds, and too many channels are further
    off than a healthy moving average can be."""
    if divergence - noise <= limits["model"]:
        return DriftVerdict.HEALTHY
    if beyond is not None and beyond <= limits["beyond"]:
        return DriftVerdict.NOISY
    return DriftVerdict.STALE


def _doubt(
    model: Model,
    shifts: Mapping[NormLayer, Shift],
    divergence: float | None,
    noise: float | None,
    limits: Mapping[str, float],
    better: Preprocessing | None,
) -> str:
    """Why no verdict can be given; empty where it can."""
    if model.untrained:
        return "The model was never trained (S100), so it has no statistics yet."
    counted, broken = sum(len(s.channels) for s in shifts.values()), sum(s.broken for s in shifts.values())
    if broken > counted:
        return (
            "Most channels cannot be compared: their buffers, or the inputs that come out of layers before them, "
            "are not finite. Repair what S101 and S102 name first."
        )
    if divergence is None or noise is None or counted < FEW:
        return f"Only {plural(counted, 'channel')} with statistics could be compared: too few for a verdict."
    if better is not None:
        return (
            f"The data does not seem to be prepared as for training: otherwise ({better.words}) it would fit the first "
            "norm. Prepare it like that before anything is said about the statistics."
        )
    if noise > limits["model"] and divergence < limits["model"] + 3 * noise:
        return (
            "Too little data: what measuring on so few samples adds is as large as the difference. Give more samples."
        )
    return ""


def better_prepared(tried: tuple[Preprocessing, ...], limits: Mapping[str, float]) -> Preprocessing | None:
    """What fits the first norm far better than the data as it was given; None where that fits, or nothing does."""
    if len(tried) < 2:
        return None
    given, best = tried[0], min(tried[1:], key=lambda one: one.divergence)
    doubtful = given.divergence > limits["given"] and best.divergence < limits["explained"]
    return best if doubtful and given.divergence > limits["better"] * best.divergence else None


def effective_values(layer: NormLayer) -> float | None:
    """How many independent values of a channel there were, median; at least one for each sample."""
    seen = layer.measured
    if seen is None:
        return None
    known = np.empty(0) if seen.effective is None else seen.effective[np.isfinite(seen.effective)]
    return median(known) if known.size else float(seen.samples)


def _row(layer: NormLayer, shift: Shift, deviations: float) -> LayerDrift | None:
    if not len(shift.channels):
        return None
    worst = np.argsort(-shift.divergence, kind="stable")[:WORST_SHOWN]
    return LayerDrift(
        layer=layer.name,
        channels=len(shift.channels),
        broken=shift.broken,
        divergence=median(shift.divergence),
        divergence_p95=quantile(shift.divergence, 0.95),
        shift=median(shift.z),
        shift_p95=quantile(shift.z, 0.95),
        ratio=float(np.exp(min(median(shift.log_ratio), 700.0))),
        beyond=None if shift.tested is None else _beyond(shift.tested, deviations),
        effective=effective_values(layer),
        worst=tuple(int(channel) for channel in shift.channels[worst]),
    )


def quantile(values: Vector, share: float) -> float:
    """The value at this share of the way from the smallest to the largest, one of them."""
    place = int(share * (len(values) - 1))
    return float(np.partition(values, place)[place])


def _middle(parts: list[Vector]) -> float | None:
    values = np.concatenate(parts) if parts else np.empty(0)
    return median(values) if values.size else None


def _beyond(tested: Vector, deviations: float) -> float | None:
    known = tested[~np.isnan(tested)]
    return float(np.mean(known > deviations)) if known.size else None


def _nothing_left(shifts: Mapping[NormLayer, Shift]) -> Iterator[tuple[str, str]]:
    for layer, shift in shifts.items():
        if not len(shift.channels):
            yield layer.name, "no channel has finite statistics and inputs, and carries signal"
