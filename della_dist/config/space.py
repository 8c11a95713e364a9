"""A configuration some of whose numbers and words are to be found: what a search goes through.

In the place of a value stands ``{search: [low, high]}``, with ``log: true`` or ``step: x`` as well
and ``first: x``, which is tried first, or ``{choices: [a, b, ...]}``. One that is an alias of
another (``*name``) always has its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from della_dist.config import scalars
from della_dist.config.load import config_from_mapping
from della_dist.config.model import MergeConfig
from della_dist.config.problem import Problem, shown
from della_dist.config.reading import read_text, read_yaml
from della_dist.config.schema import TOP_KEYS
from della_dist.errors import ConfigError
from della_dist.locations import short_names

Value: TypeAlias = float | str | bool | None

#: For so many trials a value that is chosen, some are tied to others.
TIED_TRIALS = 6

_KEYS = {"search", "choices", "log", "step", "first"}


@dataclass(frozen=True, slots=True)
class Dimension:
    """One value that is to be found."""

    name: str
    """Where it stands: ``models[0].parameters.weight``."""
    label: str
    """What a person calls it: ``weight of math``."""
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()
    """If any, it is one of them."""
    start: float | None = None
    """What is tried first; None: the middle."""

    @property
    def first(self) -> Value:
        """The value that is tried first."""
        if self.choices:
            return self.choices[0]
        if self.start is not None:
            return self.start
        if self.is_log:
            return math.sqrt(self.low * self.high)
        if self.step is not None:
            return self.low + self.step * ((self.high - self.low) / self.step // 2)
        return (self.low + self.high) / 2

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values between which all others lie."""
        return self.choices or (self.low, self.high)

    def __str__(self) -> str:
        """Return what may be tried."""
        if self.choices:
            return f"{self.label}: {', '.join(map(str, self.choices))}"
        how = " by its logarithm" if self.is_log else ""
        how += "" if self.step is None else f" in steps of {self.step:g}"
        return f"{self.label}: {self.low:.4g} to {self.high:.4g}{how}, {self.first:.4g} first"


class Space:
    """A configuration with values left open.

    Parameters
    ----------
    document
        As it was read.
    source
        What messages call it.
    then
        What is tried right after the first values: those that are others, by name.
    tied
        Names of values that are the same number of times their first ones for a while: groups,
        whose first values are not 0 and whose ranges are as many times these.

    Raises
    ------
    ConfigError
        If nothing is to be found, a range is none, or a configuration at the first values of all,
        or at an end of one, is wrong.
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        source: str,
        then: Sequence[Mapping[str, Value]] = (),
        tied: Sequence[Sequence[str]] = (),
    ) -> None:
        self.document = document
        self._source = source
        try:
            # What is an alias is met again, elsewhere.
            found = dict(reversed(list(_dimensions(document, "", _Place(_short(document))))))
        except Problem as problem:
            raise ConfigError(f"{source}: {problem}") from None
        self._names = {key: one.name for key, one in found.items()}
        labels = [one.label for one in found.values()]
        self.dimensions = tuple(
            one if labels.count(one.label) == 1 else replace(one, label=f"{one.label} ({one.name})")
            for one in reversed(found.values())
        )
        if not self.dimensions:
            raise ConfigError(
                f"{source}: nothing is to be searched. Write `{{search: [low, high]}}` or "
                "`{choices: [a, b]}` in the place of a number or word, or merge it as it is."
            )
        self.first = {one.name: one.first for one in self.dimensions}
        self.config(self.first)
        for one in self.dimensions:
            for end in one.ends:
                self.config({**self.first, one.name: end})
        self.starts = (self.first, *({**self.first, **values} for values in then))
        self.tied = tuple(map(tuple, tied))
        num_free = len(self.dimensions) - sum(len(group) - 1 for group in self.tied)
        #: Trials from the first on in which they are tied.
        self.num_tied = len(self.starts) + TIED_TRIALS * num_free if tied else 0

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

        At the first values where these do not go together.
        """
        try:
            return self.config({one.name: one.ends[-1] for one in self.dimensions})
        except ConfigError:
            return self.config(self.first)

    def _filled(self, node: Any, values: Mapping[str, Value]) -> Any:  # noqa: ANN401
        if id(node) in self._names:
            return values[self._names[id(node)]]
        if isinstance(node, Mapping):
            return {key: self._filled(value, values) for key, value in node.items()}
        if isinstance(node, list):
            return [self._filled(value, values) for value in node]
        return node


def read_document(path: Path) -> Mapping[str, Any]:
    """Return what a YAML file says of one merge, as it is written.

    Raises
    ------
    ConfigError
        If the file cannot be read, is no YAML, or has several documents.
    """
    documents, _ = read_yaml(read_text(path), str(path), TOP_KEYS)
    if len(documents) > 1:
        raise ConfigError(
            f"{path}: has {len(documents)} documents; a search is of one. Merge the others first, "
            "and name what they wrote."
        )
    if not isinstance(documents[0], Mapping):
        raise ConfigError(f"{path}: is {shown(documents[0])}, and no configuration.")
    return documents[0]


def has_ranges(document: object) -> bool:
    """Tell whether a value of a document is left open.

    Raises
    ------
    Problem
        If a range is none.
    """
    return next(_dimensions(document, "", _Place({})), None) is not None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a document something stands, as a person calls it."""

    names: Mapping[str, str]
    """Of models, by location."""
    key: str = ""
    model: str = ""
    filter: str = ""

    def inside(self, node: Mapping[str, Any], key: str) -> _Place:
        """Return the place of an entry of a mapping."""
        model = str(node.get("model", ""))
        return replace(
            self,
            key=self.key if key == "value" else key,
            model=self.names.get(model, self.model),
            filter=str(node["filter"]) if node.get("filter") else self.filter,
        )

    @property
    def label(self) -> str:
        """What stands there."""
        where = {"": "", "*": " elsewhere"}.get(self.filter, f" in {self.filter.strip('.')}")
        return f"{self.key}{f' of {self.model}' if self.model else ''}{where}"


def _short(document: Mapping[str, Any]) -> dict[str, str]:
    """Return short names of the models of a document, by location."""
    found = dict.fromkeys(_locations(document))
    return dict(zip(found, short_names(list(found)), strict=True))


def _locations(node: Any) -> Iterator[str]:  # noqa: ANN401
    if isinstance(node, Mapping):
        if isinstance(node.get("model"), str):
            yield node["model"]
        for value in node.values():
            yield from _locations(value)
    elif isinstance(node, list):
        for value in node:
            yield from _locations(value)


def _dimensions(node: Any, where: str, place: _Place) -> Iterator[tuple[int, Dimension]]:  # noqa: ANN401
    """Yield what is to be found, with the identity of its node."""
    if isinstance(node, Mapping):
        if node.keys() & {"search", "choices"}:
            yield id(node), _dimension(node, where, place.label)
            return
        for key, value in node.items():
            inside = f"{where}.{key}" if where else str(key)
            yield from _dimensions(value, inside, place.inside(node, str(key)))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _dimensions(value, f"{where}[{i}]", place)


def _dimension(node: Mapping[str, Any], where: str, label: str) -> Dimension:
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
        return Dimension(where, label, choices=tuple(choices))
    ends = node["search"]
    found = list(map(_number, ends)) if isinstance(ends, list) and len(ends) == 2 else []
    low, high = found or (None, None)
    if low is None or high is None:
        raise Problem(where, f"is searched in {shown(ends)}; write two numbers: [low, high]")
    is_log, step, first = node.get("log", False), node.get("step"), node.get("first")
    if not isinstance(is_log, bool):
        raise Problem(where, f"has log {shown(is_log)}; write true or false")
    if not low < high:
        raise Problem(where, f"is searched from {low:g} to {high:g}; the first must be smaller")
    if is_log and (low <= 0 or step is not None):
        raise Problem(where, "is searched by its logarithm: from above 0, without a step")
    width, start = _number(step), _number(first)
    if step is not None and (width is None or not 0 < width <= high - low):
        raise Problem(where, f"has step {shown(step)}; write a number up to {high - low:g}")
    if first is not None and (start is None or not low <= start <= high):
        raise Problem(where, f"has first {shown(first)}; write a number from {low:g} to {high:g}")
    if start is not None and width is not None and not _is_on_grid(start - low, width):
        raise Problem(where, f"has first {start:g}, which no step of {width:g} from {low:g} meets")
    return Dimension(where, label, low, high, is_log, width, start=start)


def _number(raw: object) -> float | None:
    """Return a number as parameters take it, text such as 1e-4 among it; None if it is none."""
    try:
        return scalars.number(raw)
    except ValueError:
        return None


def _is_on_grid(distance: float, step: float) -> bool:
    return math.isclose(distance / step, round(distance / step), abs_tol=1e-9)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
