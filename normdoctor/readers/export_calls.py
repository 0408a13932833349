"""What torch.export.load would evaluate, import or call for the graph of a package, beyond torch's operators."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from normdoctor.layers import Danger, LoadCall
from normdoctor.readers import load_calls
from normdoctor.readers.export_graph import Evaluated, Program, as_dict, as_list
from normdoctor.readers.expressions import is_plain, is_plain_guard
from normdoctor.readers.pickle_records import Call, Global

SHOWN = 60
MAX_LISTED = 50
"""More texts of one kind than that are only counted."""

MAX_TEXT = 1 << 20
"""Characters of expressions, and of descriptions of inputs, that are looked at; models with dynamic shapes in every
layer have a twentieth."""

OPERATORS = re.compile(
    r"torch\.ops\.(?!load_library\b|import_module\b|loaded_libraries\b)[A-Za-z]\w*"
    r"\.(?:__i?(?:and|or|xor|lshift|rshift)__|(?!__)\w+)(?:\.(?!__)\w+)?"
    r"|_operator\.(?:add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|lshift|"
    r"rshift|index|getitem)"
    r"|math\.[a-z][a-z0-9]*"
    r"|torch\._?sym_\w+"
    r"|torch\.autograd\.grad_mode\.set_grad_enabled"
    r"|torch\._C\._set_grad_enabled"
    r"|torch\.amp\.autocast_mode\._(?:enter|exit)_autocast"
    r"|torch\.fx\.experimental\.symbolic_shapes\.cast_symbool_to_symint_guardless"
    r"|torch\._functorch\.predispatch\._?[a-z]\w*"
    r"|#\w+:[\w.:]+"
)
"""Targets that are operators or the functions that torch allows in a graph; all else in torch can be named too."""

NAME = re.compile(r"\*{0,2}[\w.]*")
"""A name that is written into Python code as it stands."""

LITERAL = re.compile(r"[^'\"\\\x00-\x1f\x7f]*")
"""Text that is written between quotes."""


def judge_program(evaluated: Evaluated, program: Program) -> tuple[LoadCall, ...]:
    """The calls that loading the program would make and no healthy one makes; each text once."""
    found = [
        *_too_long("expressions", evaluated.expressions),
        *_too_long("guards", program.guards),
        *_too_long("input descriptions", program.trees),
        *_flag("expression", (text for text in _first(evaluated.expressions) if not is_plain(text))),
        *_flag("operator", (text for text in evaluated.operators if not OPERATORS.fullmatch(text))),
        *_flag("name", (text for text in (*evaluated.names, *program.names) if not NAME.fullmatch(text))),
        *_flag("guard", (text for text in _first(program.guards) if not is_plain_guard(text))),
        *_flag("literal", (text for text in program.literals if not LITERAL.fullmatch(text))),
    ]
    for tree in _first(program.trees):
        found += _judge_tree(tree)
    return tuple(dict.fromkeys(found))


def _first(texts: Collection[str]) -> Iterator[str]:
    """The texts up to MAX_TEXT characters in all."""
    left = MAX_TEXT
    for text in texts:
        left -= len(text)
        if left < 0:
            return
        yield text


def _too_long(kind: str, texts: Collection[str]) -> Iterator[LoadCall]:
    total = sum(map(len, texts))
    if total > MAX_TEXT:
        yield LoadCall(f"{kind} of {total:,} characters, more than are looked at", Danger.OTHER)


def _flag(kind: str, texts: Iterator[str]) -> Iterator[LoadCall]:
    for count, text in enumerate(texts):
        if count == MAX_LISTED:
            yield LoadCall(f"more than {MAX_LISTED} such {kind}s", Danger.OTHER)
            return
        yield LoadCall(f"{kind} {printable(text)}", Danger.OTHER)


def printable(text: str) -> str:
    """`text` on one line, without control characters and not too long."""
    head = text[: SHOWN + 1]
    shown = "".join(char if char.isprintable() else "?" for char in head[:SHOWN])
    return shown + "..." if len(head) > SHOWN else shown


def _judge_tree(tree: str) -> Iterator[LoadCall]:
    """Enums and default factories inside the description of inputs are imported by name; keys become code."""
    values = list(_inside(tree, depth=0))
    if any(value is _TOO_DEEP for value in values):
        yield LoadCall(f"input description {printable(tree)}", Danger.OTHER)
    keys = (value for value in values if isinstance(value, str) and not LITERAL.fullmatch(value))
    yield from _flag("literal", keys)
    imported = []
    for record in map(as_dict, values):
        if "__enum__" in record:
            module, _, name = str(record.get("fqn")).partition(":")
            imported.append(Global(module, name))
        if "default_factory_module" in record:
            imported.append(Global(str(record["default_factory_module"]), str(record.get("default_factory_name"))))
    calls = load_calls.judge(Call(function, (), True) for function in imported)
    yield from (LoadCall(printable(call.name), call.danger) for call in calls)


_TOO_DEEP = object()


def _inside(text: str, depth: int) -> Iterator[object]:
    """Everything in a JSON text, and in the JSON that its strings hold."""
    stack: list[Any] = [None]
    try:
        if depth > 3:
            raise ValueError
        stack = [json.loads(text)]
    except (ValueError, RecursionError):
        if depth == 0 or depth > 3:
            yield _TOO_DEEP
        else:
            yield text
        return
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            if value[:1] in ("[", "{", '"'):
                yield from _inside(value, depth + 1)
            else:
                yield value
            continue
        yield value
        stack += as_list(value)
        if isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
