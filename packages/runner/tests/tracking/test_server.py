"""Tracking with a real MLflow server on this machine, and what can happen to it."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest
from regrad_runner.cli.main import main
from regrad_runner.results.about import LAYOUT
from regrad_runner.results.run import begin_run
from regrad_runner.results.sync import sync
from regrad_runner.results.view import tracking
from regrad_runner.tracking import projector

STEPS = 300


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` on a database of its own, which can be killed and started again at the same address."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        database = f"sqlite:///{self.folder / 'server.db'}"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--workers", "1", "--backend-store-uri", database]
        command += ["--artifacts-destination", str(self.folder / "files")]
        environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )

    def wait(self):
        for _ in range(2400):
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.1)
        pytest.fail((self.folder / "server.log").read_text())

    def kill(self):
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def runs(self):
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'server.db'}")
        return client, client.search_runs(
            [one.experiment_id for one in client.search_experiments()]
        )

    def check(self, status="FINISHED"):
        """Check that what `train` logged is there once."""
        client, (run,) = self.runs()
        history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
        assert history == [(step, 1.0 / (step + 1)) for step in range(STEPS)]
        assert (run.info.status, run.data.params) == (status, {"seeds": "1"})
        return run


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    yield server
    server.kill()


@pytest.fixture
def quickly_again(monkeypatch):
    """Let rounds follow each other closely, also after failures, and the end wait long."""
    monkeypatch.setattr(projector, "SECONDS_BETWEEN_ROUNDS", 0.1)
    monkeypatch.setattr(projector, "LONGEST_PAUSE", 1.0)
    monkeypatch.setattr(projector, "SECONDS_AT_THE_END", 240.0)
    monkeypatch.setattr(projector, "SECONDS_IN_VAIN", 240.0)


@pytest.fixture
def no_network(monkeypatch):
    """Make every connection from this thread an error: the training's thread."""
    here = threading.current_thread()
    connect = socket.socket.connect

    def guarded(self, address):
        if threading.current_thread() is here:
            pytest.fail(f"the training's thread connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


SETTINGS = {"seeds": 1}


@pytest.fixture
def out(tmp_path):
    """The folder of a run that is about to begin."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.yaml").write_text("tracker: mlflow\n")
    about = {"layout": LAYOUT, "kind": "run", "workload": "digits"}
    (folder / "about.json").write_text(json.dumps(about))
    return folder


def train(out, uri, meanwhile=lambda step: None):
    """Log a run of some steps, as a training does, and return what is said of its tracking."""
    said = []
    values = {"name": "run", "arm": "baseline", "seed": 0, "lr": 0.1, "settings": SETTINGS}
    values["curves"] = {"evaluation": {"loss": "loss"}}
    with tracking("mlflow", out, uri, say=said.append), begin_run(out, values) as record:
        for step in range(STEPS):
            record.log("evaluation", step, {"loss": 1.0 / (step + 1)})
            meanwhile(step)
        record.keep("receipt.json", "{}")
        record.end("finished")
    return said


@pytest.mark.long
def test_a_server_that_comes_late_gets_everything_and_the_training_never_touches_the_network(
    server, out, quickly_again, no_network
):
    begun = time.perf_counter()
    took = []

    def come_late(step):
        if step == STEPS - 1:
            took.append(time.perf_counter() - begun)
            time.sleep(1.0)  # long enough for an attempt in vain
            server.start()

    said = train(out, server.uri, come_late)
    assert took[0] < 60
    assert len(said) == 1
    assert said[0].startswith(f"tracking at {server.uri} failed")
    server.check()
    assert [path.name for path in (server.folder / "files").rglob("*.json")] == ["receipt.json"]


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_during_a_run_gets_everything_once(
    server, out, quickly_again, no_network
):
    def faults(step):
        time.sleep(0.05)
        if step in (50, 150):
            server.kill()
        if step in (100, 200):
            server.start()

    # The requests of the test itself are made in a thread too: no_network holds for this one.
    def start_and_wait():
        server.start()
        server.wait()

    starting = threading.Thread(target=start_and_wait)
    starting.start()
    starting.join()
    train(out, server.uri, faults)
    server.check()


@pytest.mark.long
def test_a_run_killed_without_a_server_is_shown_by_sync_and_marked_killed(server, out, capsys):
    code = f"""
import os, signal
from pathlib import Path
from regrad_runner.results.run import begin_run
values = {{"name": "run", "arm": "baseline", "seed": 0, "lr": 0.1, "settings": {SETTINGS}}}
values["curves"] = {{"evaluation": {{"loss": "loss"}}}}
record = begin_run(Path({str(out)!r}), values)
for step in range({STEPS}):
    record.log("evaluation", step, {{"loss": 1.0 / (step + 1)}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert (
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == -9
    )
    assert main(["sync", str(out), "--tracking-uri", server.uri]) == 1
    assert f"not everything in {out} is at {server.uri}" in capsys.readouterr().out
    server.start()
    server.wait()
    assert main(["sync", str(out), "--tracking-uri", server.uri]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{STEPS} numbers and 0 files of 1 runs sent to {server.uri}",
        "1 runs that never ended are shown as KILLED",
    ]
    server.check("KILLED")
    assert main(["sync", str(out), "--tracking-uri", server.uri]) == 0
    assert capsys.readouterr().out.startswith(f"everything in {out} is at {server.uri}\n")
    server.check("KILLED")


class Faulty:
    """A way to the server on which requests fail: `faults` gives what happens to each, "" for nothing."""

    def __init__(self, server, faults):
        self.faults, self.seen = iter(faults), []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = next(outer.faults, "") if "/mlflow/" in self.path else ""
                outer.seen.append((self.path, fault))
                if fault == "error":
                    return self.reply(503, b"the server is busy")
                headers = {
                    k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")
                }
                request = urllib.request.Request(
                    server.uri + self.path, data=body or None, headers=headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        status, content = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    status, content = error.code, error.read()
                if fault == "slow":
                    time.sleep(3.0)  # longer than the client waits
                if fault == "lost":
                    self.close_connection = True
                    return None
                return self.reply(status, content)

            def reply(self, status, content):
                with suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.answer)
        self.proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.proxy.server_port}"
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error", "lost", "slow"])
def test_a_server_that_answers_errors_or_late_or_not_at_all_gets_everything_once(
    server, out, quickly_again, monkeypatch, fault
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.start()
    server.wait()
    faulty = Faulty(server, ["", fault] * 12)
    train(out, faulty.uri, lambda step: time.sleep(0.05))
    faulty.proxy.shutdown()
    faulty.proxy.server_close()
    happened = [path.rpartition("/")[2] for path, what in faulty.seen if what]
    assert len(happened) >= 5, faulty.seen
    sync(out, server.uri)  # what a slow server made after all
    server.check()
