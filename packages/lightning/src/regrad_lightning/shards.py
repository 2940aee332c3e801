"""The corrections' state of shards: each process has a part of it, and the first writes all."""

from typing import Any

from regrad import Attachment
from regrad.errors import RegradError
from torch import distributed


def state_of(attachment: Attachment) -> Any:
    """Return the state; of shards a list, by rank. Call it on every process then."""
    state = attachment.state_dict()
    if not attachment.engine.is_sharded():
        return state
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, state)
    return parts


def load_state(attachment: Attachment, state: Any, *, strict: bool) -> None:
    """Restore what `state_of` returned.

    Raises:
        RegradError: If the weights were cut for another number of processes, or if
            `strict` and corrections or options differ.
    """
    then = len(state) if isinstance(state, list) else 0
    now = distributed.get_world_size() if attachment.engine.is_sharded() else 0
    if then != now:
        rule = "be of whole weights"
        if now:
            rule = f"come from {now} processes with shards"
        got = "of whole weights"
        if then:
            got = f"of {then} processes with shards"
        raise RegradError(
            f"the state must {rule}, got that {got}; resume in the form it was saved in"
        )
    own = state[distributed.get_rank()] if then else state
    attachment.load_state_dict(own, strict=strict)
