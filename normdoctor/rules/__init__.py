"""The rules: one file per family of codes, joined here. The S family fills two files."""

from __future__ import annotations

from normdoctor.findings import Rule
from normdoctor.rules import affine, files, numerics, settings, staleness, statistics, transformers

FAMILIES = "SACNTF"
"""The families in the order in which they are listed."""

RULES: tuple[Rule, ...] = tuple(
    sorted(
        (
            *statistics.RULES,
            *staleness.RULES,
            *affine.RULES,
            *settings.RULES,
            *numerics.RULES,
            *transformers.RULES,
            *files.RULES,
        ),
        key=lambda rule: (FAMILIES.index(rule.code[0]), rule.code),
    )
)
"""Every rule there is. A code never changes its meaning and is never used again."""
