"""Write the repository's address into every member, so that links work on the index too.

Usage: python release/addresses.py ADDRESS TAG
Links of a card to other files become addresses of these files at the tag, and `pyproject.toml`
gets its `[project.urls]`. The release workflow does this in its own checkout, since a fork, or
a checkout without a remote, has another address or none. Needs the standard library only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from members import ROOT, Member, read_members

# An address, a mail, or a place on the same page.
LEADS_SOMEWHERE = re.compile(r"https?://|mailto:|#")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)")
TABLE_BELOW_PROJECT = re.compile(r"^\[(?!build-system\]|project\])", flags=re.MULTILINE)


def dead_links(text: str) -> list[str]:
    """Return the links in Markdown that lead nowhere outside the repository.

    Example:
        >>> dead_links("[here](#use), [there](https://a.example), [gone](../README.md)")
        ['../README.md']
    """
    return [link for link in LINK.findall(text) if not LEADS_SOMEWHERE.match(link)]


def with_addresses(readme: str, folder: Path, root: Path, files: str) -> str:
    """Return a card whose links are addresses.

    Args:
        readme: Text of the card.
        folder: Where it lies.
        root: The repository.
        files: Address of the repository's files at the tag.

    Raises:
        ValueError: If a link leads to nothing in the repository.
    """

    def address(match: re.Match[str]) -> str:
        link = match[1]
        if LEADS_SOMEWHERE.match(link):
            return match[0]
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve()
        if not target.is_relative_to(root.resolve()) or not target.exists():
            raise ValueError(
                f"link must lead to a file of the repository, got {link!r} in {folder}"
            )
        place = target.relative_to(root.resolve()).as_posix()
        ending = f"#{anchor}" if anchor else ""
        return match[0].replace(link, f"{files}/{place}{ending}")

    return LINK.sub(address, readme)


def with_urls(pyproject: str, urls: dict[str, str]) -> str:
    """Return a `pyproject.toml` with `[project.urls]`, above the first table below `[project]`."""
    lines = [f'{label} = "{address}"\n' for label, address in urls.items()]
    table = f"[project.urls]\n{''.join(lines)}\n"
    below = TABLE_BELOW_PROJECT.search(pyproject)
    if below is None:
        return f"{pyproject}\n{table}"
    return pyproject[: below.start()] + table + pyproject[below.start() :]


def write_addresses(member: Member, root: Path, address: str, tag: str) -> None:
    """Write the repository's address into a member's card and `pyproject.toml`."""
    files = f"{address}/blob/{tag}"
    card = member.path / "README.md"
    text = with_addresses(card.read_text(encoding="utf-8"), member.path, root, files)
    card.write_text(text, encoding="utf-8")
    if member.project.get("urls"):
        return
    folder = member.path.relative_to(root).as_posix()
    urls = {
        "Repository": address,
        "Documentation": f"{files}/docs/index.md",
        "Changelog": f"{files}/{folder}/CHANGELOG.md",
    }
    pyproject = member.path / "pyproject.toml"
    text = with_urls(pyproject.read_text(encoding="utf-8"), urls)
    pyproject.write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Write the address into every member."""
    address, tag = arguments
    if not re.fullmatch(r"https://[\w./-]+[\w-]", address):
        raise ValueError(f"address must be that of a repository, with https://, got {address!r}")
    if not re.fullmatch(r"[\w.-]+", tag):
        raise ValueError(f"tag must be letters, digits, dots and hyphens, got {tag!r}")
    for member in read_members(ROOT):
        write_addresses(member, ROOT, address, tag)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
