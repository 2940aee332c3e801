import pytest
from regrad_runner.tracking.mlflow import MetricPoint, TrackedRun

WHEN = 1_700_000_000_000


@pytest.fixture
def tracked_run(tmp_path):
    """A run with everything that one can have, among it values that compare badly."""
    points = [MetricPoint("loss", 1.0 / (step + 1), WHEN + step, step) for step in range(3)]
    odd = [float("nan"), float("inf"), float("-inf"), 1.0, 0.1 + 0.2]
    points += [MetricPoint("odd", value, WHEN, step) for step, value in enumerate(odd)]
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "receipt.json").write_text("{}")
    return TrackedRun(
        id=f"{7:032x}",
        experiment="digits",
        name="baseline, seed 0",
        status="FINISHED",
        started=WHEN,
        ended=WHEN + 9,
        parameters={"lr": 0.1, "corrections": "xgrad"},
        tags={"seeds": "3"},
        points=points,
        folder=folder,
        files=("receipt.json", "absent.txt"),
    )


@pytest.fixture
def held():
    """Return what a store holds of a run: everything that can be there too often or not at all."""

    def read(client, run):
        (experiment,) = client.search_experiments(filter_string=f"name = '{run.experiment}'")
        found = client.search_runs([experiment.experiment_id], f"tags.`regrad.run` = '{run.id}'")
        (there,) = found
        number = there.info.run_id
        names = sorted(there.data.metrics)
        points = [
            (name, metric.step, str(metric.value), metric.timestamp)
            for name in names
            for metric in client.get_metric_history(number, name)
        ]
        return {
            "points": sorted(points),
            "parameters": there.data.params,
            "status": (there.info.status, there.info.start_time, there.info.end_time),
            "files": sorted(one.path for one in client.list_artifacts(number)),
        }

    return read


@pytest.fixture
def wanted(tracked_run):
    """What a store must hold of the run."""
    largest = {"inf": "1.7976931348623157e+308", "-inf": "-1.7976931348623157e+308"}
    points = [
        (point.name, point.step, largest.get(str(point.value), str(point.value)), point.time)
        for point in tracked_run.points
    ]
    return {
        "points": sorted(points),
        "parameters": {"lr": "0.1", "corrections": "xgrad"},
        "status": ("FINISHED", WHEN, WHEN + 9),
        "files": ["receipt.json"],
    }
