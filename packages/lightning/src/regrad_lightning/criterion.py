"""The user's criterion, corrected while the fit lasts."""

import copy
from collections.abc import Sequence
from typing import Any

from regrad import Attachment, Correction
from regrad.errors import RegradError
from torch import nn

HOW = (
    "keep it as self.criterion = nn.CrossEntropyLoss() in __init__, call it in training_step, "
    "and pass criterion='criterion'"
)


class BorrowedCriterion:
    """A loss module of a LightningModule whose forward is replaced until it is given back.

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
        self._held: Any = None
        if name is None:
            _refuse_without_criterion(corrections)
        else:
            self._held = getattr(owner, name, None)
            if not isinstance(self._held, nn.Module):
                raise RegradError(
                    f"criterion must name a loss module of {type(owner).__name__}, "
                    f"got {name!r}; {HOW}"
                )
        self.original = copy.copy(self._held)

    def replace(self, attachment: Attachment) -> None:
        """Let calls of the loss module reach the corrected criterion."""
        if self._held is None:
            return
        corrected = attachment.criterion

        def forward(*arguments: Any, **options: Any) -> Any:
            return corrected(*arguments, **options)

        # A module as attribute would become a submodule, and be in every checkpoint.
        self._held.forward = forward

    def give_back(self) -> None:
        """Let the loss module's forward be its own again."""
        if self._held is not None:
            vars(self._held).pop("forward")


def _refuse_without_criterion(corrections: Sequence[Correction]) -> None:
    """Refuse corrections of the criterion if no criterion is named."""
    names = [repr(c.name) for c in corrections if "criterion" in c.needs.stages]
    if names:
        raise RegradError(f"{', '.join(names)} corrects the criterion; {HOW} to RegradCallback")
