"""The options that say what a model is run on, and how: the same for `inspect` and `recalibrate`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from normdoctor.errors import UsageError

DATA, RUNNING = "The data", "Models that are code"
"""The parts of the help."""

DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help=".npz by input name, .npy, .pt, .safetensors, a folder of images, or mypkg.data:loader.",
        rich_help_panel=DATA,
    ),
]
SamplesOption = Annotated[
    str | None,
    typer.Option("--samples", metavar="N|all", help="How many; all, up to 10,000.", rich_help_panel=DATA),
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", metavar="N", rich_help_panel=DATA)]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", help="Of the order, and of which are taken.", rich_help_panel=DATA)
]
ScaleOption = Annotated[
    str | None,
    typer.Option("--scale", metavar="X", help="Multiply by this first: 1/255.", rich_help_panel=DATA),
]
MeanOption = Annotated[
    list[str] | None,
    typer.Option("--mean", metavar="M,M,M", help="Subtract this from each channel.", rich_help_panel=DATA),
]
StdOption = Annotated[
    list[str] | None,
    typer.Option("--std", metavar="S,S,S", help="Then divide each channel by this.", rich_help_panel=DATA),
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        "--image-size", metavar="N", help="Short side of images resized, the centre cropped.", rich_help_panel=DATA
    ),
]
DropOption = Annotated[
    bool,
    typer.Option("--drop-nonfinite", help="Leave out samples with NaN or Inf, and count them.", rich_help_panel=DATA),
]
LabelsOption = Annotated[
    str | None,
    typer.Option("--labels", metavar="FILE|KEY", help="The right classes: accuracy is measured.", rich_help_panel=DATA),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust", help="Let torch load the file, which may run code in it.", rich_help_panel=RUNNING),
]
ArchOption = Annotated[
    str | None,
    typer.Option(
        "--arch", metavar="PKG.MODULE:NAME", help="What builds the module of these weights.", rich_help_panel=RUNNING
    ),
]
ArchArgsOption = Annotated[
    str | None,
    typer.Option("--arch-args", metavar="JSON", help="Its keyword arguments.", rich_help_panel=RUNNING),
]
KeyOption = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", help="Which model of the file: state_dict_ema.", rich_help_panel=RUNNING),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Where to run it: cuda.", rich_help_panel=RUNNING)
]


@dataclass(frozen=True, kw_only=True)
class Given:
    """These options as they were given."""

    data: str | None
    samples: str | None
    batch_size: int
    seed: int
    scale: str | None
    mean: list[str] | None
    std: list[str] | None
    image_size: int | None
    drop_nonfinite: bool
    labels: str | None
    trust: bool
    arch: str | None
    arch_args: str | None
    key: str | None
    device: str | None

    def parsed(self) -> Mapping[str, Any]:
        """The keyword arguments of `inspect` and `recalibrate` for them. Raises UsageError."""
        from normdoctor.data.options import parse_channels, parse_samples, parse_scale

        return {
            "data": self.data,
            "samples": None if self.samples is None else parse_samples(self.samples),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "scale": None if self.scale is None else parse_scale(self.scale),
            "mean": parse_channels("--mean", self.mean) if self.mean else None,
            "std": parse_channels("--std", self.std) if self.std else None,
            "image_size": self.image_size,
            "drop_nonfinite": self.drop_nonfinite,
            "labels": self.labels,
            "trust": self.trust,
            "arch": self.arch,
            "arch_args": self.arch_args,
            "key": self.key,
            "device": self.device,
        }

    def check_unused(self, useful: Collection[str] = ()) -> None:
        """Raise UsageError for an option that means nothing without --data, save those that are `useful` still."""
        if self.data is not None:
            return
        for name, value in vars(self).items():
            if value and name not in useful and (name, value) != ("batch_size", 32):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} is for running the model on data", f"Add --data, or leave {option} out.")


def parse_bytes(text: str) -> int:
    """What --memory says. Raises UsageError.

    >>> parse_bytes("4GB"), parse_bytes("512 MB")
    (4000000000, 512000000)
    """
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    word = text.strip().upper()
    unit = next((name for name in sorted(units, key=len, reverse=True) if word.endswith(name)), "")
    try:
        return int(float(word.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError):
        raise UsageError(f"--memory {text}: not a number of bytes", "Write it like 4GB.") from None
