"""Settings that continue a folder."""

from __future__ import annotations

from typing import Any

from regrad_runner.settings.config import ComparisonSettings, Config, Settings

WITHOUT_EFFECT_ON_RESULTS = frozenset(
    {
        "download",
        "workers",
        "tracker",
        "tracking_uri",
        "threads",
        "processes",
        "checkpoint_every",
        "keep_checkpoints",
    }
)


def first_difference(old: Settings, new: Settings) -> str | None:
    """Name the first setting that would change results, with both values; None if there is none."""
    before = old.model_dump(mode="json")
    for name, value in new.model_dump(mode="json").items():
        if name not in WITHOUT_EFFECT_ON_RESULTS and before.get(name) != value:
            return f"{name} {before.get(name)!r} there and {value!r} here"
    return None


def continued(old: Config, new: Config) -> Config:
    """Return settings that continue a folder: `old` with the corrections and seeds that `new` adds.

    Args:
        old: The folder's settings.
        new: What is asked for now.

    Returns:
        `new`, with the corrections of `old` in front, in their order, so that earlier arms and
        controls keep their names.

    Raises:
        ValueError: If `new` leaves out a correction or a seed, or differs in anything else that
            has an effect.
    """
    more: dict[str, Any] = {}
    if isinstance(old, ComparisonSettings) and isinstance(new, ComparisonSettings):
        added = tuple(text for text in new.corrections if text not in old.corrections)
        if set(old.corrections) <= set(new.corrections):
            more["corrections"] = (*old.corrections, *added)
        if new.seeds > old.seeds:
            more["seeds"] = new.seeds
    without_more = new.model_copy(update={name: getattr(old, name) for name in more})
    difference = first_difference(old, without_more)
    if difference:
        raise ValueError(
            f"out must hold the same configuration, got {difference}; choose another folder"
        )
    return new.model_copy(update=more)
