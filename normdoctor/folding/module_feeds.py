"""What a model of torch's is run on for the proof."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from normdoctor.folding.data import Wanted, load_data
from normdoctor.folding.opening import Request
from normdoctor.folding.subjects import Feed
from normdoctor.models.inputs import Example

if TYPE_CHECKING:
    from normdoctor.models.loaded import Loaded


def feeds_of(request: Request, loaded: Loaded, example: Example, *, several: bool) -> Iterator[Feed]:
    """What the proof runs on: --data, the caller's own example, or random numbers of the shapes given.

    several: first with at least two samples, since a fold over the batch would not show in one."""
    from normdoctor.folding.with_torch import named_tensors, with_arrays
    from normdoctor.models.with_torch import make_example

    if request.data is not None:
        named = list(named_tensors(loaded, example))
        wanted = [
            Wanted(name, (None,) * tensor.ndim, str(tensor.dtype).removeprefix("torch.")) for name, _, tensor in named
        ]
        arrays = load_data(request.data, wanted)
        yield Feed(with_arrays(example, {name: place for name, place, _ in named}, arrays), str(request.data))
        return
    if request.example_inputs is not None:
        yield Feed(example, "the example inputs given")
    elif not request.specs:
        yield Feed(example, "the example inputs in the file")
    else:
        specs = request.specs
        lengths = {spec.shape[0] for spec in specs if spec.shape}
        if several and lengths == {1}:
            pairs = [replace(spec, shape=(2, *spec.shape[1:])) if spec.shape else spec for spec in specs]
            doubled = make_example(loaded, pairs, seed=request.seed)
            yield Feed(doubled, f"random numbers of seed {request.seed}: {doubled}")
        yield Feed(example, f"random numbers of seed {request.seed}: {example}")
