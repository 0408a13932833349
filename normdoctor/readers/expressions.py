"""Shape expressions of exported programs: which of them are plain arithmetic.

torch.export.load hands each one to sympy, which evaluates it as Python; the guards of a program are executed as
Python when its module is made. Nothing is evaluated here: a small grammar decides what is harmless.

What it accepts: numbers, names, + - * / // % **, comparisons, and, or, not, and calls of functions of a fixed
list; in guards also the sizes of inputs, L['x'].size()[0].
"""

from __future__ import annotations

import math
import re

MAX_LENGTH = 1 << 14
MAX_DEPTH = 40
MAX_BITS = 4096.0
"""Numbers that an expression could make by itself have no more bits."""

TOKEN = re.compile(
    r" *(?:"
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<text>'[A-Za-z0-9_.+ -]{0,200}')"
    r"|(?P<sign>\*\*|//|==|!=|<=|>=|[-+*/%<>&|~()\[\],.=])"
    r") *"
)

ARITHMETIC = frozenset(
    {
        "Add", "Mul", "Abs", "abs", "Max", "Min", "max", "min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv",
        "IntTrueDiv", "FloatTrueDiv", "ModularIndexing", "floor", "ceiling", "FloorToInt", "CeilToInt", "TruncToInt",
        "TruncToFloat", "RoundToInt", "RoundDecimal", "ToFloat", "Identity", "Where", "Piecewise", "ExprCondPair",
        "Integer", "Rational", "Float", "Half", "IsNonOverlappingAndDenseIndicator", "sqrt", "int", "float", "bool",
        "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan",
        "StrictGreaterThan", "And", "Or", "Not", "Infinity", "NegativeInfinity", "IntInfinity", "NegativeIntInfinity",
    }
)  # fmt: skip
"""Functions whose value is no larger than the product of their arguments, or a truth."""

POWERS = frozenset({"Pow", "PowByNatural", "FloatPow"})
SHIFTS = frozenset({"LShift", "RShift"})
TORCH_FUNCTION = re.compile(r"(OpaqueUnaryFn|BitwiseFn)_[a-z0-9_]+")
"""torch's own names for functions that sympy does not know; they evaluate nothing."""

MATH = frozenset({"ceil", "floor", "trunc", "sqrt", "log2", "isnan", "inf", "fabs"})
ASSUMPTIONS = frozenset(
    {
        "positive", "negative", "integer", "nonnegative", "nonpositive", "nonzero", "zero", "real", "finite",
        "rational", "even", "odd", "extended_real", "extended_positive", "extended_negative", "extended_nonnegative",
        "commutative",
    }
)  # fmt: skip
SIZES = frozenset({"size", "stride", "storage_offset", "dim", "item"})


class _Beyond(Exception):
    """The expression is not of the grammar, or could make a number that is too large."""


def is_plain(text: str) -> bool:
    """Whether `text`, the expression of a size, is arithmetic that sympy can evaluate without harm."""
    return _accepts(text, guard=False)


def is_plain_guard(text: str) -> bool:
    """Whether `text` is a condition on the sizes of inputs and nothing else."""
    return _accepts(text, guard=True)


def _accepts(text: str, guard: bool) -> bool:
    if len(text) > MAX_LENGTH:
        return False
    try:
        _Parser(text, guard).check()
    except _Beyond:
        return False
    return True


class _Parser:
    """Recursive descent, one method a level of precedence. Each gives the bits of the largest number that its part
    can come to when every name in it stands for 1."""

    def __init__(self, text: str, guard: bool) -> None:
        self._tokens: list[tuple[str, str]] = []
        self._guard = guard
        self._at = 0
        self._depth = 0
        place = 0
        while place < len(text):
            match = TOKEN.match(text, place)
            if match is None or match.end() == place:
                raise _Beyond
            self._tokens.append((match.lastgroup or "", match[match.lastgroup or ""]))
            place = match.end()

    def check(self) -> None:
        self._truth()
        if self._at != len(self._tokens):
            raise _Beyond

    # tokens

    def _peek(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._tokens[at][1] if at < len(self._tokens) else ""

    def _take(self) -> tuple[str, str]:
        if self._at >= len(self._tokens):
            raise _Beyond
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, sign: str) -> None:
        if self._take()[1] != sign:
            raise _Beyond

    def _skip(self, *signs: str) -> None:
        """Pass over signs in front of something; each is a level of nesting for Python."""
        for _ in range(MAX_DEPTH):
            if self._peek() not in signs:
                return
            self._take()
        raise _Beyond

    # levels, loosest first

    def _truth(self) -> float:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Beyond
        bits = self._negation()
        while self._peek() in ("and", "or", "&", "|"):
            self._take()
            bits = max(bits, self._negation())
        self._depth -= 1
        return bits

    def _negation(self) -> float:
        self._skip("not", "~")
        return self._comparison()

    def _comparison(self) -> float:
        bits = self._sum()
        while self._peek() in ("==", "!=", "<", "<=", ">", ">="):
            self._take()
            bits = max(bits, self._sum())
        return bits

    def _sum(self) -> float:
        bits = self._product()
        while self._peek() in ("+", "-"):
            self._take()
            bits = self._bounded(max(bits, self._product()) + 1)
        return bits

    def _product(self) -> float:
        bits = self._signed()
        while self._peek() in ("*", "/", "//", "%"):
            self._take()
            bits = self._bounded(bits + self._signed())
        return bits

    def _signed(self) -> float:
        self._skip("+", "-")
        bits = self._atom()
        if self._peek() == "**":
            self._take()
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise _Beyond
            bits = self._raised(bits, self._signed())
            self._depth -= 1
        return bits

    def _atom(self) -> float:
        kind, token = self._take()
        if kind == "number":
            return _bits_of(token)
        if token == "(":
            bits = self._truth()
            self._expect(")")
            return bits
        if kind == "text" and self._guard:
            return 0.0
        if kind != "name":
            raise _Beyond
        if self._guard and token == "L":
            return self._input()
        if self._guard and token == "math" and self._peek() == ".":
            self._take()
            token = self._take()[1]
            if token not in MATH:
                raise _Beyond
            if self._peek() != "(":
                return 0.0
            return self._arguments()[0]
        if self._peek() == "(":
            return self._call(token)
        return 0.0

    def _input(self) -> float:
        """['x'], [0], .name and .size() in any number behind L."""
        while self._peek() in ("[", "."):
            if self._take()[1] == "[":
                if self._take()[0] not in ("number", "text"):
                    raise _Beyond
                self._expect("]")
                continue
            kind, token = self._take()
            if kind != "name" or token.startswith("_"):
                raise _Beyond
            if self._peek() == "(":
                if token not in SIZES:
                    raise _Beyond
                self._take()
                if self._peek() != ")":
                    self._sum()
                self._expect(")")
        return 0.0

    def _call(self, function: str) -> float:
        if function == "Symbol":
            return self._symbol()
        if function == "Float":
            return self._float()
        sizes = self._arguments()
        if function in ARITHMETIC or TORCH_FUNCTION.fullmatch(function):
            return self._bounded(sum(sizes) + len(sizes))
        if function in POWERS and len(sizes) == 2:
            return self._raised(*sizes)
        if function in SHIFTS and len(sizes) == 2:
            return self._bounded(sizes[0] + _value(sizes[1]))
        raise _Beyond

    def _arguments(self) -> list[float]:
        self._expect("(")
        sizes = []
        while self._peek() != ")":
            sizes.append(self._truth())
            if self._peek() != ",":
                break
            self._take()
        self._expect(")")
        return sizes or [0.0]

    def _symbol(self) -> float:
        self._expect("(")
        kind, token = self._take()
        if kind != "text" or not re.fullmatch(r"'[A-Za-z_][A-Za-z0-9_]*'", token):
            raise _Beyond
        while self._peek() == ",":
            self._take()
            if self._take()[1] not in ASSUMPTIONS:
                raise _Beyond
            self._expect("=")
            if self._take()[1] not in ("True", "False", "None"):
                raise _Beyond
        self._expect(")")
        return 0.0

    def _float(self) -> float:
        """Float('0.5', precision=53)."""
        self._expect("(")
        kind, token = self._take()
        token = token.strip("'")
        if kind not in ("text", "number") or not re.fullmatch(r"[+-]?[0-9.]{1,400}([eE][+-]?\d{1,3})?", token):
            raise _Beyond
        if self._peek() == ",":
            self._take()
            if self._take()[1] not in ("precision", "dps"):
                raise _Beyond
            self._expect("=")
            kind, digits = self._take()
            if kind != "number" or len(digits) > 3:
                raise _Beyond
        self._expect(")")
        return _bits_of(token.lstrip("+-"))

    def _raised(self, base: float, exponent: float) -> float:
        return self._bounded(max(base, 1.0) * _value(exponent))

    def _bounded(self, bits: float) -> float:
        if bits > MAX_BITS:
            raise _Beyond
        return bits


def _value(bits: float) -> float:
    """The largest number of so many bits."""
    return 2.0**bits if bits < 64 else math.inf


def _bits_of(number: str) -> float:
    """log2 of a number, at least 0. Raises _Beyond for one of absurd length."""
    if len(number) > 400:
        raise _Beyond
    try:
        value = float(number)
    except ValueError:
        raise _Beyond from None
    if value == math.inf:
        raise _Beyond
    # 1e-300 is a fraction with a denominator of as many digits.
    return abs(math.log2(value)) if value else 0.0
