"""The figures of a comparison: described once, as marks; drawn as SVG for the page and as PNG."""
