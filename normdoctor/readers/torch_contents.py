"""What a torch pickle holds: state_dicts, modules and the training state around them → models.

Containers nest: {"state_dict": ..., "state_dict_ema": ..., "optimizer": ...}. Optimizer, scheduler and scaler
state repeats the shapes of norm tensors under other names and is never entered.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from normdoctor.layers import ArrayRef, Model, Reference
from normdoctor.readers.finishing import Budget
from normdoctor.readers.load_calls import is_module_state
from normdoctor.readers.modules import ModuleRecord, notes_on_lazy, read_modules
from normdoctor.readers.naming import FLAT_PARAMETER, read_names, why_no_norms
from normdoctor.readers.pickle_records import Call, Global
from normdoctor.readers.torch_tensors import TensorReader

TRAINING_STATE = re.compile(
    r"(^|_)(optim|optimizers?|optimizer_states?|schedulers?|lr_schedulers?|scaler|grad_scaler|amp|rng_state|"
    r"callbacks|loops|hyper_parameters|hparams|exp_avg|exp_avg_sq|momentum_buffer|shadow_params)(_|$)"
)
CONTAINERS = re.compile(
    r"^(state_dict|model|model_state_dict|module|net|network|ema|model_ema|state_dict_ema|ema_state_dict|"
    r"teacher|student|generator|discriminator|encoder|decoder|backbone|weights|params|params_ema|"
    r"[GD](_ema)?|online|target)$"
)
"""Keys under which a whole model is stored, rather than one level of a nested state_dict."""
AVERAGED_KEYS = re.compile(r"(^|[_.])(ema|swa|averaged|polyak)([_.]|$)|_ema$", re.IGNORECASE)

COMPILED_MODULE = Global("torch._dynamo.eval_frame", "OptimizedModule")

MAX_DEPTH = 12
MAX_NODES = 500_000
"""Dictionaries, lists and objects that are searched for models."""


@dataclass
class _Found:
    """A state_dict or module and the keys that lead to it."""

    keys: tuple[str, ...]
    tensors: dict[str, ArrayRef] = field(default_factory=dict)
    module: ModuleRecord | None = None


@dataclass
class Contents:
    """What find_models found."""

    models: list[Model] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be read, in sentences."""
    references: list[Reference] = field(default_factory=list)
    """The tensors of all models under all their names."""


def find_models(value: object, reader: TensorReader) -> Contents:
    """All models in an unpickled value, in order."""
    contents = Contents()
    budget = Budget()
    found = _join_levels(_search(value, reader, budget, contents.notes))
    outcomes = [(item, *_read(item, budget)) for item in found]
    # One model stays without a key: tensors beside it (best_acc1) make it none of several.
    several = sum(bool(model.layers) for _, model, _ in outcomes) > 1
    for item, model, references in outcomes:
        key = model.key if several or not model.layers else None
        prefix = f"{key}:" if key else ""
        contents.references += [Reference(prefix + ref.name, ref.array) for ref in references]
        if model.averaged is None and any(AVERAGED_KEYS.search(part) for part in item.keys):
            model = replace(model, averaged=f"stored under {'.'.join(item.keys)}")
        flat = [name for name in item.tensors if FLAT_PARAMETER.search(name)]
        if flat:
            contents.notes.append(
                f"{len(flat)} flat FSDP parameters ({flat[0]}): norm weights inside them are not separable; "
                "save a full state_dict (StateDictType.FULL_STATE_DICT) to have them judged"
            )
        contents.models.append(with_key(model, key))
    contents.notes += notes_on_lazy(contents.models)
    if not any(model.layers for model in contents.models) and not contents.notes:
        why = why_no_norms({reference.name: reference.array for reference in contents.references})
        contents.notes += [f"no norm layers: {why}"] if why else []
    inner = value.get("optimizer_state_dict") if isinstance(value, dict) else None
    if isinstance(inner, dict) and "zero_stage" in inner and not any(m.layers for m in contents.models):
        contents.notes.append("a DeepSpeed ZeRO shard: the parameters in it are flat and not separable")
    return contents


def _read(item: _Found, budget: Budget) -> tuple[Model, tuple[Reference, ...]]:
    key = ".".join(item.keys) or None
    if item.module is not None:
        return read_modules(item.module, key, budget)
    references = tuple(Reference(name, array) for name, array in item.tensors.items())
    return read_names(item.tensors, key, budget), references


def with_key(model: Model, key: str | None) -> Model:
    """Layer names as `key:path`, so that equal layers of several models stay apart."""
    if key is None:
        return replace(model, key=None)
    layers = tuple(
        replace(layer, name=f"{key}:{layer.name}", aliases=tuple(f"{key}:{alias}" for alias in layer.aliases))
        for layer in model.layers
    )
    return replace(model, layers=layers)


def describe(value: object, models: Iterable[Model]) -> str:
    """In words, what the file holds."""
    count = sum(bool(model.layers) for model in models)
    if count > 1:
        return f"checkpoint of {count} models"
    if isinstance(value, Call) and is_module_state(_state_of(value)):
        return "module"
    if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
        return "checkpoint"
    return "state_dict"


def _mapping(value: object) -> Mapping[Any, Any] | None:
    if isinstance(value, dict):
        return value
    if isinstance(value, Call) and value.items is not None:
        return value.items  # a defaultdict, an addict.Dict, ...
    return None


def _search(root: object, reader: TensorReader, budget: Budget, notes: list[str]) -> list[_Found]:
    """Every module and every dictionary that holds tensors directly, outside of training state."""
    found: list[_Found] = []
    seen: set[int] = set()
    stack: list[Iterator[tuple[tuple[str, ...], object]]] = [iter([((), root)])]
    while stack:
        keys, value = next(stack[-1], ((), None))
        if value is None:
            stack.pop()
            continue
        # Several objects may share one state, and a pickle can make a million such objects.
        state = _state_of(value) if isinstance(value, Call) else None
        identities = {id(value), id(state)} if state is not None else {id(value)}
        if seen & identities or len(keys) > MAX_DEPTH:
            continue
        if len(seen) > MAX_NODES:
            notes.append(f"only the first {MAX_NODES:,} objects in the file were searched for models")
            break
        seen |= identities
        if isinstance(value, Call) and is_module_state(state):
            found.append(_Found(keys, module=PickledModule(value, reader)))
            continue
        mapping, is_state = _mapping(value), False
        if mapping is None and isinstance(state, dict):
            mapping, is_state = state, True  # an object with a model inside: an EMA wrapper, a trainer
        if mapping is not None:
            if "param_groups" in mapping and "state" in mapping:
                continue
            item = _Found(keys)
            for name, tensor in () if is_state else _tensors_in(mapping, reader):
                budget.spend_names(sum(map(len, keys)) + len(name))
                item.tensors[name] = tensor
            if item.tensors:
                found.append(item)
            kinds = (dict, Call) if is_state else (dict, Call, list, tuple)
            stack.append(_values_in(keys, mapping, kinds, reader))
        elif isinstance(value, (list, tuple)):
            stack.append(_places_in(keys, value))
    return found


def _tensors_in(mapping: Mapping[Any, Any], reader: TensorReader) -> Iterator[tuple[str, ArrayRef]]:
    for name, inner in mapping.items():
        if isinstance(name, str) and not _is_training_state(name):
            tensor = reader.tensor(inner)
            if tensor is not None:
                yield name, tensor.array


def _values_in(
    keys: tuple[str, ...], mapping: Mapping[Any, Any], kinds: tuple[type, ...], reader: TensorReader
) -> Iterator[tuple[tuple[str, ...], object]]:
    """The values of these kinds in a mapping, which are to be searched further."""
    for name, inner in mapping.items():
        if (
            isinstance(inner, kinds)
            and isinstance(name, str)
            and not _is_training_state(name)
            and reader.tensor(inner) is None
        ):
            yield (*keys, name), inner


def _places_in(keys: tuple[str, ...], values: Sequence[object]) -> Iterator[tuple[tuple[str, ...], object]]:
    for place, inner in enumerate(values):
        if isinstance(inner, (dict, Call)):
            yield (*keys, str(place)), inner


def with_unnamed(named: Sequence[Reference], root: object, reader: TensorReader) -> tuple[Reference, ...]:
    """The references, and one without a name for each tensor below `root` that stands in more places than they name."""
    names = Counter(id(reference.array) for reference in named)
    unnamed = [Reference("", array) for array, count in uses_of_tensors(root, reader) if count > names[id(array)]]
    return (*named, *unnamed)


def uses_of_tensors(root: object, reader: TensorReader) -> list[tuple[ArrayRef, int]]:
    """Every tensor below `root`, training state included, and in how many places it stands."""
    uses: dict[int, list[Any]] = {}
    seen: set[int] = set()
    stack: list[object] = [root]
    while stack:
        value = stack.pop()
        tensor = reader.tensor(value)
        if tensor is not None:
            uses.setdefault(id(tensor.array), [tensor.array, 0])[1] += 1
            continue
        if id(value) in seen or not isinstance(value, (dict, list, tuple, Call)):
            continue
        seen.add(id(value))
        if isinstance(value, Call):
            stack += [value.args, value.state, value.items, value.members]
        else:
            stack += value.values() if isinstance(value, dict) else value
    return [(array, count) for array, count in uses.values()]


def _is_training_state(key: str) -> bool:
    """Whether training state is kept under `key`. A path with dots is a parameter's."""
    if "." in key or key.startswith(("model", "module", "state_dict")):
        return False
    return bool(TRAINING_STATE.search(key))


def _join_levels(found: list[_Found]) -> list[_Found]:
    """Join the levels of a nested state_dict ({"layer1": {"bn": {"weight": ...}}}) into one flat one.

    A dictionary is a level, not a model of its own, when the names in it have no dots and its key is not one
    under which whole models are kept."""
    joined: list[_Found] = []
    roots: dict[tuple[str, ...], _Found] = {}
    for item in found:
        keys = item.keys
        start = 0
        for place, key in enumerate(keys, start=1):
            if CONTAINERS.match(key):
                start = place
        is_level = item.module is None and start < len(keys) and not any("." in name for name in item.tensors)
        home = keys[:start] if is_level else keys
        if item.module is not None or (not is_level and home not in roots):
            joined.append(item)
            if item.module is None:
                roots[home] = item
            continue
        if home not in roots:
            roots[home] = _Found(home)
            joined.append(roots[home])
        prefix = ".".join(keys[len(home) :])
        for name, tensor in item.tensors.items():
            roots[home].tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return joined


def _state_of(call: Call) -> object:
    """The attributes an object would get; pickle gives (attributes, slots) where a class has slots.

    torch.compile's wrapper has none: it is pickled as a call with the module it wraps."""
    if call.state is None and call.function == COMPILED_MODULE and call.args:
        call.state = {"_parameters": {}, "_modules": {"_orig_mod": call.args[0]}}
    state = call.state
    return state[0] if isinstance(state, tuple) and len(state) == 2 else state


class PickledModule:
    """A pickled nn.Module, as its inert record. tree: the modules met so far, by identity."""

    def __init__(self, call: Call, reader: TensorReader, tree: dict[int, PickledModule] | None = None) -> None:
        self._call = call
        self._reader = reader
        self._tree: dict[int, PickledModule] = {} if tree is None else tree
        state = _state_of(call)
        assert isinstance(state, dict)
        self._state: dict[Any, Any] = state

    @property
    def identity(self) -> int:
        return id(self._call)

    @property
    def class_names(self) -> tuple[str, ...]:
        function = self._call.function
        if isinstance(function, Global) and function.full_name == "copyreg._reconstructor" and self._call.args:
            function = self._call.args[0]
        return (function.full_name,) if isinstance(function, Global) else ("?",)

    @property
    def attributes(self) -> Mapping[str, Any]:
        return self._state

    @cached_property
    def _own(self) -> dict[str, Any]:
        own = {}
        for table in ("_parameters", "_buffers"):
            for name, record in (_mapping(self._state.get(table)) or {}).items():
                tensor = self._reader.tensor(record)
                if tensor is not None and isinstance(name, str):
                    own[name] = tensor
        return own

    @cached_property
    def tensors(self) -> Mapping[str, ArrayRef]:
        return {name: tensor.array for name, tensor in self._own.items()}

    @property
    def trainable(self) -> bool | None:
        flags = [tensor.requires_grad for tensor in self._own.values() if tensor.requires_grad is not None]
        return any(flags) if flags else None

    def children(self) -> Iterable[tuple[str, ModuleRecord]]:
        for name, child in (_mapping(self._state.get("_modules")) or {}).items():
            if isinstance(name, str) and isinstance(child, Call) and is_module_state(_state_of(child)):
                if id(child) not in self._tree:
                    self._tree[id(child)] = PickledModule(child, self._reader, self._tree)
                yield name, self._tree[id(child)]
