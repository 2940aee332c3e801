"""The user's criterion, corrected while the fit lasts."""

import copy
from collections.abc import Sequence
from typing import Any

from regrad import Attachment, Correction
from regrad.errors import refuse_if
from torch import nn

TYPED = "self.criterion = nn.CrossEntropyLoss()"


class BorrowedCriterion:
    """A loss module of a LightningModule whose forward is another until it is given back.

    The module itself stays where it is: its buffers stay in every checkpoint, under their names.

    Args:
        owner: The LightningModule.
        name: The loss module's name in it, or None for none.
        corrections: What is to be attached.

    Attributes:
        original: What to pass to `regrad.attach` as criterion: it shares everything with
            the loss module but the forward.

    Raises:
        RegradError: If there is no such loss module, or a correction needs one and none was named.
    """

    def __init__(
        self, owner: nn.Module, name: str | None, corrections: Sequence[Correction]
    ) -> None:
        lost = ", ".join(
            repr(c.name) for c in corrections if name is None and "criterion" in c.needs.stages
        )
        how = f"keep it as {TYPED} in __init__, call it in training_step, and pass criterion='criterion'"
        refuse_if(lost, f"{lost} corrects the criterion; {how} to RegradCallback")
        self._held: Any = None if name is None else getattr(owner, name, None)
        rule = f"criterion must name a loss module of {type(owner).__name__}, got {name!r}"
        refuse_if(name is not None and not isinstance(self._held, nn.Module), f"{rule}; {how}")
        self.original = copy.copy(self._held)

    def replace(self, attachment: Attachment) -> None:
        """Let calls of the loss module reach the corrected criterion."""
        if self._held is None:
            return
        corrected = attachment.criterion

        def forward(*arguments: Any, **options: Any) -> Any:
            return corrected(*arguments, **options)

        # A module as attribute would become a submodule, and stand in every checkpoint.
        self._held.forward = forward

    def give_back(self) -> None:
        """Let the loss module's forward be its own again."""
        if self._held is not None:
            vars(self._held).pop("forward")
