"""A folder of images as an array: samples x channels x height x width, bytes. Needs Pillow, the extra `images`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normdoctor.errors import InputError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
"""Those that Pillow decodes by itself; it would start other programs for some."""

HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"P5", b"P6")

MAX_PIXELS = 50_000_000
"""A larger image is refused before it is decoded: it would take 200 MB for each step of its way."""

MAX_RATIO = 50
"""Sides longer than so many times the short one are refused: resizing the short one makes the long one longer."""


@dataclass(eq=False)
class ImageRows:
    """Images as `Rows`. Orientation as EXIF says, short side resized to `size` (bilinear, antialiased), the middle
    square of it. Those that cannot be decoded are found out when they are taken."""

    folder: Path
    files: Sequence[Path]
    channels: int
    height: int
    width: int
    size: int | None
    """None: as they are, all of height x width."""
    lost: dict[int, str] = field(default_factory=dict)

    dtype: str = "uint8"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.files), self.channels, self.height, self.width)

    def take(self, places: Sequence[int]) -> NDArray[Any]:
        values = np.zeros((len(places), *self.shape[1:]), np.uint8)
        for i, place in enumerate(places):
            if place in self.lost:
                continue
            try:
                values[i] = self._image(self.files[place])
            except Exception as error:  # whatever a decoder raises over a damaged file
                self.lost[place] = reason(error)
        return values

    def whole(self) -> NDArray[Any]:
        return self.take(range(len(self.files)))

    def name_of(self, place: int) -> str:
        path = self.files[place]
        return str(path.relative_to(self.folder)) if path != self.folder else path.name

    def _image(self, path: Path) -> NDArray[np.uint8]:
        from PIL import Image, ImageOps

        with opened(path) as image, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF, odd palettes
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its values are no bytes (mode {image.mode})")
            image.load()
            mode = "L" if self.channels == 1 else "RGB"
            ImageOps.exif_transpose(image, in_place=True)
            plain = image.copy() if image.mode == mode else image.convert(mode)
        if self.size is not None:
            width, height = plain.size
            short = min(width, height)
            target = (_scaled(width, self.size, short), _scaled(height, self.size, short))
            if target[0] * target[1] > MAX_PIXELS:
                raise ValueError(f"{target[0]} x {target[1]} pixels once its short side is {self.size}")
            if target != plain.size:
                plain = plain.resize(target, Image.Resampling.BILINEAR)
            left, top = (round((side - self.size) / 2) for side in target)
            plain = plain.crop((left, top, left + self.size, top + self.size))
        values: NDArray[np.uint8] = np.asarray(plain, dtype=np.uint8)
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        if values.shape != self.shape[1:]:
            raise ValueError(f"it is {plain.width} x {plain.height}")
        return values


def _scaled(side: int, size: int, short: int) -> int:
    """As torchvision rounds it."""
    return size if side == short else size * side // short


def reason(error: BaseException) -> str:
    """The first line of an exception, without the address of a file object."""
    text = (str(error).splitlines() or [""])[0].partition(" <_io")[0]
    return text[:200] or type(error).__name__


def opened(path: Path) -> Image:
    """An image whose header is read and no more. Raises ValueError for one that is too large, OSError for none."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.init()
        image = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
        image.close()
        raise ValueError(f"{width} x {height} pixels")
    return image


def is_image(head: bytes) -> bool:
    """Whether a file begins as images do."""
    return head.startswith(HEADS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def open_images(path: Path, size: int | None, channels: int = 3) -> ImageRows:
    """A single image, or all below a folder in the order of their paths; links to folders are not followed.

    Raises MissingDependencyError without Pillow, InputError where there is no image, UsageError for images of
    several sizes where `size` is None."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: images need Pillow, which cannot be imported ({error})", "pip install 'normdoctor[images]'"
        ) from None
    files = sorted(_files(path)) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no images in this folder", f"It reads {', '.join(sorted(SUFFIXES))}.")
    if size is not None:
        return ImageRows(path, files, channels, size, size, size)
    lost: dict[int, str] = {}
    sizes: dict[tuple[int, int], Path] = {}
    for place, file in enumerate(files):
        try:
            sizes.setdefault(_turned(file), file)
        except Exception as error:  # as when it is decoded
            lost[place] = reason(error)
        if len(sizes) > 1:
            (first, second), (file, other) = sizes, sizes.values()
            raise UsageError(
                f"{path}: {file.name} is {first[0]} x {first[1]}, {other.name} is {second[0]} x {second[1]}",
                "Add --image-size, such as 224, to resize all of them.",
            )
    if not sizes:
        raise none_readable(path, len(files), files[0].name, lost[0])
    (width, height), *_ = sizes
    return ImageRows(path, files, channels, height, width, None, lost)


def none_readable(path: Path | str, count: int, name: str, why: str) -> InputError:
    """For a folder in which no image can be decoded."""
    which = f"none of {count} images can be read" if count > 1 else "the image cannot be read"
    return InputError(f"{path}: {which} ({name}: {why})", "Give JPEG, PNG or WebP files.")


def _turned(path: Path) -> tuple[int, int]:
    """Width and height as EXIF turns them."""
    with opened(path) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width, height = image.size
        return (height, width) if image.getexif().get(0x0112) in (5, 6, 7, 8) else (width, height)


def _files(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(here, name)
