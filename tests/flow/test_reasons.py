"""Every code that the program gives as a reason is one that the reader can look up."""

from __future__ import annotations

import ast
from pathlib import Path

import normdoctor
from normdoctor.flow.reasons import REASONS


def codes_in_the_program() -> set[str]:
    found = set()
    for path in Path(normdoctor.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Blocked", "Fixed"):
                found |= {code.value for code in node.args[:1] if isinstance(code, ast.Constant)}
    return found


def test_every_code_is_explained_and_every_explanation_is_used() -> None:
    given = {"overflow"}  # found out when the weights are computed, not by the plan
    assert REASONS.keys() - given <= codes_in_the_program()
    assert codes_in_the_program() <= REASONS.keys()
