"""The MLflow runs that a script starts itself: sent to the comparison's store, and read there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from regrad_runner.tracking.mlflow import MetricPoint, experiment_of
from regrad_runner.tracking.script_context import TAG, VARIABLE
from regrad_runner.tracking.stores import Store

MOST_EXPERIMENTS = 1000


@dataclass(frozen=True)
class ScriptRuns:
    """The MLflow runs of one run of a script.

    Attributes:
        folder: The output folder.
        address: Of a server or database; None for the database in the folder.
        experiment: Name of the comparison's group of runs; the script's own are in a group beside.
        run: Id of the run.
    """

    folder: Path
    address: str | None
    experiment: str
    run: str

    def environment(self) -> dict[str, str]:
        """Return the variables by which the script's runs come to the store.

        Store and experiment are there then, since scripts that start at once would each make them.
        """
        store = Store(self.folder, self.address)
        experiment = f"{self.experiment}, its own runs"
        experiment_of(store, experiment)
        return {
            "MLFLOW_TRACKING_URI": store.uri,
            "MLFLOW_EXPERIMENT_NAME": experiment,
            VARIABLE: self.run,
        }

    def curve(self, key: str) -> list[MetricPoint]:
        """Return what the script logged of a metric, in the order of its steps.

        Where several of its runs have the metric, the one that began last counts.
        """
        client = Store(self.folder, self.address).client()
        experiments = client.search_experiments(max_results=MOST_EXPERIMENTS)
        runs = client.search_runs(
            [experiment.experiment_id for experiment in experiments],
            filter_string=f"tags.`{TAG}` = '{self.run}'",
            order_by=["attributes.start_time DESC"],
        )
        for run in runs:
            if key in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, key)
                points = [
                    MetricPoint(key, point.value, point.timestamp, point.step) for point in history
                ]
                return sorted(points, key=lambda point: (point.step, point.time))
        return []
