"""`python -m regrad_testing NAME [FILE]`: check what is installed and print the report as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from regrad.errors import RegradError

from regrad_testing.checking import check

BAD_INPUT = 2


def main(name: str, file: str | None = None) -> int:
    """Print the report; return 1 if a clause failed, 2 if there is nothing to check."""
    try:
        report = check(name, Path(file) if file else None)
    except (ValueError, TypeError, RegradError, RuntimeError) as problem:
        sys.stderr.write(f"{problem}\n")
        return BAD_INPUT
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return int(any(row["outcome"] == "failed" for row in report["clauses"]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
