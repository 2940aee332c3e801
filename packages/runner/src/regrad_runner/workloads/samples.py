"""Sets of samples, and loaders whose batches do not depend on what is trained on them."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = tuple[Tensor, Tensor]
Sample = TypeVar("Sample")


class Samples(Dataset[Batch]):
    """The samples of one split, made when a batch is requested.

    A subclass implements `__len__` and `__getitems__`. What is random in a sample must be a
    function of (`seed`, `epoch`, index of the sample) alone: not of the batch it is in, the
    process, the order, or anything drawn before; see `hashed_integers`. No global random number is
    drawn. So batch k is the same in every arm of a comparison.

    Args:
        seed: Of what is random in a sample, at least 0.

    Attributes:
        kind: What samples are called in sentences, in the plural.
        evaluation_batch: Samples that go through a model at once where no gradient is taken, at
            least 1.
        work: How much of it a sample is, counted in the pixels of an image: what CPU threads are
            chosen by.
    """

    kind: ClassVar[str] = "samples"
    evaluation_batch: int = 512
    work: int = 1

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} must implement __len__")

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return inputs [B, *] and targets [B, *] of these samples, made in one go."""
        raise TypeError(f"{type(self).__name__} must implement __getitems__")

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random changes are drawn, from 0."""
        self.epoch = epoch

    def with_seed(self, seed: int) -> Self:
        """Return a view of the same samples with a seed and an epoch of its own."""
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed!r}")
        view = copy.copy(self)
        view.seed = seed
        view.epoch = 0
        return view

    def batches(
        self, size: int = 512, *, indices: Sequence[int] | None = None, workers: int = 0
    ) -> Iterator[Batch]:
        """Yield samples in order, at most `size` at a time: for evaluation.

        Args:
            size: Samples at once, at least 1.
            indices: Which samples; None for each of them once.
            workers: Processes that make the batches; 0 for this one alone.
        """
        chosen = list(range(len(self)) if indices is None else indices)
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        generator = torch.Generator()  # an iteration draws one number; without this, a global one
        yield from DataLoader(
            self,
            batch_sampler=parts,
            collate_fn=_identity,
            num_workers=workers,
            worker_init_fn=_ignore_termination,
            generator=generator,
        )


class TensorSamples(Samples):
    """Samples in memory, always the same.

    Args:
        inputs: Shape [N, *].
        targets: Shape [N, *].

    Raises:
        ValueError: If there is not one target for each input.

    Example:
        >>> samples = TensorSamples(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]]))
        >>> len(samples), samples[1]
        (2, (tensor([2.]), tensor([4.])))
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"targets must be as many as inputs ({len(inputs)}), got {len(targets)}"
            )
        super().__init__()
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return inputs and targets of these samples."""
        chosen = torch.as_tensor(indices)
        return self.inputs[chosen], self.targets[chosen]


class EpochSampler(Sampler[int]):
    """All samples of a set in an order that is a function of (seed, epoch) alone.

    Args:
        samples: The set; `set_epoch` reaches it too, so that order and random changes move
            together.
        seed: Of the order, at least 0.
    """

    def __init__(self, samples: Samples, *, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order comes next."""
        self.epoch = epoch
        self.samples.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        yield from generator.permutation(len(self.samples)).tolist()

    def __len__(self) -> int:
        return len(self.samples)


class TrainingLoader(DataLoader[Batch]):
    """A loader over an `EpochSampler`, with the `set_epoch` that accelerate's loaders have."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose batches the next iteration yields."""
        sampler = self.sampler
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(epoch)


def training_loader(
    samples: Samples, *, batch_size: int, seed: int, drop_last: bool = True, workers: int = 0
) -> TrainingLoader:
    """Return a loader whose k-th batch is a function of (seed, epoch, k) alone.

    So batch k is the same in every arm of a comparison, however many random numbers an arm draws;
    on any number of processes
    (`accelerate.Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))` splits
    this very batch); and after `accelerate.skip_first_batches`. Call `set_epoch(epoch)` on the
    loader, or on what `Accelerator.prepare` made of it, before each epoch and before skipping.

    Args:
        samples: The training set; the loader works on its own view of it, changed with `seed`.
        batch_size: Samples per optimizer step over all processes, from 1 to the size of the set.
        seed: Of the order and what is random in a sample, at least 0.
        drop_last: Whether samples that do not fill a batch are left out of the epoch.
        workers: Processes that make the batches; 0 for this one alone. The batches are the same.

    Returns:
        A loader of (inputs [B, *], targets [B, *]).

    Raises:
        ValueError: If the batch size or seed is out of its range.
    """
    if not 1 <= batch_size <= len(samples):
        raise ValueError(
            f"batch_size must be from 1 to {len(samples)} (the training {samples.kind}), "
            f"got {batch_size!r}"
        )
    view = samples.with_seed(seed)
    return TrainingLoader(
        view,
        batch_size=batch_size,
        sampler=EpochSampler(view, seed=seed),
        drop_last=drop_last,
        collate_fn=_identity,
        num_workers=workers,
        worker_init_fn=_ignore_termination,
        generator=torch.Generator(),  # each iteration draws one number; without this, a global one
    )


def _identity(batch: Sample) -> Sample:
    """Return what `__getitems__` made: it is a batch already."""
    return batch


def _ignore_termination(worker: int) -> None:
    """Let a process that makes batches ignore SIGTERM, which a launcher sends to all processes.

    The process that trains ends after its step, and this one with it. If this one ended at once,
    that step would fail, and no checkpoint would be saved.

    Args:
        worker: Its number.
    """
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def hashed_integers(
    high: int, *, seed: int, epoch: int, indices: npt.NDArray[np.int64], draw: int
) -> Tensor:
    """Return one integer in [0, high) per index, int64: a hash of (seed, epoch, draw, index).

    References:
        Steele, Lea and Flood, 2014, "Fast Splittable Pseudorandom Number Generators", figure 17
        (SplitMix64).
    """
    key = np.random.SeedSequence((seed, epoch, draw)).generate_state(1, np.uint64)
    bits = key + indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    # The upper 32 bits as a fraction of 2^32: the bias is below high / 2^32.
    upper = bits >> np.uint64(32)
    integers = (upper * np.uint64(high)) >> np.uint64(32)
    return torch.from_numpy(integers.astype(np.int64))
