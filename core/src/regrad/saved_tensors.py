"""What autograd saves while one module runs, in the form that a correction gives it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from regrad.errors import RegradError
from regrad.module_hooks import Handle, add_hook

# Called with a tensor; or with the module, what went into it, and a tensor.
Pack = Callable[..., Any]
Unpack = Callable[[Any], Tensor]

CALLS_MODULES = "torch.nn.modules.module"
RUNS_COMPILED_CODE = "torch._functorch._aot_autograd"

COMPILED = (
    "module {name!r} runs in compiled code, which saves other tensors than the module; "
    "call attach() on a model that is not compiled, and do not compile it afterwards"
)
RUN_AGAIN = (
    "module {name!r} runs again in backward, as in activation checkpointing, where its tensors are "
    "not kept anyway; leave it out of the checkpoint, or leave the correction out"
)
OTHER_HOOKS = (
    "module {name!r} runs inside other hooks on saved tensors, as those of activation "
    "checkpointing and save_on_cpu, which would not see its tensors; leave it out of them, or "
    "leave the correction out"
)


@dataclass(frozen=True)
class Untouched:
    """A saved tensor that was not packed."""

    tensor: Tensor


class Forward:
    """One call of a module.

    Args:
        inputs: What the module is called with: positional arguments, then those by keyword.
        frame: Torch's frame that calls the module.

    Attributes:
        hooks: Torch's context while it is entered, or None.
    """

    def __init__(self, inputs: tuple[Any, ...], frame: FrameType | None) -> None:
        self.inputs = inputs
        self.hooks: saved_tensors_hooks | None = None
        self._frame = frame

    def is_over(self) -> bool:
        """Say whether the call has ended, without notice where Ctrl-C interrupted it."""
        # A list of frames would keep their tensors until the garbage collector comes.
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is None

    def runs_compiled_code(self) -> bool:
        """Say whether compiled code runs inside the call that is under way."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            if str(frame.f_globals.get("__name__")).startswith(RUNS_COMPILED_CODE):
                return True
            frame = frame.f_back
        return False


class SavedTensors:
    """Packs what autograd saves while one module runs, in training mode with gradients.

    A pre-hook enters torch's `saved_tensors_hooks`, a hook that is always called leaves them. Torch
    does not call it where something else than an `Exception` ends a forward, such as Ctrl-C. Hooks
    that stay for that reason change nothing, and the next forward removes them.

    Torch keeps the pack function as long as the graph, so what it is called with is kept here only
    while the module runs.

    Args:
        module: The module.
        name: Of the module, for messages.
        pack: Called with a tensor that autograd saves.
        unpack: Called in backward with what `pack` returned. Returns a tensor of the same shape,
            dtype and device.
        with_inputs: Whether `pack` is called with the module and what went into it before that.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        pack: Pack,
        unpack: Unpack,
        *,
        with_inputs: bool = False,
    ) -> None:
        self._module = module
        self._name = name
        self._pack_one = pack
        self._unpack_one = unpack
        self._with_inputs = with_inputs
        self._forwards: list[Forward] = []
        self._handles: list[Handle] = []

    def register(self) -> None:
        """Put the hooks on the module."""
        module = self._module
        before = module.register_forward_pre_hook
        after = module.register_forward_hook
        self._handles = [
            add_hook(module, before, self._enter, prepend=True, with_kwargs=True),
            add_hook(module, after, self._leave, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Remove the hooks; what was packed before can still be unpacked."""
        for handle in self._handles:
            handle.remove()
        _leave_interrupted()
        while self._forwards:
            self._leave()

    def _enter(
        self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Begin to pack, if this is a forward of training."""
        _leave_interrupted()
        while self._forwards and self._forwards[-1].is_over():
            self._forwards.pop()
        forward = Forward((*arguments, *options.values()), _frame_of_call())
        # Every forward is noted, so that each leaves its own.
        self._forwards.append(forward)
        if not module.training or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() != -1:
            raise RegradError(RUN_AGAIN.format(name=self._name))
        if _are_others_on_top():
            raise RegradError(OTHER_HOOKS.format(name=self._name))
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        forward.hooks = hooks

    def _leave(self, *_: Any) -> None:
        """Stop packing."""
        if not self._forwards:
            return
        hooks = self._forwards.pop().hooks
        if hooks is not None and _owner_of_top() is self:
            hooks.__exit__()

    def _pack(self, tensor: Tensor) -> Any:
        """Return what stands for a tensor until backward."""
        forward = self._forwards[-1] if self._forwards else None
        if forward is None or forward.is_over():
            return Untouched(tensor)
        if forward.runs_compiled_code():
            raise RegradError(COMPILED.format(name=self._name))
        if self._with_inputs:
            return self._pack_one(self._module, forward.inputs, tensor)
        return self._pack_one(tensor)

    def _unpack(self, packed: Any) -> Tensor:
        """Return a saved tensor again."""
        if isinstance(packed, Untouched):
            return packed.tensor
        return self._unpack_one(packed)

    def is_interrupted(self) -> bool:
        """Say whether the newest forward has ended without leaving."""
        return not self._forwards or self._forwards[-1].is_over()


def _frame_of_call() -> FrameType | None:
    """Return the frame of torch that calls the module whose hook runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != CALLS_MODULES:
        frame = frame.f_back
    return frame


def _pack_on_top() -> Any:
    """Return the pack function that torch would call now, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def _owner_of_top() -> SavedTensors | None:
    """Return whose hooks torch would call now, if they are of this file."""
    owner = getattr(_pack_on_top(), "__self__", None)
    return owner if isinstance(owner, SavedTensors) else None


def _are_others_on_top() -> bool:
    """Say whether torch would call hooks of somebody else now."""
    return _pack_on_top() is not None and _owner_of_top() is None


def _leave_interrupted() -> None:
    """Remove from the top of torch's hooks what interrupted forwards have left there."""
    while (owner := _owner_of_top()) is not None and owner.is_interrupted():
        torch._C._autograd._pop_saved_tensors_default_hooks()
        if owner._forwards:
            owner._forwards.pop()
