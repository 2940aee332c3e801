"""VeLO as an optimizer of torch."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from regrad.errors import RegradError
from regrad.sharding import is_sharded
from torch import Tensor, nn
from torch.optim import Optimizer

from regrad_velo.features import new_averages, tensor_features, update_averages_, weight_features
from regrad_velo.losses import loss_features, new_losses, with_loss
from regrad_velo.networks import direction_and_magnitude, mixed_mlp, recurrent_step
from regrad_velo.weights import VeLOWeights, load_weights

GRADIENT_BOUND = 1000.0
STEP_SCALE = 0.001
MAGNITUDE_SCALE = 0.001


class VeLO(Optimizer):
    r"""Let trained networks make the steps; no learning rate has to be found.

    An LSTM reads 30 numbers about each tensor and mixes a bank of 256 small MLPs into one, which
    reads 30 numbers about each weight and says a direction d and a magnitude a:

    .. math::
        \theta \leftarrow \theta - \text{lr}\; f\; \mathrm{rms}(\theta)\; d\, e^{.001 a} \cdot .001

    with the step factor f of the tensor.

    Args:
        params: Parameters or groups of them, real, dense and whole (no DTensors).
        lr: Multiplies every step; 1 is what the networks were trained with. At least 0; a float,
            or a tensor of one element. Schedulers move it.
        weights: The networks: a path that `load_weights` reads, or `VeLOWeights`.
        num_steps: Steps of the whole training, at least 1: the networks plan by it. They were
            trained with 200 to 200,000.
        pass_lstm_state: Whether a tensor's LSTM goes on from its last state, as with the
            published file; False for the older files that were made with it standing still.

    Raises:
        ValueError: If an argument is out of range, or a parameter is complex. At a step, if
            there is no closure, its loss is not finite, or a gradient is sparse; nothing is
            changed then.
        TypeError: At a step, if the closure returns no number; nothing is changed then.
        RegradError: If a parameter is a DTensor.
        FileNotFoundError: If `weights` is a path where nothing is.

    Example:
        >>> from regrad_velo import random_weights
        >>> layer = nn.Linear(2, 1)
        >>> optimizer = VeLO(layer.parameters(), weights=random_weights(0), num_steps=100)
        >>> loss = layer(torch.ones(1, 2)).square().sum()
        >>> loss.backward()
        >>> loss is optimizer.step(lambda: loss)
        True

    References:
        Metz, Harrison, Freeman, Merchant, Beyer, Bradbury, Agrawal, Poole, Mordatch, Roberts and
        Sohl-Dickstein, 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up"
        (arXiv 2211.09760). `lr` is ours.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        *,
        weights: str | os.PathLike[str] | VeLOWeights,
        num_steps: int,
        pass_lstm_state: bool = True,
    ) -> None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps!r}")
        if not isinstance(weights, VeLOWeights):
            weights = load_weights(weights)
        self.weights = weights
        self.num_steps = num_steps
        self.pass_lstm_state = pass_lstm_state
        self._placed: dict[Any, dict[str, Tensor]] = {}
        super().__init__(params, {"lr": lr})
        self.param_groups[0]["training"] = {
            "losses": new_losses(),
            "num_steps": num_steps,
            "weights": weights.digest(),
            "pass_lstm_state": pass_lstm_state,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: the networks too."""
        own = {
            "weights": self.weights,
            "num_steps": self.num_steps,
            "pass_lstm_state": self.pass_lstm_state,
            "_placed": {},
        }
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with a rate of its own or the default.

        Raises:
            ValueError: If the rate is out of range, or a parameter is complex.
            RegradError: If a parameter is a DTensor.
        """
        _check_rate(param_group.get("lr", self.defaults["lr"]))
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                _check_parameter(parameter)
        except (ValueError, RegradError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: If it was saved with other networks, or for another number of steps.
        """
        own = self.param_groups[0]["training"]
        group = state_dict["param_groups"][0]
        if "training" not in group:
            raise ValueError("state_dict must be of VeLO, got one without its losses")
        saved = group["training"]
        for name in ("num_steps", "weights", "pass_lstm_state"):
            if saved[name] != own[name]:
                raise ValueError(
                    f"state_dict must have been saved with {name} {own[name]!r}, "
                    f"got {saved[name]!r}; make the optimizer as the saved one was made"
                )
        super().load_state_dict(state_dict)
        self._keep_wide(state_dict)

    def _keep_wide(self, state_dict: dict[str, Any]) -> None:
        """Undo that torch casts loaded averages to the format of the weights."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Returns the loss of this step, a number or a tensor of one element. It may
                evaluate the model, and is called once, with gradients on; after a backward pass
                of your own it is `lambda: loss`.

        Returns:
            What the closure returned.

        Raises:
            ValueError: If there is no closure, its loss is not finite, or a gradient is sparse.
            TypeError: If the closure returns no number.
        """
        if closure is None:
            raise ValueError(
                "closure must return the loss, which VeLO reads at every step, got None; "
                "call optimizer.step(lambda: loss) after loss.backward()"
            )
        with torch.enable_grad():
            loss = closure()
        value = _number_of(loss)
        moving = self._moving()
        training = self.param_groups[0]["training"]
        taken = training["losses"]["steps"]
        if taken == self.num_steps:
            warnings.warn(
                f"num_steps must be the steps of the whole training, got {self.num_steps}, and "
                "one more step; the networks were hardly trained beyond the end",
                RuntimeWarning,
                stacklevel=2,
            )
        losses = with_loss(training["losses"], value, self.num_steps)
        self.param_groups[0]["training"] = {**training, "losses": losses}
        if moving:
            self._move(moving, taken / self.num_steps, loss_features(losses, self.num_steps))
        return loss

    def _moving(self) -> list[tuple[nn.Parameter, Tensor, float]]:
        """Return the parameters with a gradient, those, and their rates; empty ones left out."""
        moving = []
        for group in self.param_groups:
            rate = float(group["lr"])
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise ValueError("gradients must be dense, got a sparse one; use sparse=False")
                _check_parameter(parameter)
                if parameter.numel() > 0:
                    moving.append((parameter, gradient, rate))
        return moving

    def _move(
        self,
        moving: list[tuple[nn.Parameter, Tensor, float]],
        fraction: float,
        losses: list[float],
    ) -> None:
        """Move parameters, in place."""
        device = moving[0][0].device
        dtype = torch.float32
        for parameter, _, _ in moving:
            dtype = torch.promote_types(dtype, parameter.dtype)
        network = self._network(device, dtype)
        states = [self._state_of(parameter, network) for parameter, _, _ in moving]
        seen = []
        for (parameter, _, _), state in zip(moving, states, strict=True):
            wide = parameter.to(state["square"].dtype)
            seen.append(tensor_features(wide, state, fraction, losses).to(device, dtype))
        hidden = torch.cat([state["hidden"].to(device, dtype) for state in states])
        cell = torch.cat([state["cell"].to(device, dtype) for state in states])
        mixing, factors, hidden, cell = recurrent_step(network, torch.stack(seen), hidden, cell)
        for place, (parameter, gradient, rate) in enumerate(moving):
            state = states[place]
            if self.pass_lstm_state:
                state["hidden"] = hidden[place : place + 1].clone()
                state["cell"] = cell[place : place + 1].clone()
            self._move_one(
                parameter,
                gradient,
                state,
                layers=mixed_mlp(network, mixing[place]),
                scale=rate * factors[place],
            )

    def _move_one(
        self,
        parameter: nn.Parameter,
        gradient: Tensor,
        state: dict[str, Any],
        *,
        layers: list[tuple[Tensor, Tensor]],
        scale: Tensor,
    ) -> None:
        """Move one parameter, in place."""
        wide = parameter.to(state["square"].dtype)
        gradient = gradient.to(wide.dtype).clamp(-GRADIENT_BOUND, GRADIENT_BOUND)
        update_averages_(state, gradient)
        features = weight_features(wide, gradient, state)
        own = [(weight.to(features), bias.to(features)) for weight, bias in layers]
        direction, magnitude = direction_and_magnitude(own, features)
        size = (wide.square().mean() + 1e-9).sqrt() * STEP_SCALE * scale.to(features)
        step = size * direction * torch.exp(MAGNITUDE_SCALE * magnitude)
        parameter.copy_(wide - step.reshape(wide.shape))

    def _network(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the networks on a device and in a dtype, copied there once."""
        key = (device, dtype)
        if key not in self._placed:
            self._placed[key] = self.weights.placed(device, dtype)
        return self._placed[key]

    def _state_of(self, parameter: nn.Parameter, network: dict[str, Tensor]) -> dict[str, Any]:
        """Return the state of a parameter, as before the first step if it has none."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(new_averages(parameter))
            state["hidden"] = network["hidden"].clone()
            state["cell"] = network["cell"].clone()
        return state


def _number_of(loss: Any) -> float:
    """Return a loss as a number, or raise an error if it is none or not finite."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        loss = loss.item()
    if not isinstance(loss, int | float):
        raise TypeError(f"closure must return the loss, one number, got {loss!r}")
    if not math.isfinite(loss):
        raise ValueError(
            f"loss must be finite, got {loss!r}; VeLO would remember it for ever: leave this step "
            "out, or go back to a checkpoint"
        )
    return float(loss)


def _check_rate(rate: Any) -> None:
    """Raise `ValueError` unless a rate is a number, or a tensor of one, of at least 0."""
    if isinstance(rate, Tensor) and rate.numel() != 1:
        raise ValueError(
            f"lr must be a number or a tensor of one element, got shape {list(rate.shape)}"
        )
    if not (rate >= 0 and math.isfinite(rate)):
        raise ValueError(f"lr must be at least 0 and finite, got {rate!r}")


def _check_parameter(parameter: Tensor) -> None:
    """Raise an error if a parameter is not real, or if this process holds a shard of it."""
    if not parameter.is_floating_point():
        raise ValueError(f"parameters must be real and floating point, got {parameter.dtype}")
    if is_sharded(parameter):
        raise RegradError(
            "parameters must be whole, got a DTensor; VeLO reads means over whole tensors: train "
            "with DDP, or with another optimizer under FSDP2"
        )
