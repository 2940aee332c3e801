"""The other processes of a script: whether they are corrected too."""

from __future__ import annotations

import os

from regrad import RegradError
from torch import distributed

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where launchers tell each process how many there are."""


def were_launched() -> bool:
    """Say whether a launcher started this process and others alike; ask before the script runs."""
    return any(os.environ.get(name, "1") != "1" for name in SIZES)


def refuse_processes_of_its_own(*, launched: bool) -> None:
    """Raise where the script itself started the other processes of its process group.

    Lightning with several devices does: it starts the plain script once more for each. Those train
    uncorrected, and would never answer what corrections ask of every process.

    Args:
        launched: What `were_launched` said before the script ran.

    Raises:
        RegradError: If there are such processes.
    """
    if launched or not distributed.is_available() or not distributed.is_initialized():
        return
    count = distributed.get_world_size()
    if count > 1:
        raise RegradError(
            f"the script started {count} processes by itself, and the others have no corrections; "
            f"start them all with: torchrun --nproc-per-node {count} -m regrad_runner run …"
        )
