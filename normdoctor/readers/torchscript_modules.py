"""The modules in a TorchScript archive, each as its pickled state and the code of its class.

A scripted class has its settings as Final attributes. A traced one has only the calls that were recorded: its
settings are their literals, found in the class itself or in that of a parent into which torch inlined it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from normdoctor.errors import InputError
from normdoctor.layers import ArrayRef, NormKind
from normdoctor.readers.finishing import Budget
from normdoctor.readers.modules import ModuleRecord
from normdoctor.readers.norm_classes import kind_of_class
from normdoctor.readers.pickle_records import Call, Global
from normdoctor.readers.torch_pickle import ZipRecords
from normdoctor.readers.torch_tensors import TensorReader
from normdoctor.readers.torchscript_code import (
    AFFINE,
    STATISTICS,
    UNKNOWN,
    Attribute,
    ClassCode,
    Constant,
    Function,
    NormCall,
    Unknown,
    read_classes,
    without_mangling,
)

MAX_CODE = 4 << 20
"""How much code of one archive is read; a traced net of a thousand layers has a fifth of it."""

MAX_CALLS = 20_000
"""Calls of norm operators that are read, and that are followed: a class can be that of any number of modules."""

MAX_MODULES = 50_000

ROOT = "__torch__."


class Code:
    """The classes of an archive, each file of them read when first asked for."""

    def __init__(self, records: ZipRecords) -> None:
        self._records = records
        self._folder = f"{records.root}code/"
        self._left = MAX_CODE
        self._calls_left = MAX_CALLS
        self._files: dict[str, dict[str, ClassCode]] = {}
        self.too_long: list[str] = []
        self.unreadable: list[str] = []

    def class_of(self, name: str) -> ClassCode | None:
        """What the code says about a class, by its full name; None where it cannot be read."""
        module, _, own = name.rpartition(".")
        file = self._folder + module.replace(".", "/") + ".py"
        if file not in self._files:
            self._files[file] = self._read(file)
        return self._files[file].get(own)

    def texts(self) -> Iterator[str]:
        """Every file of code that can be read."""
        for name in self._records.infos:
            if name.startswith(self._folder) and name.endswith(".py"):
                yield self._records.read(name).decode("utf-8", "replace")

    def _read(self, file: str) -> dict[str, ClassCode]:
        info = self._records.infos.get(file)
        if info is None:
            return {}
        if info.file_size > self._left:
            self.too_long.append(file)
            return {}
        self._left -= info.file_size
        try:
            text = self._records.read(file).decode("utf-8", "replace")
        except InputError:
            self.unreadable.append(file)
            return {}
        classes = read_classes(text, self._calls_left)
        self._calls_left -= sum(len(code.calls) for code in classes.values())
        return classes

    @property
    def is_cut(self) -> bool:
        """There may be more calls than were read."""
        return self._calls_left <= 0


@dataclass(frozen=True)
class Archive:
    """What all modules of one archive share."""

    reader: TensorReader
    code: Code
    constant: Callable[[int], ArrayRef | None]
    """A tensor of constants.pkl by its place there."""
    modules: dict[int, ScriptModule]
    """Those met so far, by the identity of their pickled objects."""


Scalar = bool | int | float | tuple[int, ...] | None


@dataclass(frozen=True)
class Use:
    """A call of a norm operator as one module makes it: the tensors and the settings it is given."""

    call: NormCall
    tensors: Mapping[str, ArrayRef | Literal[Unknown.UNKNOWN] | None]
    """By field of NormLayer; None where the call is given none."""
    settings: Mapping[str, Scalar]
    """training, eps, ... as far as they are known."""

    @property
    def kind(self) -> NormKind:
        return self.call.kind

    @property
    def given(self) -> dict[str, ArrayRef]:
        """The tensors that are known."""
        return {role: ref for role, ref in self.tensors.items() if ref is not None and ref is not UNKNOWN}

    def is_constant(self, role: str) -> bool:
        """Whether it is a constant of the code, not a parameter or buffer of a module."""
        return isinstance(self.call.arguments.get(role), Constant)


class ScriptModule:
    """A module of a TorchScript archive as a ModuleRecord."""

    def __init__(self, call: Call, archive: Archive) -> None:
        assert isinstance(call.function, Global)
        self._call = call
        self._archive = archive
        self._state: Mapping[Any, Any] = call.state if isinstance(call.state, dict) else {}
        self._name = call.function.full_name
        self.code = archive.code.class_of(self._name)
        self.uses: list[Use] = []
        """The calls that take its tensors, from wherever they are made."""

    @property
    def identity(self) -> int:
        return id(self._call)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return (without_mangling(self._name).removeprefix(ROOT),)

    @cached_property
    def own_tensors(self) -> Mapping[str, ArrayRef]:
        """Those in its state."""
        found = {}
        for name, record in self._state.items():
            tensor = self._archive.reader.tensor(record)
            if tensor is not None and isinstance(name, str):
                found[name] = tensor.array
        return found

    @cached_property
    def tensors(self) -> Mapping[str, ArrayRef]:
        """Its own, and what freezing made constants of."""
        found = dict(self.own_tensors)
        for use in self._own_uses:
            for role, ref in use.given.items():
                if use.is_constant(role):
                    found.setdefault(role, ref)
        return found

    @property
    def trainable(self) -> bool | None:
        flags = [
            record.args[4]
            for name, record in self._state.items()
            if self.code is not None and name in self.code.parameters and name in self.own_tensors
            if isinstance(record, Call) and len(record.args) > 4 and isinstance(record.args[4], bool)
        ]
        return any(flags) if flags else None

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        """Its settings: what the object says counts before what its class says, and that before its calls.

        Only the mode is the other way round: a literal in the code stays, whatever eval() sets."""
        found: dict[str, Any] = {**self._recorded(), **self._declared, **self._scalars}
        found["_parameters"] = self._state.keys()  # where a Parameter that is None stands as well
        if self.fixed_mode is not None:
            found["training"] = self.fixed_mode
        return found

    @property
    def saved_mode(self) -> bool | None:
        """The training attribute."""
        mode = self._state.get("training")
        return mode if isinstance(mode, bool) else None

    @cached_property
    def fixed_mode(self) -> bool | None:
        """training as the code has it for good, None where it asks the module's attribute or cannot be told.

        A scripted BatchNorm without buffers has a literal too, but was built so: track_running_stats says it.
        An InstanceNorm without them normalises with the input at hand in either mode."""
        if "track_running_stats" in self._declared:
            return None
        mode = self._recorded().get("training")
        return mode if isinstance(mode, bool) else None

    def children(self) -> Iterable[tuple[str, ModuleRecord]]:
        return self.submodules.items()

    @cached_property
    def submodules(self) -> Mapping[str, ScriptModule]:
        return {name: child for name, child in self._children() if isinstance(name, str)}

    def _children(self) -> Iterator[tuple[Any, ScriptModule]]:
        known = self._archive.modules
        for name, record in self._state.items():
            if isinstance(record, Call) and is_script_object(record):
                if id(record) not in known:
                    known[id(record)] = ScriptModule(record, self._archive)
                if known[id(record)].is_module:
                    yield name, known[id(record)]

    @property
    def is_module(self) -> bool:
        """It is one, not an object of a class of the user's or of C++."""
        return self.code.is_module if self.code is not None else "training" in self._state

    @property
    def is_packed(self) -> bool:
        """It keeps its state in a way of its own, as quantised layers do."""
        return not isinstance(self._call.state, (dict, type(None)))

    def at(self, parts: Iterable[str]) -> ScriptModule | None:
        """The module that these attributes lead to."""
        module: ScriptModule | None = self
        for part in parts:
            module = None if module is None else module.submodules.get(part)
        return module

    def use(self, call: NormCall) -> tuple[ScriptModule | None, Use]:
        """One of the calls in its code: the module whose tensors it takes, and what it is given."""
        owners: dict[int, ScriptModule] = {}
        tensors: dict[str, ArrayRef | Literal[Unknown.UNKNOWN] | None] = {}
        settings: dict[str, Scalar] = {}
        for name, value in call.arguments.items():
            if name in (*AFFINE, *STATISTICS):
                home = self.at(value.parts[:-1]) if isinstance(value, Attribute) else None
                tensors[name] = self._tensor(value, home)
                if home is not None:
                    owners[home.identity] = home
            elif isinstance(value, Attribute):
                known = self._setting(value, name)
                if known is not UNKNOWN:
                    settings[name] = known
            elif not isinstance(value, (Constant, Function, Unknown)):
                settings[name] = value
        if settings.get("momentum") == 0 and settings.get("training") is False:
            del settings["momentum"]  # what tracing in eval mode makes of momentum=None as well
        if not owners and kind_of_class(self.class_names) is call.kind:
            owners[self.identity] = self
        owner = next(iter(owners.values())) if len(owners) == 1 else None
        return owner, Use(call, tensors, settings)

    def _tensor(self, value: object, home: ScriptModule | None) -> ArrayRef | Literal[Unknown.UNKNOWN] | None:
        if value is None:
            return None
        if isinstance(value, Constant):
            constant = self._archive.constant(value.index)
            return UNKNOWN if constant is None else constant
        if home is None or not isinstance(value, Attribute):
            return UNKNOWN
        name = value.parts[-1]
        if name in home.own_tensors:
            return home.own_tensors[name]
        return None if name in home._state and home._state[name] is None else UNKNOWN

    def _setting(self, value: Attribute, name: str) -> Scalar | Literal[Unknown.UNKNOWN]:
        home = self.at(value.parts[:-1]) if value.parts else None
        if home is None or name == "training":  # the mode changes with eval()
            return UNKNOWN
        found: Scalar | Literal[Unknown.UNKNOWN] = {**home._declared, **home._scalars}.get(value.parts[-1], UNKNOWN)
        return found

    @property
    def _declared(self) -> dict[str, Any]:
        return {} if self.code is None else self.code.constants

    @cached_property
    def _scalars(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self._state.items()
            if isinstance(name, str) and isinstance(value, (bool, int, float, type(None)))
        }

    @cached_property
    def _own_uses(self) -> list[Use]:
        """The calls that tell of the layer that it is; a method for something else may call another operator."""
        kind = kind_of_class(self.class_names)
        if kind is None and "running_var" in self.own_tensors:
            kind = NormKind.BATCH
        return self.uses if kind is None else [use for use in self.uses if use.kind is kind]

    def _recorded(self) -> dict[str, Scalar]:
        """The settings on which all of its calls agree."""
        uses = self._own_uses
        found = {}
        for name in ("eps", "momentum", "training", "num_groups", "normalized_shape"):
            values = {repr(use.settings.get(name, UNKNOWN)) for use in uses}
            if len(values) == 1 and name in uses[0].settings:
                found[name] = uses[0].settings[name]
        if uses and all(_input_decides(use) for use in uses):
            found.pop("training", None)
        affine = {use.tensors.get("weight", UNKNOWN) is not None for use in uses}
        if len(affine) == 1 and not any(use.tensors.get("weight", UNKNOWN) is UNKNOWN for use in uses):
            found["affine"] = affine.pop()
        return found


def _input_decides(use: Use) -> bool:
    """An InstanceNorm without buffers: its mode changes nothing."""
    return use.kind is NormKind.INSTANCE and use.tensors.get("running_var", UNKNOWN) is None


def is_script_object(record: Call) -> bool:
    """Whether it is made from a class in the archive's code."""
    function = record.function
    return record.creates and isinstance(function, Global) and function.full_name.startswith(ROOT)


def walk(root: ScriptModule) -> list[tuple[str, ScriptModule]]:
    """Every module once, by the first of its names, without recursion.

    Raises InputError where they or their names take more memory than those of any model."""
    budget = Budget()
    seen = {root.identity}
    found = [("", root)]
    stack = [("", iter(root.submodules.items()))]
    while stack:
        prefix, children = stack[-1]
        name, child = next(children, ("", None))
        if child is None:
            stack.pop()
        elif child.identity not in seen:
            seen.add(child.identity)
            budget.spend_names(len(prefix) + len(name))
            if len(seen) > MAX_MODULES:
                raise InputError(
                    f"the archive has more than {MAX_MODULES:,} modules, more than any model",
                    "The file is damaged or was made to exhaust memory; do not load it.",
                )
            found.append((prefix + name, child))
            stack.append((f"{prefix}{name}.", iter(child.submodules.items())))
    return found
