"""From encoded image files to square pixels of one size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

LARGEST_SIDE = 64
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
            ValueError: If it is missing or cannot be decoded.
        """
        if not self.content:
            raise ValueError(f"image must hold the bytes of an image file, got none in {self.where}")
        try:
            return datasets.Image().decode_example({"bytes": self.content, "path": None})
        except (OSError, SyntaxError, ValueError) as problem:
            cause = str(problem).splitlines()[0]
            raise ValueError(
                f"image must be a JPEG, PNG or the like, got another in {self.where}: {cause}"
            ) from problem


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


def common_format(encoded: Sequence[EncodedImage]) -> Format:
    """Return the format that suits images: the median of their shorter sides, at most 64; grey if all are.

    Args:
        encoded: At least one image.

    Raises:
        ValueError: If an image is missing or cannot be decoded.
    """
    images = [file.decoded() for file in encoded]
    side = int(statistics.median(min(image.size) for image in images))
    return Format(side=min(side, LARGEST_SIDE), grey=all(image.mode in GREY_MODES for image in images))


def decode_images(encoded: Sequence[EncodedImage], form: Format) -> Tensor:
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
        image = _pixels(file.decoded(), grey=form.grey)
        if image.shape != images.shape[1:]:
            image = functional.center_crop(functional.resize(image, [form.side], antialias=True), [form.side])
        images[position] = image
    return images


def _pixels(image: Any, *, grey: bool) -> Tensor:
    """Return a Pillow image as uint8 of shape [C, H, W]."""
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would cut off the upper ones
        levels = torch.from_numpy(np.asarray(image).astype(np.int32)) // 257
        return levels.to(torch.uint8).expand(1 if grey else 3, -1, -1)
    tensor: Tensor = functional.pil_to_tensor(image.convert("L" if grey else "RGB"))
    return tensor
