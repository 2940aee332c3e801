"""Hooks that torch.compile and copies of a model leave alone, what is inside wrappers, and the forward record."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_leaves

WRAPPER = r"_orig_mod\.|_checkpoint_wrapped_module\."


class Hook:
    """A callable for one module; on copies and after unpickling it does nothing.

    Args:
        module: The module whose events count, None for none.
        function: Called with the event's arguments.
    """

    def __init__(self, module: nn.Module | None, function: Callable[..., Any] | None) -> None:
        self.module, self.function = module, function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        """Run the function if the event is the own module's."""
        return (
            self.function(module, *arguments) if self.function and module is self.module else None
        )

    def __reduce__(self) -> tuple[Any, ...]:  # copy and deepcopy use it too
        return type(self), (None, None)


def innermost_module(model: nn.Module) -> nn.Module:
    """Return the user's module inside data-parallel and compile wrappers."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    inner = model.module if wrapped else getattr(model, "_orig_mod", None)
    return innermost_module(inner) if isinstance(inner, nn.Module) else model


def innermost_optimizer(optimizer: Any) -> optim.Optimizer:
    """Return the torch optimizer inside wrappers that keep it as `.optimizer`.

    torch's `PostLocalSGDOptimizer`, which has no hooks of its own, keeps it as `.optim`.

    Raises:
        TypeError: If there is none.
    """
    while True:
        if hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        elif type(optimizer).__name__ == "PostLocalSGDOptimizer":
            optimizer = optimizer.optim
        else:
            break
    if not isinstance(optimizer, optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or wrap one, got {type(optimizer).__name__}"
        )
    return optimizer


def was_compiled_and_called(model: nn.Module) -> bool:
    """Say whether torch.compile has already traced `model`: hooks added now would never fire inside."""
    compiled = [
        m for m in model.modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None
    ]
    if not compiled:
        return False
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list  # noqa: PLC0415 - loads the compiler

    return any(
        _debug_get_cache_entry_list(type(innermost_module(m)).forward.__code__) for m in compiled
    )


def wrap_closure(args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[], None]) -> Any:
    """Return (args, kwargs) of `optimizer.step` with `then` called after its closure; None without a closure."""
    optimizer, closure, *rest = (*args, kwargs.get("closure")) if len(args) == 1 else args
    if not callable(closure):
        return None

    @functools.wraps(closure)
    def corrected_closure() -> Any:
        loss = closure()
        then()
        return loss

    return (optimizer, corrected_closure, *rest), {
        key: kwargs[key] for key in kwargs if key != "closure"
    }


@dataclass(frozen=True)
class Call:
    """One call of a submodule.

    Attributes:
        name: The module's name in the model.
        inputs: Shapes of the tensors that went in.
        outputs: Shapes of the tensors that came out.
        makes_output: Whether its output is the model's output, or that output's `logits`.
    """

    name: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    makes_output: bool


class ForwardRecord:
    """Records the first training forward after it is made, then takes its hooks away.

    Args:
        model: The innermost module. Gets a forward hook per submodule until then.

    Attributes:
        calls: One `Call` per finished submodule call, in that order; empty until the forward ran.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: tuple[Call, ...] = ()
        self._names = {module: name for name, module in model.named_modules()}
        self._seen: list[tuple[str, Any, list[Any]]] = []
        self.handles = [m.register_forward_hook(Hook(m, self._keep)) for m in self._names]
        self.handles.append(
            model.register_forward_pre_hook(Hook(model, lambda *_: self._seen.clear()))
        )

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._names[module]:
            self._seen.append(
                (self._names[module], _shapes(tree_leaves(inputs)), tree_leaves(output))
            )
            return
        if module.training:
            logits = (
                output.get("logits")
                if isinstance(output, Mapping)
                else getattr(output, "logits", None)
            )
            final = {*map(id, tree_leaves(output if logits is None else logits))}
            self.calls = tuple(
                Call(n, i, _shapes(o), bool(final & {*map(id, o)})) for n, i, o in self._seen
            )
            for handle in self.handles:
                handle.remove()
        self._seen.clear()  # keep no tensor alive


def _shapes(leaves: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))
