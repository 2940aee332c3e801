"""Figures as SVG: whole files with their own colours, and parts of a page that follow its theme."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree as ET

import matplotlib as mpl
from matplotlib.figure import Figure

from regrad_runner.reporting.styles import Style, colours

SVG = "http://www.w3.org/2000/svg"
LINK = "http://www.w3.org/1999/xlink"
HASH_SALT = "regrad"  # of matplotlib's names of shapes: the same figure is the same file
KEPT_ATTRIBUTES = {
    "fill",
    "stroke",
    "opacity",
    "font-size",
    "font-weight",
    "text-anchor",
    "clip-path",
}
# The background, which the page has itself, and the legend, which the page writes.
LEFT_OUT_GROUPS = ("patch_1", "legend_1")
LEFT_OUT_TAGS = ("metadata", "style", "title")
FONT = re.compile(r"(?:(bold)\s+)?([\d.]+)px")
# Outlines of the markers about the origin, in a box of about 10 units.
SHAPES = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.6-3.6h7.2v7.2h-7.2z",
    "^": "M0-4.4 4.4 3.6h-8.8z",
    "D": "M0-4.8 4.8 0 0 4.8-4.8 0z",
    "v": "M0 4.4 4.4-3.6h-8.8z",
    "P": "M-1.6-4.4h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8v-3.2h2.8z",
    "X": "M-4.2-2.1-2.1-4.2 0-2.1 2.1-4.2 4.2-2.1 2.1 0 4.2 2.1 2.1 4.2 0 2.1-2.1 4.2-4.2 2.1-2.1 0z",
}


def as_svg(figure: Figure, *, title: str) -> str:
    """Return a figure as the text of an SVG file, the same for the same figure."""
    text = io.StringIO()
    metadata = {"Title": title, "Date": None, "Creator": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": HASH_SALT}):
        figure.savefig(text, format="svg", facecolor="white", metadata=metadata)
    return text.getvalue()


def as_part_of_page(text: str, *, name: str, title: str, alternative: str, height: float) -> str:
    """Return a figure as a part of a page: without a style of its own, with colours by role.

    Args:
        text: From `as_svg`.
        name: Of the figure, unique in the page; the names inside the figure get it as a prefix.
        title: Its title.
        alternative: What it says, for readers who do not see it.
        height: How much of it the page shows, in points from the top.
    """
    root = ET.fromstring(text)  # noqa: S314 - written by matplotlib just now
    _remove_what_the_page_has(root)
    roles = {colour.lower(): f"var(--{role})" for role, colour in colours().items()}
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    for element in root.iter():
        _rename(element, name, used)
        _replace_style(element)
        _replace_colours(element, roles)
    _resize(root, height)
    _describe(root, name, title, alternative)
    ET.register_namespace("", SVG)
    return ET.tostring(root, encoding="unicode")


def legend_sign(style: Style) -> dict[str, str]:
    """Return what a legend draws for a style: colour, dashes, the marker's outline and filling."""
    colour = f"var(--{style.role})"
    return {
        "colour": colour,
        "dashes": " ".join(f"{length * 1.4:g}" for length in style.dashes),
        "width": "1.5" if style.control else "2.2",
        "shape": SHAPES[style.marker],
        "face": "var(--paper)" if style.control else colour,
    }


def _remove_what_the_page_has(root: ET.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            tag = child.tag.rpartition("}")[2]
            if tag in LEFT_OUT_TAGS or child.get("id") in LEFT_OUT_GROUPS:
                parent.remove(child)


def _resize(root: ET.Element, height: float) -> None:
    """Let the page decide how wide the figure is, and cut it off at a height."""
    width = root.get("viewBox", "").split()[2]
    root.set("viewBox", f"0 0 {width} {height:.1f}")
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)


def _describe(root: ET.Element, name: str, title: str, alternative: str) -> None:
    """Say what the figure shows to readers who do not see it."""
    root.set("role", "img")
    root.set("class", "figure")
    root.set("aria-labelledby", f"{name}-title {name}-text")
    heading = ET.Element(f"{{{SVG}}}title", {"id": f"{name}-title"})
    heading.text = title
    description = ET.Element(f"{{{SVG}}}desc", {"id": f"{name}-text"})
    description.text = alternative
    root.insert(0, heading)
    root.insert(1, description)


def _rename(element: ET.Element, name: str, used: set[str]) -> None:
    """Keep only the names that something refers to, and make them unique in the page."""
    own = element.attrib.pop("id", None)
    if own in used:
        element.set("id", f"{name}-{own}")
    reference = element.attrib.pop(f"{{{LINK}}}href", None)
    if reference is not None:
        element.set("href", f"#{name}-{reference.removeprefix('#')}")
    clip = element.get("clip-path")
    if clip is not None:
        element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))


def _replace_style(element: ET.Element) -> None:
    """Turn a style into attributes: the page's policy allows no style inside an element."""
    for rule in element.attrib.pop("style", "").split(";"):
        key, _, value = (word.strip() for word in rule.partition(":"))
        font = FONT.search(value) if key == "font" else None
        if font is not None:
            element.set("font-size", font[2])
            if font[1]:
                element.set("font-weight", font[1])
        elif key in KEPT_ATTRIBUTES or key.startswith(("stroke-", "fill-")):
            element.set(key, value.removesuffix("px"))


def _replace_colours(element: ET.Element, roles: dict[str, str]) -> None:
    """Name colours by their role, so that they follow the page's theme."""
    for key in ("fill", "stroke"):
        colour = element.get(key, "").lower()
        if colour in roles:
            element.set(key, roles[colour])
