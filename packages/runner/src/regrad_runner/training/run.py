"""One training run through Accelerate: the loop that `compare` and `train` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import regrad
import torch
from accelerate.utils import set_seed
from torch import Tensor

from regrad_runner.results.points import Point
from regrad_runner.settings.arms import Arm, control_as_values, create_all
from regrad_runner.settings.config import RunConfig
from regrad_runner.settings.environment import used
from regrad_runner.training.building import (
    as_inputs,
    build_criterion,
    build_loader,
    build_training,
)
from regrad_runner.training.evaluation import Evaluator
from regrad_runner.training.nonfinite import Watch
from regrad_runner.training.position import Position
from regrad_runner.training.processes import make_accelerator
from regrad_runner.training.schedule import build_scheduler, part_of, schedule
from regrad_runner.training.signs import SignMeter
from regrad_runner.training.stepping import AcceleratedSteps, EngineSteps, is_engine
from regrad_runner.training.timing import StepTimer
from regrad_runner.workloads.samples import Samples
from regrad_runner.workloads.workload import Workload


class TrainingRun:
    """One run, ready to step.

    Everything random is fixed by `seed` before anything is built, so that runs of one seed differ
    by their arm alone.

    Args:
        config: Resolved settings.
        workload: What is trained.
        arm: Corrections to attach, or a control's change to make.
        seed: Of weights, order, augmentation and everything else.
        lr: Learning rate at the start of the cosine.

    Attributes:
        position: How far it is.
        attachment: What `regrad.attach` returned.
        engine: DeepSpeed's engine, or None.
        watch: Skips steps that are not finite.
        timer: Keeps the time of the steps.
        signs: Looks at the signs of binary weights; None where the model has none.
        epochs: Passes over the training samples.
        steps_per_epoch: Optimizer steps in an epoch; samples that do not fill a batch wait for the
            next one.
        total_steps: Optimizer steps of the whole run.
        on_micro_batch: Called with inputs and targets before each micro-batch, if it is not None.
    """

    def __init__(
        self, config: RunConfig, workload: Workload, arm: Arm, *, seed: int, lr: float
    ) -> None:
        set_seed(seed)
        self.config = config
        self.workload = workload
        self.arm = arm
        self.seed = seed
        self.lr = lr
        self.accelerator = make_accelerator(config)
        model, optimizer = build_training(config, workload, arm, seed=seed, lr=lr)
        self._dtype = next(model.parameters()).dtype
        criterion = build_criterion(workload, model)
        loader = build_loader(config, workload, seed=seed)
        self.epochs = int(config.epochs or 1)
        self.steps_per_epoch = len(workload.train) // int(config.batch_size or 1)
        self.total_steps = self.steps_per_epoch * self.epochs
        scheduler = build_scheduler(
            optimizer,
            warmup_steps=config.warmup_steps or 0,
            total_steps=self.total_steps,
            parts=workload.parts,
        )
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.attachment = regrad.attach(
            self.model, self.optimizer, create_all(arm), criterion=criterion
        )
        self.engine = self.model if is_engine(self.accelerator) else None
        self._steps = self._make_steps()
        self.watch = Watch(self._steps.named_parameters(), self.accelerator)
        self.signs = self._make_sign_meter()
        self.position = Position()
        self.timer = StepTimer()
        self.on_micro_batch: Callable[[Tensor, Tensor], None] | None = None
        self.loss_sum = torch.zeros((), device=self.accelerator.device, dtype=torch.float64)
        self._evaluator = Evaluator(
            self.accelerator,
            self.model,
            workload,
            attachment=self.attachment,
            dtype=self._dtype,
            workers=config.workers,
        )
        self._begin_step()

    def _make_steps(self) -> AcceleratedSteps | EngineSteps:
        """Return what takes the steps: accelerate, or DeepSpeed's engine."""
        if self.engine is None:
            return AcceleratedSteps(self.accelerator, self.model, self.optimizer)
        return EngineSteps(self.accelerator, self.engine, self.attachment)

    @property
    def evaluate_every(self) -> int:
        """Optimizer steps between evaluations."""
        return max(1, self.steps_per_epoch // int(self.config.evaluations_per_epoch or 1))

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate of step `step`, from 0: see `schedule`."""
        return schedule(
            step,
            warmup_steps=self.config.warmup_steps or 0,
            total_steps=self.total_steps,
            parts=self.workload.parts,
        )

    def train(self, *, on_point: Callable[[Point], None], on_step: Callable[[int], None]) -> None:
        """Train to the end, evaluating on the way.

        Args:
            on_point: Called with each evaluation.
            on_step: Called after each optimizer step, and after its evaluation if it has one.
        """
        for step in self.steps():
            if step % self.evaluate_every == 0 or step == self.total_steps:
                on_point(self.evaluate())
            on_step(step)

    def steps(self) -> Iterator[int]:
        """Train; after every optimizer step yield how many are done."""
        self.timer.resume()
        while self.position.epoch < self.epochs:
            for inputs, targets in self._rest_of_epoch():
                if self._epoch_is_done():
                    continue  # micro-batches left over do not fill an optimizer step
                self._micro_batch(inputs, targets)
                self.position.batch += 1
                if self.accelerator.sync_gradients:
                    self.position.step += 1
                    self.timer.pause()
                    if self.signs is not None:
                        self.signs.look()
                    yield self.position.step
                    self.timer.resume()
            self.position.epoch += 1
            self.position.batch = 0

    def _micro_batch(self, inputs: Tensor, targets: Tensor) -> None:
        """Train on one micro-batch; with the last one of a step, make the step."""
        self._begin_step()
        if self.on_micro_batch is not None:
            self.on_micro_batch(inputs, targets)
        with self.accelerator.accumulate(self.model):
            loss = self.attachment.criterion(self.model(self.as_inputs(inputs)), targets)
            self._steps.backward(loss)
            if self._may_step(loss):
                self._clip()
                self._steps.step()
                self.scheduler.step()
            self._steps.forget_gradients()
        self.loss_sum += loss.detach()

    def _begin_step(self) -> None:
        """Let the workload prepare the model for the step that comes."""
        part = part_of(self.position.step, total_steps=self.total_steps, parts=self.workload.parts)
        self.workload.begin_step(self.accelerator.unwrap_model(self.model), part)

    def _make_sign_meter(self) -> SignMeter | None:
        """Return what looks at the signs of binary weights; None where the model has none."""
        model = self.accelerator.unwrap_model(self.model)
        binary = self.workload.binary_parameters(model)
        if not binary:
            return None
        if self.engine is not None:
            raise ValueError(
                "model must have no binary weights with DeepSpeed, whose stages cut them into "
                f"parts, got {len(binary)} binary tensors; use torchrun for this workload"
            )
        return SignMeter(binary)

    def _may_step(self, loss: Tensor) -> bool:
        """Say whether loss and gradients are finite, at the end of a step.

        A GradScaler sees to that itself. Between steps accelerate's optimizer does nothing.
        """
        if not self.accelerator.sync_gradients or self.accelerator.scaler is not None:
            return True
        return self.watch.is_finite(self.position.step + 1, loss)

    def _clip(self) -> None:
        """Clip the gradients of a step to the norm of the settings, if they have one."""
        if self.config.clip_norm is not None and self.accelerator.sync_gradients:
            self._steps.clip(self.config.clip_norm)

    def _epoch_is_done(self) -> bool:
        """Say whether every optimizer step of the epoch has been made."""
        return self.position.batch == self.steps_per_epoch * self.config.accumulate

    def _epoch(self, epoch: int) -> Any:
        """Return the loader, at the beginning of an epoch."""
        self.loader.set_epoch(epoch)
        return self.loader

    def _rest_of_epoch(self) -> Any:
        """Return the micro-batches that are left of the epoch under way."""
        loader = self._epoch(self.position.epoch)
        if self.position.batch == 0:
            return loader
        return self.accelerator.skip_first_batches(loader, self.position.batch)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets that the next step would see, without moving on."""
        next_epoch = self.position.epoch + 1
        batches = self._epoch(next_epoch) if self._epoch_is_done() else self._rest_of_epoch()
        inputs, targets = next(iter(batches))
        return self.as_inputs(inputs), targets

    def as_inputs(self, inputs: Tensor) -> Tensor:
        """Return inputs in the number format of the weights."""
        return as_inputs(inputs, self._dtype)

    def evaluate(self) -> Point:
        """Evaluate on the validation samples and append the result to the points."""
        position = self.position
        position.seconds += self.timer.end_lap(
            after_step=position.step, device=self.accelerator.device
        )
        point = Point(
            step=position.step,
            epoch=position.step / self.steps_per_epoch,
            loss=self._mean_loss(),
            value=self.value_on(self.workload.validation),
            lr=self.scheduler.get_last_lr()[0],
            seconds=position.seconds,
        )
        position.points.append(point)
        return point

    def _mean_loss(self) -> float:
        """Return the mean training loss since the last evaluation, and begin the next sum."""
        points = self.position.points
        steps = self.position.step - (points[-1].step if points else 0)
        total = self.accelerator.reduce(self.loss_sum, "mean").item()
        self.loss_sum.zero_()
        return total / steps / self.config.accumulate  # type: ignore[no-any-return]

    def value_on(self, samples: Samples) -> float:
        """Return the measure on these samples. Call it on every process."""
        return self._evaluator.value_on(samples)

    @property
    def seconds(self) -> float:
        """Time spent in training steps so far."""
        return self.position.seconds + self.timer.lap_seconds

    def continue_from(self, position: Position) -> None:
        """Continue from another position, such as that of a checkpoint."""
        self.position = position
        self._begin_step()
        self.timer.begin_lap(after_step=position.step)

    def touched(self) -> bool:
        """Say whether a correction changed any tensor."""
        metrics = self.attachment.metrics()
        return any(metrics[key] > 0 for key in metrics if key.endswith("/share_touched"))

    def metrics(self) -> dict[str, float]:
        """Return the attachment's metrics, steps that were not finite, and those of signs."""
        of_signs = self.signs.metrics() if self.signs is not None else {}
        return {
            **self.attachment.metrics(),
            "steps_not_finite": float(self.watch.skipped),
            **of_signs,
        }

    def receipt(self) -> dict[str, Any]:
        """Return the attachment's receipt with what it cannot know.

        That is arm, seed, learning rate, a control's change, and what of the environment decided
        about numbers beside the settings.
        """
        control = control_as_values(self.arm.control) if self.arm.control else None
        run = {
            "arm": self.arm.name,
            "seed": self.seed,
            "lr": self.lr,
            "control": control,
            "steps_not_finite": self.watch.skipped,
            "environment": used(),
            "threads": torch.get_num_threads(),
        }
        return {**self.attachment.receipt(), "run": run}

    def largest(self, number: int) -> int:
        """Return the largest of the numbers that the processes give. Call it on every process."""
        if self.accelerator.num_processes == 1:
            return number
        numbers = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
        return int(numbers.max().item())

    def close(self) -> None:
        """Detach the corrections, and free what DeepSpeed's engine holds."""
        self.attachment.detach()
        if self.engine is not None:
            self.engine.destroy()
