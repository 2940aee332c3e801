"""pluggy's registry, in which corrections implement hooks by name and observers only wrap them."""

from collections.abc import Callable, Sequence
from typing import Any

import pluggy

from regrad.correction import HOOK_OF_STAGE, Correction
from regrad.errors import RegradError
from regrad.hookspecs import HOOKS, CorrectionSpec

PLACING = ("wrapper", "hookwrapper", "tryfirst", "trylast")
Callers = dict[str, list[tuple[Correction, Callable[..., Any]]]]


class HookRegistry(pluggy.PluginManager):
    """Holds the corrections and observers of one attachment.

    Args:
        corrections: In acting order.
    """

    def __init__(self, corrections: Sequence[Correction]) -> None:
        super().__init__("regrad")
        self.add_hookspecs(CorrectionSpec)
        for correction in corrections:
            self.register(correction, correction.name)
        self.check_pending()

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Return the options of one implementation.

        Raises:
            RegradError: If a correction marks its place, or an observer is not a wrapper.
        """
        marked: Any = super().parse_hookimpl_opts(plugin, name)
        placing = [option for option in PLACING if marked and marked[option]]
        if isinstance(plugin, Correction):
            if placing:
                raise RegradError(
                    f"{plugin!r} must not mark {name!r} with {placing}; declare before or after"
                )
            is_unmarked_hook = marked is None and name in HOOKS
            return {} if is_unmarked_hook else marked
        if marked and "wrapper" not in placing:
            raise RegradError(f"{plugin!r} must mark {name!r} with wrapper=True")
        return marked

    def callers(self, corrections: Sequence[Correction]) -> Callers:
        """Return by hook what calls each correction alone, in acting order.

        A broadcast would lose whose result is whose, and its order would depend on the order of
        registration.
        """
        callers: Callers = {hook: [] for hook in HOOKS}
        for correction in corrections:
            others = [other for other in corrections if other is not correction]
            for hook in _hooks_of(correction):
                caller = self.subset_hook_caller(hook, others)
                callers[hook].append((correction, caller))
        return callers


def _hooks_of(correction: Correction) -> list[str]:
    """Return the hooks that a correction implements for its stages, in time order."""
    acting = {"setup", "after_step", *(HOOK_OF_STAGE[stage] for stage in correction.needs.stages)}
    return [hook for hook in HOOKS if hook in acting and hasattr(correction, hook)]
