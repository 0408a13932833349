"""How much of a fault it takes to cost a healthy network 5 points of accuracy. Run by calibration.py."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nets
import torch
from torch import nn

import normdoctor as nd
from normdoctor.rules import rule_of

INTRODUCTION = """
## How much of a fault costs 5 points

Put into every norm layer of a healthy net that can have it; the smallest dose of those tried at which the
held-out accuracy falls by 5 points, over the nets.

| rule | fault | doses | smallest | median | never | threshold |
| --- | --- | --- | ---: | ---: | ---: | ---: |
"""

FOUND = """
## How much residue S118 finds where neither momentum nor counter is known

The same fault in the bare state_dict of every net with BatchNorm; in healthy ones S118 is silent.

| rule | share of the initial 0 and 1 | found |
| --- | ---: | ---: |
"""

POINTS = 0.05

Fault = Callable[[nn.Module, float], None]
"""Puts a dose into one norm layer in place."""


def keep_initial(norm: nn.Module, share: float) -> None:
    norm.running_mean.mul_(1 - share)
    norm.running_var.mul_(1 - share).add_(share)


def move_mean(norm: nn.Module, deviations: float) -> None:
    """Every other channel up, the others down."""
    sign = 1 - 2 * (torch.arange(norm.num_features) % 2)
    norm.running_mean.add_(deviations * sign * norm.running_var.sqrt())


def flatten(norm: nn.Module, share: float) -> None:
    """Statistics on their way to being equal in all channels."""
    for buffer in (norm.running_mean, norm.running_var):
        buffer.lerp_(buffer.mean().expand_as(buffer), share)


def scale_alpha(norm: nn.Module, factor: float) -> None:
    norm.alpha.data.mul_(factor)


def move_shift(norm: nn.Module, shift: float) -> None:
    norm.shift.data.fill_(shift)


def track_with(model: nn.Module, momentum: float) -> None:
    """Statistics of 50 more batches of 8 with this momentum; the weights stay."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = momentum
    images = nets.load_digits_split().train_images
    model.train()
    with torch.no_grad():
        for batch in images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))].split(8)[:50]:
            model(batch)
    model.eval()


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A fault at rising doses, and the threshold that is to be below the first that matters."""

    code: str
    limit: str = ""
    """Empty where the dose and the threshold are of different kinds."""
    words: str
    doses: tuple[float, ...]
    kind: type[nn.Module]
    fault: Fault | None = None
    """None: `track_with`, which needs the whole model."""


TRIALS = (
    Trial(
        code="S104",
        limit="error",
        words="share of the initial 0 and 1",
        doses=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
        kind=nn.modules.batchnorm._BatchNorm,
        fault=keep_initial,
    ),
    Trial(
        code="S107",
        words="share of the way to equal statistics",
        doses=(0.1, 0.2, 0.5, 0.8, 1.0),
        kind=nn.modules.batchnorm._BatchNorm,
        fault=flatten,
    ),
    Trial(
        code="C303",
        limit="from",
        words="momentum for 50 more batches of 8",
        doses=(0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0),
        kind=nn.modules.batchnorm._BatchNorm,
    ),
    Trial(
        code="N403",
        limit="shift",
        words="means moved by standard deviations",
        doses=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
        kind=nn.modules.batchnorm._BatchNorm,
        fault=move_mean,
    ),
    Trial(
        code="T707",
        limit="large",
        words="alpha multiplied",
        doses=(1.5, 2, 5, 10, 20, 50),
        kind=nets.DynamicTanh,
        fault=scale_alpha,
    ),
    Trial(
        code="T707",
        limit="small",
        words="alpha multiplied",
        doses=(0.7, 0.5, 0.2, 0.1, 0.01),
        kind=nets.DynamicTanh,
        fault=scale_alpha,
    ),
    Trial(
        code="T709",
        limit="shift",
        words="shift inside the erf",
        doses=(0.1, 0.2, 0.5, 1.0, 1.5, 2.0),
        kind=nets.DynamicErf,
        fault=move_shift,
    ),
)


def first_dose(trial: Trial, model: nn.Module) -> float | None:
    """The first dose that costs 5 points; None where none does."""
    before = nets.accuracy(model)
    for dose in trial.doses:
        sick = copy.deepcopy(model)
        if trial.fault is None:
            track_with(sick, dose)
        else:
            for module in sick.modules():
                if isinstance(module, trial.kind):
                    trial.fault(module, dose)
        if nets.accuracy(sick) <= before - POINTS:
            return dose
    return None


def row(trial: Trial, models: Sequence[nn.Module]) -> str:
    able = [model for model in models if any(isinstance(module, trial.kind) for module in model.modules())]
    doses = [first_dose(trial, model) for model in able]
    # The first dose in the order tried, which falls for small alphas.
    found = sorted((dose for dose in doses if dose is not None), key=trial.doses.index)
    cells = (
        f"{trial.code} {trial.limit}".strip(),
        trial.words,
        ", ".join(f"{dose:g}" for dose in trial.doses),
        f"{found[0]:g}" if found else "-",
        f"{found[len(found) // 2]:g}" if found else "-",
        f"{len(doses) - len(found)} of {len(doses)}",
        f"{rule_of(trial.code).limits[trial.limit]:g}" if trial.limit else "-",
    )
    return f"| {' | '.join(cells)} |"


def suspected(model: nn.Module, share: float) -> bool:
    """Whether S118 speaks of a state_dict without counters, `share` of whose statistics is initial."""
    sick = copy.deepcopy(model)
    for norm in sick.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            keep_initial(norm, share)
    state = {name: tensor for name, tensor in sick.state_dict().items() if "num_batches" not in name}
    with tempfile.TemporaryDirectory() as directory:
        torch.save(state, Path(directory) / "sick.pt")
        return bool(nd.inspect(Path(directory) / "sick.pt", select=["S118"]).findings)


def finds(models: Sequence[nn.Module]) -> str:
    able = [model for model in models if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())]
    rows = ((share, sum(suspected(model, share) for model in able)) for share in (0, 0.2, 0.4, 0.55, 0.67, 0.8))
    return FOUND + "".join(f"| S118 | {share:.0%} | {found} of {len(able)} |\n" for share, found in rows)


def table(models: Sequence[nn.Module]) -> str:
    return INTRODUCTION + "".join(row(trial, models) + "\n" for trial in TRIALS) + finds(models)
