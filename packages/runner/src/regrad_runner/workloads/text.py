"""Language modelling of a text, byte by byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from regrad.correction import did_you_mean
from torch import Tensor, nn
from torch.nn import functional as F

from regrad_runner.files import read_bytes
from regrad_runner.models.gpt import build_gpt
from regrad_runner.workloads.folders import DataFolder
from regrad_runner.workloads.samples import Batch, Samples, hashed_integers
from regrad_runner.workloads.workload import (
    BASELINE_TARGET,
    Defaults,
    Measure,
    Target,
    Workload,
)

VOCABULARY = 256
MODEL = "gpt"
GPT_WIDTH = 128
TEXT_VALIDATION_SHARE = 0.1
TEXT_TEST_SHARE = 0.1
NO_TARGET = -100  # the target that `torch.nn.CrossEntropyLoss` ignores
BYTES_AT_ONCE = 2**16  # in evaluation: 64 MiB of logits
WORK_PER_BYTE = 16  # of a small transformer, in pixels of a small residual network
TEXT_LAYOUT = "a UTF-8 file, or a folder with *.txt"
TEXT_DEFAULTS = Defaults(
    epochs=10,
    batch_size=32,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.01,
    model=MODEL,
    warmup_steps=100,
    evaluations_per_epoch=4,
)


def load(
    *,
    seed_of_split: int = 0,
    data_dir: Path | None = None,
    train_size: int | None = None,
    context: int = 128,
    target: Target = BASELINE_TARGET,
) -> TextWorkload:
    """Return the bytes of a text, each to be predicted from those before.

    The measure is bits per byte, and lower is better. By position, the first 80 % of the bytes are
    for training, the next 10 % for validation, the last 10 % for testing; no byte is predicted in
    two of them. A sample is a window of `context` bytes, each predicted from those before it in the
    window and from one byte more in front. Training windows lie where a hash of seed, epoch and
    number puts them; an epoch has as many as fill the training bytes. Those of validation and test
    follow each other, so that every byte is predicted once, the last ones in a shorter window.

    Args:
        seed_of_split: Must be 0: the split is by position.
        data_dir: A file in UTF-8, or a folder whose `*.txt` are put one behind the other in the
            order of their names; hidden ones are left out.
        train_size: Number of training windows that an epoch has; only as many bytes, the first, are
            kept. None for all.
        context: Bytes of a window, at least 1.
        target: Bits per byte on the validation split to which steps are counted, "baseline" or
            None, as in `regrad_runner.workloads.workload.Measure`.

    Raises:
        ValueError: If there is no such file, it is empty, too short, no regular file or not UTF-8,
            if one stands twice in the folder or is a link that leads out of it, or if a number is
            out of its range.
    """
    if seed_of_split:
        raise ValueError(
            "seed_of_split must be 0 for workload 'text', which is split by position, "
            f"got {seed_of_split}"
        )
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context!r}")
    if isinstance(target, float | int) and not target > 0:
        raise ValueError(f"target must be positive, got {target!r}")
    text = _read(data_dir)
    least = math.ceil((context + 1) / TEXT_VALIDATION_SHARE)
    if len(text) < least:
        raise ValueError(
            f"data_dir must hold at least {least} bytes for windows of {context}, "
            f"got {len(text)} in '{data_dir}'; give more text or a smaller context"
        )
    validating = round(len(text) * (1 - TEXT_VALIDATION_SHARE - TEXT_TEST_SHARE))
    testing = round(len(text) * (1 - TEXT_TEST_SHARE))
    train = text[: _kept(validating, context, train_size)]
    return TextWorkload(
        name="text",
        measure=Measure(name="test bits per byte", higher_is_better=False, target=target),
        train=DrawnWindows(train, context=context),
        # Each begins with the byte before: it is what the first one is predicted from, and
        # predicted by none of them.
        validation=WindowsInOrder(text[validating - 1 : testing], context=context),
        test=WindowsInOrder(text[testing - 1 :], context=context),
        context=context,
        defaults=TEXT_DEFAULTS,
    )


@dataclass(frozen=True, kw_only=True)
class TextWorkload(Workload):
    """A text, a transformer, cross entropy and bits per byte.

    Attributes:
        context: Bytes of a window.
    """

    reads_probabilities = True

    context: int

    def build_model(
        self,
        name: str,
        *,
        width: int = GPT_WIDTH,
        layers: int = 4,
        heads: int = 4,
        tied: bool = False,
        seed: int = 0,
    ) -> nn.Module:
        """Return a transformer over bytes: see `regrad_runner.models.gpt.build_gpt`."""
        if name != MODEL:
            raise ValueError(
                f"no model named {name!r} for workload 'text'; "
                f"there is {MODEL}{did_you_mean(name, [MODEL])}"
            )
        sizes = {"width": width, "layers": layers, "heads": heads}
        return build_gpt(vocabulary=VOCABULARY, context=self.context, tied=tied, seed=seed, **sizes)

    def model_settings(self, name: str) -> Mapping[str, Any]:
        """Return the width that a model has unless told otherwise."""
        return {"width": GPT_WIDTH}

    def score(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bits of each window's bytes, and how many these are."""
        nats = F.cross_entropy(outputs.float(), targets, reduction="none", ignore_index=NO_TARGET)
        return nats.double().sum(1) / math.log(2), (targets != NO_TARGET).sum(1)


class Windows(Samples):
    """Windows of a text: bytes [B, context] to predict from, and those that follow each of them.

    Args:
        text: Bytes, uint8, shape [N].
        context: Bytes of a window.
    """

    kind = "windows"

    def __init__(self, text: Tensor, *, context: int) -> None:
        super().__init__()
        self.text = text
        self.context = context
        self.evaluation_batch = max(1, BYTES_AT_ONCE // context)
        self.work = WORK_PER_BYTE * context

    def starts(self, indices: list[int]) -> Tensor:
        """Return where windows begin, shape [B]. A subclass must implement it."""
        raise TypeError(f"{type(self).__name__} must implement starts")

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return bytes and what follows each, int64, both [B, context]; -100 after the end."""
        places = self.starts(indices)[:, None] + torch.arange(self.context + 1)
        found = self.text[places.clamp(max=len(self.text) - 1)].long()
        ended = places[:, 1:] >= len(self.text)
        return found[:, :-1], found[:, 1:].masked_fill(ended, NO_TARGET)


class DrawnWindows(Windows):
    """As many windows as fill a text, each anywhere in it.

    Where one begins is a function of (seed, epoch, number of the window).
    """

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def starts(self, indices: list[int]) -> Tensor:
        """Return where windows begin, shape [B]."""
        places = len(self.text) - self.context
        return hashed_integers(
            places, seed=self.seed, epoch=self.epoch, indices=np.asarray(indices), draw=0
        )


class WindowsInOrder(Windows):
    """Windows one behind the other: every byte of a text but the first is predicted once."""

    def __len__(self) -> int:
        return math.ceil((len(self.text) - 1) / self.context)

    def starts(self, indices: list[int]) -> Tensor:
        """Return where windows begin, shape [B]."""
        return self.context * torch.as_tensor(indices)


def _kept(size: int, context: int, train_size: int | None) -> int:
    """Return how many of `size` training bytes are kept."""
    most = (size - 1) // context
    if train_size is not None and not 1 <= train_size <= most:
        raise ValueError(
            f"train_size must be from 1 to {most} (windows of {context} bytes), got {train_size!r}"
        )
    if train_size is None:
        return size
    return train_size * context + 1


def _read(place: Path | None) -> Tensor:
    """Return the bytes of a file, or of every text in a folder, uint8."""
    if place is None:
        raise ValueError(f"data_dir must be given for workload 'text': {TEXT_LAYOUT}")
    files = [place]
    if place.is_dir():
        files = DataFolder(place).files_in(place, lambda name: name.endswith(".txt"))
    if not files:
        raise ValueError(f"data_dir must be {TEXT_LAYOUT}, got '{place}' without one")
    text = b"".join(_read_file(file) for file in files)
    if not text:
        raise ValueError(f"data_dir must hold text, got '{place}', which is empty")
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def _read_file(file: Path) -> bytes:
    """Return the bytes of a file, or raise a `ValueError` if it is not UTF-8."""
    try:
        content = read_bytes(file)
    except OSError as problem:
        raise ValueError(
            f"data_dir must be {TEXT_LAYOUT}, got '{file}': {problem.strerror}"
        ) from None
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as problem:
        where = f"byte {problem.start} (0x{content[problem.start]:02x}) of '{file}'"
        raise ValueError(
            f"data_dir must hold UTF-8, got {where}: {problem.reason}; convert it first"
        ) from None
    return content
