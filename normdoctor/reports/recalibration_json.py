"""A recalibration as JSON: strict, of a shape that is frozen for each SCHEMA_VERSION (fields may be added within one).

One shape for repairs with data and one for `debias`, told apart by "method"; source, method, layers, left, summary,
notes, dry_run, output and backup are in both. Numbers that are NaN or infinite are null, and "not_finite" beside them
says which they were."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from normdoctor.recalibration.debias import Repair
from normdoctor.recalibration.judging import Accuracy, Entropy, Judgement
from normdoctor.recalibration.records import DebiasReport, LayerChange, MeasuredReport
from normdoctor.reports.json import plain
from normdoctor.reports.recalibration_extent import (
    broken_channels,
    extent_of,
    is_little,
    known_values,
    median_layer,
    scarce_layers,
    worst_first,
)
from normdoctor.reports.recalibration_wording import median_variances

SCHEMA_VERSION = 1


def render(report: DebiasReport | MeasuredReport) -> str:
    """The whole report as one JSON document."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "source": report.source,
        "method": report.method,
        **(_debias(report) if isinstance(report, DebiasReport) else _measured(report)),
        "notes": list(report.notes),
        "dry_run": isinstance(report, MeasuredReport) and report.dry_run,
        "output": report.output,
        "backup": report.backup,
    }
    return json.dumps(plain(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _measured(report: MeasuredReport) -> dict[str, Any]:
    return {
        "format": report.format,
        "prior": report.prior,
        "data": {
            "words": report.data,
            "options": report.options,
            "samples": report.samples,
            "batches": report.batches,
            "stopped_early": report.stopped_early,
            "seconds": report.seconds,
        },
        "layers": [_layer(row) for row in report.rows],
        "left": [{"layer": name, "reason": reason} for name, reason in report.left.items()],
        "summary": _summary(report),
        "judgement": None if report.judgement is None else _judgement(report.judgement),
        "findings": [
            {
                "code": finding.code,
                "name": finding.name,
                "severity": str(finding.severity),
                "message": finding.message,
                "evidence": dict(finding.evidence),
                "fix": finding.fix,
            }
            for finding in report.findings
        ],
    }


def _layer(row: LayerChange) -> dict[str, Any]:
    """The fields of the record under their own names."""
    return _finite(asdict(row))


def _summary(report: MeasuredReport) -> dict[str, Any]:
    """changed: nothing, little, some layers or much, by the medians of layers; fewest_values: of a channel."""
    rows = report.rows
    shift, ratio = median_layer(rows) if rows else (None, None)
    known = known_values(rows).values()
    return _finite(
        {
            "layers": len(rows),
            "left": len(report.left),
            "broken_channels": broken_channels(rows),
            "changed": extent_of(rows).value.replace(" ", "_"),
            "changed_layers": sum(not is_little(row) for row in rows),
            "median_shift": shift,
            "median_ratio": ratio,
            "furthest_layer": worst_first(rows)[0].layer if rows else None,
            "fewest_values": min(known) if known else None,
            "layers_with_too_little_data": scarce_layers(rows),
        }
    )


def _judgement(judgement: Judgement) -> dict[str, Any]:
    return {
        "samples": judgement.samples,
        "scores": judgement.scores,
        "why_no_scores": judgement.why_no_scores or None,
        "accuracy": None if judgement.accuracy is None else _accuracy(judgement.accuracy),
        "entropy": None if judgement.entropy is None else _entropy(judgement.entropy),
        "agreement": judgement.agreement,
        "output_change": judgement.output_change,
        "broken_before": judgement.broken_before,
        "broken_after": judgement.broken_after,
    }


def _accuracy(accuracy: Accuracy) -> dict[str, Any]:
    """Shares from 0 to 1; the error is of after - before."""
    return {
        **asdict(accuracy),
        "standard_error": accuracy.standard_error,
        "p_value": accuracy.p_value,
        "verdict": accuracy.verdict.name.lower(),
    }


def _entropy(entropy: Entropy) -> dict[str, Any]:
    return {"before": entropy.before, "after": entropy.after, "change_percent": entropy.change}


def _debias(report: DebiasReport) -> dict[str, Any]:
    return {
        "layers": [_repair(repair) for repair in report.repairs],
        "left": [{"layer": entry.layer.name, "reason": entry.reason} for entry in report.untouched],
        "summary": {"layers": len(report.repairs), "left": len(report.untouched)},
        "recognisable": report.recognisable,
    }


def _repair(repair: Repair) -> dict[str, Any]:
    before, after = median_variances(repair)
    return _finite(
        {
            "layer": repair.layer.name,
            "channels": repair.layer.channels,
            "residue": repair.residue,
            "momentum": repair.momentum,
            "updates": repair.updates,
            "counter": repair.counter,
            "median_var_before": before,
            "median_var_after": after,
        }
    )


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with null for numbers that JSON does not have; those under "not_finite" by name, as words."""
    floats = {name: value for name, value in values.items() if isinstance(value, float)}
    odd = {name: str(float(value)) for name, value in floats.items() if not math.isfinite(value)}
    return {**values, **dict.fromkeys(odd), "not_finite": odd}
