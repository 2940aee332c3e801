"""Tensors that stand for ZeRO's parameters, and the optimizer that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from regrad import RegradError
from regrad.optimizer_state import take_out
from regrad.sharding import local
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from regrad_deepspeed.stages import Stage


class StandIns(Optimizer):
    """Holds, for every parameter that ZeRO steps, a float32 tensor that is cut by its rows.

    ZeRO keeps weights and gradients flat and cuts them anywhere. Corrections see rows, as under
    FSDP2: each process has whole ones, an equal share of every parameter. The groups have the
    hyperparameters of the optimizer inside ZeRO's, and its step runs ZeRO's.

    Args:
        stage: The parameters, as ZeRO holds them.
        names: Their names in the model.

    Attributes:
        optim: The optimizer inside ZeRO's, which says what a step is.
        engine_step: ZeRO's own step; None while nothing is attached.
        found_inf: 1 where ZeRO skips the step under way, else 0.
        stands_for: ZeRO's parameters, by the tensors that stand for them.
    """

    def __init__(self, stage: Stage, names: Mapping[Tensor, str]) -> None:
        # Every attach loads this file where it is installed; DTensor is heavy.
        from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415

        self.stage = stage
        self.optim: Optimizer = stage.optimizer.optimizer
        self.engine_step: Callable[..., Any] | None = None
        self.found_inf = 0.0
        self.stands_for: dict[Tensor, nn.Parameter] = {}
        device = stage.parameters()[0].device
        self._mesh = DeviceMesh.from_group(stage.process_group, device.type)
        groups = []
        for parameters, options in zip(stage.groups, self._options(), strict=True):
            named = [(names[parameter], self._stand_in(parameter)) for parameter in parameters]
            groups.append({**options, "params": named})
        super().__init__(groups, dict(self.optim.defaults))

    def _options(self) -> list[dict[str, Any]]:
        """Return the hyperparameters of every group."""
        options = [dict(group) for group in self.optim.param_groups]
        take_out(options)
        for group in options:
            del group["params"]
            group.pop("param_names", None)
        return options

    def _stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return a new tensor for a parameter, with its weights."""
        stand_in = nn.Parameter(self._rows_of(self.stage.true_weight(parameter)))
        self.stands_for[stand_in] = parameter
        return stand_in

    def _rows_of(self, whole: Tensor) -> Tensor:
        """Return a copy of this process's rows of a whole tensor, in float32.

        DeepSpeed takes no tensor without dimensions.
        """
        from torch.distributed.tensor import (  # noqa: PLC0415 - see above
            DTensor,
            Shard,
            distribute_tensor,
        )

        wide = whole.detach().to(torch.float32)
        rows = distribute_tensor(wide, self._mesh, [Shard(0)], src_data_rank=None)
        own = rows.to_local().clone(memory_format=torch.contiguous_format)
        return DTensor.from_local(
            own, self._mesh, [Shard(0)], run_check=False, shape=wide.shape, stride=wide.stride()
        )

    # ---- what the layout does with them

    def follow_options(self) -> None:
        """Take over the hyperparameters, which schedules change."""
        for group, options in zip(self.param_groups, self._options(), strict=True):
            group.update(options)

    @torch.no_grad()
    def follow_weights(self, *, was_stepped: bool = False) -> None:
        """Take over the weights from which the next step starts.

        Args:
            was_stepped: Whether ZeRO has stepped. Otherwise a stand-in is written, on every
                process, only where somebody gave its parameter other values.
        """
        parts = [
            (local(stand_in), local(self._rows_of(self.stage.true_weight(parameter))))
            for stand_in, parameter in self.stands_for.items()
        ]
        differs = [was_stepped or not torch.equal(own, rows) for own, rows in parts]
        if not was_stepped:
            differs = self._on_any_process(differs)
        for is_new, (own, rows) in zip(differs, parts, strict=True):
            if is_new:
                own.copy_(rows)

    def _on_any_process(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether it is set on any process. Collective."""
        counts = torch.tensor(flags, dtype=torch.int32, device=self._mesh.device_type)
        distributed.all_reduce(counts, distributed.ReduceOp.MAX, group=self.stage.process_group)
        return [bool(count) for count in counts.tolist()]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Give every stand-in the gradient of its parameter.

        One that is there with these values, from a step that raised, stays: what was done with it
        is known by the tensor.
        """
        for stand_in, parameter in self.stands_for.items():
            gradient = self._rows_of(self.stage.gradient(parameter))
            before = stand_in.grad
            if before is None or not torch.equal(local(before), local(gradient)):
                stand_in.grad = gradient

    @torch.no_grad()
    def are_gradients_finite(self) -> bool:
        """Say whether all gradients are finite, on all processes. Collective."""
        present = [local(s.grad) for s in self.stands_for if s.grad is not None]
        finite = torch.stack([gradient.isfinite().all() for gradient in present]).all()
        (is_any_other,) = self._on_any_process([not finite.item()])
        return not is_any_other

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Write the gradients where ZeRO's step reads them."""
        for stand_in, parameter in self.stands_for.items():
            gradient: Any = stand_in.grad
            self.stage.set_gradient(parameter, gradient.full_tensor())

    def forget_gradients(self) -> None:
        """Drop the gradients of a step that is left out, here and in ZeRO."""
        self.stage.forget_gradients()
        for stand_in in self.stands_for:
            stand_in.grad = None

    def whole_weight(self, stand_in: Any) -> Tensor:
        """Return all of what a stand-in holds now."""
        whole: Tensor = stand_in.detach().full_tensor()
        return whole

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take ZeRO's step; hooks on this one come before and after it.

        Args:
            closure: Passed on to ZeRO.

        Returns:
            What ZeRO's step returns.
        """
        if self.engine_step is None:
            raise RegradError("the stand-ins must be stepped by the engine; call engine.step()")
        result = self.engine_step() if closure is None else self.engine_step(closure)
        for stand_in in self.stands_for:
            stand_in.grad = None
        self.follow_weights(was_stepped=True)
        return result
