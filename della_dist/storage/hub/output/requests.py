"""How requests to the Hub are made that `huggingface_hub` makes: repeated, and refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from della_dist.errors import DellaDistError, OutputError, StorageError, UnreachableError
from della_dist.storage.hub.files import EXPIRED_STATUS, HubAnswerError, origin
from della_dist.storage.hub.snapshot import constants_of, reason_of
from della_dist.storage.remote.retry import error_status, retry

T = TypeVar("T")

#: Of who may not write.
_REFUSED_STATUS = frozenset({401, 402, 403, 404})
LOG_IN = "Log in with a token that may write ('hf auth login'), or set HF_TOKEN to one."


def ask(
    doing: str,
    call: Callable[[], T],
    *,
    on_failure: Callable[[Exception], T | None] | None = None,
    passing: Collection[int] = (),
    patience_s: float | None = None,
) -> T:
    """Return what `call` returns, calling it again where a failure may pass.

    Parameters
    ----------
    doing, call, on_failure, patience_s
        As `della_dist.storage.remote.retry.retry` has them.
    passing
        Answers that another attempt may not get, beside those that it knows.
    """

    def attempt() -> T:
        try:
            return call()
        except DellaDistError:
            raise
        except Exception as error:
            plain = _plain(error)
        # Not from the error: its text may have a signed address.
        raise OSError(str(plain)) if error_status(plain) in passing else plain

    return retry(attempt, doing, on_failure=on_failure, patience_s=patience_s)


@contextmanager
def refusing(location: str) -> Iterator[None]:
    """Turn an answer that says no into an `OutputError`: before anything is written."""
    try:
        yield
    except UnreachableError:
        raise
    except StorageError as error:
        if error_status(error) not in _REFUSED_STATUS:
            raise
        raise OutputError(
            f"{location} cannot be written by this user ({error.__cause__}). {LOG_IN}"
        ) from error


def _plain(error: Exception) -> Exception:
    """Return the failure of a request without the address, which may be signed, and the library."""
    cause: BaseException | None = error
    while cause is not None:
        response: Any = getattr(cause, "response", None)
        if hasattr(response, "status_code"):
            where = origin(str(response.url))
            if where == origin(str(constants_of().ENDPOINT)):
                return HubAnswerError(response, reason_of(cause))
            if response.status_code in EXPIRED_STATUS:  # asked again, the Hub gives another one
                return OSError(f"{response.status_code}: an address of {where} was not valid")
            return HubAnswerError(response)
        last, cause = cause, cause.__cause__
    if isinstance(last, ValueError | TypeError | OSError):
        return last
    return OSError(f"{type(last).__name__}: {last}")
