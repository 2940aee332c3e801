"""Which files of a folder are data: regular, each once, not hidden, no link that leads out."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from itertools import chain
from pathlib import Path

# What systems put into folders of images without a leading dot.
OF_SYSTEMS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})
Identity = tuple[int, int]  # device and inode


def is_hidden(name: str) -> bool:
    """Say whether a file or folder of this name is not data, such as `.ipynb_checkpoints`."""
    return name.startswith(".") or name in OF_SYSTEMS


class DataFolder:
    """A folder of data whose files are looked for; it knows what it found before.

    A link is followed if it leads to a file or folder inside the folder that is not read otherwise.
    One that leads out of it, or back into what is read already, is refused: the same images would
    be trained on twice, or validate what they trained.

    Args:
        root: The folder. It may be a link itself.
        follows_links: Whether a link may lead out of it, where names say which files are meant.

    Attributes:
        root: The folder.
    """

    def __init__(self, root: Path, *, follows_links: bool = False) -> None:
        self.root = root
        self._real_root = Path(os.path.realpath(root))
        self._follows_links = follows_links
        self._folders: dict[Identity, str] = {}
        self._files: dict[Identity, str] = {}
        self._links: set[str] = set()
        self._enter(str(root))

    def folders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder, by name, and count it as read.

        Raises:
            ValueError: If it cannot be read, is a link that leads out, or was read before.
        """
        if folder.is_symlink():
            self._refuse_leading_out(str(folder))
        self._enter(str(folder))
        return [Path(entry.path) for entry in _listed(folder) if stat.S_ISDIR(_mode(entry))]

    def files(self, folder: Path, is_data: Callable[[str], bool]) -> list[Path]:
        """Return the files in a folder and below it, folder by folder, by name.

        Args:
            folder: In the root, or the root itself.
            is_data: Says of a name whether a file of that name is data.

        Raises:
            ValueError: If a folder cannot be read, or what is named as data is not a regular file,
                stands twice, or is a link that leads out or nowhere.
        """
        found: dict[str, list[Path]] = {}
        waiting = [folder]
        while waiting:
            place = waiting.pop()
            waiting += self.folders(place)
            found[str(place)] = self.files_in(place, is_data)
        return list(chain.from_iterable(found[place] for place in sorted(found)))

    def files_in(self, folder: Path, is_data: Callable[[str], bool]) -> list[Path]:
        """Return the files in a folder, not those below it; see `files`."""
        found: list[Path] = []
        for entry in _listed(folder):
            if is_data(entry.name) and not stat.S_ISDIR(_mode(entry)):
                self._keep(entry)
                found.append(Path(entry.path))
        return found

    def _keep(self, entry: os.DirEntry[str]) -> None:
        """Note a file, or raise if it must not be read."""
        mode = _mode(entry)
        if not mode:
            raise ValueError(
                f"data_dir must hold files that are there, got a broken link '{entry.path}'"
            )
        if not stat.S_ISREG(mode):
            raise ValueError(
                f"data_dir must hold regular files, got another kind in '{entry.path}'"
            )
        if entry.is_symlink():
            self._refuse_leading_out(entry.path)
            self._links.add(entry.path)
        status = entry.stat()
        other = self._files.setdefault((status.st_dev, status.st_ino), entry.path)
        # Some network file systems reuse inode numbers: it is one file only if it has two names.
        may_have_two_names = status.st_nlink > 1 or bool(self._links & {entry.path, other})
        if other != entry.path and may_have_two_names:
            raise ValueError(
                f"data_dir must hold each file once, got one file as '{other}' and '{entry.path}'; "
                "remove one of the names"
            )

    def _enter(self, folder: str) -> None:
        """Note a folder, or raise if it was read before."""
        try:
            status = Path(folder).stat()
        except OSError as problem:
            raise _unreadable(folder, problem) from None
        other = self._folders.setdefault((status.st_dev, status.st_ino), folder)
        if other != folder:
            raise ValueError(
                f"data_dir must hold each folder once, got one folder as '{other}' and '{folder}'; "
                "remove the link"
            )

    def _refuse_leading_out(self, link: str) -> None:
        """Raise if a link leads out of the root and may not."""
        target = Path(os.path.realpath(link))
        if not self._follows_links and not target.is_relative_to(self._real_root):
            raise ValueError(
                f"data_dir must hold no link that points outside it, got '{link}' to '{target}'; "
                "copy its target, or hard-link the files"
            )


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder and not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as problem:
        raise _unreadable(str(folder), problem) from None
    return sorted(seen, key=lambda entry: entry.name)


def _mode(entry: os.DirEntry[str]) -> int:
    """Return what kind of file an entry leads to; 0 where it leads nowhere."""
    try:
        return entry.stat().st_mode
    except OSError:
        return 0


def _unreadable(folder: str, problem: OSError) -> ValueError:
    return ValueError(f"data_dir must be readable, got '{folder}': {problem.strerror}")
