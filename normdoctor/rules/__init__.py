"""The rules, joined here: every file holds rules of one family of codes, a large family has several files."""

from __future__ import annotations

import copyreg

from normdoctor.findings import Rule
from normdoctor.rules import (
    affine,
    calibration_data,
    comparison,
    drift,
    files,
    foldability,
    following,
    forecasts,
    modes,
    neighbours,
    numerics,
    prediction,
    residue,
    settings,
    siblings,
    staleness,
    stand_ins,
    statistics,
    storage,
    token_data,
    transformers,
)

FAMILIES = "SACNGDTFX"
"""The families in the order in which they are listed."""

RULES: tuple[Rule, ...] = tuple(
    sorted(
        (
            *statistics.RULES,
            *staleness.RULES,
            *residue.RULES,
            *siblings.RULES,
            *affine.RULES,
            *forecasts.RULES,
            *settings.RULES,
            *modes.RULES,
            *storage.RULES,
            *numerics.RULES,
            *neighbours.RULES,
            *foldability.RULES,
            *prediction.RULES,
            *drift.RULES,
            *calibration_data.RULES,
            *transformers.RULES,
            *token_data.RULES,
            *stand_ins.RULES,
            *files.RULES,
            *following.RULES,
            *comparison.RULES,
        ),
        key=lambda rule: (FAMILIES.index(rule.code[0]), rule.code),
    )
)
"""Every rule there is. A code never changes its meaning and is never used again."""


def rule_of(code: str) -> Rule:
    """The rule of exactly this code."""
    return next(rule for rule in RULES if rule.code == code)


# A rule travels to another process as its code: its check goes by a name that the rule itself has taken.
copyreg.pickle(Rule, lambda rule: (rule_of, (rule.code,)))
