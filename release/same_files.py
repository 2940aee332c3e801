"""Compare what is installed with a wheel, byte for byte: a source distribution gives the same.

Usage: python same_files.py WHEEL
Needs the standard library only.
"""

import sys
import sysconfig
import zipfile
from pathlib import Path

MADE_BY_INSTALLERS = "RECORD"  # the list of what was installed, and how


def different_files(wheel: Path, site: Path) -> list[str]:
    """Return which files of a wheel are not installed, or are installed with other content."""
    different = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = site / name
            if path.name == MADE_BY_INSTALLERS:
                continue
            if not path.is_file() or path.read_bytes() != archive.read(name):
                different.append(name)
    return different


def main(wheel: Path) -> int:
    """Print what differs; the exit code is 1 if anything does."""
    different = different_files(wheel, Path(sysconfig.get_paths()["purelib"]))
    for name in different:
        sys.stdout.write(f"{name} is not that of {wheel.name}\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
