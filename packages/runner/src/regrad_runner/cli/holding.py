"""Folders held while a command writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from regrad_runner.errors import checking_input

if TYPE_CHECKING:
    from regrad_runner.cli.resuming import Resuming
    from regrad_runner.comparing.plan import Planned
    from regrad_runner.training_command import TrainingPlan


@contextmanager
def holding_folder(plan: Planned[Any] | TrainingPlan, resuming: Resuming) -> Iterator[None]:
    """Hold the folder of a plan, which may have changed since it was checked.

    A command that was restarted by itself may find that what it continues is only just ending:
    then it waits.
    """
    from regrad_runner.reporting.report import check_whole  # noqa: PLC0415
    from regrad_runner.results.folder import check_unchanged  # noqa: PLC0415
    from regrad_runner.results.locks import SECONDS_FOR_ORPHANS, writing  # noqa: PLC0415

    def check() -> None:
        check_unchanged(plan.path, plan.config, resume=resuming.continues)
        if resuming.continues:
            check_whole(plan.path)

    if not plan.reports:
        yield
        return
    seconds = SECONDS_FOR_ORPHANS if resuming.is_automatic else 0.0
    with holding(writing(plan.path, seconds=seconds), check):
        yield


@contextmanager
def holding(
    lock: AbstractContextManager[None], check: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold a lock while the block runs; if it is taken, end with one line and write nothing.

    Args:
        lock: From `regrad_runner.results.locks`.
        check: Called with the lock held; what it raises becomes one line too.
    """
    with ExitStack() as held:
        with checking_input():
            held.enter_context(lock)
            if check is not None:
                check()
        yield
