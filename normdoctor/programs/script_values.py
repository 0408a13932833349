"""What TorchScript's operators on lists, dictionaries and tuples do to those of Python.

torch copies a list on its way into an operator; one that changes a list, or takes an element that is itself a list,
must therefore be done here. Operators on tensors and numbers are left to torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

Function = Callable[..., Any]


def _set_item(container: Any, key: Any, value: Any) -> Any:
    container[key] = value
    return container


def _append(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return values


def _delete(container: Any, key: Any) -> None:
    del container[key]


def _extend(values: list[Any], others: list[Any]) -> list[Any]:
    values += others
    return values


def _sort(values: list[Any], reverse: bool = False) -> None:
    values.sort(reverse=reverse)


CONTAINERS: Mapping[str, Function] = {
    "aten::__contains__": lambda container, value: value in container,
    "aten::__getitem__": lambda container, key: container[key],
    "aten::_set_item": _set_item,
    "aten::Delete": _delete,
    "aten::add": lambda values, others: values + others,
    "aten::add_": _extend,
    "aten::append": _append,
    "aten::clear": lambda container: container.clear(),
    "aten::copy": lambda container: container.copy(),
    "aten::dict": dict,
    "aten::extend": _extend,
    "aten::get": lambda container, key, default=None: container.get(key, default),
    "aten::insert": lambda values, place, value: values.insert(place, value),
    "aten::items": lambda container: list(container.items()),
    "aten::keys": lambda container: list(container),
    "aten::len": len,
    "aten::list": list,
    "aten::mul": lambda values, count: values * count,
    "aten::pop": lambda container, *key: container.pop(*key),
    "aten::popitem": lambda container: container.popitem(),
    "aten::remove": lambda values, value: values.remove(value),
    "aten::reverse": lambda values: values.reverse(),
    "aten::setdefault": lambda container, key, default: container.setdefault(key, default),
    "aten::slice": lambda values, start, end, step: values[start:end:step],
    "aten::sort": _sort,
    "aten::sorted": sorted,
    "aten::update": lambda container, others: container.update(others),
    "aten::values": lambda container: list(container.values()),
}
"""Operators whose first argument is a list or a dictionary."""


def _raise(message: str, *_: Any) -> None:
    raise RuntimeError(message)


def _unwrap(value: Any) -> Any:
    if value is None:
        raise RuntimeError("Unwrapping null optional")
    return value


def nothing(*_: Any) -> None:
    """Of what is printed or warned of nothing is wanted."""


def _set(owner: SimpleNamespace, value: Any, *, name: str) -> None:
    setattr(owner, name, value)


def _same(value: Any) -> Any:
    return value


ATTRIBUTES: Mapping[str, Function] = {
    "prim::GetAttr": lambda owner, *, name: getattr(owner, name),
    "prim::SetAttr": _set,
}
"""Operators on an object that the code has made itself, of a class of its own."""

PLAIN: Mapping[str, Function] = {
    "prim::CreateObject": SimpleNamespace,
    "prim::ListConstruct": lambda *values: list(values),
    "prim::TupleConstruct": lambda *values: values,
    "prim::DictConstruct": lambda *values: dict(zip(values[::2], values[1::2], strict=True)),
    "prim::TupleIndex": lambda values, place: values[place],
    "prim::ImplicitTensorToNum": lambda tensor: tensor.item(),
    "prim::unchecked_cast": _same,
    "prim::unchecked_unwrap_optional": _same,
    "prim::RaiseException": _raise,
    "prim::Print": nothing,
    "aten::warn": nothing,
    "aten::_unwrap_optional": _unwrap,
    "aten::__is__": lambda one, other: one is other,
    "aten::__isnot__": lambda one, other: one is not other,
    "aten::dict": lambda *items: dict(*items),
}
"""Operators of the language itself, whatever they are given."""

CONTEXTS = (".no_grad", ".record_function")
"""Classes whose objects mean nothing in a `with` statement: gradients are off anyway."""

FOLDED = frozenset(
    {f"aten::{name}" for name in ("__is__", "__isnot__", "__not__", "__and__", "__or__", "_unwrap_optional")}
    | {f"aten::{name}" for name in ("eq", "ne", "lt", "gt", "le", "ge", "add", "sub", "mul", "floordiv", "remainder")}
    | {f"aten::{name}" for name in ("neg", "Bool", "Int", "Float", "len", "div")}
    | {"prim::unchecked_cast", "prim::unchecked_unwrap_optional"}
)
"""Operators that are done once and for all where all that they are given is known: None, numbers, words; tensors only
where their values are not looked at."""

BLIND = frozenset(
    {
        "aten::__is__",
        "aten::__isnot__",
        "aten::_unwrap_optional",
        "prim::unchecked_cast",
        "prim::unchecked_unwrap_optional",
    }
)
"""Those of them that do not look at values."""
