"""Train runs that are killed again and again until they are done, and print as JSON what every kill hit.

Usage: python kills.py FOLDER SEED RUNS KILLS CORRECTION...

FOLDER/whole is trained without a kill, FOLDER/killed-0 … with KILLS kills each (SIGKILL: nothing can catch it), at
moments drawn from SEED: how many steps, evaluations, savings (what is to be saved is collected, then written) or
loadings into a life, and how far into that one.

Lives are forked from this process, which has imported everything and computed nothing, because importing takes
longer than the rest of a life. A forked life is as good as a fresh process: it inherits modules and no run, no
model, no computing thread and no open file (threads are checked), the kernel ends it as any other process, and what
it wrote to the folder is all that the next life gets. `test_chaos.py` kills one fresh process too.
"""

import io
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from statistics import median

import regrad
import sklearn.datasets  # noqa: F401 - what the workload imports late
from regrad_runner import training_command as module
from regrad_runner.checkpoints import checkpoint
from regrad_runner.reporting.progress import Display
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.run import TrainingRun
from rich.console import Console

SETTINGS = {
    **{
        "epochs": 15,
        "train_size": 100,
        "batch_size": 25,
        "width": 4,
        "threads": 1,
        "evaluations_per_epoch": 2,
    },
    **{"tracker": "none", "checkpoint_every": 1},
}
ALLOCATORS = {
    "jemalloc_bg_thd"
}  # pyarrow's, which comes with scikit-learn; jemalloc itself cares for forks
KINDS = {"s": "step", "e": "evaluation", "c": "collecting", "w": "saving", "l": "loading"}


def announced(function, kind, pipe):
    """Return the function, with a letter sent when it begins and a capital when it has ended."""

    def announcing(*args, **kwargs):
        os.write(pipe, kind.encode())
        result = function(*args, **kwargs)
        os.write(pipe, kind.upper().encode())
        return result

    return announcing


def live(folder, corrections, pipe):
    """Train in this process, from the latest checkpoint if there is one."""
    TrainingRun._micro_batch = announced(TrainingRun._micro_batch, "s", pipe)
    TrainingRun.value_on = announced(TrainingRun.value_on, "e", pipe)
    module.save_checkpoint = announced(
        module.save_checkpoint, "c", pipe
    )  # what is to be saved, and then
    checkpoint.write_checkpoint = announced(checkpoint.write_checkpoint, "w", pipe)  # its files
    module.load_latest = announced(module.load_latest, "l", pipe)
    resume = (folder / "config.yaml").is_file()
    plan = module.make_training_plan(
        TrainConfig(**SETTINGS, corrections=corrections), out=folder, resume=resume
    )
    module.train(plan, Display(Console(file=io.StringIO()), runs=1))


def start(folder, corrections):
    """Fork a life; return its process and the end of the pipe that hears of it."""
    threads = sorted(
        (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()
    )
    computing = set(threads) - ALLOCATORS
    if len(threads) > 2 or len(computing) != 1:
        raise RuntimeError(f"threads must not be forked, got {threads}")
    hears, tells = os.pipe()
    process = os.fork()
    if process:
        os.close(tells)
        return process, hears
    try:
        live(folder, corrections, tells)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(process):
    """Wait for a process; raise unless it ended well or by our signal. Return whether it ended well."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"life must end well or by the kill, got exit code {status}")
    return status == 0


def train_whole(folder, corrections):
    """Train without a kill; return how long a moment of each kind takes, in seconds."""
    process, hears = start(folder, corrections)
    begun, seconds = {}, {kind: [] for kind in KINDS}
    while letter := os.read(hears, 1).decode():
        if letter in KINDS:
            begun[letter] = time.perf_counter()
        else:
            seconds[letter.lower()].append(time.perf_counter() - begun[letter.lower()])
    os.close(hears)
    if not ended(process):
        raise RuntimeError("the run without a kill was killed")
    usual = {kind: median(times) for kind, times in seconds.items()}
    return {**usual, "l": usual["w"]}  # there was nothing to load


def kill_once(folder, corrections, *, kind, count, delay):
    """Train until the `count`-th moment of a kind, and kill `delay` seconds into it. Return what was hit, if any."""
    process, hears = start(folder, corrections)
    heard = ""
    while heard.count(kind) < count:
        letter = os.read(hears, 1).decode()
        if not letter:  # it came to its end first
            os.close(hears)
            ended(process)
            return None
        heard += letter
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    while more := os.read(hears, 1000).decode():
        heard += more
    os.close(hears)
    if ended(process):
        return None
    last = heard[-1]
    left = any((folder / "checkpoints").glob(".step-*"))
    return {"aimed": KINDS[kind], "hit": KINDS.get(last, "between"), "left_half": left}


def train_killed(folder, corrections, *, kills, moments, durations):
    """Train with so many kills, then to the end."""
    kinds = (list(KINDS) * kills)[:kills]
    moments.shuffle(kinds)
    hits = []
    for kind in kinds:
        count = 1 if kind == "l" else moments.randint(1, 4)
        hit = kill_once(
            folder, corrections, kind=kind, count=count, delay=moments.uniform(0, durations[kind])
        )
        hits += [hit] if hit else []
    process, hears = start(folder, corrections)
    while os.read(hears, 1000):
        pass
    os.close(hears)
    if not ended(process):
        raise RuntimeError("the last life was killed by somebody else")
    return hits


def main(folder, seed, runs, kills, *corrections):
    for name in corrections:
        regrad.load(name.partition(":")[0])
    moments = random.Random(int(seed))
    durations = train_whole(Path(folder, "whole"), corrections)
    hits = []
    for run in range(int(runs)):
        path = Path(folder, f"killed-{run}")
        hits.append(
            train_killed(path, corrections, kills=int(kills), moments=moments, durations=durations)
        )
    sys.stdout.write(
        json.dumps({"seconds": {KINDS[kind]: s for kind, s in durations.items()}, "hits": hits})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
