"""--input-shape: what it means, and what is said about a wrong one."""

from __future__ import annotations

import pytest

import normdoctor as nd
from normdoctor.models.inputs import InputSpec, parse_input_shape, parse_input_shapes


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1,3,224,224", InputSpec((1, 3, 224, 224))),
        ("1x3x8x8", InputSpec((1, 3, 8, 8))),
        (" [1, 128] : int64 ", InputSpec((1, 128), None, "int64")),
        ("ids=2,16:long", InputSpec((2, 16), "ids", "int64")),
        ("a.b=4,:torch.bool", InputSpec((4,), "a.b", "bool")),
        ("scale=:", InputSpec((), "scale")),
    ],
)
def test_a_shape(text: str, spec: InputSpec) -> None:
    assert parse_input_shape(text) == spec


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["abc"], "no list of lengths"),
        ([""], "no list of lengths"),
        (["1,,3"], "no list of lengths"),
        (["1,-3"], "no list of lengths"),
        (["=1,3"], "no name in front"),
        (["1,0,3"], "a length of 0"),
        (["1,3:flaot32"], "no element type 'flaot32'"),
        (["99999,99999,99999"], "elements"),
        (["x=1,3", "x=1,3"], "gives x twice"),
        (["x=1,3", "1,3"], "follows one with a name"),
    ],
)
def test_a_wrong_shape(texts: list[str], words: str) -> None:
    with pytest.raises(nd.UsageError, match=words) as caught:
        parse_input_shapes(texts)
    assert caught.value.hint
