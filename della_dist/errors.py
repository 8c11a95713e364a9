"""Exceptions of della_dist.

Every error a user can meet is a `DellaDistError` whose message is one paragraph: what is wrong,
where, and what to do. `exit_code` is the exit status of the command line:

====  ==========================================================
1     failed while running, or a store is out of reach; the same
      command continues the run
2     refused: wrong configuration, wrong input, unusable output
3     verification found a difference
4     a fault of the program: any exception that is not declared
      here, nor one of the machine (`OSError`, `MemoryError`)
====  ==========================================================

Each class also inherits a builtin, so that callers may catch `ValueError` or `OSError`. All take
exactly one positional argument, the message, and so survive pickling between processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, TypeVar

from della_dist.wording import numbered

T = TypeVar("T")
R = TypeVar("R")


class DellaDistError(Exception):
    """Base class of every error that della_dist raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(DellaDistError, ValueError):
    """The merge configuration, or an option of the command line, is wrong."""

    exit_code = 2


class InputError(DellaDistError, ValueError):
    """An input checkpoint is malformed, incomplete, or does not match the others."""

    exit_code = 2


class InputChangedError(InputError):
    """An input was changed while it was read: what is committed is kept, and a rerun decides.

    The same command continues where the content is the same after all, and refuses otherwise.
    """

    exit_code = 1


class TensorDataError(InputError):
    """The values of a tensor cannot be merged (non-finite deltas, differing integers, overflow)."""


class OutputError(DellaDistError, ValueError):
    """The output location cannot be used: other content, another run, another plan, no space."""

    exit_code = 2


class RunError(DellaDistError, RuntimeError):
    """The run failed while it was working; what is committed is kept and a rerun continues."""


class FaultError(DellaDistError, RuntimeError):
    """A worker met a fault of the program: no second run mends it."""

    exit_code = 4


class StorageError(DellaDistError, OSError):
    """Reading or writing failed while the run was working (disk full, I/O error)."""


class MissingObjectError(StorageError):
    """There is no such object in a remote store."""


class UnreachableError(StorageError):
    """A remote store did not answer in time, or only by errors that pass: nothing is wrong here."""


class UnsupportedError(StorageError):
    """A remote store does not do what it was asked for, and will not another time."""


class VerificationError(DellaDistError, ValueError):
    """The output differs from what its manifest, or a recomputation, says."""

    exit_code = 3


@contextlib.contextmanager
def refused_as(kind: type[DellaDistError], what: str) -> Iterator[None]:
    """Before anything runs: turn a `StorageError` into `kind`, since `what` is what is wrong.

    But for `UnreachableError`, which passes by itself.
    """
    try:
        yield
    except UnreachableError:
        raise
    except StorageError as error:
        raise kind(f"{what}: {error}") from error


def each(
    function: Callable[[T], R],
    items: Iterable[T],
    over: Callable[[Callable[[T], R | Exception], Iterable[T]], Iterable[R | Exception]] = map,
) -> list[R]:
    """Return what `function` makes of each item; what is wrong with any of them is said at once.

    Parameters
    ----------
    function
        Looks at one input.
    items
        The inputs.
    over
        ``map``, or that of a pool.

    Raises
    ------
    InputError
        That of the only item that has one, or one that says those of all, up to ten.
    UnreachableError
        If nothing else is wrong.
    """

    def outcome(item: T) -> R | Exception:
        try:
            return function(item)
        except (InputError, UnreachableError) as error:
            return error

    made: list[R] = []
    errors: dict[str, Exception] = {}
    for one in over(outcome, items):
        if isinstance(one, Exception):
            errors.setdefault(str(one), one)
        else:
            made.append(one)
    if len(errors) > 1 and any(isinstance(error, InputError) for error in errors.values()):
        raise InputError(numbered(list(errors)))
    for error in errors.values():
        raise error
    return made
