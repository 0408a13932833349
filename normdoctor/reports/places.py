"""Where a norm stands, in words and for JSON: the same in every report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from normdoctor.layers import NormLayer, Vector
from normdoctor.places import Fate, Neighbour, Prediction, Verdict
from normdoctor.reports.wording import short
from normdoctor.rules.prediction import ALIKE, agreement

DIGITS = 7
"""Of numbers per channel in JSON: what a float32 holds."""

NAMED = 2
"""Layers that a reason names."""

BENT = 0.25
"""Further from 1 a slope of stored against predicted means is told."""

BRIEF = {Verdict.BACKWARD.value: "back", Verdict.FORWARD.value: "forward"}


def fed_by(layer: NormLayer) -> str:
    """What goes into a norm, innermost first as it is computed: relu(addition); conv1? where it is only guessed."""
    place = layer.place
    if place is None:
        return ""
    words = ""
    for neighbour in reversed(place.before):
        words = f"{_name(neighbour)}({words})" if words else _name(neighbour)
    return f"{words}?" if place.inferred and words else words


def feeds(layer: NormLayer) -> str:
    """What takes its output."""
    return "" if layer.place is None else ", ".join(dict.fromkeys(map(_name, layer.place.after)))


def fold_of(layer: NormLayer) -> str:
    """What `fold` would do to it: into conv1, or why it stays."""
    fate = None if layer.place is None else layer.place.fate
    if fate is None:
        return ""
    if fate.verdict == Verdict.LEFT.value:
        return f"stays ({fate.code})"
    return f"into {', '.join(fate.into)}" if fate.into else fate.verdict


def fold_in_brief(layer: NormLayer) -> str:
    """The same in a word: back, forward, merged, or why it stays."""
    fate = None if layer.place is None else layer.place.fate
    if fate is None:
        return ""
    gain = None if layer.place is None else layer.place.gain_fate
    if gain is not None and gain.verdict != Verdict.LEFT.value:
        return "gain: --layernorm"
    return f"stays: {fate.code}" if fate.verdict == Verdict.LEFT.value else BRIEF.get(fate.verdict, fate.verdict)


def predicted(layer: NormLayer) -> str:
    """How running_mean agrees with what the norms before it give: the median distance in standard deviations where no
    activation lies between, else the correlation over the channels, with the slope where it is far from 1. A dash
    where nothing could be compared."""
    place = layer.place
    if place is None or layer.running_mean is None:
        return ""
    found = agreement(layer)
    if found is None:
        return "-"
    words = f"{short(found.shift)} s.d." if found.prediction.exact else f"r {found.correlation:.2f}"
    bent = found.prediction.sized and found.correlation >= ALIKE and abs(found.slope - 1) > BENT
    return f"{words} x {found.slope:.2f}" if bent else words


def why_unpredicted(layers: Iterable[NormLayer]) -> str:
    """Why no mean was predicted for some, with the first layers of each reason; empty where there is none."""
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if layer.place is not None and layer.running_mean is not None and layer.place.unpredicted:
            reasons.setdefault(layer.place.unpredicted, []).append(layer.name)
    parts = []
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        more = f", {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts.append(f"{reason} ({', '.join(names[:NAMED])}{more})")
    return "; ".join(parts)


def _name(neighbour: Neighbour) -> str:
    if neighbour.op in ("input", "output"):
        return neighbour.op
    return neighbour.activation or neighbour.label or neighbour.op


def place_in_json(layer: NormLayer) -> dict[str, Any] | None:
    """The fields of the record; means per channel, predicted and as they are stored."""
    place = layer.place
    if place is None:
        return None
    producer, activation = place.producer, place.activation
    return {
        "inferred": place.inferred,
        "calls": place.calls,
        "before": [_neighbour(one) for one in place.before],
        "after": [_neighbour(one) for one in place.after],
        "producer": None
        if producer is None
        else {**_neighbour(producer.neighbour), "alone": producer.alone, "bias": producer.bias is not None},
        "activation": None
        if activation is None
        else {
            "name": activation.name,
            "low": _bound(activation.low),
            "high": _bound(activation.high),
            "label": activation.label,
        },
        "positions": place.positions,
        "joins_branches": place.joins_branches,
        "padded": list(place.padded),
        "dropouts": [{"label": label, "probability": probability} for label, probability in place.dropouts],
        "fold": _fate(place.fate),
        "fold_layernorm": _without_count(_fate(place.gain_fate)),
        "prediction": None if place.prediction is None else _prediction(place.prediction, layer),
        "unpredicted": place.unpredicted or None,
    }


def _neighbour(neighbour: Neighbour) -> dict[str, Any]:
    return {
        "op": neighbour.op,
        "written": neighbour.written,
        "label": neighbour.label,
        "activation": neighbour.activation or None,
    }


def _bound(value: float) -> float | None:
    """None where there is none."""
    return value if math.isfinite(value) else None


def _fate(fate: Fate | None) -> dict[str, Any] | None:
    if fate is None:
        return None
    return {
        "verdict": fate.verdict,
        "code": fate.code or None,
        "reason": fate.reason or None,
        "into": list(fate.into),
        "saved": fate.saved,
    }


def _without_count(fate: dict[str, Any] | None) -> dict[str, Any] | None:
    """How many numbers a moved gain saves is known once the weights are written: a bias may have to be added."""
    return None if fate is None else {name: value for name, value in fate.items() if name != "saved"}


def _prediction(prediction: Prediction, layer: NormLayer) -> dict[str, Any]:
    return {
        "predicted": _rounded(prediction.mean),
        "stored": _rounded(layer.numbers.mean),
        "bias": _rounded(prediction.bias),
        "exact": prediction.exact,
        "even": prediction.even,
        "sized": prediction.sized,
        "sources": list(prediction.sources),
        "through": list(prediction.through),
    }


def _rounded(values: Vector | None) -> list[float] | None:
    return None if values is None else [float(f"{value:.{DIGITS}g}") for value in values]
