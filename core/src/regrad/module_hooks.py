"""Module hooks that torch.compile ignores and that copies of a model do not hold."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn

WRAPPER = r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\."

HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
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
    in its own way may still copy one: it is inert there.

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

    # Copy and deepcopy use it too.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, None)


class ReduceWithoutHooks:
    """Stands in a hooked module as its `__reduce_ex__`, to make copies without our hooks.

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
    """Return a part of what `__reduce_ex__` returned, with our hooks taken out of it."""
    if type(part) is tuple:
        return tuple(_without_hooks(item) for item in part)
    if isinstance(part, dict) and HOOK_TABLES[0] in part:
        return _state_without_hooks(part)
    return part


def _state_without_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a module without our hooks and without their options."""
    ours: set[int] = set()
    for name in HOOK_TABLES:
        ours.update(key for key, hook in state.get(name, {}).items() if _is_ours(hook))
    cleaned = {key: value for key, value in state.items() if key != REDUCE}
    for name in (*HOOK_TABLES, *OPTION_TABLES):
        if name in state:
            kept = ((key, hook) for key, hook in state[name].items() if key not in ours)
            cleaned[name] = OrderedDict(kept)
    return cleaned


def _is_ours(hook: Any) -> bool:
    """Say whether a hook, or what torch wrapped around it, is a `Hook`."""
    return isinstance(hook, Hook) or isinstance(getattr(hook, "hook", None), Hook)


def _holds_ours(module: nn.Module) -> bool:
    """Say whether any hook of a module is ours."""
    hooks = chain.from_iterable(vars(module)[name].values() for name in HOOK_TABLES)
    return any(_is_ours(hook) for hook in hooks)


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


def first_before_state_dict(module: nn.Module) -> Callable[..., Any]:
    """Return what registers a hook that runs before all others before a module's `state_dict()`."""

    def register(hook: Callable[..., Any]) -> Any:
        handle = module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
        hooks: Any = module._state_dict_pre_hooks
        hooks.move_to_end(handle.id, last=False)  # torch has no option for it
        return handle

    return register


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
