"""One training run through Accelerate: the loop that `compare` and `train` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import regrad
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from regrad_runner.results.points import Point
from regrad_runner.settings.arms import Arm, create_all
from regrad_runner.settings.config import RunConfig
from regrad_runner.settings.environment import used
from regrad_runner.training.building import as_inputs, build_training
from regrad_runner.training.nonfinite import Watch
from regrad_runner.training.position import Position
from regrad_runner.training.processes import make_accelerator
from regrad_runner.training.schedule import schedule
from regrad_runner.workloads.samples import Samples, training_loader
from regrad_runner.workloads.workload import Workload

# The effect meter looks at each of these first steps: they are slower in the arms that have a correction.
METERED_STEPS = 20


class TrainingRun:
    """One run, ready to step.

    Everything random is fixed by `seed` before anything is built, so that runs of one seed differ by their arm
    alone.

    Args:
        config: Resolved settings.
        workload: What is trained.
        arm: Corrections to attach, or a control's change to make.
        seed: Of weights, order, augmentation and everything else.
        lr: Learning rate at the start of the cosine.

    Attributes:
        position: How far it is.
        attachment: What `regrad.attach` returned.
        watch: Skips steps that are not finite.
        steps_per_epoch: Optimizer steps in an epoch; samples that do not fill a batch wait for the next one.
        total_steps: Optimizer steps of the whole run.
        on_micro_batch: Called with inputs and targets before each micro-batch.
    """

    def __init__(
        self, config: RunConfig, workload: Workload, arm: Arm, *, seed: int, lr: float
    ) -> None:
        set_seed(seed)
        self.config, self.workload, self.arm = config, workload, arm
        self.seed, self.lr = seed, lr
        self.accelerator = make_accelerator(config)
        model, optimizer = build_training(config, workload, arm, seed=seed, lr=lr)
        batch_size = int(config.batch_size or 1)
        self.steps_per_epoch = len(workload.train) // batch_size
        self.total_steps = self.steps_per_epoch * int(config.epochs or 1)
        loader = training_loader(
            workload.train,
            batch_size=batch_size // config.accumulate,
            seed=seed,
            workers=config.workers,
        )
        # Of a function the scheduler's state has nothing, of a method its attributes.
        scheduler = LambdaLR(optimizer, lambda step: self.factor(step))  # noqa: PLW0108
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.attachment = regrad.attach(
            self.model, self.optimizer, create_all(arm), criterion=workload.criterion()
        )
        self.watch = Watch(
            self.accelerator.unwrap_model(self.model).named_parameters(), self.accelerator
        )
        self.position = Position()
        self.on_micro_batch: Callable[[Tensor, Tensor], None] = lambda inputs, targets: None
        self.loss_sum = torch.zeros((), device=self.accelerator.device, dtype=torch.float64)
        self._dtype = next(model.parameters()).dtype
        self._laps: list[tuple[int, float]] = []
        self.begin_lap()

    @property
    def evaluate_every(self) -> int:
        """Optimizer steps between evaluations."""
        return max(1, self.steps_per_epoch // int(self.config.evaluations_per_epoch or 1))

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate of step `step`, from 0: see `schedule`."""
        return schedule(
            step, warmup_steps=self.config.warmup_steps or 0, total_steps=self.total_steps
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
        per_epoch = self.steps_per_epoch * self.config.accumulate
        started = time.perf_counter()
        while self.position.epoch < int(self.config.epochs or 1):
            for inputs, targets in self._rest_of_epoch():
                if self.position.batch == per_epoch:
                    continue  # micro-batches left over do not fill an optimizer step
                self._micro_batch(inputs, targets)
                self.position.batch += 1
                if self.accelerator.sync_gradients:
                    self.position.step += 1
                    self._busy += time.perf_counter() - started
                    yield self.position.step
                    started = time.perf_counter()
            self.position.epoch, self.position.batch = self.position.epoch + 1, 0

    def evaluate(self) -> Point:
        """Look at the validation samples and append what was seen to the points."""
        self._end_lap()
        position = self.position
        since = position.points[-1].step if position.points else 0
        losses = self.accelerator.reduce(self.loss_sum, "mean").item() / (position.step - since)
        self.loss_sum.zero_()
        point = Point(
            step=position.step,
            epoch=position.step / self.steps_per_epoch,
            loss=losses / self.config.accumulate,
            value=self.value_on(self.workload.validation),
            lr=self.scheduler.get_last_lr()[0],
            seconds=position.seconds,
        )
        position.points.append(point)
        return point

    @torch.no_grad()
    def value_on(self, samples: Samples) -> float:
        """Return the measure on these samples, each process looking at its part."""
        model = self.accelerator.unwrap_model(self.model)
        self._share_buffers(model)
        self.model.eval()
        device, seen = self.accelerator.device, 0
        mine = range(self.accelerator.process_index, len(samples), self.accelerator.num_processes)
        # As many for each, or the processes of a sharded model would wait for each other: what is added is not counted.
        filled = [*mine, *[0] * (-(-len(samples) // self.accelerator.num_processes) - len(mine))]
        total = torch.zeros(
            2, device=device, dtype=torch.float64
        )  # the sum, and the number of what it is over
        for inputs, targets in samples.batches(
            samples.evaluation_batch, indices=filled, workers=self.config.workers
        ):
            outputs = self._as_fitted(model(self.as_inputs(inputs.to(device))))
            scores = self.workload.score(outputs, targets.to(device))
            total += torch.stack(
                [part[: max(0, len(mine) - seen)].sum().double() for part in scores]
            )
            seen += len(inputs)
        self.model.train()
        whole, count = self.accelerator.reduce(total, "sum").tolist()
        return float(whole / count)

    def _as_fitted(self, outputs: Tensor) -> Tensor:
        """Return logits of the probabilities that were fitted, where a corrected criterion fits others than softmax."""
        probabilities = getattr(self.attachment.criterion, "probabilities", None)
        if probabilities is None or not self.workload.reads_probabilities:
            return outputs
        return probabilities(outputs.double()).log()  # type: ignore[no-any-return]

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets that the next step would see, without moving on."""
        ended = self.position.batch == self.steps_per_epoch * self.config.accumulate
        inputs, targets = next(
            iter(self._rest_of_epoch() if not ended else self._epoch(self.position.epoch + 1))
        )
        return self.as_inputs(inputs), targets

    def as_inputs(self, inputs: Tensor) -> Tensor:
        """Return inputs in the number format of the weights."""
        return as_inputs(inputs, self._dtype)

    def step_seconds(self) -> float:
        """Return the median time of a training step, fetching its batch included, evaluations not."""
        plain = [seconds for first, seconds in self._laps if first >= METERED_STEPS]
        return median(plain or [seconds for _, seconds in self._laps] or [0.0])

    @property
    def seconds(self) -> float:
        """Time spent in training steps so far."""
        return self.position.seconds + self._busy

    def touched(self) -> bool:
        """Say whether a correction changed any tensor."""
        return any(
            key.endswith("/share_touched") and value > 0
            for key, value in self.attachment.metrics().items()
        )

    def metrics(self) -> dict[str, float]:
        """Return the attachment's metrics and how many steps were skipped because they were not finite."""
        return {**self.attachment.metrics(), "steps_not_finite": float(self.watch.skipped)}

    def receipt(self) -> dict[str, Any]:
        """Return the attachment's receipt with what it cannot know.

        That is arm, seed, learning rate, a control's change, and what of the environment decided about numbers
        beside the settings.
        """
        control = asdict(self.arm.control) if self.arm.control else None
        run = {"arm": self.arm.name, "seed": self.seed, "lr": self.lr, "control": control}
        run["steps_not_finite"] = self.watch.skipped
        run["environment"] = used()
        return {**self.attachment.receipt(), "run": {**run, "threads": torch.get_num_threads()}}

    def largest(self, number: int) -> int:
        """Return the largest of the numbers that the processes give. Call it on every process."""
        if self.accelerator.num_processes == 1:
            return number
        numbers = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
        return int(numbers.max().item())

    def close(self) -> None:
        """Detach the corrections."""
        self.attachment.detach()

    def _epoch(self, epoch: int) -> Any:
        self.loader.set_epoch(epoch)
        return self.loader

    def _rest_of_epoch(self) -> Any:
        loader = self._epoch(self.position.epoch)
        return (
            self.accelerator.skip_first_batches(loader, self.position.batch)
            if self.position.batch
            else loader
        )

    def _micro_batch(self, inputs: Tensor, targets: Tensor) -> None:
        self.on_micro_batch(inputs, targets)
        with self.accelerator.accumulate(self.model):
            loss = self.attachment.criterion(self.model(self.as_inputs(inputs)), targets)
            self.accelerator.backward(loss)
            if self._may_step(loss):
                if self.config.clip_norm is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
                self.optimizer.step()
                self.scheduler.step()
            self.optimizer.zero_grad()
        self.loss_sum += loss.detach()

    def _may_step(self, loss: Tensor) -> bool:
        """Say whether loss and gradients are finite, at the end of a step. A GradScaler sees to that itself."""
        ends = self.accelerator.sync_gradients and self.accelerator.scaler is None
        return not ends or self.watch.is_finite(self.position.step + 1, loss)

    def begin_lap(self) -> None:
        """Measure time per step from here: after a checkpoint was loaded."""
        self._busy, self._lap_from = 0.0, self.position.step

    def _end_lap(self) -> None:
        """Note the time per step since the last evaluation."""
        started = time.perf_counter()
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()  # what is still running belongs to these steps
        self._busy += time.perf_counter() - started
        steps = self.position.step - self._lap_from
        self._laps.append((self._lap_from, self._busy / steps))
        self.position.seconds += self._busy
        self.begin_lap()

    def _share_buffers(self, model: nn.Module) -> None:
        """Give every process the running statistics of process 0: those that a checkpoint holds."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
