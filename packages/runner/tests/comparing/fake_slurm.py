"""A SLURM of one machine, for tests: sbatch, srun, squeue, scancel, scontrol and sacct in one file.

`install` writes each as a program that calls this file. What SLURM knows lies in a folder: a file
per task while it is in the queue, and one that says how it ended.
"""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sacct")


def install(folder: Path) -> Path:
    """Write the programs and return the folder to put into the PATH."""
    place = folder / "slurm" / "bin"
    place.mkdir(parents=True)
    for name in PROGRAMS:
        program = place / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        program.chmod(0o755)
    return place


def known() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def options_in(script: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), flags=re.MULTILINE)
    return {name: value.strip("'") for name, value in found}


def sbatch(words: list[str]) -> int:
    if (refusal := known() / "refusal").exists():
        sys.stderr.write(refusal.read_text())
        return 1
    script = Path(words[-1])
    number = 100 * (1 + len(list(known().glob("*.options"))))
    options = options_in(script)
    (known() / f"{number}.options").write_text(repr(options))
    tasks = [str(number)]
    at_once = 1
    if "array" in options:
        first, last, at_once = map(
            int, re.fullmatch(r"(\d+)-(\d+)%(\d+)", options["array"]).groups()
        )
        tasks = [f"{number}_{index}" for index in range(first, last + 1)]
    for task in tasks:
        (known() / f"{task}.queued").touch()
    subprocess.Popen(
        [sys.executable, __file__, "run", str(script.resolve()), str(at_once), *tasks],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    sys.stdout.write(f"Submitted batch job {number}\n")
    return 0


def run(words: list[str]) -> int:
    script, at_once, *tasks = words
    with ThreadPoolExecutor(int(at_once)) as pool:
        list(pool.map(lambda task: run_task(script, task), tasks))
    return 0


def run_task(script: str, task: str) -> None:
    array, _, index = task.partition("_")
    more = {"SLURM_JOB_ID": array, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    more |= {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}
    if index:
        more |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index}
    queued = known() / f"{task}.queued"
    while queued.exists():
        process = subprocess.Popen(
            ["bash", script], env={**os.environ, **more}, start_new_session=True
        )
        (known() / f"{task}.pid").write_text(str(process.pid))
        code = process.wait()
        if (again := known() / f"{task}.requeued").exists():
            again.unlink()
            continue
        state = "COMPLETED" if code == 0 else "NODE_FAIL"
        if (cancelled := known() / f"{task}.cancelled").exists():
            state = f"CANCELLED by {cancelled.read_text()}"
        (known() / f"{task}.state").write_text(state)
        queued.unlink()


def srun(words: list[str]) -> int:
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    places = {"%A": os.environ["SLURM_JOB_ID"], "%j": os.environ["SLURM_JOB_ID"], "%a": task}
    places["%t"] = "0"
    files = {}
    while words[0].startswith("-"):
        word = words.pop(0)
        if word in ("--output", "--error"):
            name = words.pop(0)
            for place, value in places.items():
                name = name.replace(place, value)
            files[word] = Path(name).open("ab")  # noqa: SIM115 - the process has it to its end
    done = subprocess.run(words, stdout=files["--output"], stderr=files["--error"], check=False)
    return abs(done.returncode)


def squeue(words: list[str]) -> int:
    (array,) = [word.partition("=")[2] for word in words if word.startswith("--jobs=")]
    if not (known() / f"{array}.options").exists():
        sys.stderr.write("slurm_load_jobs error: Invalid job id specified\n")
        return 1
    for queued in sorted(known().glob(f"{array}*.queued")):
        sys.stdout.write(f"{queued.stem}\n")
    return 0


def scancel(words: list[str]) -> int:
    for task in words:
        (known() / f"{task}.cancelled").write_text("0")
        kill(task, signal.SIGKILL)
    return 0


def scontrol(words: list[str]) -> int:
    action, task = words
    assert action == "requeue"
    (known() / f"{task}.requeued").touch()
    return 0


def sacct(words: list[str]) -> int:
    sys.stdout.write("JobID|State|NodeList\n")
    for state in sorted(known().glob("*.state")):
        sys.stdout.write(f"{state.stem}|{state.read_text()}|node1\n")
    return 0


def kill(task: str, number: int) -> None:
    """Send a signal to the processes of a task; one that can be caught to its step alone."""
    pid = known() / f"{task}.pid"
    if not pid.exists():
        return
    group = int(pid.read_text())
    if number == signal.SIGKILL:
        os.killpg(group, number)
        return
    for process in psutil.Process(group).children(recursive=True):
        words = process.cmdline()
        if "submitit.core._submit" in words and __file__ not in words:
            process.send_signal(number)


if __name__ == "__main__":
    _, name, *rest = sys.argv
    sys.exit(globals()[name](rest))
