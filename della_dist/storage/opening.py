"""Which store a location is in, to read and to write."""

from __future__ import annotations

import os
from collections.abc import Iterable

from della_dist.errors import InputError, UnreachableError
from della_dist.locations import (
    HUB_PREFIX,
    check_location,
    hub_repository,
    is_url,
    local_path,
    scheme,
)
from della_dist.storage.local.store import LocalStore
from della_dist.storage.store import OutputStore, Store

#: Requests at once where nobody says otherwise: enough for headers and small files.
DEFAULT_CONNECTIONS = 16

_PACKAGES = {"s3": "'della-dist[s3]'", "s3a": "'della-dist[s3]'", "gs": "gcsfs", "az": "adlfs"}


def resolved(location: str) -> str:
    """Return where a checkpoint is that a configuration names: a path, or a URL that is pinned.

    What exists as a local path is that; else ``org/name`` and ``org/name@revision`` are on the Hub.

    Raises
    ------
    InputError, UnreachableError
        If the Hub does not have it, or cannot be asked.
    """
    if not is_url(location) and os.path.lexists(local_path(location)):
        return location
    if hub_repository(location) is None:
        return location
    from della_dist.storage.hub.snapshot import pinned

    try:
        return pinned(location)
    except (InputError, UnreachableError) as error:
        if is_url(location):
            raise
        raise type(error)(f"there is no directory {location}, and {error}") from error


def is_here(location: str, names: Iterable[str]) -> bool:
    """Return whether files of a store are read without requests: local ones, and a cache's here.

    Parameters
    ----------
    location
        As `resolved` returns it.
    names
        Of the files.
    """
    found = hub_repository(location) if location.startswith(HUB_PREFIX) else None
    if found is None or found[1] is None:
        return not is_url(location)
    from della_dist.storage.hub.snapshot import snapshot

    files = snapshot(found[0], found[1])
    return all(name in files and files[name].path is not None for name in names)


def open_store(location: str, connections: int = DEFAULT_CONNECTIONS) -> Store:
    """Return the store whose root is `location`, to read. Nothing need be there.

    Parameters
    ----------
    location
        A path, or a URL of the Hub or of anything that fsspec knows. Endpoint, profile and
        credentials come from the usual environment variables, and fsspec's configuration.
    connections
        Requests at once, of a remote store.

    Raises
    ------
    InputError
        If the URL is wrong, a package for it is missing, or the repository is not to be had.
    """
    if location.startswith(HUB_PREFIX) and hub_repository(location) is not None:
        from della_dist.storage.hub.files import HubFiles

        return HubFiles(location, connections)
    return open_output_store(location, connections)


def open_output_store(
    location: str,
    connections: int = DEFAULT_CONNECTIONS,
    *,
    public: bool = False,
    staging: str | None = None,
) -> OutputStore:
    """Return the store whose root is `location`, to write. Nothing is read.

    Parameters
    ----------
    location
        As in `open_store`; on the Hub, a branch.
    connections
        Requests at once, of a remote store.
    public, staging
        Of an output on the Hub; see `della_dist.storage.hub.output.store.HubStore`.

    Raises
    ------
    InputError
        If the URL is wrong, or a package for it is missing.
    """
    try:
        check_location(location)
    except ValueError as error:
        raise InputError(f"a location {error}.") from None
    if not is_url(location):
        return LocalStore(local_path(location))
    name = scheme(location)
    if name == "hf":
        from della_dist.storage.hub.output.store import HubStore

        return HubStore(location, connections, public=public, staging=staging)
    package = _PACKAGES.get(name, "fsspec and the package for it")
    try:
        import fsspec

        from della_dist.storage.remote.generic import GenericStore

        if name in ("s3", "s3a"):
            from della_dist.storage.remote.s3 import S3Store

            root = location.partition("://")[2].strip("/")
            return S3Store(location, root, connections)
        filesystem, root = fsspec.url_to_fs(location, use_listings_cache=False)
    except ImportError as error:
        raise InputError(
            f"{location}: {name}:// needs a package that is not installed ({error}). "
            f"pip install {package}."
        ) from None
    except ValueError as error:
        raise InputError(f"{location}: {error}. Give a path, or a URL that fsspec knows.") from None
    return GenericStore(location, filesystem, root, connections)
