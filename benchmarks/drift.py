"""Measure how surely the drift rules tell statistics that belong to a net and its data from those that do not.

    python benchmarks/drift.py [--directory DIR] [--only NAME ...] [--write]

Nets with BatchNorm are trained on scikit-learn's digits (two minutes in all; DIR keeps them) and run on the images
they were trained on and on held-out ones: healthy, and with each of many mishaps. Prints how often the verdict is
stale, noisy, unknown and healthy, with exact binomial intervals, and how far the statistics lie from the thresholds
in the code.
"""

from __future__ import annotations

import sys

# The nets are beside this folder, not installed.
sys.path.extend(__file__.rpartition("benchmarks")[0] + folder for folder in ("fixtures", ""))

import argparse
import copy
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import drift_nets
import nets
import numpy as np
import torch
from drift_nets import Buffers, Trained, norms_of, put, with_weights
from torch import Tensor, nn

import normdoctor as nd
from normdoctor.data import Batch
from normdoctor.findings import Report
from normdoctor.layers import NormLayer, median
from normdoctor.measured import DriftVerdict
from normdoctor.measurement.lockstep import exact
from normdoctor.measurement.with_torch import open_module
from normdoctor.models.loaded import Kind, Loaded
from normdoctor.rules import rule_of
from normdoctor.rules.divergence import shift_of
from normdoctor.rules.guards import ENOUGH
from normdoctor.rules.verdict import quantile

INTRODUCTION = """\
# How surely drift is told from health

Written by `python benchmarks/drift.py --write`; `tests/test_drift_thresholds.py` compares the thresholds with the
code. {healthy} nets with BatchNorm, trained on scikit-learn's 8x8 digits: plain, residual, pre-activation, dense,
depthwise, VGG-like and colour CNNs, MLPs and 1d convolutions, 2 to {deepest} norms, batches of 8 to 200, momentum 0.03
to 0.1, several seeds. They are run on 1,024 of the 1,200 images they were trained on and on all 597 held-out ones, in
batches of 32. The nets are small and of one kind of data: the rates say what to expect there, not on ImageNet, and the
thresholds were chosen on these nets. An interval is Clopper and Pearson's, 95 %, and takes the nets for independent.

Accuracy is that on held-out images as they were prepared for the run, with the statistics as they are and with those
that `recalibrate` (exact) measures on the training images prepared the same way; mean over the nets.
"""

VERDICTS = """
## The verdict on the model

"wrong" counts what should not be said: stale or unknown of a healthy net and of statistics that are only noisy,
healthy of a mishap. "costly" counts the mishaps among the wrong ones that cost a point of accuracy or more: weights
that hardly moved any more make some mishaps harmless.

| buffers | images | nets | stale | noisy | unknown | healthy | wrong, 95 % | costly | KL | > 6 s.e. | accuracy | anew |
| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- | --- | ---: | ---: |
"""

LAYERS = """
## The rules on layers and data

In how many nets a rule said something of warning or error, of all nets.

| statistics | images | D601 | D602 | D603 layer | D604 | D606 | D608 | D610 |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""

THRESHOLDS = """
## The thresholds

The statistic of every healthy net and image set against that of the mildest mishap. Margin: threshold / worst healthy.

| rule | limit | statistic | healthy: median | 99 % | worst | mildest mishap it is for | threshold | margin |
| --- | --- | --- | ---: | ---: | --- | --- | ---: | ---: |
"""

BATCH = 32
SAMPLES = 1024
FEW_SAMPLES = 64
POINT = 0.01

Prepare = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A net as it is judged."""

    model: nn.Module
    prepare: Prepare = lambda images: images


@dataclass(frozen=True)
class Sample:
    """What came of one net."""

    kind: str
    images: str
    net: str
    report: Report
    accuracy: float
    anew: float
    layers: tuple[tuple[float, float, float], ...]
    """For each layer what D601, D602 and D603 compare with their warnings."""


def body_of(model: nn.Module) -> tuple[nn.Module, Prepare]:
    """The net that is given colour images and what makes them, or the net itself."""
    if isinstance(model, nn.Sequential) and isinstance(model[0], drift_nets.Colour):
        return model[1], model[0]
    return model, lambda images: images


# mishaps


def reset(model: nn.Module) -> nn.Module:
    return put(
        model, {name: (torch.zeros_like(n.running_mean), torch.ones_like(n.running_var)) for name, n in norms_of(model)}
    )


def one_batch_of_8(model: nn.Module, images: Tensor) -> nn.Module:
    model = copy.deepcopy(model).train()
    for _, norm in norms_of(model):
        norm.momentum, norm.was = 1.0, norm.momentum
    with torch.no_grad():
        model(images[:8])
    for _, norm in norms_of(model):
        norm.momentum = norm.was
    return model.eval()


def blurred(images: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(images, 3, 1, 1)


def raw(images: Tensor) -> Tensor:
    """From 0 to 1, without the mean and the standard deviation that they were trained with."""
    return images * 0.376 + 0.305


def mishaps(trained: Trained, images: Tensor) -> Iterator[tuple[str, Case]]:
    model = trained.model
    yield "reset", Case(reset(model))
    for momentum in (0.01, 0.005, 0.001):
        yield f"momentum {momentum:g}", Case(put(model, trained.momenta[momentum]))
    yield "one batch of 8", Case(one_batch_of_8(model, images))
    yield "weights an epoch on, on noisier images", Case(drift_nets.one_epoch_on(model))
    yield "averaged weights, last statistics", Case(with_weights(model, trained.averaged))
    yield "statistics of half the training", Case(put(model, trained.halfway))
    yield "half the contrast", Case(model, lambda x: 0.5 * x)
    yield "blurred", Case(model, blurred)
    yield "not normalised (0 to 1)", Case(model, raw)
    yield "times 255", Case(model, lambda x: 255 * x)
    yield "divided by 255", Case(model, lambda x: x / 255)
    if trained.name.startswith("colour"):
        yield "colours swapped", Case(model, lambda x: x.flip(1))


def noisy(trained: Trained) -> Iterator[tuple[str, Case]]:
    """What is right on average."""
    for momentum in (0.5, 0.9):
        model = put(trained.model, trained.momenta[momentum])
        yield f"momentum {momentum:g}, not known", Case(model)
        told = copy.deepcopy(model)
        for _, norm in norms_of(told):
            norm.momentum = momentum
        yield f"momentum {momentum:g}, known", Case(told)


# measuring


def batches_of(images: Tensor, prepare: Prepare) -> list[Batch]:
    given = prepare(images).numpy()
    return [
        Batch((part,), {}, len(part), index)
        for index, part in enumerate(np.split(given, range(BATCH, len(given), BATCH)))
    ]


def norms_by_name(model: nn.Module) -> dict[str, nn.Module]:
    return dict(norms_of(model))


def judged(model: nn.Module, images: Tensor, prepare: Prepare) -> Report:
    """What the data rules say of a net on images."""
    body, colour = body_of(model)
    return nd.inspect(body, data=prepare(colour(images)).numpy(), select="D", batch_size=BATCH)


def recalibrated(model: nn.Module, images: Tensor, prepare: Prepare) -> nn.Module:
    """A copy with the exact statistics of these images."""
    model = copy.deepcopy(model)
    body, colour = body_of(model)
    buffers: Buffers = {}
    with torch.no_grad(), open_module(Loaded(Kind.MODULE, body, "net"), norms_by_name(body), {}) as walker:
        for name, tally in exact(walker, batches_of(images, lambda x: prepare(colour(x)))).of.items():
            total = tally.total()
            buffers[name] = torch.from_numpy(total.mean).float(), torch.from_numpy(total.variance(1)).float()
    if body is model:
        return put(model, buffers)
    return nn.Sequential(model[0], put(body, buffers))


@torch.no_grad()
def accuracy(model: nn.Module, prepare: Prepare) -> float:
    data = nets.load_digits_split()
    body, colour = body_of(model)
    return (body(prepare(colour(data.test_images))).argmax(1) == data.test_labels).float().mean().item()


def sample(kind: str, images: str, trained: Trained, case: Case) -> Sample:
    data = nets.load_digits_split()
    chosen = {
        "training": data.train_images[:SAMPLES],
        "held out": data.test_images,
        f"{FEW_SAMPLES} held out": data.test_images[:FEW_SAMPLES],
        "8 held out": data.test_images[:8],
    }[images]
    report = judged(case.model, chosen, case.prepare)
    anew = float("nan")
    if images == "held out":
        anew = accuracy(recalibrated(case.model, data.train_images[:SAMPLES], case.prepare), case.prepare)
    values = [one for layer in report.layers if (one := compared(layer)) is not None]
    return Sample(kind, images, trained.name, report, accuracy(case.model, case.prepare), anew, tuple(values))


def compared(layer: NormLayer) -> tuple[float, float, float] | None:
    """95th percentile of z, |ln| of the median variance ratio, 95th percentile of KL, as D601 to D603 take them."""
    shift = shift_of(layer)
    if shift is None or len(shift.channels) < ENOUGH:
        return None
    z, ratio = quantile(shift.sure_z, 0.95), abs(median(shift.sure_log_ratio))
    return z, float(np.exp(ratio)), quantile(shift.sure_divergence, 0.95)


def collect(directory: Path | None, only: Sequence[str]) -> Iterator[Sample]:
    images = nets.load_digits_split().train_images
    for name, recipe in drift_nets.HEALTHY.items():
        if only and name not in only:
            continue
        trained = drift_nets.load_or_train(name, recipe, directory)
        for which in ("training", "held out", f"{FEW_SAMPLES} held out", "8 held out"):
            yield sample("healthy", which, trained, Case(trained.model))
        for kind, case in (*noisy(trained), *mishaps(trained, images)):
            for which in ("training", "held out"):
                yield sample(kind, which, trained, case)
        for which in (f"{FEW_SAMPLES} held out", "8 held out"):
            yield sample("reset", which, trained, Case(reset(trained.model)))
    for kind, recipes in (
        ("dropout in front of norms", drift_nets.DROPOUT),
        ("trained in batches of 2", drift_nets.SMALL_BATCH),
    ):
        for name, recipe in recipes.items():
            if not only or name in only:
                trained = drift_nets.load_or_train(name, recipe, directory)
                for which in ("training", "held out"):
                    yield sample(kind, which, trained, Case(trained.model))


# tables


def interval(hits: int, trials: int) -> str:
    """Clopper and Pearson's 95 % interval of a rate, in per cent."""
    from scipy.stats import beta

    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(0.975, hits + 1, trials - hits))
    return f"{hits} ({100 * low:.1f} to {100 * high:.1f} %)"


def span(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.2g} to {max(known):.2g}" if known else "-"


def groups(samples: Sequence[Sample]) -> dict[tuple[str, str], list[Sample]]:
    found: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for one in samples:
        found[one.kind, one.images].append(one)
    return found


def wrong_verdicts(kind: str) -> set[DriftVerdict]:
    harmless = kind == "healthy" or kind.startswith(("momentum 0.5,", "momentum 0.9,"))
    return {DriftVerdict.STALE, DriftVerdict.UNKNOWN} if harmless else {DriftVerdict.HEALTHY}


def verdict_row(kind: str, images: str, group: Sequence[Sample]) -> str:
    counts = Counter(one.report.drift.verdict for one in group if one.report.drift)
    wrong = [one for one in group if one.report.drift and one.report.drift.verdict in wrong_verdicts(kind)]
    costly = sum(one.anew - one.accuracy >= POINT for one in wrong)
    drifts = [one.report.drift for one in group if one.report.drift]
    anew = [one.anew for one in group]
    cells = (
        kind,
        images,
        len(group),
        *(counts[verdict] for verdict in (DriftVerdict.STALE, DriftVerdict.NOISY, DriftVerdict.UNKNOWN)),
        counts[DriftVerdict.HEALTHY],
        interval(len(wrong), len(group)),
        costly if images == "held out" and DriftVerdict.HEALTHY in wrong_verdicts(kind) else "",
        span(drift.divergence for drift in drifts),
        span(drift.beyond for drift in drifts),
        f"{100 * np.mean([one.accuracy for one in group]):.1f}",
        "" if np.isnan(anew).any() else f"{100 * np.mean(anew):.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


CODES = ("D601", "D602", "D603", "D604", "D606", "D608", "D610")


def layers_row(kind: str, images: str, group: Sequence[Sample]) -> str:
    hits: Counter[str] = Counter()
    for one in group:
        said = {f.code for f in one.report.findings if f.severity > 1 or f.code == "D606"}
        said -= {"D603"}
        said |= {"D603" for f in one.report.findings if f.code == "D603" and f.layer is not None and f.severity > 1}
        hits.update(said)
    return f"| {kind} | {images} | {' | '.join(str(hits[code]) for code in CODES)} |\n"


def threshold_rows(samples: Sequence[Sample]) -> Iterator[str]:
    """Those of the model take a value of each net and image set, those of layers the largest of its layers."""
    whole = [one for one in samples if one.images in ("training", "held out")]

    def excess(one: Sample) -> float:
        drift = one.report.drift
        return 0.0 if drift is None or drift.divergence is None else drift.divergence - (drift.noise or 0.0)

    def beyond(one: Sample) -> float:
        return (one.report.drift.beyond if one.report.drift else None) or 0.0

    def largest(place: int) -> Callable[[Sample], float]:
        return lambda one: max((values[place] for values in one.layers), default=0.0)

    table: tuple[tuple[str, str, str, Callable[[Sample], float], str], ...] = (
        ("D603", "model", "median KL of the model less what measuring adds", excess, "one batch of 8"),
        ("D603", "beyond", "share of channels beyond six standard errors", beyond, "one batch of 8"),
        ("D601", "warning", "z in the worst twentieth of the worst layer", largest(0), "one batch of 8"),
        ("D602", "warning", "variance ratio of the median channel of the worst layer", largest(1), "reset"),
        ("D603", "warning", "KL in the worst twentieth of the worst layer", largest(2), "one batch of 8"),
    )
    for code, limit, words, value, mishap in table:
        healthy = sorted(((value(one), one) for one in whole if one.kind == "healthy"), key=lambda pair: pair[0])
        worst, where = healthy[-1]
        mild = min(((value(one), one) for one in whole if one.kind == mishap), key=lambda pair: pair[0])
        threshold = rule_of(code).limits[limit]
        values = [pair[0] for pair in healthy]
        margin = f"{threshold / worst:.3g}" if worst else "-"
        yield (
            f"| {code} | {limit} | {words} | {np.median(values):.3g} | {np.percentile(values, 99):.3g} | {worst:.3g} "
            f"({where.net}, {where.images}) | {mild[0]:.3g} ({mishap}, {mild[1].net}) | {threshold:g} | {margin} |\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where the trained nets are kept")
    parser.add_argument("--only", nargs="+", default=(), help="names of nets")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/drift.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    samples = list(collect(options.directory, options.only))
    grouped = groups(samples)
    deepest = max(len(one.report.layers) for one in samples)
    healthy = len({one.net for one in samples if one.kind == "healthy"})
    text = INTRODUCTION.format(healthy=healthy, deepest=deepest)
    text += VERDICTS + "".join(verdict_row(*key, group) for key, group in grouped.items())
    text += LAYERS + "".join(layers_row(*key, group) for key, group in grouped.items())
    text += THRESHOLDS + "".join(threshold_rows(samples))
    print(text, end="")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
