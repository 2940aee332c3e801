"""A tag on the MLflow runs that a script of the user's own starts, while regrad runs the script.

MLflow itself loads this, through an entry point; without the variable nothing is tagged.
"""

from __future__ import annotations

import os

from mlflow.tracking.context.abstract_context import RunContextProvider

VARIABLE = "REGRAD_SCRIPT_RUN"
TAG = "regrad.script_run"


class ScriptContext(RunContextProvider):  # type: ignore[misc]
    """Says which run of a comparison an MLflow run belongs to."""

    def in_context(self) -> bool:
        """Say whether regrad runs this process."""
        return VARIABLE in os.environ

    def tags(self) -> dict[str, str]:
        """Return the tag."""
        return {TAG: os.environ[VARIABLE]}
