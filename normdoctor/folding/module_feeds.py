"""What a model of torch's is run on for the proof."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from normdoctor.data.wanted import Wanted
from normdoctor.errors import UsageError, did_you_mean
from normdoctor.folding.data import load_data, read_data
from normdoctor.folding.opening import Request
from normdoctor.folding.subjects import Feed
from normdoctor.models.inputs import Example
from normdoctor.models.loaded import Kind, described, example_of, parameters_of, required_of

if TYPE_CHECKING:
    from normdoctor.models.loaded import Loaded


def example_for(request: Request, loaded: Loaded) -> Example:
    """What a model is traced with: the caller's own example, --data itself, or random numbers of the shapes given.

    Raises UsageError where there is none of them, or one does not fit the model or another."""
    from normdoctor.models.with_torch import make_example

    if request.data is None:
        if request.example_inputs is not None:
            return example_of(request.example_inputs)
        return make_example(loaded, request.specs, seed=request.seed)
    if request.example_inputs is not None:
        return _replaced(request, loaded, example_of(request.example_inputs))
    if loaded.kind is Kind.PROGRAM and not request.specs and loaded.model.example_inputs is not None:
        return _replaced(request, loaded, make_example(loaded, ()))
    return _from_data(request, loaded)


def _replaced(request: Request, loaded: Loaded, example: Example) -> Example:
    """An example with --data in the place of its tensors, in their types."""
    from normdoctor.folding.with_torch import named_tensors, with_arrays

    assert request.data is not None
    named = list(named_tensors(loaded, example))
    wanted = [
        Wanted(name, (None,) * tensor.ndim, str(tensor.dtype).removeprefix("torch.")) for name, _, tensor in named
    ]
    arrays = load_data(request.data, wanted)
    return with_arrays(example, {name: place for name, place, _ in named}, arrays)


def _from_data(request: Request, loaded: Loaded) -> Example:
    """The arguments of forward as --data has them: lengths and types are those of the arrays, but numbers with a
    fraction come in the float type of the model unless --input-shape names another."""
    from normdoctor.folding.with_torch import argument_of

    assert request.data is not None
    takes = parameters_of(loaded)
    plain = [name for name in takes if not name.startswith("*")]
    needed = required_of(loaded)
    only = (needed or plain)[:1] if len(needed) < 2 else needed
    arrays = dict(read_data(request.data, [Wanted(name, None) for name in only or ["input_0"]]))
    rest = [name for name in takes if name.startswith("*")]
    places = [f"input_{place}" for place in range(len(arrays))] if rest and not rest[0].startswith("**") else []
    known = [*plain, *places[len(plain) :]]
    listed = f"It takes {', '.join(takes) or 'no arguments'}."
    for name in arrays:
        if name not in known and not any(name.startswith("**") for name in rest):
            raise UsageError(f"{request.data}: {loaded.name} takes no {name}", did_you_mean(name, known) + listed)
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise UsageError(f"{request.data}: has nothing for input {missing[0]}", listed)
    specs = {
        spec.name or (known[place] if place < len(known) else ""): spec for place, spec in enumerate(request.specs)
    }
    for name, spec in specs.items():
        if name not in arrays or arrays[name].shape != spec.shape:
            found = "x".join(map(str, arrays[name].shape)) or "a single number" if name in arrays else "not there"
            raise UsageError(
                f"--input-shape {spec}: in {request.data} {name or 'it'} is {found}",
                "Leave --input-shape out: the shapes are those of the data.",
            )
    values = {}
    for name, array in arrays.items():
        dtype = specs[name].dtype if name in specs else None
        values[name] = argument_of(loaded, request.data, name, array, dtype)
    args = []
    for name in known:  # by place as far as there is no gap: what was exported by place takes no names
        if name not in values:
            break
        args.append(values.pop(name))
    return Example(tuple(args), values)


def feeds_of(request: Request, loaded: Loaded, example: Example, *, several: bool) -> Iterator[Feed]:
    """What the proof runs on: --data, the caller's own example, or random numbers of the shapes given.

    several: first with at least two samples, since a fold over the batch would not show in one."""
    from normdoctor.models.with_torch import make_example

    if request.data is not None:
        yield Feed(example, str(request.data))
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
            yield Feed(doubled, f"random numbers of seed {request.seed}: {described(loaded, doubled)}")
        yield Feed(example, f"random numbers of seed {request.seed}: {described(loaded, example)}")
