"""The JSON report: a published shape of its own, strict JSON, the same order every time.

The shape is frozen for each SCHEMA_VERSION; fields may be added within a version, none changes or goes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from enum import Enum
from typing import Any

import numpy as np

from normdoctor.compared import Comparison
from normdoctor.findings import Finding, Report, Severity, Skip, Survey
from normdoctor.layers import NormLayer, median
from normdoctor.measured import Drift
from normdoctor.reports.places import place_in_json

SCHEMA_VERSION = 1


def render(survey: Survey) -> str:
    """The whole survey as one JSON document."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "files": [_file(report) for report in survey.reports],
        "failed": [{"path": f.path, "message": f.message, "hint": f.hint} for f in survey.failures],
        "fixed": list(survey.fixed),
        "summary": _summary(survey),
    }
    return json.dumps(plain(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _file(report: Report) -> dict[str, Any]:
    return {
        "path": report.path,
        "format": report.format,
        "bytes_read": report.bytes_read,
        "bytes_total": report.bytes_total,
        "layers": [_layer(layer) for layer in report.layers],
        "findings": [_finding(finding) for finding in report.findings],
        "skips": [_skip(skip) for skip in report.skips],
        "assumed": dict(report.assumed),
        "notes": list(report.notes),
        "near_misses": [
            {"name": miss.name, "shape": list(miss.shape), "reason": miss.reason} for miss in report.near_misses
        ],
        "drift": None if report.drift is None else drift_of(report.drift),
        "comparison": None if report.comparison is None else comparison_of(report.comparison),
    }


def drift_of(drift: Drift) -> dict[str, Any]:
    """The fields of the record under their own names; KL in nats, shifts in standard deviations."""
    return {
        **{entry.name: getattr(drift, entry.name) for entry in fields(drift)},
        "verdict": drift.verdict.value,
        "layers": [asdict(row) for row in drift.layers],
    }


def comparison_of(comparison: Comparison) -> dict[str, Any]:
    """The fields of the record under their own names; KL in nats, shifts in standard deviations."""
    document: dict[str, Any] = _words(asdict(comparison))
    for row, change in zip(document["layers"], comparison.layers, strict=True):
        row["steps"] = change.steps
    return document


def _words(value: Any) -> Any:
    """`value` with the words of its enumerations."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {name: _words(inner) for name, inner in value.items()}
    return [_words(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _layer(layer: NormLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind.value,
        "origin": layer.origin,
        "channels": layer.channels,
        "groups": layer.groups,
        "eps": layer.eps,
        "momentum": layer.momentum,
        "training": layer.training,
        "affine": layer.affine,
        "track_running_stats": layer.track_running_stats,
        "zero_centred": layer.zero_centred,
        "num_batches_tracked": updates_of(layer),
        "aliases": list(layer.aliases),
        "stats": statistics_of(layer),
        "dtypes": {
            name: ref.dtype
            for name in ("weight", "bias", "running_mean", "running_var", "alpha")
            if (ref := getattr(layer, name)) is not None
        },
        "place": place_in_json(layer),
    }


def updates_of(layer: NormLayer) -> float | int | None:
    """num_batches_tracked, whole unless the file stores a fraction."""
    updates = layer.numbers.updates
    return int(updates) if updates is not None and updates.is_integer() else updates


def statistics_of(layer: NormLayer) -> dict[str, dict[str, Any]]:
    """What the values of each stored vector look like, by field; weight and bias as the layer applies them."""
    vectors = {
        "weight": layer.numbers.gain if layer.weight is not None else None,
        "bias": layer.numbers.shift if layer.bias is not None else None,
        "running_mean": layer.numbers.mean,
        "running_var": layer.numbers.var,
    }
    return {name: _stats(values) for name, values in vectors.items() if values is not None}


def _stats(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """Extremes, median and mean of the finite values, and how many are not finite."""
    finite = values[np.isfinite(values)]
    stats: dict[str, Any] = {"nonfinite": int(values.size - finite.size)}
    if finite.size:
        stats |= {
            "min": float(finite.min()),
            "median": median(finite),
            "mean": float(finite.mean()),
            "max": float(finite.max()),
        }
    return stats


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": str(finding.severity),
        "confidence": str(finding.confidence),
        "evidence_level": finding.evidence_level.value,
        "layer": finding.layer,
        "channels": list(finding.channels),
        "message": finding.message,
        "evidence": dict(finding.evidence),
        "assumed": dict(finding.assumed),
        "fix": finding.fix,
        "reference": finding.rule.reference,
        "fingerprint": finding.fingerprint,
        "known": finding.known,
    }


def _skip(skip: Skip) -> dict[str, Any]:
    return {"code": skip.code, "layer": skip.layer, "missing": list(skip.missing)}


def _summary(survey: Survey) -> dict[str, Any]:
    """Counts over all files; findings that the baseline knows are counted apart."""
    new = [finding for finding in survey.findings if not finding.known]
    return {
        "files": len(survey.reports),
        "failed": len(survey.failures),
        "passed_over": survey.passed_over,
        "layers": sum(len(report.layers) for report in survey.reports),
        **{str(level): sum(f.severity is level for f in new) for level in sorted(Severity, reverse=True)},
        "known": len(survey.findings) - len(new),
        "fixed": len(survey.fixed),
        "skips": sum(len(report.skips) for report in survey.reports),
        "rules": dict(sorted(Counter(finding.code for finding in new).items())),
    }


def plain(value: Any) -> Any:
    """`value` in JSON's own types. NaN and infinities, which JSON lacks, become the strings "nan", "inf"."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range, np.ndarray)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):  # lone surrogates from a pickle are no valid UTF-8
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value
