"""Files that the processes of one training wrote, told by their names: rank_0.pt, epoch3_rank1.pt, rank2/model.pt."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

RANK = re.compile(r"^(?P<head>|.*[^A-Za-z])(?:rank|worker|proc)[_-]?(?P<number>\d{1,6})(?P<tail>\D.*|)$", re.IGNORECASE)
PARTS = re.compile(r"(^|[_-])(mp|tp|pp|ep|cp|zero|shard|model|tensor|pipeline|expert)[_-]?$", re.IGNORECASE)
"""What stands in front where a rank holds a part of the model: mp_rank_00, zero_pp_rank_0."""

MAX_RANKS = 64
"""More ranks of one run than these are not opened: the first tell enough."""


def rank_of(path: Path) -> tuple[tuple[str, ...], int] | None:
    """What is the same for all ranks of a run, and the number of this one; None where no name says a rank."""
    for place, name in ((0, path.name), (1, path.parent.name)):
        found = RANK.match(name)
        if found is not None and not PARTS.search(found["head"]):
            home = path.parent if place == 0 else path.parent.parent
            run = (str(home), str(place), found["head"], found["tail"], path.name if place else "")
            return run, int(found["number"])
    return None


def rank_groups(paths: Iterable[Path]) -> list[list[Path]]:
    """The files of each run of which there are two ranks or more, in the order of their ranks."""
    runs: dict[tuple[str, ...], dict[int, Path]] = defaultdict(dict)
    for path in paths:
        found = rank_of(path)
        if found is not None:
            runs[found[0]].setdefault(found[1], path)
    return [[run[number] for number in sorted(run)][:MAX_RANKS] for run in runs.values() if len(run) > 1]
