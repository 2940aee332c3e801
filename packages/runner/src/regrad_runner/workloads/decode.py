"""From encoded image files to square pixels of one size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

LARGEST_SIDE = 64


@dataclass(frozen=True)
class Format:
    """What every image of a set is made to be.

    Attributes:
        side: Height and width in pixels.
        grey: Whether images have one channel instead of red, green and blue.
    """

    side: int
    grey: bool


@dataclass(frozen=True)
class EncodedImage:
    """An image file.

    Attributes:
        where: Where it was found, for errors.
        content: JPEG, PNG, GIF or WebP; None where there is none.
    """

    where: str
    content: bytes | None


def common_format(encoded: Sequence[EncodedImage]) -> Format:
    """Return the format that suits images: the median of their shorter sides, at most 64; grey if all are.

    Args:
        encoded: At least one image.

    Raises:
        ValueError: If an image cannot be decoded.
    """
    images = [_decoded(image, ImageReadMode.UNCHANGED) for image in encoded]
    side = int(statistics.median(min(image.shape[1:]) for image in images))
    return Format(side=min(side, LARGEST_SIDE), grey=all(image.shape[0] == 1 for image in images))


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
    mode = ImageReadMode.GRAY if form.grey else ImageReadMode.RGB
    images = torch.empty(len(encoded), 1 if form.grey else 3, form.side, form.side, dtype=torch.uint8)
    for position, file in enumerate(encoded):
        image = _decoded(file, mode)
        if image.shape != images.shape[1:]:
            image = functional.center_crop(functional.resize(image, [form.side], antialias=True), [form.side])
        images[position] = image
    return images


def _decoded(file: EncodedImage, mode: ImageReadMode) -> Tensor:
    if not file.content:
        raise ValueError(f"image must hold the bytes of an image file, got none in {file.where}")
    try:
        image: Tensor = decode_image(torch.frombuffer(bytearray(file.content), dtype=torch.uint8), mode=mode)
    except RuntimeError as problem:
        cause = str(problem).splitlines()[0]
        raise ValueError(
            f"image must be a JPEG, PNG, GIF or WebP file, got another in {file.where}: {cause}"
        ) from problem
    if image.ndim == 4:  # an animation
        image = image[0]
    if image.dtype != torch.uint8:
        image = functional.to_dtype(image, torch.uint8, scale=True)
    return image
