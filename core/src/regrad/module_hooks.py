"""Module hooks that torch.compile leaves alone, and that copies and pickles of a model do not hold."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

WRAPPER = r"_orig_mod\.|_checkpoint_wrapped_module\."

HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)
OPTION_TABLES = (
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
REDUCE = "__reduce_ex__"


class Handle(Protocol):
    """What removes a hook."""

    def remove(self) -> None:
        """Remove it; a second call does nothing."""


class Hook:
    """A callable for one module; on a copy of the module it does nothing.

    Copies and pickles hold no hook, see `ReduceWithoutHooks`. A module class that copies itself
    in its own way may take one along all the same: it is inert there.

    Args:
        module: The module whose events count, None for none.
        function: Called with the module and the event's arguments.
    """

    def __init__(self, module: nn.Module | None, function: Callable[..., Any] | None) -> None:
        self.module = module
        self.function = function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        """Run the function if the event is the own module's."""
        if self.function is None or module is not self.module:
            return None
        return self.function(module, *arguments)

    def __reduce__(self) -> tuple[Any, ...]:  # copy and deepcopy use it too
        return type(self), (None, None)


class ReduceWithoutHooks:
    """Stands in a hooked module as its `__reduce_ex__`: copies and pickles are made without our hooks.

    A hook that stayed in a copy could not be removed by detach, would pile up over the folds of
    a cross validation, would block `torch.export` of the copy, and would make a file of
    `torch.save(model)` unreadable where regrad is not installed.

    Args:
        module: The hooked module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, protocol: Any) -> Any:
        """Return what the module's own class returns, less our hooks."""
        reduced = type(self.module).__reduce_ex__(self.module, protocol)
        if not isinstance(reduced, tuple):
            return reduced
        return tuple(_without_hooks(part) for part in reduced)


def _without_hooks(part: Any) -> Any:
    """Return a part of what `__reduce_ex__` returned, with our hooks taken out of a module's state."""
    if isinstance(part, tuple):
        return tuple(_without_hooks(item) for item in part) if type(part) is tuple else part
    if not isinstance(part, dict) or HOOK_TABLES[0] not in part:
        return part
    state = {key: value for key, value in part.items() if key != REDUCE}
    ours = set[int]()
    for name in HOOK_TABLES:
        table = state.get(name, {})
        ours.update(key for key, hook in table.items() if _is_ours(hook))
    for name in (*HOOK_TABLES, *OPTION_TABLES):
        if name in state:
            kept = ((key, hook) for key, hook in state[name].items() if key not in ours)
            state[name] = OrderedDict(kept)
    return state


def _is_ours(hook: Any) -> bool:
    """Say whether a hook, or what torch wrapped around it, is a `Hook`."""
    return isinstance(hook, Hook) or isinstance(getattr(hook, "hook", None), Hook)


def _holds_ours(module: nn.Module) -> bool:
    """Say whether any hook of a module is ours."""
    return any(_is_ours(hook) for name in HOOK_TABLES for hook in vars(module)[name].values())


class ModuleHandle:
    """Removes one hook, and the module's `ReduceWithoutHooks` with its last one."""

    def __init__(self, module: nn.Module, handle: Handle) -> None:
        self._module = module
        self._handle = handle

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""
        self._handle.remove()
        if not _holds_ours(self._module):
            vars(self._module).pop(REDUCE, None)


def add_hook(
    module: nn.Module,
    register: Callable[..., Handle],
    function: Callable[..., Any],
    **options: Any,
) -> ModuleHandle:
    """Register `function(module, *event)` on one module, outside of its copies.

    Args:
        module: The module.
        register: Its method that registers, such as `module.register_forward_hook`.
        function: Called with the module and the event's arguments.
        **options: Passed on to `register`.

    Returns:
        The handle that removes it.
    """
    handle = register(Hook(module, function), **options)
    vars(module).setdefault(REDUCE, ReduceWithoutHooks(module))
    return ModuleHandle(module, handle)
