"""A parameter that may vary: a number, a gradient over the layers, or a list of conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from della_dist.config.problem import Problem, check_keys, gathering, shown

#: Points of a gradient: more than any model has layers.
MAX_POINTS = 4096

T = TypeVar("T", bound="float | str")
R = TypeVar("R", bound="float | str")


@dataclass(frozen=True, slots=True)
class Branch(Generic[T]):
    """What holds for the tensors whose name contains `filter`."""

    filter: str
    """Empty: every tensor."""
    points: tuple[T, ...]
    """One value, or the values of a gradient at equal distances over the layers."""

    def at(self, t: float) -> T:
        """Return the value at t: numbers are interpolated, others chosen."""
        points = self.points
        if len(points) == 1:
            return points[0]
        scaled = t * (len(points) - 1)
        i = int(scaled)
        low, high = points[i], points[min(i + 1, len(points) - 1)]
        if not isinstance(low, float) or not isinstance(high, float) or low == high:
            return low
        fraction = scaled - i
        return cast("T", (1 - fraction) * low + fraction * high)


@dataclass(frozen=True, slots=True)
class Setting(Generic[T]):
    """The branches of a parameter; the first whose filter matches a tensor holds for it."""

    branches: tuple[Branch[T], ...]

    @classmethod
    def constant(cls, value: T) -> Setting[T]:
        """Return the setting that has one value everywhere."""
        return cls((Branch("", (value,)),))

    @property
    def is_total(self) -> bool:
        """Whether every tensor matches some branch."""
        return self.branches[-1].filter == ""

    def at(self, name: str, t: float) -> T | None:
        """Return the value for a tensor, None where no filter matches."""
        for branch in self.branches:
            if branch.filter in name:
                return branch.at(t)
        return None

    def then(self, other: Setting[T] | None) -> Setting[T]:
        """Return this setting, and `other` where this one yields nothing."""
        if other is None or self.is_total:
            return self
        return Setting(self.branches + other.branches)

    def values(self) -> Iterator[T]:
        """Return every value that is written down."""
        for branch in self.branches:
            yield from branch.points

    def map(self, function: Callable[[T], R]) -> Setting[R]:
        """Return the setting with `function` applied to every value."""
        return Setting(
            tuple(Branch(b.filter, _collapsed(map(function, b.points))) for b in self.branches)
        )

    def plain(self) -> Any:  # noqa: ANN401
        """Return the setting as it would be written in YAML."""
        values = [b.points[0] if len(b.points) == 1 else list(b.points) for b in self.branches]
        if len(values) == 1 and self.is_total:
            return values[0]
        return [
            {"filter": b.filter or "*", "value": value}
            for b, value in zip(self.branches, values, strict=True)
        ]


#: The parameters that have an effect, by name.
Settings = Mapping[str, Setting[Any]]


def plain(settings: Settings) -> dict[str, Any]:
    """Return parameters as they would be written in YAML."""
    return {name: setting.plain() for name, setting in settings.items()}


def parse_setting(raw: object, scalar: Callable[[object], T]) -> Setting[T]:
    """Return the setting that `raw` means; `scalar` converts and checks one value.

    Raises
    ------
    Problem
        All that is wrong, with the places inside `raw`.
    """
    if isinstance(raw, Mapping):
        return _closed([_condition(raw, scalar)])
    if isinstance(raw, (list, tuple)) and raw and isinstance(raw[0], Mapping):
        branches = []
        with gathering() as problems:
            for i, item in enumerate(raw):
                with problems.at(f"[{i}]"):
                    branches.append(_condition(item, scalar))
        return _closed(branches)
    return Setting((Branch("", _points(raw, scalar)),))


def _closed(branches: list[Branch[T]]) -> Setting[T]:
    """Return the branches up to the first that matches everything; refuse filters behind it."""
    end = next((i for i, branch in enumerate(branches) if not branch.filter), len(branches))
    with gathering() as problems:
        for i, branch in enumerate(branches[end + 1 :], start=end + 1):
            if branch.filter:
                problems.add(
                    f"[{i}].filter",
                    f"is {shown(branch.filter)}, and has no effect: entry [{end}] before it "
                    "matches every tensor. Put that one last",
                )
    return Setting(tuple(branches[: end + 1]))


def _condition(raw: object, scalar: Callable[[object], T]) -> Branch[T]:
    if not isinstance(raw, Mapping):
        raise Problem(
            "",
            f"is {shown(raw)} in a list of conditions. Write every entry as `filter` and `value`",
        )
    with gathering() as problems:
        with problems.at():
            check_keys(raw, ("filter", "value"))
        with problems.at(".filter"):
            text = _filter(raw.get("filter"))
        if "value" not in raw:
            problems.add("", "has no `value`")
        else:
            with problems.at(".value"):
                points = _points(raw["value"], scalar)
    return Branch(text, points)


def _filter(raw: object) -> str:
    if raw is not None and not isinstance(raw, str):
        raise Problem("", f"must be text, a part of a tensor name, not {shown(raw)}")
    return "" if raw in (None, "*") else str(raw)


def _points(raw: object, scalar: Callable[[object], T]) -> tuple[T, ...]:
    if not isinstance(raw, (list, tuple)):
        return (scalar(raw),)
    if not raw:
        raise Problem("", "is an empty list. Give a value, or the values of a gradient")
    if len(raw) > MAX_POINTS:
        raise Problem("", f"has {len(raw)} points; a gradient can have {MAX_POINTS} at most")
    values = []
    with gathering() as problems:
        for i, item in enumerate(raw):
            with problems.at(f"[{i}]"):
                values.append(scalar(item))
    return _collapsed(values)


def _collapsed(values: Iterable[T]) -> tuple[T, ...]:
    """Return the points of a gradient, one where all are the same."""
    points = tuple(values)
    return points[:1] if len(set(points)) == 1 else points
