"""An engine that core and kit know nothing of: its processes average their gradients late."""

import torch
from regrad import hookimpl
from regrad.layouts import PlainLayout
from regrad.reading import EVERYTHING
from torch import Tensor, distributed, nn


class Late(nn.Module):
    """A model whose gradients wait on each process, in tensors that the optimizer reads."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the model returns."""
        return self.module(inputs)


class LateLayout(PlainLayout):
    """Hands out copies of the gradients that are averaged, and writes them back."""

    name = "late"
    offers = EVERYTHING - {"micro", "moments"}

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[Tensor, Tensor] = {}

    def why_not(self, need: str) -> str:
        """Return why something cannot be read here."""
        return "this engine shows it to nobody; use another"

    def gradients(self, step) -> None:
        """Put the average of all processes in the place of each gradient."""
        for parameter in step.parameters:
            if parameter.grad is not None:
                self._waiting[parameter] = parameter.grad
                parameter.grad = parameter.grad / distributed.get_world_size()
                distributed.all_reduce(parameter.grad)

    @torch.no_grad()
    def commit(self, step) -> None:
        """Write them where the optimizer reads them."""
        for parameter, waiting in self._waiting.items():
            waiting.copy_(parameter.grad)
            parameter.grad = waiting
        self._waiting.clear()


@hookimpl
def regrad_layout(model):
    """Return the layout of a model of this engine."""
    is_late = any(isinstance(module, Late) for module in model.modules())
    return LateLayout() if is_late else None
