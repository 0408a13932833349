"""Commands in fixes: on a line of their own, so that they can be copied."""

from __future__ import annotations

import re

import pytest

from normdoctor.layers import Checkpoint, Container
from normdoctor.reports.wording import split_fix
from normdoctor.rules import RULES
from normdoctor.rules.runner import fill_in

FILE = Checkpoint(path="m.pt", format="state_dict", container=Container.ZIP, models=())
NAMED_ONLY = re.compile(r"`normdoctor \w+`|as normdoctor fold does")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_the_command_of_a_fix_is_at_its_end_and_apart(rule) -> None:
    fix = fill_in(rule.fix, FILE)
    prose, command = split_fix(fix)
    assert "normdoctor " not in NAMED_ONLY.sub("", prose)
    assert not re.search("[;,] ", command)
    assert " ".join(filter(None, (prose, command))) == fix


def test_a_condition_before_the_command() -> None:
    assert split_fix("if not on purpose: normdoctor recalibrate m.pt --data DATA -o m.fixed.pt") == (
        "if not on purpose:",
        "normdoctor recalibrate m.pt --data DATA -o m.fixed.pt",
    )


def test_what_is_read_twice_does_not_exceed_the_whole() -> None:
    small = Checkpoint(
        path="m.pt2", format="", container=Container.ZIP, models=(), bytes_total=152, count_bytes_read=lambda: 155
    )
    assert small.bytes_read == 152
