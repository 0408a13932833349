"""Findings, layers and numbers in words, the same way in every report that people read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce

from normdoctor.findings import DATA_FIELD, GRAPH_FIELD, Finding, Report, Rule, Severity, Skip
from normdoctor.layers import NormKind, NormLayer

SHORT_KINDS = {
    NormKind.BATCH: "BN",
    NormKind.INSTANCE: "IN",
    NormKind.LAYER: "LN",
    NormKind.GROUP: "GN",
    NormKind.RMS: "RMS",
    NormKind.LAYER_OR_GROUP: "LN/GN",
    NormKind.LAYER_OR_RMS: "LN/RMS",
    NormKind.EVO: "Evo",
    NormKind.FILTER_RESPONSE: "FRN",
    NormKind.DYNAMIC_TANH: "DyT",
    NormKind.AFFINE: "affine",
}


def new_findings(report: Report) -> list[Finding]:
    """Those that the baseline does not know."""
    return [finding for finding in report.findings if not finding.known]


def grouped(findings: Iterable[Finding]) -> Iterator[list[Finding]]:
    """Findings of one rule together, worst first within a rule and among rules."""
    by_code: dict[str, list[Finding]] = {}
    for finding in findings:
        by_code.setdefault(finding.code, []).append(finding)
    groups = [sorted(group, key=lambda f: (-f.severity, -f.rank)) for group in by_code.values()]
    yield from sorted(groups, key=lambda group: (-group[0].severity, group[0].code))


def ranked(reports: Iterable[Report]) -> list[tuple[Report, list[Finding]]]:
    """The groups of new findings of all files, each with its file, worst first."""
    found = [(report, group) for report in reports for group in grouped(new_findings(report))]
    return sorted(found, key=lambda pair: -pair[1][0].severity)


def worst_layers_first(report: Report) -> list[NormLayer]:
    """The layers by the severity of their worst new finding, in file order among equals."""
    worst: dict[str, int] = {}
    for finding in new_findings(report):
        if finding.layer is not None:
            worst[finding.layer] = max(finding.severity, worst.get(finding.layer, 0))
    return sorted(report.layers, key=lambda layer: -worst.get(layer.name, 0))


def codes_by_layer(report: Report) -> Mapping[str, list[str]]:
    """Layer name → the codes of its new findings, worst first."""
    codes: dict[str, dict[str, None]] = {}
    for finding in new_findings(report):
        if finding.layer is not None:
            codes.setdefault(finding.layer, {})[finding.code] = None
    return {name: list(found) for name, found in codes.items()}


def about(group: Sequence[Finding]) -> str:
    """Which layers a group of findings is about, worst first."""
    layers = [finding.layer for finding in group if finding.layer is not None]
    if not layers:
        return ""
    if len(layers) == 1:
        return layers[0]
    if len(layers) == 2:
        return f"{layers[0]}, {layers[1]}"
    return f"{many_layers(group)}, worst {layers[0]}"


def many_layers(group: Sequence[Finding]) -> str:
    """How many layers a group is about, by severity where that differs: 3 layers (1 error, 2 warning)."""
    counts = Counter(finding.severity for finding in group)
    levels = ""
    if len(counts) > 1:
        levels = f" ({', '.join(f'{counts[level]} {level}' for level in sorted(counts, reverse=True))})"
    return f"{sum(finding.layer is not None for finding in group)} layers{levels}"


def verdict(reports: Sequence[Report]) -> str:
    """How many layers there are, what was found, and what could not be judged: all in a line.

    Findings of one rule in one file count as one."""
    layers = sum(len(report.layers) for report in reports)
    line = f"{plural(layers, 'layer')}: {severities_in_words(reports) or 'nothing found'}"
    verdicts = list(dict.fromkeys(report.drift.verdict.value for report in reports if report.drift is not None))
    if verdicts:
        line += f"; statistics {' and '.join(verdicts)} on this data"
    known = sum(finding.known for report in reports for finding in report.findings)
    if known:
        line += f"; {plural(known, 'known finding')} in the baseline"
    if skips := [skip for report in reports for skip in report.skips]:
        line += f"; {skips_in_words(skips)}"
    assumed = {name: value for report in reports for name, value in report.assumed.items()}
    if assumed:
        values = " and ".join(f"{name} {value:g}" for name, value in assumed.items())
        options = " ".join(f"--{name}" for name in assumed)
        line += f"; {values} assumed where the file is silent ({options})"
    return line


def severities_in_words(reports: Iterable[Report]) -> str:
    """2 errors, 1 warning; empty where nothing new was found. Findings of one rule in one file count as one."""
    counts = Counter(group[0].severity for _, group in ranked(reports))
    return ", ".join(plural(counts[level], str(level)) for level in sorted(Severity, reverse=True) if counts[level])


def kinds_in_words(layers: Sequence[NormLayer]) -> str:
    counts = Counter(layer.kind.value for layer in layers)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "no norm layers"


def skips_in_words(skips: Sequence[Skip]) -> str:
    """How many rules were skipped, for want of what; those that need the graph or data apart."""
    without_data = {skip.code for skip in skips if DATA_FIELD in skip.missing}
    without_graph = {skip.code for skip in skips if GRAPH_FIELD in skip.missing} - without_data
    others = [skip for skip in skips if skip.code not in without_data | without_graph]
    words = []
    if others:
        missing = list(dict.fromkeys(name for skip in others for name in skip.missing))
        words.append(f"{plural(len({skip.code for skip in others}), 'check')} skipped for want of {', '.join(missing)}")
    for codes, what in ((without_data, "data (--data)"), (without_graph, "the graph")):
        if codes:
            words.append(f"{plural(len(codes), 'check')} {'needs' if len(codes) == 1 else 'need'} {what}")
    return "; ".join(words)


def split_fix(fix: str) -> tuple[str, str]:
    """What a fix says, and the command it ends with; either may be empty.

    >>> split_fix("find the momentum, then: normdoctor inspect m.pt --momentum VALUE")
    ('find the momentum, then:', 'normdoctor inspect m.pt --momentum VALUE')
    """
    if fix.startswith("normdoctor "):
        return "", fix
    prose, colon, command = fix.partition(": normdoctor ")
    return (f"{prose}:", f"normdoctor {command}") if colon else (fix, "")


def example_fix(rule: Rule) -> str:
    """The rule's fix with names of files as an example."""
    words = {
        "{path}": "model.pt",
        "{fixed}": "fixed.pt",
        "{momentum}": "",
        "{data}": " --data calib.npy",
        "{opening}": "",
    }
    return reduce(lambda fix, placeholder: fix.replace(placeholder, words[placeholder]), words, rule.fix)


def short_kind(layer: NormLayer) -> str:
    """BN2d, LN, IN1d: the dimension only where the class names it."""
    name = (layer.origin or "").rpartition(".")[2]
    if layer.kind is NormKind.BATCH and name.startswith(("Sync", "Frozen")):
        return name.removesuffix("2d").replace("BatchNorm", "BN").replace("BNAct", "BN")
    kind = SHORT_KINDS[layer.kind]
    return kind + name[-2:] if name[-2:] in ("1d", "2d", "3d") else kind


def short(value: float) -> str:
    """At most six characters: 0.02, 1.4, 312, 5e-45."""
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 10000:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def updates_in_words(layer: NormLayer) -> str:
    """num_batches_tracked, or nothing."""
    return "" if layer.numbers.updates is None else f"{layer.numbers.updates:,.12g}"


def size(count: int) -> str:
    """Bytes in decimal units: 76 KB, 44.8 MB."""
    if count < 1000:
        return f"{count} B"
    amount = float(count)
    for unit in ("KB", "MB", "GB", "TB"):
        amount /= 1000
        if amount < 1000 or unit == "TB":
            break
    return f"{amount:.1f} {unit}" if amount < 100 and unit != "KB" else f"{amount:.0f} {unit}"


def percent(share: float) -> str:
    """A share as a percentage with two significant digits: 0.34 %, 74 %."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 or noun == "info" else "s")
