"""What GC-W keeps of each tensor from step to step."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from regrad.sharding import local, sum_over_shards
from torch import Tensor

from regrad_gcw import functional

DECAYS = {"last": 0.0, "fast": 0.9, "slow": 0.98}
WINDOWS_JUDGED = 5
MODULE = ("query", "key", "scale")
LEARNED = ("learned", "gains", *MODULE)
LARGE = ("history", "snapshot", "sum")  # of the size of the tensor


class Memory:
    """Slots, evidence and coefficients of one tensor.

    Args:
        tensors: By name. "history" [S + 1, *]; "learned" and "used" [S], coefficients;
            "gate" [2], whether the learned ones are used, whether any are; "window"
            [rows, S + 2, S + 2], Gram matrices, NaN if missing; "gains" [5 · rows, 2],
            to first order, of the prior and of the learned coefficients; "query", "key",
            "scale" where attention predicts; "snapshot" [S + 1, *] and "sum" [1, *] where
            the target is hindsight. Of a shard, * is the shape of this process's part.
        prior: S coefficients, as the optimizer's group had them last.
        seen: Gradients taken in.
        rows: Gradients that the window has seen.

    Attributes:
        whole: Adds over the processes what each computed from its part of a shard.
    """

    def __init__(
        self, tensors: dict[str, Tensor], prior: Sequence[float], seen: int = 0, rows: int = 0
    ) -> None:
        self.tensors = tensors
        self.prior = prior
        self.seen = seen
        self.rows = rows
        self.whole: functional.Whole = lambda values: values

    @classmethod
    def begin(
        cls, gradient: Tensor, prior: Sequence[float], *, rows: int | None, attention: bool
    ) -> Self:
        """Return an empty memory.

        Args:
            gradient: Tells shape, device and dtype (float32 at least).
            prior: S coefficients, from which the learned ones start.
            rows: Gradients per window; None if the target is hindsight.
            attention: Whether attention predicts.
        """
        slots = len(prior)
        size = slots + 2
        height = rows or 1
        tensors = {
            "learned": torch.tensor(prior, dtype=torch.float64),
            "used": torch.tensor(prior, dtype=torch.float64),
            "gate": torch.tensor([0.0, 1.0]),
            "window": torch.full((height, size, size), torch.nan),
            "gains": torch.full((WINDOWS_JUDGED * height, 2), torch.nan),
        }
        if attention:
            tensors |= _new_module(slots)
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        tensors = {
            key: tensor.to(gradient.device, dtype, copy=True) for key, tensor in tensors.items()
        }
        tensors["history"] = tensors["window"].new_zeros(slots + 1, *gradient.shape)
        if rows is None:
            tensors["snapshot"] = torch.full_like(tensors["history"], torch.nan)
            tensors["sum"] = torch.zeros_like(tensors["history"][:1])
        return cls(tensors, prior)

    def of_(self, parameter: Tensor) -> Self:
        """Move to where the parameter is, after a load, and note how it is cut into shards."""
        device = local(parameter).device
        self.tensors = {key: tensor.to(device) for key, tensor in self.tensors.items()}
        self.whole = partial(sum_over_shards, tensor=parameter)
        return self

    def witness(self, gradient: Tensor) -> None:
        """Note the gradient that came after the last step's slots; call before `take`."""
        window = self.tensors["window"]
        if "sum" in self.tensors:
            self.tensors["sum"].add_(gradient.nan_to_num(0.0, 0.0, 0.0))
        elif self.rows < len(window):
            gram = functional.gram(self.tensors["history"], gradient)
            window[self.rows].copy_(self.whole(gram))
        self.rows += 1

    def take(self, gradient: Tensor, decays: Sequence[float]) -> None:
        """Roll the slots; the gradient becomes the one that they are compared with."""
        functional.roll_(self.tensors["history"], gradient, decays=decays, seen=self.seen)
        self.seen += 1

    def close_window(self) -> Tensor:
        """Return the window's Gram matrices, and begin the next window."""
        kept = self.tensors
        window = kept["window"]
        if "sum" in kept:
            gram = functional.gram(kept["snapshot"], kept["sum"] / self.rows)
            window[0].copy_(self.whole(gram))
            kept["snapshot"].copy_(kept["history"])
            kept["sum"].zero_()
        kept["window"] = torch.full_like(window, torch.nan)
        self.rows = 0
        return window

    def state(self) -> dict[str, Any]:
        """Return copies of everything.

        Of a shard, what is large is this process's part, in a dict by row; what is in the
        list "learning" is not a shard.
        """
        large = {key: self.tensors[key].clone() for key in LARGE if key in self.tensors}
        small = {key: tensor.clone() for key, tensor in self.tensors.items() if key not in LARGE}
        return {
            **{key: dict(enumerate(tensor)) for key, tensor in large.items()},
            "learning": [small],
            "prior": list(self.prior),
            "seen": self.seen,
            "rows": self.rows,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the memory that `state` described."""
        tensors = {key: torch.stack([*state[key].values()]) for key in LARGE if key in state}
        small = {key: tensor.clone() for key, tensor in state["learning"][0].items()}
        return cls(tensors | small, state["prior"], state["seen"], state["rows"])


def _new_module(slots: int) -> dict[str, Tensor]:
    """Return the attention's first weights, the same for every tensor whenever it comes."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(functional.WIDTH, slots + 4, generator=generator, dtype=torch.float64)
    return {
        "query": draws[:, 0],
        "key": draws[:, 1:] / (slots + 3) ** 0.5,
        "scale": torch.zeros(()),
    }


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
    prior = grams.new_tensor([memory.prior for memory in memories])
    new = {
        key: _stack(memory.tensors[key] for memory in memories)
        for key in LEARNED
        if key in memories[0].tensors
    }
    gains = [(products * a[:, None]).sum(dim=-1) for a in (prior, new["learned"])]
    judged = torch.stack(gains, dim=-1)
    new["gains"] = torch.cat([new["gains"][:, judged.shape[1] :], judged], dim=1)
    if predictor == "slot":
        new["learned"] = functional.fit_slot(new["learned"], cosines)
    elif predictor == "attention":
        module = [new[key] for key in MODULE]
        module, new["learned"] = _fit_attention(module, grams, cosines, prior)
        new |= dict(zip(MODULE, module, strict=True))
    else:
        new["learned"] = prior
    uses_learned, is_on = functional.gate(new["gains"])
    if not gated:
        uses_learned = torch.ones_like(uses_learned)
        is_on = torch.ones_like(is_on)
    new["gate"] = torch.stack([uses_learned & is_on, is_on], dim=-1)
    chosen = torch.where(uses_learned[:, None], new["learned"], prior)
    new["used"] = chosen.where(is_on[:, None], 0.0)
    for key, values in new.items():
        for memory, value in zip(memories, values, strict=True):
            memory.tensors[key].copy_(value)


def _fit_attention(
    module: Sequence[Tensor], grams: Tensor, cosines: Tensor, prior: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return the fitted q, W and γ, and the coefficients that they predict."""
    known = cosines.isfinite().all(dim=-1)[..., None, None]
    features = functional.features(grams).where(known, torch.nan).nanmean(dim=1).nan_to_num(0.0)
    fitted = functional.fit_attention(module, features, cosines, prior)
    return fitted, functional.attend(fitted, features, prior)


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    """Return n tensors as one [n, *], on the device of the first one."""
    first, *others = tensors
    return torch.stack([first, *(tensor.to(first) for tensor in others)])
