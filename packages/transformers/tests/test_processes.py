import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from regrad_transformers import RegradCallback

SCRIPT = Path(__file__).with_name("one_of_two_processes.py")
CORRECTIONS = ["xgrad", "powergrad", "agc", "adanorm"]


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="two processes are made by a fork")
def test_two_processes_train_like_one_resume_to_the_same_bits_and_refuse_checkpoints_of_shards(
    make_trainer, tmp_path
):
    callback = RegradCallback(CORRECTIONS)
    trainer = make_trainer([callback])
    trainer.train()
    torch.save(trainer.model.state_dict(), tmp_path / "alone.pt")

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, str(SCRIPT), free_port(), str(tmp_path), str(tmp_path / "alone.pt")]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert process.wait(timeout=280) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for rank in range(2):
        seen = dict(
            line.split(" ", 1)
            for line in (tmp_path / f"seen-by-{rank}.txt").read_text().splitlines()
        )
        assert seen["wrapped"] == "DistributedDataParallel"
        # float32: gradients are added in another order, and Adam divides by small second moments
        assert float(seen["from_one_process"]) < 1e-5
        assert float(seen["after_resuming"]) == 0
        assert "checkpoints must not be of shards" in seen["shards"]
        assert "save_strategy='no'" in seen["shards"]
    assert (tmp_path / "regrad.json").is_file()
