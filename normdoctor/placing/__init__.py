"""A checkpoint → the same with the place of each norm in the graph of its network.

The graph is that of the file (ONNX, .pt2), or is traced from the module that the user lets torch load. Where there is
none, names and shapes say what they can. Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from normdoctor.errors import CannotRunError, InputError, MisfitError, RefusedError, UsageError
from normdoctor.layers import VECTORS, ArrayRef, Checkpoint, Container, Danger, Model, NormLayer, as_vector
from normdoctor.models.inputs import parse_input_shapes
from normdoctor.models.opening import RunOptions, layers_of, load_for
from normdoctor.places import Place

if TYPE_CHECKING:
    from normdoctor.flow.graph import Graph
    from normdoctor.models.inputs import Example
    from normdoctor.models.loaded import Loaded

SKIPPED = "rules that need it are skipped"

TORCHSCRIPT = "torch.jit.load"
"""`Checkpoint.loader` of TorchScript."""


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """How a graph is come by, where the file has none."""

    run: RunOptions = field(default_factory=RunOptions)
    input_shape: tuple[str, ...] = ()
    """As --input-shape has them: what a module is traced with."""
    example_inputs: Any = None
    """The inputs themselves, in their place."""
    largest: bool = False
    """Whether whole weights are read where the graph is only guessed."""


def place_options(
    *,
    live: bool = False,
    input_shape: str | Iterable[str] = (),
    example_inputs: Any = None,
    trust: bool = False,
    arch: str | None = None,
    arch_args: str | Mapping[str, Any] | None = None,
    key: str | None = None,
) -> PlaceOptions:
    """The options of `inspect` that say how a graph is come by. Raises UsageError for those that make no sense.

    live: the model is a module in memory, and no file."""
    shapes = (input_shape,) if isinstance(input_shape, str) else tuple(input_shape)
    parse_input_shapes(shapes)
    if arch is None and arch_args is not None:
        raise UsageError("--arch-args without --arch", "Name the class or function with --arch.")
    if shapes and example_inputs is not None:
        raise UsageError("--input-shape and example inputs exclude each other", "Leave out one of them.")
    if not live and not trust and arch is None:
        for option, given in (("--input-shape", shapes), ("example_inputs", example_inputs), ("--key", key)):
            if given is not None and given != ():
                raise UsageError(
                    f"{option} is for models that torch runs", f"Add --trust or --arch, or leave {option} out."
                )
    run = RunOptions(trust=trust, arch=arch, arch_args=arch_args, key=key)
    return PlaceOptions(run=run, input_shape=shapes, example_inputs=example_inputs)


@dataclass(frozen=True, eq=False)
class Found:
    """Where the norms of a checkpoint stand, by the names of the layers."""

    places: Mapping[str, Place] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """eps and momentum of the module that each layer is, where a module was built for bare weights."""
    notes: tuple[str, ...] = ()


def placed(model: Any, checkpoint: Checkpoint, asked: PlaceOptions) -> Checkpoint:
    """The checkpoint with the place of each norm that a graph has. model: the path or live module behind it.

    A graph that cannot be had is noted. Raises UsageError, RefusedError and InputError where the user's own options do
    not fit: an architecture for other weights, no shapes of inputs."""
    return with_places(checkpoint, find_places(model, checkpoint, asked))


def with_places(checkpoint: Checkpoint, found: Found) -> Checkpoint:
    """The checkpoint with these places and notes."""
    models = tuple(_told(model, found) for model in checkpoint.models)
    return replace(checkpoint, models=models, notes=(*checkpoint.notes, *found.notes))


def _told(model: Model, found: Found) -> Model:
    layers = []
    for layer in model.layers:
        settings = {
            name: value for name, value in found.settings.get(layer.name, {}).items() if getattr(layer, name) is None
        }
        told = replace(layer, place=found.places.get(layer.name), **settings)
        told.__dict__["numbers"] = layer.numbers  # the tensors are the same: keep what was read
        layers.append(told)
    return replace(model, layers=tuple(layers))


def find_places(model: Any, checkpoint: Checkpoint, asked: PlaceOptions) -> Found:
    """The places as far as they can be told. Raises what `placed` raises."""
    run = asked.run
    if run.arch is None and checkpoint.graphs:
        return in_file(checkpoint)
    if not _is_traced(checkpoint, asked):
        from normdoctor.placing.names import places_by_names

        return Found(places_by_names(checkpoint, largest=asked.largest))
    from normdoctor.models.with_torch import make_example

    loaded = load_for(model, checkpoint, run)
    if asked.example_inputs is not None:
        from normdoctor.models.loaded import example_of

        example = example_of(asked.example_inputs)
    else:
        example = make_example(loaded, parse_input_shapes(asked.input_shape))
    found = in_loaded(loaded, example, layers_of(checkpoint, run.key))
    return replace(found, notes=(*loaded.notes, *found.notes))


def _is_traced(checkpoint: Checkpoint, asked: PlaceOptions) -> bool:
    """Whether the user lets torch make a graph. Raises UsageError for options that mean nothing for the file."""
    run = asked.run
    if checkpoint.container is Container.ONNX and run.arch is not None:
        raise UsageError(f"{checkpoint.path}: --arch means nothing for an ONNX file", "Leave out --arch.")
    if checkpoint.container is Container.MEMORY:
        return asked.example_inputs is not None or bool(asked.input_shape)
    has_code = checkpoint.loader == TORCHSCRIPT or any(
        call.danger is Danger.MODULE_CLASS for call in checkpoint.load_calls
    )
    return run.arch is not None or (run.trust and has_code)


def in_file(checkpoint: Checkpoint) -> Found:
    """The places in the graphs that the file has."""
    places: dict[str, Place] = {}
    notes: list[str] = []
    for key, read in checkpoint.graphs.items():
        found = _found(f"{key}: " if key else "", lambda read=read: read())  # type: ignore[misc]
        places |= found.places
        notes += found.notes
    return Found(places, notes=tuple(notes))


def in_loaded(loaded: Loaded, example: Example, layers: Sequence[NormLayer]) -> Found:
    """The places in the graph of a model of torch. layers: its norms, as the file has them.

    Raises MisfitError for inputs that do not fit."""
    settings: dict[str, dict[str, Any]] = {}
    return replace(_found("", lambda: _traced(loaded, example, layers, settings)), settings=settings)


def _found(prefix: str, read: Callable[[], Any]) -> Found:
    from normdoctor.flow.surroundings import places_of

    try:
        return Found(places_of(read()))
    except MisfitError:
        raise
    except (InputError, RefusedError, CannotRunError) as error:
        return Found(notes=(f"{prefix}the graph could not be read ({error.message}): {SKIPPED}",))


def _traced(
    loaded: Loaded, example: Example, layers: Sequence[NormLayer], settings: dict[str, dict[str, Any]]
) -> Graph:
    """The graph of a module, its norms those of the file. What the module says of them is left in `settings`."""
    from normdoctor.models.loaded import Kind

    if loaded.kind is Kind.SCRIPT:
        from normdoctor.torchscript.with_torch import read_script

        named = {name: layer for layer in layers for name in (layer.name, *layer.aliases)}
        graph = read_script(loaded, example, named).graph
        _tell_apart(graph, layers)
        return graph
    from normdoctor.models.norm_modules import layer_of
    from normdoctor.tracing.with_torch import trace

    graph = trace(loaded, example).graph
    own = {node.layer: layer_of(node.layer, layers) for node in graph.nodes if node.layer is not None}
    for node in graph.nodes:
        if node.layer is not None:
            node.layer = own[node.layer] or node.layer
    for live, layer in own.items():
        if layer is not None:
            settings[layer.name] = {"eps": live.eps, "momentum": live.momentum}
    return graph


def _tell_apart(graph: Graph, layers: Sequence[NormLayer]) -> None:
    """Freezing stores equal tensors once, under one name: of what a norm takes, all must be what its layer has.

    Norms that are equal in everything stay apart only as far as their names do."""
    by_values: dict[Any, list[NormLayer]] = {}
    for layer in layers:
        by_values.setdefault(tuple(_bytes(getattr(layer, role)) for role in VECTORS), []).append(layer)
    norms = [node for node in graph.nodes if node.layer is not None]
    claims = Counter(node.layer for node in norms)
    for node in norms:
        values = (node.given(slot) for slot in range(1, 1 + len(VECTORS)))
        found = by_values.get(tuple(_bytes(None if value is None else value.array) for value in values), [])
        if len(found) == 1:
            node.layer = found[0]
        elif node.layer not in found or claims[node.layer] > 1:
            node.layer, node.label = None, node.y.name


def _bytes(array: ArrayRef | None) -> bytes | None:
    values = as_vector(array)
    return None if values is None else values.tobytes()


__all__ = ["Found", "PlaceOptions", "find_places", "in_file", "in_loaded", "place_options", "placed", "with_places"]
