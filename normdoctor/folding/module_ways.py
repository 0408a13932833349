"""Other ways through the code of a module: inputs of other shapes and other arguments, on which the proof runs too.

A module is folded along the one way that was traced. Code that asks for a shape or an argument may take another way
elsewhere, where a folded weight or a norm that is gone is wrong. A graph has one way only; nothing here is for it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from normdoctor.folding.records import Proof, ProofState
from normdoctor.folding.subjects import Feed
from normdoctor.folding.verify import TIMES_NOISE, Reference, Running
from normdoctor.models.inputs import Example
from normdoctor.models.loaded import named_inputs, parameters_of
from normdoctor.readers.live_module import is_tensor

if TYPE_CHECKING:
    from normdoctor.models.loaded import Loaded

BATCHES = (1, 3, 5)

SECONDS = 20.0
"""How long all of them may take together."""


def variants_of(loaded: Loaded, example: Example) -> Iterator[Feed]:
    """Inputs like the example in other shapes, and with each switch of forward turned; the cheap ones first.

    Which of them the model takes shows only when it runs."""
    from normdoctor.folding.with_torch import tensors_of, with_length

    tensors = list(tensors_of(example))
    batch = next((tensor.shape[0] for tensor in tensors if tensor.ndim > 1), 0)
    images = [tensor for tensor in tensors if tensor.ndim > 2 and tensor.is_floating_point()]
    axes = {axis: tensor.shape[axis] for tensor in reversed(images) for axis in range(2, tensor.ndim)}

    def with_batch(new: int) -> Callable[[], Example]:
        return lambda: with_length(example, 0, batch, new)

    def scaled(chosen: Iterable[int], double: bool) -> Callable[[], Example]:
        def make() -> Example:
            result = example
            for axis in chosen:
                old = axes[axis]
                result = with_length(result, axis, old, old * 2 if double else max(old // 2, 1), images=True)
            return result

        return make

    groups = [[axis] for axis in sorted(axes)] + ([sorted(axes)] if len(axes) > 1 else [])
    makers = [with_batch(new) for new in BATCHES if batch and new < batch]
    makers += [scaled(group, False) for group in groups if any(axes[axis] > 1 for axis in group)]
    later = [with_batch(new) for new in BATCHES if batch and new > batch]
    later += [scaled(group, True) for group in groups if any(axes[axis] for axis in group)]
    size = _size(tensors)
    for maker in makers:
        yield from _shaped(loaded, maker)
    for name, value in _switches(loaded, example):
        yield Feed(Example(example.args, {**example.kwargs, name: value}), f"with {name}={value}", size)
    for maker in later:
        yield from _shaped(loaded, maker)


def _shaped(loaded: Loaded, make: Callable[[], Example]) -> Iterator[Feed]:
    from normdoctor.folding.with_torch import tensors_of

    with suppress(RuntimeError, TypeError):  # a kind of tensor that cannot be indexed
        example = make()
        shapes = {name: value.shape for name, value in named_inputs(loaded, example).items() if is_tensor(value)}
        words = ", ".join(f"{name} {'x'.join(map(str, shape)) or '1'}" for name, shape in shapes.items())
        yield Feed(example, f"for inputs {words}" if words else "for other shapes", _size(tensors_of(example)))


def _size(tensors: Iterable[Any]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _switches(loaded: Loaded, example: Example) -> Iterator[tuple[str, bool]]:
    """The arguments of forward that are True or False unless given, and are not given, turned."""
    given = {*parameters_of(loaded)[: len(example.args)], *example.kwargs}
    try:
        found = inspect.signature(loaded.module.forward).parameters.values()
    except (TypeError, ValueError):
        return
    for parameter in found:
        if isinstance(parameter.default, bool) and parameter.name not in given:
            yield parameter.name, not parameter.default


class Tried(NamedTuple):
    """What other inputs showed."""

    words: str = ""
    """Which were tried, to go behind what the proof ran on."""
    failed: tuple[Feed, Reference, Proof] | None = None
    """The first on which the two models differ."""


def try_variants(
    original: Running,
    feed: Feed,
    noise: float,
    measured: Callable[[Feed], Reference],
    compared: Callable[[Feed, Reference], Proof],
) -> Tried:
    """Run both models on the variants of a feed, until one shows a difference or the time is up.

    noise: of the original on the feed itself. measured: what the original makes of inputs, with the noise there; it is
    asked only where something seems to differ. compared: what the folded model makes of the same."""
    begin = time.perf_counter()
    slowest = 0.0  # seconds per number
    shapes = switches = 0
    for variant in feed.variants:
        start = time.perf_counter()
        if start - begin + slowest * variant.size > SECONDS:
            continue
        try:
            reference = Reference(original.run(variant.inputs), None, "", "")
        except Exception:  # the code of a model raises anything; what it does not take it is not asked for
            continue
        if _differs(compared(variant, reference), noise):
            reference = measured(variant)
            proof = compared(variant, reference)
            if _differs(proof, noise):
                return Tried(failed=(variant, reference, replace(proof, reason=_reason(variant, proof))))
        slowest = max(slowest, (time.perf_counter() - start) / max(variant.size, 1))
        same = variant.words.startswith("with ")
        switches += same
        shapes += not same
    parts = [f"{n} other {word}{'s' * (n > 1)}" for n, word in ((shapes, "shape"), (switches, "argument")) if n]
    return Tried(" and ".join(parts))


def _differs(proof: Proof, noise: float) -> bool:
    if proof.state is not ProofState.FAILED:
        return False
    failed = [difference for difference in proof.differences if not difference.ok]
    return not failed or any(difference.error > TIMES_NOISE * noise for difference in failed)


def _reason(variant: Feed, proof: Proof) -> str:
    error = proof.error
    how = f"off by {error:.2g}" if error is not None and math.isfinite(error) else proof.reason
    return f"{variant.words} its code takes another way, and there the folded module computes something else ({how})"
