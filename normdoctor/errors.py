"""Every exception that normdoctor raises on purpose; each carries a hint that says what to do.

Anything that is raised and is not a `NormDoctorError` is a defect of normdoctor itself and shows itself fully.
"""

from __future__ import annotations


class NormDoctorError(Exception):
    """Something could not be done; `message` says what, `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(NormDoctorError):
    """The input is at fault: missing, damaged, hostile, or not a model that normdoctor reads."""


class RefusedError(NormDoctorError):
    """A transformation is refused because it would be wrong, or its result failed its own check."""


class UsageError(NormDoctorError):
    """An option or an argument makes no sense: an unknown rule code, a bad threshold."""


class MissingDependencyError(NormDoctorError):
    """A package that this one job needs is not installed."""
