import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import regrad
import torch
from regrad.errors import RegradWarning
from regrad_runner.checkpoints.folder import checkpoints
from regrad_runner.cli.corrections_flag import repeat_flag
from regrad_runner.cli.main import main
from regrad_runner.comparing import compare
from regrad_runner.errors import format_warning
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.settings.config import CompareConfig, TrainConfig
from regrad_runner.settings.loading import write_config
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload

DEAD_SERVER = "http://127.0.0.1:9"
SHAPE = ["--train-size", "100", "--batch-size", "25", "--width", "4"]
SMALL = [*SHAPE, "--epochs", "2", "--tracker", "none"]
needs_plugins = pytest.mark.skipif(
    not {"xgrad", "powergrad", "gcw"} <= regrad.available().keys(),
    reason="regrad-xgrad, regrad-powergrad and regrad-gcw are not installed",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder; the end of a command waits for its tracking, however slow the machine is."""
    monkeypatch.setattr("regrad_runner.tracking.projector.SECONDS_AT_THE_END", 240.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD = [
    ("compare --workload nope", "no workload named 'nope'; installed: cifar10, cifar100, digits"),
    ("compare --workload parquet", "data_dir must be"),
    ("compare --workload parquet --data-dir nowhere", "data_dir must be a folder"),
    ("compare --workload digits --data-dir nowhere", "data_dir must be left out"),
    ("compare --corrections nope", "no correction named 'nope'"),
    (
        "compare --corrections +",
        "corrections must name one correction on each side of '+', got '+'",
    ),
    ("compare --corrections", "'--corrections' requires an argument"),
    ("compare --epochs 0", "epochs must be greater than 0, got 0"),
    ("compare --epochs many", "'--epochs'"),
    ("compare --seeds -3", "seeds must be greater than 0, got -3"),
    ("compare --train-size 5", "train_size must be from 10 (the classes) to 1067, got 5"),
    ("compare --train-size 5000", "train_size must be from 10 (the classes) to 1067, got 5000"),
    (
        "compare --batch-size 2000",
        "batch_size must be at most 1077 (the training images), got 2000",
    ),
    ("compare --optimizer sdg", "no optimizer named 'sdg'"),
    ("compare --optimizer sgd:speed=1", "optimizer 'sgd' has no option 'speed'"),
    (
        "compare --model resnet9",
        "no model named 'resnet9'; there are resnet8, resnet20, resnet32, resnet56, multiexit8,",
    ),
    (
        "compare --model resnet18 --width 8",
        "width must be left out for model 'resnet18', whose widths are",
    ),
    ("compare --model vit_b_16", "image_size must fit model 'vit_b_16', such as 224, got 8"),
    ("compare --norm layer", "norm must be 'batch', 'group' or 'none', got 'layer'"),
    ("compare --lr fast", "lr must be a valid number, got 'fast'"),
    (
        "compare --tracker comet",
        "tracker must be 'mlflow', 'tensorboard', 'wandb' or 'none', got 'comet'",
    ),
    ("compare --tracking-uri mlruns", "tracking_uri must be an absolute address, got 'mlruns'"),
    ("compare --processes 2", "processes must be 2 as asked, got 1"),
    ("compare --config settings.yaml", "no setting named 'epoch'; did you mean 'epochs'?"),
    ("compare --config nowhere.yaml", "config must be a readable file, got 'nowhere.yaml'"),
    ("compare --resume", "out must be given with --resume"),
    (
        "compare --resume --out nowhere",
        "out must be the folder of an earlier run to resume it, got 'nowhere'",
    ),
    ("compare --out .", "out must be a new or empty folder, got '.'"),
    ("compare --speed 3", "No such option"),
    ("compare 3", "script must be a file, got '3'; corrections go after --corrections"),
    ("train --seed -1", "seed must be greater than or equal to 0, got -1"),
    ("train --lr 0", "lr must be greater than 0, got 0.0"),
    ("explain --after-steps -1", "after_steps must be from 0 to"),
    ("plugins show digit", "no plugin named 'digit'; installed: "),
    ("plugins show digit", "; did you mean 'digits'?"),
    ("plugins show", "Missing argument"),
    ("report nowhere", "folder must be one that compare or train wrote, got 'nowhere'"),
    ("report", "Missing argument"),
    ("sync nowhere", "folder must be one that compare or train wrote, got 'nowhere'"),
    ("paint", "No such command 'paint'"),
]


@pytest.mark.parametrize(
    ("words", "message"), BAD, ids=[f"{words}: {message[:20]}" for words, message in BAD]
)
def test_bad_input_is_one_clear_line_and_writes_nothing(here, capsys, words, message):
    (here / "settings.yaml").write_text("epoch: 3\n")
    assert main(words.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.startswith("regrad: ")
    assert said.err.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["settings.yaml"]


@needs_plugins
@pytest.mark.parametrize(
    ("corrections", "message"),
    [
        ("xgrad:horizon=-1", "horizon must be at least 0 and finite, got -1"),
        ("xgrad:speed=1", "xgrad has no option 'speed'; allowed: horizon"),
        ("xgrid", "no correction named 'xgrid'; installed: .*did you mean 'xgrad'?"),
        ("xgrad xgrad", "corrections must be different, got 'xgrad' twice"),
        ("xgrad+xgrad", "corrections must be different, got 'xgrad' twice"),
    ],
)
def test_a_bad_correction_is_one_clear_line(here, capsys, corrections, message):
    assert main(["compare", "--corrections", *corrections.split()]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in message.split(".*"))
    assert list(here.iterdir()) == []


def test_a_folder_of_another_configuration_is_refused_and_left_alone(here, capsys):
    (here / "out").mkdir()
    config = resolved(CompareConfig(epochs=3), load_workload("digits"))
    (here / "out" / "config.yaml").write_text(write_config(config))
    assert main(["compare", "--resume", "--out", "out", "--epochs", "4"]) == 2
    assert "got epochs 3 there and 4 here; choose another folder" in capsys.readouterr().err
    assert [path.name for path in (here / "out").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        "",
        "compare",
        "train",
        "report",
        "sync",
        "explain",
        "plugins",
        "plugins list",
        "plugins show",
        "plugins check",
        "plugins new",
        "plugins doctor",
    ],
)
def test_help_fits_80_columns(monkeypatch, capsys, words):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*words.split(), "--help"] if words else []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 80


def test_every_setting_has_its_flag(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for command, kind in (("compare", CompareConfig), ("train", TrainConfig)):
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        flags = {
            f"--{'no-' if name == 'controls' else ''}{name.replace('_', '-')} "
            for name in kind.model_fields
        }
        assert [flag for flag in flags if flag not in shown] == []


@pytest.mark.parametrize(
    ("words", "repeated"),
    [
        ("--corrections a b --seeds 3", "--corrections a --corrections b --seeds 3"),
        ("--seeds 3 --corrections a", "--seeds 3 --corrections a"),
        ("--correction a b", "--corrections a --corrections b"),
        ("--corrections a --corrections b c", "--corrections a --corrections b --corrections c"),
        ("folder --json", "folder --json"),
    ],
)
def test_one_flag_takes_many_corrections(words, repeated):
    assert repeat_flag(words.split()) == repeated.split()


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("words", [["plugins", "list"], ["plugins", "list", "--json"]])
def test_listing_plugins_imports_nothing_heavy(words):
    heavy = "('torch', 'accelerate', 'mlflow', 'pydantic', 'numpy', 'typer')"
    code = f"import sys; from regrad_runner.cli.main import main; main({words!r}); "
    done = python(f"{code} sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)")
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits" in done.stdout


def test_the_list_of_plugins_is_json_for_programs(capsys):
    assert main(["plugins", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"digits", "parquet"} <= {
        entry["name"] for entry in listed if entry["kind"] == "workload"
    }


def test_a_comparison_and_its_report_print_the_same_and_only_progress_goes_to_stderr(here, capsys):
    (here / "baseline.yaml").write_text("corrections: []\n")
    assert (
        main(["compare", *SMALL, "--config", "baseline.yaml", "--seeds", "2", "--out", "out"]) == 0
    )
    compared = capsys.readouterr()
    assert "test accuracy" in compared.out
    assert "regrad report out shows this again" in compared.out
    assert "[2/2] baseline, seed 1" in compared.err
    (here / "out" / "curves.png").unlink()
    assert main(["report", "out"]) == 0
    assert capsys.readouterr().out == compared.out
    assert (here / "out" / "curves.png").is_file()
    assert main(["report", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"][0]["seeds"] == 2


def test_a_run_and_its_report_print_the_same(here, capsys):
    assert main(["train", *SMALL, "--out", "out"]) == 0
    trained = capsys.readouterr().out
    assert "baseline, seed 0, learning rate 0.05" in trained
    assert main(["report", "out"]) == 0
    assert capsys.readouterr().out == trained
    assert main(["report", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["steps"] == 8


@needs_plugins
def test_explain_says_what_each_correction_would_change(here, capsys):
    assert main(["explain", *SHAPE, "--corrections", "xgrad", "powergrad"]) == 0
    shown = capsys.readouterr().out
    assert "more; --all shows them" in shown
    assert "logits" in shown
    assert main(["explain", *SHAPE, "--corrections", "xgrad", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["corrections"]
    assert one["name"] == "xgrad"
    assert one["refuses"]["gcw"] == "both own the look-ahead"
    assert {row["stage"] for row in one["rows"]} == {"weights"}
    assert main(["explain", *SHAPE, "--corrections", "xgrad", "--all"]) == 0
    shown = capsys.readouterr().out
    assert [row["tensor"] for row in one["rows"] if row["tensor"] not in shown] == []
    assert list(here.iterdir()) == []


def tracked(folder: Path) -> dict[str, str]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return dict(database.execute("select name, status from runs"))


@pytest.fixture
def baseline(here):
    """Settings of very short runs of the baseline alone."""
    (here / "baseline.yaml").write_text("corrections: []\nepochs: 1\ntrain_size: 100\nwidth: 4\n")
    return ["--config", "baseline.yaml", "--out", "out"]


def in_the_step(monkeypatch, number, action):
    """Let something happen in a training step, counted over all runs from 1.

    A comparison estimates no time then, which would take steps of its own.
    """
    count = itertools.count(1)
    original = TrainingRun._micro_batch

    def step(self, images, labels):
        if next(count) == number:
            action()
        original(self, images, labels)

    monkeypatch.setattr(compare, "estimate_in_words", lambda *_: None)
    monkeypatch.setattr(TrainingRun, "_micro_batch", step)


def test_a_sigterm_ends_comparison_and_run_as_killed(here, baseline, monkeypatch, capsys):
    in_the_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--seeds", "3", *baseline])
    assert stop.value.code == 143
    assert (
        "stopped; to continue from here: regrad compare --resume --out out"
        in capsys.readouterr().err
    )
    assert tracked(here / "out") == {
        "out": "KILLED",
        "baseline, seed 0": "FINISHED",
        "baseline, seed 1": "KILLED",
    }


def test_ctrl_c_ends_a_run_as_killed_with_code_130(here, baseline, monkeypatch, capsys):
    in_the_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(["train", *baseline]) == 130
    assert (
        "stopped; to continue from here: regrad train --resume --out out" in capsys.readouterr().err
    )
    assert tracked(here / "out") == {"out": "KILLED"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoints(folder / "checkpoints")[-1] / "tensors.pt", weights_only=True)[
        "model"
    ]


def exit_code(words) -> int:
    try:
        return main(words)
    except SystemExit as stop:
        return int(stop.code)


@pytest.mark.parametrize(
    ("number", "code", "hint"),
    [
        (signal.SIGINT, 130, "; once more leaves at once"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGUSR1, 138, ""),
    ],
)
def test_a_stopped_training_saves_after_its_step_and_goes_on_from_there(
    here, monkeypatch, capfd, number, code, hint
):
    corrections = ["--corrections", "xgrad"] if "xgrad" in regrad.available() else []
    words = ["train", *SMALL, *corrections]
    assert main([*words, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        in_the_step(patch, 3, lambda: os.kill(os.getpid(), number))
        assert exit_code([*words, "--out", "out"]) == code
    assert f"stopping after this step{hint}\n" in capfd.readouterr().err
    assert checkpoints(here / "out" / "checkpoints")[-1].name == "step-00000003"
    assert main(["train", "--resume", "--out", "out"]) == 0
    assert "continuing from step 3" in capfd.readouterr().err
    stopped, whole = weights(here / "out"), weights(here / "whole")
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_a_second_ctrl_c_leaves_at_once_without_saving_or_waiting(here, monkeypatch, capfd):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the training went on")

    in_the_step(monkeypatch, 3, twice)
    words = (
        [*SHAPE, "--epochs", "2", "--corrections", "xgrad"]
        if "xgrad" in regrad.available()
        else SHAPE
    )
    assert main(["train", *words, "--tracking-uri", DEAD_SERVER, "--out", "out"]) == 130
    said = capfd.readouterr().err
    assert "once more leaves at once" in said
    assert f"tracking at {DEAD_SERVER} is incomplete" in said
    assert "regrad sync out completes it" in said
    assert not (here / "out" / "checkpoints").exists()
    (record,) = (here / "out" / "runs").glob("*/0/run.json")
    assert json.loads(record.read_text())["status"] == "killed"


@pytest.mark.usefixtures("ready_schema")
def test_sync_shows_a_run_that_was_not_tracked_and_the_second_time_finds_everything_there(
    here, baseline, capsys
):
    assert main(["train", *baseline, "--tracker", "none"]) == 0
    capsys.readouterr()
    address = f"sqlite:///{here / 'out' / 'mlflow.db'}"
    assert main(["sync", "out"]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f" numbers and 1 files of 1 runs sent to {address}\n")
    assert main(["sync", "out"]) == 0
    assert capsys.readouterr().out == f"everything in out is at {address}\n"
    assert tracked(here / "out") == {"out": "FINISHED"}


KILLED_IN_ITS_THIRD_STEP = """
import os, signal, sys
from regrad_runner.cli.main import main
from regrad_runner.training.run import TrainingRun
original = TrainingRun._micro_batch
def step(self, images, labels):
    if self.position.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, images, labels)
TrainingRun._micro_batch = step
main(sys.argv[1:])
"""


@pytest.mark.long
def test_a_run_that_was_killed_is_marked_when_it_goes_on_and_its_curve_is_whole(here):
    words = [
        "train",
        *SHAPE,
        "--epochs",
        "1",
        "--evaluations-per-epoch",
        "4",
        "--checkpoint-every",
        "1",
    ]
    command = [sys.executable, "-c", KILLED_IN_ITS_THIRD_STEP, *words, "--out", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert main(["train", "--resume", "--out", "out"]) == 0
    with closing(sqlite3.connect(here / "out" / "mlflow.db")) as database:
        runs = database.execute("select run_uuid, status from runs order by start_time").fetchall()
        losses = (
            "select step from metrics where key = 'training loss' and run_uuid = ? order by step"
        )
        curves = [[step for (step,) in database.execute(losses, [run])] for run, _ in runs]
    assert [status for _, status in runs[:-1]] in ([], ["KILLED"])  # it may not have come so far
    assert (runs[-1][1], curves[-1]) == ("FINISHED", [1, 2, 3, 4])


def crash():
    raise RuntimeError("the machine is on fire")


def test_a_crash_of_one_run_is_failed_in_the_tracker_and_in_the_exit_code(
    here, baseline, monkeypatch, capsys
):
    in_the_step(monkeypatch, 2, crash)
    assert main(["compare", "--seeds", "3", *baseline]) == 1
    said = capsys.readouterr()
    assert "baseline, seed 1 failed: RuntimeError: the machine is on fire" in said.err
    assert "1 run failed" in said.out
    assert tracked(here / "out") == {
        "out": "FAILED",
        "baseline, seed 0": "FINISHED",
        "baseline, seed 1": "FAILED",
        "baseline, seed 2": "FINISHED",
    }
    (trace,) = (here / "out" / "artifacts").rglob("traceback.txt")
    assert trace.read_text().rstrip().endswith("RuntimeError: the machine is on fire")


def test_a_crash_in_training_is_failed_in_the_tracker_and_shows_its_traceback(
    here, baseline, monkeypatch
):
    in_the_step(monkeypatch, 1, crash)
    with pytest.raises(RuntimeError, match="the machine is on fire"):
        main(["train", *baseline])
    assert tracked(here / "out") == {"out": "FAILED"}
    (trace,) = (here / "out" / "artifacts").rglob("traceback.txt")
    assert trace.read_text().rstrip().endswith("RuntimeError: the machine is on fire")


def test_a_disk_that_fills_while_saving_is_one_clear_line_and_the_run_goes_on_when_there_is_room(
    here, monkeypatch, capsys
):
    words = ["train", *SMALL, "--checkpoint-every", "3", "--out"]
    saved, original = [], torch.save

    def fills(value, file):
        saved.append(value)
        if len(saved) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        original(value, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fills)
        assert main([*words, "out"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "regrad: checkpoint must be written, got [Errno 28] No space left on device; earlier ones"
    )
    assert [path.name for path in (here / "out" / "checkpoints").iterdir()] == ["step-00000003"]
    assert main(["train", "--resume", "--out", "out"]) == main([*words, "whole"]) == 0
    resumed, whole = weights(here / "out"), weights(here / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_folder_that_holds_a_hidden_file_or_a_link_is_not_empty_and_one_with_a_lock_is(
    here, capsys
):
    (here / "out").mkdir()
    (here / "victim").write_text("mine")
    for name in (".config.yaml.part", ".hidden"):
        (here / "out" / name).symlink_to(here / "victim")
        assert main(["train", *SMALL, "--epochs", "1", "--out", "out"]) == 2
        assert f"which holds '{name}'; choose another folder" in capsys.readouterr().err
        (here / "out" / name).unlink()
    assert (here / "victim").read_text() == "mine"
    (here / "out" / ".regrad.lock").touch()  # which a kill leaves
    assert main(["train", "--resume", "--out", "out"]) == 2
    assert capsys.readouterr().err.endswith(
        "without config.yaml; start it again without --resume\n"
    )
    assert main(["train", *SMALL, "--epochs", "1", "--out", "out"]) == 0
    assert main(["train", *SMALL, "--epochs", "1", "--out", "out"]) == 2
    assert (
        "out must be a new or empty folder, got 'out'; --resume continues it"
        in capsys.readouterr().err
    )


@pytest.mark.long
def test_a_process_that_gets_a_sigterm_leaves_no_run_open_and_a_folder_to_go_on_from(
    here, baseline
):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    words = ["-m", "regrad_runner", "compare", "--seeds", "500", *baseline]
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not process.stderr.readline().startswith("[  1/500]"):
        assert process.poll() is None
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    statuses = tracked(here / "out")
    assert statuses.pop("out") == "KILLED"
    assert set(statuses.values()) <= {"FINISHED", "KILLED"}
    assert len(ResultsFolder(here / "out").results) >= 1


@pytest.mark.parametrize("words", [["--seed", "1e3"], ["--seed=1e3"]])
def test_a_value_that_is_no_number_is_repeated_with_its_flag(capsys, words):
    assert main(["train", *words, "--epochs", "2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("regrad: Invalid value for '--seed': ")
    assert said.endswith(", got '1e3'\n")


def test_a_flag_with_its_first_value_behind_an_equals_sign_takes_the_others_too():
    words = "--corrections=xgrad agc --seeds 2 --correction=gcw"
    repeated = "--corrections xgrad --corrections agc --seeds 2 --corrections gcw"
    assert repeat_flag(words.split()) == repeated.split()


def test_errors_and_warnings_show_the_escape_codes_of_others(capsys):
    assert main(["plugins", "show", "\x1b[31m\u202e"]) == 2
    assert capsys.readouterr().err.removesuffix("\n").isprintable()
    for category in (RegradWarning, UserWarning):
        text = format_warning("two\n\x1b[31mlines\u202e", category, "file\x1b.py", 3)
        assert r"\x1b[31mlines\u202e" in text
        assert text.replace("\n", "").isprintable()


def test_a_plugin_whose_error_has_escape_codes_is_one_plain_line(tmp_path, monkeypatch, capsys):
    info = tmp_path / "odd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: odd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[regrad]\nodd = odd_module_of_this_test:Odd\n")
    source = r"raise RuntimeError('\x1b[31mred\n\u202e')"
    (tmp_path / "odd_module_of_this_test.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for words in (["plugins", "show", "odd"], ["explain", "--corrections", "odd"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.removesuffix("\n").isprintable()
        assert r"\x1b[31mred" in said
