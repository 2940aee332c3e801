"""Tell an optimizer's outermost `step` from the calls inside it."""

from __future__ import annotations

import sys
from types import FrameType


def caller_of_hook() -> FrameType | None:
    """Return the frame that called the hook which calls this: torch's wrapper around `step`.

    Frames of the compiler between the two are passed over.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
        frame = frame.f_back
    return frame


class StepUnderWay:
    """Tells the outermost `optimizer.step` from a `super().step()` inside of it.

    Torch wraps both, and calls our hooks for both. They are told apart by the frame of torch's
    wrapper: it is gone when a step has raised.
    """

    def __init__(self) -> None:
        self._frame: FrameType | None = None
        self._nested = 0

    def contains(self, frame: FrameType | None) -> bool:
        """Say whether a frame was called, directly or not, by the step under way."""
        while self._frame is not None and frame is not None:
            if frame is self._frame:
                return True
            frame = frame.f_back
        return False

    def begin(self, frame: FrameType | None) -> bool:
        """Note that a step begins in a frame; return whether it is the outermost."""
        if self.contains(frame):
            self._nested += 1
            return False
        self._frame = frame
        self._nested = 0
        return True

    def end(self, frame: FrameType | None) -> bool:
        """Note that a step ends in a frame; return whether it was the outermost."""
        if self._nested and frame is not self._frame:
            self._nested -= 1
            return False
        self._frame = None
        return True
