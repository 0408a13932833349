"""The code in a TorchScript archive → what each class declares and which norm operators it calls with what.

The code is a stranger's text in a small part of Python, one statement a line as torch's printer writes it. It
is never run, compiled or parsed as Python, whose parser can be made to exhaust memory: lines are matched and
brackets counted, in time linear in the text. What is not understood is unknown, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Literal

from normdoctor.layers import NormKind

MAX_LINE = 1 << 16
"""Longer lines are passed over; torch writes one statement a line."""

MAX_EXPRESSION = 256
"""Longer expressions are unknown: names, attributes and literals are short."""

MAX_PARTS = 32
"""Attributes of attributes are followed as deep as modules nest."""


class Unknown(Enum):
    """The value of what only running the code would tell."""

    UNKNOWN = "unknown"


UNKNOWN = Unknown.UNKNOWN


@dataclass(frozen=True)
class Attribute:
    """self.layer1.bn.weight, as the parts behind self."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Constant:
    """CONSTANTS.c4: a place in constants.pkl."""

    index: int


@dataclass(frozen=True)
class Function:
    """torch.nn.functional.batch_norm under a name of its own."""

    operator: str


Value = Attribute | Constant | Function | bool | int | float | tuple[int, ...] | None | Literal[Unknown.UNKNOWN]


@dataclass(frozen=True)
class Operator:
    """A norm operator: what it computes, and its arguments in order, as torch and as torch.nn.functional take them."""

    kind: NormKind
    arguments: tuple[str, ...]
    functional: tuple[str, ...]
    defaults: Mapping[str, Value] = field(default_factory=dict)


STATISTICS = ("running_mean", "running_var")
AFFINE = ("weight", "bias")
NO_AFFINE: dict[str, Value] = {"weight": None, "bias": None}

OPERATORS = {
    "batch_norm": Operator(
        NormKind.BATCH,
        ("input", *AFFINE, *STATISTICS, "training", "momentum", "eps"),
        ("input", *STATISTICS, *AFFINE, "training", "momentum", "eps"),
        {**NO_AFFINE, "training": False, "momentum": 0.1, "eps": 1e-5},
    ),
    "instance_norm": Operator(
        NormKind.INSTANCE,
        ("input", *AFFINE, *STATISTICS, "training", "momentum", "eps"),
        ("input", *STATISTICS, *AFFINE, "training", "momentum", "eps"),
        {**NO_AFFINE, "running_mean": None, "running_var": None, "training": True, "momentum": 0.1, "eps": 1e-5},
    ),
    "layer_norm": Operator(
        NormKind.LAYER,
        ("input", "normalized_shape", *AFFINE, "eps"),
        ("input", "normalized_shape", *AFFINE, "eps"),
        {**NO_AFFINE, "eps": 1e-5},
    ),
    "group_norm": Operator(
        NormKind.GROUP,
        ("input", "num_groups", *AFFINE, "eps"),
        ("input", "num_groups", *AFFINE, "eps"),
        {**NO_AFFINE, "eps": 1e-5},
    ),
    "rms_norm": Operator(
        NormKind.RMS,
        ("input", "normalized_shape", "weight", "eps"),
        ("input", "normalized_shape", "weight", "eps"),
        {"weight": None, "eps": None},
    ),
}
"""By the operator's name. torch leaves out arguments at the end that have their defaults. use_input_stats of
instance_norm goes by the name of what it is in the other one: training."""


@dataclass(frozen=True)
class NormCall:
    """One call of a norm operator in the code of a class."""

    operator: str
    place: str
    """Method, operator and how manyeth of its kind there: forward.batch_norm_1."""
    arguments: Mapping[str, Value]

    @property
    def kind(self) -> NormKind:
        return OPERATORS[self.operator].kind


@dataclass
class ClassCode:
    """What the code says about one class."""

    is_module: bool
    declared: set[str] = field(default_factory=set)
    """The names of its attributes."""
    parameters: frozenset[str] = frozenset()
    constants: dict[str, Value] = field(default_factory=dict)
    """Its attributes that are Final: eps, momentum, ... of a scripted module."""
    calls: list[NormCall] = field(default_factory=list)


CLASS = re.compile(r"class (\w{1,256})(\((\w+)\))?:")
METHOD = re.compile(r"  def (\w{1,256})\((\w+)")
PARAMETER = re.compile(r"    (\w+): ")
FINAL = re.compile(r"  (\w{1,256}) : Final\[.{1,200}?\] = (.{1,200})$")
DECLARED = re.compile(r'  (?:(\w{1,256}) : |__annotations__\["([^"\\]{1,256})"\] = )')
PARAMETERS = re.compile(r"  __parameters__ = \[(.*)\]$")
QUOTED = re.compile(r'"([^"\\]*)"')
ASSIGNED = re.compile(r" +(\w+) = ")
ASSIGNED_TOGETHER = re.compile(r" +((?:\w+, )+)= ")
LOOP = re.compile(r" +for (\w+) in ")


def read_classes(text: str, max_calls: int) -> dict[str, ClassCode]:
    """The classes in one file of code, by their names without the module, with `max_calls` calls of them all."""
    classes: dict[str, ClassCode] = {}
    current: ClassCode | None = None
    method: _Method | None = None
    for line in _lines(text):
        if line.startswith("    ") and method is not None:
            method.add(line)
            continue
        if current is not None and method is not None:
            before = len(current.calls)
            current.calls += islice(method.calls(), max_calls)
            max_calls -= len(current.calls) - before
            method = None
        if not line.startswith(" "):
            found = CLASS.match(line)
            current = None  # a function stands between classes
            if found is not None:
                current = classes[found[1]] = ClassCode(found[3] == "Module")
        elif current is not None:
            begin = METHOD.match(line)
            if begin is not None:
                method = _Method(begin[1], begin[2], in_signature=not line.endswith(":"))
            else:
                _declare(current, line)
    if current is not None and method is not None:
        current.calls += islice(method.calls(), max_calls)
    return classes


def _lines(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        if 0 < end - start <= MAX_LINE:
            yield text[start:end]
        start = end + 1


def _declare(code: ClassCode, line: str) -> None:
    listed = PARAMETERS.match(line)
    if listed is not None:
        code.parameters = frozenset(QUOTED.findall(listed[1]))
        return
    found = DECLARED.match(line)
    if found is None:
        return
    name = found[1] or found[2]
    code.declared.add(name)
    final = FINAL.match(line)
    if final is not None:
        value = evaluate(final[2], {})
        if value is not UNKNOWN:
            code.constants[name] = value


class _Method:
    """The body of one method, line by line."""

    def __init__(self, name: str, owner: str, *, in_signature: bool) -> None:
        self._name = name
        self._owner = owner
        self._in_signature = in_signature
        self._lines: list[str] = []
        self._texts: dict[str, str | None] = {}
        """What is assigned to each name; None where several things are, so that it says nothing."""
        self._has_norms = False

    def add(self, line: str) -> None:
        if self._in_signature:
            found = PARAMETER.match(line)
            if found is not None:
                self._texts[found[1]] = None
            self._in_signature = not line.endswith(":")
            return
        self._has_norms = self._has_norms or "_norm" in line
        self._lines.append(line)
        found = ASSIGNED.match(line)
        if found is not None:
            text = line[found.end() :]
            if self._texts.setdefault(found[1], text) != text:
                self._texts[found[1]] = None
            return
        found = ASSIGNED_TOGETHER.match(line)
        if found is not None:
            self._texts.update(dict.fromkeys(found[1].split(", ")))
            return
        found = LOOP.match(line)
        if found is not None:
            self._texts[found[1]] = None

    def calls(self) -> Iterator[NormCall]:
        """Its calls of norm operators, in the order in which they run."""
        if not self._has_norms:
            return
        known: dict[str, Value] = {} if self._owner in self._texts else {self._owner: Attribute(())}
        counts: dict[str, int] = {}
        aliases = False
        for line in self._lines:
            if aliases or "_norm(" in line:
                for operator, arguments in _calls_in(line, known):
                    counts[operator] = counts.get(operator, 0) + 1
                    yield NormCall(operator, f"{self._name}.{operator}_{counts[operator]}", arguments)
            found = ASSIGNED.match(line)
            if found is not None and self._texts.get(found[1]) is not None:
                value = evaluate(line[found.end() :], known)
                if value is not UNKNOWN:
                    known[found[1]] = value
                    aliases = aliases or isinstance(value, Function)


TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[()\[\]{},]|[A-Za-z_][\w.]*')


def _calls_in(line: str, known: Mapping[str, Value]) -> Iterator[tuple[str, dict[str, Value]]]:
    """The norm operators that a line calls, the inner ones first, with their arguments by name."""
    open_brackets: list[_Call | None] = []
    name, name_end = "", -1
    for token in TOKEN.finditer(line):
        first = line[token.start()]
        if first in "([{":
            names = _argument_names(name, known) if first == "(" and name_end == token.start() else None
            open_brackets.append(None if names is None else _Call(*names, token.end()))
        elif first in ")]}":
            call = open_brackets.pop() if open_brackets else None
            if call is not None:
                call.end_argument(line, token.start(), known)
                yield call.operator, call.arguments
        elif first == ",":
            call = open_brackets[-1] if open_brackets else None
            if call is not None:
                call.end_argument(line, token.start(), known)
        elif first != '"':
            name, name_end = token.group(), token.end()


class _Call:
    """A call whose closing bracket is still to come."""

    def __init__(self, operator: str, names: tuple[str, ...], start: int) -> None:
        self.operator = operator
        self.arguments = dict(OPERATORS[operator].defaults)
        self._names = names
        self._place = 0
        self._start = start

    def end_argument(self, line: str, end: int, known: Mapping[str, Value]) -> None:
        start, place = self._start, self._place
        self._start, self._place = end + 1, place + 1
        length = end - start
        if length > MAX_EXPRESSION:
            if place < len(self._names):
                self.arguments[self._names[place]] = UNKNOWN
            return
        text = line[start:end].strip()
        named = KEYWORD.match(text)
        if named is not None:
            self.arguments[named[1]] = evaluate(text[named.end() :], known)
        elif text and place < len(self._names):  # torch ends the arguments of functions of its own with a comma
            self.arguments[self._names[place]] = evaluate(text, known)


KEYWORD = re.compile(r"(\w+)=(?!=)")
MANGLED = re.compile(r"___torch_mangle_\d+\.")
FUNCTIONAL = "__torch__.torch.nn.functional."


def without_mangling(name: str) -> str:
    """A qualified name without the parts that torch puts in to keep classes of one name apart."""
    return MANGLED.sub("", name)


def _argument_names(callee: str, known: Mapping[str, Value]) -> tuple[str, tuple[str, ...]] | None:
    """The norm operator that is called, and what its arguments are."""
    function = known.get(callee)
    if not isinstance(function, Function):
        if callee.startswith("torch."):
            operator = callee.removeprefix("torch.")
            return (operator, OPERATORS[operator].arguments) if operator in OPERATORS else None
        function = _function(callee)
    return None if function is None else (function.operator, OPERATORS[function.operator].functional)


def _function(text: str) -> Function | None:
    if not text.startswith(FUNCTIONAL):
        return None
    operator = without_mangling(text).removeprefix(FUNCTIONAL)
    return Function(operator) if operator in OPERATORS else None


CONSTANT = re.compile(r"CONSTANTS\.c(\d{1,6})$")
WHOLE = re.compile(r"-?\d{1,18}$")
DECIMAL = re.compile(r"-?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d{1,3})?$")
NUMBERS = re.compile(r"[(\[](?:-?\d{1,18}(?:, ?|(?=[)\]])))*[)\]]$")
PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*$")
ITEM = re.compile(r'getattr\(([\w.]+), "([^"\\]+)"\)$')
CAST = re.compile(r"(?:unchecked_cast|annotate)\(.*, ([^,()]+)\)$")
WORDS: dict[str, Value] = {"None": None, "True": True, "False": False}


def evaluate(text: str, known: Mapping[str, Value]) -> Value:
    """What an expression stands for: a literal, an attribute of self, a constant, a name already known."""
    if len(text) > MAX_EXPRESSION:
        return UNKNOWN
    cast = CAST.match(text)
    if cast is not None:
        text = cast[1]
    if text.isidentifier():
        return WORDS[text] if text in WORDS else known.get(text, UNKNOWN)
    for pattern, convert in CONVERSIONS:
        if pattern.match(text):
            return convert(text)
    item = ITEM.match(text)
    if item is not None:
        return _attribute(item[1], (item[2],), known)
    return (_function(text) or _attribute(text, (), known)) if PATH.match(text) else UNKNOWN


def _attribute(path: str, parts: tuple[str, ...], known: Mapping[str, Value]) -> Value:
    name, *inner = path.split(".")
    value = known.get(name, UNKNOWN)
    parts = (*inner, *parts)
    if not parts:
        return value
    if not isinstance(value, Attribute) or len(value.parts) + len(parts) > MAX_PARTS:
        return UNKNOWN
    return Attribute(value.parts + parts)


def _tuple(text: str) -> Value:
    return tuple(int(number) for number in re.findall(r"-?\d+", text))


CONVERSIONS: tuple[tuple[re.Pattern[str], Callable[[str], Value]], ...] = (
    (WHOLE, int),
    (DECIMAL, float),
    (NUMBERS, _tuple),
    (CONSTANT, lambda text: Constant(int(text.removeprefix("CONSTANTS.c")))),
)


def count_constants(texts: Iterable[str]) -> dict[int, int]:
    """How often each place of constants.pkl is named in these texts."""
    counts: dict[int, int] = {}
    for text in texts:
        for found in re.finditer(r"\bCONSTANTS\.c(\d{1,6})\b", text):
            counts[int(found[1])] = counts.get(int(found[1]), 0) + 1
    return counts
