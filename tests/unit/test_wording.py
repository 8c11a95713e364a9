"""Turns of phrase that messages share."""

from __future__ import annotations

import pytest

from della_dist.wording import few, listed_tensors, numbered, plural


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "0"), (2, "0, 1"), (3, "0, 1 and 1 more"), (1002, "0, 1 and 1000 more")],
)
def test_few(count: int, text: str) -> None:
    assert few([str(i) for i in range(count)], 2) == text


def test_long_items_are_cut() -> None:
    assert few(["x" * 300, "y"], separator="; ") == "x" * 200 + "; y"
    assert few(["x" * 300], longest=250) == "x" * 250


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (2000, "2,000 shards")]
)
def test_plural(count: int, text: str) -> None:
    assert plural(count, "shard") == text


def test_tensors() -> None:
    assert listed_tensors({"b", "a"}) == "2 tensors (a, b)"


def test_problems_are_numbered_and_common_advice_is_said_once() -> None:
    assert numbered(["a is 1. Do it."]) == "a is 1. Do it."
    assert numbered(["a is 1.", "b is 2?"]) == "2 problems. (1) a is 1. (2) b is 2?"
    advised = [f"{name} is 1. Do it. Or not." for name in "ab"]
    assert numbered(advised) == "2 problems. (1) a is 1. (2) b is 1. Do it. Or not."
    many = [f"{name} is 1. Do it." for name in "abcdefghijklm"]
    said = numbered(many)
    assert said.startswith("13 problems. (1) a is 1. (2) b is 1. (3) c")
    assert said.endswith("(10) j is 1. And 3 more. Do it.")
    said = numbered([*many, "n is 1. Do not."][-11:])
    assert said.startswith("11 problems. (1) d is 1. (2) e")
    assert said.endswith("(10) m is 1. And 1 more. Do it.")
    assert numbered(["a is 1. Do.", "b is 1. Do not."]) == (
        "2 problems. (1) a is 1. Do. (2) b is 1. Do not."
    )
    assert numbered(["the same.", "the same."]) == "2 problems. (1) the same. (2) the same."
