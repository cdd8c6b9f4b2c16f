"""The files below a folder, in a fixed order; links to folders are followed, and each folder is read once."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from tinyexperts.data.document import printable
from tinyexperts.errors import InputError

# A folder as the system knows it, whatever its names: device and number on it.
_Identity = tuple[int, int]


def walk_files(folder: Path, excluded_folders: Collection[str] = ("__pycache__",)) -> Iterator[Path]:
    """Yield everything below a folder that is no folder, sorted, without hidden entries.

    Pipes, sockets, devices and links that lead nowhere are among them: `read_file` refuses each by name.

    Args:
        folder (Path): the folder.
        excluded_folders (Collection[str]): names of folders that are passed over.

    Raises:
        InputError: a folder that cannot be listed.
    """
    for parent, names in walk_folders(folder, excluded_folders):
        for name in names:
            yield parent / name


def walk_folders(
    folder: Path, excluded_folders: Collection[str] = ("__pycache__",)
) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those below it, each once, with the sorted names of what else they hold.

    A folder that both a link and a real path reach is read at the real path, and one that only links reach at the first
    of them in the order of the walk, so that links in a circle end.

    Args:
        folder (Path): the folder.
        excluded_folders (Collection[str]): names of folders that are passed over.

    Raises:
        InputError: a folder that cannot be listed.
    """
    places: dict[_Identity, Path] = {}
    _claim(folder, excluded_folders, places)
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        identity = _identity(parent)
        if parent != folder and parent.is_symlink():
            if identity in places:
                continue
            _claim(parent, excluded_folders, places)
        elif places.get(identity, parent) != parent:
            continue
        folders, others = _listed(parent, excluded_folders)
        yield parent, others
        waiting += [parent / name for name in reversed(folders)]


def _claim(folder: Path, excluded_folders: Collection[str], places: dict[_Identity, Path]) -> None:
    """Note a folder, and those below it that no link leads to, at the paths where they are to be read."""
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        if places.setdefault(_identity(parent), parent) == parent:
            below = (parent / name for name in _listed(parent, excluded_folders)[0])
            waiting += [path for path in below if not path.is_symlink()]


def _listed(folder: Path, excluded_folders: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders in a folder, and of all else in it, without what is passed over."""
    folders, others = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not _is_folder(entry):
                    others.append(entry.name)
                elif entry.name not in excluded_folders:
                    folders.append(entry.name)
    except OSError as error:
        raise InputError(f"cannot list the folder {printable(folder)}: {error.strerror}") from error
    return sorted(folders), sorted(others)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or to where this process may not look: reading it reports that
        return False


def _identity(folder: Path) -> _Identity:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise InputError(f"cannot list the folder {printable(folder)}: {error.strerror}") from error
    return found.st_dev, found.st_ino
