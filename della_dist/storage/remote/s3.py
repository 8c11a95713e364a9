"""The store over S3 and what speaks its protocol.

Versions are ETags: reads are pinned to one, and conditional writes make the lease exclusive.
Objects are written by multipart uploads, several parts at once.

Much that speaks the protocol lacks a part of it. What a merge can do without it does without, and
says so (the sweep of unfinished uploads; ETags, for which size and time of the last change have to
do). The rest is refused at once, by the name of what is missing: ranges, multipart uploads,
conditional writes (see `della_dist.storage.remote.lease`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

from della_dist.errors import DellaDistError, MissingObjectError, UnsupportedError
from della_dist.storage.remote.files import check_length
from della_dist.storage.remote.retry import error_code, error_status, is_unknown_to_store, retry
from della_dist.storage.remote.s3_client import shared_client
from della_dist.storage.remote.store import RemoteStore, say_once
from della_dist.storage.remote.upload import MultipartWriter, abort_upload, part_bytes
from della_dist.storage.store import ObjectStat, Writer, check_key

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
#: So often an answer may be cut on its way; then it is nonsense.
_MAX_UNREADABLE = 6
#: Of versions that are no ETags.
_MODIFIED = "last changed "


class S3Store(RemoteStore):
    """Objects under ``s3://bucket/prefix``; see `RemoteStore`."""

    def __init__(self, location: str, root: str, connections: int) -> None:
        super().__init__(location, root, connections)
        self._client = shared_client(connections)
        self._bucket, _, prefix = self._root.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._pins = True

    def place(self, key: str) -> dict[str, str]:
        """Return bucket and name of `key`, as requests have them."""
        return {"Bucket": self._bucket, "Key": f"{self._prefix}{check_key(key)}"}

    def call(self, operation: str, **arguments: Any) -> Any:  # noqa: ANN401
        """Make one request, once."""
        return self._client.call(operation, **arguments)

    def _look_up(self, key: str) -> Any:  # noqa: ANN401
        return self.retried(key, "looking up", "head_object")

    def retried(self, key: str, doing: str, operation: str, **arguments: Any) -> Any:  # noqa: ANN401
        """Make a request about `key`, again where a failure may pass."""
        place = self.place(key)
        return retry(
            lambda: self.call(operation, **place, **arguments), f"{doing} {self.describe(key)}"
        )

    def stat(self, key: str) -> ObjectStat:
        """Return size and ETag of `key`."""
        head = self._look_up(key)
        size_bytes = self._size_of(key, head)
        return ObjectStat(size_bytes, self._version_of(head, size_bytes))

    def _size_of(self, key: str, head: Mapping[str, Any]) -> int:
        if "ContentLength" not in head:
            raise UnsupportedError(
                f"looking up {self.describe(key)} failed: the store does not say how large it is "
                "(a HEAD without Content-Length). Use the store itself rather than a proxy that "
                "drops this, or another store."
            )
        return int(head["ContentLength"])

    def _version_of(self, answer: Mapping[str, Any], size_bytes: int) -> str:
        """Return what tells this version of an object from others; size and time if need be."""
        if etag := _unquoted(answer.get("ETag", "")):
            return etag
        say_once(
            f"the store of s3://{self._bucket} names no versions (ETags): that an object changes "
            "is seen by its size and the time of its last change alone"
        )
        modified = answer.get("LastModified")
        when = "at an unknown time" if modified is None else f"{modified:%Y-%m-%dT%H:%M:%SZ}"
        return f"{_MODIFIED}{when}, {size_bytes} bytes"

    def exists(self, key: str) -> bool:
        """Return whether there is an object `key`."""
        try:
            self._look_up(key)
        except MissingObjectError:
            return False
        return True

    def age_s(self, key: str) -> float | None:
        """Return how long ago at least `key` was written, by the clock of the server."""
        head = self._look_up(key)
        date, modified = head["ResponseMetadata"]["HTTPHeaders"].get("date"), "LastModified"
        if date is None or modified not in head:
            return None
        age_s: float = (parsedate_to_datetime(date) - head[modified]).total_seconds()
        return max(0.0, age_s - 1)  # both times are in whole seconds

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the keys right in `folder`, sorted: of objects, and of folders."""
        prefix = f"{folder}/" if folder else ""
        files: list[str] = []
        folders: list[str] = []
        for page in self._pages(prefix, Delimiter="/"):
            files += (key for key in self._keys_of(page) if key != prefix)
            folders += (
                entry["Prefix"].removeprefix(self._prefix).removesuffix("/")
                for entry in page.get("CommonPrefixes", ())
            )
        return sorted(files), sorted(folders)

    def _keys(self, prefix: str) -> list[str]:
        return sorted(key for page in self._pages(prefix) for key in self._keys_of(page))

    def _keys_of(self, page: dict[str, Any]) -> Iterator[str]:
        for entry in page.get("Contents", ()):
            # Consoles mark an empty folder by an object of its name.
            if key := entry["Key"].removeprefix(self._prefix):
                yield key

    def _pages(self, prefix: str, **how: str) -> Iterator[dict[str, Any]]:
        place = {"Bucket": self._bucket, "Prefix": f"{self._prefix}{prefix}"}
        marker: dict[str, str] = {}
        while True:
            list_objects = partial(self.call, "list_objects_v2", **place, **how, **marker)
            found = retry(list_objects, f"listing {self.location}")
            yield found
            if not found.get("IsTruncated"):
                return
            if "NextContinuationToken" not in found:
                raise UnsupportedError(
                    f"listing {self.location} failed: the store lists some of the objects "
                    "and not how to ask for the rest (it lacks ListObjectsV2). Use another store, "
                    "or another gateway to this one."
                )
            marker = {"ContinuationToken": found["NextContinuationToken"]}

    def _read_whole(self, key: str) -> bytes:
        place = self.place(key)
        size_bytes = self._size_of(key, self.call("head_object", **place))
        # botocore checks the checksum of a whole object, where the store has one.
        with contextlib.closing(self.call("get_object", **place)["Body"]) as body:
            data = bytes(body.read())
        check_length(data, size_bytes)
        return data

    def _fetch(self, key: str, start: int, version: str | None, into: memoryview) -> None:
        stop = start + len(into)
        response = self._get_range(key, start, stop, version)
        if (wrong := self._wrong_with(key, start, stop, version, response)) is not None:
            response["Body"].close()  # whatever may still come
            raise wrong
        done = self._client.read_into(response, into)
        if done != len(into):
            raise OSError(f"{done} of {len(into)} bytes from {start} on came")

    def _get_range(self, key: str, start: int, stop: int, version: str | None) -> Any:  # noqa: ANN401
        how = {"Range": f"bytes={start}-{stop - 1}"}
        pins = self._pins and version is not None and _is_strong(version)
        if pins:
            how["IfMatch"] = f'"{version}"'
        try:
            return self.call("get_object", **self.place(key), **how)
        except OSError as error:
            status = error_status(error)
            if pins and status in (412, 501) and self.stat(key).version == version:
                # It compares ETags by other rules, or not at all. The answer's is looked at anyway.
                self._pins = False
                return self._get_range(key, start, stop, version)
            if status in (412, 416):
                raise self._changed(key) from error
            if version is not None and status == 404:
                raise self._changed(key, "removed") from error
            raise

    def _wrong_with(
        self, key: str, start: int, stop: int, version: str | None, response: Mapping[str, Any]
    ) -> DellaDistError | None:
        """Return why an answer is not the range that was asked for, or None if it is."""
        length = response.get("ContentLength")
        found = _CONTENT_RANGE.match(response.get("ContentRange", ""))
        if found is None and start == 0 and length == stop:
            size_bytes = stop  # all of the object, which is what was wanted
        elif found is None or int(found[1]) != start:
            return self._no_ranges(key)
        else:
            size_bytes = int(found[2]) if found[2] != "*" else start + int(length or 0)
        if version is not None and self._version_of(response, size_bytes) != version:
            return self._changed(key)
        if stop > size_bytes:
            return self._too_short(key, stop, size_bytes)
        return None

    def put(self, key: str, data: bytes) -> ObjectStat:
        """Write a small object at once, whole or not at all."""
        answer = self.retried(key, "writing", "put_object", Body=data)
        if etag := _unquoted(answer.get("ETag", "")):
            return ObjectStat(len(data), etag)
        return self.stat(key)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write `key` unless it exists; return whether it did not."""
        return self._conditional(key, data, {"IfNoneMatch": "*"})

    def put_over(self, key: str, data: bytes, version: str) -> bool:
        """Replace the `version` of `key`; return whether that was there."""
        if not _is_strong(version):
            raise UnsupportedError(f"{self.describe(key)} has no ETag that If-Match could name.")
        if self._conditional(key, data, {"IfMatch": f'"{version}"'}):
            return True
        # Ceph knows the ETag only without its quotes, here.
        try:
            unchanged = self.stat(key).version == version
        except MissingObjectError:
            return False
        return unchanged and self._conditional(key, data, {"IfMatch": version})

    def _conditional(self, key: str, data: bytes, conditions: dict[str, str]) -> bool:
        place = self.place(key)
        doing = f"writing {self.describe(key)}"

        def attempt() -> bool:
            try:
                self.call("put_object", **place, Body=data, **conditions)
            except OSError as error:
                # 404: If-Match, and there is no object.
                if isinstance(error, FileExistsError) or error_status(error) in (404, 412):
                    return False
                if is_unknown_to_store(error):
                    raise UnsupportedError(f"{doing} under a condition failed: {error}") from error
                raise
            return True

        return retry(attempt, doing)

    def create(self, key: str, size_bytes: int | None = None) -> Writer:
        """Begin a new object; one that exists is replaced at ``commit``."""
        return MultipartWriter(self, key, size_bytes, part_bytes(size_bytes))

    def delete(self, key: str) -> None:
        """Remove `key`; one that is not there is fine."""
        self.retried(key, "deleting", "delete_object")

    def clear_staging(self, names: Collection[str] = ()) -> None:
        """Abort the uploads that attempts which were killed left behind; see `Store`.

        Of keys in subfolders only `names`: others are somebody else's, for an output may be a
        whole bucket.
        """
        marker: dict[str, str] = {}
        while (found := self._uploads(marker)) is not None:
            for upload in found.get("Uploads", ()):
                key = upload["Key"].removeprefix(self._prefix)
                if "/" not in key or key in names:
                    found_place = {"Bucket": self._bucket, "Key": upload["Key"]}
                    abort_upload(self, found_place, upload["UploadId"])
            if not found.get("IsTruncated"):
                return
            marker = {
                "KeyMarker": found["NextKeyMarker"],
                "UploadIdMarker": found["NextUploadIdMarker"],
            }
        say_once(
            f"the store of s3://{self._bucket} does not list unfinished uploads: what runs that "
            "were killed leave there stays and may cost; let a lifecycle rule of the bucket abort "
            "incomplete multipart uploads"
        )

    def _uploads(self, marker: dict[str, str]) -> Any:  # noqa: ANN401
        """Return a page of the unfinished uploads here, or None where the store lists none."""
        place = {"Bucket": self._bucket, "Prefix": self._prefix}
        unreadable: list[Exception] = []

        def unknown(error: Exception) -> dict[str, Any] | None:
            if error_code(error) == "500":  # botocore's word for an answer that is no XML, or cut
                unreadable.append(error)
            # 404: the bucket is there, the lease is in it.
            lacks = is_unknown_to_store(error) or error_status(error) == 404
            return {} if lacks or len(unreadable) > _MAX_UNREADABLE else None

        found = retry(
            lambda: self.call("list_multipart_uploads", **place, **marker),
            f"listing the uploads to {self.location}",
            on_failure=unknown,
        )
        # What names no bucket is another listing, of the objects.
        return found if "Bucket" in found or "Uploads" in found else None


def _unquoted(etag: str) -> str:
    """Return an ETag as versions have it, '' where there is none; weak ones keep their W/."""
    weak = "W/" if etag.startswith("W/") else ""
    value = etag.removeprefix("W/").strip('"')
    return weak + value if value else ""


def _is_strong(version: str) -> bool:
    """Tell whether a condition can name a version: by HTTP's rules a weak ETag equals none."""
    return not version.startswith(("W/", _MODIFIED))
