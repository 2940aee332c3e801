"""How much memory an object holds on to in tensors."""

from __future__ import annotations

import gc
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from regrad import Attachment

# These lead from an object to the whole program, so they are not followed.
ELSEWHERE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def bytes_held(root: Any, *, besides: Attachment) -> int:
    """Return the bytes of all tensors that can be reached from an object, each storage once.

    Args:
        root: Such as a correction: dictionaries, dataclasses, modules and optimizers of its own are
            followed.
        besides: An attachment. What belongs to its model and optimizer is not counted.

    Example:
        >>> import regrad, torch
        >>> model = torch.nn.Linear(2, 3)
        >>> attachment = regrad.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [])
        >>> bytes_held({"own": torch.zeros(5), "theirs": [model.weight]}, besides=attachment)
        20
    """
    model = besides.model
    optimizer = besides.optimizer
    not_followed = [besides, besides.engine, optimizer, optimizer.state, *model.modules()]
    seen = {id(thing) for thing in not_followed}
    sizes: dict[int, int] = {}  # of the storages, in bytes
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, ELSEWHERE):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            sizes[_storage(thing)] = thing.untyped_storage().nbytes()
        else:
            waiting += gc.get_referents(thing)
    theirs = {_storage(tensor) for tensor in _tensors_of(besides)}
    return sum(size for storage, size in sizes.items() if storage not in theirs)


def _tensors_of(attachment: Attachment) -> list[Tensor]:
    """Return weights, buffers, gradients and the optimizer's state."""
    tensors: list[Any] = [*attachment.model.buffers()]
    for parameter in attachment.model.parameters():
        tensors += [parameter, parameter.grad]
    for state in attachment.optimizer.state.values():
        tensors += state.values()
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def _storage(tensor: Tensor) -> int:
    """Return what tells the storage of a tensor from others."""
    return tensor.untyped_storage().data_ptr()
