"""What GC-W keeps of each tensor from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from regrad_gcw import functional

DECAYS = {"last": 0.0, "fast": 0.9, "slow": 0.98}
WINDOWS_JUDGED = 5
MODULE = ("query", "key", "scale")
SMALL = ("learned", "gains", *MODULE)


class Memory:
    """Slots, evidence and coefficients of one tensor.

    Args:
        tensors: "history" [S + 1, N]; "learned", "used" [S], coefficients; "gate" [2],
            whether the learned ones are used, whether any are; "window" [rows, S + 2,
            S + 2], Gram matrices, NaN where missing; "gains" [5 · rows, 2], of the prior
            and of the learned coefficients, first order; "query", "key", "scale" where attention predicts; "snapshot"
            [S + 1, N] and "sum" [N] where the target is hindsight.
        prior: S coefficients, as the optimizer's group had them last.
        seen: Gradients taken in.
        rows: Gradients that the window has seen.
    """

    def __init__(self, tensors: dict[str, Tensor], prior: Sequence[float], seen: int = 0, rows: int = 0) -> None:
        self.tensors, self.prior, self.seen, self.rows = tensors, prior, seen, rows

    @classmethod
    def begin(cls, gradient: Tensor, prior: Sequence[float], *, rows: int | None, attention: bool) -> Self:
        """Return an empty memory; the slots are 0, the coefficients the prior; `rows` None means hindsight."""
        size, members, a = len(prior) + 2, len(prior) + 1, torch.tensor(prior, dtype=torch.float64)
        tensors = {"learned": a, "used": a, "gate": torch.tensor([0.0, 1.0])}
        tensors["window"] = torch.full((rows or 1, size, size), torch.nan)
        tensors["gains"] = torch.full((WINDOWS_JUDGED * (rows or 1), 2), torch.nan)
        if attention:  # every tensor starts from the same numbers, so the order of their coming does not matter
            generator = torch.Generator().manual_seed(0)
            draws = torch.randn(functional.WIDTH, size + 2, generator=generator, dtype=torch.float64)
            tensors |= {"query": draws[:, 0], "key": draws[:, 1:] / (size + 1) ** 0.5, "scale": torch.zeros(())}
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        tensors = {key: tensor.to(gradient.device, dtype, copy=True) for key, tensor in tensors.items()}
        tensors["history"] = tensors["window"].new_zeros(members, gradient.numel())
        if rows is None:
            tensors["snapshot"] = torch.full_like(tensors["history"], torch.nan)
            tensors["sum"] = torch.zeros_like(tensors["history"][0])
        return cls(tensors, prior)

    def to_(self, device: torch.device) -> Self:
        """Move to where the gradient is, after a load."""
        self.tensors = {key: tensor.to(device) for key, tensor in self.tensors.items()}
        return self

    def witness(self, gradient: Tensor) -> None:
        """Note the gradient that came after the last step's slots; call before `take`."""
        kept, window = self.tensors, self.tensors["window"]
        if "sum" in kept:
            kept["sum"].add_(gradient.reshape(-1).nan_to_num(0.0, 0.0, 0.0))
        elif self.rows < len(window):
            window[self.rows].copy_(functional.gram(kept["history"], gradient))
        self.rows += 1

    def take(self, gradient: Tensor, decays: Sequence[float]) -> None:
        """Roll the slots; the gradient becomes the one that they are compared with."""
        functional.roll_(self.tensors["history"], gradient, decays=decays, seen=self.seen)
        self.seen += 1

    def close_window(self) -> Tensor:
        """Return the window's Gram matrices, and begin the next window."""
        kept, window = self.tensors, self.tensors["window"]
        if "sum" in kept:
            window[0].copy_(functional.gram(kept["snapshot"], kept["sum"] / self.rows))
            kept["snapshot"].copy_(kept["history"])
            kept["sum"].zero_()
        kept["window"], self.rows = torch.full_like(window, torch.nan), 0
        return window

    def state(self) -> dict[str, Any]:
        """Return copies of everything."""
        plain = {"prior": list(self.prior), "seen": self.seen, "rows": self.rows}
        return {key: tensor.clone() for key, tensor in self.tensors.items()} | plain

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the memory that `state` described."""
        tensors = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
        return cls(tensors, state["prior"], state["seen"], state["rows"])


def fit(memories: Sequence[Memory], *, predictor: str, gated: bool) -> None:
    """Learn from the window that ends: coefficients, then the gate, for all tensors together.

    The gate judges the coefficients that stood during a window, not those fitted to it.

    Args:
        memories: n of them, each with a gradient in its window. Overwritten.
        predictor: "prior", "slot" or "attention".
        gated: Whether the gate may switch to the prior, or off.
    """
    grams = _stack(memory.close_window() for memory in memories)
    products, cosines = functional.evidence(grams)
    new = {key: _stack(m.tensors[key] for m in memories) for key in memories[0].tensors if key in SMALL}
    prior = grams.new_tensor([memory.prior for memory in memories])
    judged = torch.stack([(products * a[:, None]).sum(dim=-1) for a in (prior, new["learned"])], dim=-1)
    new["gains"] = torch.cat([new["gains"][:, judged.shape[1] :], judged], dim=1)
    if predictor == "slot":
        new["learned"] = functional.fit_slot(new["learned"], cosines)
    elif predictor == "attention":
        known = cosines.isfinite().all(dim=-1)[..., None, None]
        features = functional.features(grams).where(known, torch.nan).nanmean(dim=1).nan_to_num(0.0)
        module = functional.fit_attention([new[key] for key in MODULE], features, cosines, prior)
        new |= dict(zip(MODULE, module, strict=True))
        new["learned"] = functional.attend(module, features, prior)
    else:
        new["learned"] = prior
    learned, on = functional.gate(new["gains"])
    if not gated:
        learned, on = torch.ones_like(learned), torch.ones_like(on)
    new["gate"] = torch.stack([learned & on, on], dim=-1)
    new["used"] = torch.where(learned[:, None], new["learned"], prior).where(on[:, None], 0.0)
    for key, values in new.items():
        for memory, value in zip(memories, values, strict=True):
            memory.tensors[key].copy_(value)


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    """Return n tensors as one [n, *], where the first one is."""
    first, *others = tensors
    return torch.stack([first, *(tensor.to(first) for tensor in others)])
