"""A: gamma and beta broken, never trained, or of a size that spells trouble."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, NormLayer, median
from normdoctor.rules.guards import (
    ENOUGH,
    FEW,
    SWITCHED_OFF,
    carries_signal,
    for_size,
    frozen,
    in_use,
    nonfinite,
    typical_gain,
    usable_eps,
)
from normdoctor.rules.wording import number, percent, plural, some_of, where


@rule(
    "A201",
    "nonfinite-affine",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    needs=("weight",),
    why="These channels give NaN or infinity for every input, in training as in eval.",
    fix="go back to the last checkpoint before the loss became NaN",
    reference="https://github.com/pytorch/pytorch/issues/96798",
)
def nonfinite_affine(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A gain or shift is NaN or infinite.

    A gradient overflowed and the optimiser stepped all the same: no loss scaling in float16, no gradient
    clipping, or a learning rate that diverged. In a half-precision file an infinite gain may also come from
    the cast. Unlike running statistics these values cannot be re-estimated from data.

    Example: weight has 256 NaN of 256, saved one step after the loss became NaN.
    """
    yield from nonfinite(weight=layer.numbers.gain, bias=layer.numbers.shift)


@rule(
    "A202",
    "switched-off-channels",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    needs=("weight",),
    why="Such a channel gives its shift and nothing else, so it costs time without carrying anything.",
    fix="prune them and add the constant shift to the next layer's bias; zeroing them changes the model",
    reference="https://arxiv.org/abs/1708.06519",
    limits={"of_median": 1e-2, "absolute": SWITCHED_OFF, "share": 0.5},
)
def switched_off_channels(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Channels whose gain is next to nothing: their output is the constant shift.

    Weight decay or an L1 penalty on gamma switches off what the network does not need; network slimming does
    it on purpose. Good models have up to a third of such channels (20 of 64 in the first layer of a published
    text detector). A warning from half of a layer of 16 channels or more; all exactly 0 is A203.

    Example: 21 of 128 gains below 1 % of the median, with shifts up to 0.08 that still matter.
    """
    size, limits = np.abs(layer.numbers.gain), context.limits
    bar = limits["absolute"]
    if size.min() >= max(bar, limits["of_median"] * size.max()):
        return  # the median is not above the largest
    if len(size) >= FEW:
        bar = max(bar, limits["of_median"] * typical_gain(layer))
    off = size < bar
    if not off.any() or not size.any():
        return
    channels = where(off)
    share = len(channels) / len(size)
    shift = np.abs(layer.numbers.shift[off])
    shift = shift[np.isfinite(shift)]
    largest = float(shift.max()) if shift.size else 0.0
    constant = f"the constant shift, up to {number(largest)}" if largest else "0"
    many = share >= limits["share"] and len(size) >= ENOUGH
    yield Observation(
        message=f"The gain is below {number(bar)} in {some_of(channels, len(size))}: their output is {constant}.",
        channels=channels,
        evidence={"share": share, "bar": bar, "largest_shift": largest},
        severity=Severity.WARNING if many else Severity.INFO,
        rank=share,
    )


@rule(
    "A203",
    "residual-branch-off",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    needs=("weight",),
    even_untrained=False,
    why="The layer passes on nothing of its input, so the branch it ends is not there.",
    fix="check that this gamma reaches the optimiser; if the block is meant to be off, remove it",
    reference="https://arxiv.org/abs/1706.02677",
)
def residual_branch_off(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Every gain of a trained layer is exactly 0.

    The last norm of a residual block is often created with gamma 0 so that the block starts as the identity.
    After training an exact 0 means that it never got a gradient step: left out of the optimiser, the block
    never used, or pruned as a whole. Where the graph is known it confirms that the layer ends such a branch (G512).

    Medium confidence where no counter says that the layer was trained. Example: all 256 gains of layer3.5.bn3
    are 0 after 25,301 updates, so the block is the identity.
    """
    if layer.numbers.gain.any():
        return
    updates = layer.numbers.updates
    if updates == 0 and layer.numbers.default_statistics:
        return  # nothing ever went through here: S103
    largest = float(np.abs(layer.numbers.shift).max(initial=0.0))
    trained = f" after {updates:,.0f} updates" if updates else ""
    output = "0" if largest == 0 else "the constant shift"
    place = layer.place
    ends = place is not None and place.joins_branches and not place.inferred
    confirmed = ", and in the graph it ends a residual branch" if ends else ""
    yield Observation(
        message=f"All {len(layer.numbers.gain)} gains are exactly 0{trained}: the output is {output}{confirmed}.",
        channels=range(len(layer.numbers.gain)),
        evidence={"num_batches_tracked": updates, "largest_shift": largest if np.isfinite(largest) else None},
        confidence=None if updates else Confidence.MEDIUM,
    )


@rule(
    "A204",
    "affine-untouched",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("weight", "running_mean", "running_var"),
    scope=Scope.MODEL,
    even_untrained=False,
    why="The layer saw data but its gain and shift never got a step, so they were probably left out.",
    fix="check the optimiser's parameter groups and requires_grad for this layer, then train on",
    reference="https://arxiv.org/abs/2003.00152",
)
def affine_untouched(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Gain exactly 1 and shift exactly 0 in a layer whose statistics are real, while other layers learnt.

    Left out of the optimiser, added after training, reset by an initialiser that ran too late, or trained in
    bfloat16 with steps smaller than the last digit of 1. Info where it looks like a choice: no norm layer of
    the model ever moved (said once), or this one has no gradient.

    Example: gamma 1 and beta 0 in all 64 channels of head.bn, after 25,301 updates; 19 other layers moved.
    """
    untouched = [layer for layer in layers if _untouched(layer) and not layer.numbers.default_statistics]
    if not untouched:
        return
    affine = [layer for layer in context.model.layers if layer.weight is not None]
    moved = sum(1 for layer in affine if layer.numbers.gain.any() and not _untouched(layer))
    if not moved:
        yield Observation(
            message=f"Gain 1 and shift 0 in {plural(len(untouched), 'layer')} with real statistics, and no "
            "norm layer of the model ever moved: trained without them by design?",
            evidence={"layers": len(untouched), "moved": 0},
            severity=Severity.INFO,
        )
        return
    for layer in untouched:
        by_design = frozen(layer)
        yield Observation(
            layer=layer,
            message=(
                f"Gain is exactly 1 and shift exactly 0 in all {len(layer.numbers.gain)} channels, although "
                f"the statistics are real and {plural(moved, 'other norm layer')} moved."
                + (" Frozen by design?" if by_design else "")
            ),
            channels=range(len(layer.numbers.gain)),
            evidence={"moved": moved},
            severity=Severity.INFO if by_design else None,
        )


def _untouched(layer: NormLayer) -> bool:
    # The first value decides nearly always: this runs for every layer.
    gain = layer.numbers.gain
    return bool(gain[0] == 1 and (gain == 1).all() and not layer.numbers.shift.any())


@rule(
    "A205",
    "gain-explosion",
    severity=Severity.WARNING,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("weight", "running_var", "eps"),
    why="Small errors of the input or of the statistics are multiplied by this; so are folded weights.",
    fix="quantise this layer per channel or keep it in float32; compare the output after folding",
    reference="https://github.com/LeelaChessZero/lc0/issues/779",
    limits={"of_median": 100.0, "absolute": 1e3, "signal": 0.01},
)
def gain_explosion(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """A channel is multiplied by far more than the others: |gamma| / sqrt(var + eps) is huge.

    More than 100 times the layer's median (8 channels or more), or more than 1000. Either the variance
    collapsed while gamma did not, or gamma grew. Healthy layers stay below 11 times the median.

    Info only where the input of the channel never varies (gamma * sqrt(var / (var + eps)) below 1 % of a
    typical gain): a huge factor times nothing. Example: 1,902 in a layer whose median is 4.3.
    """
    eps, limits = usable_eps(layer), context.limits
    if eps is None:
        return
    scale = np.abs(layer.numbers.scale(eps))
    if scale.max() <= min(limits["absolute"], limits["of_median"] * scale.min()):
        return  # the median is not below the smallest
    largest = float(np.nanmax(scale)) if not np.isnan(scale).all() else 0.0
    middle = median(scale[in_use(layer) & np.isfinite(scale)])
    bar = limits["absolute"]
    if middle > 0 and for_size(len(scale), Severity.WARNING) is not None:
        bar = min(bar, limits["of_median"] * middle)
    if largest <= bar:
        return
    huge = scale > bar
    # eps 0 and variance 0: infinity times an input that never varies is NaN, not nothing.
    alive = huge & (carries_signal(layer, eps, limits["signal"]) | np.isinf(scale))
    silent = where(huge & ~alive)
    channels = where(alive) or silent
    shown = float(scale[channels].max())
    ratio = shown / middle if middle > 0 and np.isfinite(shown) else None
    times = "" if ratio is None else f", {number(ratio)} times the layer's median"
    message = f"The factor gamma / sqrt(var + eps) reaches {number(shown)}{times}: {some_of(channels, len(scale))}."
    if silent:
        message += (
            f" Also in {plural(len(silent), 'channel')} whose input does not vary."
            if alive.any()
            else " Their input does not vary, so nothing is multiplied."
        )
    sure = len(scale) >= ENOUGH or shown > limits["absolute"]
    yield Observation(
        message=message,
        channels=channels,
        evidence={
            "largest": shown if np.isfinite(shown) else None,
            "median": middle,
            "ratio": ratio,
            "silent_channels": silent,
        },
        severity=Severity.WARNING if alive.any() and sure else Severity.INFO,
        rank=shown if alive.any() and np.isfinite(shown) else 0.0,
    )


@rule(
    "A207",
    "neutralised-norm",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    kinds=TRACKING_KINDS,
    needs=("weight", "running_mean", "running_var", "eps"),
    why="In eval mode the layer returns its input, so it can be removed.",
    fix="remove the layer, or fold it; nothing to repair",
    reference="https://arxiv.org/abs/1502.03167",
    limits={"near": 0.05, "share": 0.9},
)
def neutralised_norm(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """Gain and shift undo the normalisation: gamma is the standard deviation and beta the mean.

    With gamma = sqrt(var + eps) and beta = mean an eval-mode BatchNorm is the identity. In trained networks
    at most 0.7 % of the channels come within 5 % of that, so 90 % of a layer is no accident: training learnt
    to do without, or a tool inserted the layer that way on purpose. Layers of 8 channels or more.

    Example: |gamma / sqrt(var + eps) - 1| has the median 0.004 over 64 channels.
    """
    mean, var, eps, limits = layer.numbers.mean, layer.numbers.var, usable_eps(layer), context.limits
    assert mean is not None and var is not None
    if eps is None or len(var) < FEW or layer.numbers.default_statistics:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        spread = np.sqrt(var + eps)
        off = np.abs(layer.numbers.gain - spread)
        near = off <= limits["near"] * spread
        if np.count_nonzero(near) < limits["share"] * len(var):
            return
        near &= np.abs(layer.numbers.shift - mean) <= limits["near"] * spread
    if np.count_nonzero(near) < limits["share"] * len(var):
        return
    channels = where(near)
    index = median(off[near] / spread[near])
    yield Observation(
        message=(
            f"gamma is the standard deviation and beta the mean, within {percent(limits['near'])}, in "
            f"{some_of(channels, len(var))} (median deviation {number(index)}): eval mode is the identity."
        ),
        channels=channels,
        evidence={"share": len(channels) / len(var), "neutralisation_index": index},
    )


RULES: tuple[Rule, ...] = (
    nonfinite_affine,
    switched_off_channels,
    residual_branch_off,
    affine_untouched,
    gain_explosion,
    neutralised_norm,
)
