"""What tells whether two runs of a script started alike: first weights and first inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from regrad.samples import sample
from regrad.sharding import local
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree


@torch.no_grad()
def fingerprint(module: nn.Module, inputs: Any) -> str:
    """Return a text that is the same for the same weights and inputs.

    Args:
        module: The model, before its first training forward.
        inputs: Of that forward, by position. If all of them are given by name, only weights are
            compared.
    """
    found = hashlib.sha256()
    for tensor in _tensors(module, inputs):
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(_samples(tensor))
    return found.hexdigest()


def _tensors(module: nn.Module, inputs: Any) -> Iterator[Tensor]:
    for parameter in module.parameters():
        if not is_lazy(parameter):  # has no values yet
            yield local(parameter)
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            yield local(leaf)


def _samples(tensor: Tensor) -> bytes:
    """Return some values of a tensor, bit for bit."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return b""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return bytes(sample(tensor).cpu().contiguous().view(torch.uint8).tolist())
