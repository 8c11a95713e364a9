"""A configuration some of whose numbers and words are to be found: what a search goes through.

In the place of a value stands ``{search: [low, high]}``, with ``log: true`` or ``step: x`` as well,
or ``{choices: [a, b, ...]}``. One that is an alias of another (``*name``) always has its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from della_dist.config.load import config_from_mapping
from della_dist.config.model import MergeConfig
from della_dist.config.problem import Problem, shown
from della_dist.config.reading import read_text, read_yaml
from della_dist.config.schema import TOP_KEYS
from della_dist.errors import ConfigError

Value: TypeAlias = float | str | bool | None

_KEYS = {"search", "choices", "log", "step"}


@dataclass(frozen=True, slots=True)
class Dimension:
    """One value that is to be found."""

    name: str
    """Where it stands: ``models[0].parameters.weight``."""
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()
    """If any, it is one of them."""

    @property
    def middle(self) -> Value:
        """The value that is tried first."""
        if self.choices:
            return self.choices[0]
        if self.is_log:
            return math.sqrt(self.low * self.high)
        if self.step is not None:
            return self.low + self.step * ((self.high - self.low) / self.step // 2)
        return (self.low + self.high) / 2

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values between which all others lie."""
        return self.choices or (self.low, self.high)


class Space:
    """A configuration with values left open.

    Parameters
    ----------
    document
        As it was read.
    source
        What messages call it.

    Raises
    ------
    ConfigError
        If nothing is to be found, a range is none, or a configuration at the middle of all ranges,
        or at an end of one, is wrong.
    """

    def __init__(self, document: Mapping[str, Any], source: str) -> None:
        self.document = document
        self._source = source
        try:
            # What is an alias is met again, elsewhere.
            found = dict(reversed(list(_dimensions(document, ""))))
        except Problem as problem:
            raise ConfigError(f"{source}: {problem}") from None
        self._names = {key: one.name for key, one in found.items()}
        self.dimensions = tuple(reversed(found.values()))
        if not self.dimensions:
            raise ConfigError(
                f"{source}: nothing is to be searched. Write `{{search: [low, high]}}` or "
                "`{choices: [a, b]}` in the place of a number or word, or merge it as it is."
            )
        self.middle = {one.name: one.middle for one in self.dimensions}
        self.config(self.middle)
        for one in self.dimensions:
            for end in one.ends:
                self.config({**self.middle, one.name: end})

    def mapping(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """Return the configuration at some values, by the names of the dimensions."""
        filled = self._filled(self.document, values)
        assert isinstance(filled, dict)
        return filled

    def config(self, values: Mapping[str, Value]) -> MergeConfig:
        """Return the validated configuration at some values.

        Raises
        ------
        ConfigError
            If values do not go together.
        """
        at = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if _is_number(value))
        where = f"{self._source}, at {at}" if at else self._source
        return config_from_mapping(self.mapping(values), where)

    def largest(self) -> MergeConfig:
        """Return the configuration at the upper ends, at which no weight is likely to be 0.

        At the middle where these do not go together.
        """
        try:
            return self.config({one.name: one.ends[-1] for one in self.dimensions})
        except ConfigError:
            return self.config(self.middle)

    def _filled(self, node: Any, values: Mapping[str, Value]) -> Any:  # noqa: ANN401
        if id(node) in self._names:
            return values[self._names[id(node)]]
        if isinstance(node, Mapping):
            return {key: self._filled(value, values) for key, value in node.items()}
        if isinstance(node, list):
            return [self._filled(value, values) for value in node]
        return node


def load_space(path: Path) -> Space:
    """Return the space of a YAML file.

    Raises
    ------
    ConfigError
        If the file cannot be read or anything in it is wrong.
    """
    documents, _ = read_yaml(read_text(path), str(path), TOP_KEYS)
    if len(documents) > 1:
        raise ConfigError(
            f"{path}: has {len(documents)} documents; a search is of one. Merge the others first, "
            "and name what they wrote."
        )
    return Space(documents[0], str(path))


def _dimensions(node: Any, where: str) -> Iterator[tuple[int, Dimension]]:  # noqa: ANN401
    """Yield what is to be found, with the identity of its node."""
    if isinstance(node, Mapping):
        if node.keys() & {"search", "choices"}:
            yield id(node), _dimension(node, where)
            return
        for key, value in node.items():
            yield from _dimensions(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _dimensions(value, f"{where}[{i}]")


def _dimension(node: Mapping[str, Any], where: str) -> Dimension:
    if unknown := node.keys() - _KEYS:
        raise Problem(where, f"has {', '.join(sorted(map(str, unknown)))}, unknown in a search")
    if "choices" in node:
        choices = node["choices"]
        if not isinstance(choices, list) or len(choices) < 2 or node.keys() != {"choices"}:
            raise Problem(
                where, f"has choices {shown(choices)}; write two or more, and no other key"
            )
        if not all(one is None or isinstance(one, (bool, int, float, str)) for one in choices):
            raise Problem(where, "has choices that are neither numbers nor words")
        return Dimension(where, choices=tuple(choices))
    ends = node["search"]
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_number, ends)):
        raise Problem(where, f"is searched in {shown(ends)}; write two numbers: [low, high]")
    low, high = map(float, ends)
    is_log, step = node.get("log", False), node.get("step")
    if not isinstance(is_log, bool):
        raise Problem(where, f"has log {shown(is_log)}; write true or false")
    if not low < high:
        raise Problem(where, f"is searched from {low:g} to {high:g}; the first must be smaller")
    if is_log and (low <= 0 or step is not None):
        raise Problem(where, "is searched by its logarithm: from above 0, without a step")
    if step is not None and not (_is_number(step) and 0 < step <= high - low):
        raise Problem(where, f"has step {shown(step)}; write a number up to {high - low:g}")
    return Dimension(where, low, high, is_log, None if step is None else float(step))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
