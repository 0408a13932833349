"""A fold as JSON: strict, of a shape that is frozen for each SCHEMA_VERSION (fields may be added within one)."""

from __future__ import annotations

import json
from typing import Any

from normdoctor.folding.records import Difference, FoldReport, FoldRow, Overflow, Proof
from normdoctor.reports.json import plain

SCHEMA_VERSION = 1


def render(report: FoldReport) -> str:
    """The whole report as one JSON document."""
    largest = report.largest_gain
    document = {
        "schema_version": SCHEMA_VERSION,
        "source": report.source,
        "format": report.format,
        "output": report.output,
        "unchanged": report.unchanged,
        "dry_run": report.dry_run,
        "norms": [_norm(row) for row in report.rows],
        "summary": {
            "norms": len(report.rows),
            **{verdict.replace(" ", "_"): count for verdict, count in report.counts.items()},
            "parameters_before": report.parameters[0],
            "parameters_after": report.parameters[1],
            "nodes_before": report.nodes[0],
            "nodes_after": report.nodes[1],
            "largest_gain": None if largest is None else {"norm": largest.norm, "gain": largest.gain},
        },
        "copies": list(report.copies),
        "fp16_overflow": [_overflow(overflow) for overflow in report.overflows],
        "proof": _proof(report.proof),
        "notes": list(report.notes),
    }
    return json.dumps(plain(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _norm(row: FoldRow) -> dict[str, Any]:
    return {
        "norm": row.norm,
        "kind": row.kind,
        "verdict": row.verdict.replace(" ", "_"),
        "into": list(row.into),
        "through": list(row.through),
        "code": row.code or None,
        "reason": row.reason or None,
        "gain": row.gain,
    }


def _overflow(overflow: Overflow) -> dict[str, Any]:
    return {"weight": overflow.weight, "channels": list(overflow.channels), "largest": overflow.largest}


def _proof(proof: Proof) -> dict[str, Any]:
    return {
        "state": proof.state.value.replace(" ", "_"),
        "reason": proof.reason or None,
        "engine": proof.engine or None,
        "inputs": proof.inputs or None,
        "outputs": [_difference(difference) for difference in proof.differences],
        "noise_reason": proof.noise_reason or None,
        "first_norm": proof.first_norm or None,
    }


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        "output": difference.output,
        "shape": list(difference.shape),
        "dtype": difference.dtype,
        "error": difference.error,
        "noise": difference.noise,
        "channel": difference.channel,
        "ok": difference.ok,
        "note": difference.note or None,
    }
