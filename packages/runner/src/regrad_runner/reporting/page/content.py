"""What the page says beside its figures: tables, sentences, what was run, what is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

from regrad_runner.diagnostics.gradient_quality import QUALITY_MEASURES, mean_qualities
from regrad_runner.reporting.page.curves import times_are_estimated
from regrad_runner.reporting.page.repeat import LEFT_OUT
from regrad_runner.reporting.page.source import Source
from regrad_runner.reporting.table import probability, sentence, short_number
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import Measure

NOTHING, MINUS = "–", "−"
SHORT = 24  # characters that stay on one line
# Of each verdict's label: what kind of news it is.
TONES = {"better": "good", "better than nothing": "half", "worse": "bad", "inert": "bad"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: As shown.
        key: By what the column sorts: a number or a text; None, which comes last, where there is nothing.
    """

    text: str
    key: float | str | None = None

    @property
    def is_long(self) -> bool:
        """Whether it takes several lines."""
        return len(self.text) > SHORT


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        caption: What it shows.
        columns: Headings.
        rows: Cells, the first of each row is its heading.
        words: Places of the columns that hold words; the others hold numbers.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    words: frozenset[int] = frozenset({0})


def verdicts(source: Source) -> list[dict[str, str]]:
    """Return arm, verdict, its tone and a sentence for each arm: corrections first, then baseline and controls."""
    order = sorted(source.summaries, key=lambda summary: summary.verdict in ("baseline", "control"))
    return [
        {
            "arm": summary.arm,
            "verdict": summary.verdict,
            "tone": TONES.get(summary.verdict, "plain"),
            "kind": "control" if summary.verdict in ("baseline", "control") else "correction",
            "sentence": _without_name(
                summary, sentence(summary, source.measure, baseline=source.baseline)
            ),
        }
        for summary in order
    ]


def comparison_table(source: Source) -> Table:
    """Return the table of the arms."""
    measure, target = source.measure, source.measure.target
    columns = [
        "Arm",
        "Verdict",
        measure.name.capitalize(),
        "sd",
        f"Difference to {source.baseline}",
        "95 % interval",
    ]
    columns += ["p, Holm", *([f"Steps to {target:g}", "Misses"] if target is not None else [])]
    rates = {result.arm: result.lr for result in source.folder.results}
    tuned = len(set(rates.values())) > 1
    columns += [
        "ms per step",
        "Time ratio",
        "Effect in runs",
        *(["Learning rate"] if tuned else []),
    ]
    shown = rates if tuned else {}
    rows = [_row(source, summary, shown.get(summary.arm)) for summary in source.summaries]
    return Table(f"Every arm, {_seeds(source)}", columns, rows, frozenset({0, 1}))


def effects_table(source: Source) -> Table | None:
    """Return what each correction did over whole runs, from the receipts of the first seeds."""
    rows = []
    for arm in source.styles:
        for name, stages in source.receipts.get(arm, {}).get("effects", {}).items():
            for stage, seen in stages.items():
                numbers = (
                    seen[key]
                    for key in ("share_touched", "relative_change", "cosine", "trigger_rate")
                )
                rows.append(
                    [
                        _word(arm),
                        _word(name),
                        _word(stage),
                        *(_figure(number) for number in numbers),
                    ]
                )
    columns = [
        "Arm",
        "Correction",
        "Stage",
        "Share of tensors",
        "Relative change",
        "Cosine",
        "Trigger rate",
    ]
    caption = "Means over the whole run of the first seed, from its receipt"
    return Table(caption, columns, rows, frozenset({0, 1, 2})) if rows else None


def quality_table(source: Source) -> Table | None:
    """Return the means of the probes."""
    columns = [
        "Arm",
        "Probes",
        "Cosine, raw",
        "Cosine, corrected",
        "Norm ratio, raw",
        "Norm ratio, corrected",
    ]
    rows = [
        [
            _word(mean["arm"]),
            Cell(f"{mean['probes']:,}", mean["probes"]),
            *(_figure(mean[name]) for name in QUALITY_MEASURES),
        ]
        for mean in mean_qualities(source.qualities)
    ]
    return Table("Means over all probes of an arm", columns, rows) if rows else None


def rates_table(source: Source) -> Table | None:
    """Return the means of the trials by which learning rates were chosen; the chosen one is marked."""
    trials, chosen = (
        source.folder.trials,
        {result.arm: result.lr for result in source.folder.results},
    )
    rates = sorted({trial.lr for trial in trials})
    rows = []
    for arm in source.styles:
        row = [_word(arm)]
        for rate in rates:
            values = [trial.validation for trial in trials if (trial.arm, trial.lr) == (arm, rate)]
            cell = _figure(fmean(values) if values else None)
            row.append(Cell(f"{cell.text} *", cell.key) if chosen.get(arm) == rate else cell)
        rows.append(row)
    caption = "Choice of learning rates: mean on the validation split; * chosen"
    return Table(caption, ["Arm", *(f"{rate:g}" for rate in rates)], rows) if rates else None


def corrections_table(source: Source) -> Table | None:
    """Return what was attached in each arm, in the order in which it acted."""
    rows = []
    for arm in source.styles:
        receipt = source.receipts.get(arm, {})
        parts = {part["name"]: part for part in receipt.get("corrections", [])}
        for place, name in enumerate(receipt.get("order", parts), start=1):
            part = parts.get(name, {})
            options = ", ".join(f"{key}={value}" for key, value in part.get("options", {}).items())
            version = f"{part.get('distribution', '')} {part.get('version', '')}".strip()
            order = Cell(str(place), place)
            cells = (
                _word(text) for text in (name, version, options, ", ".join(part.get("stages", [])))
            )
            rows.append([_word(arm), order, *cells, _word("; ".join(receipt.get("notes", [])))])
    columns = [
        "Arm",
        "Order",
        "Correction",
        "Distribution",
        "Options",
        "Stages",
        "Notes of the arm",
    ]
    caption = "Corrections as they were attached, from the receipts"
    return Table(caption, columns, rows, frozenset({0, 2, 3, 4, 5, 6})) if rows else None


def controls_table(source: Source) -> Table | None:
    """Return what each control changed."""
    rows = []
    for arm in source.styles:
        control = source.receipts.get(arm, {}).get("run", {}).get("control") or {}
        plain = {
            key: value
            for key, value in control.items()
            if key != "name" and value not in (1.0, {}, [], ())
        }
        if plain:
            rows.append(
                [
                    _word(arm),
                    _word(", ".join(f"{key}: {_plain(value)}" for key, value in plain.items())),
                ]
            )
    return (
        Table("Changes of the controls", ["Arm", "Change"], rows, frozenset({0, 1}))
        if rows
        else None
    )


def settings_table(source: Source) -> Table | None:
    """Return the settings, without the address that numbers were sent to."""
    shown = {
        key: value for key, value in source.settings.items() if key not in LEFT_OUT - {"controls"}
    }
    rows = [[_word(key), _word(_plain(value))] for key, value in shown.items()]
    return Table("Settings", ["Setting", "Value"], rows, frozenset({0, 1})) if rows else None


def machines_table(source: Source) -> Table | None:
    """Return where it ran: from what the folder says, or from what the receipts say in older ones."""
    machines = [dict(machine) for machine in source.about.get("machines", [])]
    environments = [
        receipt["environment"] for receipt in source.receipts.values() if "environment" in receipt
    ]
    if not machines:
        machines = [dict(environment) for environment in environments[:1]]
    elif environments:
        machines[0]["device of the runs"] = environments[0].get("device")
    rows = []
    for number, machine in enumerate(machines, start=1):
        versions = machine.pop("versions", {})
        place = f"{number}: " if len(machines) > 1 else ""
        told = {key: value for key, value in machine.items() if value not in (None, [])}
        rows += [
            [_word(f"{place}{key.replace('_', ' ')}"), _word(_plain(value))]
            for key, value in told.items()
        ]
        rows += [[_word(f"{place}{name}"), _word(version)] for name, version in versions.items()]
    return (
        Table("Machine and versions", ["What", "Value"], rows, frozenset({0, 1})) if rows else None
    )


def missing(source: Source) -> list[str]:
    """Say what the folder does not hold and the page therefore does not show."""
    failed, diverged = (
        sum(r.status == end for r in source.folder.results) for end in ("failed", "diverged")
    )
    corrected = any(receipt.get("effects") for receipt in source.receipts.values())
    facts = {
        f"{failed} of {len(source.folder.results)} runs failed and are left out; failures.txt says why.": failed
        > 0,
        f"{diverged} of {len(source.folder.results)} runs diverged: they have no number and are in no figure. In the "
        "verdicts they are worse than any number.": diverged > 0,
        "This folder was written before times of evaluations were kept: in the figures against time they are "
        "the number of steps times the run's median time per step.": times_are_estimated(source),
        "This folder was written before the effect over training was kept: only means over whole runs are shown.": (
            corrected and not source.effects
        ),
        "This folder was written before the machine was kept: only what the receipts say of it is shown.": (
            not source.about.get("machines")
        ),
        "This folder holds no receipts.": not source.receipts,
        "The workload has no target: there is no figure of the steps to it.": source.measure.target
        is None,
    }
    left_out = [
        f"Left out: {name} ({why})." for name, why in source.about.get("left_out", {}).items()
    ]
    return [*left_out, *(text for text, holds in facts.items() if holds)]


def in_brief(source: Source) -> str:
    """Say in one line what was compared."""
    settings = source.settings
    parts = [
        f"{len(source.summaries)} arms",
        _seeds(source),
        *([f"{settings['model']}"] if settings.get("model") else []),
        *([f"{settings['epochs']} epochs"] if settings.get("epochs") else []),
        *([f"{settings['optimizer']}"] if settings.get("optimizer") else []),
        f"by {source.measure.name}, {source.measure.direction}",
    ]
    return " · ".join(parts)


def _row(source: Source, summary: ArmSummary, rate: float | None) -> list[Cell]:
    low, high = summary.interval or (None, None)
    signed = partial(_signed, source.measure)
    interval = NOTHING if low is None or high is None else f"{signed(low)} to {signed(high)}"
    runs = [
        r.step_seconds
        for r in source.folder.results
        if r.arm == summary.arm and r.status == "finished"
    ]
    pace = median(runs) * 1e3 if runs else None
    alone = summary.verdict in ("baseline", "control")
    steps = [_number(summary.steps_to_target, "{:,.0f}"), Cell(str(summary.misses), summary.misses)]
    ratio = 1.0 if summary.verdict == "baseline" else summary.time_ratio
    adjusted = (
        NOTHING
        if summary.p_adjusted is None
        else probability(summary.p_adjusted).removeprefix("p ")
    )
    return [
        _word(summary.arm),
        _word(summary.verdict),
        Cell(
            NOTHING if summary.mean is None else short_number(summary.mean, source.measure),
            summary.mean,
        ),
        Cell(
            NOTHING if summary.sd is None else short_number(summary.sd, source.measure), summary.sd
        ),
        Cell(
            NOTHING if summary.difference is None else signed(summary.difference),
            summary.difference,
        ),
        Cell(interval, low),
        Cell(adjusted.removeprefix("= "), summary.p_adjusted),
        *(steps if source.measure.target is not None else []),
        _number(pace, "{:.2f}"),
        _number(ratio, "{:.2f}×"),
        Cell(NOTHING) if alone else Cell(f"{summary.touched}/{summary.seeds}", summary.touched),
        *([] if rate is None else [Cell(f"{rate:g}", rate)]),
    ]


def _without_name(summary: ArmSummary, text: str) -> str:
    text = text.removeprefix(f"{summary.arm}: ")
    text = re.sub(r"(?<=[ (\[])-(?=\.?\d)", MINUS, text)
    return f"{text[0].upper()}{text[1:]}"


def _seeds(source: Source) -> str:
    return f"{source.seeds} paired seeds" if source.seeds != 1 else "1 seed"


def _signed(measure: Measure, value: float) -> str:
    return short_number(value, measure, sign="+").replace("-", MINUS)


def _number(value: float | None, form: str) -> Cell:
    return (
        Cell(NOTHING)
        if value is None or not math.isfinite(value)
        else Cell(form.format(value), value)
    )


def _figure(value: float | None) -> Cell:
    return _number(value, "{:.3g}")


def _word(text: str) -> Cell:
    return Cell(text, text)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return (
        {None: NOTHING, True: "yes", False: "no"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )
