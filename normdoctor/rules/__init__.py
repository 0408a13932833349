"""The rules: one file per family of codes, joined here in the order of their letters."""

from __future__ import annotations

from normdoctor.findings import Rule
from normdoctor.rules import affine, files, numerics, settings, statistics, transformers

RULES: tuple[Rule, ...] = (
    *affine.RULES,
    *settings.RULES,
    *files.RULES,
    *numerics.RULES,
    *statistics.RULES,
    *transformers.RULES,
)
"""Every rule there is. A code never changes its meaning and is never used again."""
