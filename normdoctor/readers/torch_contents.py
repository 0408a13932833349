"""What a torch pickle holds: state_dicts, modules and the training state around them → models.

Containers nest: {"state_dict": ..., "state_dict_ema": ..., "optimizer": ...}. Optimizer, scheduler and scaler
state repeats the shapes of norm tensors under other names and is never entered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from normdoctor.layers import ArrayRef, Model, Reference
from normdoctor.readers.load_calls import is_module_state
from normdoctor.readers.modules import ModuleRecord, read_modules
from normdoctor.readers.naming import FLAT_PARAMETER, read_names
from normdoctor.readers.pickle_machine import Call, Global
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

MAX_DEPTH = 12
MAX_NODES = 500_000


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
    found = _join_levels(_search(value, reader))
    contents = Contents()
    several = len(found) > 1
    for item in found:
        key = ".".join(item.keys) if several and item.keys else None
        if item.module is not None:
            model, references = read_modules(item.module, key)
        else:
            model = read_names(item.tensors, key)
            references = tuple(Reference(name, array) for name, array in item.tensors.items())
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
        contents.models.append(_with_key(model, key))
    inner = value.get("optimizer_state_dict") if isinstance(value, dict) else None
    if isinstance(inner, dict) and "zero_stage" in inner and not any(m.layers for m in contents.models):
        contents.notes.append("a DeepSpeed ZeRO shard: the parameters in it are flat and not separable")
    return contents


def _with_key(model: Model, key: str | None) -> Model:
    """Layer names as `key:path`, so that equal layers of several models stay apart."""
    if key is None:
        return model
    layers = tuple(
        replace(layer, name=f"{key}:{layer.name}", aliases=tuple(f"{key}:{alias}" for alias in layer.aliases))
        for layer in model.layers
    )
    return replace(model, layers=layers)


def describe(value: object, models: Iterable[Model]) -> str:
    """In words, what the file holds."""
    models = list(models)
    if len(models) > 1:
        return f"checkpoint of {len(models)} models"
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


def _search(root: object, reader: TensorReader) -> list[_Found]:
    """Every module and every dictionary that holds tensors directly, outside of training state."""
    found: list[_Found] = []
    stack: list[tuple[tuple[str, ...], object]] = [((), root)]
    seen: set[int] = set()
    while stack and len(seen) < MAX_NODES:
        keys, value = stack.pop()
        if id(value) in seen or len(keys) > MAX_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, Call) and is_module_state(_state_of(value)):
            found.append(_Found(keys, module=PickledModule(value, reader)))
            continue
        mapping = _mapping(value)
        if mapping is None and isinstance(value, Call) and isinstance(value.state, dict):
            # An object with a model inside: an EMA wrapper, a trainer.
            mapping = {name: inner for name, inner in value.state.items() if _is_module(inner) or _mapping(inner)}
        if mapping is not None:
            if "param_groups" in mapping and "state" in mapping:
                continue
            item = _Found(keys)
            inner_values = []
            for name, inner in mapping.items():
                if not isinstance(name, str) or _is_training_state(name):
                    continue
                tensor = reader.tensor(inner)
                if tensor is not None:
                    item.tensors[name] = tensor.array
                elif isinstance(inner, (dict, list, tuple, Call)):
                    inner_values.append(((*keys, name), inner))
            if item.tensors:
                found.append(item)
            stack += reversed(inner_values)
        elif isinstance(value, (list, tuple)):
            stack += reversed(
                [((*keys, str(place)), inner) for place, inner in enumerate(value) if isinstance(inner, (dict, Call))]
            )
    return found


def _is_module(value: object) -> bool:
    return isinstance(value, Call) and is_module_state(_state_of(value))


def _is_training_state(key: str) -> bool:
    return bool(TRAINING_STATE.search(key)) and not key.startswith(("model", "module", "state_dict"))


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
    """The attributes an object would get; pickle gives (attributes, slots) where a class has slots."""
    state = call.state
    return state[0] if isinstance(state, tuple) and len(state) == 2 else state


class PickledModule:
    """A pickled nn.Module, as its inert record."""

    def __init__(self, call: Call, reader: TensorReader) -> None:
        self._call = call
        self._reader = reader
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
        return {name: value for name, value in self._state.items() if isinstance(name, str)}

    @cached_property
    def _own(self) -> dict[str, Any]:
        own = {}
        for table in ("_parameters", "_buffers"):
            for name, record in (_mapping(self._state.get(table)) or {}).items():
                tensor = self._reader.tensor(record)
                if tensor is not None and isinstance(name, str):
                    own[name] = tensor
        return own

    @property
    def tensors(self) -> Mapping[str, ArrayRef]:
        return {name: tensor.array for name, tensor in self._own.items()}

    @property
    def trainable(self) -> bool | None:
        flags = [tensor.requires_grad for tensor in self._own.values() if tensor.requires_grad is not None]
        return any(flags) if flags else None

    def children(self) -> Iterable[tuple[str, ModuleRecord]]:
        for name, child in (_mapping(self._state.get("_modules")) or {}).items():
            if isinstance(name, str) and isinstance(child, Call) and is_module_state(_state_of(child)):
                yield name, PickledModule(child, self._reader)
