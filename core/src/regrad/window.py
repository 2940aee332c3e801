"""The window: the time between moving weights and restoring them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regrad.errors import refuse_if
from regrad.sharding import local, locals_of


class Window:
    """Moves weights and restores them bit for bit.

    The true weights are copied into buffers that are kept from step to step:
    allocating them anew costs several times the copy.

    Attributes:
        is_open: Whether the weights of this step were already asked for; true also
            when nothing had to be moved.
        moved: The parameters that are moved now.
    """

    def __init__(self) -> None:
        self.is_open, self.moved = False, list[Tensor]()
        self._buffers: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def open(
        self, parameters: Sequence[Tensor], displacements: Sequence[Tensor | None] | None
    ) -> bool:
        """Add a displacement to each parameter.

        Args:
            parameters: The live parameters. Overwritten until `close`.
            displacements: One per parameter, of its local shape, or None.

        Returns:
            Whether any parameter was moved.

        Raises:
            RegradError: If the number of displacements is not the number of parameters.
        """
        displacements = displacements or [None] * len(parameters)
        wanted, got = len(parameters), len(displacements)
        refuse_if(wanted != got, f"predict_weights must return {wanted} displacements, got {got}")
        moves = {
            p: local(d) for p, d in zip(parameters, displacements, strict=True) if d is not None
        }
        self.is_open, self.moved = True, list(moves)
        self._buffers = {p: self._buffer(p) for p in moves}
        if moves:
            torch._foreach_copy_(list(self._buffers.values()), locals_of(moves))
            torch._foreach_add_(locals_of(moves), list(moves.values()))
        return bool(moves)

    def _buffer(self, parameter: Tensor) -> Tensor:
        part, kept = local(parameter), self._buffers.get(parameter)
        fits = kept is not None and (kept.shape, kept.dtype, kept.device) == (
            part.shape,
            part.dtype,
            part.device,
        )
        return kept if kept is not None and fits else torch.empty_like(part)

    @torch.no_grad()
    def close(self) -> bool:
        """Restore every moved parameter; return whether there was any."""
        moved, self.moved, self.is_open = self.moved, [], False
        if moved:
            torch._foreach_copy_(locals_of(moved), [self._buffers[p] for p in moved])
        return bool(moved)

    def true_weights(self) -> dict[Tensor, Tensor]:
        """Return copies of the true weights by moved parameter: the buffers themselves are reused."""
        copies = {p: p.detach().clone() for p in self.moved}
        for parameter, copy in copies.items():
            local(copy).copy_(self._buffers[parameter])
        return copies
