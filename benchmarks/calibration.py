"""Measure what the rules look at on healthy networks and published models, beside the thresholds in the code.

    python benchmarks/calibration.py [--directory DIR] [--write]

For each threshold: how far the healthy nets of fixtures/nets.py and the models under NORMDOCTOR_CORPUS come
towards it, and where a warning would go by our recipe, at twice the worst healthy value (half, where small is
bad). Then how much of a fault it takes to cost 5 points of accuracy. DIR holds the checkpoints that
`benchmarks/healthy.py --directory DIR` left behind; nets that are not there are trained (two minutes in all).
"""

from __future__ import annotations

import sys

# The nets are beside this folder, not installed.
sys.path.extend(__file__.rpartition("benchmarks")[0] + folder for folder in ("fixtures", ""))

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import doses
import nets
import numpy as np
import torch
from torch import nn

from normdoctor.errors import NormDoctorError
from normdoctor.findings import Finding, Precision
from normdoctor.layers import TRACKING_KINDS, Checkpoint, NormKind, NormLayer, as_vector, median
from normdoctor.readers import open_checkpoint
from normdoctor.rules import rule_of
from normdoctor.rules.guards import ENOUGH, TOKEN_KINDS, distance
from normdoctor.rules.runner import Settings, examine

INTRODUCTION = """\
# What the thresholds rest on

Written by `python benchmarks/calibration.py --write`; `tests/test_calibration.py` compares the column "threshold"
with the code. Each value is one of a layer or of a model, and the worst is the one nearest to the threshold or
farthest beyond it: the largest, or the smallest where the margin is turned round (marked <). "by recipe" is twice
the worst value of our own nets, or half of it: too strict where our nets are too small or too few to show what
large ones do. Published models are measured as well; what they exceed is explained in `benchmarks/corpus.md`.
A rule with several limits speaks only where all of them are passed.

| rule | limit | statistic | values | 99.5 % | worst of our nets | by recipe | worst published | threshold | margin |
| --- | --- | --- | ---: | ---: | --- | ---: | --- | ---: | ---: |
"""

CORPUS = "NORMDOCTOR_CORPUS"
SUFFIXES = (".pt", ".pth", ".ckpt", ".onnx", ".safetensors")

Measure = Callable[[Checkpoint], Iterable[tuple[str, float]]]
"""Gives (layer or model, value) for everything that the threshold is compared with."""


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """What one threshold is compared with."""

    code: str
    limit: str
    words: str
    measure: Measure
    small_is_bad: bool = False

    @property
    def threshold(self) -> float:
        return rule_of(self.code).limits[self.limit]


def opened(code: str, value: Callable[[Mapping[str, Any]], float | None], **limits: float) -> Measure:
    """`value` of the evidence of a rule whose thresholds are so low that it speaks about everything."""

    def measure(checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
        for finding in findings(checkpoint, code, "bf16" if code == "N403" else None, limits):
            found = value(finding.evidence)
            if found is not None:
                yield finding.layer or "model", found

    return measure


def findings(
    checkpoint: Checkpoint, code: str, precision: Precision | None, limits: Mapping[str, float]
) -> tuple[Finding, ...]:
    settings = Settings(precision=precision, limits={code: limits})
    return examine(checkpoint, [rule_of(code)], settings).findings


def of_layers(value: Callable[[NormLayer], float | None]) -> Measure:
    def measure(checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
        for layer in checkpoint.layers:
            found = value(layer)
            if found is not None and math.isfinite(found):
                yield layer.name, found

    return measure


def most_alike(layer: NormLayer) -> float | None:
    """How many channels that carry signal agree in running_mean or in running_var to the last bit."""
    mean, var = layer.numbers.mean, layer.numbers.var
    if mean is None or var is None or not layer.numbers.live.any():
        return None
    live = layer.numbers.live
    return float(max(np.unique(values[live], return_counts=True)[1].max() for values in (mean, var)))


def far_mean(layer: NormLayer) -> float | None:
    """What |mean| in standard deviations reaches in the share of channels that S108 asks for."""
    if layer.numbers.mean is None or layer.numbers.var is None:
        return None
    far = np.sort(distance(layer))[::-1]
    return float(far[math.ceil(rule_of("S108").limits["share"] * len(far)) - 1])


def momentum(layer: NormLayer) -> float | None:
    return layer.momentum if isinstance(layer.momentum, float) and layer.kind in TRACKING_KINDS else None


def alpha_of_start(layer: NormLayer) -> float | None:
    alpha = as_vector(layer.alpha) if layer.kind is NormKind.DYNAMIC_TANH else None
    return None if alpha is None else float(np.abs(alpha).max()) / rule_of("T707").limits["init"]


def inner_shift(layer: NormLayer) -> float | None:
    shift = as_vector(layer.inner_shift)
    return None if shift is None else float(np.abs(shift).max())


def token_weight(layer: NormLayer, zero_centred: bool) -> np.ndarray | None:
    known = layer.kind in TOKEN_KINDS and len(layer.lengths) > 0 and layer.numbers.gain.size >= ENOUGH
    return as_vector(layer.weight) if known and bool(layer.zero_centred) is zero_centred else None


def plain_median(layer: NormLayer) -> float | None:
    weight = token_weight(layer, False)
    return None if weight is None else abs(median(weight))


def centred_median(layer: NormLayer) -> float | None:
    weight = token_weight(layer, True)
    return None if weight is None else abs(median(weight) - 1)


def negative_share(layer: NormLayer) -> float | None:
    weight = token_weight(layer, False)
    return None if weight is None else float(np.mean(weight < 0))


def untouched_gains(checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
    """The share of a model's LayerNorms and RMSNorms with gain 1 in all features."""
    for model in checkpoint.models:
        ones = [(each.numbers.gain == 1).all() for each in model.layers if each.weight and each.kind in TOKEN_KINDS]
        if ones:
            yield "model", float(np.mean(ones))


def squeezed_share(checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
    """The share of a model's layers whose variances lie in the band of S118, were momentum and counter unknown."""
    limits = {"share": 0, "channels": 0}
    for model in checkpoint.models:
        bare = tuple(replace(layer, momentum=None, num_batches_tracked=None) for layer in model.layers)
        tracking = [layer for layer in bare if layer.kind in TRACKING_KINDS and layer.running_var is not None]
        if tracking:
            found = findings(replace(checkpoint, models=(replace(model, layers=bare),)), "S118", None, limits)
            yield "model", len(found[0].evidence.get("layers", ())) / len(tracking) if found else 0.0


EVERYTHING = math.inf

STATISTICS = (
    Statistic(
        code="S107", limit="channels", words="channels that agree to the last bit", measure=of_layers(most_alike)
    ),
    Statistic(code="S108", limit="info", words="mean / s.d. in 5 % of the channels", measure=of_layers(far_mean)),
    Statistic(
        code="S109",
        limit="info",
        words="largest / median variance",
        measure=opened("S109", lambda evidence: evidence["ratio"], info=0, warning=EVERYTHING),
    ),
    Statistic(
        code="S118",
        limit="share",
        words="layers whose variances are all close to 1, as least and spread define it",
        measure=squeezed_share,
    ),
    Statistic(
        code="A205",
        limit="of_median",
        words="largest / median factor",
        measure=opened("A205", lambda evidence: evidence["ratio"], of_median=0, absolute=EVERYTHING),
    ),
    Statistic(
        code="A207",
        limit="share",
        words="channels whose affine undoes the norm",
        measure=opened("A207", lambda evidence: evidence["share"], share=0),
    ),
    Statistic(code="C303", limit="from", words="momentum", measure=of_layers(momentum)),
    Statistic(
        code="N403",
        limit="shift",
        words="rounding of the mean in bfloat16 / s.d.",
        measure=opened("N403", lambda evidence: evidence["largest_shift"], shift=0),
    ),
    Statistic(
        code="T701",
        limit="of_median",
        words="largest / median gain",
        measure=opened("T701", lambda evidence: evidence.get("ratio"), deviations=0, of_median=0, norms=EVERYTHING),
    ),
    Statistic(
        code="T701",
        limit="share",
        words="norms that agree on an outlier",
        measure=opened(
            "T701",
            lambda evidence: evidence["most"] / evidence["norms"] if evidence.get("norms", 0) >= 3 else None,
            of_median=EVERYTHING,
            share=0,
            norms=0,
        ),
    ),
    Statistic(
        code="T702",
        limit="share",
        words="norms with a gain of exactly 1",
        measure=untouched_gains,
    ),
    Statistic(code="T707", limit="large", words="alpha / its start", measure=of_layers(alpha_of_start)),
    Statistic(
        code="T707", limit="small", words="alpha / its start", measure=of_layers(alpha_of_start), small_is_bad=True
    ),
    Statistic(code="T709", limit="shift", words="shift inside the erf", measure=of_layers(inner_shift)),
    Statistic(
        code="T712",
        limit="near_zero",
        words="median weight of a norm that multiplies by weight",
        measure=of_layers(plain_median),
        small_is_bad=True,
    ),
    Statistic(
        code="T712",
        limit="near_one",
        words="distance from 1 of the median of one that multiplies by 1 + weight",
        measure=of_layers(centred_median),
        small_is_bad=True,
    ),
    Statistic(
        code="T712",
        limit="negative",
        words="negative weights of a norm that multiplies by weight",
        measure=of_layers(negative_share),
    ),
)


@dataclass(frozen=True)
class Value:
    """One measured value and where it was found."""

    size: float
    place: str


def collect(paths: Iterable[Path]) -> dict[Statistic, list[Value]]:
    values: dict[Statistic, list[Value]] = {statistic: [] for statistic in STATISTICS}
    for path in paths:
        try:
            with open_checkpoint(path) as checkpoint:
                for statistic in STATISTICS:
                    found = statistic.measure(checkpoint)
                    values[statistic] += [Value(size, f"{path.stem} {place}") for place, size in found]
        except NormDoctorError as error:
            print(f"passed over: {error.message}", file=sys.stderr)
    return values


def worst(statistic: Statistic, values: Sequence[Value]) -> Value | None:
    chosen = min if statistic.small_is_bad else max
    return chosen(values, key=lambda value: value.size, default=None)


def row(statistic: Statistic, ours: Sequence[Value], published: Sequence[Value]) -> str:
    bad = worst(statistic, ours)
    assert bad is not None, f"no healthy net has a value for {statistic.code}"
    far = worst(statistic, published)
    tail = 0.5 if statistic.small_is_bad else 99.5
    threshold = statistic.threshold
    if statistic.small_is_bad:
        recipe, margin = bad.size / 2, f"< {bad.size / threshold:.3g}"
    else:
        recipe, margin = 2 * bad.size, f"{threshold / bad.size:.3g}" if bad.size else "-"
    cells = (
        statistic.code,
        statistic.limit,
        statistic.words,
        len(ours),
        f"{np.percentile([value.size for value in ours], tail):.3g}",
        f"{bad.size:.3g} ({bad.place})",
        f"{recipe:.3g}",
        f"{far.size:.3g} ({far.place})" if far else "-",
        f"{threshold:g}",
        margin,
    )
    return f"| {' | '.join(map(str, cells))} |"


def healthy_files(directory: Path) -> tuple[list[Path], list[nn.Module]]:
    """The files of every healthy net, and the nets; what is not in `directory` is trained and saved there."""
    paths, models = [], []
    for name in nets.HEALTHY:
        plain, whole = directory / f"{name}.pt", directory / f"{name}_module.pt"
        if whole.exists():
            model = torch.load(whole, weights_only=False)  # our own, from healthy.py
        else:
            model = nets.train_healthy(name)
            torch.save(model, whole)
        if not plain.exists():
            torch.save(model.state_dict(), plain)
        paths += [plain, whole]
        models.append(model)
    return paths, models


def published_files() -> list[Path]:
    folder = os.environ.get(CORPUS)
    return sorted(path for path in Path(folder).rglob("*") if path.suffix in SUFFIXES) if folder else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where benchmarks/healthy.py kept the checkpoints")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/calibration.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        paths, models = healthy_files(directory)
        ours = collect(paths)
        published = collect(published_files())
        text = INTRODUCTION + "".join(row(one, ours[one], published[one]) + "\n" for one in STATISTICS)
        text += doses.table(models)
    print(text, end="")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
