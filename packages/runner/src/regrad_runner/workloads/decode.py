"""From encoded image files to square pixels of one size."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from regrad.errors import RegradError
from torch import Tensor

from regrad_runner.errors import in_one_line
from regrad_runner.files import read_bytes

SMALLEST_SIDE = 4  # what three stages of a CIFAR network leave of it is one pixel
LARGEST_SIDE = 64
LARGEST_ASPECT_RATIO = 1000
# Pillow's own limit, a quarter of a GiB; a few kilobytes can claim billions.
MOST_PIXELS = 89_478_485
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")  # Pillow's names
LARGEST_LEVEL = 65_535
IMAGES_LOOKED_AT = 100  # to find a format that suits all
# Pillow knows more, and for some of them starts programs, such as Ghostscript for EPS.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class UnreadableImage(RegradError, ValueError):  # noqa: N818 - said of the image
    """An image is missing, damaged or of a kind that is not read; the message names it."""


@dataclass(frozen=True)
class EncodedImage:
    """An image file.

    Attributes:
        where: Where it was found, for errors.
        content: A file of one of `FORMATS`; None if there is none.
    """

    where: str
    content: bytes | None

    def decoded(self) -> Image.Image:
        """Return the image as a Pillow image, upright.

        Raises:
            UnreadableImage: If it is missing, of another format, damaged, a thin strip, or without
                pixels or with too many.
        """
        if not self.content:
            raise UnreadableImage(
                f"image must hold the bytes of an image file, got none in {self.where}"
            )
        image = _opened(io.BytesIO(self.content), self.where)
        with _named(self.where):
            image.load()
            turned = image.getexif().get(ExifTags.Base.Orientation) is not None
            return ImageOps.exif_transpose(image) if turned else image

    def in_eight_bits(self, *, grey: bool) -> Image.Image:
        """Return the image in mode "L" or "RGB", upright and in its own size.

        Raises:
            UnreadableImage: As `decoded`, or if its levels have no black and white, as
                floating-point numbers.
        """
        image = self.decoded()
        if image.mode == "F":
            raise UnreadableImage(
                "image must have whole numbers as pixels, "
                f"got floating-point ones in {self.where}; convert it first"
            )
        with _named(self.where):
            if image.mode.startswith("I"):
                image = self._scaled(image.convert("I"))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # the colours are the same, and Pillow does not warn
            return image.convert("L" if grey else "RGB")

    def _scaled(self, image: Image.Image) -> Image.Image:
        """Scale 65,536 levels of grey to 256; Pillow alone would cut off the upper ones."""
        low, high = image.getextrema()
        if low < 0 or high > LARGEST_LEVEL:  # type: ignore[operator]
            raise UnreadableImage(
                f"image must have levels from 0 to {LARGEST_LEVEL}, "
                f"got {low} to {high} in {self.where}; convert it first"
            )
        return image.point(lambda level: level * (1 / 257) + 0.5)


@dataclass(frozen=True)
class ImageFile:
    """An image file on the disk, read each time that it is decoded.

    Attributes:
        path: Where it is.
    """

    path: Path

    def read(self) -> EncodedImage:
        """Return what the file holds.

        Raises:
            UnreadableImage: If it cannot be read.
        """
        try:
            return EncodedImage(where=f"'{self.path}'", content=read_bytes(self.path))
        except OSError as problem:
            raise self._unreadable(problem) from problem

    def check(self) -> None:
        """Read the head of the file alone.

        Raises:
            UnreadableImage: If it cannot be read, is of another format, a thin strip, or without
                pixels or with too many. What is damaged behind its head is not found.
        """
        try:
            with self.path.open("rb") as stream:
                _opened(stream, f"'{self.path}'")
        except OSError as problem:
            raise self._unreadable(problem) from problem

    def _unreadable(self, problem: OSError) -> UnreadableImage:
        return UnreadableImage(
            f"image must be a readable file, got '{self.path}': {problem.strerror}"
        )


Encoded = EncodedImage | ImageFile


@dataclass(frozen=True)
class Format:
    """What every image of a set is made to be.

    Attributes:
        side: Height and width in pixels.
        grey: Whether images have one channel instead of red, green and blue.
    """

    side: int
    grey: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (1 if self.grey else 3, self.side, self.side)


def common_format(encoded: Sequence[Encoded]) -> Format:
    """Return the format that suits images.

    Its side is the median of their shorter sides, at most 64. It is grey if all of them are.

    Args:
        encoded: At least one image.

    Raises:
        ValueError: If an image is missing or cannot be decoded.
    """
    images = [read(file).decoded() for file in encoded]
    side = int(statistics.median(min(image.size) for image in images))
    grey = all(image.mode in GREY_MODES for image in images)
    return Format(side=min(side, LARGEST_SIDE), grey=grey)


def decode_images(encoded: Sequence[Encoded], form: Format) -> Tensor:
    """Return images in one format.

    If an image differs, its shorter side is resized and the middle is cut out.

    Args:
        encoded: N images.
        form: Side S and grey (C = 1) or not (C = 3).

    Returns:
        Pixels, uint8, shape [N, C, S, S], in the order of `encoded`.

    Raises:
        ValueError: If an image is missing or cannot be decoded.
    """
    images = torch.empty(len(encoded), *form.shape, dtype=torch.uint8)
    for position, file in enumerate(encoded):
        image = _fitted(eight_bit_image(file, grey=form.grey), form.side)
        pixels = torch.from_numpy(np.array(image))
        images[position] = pixels if form.grey else pixels.permute(2, 0, 1)
    return images


def eight_bit_image(file: Encoded, *, grey: bool) -> Image.Image:
    """Return a file as a Pillow image of mode "L" or "RGB", in its own size.

    Raises:
        UnreadableImage: If it is missing or cannot be decoded.
    """
    return read(file).in_eight_bits(grey=grey)


def read(file: Encoded) -> EncodedImage:
    """Return an image file with what it holds.

    Raises:
        UnreadableImage: If it cannot be read.
    """
    if isinstance(file, ImageFile):
        return file.read()
    return file


def _opened(stream: IO[bytes], where: str) -> Image.Image:
    """Return an image of which the head alone is read: format, size and mode."""
    with _named(where), _any_size():
        image = Image.open(stream, formats=_formats())
    width, height = image.size
    size = f"{width} × {height} in {where}"
    if min(image.size) < 1 or width * height > MOST_PIXELS:
        raise UnreadableImage(f"image must have 1 to {MOST_PIXELS:,} pixels, got {size}")
    if max(image.size) > LARGEST_ASPECT_RATIO * min(image.size):
        raise UnreadableImage(
            f"image must be at most {LARGEST_ASPECT_RATIO} times as long as wide, got {size}"
        )
    return image


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say in which file it was, whatever Pillow and its codecs raise in the block."""
    rule = f"image must be a JPEG, PNG or the like, got something else in {where}"
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError as problem:
        raise UnreadableImage(f"{rule}; supported are {', '.join(_formats())}") from problem
    except Exception as problem:
        raise UnreadableImage(f"{rule}: {in_one_line(problem)}") from problem


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _any_size() -> Iterator[None]:
    """Let Pillow open the head of an image of any size without a warning: `_opened` checks it."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """Resize a Pillow image, bicubic, to a shorter side of `side` pixels; cut out its middle."""
    width, height = image.size
    if width == height == side:
        return image
    scale = side / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)))
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
