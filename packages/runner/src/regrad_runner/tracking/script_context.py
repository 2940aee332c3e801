"""A tag on the MLflow runs that a script of the user's own starts, while regrad runs the script.

MLflow itself loads this, through an entry point; without the variable nothing is tagged.
"""

from __future__ import annotations

import os

VARIABLE = "REGRAD_SCRIPT_RUN"
TAG = "regrad.script_run"


class ScriptContext:
    """Says which run of a comparison an MLflow run belongs to.

    It has the methods of MLflow's `RunContextProvider` but is none: MLflow loads it while MLflow
    itself is being imported.
    """

    def in_context(self) -> bool:
        """Say whether regrad runs this process."""
        return VARIABLE in os.environ

    def tags(self) -> dict[str, str]:
        """Return the tag."""
        return {TAG: os.environ[VARIABLE]}
