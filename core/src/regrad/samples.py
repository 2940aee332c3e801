"""Notices when somebody else writes into tensors, without reading all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regrad.sharding import is_sharded, local

SAMPLES = 64


class Samples:
    """Tells whether tensors are unchanged.

    Torch counts the writes into a tensor in `Tensor._version`. Writes through `.data` are not
    counted, so that a few elements of each tensor are kept as well and compared: all of a small
    tensor, evenly spread ones of a large tensor. A write through `.data` that changes none of these
    elements goes unnoticed.

    Args:
        tensors: What to watch, plain or DTensor. May be empty.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._is_plain = not any(is_sharded(tensor) for tensor in self.tensors)
        self._versions = self._count_writes()
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            part = local(tensor)
            groups.setdefault((part.device, part.dtype), []).append(tensor)
        self._groups = [_Group(members) for members in groups.values()]

    def _count_writes(self) -> list[int]:
        if self._is_plain:
            return [tensor._version for tensor in self.tensors]
        return [local(tensor)._version for tensor in self.tensors]

    def is_in_place(self) -> bool:
        """Say whether every tensor has the memory that it had."""
        return all(group.is_in_place() for group in self._groups)

    def take(self) -> None:
        """Watch for changes from now on; only where every tensor is in place."""
        self._versions = self._count_writes()
        for group in self._groups:
            group.take()

    def rewritten(self) -> list[Tensor]:
        """Return the tensors that are known to hold other values. Reads nothing on a device."""
        counts = zip(self.tensors, self._count_writes(), self._versions, strict=True)
        changed = {tensor for tensor, now, then in counts if now != then}
        for group in self._groups:
            if group.is_on_host:
                changed.update(group.changed_on_host())
        if not changed:
            return []
        return [tensor for tensor in self.tensors if tensor in changed]

    def flags(self) -> dict[Tensor, Tensor]:
        """Return, for tensors on a device, a boolean scalar there: whether the samples differ."""
        flags: dict[Tensor, Tensor] = {}
        for group in self._groups:
            if not group.is_on_host:
                flags |= group.flags()
        return flags


class _Group:
    """Samples of tensors of one device and type, compared together.

    Args:
        tensors: At least one.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._is_plain = not any(is_sharded(tensor) for tensor in self._tensors)
        first = local(self._tensors[0])
        self.is_on_host = first.device.type == "cpu"
        self._views = [sample(local(tensor)) for tensor in self._tensors]
        self._lengths = [view.numel() for view in self._views]
        self._places = self._current_places()
        self._kept = torch.cat(self._views)
        # Of which tensor each element is; made where it is needed.
        self._owners: Tensor | None = None

    def _current_places(self) -> list[int]:
        if self._is_plain:
            return [tensor.data_ptr() for tensor in self._tensors]
        return [local(tensor).data_ptr() for tensor in self._tensors]

    def is_in_place(self) -> bool:
        """Say whether every tensor has the memory that it had."""
        return self._current_places() == self._places

    def take(self) -> None:
        """Keep the values of now."""
        self._kept = torch.cat(self._views)

    def _differs(self) -> Tensor:
        """Return which of all sampled elements differ, shape [sum of the lengths]."""
        now = self._now()
        both_nan = now.isnan() & self._kept.isnan()
        return (now != self._kept) & ~both_nan

    def _now(self) -> Tensor:
        """Return the samples as they are now."""
        if self.is_in_place():
            return torch.cat(self._views)
        return torch.cat(
            [self._current(index, tensor) for index, tensor in enumerate(self._tensors)]
        )

    def _current(self, index: int, tensor: Tensor) -> Tensor:
        """Return the sample of a tensor whose memory may be another now."""
        view = sample(local(tensor))
        if view.numel() != self._lengths[index]:
            return torch.full_like(self._views[index], torch.nan)
        # A tensor that was converted or moved, as by model.to(), still has the values.
        kept = torch.split(self._kept, self._lengths)[index]
        is_same = (kept.to(view.device, view.dtype) == view).to(kept.device)
        return torch.where(is_same, kept, view.to(kept.device, kept.dtype))

    def changed_on_host(self) -> list[Tensor]:
        """Return the tensors whose samples differ."""
        if torch.equal(self._now(), self._kept):
            return []
        differs = self._differs()
        parts = torch.split(differs, self._lengths)
        pairs = zip(self._tensors, parts, strict=True)
        return [tensor for tensor, part in pairs if part.any()]

    def flags(self) -> dict[Tensor, Tensor]:
        """Return by tensor a boolean scalar: whether its samples differ."""
        differs = self._differs().to(torch.float32)
        if self._owners is None:
            self._owners = torch.repeat_interleave(
                torch.arange(len(self._lengths)), torch.tensor(self._lengths)
            ).to(differs.device, non_blocking=True)
        counts = torch.zeros(len(self._lengths), device=differs.device)
        counts.index_add_(0, self._owners.to(differs.device), differs)
        return dict(zip(self._tensors, (counts > 0).unbind(), strict=True))


def sample(part: Tensor) -> Tensor:
    """Return a view of at most `SAMPLES` elements of a tensor, shape [n]."""
    part = part.detach()
    order = sorted(range(part.dim()), key=part.stride, reverse=True)
    dense = part.permute(order)
    if not dense.is_contiguous():
        return part[(slice(1),) * (part.dim() - 1)].reshape(-1)[:SAMPLES]
    flat = dense.view(-1)
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step][:SAMPLES]
