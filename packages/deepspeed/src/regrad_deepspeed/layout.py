"""The layout of DeepSpeed's ZeRO, which attach asks for through the group `regrad.layouts`."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from regrad import RegradError, hookimpl
from regrad.hooks import WRAPPER
from regrad.hookspecs import Step
from regrad.layouts import PlainLayout
from regrad.reading import EVERYTHING, Reading
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_deepspeed.stages import Stage
from regrad_deepspeed.stand_ins import StandIns
from regrad_deepspeed.support import refuse_other_optimizers, refuse_unproved, stage_of

KEPT_AS = "_regrad_layout"
LATER = (
    "attach must come after deepspeed.initialize, which replaces what an optimizer steps; pass the "
    "engine and its optimizer: attach(engine, engine.optimizer, …)"
)
MICRO = "ZeRO reduces the gradients of micro-batches out of sight; use DDP"
MOMENTS = "ZeRO keeps the optimizer's moments flat, cut anywhere; use FSDP2"


class ZeroLayout(PlainLayout):
    """ZeRO, stages 1 to 3: DeepSpeed steps flat float32 tensors, of which each process has a part.

    Corrections see stand-ins of the parameters, cut by rows; see `StandIns`.

    Args:
        model: The user's module inside the engine.
        stage: The parameters, as ZeRO holds them.
        model_group: As given to attach.

    Attributes:
        model: The user's module inside the engine.
        optimizer: Holds the stand-ins.
    """

    offers = EVERYTHING - {"micro", "moments"}
    is_cut = True

    def __init__(self, model: nn.Module, stage: Stage, model_group: Any = None) -> None:
        super().__init__(model_group)
        self.model = model
        self.name = f"zero-{stage.number}"
        # Every process saves its part of stage 3, and what it moved is what it saves.
        self.is_restored_to_save = stage.number == 3
        self._stage = stage
        names: dict[Tensor, str] = {
            p: re.sub(WRAPPER, "", name) for name, p in model.named_parameters()
        }
        self.optimizer = StandIns(stage, names)
        self._kept: dict[nn.Parameter, list[Tensor]] = {}
        self.own_step = self

    def why_not(self, need: Reading) -> str:
        """Return why something cannot be read here."""
        return MICRO if need == "micro" else MOMENTS

    # ---- the gradients of a step

    def gradients(self, step: Step) -> None:
        """Do nothing: the engine's step begins with taking them."""

    def moments(self, optimizer: Optimizer) -> None:
        """Give the stand-ins the weights and the hyperparameters of now."""
        self.optimizer.follow_options()
        self.optimizer.follow_weights()

    def commit(self, step: Step) -> None:
        """Write the gradients where ZeRO's step reads them."""
        self.optimizer.give_gradients()

    # ---- the weights of a forward pass

    def move(self, open_window: Callable[[], bool]) -> bool:
        """Move the stand-ins, and write what they hold where a forward pass reads it."""
        was_moved = open_window()
        if was_moved:
            for stand_in, parameter in self.optimizer.stands_for.items():
                parts = self._stage.forward_weights(parameter)
                self._kept[parameter] = [part.clone() for part in parts]
                weight = self.optimizer.whole_weight(stand_in)
                self._stage.set_forward_weights(parameter, weight)
        return was_moved

    def restore(self, close_window: Callable[[], bool]) -> bool:
        """Restore both; reads no other process."""
        for parameter, kept in self._kept.items():
            parts = self._stage.forward_weights(parameter)
            for part, before in zip(parts, kept, strict=False):
                part.copy_(before)
        self._kept.clear()
        return close_window()

    def true_weights(self, read_window: Callable[[], dict[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
        """Return what stand-ins, and the model's own parameters, held before they were moved."""
        true = read_window()
        for parameter, kept in self._kept.items():
            true[parameter] = kept[-1].clone()
        return true

    # ---- the engine's step

    @property
    def notes(self) -> tuple[str, ...]:
        """Say how DeepSpeed clips."""
        bound = float(self._stage.optimizer.clip_grad)
        if bound > 0:
            return (
                f"DeepSpeed clips the norm of corrected gradients at {bound:g} "
                "(gradient_clipping): corrections come first",
            )
        return ("DeepSpeed does not clip (gradient_clipping is 0)",)

    def bind(self) -> Binding:
        """Lead ZeRO's step through that of `optimizer`, which hooks know of."""
        zero = self._stage.optimizer
        binding = Binding(zero, vars(zero).get("step"))
        self.optimizer.engine_step = zero.step
        zero.step = self._step
        return binding

    def _step(self, *arguments: Any, **options: Any) -> Any:
        """Take the engine's step with its gradients; say so before if it will be left out."""
        self.optimizer.take_gradients()
        self.optimizer.found_inf = 0.0
        if self._stage.skips_what_is_not_finite() and not self.optimizer.are_gradients_finite():
            self.optimizer.found_inf = 1.0
        return self.optimizer.step(*arguments, **options)

    def shapes(self) -> contextlib.AbstractContextManager[None]:
        """Show the shapes of parameters that stage 3 empties."""
        return self._stage.shapes()


class Binding:
    """Gives ZeRO's optimizer its own step back.

    Args:
        optimizer: Whose `step` leads through a layout.
        before: What had replaced the step of its class before, or None.
    """

    def __init__(self, optimizer: Any, before: Any) -> None:
        self._optimizer = optimizer
        self._before = before

    def remove(self) -> None:
        """Do so; a second call does nothing."""
        own = vars(self._optimizer)
        if own.pop(KEPT_AS, None) is None:
            return
        del own["step"]
        if self._before is not None:
            own["step"] = self._before


@hookimpl
def regrad_layout(model: nn.Module, optimizer: Any, model_group: Any) -> ZeroLayout | None:
    """Return the layout of a DeepSpeed engine's model and optimizer; None for any other.

    Args:
        model: The engine, or the module inside of it.
        optimizer: The engine's optimizer, or a wrapper of it.
        model_group: As given to attach.

    Raises:
        RegradError: If the model is an engine's and the optimizer is not, or if ZeRO is set up in a
            way in which nothing is proved.
    """
    if "deepspeed" not in sys.modules:
        return None
    zero = _zero_optimizer(optimizer)
    stage = None if zero is None else stage_of(zero)
    if stage is None:
        refuse_other_optimizers(optimizer)
        if _is_of_an_engine(model):
            raise RegradError(LATER)
        return None
    refuse_unproved(zero)
    inner = _module_inside(model)
    kept: ZeroLayout | None = vars(zero).get(KEPT_AS)
    if kept is not None and kept.model is inner:
        return kept
    _refuse_other_models(inner, stage.parameters())
    layout = ZeroLayout(inner, stage, model_group)
    setattr(zero, KEPT_AS, layout)
    return layout


def _zero_optimizer(optimizer: Any) -> Any:
    """Return DeepSpeed's optimizer inside wrappers, or None."""
    while optimizer is not None:
        if stage_of(optimizer) is not None:
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _is_of_an_engine(model: nn.Module) -> bool:
    """Say whether a model is an engine with ZeRO, or has parameters that ZeRO has taken over."""
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters())


def _module_inside(model: nn.Module) -> nn.Module:
    """Return the user's module inside an engine; any other model as it is."""
    from deepspeed import DeepSpeedEngine  # noqa: PLC0415 - there when an engine is

    inner: nn.Module = model
    while isinstance(inner, DeepSpeedEngine):
        inner = inner.module
    return inner


def _refuse_other_models(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a model that lacks parameters which the engine trains."""
    lacking = set(parameters).difference(model.parameters())
    if lacking:
        raise RegradError(
            f"model must be the engine of the optimizer, got {type(model).__name__}, which lacks "
            f"{len(lacking)} of the {len(parameters)} parameters that it trains; "
            "attach(engine, engine.optimizer, …)"
        )
