"""The plan of a comparison whose folder was made before, by this command or another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regrad_runner.comparing.plan import Planned, plan_of
from regrad_runner.comparing.script_plan import script_plan_of
from regrad_runner.results.folder import SETTINGS_FILE
from regrad_runner.settings.config import CompareConfig, ComparisonSettings
from regrad_runner.settings.loading import load_config, read_settings
from regrad_runner.settings.script_config import ScriptConfig, comparison_settings_of


def prepared_plan(path: Path, config: ComparisonSettings | None = None) -> Planned[Any]:
    """Return the plan of a prepared folder, of whatever its cells are.

    Args:
        path: The comparison's folder.
        config: Its settings; None to read them from the folder.

    Raises:
        ValueError: If the settings cannot be read, or what is to be trained is not there.
    """
    if config is None:
        file = path / SETTINGS_FILE
        config = load_config(comparison_settings_of(read_settings(file)), file=file, flags={})
    if isinstance(config, ScriptConfig):
        return script_plan_of(path, config)
    if not isinstance(config, CompareConfig):
        raise TypeError(f"config must be of a comparison, got {type(config).__name__}")
    return plan_of(path, config)
