"""The callback: attach when a fit starts, detach when it ends, be in every checkpoint."""

import json
import posixpath
import secrets
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from regrad import Attachment, Correction, attach, layouts, optimizer_state, refusals
from regrad.errors import RegradError
from regrad.registry import as_list, create_all
from regrad.wrappers import holder_of_all, optimizer_layers
from torch import nn
from torch.optim import Optimizer

from regrad_lightning import shards
from regrad_lightning.criterion import BorrowedCriterion


class RegradCallback(Callback):
    """Correct gradients in `Trainer.fit`; the LightningModule is not changed.

    Attached from the start of a fit to its end, even if it ends in an exception.
    Validation and checkpoints see the true weights. The corrections' state is in
    every checkpoint, inside the optimizer's, and is restored by
    `fit(ckpt_path=…)`. Their metrics go to the
    trainer's loggers under "regrad/" every `log_every_n_steps`; the receipt is written beside the
    logs as "regrad-receipt.json".

    Args:
        corrections: Names with options for `regrad.create`, or `Correction`
            objects, in the order in which they act. May be empty.
        module: Name of the submodule that makes the outputs, such as "net"; names
            of parameters are those within it. None takes the LightningModule's only child with
            parameters, or itself if there are several.
        criterion: Name of the LightningModule's loss module, such as
            "criterion", if a correction corrects the criterion. Calls of it in training mode are
            corrected until the fit ends.
        optimizer: Index of the optimizer, from 0, if `configure_optimizers` returns several; use
            one callback for each that is to be corrected.
        strict: Refuse to resume from a checkpoint without these corrections and
            options; False resumes with whatever has the same name.

    Attributes:
        attachment: The `regrad.Attachment` of the current fit or, detached, of the last one; None
            before the first.

    Raises:
        ValueError: If no correction of that name is installed or an option is out of range.
        TypeError: If an argument or option is of the wrong type.
        RegradError: At the start of a fit, if a correction cannot work correctly there, or
            `module`, `criterion` or `optimizer` does not fit; the message says what does.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = RegradCallback([])
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        corrections: Sequence[str | Correction],
        *,
        module: str | None = None,
        criterion: str | None = None,
        optimizer: int | None = None,
        strict: bool = True,
    ) -> None:
        self.corrections = as_list(corrections)
        self.module = module
        self.criterion = criterion
        self.optimizer = optimizer
        self.strict = strict
        self.attachment: Attachment | None = None
        self._borrowed: BorrowedCriterion | None = None
        self._loaded: Any = None
        self._kept: Any = None
        self._folder = ""
        # A misspelt name or option is an error here, not after an hour in a queue.
        create_all(self.corrections)

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: callbacks of several optimizers have one each."""
        return "RegradCallback" if self.optimizer is None else f"RegradCallback-{self.optimizer}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier run loaded: a checkpoint's state, if any, comes after this."""
        self._loaded = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state in a checkpoint's optimizer; refuse to resume if there is none."""
        if trainer.state.fn != "fit" or self.state_key in checkpoint["callbacks"]:
            return
        saved = checkpoint.get("optimizer_states", [])[self.optimizer or 0 :]
        self._loaded = saved[0].get(optimizer_state.KEY) if saved else None
        if self._loaded is None and self.strict:
            raise RegradError(
                f"the checkpoint must hold the state of {self.corrections}, got none; pass "
                "strict=False to RegradCallback to reset them"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state: Lightning restores callbacks before there are optimizers."""
        self._loaded = state_dict["attachment"]

    def state_dict(self) -> dict[str, Any]:
        """Return the corrections' state if no optimizer's state holds all of it, else nothing.

        That is the case for shards, and for the last fit if none is under way; None before the
        first.
        """
        live = self._live()
        if live is None:
            return {"attachment": self._kept}
        return {"attachment": shards.state_of(live)} if live.engine.is_sharded() else {}

    def _live(self) -> Attachment | None:
        return None if self.attachment is None or self.attachment.is_detached else self.attachment

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach before the first forward."""
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach if there was no sanity check."""
        if self._live() is None:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: optimizers are made and restored, and nothing was called yet.

        Not earlier: torch steps an optimizer of shards to restore it, and a search for
        the rate trains in between.
        """
        optimizer = self._chosen(trainer.optimizers)
        made = create_all(self.corrections)
        # The wrapper is what says how the weights lie; the target alone would look unwrapped.
        wrapped: Any = trainer.strategy.model
        layout = layouts.choose(wrapped, optimizer)
        target = self._target(pl_module)
        if isinstance(layout, layouts.FlatLayout):
            # FSDP1 keeps the weights, and its hooks, in the outermost module.
            target = wrapped
        outside = _outside(optimizer, target)
        if outside:
            raise RegradError(
                "module must hold every parameter that the optimizer trains, "
                f"{self.module!r} lacks {outside} parameters"
            )
        borrowed = BorrowedCriterion(pl_module, self.criterion, made)
        layers = optimizer_layers(optimizer)
        refusals.check([wrapped], layers, made, borrowed.original)
        refusals.check_layout(made, layout)
        optimizer_state.take_out(holder_of_all(layers).param_groups)  # the same as in self._loaded
        self.attachment = attach(target, optimizer, made, borrowed.original)
        borrowed.replace(self.attachment)
        self._borrowed = borrowed
        self._kept = None
        # This asks all processes, so it is not left for an exception.
        self._folder = trainer.log_dir or trainer.default_root_dir
        if self._loaded is not None:
            shards.load_state(self.attachment, self._loaded, strict=self.strict)

    def _chosen(self, optimizers: Sequence[Optimizer]) -> Optimizer:
        """Return the optimizer to attach to."""
        index = self.optimizer
        if index is None and len(optimizers) == 1:
            index = 0
        if index is None or index not in range(len(optimizers)):
            raise RegradError(
                f"optimizer must be an index below {len(optimizers)}, got {self.optimizer!r}; "
                "use one RegradCallback for each optimizer that is to be corrected"
            )
        return optimizers[index]

    def _target(self, pl_module: LightningModule) -> nn.Module:
        """Return the module to attach to: `training_step` may call a child alone."""
        children = {
            name: child
            for name, child in pl_module.named_children()
            if _has_parameters(child, recurse=True)
        }
        if self.module is None:
            has_one_child = len(children) == 1 and not _has_parameters(pl_module, recurse=False)
            return next(iter(children.values())) if has_one_child else pl_module
        modules: dict[str, nn.Module] = dict(pl_module.named_modules())
        if self.module not in modules:
            raise RegradError(
                f"module must name a submodule of {type(pl_module).__name__}, "
                f"got {self.module!r}; it has {', '.join(children)}"
            )
        return modules[self.module]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the window: `training_step` need not call the module that is attached."""
        if (live := self._live()) is not None:
            live.engine.prepare_forward(live.model)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after a step, when Lightning logs; raise if a correction saw no forward."""
        if (live := self._live()) is None:
            return
        self._refuse_blindness(live)
        is_after_a_step = live.engine.forwards == 0
        logs_now = trainer.loggers and trainer._logger_connector.should_update_logs
        if is_after_a_step and logs_now:
            prefix = "regrad" if self.optimizer is None else f"regrad/{self.optimizer}"
            pl_module.log_dict({f"{prefix}/{key}": value for key, value in live.metrics().items()})

    def _refuse_blindness(self, live: Attachment) -> None:
        """Raise if corrections record forwards and a step was taken without any."""
        if live.record is None or live.record.calls or not live.engine.applied:
            return
        names = ", ".join(c.name for c in live.engine.corrections if c.needs.record)
        raise RegradError(
            f"{names} must attach to the module that training_step calls, got no forward of "
            f"{self.module or 'the LightningModule'}; name it with module='…'"
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the true weights, also in the middle of an accumulation."""
        if (live := self._live()) is not None:
            live.engine.close_window()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the receipt and detach."""
        if (live := self._live()) is not None:
            self._kept = shards.state_of(live)
        self._end(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the weights, leave the receipt and detach."""
        live = self._live()
        # Of shards other processes would have to answer, which may be gone.
        if live is not None and not live.engine.is_sharded():
            self._kept = live.state_dict()
        self._end(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach if a fit ended after its sanity check."""
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if (live := self._live()) is None:
            return
        receipt = live.receipt()
        live.detach()
        if self._borrowed is not None:
            self._borrowed.give_back()
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self._write(receipt)

    def _write(self, receipt: Any) -> None:
        """Write the receipt beside the logs, on whatever file system they are."""
        name = "regrad-receipt.json"
        if self.optimizer is not None:
            name = f"regrad-receipt-{self.optimizer}.json"
        files = get_filesystem(self._folder)
        files.makedirs(self._folder, exist_ok=True)
        # Renamed, so that a link of that name is replaced, not followed; nor does "x" follow one.
        aside = posixpath.join(self._folder, f".{name}.{secrets.token_hex(8)}.part")
        with files.open(aside, "x") as file:
            json.dump(receipt, file, indent=2)
        files.mv(aside, posixpath.join(self._folder, name))


def _outside(optimizer: Optimizer, module: nn.Module) -> int:
    """Return how many of the optimizer's parameters are not in `module`."""
    own = set(module.parameters())
    outside = 0
    for group in optimizer.param_groups:
        outside += sum(parameter not in own for parameter in group["params"])
    return outside


def _has_parameters(module: nn.Module, *, recurse: bool) -> bool:
    """Say whether a module has parameters, those of its children counted with `recurse`."""
    return any(True for _ in module.parameters(recurse=recurse))
