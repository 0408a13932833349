"""TorchScript archives (torch.jit.save): scripted, traced and frozen modules.

Layout: a torch zip of modules (data.pkl, data/N) with the code of their classes (code/__torch__/**.py, deflated)
and the tensors that the code names (constants.pkl, constants/N).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

from normdoctor.errors import InputError
from normdoctor.layers import (
    VECTORS,
    ArrayRef,
    Checkpoint,
    Container,
    Danger,
    LoadCall,
    Model,
    NormKind,
    NormLayer,
    Reference,
)
from normdoctor.readers import load_calls
from normdoctor.readers.arrays import Source
from normdoctor.readers.finishing import Budget, settle_gains
from normdoctor.readers.load_calls import PLAIN, REBUILD_FUNCTIONS
from normdoctor.readers.modules import read_modules, usable
from normdoctor.readers.naming import size_of, why_no_norms
from normdoctor.readers.norm_classes import declared_width, kind_of_class
from normdoctor.readers.pickle_records import Call, Global, Pickled
from normdoctor.readers.torch_contents import with_unnamed
from normdoctor.readers.torch_pickle import ZipRecords, unpickle_zip
from normdoctor.readers.torchscript_code import UNKNOWN, Constant, count_constants
from normdoctor.readers.torchscript_modules import (
    MAX_CALLS,
    MAX_CODE,
    ROOT,
    Archive,
    Code,
    ScriptModule,
    Use,
    is_script_object,
    walk,
)

LIST_BUILDERS = frozenset(
    f"torch.jit._pickle.{name}"
    for name in (
        "build_intlist",
        "build_tensorlist",
        "build_doublelist",
        "build_boollist",
        "build_complexlist",
        "build_tensor_from_id",
        "restore_type_tag",
    )
)
"""What torch.jit.load takes typed lists and dictionaries from."""

MAX_CONSTANTS = 1 << 20
"""Bytes of constants.pkl; one of a thousand tensors has a tenth of it."""

FROZEN = (
    "frozen TorchScript: parameter names are gone and BatchNorms next to convolutions were folded in; "
    "inspect the model it was frozen from"
)


def read(source: Source, records: ZipRecords) -> Checkpoint:
    """The module in a TorchScript archive. records.root must not be None."""
    pickled, reader = unpickle_zip(source, records)
    size = records.infos[f"{records.root}constants.pkl"].file_size
    if size > MAX_CONSTANTS:
        raise InputError(
            f"{source.path}: constants.pkl has {size:,} bytes, more than that of any model",
            "The file is damaged or was made to exhaust memory; do not load it.",
        )
    constants, constant_reader = unpickle_zip(source, records, "constants")
    if not isinstance(pickled.value, Call) or not is_script_object(pickled.value):
        raise InputError(
            f"{source.path}: a TorchScript archive that holds no module",
            "Save a scripted or traced module with torch.jit.save.",
        )

    @cache
    def constant(index: int) -> ArrayRef | None:
        values = constants.value
        tensor = (
            constant_reader.tensor(values[index]) if isinstance(values, (tuple, list)) and index < len(values) else None
        )
        return None if tensor is None else tensor.array

    code = Code(records)
    root = ScriptModule(pickled.value, Archive(reader, code, constant, {}))
    contents = _Contents(root)
    frozen = root.saved_mode is None and root.is_module and not root.is_packed
    traced = f"{records.root}traced_inputs.pkl" in records.infos
    kind = "frozen" if frozen else "traced" if traced else "scripted"
    notes = [FROZEN] if frozen else []
    notes += contents.notes(code, frozen)
    notes += _notes_on_code(code)

    def list_references() -> tuple[Reference, ...]:
        constants_named = _uses_of_constants(code, contents.uses, constant)
        return with_unnamed((*contents.references, *constants_named), pickled.value, reader)

    return Checkpoint(
        path=str(source.path),
        format=f"TorchScript {kind} module (zip)",
        container=Container.ZIP,
        models=(contents.model,),
        notes=tuple(notes),
        list_references=list_references,
        load_calls=_out_of_place([pickled, constants]),
        loader="torch.jit.load",
        bytes_total=source.size,
        count_bytes_read=lambda: source.bytes_read,
        on_close=source.close,
    )


class _Contents:
    """The norm layers of a module tree and of the calls in its code."""

    def __init__(self, root: ScriptModule) -> None:
        budget = Budget()
        self._modules = walk(root)
        self._root = root
        self.is_cut = False
        self.uses: list[tuple[str, ScriptModule | None, Use]] = []
        """Each call, the module that makes it and where, and the module whose tensors it takes."""
        self._follow_calls()
        _share_between_tied([module for _, module in self._modules])
        model, self.references = read_modules(root, None, budget)
        self._layers = [self._with_mode(layer) for layer in model.layers]
        calls = list(self._calls_without_layer())
        budget.spend_values(layer for layer, _ in calls)
        self.references += tuple(
            Reference(f"{layer.name}.{field}", getattr(layer, field))
            for layer, use in calls
            for field in VECTORS
            if getattr(layer, field) is not None and use.is_constant(field)
        )
        layers = (*self._layers, *settle_gains([layer for layer, _ in calls]))
        self.model: Model = replace(model, layers=layers)

    def _follow_calls(self) -> None:
        for name, module in self._modules:
            for call in module.code.calls if module.code is not None else ():
                if len(self.uses) >= MAX_CALLS:
                    self.is_cut = True
                    return
                owner, use = module.use(call)
                self.uses.append((f"{name}.{call.place}" if name else call.place, owner, use))
                if owner is not None:
                    owner.uses.append(use)

    def _with_mode(self, layer: NormLayer) -> NormLayer:
        module = self._module(layer.name)
        return replace(layer, baked=module is not None and module.fixed_mode is not None and layer.training is not None)

    def _module(self, name: str) -> ScriptModule | None:
        return self._root.at(name.split(".") if name else ())

    def _calls_without_layer(self) -> Iterator[tuple[NormLayer, Use]]:
        """Layers for the calls that take tensors of no layer found so far: constants, or loose parameters.

        Calls that are equal in everything are one layer, called in two branches. Equal constants alone say
        nothing: freezing stores equal values once."""
        found = {ref.identity for layer in self._layers for ref in map(layer.__getattribute__, VECTORS) if ref}
        seen: set[Hashable] = set()
        for place, _, use in self.uses:
            given = {role: ref for role, ref in use.given.items() if usable(role, ref)}
            same = (use.call.operator, *((role, ref.identity) for role, ref in given.items()), repr(use.settings))
            parameters = [ref.identity for role, ref in given.items() if not use.is_constant(role)]
            if not given or same in seen or (parameters and found.issuperset(parameters)):
                continue
            seen.add(same)
            yield _layer_of(place, use, given), use

    def notes(self, code: Code, frozen: bool) -> Iterator[str]:
        """What was found and cannot be judged, and what is not as it seems."""
        if self.is_cut or code.is_cut:
            yield f"only the first {MAX_CALLS:,} calls of norm operators were read"
        overruled = [
            layer.name
            for layer in self._layers
            if layer.baked and self._saved_mode(layer.name) not in (None, layer.training)
        ]
        if overruled:
            yield (
                f"{_some(overruled)}: the mode in the recorded code counts, not the training attribute saved with it, "
                "which says otherwise; train() and eval() change nothing in traced layers"
            )
        lone = [place for place, owner, use in self.uses if self._is_bare(owner, use)]
        if lone:
            yield (
                f"{_some(lone)}: a batch_norm without tensors normalises with the batch at hand at inference; "
                "it is not listed, since the file does not say how wide it is"
            )
        lost = [place for place, owner, use in self.uses if owner is None and UNKNOWN in use.tensors.values()]
        if lost:
            yield f"{_some(lost)}: takes tensors that the file does not hold as such, so it cannot be judged"
        packed = [name for name, module in self._modules if module.is_packed and kind_of_class(module.class_names)]
        if packed:
            yield f"{_some(packed)}: keeps its state in a way of its own, which normdoctor does not read"
        if not self.model.layers:
            why = why_no_norms({reference.name: reference.array for reference in self.references})
            if why or frozen:
                yield f"no norm layers: {why or 'freezing left none, which says nothing about those it folded'}"

    def _saved_mode(self, name: str) -> bool | None:
        module = self._module(name)
        return None if module is None else module.saved_mode

    def _is_bare(self, owner: ScriptModule | None, use: Use) -> bool:
        if use.kind is not NormKind.BATCH or use.settings.get("training") is not True:
            return False
        listed = owner is not None and (owner.tensors or declared_width(owner.attributes))
        return not listed and not any(use.tensors.values())


def _layer_of(place: str, use: Use, given: dict[str, ArrayRef]) -> NormLayer:
    """A layer of which only the call is known."""
    settings = use.settings
    sizes = [size_of(given[role]) for role in ("running_var", "weight", "running_mean", "bias") if role in given]
    eps, momentum, mode, groups = map(settings.get, ("eps", "momentum", "training", "num_groups"))
    weight = use.tensors.get("weight", UNKNOWN)
    return NormLayer(
        name=place,
        path=place,
        kind=use.kind,
        channels=declared_width(settings) or sizes[0],
        origin=f"aten::{use.call.operator}",
        groups=groups if type(groups) is int else None,
        eps=float(eps) if isinstance(eps, (int, float)) else None,
        momentum=float(momentum) if isinstance(momentum, (int, float)) else None,
        training=mode if isinstance(mode, bool) else None,
        affine=None if weight is UNKNOWN else weight is not None,
        zero_centred_by_class=False if use.kind is NormKind.RMS else None,
        **cast(dict[str, Any], given),
    )


def _share_between_tied(modules: Sequence[ScriptModule]) -> None:
    """torch.jit.trace gives each name of a shared module a class of its own, and the calls to one of them."""
    tied: dict[Hashable, list[ScriptModule]] = defaultdict(list)
    for module in modules:
        if "weight" in module.own_tensors or "running_var" in module.own_tensors:
            tied[tuple((name, ref.identity) for name, ref in module.own_tensors.items())].append(module)
    for group in tied.values():
        having = [module for module in group if module.uses]
        for module in group if having else ():
            if not module.uses:
                module.uses = having[0].uses


def _some(places: Sequence[str]) -> str:
    first = places[0] or "the module itself"
    return first if len(places) == 1 else f"{first} and {len(places) - 1} more"


def _notes_on_code(code: Code) -> Iterator[str]:
    if code.too_long:
        yield (
            f"the code of {_some(code.too_long)} was not read, since the code takes more than {MAX_CODE >> 20} MB: "
            "eps, momentum and the mode of its layers are unknown"
        )
    if code.unreadable:
        yield f"the code of {_some(code.unreadable)} cannot be read: what it says about its layers is unknown"


def _uses_of_constants(
    code: Code, uses: Iterable[tuple[str, object, Use]], constant: Callable[[int], ArrayRef | None]
) -> Iterator[Reference]:
    """A reference for each constant that the code names more often than the norm layers take it."""
    left = count_constants(code.texts())
    for _, _, use in uses:
        for value in use.call.arguments.values():
            if isinstance(value, Constant):
                left[value.index] = left.get(value.index, 0) - 1
    for index, count in left.items():
        array = constant(index) if count > 0 else None
        if array is not None:
            yield Reference(f"CONSTANTS.c{index}", array)


def _out_of_place(pickles: Iterable[Pickled]) -> tuple[LoadCall, ...]:
    """The calls that an archive of torch.jit.save never has: it holds TorchScript's own classes and values."""
    foreign = [call for pickled in pickles for call in pickled.calls if not _belongs(call)]
    return tuple(sorted({LoadCall(call.name, Danger.OTHER) for call in load_calls.judge(foreign)}, key=str))


def _belongs(call: Call) -> bool:
    if not isinstance(call.function, Global):
        return False
    name = call.function.full_name
    return name.startswith(ROOT) or name in REBUILD_FUNCTIONS or name in PLAIN or name in LIST_BUILDERS
