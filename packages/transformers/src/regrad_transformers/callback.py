"""The callback that attaches corrections where a Trainer begins to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import regrad
from regrad import optimizer_state
from regrad.errors import RegradError, refuse_if
from regrad.registry import created
from regrad.sharding import is_sharded
from regrad.wrappers import innermost_optimizer
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from regrad_transformers import loss, storage

PREFIX = "regrad/"
ANEW = "RegradCallback(…, restore=False) begins corrections anew"
WITHOUT = f"checkpoint must be of a training with corrections, got one without; {ANEW}"
SHARDS = (
    "checkpoints must not be of shards, whose corrections this callback cannot save; pass save_strategy='no' or "
    "save_only_model=True"
)
UNWIRED = (
    "{} corrects the criterion, and the Trainer does not call it; pass Trainer(…, callbacks=[callback], "
    "compute_loss_func=callback.compute_loss), or call callback.criterion in a compute_loss_func of your own"
)


class RegradCallback(TrainerCallback):
    """Attach corrections when a `transformers.Trainer` begins to train, and detach them when it ends.

    Their state is in every checkpoint, within the optimizer's (`optimizer.pt`), and is
    restored by `train(resume_from_checkpoint=…)`; the receipt is beside it for people
    (`regrad.json`). What each really changed is in the Trainer's logs, under "regrad/".
    Corrections act on
    gradients that are accumulated, averaged over processes and clipped by
    `max_grad_norm`. Every `train()` begins them anew unless it resumes.

    Args:
        corrections: As for `regrad.attach`.
        criterion: The cross entropy to correct, with the arguments of
            `torch.nn.functional.cross_entropy`, which is taken where none is given:
            for example a `functools.partial` of it that weights classes.
        restore: Whether a resumed training must go on with the state of its
            corrections; False begins them anew.

    Attributes:
        attachment: The `regrad.Attachment` of the last training, None before.

    Raises:
        ValueError: If no correction of a name is installed or an option is out of range.
        TypeError: If an argument or option is of the wrong type.

    Example:
        >>> callback = RegradCallback([])  # then Trainer(model, …, callbacks=[callback])
        >>> callback.attachment is None
        True
    """

    def __init__(
        self,
        corrections: Sequence[str | regrad.Correction],
        *,
        criterion: Callable[..., Tensor] | None = None,
        restore: bool = True,
    ) -> None:
        if isinstance(corrections, str):
            raise TypeError(
                f"corrections must be a list, got {corrections!r}; write [{corrections!r}]"
            )
        for item in corrections:
            if not isinstance(item, str | regrad.Correction):
                raise TypeError(f"corrections must be names or Correction objects, got {item!r}")
        self.corrections, self._plain, self._restore = (
            [*corrections],
            criterion or F.cross_entropy,
            restore,
        )
        self.attachment: regrad.Attachment | None = None
        self._was_called = False
        self._shift, self._smoothing = False, 0.0
        needed = [c.name for c in self._made() if "criterion" in c.needs.stages]
        self._needed = ", ".join(map(repr, needed))

    def _made(self) -> list[regrad.Correction]:
        """Return new corrections with the options that were asked for."""
        pairs = (
            (item, (item,)) if not isinstance(item, str) else (item, created(item))
            for item in self.corrections
        )
        return [
            c if isinstance(item, str) else type(c)(**vars(c.options))
            for item, made in pairs
            for c in made
        ]

    @property
    def criterion(self) -> Callable[..., Tensor]:
        """The criterion for a `compute_loss_func` of your own; ask for it at every call."""
        self._was_called = True
        return (
            self.attachment.criterion
            if self.attachment is not None and self._needed
            else self._plain
        )

    def compute_loss(
        self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the cross entropy that the model would compute itself; give it to the Trainer as `compute_loss_func`.

        Position i predicts label i + 1 where the model's own loss shifts labels
        (causal language models), its own label otherwise; -100 does not count; the
        Trainer's `label_smoothing_factor` is honoured.

        Args:
            outputs: Of the model, with logits of shape [N, ..., C].
            labels: Class indices, shape [N, ...].
            num_items_in_batch: Labels that count in the whole optimizer step; None
                takes the mean.

        Returns:
            The loss in nats, shape [].

        Raises:
            RegradError: If the labels are no class indices of every position, if the
                model has a loss beside cross entropy, or under `nn.DataParallel`.
        """
        smoothing, shift = self._smoothing, self._shift
        given = (outputs, labels, num_items_in_batch)
        return loss.cross_entropy(self.criterion, *given, shift=shift, label_smoothing=smoothing)

    def add_to(self, trainer: Any) -> None:
        """Add this callback to a Trainer that exists, wire its criterion, and let reporters see the metrics.

        Reporters (`report_to`) come before the callbacks that a Trainer is given. A
        `compute_loss_func` that the Trainer has already stays: it must call
        `criterion`.
        """
        trainer.callback_handler.callbacks.insert(0, _Metrics(self))
        trainer.add_callback(self)
        if self._needed and trainer.compute_loss_func is None:
            trainer.compute_loss_func = self.compute_loss
        self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def detach(self) -> None:
        """Restore the weights and remove every hook: what the end of training does, for use after an exception."""
        if self.attachment is not None:
            self.attachment.detach()

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Learn what loss the model has, so that evaluation without training is right too."""
        self._shift, self._smoothing = loss.shifts_labels(model), float(args.label_smoothing_factor)

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Attach, and restore the corrections' state where training goes on."""
        self.detach()
        model, optimizer = objects["model"], objects["optimizer"]
        self.on_init_end(args, state, control, model=model)
        resumable = args.save_strategy != "no" and not args.save_only_model
        refuse_if(resumable and any(is_sharded(p) for p in model.parameters()), SHARDS)
        groups = innermost_optimizer(optimizer).param_groups
        if not self._restore:
            optimizer_state.take_out(groups)
        is_carried = optimizer_state.carries(groups)
        if state.global_step and self._restore and not is_carried:
            raise RegradError(WITHOUT)
        try:
            self.attachment = regrad.attach(
                model, optimizer, self._made(), self._plain if self._needed else None
            )
        except RegradError as problem:
            if not is_carried:
                raise
            raise RegradError(f"{problem}; {ANEW}") from problem
        self._was_called = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse where a criterion correction is never called: before anything was learnt."""
        if self._needed and not self._was_called:
            self.detach()
        refuse_if(self._needed and not self._was_called, UNWIRED.format(self._needed))

    on_pre_optimizer_step = on_substep_end

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the receipt into the checkpoint; the state is in the optimizer's own file."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        is_ours = args.should_save and not state.is_hyper_param_search and folder.is_dir()
        if self.attachment is not None and is_ours:
            storage.write_receipt(folder, self.attachment.receipt())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add what each correction changed to a log of training, for the history and the callbacks after this."""
        training = logs is not None and ("loss" in logs or "train_loss" in logs)
        if training and self.attachment is not None and f"{PREFIX}steps_applied" not in logs:
            found = {f"{PREFIX}{name}": value for name, value in self.attachment.metrics().items()}
            logs.update(found)
            state.log_history[-1].update(
                found
            )  # the Trainer has copied its logs there before it tells callbacks

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach, and write the receipt beside the checkpoints."""
        self.detach()
        if self.attachment is not None and state.is_world_process_zero:
            storage.write_receipt(Path(args.output_dir), self.attachment.receipt())


class _Metrics(TrainerCallback):
    """Stands before reporters, which log what they are given at once."""

    def __init__(self, callback: RegradCallback) -> None:
        self._callback = callback

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Let the callback add to the log."""
        self._callback.on_log(args, state, control, logs=logs)
