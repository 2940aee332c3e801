"""Regular files and nothing else: no pipe is waited for, and no device is read without end."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def read_regular(path: Path) -> bytes:
    """Return what a file holds.

    Args:
        path: A file, or a link to one.

    Raises:
        OSError: If it cannot be read, or is a pipe, a socket or a device.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder the system itself says so
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()
