"""How often the signs of binary weights change, and how much they still are as at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from regrad.sharding import local, sum_over_shards
from torch import Tensor


class SignMeter:
    r"""Counts changes of signs over a run, of any optimizer.

    Of N weights, FF is the share of signs that a step changes, averaged over the steps so far.
    C2I is :math:`1 - 2 d/N`, d being the signs that differ from those at the start: 1 as at the
    start, 0 where the two have nothing to do with each other, -1 if all are turned.

    Args:
        weights: Binary weights, or latent ones; at their start. Plain or sharded; a weight of 0
            counts as positive.

    Example:
        >>> weight = torch.tensor([0.5, -0.5, 0.1, 0.1])
        >>> meter = SignMeter([weight])
        >>> _ = weight.mul_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
        >>> meter.look()
        >>> meter.metrics()
        {'signs/flips_per_step': 0.25, 'signs/likeness_to_start': 0.5}

    References:
        Liu, Shen, Li, Helwegen, Huang and Cheng, 2021, "How Do Adam and Training Strategies Help
        BNNs Optimization?" (FF and C2I). The normalisation of C2I is ours.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._start = self._signs()
        self._last = self._start
        self._size = sum(weight.numel() for weight in weights)
        self._flips = self._none()
        self._unlike = self._none()
        self._steps = 0

    def look(self) -> None:
        """Compare with the step before. Call it after every step, on every process."""
        now = self._signs()
        self._flips += self._differences(now, self._last)
        self._unlike = self._differences(now, self._start)
        self._last = now
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Return FF and C2I, by their names as metrics."""
        unlike = self._unlike.item() / self._size
        return {
            "signs/flips_per_step": self._flips.item() / self._size / max(1, self._steps),
            "signs/likeness_to_start": 1 - 2 * unlike,
        }

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint holds; the start follows from the seed."""
        return {"flips": int(self._flips.item()), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Call it when the weights are loaded, on every process."""
        self._last = self._signs()
        self._flips = self._none() + state["flips"]
        self._unlike = self._differences(self._last, self._start)
        self._steps = state["steps"]

    @torch.no_grad()
    def _signs(self) -> list[Tensor]:
        """Return for each weight which elements are not negative; of shards the local part."""
        return [local(weight) >= 0 for weight in self._weights]

    def _differences(self, now: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
        """Return how many signs differ, over all processes."""
        total = self._none()
        for weight, one, other in zip(self._weights, now, then, strict=True):
            total += sum_over_shards((one != other).sum(), weight)
        return total

    def _none(self) -> Tensor:
        """Return a count of zero, where the weights are."""
        return torch.zeros((), dtype=torch.int64, device=self._weights[0].device)
