"""The store over S3 and what speaks its protocol, through s3fs.

Requests that fsspec's interface has no word for go to the client that s3fs configures: reads pinned
to an ETag, conditional writes, multipart uploads of several parts at once.
"""

from __future__ import annotations

import io
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

from della_dist.storage.remote import RemoteStore
from della_dist.storage.retry import error_code, error_status, retry
from della_dist.storage.store import ObjectStat, Writer, check_key
from della_dist.storage.upload import MultipartWriter, part_bytes

#: Bytes of a body that are handed over at a time.
_CHUNK_BYTES = 1 << 20


def open_filesystem(connections: int) -> Any:  # noqa: ANN401
    """Return an s3fs file system for so many connections, otherwise as the user configured it."""
    import fsspec.config
    import s3fs

    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    filesystem = s3fs.S3FileSystem(
        # botocore keeps ten connections, whatever the number of requests at once.
        config_kwargs={"max_pool_connections": connections + 4, **configured},
        use_listings_cache=False,
    )
    filesystem.retries = 1  # ours come on top of botocore's; a third layer only multiplies them
    return filesystem


class S3Store(RemoteStore):
    """Objects under ``s3://bucket/prefix``; see `RemoteStore`."""

    def __init__(self, location: str, filesystem: Any, root: str, connections: int) -> None:  # noqa: ANN401
        super().__init__(location, filesystem, root, connections)
        self._bucket, _, self._prefix = self._root.partition("/")

    def place(self, key: str) -> dict[str, str]:
        """Return bucket and name of `key`, as requests have them."""
        name = f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)
        return {"Bucket": self._bucket, "Key": name}

    def _call(self, operation: str, **arguments: Any) -> Any:  # noqa: ANN401
        return self._fs.call_s3(operation, **arguments)

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
        place = self.place(key)

        def look() -> bool:
            try:
                self._call("head_object", **place)
            except FileNotFoundError:
                return False
            return True

        return retry(look, f"looking up {self.describe(key)}")

    def age_s(self, key: str) -> float | None:
        """Return how long ago `key` was written, by the clock of the server."""
        head = self._look_up(key)
        date = head["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            return None
        age_s: float = (parsedate_to_datetime(date) - head["LastModified"]).total_seconds()
        return max(0.0, age_s)

    def _cat(self, path: str, start: int) -> bytes:
        # s3fs reads whole objects with their checksum, where the store has one.
        return bytes(self._fs.cat_file(path, start=start or None, end=None))

    def _fetch(self, key: str, start: int, version: str | None, into: memoryview) -> None:
        from fsspec.asyn import sync

        sync(self._fs.loop, self._fetch_async, key, start, version, into)

    async def _fetch_async(
        self, key: str, start: int, version: str | None, into: memoryview
    ) -> None:
        pinned = {} if version is None else {"IfMatch": f'"{version}"'}
        stop = start + len(into)
        try:
            response = await self._fs._call_s3(
                "get_object", **self.place(key), Range=f"bytes={start}-{stop - 1}", **pinned
            )
        except OSError as error:
            if error_status(error) in (412, 416) or (version and error_status(error) == 404):
                raise self._changed(key) from error
            raise
        body = response["Body"]
        try:
            if version is not None and response["ETag"].strip('"') != version:
                raise self._changed(key)
            self._refuse_beyond(key, stop, int(response["ContentRange"].rpartition("/")[2]))
            done = 0
            while done < len(into):
                count = await body.readinto(into[done : done + _CHUNK_BYTES])
                if count == 0:
                    break
                done += count
        finally:
            body.close()
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

    def clear_staging(self) -> None:
        """Abort the uploads that attempts which were killed left behind."""
        prefix = f"{self._prefix}/" if self._prefix else ""
        place = {"Bucket": self._bucket, "Prefix": prefix}
        marker: dict[str, str] = {}
        while True:
            list_uploads = partial(self._call, "list_multipart_uploads", **place, **marker)
            found = retry(list_uploads, f"listing the uploads to {self.location}")
            for upload in found.get("Uploads", ()):
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
        place = self.place(key)

        def send() -> Any:  # noqa: ANN401
            data.seek(0)
            return self._call("upload_part", **place, UploadId=upload, PartNumber=number, Body=data)

        answer = retry(send, f"writing {self.describe(key)}")
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
            # The answer to an earlier attempt was lost: the upload is gone, the object is there.
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

        retry(complete, f"writing {self.describe(key)}", on_repeat=was_done)
        return self.stat(key)

    def abort_upload(self, place: dict[str, str], upload: str) -> None:
        """Throw an upload away; one that is gone is fine."""

        def abort() -> None:
            try:
                self._call("abort_multipart_upload", **place, UploadId=upload)
            except FileNotFoundError:
                return

        retry(abort, f"aborting an upload to {self.location}")
