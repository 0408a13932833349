"""Every exception that normdoctor raises on purpose; each carries a hint that says what to do.

Anything that is raised and is not a `NormDoctorError` is a defect of normdoctor itself and shows itself fully.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class NormDoctorError(Exception):
    """Something could not be done; `message` says what, `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.told_elsewhere = False
        """Whether another process of the same run says it to the user."""


class InputError(NormDoctorError):
    """The input is at fault: missing, damaged, hostile, or not a model that normdoctor reads."""


class RefusedError(NormDoctorError):
    """A transformation is refused because it would be wrong, or its result failed its own check."""


class UsageError(NormDoctorError):
    """An option or an argument makes no sense: an unknown rule code, a bad threshold."""


class CannotRunError(NormDoctorError):
    """A model cannot be run here: an operator without a kernel, a runtime that is not there."""


class MisfitError(CannotRunError):
    """A model runs here, but not on these inputs."""


class VerificationError(RefusedError):
    """A folded model does not compute what the original does; nothing was written. `report` has the proof."""

    def __init__(self, message: str, hint: str = "", report: Any = None) -> None:
        super().__init__(message, hint)
        self.report = report


class MissingDependencyError(NormDoctorError):
    """A package that this one job needs is not installed."""


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """The beginning of a hint: what the user may have meant by `word`, empty where nothing is near.

    >>> did_you_mean("fial-on", ["fail-on", "select"])
    'Did you mean fail-on? '
    """
    import difflib  # only ever needed on the way out

    spellings = {spelling.lower(): spelling for spelling in known}
    near = difflib.get_close_matches(word.lower(), spellings, n=count, cutoff=0.5)
    return f"Did you mean {', '.join(spellings[match] for match in near)}? " if near else ""
