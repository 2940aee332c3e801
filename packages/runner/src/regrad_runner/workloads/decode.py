"""From encoded image files to square pixels of one size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

LARGEST_SIDE = 64
LONGEST = 1000
GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")  # Pillow's names


@dataclass(frozen=True)
class EncodedImage:
    """An image file.

    Attributes:
        where: Where it was found, for errors.
        content: JPEG, PNG or whatever else Pillow reads; None where there is none.
    """

    where: str
    content: bytes | None

    def decoded(self) -> Any:
        """Return the image as a Pillow image, upright.

        Raises:
            ValueError: If it is missing, cannot be decoded, or is a thin strip.
        """
        if not self.content:
            raise ValueError(
                f"image must hold the bytes of an image file, got none in {self.where}"
            )
        try:
            image = datasets.Image().decode_example({"bytes": self.content, "path": None})
        except Exception as problem:
            cause = (str(problem).splitlines() or [type(problem).__name__])[0]
            raise ValueError(
                f"image must be a JPEG, PNG or the like, got another in {self.where}: {cause}"
            ) from problem
        if max(image.size) > LONGEST * min(image.size):
            size = " × ".join(map(str, image.size))
            raise ValueError(
                f"image must be at most {LONGEST} times as long as wide, got {size} in {self.where}"
            )
        return image


@dataclass(frozen=True)
class ImageFile:
    """An image file on the disk, read each time that it is decoded.

    Attributes:
        path: Where it is.
    """

    path: Path

    def decoded(self) -> Any:
        """Return the image as a Pillow image, upright.

        Raises:
            ValueError: If it is missing or cannot be decoded.
        """
        try:
            return EncodedImage(where=f"'{self.path}'", content=self.path.read_bytes()).decoded()
        except OSError as problem:
            raise ValueError(
                f"image must be a readable file, got '{self.path}': {problem.strerror}"
            ) from problem


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
    """Return the format that suits images: the median of their shorter sides, at most 64; grey if all are.

    Args:
        encoded: At least one image.

    Raises:
        ValueError: If an image is missing or cannot be decoded.
    """
    images = [file.decoded() for file in encoded]
    side = int(statistics.median(min(image.size) for image in images))
    return Format(
        side=min(side, LARGEST_SIDE), grey=all(image.mode in GREY_MODES for image in images)
    )


def decode_images(encoded: Sequence[Encoded], form: Format) -> Tensor:
    """Return images in one format; where one differs its shorter side is resized and its middle cut out.

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


def eight_bit_image(file: Encoded, *, grey: bool) -> Any:
    """Return a file as a Pillow image of mode "L" or "RGB", in its own size.

    Raises:
        ValueError: If it is missing or cannot be decoded.
    """
    return _eight_bits(file.decoded()).convert("L" if grey else "RGB")


def _eight_bits(image: Any) -> Any:
    """Scale 65,536 levels of grey to 256; Pillow alone would cut off the upper ones."""
    return (
        image.convert("I").point(lambda level: level * (1 / 257) + 0.5)
        if image.mode.startswith("I")
        else image
    )


def _fitted(image: Any, side: int) -> Any:
    """Resize a Pillow image, bicubic, to a shorter side of `side` pixels and cut out its middle square."""
    width, height = image.size
    if width == height == side:
        return image
    scale = side / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)))
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))
