"""Folders of a local output, reached from its root through no link, and removed likewise.

The root may be a link: the user named it. Below it everything is the output's own, so that a link
there would lead writes and removals to files of somebody else. Looking first is not enough, since a
link may be put there afterwards: each folder is opened relative to the one before it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_flags
from collections.abc import Iterable, Iterator
from pathlib import Path

from della_dist.storage.libc import make_durable

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextlib.contextmanager
def opened_folder(root: Path, folder: str = "", *, make: bool = False) -> Iterator[int]:
    """Open `folder`, a key below `root`, and return its descriptor.

    Parameters
    ----------
    root
        The directory of the output; links on the way to it are followed.
    folder
        With forward slashes; the root itself if empty.
    make
        Whether to make what is missing, durably.

    Raises
    ------
    OSError
        If it is not there, or is, or lies in, something else than a directory: ``ENOTDIR`` or
        ``ELOOP`` for a link.
    """
    if make:
        make_directories(root)
    descriptor = os.open(root, _FOLDER)
    try:
        for part in folder.split("/") if folder else ():
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            except FileNotFoundError:
                if not make:
                    raise
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
                    sync_folder(descriptor)
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            # In this order: an interrupt in between leaves one open, and closes none twice, which
            # might be another thread's by then.
            outer, descriptor = descriptor, inner
            os.close(outer)
        yield descriptor
    finally:
        os.close(descriptor)


def split_key(key: str) -> tuple[str, str]:
    """Return the folder of a key (empty for the root), and its name in it."""
    folder, _, name = key.rpartition("/")
    return folder, name


def sync_folder(descriptor: int) -> None:
    """Make the entries of an open folder durable."""
    try:
        make_durable(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # network file systems without it
            raise


def make_directories(path: Path) -> None:
    """Create directory `path` and its missing parents, durably."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        with opened_folder(directory.parent) as parent:
            sync_folder(parent)


def remove_tree(root: Path, folder: str) -> None:
    """Remove a folder, while workers believed dead may still come and go in it.

    Links in it are removed, and what they point to is left alone.
    """
    above, name = split_key(folder)
    try:
        with opened_folder(root, above) as parent:
            for _, folders, files, here in os.fwalk(name, topdown=False, dir_fd=parent):
                for file in (*files, *folders):
                    _remove(file, here)
            os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        remove_tree(root, folder)


def _remove(name: str, folder: int) -> None:
    """Remove an entry: a link whatever it points to, a folder if it is empty."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        remove = os.rmdir if stat_flags.S_ISDIR(found.st_mode) else os.unlink
        remove(name, dir_fd=folder)


def remove_file(root: Path, key: str) -> None:
    """Remove `key`, durably, and the folders below `root` that this leaves empty, as in a bucket.

    A key that is not there is fine.
    """
    folder, name = split_key(key)
    with contextlib.suppress(FileNotFoundError):
        with opened_folder(root, folder) as parent:
            _remove(name, parent)
            sync_folder(parent)
        while folder:
            above, name = split_key(folder)
            with opened_folder(root, above) as parent:
                try:
                    os.rmdir(name, dir_fd=parent)
                except OSError:  # something else is in it
                    return
            folder = above


def links_among(root: Path, keys: Iterable[str]) -> list[str]:
    """Return the keys, or the folders below `root` they lie in, that are links, sorted."""
    checked = {part for key in keys for part in _with_folders(key)}
    return sorted(part for part in checked if (root / part).is_symlink())


def taken_among(root: Path, keys: Iterable[str]) -> list[str]:
    """Return the keys that cannot be made anew: something has the name, or that of a folder."""

    def is_taken(key: str) -> bool:
        *folders, name = _with_folders(key)
        return os.path.lexists(root / name) or any(
            os.path.lexists(root / folder) and not (root / folder).is_dir() for folder in folders
        )

    return sorted(key for key in keys if is_taken(key))


def _with_folders(key: str) -> list[str]:
    """Return the folders a key lies in, outermost first, and the key itself."""
    parts = key.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]
