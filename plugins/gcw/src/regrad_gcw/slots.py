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
SMALL, LARGE = ("learned", "gains", *MODULE), ("history", "snapshot", "sum")


class Memory:
    """Slots, evidence and coefficients of one tensor.

    Args:
        tensors: "history" [S + 1, *]; "learned", "used" [S], coefficients; "gate" [2],
            whether the learned ones are used, whether any are; "window" [rows, S + 2,
            S + 2], Gram matrices, NaN where missing; "gains" [5 · rows, 2], of the prior
            and of the learned coefficients, first order; "query", "key", "scale" where attention predicts; "snapshot"
            [S + 1, *] and "sum" [1, *] where the target is hindsight. Of a shard, * is the shape of this
            process's part.
        prior: S coefficients, as the optimizer's group had them last.
        seen: Gradients taken in.
        rows: Gradients that the window has seen.

    Attributes:
        whole: Adds over the processes what each computed from its part of a shard.
    """

    def __init__(
        self, tensors: dict[str, Tensor], prior: Sequence[float], seen: int = 0, rows: int = 0
    ) -> None:
        self.tensors, self.prior, self.seen, self.rows = tensors, prior, seen, rows
        self.whole: functional.Whole = lambda values: values

    @classmethod
    def begin(
        cls, gradient: Tensor, prior: Sequence[float], *, rows: int | None, attention: bool
    ) -> Self:
        """Return an empty memory; the slots are 0, the coefficients the prior; `rows` None means hindsight."""
        size, members, a = len(prior) + 2, len(prior) + 1, torch.tensor(prior, dtype=torch.float64)
        tensors = {"learned": a, "used": a, "gate": torch.tensor([0.0, 1.0])}
        tensors["window"] = torch.full((rows or 1, size, size), torch.nan)
        tensors["gains"] = torch.full((WINDOWS_JUDGED * (rows or 1), 2), torch.nan)
        if attention:  # every tensor starts from the same numbers, so the order of their coming does not matter
            generator = torch.Generator().manual_seed(0)
            draws = torch.randn(
                functional.WIDTH, size + 2, generator=generator, dtype=torch.float64
            )
            tensors |= {
                "query": draws[:, 0],
                "key": draws[:, 1:] / (size + 1) ** 0.5,
                "scale": torch.zeros(()),
            }
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        tensors = {
            key: tensor.to(gradient.device, dtype, copy=True) for key, tensor in tensors.items()
        }
        tensors["history"] = tensors["window"].new_zeros(members, *gradient.shape)
        if rows is None:
            tensors["snapshot"] = torch.full_like(tensors["history"], torch.nan)
            tensors["sum"] = torch.zeros_like(tensors["history"][:1])
        return cls(tensors, prior)

    def of_(self, parameter: Tensor) -> Self:
        """Move to where the parameter is, after a load, and remember how it is cut into shards."""
        self.tensors = {
            key: tensor.to(local(parameter).device) for key, tensor in self.tensors.items()
        }
        self.whole = partial(sum_over_shards, tensor=parameter)
        return self

    def witness(self, gradient: Tensor) -> None:
        """Note the gradient that came after the last step's slots; call before `take`."""
        kept, window = self.tensors, self.tensors["window"]
        if "sum" in kept:
            kept["sum"].add_(gradient.nan_to_num(0.0, 0.0, 0.0))
        elif self.rows < len(window):
            window[self.rows].copy_(self.whole(functional.gram(kept["history"], gradient)))
        self.rows += 1

    def take(self, gradient: Tensor, decays: Sequence[float]) -> None:
        """Roll the slots; the gradient becomes the one that they are compared with."""
        functional.roll_(self.tensors["history"], gradient, decays=decays, seen=self.seen)
        self.seen += 1

    def close_window(self) -> Tensor:
        """Return the window's Gram matrices, and begin the next window."""
        kept, window = self.tensors, self.tensors["window"]
        if "sum" in kept:
            window[0].copy_(self.whole(functional.gram(kept["snapshot"], kept["sum"] / self.rows)))
            kept["snapshot"].copy_(kept["history"])
            kept["sum"].zero_()
        kept["window"], self.rows = torch.full_like(window, torch.nan), 0
        return window

    def state(self) -> dict[str, Any]:
        """Return copies of everything: of shards, row by row, this process's parts; what is in a list is no shard."""
        rows = {
            key: dict(enumerate(self.tensors[key].clone())) for key in LARGE if key in self.tensors
        }
        small = {key: tensor.clone() for key, tensor in self.tensors.items() if key not in LARGE}
        return {
            **rows,
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
    new = {
        key: _stack(m.tensors[key] for m in memories) for key in memories[0].tensors if key in SMALL
    }
    prior = grams.new_tensor([memory.prior for memory in memories])
    judged = torch.stack(
        [(products * a[:, None]).sum(dim=-1) for a in (prior, new["learned"])], dim=-1
    )
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
    learned, on = (answer | (not gated) for answer in functional.gate(new["gains"]))
    new["gate"] = torch.stack([learned & on, on], dim=-1)
    new["used"] = torch.where(learned[:, None], new["learned"], prior).where(on[:, None], 0.0)
    for key, values in new.items():
        for memory, value in zip(memories, values, strict=True):
            memory.tensors[key].copy_(value)


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    """Return n tensors as one [n, *], where the first one is."""
    first, *others = tensors
    return torch.stack([first, *(tensor.to(first) for tensor in others)])
