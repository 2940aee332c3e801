"""How much memory an object holds on to in tensors."""

from __future__ import annotations

import gc
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from regrad import Attachment

# What leads from an object to the whole program.
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
    model, optimizer = besides.model, besides.optimizer
    owned: list[Any] = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in model.parameters()),
    ]
    owned += chain.from_iterable(state.values() for state in optimizer.state.values())
    theirs = {_storage(tensor) for tensor in owned if isinstance(tensor, Tensor)}
    seen = {
        id(thing)
        for thing in (besides, besides.engine, optimizer, optimizer.state, *model.modules())
    }
    waiting, found = [root], dict[int, int]()
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, ELSEWHERE):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[_storage(thing)] = thing.untyped_storage().nbytes()
        else:
            waiting += gc.get_referents(thing)
    return sum(size for storage, size in found.items() if storage not in theirs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
