"""Figures as SVG: whole files with their own colours, and parts of a page that follow its theme."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree as ET

import matplotlib as mpl
from matplotlib.figure import Figure

from regrad_runner.reporting.styles import Style, colours

SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
SALT = "regrad"  # of matplotlib's names of shapes: the same figure is the same file
KEPT = {"fill", "stroke", "opacity", "font-size", "font-weight", "text-anchor", "clip-path"}
APART = (
    "patch_1",
    "legend_1",
)  # the ground, behind which the page shows, and the legend, which the page has
FONT = re.compile(r"(?:(bold)\s+)?([\d.]+)px")
# About the origin, in a box of about 10 units.
SHAPES = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.6-3.6h7.2v7.2h-7.2z",
    "^": "M0-4.4 4.4 3.6h-8.8z",
    "D": "M0-4.8 4.8 0 0 4.8-4.8 0z",
    "v": "M0 4.4 4.4-3.6h-8.8z",
    "P": "M-1.6-4.4h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8v-3.2h2.8z",
    "X": "M-4.2-2.1-2.1-4.2 0-2.1 2.1-4.2 4.2-2.1 2.1 0 4.2 2.1 2.1 4.2 0 2.1-2.1 4.2-4.2 2.1-2.1 0z",
}


def as_file(figure: Figure, *, title: str) -> str:
    """Return a figure as an SVG file, the same for the same figure."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": SALT}):
        metadata = {"Title": title, "Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(text, format="svg", facecolor="white", metadata=metadata)
    return text.getvalue()


def as_part(text: str, *, name: str, title: str, alternative: str, height: float) -> str:
    """Return a figure as a part of a page: no style of its own, colours by role, names that occur once in the page.

    Args:
        text: From `as_file`.
        name: Of the figure: unique in the page.
        title: Its title.
        alternative: What it says, for those who do not see it.
        height: How much of it the page shows, in points from the top.
    """
    root = ET.fromstring(text)  # noqa: S314 - written by matplotlib just now
    for parent in list(root.iter()):
        for child in list(parent):
            if (
                child.tag.rpartition("}")[2] in ("metadata", "style", "title")
                or child.get("id") in APART
            ):
                parent.remove(child)
    roles = {colour.lower(): f"var(--{role})" for role, colour in colours().items()}
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    for element in root.iter():
        _rename(element, name, used)
        _unstyle(element, roles)
    root.set("viewBox", f"0 0 {root.get('viewBox', '').split()[2]} {height:.1f}")
    for unit in ("width", "height"):
        root.attrib.pop(unit, None)
    root.attrib |= {
        "role": "img",
        "class": "figure",
        "aria-labelledby": f"{name}-title {name}-text",
    }
    for place, (tag, words) in enumerate((("title", title), ("desc", alternative))):
        told = ET.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{'text' if place else 'title'}"})
        told.text = words
        root.insert(place, told)
    ET.register_namespace("", SVG)
    return ET.tostring(root, encoding="unicode")


def swatch(style: Style) -> dict[str, str]:
    """Return what a legend draws for a style: colour, dashes, the marker's outline and what fills it."""
    return {
        "colour": f"var(--{style.role})",
        "dashes": " ".join(f"{length * 1.4:g}" for length in style.dashes),
        "width": "1.5" if style.control else "2.2",
        "shape": SHAPES[style.marker],
        "face": "var(--paper)" if style.control else f"var(--{style.role})",
    }


def _rename(element: ET.Element, name: str, used: set[str]) -> None:
    """Keep only the names that something refers to, and make them the figure's own."""
    own = element.attrib.pop("id", None)
    if own in used:
        element.set("id", f"{name}-{own}")
    reference = element.attrib.pop(f"{{{LINK}}}href", None)
    if reference is not None:
        element.set("href", f"#{name}-{reference.removeprefix('#')}")
    clip = element.get("clip-path")
    if clip is not None:
        element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))


def _unstyle(element: ET.Element, roles: dict[str, str]) -> None:
    """Turn a style into attributes, which a page may have that allows no styles but its own."""
    for rule in (element.attrib.pop("style", "")).split(";"):
        key, _, value = (word.strip() for word in rule.partition(":"))
        if key == "font" and (font := FONT.search(value)):
            element.set("font-size", font[2])
            if font[1]:
                element.set("font-weight", font[1])
        elif key in KEPT or key.startswith(("stroke-", "fill-")):
            element.set(key, value.removesuffix("px"))
    for key in ("fill", "stroke"):
        if (colour := element.get(key, "").lower()) in roles:
            element.set(key, roles[colour])
