"""``base_model``: where the base is, and perhaps what becomes of its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from della_dist.config import scalars
from della_dist.config.problem import Problem, nearest
from della_dist.config.renames import Rename, parse_renames

_KEYS = ("model", "rename")


@dataclass(frozen=True, slots=True)
class Base:
    """The base as a configuration names it."""

    model: str
    rename: tuple[Rename, ...] = ()


def parse_base(raw: object) -> Base | None:
    """Return what is said of the base: its location, or a mapping like an entry of ``models``.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        return Base(scalars.location(raw))
    for key in raw:
        if key not in _KEYS:
            raise Problem(f".{key}", f"is no known key{nearest(str(key), _KEYS)}")
    try:
        location = scalars.location(raw.get("model"))
    except ValueError as error:
        raise Problem(".model", str(error)) from None
    try:
        return Base(location, parse_renames(raw.get("rename")))
    except Problem as problem:
        raise problem.inside(".rename") from None
