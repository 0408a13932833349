"""F: the file itself."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import Checkpoint, Danger
from normdoctor.rules.wording import names, plural

SEVERITY = {
    Danger.MODULE_CLASS: Severity.INFO,
    Danger.DATA_CLASS: Severity.WARNING,
    Danger.OTHER: Severity.ERROR,
}

LONGEST_SUBJECT = 200

MEANING = {
    Danger.MODULE_CLASS: "the classes that a pickled module is made of",
    Danger.DATA_CLASS: "classes of settings and records, not of a model",
    Danger.OTHER: "functions that no checkpoint needs",
}


@rule(
    "F901",
    "runs-code-on-load",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    scope=Scope.FILE,
    why="It calls whatever the file names, before any check of yours.",
    fix="from a source you trust, allow these names with torch.serialization.add_safe_globals for weights_only=True, "
    "or save the state_dict alone",
    reference="https://pytorch.org/docs/stable/notes/serialization.html",
)
def runs_code_on_load(checkpoint: Checkpoint, context: Context) -> Iterator[Observation]:
    """Loading the file with torch would call something beside torch's own rebuild functions and containers.

    A pickle is a program, and the sizes in a torch.export package are expressions that torch evaluates. Nothing
    of it was run here; these are the calls it asks for. Classes of modules are
    what a whole pickled model consists of (info). Data classes of other libraries, such as numpy scalars,
    configurations or loggers, mean that training state was saved along (warning). Anything else has no
    business in a checkpoint: os.system, eval, getattr chains, functions of torch itself that run commands
    (error; do not load such a file).

    Example: would call posix.system on torch.load.
    """
    if not checkpoint.load_calls:
        return
    groups: dict[Danger, list[str]] = {danger: [] for danger in reversed(Danger)}
    for call in checkpoint.load_calls:
        if call.name not in groups[call.danger]:
            groups[call.danger].append(call.name)
    found = {danger: listed for danger, listed in groups.items() if listed}
    worst = next(iter(found))
    said = [f"{_short(listed)} ({MEANING[danger]})" for danger, listed in found.items()]
    total = sum(map(len, found.values()))
    yield Observation(
        message=f"{checkpoint.loader} would call {plural(total, 'name')}: {'; '.join(said)}.",
        evidence={danger.name.lower(): listed for danger, listed in found.items()},
        severity=SEVERITY[worst],
        fix=_fix(checkpoint, worst),
        rank=float(worst.value),
        subject=_subject(found.get(Danger.OTHER, [])),
    )


def _subject(calls: list[str]) -> str:
    """The dangerous calls, so that whoever accepted some of them has not accepted others."""
    text = ", ".join(sorted(calls))
    if len(text) <= LONGEST_SUBJECT:
        return text
    return f"{len(calls)} calls {sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"


def _fix(checkpoint: Checkpoint, worst: Danger) -> str | None:
    if worst is Danger.OTHER:
        return "do not load this file with torch; ask where it comes from"
    if "weights_only" not in checkpoint.loader:  # only torch.load has it
        return "load it only from a source you trust, and save it again without these objects"
    return None


def _short(calls: list[str]) -> str:
    """The names, with torch's own layers only counted: they are in every module."""
    foreign = [name for name in calls if not name.startswith("torch.nn.modules.")]
    layers = len(calls) - len(foreign)
    if layers and foreign:
        return f"{names(foreign)} and {plural(layers, 'layer')} of torch.nn"
    return names(calls)


RULES: tuple[Rule, ...] = (runs_code_on_load,)
