"""Examples of what each expert has learnt: prompts and the responses that should follow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from della_dist.errors import ConfigError

#: Items of a skill that trials are scored on, and that the winner is, at most.
MOST_SEARCHED = 100
MOST_HELD_OUT = 200
#: A skill needs so many: half of them are held out.
LEAST = 4


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation whose last message is to be predicted, or a prompt and its response."""

    messages: tuple[dict[str, Any], ...] | None
    prompt: str = ""
    response: str = ""


@dataclass(frozen=True, slots=True)
class Skill:
    """The examples of one expert."""

    name: str
    """The expert's short name."""
    searched: tuple[Example, ...]
    held_out: tuple[Example, ...]
    digest: str
    """Of the file."""


def load_skill(name: str, path: Path) -> Skill:
    """Return the examples of a file, a JSON object a line.

    Each has ``prompt`` and ``response``, or ``messages`` with ``role`` and ``content``, the last
    of which is the response. Which are held out follows from the content of each alone.

    Raises
    ------
    ConfigError
        If the file cannot be read, a line is something else, or there are too few.
    """
    try:
        data = path.read_bytes()
        lines = [line for line in data.decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--data {name}={path}: cannot be read: {error}.") from None
    # Equal lines are one item: half of a pair would be held out, and known all the same.
    items = list(dict.fromkeys(lines))
    found = [
        _example(line, f"--data {name}={path}, line {lines.index(line) + 1}") for line in items
    ]
    if len(found) < LEAST:
        raise ConfigError(
            f"--data {name}={path}: has {len(found)} different examples; a skill needs at least "
            f"{LEAST}, half of which are held out."
        )
    order = sorted(range(len(items)), key=lambda i: hashlib.sha256(items[i].encode()).digest())
    half = len(order) // 2
    return Skill(
        name,
        _chosen(found, order[:half], MOST_SEARCHED),
        _chosen(found, order[half:], MOST_HELD_OUT),
        hashlib.sha256(data).hexdigest(),
    )


def _chosen(found: Sequence[Example], order: Sequence[int], most: int) -> tuple[Example, ...]:
    return tuple(found[i] for i in order[:most])


def _example(line: str, where: str) -> Example:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is no JSON: {error}.") from None
    if isinstance(item, dict) and _is_conversation(item.get("messages")):
        return Example(tuple(item["messages"]))
    if (
        isinstance(item, dict)
        and all(isinstance(item.get(key), str) for key in ("prompt", "response"))
        and item["response"]
    ):
        return Example(None, item["prompt"], item["response"])
    raise ConfigError(
        f"{where}: has neither texts `prompt` and `response`, nor `messages` with `role` and "
        "`content`, the last of which is the response."
    )


def _is_conversation(messages: Any) -> bool:  # noqa: ANN401
    return (
        isinstance(messages, list)
        and len(messages) >= 2
        and all(
            isinstance(one, dict) and isinstance(one.get(key), str)
            for one in messages
            for key in ("role", "content")
        )
    )
