"""How data is to be read: what --samples, --batch-size, --scale, --mean and their like say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from normdoctor.errors import UsageError

MOST_SAMPLES = 10_000
"""How many are used where nobody says how many: what a population mean and variance is worth then is known to 1 %."""

MAX_IMAGE_SIZE = 1 << 12

FRACTION = re.compile(r"\s*([^/\s]+)\s*/\s*([^/\s]+)\s*")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What to take of the data, and what to do to its values before a model sees them. Raises UsageError."""

    samples: int | Literal["all"] | None = None
    """How many; None: all, but at most 10,000. Where there are more, those used are drawn by the seed, each sample
    with the same probability and none twice. What is used is always shuffled by the seed: files and folders are
    often sorted by class, and the spread between batches is what errors are estimated from."""
    batch_size: int = 32
    """Of what comes without batches of its own, unless the model takes only one other length."""
    seed: int = 0
    scale: float | None = None
    """What every value is multiplied with first. Images are bytes, and without it taken times 1/255."""
    mean: Sequence[float] | None = None
    """What is subtracted then: a value per channel (axis 1), or one for all."""
    std: Sequence[float] | None = None
    """What is divided by last."""
    image_size: int | None = None
    """Height and width that images are resized and cropped to."""
    drop_nonfinite: bool = False
    """Leave out samples with NaN or Inf, instead of an error."""
    labels: str | Path | None = None
    """A file with the right classes, or the name of the array in the data that has them."""

    def __post_init__(self) -> None:
        if self.samples not in (None, "all") and (not isinstance(self.samples, int) or self.samples < 1):
            raise UsageError(f"--samples {self.samples}: not a number of samples", "Give 1 or more, or the word all.")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: not a number of samples", "Give 1 or more.")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: is negative", "Give 0 or more.")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale):
            raise UsageError(f"--scale {self.scale}: not a factor", "Give a number such as 1/255.")
        for name, values in (("--mean", self.mean), ("--std", self.std)):
            if values is not None and (not values or not all(map(math.isfinite, values))):
                raise UsageError(f"{name} {list(values)}: not a number for each channel", _CHANNELS)
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"--std {list(self.std)}: not all are above 0", _CHANNELS)
        if self.image_size is not None and not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise UsageError(f"--image-size {self.image_size}: not a number of pixels", "Give one such as 224.")

    def limit(self) -> int | None:
        """How many samples are used at most, None for no limit."""
        if self.samples is None:
            return MOST_SAMPLES
        return None if self.samples == "all" else int(self.samples)


_CHANNELS = "Write it like 0.485,0.456,0.406 or 0.5."


def parse_samples(text: str) -> int | Literal["all"]:
    """What --samples says. Raises UsageError.

    >>> parse_samples("2_000"), parse_samples("all")
    (2000, 'all')
    """
    if text.strip().lower() == "all":
        return "all"
    try:
        return int(text.replace(",", ""))
    except ValueError:
        raise UsageError(f"--samples {text}: not a number of samples", "Give 1 or more, or the word all.") from None


def parse_scale(text: str) -> float:
    """What --scale says: a number, or a fraction of two. Raises UsageError.

    >>> parse_scale("1/4"), parse_scale("0.5")
    (0.25, 0.5)
    """
    fraction = FRACTION.fullmatch(text)
    try:
        return float(fraction[1]) / float(fraction[2]) if fraction else float(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"--scale {text!r}: not a factor", "Give a number such as 1/255.") from None


def parse_channels(option: str, texts: Iterable[str]) -> tuple[float, ...]:
    """What --mean or --std says: numbers with commas or spaces between them. Raises UsageError.

    >>> parse_channels("--mean", ["0.5,0.25", "1"])
    (0.5, 0.25, 1.0)
    """
    words = [word for text in texts for word in re.split(r"[,\s]+", text.strip("[]() ")) if word]
    try:
        return tuple(map(float, words))
    except ValueError:
        raise UsageError(f"{option} {' '.join(words)}: not a number for each channel", _CHANNELS) from None


def scale_words(scale: float) -> str:
    """A factor as people write it.

    >>> scale_words(0.00392157), scale_words(2.0)
    ('1/255', 'times 2')
    """
    inverse = 1 / scale
    if round(inverse) > 1 and abs(inverse - round(inverse)) < 1e-4 * inverse:
        return f"1/{round(inverse)}"
    return f"times {scale:g}"
