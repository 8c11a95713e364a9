"""Skills to learn: items made in code, those of training apart from those that measure."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

#: Of tokens, by their ids; the first begins and ends an item and fills its row.
ALPHABET = "\n0123456789abcdefghijklmnopqrstuvwxyz=> ."
#: What labels are where nothing is to be predicted, as in transformers.
IGNORED = -100

IdArray: TypeAlias = npt.NDArray[np.int64]
Rng: TypeAlias = np.random.Generator
Part = Literal["first half", "second half", "validation", "test"]

_TENTHS: Sequence[tuple[Part, int]] = (
    ("first half", 4),
    ("second half", 4),
    ("validation", 1),
    ("test", 1),
)
_PARTS = [part for part, tenths in _TENTHS for _ in range(tenths)]


@dataclass(frozen=True, slots=True)
class Item:
    """What is given, and what follows it."""

    given: str
    answer: str

    @property
    def part(self) -> Part:
        """Of which part it is, whoever draws it: no item is in two."""
        return _PARTS[zlib.crc32(f"{self.given}|{self.answer}".encode()) % len(_PARTS)]


@dataclass(frozen=True, slots=True)
class Skill:
    """Something to learn."""

    draw: Callable[[Rng], Item]
    is_exact: bool = True
    """Whether what is given has one right answer."""


def _double(rng: Rng, num_digits: int) -> Item:
    """Twice a number, units first: each digit then needs nothing that comes behind it."""
    number = int(rng.integers(10**num_digits))
    return Item(f"{number:0{num_digits}}"[::-1] + "=", f"{2 * number:0{num_digits + 1}}"[::-1])


def _sort(rng: Rng, num_letters: int) -> Item:
    letters = [ALPHABET[11 + int(i)] for i in rng.integers(26, size=num_letters)]
    return Item("".join(letters) + ">", "".join(sorted(letters)))


_NUM_WORDS = 20  # of each kind


@cache
def _words(dialect: int) -> Sequence[str]:
    """Return subjects, verbs and objects of three letters, the frequent ones of each first."""
    rng = np.random.default_rng(dialect)
    parts = ("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz")
    return [
        "".join(letters[int(rng.integers(len(letters)))] for letters in parts)
        for _ in range(3 * _NUM_WORDS)
    ]


def _sentence(rng: Rng, dialect: int) -> Item:
    frequencies = 1 / np.arange(2, _NUM_WORDS + 2)
    ranks = rng.choice(_NUM_WORDS, size=3, p=frequencies / frequencies.sum())
    subject, verb, thing = (_words(dialect)[k * _NUM_WORDS + int(r)] for k, r in enumerate(ranks))
    of_subject, of_verb = ("", "o") if rng.integers(2) else ("s", "")  # they agree in number
    return Item("", f"{subject}{of_subject} {verb}{of_verb} {thing}.")


#: What experts learn: to double numbers, to sort letters, a language.
SKILLS: Mapping[str, Skill] = {
    "doubles": Skill(partial(_double, num_digits=7)),
    "sorting": Skill(partial(_sort, num_letters=7)),
    "text": Skill(partial(_sentence, dialect=1), is_exact=False),
}

#: What the base learns, and how often: less of the same kinds, and a little of the skills.
MIXTURE: Sequence[tuple[Skill, float]] = (
    (Skill(partial(_double, num_digits=4)), 0.32),
    (Skill(partial(_sort, num_letters=4)), 0.32),
    (Skill(partial(_sentence, dialect=2), is_exact=False), 0.32),
    *((skill, 0.04 / 3) for skill in SKILLS.values()),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Items as a model takes them."""

    ids: IdArray
    """(items, tokens)"""
    labels: IdArray
    """The same where an answer is to be predicted, otherwise `IGNORED`."""


def batches(
    mixture: Sequence[tuple[Skill, float]], part: Part, seed: int, num_items: int
) -> Iterator[Batch]:
    """Yield batches of so many items of a part, without end; skills are drawn by their shares."""
    rng = np.random.default_rng(seed)
    skills, shares = [skill for skill, _ in mixture], [share for _, share in mixture]
    while True:
        items: list[Item] = []
        while len(items) < num_items:
            item = skills[int(rng.choice(len(skills), p=shares))].draw(rng)
            if item.part == part:
                items.append(item)
        yield _encoded(items)


def _encoded(items: Sequence[Item]) -> Batch:
    width = max(len(item.given) + len(item.answer) for item in items) + 2
    ids = np.zeros((len(items), width), np.int64)
    labels = np.full_like(ids, IGNORED)
    for row, item in enumerate(items):
        text = ALPHABET[0] + item.given + item.answer + ALPHABET[0]
        ids[row, : len(text)] = [ALPHABET.index(character) for character in text]
        start = 1 + len(item.given)
        labels[row, start : len(text)] = ids[row, start : len(text)]
    return Batch(ids, labels)
