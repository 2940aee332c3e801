"""Tracking with a real MLflow server on this machine, and what can happen to it."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from contextlib import suppress

import pytest
from regrad.errors import RegradWarning
from regrad_runner.cli.main import main
from regrad_runner.tracking.mlflow_ import open_tracker

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
        assert (run.info.status, run.data.params) == (status, {"lr": "0.1"})
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
    """Let failed attempts be repeated soon."""
    monkeypatch.setattr("regrad_runner.tracking.delivery.LONGEST_PAUSE", 1.0)


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


def train(tracker, meanwhile=lambda step: None):
    """Log a run of some steps, as a training would."""
    with tracker.start("digits", "run", {"lr": 0.1}) as run:
        for step in range(STEPS):
            run.log(step, {"loss": 1.0 / (step + 1)})
            meanwhile(step)


def test_a_server_that_comes_late_gets_everything_and_the_training_never_touches_the_network(
    server, tmp_path, quickly_again, no_network
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegradWarning)
        tracker = open_tracker("mlflow", folder=tmp_path / "out", uri=server.uri)
        receipt = tmp_path / "receipt.json"
        receipt.write_text("{}")
        with tracker.start("digits", "run", {"lr": 0.1}) as run:
            assert not tracker.flush(60)
            for step in range(STEPS):
                run.log(step, {"loss": 1.0 / (step + 1)})
            run.artifact(receipt)
    server.start()
    for _ in range(2400):
        if not tracker._spool.waiting:
            break
        time.sleep(0.1)
    tracker.close()
    server.check()
    assert [path.name for path in (server.folder / "files").rglob("*.json")] == ["receipt.json"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_during_a_run_gets_everything_once(
    server, tmp_path, quickly_again, no_network, monkeypatch
):
    monkeypatch.setattr("regrad_runner.tracking.delivery.SECONDS_BETWEEN_CALLS", 0.01)

    def faults(step):
        time.sleep(0.01)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegradWarning)
        tracker = open_tracker("mlflow", folder=tmp_path / "out", uri=server.uri)
        train(tracker, faults)
        for _ in range(2400):
            if not tracker._spool.waiting:
                break
            time.sleep(0.1)
        tracker.close()
    server.check()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_run_killed_without_a_server_is_delivered_by_sync_and_marked_killed(
    server, tmp_path, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").touch()
    code = f"""
import os, signal
from pathlib import Path
from regrad_runner.tracking.mlflow_ import open_tracker
tracker = open_tracker("mlflow", folder=Path({str(out)!r}), uri={server.uri!r})
with tracker.start("digits", "run", {{"lr": 0.1}}) as run:
    for step in range({STEPS}):
        run.log(step, {{"loss": 1.0 / (step + 1)}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert (
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == -9
    )
    assert main(["sync", str(out)]) == 1
    assert f"{STEPS + 3} records wait in {out / 'unsent'}" in capsys.readouterr().out
    server.start()
    server.wait()
    assert main(["sync", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{STEPS + 3} records delivered to {server.uri}",
        "1 runs that never ended are marked KILLED",
    ]
    server.check("KILLED")
    assert main(["sync", str(out)]) == 0
    assert capsys.readouterr().out == f"nothing waits in {out}\n"
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
    server, tmp_path, quickly_again, monkeypatch, fault
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("regrad_runner.tracking.delivery.SECONDS_BETWEEN_CALLS", 0.01)
    monkeypatch.setattr("regrad_runner.tracking.mlflow_.SECONDS_IN_VAIN", 60.0)
    server.start()
    server.wait()
    faulty = Faulty(server, ["", fault] * 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegradWarning)
        with open_tracker("mlflow", folder=tmp_path / "out", uri=faulty.uri) as tracker:
            train(tracker, lambda step: time.sleep(0.01))
    faulty.proxy.shutdown()
    faulty.proxy.server_close()
    happened = [path.rpartition("/")[2] for path, what in faulty.seen if what]
    assert len(happened) >= 5, faulty.seen
    server.check()
    assert list((tmp_path / "out").iterdir()) == []
