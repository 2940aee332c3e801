"""The time that training steps take."""

from __future__ import annotations

import time
from statistics import median

import torch

# The effect meter looks at each of these first steps: they are slower in the arms that have a
# correction.
METERED_STEPS = 20


class StepTimer:
    """A stopwatch for training steps, including the fetching of batches but not evaluations.

    Times are kept lap by lap. A lap is what lies between two evaluations: several steps, because a
    device computes on while the host goes ahead, and only an evaluation waits for it.

    Attributes:
        laps: For each lap that has ended the step that it began after, and its seconds per step.
        lap_seconds: Seconds of the lap under way.
    """

    def __init__(self) -> None:
        self.laps: list[tuple[int, float]] = []
        self.begin_lap(after_step=0)

    def begin_lap(self, *, after_step: int) -> None:
        """Measure from here, where `after_step` steps are done."""
        self.lap_seconds = 0.0
        self._after_step = after_step

    def resume(self) -> None:
        """Let the time run."""
        self._resumed = time.perf_counter()

    def pause(self) -> None:
        """Stop the time, and count what has run since `resume`."""
        self.lap_seconds += time.perf_counter() - self._resumed

    def end_lap(self, *, after_step: int, device: torch.device) -> float:
        """End the lap, begin the next one, and return the seconds of the one that ended.

        Args:
            after_step: Steps that are done, more than at its beginning.
            device: That computed them. It is waited for: what it still has to do belongs to them.
        """
        self.resume()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        self.pause()
        seconds = self.lap_seconds
        self.laps.append((self._after_step, seconds / (after_step - self._after_step)))
        self.begin_lap(after_step=after_step)
        return seconds

    def step_seconds(self) -> float:
        """Return the median over the laps of the seconds per step, 0 before the first lap ended.

        Laps that began while the effect meter looked at every step count only where there are no
        others.
        """
        plain = [seconds for after_step, seconds in self.laps if after_step >= METERED_STEPS]
        if plain:
            return median(plain)
        every = [seconds for _, seconds in self.laps]
        return median(every) if every else 0.0
