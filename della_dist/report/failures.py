"""What an exception means to a person: one paragraph, and the exit status of the command line."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from della_dist.errors import DellaDistError, FaultError
from della_dist.locations import masked
from della_dist.report.text import printable
from della_dist.version import __version__

_PACKAGE = Path(__file__).parents[1]


def failure_of(error: BaseException) -> tuple[int, str]:
    """Return the exit status that belongs to `error`, and the paragraph."""
    if isinstance(error, DellaDistError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 1, "interrupted; the same command continues."
    if isinstance(error, (OSError, MemoryError)):
        what = str(error) or type(error).__name__
        return 1, f"{what}. The same command continues the run once this is mended."
    return FaultError.exit_code, fault_message(error, "which --debug shows")


def fault_message(error: BaseException, where_shown: str) -> str:
    """Return the paragraph for a fault of the program, with where its traceback is shown."""
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return (
        f"this is a fault of della-dist {__version__}, and running it again will not help: {what} "
        f"({_where(error)}). Please report it with the traceback, {where_shown}."
    )


def paragraph(message: str) -> str:
    """Return `message` on one line, without credentials and without endless words."""
    return printable(re.sub(r"\S{500,}", lambda word: word[0][:200] + "...", masked(message)))


def _where(error: BaseException) -> str:
    """Return the innermost line of this package that `error` came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(_PACKAGE)]
    if not ours:
        return "outside of its own code"
    return f"{Path(ours[-1].filename).relative_to(_PACKAGE.parent)}, line {ours[-1].lineno}"
