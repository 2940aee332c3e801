"""A whole folder in MLflow, from hands that are not to be trusted as well."""

import json
import os
import shutil
import sqlite3
from contextlib import closing

import pytest
from regrad_runner.cli.main import main
from regrad_runner.reporting.verdict_numbers import verdict_numbers
from regrad_runner.results.about import LAYOUT
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.locks import running_cell, writing
from regrad_runner.results.outcomes import Result
from regrad_runner.results.run import begin_run
from regrad_runner.results.sync import sync
from regrad_runner.settings.config import FIRST_TUNING_SEED, CompareConfig
from regrad_runner.settings.loading import write_config

pytestmark = pytest.mark.usefixtures("ready_schema")
SECRET = "s3kret-w0rd"
CURVES = {"evaluation": {"loss": "training loss"}}


def begin(folder, arm="baseline", seed=0):
    values = {"name": f"{arm}, seed {seed}", "arm": arm, "seed": seed, "lr": 0.1, "curves": CURVES}
    record = begin_run(folder, values)
    for step in range(3):
        record.log("evaluation", step, {"loss": 1.0 / (step + 1)})
    return record


@pytest.fixture
def out(tmp_path):
    """The folder of a comparison of one arm, of which one run ended and one is missing."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.yaml").write_text(write_config(CompareConfig(seeds=2, lr=(0.1,))))
    about = {"layout": LAYOUT, "id": "a" * 32, "started": 1_700_000_000_000}
    about |= {"kind": "comparison", "workload": "digits", "arms": {"baseline": {}}}
    (folder / "about.json").write_text(json.dumps(about))
    begin(folder).end("finished", result={"value": 0.5})
    return folder


def rows(folder, what):
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(what).fetchall()


def statuses(folder):
    return dict(rows(folder, "select name, status from runs where lifecycle_stage = 'active'"))


def test_everything_arrives_once_however_often_it_is_synced(out):
    done = sync(out)
    assert (done.sent.points, done.runs, done.is_complete) == (3, 2, True)
    assert not sync(out).sent
    assert statuses(out) == {"out": "KILLED", "baseline, seed 0": "FINISHED"}
    assert rows(out, "select key, count(*) from metrics group by key") == [("training loss", 3)]
    assert rows(out, "select value from params where key = 'arm'") == [("baseline",)]
    begin(out, seed=1).end("finished", result={"value": 0.5})
    assert sync(out).sent.points == 3
    assert set(statuses(out).values()) == {"FINISHED"}


def test_more_seeds_are_a_tag_that_changes_and_no_parameter_that_may_not(out):
    sync(out)
    (out / "config.yaml").write_text(write_config(CompareConfig(seeds=5, lr=(0.1,))))
    assert sync(out).is_complete
    assert rows(out, "select value from tags where key = 'seeds'") == [("5",)]
    assert rows(out, "select value from params where key = 'seeds'") == []


def test_the_comparison_shows_the_numbers_of_its_verdicts_once(out, ended_run):
    about = json.loads((out / "about.json").read_text())
    about |= {"arms": {"baseline": {}, "agc": {}}, "measure": {"name": "accuracy", "target": None}}
    (out / "about.json").write_text(json.dumps(about))
    shutil.rmtree(out / "runs")
    for seed in range(6):
        shifts = {"baseline": 0.0, "agc": 0.01 + 0.001 * (seed % 2)}
        for arm, shift in shifts.items():
            ended_run(out, Result(arm=arm, seed=seed, value=0.5 + shift, touched=True))
    sync(out, verdicts=verdict_numbers)
    wanted = verdict_numbers(out)
    kept = (
        "select key, value from latest_metrics join runs using (run_uuid) where runs.name = 'out'"
    )
    assert dict(rows(out, kept)) == pytest.approx(wanted)
    assert wanted["difference/agc"] == pytest.approx(0.0105)
    assert wanted["difference_low/agc"] < 0.0105 < wanted["difference_high/agc"]
    assert 0 < wanted["p/agc"] < 0.001
    assert not sync(out, verdicts=verdict_numbers).sent
    ended_run(out, Result(arm="agc", seed=6, value=0.9, touched=True))
    ended_run(out, Result(arm="baseline", seed=6, value=0.5))
    sync(out, verdicts=verdict_numbers)
    assert dict(rows(out, kept))["difference/agc"] > 0.05


def test_a_folder_without_a_verdict_is_synced_without_its_numbers(out):
    assert sync(out, verdicts=verdict_numbers).is_complete
    assert rows(out, "select key from metrics where key like 'difference%'") == []


def end_trial(folder, lr, validation):
    values = {"name": f"lr {lr}", "arm": "baseline", "seed": FIRST_TUNING_SEED, "lr": lr}
    with begin_run(folder, values | {"trial": True}) as record:
        record.end("finished", result={"validation": validation})


@pytest.mark.parametrize("sign", [1, -1], ids=["higher is better", "lower is better"])
def test_a_comparison_has_ended_when_its_arms_ask_for_no_further_rate(out, sign):
    config = CompareConfig(seeds=1, lr=(0.1, 0.3), tuning_seeds=1)
    (out / "config.yaml").write_text(write_config(config))
    about = json.loads((out / "about.json").read_text())
    about["measure"] = {"higher_is_better": sign == 1}
    (out / "about.json").write_text(json.dumps(about))
    end_trial(out, 0.1, 0.5 * sign)
    end_trial(out, 0.3, 0.6 * sign)
    sync(out)
    assert statuses(out)["out"] == "KILLED"
    assert ResultsFolder(out).missing == [2, 3, 4]
    end_trial(out, 0.9, 0.4 * sign)
    sync(out)
    assert statuses(out)["out"] == "FINISHED"
    assert ResultsFolder(out).missing == []


def test_a_trial_whose_value_is_no_number_leaves_the_comparison_open_and_is_said(out):
    config = CompareConfig(seeds=1, lr=(0.1, 0.3), tuning_seeds=1)
    (out / "config.yaml").write_text(write_config(config))
    end_trial(out, 0.1, "high")
    sync(out)
    assert statuses(out)["out"] == "KILLED"
    with pytest.raises(ValueError, match="must hold the result of a run, got another"):
        ResultsFolder(out)


def test_a_failed_run_and_one_that_diverged_are_failed(out):
    begin(out, seed=1).end("diverged", error="NonFiniteError: ten steps in a row")
    sync(out)
    assert statuses(out) == {
        "out": "FINISHED",
        "baseline, seed 0": "FINISHED",
        "baseline, seed 1": "FAILED",
    }
    begin(out, seed=1).end("failed", error="ValueError: no such option")
    sync(out)
    assert statuses(out)["out"] == "FAILED"


def test_a_run_that_is_under_way_in_another_process_is_running_and_a_dead_one_killed(out):
    record = begin(out, seed=1)
    done = sync(out)
    assert (done.killed, statuses(out)["baseline, seed 1"], statuses(out)["out"]) == (
        0,
        "RUNNING",
        "RUNNING",
    )
    record._held.close()  # as the system does for a process that is gone
    done = sync(out)
    assert (done.killed, statuses(out)["baseline, seed 1"]) == (1, "KILLED")
    assert list(done.in_words(out))[-1] == "1 runs that never ended are shown as KILLED"


def test_cells_may_run_and_begin_while_a_folder_is_synced(out):
    with running_cell(out, "runs", "baseline", "1"):
        assert sync(out).is_complete


def test_a_folder_that_a_command_writes_is_one_line_and_exit_code_2(out, capsys):
    with writing(out):
        assert main(["sync", str(out)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "must be written by one command at a time" in said.err
    assert not (out / "mlflow.db").exists()


def test_an_address_is_gone_to_when_it_is_given_or_in_the_settings(out, tmp_path):
    address = f"sqlite:///{tmp_path / 'other.db'}"
    assert sync(out, address).shown == address
    assert not (out / "mlflow.db").exists()
    config = CompareConfig(seeds=2, lr=(0.1,), tracking_uri=address)
    (out / "config.yaml").write_text(write_config(config))
    done = sync(out)
    assert (done.shown, done.sent.points) == (address, 0)


def test_a_password_is_refused_in_the_flag_and_in_the_settings_and_never_shown(out, capsys):
    address = f"http://me:{SECRET}@127.0.0.1:9"
    assert main(["sync", str(out), "--tracking-uri", address]) == 2
    said = capsys.readouterr()
    (out / "config.yaml").write_text(f"tracking_uri: {address}\n")
    assert main(["sync", str(out)]) == 2
    again = capsys.readouterr()
    assert "MLFLOW_TRACKING_PASSWORD" in said.err
    assert "MLFLOW_TRACKING_PASSWORD" in again.err
    assert SECRET not in said.out + said.err + again.out + again.err


@pytest.mark.parametrize("content", ["{}", "[]", "", "null", "{\x00", '{"id": "../../x"}'])
def test_a_damaged_record_is_said_and_the_other_runs_arrive(out, capsys, content):
    begin(out, seed=1).end("finished", result={})
    (out / "runs" / "baseline" / "1" / "run.json").write_text(content)
    assert main(["sync", str(out)]) == 1
    said = capsys.readouterr().out
    assert "1/run.json' must be the record of a run" in said
    assert statuses(out) == {"out": "KILLED", "baseline, seed 0": "FINISHED"}


def everything_in(folder):
    """What lies in a folder: kinds, contents and ends of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = path.readlink()
        else:
            found[path] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def victim(tmp_path):
    """A folder beside the run's, which has what a run has, and must be byte for byte what it was."""
    folder = tmp_path / "victim"
    record = begin(folder, arm="thesis")
    record.keep("receipt.json", '{"mine": true}')
    record.end("finished", result={})
    before = everything_in(folder)
    yield folder
    assert everything_in(folder) == before


@pytest.mark.parametrize("name", ["run.json", "points.jsonl", "receipt.json"])
def test_a_file_that_is_a_link_is_not_sent(out, victim, name):
    path = out / "runs" / "baseline" / "0" / name
    path.unlink(missing_ok=True)
    path.symlink_to(victim / "runs" / "thesis" / "0" / name)
    done = sync(out)
    assert done.is_complete == (name == "receipt.json")
    assert not (out / "artifacts").exists()


@pytest.mark.parametrize("where", ["", "runs", "runs/baseline", "runs/baseline/0"])
def test_a_folder_that_is_a_link_is_left_alone(out, victim, where):
    if not where:
        shutil.rmtree(out / "runs")
        (out / "runs").symlink_to("..")
    else:
        shutil.rmtree(out / where)
        (out / where).symlink_to(victim / where.replace("baseline", "thesis"))
    assert sync(out).sent.points == 0
    assert not any("thesis" in name for name in statuses(out))


@pytest.mark.parametrize("name", ["..", "...", "x/..", " ", "-", "0 or 1=1", "%2e%2e"])
def test_folders_with_odd_names_that_no_run_made_lead_nowhere(out, victim, name):
    if name not in ("..", "x/.."):
        shutil.copytree(out / "runs" / "baseline" / "0", out / "runs" / name / "0")
    record = json.loads((out / "runs" / "baseline" / "0" / "run.json").read_text())
    record["arm"] = f"../../../victim/runs/{name}"
    (out / "runs" / "baseline" / "0" / "run.json").write_text(json.dumps(record))
    done = sync(out)
    assert "must be the record of the run that its folder is named after" in done.problems[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_points_that_are_a_pipe_are_not_waited_for(out):
    (out / "runs" / "baseline" / "0" / "points.jsonl").unlink()
    os.mkfifo(out / "runs" / "baseline" / "0" / "points.jsonl")
    assert "not a regular file" in sync(out).problems[0]


def test_a_folder_of_an_earlier_version_is_one_clear_line(out, capsys):
    (out / "about.json").write_text('{"kind": "comparison", "measure": {}}')
    assert main(["sync", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "folder must be of layout 3" in said


def test_only_a_folder_of_ours_is_synced(tmp_path):
    with pytest.raises(ValueError, match="folder must be one that compare or train wrote, got "):
        sync(tmp_path)


def test_a_run_of_the_earlier_attempt_no_longer_looks_open(out):
    record = begin(out, seed=1)
    sync(out)
    record._held.close()
    begin(out, seed=1).end("finished", result={"value": 0.5})
    sync(out)
    found = rows(out, "select status from runs where name = 'baseline, seed 1' order by start_time")
    assert found == [("KILLED",), ("FINISHED",)]


def test_an_ended_run_shows_its_result(out, ended_run):
    ended_run(out, Result(arm="baseline", seed=1, value=0.25))
    assert sync(out).is_complete
