"""Which failures are tried again, for how long, and what is said in the end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from della_dist.errors import InputError, StorageError, UnreachableError, UnsupportedError
from della_dist.storage.remote import retry as module
from della_dist.storage.remote.retry import error_code, error_status, failing, is_final, retry


class Clock:
    """Time that passes only by sleeping, and by what calls take."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def answer(status: int, code: str, text: str = "") -> OSError:
    """Return what s3fs makes of an answer of the server."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    error = ClientError(
        {"Error": {"Code": code, "Message": text}, "ResponseMetadata": {"HTTPStatusCode": status}},
        "GetObject",
    )
    translated = translate_boto_error(error)
    assert isinstance(translated, OSError)
    translated.__cause__ = error
    return translated


def failing_times(number: int | None, error: Exception) -> tuple[Callable[[], str], list[int]]:
    """Return a call that fails so often (None: always), and its calls."""
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if number is None or len(calls) <= number:
            raise error
        return "done"

    return call, calls


def test_passes_by_itself(clock: Clock) -> None:
    call, calls = failing_times(9, answer(503, "SlowDown"))
    assert retry(call, "reading x") == "done"
    assert len(calls) == 10
    # Twice as long each time, up to a bound, and never in step with other clients.
    for slept_s, most_s in zip(clock.slept_s, (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5), strict=True):
        assert most_s / 2 <= slept_s <= most_s
    assert len({slept_s / 5 for slept_s in clock.slept_s[-3:]}) == 3


def test_failures_have_an_end(clock: Clock) -> None:
    call, calls = failing_times(None, answer(500, "InternalError", "We are sorry."))
    with pytest.raises(
        UnreachableError, match=r"^reading x failed: .*We are sorry\. Check the store"
    ):
        retry(call, "reading x")
    assert module.PATIENCE_S - module.MAX_DELAY_S <= clock.now_s <= module.PATIENCE_S
    assert len(calls) >= 15  # at a fifth of all requests failing: never in practice


def test_a_store_that_never_answers_is_not_asked_often(clock: Clock) -> None:
    calls = []

    def call() -> None:
        calls.append(clock.now_s)
        clock.now_s += 15
        raise TimeoutError("no answer")

    with pytest.raises(StorageError, match="no answer"):
        retry(call, "reading x")
    assert len(calls) == 4
    assert clock.now_s < module.PATIENCE_S + 15


def test_patience(clock: Clock) -> None:
    call, _ = failing_times(None, ConnectionResetError("reset"))
    with pytest.raises(StorageError, match="reset"):
        retry(call, "reading x", patience_s=3)
    assert clock.now_s <= 3


@pytest.mark.parametrize(
    "error",
    [
        answer(500, "InternalError"),
        answer(503, "SlowDown"),
        answer(503, "ServiceUnavailable"),
        answer(429, "TooManyRequests"),
        answer(408, "RequestTimeout"),
        answer(409, "OperationAborted"),
        answer(400, "RequestTimeout"),
        answer(400, "BadDigest"),
        answer(400, "XAmzContentSHA256Mismatch"),
        answer(403, "RequestTimeTooSkewed"),
        ConnectionResetError(),
        TimeoutError(),
        EOFError("cut"),
        OSError("short"),
    ],
    ids=str,
)
def test_what_may_pass(error: Exception) -> None:
    assert not is_final(error)


@pytest.mark.parametrize(
    "error",
    [
        answer(403, "AccessDenied"),
        answer(403, "InvalidAccessKeyId"),
        answer(403, "SignatureDoesNotMatch"),
        answer(400, "ExpiredToken"),
        answer(400, "InvalidBucketName"),
        answer(404, "NoSuchKey"),
        answer(404, "NoSuchBucket"),
        answer(404, "NoSuchUpload"),
        answer(412, "PreconditionFailed"),
        answer(501, "NotImplemented"),
        answer(405, "MethodNotAllowed"),
        FileNotFoundError(),
        FileExistsError(),
        PermissionError(),
        NotImplementedError(),
        TypeError(),
        StorageError("said already"),
    ],
    ids=str,
)
def test_what_does_not_pass(error: Exception, clock: Clock) -> None:
    assert is_final(error)
    call, calls = failing_times(None, error)
    with pytest.raises(StorageError) as caught:
        retry(call, "reading x")
    assert not isinstance(caught.value, UnreachableError)
    assert len(calls) == 1
    assert clock.now_s == 0


@pytest.mark.parametrize(
    "error",
    [answer(501, "NotImplemented", "No."), answer(405, "405", "No."), NotImplementedError("No.")],
    ids=str,
)
def test_what_a_store_does_not_do(error: Exception, clock: Clock) -> None:
    call, calls = failing_times(None, error)
    with pytest.raises(UnsupportedError, match=r"reading x failed: the store does not do this \("):
        retry(call, "reading x")
    assert len(calls) == 1
    assert clock.now_s == 0


def test_no_credentials() -> None:
    from botocore.exceptions import NoCredentialsError

    call, calls = failing_times(None, NoCredentialsError())
    with pytest.raises(StorageError, match=r"access denied \(Unable to locate credentials\)"):
        retry(call, "reading x")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (answer(404, "NoSuchBucket", "None."), "there is no such object (or bucket). Check the"),
        (answer(403, "AccessDenied", "No."), "access denied (No). Check the credentials"),
        (answer(404, "NoSuchUpload", "None."), "its upload was aborted, by a run that took the"),
        (OSError("two\nlines  here." + "x" * 1000), "two lines here.xxx"),
        (ConnectionResetError(), "ConnectionResetError. Check the store and the network"),
    ],
)
def test_what_is_said(error: Exception, text: str) -> None:
    with pytest.raises(StorageError) as caught, failing("reading x"):
        raise error
    said = str(caught.value)
    assert said.startswith(f"reading x failed: {text}")
    assert said.endswith("run the same command again.")
    assert len(said) < 700


def test_own_errors_are_not_reworded() -> None:
    own = InputError("the input was changed")

    def call() -> None:
        raise own

    with pytest.raises(InputError) as caught:
        retry(call, "reading x")
    assert caught.value is own
    with pytest.raises(InputError) as caught, failing("reading x"):
        call()
    assert caught.value is own


def test_what_was_performed_although_its_answer_was_lost() -> None:
    lost = iter([ConnectionResetError(), answer(404, "NoSuchUpload")])

    def call() -> str:
        raise next(lost)

    def was_done(error: Exception) -> str | None:
        return "was done" if error_code(error) == "NoSuchUpload" else None

    assert retry(call, "writing x", on_failure=was_done) == "was done"
    # The client may have repeated it by itself: then the first failure is the telling one.
    lost = itertools.repeat(answer(404, "NoSuchUpload"))
    assert retry(call, "writing x", on_failure=was_done) == "was done"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answer(404, "NoSuchUpload"), (404, "NoSuchUpload")),
        (answer(503, "SlowDown"), (503, "SlowDown")),
        (OSError(), (0, "")),
    ],
)
def test_code_and_status(error: Exception, expected: Any) -> None:
    assert (error_status(error), error_code(error)) == expected
