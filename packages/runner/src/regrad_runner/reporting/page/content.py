"""What the page says beside its figures: verdicts, tables, and what is missing."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from regrad_runner.diagnostics.gradient_quality import QUALITY_MEASURES, mean_qualities
from regrad_runner.diagnostics.step_times import why_not_measured
from regrad_runner.reporting.figures.curves import times_are_estimated
from regrad_runner.reporting.figures.families import in_families
from regrad_runner.reporting.figures.scales import MINUS
from regrad_runner.reporting.numbers import (
    difference_in_brackets,
    is_resolved,
    probability,
    ratio_interval,
    short_number,
    short_target,
)
from regrad_runner.reporting.page.repeat import PRIVATE_SETTINGS
from regrad_runner.reporting.rates import rates_at_edges
from regrad_runner.reporting.report_data import ReportData
from regrad_runner.reporting.resolution import resolution_in_words, resolution_of
from regrad_runner.reporting.sentences import reason
from regrad_runner.reporting.summaries import has_step_times, verdict_in_words
from regrad_runner.reporting.unsteady import in_words, lower_rates
from regrad_runner.results.pairs import unlike_in_words, unlike_pairs
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import Measure, name_on_validation

NOTHING = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"
WORDS_OF_A_COMMAND = {"script"}
ONE_LINE = 24  # characters that stay on one line
# What kind of news each verdict is.
TONES = {"better": "good", "better than nothing": "half", "worse": "bad", "inert": "bad"}
EFFECT_COLUMNS = {
    "share_touched": "Share of tensors",
    "relative_change": "Relative change",
    "cosine": "Cosine",
    "trigger_rate": "Trigger rate",
}
QUALITY_COLUMNS = ["Cosine, raw", "Cosine, corrected", "Norm ratio, raw", "Norm ratio, corrected"]


@dataclass(frozen=True)
class TableCell:
    """A cell of a table.

    Attributes:
        text: As shown.
        key: What the column sorts by: a number or a text; None, which comes last, for no value.
        tone: What kind of news it is; empty for none.
    """

    text: str
    key: float | str | None = None
    tone: str = ""

    @property
    def is_long(self) -> bool:
        """Whether it takes several lines."""
        return len(self.text) > ONE_LINE


@dataclass(frozen=True)
class PageTable:
    """A table of the page.

    Attributes:
        caption: What it shows.
        columns: Headings.
        rows: Cells, the first of each row is its heading.
        words: Places of the columns that hold words; the others hold numbers.
    """

    caption: str
    columns: list[str]
    rows: list[list[TableCell]]
    words: frozenset[int] = frozenset({0})

    @property
    def heading(self) -> str:
        """What it is about, in a few words: its caption as far as the first mark."""
        return re.split("[,:;]", self.caption)[0]


def verdicts(data: ReportData) -> list[dict[str, str]]:
    """Return what is said of each arm: of corrections first, then of baseline and controls."""
    ordered = sorted(data.summaries, key=_is_control)
    return [_verdict(summary, data.measure) for summary in ordered]


def tones(data: ReportData) -> dict[str, str]:
    """Return what kind of news the verdict on each arm is."""
    return {summary.arm: _tone(summary) for summary in data.summaries}


def arms_table(data: ReportData) -> PageTable:
    """Return the numbers that matter, as few columns as answer the question."""
    rates = _tuned_rates(data)
    columns = [
        "Arm",
        "Verdict",
        f"{data.measure.name.capitalize()} ±{NO_BREAK}sd",
        f"Difference [95{NO_BREAK}%{NO_BREAK}interval]",
        "p, Holm",
        "Against its control",
    ]
    if data.target is not None:
        columns.append("Ratio of steps")
    if has_step_times(data.summaries):
        columns.append("Time per step")
    if rates:
        columns.append("Learning rate")
    in_order = _in_families(data.summaries)
    rows = [_arm_row(data, summary, rates) for summary in in_order]
    return PageTable(f"Every arm, {_seeds(data)}", columns, rows, frozenset({0, 1}))


def more_table(data: ReportData) -> PageTable:
    """Return the numbers that some ask for: of runs, steps and times."""
    columns = ["Arm", "Runs", "Failed", "Diverged"]
    if data.target is not None:
        target = short_target(data.target, data.measure)
        columns += [f"Steps to {target}", "Misses", "Interval of the ratio of steps"]
    columns += ["ms per step in runs", "Effect in runs"]
    rows = [_further_row(data, summary) for summary in _in_families(data.summaries)]
    return PageTable("More of every arm", columns, rows)


def effects_table(data: ReportData) -> PageTable | None:
    """Return what each correction did over whole runs, from the receipts of the first seeds."""
    rows = []
    for arm in data.styles:
        for name, stages in data.receipts.get(arm, {}).get("effects", {}).items():
            for stage, seen in stages.items():
                numbers = [_significant(seen[key]) for key in EFFECT_COLUMNS]
                rows.append([_word(arm), _word(name), _word(stage), *numbers])
    columns = ["Arm", "Correction", "Stage", *EFFECT_COLUMNS.values()]
    caption = "Means over the whole run of the first seed, from its receipt"
    return PageTable(caption, columns, rows, frozenset({0, 1, 2})) if rows else None


def quality_table(data: ReportData) -> PageTable | None:
    """Return the means of the probes."""
    rows = []
    for mean in mean_qualities(data.qualities):
        probes = TableCell(f"{mean['probes']:,}", mean["probes"])
        numbers = [_significant(mean[name]) for name in QUALITY_MEASURES]
        rows.append([_word(mean["arm"]), probes, *numbers])
    columns = ["Arm", "Probes", *QUALITY_COLUMNS]
    return PageTable("Means over all probes of an arm", columns, rows) if rows else None


def rates_table(data: ReportData) -> PageTable | None:
    """Return the worst trial of every learning rate tried, the rate that was chosen marked."""
    rates = sorted({trial.lr for trial in data.folder.trials})
    if not rates:
        return None
    chosen = {result.arm: result.lr for result in data.folder.results}
    rows = []
    for arm in data.styles:
        cells = [_trials_cell(data, arm, rate, chosen.get(arm)) for rate in rates]
        rows.append([_word(arm), *cells])
    caption = f"Choice of learning rates: worst trial{_on_validation(data.measure)}; * chosen"
    return PageTable(caption, ["Arm", *(f"{rate:g}" for rate in rates)], rows)


def corrections_table(data: ReportData) -> PageTable | None:
    """Return what was attached in each arm, in the order in which it acted."""
    rows = []
    for arm in data.styles:
        rows += _attached_rows(arm, data.receipts.get(arm, {}))
    columns = [
        "Arm",
        "Order",
        "Correction",
        "Distribution",
        "Options",
        "Stages",
        "Notes on the arm",
    ]
    caption = "Corrections as they were attached, from the receipts"
    words = frozenset({0, 2, 3, 4, 5, 6})
    return PageTable(caption, columns, rows, words) if rows else None


def controls_table(data: ReportData) -> PageTable | None:
    """Return what each control changed."""
    rows = []
    for arm in data.styles:
        control = data.receipts.get(arm, {}).get("run", {}).get("control") or {}
        changes = [
            f"{key}: {_plain(value)}"
            for key, value in control.items()
            if key != "name" and value not in (1.0, {}, [], ())
        ]
        if changes:
            rows.append([_word(arm), _word(", ".join(changes))])
    return _table_of_words("Changes of the controls", ["Arm", "Change"], rows)


def settings_table(data: ReportData) -> PageTable | None:
    """Return the settings, without the address that numbers were sent to."""
    hidden = PRIVATE_SETTINGS - {"controls"}
    rows = [
        [_word(key), _word(shlex.join(value) if key in WORDS_OF_A_COMMAND else _plain(value))]
        for key, value in data.settings.items()
        if key not in hidden
    ]
    return _table_of_words("Settings", ["Setting", "Value"], rows)


def machines_table(data: ReportData) -> PageTable | None:
    """Return where it ran: as the folder says, or in older ones as the receipts say."""
    machines = _machines(data)
    rows = []
    for number, machine in enumerate(machines, start=1):
        prefix = f"{number}: " if len(machines) > 1 else ""
        versions = machine.pop("versions", {})
        for key, value in machine.items():
            if value not in (None, []):
                rows.append([_word(f"{prefix}{key.replace('_', ' ')}"), _word(_plain(value))])
        for name, version in versions.items():
            rows.append([_word(f"{prefix}{name}"), _word(version)])
    return _table_of_words("Machine and versions", ["What", "Value"], rows)


def missing(data: ReportData) -> list[str]:
    """Say what the folder does not hold and the page therefore does not show."""
    notes = [f"Left out: {name} ({why})." for name, why in data.about.get("left_out", {}).items()]
    notes += _notes_on_runs(data)
    notes += _notes_on_age(data)
    if not data.receipts:
        notes.append("This folder holds no receipts.")
    if data.target is None:
        notes.append(_why_no_target(data))
    if not has_step_times(data.summaries):
        notes.append(f"Step times are unknown: {why_not_measured(data.about)}.")
    return notes


def remarks(data: ReportData) -> list[str]:
    """Say what to bear in mind with the verdicts."""
    notes = [_as_sentence(unlike_in_words(pair)) for pair in unlike_pairs(data.folder)[:1]]
    resolution = resolution_of(data.about, data.measure)
    if resolution is not None and resolution.warning:
        notes.append(_as_sentence(resolution.warning))
    notes += [f"{line}." for line in rates_at_edges(data.folder.choices)]
    return notes


def offers(data: ReportData) -> list[str]:
    """Say what to compare next where an arm is unsteady; each begins with the name of an arm."""
    return [in_words(offer) for offer in lower_rates(data.folder, data.summaries)]


def resolution(data: ReportData) -> str:
    """Say on how many samples the numbers rest, and what one of them is worth."""
    found = resolution_of(data.about, data.measure)
    return "" if found is None else _as_sentence(resolution_in_words(found, data.measure))


def digest_of_script(data: ReportData) -> str:
    """Return the SHA-256 of the script that was compared on; empty if there is none."""
    return str(data.about.get("script_sha256") or "")


def in_brief(data: ReportData) -> str:
    """Say in one line what was compared."""
    parts = [f"{len(data.summaries)} arms", _seeds(data)]
    settings = data.settings
    if settings.get("model"):
        parts.append(str(settings["model"]))
    if settings.get("epochs"):
        parts.append(f"{settings['epochs']} epochs")
    if settings.get("optimizer"):
        parts.append(str(settings["optimizer"]))
    parts.append(f"{data.measure.name}, {data.measure.direction}")
    return " · ".join(parts)


def _is_control(summary: ArmSummary) -> bool:
    return summary.verdict in ("baseline", "control")


def _verdict(summary: ArmSummary, measure: Measure) -> dict[str, str]:
    return {
        "arm": summary.arm,
        "verdict": verdict_in_words(summary),
        "tone": _tone(summary),
        "sentence": _own_sentence(summary, measure),
    }


def _tone(summary: ArmSummary) -> str:
    return TONES.get(summary.verdict, "plain")


def _own_sentence(summary: ArmSummary, measure: Measure) -> str:
    """Return the sentence of an arm without its name, with minus signs instead of hyphens."""
    text = _with_minus(reason(summary, measure))
    return f"{text[0].upper()}{text[1:]}."


def _with_minus(text: str) -> str:
    return re.sub(r"(?<=[ (\[])-(?=\.?\d)", MINUS, f" {text}").removeprefix(" ")


def _in_families(summaries: Sequence[ArmSummary]) -> list[ArmSummary]:
    """Return the baseline, and then each correction with its control behind it."""
    by_name = {summary.arm: summary for summary in summaries}
    first = [summary for summary in summaries if summary.verdict == "baseline"]
    return [*first, *(by_name[arm] for arm in in_families(summaries))]


def _tuned_rates(data: ReportData) -> dict[str, float]:
    """Return the learning rate of each arm; nothing if all have the same."""
    rates = {result.arm: result.lr for result in data.folder.results}
    return rates if len(set(rates.values())) > 1 else {}


def _arm_row(data: ReportData, summary: ArmSummary, rates: Mapping[str, float]) -> list[TableCell]:
    measure = data.measure
    verdict = verdict_in_words(summary)
    cells = [
        _word(summary.arm),
        TableCell(verdict, verdict, _tone(summary)),
        _mean_cell(summary, measure),
        _difference_cell(summary, measure),
        _probability_cell(summary.p_adjusted),
        _control_cell(summary, measure),
    ]
    is_baseline = summary.verdict == "baseline"
    if data.target is not None:
        cells.append(_steps_cell(summary))
    if has_step_times(data.summaries):
        cells.append(_number(1.0 if is_baseline else summary.time_ratio, "{:.2f}×"))
    if rates:
        cells.append(_number(rates.get(summary.arm), "{:g}"))
    return cells


def _further_row(data: ReportData, summary: ArmSummary) -> list[TableCell]:
    cells = [
        _word(summary.arm),
        *(_count(number) for number in (summary.seeds, summary.failed, summary.diverged)),
    ]
    if data.target is not None:
        cells += [
            _number(summary.steps_to_target, "{:,.0f}"),
            _count(summary.misses),
            _steps_interval_cell(summary),
        ]
    return [
        *cells,
        _number(_milliseconds_per_step(data, summary.arm), "{:.2f}"),
        _effect_cell(summary),
    ]


def _milliseconds_per_step(data: ReportData, arm: str) -> float | None:
    """Return the median over the runs of an arm that finished."""
    seconds = [
        result.step_seconds
        for result in data.folder.results
        if result.arm == arm and result.status == "finished"
    ]
    return median(seconds) * 1e3 if any(seconds) else None  # unknown for a script


def _count(number: int) -> TableCell:
    return TableCell(str(number), number)


def _mean_cell(summary: ArmSummary, measure: Measure) -> TableCell:
    if summary.mean is None:
        return TableCell(NOTHING)
    text = short_number(summary.mean, measure)
    if summary.sd is not None:
        text = f"{text} ± {short_number(summary.sd, measure)}"
    return TableCell(_with_minus(text), summary.mean)


def _difference_cell(summary: ArmSummary, measure: Measure) -> TableCell:
    text = difference_in_brackets(summary, measure)
    return TableCell(_with_minus(text) or NOTHING, summary.difference)


def _control_cell(summary: ArmSummary, measure: Measure) -> TableCell:
    """Return the difference from the control that an arm must beat."""
    test = summary.against_control
    if test is None or test.difference is None or summary.verdict == "control":
        return TableCell(NOTHING)
    difference = short_number(test.difference, measure, sign="+")
    return TableCell(_with_minus(f"{difference}, {probability(test.p_value)}"), test.difference)


def _steps_cell(summary: ArmSummary) -> TableCell:
    """Return the ratio to the baseline's steps, if it says anything."""
    if summary.verdict == "baseline":
        return TableCell("1.00×", 1.0)
    if summary.steps_ratio is None:
        return TableCell("missed" if summary.misses else NOTHING)
    if not is_resolved(summary.steps_interval):
        return TableCell("not resolved")
    return TableCell(f"{summary.steps_ratio:.2f}×", summary.steps_ratio)


def _steps_interval_cell(summary: ArmSummary) -> TableCell:
    """Return the interval of the ratio of steps, as other intervals are written."""
    if summary.steps_interval is None:
        return TableCell(NOTHING)
    text = ratio_interval(summary.steps_interval).strip("[]").replace(", ", " to ")
    return TableCell(text, summary.steps_interval[0])


def _probability_cell(p_value: float | None) -> TableCell:
    if p_value is None:
        return TableCell(NOTHING)
    return TableCell(probability(p_value).removeprefix("p ").removeprefix("= "), p_value)


def _effect_cell(summary: ArmSummary) -> TableCell:
    if _is_control(summary):
        return TableCell(NOTHING)
    return TableCell(f"{summary.touched}/{summary.seeds}", summary.touched)


def _trials_cell(data: ReportData, arm: str, rate: float, chosen: float | None) -> TableCell:
    """Return the worst of an arm's trials with a learning rate."""
    values = [
        trial.validation for trial in data.folder.trials if trial.arm == arm and trial.lr == rate
    ]
    cell = _significant(_worst(values, data.measure) if values else None)
    return TableCell(f"{cell.text} *", cell.key) if rate == chosen else cell


def _on_validation(measure: Measure) -> str:
    """Return on what trials are looked at, if that is another split."""
    return "" if name_on_validation(measure) == measure.name else " on the validation split"


def _worst(values: Sequence[float], measure: Measure) -> float:
    """Return the worst of some trials; not a number where one diverged."""
    if any(map(math.isnan, values)):
        return math.nan
    return min(values) if measure.higher_is_better else max(values)


def _attached_rows(arm: str, receipt: Mapping[str, Any]) -> list[list[TableCell]]:
    """Return a row per correction of an arm's receipt."""
    parts = {part["name"]: part for part in receipt.get("corrections", [])}
    notes = _word("; ".join(receipt.get("notes", [])))
    rows = []
    for place, name in enumerate(receipt.get("order", parts), start=1):
        part = parts.get(name, {})
        version = f"{part.get('distribution', '')} {part.get('version', '')}".strip()
        options = ", ".join(f"{key}={value}" for key, value in part.get("options", {}).items())
        row = [
            _word(arm),
            TableCell(str(place), place),
            _word(name),
            _word(version),
            _word(options),
            _word(", ".join(part.get("stages", []))),
            notes,
        ]
        rows.append(row)
    return rows


def _machines(data: ReportData) -> list[dict[str, Any]]:
    """Return the facts of each machine, as the folder or the first receipt has them."""
    machines = [dict(machine) for machine in data.about.get("machines", [])]
    environments = [
        receipt["environment"] for receipt in data.receipts.values() if "environment" in receipt
    ]
    if not machines:
        return [dict(environment) for environment in environments[:1]]
    if environments:
        machines[0]["device of the runs"] = environments[0].get("device")
    return machines


def _notes_on_runs(data: ReportData) -> list[str]:
    """Say which runs are not in the figures."""
    results = data.folder.results
    failed = sum(result.status == "failed" for result in results)
    diverged = sum(result.status == "diverged" for result in results)
    notes = []
    if failed:
        notes.append(
            f"{failed} of {len(results)} runs failed and are left out; failures.txt says why."
        )
    if diverged:
        notes.append(
            f"{diverged} of {len(results)} runs diverged: they have no number and appear in no "
            "figure. In the verdicts they count as worse than any number."
        )
    return notes


def _notes_on_age(data: ReportData) -> list[str]:
    """Say what folders of older versions do not hold."""
    notes: list[str] = []
    if "script" in data.settings:  # a script cannot provide what is missing there
        return notes
    if times_are_estimated(data):
        notes.append(
            "This folder was written before the times of evaluations were kept: figures over time "
            "use the number of steps times the run's median time per step."
        )
    corrected = any(receipt.get("effects") for receipt in data.receipts.values())
    if corrected and not data.effects:
        notes.append(
            "This folder was written before the effect over training was kept: only means over "
            "whole runs are shown."
        )
    if not data.about.get("machines"):
        notes.append(
            "This folder was written before the machine was kept: only what the receipts say "
            "about it is shown."
        )
    return notes


def _why_no_target(data: ReportData) -> str:
    """Say why no steps are counted."""
    if data.measure.target is None:
        return "There is no target, so there is no figure of the steps to it."
    return (
        "There is no figure of the steps to the baseline's end: it needs baseline runs with at "
        "least three evaluations each."
    )


def _as_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _seeds(data: ReportData) -> str:
    return "1 seed" if data.seeds == 1 else f"{data.seeds} paired seeds"


def _table_of_words(
    caption: str, columns: Sequence[str], rows: list[list[TableCell]]
) -> PageTable | None:
    """Return a table without numbers; None if it has no row."""
    if not rows:
        return None
    return PageTable(caption, list(columns), rows, frozenset(range(len(columns))))


def _number(value: float | None, form: str) -> TableCell:
    if value is None or not math.isfinite(value):
        return TableCell(NOTHING)
    return TableCell(form.format(value), value)


def _significant(value: float | None) -> TableCell:
    """Return a number with three digits."""
    return _number(value, "{:.3g}")


def _word(text: str) -> TableCell:
    return TableCell(text, text)


def _plain(value: Any) -> str:
    """Return a setting as people write it."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)
