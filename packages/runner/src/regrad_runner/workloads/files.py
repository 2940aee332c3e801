"""Sets of labelled image files that are too many or too large to hold decoded in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from regrad_runner.workloads.decode import ImageFile, eight_bit_image
from regrad_runner.workloads.images import LabelledImages

# Of ImageNet's training pixels in red, green and blue, as torchvision's pretrained models have
# them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
RESIZED = 256 / 224  # the shorter side before the middle is cut out, per side of the cut


class FileSet(LabelledImages):
    """Labelled image files, decoded when a batch is requested: ImageNet's usual pipeline.

    Images become RGB. Training images: a random part of .08 to 1 of the area, with an aspect ratio
    from 3/4 to 4/3, resized to the square; half of them mirrored. Others: the shorter side is
    resized to 256/224 of the square's, and the middle is cut out. All are standardised with
    ImageNet's moments.

    Args:
        paths: Image files, N.
        labels: Classes from 0, int64, shape [N].
        side: Height and width in pixels.
        augment: Whether images are changed at random.
        seed: Of the augmentation, at least 0.

    References:
        Szegedy et al., 2015, "Going Deeper with Convolutions", section 6, for the random part; the
        pipeline is that of torchvision's reference training, except that each image's draw is a
        function of (seed, epoch, index).
    """

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, *, side: int, augment: bool, seed: int = 0
    ) -> None:
        super().__init__(labels, channels=3, image_size=side, seed=seed)
        self.paths = list(paths)
        self.augment = augment
        if augment:
            cut = [v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()]
        else:
            cut = [v2.Resize(round(side * RESIZED), antialias=True), v2.CenterCrop(side)]
        scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.transform = v2.Compose([*cut, *scale])

    def pixels(self, indices: list[int]) -> Tensor:
        """Return the images [B, 3, H, W], float32, normalised and augmented.

        Raises:
            ValueError: If a file is missing or cannot be decoded.
        """
        images = torch.empty(len(indices), 3, self.image_size, self.image_size)
        # The transforms use only the global generator: it is seeded for them and restored.
        with torch.random.fork_rng(devices=[]):
            for position, index in enumerate(indices):
                image = eight_bit_image(ImageFile(self.paths[index]), grey=False)
                torch.default_generator.manual_seed(self._seed_of(index))
                images[position] = self.transform(image).as_subclass(Tensor)
        return images

    def _seed_of(self, index: int) -> int:
        """Return a seed for an image's changes: a function of (seed, epoch, index) alone."""
        drawn = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)
        return int(drawn[0])
