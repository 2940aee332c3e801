"""GCGD: the corrections that act together under one name."""

from regrad import Composition

# Named, not imported: the registry finds the parts, and says if one is missing.
GCGD = Composition(parts=("gcw", "gcode"))
