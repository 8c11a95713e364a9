"""``base_model``: where the base is, and perhaps what becomes of its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from della_dist.config import scalars
from della_dist.config.problem import check_keys, gathering
from della_dist.config.renames import Rename, parse_renames


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
    if not isinstance(raw, Mapping) or "path" in raw or "lora" in raw:
        return Base(scalars.location(raw))
    with gathering() as problems:
        with problems.at():
            check_keys(raw, ("model", "rename"))
        with problems.at(".model"):
            location = scalars.location(raw.get("model"))
        with problems.at(".rename"):
            renames = parse_renames(raw.get("rename"))
    return Base(location, renames)
