"""Turns of phrase that messages share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

#: Problems that are said at once.
_MAX_PROBLEMS = 10


def few(items: Collection[str], most: int = 5, *, separator: str = ", ", longest: int = 200) -> str:
    """Return the first `most` items, cut to `longest` characters each, and count the rest."""
    shown = separator.join(item[:longest] for item in islice(items, most))
    rest = len(items) - most
    return f"{shown} and {rest} more" if rest > 0 else shown


def plural(count: int, noun: str) -> str:
    """Return the count and the noun: ``1 shard``, ``2 shards``."""
    return f"{count:,} {noun}{'s'[: count != 1]}"


def numbered(problems: Sequence[str]) -> str:
    """Return the first few problems as one paragraph, and how many there are; one alone.

    What all of them end with, as they do with advice, is said once, at the end.
    """
    if len(problems) == 1:
        return problems[0]
    said = [problem.split(". ") for problem in problems[:_MAX_PROBLEMS]]
    advice: list[str] = []
    while len(said) > 1 and all(len(one) > 1 and one[-1] == said[0][-1] for one in said):
        advice.insert(0, said[0][-1])
        said = [one[:-1] for one in said]
    stop = "." if advice else ""  # theirs went with the advice
    parts = [f"({i}) {'. '.join(one)}{stop}" for i, one in enumerate(said, 1)]
    if len(problems) > len(said):
        parts.append(f"And {len(problems) - len(said)} more.")
    return " ".join([f"{len(problems)} problems.", *parts, ". ".join(advice)]).rstrip()


def listed_tensors(names: Collection[str]) -> str:
    """Return the number of tensors, and the names of the first few."""
    return f"{plural(len(names), 'tensor')} ({few(sorted(names))})"
