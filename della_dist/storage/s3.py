"""The store over S3 and what speaks its protocol.

Versions are ETags: reads are pinned to one, and conditional writes make the lease exclusive.
Objects are written by multipart uploads, several parts at once.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

from della_dist.errors import MissingObjectError
from della_dist.storage.remote import RemoteStore, check_length
from della_dist.storage.retry import error_code, error_status, retry
from della_dist.storage.s3_client import shared_client
from della_dist.storage.store import ObjectStat, Writer, check_key
from della_dist.storage.upload import MultipartWriter, part_bytes


class S3Store(RemoteStore):
    """Objects under ``s3://bucket/prefix``; see `RemoteStore`."""

    def __init__(self, location: str, root: str, connections: int) -> None:
        super().__init__(location, root, connections)
        self._client = shared_client(connections)
        self._bucket, _, prefix = self._root.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def place(self, key: str) -> dict[str, str]:
        """Return bucket and name of `key`, as requests have them."""
        return {"Bucket": self._bucket, "Key": f"{self._prefix}{check_key(key)}"}

    def _call(self, operation: str, **arguments: Any) -> Any:  # noqa: ANN401
        return self._client.call(operation, **arguments)

    def _look_up(self, key: str) -> Any:  # noqa: ANN401
        return self._retried(key, "looking up", "head_object")

    def _retried(self, key: str, doing: str, operation: str, **arguments: Any) -> Any:  # noqa: ANN401
        place = self.place(key)
        return retry(
            lambda: self._call(operation, **place, **arguments), f"{doing} {self.describe(key)}"
        )

    def stat(self, key: str) -> ObjectStat:
        """Return size and ETag of `key`."""
        head = self._look_up(key)
        return ObjectStat(int(head["ContentLength"]), head["ETag"].strip('"'))

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
        date = head["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            return None
        age_s: float = (parsedate_to_datetime(date) - head["LastModified"]).total_seconds()
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
            list_objects = partial(self._call, "list_objects_v2", **place, **how, **marker)
            found = retry(list_objects, f"listing {self.location}")
            yield found
            if not found.get("IsTruncated"):
                return
            marker = {"ContinuationToken": found["NextContinuationToken"]}

    def _read_whole(self, key: str) -> bytes:
        place = self.place(key)
        size_bytes = int(self._call("head_object", **place)["ContentLength"])
        # botocore checks the checksum of a whole object, where the store has one.
        with contextlib.closing(self._call("get_object", **place)["Body"]) as body:
            data = bytes(body.read())
        check_length(data, size_bytes)
        return data

    def _fetch(self, key: str, start: int, version: str | None, into: memoryview) -> None:
        pinned = {} if version is None else {"IfMatch": f'"{version}"'}
        stop = start + len(into)
        try:
            response = self._call(
                "get_object", **self.place(key), Range=f"bytes={start}-{stop - 1}", **pinned
            )
        except OSError as error:
            if error_status(error) in (412, 416):
                raise self._changed(key) from error
            if version is not None and error_status(error) == 404:
                raise self._changed(key, "removed") from error
            raise
        if version is not None and response["ETag"].strip('"') != version:
            response["Body"].close()
            raise self._changed(key)
        size_bytes = int(response["ContentRange"].rpartition("/")[2])
        if stop > size_bytes:
            response["Body"].close()
            raise self._too_short(key, stop, size_bytes)
        done = self._client.read_into(response, into)
        if done != len(into):
            raise OSError(f"{done} of {len(into)} bytes from {start} on came")

    def put(self, key: str, data: bytes) -> ObjectStat:
        """Write a small object at once, whole or not at all."""
        answer = self._retried(key, "writing", "put_object", Body=data)
        return ObjectStat(len(data), answer["ETag"].strip('"'))

    def put_new(self, key: str, data: bytes) -> bool:
        """Write `key` unless it exists; return whether it did not."""
        return self._conditional(key, data, {"IfNoneMatch": "*"})

    def put_over(self, key: str, data: bytes, version: str) -> bool:
        """Replace the `version` of `key`; return whether that was there."""
        if self._conditional(key, data, {"IfMatch": f'"{version}"'}):
            return True
        # Ceph knows the ETag only without its quotes, here.
        unchanged = self.exists(key) and self.stat(key).version == version
        return unchanged and self._conditional(key, data, {"IfMatch": version})

    def _conditional(self, key: str, data: bytes, conditions: dict[str, str]) -> bool:
        place = self.place(key)

        def attempt() -> bool:
            try:
                self._call("put_object", **place, Body=data, **conditions)
            except OSError as error:
                # 404: If-Match, and there is no object.
                if isinstance(error, FileExistsError) or error_status(error) in (404, 412):
                    return False
                raise
            return True

        return retry(attempt, f"writing {self.describe(key)}")

    def create(self, key: str, size_bytes: int | None = None) -> Writer:
        """Begin a new object; one that exists is replaced at ``commit``."""
        return MultipartWriter(self, key, size_bytes, part_bytes(size_bytes))

    def delete(self, key: str) -> None:
        """Remove `key`; one that is not there is fine."""
        self._retried(key, "deleting", "delete_object")

    def clear_staging(self, names: Collection[str] = ()) -> None:
        """Abort the uploads of attempts that were killed; in folders only those to `names`."""
        place = {"Bucket": self._bucket, "Prefix": self._prefix}
        marker: dict[str, str] = {}
        while True:
            list_uploads = partial(self._call, "list_multipart_uploads", **place, **marker)
            found = retry(list_uploads, f"listing the uploads to {self.location}")
            for upload in found.get("Uploads", ()):
                key = upload["Key"].removeprefix(self._prefix)
                if "/" in key and key not in names:
                    continue  # somebody else's: an output may be a whole bucket
                found_place = {"Bucket": self._bucket, "Key": upload["Key"]}
                self.abort_upload(found_place, upload["UploadId"])
            if not found.get("IsTruncated"):
                return
            marker = {
                "KeyMarker": found["NextKeyMarker"],
                "UploadIdMarker": found["NextUploadIdMarker"],
            }

    # What an upload is made of; see `MultipartWriter`.

    def begin_upload(self, key: str) -> str:
        """Begin a multipart upload and return its id."""
        answer = self._retried(key, "writing", "create_multipart_upload")
        return str(answer["UploadId"])

    def upload_part(self, key: str, upload: str, number: int, data: io.BytesIO) -> dict[str, Any]:
        """Send one part and return what the completion has to say of it."""
        answer = self._retried(
            key, "writing", "upload_part", UploadId=upload, PartNumber=number, Body=data
        )
        # Where the client sends checksums, completing names them again.
        checksums = {
            name: answer[name]
            for name in answer
            if name.startswith("Checksum") and name != "ChecksumType"
        }
        return {"PartNumber": number, "ETag": answer["ETag"], **checksums}

    def finish_upload(
        self, key: str, upload: str, parts: list[dict[str, Any]], size_bytes: int
    ) -> ObjectStat:
        """Complete an upload: the object appears, all of it at once."""
        place = self.place(key)

        def was_done(error: Exception) -> bool | None:
            # The answer to an earlier request was lost: the upload is gone, the object is there.
            gone = error_code(error) == "NoSuchUpload"
            return (
                True
                if gone and self.exists(key) and self.stat(key).size_bytes == size_bytes
                else None
            )

        def complete() -> bool:
            self._call(
                "complete_multipart_upload",
                **place,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
            )
            return True

        retry(complete, f"writing {self.describe(key)}", on_failure=was_done)
        return self.stat(key)

    def abort_upload(
        self, place: dict[str, str], upload: str, patience_s: float | None = None
    ) -> None:
        """Throw an upload away; one that is gone is fine."""

        def abort() -> None:
            try:
                self._call("abort_multipart_upload", **place, UploadId=upload)
            except FileNotFoundError:
                return

        retry(abort, f"aborting an upload to {self.location}", patience_s=patience_s)
