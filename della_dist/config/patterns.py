"""Regular expressions of other people, which must come to an end."""

from __future__ import annotations

import re
from functools import lru_cache

#: Names that are longer are matched by no pattern: they would take a pattern's time to a power.
MAX_NAME = 500
#: Each may double what is tried.
_MOST_OPTIONAL = 8


@lru_cache(maxsize=256)  # of a hundred thousand names, each asks again
def compiled(pattern: str, most: int = 3) -> re.Pattern[str]:
    """Return a pattern that takes no time on a name of at most `MAX_NAME` characters.

    Parameters
    ----------
    pattern
        A regular expression.
    most
        Repetitions (``*``, ``+``, ``{``) that it may have.

    Raises
    ------
    ValueError
        If it is none, or may take for ever: repetitions of groups, or too many.
    """
    is_nested = re.search(r"\)[*+{]", pattern) is not None
    is_long = len(re.findall(r"[*+{]", pattern)) > most or pattern.count("?") > _MOST_OPTIONAL
    if is_nested or is_long:
        raise ValueError(
            f"the pattern {pattern!r} is too involved: at most {most} repetitions are allowed, and "
            "none of a group"
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None
