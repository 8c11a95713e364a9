"""Models on the Hugging Face Hub: from the cache where it has them, else in ranges, not stored.

A file of a commit never changes, so that its ETag tells the content wherever it is read: the cache
here and the Hub elsewhere are one location.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from della_dist.errors import MissingObjectError
from della_dist.locations import hub_repository
from della_dist.storage.hub.snapshot import HubFile, cached_folder, gated, pinned, snapshot
from della_dist.storage.local.files import LocalFiles
from della_dist.storage.local.mapped import MappedReader
from della_dist.storage.readahead import ReadAhead
from della_dist.storage.remote.body import read_into
from della_dist.storage.remote.files import RemoteFiles, check_length
from della_dist.storage.store import ObjectStat, Reader, storage_error

CONNECT_S = 5.0
ANSWER_S = 15.0
_MAX_REDIRECTS = 5
#: What an address that was handed out once answers when its time is over.
EXPIRED_STATUS = frozenset({400, 401, 403, 404, 410})


class HubFiles(RemoteFiles):
    """The files of one commit; see `RemoteFiles`.

    Parameters
    ----------
    location
        ``hf://org/name@revision``. The commit is looked up when it is first needed.
    connections
        Requests at once.
    """

    def __init__(self, location: str, connections: int) -> None:
        super().__init__(location, connections)
        self._direct: dict[str, str] = {}
        """Addresses to which the Hub has sent us: of the store behind it, which wants no token."""

    @functools.cached_property
    def _commit(self) -> tuple[str, str]:
        found = hub_repository(pinned(self.location))
        assert found is not None
        assert found[1] is not None
        return found[0], found[1]

    @property
    def _files(self) -> Mapping[str, HubFile]:
        return snapshot(*self._commit)

    def _file(self, key: str) -> HubFile:
        try:
            return self._files[key]
        except KeyError:
            raise MissingObjectError(
                f"looking up {self.describe(key)} failed: there is no such file in the repository."
            ) from None

    def _cached(self, key: str) -> LocalFiles | None:
        if self._file(key).path is None:
            return None
        return LocalFiles(cached_folder(*self._commit))

    def stat(self, key: str) -> ObjectStat:
        """Return size and ETag of `key`."""
        file = self._file(key)
        return ObjectStat(file.size_bytes, file.version)

    def exists(self, key: str) -> bool:
        """Return whether there is a file `key`."""
        return key in self._files

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the keys right in `folder`, sorted: of files, and of folders."""
        prefix = f"{folder}/" if folder else ""
        names = [key.removeprefix(prefix) for key in self._files if key.startswith(prefix)]
        folders = {name.partition("/")[0] for name in names if "/" in name}
        files = (name for name in names if "/" not in name)
        return sorted(prefix + name for name in files), sorted(prefix + name for name in folders)

    def _keys(self, prefix: str) -> Sequence[str]:
        return sorted(key for key in self._files if key.startswith(prefix))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of `key` from `start` up to `stop` (its end if None), all of them."""
        cached = self._cached(key)
        return super().read(key, start, stop) if cached is None else cached.read(key, start, stop)

    def open_reader(
        self, key: str, planned: ObjectStat | None = None, ahead: ReadAhead | None = None
    ) -> Reader:
        """Open `key` for reading: it is mapped where the cache has it."""
        path, stat = self._file(key).path, self.stat(key)
        if planned is not None and planned != stat:
            raise self._changed(key)
        if path is None:
            return super().open_reader(key, stat, ahead)
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != stat.size_bytes:
                    raise self._changed(key, "cut short in the cache")
                return MappedReader(file.fileno(), stat, str(path))
        except OSError as error:
            raise storage_error(error, f"opening {path}") from error

    def _read_whole(self, key: str) -> bytes:
        with self._get(key, {}) as response:
            data = bytes(response.content)
        check_length(data, self._file(key).size_bytes)
        return data

    def _fetch(self, key: str, start: int, version: str | None, into: memoryview) -> None:
        file = self._file(key)
        stop = start + len(into)
        if version not in (None, file.version):
            raise self._changed(key)
        if stop > file.size_bytes:
            raise self._too_short(key, stop, file.size_bytes)
        with self._get(key, {"Range": f"bytes={start}-{stop - 1}"}) as response:
            is_whole = response.status_code == 200 and len(into) == file.size_bytes
            served = response.headers.get("Content-Range", "")
            if not is_whole and not served.startswith(f"bytes {start}-{stop - 1}/"):
                raise self._no_ranges(key)
            done = read_into(response.raw, into)
        if done != len(into):
            raise OSError(f"{done} of {len(into)} bytes from {start} on came")

    def _get(self, key: str, headers: Mapping[str, str]) -> Any:  # noqa: ANN401
        """Return the answer to a request for a file, following the Hub to where it lies.

        The Hub knows who may read, and sends to a store that need not: a signed address, which is
        used again until its time is over. The token goes to the Hub alone.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        get = functools.partial(_request, _session(self.connections))
        plain = {**headers, "Accept-Encoding": "identity"}
        direct = self._direct.get(key)
        if direct is not None:
            response = get(direct, plain)
            if response.status_code not in EXPIRED_STATUS:
                return self._checked(response)
            response.close()
            self._direct.pop(key, None)
        repository, commit = self._commit
        url = f"{constants.ENDPOINT}/{repository}/resolve/{commit}/{quote(key)}"
        for _ in range(_MAX_REDIRECTS):
            is_hub = origin(url) == origin(constants.ENDPOINT)
            own = build_hf_headers(library_name="della-dist") if is_hub else {}
            response = get(url, {**own, **plain})
            target = response.headers.get("Location")
            if not response.is_redirect or target is None:
                if not is_hub and response.ok:
                    self._direct[key] = url
                return self._checked(response)
            response.close()
            url = urljoin(url, target)
        raise OSError(f"more than {_MAX_REDIRECTS} redirections, the last to {origin(url)}")

    def _checked(self, response: Any) -> Any:  # noqa: ANN401
        if response.ok:
            return response
        response.close()
        error = HubAnswerError(response)
        if response.headers.get("X-Error-Code") == "GatedRepo":
            raise gated(self._commit[0], str(error))
        raise error


def _request(session: Any, url: str, headers: Mapping[str, str]) -> Any:  # noqa: ANN401
    import requests

    waits = (CONNECT_S, ANSWER_S)
    try:
        return session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=waits)
    except requests.RequestException as error:
        kind = type(error).__name__  # its text has the whole address, signature and all
    raise OSError(f"{kind} at {origin(url)}")


class HubAnswerError(OSError):
    """An answer that is none; `della_dist.storage.remote.retry` reads its status."""

    def __init__(self, response: Any, said: str | None = None) -> None:  # noqa: ANN401
        # What `requests` calls reason is reason_phrase where huggingface_hub asked.
        phrase = getattr(response, "reason", "") or getattr(response, "reason_phrase", "")
        said = said or response.headers.get("X-Error-Message") or phrase
        super().__init__(f"{response.status_code} {said}".strip())
        self.response = response


def origin(url: str) -> str:
    """Return scheme, host and port: all that a message may say of a signed address."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


@functools.lru_cache
def _session(connections: int) -> Any:  # noqa: ANN401
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    adapter = HTTPAdapter(pool_maxsize=connections)
    for prefix in ("https://", "http://"):
        session.mount(prefix, adapter)
    return session
