"""Comparisons of scripts. Most take a launcher that starts them without torch."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from regrad_runner.cli.main import main
from regrad_runner.reporting.page.repeat import command_to_repeat
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.scripts import child
from regrad_runner.settings.loading import read_settings

LIGHT = shlex.join([sys.executable, str(Path(__file__).with_name("light_launcher.py"))])
MEASURE = r"loss=step (?P<step>\d+): loss ([0-9.]+)"
SCRIPT = """
import os, sys
seed = int(sys.argv[1])
arm = os.environ["CORRECTIONS"]
rate = float(sys.argv[2]) if len(sys.argv) > 2 else 0.1
print(open("counted", "a").write(f"{sys.argv[1:]} {arm}\\n"))
for step in (1, 2, 3):
    # The baseline is best at 0.4, xgrad at 0.1.
    best = 0.1 if arm else 0.4
    print(f"step {step}: loss {(3 - step) + abs(rate - best) + 0.001 * seed % 0.1:.4f}")
"""


@pytest.fixture
def here(tmp_path, monkeypatch, ready_schema):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(child, "SECONDS_TO_TERMINATE", 0.5)
    monkeypatch.setattr(child, "SECONDS_FOR_THE_REST", 0.5)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def compare(*words, script=("train.py", "{seed}"), seeds=2, tracker="none", flags=()):
    """Compare xgrad on the script in the current folder, without torch."""
    return main(
        [
            *("compare", "--corrections", "xgrad", *words, "--no-controls"),
            *("--launcher", LIGHT, "--measure", MEASURE, "--lower-is-better"),
            *("--seeds", str(seeds), "--out", "out", "--tracker", tracker, "--jobs", "2", *flags),
            *("--", *script),
        ]
    )


def ends_as(here, capsys, body, *, code=1, flags=()):
    """Compare with a script that does something odd in the arm xgrad, and return what is said."""
    odd = f"import os, sys, time\nif os.environ['CORRECTIONS']:\n    {body}\n"
    (here / "train.py").write_text(odd + SCRIPT)
    assert compare(flags=flags) == code
    folder = ResultsFolder(here / "out")
    finished = {result.seed for result in folder.results if result.arm == "baseline"}
    assert finished == {0, 1}  # the comparison went on
    return capsys.readouterr().err


def test_a_comparison_ends_with_table_and_page_and_exit_code_0(here, capsys):
    assert compare(seeds=6) == 0
    shown = capsys.readouterr()
    assert "train, SGD on Linear: 2 arms × 6 seeds, 2 at once" in shown.err
    assert "[12/12] " in shown.err
    assert "validation" not in shown.out
    table = " ".join(shown.out.split())
    assert "baseline .3025 ± .0019" in table
    assert "step times are unknown: the runs were those of a script" in table
    page = (here / "out" / "report.html").read_text()
    for wrong in (
        "Learning rate",
        "test split",
        "epochs",
        "older versions",
        "validation",
        ">0.00<",
    ):
        assert wrong not in page
    assert "-- train.py &#39;{seed}&#39;" in page
    assert "and loss" not in page
    assert ResultsFolder(here / "out").results[0].steps == 3


def test_the_command_on_the_page_repeats_the_settings(here, capsys):
    settings = ["--timeout", "99", "--optimizer-class", "SGD", "--optimizer-class", "Adam"]
    assert compare("agc:max_ratio=0.1", flags=settings, script=("train.py", "{seed}", "0.1")) == 0
    first = read_settings(here / "out" / "config.yaml")
    assert first["optimizer_class"] == ["SGD", "Adam"]
    words = shlex.split(command_to_repeat(first).replace("\\\n", " "))
    assert words[:2] == ["regrad", "compare"]
    assert words[-4:] == ["--", "train.py", "{seed}", "0.1"]
    assert main([*words[1:3], *words[3:-4], "--out", "again", *words[-4:]]) == 0
    assert read_settings(here / "again" / "config.yaml") == first


def test_a_measure_that_is_always_zero_divides_nothing(here, capsys):
    (here / "train.py").write_text("print('step 0: loss 0')")
    assert compare(seeds=6) == 0
    shown = capsys.readouterr().out
    assert "baseline .0000 ± .0000" in " ".join(shown.split())
    assert "nan" not in shown


def test_a_comparison_goes_on_with_more_seeds_and_corrections(here, capsys, monkeypatch):
    assert compare() == 0
    monkeypatch.setenv("REFUSED", "agc")
    more = ["compare", "--resume", "--out", "out", "--jobs", "2"]
    assert main([*more, "--seeds", "3", "--corrections", "gcw", "xgrad"]) == 0
    assert (here / "counted").read_text().count("\n") == 9
    assert read_settings(here / "out" / "config.yaml")["corrections"] == ["xgrad", "gcw"]
    assert {result.arm for result in ResultsFolder(here / "out").results} == {
        "baseline",
        "xgrad",
        "gcw",
    }
    capsys.readouterr()
    assert main([*more, "--lr", "0.1"]) == 2
    assert "script must take {lr} in its arguments when --lr is given" in capsys.readouterr().err


def test_one_command_starts_a_comparison_of_a_script_and_continues_it(here, capsys):
    automatic = ["--resume", "auto"]
    assert compare(flags=automatic) == 0
    assert "nothing is left to run" not in capsys.readouterr().err
    assert compare(flags=automatic) == 0
    assert "every run has ended; nothing is left to run" in capsys.readouterr().err
    assert (here / "counted").read_text().count("\n") == 4
    assert compare(flags=automatic, seeds=3) == 0
    assert (here / "counted").read_text().count("\n") == 6
    capsys.readouterr()
    assert compare(flags=automatic, seeds=3, script=("train.py", "{seed}", "0.1")) == 2
    assert "out must hold the same configuration, got script" in capsys.readouterr().err
    assert compare(flags=automatic) == 2
    assert "got seeds 3 there and 2 here; choose another folder" in capsys.readouterr().err


def test_several_rates_are_chosen_by_trials_and_extensions(here, capsys):
    flags = ["--lr", "0.1,0.2", "--tuning-seeds", "1"]
    assert compare(script=("train.py", "{seed}", "{lr}"), flags=flags) == 0
    folder = ResultsFolder(here / "out")
    assert folder.rates == {"baseline": 0.4, "xgrad": 0.1}
    assert folder.choices["baseline"].added[0] == 0.4
    assert "learning rates chosen by trials: baseline 0.4, xgrad 0.1" in capsys.readouterr().out
    assert "validation split" not in (here / "out" / "report.html").read_text()


def test_a_rate_whose_trial_diverges_is_not_chosen_and_ends_nothing(here, capsys):
    odd = "import sys\nif sys.argv[2] == '0.4':\n    print('step 1: loss nan')\n    sys.exit()\n"
    (here / "train.py").write_text(odd + SCRIPT)
    flags = ["--lr", "0.1,0.2,0.4", "--tuning-seeds", "1", "--tuning-extensions", "0"]
    assert compare(script=("train.py", "{seed}", "{lr}"), flags=flags, seeds=1) == 0
    assert ResultsFolder(here / "out").rates == {"baseline": 0.2, "xgrad": 0.1}


def test_settings_come_from_a_file_too(here):
    (here / "mine.yaml").write_text(
        json.dumps(
            {
                "script": ["train.py", "{seed}"],
                "measure": MEASURE,
                "better": "lower",
                "launcher": LIGHT,
                "seeds": 1,
                "corrections": ["xgrad"],
                "controls": False,
                "tracker": "none",
            }
        )
    )
    assert main(["compare", "--config", "mine.yaml", "--out", "out", "--jobs", "2"]) == 0
    assert len(ResultsFolder(here / "out").results) == 2


def test_cells_run_as_jobs_and_a_control_knows_its_change(here, capsys):
    words = ["--launcher", LIGHT, "--measure", MEASURE, "--lower-is-better", "--tracker", "none"]
    words += ["--corrections", "xgrad", "--seeds", "1", "--out", "out", "--", "train.py", "{seed}"]
    assert main(["compare", "--cells", *words]) == 0
    assert capsys.readouterr().out.splitlines()[:1] == ["runs 0-2"]
    assert [main(["compare", "--out", "out", "--cell", str(n)]) for n in (2, 0, 1)] == [0, 0, 0]
    assert main(["report", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing_cells"] == []
    receipt = json.loads((here / "out/runs/nesterov/0/receipt.json").read_text())
    assert receipt["run"]["control"]["optimizer"] == {"nesterov": True}
    assert receipt["script"]["control_of"] == ["xgrad"]
    assert "nesterov=True" in (here / "out" / "report.html").read_text()


def test_a_folder_cannot_choose_the_class_of_an_optimizer(here, capsys):
    words = ["--launcher", LIGHT, "--measure", MEASURE, "--lower-is-better", "--tracker", "none"]
    words += ["--corrections", "xgrad", "--seeds", "1", "--out", "out", "--", "train.py", "{seed}"]
    assert main(["compare", "--cells", *words]) == 0
    about = json.loads((here / "out" / "about.json").read_text())
    about["arms"]["nesterov"]["optimizer_class"] = "subprocess.Popen"
    (here / "out" / "about.json").write_text(json.dumps(about))
    capsys.readouterr()
    assert main(["compare", "--out", "out", "--cell", "2"]) == 2
    assert "optimizer_class must be one of torch.optim, got 'subprocess.Popen'" in (
        capsys.readouterr().err
    )
    del about["arms"]["nesterov"]["optimizer_class"]
    about["arms"]["nesterov"]["no_such"] = 1
    (here / "out" / "about.json").write_text(json.dumps(about))
    assert main(["compare", "--out", "out", "--cell", "2"]) == 2
    assert "about.json must say what the control 'nesterov' changes" in capsys.readouterr().err


def test_all_stands_for_what_fits_and_says_what_is_left_out(here, capsys, monkeypatch):
    monkeypatch.setenv("REFUSED", "agc")
    words = ["--launcher", LIGHT, "--measure", MEASURE, "--lower-is-better", "--tracker", "none"]
    words += ["--corrections", "all", "--seeds", "1", "--out", "out", "--", "train.py", "{seed}"]
    assert main(["compare", "--cells", *words]) == 0
    about = json.loads((here / "out" / "about.json").read_text())
    assert about["left_out"] == {"agc": "it needs whole weights"}
    corrections = read_settings(here / "out" / "config.yaml")["corrections"]
    assert "xgrad" in corrections
    assert "agc" not in corrections
    assert "all" not in corrections


def test_a_control_that_cannot_be_made_is_left_out_and_the_verdict_knows(here, capsys, monkeypatch):
    monkeypatch.setenv("TIED", "1")
    words = ["--launcher", LIGHT, "--measure", MEASURE, "--lower-is-better", "--tracker", "none"]
    words += ["--corrections", "xgrad", "--seeds", "1", "--out", "out", "--", "train.py", "{seed}"]
    assert main(["compare", *words]) == 0
    about = json.loads((here / "out" / "about.json").read_text())
    assert about["left_out"] == {"the control nesterov": "the head is tied"}
    assert list(about["roles"]) == ["baseline", "xgrad"]
    assert about["roles"]["xgrad"]["must_beat"] == "nesterov"
    assert "left out: the control nesterov (the head is tied)" in capsys.readouterr().out


def test_what_is_refused_is_named_before_anything_is_written(here, capsys, monkeypatch):
    monkeypatch.setenv("REFUSED", "xgrad")
    assert compare() == 2
    assert (
        "regrad: corrections must fit what the script trains, got 'xgrad': it needs whole weights"
        in capsys.readouterr().err
    )
    assert not (here / "out").exists()


def test_a_folder_that_is_taken_is_refused_before_the_script_starts(here, capsys, monkeypatch):
    (here / "out").mkdir()
    (here / "out" / "mine").touch()
    monkeypatch.setenv("REFUSED", "xgrad")
    assert compare() == 2
    assert "out must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no room')", "xgrad, seed 0 failed: it ended with exit code 1: Runti"),
        ("sys.exit(7)", "failed: it ended with exit code 7: it printed nothing"),
        ("sys.exit(0)", r"failed: it gave no loss: nothing that matches 'step (?P<step>\\d+)"),
        ("input()", "it read its standard input, which is empty here; its output is in out/runs"),
        ("os.kill(os.getpid(), 9)", "it was ended by SIGKILL: it printed nothing; perhaps memory"),
        (
            "print('regrad: not attached: SGD: too old', flush=True); sys.exit(3)",
            "failed: nothing was corrected: SGD: too old; its output is in",
        ),
        ("print('step 1: loss nan'); sys.exit(3)", "failed: nothing was corrected: step 1: loss"),
    ],
)
def test_a_run_that_fails_is_one_line_and_the_others_go_on(here, capsys, body, said):
    told = ends_as(here, capsys, body)
    lines = [line for line in told.splitlines() if "failed: " in line]
    assert len(lines) == 2
    assert said in told
    assert "Traceback" not in told
    assert (here / "out/runs/xgrad/0/output.txt").is_file()
    assert "xgrad, seed 1" in (here / "out/failures.txt").read_text()


def test_a_run_that_hangs_is_ended(here, capsys):
    told = ends_as(here, capsys, "print('waits'); time.sleep(600)", flags=["--timeout", "5"])
    assert "failed: it did not end within 5 s (--timeout); its output is in" in told
    assert "waits" in (here / "out/runs/xgrad/0/output.txt").read_text()


@pytest.mark.parametrize("end", ["sys.exit(0)", "raise ValueError('loss is nan')"])
def test_a_run_that_diverges_is_an_outcome_however_it_ends(here, capsys, end):
    body = f"print('step 1: loss 2'); print('step 2: loss nan'); {end}"
    told = ends_as(here, capsys, body, code=0)
    assert "xgrad, seed 0: diverged" in told
    results = ResultsFolder(here / "out").results
    assert {result.status for result in results if result.arm == "xgrad"} == {"diverged"}


def test_a_script_may_change_its_folder_and_remove_what_it_was_given(here, capsys):
    body = "import shutil; shutil.rmtree(sys.argv[2]); os.chdir('/')"
    odd = f"import os, sys\n{body}\ndel sys.argv[2]\n"
    (here / "train.py").write_text(odd + SCRIPT.replace('print(open("counted', "#"))
    assert compare(script=("train.py", "{seed}", "{out}")) == 0


def test_a_file_measure_needs_its_file(here, capsys):
    text = "import json, sys\nif sys.argv[3] == 'xgrad': sys.exit(0)\n"
    text += "for step in (1, 2, 3):\n    print(json.dumps({'loss': 3 / step, 'step': step}), "
    text += "file=open(sys.argv[2] + '/metrics.json', 'a'))\n"
    (here / "train.py").write_text(text)
    words = ("--measure", "loss=json:metrics.json:loss")
    assert compare(flags=words, script=("train.py", "{seed}", "{out}", "{arm}")) == 1
    assert "it gave no loss: no 'loss' in metrics.json; its output" in capsys.readouterr().err
    curve = [p.value for p in ResultsFolder(here / "out").curves if p.seed == 0]
    assert curve == [3.0, 1.5, 1.0]
    page = (here / "out" / "report.html").read_text()
    assert "before the times of evaluations were kept" not in page


def test_links_in_the_place_of_a_runs_files_are_not_followed(here):
    assert compare(seeds=1) == 0
    precious = here / "precious"
    precious.mkdir()
    (precious / "file").write_text("as it was")
    run = here / "out/runs/xgrad/0"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "failed"}))
    for name, target in (("out", precious), ("output.txt", precious / "file")):
        path = run / name
        path.rmdir() if path.is_dir() else path.unlink()
        path.symlink_to(target)
    assert main(["compare", "--resume", "--out", "out", "--jobs", "2"]) == 0
    assert (precious / "file").read_text() == "as it was"
    assert not (run / "out").is_symlink()
    assert not (run / "output.txt").is_symlink()


def test_equal_runs_of_different_seeds_are_an_error(here, capsys):
    (here / "train.py").write_text("import os, pathlib, sys\nsys.argv[1] = '0'\n" + SCRIPT)
    assert compare(script=("train.py", "0", "0.1", "{arm}"), flags=["--seed-by-run"]) == 1
    told = capsys.readouterr().err
    assert "regrad: seeds must change the runs, got the same run of" in told
    assert "Traceback" not in told


def test_without_a_seed_in_its_words_a_script_is_seeded_by_the_run(here):
    text = SCRIPT.replace("int(sys.argv[1])", "int(os.environ['FLAGS'].split('--seed ')[1][0])")
    text += "print(os.environ['FLAGS'])\n"
    (here / "train.py").write_text(text)
    flags = ["--seed-by-run", "--optimizer-class", "Muon"]
    assert compare(script=("train.py", "0"), flags=flags) == 0
    flags = (here / "out/runs/xgrad/1/output.txt").read_text().splitlines()[-1]
    assert "--corrections xgrad --optimizer-class Muon --seed 1 --shift-seeds --receipt" in flags
    values = {r.seed: r.value for r in ResultsFolder(here / "out").results if r.arm == "xgrad"}
    assert values == {0: 0.0, 1: 0.001}


def test_pairs_that_begin_differently_are_one_warning_and_the_report_says_it_again(
    here, capsys, monkeypatch
):
    monkeypatch.setenv("UNLIKE", "1")
    assert compare() == 0
    said = "started from other weights or inputs than the baseline"
    shown = capsys.readouterr()
    assert shown.err.count(said) == 1
    assert shown.out.count(said) == 1
    assert main(["report", "out"]) == 0
    assert said in capsys.readouterr().out
    assert said in (here / "out" / "report.html").read_text().replace("&#39;", "'")
    assert main(["report", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unlike_pairs"] == [
        {"arm": "xgrad", "seed": 0},
        {"arm": "xgrad", "seed": 1},
    ]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_resume_runs_the_rest_in_clean_folders(here, capsys, number):
    body = (
        "import os, subprocess, sys, time\n"
        "open(sys.argv[3] + '/left', 'x').close()\n"
        "if sys.argv[1] == '1' and not os.path.exists('again'):\n"
        "    sleeper = subprocess.Popen(['sleep', '600'])\n"
        "    open(f'{os.environ[\"CORRECTIONS\"]}.pid', 'w').write(f'{os.getpid()} {sleeper.pid}')\n"
        "    time.sleep(600)\n"
    )
    (here / "train.py").write_text(body + SCRIPT)
    words = ["compare", "--corrections", "xgrad", "--no-controls", "--launcher", LIGHT]
    words += ["--measure", MEASURE, "--lower-is-better", "--seeds", "2", "--out", "my out"]
    words += ["--tracker", "none", "--jobs", "2", "--", "train.py", "{seed}", "0.1", "{out}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "regrad_runner", *words], stderr=subprocess.PIPE, text=True
    )
    waiting = [here / ".pid", here / "xgrad.pid"]
    for _ in range(2400):
        if process.poll() is not None or all(
            file.is_file() and file.read_text() for file in waiting
        ):
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert "to continue from here: regrad compare --resume --out 'my out' --jobs 2" in told
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    for file in waiting:
        for pid in map(int, file.read_text().split()):
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
    before = (here / "counted").read_text().count("\n")
    assert before == 2
    (here / "again").touch()
    assert main(["compare", "--resume", "--out", "my out", "--jobs", "2"]) == 0
    assert (here / "counted").read_text().count("\n") == 4  # nothing ran twice
    assert {r.status for r in ResultsFolder(here / "my out").results} == {"finished"}
    assert main(["compare", "--resume", "--out", "my out"]) == 0
    assert (here / "counted").read_text().count("\n") == 4


@pytest.mark.long
def test_runs_of_the_script_itself_are_found_in_mlflow(here, capsys):
    (here / "train.py").write_text(
        "import sys\nfrom mlflow.tracking import MlflowClient\n"
        "import mlflow\n"
        "if sys.argv[1] == '1': mlflow.set_experiment('mine')\n"
        "with mlflow.start_run():\n"
        "    for step in (1, 2, 3): mlflow.log_metric('eval/loss', 3 / step + int(sys.argv[1]), step)\n"
    )
    flags = ["--measure", "loss=mlflow:eval/loss"]
    assert compare(flags=flags, tracker="mlflow") == 0
    curves = ResultsFolder(here / "out").curves
    for seed in (0, 1):
        curve = [p.value for p in curves if (p.arm, p.seed) == ("xgrad", seed)]
        assert curve == [3.0 + seed, 1.5 + seed, 1.0 + seed]


TRAINS = """
import sys
import torch
from torch import nn

torch.manual_seed(int(sys.argv[1]))
model = nn.Linear(4, 1)
optimizer = {
    "sgd": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": torch.optim.AdamW(model.parameters(), lr=0.1),
}[sys.argv[2]]
inputs = torch.randn(64, 4)
for step in (1, 2, 3):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs), inputs.sum(dim=1, keepdim=True))
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.6f}", flush=True)
"""


@pytest.mark.long
def test_a_comparison_of_a_script_that_trains_is_in_the_store(here, capsys):
    from mlflow import MlflowClient

    (here / "train.py").write_text(TRAINS)
    words = ["compare", "--corrections", "agc", "--no-controls", "--seeds", "1", "--out", "out"]
    words += ["--measure", MEASURE, "--lower-is-better", "--jobs", "2"]
    assert main([*words, "--", "train.py", "{seed}", "sgd"]) == 0
    shown = capsys.readouterr()
    assert "train, SGD on Linear: 2 arms × 1 seeds" in shown.err
    client = MlflowClient(f"sqlite:///{(here / 'out' / 'mlflow.db').as_posix()}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    names = {run.info.run_name for run in client.search_runs(experiments)}
    assert {"baseline, seed 0", "agc, seed 0"} <= names
    by_arm = {result.arm: result for result in ResultsFolder(here / "out").results}
    assert by_arm["agc"].touched
    assert not by_arm["baseline"].touched
    assert by_arm["agc"].steps == 3
    output = (here / "out/runs/agc/0/output.txt").read_text()
    assert "regrad: agc on SGD with Linear: 3 steps corrected" in output
