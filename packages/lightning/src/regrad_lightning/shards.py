"""The corrections' state where the weights are shards: each process has a part of it, and the first one writes all."""

from typing import Any

from regrad import Attachment
from regrad.errors import refuse_if
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
    """Take back what `state_of` returned.

    Raises:
        RegradError: If the weights were cut for another number of processes, or if `strict` and corrections or
            options differ.
    """
    then = len(state) if isinstance(state, list) else 0
    now = distributed.get_world_size() if attachment.engine.is_sharded() else 0
    rule = (
        f"the state must come from {now} processes with shards"
        if now
        else "the state must be of whole weights"
    )
    got = f"got that of {then} processes with shards" if then else "got that of whole weights"
    refuse_if(then != now, f"{rule}, {got}; resume as it was saved")
    attachment.load_state_dict(state[distributed.get_rank()] if then else state, strict=strict)
