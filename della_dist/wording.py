"""Turns of phrase that messages share."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice


def few(items: Collection[str], most: int = 5, *, separator: str = ", ", longest: int = 200) -> str:
    """Return the first `most` items, cut to `longest` characters each, and count the rest."""
    shown = separator.join(item[:longest] for item in islice(items, most))
    rest = len(items) - most
    return f"{shown} and {rest} more" if rest > 0 else shown


def plural(count: int, noun: str) -> str:
    """Return the count and the noun: ``1 shard``, ``2 shards``."""
    return f"{count:,} {noun}{'s'[: count != 1]}"


def listed_tensors(names: Collection[str]) -> str:
    """Return the number of tensors, and the names of the first few."""
    return f"{plural(len(names), 'tensor')} ({few(sorted(names))})"
