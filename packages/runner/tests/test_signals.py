import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from regrad_runner import signals as stopping
from regrad_runner.checkpoints.folder import checkpoints, read_checkpoint
from regrad_runner.signals import Terminated

SMALL = [
    "--train-size",
    "100",
    "--batch-size",
    "20",
    "--width",
    "4",
    "--epochs",
    "2",
    "--norm",
    "group",
]
# Rank 1 alone hears Ctrl-C, in the middle of its third step.
CTRL_C_AT_ONE_PROCESS = """
import os, signal, sys
from regrad_runner.tracking import projector
from regrad_runner.cli.main import main
from regrad_runner.training.run import TrainingRun
original = TrainingRun._micro_batch
def step(self, images, labels):
    if self.position.step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)
    original(self, images, labels)
TrainingRun._micro_batch = step
projector.SECONDS_AT_THE_END = 600.0
sys.exit(main(sys.argv[1:]))
"""


def on_two_processes(code, words, folder):
    """Run a program as a launcher does, on two processes; return exit code and stderr of each."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
    clean |= {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    clean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env={**clean, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=1000)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ctrl_c_at_one_of_two_processes_saves_once_and_ends_both_as_killed_with_code_130(tmp_path):
    (first, said), (second, heard) = on_two_processes(
        CTRL_C_AT_ONE_PROCESS, ["train", *SMALL, "--processes", "2", "--out", "out"], tmp_path
    )
    assert (first, second) == (130, 130), said + heard
    assert "stopping after this step; once more leaves at once" in heard
    assert "stopped; to continue from here: regrad train --resume --out out" in said
    assert "Traceback" not in said + heard
    (path,) = checkpoints(tmp_path / "out" / "checkpoints")
    content = read_checkpoint(path)
    assert (path.name, content.state["step"], content.state["processes"]) == ("step-00000003", 3, 2)
    with closing(sqlite3.connect(tmp_path / "out" / "mlflow.db")) as database:
        assert database.execute("select name, status from runs").fetchall() == [("out", "KILLED")]


def test_all_act_on_the_signal_that_any_of_them_got():
    with pytest.raises(Terminated), stopping.stops_after_steps(lambda own: max(own, 15)):
        assert stopping.asked_to_stop() == 15
        stopping.stop(15)
    assert stopping.stopped_together()
    with stopping.stops_after_steps():
        stopping.stop(stopping.asked_to_stop())
    assert not stopping.stopped_together()


def test_a_signal_that_another_process_got_in_the_last_step_ends_this_one_too():
    with pytest.raises(KeyboardInterrupt), stopping.stops_after_steps(lambda own: max(own, 2)):
        pass


def test_only_ctrl_c_acts_at_once_when_it_comes_again():
    with stopping.stoppable(), pytest.raises(SystemExit) as end, stopping.stops_after_steps():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)  # as a scheduler and a launcher may
    assert end.value.code == 128 + signal.SIGUSR1
    with (
        stopping.stoppable(),
        pytest.raises(stopping.LeftAtOnce),
        stopping.stops_after_steps(),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_exit_code_says_which_signal_came(number):
    with pytest.raises(Terminated) as end, stopping.stoppable():
        os.kill(os.getpid(), number)
        pytest.fail("it went on")
    assert end.value.code == 128 + number
