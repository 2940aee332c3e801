import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("one_of_two_processes.py")


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)
def test_two_processes_train_as_one_and_logits_in_parts_are_exact_or_refused(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    commands = [
        [sys.executable, str(SCRIPT), str(rank), str(tmp_path / "rendezvous")] for rank in range(2)
    ]
    processes = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, text=True) for c in commands
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    for output in outputs:
        differences = dict(line.split() for line in output.splitlines())
        assert differences.keys() == {"ddp", "fsdp2", "parts", "refusals"}
        # float64: the mean of two half batches and of the whole round differently
        assert all(float(difference) < 1e-14 for difference in differences.values()), output
