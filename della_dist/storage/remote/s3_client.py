"""Requests to S3, configured as s3fs is.

s3fs knows where endpoint, profile, credentials and their absence come from, and what every request
is to carry (encryption, requester pays). The requests themselves are made by botocore's blocking
client from threads: on one core it reads twice as fast as the event loop does, straight into the
buffer that is wanted.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Mapping
from typing import Any

from della_dist.storage.remote.body import read_into

#: What the client waits for: a connection, and the next bytes of an answer.
CONNECT_S = 5
ANSWER_S = 15


def open_filesystem(connections: int) -> Any:  # noqa: ANN401
    """Return an s3fs file system for so many connections, otherwise as the user configured it."""
    import fsspec.config
    import s3fs

    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return s3fs.S3FileSystem(
        config_kwargs={
            # botocore keeps ten, whatever the number of requests at once.
            "max_pool_connections": connections,
            # `della_dist.storage.remote.retry` repeats; two layers would multiply.
            "retries": {"max_attempts": 0},
            "connect_timeout": CONNECT_S,
            "read_timeout": ANSWER_S,
            **configured,
        }
    )


_clients: dict[tuple[object, ...], S3Client] = {}
_clients_lock = threading.Lock()


def shared_client(connections: int) -> S3Client:
    """Return the client of this process for so many connections.

    Making one takes a tenth of a second of computing, and a merge has a store for every checkpoint.
    """
    import fsspec.config

    names = sorted(name for name in os.environ if name.startswith(("AWS_", "FSSPEC_")))
    environment = tuple((name, os.environ[name]) for name in names)
    key = (connections, environment, repr(fsspec.config.conf.get("s3")))
    with _clients_lock:
        if key not in _clients:
            _clients[key] = S3Client(open_filesystem(connections))
        return _clients[key]


class S3Client:
    """Makes requests. Safe to use from several threads.

    Parameters
    ----------
    filesystem
        Says how.
    """

    def __init__(self, filesystem: Any) -> None:  # noqa: ANN401
        self.filesystem = filesystem
        self._lock = threading.Lock()
        self._client: Any = None
        self._additional: dict[str, dict[str, Any]] = {}

    def call(self, operation: str, **arguments: Any) -> Any:  # noqa: ANN401
        """Make one request.

        Parameters
        ----------
        operation
            As botocore calls its method: ``"get_object"``.
        **arguments
            Of the operation, in S3's spelling. A body is sent from its beginning, in small pieces:
            its time-outs then are for each of these, and a slow network does not fail.

        Raises
        ------
        OSError
            As s3fs translates what the server says: `FileNotFoundError`, `PermissionError` ...
        """
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        body = arguments.get("Body")
        if isinstance(body, bytes):
            arguments["Body"] = io.BytesIO(body)  # a view, no copy
        elif body is not None:
            body.seek(0)
        client = self._connected()
        method = getattr(client, operation)
        try:
            return method(**self._additional_to(client, operation), **arguments)
        except ClientError as error:
            raise translate_boto_error(error) from error

    def read_into(self, response: Mapping[str, Any], into: memoryview) -> int:
        """Fill `into` with the body of an answer to ``get_object``; return how much there was."""
        with contextlib.closing(response["Body"]) as body:
            return read_into(body._raw_stream, into)

    def _connected(self) -> Any:  # noqa: ANN401
        with self._lock:
            if self._client is None:
                self._client = _connect(self.filesystem)
            return self._client

    def _additional_to(self, client: Any, operation: str) -> dict[str, Any]:  # noqa: ANN401
        """Return what the user wants every such request to carry."""
        if operation not in self._additional:
            known = client.meta.service_model.operation_model(
                client.meta.method_to_api_mapping[operation]
            ).input_shape.members
            wanted = {**self.filesystem.s3_additional_kwargs, **self.filesystem.req_kw}
            self._additional[operation] = {k: v for k, v in wanted.items() if k in known}
        return self._additional[operation]


def _connect(filesystem: Any) -> Any:  # noqa: ANN401
    """Return a client that is configured as the one `filesystem` would make."""
    import botocore
    import botocore.session
    from botocore.config import Config

    session = botocore.session.Session(**filesystem.kwargs)
    config = {
        "connect_timeout": filesystem.connect_timeout,
        "read_timeout": filesystem.read_timeout,
        **filesystem.config_kwargs,
    }
    options = {
        "aws_access_key_id": filesystem.key,
        "aws_secret_access_key": filesystem.secret,
        "aws_session_token": filesystem.token,
        "endpoint_url": filesystem.endpoint_url,
        "use_ssl": filesystem.use_ssl,
    }
    options = {name: value for name, value in options.items() if value is not None}
    options.update(filesystem.client_kwargs)
    if filesystem.anon:
        config["signature_version"] = botocore.UNSIGNED
        for name in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token"):
            options.pop(name, None)
    return session.create_client("s3", config=Config(**config), **options)
