import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from regrad_runner.tracking.of_scripts import ScriptRuns
from regrad_runner.tracking.stores import Store

NAME = "regrad train, its own runs"


@pytest.fixture
def script_runs(tmp_path, schema):
    """The runs of a script, whose store is a copy of a database that was made before."""
    shutil.copyfile(schema, tmp_path / "mlflow.db")
    return ScriptRuns(tmp_path, None, "regrad train", "run-1")


def test_the_experiment_is_there_before_a_script_can_make_it(tmp_path, script_runs):
    # MLflow looks for the experiment that the environment names and then makes it, so the second
    # of two scripts that start at once fails.
    told = script_runs.environment()
    assert told["MLFLOW_EXPERIMENT_NAME"] == NAME
    known = Store(tmp_path).client().get_experiment_by_name(NAME)
    assert known.lifecycle_stage == "active"
    assert known.artifact_location == (tmp_path / "artifacts").as_uri()


def test_runs_that_start_at_once_share_one_experiment(tmp_path, script_runs):
    with ThreadPoolExecutor(8) as threads:
        told = [threads.submit(script_runs.environment) for _ in range(8)]
    assert len({tuple(one.result().items()) for one in told}) == 1
    found = Store(tmp_path).client().search_experiments()
    assert sorted(one.name for one in found) == ["Default", NAME]


def test_an_experiment_that_the_user_deleted_comes_back(tmp_path, script_runs):
    script_runs.environment()
    client = Store(tmp_path).client()
    client.delete_experiment(client.get_experiment_by_name(NAME).experiment_id)
    script_runs.environment()
    assert client.get_experiment_by_name(NAME).lifecycle_stage == "active"
