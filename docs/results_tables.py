"""Write what the README, docs/results.md and the methods' pages say of comparisons.

Usage: python docs/results_tables.py [--check]
With --check nothing is written, and a stale page is an error.

A comparison is kept in docs/results/ as `regrad compare` wrote it, without the figures, and of the
receipts with those of seed 0 alone; docs/results/claims.yaml says what was claimed, and
which arms of which comparisons speak to it.
"""

import io
import itertools
import json
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import optimizer_results
import yaml
from regrad_runner.diagnostics.step_times import kept_step_times
from regrad_runner.reporting.numbers import difference_in_brackets, short_number
from regrad_runner.reporting.sentences import sentence
from regrad_runner.reporting.summaries import summarize_results
from regrad_runner.reporting.table import print_comparison
from regrad_runner.results.outcomes import CurvePoint, Result, Trial
from regrad_runner.results.tables import read_rows
from regrad_runner.settings.arms import BASELINE, FORMER_BASELINE
from regrad_runner.statistics.verdicts import ArmSummary
from regrad_runner.workloads.workload import Measure
from rich.console import Console

DOCS = Path(__file__).parent
FOLDER = DOCS / "results"
PAGE = DOCS / "results.md"
README = DOCS.parent / "README.md"
METHODS = DOCS / "methods"
# The rows of the README's table: a folder of docs/results, its heading, what was trained, an arm.
FRONT = (
    ("scripts/nanogpt", "nanogpt-unmodified", "nanoGPT, AdamW: loss", "xgrad"),
    ("cifar10-adamw", "cifar10-adamw", "ResNet-8, AdamW: accuracy", "xgrad"),
    ("cifar10-sgd", "cifar10-sgd", "ResNet-8, SGD: accuracy", "xgrad"),
    ("cifar10-sgd", "cifar10-sgd", "ResNet-8, SGD: accuracy", "centralization"),
    ("cifar10-adamw", "cifar10-adamw", "ResNet-8, AdamW: accuracy", "powergrad"),
    ("tinyshakespeare-updates", "tinyshakespeare-updates", "GPT, AdamW: bits", "cautious"),
    ("scripts/run_clm", "transformers-run_clmpy-unmodified", "run_clm.py, AdamW: loss", "agc"),
)
FORMATS = {"no": "in float32", "bf16": "in bfloat16 autocast", "fp16": "in float16 autocast"}
BEGIN = "<!-- written by docs/results_tables.py -->\n"
END = "<!-- end of what is written -->"

Row = TypeVar("Row", Result, Trial)


def about_of(path: Path) -> dict[str, Any]:
    """Return what a comparison says about itself."""
    about: dict[str, Any] = json.loads((path / "about.json").read_text(encoding="utf-8"))
    return about


def measure_of(path: Path) -> Measure:
    """Return what a comparison compared by."""
    return Measure(**about_of(path)["measure"])


def comparisons() -> dict[str, list[ArmSummary]]:
    """Return the summaries of every comparison that has results, by its folder's name."""
    folders = [path.parent for path in sorted(FOLDER.glob("*/config.yaml"))]
    return {folder.name: summaries_of(folder) for folder in folders if results_of(folder)}


def summaries_of(folder: Path) -> list[ArmSummary]:
    """Return the summaries of one comparison."""
    return summarize_results(
        results_of(folder),
        measure_of(folder),
        curves=read_rows(folder / "curves.csv", CurvePoint),
        step_times=kept_step_times(folder),
    )


def results_of(path: Path) -> list[Result]:
    """Return the runs in the table of a comparison."""
    return [with_name_of_today(row) for row in read_rows(path / "results.csv", Result)]


def trials_of(path: Path) -> list[Trial]:
    """Return the trials of learning rates in the table of a comparison."""
    return [with_name_of_today(row) for row in read_rows(path / "tuning.csv", Trial)]


def with_name_of_today(row: Row) -> Row:
    """Return a row whose arm is called as it is now: tables kept from earlier versions say "none"."""
    if row.arm != FORMER_BASELINE:
        return row
    return replace(row, arm=BASELINE)


def seen(told: dict[str, list[str]], summaries: dict[str, list[ArmSummary]]) -> str:
    """Say what the arms that speak to a claim came to."""
    lines = []
    for name, found in sentences(told, summaries).items():
        lines += [f"*{name}*: {line}" for line in found]
    return " ".join(lines) or "not measured"


def sentences(
    told: dict[str, list[str]], summaries: dict[str, list[ArmSummary]]
) -> dict[str, list[str]]:
    """Return a sentence for each arm that speaks to a claim, by comparison."""
    found = {}
    for name, arms in told.items():
        measure = measure_of(FOLDER / name)
        chosen = [summary for summary in summaries.get(name, []) if summary.arm in arms]
        found[name] = [sentence(summary, measure) for summary in chosen]
    return found


def ledger(summaries: dict[str, list[ArmSummary]]) -> str:
    """Return the table of claims."""
    rows = [
        "| method | claimed | seen here | how the protocol differs | command |\n"
        "| --- | --- | --- | --- | --- |\n"
    ]
    for claim in claims():
        ran = [
            n
            for n, arms in claim["seen"].items()
            if {*arms} & {summary.arm for summary in summaries.get(n, [])}
        ]
        as_optimizer = claim.get("optimizer_on", [])
        anchors = [*ran, *(f"optimizers-{workload}" for workload in as_optimizer)]
        commands = ", ".join(f"[{name}](#{name})" for name in anchors) or "–"
        found = [seen(claim["seen"], summaries)] if claim["seen"] or not as_optimizer else []
        found += [
            f"*{workload}*: {optimizer_results.sentence_on(claim['method'], workload)}"
            for workload in as_optimizer
        ]
        cells = [
            claim["method"],
            claim["claimed"],
            " ".join(found),
            claim["differs"],
            commands,
        ]
        rows.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |\n")
    return "".join(rows)


def environment(path: Path) -> str:
    """Say with which versions, and on what, a comparison ran: as its receipts say."""
    receipts = (
        json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(path.glob("runs/**/receipt.json"))
    )
    return "; ".join(
        sorted(
            {
                ", ".join(f"{k} {v}" for k, v in receipt["environment"].items())
                for receipt in receipts
            }
        )
    )


def rates(path: Path) -> str:
    """Say which learning rate every arm chose, and what the trials said of each."""
    if not trials_of(path):
        return ""
    chosen = {result.arm: result.lr for result in results_of(path)}
    return f"Learning rates chosen: {', '.join(f'{arm} {lr:g}' for arm, lr in chosen.items())}.\n\n"


def section(name: str, summaries: list[ArmSummary]) -> str:
    """Return one comparison's heading, command, table and sentences."""
    path = FOLDER / name
    settings = optimizer_results.settings_of(path)
    runs = sum(result.status == "finished" for result in results_of(path))
    named = {"width": settings["width"], "normalisation:": settings["norm"]}
    shape = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
    text = io.StringIO()
    print_comparison(Console(file=text, width=200), summaries, measure_of(path))
    table = "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())
    trials = trials_of(path)
    rates_tried = ", ".join(f"{lr:g}" for lr in settings["lr"])
    chosen = f"{runs} runs at the rate {rates_tried}"
    if trials:
        chosen = f"{runs} runs and {len(trials)} trials of learning rates ({rates_tried})"
    tables = [t for t in ("results", "curves", "tuning", "exits") if (path / f"{t}.csv").exists()]
    command = optimizer_results.command_of(f"docs/results/{name}", settings)
    kept = f"results/{name}"
    return (
        f"({name})=\n\n### {name}\n\n"
        f"{settings['model']} ({shape}), {settings['optimizer']}, "
        f"{settings['train_size'] or 'all'} training {about_of(path).get('samples', 'images')}, "
        f"{settings['epochs']} epoch{'s' * (settings['epochs'] != 1)}, batch "
        f"{settings['batch_size']}, {settings['warmup_steps']} steps of warm-up, "
        f"{FORMATS[settings['mixed_precision']]}. {chosen}. {environment(path)}.\n\n"
        f"```bash\n{command}\n```\n\n"
        f"```text\n{table}\n```\n\n{rates(path)}"
        f"Every run: {', '.join(f'[{one}.csv]({kept}/{one}.csv)' for one in tables)}.\n\n"
    )


def written() -> str:
    """Return the part of the page that comes from the comparisons."""
    found = comparisons()
    sections = "".join(section(name, summaries) for name, summaries in found.items())
    optimizers = "".join(map(optimizer_results.section, optimizer_results.workloads()))
    return f"## The ledger\n\n{ledger(found)}\n## The comparisons\n\n{sections}{optimizers}"


def claims() -> list[dict[str, Any]]:
    """Return what was claimed, and which arms of which comparisons speak to it."""
    listed: list[dict[str, Any]] = yaml.safe_load(
        (FOLDER / "claims.yaml").read_text(encoding="utf-8")
    )
    return listed


def methods_of(page: Path) -> set[str]:
    """Return the names of the corrections and optimizers that one method's page is about."""
    project = DOCS.parent / "plugins" / page.stem / "pyproject.toml"
    offered = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"]
    return set(itertools.chain.from_iterable(offered.values()))


def seen_on(page: Path, summaries: dict[str, list[ArmSummary]]) -> str:
    """Say on a method's page what the comparisons came to."""
    told: dict[str, list[str]] = {}
    lines = []
    for claim in claims():
        if claim["method"] not in methods_of(page):
            continue
        for name, arms in claim["seen"].items():
            told[name] = [*dict.fromkeys((*told.get(name, []), *arms))]
        for workload in claim.get("optimizer_on", []):
            said = optimizer_results.sentence_on(claim["method"], workload)
            anchor = f"optimizers-{workload}"
            lines.append(f"- [{anchor}](../results.md#{anchor}): {said}\n")
    for name, found in sentences(told, summaries).items():
        lines += [f"- [{name}](../results.md#{name}): {line}\n" for line in found]
    return "".join(lines) or "No comparison is kept: not measured.\n"


def front_table() -> str:
    """Return the README's table: a few arms, each beside its control."""
    lines = [
        "| trained, measured | baseline | correction | difference [95 % interval] | its control | "
        "difference from the control | verdict |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
    ]
    for folder, heading, trained, name in FRONT:
        arms = {summary.arm: summary for summary in summaries_of(FOLDER / folder)}
        measure = measure_of(FOLDER / folder)
        arm = arms[name]
        baseline = arms[BASELINE].mean
        cells = [
            f"[{trained}](docs/results.md#{heading})",
            "–" if baseline is None else short_number(baseline, measure),
            f"`{name}`",
            difference_in_brackets(arm, measure),
            "none" if arm.control is None else f"`{arm.control}`",
            against_control_in_front(arm, measure),
            verdict_in_front(arm),
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return f"{''.join(lines)}\n{tally()}\n"


def tally() -> str:
    """Return a sentence on the verdicts of all arms that were ever compared, not of a few."""
    files = sorted(FOLDER.glob("**/results.csv"))
    folders = [path.parent for path in files if not path.is_relative_to(optimizer_results.FOLDER)]
    counts: Counter[str] = Counter()
    for folder in folders:
        for summary in summaries_of(folder):
            if summary.verdict not in ("baseline", "control"):
                counts[verdict_in_front(summary).strip("*")] += 1
    verdicts = "; ".join(f"{verdict}: {count}" for verdict, count in counts.most_common())
    return (
        f"The verdicts on all {counts.total()} arms with corrections, in {len(folders)} "
        f"comparisons: {verdicts}."
    )


def against_control_in_front(arm: ArmSummary, measure: Measure) -> str:
    """Return an arm's difference from its control, with the interval."""
    test = arm.against_control
    if test is None:
        return "–"
    return difference_in_brackets(test, measure)


def verdict_in_front(arm: ArmSummary) -> str:
    """Say what an arm came to, with its control."""
    if arm.verdict == "better" and arm.control is not None:
        return "**better than both**"
    if arm.verdict == "better":
        return "better, with no control to beat"
    if arm.verdict == "better than nothing":
        return "not shown to beat its control"
    return arm.verdict


def pages() -> dict[Path, str]:
    """Return what stands between the marks of every page."""
    summaries = comparisons()
    methods = (page for page in METHODS.glob("*.md") if page.stem != "index")
    return {
        README: front_table(),
        PAGE: f"\n{written()}",
        **{page: seen_on(page, summaries) for page in methods},
    }


def main(arguments: list[str]) -> int:
    """Write the pages anew, or say which should be."""
    stale = []
    for page, content in pages().items():
        text = page.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        new = f"{before}{BEGIN}{content}{END}{rest.partition(END)[2]}"
        if new != text or not begin:
            stale.append(str(page.relative_to(DOCS.parent)))
            if "--check" not in arguments:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in arguments:
        sys.stderr.write(f"{', '.join(stale)}: stale; run python docs/results_tables.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
