"""The moments of a training step at which a correction may act.

In time order of one optimizer step::

    setup                    once, at attach
    wrap_criterion           once, at attach
    for every optimizer step:
        predict_weights      before the first training-mode forward
        forward, backward    the user's, once per micro-batch
        correct_gradients    gradients final, weights restored
        correct_moments      right after, just before the update
        optimizer update     the user's
        after_step           the update happened
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from regrad.attachment import Attachment
    from regrad.step import Step

hookspec = pluggy.HookspecMarker("regrad")
hookimpl = pluggy.HookimplMarker("regrad")


class CorrectionSpec:
    """The hooks. A correction implements those of its stages; each may take fewer arguments than named here."""

    @hookspec
    def setup(self, attachment: Attachment) -> None:
        """Build state, or refuse by raising.

        Called once, at attach, after every argument was validated and before any
        hook is on the model. Submodule hooks go through
        `attachment.hook_forward`, so that detach removes them. Draws no global
        random number.
        """

    @hookspec(firstresult=True)
    def wrap_criterion(self, criterion: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
        """Return the criterion to use while the model is in training mode.

        Called at attach on the one correction that owns `criterion`. The
        attachment goes back to the original in evaluation mode and after detach.
        """

    @hookspec(firstresult=True)
    def predict_weights(self, step: Step) -> Sequence[Tensor | None] | None:
        """Return how far to move each parameter before the forward pass.

        Called before the first training-mode forward after an optimizer step.
        One displacement, of the parameter's (local) shape, or None per entry of
        `step.parameters`; None for the whole step moves nothing. The core copies
        the weights, adds the displacements and restores the weights bit for bit.
        May be called again for the same step after an evaluation closed the
        window, and must then return the same numbers.
        """

    @hookspec
    def correct_gradients(self, step: Step) -> None:
        """Change `.grad` in place.

        Called when the gradient is final: accumulated, all-reduced, unscaled;
        the weights are restored. Not called for a step that a scaler skips.
        """

    @hookspec
    def correct_moments(self, step: Step) -> None:
        """Add to optimizer state that the coming update will read.

        Called after every `correct_gradients`, just before the update.
        """

    @hookspec
    def after_step(self, step: Step) -> None:
        """Learn from the step and update own state.

        Called after the update really happened; gradients may be gone.
        """


HOOKS = tuple(name for name in vars(CorrectionSpec) if not name.startswith("_"))
