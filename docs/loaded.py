"""Find what pages load from a network: scripts, styles, images, fonts; links do not count.

Usage: python docs/loaded.py FOLDER
Reads every page, picture, style sheet and script in the folder; an address that is
loaded is an error.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# The attributes whose address an element loads by itself.
LOADING = {
    "audio": ("src",),
    "base": ("href",),  # every other address of the page is relative to it
    "body": ("background",),
    "embed": ("src",),
    "feimage": ("href", "xlink:href"),
    "frame": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src",),
    "input": ("src",),
    "object": ("data",),
    "script": ("src", "href", "xlink:href"),
    "source": ("src",),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
# Relations of <link> that only say where something is. Every other one loads or connects.
FOLLOWED = {
    *("alternate", "author", "bookmark", "canonical", "copyright", "genindex", "help", "index"),
    *("license", "next", "prev", "search", "top", "up"),
}
DATA = {"application/json", "application/ld+json"}  # scripts of these types do not run
NAMESPACES = "http://www.w3.org/"  # names, not addresses
REMOTE = re.compile(r"\s*(?:(?:https?|wss?|ftp):|//)", re.IGNORECASE)
STYLE_ADDRESS = re.compile(
    r"(?:url\(|@import|image-set\()\s*(?:url\()?\s*[\"']?\s*([^\"')\s;]+)", re.IGNORECASE
)
REFRESH_ADDRESS = re.compile(r"url\s*=\s*[\"']?([^\"']+)", re.IGNORECASE)
SCRIPT_TEXT = re.compile(r"[\"'`]((?:(?:https?|wss?):)?//[\w\[$][^\"'`\s]*)")
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


class Page(HTMLParser):
    """Collects what one page loads from a network in `addresses`."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Read the attributes by which an element loads something."""
        values = {name: value or "" for name, value in attrs}
        if tag == "style" or (tag == "script" and values.get("type") not in DATA):
            self._inside = tag
        loaded = [values.get(name, "") for name in LOADING.get(tag, ())]
        for name in ("srcset", "imagesrcset"):
            loaded += values.get(name, "").split(",")
        if tag == "link" and not set(values.get("rel", "").lower().split()) <= FOLLOWED:
            loaded.append(values.get("href", ""))
        if tag == "meta" and values.get("http-equiv", "").lower() == "refresh":
            loaded += REFRESH_ADDRESS.findall(values.get("content", ""))
        self.addresses += filter(REMOTE.match, loaded)
        self.addresses += loaded_by_style(values.get("style", ""))
        self.addresses += loaded_by_page(values.get("srcdoc", "")) if "srcdoc" in values else []
        for name, value in values.items():
            self.addresses += loaded_by_script(value) if name.startswith("on") else []

    def handle_endtag(self, tag: str) -> None:
        """Leave a script or style."""
        self._inside = ""

    def handle_data(self, data: str) -> None:
        """Read a script or style that stands in the page."""
        if self._inside == "style":
            self.addresses += loaded_by_style(data)
        if self._inside == "script":
            self.addresses += loaded_by_script(data)


def loaded_by_page(text: str) -> list[str]:
    """Return the network addresses that a page in HTML or a picture in SVG loads."""
    page = Page()
    page.feed(text)
    page.close()
    return page.addresses


def loaded_by_style(text: str) -> list[str]:
    """Return the network addresses that a style sheet loads."""
    return list(filter(REMOTE.match, STYLE_ADDRESS.findall(COMMENT.sub("", text))))


def loaded_by_script(text: str) -> list[str]:
    """Return the network addresses in the texts of a script: it may load any of them."""
    found = SCRIPT_TEXT.findall(COMMENT.sub("", text))
    return [address for address in found if not address.startswith(NAMESPACES)]


READERS = {
    ".html": loaded_by_page,
    ".svg": loaded_by_page,
    ".css": loaded_by_style,
    ".js": loaded_by_script,
}


def loaded_in(folder: Path) -> list[str]:
    """Return what the files in a folder load from a network, one line for each, with the file."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in READERS and path.is_file():
            addresses = READERS[path.suffix](path.read_text(encoding="utf-8"))
            lines += [f"{path.relative_to(folder)}: {address}" for address in addresses]
    return lines


if __name__ == "__main__":
    sys.exit("\n".join(loaded_in(Path(sys.argv[1]))) or None)
