"""What Ctrl-C, SIGTERM and SIGUSR1 end, and how to continue from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames
from typing import TYPE_CHECKING

from regrad_runner.signals import stoppable, stopped_together

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def going_on(console: Console, again: str, *, quiet: bool) -> Iterator[None]:
    """Let signals that stop end current runs as killed, and say how to continue.

    Args:
        console: To print on.
        again: Command that continues from here.
        quiet: Whether nothing is said.
    """
    try:
        with stoppable():
            yield
    except (KeyboardInterrupt, SystemExit) as end:
        if not quiet:
            console.print(
                f"stopped; to continue from here: {again}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        if stopped_together():
            # Imported here, because it imports torch.
            from regrad_runner.training.processes import destroy_process_group  # noqa: PLC0415

            clear_frames(end.__traceback__)  # they hold the model
            destroy_process_group()
        raise
