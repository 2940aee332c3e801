"""Write the page on layouts, and what the cards say of them, from what the processes measure.

Usage: python docs/sharding.py [--prove | --render | --check] [--column=TITLE ...] [NAME ...]
Without a flag everything, or what is named, is measured on one, two and four processes, and
sharding.json, the page and the cards are written. With --column only the columns of these
headings are measured.
With --prove the verdicts are measured and compared with sharding.json; with --render
page and cards are written from it; with --check nothing is measured or written, and a
stale page or card is an error.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from corrections_table import ROOT, cards
from interactions import shipped
from regrad import available
from regrad_testing.processes import launch
from sharding_cells import Column, Seen, suites_of
from sharding_columns import (
    COLUMNS,
    NAMES,
    TITLES,
    OnSeveralProcesses,
    chosen_columns,
    measures,
)

DOCS = Path(__file__).parent
PAGE, TABLE = DOCS / "sharding.md", DOCS / "sharding.json"
BEGIN, END = "<!-- layouts: written by docs/sharding.py -->\n", "<!-- end of layouts -->"
PATIENCE = 3600.0  # seconds; a quiet machine needs a few minutes
Verdict = dict[str, Any]
Verdicts = dict[str, dict[str, Verdict]]


def repeatable() -> list[str]:
    """Return the shipped corrections with a suite: others draw, so that only means can agree."""
    return [name for name in shipped() if suites_of(name)]


class NotExactError(RuntimeError):
    """A cell is neither exact nor bounded nor refused."""


def verdict_of(where: str, column: Column, seen: Mapping[str, Seen]) -> Verdict:
    """Return "exact", "bounded" or "refused" with what was measured, for one cell.

    Args:
        where: Begins the message of an error.
        column: Its column.
        seen: What was measured in each way, on each suite and optimizer.

    Raises:
        NotExactError: If a training ends elsewhere than it must, without a refusal.
    """
    for which, one in seen.items():
        wrong = one.get("broken") or (
            one.get("far", 0.0) > column.tolerance and f"ends {one['far']:.1e} away"
        )
        wrong = wrong or (
            one.get("bound", 0.0) > 0.1 + 5 * one.get("usual", 0.0)
            and f"ends {one['bound']:.2f} away"
        )
        if wrong:
            raise NotExactError(f"{where} | {which}: {wrong}")
    far, bounds = ([one[key] for one in seen.values() if key in one] for key in ("far", "bound"))
    reasons = sorted({one["refused"] for one in seen.values() if "refused" in one})
    if far:
        return {
            "verdict": "exact or refused" if reasons else "exact",
            "far": max(far),
            "reasons": reasons,
        }
    if bounds and not reasons:
        usual = max(one["usual"] for one in seen.values() if "usual" in one)
        return {"verdict": "bounded", "bound": max(bounds), "usual": usual, "reasons": []}
    if bounds or not reasons:
        raise NotExactError(f"{where}: nothing was measured, or only a part")
    return {"verdict": "refused", "reasons": reasons}


def measured(names: Sequence[str], columns: Sequence[Column]) -> dict[str, Seen]:
    """Return what all processes see, by "name | column | way | suite and optimizer"."""
    os.environ[NAMES] = " ".join(names)  # read by the other processes
    seen: dict[str, Seen] = {}
    for column in columns:
        if column.processes > 1:
            seen |= measured_apart(column)
            continue
        for name in names:
            for key, measure in measures(name, column).items():
                seen[key] = measure()
    return seen


def measured_apart(column: Column) -> dict[str, Seen]:
    """Return what the processes of a column see.

    Each column has processes of its own: torch keeps what it worked out for a mesh of processes,
    and takes it for that of an equal mesh in another process group.
    """
    os.environ[TITLES] = column.title
    ranks = launch(OnSeveralProcesses, PATIENCE, processes=column.processes)
    return {key: of_all_ranks([rank[key] for rank in ranks]) for key in ranks[0]}


def of_all_ranks(told: Sequence[Seen]) -> Seen:
    """Return what the ranks saw together: the largest distance, and whether they end apart."""
    first = told[0]
    broken = [one["broken"] for one in told if one.get("broken")]
    together: Seen = {**first, "broken": broken[0] if broken else ""}
    if "far" in first:
        together["far"] = max(one.get("far", 0.0) for one in told)
    if any(one.get("ranks") != first.get("ranks") for one in told):
        together["broken"] = "the ranks end apart"
    if any(one.get("refused") != first.get("refused") for one in told):
        together["broken"] = "not all ranks refuse, or for one reason"
    errors = [one["error"] for one in told if "error" in one]
    if errors:
        together["broken"] = f"\n{errors[0]}"
    return together


def verdicts(names: Sequence[str], columns: Sequence[Column]) -> Verdicts:
    """Measure, and return a verdict per correction and column."""
    seen, found = measured(names, columns), dict[str, dict[str, Verdict]]()
    for name in names:
        found[name] = {}
        for column in columns:
            where = f"{name} | {column.title}"
            of_cell = {key: one for key, one in seen.items() if key.startswith(f"{where} | ")}
            found[name][column.title] = verdict_of(where, column, of_cell)
    return found


def with_fresh(found: Verdicts) -> Verdicts:
    """Return the verdicts in sharding.json with those that were measured now, in order."""
    before = kept()
    rows: Verdicts = {}
    for name in shipped():
        cells = {**before.get(name, {}), **found.get(name, {})}
        rows[name] = {c.title: cells[c.title] for c in COLUMNS if c.title in cells}
    return {name: cells for name, cells in rows.items() if cells}


def short(verdict: Verdict) -> str:
    """Return what a cell of the table says."""
    if verdict["verdict"] == "bounded":
        return f"bounded: {percent(verdict['bound'])}"
    return str(verdict["verdict"])


def percent(share: float) -> str:
    """Return a share in percent, rounded up to one digit."""
    digits = -math.floor(math.log10(share)) - 2 if share > 0 else 0
    return f"{math.ceil(share * 100 * 10**digits) / 10**digits:g} %"


def table(found: Verdicts) -> str:
    """Return a row per column, and a column per correction: layouts are more."""
    head = "| | " + " | ".join(f"`{name}`" for name in found) + " |\n"
    rule = "|" + " --- |" * (len(found) + 1) + "\n"
    rows = [
        f"| {column.title} | "
        + " | ".join(short(found[name][column.title]) for name in found)
        + " |\n"
        for column in COLUMNS
    ]
    return head + rule + "".join(rows)


def reasons(found: Verdicts) -> str:
    """Return every refusal with its reason, and every bound with what it is compared with.

    Columns that are refused for one reason have one line.
    """
    lines = []
    for name, cells in found.items():
        refused: dict[str, list[str]] = {}
        for title, cell in cells.items():
            if cell["verdict"] == "bounded":
                bound = percent(cell["bound"])
                usual = percent(cell["usual"])
                lines.append(f"- `{name}`, {title}: {bound}; without a correction {usual}.\n")
            for reason in cell["reasons"]:
                refused.setdefault(reason, []).append(title)
        for reason, titles in refused.items():
            lines.append(f"- `{name}`, {'; '.join(titles)}: refused: {reason}.\n")
    return "".join(lines)


def row_of_card(names: Sequence[str], found: Verdicts) -> str:
    """Return what a card says: one line per correction, in which the commonest verdict is last."""
    lines = []
    for name in names:
        groups: dict[str, list[str]] = {}
        for title, cell in found[name].items():
            groups.setdefault(short(cell), []).append(title.replace(",", ""))
        *fewer, commonest = sorted(groups, key=lambda verdict: len(groups[verdict]))
        said = [f"**{verdict}**: {', '.join(groups[verdict])}" for verdict in fewer]
        others = "the other " if fewer else "all "
        said.append(f"**{commonest}**: {others}{len(groups[commonest])}")
        lines.append(
            f"Measured on {len(found[name])} layouts (`docs/sharding.md`), `{name}`: "
            f"{'; '.join(said)}.\n"
        )
    return "\n".join(lines)


def replaced(path: Path, text: str) -> str:
    """Return a file's text with a fresh part between the marks."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    if not begin:
        raise ValueError(f"{path.name} of {path.parent.name} must hold the mark {BEGIN.strip()!r}")
    return f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}"


def pages(found: Verdicts) -> dict[Path, str]:
    """Return the texts of the page and of the cards."""
    texts = {PAGE: replaced(PAGE, f"{table(found)}\n{reasons(found)}")}
    for distribution, card in cards().items():
        names = [name for name in found if available()[name].distribution == distribution]
        if names:
            texts[ROOT / card] = replaced(ROOT / card, row_of_card(names, found))
    return texts


def kept() -> Verdicts:
    """Return the verdicts in sharding.json; none before it was first written."""
    if not TABLE.is_file():
        return {}
    return json.loads(TABLE.read_text(encoding="utf-8"))["verdicts"]  # type: ignore[no-any-return]


def differences(found: Verdicts, wanted: Verdicts) -> list[str]:
    """Return the cells whose verdict or reason is another one."""
    lines = []
    for name, cells in found.items():
        for title, cell in cells.items():
            told = (cell["verdict"], cell["reasons"])
            before = wanted.get(name, {}).get(title)
            if before is None or told != (before["verdict"], before["reasons"]):
                lines.append(f"{name}, {title}: {told}")
    return lines


def main(arguments: list[str]) -> int:
    """Measure and write, or compare."""
    names = [argument for argument in arguments if not argument.startswith("-")] or repeatable()
    titles = [a.partition("=")[2] for a in arguments if a.startswith("--column=")]
    os.environ[TITLES] = "\n".join(titles)
    columns = chosen_columns()
    if "--check" in arguments:
        stale = [
            path for path, text in pages(kept()).items() if text != path.read_text(encoding="utf-8")
        ]
        said = [
            f"{path.relative_to(ROOT)} is stale; run python docs/sharding.py --render"
            for path in stale
        ]
    elif "--prove" in arguments:
        said = [
            f"{line}; docs/sharding.json says otherwise"
            for line in differences(verdicts(names, columns), kept())
        ]
    else:
        said = []
        if "--render" not in arguments:
            rows = with_fresh(verdicts(names, columns))
            found = {"torch": torch.__version__.partition("+")[0], "verdicts": rows}
            TABLE.write_text(
                json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        for path, text in pages(kept()).items():
            path.write_text(text, encoding="utf-8")
    sys.stderr.write("".join(f"{line}\n" for line in said))
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
