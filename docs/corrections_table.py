"""Write the table of corrections into the README, from what installed plugins say.

Usage: python docs/corrections_table.py [--check]
With --check nothing is written, and a stale table is an error.
"""

import inspect
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


def cards() -> dict[str, str]:
    """Return the path of each plugin's card by the name of its distribution."""
    projects = (path for path in ROOT.glob("plugins/*/pyproject.toml"))
    return {
        tomllib.loads(path.read_text(encoding="utf-8"))["project"][
            "name"
        ]: f"plugins/{path.parent.name}/README.md"
        for path in projects
    }


def row(entry: Entry, card: str) -> str:
    """Return one line of the table."""
    loaded = regrad.load(entry.name)
    if isinstance(loaded, regrad.Composition):
        what, acts = entry.summary, " + ".join(loaded.parts)
    else:
        what = (inspect.getdoc(loaded) or entry.summary).partition("\n")[0].rstrip(".")
        acts = ", ".join(
            loaded().needs.stages
        )  # a class declares more stages than an object acts in
    return (
        f"| [`{entry.name}`]({card}) | {what} | {acts} | `{entry.distribution}` {entry.version} |\n"
    )


def table() -> str:
    """Return the whole table: the corrections that have a card in this repository."""
    entries = regrad.available()
    place = cards()
    rows = [
        row(entry, place[entry.distribution])
        for entry in entries.values()
        if entry.distribution in place
    ]
    return (
        "| correction | what it does | acts on | package |\n| --- | --- | --- | --- |\n"
        + "".join(rows)
    )


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
