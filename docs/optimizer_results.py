"""Join comparisons that trained with different optimizers, so that they can be judged as arms.

A folder docs/results/optimizers/WORKLOAD/OPTIMIZER/ is a comparison without corrections, as
`regrad compare --corrections --no-controls --optimizer OPTIMIZER` wrote it. All folders of one
workload have the same seeds, and with them the same initial weights and batches: their runs are
pairs. Adam stands in for the baseline. Where there are binary weights, Adam and SGD train latent
ones, and latent SGD is a control: Bop is that.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from regrad_runner.reporting.sentences import sentence
from regrad_runner.reporting.summaries import summarize_results
from regrad_runner.results.outcomes import CurvePoint, Result, Trial
from regrad_runner.results.tables import read_rows
from regrad_runner.settings.arms import BASELINE
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import Measure

FOLDER = Path(__file__).parent / "results" / "optimizers"
BESIDE = "adam"
MUST_BEAT = {"bop": "sgd", "bop2": "sgd"}


def workloads() -> list[str]:
    """Return the names of the workloads on which optimizers were compared."""
    return sorted(path.name for path in FOLDER.glob("*") if (path / BESIDE).is_dir())


def folders_of(workload: str) -> list[Path]:
    """Return the comparison of each optimizer on a workload, Adam's first."""
    folders = sorted(path.parent for path in (FOLDER / workload).glob("*/results.csv"))
    return sorted(folders, key=lambda path: path.name != BESIDE)


def measure_of(workload: str) -> Measure:
    """Return what the optimizers were compared by on a workload."""
    about = json.loads((FOLDER / workload / BESIDE / "about.json").read_text(encoding="utf-8"))
    return Measure(**about["measure"])


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings of one optimizer's comparison."""
    settings: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return settings


def command_of(kept: str, settings: dict[str, Any]) -> str:
    """Return the command that runs a comparison again, from where it is kept."""
    data = "" if settings["data_dir"] is None else " --data-dir FOLDER"
    return f"regrad compare --config {kept}/config.yaml{data} --out DIR"


def arm_of(folder: Path) -> str:
    """Return what an optimizer is called among the arms: Adam is the baseline."""
    return BASELINE if folder.name == BESIDE else folder.name


def results_of(workload: str) -> Iterator[Result]:
    """Yield the runs of all optimizers on a workload, each with its optimizer as its arm."""
    for folder in folders_of(workload):
        for result in read_rows(folder / "results.csv", Result):
            # Nothing corrects these runs: what differs is the optimizer, in every step.
            yield replace(
                result,
                arm=arm_of(folder),
                touched=True,
                must_beat=MUST_BEAT.get(folder.name),
                control=folder.name in MUST_BEAT.values(),
            )


def curves_of(workload: str) -> Iterator[CurvePoint]:
    """Yield the evaluations of all optimizers on a workload."""
    for folder in folders_of(workload):
        for point in read_rows(folder / "curves.csv", CurvePoint):
            yield replace(point, arm=arm_of(folder))


def trials_of(folder: Path) -> list[Trial]:
    """Return one optimizer's trials of learning rates."""
    return read_rows(folder / "tuning.csv", Trial)


def summaries_of(workload: str) -> list[ArmSummary]:
    """Return one summary per optimizer on a workload; Adam's is that of the baseline."""
    return summarize_results(
        list(results_of(workload)), measure_of(workload), curves=list(curves_of(workload))
    )


def sentence_on(optimizer: str, workload: str) -> str:
    """Say what an optimizer came to beside Adam on a workload."""
    found = next(one for one in summaries_of(workload) if one.arm == optimizer)
    return sentence(found, measure_of(workload)).replace("the baseline", "Adam")


def section(workload: str) -> str:
    """Return a workload's heading, protocol, and a line for each optimizer."""
    folders = folders_of(workload)
    settings = settings_of(folders[0])
    grids = "; ".join(f"{folder.name}: {_rates(folder)}" for folder in folders)
    fewest_trials = min(len(trials_of(folder)) for folder in folders)
    lines = [
        f"(optimizers-{workload})=\n\n### Optimizers beside Adam: {workload}\n\n"
        f"{settings['model']} (width {settings['width']}), {settings['epochs']} "
        f"epoch{'s' * (settings['epochs'] != 1)}, batch {settings['batch_size']}, "
        f"{settings['warmup_steps']} steps of warm-up; {fewest_trials} trials or more "
        "of learning rates for each optimizer, on the validation split. "
        f"{measure_of(workload).name}; pairs share the initial weights and batches. "
        f"Rates tried and chosen: {grids}.\n\n"
        "| optimizer | mean ± sd | beside Adam |\n| --- | --- | --- |\n"
    ]
    for summary, folder in zip(summaries_of(workload), folders, strict=True):
        spread = _number(summary.mean) if summary.sd is None else _spread(summary)
        told = "–" if folder.name == BESIDE else sentence_on(folder.name, workload)
        lines.append(f"| `{settings_of(folder)['optimizer']}` | {spread} | {told} |\n")
    kept = f"docs/results/optimizers/{workload}"
    command = command_of(f"{kept}/{BESIDE}", settings)
    lines.append(
        f"\n```bash\n{command}\n```\n\n"
        f"The other optimizers have their own `config.yaml`. Every run and trial: `{kept}`.\n\n"
    )
    return "".join(lines)


def _number(value: float | None) -> str:
    """Return a number of a table; a dash for none."""
    return "–" if value is None else f"{value:.4f}"


def _spread(summary: ArmSummary) -> str:
    """Return a mean with its standard deviation."""
    return f"{_number(summary.mean)} ± {_number(summary.sd)}"


def _rates(folder: Path) -> str:
    """Say which learning rates an optimizer tried, and which it chose."""
    tried = sorted({trial.lr for trial in trials_of(folder)})
    chosen = next(result.lr for result in read_rows(folder / "results.csv", Result))
    return f"{', '.join(f'{rate:g}' for rate in tried)}, chose {chosen:g}"
