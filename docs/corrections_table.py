"""Write the table of corrections into the README, from what installed plugins and their cards say.

Usage: python docs/corrections_table.py [--check]
With --check nothing is written, and a stale table is an error.
"""

import inspect
import re
import sys
import tomllib
from pathlib import Path

import regrad
from regrad.registry import Entry

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = (
    "<!-- corrections: written by docs/corrections_table.py -->\n",
    "<!-- end of corrections -->",
)
# As a card names a paper: authors, title, year, number, and whether it was withdrawn.
CITATION = re.compile(
    r"""(?P<first>[A-Z]\w+),(?P<others>[^".;]*),\ "[^"]+",\ (?P<year>\d{4}),
    \ arXiv\ (?P<number>[\d.]+\d)(?P<withdrawn>\ \(withdrawn\))?""",
    re.VERBOSE,
)


def cards() -> dict[str, str]:
    """Return the path of each plugin's card by the name of its distribution."""
    projects = (path for path in ROOT.glob("plugins/*/pyproject.toml"))
    return {
        tomllib.loads(path.read_text(encoding="utf-8"))["project"][
            "name"
        ]: f"plugins/{path.parent.name}/README.md"
        for path in projects
    }


def paper(entry: Entry, card: str) -> str:
    """Return a link to the paper that a correction comes from, as its card names it.

    Where a card names several, it is the one whose first author the correction's own docstring names.
    """
    text = (ROOT / card).read_text(encoding="utf-8").partition("\n## Source")[2]
    found = list(CITATION.finditer(text.partition("\n## ")[0]))
    own = inspect.getdoc(regrad.load(entry.name)) or ""
    if len(entry_names(entry.distribution)) > 1:
        references = own.partition("References:")[2]
        found = [one for one in found if one["first"] in references]
    if not found:
        return "–"
    one = found[0]
    authors = f"{one['first']} et al." if one["others"].strip() else one["first"]
    link = f"[{authors} {one['year']}](https://arxiv.org/abs/{one['number']})"
    return link + (one["withdrawn"] or "")


def entry_names(distribution: str) -> list[str]:
    """Return the corrections that a distribution offers."""
    entries = regrad.available().values()
    return [entry.name for entry in entries if entry.distribution == distribution]


def row(entry: Entry, card: str) -> str:
    """Return one line of the table."""
    loaded = regrad.load(entry.name)
    if isinstance(loaded, regrad.Composition):
        what = entry.summary
        acts = " + ".join(loaded.parts)
    else:
        what = (inspect.getdoc(loaded) or entry.summary).partition("\n")[0].rstrip(".")
        # A class declares more stages than an object acts in.
        acts = ", ".join(loaded().needs.stages)
    cells = [
        f"[`{entry.name}`]({card})",
        what,
        acts,
        f"`{entry.distribution}`",
        paper(entry, card),
    ]
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    """Return the whole table: the corrections that have a card in this repository."""
    place = cards()
    rows = [
        row(entry, place[entry.distribution])
        for entry in regrad.available().values()
        if entry.distribution in place
    ]
    heading = "| correction | what it does | acts on | package | paper |\n"
    return heading + "| --- | --- | --- | --- | --- |\n" + "".join(rows)


def main(arguments: list[str]) -> int:
    """Write the README anew, or say that it should be."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}{table()}{END}{after}"
    if "--check" not in arguments:
        README.write_text(new, encoding="utf-8")
    elif new != text:
        sys.stderr.write(
            "README.md: the table of corrections is stale; run python docs/corrections_table.py\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
