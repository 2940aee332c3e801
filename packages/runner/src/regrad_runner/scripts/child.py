"""A script in a process of its own: its output kept, its time limited, its processes ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from regrad_runner.files import new_file
from regrad_runner.signals import OF_A_SHELL

SECONDS_TO_TERMINATE = 10.0
SECONDS_FOR_THE_REST = 5.0  # of the output, after the process itself has ended
CHUNK = 2**16
# Of the output, in bytes: what is kept from its beginning and from its end.
KEPT = 2**20
LONGEST_OUTPUT_LINE = 2**16
LAST_LINES = 100
LONGEST_SHOWN_LINE = 300  # characters
OUR_LINES = "regrad: "
ERROR = re.compile(r".*\b\w*(?:Error|Exception): \S.*")
# Colours and movements of the cursor, as a terminal takes them: ECMA-48, section 5.4.
FOR_A_TERMINAL = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        code: Its exit code; the negative number of a signal that ended it.
        timed_out: Whether it was ended because it took too long.
        last_lines: Of what it printed, those that are not empty.
        seconds: How long it ran.
        timeout: Seconds that it had; None for as many as it takes.
    """

    code: int
    timed_out: bool
    last_lines: tuple[str, ...]
    seconds: float
    timeout: float | None = None

    @property
    def in_words(self) -> str:
        """How it ended, in a few words."""
        if self.timed_out:
            return f"it did not end within {self.timeout:g} s"
        number = -self.code if self.code < 0 else self.code - OF_A_SHELL
        with suppress(ValueError):
            return f"it was ended by {signal.Signals(number).name}"
        return f"it ended with exit code {self.code}"

    @property
    def reason(self) -> str:
        """The line that says most of why it failed: the last error, or else the last line.

        Behind it there may be what a launcher adds, and the summary of `regrad run`.
        """
        lines = [line.strip() for line in self.last_lines if not line.startswith(OUR_LINES)]
        errors = [line for line in lines if ERROR.fullmatch(line)]
        if not lines:
            return "it printed nothing"
        line = errors[-1] if errors else lines[-1]
        if len(line) > LONGEST_SHOWN_LINE:
            return f"{line[:LONGEST_SHOWN_LINE]}…"
        return line


class Child:
    """A process with its output read line by line, and everything that it starts.

    Args:
        command: Its words.
        environment: Its variables.
        output: File for what it prints, which must not exist. If it is several megabytes, the first
            and the last parts are kept.
        hear: Called with each line, as it comes; a carriage return ends one too, and colours are
            taken out.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        output: Path,
        hear: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._output = output
        self._hear = hear
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._is_read = False
        self._problem: BaseException | None = None

    def run(self, timeout: float | None = None) -> Ending:
        """Run to the end.

        Args:
            timeout: Seconds after which it is ended, with all that it started.

        Raises:
            OSError: If it cannot be started, or its output cannot be kept.
        """
        started = time.perf_counter()
        with new_file(self._output) as kept:
            if self._ended.is_set():
                return Ending(-signal.SIGTERM, timed_out=False, last_lines=(), seconds=0.0)
            self._process = subprocess.Popen(  # noqa: S603 - the user's own command
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
            if self._ended.is_set():  # meanwhile
                end_tree(self._process.pid)
            reader = threading.Thread(target=self._read, args=(kept,), daemon=True)
            reader.start()
            try:
                timed_out = self._wait(timeout)
            except BaseException:  # such as Ctrl-C, which only this process hears
                self.end()
                self._process.wait()
                reader.join(SECONDS_FOR_THE_REST)
                raise
            reader.join(SECONDS_FOR_THE_REST)
            if reader.is_alive():  # a process that it started still holds its output
                self.end()
                reader.join(SECONDS_FOR_THE_REST)
            self._is_read = True
        if self._problem is not None:
            raise self._problem
        return Ending(
            self._process.returncode,
            timed_out=timed_out,
            last_lines=tuple(self._last),
            seconds=time.perf_counter() - started,
            timeout=timeout,
        )

    def end(self) -> None:
        """End the process and all that it started; callable from another thread."""
        self._ended.set()
        if self._process is None:
            return
        if self._process.poll() is None:
            end_tree(self._process.pid)
        else:
            end_group(self._process.pid)

    def _wait(self, timeout: float | None) -> bool:
        """Wait for the process; end it when the time is over, and say whether that was so."""
        if self._process is None:
            return False
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            end_tree(self._process.pid)
            self._process.wait()
            return True
        return False

    def _read(self, kept: IO[bytes]) -> None:
        """Hand on what the process prints, line by line, and keep it."""
        keeper = _Keeper(kept)
        rest = b""
        try:
            for chunk in iter(self._next_chunk, b""):
                if self._is_read:  # by whoever still holds the output, long after the end
                    return
                keeper.keep(chunk)
                *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
                for line in lines:
                    self._take(line)
                rest = rest[-LONGEST_OUTPUT_LINE:]
            self._take(rest)
            keeper.close()
        except BaseException as problem:  # noqa: BLE001 - raised where the process is waited for
            self._problem = problem
            self.end()
        finally:
            self._close_output()

    def _close_output(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()

    def _next_chunk(self) -> bytes:
        if self._process is None or self._process.stdout is None:
            return b""
        return os.read(self._process.stdout.fileno(), CHUNK)

    def _take(self, line: bytes) -> None:
        text = FOR_A_TERMINAL.sub(b"", line).decode("utf-8", errors="replace")
        if text.strip():
            self._last.append(text)
            self._hear(text)


class _Keeper:
    """Keeps the first and the last part of an output.

    Args:
        file: To write.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._written = 0
        self._end: deque[bytes] = deque()
        self._waiting = 0
        self._left_out = 0

    def keep(self, chunk: bytes) -> None:
        """Keep a part."""
        if self._written < KEPT:
            self._file.write(chunk)
            self._file.flush()
            self._written += len(chunk)
            return
        self._end.append(chunk)
        self._waiting += len(chunk)
        while self._waiting - len(self._end[0]) >= KEPT:
            dropped = self._end.popleft()
            self._waiting -= len(dropped)
            self._left_out += len(dropped)

    def close(self) -> None:
        """Write the last part."""
        if self._left_out:
            self._file.write(f"\n… {self._left_out:,} bytes are left out …\n".encode())
        for chunk in self._end:
            self._file.write(chunk)
        self._file.flush()


def end_tree(pid: int) -> None:
    """End a process and all its descendants: first gracefully, then by force."""
    try:
        top = psutil.Process(pid)
        processes = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        processes = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=SECONDS_TO_TERMINATE)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    end_group(pid)


def end_group(pid: int) -> None:
    """Kill what a process started and left behind when it ended."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
