"""``rename``: how the names of a checkpoint become those of the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from della_dist.config.patterns import MAX_NAME, compiled
from della_dist.config.problem import Problem, check_keys, gathering, shown
from della_dist.locations import place

_KEYS = ("from", "to")
#: Names of experts have two numbers in them.
_MOST_REPETITIONS = 2


@dataclass(frozen=True, slots=True)
class Rename:
    """What matches a pattern, and what takes its place, wherever it stands in a name."""

    pattern: str
    to: str
    """With ``\\1`` for what the first group of the pattern matched."""

    def __call__(self, name: str) -> str:
        """Return a name as it is called from now on."""
        if len(name) > MAX_NAME:
            return name
        return compiled(self.pattern, _MOST_REPETITIONS).sub(self.to, name)


#: Location of a checkpoint -> what becomes of its names, one after another.
Renames: TypeAlias = Mapping[str, tuple[Rename, ...]]


def parse_renames(raw: object) -> tuple[Rename, ...]:
    """Return what a list of rules means.

    Raises
    ------
    Problem
        If one is none.
    """
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise Problem("", f"must be a list of rules {{from: REGEX, to: TEXT}}, not {shown(raw)}")
    rules = []
    with gathering() as problems:
        for i, one in enumerate(raw):
            with problems.at(f"[{i}]"):
                rules.append(_rule(one))
    return tuple(rules)


def _rule(raw: object) -> Rename:
    if not isinstance(raw, Mapping):
        raise Problem("", f"must be a rule {{from: REGEX, to: TEXT}}, not {shown(raw)}")
    with gathering() as problems:
        with problems.at():
            check_keys(raw, _KEYS)
        for key in _KEYS:
            if not isinstance(raw.get(key), str) or not raw[key].isprintable():
                problems.add(f".{key}", f"must be text, not {shown(raw.get(key))}")
    rule = Rename(str(raw["from"]), str(raw["to"]))
    if not rule.pattern:
        raise Problem(".from", "is empty, and would match everywhere; write ^ for the front")
    try:
        rule("")
    except (ValueError, IndexError, re.error) as error:
        what = str(error) if str(error).startswith("the pattern") else f"{error}: {shown(rule.to)}"
        raise Problem("", f"is wrong: {what}") from None
    return rule


def together(given: Iterable[tuple[str, str, tuple[Rename, ...]]], names: Iterable[str]) -> Renames:
    """Return the rules of each checkpoint, which may be named in several places.

    Parameters
    ----------
    given
        Place in the configuration, location, rules.
    names
        The locations as the configuration has them from now on.

    Raises
    ------
    Problem
        If two places say other rules for one checkpoint.
    """
    found: dict[object, tuple[str, tuple[Rename, ...]]] = {}
    with gathering() as problems:
        for where, location, rules in given:
            if rules and found.setdefault(place(location), (where, rules))[1] != rules:
                problems.add(
                    where,
                    f"says other rules for {shown(location)} than `{found[place(location)][0]}`; "
                    "say them once, or the same everywhere",
                )
    return {name: found[place(name)][1] for name in names if place(name) in found}


def spelled(renames: Renames, location: str) -> dict[str, Any]:
    """Return what an entry of a configuration says of the names of a checkpoint."""
    rules = renames.get(location, ())
    return {"rename": [{"from": one.pattern, "to": one.to} for one in rules]} if rules else {}
