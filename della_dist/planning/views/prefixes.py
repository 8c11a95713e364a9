"""Names that begin in other ways: which beginning of one file is which of another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from della_dist.errors import InputError
from della_dist.planning.views.layout_rules import PREFIXES


@dataclass(frozen=True, slots=True)
class Renaming:
    """Names that begin with `theirs`, called by names that begin with `ours`."""

    theirs: str
    ours: str
    names: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.theirs}* as {self.ours}*"


def find_renamings(
    theirs: Collection[str],
    ours: Collection[str],
    is_alike: Callable[[str, str], bool],
    where: str,
) -> list[Renaming]:
    """Return which of their names are which of ours, the largest number first.

    Parameters
    ----------
    theirs, ours
        Names that have no equal on the other side.
    is_alike
        Whether one of theirs may be one of ours by its shape.
    where
        Whose names they are, for messages.

    Raises
    ------
    InputError
        If two ways are as good as one another.
    """
    left, free = set(theirs), set(ours)
    candidates = [
        Renaming(p, q, {n: q + n[len(p) :] for n in theirs if n.startswith(p)})
        for p, q in _pairs(theirs, ours)
    ]
    found: list[Renaming] = []
    while left and free:
        now = [
            Renaming(
                c.theirs, c.ours, {n: m for n, m in c.names.items() if n in left and m in free}
            )
            for c in candidates
        ]
        now = [one for one in now if one.names]
        if not now:
            break
        best = _best(now, is_alike, where)
        found.append(best)
        left -= best.names.keys()
        free -= set(best.names.values())
        # What begins so is called so: nothing of it is another part of the model as well.
        candidates = [c for c in candidates if c.theirs != best.theirs]
    return found


def _pairs(theirs: Collection[str], ours: Collection[str]) -> Iterator[tuple[str, str]]:
    yield "", ""
    seen = {("", "")}
    for alike in PREFIXES:
        at_theirs = [p for p in alike if any(name.startswith(p) for name in theirs)]
        at_ours = [q for q in alike if any(name.startswith(q) for name in ours)]
        for pair in ((p, q) for p in at_theirs for q in at_ours if p != q):
            if pair not in seen:
                seen.add(pair)
                yield pair


def _best(
    candidates: Sequence[Renaming], is_alike: Callable[[str, str], bool], where: str
) -> Renaming:
    most = max(len(one.names) for one in candidates)
    best = [one for one in candidates if len(one.names) == most]
    if _agree(best):
        return best[0]
    alike = [sum(is_alike(*pair) for pair in one.names.items()) for one in best]
    best = [one for one, count in zip(best, alike, strict=True) if count == max(alike)]
    if _agree(best):
        return best[0]
    first = best[0]
    other = next(one for one in best if not _agree([first, one]))
    name = next(n for n in first.names if other.names.get(n, first.names[n]) != first.names[n])
    raise InputError(
        f"{where}: its names may be meant in two ways, {first} as well as {other} "
        f"({name} is {first.names[name]}, or {other.names[name]}). Say which with `rename`."
    )


def _agree(renamings: Sequence[Renaming]) -> bool:
    first = renamings[0].names
    return all(first.get(n, m) == m for one in renamings[1:] for n, m in one.names.items())


def beginning(names: Collection[str]) -> str:
    """Return what all names begin with, up to a dot, and an asterisk."""
    first, last = min(names).split("."), max(names).split(".")
    common = [a for a, b in zip(first[:-1], last[:-1], strict=False) if a == b]
    prefix = common if first[: len(common)] == common else []
    return ".".join([*prefix, "*"])
