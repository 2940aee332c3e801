"""A script in a process of its own: output kept, time limited, everything that it starts ended."""

import os
import signal
import sys
import threading
import time

import psutil
import pytest
from regrad_runner.scripts import child as child_module
from regrad_runner.scripts.child import KEPT, Child, Ending


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run Python code as a child, and return how it ended and what was heard."""
    monkeypatch.setattr(child_module, "SECONDS_TO_TERMINATE", 0.5)
    monkeypatch.setattr(child_module, "SECONDS_FOR_THE_REST", 0.5)

    def run(code, *, timeout=None):
        heard = []
        child = Child(
            [sys.executable, "-ISu", "-c", code],
            environment=dict(os.environ),
            output=tmp_path / "output.txt",
            hear=heard.append,
        )
        return child.run(timeout), heard

    return run


def is_gone(pid):
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_lines_come_one_by_one_and_the_output_is_kept_as_it_was(start, tmp_path):
    ending, heard = start("import sys; sys.stdout.write('a\\n\\nb\\rc\\r\\n\\x1b[32md\\x1b[0m 1')")
    assert heard == ["a", "b", "c", "d 1"]  # also the last one, which no newline ends
    assert (tmp_path / "output.txt").read_bytes() == b"a\n\nb\rc\r\n\x1b[32md\x1b[0m 1"
    assert (ending.code, ending.timed_out, ending.last_lines) == (0, False, tuple(heard))


def test_errors_are_in_the_output_too_and_bytes_that_are_no_text(start):
    _, heard = start("import sys; sys.stderr.buffer.write(b'caf\\xe9\\n')")
    assert heard == ["caf\ufffd"]


def test_of_megabytes_the_first_and_the_last_are_kept(start, tmp_path):
    code = (
        "import sys\nprint('first')\n"
        f"for _ in range(6): sys.stdout.write(('x' * 1023 + chr(10)) * {KEPT // 1024})\n"
        "print('last')"
    )
    _, heard = start(code)
    output = (tmp_path / "output.txt").read_bytes()
    assert len(output) < 3 * KEPT
    assert output.startswith(b"first\n")
    assert output.endswith(b"last\n")
    assert b" bytes are left out " in output
    assert len(heard) == 6 * KEPT // 1024 + 2


def test_a_line_of_megabytes_is_heard_by_its_end(start):
    _, heard = start("print('x' * 5_000_000, 'loss 0.5')")
    assert heard[-1].endswith("x loss 0.5")
    assert sum(map(len, heard)) < 1_000_000


def test_a_child_that_takes_too_long_is_ended_although_it_ignores_sigterm(start):
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid()); time.sleep(600)"
    )
    ending, heard = start(code, timeout=3)
    assert ending.timed_out
    assert ending.in_words == "it did not end within 3 s"
    assert is_gone(int(heard[0]))


def test_a_process_that_keeps_the_output_open_is_ended_with_the_child(start):
    code = (
        "import subprocess, sys\n"
        "sleeper = subprocess.Popen([sys.executable, '-ISc', 'import time; time.sleep(600)'])\n"
        "print(sleeper.pid)"
    )
    ending, heard = start(code)
    assert ending.code == 0
    assert is_gone(int(heard[0]))


def test_a_daemon_in_a_session_of_its_own_is_not_waited_for(start):
    code = (
        "import subprocess, sys\n"
        "sleeper = subprocess.Popen([sys.executable, '-ISc', 'import time; time.sleep(600)'],\n"
        "    start_new_session=True)\nprint(sleeper.pid)"
    )
    ending, heard = start(code)
    assert ending.code == 0
    os.kill(int(heard[0]), signal.SIGKILL)  # nobody else ends it


def test_input_is_empty(start):
    ending, _ = start("input()")
    assert ending.code == 1
    assert ending.last_lines[-1] == "EOFError: EOF when reading a line"


def test_ending_it_from_another_thread_ends_its_children_too(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "sleeper = subprocess.Popen([sys.executable, '-ISc', 'import time; time.sleep(600)'])\n"
        "print(sleeper.pid); time.sleep(600)"
    )
    started = threading.Event()
    heard = []

    def hear(line):
        heard.append(line)
        started.set()

    child = Child(
        [sys.executable, "-ISu", "-c", code],
        environment=dict(os.environ),
        output=tmp_path / "output.txt",
        hear=hear,
    )
    ender = threading.Thread(target=lambda: (started.wait(60), child.end()))
    ender.start()
    child.run()
    ender.join()
    assert is_gone(int(heard[0]))


def test_a_child_that_was_ended_before_it_ran_does_not_start(tmp_path):
    child = Child(["no-such-program"], environment={}, output=tmp_path / "output.txt")
    child.end()
    assert child.run().in_words == "it was ended by SIGTERM"


def test_an_exception_while_it_is_waited_for_ends_it(tmp_path, monkeypatch):
    code = "import os, time; print(os.getpid()); time.sleep(600)"
    started = threading.Event()
    heard = []

    def hear(line):
        heard.append(line)
        started.set()

    child = Child(
        [sys.executable, "-ISu", "-c", code],
        environment=dict(os.environ),
        output=tmp_path / "output.txt",
        hear=hear,
    )

    def interrupted(timeout):
        started.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        child.run()
    assert is_gone(int(heard[0]))


def test_a_listener_that_fails_ends_the_child(tmp_path):
    def hear(line):
        raise OSError(28, "No space left on device")

    child = Child(
        [sys.executable, "-ISu", "-c", "import time; print(1); time.sleep(600)"],
        environment=dict(os.environ),
        output=tmp_path / "output.txt",
        hear=hear,
    )
    with pytest.raises(OSError, match="No space"):
        child.run()


def test_a_link_in_the_place_of_the_output_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    (tmp_path / "output.txt").symlink_to(precious)
    child = Child([sys.executable, "-c", ""], environment={}, output=tmp_path / "output.txt")
    with pytest.raises(FileExistsError):
        child.run()
    assert precious.read_text() == "as it was"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "it ended with exit code 1"),
        (255, "it ended with exit code 255"),
        (-9, "it was ended by SIGKILL"),
        (139, "it was ended by SIGSEGV"),  # as a shell or launcher passes it on
    ],
)
def test_endings_are_said_in_words(code, words):
    assert Ending(code, timed_out=False, last_lines=(), seconds=1.0).in_words == words


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ((), "it printed nothing"),
        (("regrad: nothing was corrected",), "it printed nothing"),
        (("step 1", " stopped "), "stopped"),
        (
            ("Traceback:", "torch.OutOfMemoryError: no room", "regrad: agc on SGD: 3 steps"),
            "torch.OutOfMemoryError: no room",
        ),
        (
            ("[rank0]: ValueError: 3", "elastic.errors.ChildFailedError: ", "==="),
            "[rank0]: ValueError: 3",
        ),
        (("x" * 5000,), "x" * 300 + "…"),
    ],
)
def test_the_reason_is_the_line_that_says_most(lines, reason):
    assert Ending(1, timed_out=False, last_lines=lines, seconds=1.0).reason == reason
