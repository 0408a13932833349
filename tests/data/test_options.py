"""What the options of data say, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from normdoctor.data.options import DataOptions, parse_channels, parse_samples, parse_scale, scale_words
from normdoctor.errors import UsageError


@pytest.mark.parametrize(
    "text, value", [("1/255", 1 / 255), (" 2 / 4 ", 0.5), ("0.00392157", 0.00392157), ("1e-2", 0.01), ("-1", -1)]
)
def test_scale(text: str, value: float) -> None:
    assert parse_scale(text) == value


@pytest.mark.parametrize("text", ["", "x", "1/0", "1/", "1/2/3"])
def test_no_scale(text: str) -> None:
    with pytest.raises(UsageError, match="not a factor"):
        parse_scale(text)


def test_samples_and_channels() -> None:
    assert [parse_samples(text) for text in ("12", "10,000", "ALL")] == [12, 10_000, "all"]
    assert parse_channels("--mean", ["0.485, 0.456,0.406"]) == (0.485, 0.456, 0.406)
    assert parse_channels("--std", ["[1", "2]"]) == (1, 2)
    with pytest.raises(UsageError, match="--samples many"):
        parse_samples("many")
    with pytest.raises(UsageError, match="--std a"):
        parse_channels("--std", ["a"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 0},
        {"samples": -3},
        {"batch_size": 0},
        {"seed": -1},
        {"scale": 0.0},
        {"scale": float("nan")},
        {"mean": ()},
        {"mean": (float("inf"),)},
        {"std": (1.0, 0.0)},
        {"image_size": 0},
        {"image_size": 10**9},
    ],
)
def test_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        DataOptions(**wrong)
    assert f"--{next(iter(wrong)).replace('_', '-')}" in caught.value.message and caught.value.hint


def test_words_of_a_factor() -> None:
    assert [scale_words(value) for value in (1 / 255, 0.00392157, 0.5, 2, 0.3, -1)] == [
        "1/255", "1/255", "1/2", "times 2", "times 0.3", "times -1",
    ]  # fmt: skip
    assert (DataOptions().limit(), DataOptions(samples="all").limit(), DataOptions(samples=7).limit()) == (
        10_000,
        None,
        7,
    )
