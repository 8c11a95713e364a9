"""Which store a location is in."""

from __future__ import annotations

from della_dist.errors import InputError
from della_dist.locations import check_location, is_url, local_path, scheme
from della_dist.storage.local.store import LocalStore
from della_dist.storage.store import OutputStore

#: Requests at once where nobody says otherwise: enough for headers and small files.
DEFAULT_CONNECTIONS = 16

_PACKAGES = {"s3": "'della-dist[s3]'", "s3a": "'della-dist[s3]'", "gs": "gcsfs", "az": "adlfs"}


def open_store(location: str, connections: int = DEFAULT_CONNECTIONS) -> OutputStore:
    """Return the store whose root is `location`. Nothing is read, and nothing need be there.

    Parameters
    ----------
    location
        A path, or a URL of anything that fsspec knows. Endpoint, profile and credentials come from
        fsspec's configuration and the usual environment variables.
    connections
        Requests at once, of a remote store.

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
