"""Processes that torchrun started together, on one machine or several."""

from __future__ import annotations

from collections.abc import Mapping

from normdoctor.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process that it starts."""


def are_several(environment: Mapping[str, str]) -> bool:
    """Whether torchrun started this process beside others.

    Raises UsageError where only a part of its variables is there, or they make no sense."""
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        return False
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        raise UsageError(f"the environment has no {', '.join(missing)}", "Start it with torchrun, or unset RANK.")
    rank, count = (environment[name] for name in VARIABLES[:2])
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise UsageError(f"RANK={rank} of WORLD_SIZE={count} makes no sense", "Start it with torchrun, or unset both.")
    return int(count) > 1
