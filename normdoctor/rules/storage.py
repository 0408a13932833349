"""C: how the tensors are stored: averaged, of other lengths or types, under other names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from normdoctor.findings import Confidence, Context, Observation, Rule, Scope, Severity, rule
from normdoctor.layers import TRACKING_KINDS, VECTORS, NormKind, NormLayer
from normdoctor.measured import DriftVerdict
from normdoctor.rules.wording import REESTIMATE, both, plural


@rule(
    "C310",
    "averaged-weights-old-stats",
    severity=Severity.INFO,
    confidence=Confidence.MEDIUM,
    kinds=TRACKING_KINDS,
    needs=("running_mean", "running_var"),
    scope=Scope.MODEL,
    why="The weights are an average of several models, the statistics may still be those of one of them.",
    fix=f"unless the statistics were computed after averaging, {REESTIMATE}",
    reference="https://github.com/Lightning-AI/pytorch-lightning/issues/14866",
)
def averaged_weights_old_stats(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The file says that its weights are an average (EMA, SWA, a soup), and the model has running statistics.

    Averaged weights make other activations than any of the models they come from, so their statistics must be
    computed anew after averaging; a file cannot show whether they were. That the buffers were averaged along,
    as a counter with a fraction shows (S112), is not the same thing. Data shows it: a warning where the statistics
    are not those of the data (D603).

    Harmless where update_bn or the like ran afterwards. Example: n_averaged = 12; re-estimating took a digits
    CNN from 96.6 % to 98.7 %.
    """
    if context.model.averaged:
        verdict = DriftVerdict.UNKNOWN if context.drift is None else context.drift.verdict
        older = {DriftVerdict.STALE: "are older (D603)", DriftVerdict.HEALTHY: "fit them on this data"}
        yield Observation(
            message=f"Averaged weights: {context.model.averaged}. The running statistics of "
            f"{plural(len(layers), 'layer')} {older.get(verdict, 'may be older')}.",
            evidence={"averaged": context.model.averaged},
            severity=Severity.WARNING if verdict is DriftVerdict.STALE else None,
        )


@rule(
    "C311",
    "shape-mismatch",
    severity=Severity.ERROR,
    confidence=Confidence.HIGH,
    why="The layer cannot run; loading it or the first batch will fail.",
    fix="find which one was changed (pruned, resized, from another model) and bring the others along",
    reference="https://pytorch.org/docs/stable/generated/torch.nn.functional.batch_norm.html",
)
def shape_mismatch(layer: NormLayer, context: Context) -> Iterator[Observation]:
    """weight, bias, running_mean and running_var do not have the same number of values.

    Usual after pruning that forgot the buffers, after replacing a head, or when two checkpoints were merged
    key by key. No other rule can calculate with such a layer, so they skip it.

    Example: weight has 64 values, running_var 48.
    """
    lengths = layer.lengths
    if layer.lengths_agree:
        return
    groups: dict[int, list[str]] = {}
    for name in VECTORS:
        if name in lengths:
            groups.setdefault(lengths[name], []).append(name)
    said = [f"{both(fields)} {plural(size, 'value')}" for size, fields in groups.items()]
    what = "Lengths differ" if len(groups) > 1 else "Nothing is stored"
    yield Observation(message=f"{what}: {', '.join(said)}.", evidence=dict(lengths))


@rule(
    "C312",
    "foreign-names",
    severity=Severity.INFO,
    confidence=Confidence.HIGH,
    scope=Scope.MODEL,
    why="load_state_dict looks for torch's own names and finds none of these, silently so with strict=False.",
    fix="none for inspecting; for loading rename the keys in the same way, or take the wrapper off before saving",
    reference="https://github.com/huggingface/transformers/issues/29554",
)
def foreign_names(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """Tensors go by other names than torch's, or their paths contain what a wrapper put there.

    gamma and beta, moving_mean and moving_variance come from TensorFlow and Keras, scale from Flax, _mean and
    _variance from Paddle; `module.` from DataParallel, `_orig_mod.` from torch.compile, and the like from FSDP.
    Said once for the file, with what each name was taken for, so that a wrong guess can be seen.

    Harmless in itself. Example: gamma read as weight and beta as bias in 25 layers; module. left out of 53 paths.
    """
    read_as: dict[tuple[str, str], int] = {}
    for layer in layers:
        for field, stored in layer.stored_names.items():
            read_as[stored, field] = read_as.get((stored, field), 0) + 1
    wrapped = [layer for layer in layers if layer.wrappers]
    said = [f"{stored} read as {field} in {plural(count, 'layer')}" for (stored, field), count in read_as.items()]
    if wrapped:
        parts = list(dict.fromkeys(part for layer in wrapped for part in layer.wrappers))
        said.append(f"{both([f'{part}.' for part in parts])} left out of {plural(len(wrapped), 'path')}")
    if said:
        yield Observation(
            message=f"{'; '.join(said)}.",
            evidence={
                "read_as": [f"{stored}: {field}" for stored, field in read_as],
                "wrappers": list(dict.fromkeys(part for layer in wrapped for part in layer.wrappers)),
            },
        )


@rule(
    "C313",
    "dtype-disagrees",
    severity=Severity.WARNING,
    confidence=Confidence.HIGH,
    scope=Scope.MODEL,
    why="torch on a CPU refuses such a layer, and what is kept in fewer bits has lost digits for good.",
    fix="convert the layer as a whole (layer.float() or layer.to(dtype)) and save again",
    reference="https://github.com/pytorch/pytorch/issues/88474",
)
def dtype_disagrees(layers: tuple[NormLayer, ...], context: Context) -> Iterator[Observation]:
    """The tensors of one layer have different types, or a layer has another type than its siblings.

    Inside one layer: torch's CPU kernels raise "mixed dtype" or "expected scalar type Float but found Half";
    GPUs accept parameters in 16 bits beside statistics in float32, which mixed-precision training (FSDP with
    float32 buffers) leaves behind on purpose. Between layers of one kind it is only info: norms kept in
    float32 among 16-bit ones are usual, one in 16 bits among float32 ones is a leftover.

    Example: weight and bias float16, running_mean and running_var float32.
    """
    by_kind: dict[NormKind, list[tuple[NormLayer, str]]] = {}
    for layer in layers:
        types = {name: ref.dtype for name in VECTORS if (ref := getattr(layer, name)) is not None}
        distinct = set(types.values())
        if len(distinct) == 1:
            by_kind.setdefault(layer.kind, []).append((layer, distinct.pop()))
        elif distinct:
            said = [
                f"{both([name for name, have in types.items() if have == kind])} {kind}"
                for kind in dict.fromkeys(types.values())
            ]
            yield Observation(layer=layer, message=f"Types differ: {', '.join(said)}.", evidence=types, rank=1.0)
    for group in by_kind.values():
        yield from _unlike_siblings(group)


def _unlike_siblings(group: Sequence[tuple[NormLayer, str]]) -> Iterator[Observation]:
    table = Counter(dtype for _, dtype in group)
    usual, count = table.most_common(1)[0]
    if 2 * count <= len(group):
        return  # no usual type to differ from
    for layer, dtype in group:
        if dtype != usual:
            yield Observation(
                layer=layer,
                message=f"Stored as {dtype}, {count} of {len(group)} {layer.kind.value} layers as {usual}.",
                evidence={"dtype": dtype, "usual": usual},
                severity=Severity.INFO,
            )


RULES: tuple[Rule, ...] = (
    averaged_weights_old_stats,
    shape_mismatch,
    foreign_names,
    dtype_disagrees,
)
