"""Gradient rescaling: what several exits use receives the mean of their gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from regrad.errors import RegradError
from torch import Tensor

RESCALED = "regrad_boosted.rescaled"
Gradients = tuple[Tensor | None, ...]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def average_over_exits(outputs: Sequence[Tensor]) -> None:
    r"""Let the coming backward pass hand on means over exits in place of sums.

    Where k exits depend on an intermediate result and m ≥ k on an input of it, the gradient that
    goes from the one to the other is multiplied by k/m. So every tensor receives

    .. math:: \frac{1}{m} \sum_{n} \frac{\partial L_n}{\partial t}

    over the m exits that depend on it: the trunk before all exits the mean of their gradients, a
    head, on which one exit depends, its own. In terms of a chain of N stages (from 0), the gradient
    before exit i is multiplied by 1/(N − i) and the one that comes from the next stage by
    N − i − 1.

    It sets hooks on the graph behind `outputs`, which goes away with the graph. A second call on
    the same outputs changes nothing.

    Args:
        outputs: The logits of the exits. Those that need no gradient are left out.

    Raises:
        RegradError: If several outputs come from one node of the graph, as of a compiled
            model: which exits a tensor feeds cannot be seen there.

    Example:
        >>> trunk = torch.ones(1, requires_grad=True)
        >>> exits = [1 * trunk, 2 * trunk, 3 * trunk]
        >>> average_over_exits(exits)
        >>> sum(exits).backward()
        >>> trunk.grad  # the plain sum is 6
        tensor([2.])

    References:
        Li, Zhang, Qi, Yang and Huang, 2019, "Improved Techniques for Training Adaptive Deep
        Networks" (gradient equilibrium). Ours reads the graph, so that it needs no
        change of the model.
    """
    ends = [output.grad_fn for output in outputs if output.grad_fn is not None]
    if len(set(ends)) < len(ends):
        raise RegradError(
            "rescale must see which exits a tensor feeds, but several outputs come from one node "
            f"of the graph, {_name_of_shared(ends)}; compile the model's parts instead of the "
            "whole, return the exits as separate tensors, or use rescale=False"
        )
    exits_of = _count_exits(ends)
    for node, exits in exits_of.items():
        sources = [source for source, _ in node.next_functions]
        factors = [1.0 if source is None else exits / exits_of[source] for source in sources]
        if min(factors, default=1.0) < 1 and RESCALED not in node.metadata:
            node.metadata[RESCALED] = True
            node.register_hook(partial(_scaled, factors))


def _count_exits(ends: Sequence[Any]) -> Counter[Any]:
    """Return, of each node of the graph behind the exits, how many of them depend on it."""
    exits_of: Counter[Any] = Counter()
    for end in ends:
        seen = {end}
        waiting = [end]
        while waiting:
            for source, _ in waiting.pop().next_functions:
                if source is not None and source not in seen:
                    seen.add(source)
                    waiting.append(source)
        exits_of.update(seen)
    return exits_of


def _scaled(factors: Sequence[float], gradients: Gradients, _: Gradients) -> Gradients:
    """Return the gradients that a node hands on, each times its factor."""
    return tuple(
        gradient if gradient is None or factor == 1 else gradient * factor
        for gradient, factor in zip(gradients, factors, strict=True)
    )


def _name_of_shared(ends: Sequence[Any]) -> str:
    """Return the name of the node from which most outputs come."""
    (node, _), *_ = Counter(ends).most_common(1)
    return str(node.name())
