"""The GPU's checks and comparisons, in order of value, within some minutes: see run.sh --help.

Everything runs in processes of its own, each with a time after which it is stopped: what fails or
takes too long costs its own result alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMPARISONS = ("cifar10", "cifar10-no-norm")
# These time something, so they run when nothing else does.
TIMING_TESTS = ("test_timing.py", "test_memory.py")
SECONDS_OF_FORMS = 45
SECONDS_OF_A_CASE = 15  # of the bench, at most: none begins later than this before the end
# Shares of the minutes; what a stage leaves over goes to the next ones.
SHARE_OF_TESTS = 0.17
SHARE_OF_COSTS = 0.36
SECONDS_TO_REPORT = 35
SECONDS_TO_STOP = 20
SECONDS_BETWEEN_ARCHIVES = 30
MOST_MIB = 15
DONE = "exit code 0"
# What a process of a comparison takes of the other machine's processor beside its own core.
CORES_LEFT = 2
MOST_JOBS = 14
# Below this number of seeds there is no verdict worth the name.
FEWEST_SEEDS = 8
# Where the best rate is the largest or smallest, more are tried.
SHARE_OF_EXTENSIONS = 0.25
SLOWER_THAN_THE_BASELINE = 1.25  # on average over the arms
WORTH_ANOTHER_TRY = 120  # seconds
TRY_CUDA = "import torch; print(torch.ones(8, device='cuda').sum().item())"
SECONDS_TO_TRY = 40
DECODE = """
import pathlib, sys
import regrad_on_device
regrad_on_device.load(data_dir=pathlib.Path(sys.argv[1]))
"""
TINY = (
    *("--model", "resnet8", "--width", "4", "--epochs", "1", "--batch-size", "20"),
    *("--warmup-steps", "1", "--train-size", "60", "--seeds", "1", "--lr", "0.1"),
)


@dataclass
class Session:
    """What was asked for, and what came out so far.

    Attributes:
        out: Folder to write.
        packed: Folder that run.sh --pack made.
        site: Where the wheels are unpacked.
        device: Type of the device: cuda or cpu.
        tiny: Whether sizes are small and numbers mean nothing.
        jobs: Runs of comparisons at once.
        mps: Whether these are to compute at the same time, by NVIDIA's MPS.
        deadline: When everything must be over, on the clock of `time.monotonic`.
        lines: Of the summary.
        shared: What processes need in their environment to find MPS.
        epochs: Of the runs of comparisons; None for as many as their settings say.
    """

    out: Path
    packed: Path
    site: Path
    device: str
    tiny: bool
    jobs: int
    mps: bool
    deadline: float
    lines: list[str] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    epochs: int | None = None

    @property
    def remaining(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of every process: the wheels come before what the machine has."""
        paths = [str(self.site), os.environ.get("PYTHONPATH", "")]
        changes = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "REGRAD_ON_DEVICE_CACHE": str(self.site.parent),
            "COLUMNS": "160",
        }
        return os.environ | changes | self.shared

    def say(self, text: str) -> None:
        """Print lines, and put them into the summary."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        self.lines.append(text)
        (self.out / "summary.md").write_text("\n".join(self.lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Command:
    """A process to start.

    Attributes:
        name: Of its log: OUT/logs/NAME.txt.
        words: Its arguments, after Python's own name.
    """

    name: str
    words: tuple[str, ...]


def main() -> int:
    """Run every stage, and say what came out."""
    asked = _asked()
    started = time.monotonic()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="regrad-gpu-") as folder:
        session = Session(
            out=asked.out.resolve(),
            packed=asked.packed.resolve(),
            site=Path(folder) / "site",
            device=asked.device,
            tiny=asked.tiny,
            jobs=asked.jobs,
            mps=asked.mps,
            deadline=started + asked.minutes * 60,
        )
        archive = Archive(session.out, asked.archive)
        with archive:
            _unpack_wheels(session)
            for name, stage in STAGES.items():
                begun = time.monotonic()
                session.say(f"\n## {name}, {session.remaining:.0f} s left\n")
                _attempt(session, stage)
                session.say(f"\n{name} took {time.monotonic() - begun:.0f} s")
            session.say(f"\nall of it took {time.monotonic() - started:.0f} s")
    return 0


def _attempt(session: Session, stage: Callable[[Session], None]) -> None:
    """Run a stage; what it fails of does not end the ones after it."""
    try:
        stage(session)
    except (OSError, ValueError, subprocess.SubprocessError) as problem:
        session.say(f"it failed: {type(problem).__name__}: {problem}")


def _asked() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="run.sh", description="Measure on a GPU.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--packed", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--minutes", type=float, default=13.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    cores = os.cpu_count() or 1
    jobs = min(MOST_JOBS, max(2, cores - CORES_LEFT))
    parser.add_argument("--jobs", type=int, default=jobs)
    parser.add_argument("--mps", action="store_true")
    parser.add_argument("--archive", type=Path)
    asked = parser.parse_args()
    if asked.jobs < len(COMPARISONS):
        parser.error(f"--jobs must be at least {len(COMPARISONS)}, got {asked.jobs}")
    if not (asked.packed / "wheels").is_dir():
        parser.error(f"--packed must be what run.sh --pack made, got '{asked.packed}'")
    return asked


def _unpack_wheels(session: Session) -> None:
    """Install the wheels: theirs hold nothing but what goes beside each other in one folder."""
    for wheel in sorted((session.packed / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(session.site)  # noqa: S202 - run.sh --pack made it


class Archive:
    """Keeps a folder in one file, renewed again and again: a context manager.

    Args:
        folder: What is kept.
        path: The file, a tar.gz; None for none.
    """

    def __init__(self, folder: Path, path: Path | None) -> None:
        self._folder = folder
        self._path = path
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> None:
        if self._path is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._path is not None:
            self._thread.join()
            self._write(self._path)

    def _keep(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_ARCHIVES):
            if self._path is not None:
                self._write(self._path)

    def _write(self, path: Path) -> None:
        """Write the file whole, or leave the one before; the largest files go if it is too big."""
        files = sorted(
            (file for file in self._folder.rglob("*") if file.is_file() and file != path),
            key=_size,
        )
        aside = path.with_name(f".{path.name}")
        while True:
            with tarfile.open(aside, "w:gz") as archive:
                for file in files:
                    _add(archive, file, str(file.relative_to(self._folder)))
            if aside.stat().st_size < MOST_MIB * 2**20 or not files:
                break
            files = files[: len(files) * 9 // 10]
        aside.replace(path)


def _size(path: Path) -> int:
    """Return a file's size; 0 if it is gone meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a file as it is now, unless it is gone; one that grows meanwhile does no harm."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    with tempfile.SpooledTemporaryFile(max_size=MOST_MIB * 2**20) as copy:
        copy.write(content)
        copy.seek(0)
        member = tarfile.TarInfo(name)
        member.size = len(content)
        member.mtime = int(time.time())
        archive.addfile(member, copy)


def run_together(session: Session, commands: Sequence[Command], *, seconds: float) -> list[str]:
    """Run commands at once, and stop those that are not done in time.

    Returns:
        What became of each, in one word or two.
    """
    processes = [_start(session, command) for command in commands]
    ends = time.monotonic() + seconds
    late = set()
    for process in processes:
        try:
            process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.add(process.pid)
            process.send_signal(signal.SIGINT)
    stopped_by = time.monotonic() + SECONDS_TO_STOP
    for process in processes:
        try:
            process.wait(max(0.0, stopped_by - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(process)
    return [
        "stopped in time" if process.pid in late else f"exit code {process.returncode}"
        for process in processes
    ]


def _start(session: Session, command: Command) -> subprocess.Popen[bytes]:
    """Start a command in a group of its own, its output in a log."""
    log = session.out / "logs" / f"{command.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(  # noqa: S603 - our own commands
            [sys.executable, *command.words],
            cwd=ROOT,
            env=session.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(session: Session, name: str, *, lines: int) -> str:
    """Return the end of a log."""
    path = session.out / "logs" / f"{name}.txt"
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace").rstrip()
    return "\n".join(text.splitlines()[-lines:])


def plan(session: Session) -> None:
    """Say how long each stage may take."""
    tests, costs = _seconds_of_tests(session), _seconds_of_costs(session)
    rest = session.remaining - tests - costs - SECONDS_TO_REPORT
    session.say(
        f"At most {tests:.0f} s for tests, {costs:.0f} s for costs, about {rest:.0f} s for "
        f"comparisons with {session.jobs} runs at once, {SECONDS_TO_REPORT} s for reports."
    )


def estimate(session: Session) -> None:
    """Measure the time of a step with as many runs at once as there will be, and fit epochs to it.

    A comparison that is cut before its seeds says nothing, so it is rather trained for less long.
    """
    config = HERE / f"{COMPARISONS[0]}.yaml"
    tiny = ("--steps", "3", "--model", "resnet8") if session.tiny else ()
    folder = session.out / "estimate"
    folder.mkdir(exist_ok=True)
    words = (str(HERE / "estimate.py"), str(config), "--data-dir", str(session.packed / "data"))
    commands = [
        Command(f"estimate-{number}", (*words, *tiny, "--write", str(folder / f"{number}.json")))
        for number in range(session.jobs)
    ]
    with sharing(session):
        run_together(session, commands, seconds=session.remaining / 4)
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not found:
        raise ValueError(f"no estimate ended in time; see {folder.parent / 'logs'}")
    step = statistics.median(one["seconds_per_step"] for one in found)
    batch = statistics.median(one["seconds_per_batch"] for one in found)
    seconds = session.remaining - SECONDS_TO_REPORT - SECONDS_TO_STOP
    runs = _runs_with_seeds(found[0]["arms"], found[0]["trials"], seeds=FEWEST_SEEDS)
    steps = seconds * _jobs(session)[0] / (runs * step)
    session.epochs = max(1, min(found[0]["epochs"], int(steps / found[0]["steps_per_epoch"])))
    session.say(
        f"{config.stem}: {found[0]['arms']} arms, {found[0]['trials']} runs choose rates. With "
        f"{len(found)} runs at once a step takes {step * 1000:.2f} ms, {batch * 1000:.2f} of them "
        f"to make the batch. So that {FEWEST_SEEDS} seeds of each arm fit into {seconds:.0f} s, "
        f"runs have {session.epochs} of {found[0]['epochs']} epochs."
    )


def _runs_with_seeds(arms: int, trials: int, *, seeds: int) -> float:
    """Return how many runs of the baseline's length a comparison takes."""
    return (trials * (1 + SHARE_OF_EXTENSIONS) + arms * seeds) * SLOWER_THAN_THE_BASELINE


def gpu_tests(session: Session) -> None:
    """Run the tests marked gpu: all files at once, then one by one those that time something.

    Meanwhile the images of the comparisons are decoded, and models compiled.
    """
    if session.device == "cpu":
        session.say("They are collected, and skipped for want of a CUDA device.")
    seconds = _seconds_of_tests(session)
    files = gpu_test_files()
    if session.tiny:
        files = files[:1]
    quiet = [file for file in files if file.name in TIMING_TESTS]
    others = [file for file in files if file.name not in TIMING_TESTS]
    ends = time.monotonic() + seconds
    decode = Command("decode", ("-c", DECODE, str(session.packed / "data")))
    first = [*(_test_command(session, file) for file in others), decode]
    if not session.tiny:  # the compiler keeps what it makes here
        words = (*_forms(session), "--warm", "--seconds", f"{seconds / 2:.0f}")
        first.append(Command("compile", words))
    run_together(session, first, seconds=max(5.0, ends - time.monotonic()))
    for file in quiet:
        command = _test_command(session, file)
        run_together(session, [command], seconds=max(5.0, ends - time.monotonic()))
    session.say(_tests_in_words(session, files))


def gpu_test_files() -> list[Path]:
    """Return the test files with tests marked gpu."""
    folders = [
        ROOT / "core" / "tests",
        *ROOT.glob("plugins/*/tests"),
        *ROOT.glob("packages/*/tests"),
    ]
    files: list[Path] = []
    for folder in sorted(folders):
        files += sorted(folder.rglob("test_*.py"))
    return [file for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def _test_name(file: Path) -> str:
    """Return the name of a test file's results."""
    return "-".join(file.relative_to(ROOT).with_suffix("").parts)


def _test_command(session: Session, file: Path) -> Command:
    name = _test_name(file)
    results = session.out / "tests" / f"{name}.xml"
    words = (
        *("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"),
        # Another torch deprecates other things than the one that these tests are developed with.
        *("-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"),
        *(f"--junitxml={results}", str(file)),
    )
    return Command(f"test-{name}", words)


def _tests_in_words(session: Session, files: Sequence[Path]) -> str:
    """Say of each file how many tests passed, failed and were skipped, and which failed."""
    lines = ["| tests | passed | failed | skipped |", "| --- | --- | --- | --- |"]
    failed: list[str] = []
    for file in files:
        name = _test_name(file)
        cases = _cases(session.out / "tests" / f"{name}.xml")
        bad = [case for case in cases if {"failure", "error"} & {part.tag for part in case}]
        skipped = sum(case.find("skipped") is not None for case in cases)
        passed = len(cases) - len(bad) - skipped
        lines.append(f"| {name} | {passed} | {len(bad)} | {skipped} |")
        failed += [f"failed: {case.get('classname')}::{case.get('name')}" for case in bad]
        if not cases:
            failed.append(f"no result: logs/test-{name}.txt")
    return "\n".join([*lines, "", *failed])


def _cases(path: Path) -> list[ElementTree.Element]:
    """Return the tests in a file of pytest's; none where it is missing or was cut."""
    if not path.is_file():
        return []
    try:
        suite = ElementTree.parse(path)  # noqa: S314 - written by pytest, just now
    except ElementTree.ParseError:
        return []
    return list(suite.getroot().iter("testcase"))


def costs(session: Session) -> None:
    """Count synchronisations, then time forms of the step and the bench's cases one by one."""
    ends = time.monotonic() + _seconds_of_costs(session)
    folder = session.out / "bench"
    folder.mkdir(exist_ok=True)
    quick = ("--quick",) if session.tiny else ()
    counted = Command(
        "synchronisations",
        (
            *(str(HERE / "synchronisations.py"), str(folder / "synchronisations.csv")),
            *("--device", session.device, *quick),
        ),
    )
    (ended,) = run_together(session, [counted], seconds=max(5.0, ends - time.monotonic()))
    session.say(f"{_log(session, 'synchronisations', lines=16)}\n({ended})")
    forms = Command(
        "forms", (*_forms(session), "--seconds", f"{SECONDS_OF_FORMS - SECONDS_OF_A_CASE}", *quick)
    )
    (ended,) = run_together(session, [forms], seconds=SECONDS_OF_FORMS)
    session.say(f"```text\n{_log(session, 'forms', lines=12)}\n```\n({ended})")
    timed = Command(
        "bench",
        (
            *(str(HERE / "bench_cases.py"), str(folder / "cases.csv"), "--device", session.device),
            *("--seconds", f"{ends - time.monotonic() - SECONDS_OF_A_CASE:.0f}"),
            *("--only", "step/none" if session.tiny else "*", *quick),
        ),
    )
    (ended,) = run_together(session, [timed], seconds=max(5.0, ends - time.monotonic()))
    session.say(f"```text\n{_log(session, 'bench', lines=70)}\n```\n({ended})")


def _forms(session: Session) -> tuple[str, ...]:
    table = session.out / "bench" / "forms.csv"
    return (str(HERE / "forms.py"), str(table), "--device", session.device)


def comparisons(session: Session) -> None:
    """Run both comparisons at once, and draw what was finished."""
    with sharing(session):
        ended = _compare(session)
    if session.mps and "exit code 2" in ended and session.remaining > WORTH_ANOTHER_TRY:
        session.say("again without MPS")
        ended = _compare(session)
    is_cut = {name: how != DONE for name, how in zip(COMPARISONS, ended, strict=True)}
    reports = [
        Command(f"report-{name}", ("-m", "regrad_runner", "report", str(session.out / name)))
        for name in COMPARISONS
        if is_cut[name]
    ]
    run_together(session, reports, seconds=max(10.0, session.remaining))
    for name, how in zip(COMPARISONS, ended, strict=True):
        table = _log(session, f"report-{name}" if is_cut[name] else name, lines=40)
        table = "\n".join(line for line in table.splitlines() if not line.startswith("["))
        session.say(f"### {name} ({how})\n\n```text\n{table}\n```")


def _compare(session: Session) -> list[str]:
    """Run the comparisons, or go on with them, until little more than the reports fits in."""
    commands = [
        _comparison(session, name, jobs)
        for name, jobs in zip(COMPARISONS, _jobs(session), strict=True)
    ]
    seconds = max(10.0, session.remaining - SECONDS_TO_REPORT - SECONDS_TO_STOP)
    return run_together(session, commands, seconds=seconds)


@contextlib.contextmanager
def sharing(session: Session) -> Iterator[None]:
    """Let processes compute on the GPU at the same time, by NVIDIA's MPS, if that was asked for.

    Without it they take turns. Nothing about the device is set: a daemon of ours hands out one
    context, and ends with the block.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    if not session.mps or control is None:
        if session.mps:
            session.say("MPS: there is no nvidia-cuda-mps-control; processes take turns")
        yield
        return
    with tempfile.TemporaryDirectory(prefix="regrad-mps-") as folder:
        session.shared = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        _ask_mps(session, control, "-d")
        tries = [Command(f"mps-{number}", ("-c", TRY_CUDA)) for number in (1, 2)]
        ended = run_together(session, tries, seconds=SECONDS_TO_TRY)
        works = set(ended) == {DONE}
        if not works:
            _ask_mps(session, control, said="quit\n")
            session.shared = {}
        session.say(f"MPS: {'on' if works else f'it does not work here {ended}; off'}")
        try:
            yield
        finally:
            if works:
                _ask_mps(session, control, said="quit\n")
            session.shared = {}


def _ask_mps(session: Session, control: str, *words: str, said: str | None = None) -> None:
    """Start MPS's control daemon, or tell it something."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(  # noqa: S603 - found on the PATH, with words of ours
            [control, *words],
            env=session.environment,
            input=said,
            text=True,
            capture_output=True,
            timeout=SECONDS_TO_STOP,
            check=False,
        )


def _jobs(session: Session) -> tuple[int, int]:
    """Return how many runs each comparison has at once.

    The first has three times the arms, and slower ones among them.
    """
    second = max(1, session.jobs // 5)
    return session.jobs - second, second


def _comparison(session: Session, name: str, jobs: int) -> Command:
    """Return the command of a comparison: from its settings, or from where it was left."""
    compare = ("-m", "regrad_runner", "compare", "--out", str(session.out / name))
    if (session.out / name / "config.yaml").is_file():
        return Command(name, (*compare, "--jobs", str(jobs), "--resume"))
    settings = ("--config", str(HERE / f"{name}.yaml"))
    data = ("--data-dir", str(session.packed / "data"))
    changes: tuple[str, ...] = ()
    if session.epochs is not None:
        changes = ("--epochs", str(session.epochs))
    if session.tiny:
        changes = TINY
    return Command(name, (*compare, *settings, *data, "--jobs", str(jobs), *changes))


def _seconds_of_tests(session: Session) -> float:
    return session.remaining * SHARE_OF_TESTS


def _seconds_of_costs(session: Session) -> float:
    return session.remaining * SHARE_OF_COSTS


STAGES: dict[str, Callable[[Session], None]] = {
    "Plan": plan,
    "Tests marked gpu": gpu_tests,
    "Costs": costs,
    "Estimate of CIFAR-10": estimate,
    "CIFAR-10": comparisons,
}


if __name__ == "__main__":
    sys.exit(main())
