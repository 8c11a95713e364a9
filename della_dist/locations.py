"""Where checkpoints and outputs are: local paths, and URLs of object stores.

A location is a path, ``file:///path``, or ``scheme://bucket/prefix`` of anything that fsspec knows.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}


def is_url(location: str) -> bool:
    """Return whether `location` is in an object store (or another remote file system)."""
    match = _URL.match(location)
    return match is not None and match[1].lower() != "file"


def scheme(url: str) -> str:
    """Return the scheme of a URL, in lower case."""
    return url.partition("://")[0].lower()


def check_url(url: str) -> None:
    """Refuse a URL that cannot be a directory of a store.

    Raises
    ------
    ValueError
        What is wrong with it. The message never shows what may be a credential.
    """
    match = _URL.fullmatch(url)
    assert match is not None
    authority = match[2].partition("/")[0]
    # az://container@account.host is the one use of @ that names a place.
    if "@" in authority and _ALIASES.get(match[1].lower(), match[1].lower()) != "az":
        raise ValueError(
            f"is a {match[1]}:// URL with a user name or password in it. Credentials belong in the "
            "environment, a profile, or fsspec's configuration"
        )
    if "?" in match[2] or "#" in match[2]:
        raise ValueError(
            f"is a {match[1]}:// URL with a query (? or #), which no directory has. Give the URL "
            "of the directory alone; credentials belong in the environment"
        )
    if not authority and match[1].lower() != "memory":
        raise ValueError(f"is {url!r}, a URL without a bucket or host")
    if ".." in match[2].split("/"):
        raise ValueError(f"is {url!r}; a URL cannot go up with '..'")


def local_path(location: str) -> Path:
    """Return the path that a location which is no URL names; ``~`` is expanded."""
    if location.lower().startswith("file://"):
        location = location[len("file://") :]
    return Path(location).expanduser()


def place(location: str, *, follow_links: bool = False) -> str:
    """Return a form of `location` in which two spellings of one place are equal.

    Parameters
    ----------
    location
        A path or URL.
    follow_links
        Also see through links of the local file system, which reads it.
    """
    if is_url(location):
        name = scheme(location)
        parts = [part for part in location.partition("://")[2].split("/") if part not in ("", ".")]
        return f"{_ALIASES.get(name, name)}://{'/'.join(parts)}"
    path = local_path(location).absolute()
    return str(path.resolve()) if follow_links else os.path.normpath(path)


def absolute(location: str) -> str:
    """Return `location` in a form that means the same in every working directory."""
    return location if is_url(location) else str(local_path(location).absolute())


def overlap(one: str, other: str) -> bool:
    """Return whether two locations are the same place, or one lies within the other."""
    a, b = (place(location, follow_links=True) for location in (one, other))
    return a == b or a.startswith(f"{b.rstrip('/')}/") or b.startswith(f"{a.rstrip('/')}/")
