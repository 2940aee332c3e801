"""GCGD has no rule of its own: it is what its parts are, one after the other."""

PARTS = ("gcw", "gcode")


def specs(options):
    """The parts' own strings for "gcgd:<part>.<option>=<value>,…", given as {(part, option): value}."""
    result = []
    for part in PARTS:
        own = ",".join(
            f"{option}={value}" for (whose, option), value in options.items() if whose == part
        )
        result.append(f"{part}:{own}" if own else part)
    return result
