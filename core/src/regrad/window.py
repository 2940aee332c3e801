"""The window: the time between moving weights and restoring them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regrad.errors import RegradError
from regrad.samples import Samples
from regrad.sharding import local, locals_of


class Window:
    """Moves weights and restores them bit for bit, but for those that were written meanwhile.

    The true weights are copied into buffers that are kept from step to step:
    allocating them anew costs several times the copy.

    Attributes:
        is_open: Whether the weights of this step were already asked for; true also
            when nothing had to be moved.
        moved: The parameters that are moved now.
        overwritten: Those that held other values than the window's at its last closing.
        overwritten_on_device: How many more there were so far whose values only their device
            knows; a scalar there, or None.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.moved: list[Tensor] = []
        self.overwritten: list[Tensor] = []
        self.overwritten_on_device: Tensor | None = None
        self._buffers: dict[Tensor, Tensor] = {}
        self._samples = Samples([])

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
        if len(displacements) != len(parameters):
            raise RegradError(
                f"predict_weights must return {len(parameters)} displacements, "
                f"got {len(displacements)}"
            )
        pairs = zip(parameters, displacements, strict=True)
        moves = {parameter: local(move) for parameter, move in pairs if move is not None}
        self.is_open = True
        if not moves:
            self._buffers = {}
            return False
        self._buffers = {parameter: self._buffer(parameter) for parameter in moves}
        live = locals_of(moves)
        torch._foreach_copy_(list(self._buffers.values()), live)
        torch._foreach_add_(live, list(moves.values()))
        self.moved = list(moves)
        self._watch()
        return True

    def _watch(self) -> None:
        """Note what was written, to know later whether it is still there."""
        watched = self._samples.tensors
        is_same = [id(tensor) for tensor in watched] == [id(parameter) for parameter in self.moved]
        if is_same and self._samples.is_in_place():
            self._samples.take()
        else:
            self._samples = Samples(self.moved)

    def _buffer(self, parameter: Tensor) -> Tensor:
        """Return a tensor for the true weights of a parameter, kept from step to step."""
        part = local(parameter)
        kept = self._buffers.get(parameter)
        if kept is None:
            return torch.empty_like(part)
        is_alike = (kept.shape, kept.dtype, kept.device) == (part.shape, part.dtype, part.device)
        return kept if is_alike else torch.empty_like(part)

    def rewritten(self) -> list[Tensor]:
        """Return the moved parameters that somebody else wrote. Reads nothing on a device."""
        return self._samples.rewritten() if self.moved else []

    @torch.no_grad()
    def close(self) -> bool:
        """Restore the moved parameters that nobody else wrote.

        Returns:
            Whether any parameter was moved.
        """
        if not self.moved:
            self.is_open = False
            return False
        self.overwritten = self.rewritten()
        flags = self._samples.flags()
        newer = set(self.overwritten)
        unwritten = [parameter for parameter in self.moved if parameter not in newer]
        self.moved = []
        self.is_open = False
        known = [parameter for parameter in unwritten if parameter not in flags]
        if known:
            true = [self._buffers[parameter] for parameter in known]
            torch._foreach_copy_(locals_of(known), true)
        unknown = [parameter for parameter in unwritten if parameter in flags]
        self._restore_on_device({parameter: flags[parameter] for parameter in unknown})
        return True

    def _restore_on_device(self, flags: dict[Tensor, Tensor]) -> None:
        """Restore the parameters whose flag is not set, without waiting for the device."""
        for parameter, is_newer in flags.items():
            live = local(parameter)
            torch.where(is_newer, live, self._buffers[parameter].to(live), out=live)
        if flags:
            self._count_on_device(list(flags.values()))

    def _count_on_device(self, flags: list[Tensor]) -> None:
        """Add the flags that are set to the count of all so far."""
        count = torch.stack([flag.to(torch.float32) for flag in flags]).sum()
        if self.overwritten_on_device is not None:
            count += self.overwritten_on_device.to(count)
        self.overwritten_on_device = count

    def true_weights(self) -> dict[Tensor, Tensor]:
        """Return copies of the true weights, by moved parameter.

        They are copies because the buffers are used again.
        """
        if not self.moved:
            return {}
        newer = set(self.rewritten())
        flags = self._samples.flags()
        copies: dict[Tensor, Tensor] = {}
        for parameter in self.moved:
            if parameter in newer:
                continue
            copy = parameter.detach().clone()
            part = local(copy)
            true = self._buffers[parameter].to(part)
            if parameter in flags:
                true = torch.where(flags[parameter], part, true)
            part.copy_(true)
            copies[parameter] = copy
        return copies
