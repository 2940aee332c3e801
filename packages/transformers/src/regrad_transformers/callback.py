"""The callback that attaches corrections when a Trainer begins to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import regrad
from regrad import optimizer_state
from regrad.errors import RegradError
from regrad.inside import CrossEntropyInside
from regrad.module_hooks import add_hook
from regrad.registry import as_list, create_all
from regrad.sharding import is_sharded
from regrad.wrappers import innermost_module, innermost_optimizer
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from regrad_transformers import loss, storage

PREFIX = "regrad/"
ANEW = "RegradCallback(…, restore=False) resets the corrections"
WITHOUT = f"checkpoint must come from training with corrections, got one without; {ANEW}"
SHARDS = (
    "checkpoints must not be sharded, because this callback cannot save their corrections; "
    "pass save_strategy='no' or save_only_model=True"
)
NO_CROSS_ENTROPY = (
    "{} corrects cross entropy, and the first training batch had none that it could reach: if the "
    "model is compiled, or returns no loss, pass Trainer(…, callbacks=[callback], "
    "compute_loss_func=callback.compute_loss); if the loss is another one (regression, several "
    "labels per row, a fused one), leave {} out, or call callback.criterion in a "
    "compute_loss_func of your own"
)
NEEDS_WIRE = (
    "{} corrects cross entropy, and the Trainer computes {} beside the model; pass Trainer(…, "
    "callbacks=[callback], compute_loss_func=callback.compute_loss), or callback.add_to(trainer)"
)
ONE_MICRO_BATCH = (
    "compute_loss must know how many micro-batches the Trainer divides the loss of {} by, "
    f"and it does not; {loss.INSIDE}"
)


class RegradCallback(TrainerCallback):
    """Attach corrections when a `transformers.Trainer` begins to train, and detach at the end.

    A correction of the criterion acts on every cross entropy that the model computes
    in its own training forward, so in everything else the loss stays the model's own. The
    corrections' state is in every checkpoint, inside the optimizer's (`optimizer.pt`), and is
    restored by `train(resume_from_checkpoint=…)`; a readable receipt is beside it (`regrad.json`).
    What each correction actually changed is in the Trainer's logs, under "regrad/". Corrections act
    on gradients that are accumulated, averaged over processes and clipped by `max_grad_norm`. Every
    `train()` resets them unless it resumes.

    Args:
        corrections: As for `regrad.attach`.
        criterion: A cross entropy for `compute_loss` to take in place of the model's
            own, with the arguments of `torch.nn.functional.cross_entropy`: for
            example a `functools.partial` of it that weights classes.
        restore: Whether a resumed training must go on with the state of its
            corrections; False resets them.

    Attributes:
        attachment: The `regrad.Attachment` of the last training, None before.

    Raises:
        ValueError: If no correction of that name is installed or an option is out of range.
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
        self.corrections = as_list(corrections)
        self._has_own_criterion = criterion is not None
        self._plain: Callable[..., Tensor] = criterion or F.cross_entropy
        self._restore = restore
        self.attachment: regrad.Attachment | None = None
        self._was_called = False
        self._model: Any = None
        self._smoothing = 0.0
        self._micro_batches = 1
        self._inside: CrossEntropyInside | None = None
        self._target: loss.Target | None = None
        self._shifts: bool | None = None
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._input_handle: Any = None
        needed = [c.name for c in self._made() if "criterion" in c.needs.stages]
        self._needed = ", ".join(map(repr, needed))

    def _made(self) -> list[regrad.Correction]:
        """Return new corrections with the requested options."""
        given = create_all(self.corrections)
        return [type(correction)(**vars(correction.options)) for correction in given]

    @property
    def criterion(self) -> Callable[..., Tensor]:
        """The criterion for a `compute_loss_func` of your own; ask for it at every call."""
        self._was_called = True
        if self.attachment is not None and self._needed:
            return self.attachment.criterion
        return self._plain

    def compute_loss(
        self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the cross entropy that the Trainer would use: give it as `compute_loss_func`.

        For what is computed beside the model: `label_smoothing_factor`, or a
        `criterion` of your own. The model's target is learnt from the first training
        batch, where the model is asked for its own loss once more.

        Args:
            outputs: Of the model, with logits of shape [N, ..., C].
            labels: Class indices, shape [N, ...]; -100 does not count.
            num_items_in_batch: Labels that count in the whole optimizer step; None uses the mean.

        Returns:
            The loss in nats, shape [].

        Raises:
            RegradError: If the labels are not class indices for every position, if the
                model's own loss is anything but their cross entropy, or under
                `nn.DataParallel`.
        """
        target = self._target
        if target is None:
            target = self._learn_target(labels, num_items_in_batch)
        return loss.cross_entropy(
            self.criterion,
            outputs,
            labels,
            num_items_in_batch if target.counts else None,
            shift=target.shift,
            label_smoothing=self._smoothing,
        )

    def _learn_target(self, labels: Any, items: Tensor | int | None) -> loss.Target:
        """Return what the Trainer would compare logits with, kept once a training batch told."""
        if self._inside is not None:  # the loss is computed here
            self._inside.remove()
            self._inside = None
        inputs, self._inputs = self._inputs, None
        target: loss.Target | None = None
        if self._smoothing:
            target = loss.smoothed_target(self._model)
        elif inputs is not None and isinstance(labels, Tensor):
            target = loss.own_target(self._model, *inputs, labels)
        if target is None:
            if self._shifts is None:
                self._shifts = loss.shifts_labels(self._model)
            has_positions = isinstance(labels, Tensor) and labels.dim() > 1
            target = loss.Target(self._shifts and has_positions, counts=True)
        if inputs is None:  # an evaluation
            return target
        divides = items is not None and self._micro_batches > 1 and not target.counts
        if divides and not loss.accepts_loss_kwargs(self._model):
            raise RegradError(ONE_MICRO_BATCH.format(type(self._model).__name__))
        self._target = target
        return target

    def _keep_inputs(self, module: Any, arguments: Any, inputs: Any) -> None:
        """Keep what the first training forward is given, until the target is known."""
        if module.training:
            self._inputs = (arguments, inputs)
            self._input_handle.remove()

    def add_to(self, trainer: Any) -> None:
        """Add this callback to a Trainer that exists, and let reporters see the metrics.

        Reporters (`report_to`) come before the callbacks that a Trainer is given. The
        Trainer's label smoothing is corrected too, and a `criterion` of this callback
        becomes its `compute_loss_func`. If the Trainer already has one, it is kept and must call
        `criterion`.
        """
        trainer.callback_handler.callbacks.insert(0, _Metrics(self))
        trainer.add_callback(self)
        if self._needed and trainer.compute_loss_func is None:
            if self._has_own_criterion:
                trainer.compute_loss_func = self.compute_loss
            elif trainer.label_smoother is not None:
                trainer.label_smoother = self._smoothed_loss
        self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def _smoothed_loss(
        self,
        outputs: Any,
        labels: Any,
        shift_labels: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Stand in for the Trainer's `LabelSmoother`."""
        return loss.cross_entropy(
            self.criterion,
            outputs,
            labels,
            num_items_in_batch,
            shift=shift_labels,
            label_smoothing=self._smoothing,
        )

    def detach(self) -> None:
        """Restore the weights and remove every hook, as the end of training does.

        For use after an exception.
        """
        if self._input_handle is not None:
            self._input_handle.remove()
        if self.attachment is not None:
            self.attachment.detach()

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Note the model and its settings, so that evaluation without training is correct too."""
        self._model = None if model is None else innermost_module(model)
        self._target = None
        self._inputs = None
        self._shifts = None
        self._smoothing = float(args.label_smoothing_factor)
        self._micro_batches = args.gradient_accumulation_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Attach, and restore the corrections' state if training resumes."""
        self.detach()
        model = objects["model"]
        optimizer = objects["optimizer"]
        self.on_init_end(args, state, control, model=model)
        resumable = args.save_strategy != "no" and not args.save_only_model
        if resumable and any(is_sharded(p) for p in model.parameters()):
            raise RegradError(SHARDS)
        groups = innermost_optimizer(optimizer).param_groups
        if not self._restore:
            optimizer_state.take_out(groups)
        is_carried = optimizer_state.carries(groups)
        if state.global_step and self._restore and not is_carried:
            raise RegradError(WITHOUT)
        criterion = self._plain if self._needed else None
        try:
            self.attachment = regrad.attach(model, optimizer, self._made(), criterion)
        except RegradError as problem:
            if not is_carried:
                raise
            raise RegradError(f"{problem}; {ANEW}") from problem
        self._watch(self.attachment)
        self._was_called = False

    def _watch(self, attachment: regrad.Attachment) -> None:
        """Correct the loss inside the model, and keep what `compute_loss` needs."""
        model = attachment.model
        acts_inside = self._needed and not self._has_own_criterion
        self._inside = CrossEntropyInside(attachment) if acts_inside else None
        self._input_handle = add_hook(
            model, model.register_forward_pre_hook, self._keep_inputs, with_kwargs=True
        )

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise if there is no cross entropy to correct, before any step is taken."""
        self._inputs = None  # a batch is large
        if not self._needed or self._was_called or (self._inside and self._inside.calls):
            return
        self.detach()
        if self._smoothing or self._has_own_criterion:
            what = "label_smoothing_factor" if self._smoothing else "a criterion of your own"
            raise RegradError(NEEDS_WIRE.format(self._needed, what))
        raise RegradError(NO_CROSS_ENTROPY.format(self._needed, self._needed))

    on_pre_optimizer_step = on_substep_end

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the receipt into the checkpoint; the state is in the optimizer's own file."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        is_ours = args.should_save and not state.is_hyper_param_search and folder.is_dir()
        if self.attachment is not None and is_ours:
            storage.write_receipt(folder, self.attachment.receipt())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add what each correction changed to a log of training, and to the history."""
        is_training = logs is not None and ("loss" in logs or "train_loss" in logs)
        if not is_training or self.attachment is None or f"{PREFIX}steps_applied" in logs:
            return
        found = {f"{PREFIX}{name}": value for name, value in self.attachment.metrics().items()}
        logs.update(found)
        # The Trainer has copied its logs there before it tells callbacks.
        state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach, and write the receipt beside the checkpoints."""
        self.detach()
        if self.attachment is not None and state.is_world_process_zero:
            storage.write_receipt(Path(args.output_dir), self.attachment.receipt())


class _Metrics(TrainerCallback):
    """Comes before reporters, which immediately log what they are given."""

    def __init__(self, callback: RegradCallback) -> None:
        self._callback = callback

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Let the callback add to the log."""
        self._callback.on_log(args, state, control, logs=logs)
