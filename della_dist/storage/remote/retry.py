"""Which failures of a remote store pass by themselves, and how long to wait for that."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from della_dist.errors import (
    DellaDistError,
    MissingObjectError,
    StorageError,
    UnreachableError,
    UnsupportedError,
)

T = TypeVar("T")

#: How long an operation is tried again. S3's client waits 15 s for an answer: a store that never
#: answers is given up on after four requests, one that answers with errors after 15 or more.
PATIENCE_S = 60.0
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
#: Of a server that says how long it is to be left alone.
MAX_WANTED_DELAY_S = 30.0

#: Answers of class 4xx that another attempt may not get: time-outs, conflicts, throttling.
_PASSING_STATUS = frozenset({408, 409, 425, 429})
#: A request whose bytes were damaged on the way.
_PASSING_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InvalidDigest",
        "RequestTimeout",
        "RequestTimeTooSkewed",
        "SlowDown",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
#: What a store answers to an operation or a header that it does not know.
_LACKING_STATUS = frozenset({405, 501})
_LACKING_CODES = frozenset({"MethodNotAllowed", "NotImplemented"})
#: What it says of them under status 400, where the rest of the request is known to be right.
_UNKNOWN_CODES = frozenset({"", "400", "BadRequest", "InvalidArgument", "InvalidRequest"})
_FINAL = (
    DellaDistError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
)


def retry(
    call: Callable[[], T],
    doing: str,
    *,
    on_failure: Callable[[Exception], T | None] | None = None,
    patience_s: float | None = None,
) -> T:
    """Return what `call` returns, calling it again where a failure may pass.

    Parameters
    ----------
    call
        Performs one request.
    doing
        What it does, with the URL, for the error: ``"reading s3://bucket/key"``.
    on_failure
        Asked about every failure: the request, or one before it (the client may repeat some by
        itself), may have been performed although its answer was lost. What it returns, unless
        None, is the result.
    patience_s
        Begin no further call when so much time has passed; `PATIENCE_S` if None.

    Raises
    ------
    UnreachableError
        If it went on failing for so long.
    UnsupportedError
        If the store does not do such a thing.
    StorageError
        If another attempt would fail in the same way.
    """
    end_s = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    delay_s = FIRST_DELAY_S
    while True:
        try:
            return call()
        except DellaDistError:
            raise
        except Exception as error:
            if on_failure is not None and (done := on_failure(error)) is not None:
                return done
            if is_final(error) or time.monotonic() + delay_s > end_s:
                raise remote_error(error, doing) from error
            wanted_s = _wanted_delay_s(error)
        # No two clients in step.
        time.sleep(max(delay_s * random.uniform(0.5, 1.0), wanted_s))
        delay_s = min(MAX_DELAY_S, 2 * delay_s)


@contextlib.contextmanager
def failing(doing: str) -> Iterator[None]:
    """Turn every failure into the `StorageError` that says what was being done."""
    try:
        yield
    except DellaDistError:
        raise
    except Exception as error:
        raise remote_error(error, doing) from error


def is_final(error: BaseException) -> bool:
    """Tell whether another attempt would fail in the same way."""
    answer = _answer(error)
    if answer is not None:
        status, code = answer
        passing = status in _PASSING_STATUS or code in _PASSING_CODES
        return (400 <= status < 500 and not passing) or is_lacking(error)
    if isinstance(error, PermissionError):
        return True
    return isinstance(error, _FINAL) or type(error).__name__ in (
        "NoCredentialsError",
        "ParamValidationError",
        "PartialCredentialsError",
        "ProfileNotFound",
    )


def is_lacking(error: BaseException) -> bool:
    """Tell whether the store says that it does not do what it was asked for."""
    return (
        isinstance(error, NotImplementedError)
        or error_status(error) in _LACKING_STATUS
        or error_code(error) in _LACKING_CODES
    )


def is_unknown_to_store(error: BaseException) -> bool:
    """Tell the same of a request of which nothing else can be wrong."""
    refused = error_status(error) == 400 and error_code(error) in _UNKNOWN_CODES
    return refused or is_lacking(error)


def error_code(error: BaseException) -> str:
    """Return the code that the server gave for a failure, such as ``NoSuchUpload``, or ''."""
    answer = _answer(error)
    return "" if answer is None else answer[1]


def error_status(error: BaseException) -> int:
    """Return the HTTP status of a failure, or 0."""
    answer = _answer(error)
    return 0 if answer is None else answer[0]


def remote_error(error: Exception, doing: str) -> StorageError:
    """Return the `StorageError` for a request that failed for good."""
    if error_code(error) == "NoSuchUpload":
        reason = "its upload was aborted, by a run that took the output over or by hand"
        advice = "Let a run that is working on it finish, or if there is none"
        return StorageError(f"{doing} failed: {reason}. {advice} run the same command again.")
    if is_lacking(error):
        return UnsupportedError(
            f"{doing} failed: the store does not do this ({_text(error)}). Use another store, or "
            "another gateway to this one."
        )
    if isinstance(error, FileNotFoundError):
        return MissingObjectError(
            f"{doing} failed: there is no such object (or bucket). Check the URL, then run the "
            "same command again."
        )
    if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        reason = f"access denied ({_text(error)})"
        advice = "Check the credentials (environment, profile, role) and what they may do"
    else:
        reason, advice = _text(error), "Check the store and the network"
    kind = StorageError if is_final(error) else UnreachableError
    return kind(f"{doing} failed: {reason}. {advice}, then run the same command again.")


def _answer(error: BaseException) -> tuple[int, str] | None:
    """Return HTTP status and error code, where an answer of a server is at the bottom of this."""
    cause: BaseException | None = error
    while cause is not None:
        response: Any = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status or 0), str(response["Error"].get("Code", ""))
        if hasattr(response, "status_code"):  # requests, and what huggingface_hub uses
            return int(response.status_code), str(response.headers.get("X-Error-Code", ""))
        cause = cause.__cause__
    return None


def _wanted_delay_s(error: BaseException) -> float:
    """Return how long the server wants to be left alone, within bounds; 0 if it does not say."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None)
    wanted = str(headers.get("Retry-After", "")) if hasattr(headers, "get") else ""
    return min(float(wanted), MAX_WANTED_DELAY_S) if wanted.isdecimal() else 0.0


def _text(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text[:500] or type(error).__name__
