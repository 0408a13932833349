"""Which texts of an exported program are plain arithmetic. What passes is handed to sympy here; nothing else is."""

from __future__ import annotations

import time

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from normdoctor.readers.expressions import is_plain, is_plain_guard

SYMBOL = "Symbol('s77', positive=True, integer=True)"

PLAIN = [
    "s0",
    "2*s0 + 1",
    "s0*(s1 - 1)//2",
    "2**(s0 - 1)",
    "-s0 % 8",
    "s0 >= 2",
    SYMBOL,
    f"Mul(Integer(8), {SYMBOL})",
    f"Min(Integer(16), Mul(Integer(16), {SYMBOL}))",
    f"Add(Integer(1), Pow({SYMBOL}, Integer(-1)), Rational(1, 2))",
    f"FloorDiv(Add({SYMBOL}, Integer(-1)), Integer(2))",
    f"Piecewise(ExprCondPair(Integer(1), Equality({SYMBOL}, Integer(0))), ExprCondPair({SYMBOL}, true))",
    "Float('0.5', precision=53)",
    f"StrictLessThan({SYMBOL}, Integer(64))",
    f"OpaqueUnaryFn_sqrt(ToFloat({SYMBOL}))",
]

HOSTILE = {
    "a call": "__import__('os').system('id')",
    "a builtin": "eval('1')",
    "an attribute": "s0.__class__",
    "an attribute behind a number": "(1).real",
    "an item": "s0[0]",
    "a lambda": "(lambda: 0)()",
    "a comprehension": "[s0 for s0 in s1]",
    "a conditional": "s0 if s1 else s2",
    "a walrus": "(s0 := 1)",
    "a text": "'s0'",
    "a text in a symbol": "Symbol('s0) + eval(1')",
    "a keyword": "Symbol('s0', cls=eval)",
    "a float of code": "Float('__import__')",
    "an f-string": "f's0'",
    "a factorial": "9999999!",
    "a factorial by name": "factorial(99999999)",
    "another function of sympy": "sympify('1')",
    "a starred argument": "Max(*s0)",
    "a tower": "9**9**9",
    "a tower of calls": "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "a power behind a zero": "2**(0*s0 + 10**12)",
    "a long shift": "LShift(Integer(1), Integer(10000000000))",
    "a large number": "9" * 500,
    "a large exponent": "1e999",
    "many factors": "*".join(["99999999999999999999"] * 100),
    "deep": "(" * 100 + "1" + ")" * 100,
    "signs": "-" * 200 + "1",
    "long": "1+" * 10_000 + "1",
    "a comment": "s0 # comment",
    "two lines": "s0\n+ s1",
    "two expressions": "s0; s1",
    "unfinished": "Mul(s0,",
    "unbalanced": "Mul(s0))",
    "nothing": "",
    "not ASCII": "ｓ0",
}


@pytest.mark.parametrize("text", PLAIN)
def test_what_torch_writes_is_plain(text: str) -> None:
    assert is_plain(text)
    sympy.sympify(text)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_everything_else_is_not(text: str) -> None:
    begin = time.perf_counter()
    assert not is_plain(text)
    assert not is_plain_guard(text) or text == "'s0'"
    assert time.perf_counter() - begin < 0.5


GUARDS = [
    "2*L['x'].size()[1] > 7",
    "L['flat_args'][0].size()[1] % 2 == 0",
    "L['x'].stride()[0] == L['x'].size()[1] and not (L['y'] <= 3)",
    "math.floor(L['x'].size()[0] / 2) >= 1",
    "L['batch'].image.size()[0] != math.inf",
    "L['mode'] == 'fast'",
]


@pytest.mark.parametrize("text", GUARDS)
def test_conditions_on_sizes_are_plain_guards_but_no_sizes(text: str) -> None:
    assert is_plain_guard(text)
    assert not is_plain(text)


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].__class__",
        "L['x'].apply(eval)",
        "L['x'].numpy().tofile('a')",
        "math.__loader__",
        "math.factorial(99999999)",
        "L['x'].size()[0] == 1); import os; (1",
        "L['a\\'b']",
        "torch.load('x')",
    ],
)
def test_other_guards_are_not(text: str) -> None:
    assert not is_plain_guard(text)


PARTS = st.sampled_from(
    [
        "s0",
        "1",
        "9",
        "99999",
        "0",
        "**",
        "*",
        "+",
        "-",
        "//",
        "(",
        ")",
        ",",
        "Pow",
        "LShift",
        "Max",
        " ",
        "1e9",
        ".",
        "'",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=14).map("".join))
def test_what_is_accepted_makes_no_huge_numbers(text: str) -> None:
    if not is_plain(text):
        return
    functions = {
        "Pow": lambda *given: given[0] ** given[1],
        "LShift": lambda *given: int(given[0]) << int(given[1]),
        "Max": lambda *given: max(given),
    }
    try:
        value = eval(text, {"__builtins__": {}}, {"s0": 1, **functions})  # the parts can make nothing but arithmetic
    except (TypeError, ValueError, ZeroDivisionError, SyntaxError, OverflowError, IndexError, NameError):
        return
    if isinstance(value, int):
        assert value.bit_length() < 5000
