"""normdoctor: inspect, judge and repair the normalisation layers of trained models.

    import normdoctor as nd
    report = nd.inspect("model.pt")
    report.findings

Importing this package imports neither torch nor onnx; each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normdoctor.compared import Comparison, LayerChange
    from normdoctor.comparison import compare
    from normdoctor.errors import (
        CannotRunError,
        InputError,
        MissingDependencyError,
        NormDoctorError,
        RefusedError,
        UsageError,
        VerificationError,
    )
    from normdoctor.findings import Failure, Finding, LayerIgnore, Report, Rule, Severity, Skip, Survey
    from normdoctor.folding import fold
    from normdoctor.folding.records import Folding, FoldReport
    from normdoctor.inspection import inspect, survey
    from normdoctor.layers import ArrayRef, Checkpoint, Model, NormKind, NormLayer
    from normdoctor.measured import Drift, DriftVerdict, LayerDrift
    from normdoctor.readers import open_checkpoint
    from normdoctor.readers.folders import Discovery, find_checkpoints
    from normdoctor.recalibration import Recalibration, recalibrate
    from normdoctor.rules import RULES

__version__ = "0.1.0"

_HOMES = {
    "Comparison": "compared",
    "LayerChange": "compared",
    "compare": "comparison",
    "CannotRunError": "errors",
    "InputError": "errors",
    "MissingDependencyError": "errors",
    "NormDoctorError": "errors",
    "RefusedError": "errors",
    "UsageError": "errors",
    "VerificationError": "errors",
    "Failure": "findings",
    "Finding": "findings",
    "LayerIgnore": "findings",
    "Report": "findings",
    "Rule": "findings",
    "Severity": "findings",
    "Skip": "findings",
    "Survey": "findings",
    "fold": "folding",
    "FoldReport": "folding.records",
    "Folding": "folding.records",
    "inspect": "inspection",
    "survey": "inspection",
    "ArrayRef": "layers",
    "Checkpoint": "layers",
    "Model": "layers",
    "NormKind": "layers",
    "NormLayer": "layers",
    "Drift": "measured",
    "DriftVerdict": "measured",
    "LayerDrift": "measured",
    "open_checkpoint": "readers",
    "Discovery": "readers.folders",
    "find_checkpoints": "readers.folders",
    "Recalibration": "recalibration",
    "recalibrate": "recalibration",
    "RULES": "rules",
}

__all__ = [
    "RULES",
    "ArrayRef",
    "CannotRunError",
    "Checkpoint",
    "Comparison",
    "Discovery",
    "Drift",
    "DriftVerdict",
    "Failure",
    "Finding",
    "FoldReport",
    "Folding",
    "InputError",
    "LayerChange",
    "LayerDrift",
    "LayerIgnore",
    "MissingDependencyError",
    "Model",
    "NormDoctorError",
    "NormKind",
    "NormLayer",
    "Recalibration",
    "RefusedError",
    "Report",
    "Rule",
    "Severity",
    "Skip",
    "Survey",
    "UsageError",
    "VerificationError",
    "__version__",
    "compare",
    "find_checkpoints",
    "fold",
    "inspect",
    "open_checkpoint",
    "recalibrate",
    "survey",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'normdoctor' has no attribute {name!r}")
    value = getattr(import_module(f"normdoctor.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
