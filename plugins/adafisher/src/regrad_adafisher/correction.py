"""AdaFisher: gradients divided by a diagonal Fisher that is a product of two factors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from regrad import Attachment, Correction, RegradError
from regrad.correction import Control, Needs
from regrad.hookspecs import Layout, Step
from regrad.optimizers import stepped_by
from regrad.sharding import total_norm
from regrad.signatures import takes
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Optimizer

from regrad_adafisher.functional import Average, advance, relative_divisor
from regrad_adafisher.layers import Layer, Moments, layers_of, one_of_each
from regrad_adafisher.loss_scale import loss_scale
from regrad_adafisher.places import Place, kinds_of_holders, places_of
from regrad_adafisher.ranks import add_over_ranks, are_parts_of_a_batch, count_ranks

DIVIDE_NOTHING = (SGD, ASGD)
UNCOUNTED = "FSDP2 hides the gradients that show which micro-batches belong to a step"
IN_PARTS = "leave it out: the ranks add up what they saw of the same layers"


class AdaFisher(Correction):
    r"""Divide gradients by a diagonal Fisher, the product of two vectors per layer.

    For a layer with inputs h and output gradients s, every `refresh` steps

    .. math:: \hat H_j = \mathrm{mean}\, h_j^2, \quad \hat S_i = \mathrm{mean}\, s_i^2, \quad
        F = S \otimes H + \lambda, \quad g \leftarrow \lambda\, g / F,

    where H and S are averages of the second moments, which are brought to [0, 1] first. The factor
    :math:`\lambda` keeps the meaning of the learning rate. Linear, Conv2d without groups,
    BatchNorm2d and LayerNorm have a divisor; all other parameters are left alone.

    Args:
        average: "published" takes the averages of the paper, whose weights sum to .088: after two
            refreshes F is constant to 8 %. "ema" takes convex ones, and F is between
            :math:`\lambda` and :math:`1 + \lambda`; it needs a larger learning rate.
        refresh: Optimizer steps per refresh; the first step is one. At least 1.
        damping: :math:`\lambda`. Positive.
        fisher: "factored"; or "mean", the control: every element is divided by the mean of F.
        select: Names of modules that may have a divisor, with the wildcards of a shell. Empty:
            all.
        allow_adaptive: Whether to act on optimizers that divide gradients too, or may do so.

    Raises:
        ValueError: If a number is out of its range, or `select` names no module with a divisor.
        RegradError: At attach, on an optimizer other than torch's SGD and ASGD without
            `allow_adaptive`, on a model without a supported layer, and under FSDP2.

    Example:
        >>> import regrad, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> attachment = regrad.attach(model, optimizer, [AdaFisher(refresh=50)])

    References:
        Gomes, Zhang, Belilovsky, Wolf and Hosseini, 2025, "AdaFisher: Adaptive Second Order
        Optimization via Fisher Information" (ICLR). It divides the momentum, and we what goes into
        it: the same between two refreshes.
    """

    name = "adafisher"
    needs = Needs(
        stages=("hidden", "gradient"),
        conflicts={"fsdp2": UNCOUNTED, "parts": IN_PARTS},
        reads=("model", "micro"),
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Which averages, how often, how strongly, and where."""

        average: Average = "published"
        refresh: int = 100
        damping: float = 1e-3
        fisher: Literal["factored", "mean"] = "factored"
        select: tuple[str | int, ...] = ()
        allow_adaptive: bool = False

        def __post_init__(self) -> None:
            if self.refresh < 1:
                raise ValueError(f"refresh must be at least 1, got {self.refresh!r}")
            if not 0 < self.damping < torch.inf:
                raise ValueError(f"damping must be positive and finite, got {self.damping!r}")

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._layers: dict[str, Layer] = {}
        self._places: dict[str, Place] = {}
        self._averages: dict[str, Moments] = {}
        self._uncalled: set[str] = set()
        self._is_complete = False
        self._task = -1

    def setup(self, attachment: Attachment) -> None:
        """Find the layers, say what is left alone, and watch the layers' calls."""
        self._refuse_a_second_divisor(attachment.optimizer)
        _refuse_a_model_in_parts(attachment)
        possible = layers_of(attachment.model)
        layers = [layer for layer in possible if self._may_act_on(layer)]
        if not layers:
            self._refuse_no_layer(attachment.model, [layer.name for layer in possible])
        together = one_of_each(layers)
        self._layers = {layer.name: layer for layer in together.values()}
        layer_names = {name: layer.name for name, layer in together.items()}
        self._places = places_of(attachment.model, layer_names)
        self._uncalled = set()
        self._is_complete = False
        self._note_what_is_left_alone()
        for layer in layers:
            after_forward = partial(self._after_forward, layer, together[layer.name])
            attachment.hook_forward(layer.module, after_forward)
        self.load_state_dict(self.state_dict())

    def _refuse_a_second_divisor(self, optimizer: Optimizer) -> None:
        if self.options.allow_adaptive or isinstance(stepped_by(optimizer), DIVIDE_NOTHING):
            return
        raise RegradError(
            "'adafisher' must have an optimizer that divides by nothing itself, got "
            f"{type(stepped_by(optimizer)).__name__}; use SGD with momentum, or pass "
            "allow_adaptive=True if two divisors are meant"
        )

    def _may_act_on(self, layer: Layer) -> bool:
        """Say whether option `select` names a layer."""
        patterns = [str(pattern) for pattern in self.options.select]
        return not patterns or any(fnmatchcase(layer.name, pattern) for pattern in patterns)

    def _refuse_no_layer(self, model: nn.Module, possible: Sequence[str]) -> None:
        if possible:
            raise ValueError(
                f"select must name modules that have a divisor, got {self.options.select!r}; "
                f"it may name {', '.join(possible)}"
            )
        raise RegradError(
            "'adafisher' must find a Linear, Conv2d without groups, BatchNorm2d or LayerNorm, got "
            f"{type(model).__name__} without any"
        )

    def _note_what_is_left_alone(self) -> None:
        """List in the receipt the parameters that no rule speaks of."""
        left: dict[str, list[str]] = defaultdict(list)
        kinds = kinds_of_holders(self.attachment.model)
        for name in self.attachment.engine.step().names:
            if name not in self._places:
                left[kinds.get(name, "outside the model")].append(name)
        if left:
            listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in left.items())
            self._note(f"'adafisher' leaves alone {listed}")

    def _note(self, sentence: str) -> None:
        self.attachment.reasons = (*self.attachment.reasons, sentence)

    # ---- what is read in forward and backward

    def _is_due(self, index: int) -> bool:
        """Say whether a step refreshes all averages."""
        due: bool = index % self.options.refresh == 0
        return due

    def _counts(self, layer: Layer) -> bool:
        """Say whether the calls of a layer count now: it is refreshed, or has no averages yet."""
        return self._is_due(self.attachment.engine.applied) or layer.name not in self._averages

    def _after_forward(
        self, called: Layer, layer: Layer, _: nn.Module, inputs: Any, output: Tensor
    ) -> None:
        """Let the backward of this call add it to the sums of `layer`, if they count in this step.

        Only then it counts: a forward that nobody differentiates, and the one that a checkpoint
        repeats, add nothing.
        """
        if self.attachment is None or not self.attachment.engine.is_training():
            return
        if not (output.requires_grad and self._counts(layer)):
            return
        if not inputs or not called.accepts(inputs[0]):
            return
        with torch.no_grad():
            seen = called.sum_inputs(inputs[0].detach().to(layer.dtype), output.shape)
        collect = partial(self._collect, layer, seen, output.shape)
        _base_of(output).register_hook(collect)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _collect(
        self, layer: Layer, inputs: Tensor, shape: Sequence[int], gradient: Tensor
    ) -> None:
        """Add one call of a layer, now that the gradient of its output has come."""
        if self.attachment is None:
            return
        self._forget_other_steps()
        layer.add(inputs, gradient.reshape(shape))

    def _forget_other_steps(self) -> None:
        """At the beginning of a backward, drop the sums if no gradient belongs to them.

        Their step was skipped. No gradient of these layers has come yet in this backward.
        """
        last = self._task
        self._task = torch._C._current_graph_task_id()
        if self._task == last or not any(layer.rows for layer in self._layers.values()):
            return
        gradients: list[Tensor] = []
        for layer in self._layers.values():
            gradients += [p.grad for p in layer.parameters() if p.grad is not None]
        if total_norm(gradients) == 0:
            self._forget()

    def _forget(self) -> None:
        for layer in self._layers.values():
            layer.forget()

    # ---- the step

    def correct_gradients(self, step: Step) -> None:
        """Refresh the averages if due, and divide the gradients."""
        layers = self._to_refresh(step.index)
        if layers:
            self._refresh(layers, step.layout)
        self._forget()
        if self.options.fisher == "mean":
            self._divide_by_the_mean(step)
        else:
            self._divide(step)

    def _to_refresh(self, index: int) -> list[Layer]:
        """Return all layers in a step that refreshes, else those whose first gradients came now.

        Their parameters were frozen until now, or not used. All ranks return the same ones: they
        have the same gradients.
        """
        layers = [*self._layers.values()]
        if self._is_due(index):
            return layers
        known = self._averages.keys() | self._uncalled
        return [layer for layer in layers if layer.name not in known and layer.has_gradient()]

    def _refresh(self, layers: Sequence[Layer], layout: Layout | None) -> None:
        """Let averages advance by what all ranks saw in the micro-batches of this step."""
        are_parts = are_parts_of_a_batch(self.attachment.model, layout)
        add_over_ranks(layers, are_parts=are_parts)
        scale = 1.0
        if self.options.average == "published":  # only its floor has the units of the gradient
            scale = loss_scale()
            if are_parts:  # of a mean over the ranks, as the final gradient is
                scale *= count_ranks()
        for layer in layers:
            if layer.rows:
                self._advance(layer, layer.moments(scale))
            elif layer.has_gradient():
                self._uncalled.add(layer.name)
        if not self._is_complete:
            self._is_complete = True
            self._note_what_was_not_called()

    def _note_what_was_not_called(self) -> None:
        """List in the receipt the trainable layers that no gradient came through."""
        unseen = [
            name
            for name, layer in self._layers.items()
            if name not in self._averages and layer.is_trainable()
        ]
        if unseen:
            listed = ", ".join(unseen)
            self._note(
                f"'adafisher' saw no call of {listed}, and leaves them alone until there is one"
            )

    def _advance(self, layer: Layer, moments: Moments) -> None:
        before = self._averages.get(layer.name)
        inputs = None if before is None else before.inputs
        outputs = None if before is None else before.outputs
        self._averages[layer.name] = Moments(
            advance(inputs, moments.inputs, average=self.options.average),
            advance(outputs, moments.outputs, average=self.options.average),
        )

    def _factors(self, step: Step) -> Iterator[tuple[nn.Parameter, Moments]]:
        """Yield the parameters that have a divisor, with S and their part of H."""
        for name, parameter in step.named_parameters():
            place = self._places.get(name)
            if place is None or place.layer not in self._averages:
                continue
            averages = self._averages[place.layer]
            yield parameter, Moments(self._own_inputs(place), averages.outputs)

    def _own_inputs(self, place: Place) -> Tensor:
        """Return the part of H that belongs to a weight or to a bias."""
        inputs = self._averages[place.layer].inputs
        if place.is_bias:
            return inputs[-1:]
        return inputs[:-1] if self._layers[place.layer].has_bias_column else inputs

    def _divide(self, step: Step) -> None:
        for parameter, (inputs, outputs) in self._factors(step):
            gradient = parameter.grad
            if gradient is None:
                continue
            divisor = relative_divisor(outputs, inputs, damping=self.options.damping)
            gradient.div_(divisor.reshape(gradient.shape))

    def _divide_by_the_mean(self, step: Step) -> None:
        factors = [pair for pair in self._factors(step) if pair[0].grad is not None]
        mean = self._mean_divisor(factors)
        if mean is None:
            return
        for parameter, _ in factors:
            parameter.grad.div_(mean.to(parameter.grad.device))  # type: ignore[union-attr]

    def _mean_divisor(self, factors: Iterable[tuple[nn.Parameter, Moments]]) -> Tensor | None:
        """Return the mean of F/λ over all elements of some parameters; None without any."""
        sums: list[Tensor] = []
        elements = 0
        for parameter, (inputs, outputs) in factors:
            sums.append(inputs.sum() * outputs.sum())
            elements += parameter.numel()
        if not sums:
            return None
        device = sums[0].device
        total = torch.stack([one.to(device) for one in sums]).sum()
        mean: Tensor = total / (self.options.damping * elements) + 1
        return mean

    # ---- what others ask

    def selects(self, name: str, parameter: Tensor) -> bool:
        """Say whether a parameter has a divisor."""
        return name in self._places

    def control(self, optimizer: Optimizer) -> Control | None:
        """Return the same steps with the mean of F for every element: a warm-up of the rate."""
        if self.options.fisher == "mean":
            return None
        with_the_mean = type(self)(**vars(self.options) | {"fisher": "mean"})
        return Control(name="mean-fisher", corrections=(with_the_mean.as_text(),))

    def metrics(self) -> dict[str, float]:
        """Return the mean, smallest and largest F/λ of all elements that have a divisor."""
        if self.attachment is None or not self._averages:
            return {}
        factors = [*self._factors(self.attachment.engine.step())]
        smallest: list[float] = []
        largest: list[float] = []
        for _, (inputs, outputs) in factors:
            smallest.append((inputs.min() * outputs.min()).item())
            largest.append((inputs.max() * outputs.max()).item())
        mean = self._mean_divisor(factors)
        if mean is None:
            return {}
        return {
            "mean_divisor": mean.item(),
            "smallest_divisor": min(smallest) / self.options.damping + 1,
            "largest_divisor": max(largest) / self.options.damping + 1,
        }

    def idle_reason(self) -> str:
        """Say why no gradient may have been divided."""
        return "no supported layer was called in a training forward whose loss was differentiated"

    def state_dict(self) -> dict[str, Any]:
        """Return copies of H ("inputs") and S ("outputs") by the names of the modules."""
        return {
            name: {"inputs": averages.inputs.clone(), "outputs": averages.outputs.clone()}
            for name, averages in self._averages.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, on the devices of the layers."""
        self._averages = {}
        for name, kept in state.items():
            layer = self._layers.get(name)
            device = kept["inputs"].device if layer is None else layer.device
            self._averages[name] = Moments(
                kept["inputs"].to(device, copy=True), kept["outputs"].to(device, copy=True)
            )


def _base_of(output: Tensor) -> Tensor:
    """Return what a view shows all of, or a tensor itself.

    torch drops the hooks of a view that is written in place, but not those of its base.
    """
    base = output._base
    return output if base is None or base.numel() != output.numel() else base


def _refuse_a_model_in_parts(attachment: Attachment) -> None:
    """Refuse `model_group`, by which the core lets corrections act that add over the parts."""
    if attachment.engine.layout.model_group is not None:
        raise RegradError(f"'adafisher' must see the whole model, got model_group=…; {IN_PARTS}")
