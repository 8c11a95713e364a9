"""What is wrong at one place of a configuration, before its file is known."""

from __future__ import annotations

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator, Sequence

from della_dist.locations import masked
from della_dist.wording import numbered

#: Snapshots in a Hugging Face cache have paths of about 150 characters, which are named whole.
MAX_SHOWN = 200
MAX_WHERE = 200
#: Before the keys that there are.
_KNOWN = "; known are "


class Problem(ValueError):
    """Something wrong at `where`, a path such as ``models[1].parameters.density``.

    Of several documents, `document` says in which.
    """

    def __init__(self, where: str, message: str, document: str = "") -> None:
        super().__init__(where, message)
        self.where = where
        self.message = message
        self.document = document

    def inside(self, outer: str) -> Problem:
        """Return the same problem as seen from outside of `outer`."""
        return type(self)(outer + self.where, self.message)

    def each(self) -> list[Problem]:
        """Return the problems that this one consists of."""
        return [self]

    def of(self, document: str) -> list[Problem]:
        """Return the same problems as those of one of several documents."""
        return [Problem(problem.where, problem.message, document) for problem in self.each()]

    def __str__(self) -> str:
        return masked(self._text())

    def _text(self) -> str:
        where = self.where if self.where.isprintable() else repr(self.where)[1:-1]
        if len(where) > MAX_WHERE:
            where = f"{where[: MAX_WHERE // 2]}...{where[-MAX_WHERE // 2 :]}"
        subject = f"`{where}` " if where else ""
        if self.document:
            subject = f"{self.document}: {subject}"
        return f"{subject}{self.message}" + ("" if self.message.endswith("?") else ".")


class Problems(Problem):
    """Several problems of one configuration, the most likely cause of others first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems[0].where, problems[0].message)
        self.problems = problems

    def inside(self, outer: str) -> Problem:
        """Return the same problems as seen from outside of `outer`."""
        return Problems([problem.inside(outer) for problem in self.problems])

    def each(self) -> list[Problem]:
        """Return the problems that this one consists of."""
        return list(self.problems)

    def _text(self) -> str:
        return numbered([str(problem) for problem in _said_once(self.problems)])


def together(problems: Sequence[Problem]) -> Problem:
    """Return one problem that says all of them."""
    return problems[0] if len(problems) == 1 else Problems(problems)


class Gathering:
    """Problems of several places, each of which is looked at whatever the others say."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    @contextlib.contextmanager
    def at(self, where: str = "") -> Iterator[None]:
        """Keep what is raised here, as seen from outside of `where`; of a `ValueError` its text."""
        try:
            yield
        except Problem as problem:
            self.problems += problem.inside(where).each()
        except ValueError as error:
            self.add(where, str(error))

    def add(self, where: str, message: str) -> None:
        """Keep a problem."""
        self.problems.append(Problem(where, message))

    def check(self) -> None:
        """Raise what was found so far, each once."""
        found = list({(p.document, p.where, p.message): p for p in self.problems}.values())
        if found:
            raise together(found)


@contextlib.contextmanager
def gathering() -> Iterator[Gathering]:
    """Gather problems; raise them together at the end.

    Raises
    ------
    Problem
        All that was gathered, if anything was.
    """
    gathered = Gathering()
    yield gathered
    gathered.check()


def check_keys(raw: Iterable[object], known: Sequence[str]) -> None:
    """Refuse keys of a mapping that mean nothing.

    Raises
    ------
    Problem
        Naming all of them.
    """
    with gathering() as problems:
        for key in raw:
            if key not in known:
                problems.add(f".{key}", f"is no known key{nearest(key, known)}")


def _said_once(problems: Sequence[Problem]) -> Iterator[Problem]:
    """Yield the problems, without lists of keys that one before names."""
    lists = set()
    for problem in problems:
        message, _, keys = problem.message.partition(_KNOWN)
        yield Problem(problem.where, message, problem.document) if keys in lists else problem
        if keys:
            lists.add(keys)


def shown(value: object) -> str:
    """Return `value` as a message names it: on one line, never long, and without credentials."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and len(hidden := masked(value)) <= MAX_SHOWN:
        return repr(hidden)
    try:
        return _Short().repr(value)
    except ValueError:  # an integer of more digits than Python is willing to print
        return "a huge number"


def closest(key: object, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return the known key that is most like `key`, None if none is so like it (at most 1)."""
    text = str(key).lower()[:MAX_SHOWN]
    return next(iter(difflib.get_close_matches(text, sorted(known), 1, likeness)), None)


def meant_word(value: object, words: Iterable[str]) -> str:
    """Return the end of a message that proposes the word most like `value`, if one is like it."""
    close = closest(value, words) if isinstance(value, str) else None
    return f"; did you mean `{close}`?" if close else ""


def nearest(key: object, known: Iterable[str]) -> str:
    """Return the end of a message that proposes the known key most like `key`, or names all."""
    close = closest(key, known)
    return f"; did you mean `{close}`?" if close else f"{_KNOWN}{', '.join(sorted(known))}"


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        # Before it is shortened: what is cut off may be what tells that it is a credential.
        return super().repr_str(masked(x), level)
