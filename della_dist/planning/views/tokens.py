"""Which row of which checkpoint each token of the output has.

A token keeps its row in every model that has it. Where a model lacks it, the row is that of the
base; or of the one model that has it; or the mean of all that do. A delta there is zero, unless the
base is what lacks it. Rows of no token, behind the vocabulary, stay what they are.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from della_dist.config.tokenizer import TokenizerPolicy
from della_dist.errors import InputError, each
from della_dist.planning.views.vocabulary import Alignment, num_rows_of
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.specs.runs import Runs
from della_dist.wording import few, plural

#: What a token takes while vocabularies are compared, and more while its own is read: measured.
TEXT_BYTES = 250
READ_TOKEN_BYTES = 450

#: Of rows: there is none. Of sources: zeros.
_NONE = -1


class Vocabularies:
    """The tokens of several checkpoints. Each text is held once, for the vocabularies are large."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        """Those of the first checkpoint by number, then what each other has beside them."""
        self.of: list[array[int]] = []
        """Of each checkpoint, the place in `tokens` of every number; -1 where there is no token."""
        self.assumed: set[int] = set()
        """Checkpoints that have no tokenizer, and are taken to have the first one's."""
        self._places: dict[str | tuple[str, int], int] = {}

    def add(self, vocabulary: Mapping[int, str]) -> None:
        """Take the vocabulary, token by number, of one more checkpoint."""
        ordered = sorted(vocabulary)
        tokens = [vocabulary[number] for number in ordered]
        keys: list[str | tuple[str, int]] = list(tokens)
        if len(set(tokens)) < len(tokens):  # the same text may be two tokens
            there: dict[str, int] = {}
            for i, token in enumerate(tokens):
                again = there[token] = there.get(token, -1) + 1
                keys[i] = (token, again) if again else token
        places = self._places
        new = [(key, token) for key, token in zip(keys, tokens, strict=True) if key not in places]
        places.update(zip((key for key, _ in new), itertools.count(len(self.tokens))))
        self.tokens += [token for _, token in new]
        numbers = array("i", [_NONE]) * (max(vocabulary, default=-1) + 1)
        for number, key in zip(ordered, keys, strict=True):
            numbers[number] = places[key]
        self.of.append(numbers)

    def add_same(self, number: int, *, is_assumed: bool = False) -> None:
        """Take that of checkpoint `number` for one more."""
        if is_assumed:
            self.assumed.add(len(self.of))
        self.of.append(self.of[number])

    def place(self, token: str) -> int | None:
        """Return the place in `tokens` of a token; None if no checkpoint has it."""
        return self._places.get(token)

    def rows(self, checkpoint: int) -> array[int]:
        """Return which number each of `tokens` has in a checkpoint; -1: none."""
        rows = array("i", [_NONE]) * len(self.tokens)
        for number, place in enumerate(self.of[checkpoint]):
            if place != _NONE:
                rows[place] = number
        return rows

    def output(self, policy: TokenizerPolicy, donor: int) -> tuple[array[int], tuple[str, ...]]:
        """Return the places in `tokens` of the output's numbers, and tokens that `donor` lacks.

        These have the last numbers. A token that no checkpoint has gets a place here.
        """
        output = array("i", self.of[donor])
        there = set(output)
        added: dict[int, None] = {}
        if policy.source == "union":
            added.update(dict.fromkeys(range(len(self.tokens))))
        for token in sorted(policy.tokens):  # a manifest does not keep their order
            place = self._places.setdefault(token, len(self.tokens))
            if place == len(self.tokens):
                self.tokens.append(token)
            added[place] = None
        new = [place for place in added if place not in there]
        output.extend(new)
        return output, tuple(self.tokens[place] for place in new)


def align(
    policy: TokenizerPolicy,
    vocabularies: Vocabularies,
    checkpoints: Sequence[CheckpointIndex],
    *,
    has_base: bool,
) -> Alignment | None:
    """Return where the rows of tokens come from; None where every row stays where it is.

    Parameters
    ----------
    policy
        Whose tokens the output has.
    vocabularies
        Of the checkpoints.
    checkpoints
        The inputs, the reference first.
    has_base
        Whether that is a base.

    Raises
    ------
    InputError
        If a row that is asked for does not exist.
    """
    places = {c.location: i for i, c in enumerate(checkpoints)}
    donor = places.get(policy.source, 0)
    stored = [num_rows_of(c) for c in checkpoints]
    output, added = vocabularies.output(policy, donor)
    num_rows = max(len(output), stored[donor])
    if policy.pad_to_multiple_of is not None:
        num_rows = -(-num_rows // policy.pad_to_multiple_of) * policy.pad_to_multiple_of
    num_tokens = len(output)
    output.extend([_NONE] * (num_rows - num_tokens))
    rows = [_rows(output, vocabularies, c, stored, donor) for c in range(len(checkpoints))]
    tokens = vocabularies.tokens
    forced = {token for token, one in policy.tokens.items() if one.force}
    moved = {i for i, place in enumerate(output) if place != _NONE and tokens[place] in forced}
    if not moved and all(
        stored[c] == num_rows and all(row == i for i, row in enumerate(own))
        for c, own in enumerate(rows)
    ):
        return None
    fallbacks = _Fallbacks(policy, vocabularies, places, stored, rows, donor, has_base=has_base)
    lacking = {i for own in rows for i, row in enumerate(own) if row == _NONE} | moved
    wanted = sorted(lacking)
    texts = [None if output[i] == _NONE else tokens[output[i]] for i in wanted]
    found = each(lambda one: fallbacks.choose(*one), zip(wanted, texts, strict=True))
    chosen = dict(zip(wanted, found, strict=True))
    columns, uses = zip(
        *(_column(c, own, chosen, moved) for c, own in enumerate(rows)), strict=True
    )
    return Alignment(
        num_rows=num_rows,
        num_tokens=num_tokens,
        mem=len(tokens) * TEXT_BYTES + max(map(len, vocabularies.of)) * READ_TOKEN_BYTES,
        added=added,
        stored_rows=tuple(stored),
        columns=columns,
        uses=uses,
        numbers=_inverse(rows[0], stored[0]) if donor else array("i"),
        own={c: _own(rows[c]) for c in sorted({c for mean in fallbacks.means for c in mean})},
        means=tuple(fallbacks.means),
        fixed=tuple(fallbacks.fixed),
        notes=tuple(_notes(checkpoints, vocabularies, output, rows, donor, len(added))),
    )


def _rows(
    output: array[int], vocabularies: Vocabularies, c: int, stored: Sequence[int], donor: int
) -> array[int]:
    """Return which row of one checkpoint each row of the output is."""
    by_place, numbers = vocabularies.rows(c), vocabularies.of[c]

    def of_no_token(i: int) -> int:
        # A row of no token is the same row, if it is of none here either.
        is_free = i < stored[donor] and (i >= len(numbers) or numbers[i] == _NONE)
        return i if is_free else _NONE

    rows = array(
        "i",
        [by_place[p] if p != _NONE else of_no_token(i) for i, p in enumerate(output)],
    )
    if max(rows, default=_NONE) >= stored[c]:
        rows = array("i", [row if row < stored[c] else _NONE for row in rows])
    return rows


def _column(
    c: int, own: array[int], chosen: Mapping[int, tuple[int, int]], moved: set[int]
) -> tuple[Runs, tuple[int, ...]]:
    """Return the runs of a checkpoint, and what their sources are."""
    uses = {chosen[i][0] for i, row in enumerate(own) if row == _NONE or i in moved}
    used = tuple(sorted((uses | {c}) - {_NONE}))
    local = {source: i for i, source in enumerate(used)} | {_NONE: _NONE}

    def picked() -> Iterator[tuple[int, int]]:
        mine = local[c]
        for i, row in enumerate(own):
            if row == _NONE or i in moved:
                source, row = chosen[i]  # noqa: PLW2901
                yield local[source], row
            else:
                yield mine, row

    return Runs.of(picked()), used


def _inverse(rows: array[int], count: int) -> array[int]:
    numbers = array("i", [_NONE]) * count
    for i, row in enumerate(rows):
        if row != _NONE:
            numbers[row] = i
    return numbers


def _own(rows: array[int]) -> Runs:
    return Runs.of((_NONE, i) if row == _NONE else (0, row) for i, row in enumerate(rows))


class _Fallbacks:
    """What stands for a row where a model lacks the token."""

    def __init__(
        self,
        policy: TokenizerPolicy,
        vocabularies: Vocabularies,
        places: Mapping[str, int],
        stored: Sequence[int],
        rows: Sequence[array[int]],
        donor: int,
        *,
        has_base: bool,
    ) -> None:
        self._policy = policy
        self._vocabularies = vocabularies
        self._places = places
        self._stored = stored
        self._rows = rows
        self._donor = donor
        self._has_base = has_base
        # An average row: its logit is none that a model would choose.
        num_tokens = min(len(vocabularies.of[donor]), stored[donor])
        self._average = (donor, 0, max(1, num_tokens))
        self.means: dict[tuple[int, ...], int] = {}
        self.fixed: dict[tuple[int, int, int], int] = {}

    def choose(self, row: int, token: str | None) -> tuple[int, int]:
        """Return the source of a row of the output, and its row in it."""
        if token is not None and token in self._policy.tokens:
            return self._configured(row, token)
        if token is None and self._rows[self._donor][row] != _NONE:
            return self._donor, row
        having = tuple(c for c, own in enumerate(self._rows) if own[row] != _NONE)
        if not having:
            return self._one_row(self._average), row
        if len(having) == 1 or (self._has_base and having[0] == 0):
            return having[0], self._rows[having[0]][row]
        place = self.means.setdefault(having, len(self.means))
        return len(self._stored) + 2 * place, row

    def _one_row(self, which: tuple[int, int, int]) -> int:
        return len(self._stored) + 2 * self.fixed.setdefault(which, len(self.fixed)) + 1

    def _configured(self, row: int, token: str) -> tuple[int, int]:
        source = self._policy.tokens[token]
        if source.model is None:
            return _NONE, row
        c = self._places[source.model]
        if source.token is None:
            number = self._rows[c][row]
            if number == _NONE:
                self._refuse(token, source.model, f"no token {token!r}")
            return c, number
        number = source.token if isinstance(source.token, int) else _NONE
        if isinstance(source.token, str):
            place = self._vocabularies.place(source.token)
            numbers = self._vocabularies.of[c]
            number = _NONE if place is None or place not in numbers else numbers.index(place)
        if not 0 <= number < self._stored[c]:
            self._refuse(token, source.model, f"no row of {source.token!r}")
        return self._one_row((c, number, 1)), row

    def _refuse(self, token: str, model: str, what: str) -> NoReturn:
        raise InputError(
            f"`tokenizer.tokens.{token}`: {model} has {what}, whose rows it is to have. Name a "
            "model and a token that it has, or `kind: zero`."
        )


def _notes(
    checkpoints: Sequence[CheckpointIndex],
    vocabularies: Vocabularies,
    output: array[int],
    rows: Sequence[array[int]],
    donor: int,
    num_added: int,
) -> Iterator[str]:
    tokens, there = vocabularies.tokens, set(output)
    added = f", {plural(num_added, 'token')} added" if num_added else ""
    yield (
        f"vocabulary: that of {checkpoints[donor].location}{added}; {len(output):,} rows, as "
        "`tokenizer` says."
    )
    for c, (checkpoint, own) in enumerate(zip(checkpoints, rows, strict=True)):
        lacking = [p for row, p in zip(own, output, strict=True) if row == _NONE and p != _NONE]
        elsewhere = [i for i, row in enumerate(own) if row not in (i, _NONE)]
        moved = sum(output[i] != _NONE for i in elsewhere)
        left_out = [p for p in vocabularies.of[c] if p != _NONE and p not in there]
        parts = ["has no tokenizer, and is taken to have the first one's"] * (
            c in vocabularies.assumed
        )
        if moved:
            parts.append(f"rows of {plural(moved, 'token')} moved to their numbers")
        if lacking:
            shown = _counted([tokens[place] for place in lacking])
            parts.append(f"lacks {shown}, filled in")
        if left_out:
            parts.append(f"{_counted([tokens[place] for place in left_out])} left out")
        if parts:
            yield f"{checkpoint.location}: {'; '.join(parts)}."


def _counted(tokens: Sequence[str]) -> str:
    return f"{plural(len(tokens), 'token')} ({few([repr(token) for token in tokens])})"
