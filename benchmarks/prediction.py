"""Measure how surely G507 tells buffers that belong to their weights from those that do not.

    python benchmarks/prediction.py --directory DIR [--only NAME ...] [--write]

Nets with BatchNorm are trained on scikit-learn's digits (some ten minutes in all; DIR keeps them) and written as .pt2:
healthy, and with each of many mishaps in their buffers. Prints how well predicted and stored means agree, in what share
of the layers the rule finds a mishap, with Wilson's intervals, and what other thresholds would find.
"""

from __future__ import annotations

import sys

# The nets are beside this folder, not installed.
sys.path.extend(__file__.rpartition("benchmarks")[0] + folder for folder in ("fixtures", ""))

import argparse
import copy
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from prediction_nets import FAMILIES, Plan, State, Trained, load_or_train, plans
from torch import Tensor, nn

import normdoctor as nd
from normdoctor.findings import Report, Severity
from normdoctor.rules.prediction import agreement

INTRODUCTION = """\
# How surely buffers are told from those of other weights

Written by `python benchmarks/prediction.py --write`. {nets} nets trained on scikit-learn's 8x8 digits ({larger} of them
enlarged to 16x16): plain, residual, pre-activation, depthwise (inverted residuals) and branched ones (norms directly
behind norms), each with ReLU, ReLU6, leaky ReLU, SiLU, GELU and hard-swish; {norms} norms with 16 to 64 channels;
momentum 0.1, 0.03 and 0.01, batches of 32 to 100, cosine and step schedules; held-out accuracy {worst:.1f} to
{best:.1f} %. All is read from .pt2 files, without any data. The nets are small and of one kind of data: the rates say
what to expect there. Intervals are Wilson's, 95 %; they take layers for independent, which layers of one net are not
quite.

A chain is exact where no activation lies on it, Gaussian otherwise, and uneven where a border, a stride or a kernel
lies on an exact one. Of {norms} norms {predicted} have a prediction, {exact} of them an exact one. Quiet chains predict
less than {quiet} standard deviations (root mean square over the channels): where a norm's output only goes through 1x1
convolutions to other norms, as behind MobileNetV2's linear bottlenecks, its beta has no gradient and stays at 0. There
is next to nothing for buffers of another net to contradict, and by their means they do no harm; they have rows of their
own.
"""

HEALTHY = """
## Healthy nets: predicted against stored means

Shift: median over the channels of |stored - predicted|, in standard deviations. Loudness: root mean square of the
predictions, in standard deviations: slopes count from {loud} on. Rest: root mean square of stored - predicted over the
loudness. Cells: smallest, median, largest of the layers.

| chain | net | layers | shift | correlation | slope | loudness | rest |
| --- | --- | ---: | --- | --- | --- | --- | --- |
"""

FINDINGS = """
## Healthy nets: findings above info

| rule | nets | findings | of which warnings | errors |
| --- | ---: | ---: | ---: | ---: |
"""

MISHAPS = """
## Mishaps

In how many of the layers that a chain reaches G507 said something of warning or error. Reset buffers are the
untouched 0 and 1, of which S103 speaks in its place: both count there. Correlation and slope: median over the layers.
"nets": in how many of them G507 (or S103) found any layer.

| buffers | chain | layers | found, 95 % | errors | nets | shift | correlation | slope |
| --- | --- | ---: | --- | ---: | --- | ---: | ---: | ---: |
"""

CANDIDATES = """
## What other thresholds would find

Share of the layers in per cent. Slopes are judged where the loudness is {loud} or more.

| buffers | chain | {heads} |
| --- | --- |{rules}
"""

LOUD = 0.25
SHIFTS, CORRELATIONS, SLOPES, RESTS = (0.03, 0.1, 0.3), (0.3, 0.5, 0.7, 0.8, 0.9), (0.1, 0.25, 0.4), (0.05, 0.5, 0.7)
QUIET = 0.005


@dataclass(frozen=True)
class Reached:
    """A layer that a chain reaches, as it is judged."""

    kind: str
    plan: Plan
    name: str
    exact: bool
    even: bool
    shift: float
    correlation: float
    slope: float
    loudness: float
    rest: float
    """Root mean square of stored - predicted, as a share of the loudness."""
    quiet: bool
    """Of the healthy net: hardly anything is predicted."""
    severity: Severity | None
    """Of what the rule said of it."""

    @property
    def chain(self) -> str:
        kind = ("exact" if self.even else "exact, uneven") if self.exact else "Gaussian"
        return f"{kind}, quiet" if self.quiet else kind

    @property
    def found(self) -> bool:
        return self.severity is not None and self.severity > Severity.INFO


@dataclass(frozen=True)
class Judged:
    """What came of one net with one set of buffers."""

    kind: str
    plan: Plan
    report: Report
    layers: tuple[Reached, ...]


# mishaps


def statistics(state: State) -> dict[str, str]:
    """The name of each running mean and its variance's."""
    return {name: name.removesuffix("mean") + "var" for name in state if name.endswith("running_mean")}


def with_statistics(state: State, change: Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]) -> State:
    found = dict(state)
    for mean, var in statistics(state).items():
        found[mean], found[var] = change(mean, state[mean], state[var])
    return found


def of_another(state: State, other: State) -> State:
    return with_statistics(state, lambda name, mean, var: (other[name], other[statistics(other)[name]]))


def mishaps(trained: Trained, state: State, other: State) -> Iterator[tuple[str, State]]:
    """What the file holds after each. state: the healthy one. `other` has the same shapes."""
    generator = torch.Generator().manual_seed(trained.plan.seed)

    def permuted(name: str, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(mean), generator=generator)
        return mean[order], var[order]

    yield "of another net", of_another(state, other)
    yield "permuted over channels", with_statistics(state, permuted)
    yield "reset", with_statistics(state, lambda _, mean, var: (torch.zeros_like(mean), torch.ones_like(var)))
    for moment in ("step 20", "epoch 1", "epoch 2"):
        yield f"of {moment}", of_another(state, trained.early[moment])
    for q in (0.1, 0.3, 0.8):
        residue = with_statistics(state, lambda _, mean, var, q=q: ((1 - q) * mean, (1 - q) * var + q))
        yield f"{100 * q:.0f} % initial", residue
    yield "averaged weights", {**state, **trained.averaged}
    if trained.plan.bias:
        modules = dict(trained.model.named_modules())
        biases = [f"{name}.bias" for name, module in modules.items() if isinstance(module, nn.Conv2d)]
        yield "bias dropped", {**state, **{name: torch.zeros_like(state[name]) for name in biases}}


# judging


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    shapes = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
    return torch.export.export(model.eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=(shapes["input"],))


def collect(directory: Path, only: Sequence[str]) -> Iterator[Judged]:
    chosen = [plan for plan in plans() if not only or plan.name in only]
    nets = {plan: load_or_train(plan, directory) for plan in chosen}
    states = {plan: copy.deepcopy(trained.model.state_dict()) for plan, trained in nets.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pt2"
        for plan, trained in nets.items():
            healthy = states[plan]
            program = exported(trained.model)  # whose tensors are those of the model
            others = [each for each in chosen if (each.family, each.bias) == (plan.family, plan.bias) and each != plan]
            others = others or [each for each in chosen if each.family == plan.family and each != plan] or [plan]
            other = states[others[chosen.index(plan) % len(others)]]
            quiet: set[str] = set()
            for kind, state in (("healthy", healthy), *mishaps(trained, healthy, other)):
                for name, value in program.state_dict.items():
                    value.data.copy_(state[name])
                torch.export.save(program, path)
                one = judged(kind, plan, path, quiet)
                quiet = {each.name for each in one.layers if each.quiet}
                yield one


def judged(kind: str, plan: Plan, path: Path, quiet: Container[str] = ()) -> Judged:
    """quiet: of other buffers than the healthy ones, the layers that are quiet with those."""
    report = nd.inspect(path)
    said: dict[str, Severity] = {}
    for finding in report.findings:
        if finding.layer is not None and finding.code in ("G507", "S103"):
            said[finding.layer] = max(finding.severity, said.get(finding.layer, finding.severity))
    layers = []
    for layer in report.layers:
        prediction = None if layer.place is None else layer.place.prediction
        if prediction is None:
            continue
        each = agreement(layer)
        values = (math.nan,) * 5
        if each is not None:
            rest = math.sqrt(float(np.mean(each.off**2))) / each.loudness
            values = (each.shift, each.correlation, each.slope, each.loudness, rest)
        still = values[3] < QUIET if kind == "healthy" else layer.name in quiet
        kinds = (prediction.exact, prediction.even)
        layers.append(Reached(kind, plan, layer.name, *kinds, *values, still, said.get(layer.name)))
    return Judged(kind, plan, report, tuple(layers))


# tables


def wilson(hits: int, trials: int) -> str:
    """Wilson's 95 % interval of a rate, in per cent."""
    if not trials:
        return "-"
    z, share = 1.959964, hits / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return f"{100 * share:.1f} % ({max(0, 100 * (center - half)):.1f} to {min(100, 100 * (center + half)):.1f})"


def span(values: Iterable[float]) -> str:
    known = np.array([value for value in values if not math.isnan(value)])
    return f"{known.min():.3g}, {np.median(known):.3g}, {known.max():.3g}" if known.size else "-"


def middle(values: Iterable[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{np.median(known):.3g}" if known else "-"


def healthy_rows(layers: Sequence[Reached]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Reached]] = defaultdict(list)
    for each in layers:
        for net in ("all", each.plan.family, each.plan.activation):
            groups[each.chain, net].append(each)
    order = ["all", *FAMILIES]
    for (chain, net), group in sorted(
        groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]) if item[0][1] in order else 9)
    ):
        loud = [each.slope for each in group if each.loudness >= LOUD]
        cells = (
            chain,
            net,
            len(group),
            span(each.shift for each in group),
            span(each.correlation for each in group),
            span(loud),
            span(each.loudness for each in group),
            span(each.rest for each in group),
        )
        yield f"| {' | '.join(map(str, cells))} |\n"


def finding_rows(reports: Sequence[Judged]) -> Iterator[str]:
    findings = [(each.plan, finding) for each in reports for finding in each.report.findings]
    loud = [(plan, finding) for plan, finding in findings if finding.severity > Severity.INFO]
    for code in sorted({"G507", "A208", "A209", "A210"} | {finding.code for _, finding in loud}):
        own = [(plan, finding) for plan, finding in loud if finding.code == code]
        counts = Counter(finding.severity for _, finding in own)
        nets = len({plan for plan, _ in own})
        yield f"| {code} | {nets} | {len(own)} | {counts[Severity.WARNING]} | {counts[Severity.ERROR]} |\n"


def by_kind(layers: Sequence[Reached]) -> dict[tuple[str, str], list[Reached]]:
    groups: dict[tuple[str, str], list[Reached]] = defaultdict(list)
    for each in layers:
        groups[each.kind, each.chain].append(each)
    return groups


def mishap_rows(layers: Sequence[Reached]) -> Iterator[str]:
    for (kind, chain), group in by_kind(layers).items():
        hits = [each for each in group if each.found]
        errors = sum(each.severity is Severity.ERROR for each in group)
        nets, of = len({each.plan for each in hits}), len({each.plan for each in group})
        cells = (
            kind,
            chain,
            len(group),
            wilson(len(hits), len(group)),
            errors,
            f"{nets} of {of}",
            middle(each.shift for each in group),
            middle(each.correlation for each in group),
            middle(each.slope for each in group if each.loudness >= LOUD),
        )
        yield f"| {' | '.join(map(str, cells))} |\n"


def candidate_heads() -> list[str]:
    return [
        *(f"shift > {limit:g}" for limit in SHIFTS),
        *(f"r < {limit:g}" for limit in CORRELATIONS),
        *(f"slope off > {limit:g}" for limit in SLOPES),
        *(f"rest > {limit:g}" for limit in RESTS),
    ]


def candidate_rows(layers: Sequence[Reached]) -> Iterator[str]:
    for (kind, chain), group in by_kind(layers).items():
        known = [each for each in group if not math.isnan(each.shift)]
        tests: list[Callable[[Reached], bool]] = [
            *(lambda each, limit=limit: each.shift > limit for limit in SHIFTS),
            *(lambda each, limit=limit: each.correlation < limit for limit in CORRELATIONS),
            *(lambda each, limit=limit: each.loudness >= LOUD and abs(each.slope - 1) > limit for limit in SLOPES),
            *(lambda each, limit=limit: each.rest > limit for limit in RESTS),
        ]
        if known:
            shares = [f"{100 * sum(map(test, known)) / len(known):.0f}" for test in tests]
            yield f"| {kind} | {chain} | {' | '.join(shares)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the trained nets are kept")
    parser.add_argument("--only", nargs="+", default=(), help="names of nets")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/prediction.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    everything = list(collect(options.directory, options.only))
    healthy = [each for each in everything if each.kind == "healthy"]
    layers = [layer for each in everything for layer in each.layers]
    sound = [each for each in layers if each.kind == "healthy"]
    accuracies = [100 * load_or_train(each.plan, options.directory).accuracy for each in healthy]
    text = INTRODUCTION.format(
        nets=len(healthy),
        larger=sum(each.plan.pixels > 8 for each in healthy),
        norms=sum(len(each.report.layers) for each in healthy),
        worst=min(accuracies),
        best=max(accuracies),
        predicted=len(sound),
        exact=sum(each.exact for each in sound),
        quiet=QUIET,
    )
    text += HEALTHY.format(loud=LOUD) + "".join(healthy_rows(sound))
    text += FINDINGS + "".join(finding_rows(healthy))
    text += MISHAPS + "".join(mishap_rows(layers))
    heads = candidate_heads()
    text += CANDIDATES.format(loud=LOUD, heads=" | ".join(heads), rules=" ---: |" * len(heads))
    text += "".join(candidate_rows(layers))
    print(text, end="")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
