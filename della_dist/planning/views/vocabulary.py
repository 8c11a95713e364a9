"""Vocabularies: rows of embeddings and heads, moved to the numbers that tokens have in the output.

A token keeps its row in every model that has it. Where a model lacks it, the row is that of the
base; or of the one model that has it; or the mean of all that do. A delta there is zero, unless the
base is what lacks it. Rows of no token, behind the vocabulary, stay what they are.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn, TypeAlias

from della_dist.config.tokenizer import TokenizerPolicy
from della_dist.errors import InputError
from della_dist.planning.ties import EMBEDDINGS, HEADS, ends_in
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import num_bytes
from della_dist.specs.runs import Runs
from della_dist.specs.sources import Mean, MeanRow, Rows, Stored
from della_dist.wording import few, plural

#: Token by number, of one checkpoint.
Vocabulary: TypeAlias = Mapping[int, str]

_BIASES = (*(head.replace(".weight", ".bias") for head in HEADS), "predictions.bias")
#: Of one row, with an entry for each token.
_ACROSS = ("final_logits_bias",)
#: Rows of tokens that are not those of the embedding (Gemma 3n).
_OTHER_ROWS = ("embed_tokens_per_layer.weight",)

#: What a row is made of, where a model lacks the token: -1 zeros, or which of the sources.
_ZEROS = -1


@dataclass(frozen=True, slots=True)
class Alignment:
    """Which rows of which checkpoints the rows of aligned tensors are."""

    num_rows: int
    """Of the output."""
    num_tokens: int
    """Of them, those of tokens."""
    added: tuple[str, ...]
    """Tokens that the tokenizer of the output does not have yet: the last of `num_tokens`."""
    stored_rows: tuple[int, ...]
    """Of each checkpoint."""
    columns: tuple[Runs, ...]
    """Of each checkpoint; their sources are those of `uses`."""
    uses: tuple[tuple[int, ...], ...]
    """What the sources of a column are: a checkpoint; behind these, one of `means` or, every other
    number, of `fixed`."""
    own: tuple[Runs, ...]
    """Of each checkpoint, its own rows alone, zeros where it lacks a token."""
    means: tuple[tuple[int, ...], ...]
    """Checkpoints whose rows are averaged."""
    fixed: tuple[tuple[int, int, int], ...]
    """Checkpoint, first row and number of rows of one row that stands for others."""
    notes: tuple[str, ...]
    entries: tuple[Mapping[str, TensorEntry], ...] = field(default=(), repr=False)
    """The aligned tensors of each checkpoint, by name, in the shape of the output."""

    def over(self, checkpoints: Sequence[CheckpointIndex]) -> Alignment:
        """Return the alignment of these checkpoints, whose heads are what they are meant to be."""
        entries = tuple(
            {n: e for n, e in c.tensors.items() if self._is_of_tokens(e, rows)}
            for c, rows in zip(checkpoints, self.stored_rows, strict=True)
        )
        return replace(self, entries=entries)

    def _is_of_tokens(self, entry: TensorEntry, rows: int) -> bool:
        if _axis(entry.name, entry, self.num_rows) is None:
            return False
        shape = _with_rows(entry, self.num_rows, rows).shape
        return num_bytes(entry.dtype, shape) == entry.stop - entry.start

    def has(self, name: str) -> bool:
        """Return whether a tensor has rows of tokens."""
        return any(name in entries for entries in self.entries)

    def column(self, checkpoint: int, name: str) -> Rows:
        """Return the rows of an aligned tensor of a checkpoint.

        Raises
        ------
        InputError
            If another checkpoint, which has tokens that this one lacks, lacks the tensor.
        """
        entry = self.entries[checkpoint][name]
        sources = tuple(self._source(number, name) for number in self.uses[checkpoint])
        dtype = _common([one.dtype for one in sources] or [entry.dtype])
        return Rows(checkpoint, entry.shape, dtype, sources, self.columns[checkpoint])

    def _source(self, number: int, name: str) -> Stored | MeanRow | Mean:
        count = len(self.stored_rows)
        if number < count:
            return self._stored(number, name)
        place, is_fixed = divmod(number - count, 2)
        if is_fixed:
            checkpoint, first, rows = self.fixed[place]
            return MeanRow(self._stored(checkpoint, name), first, rows)
        members = [self._own(one, name) for one in self.means[place]]
        return Mean(tuple(members), _common([one.dtype for one in members]))

    def _own(self, checkpoint: int, name: str) -> Rows:
        stored, entry = self._stored(checkpoint, name), self.entries[checkpoint][name]
        return Rows(checkpoint, entry.shape, entry.dtype, (stored,), self.own[checkpoint])

    def _stored(self, checkpoint: int, name: str) -> Stored:
        entry = self.entries[checkpoint].get(name)
        if entry is None:
            raise InputError(
                f"{name}: its rows of some tokens are to be those of a model that has no such "
                "tensor. Take `tokenizer_source: base`, or models that all have it."
            )
        return Stored(checkpoint, _with_rows(entry, self.num_rows, self.stored_rows[checkpoint]))

    def number_of(self, row: int) -> int | None:
        """Return which row of the output a row of the reference is; None if it is none."""
        for start, count, source, first in self.own[0].within(0, self.num_rows):
            if source != _ZEROS and first <= row < first + count:
                return start + row - first
        return None

    def digest(self) -> str:
        """Return a digest of which row goes where."""
        digest = hashlib.sha256(repr((self.num_rows, self.uses, self.means, self.fixed)).encode())
        for runs in (*self.columns, *self.own):
            for numbers in (runs.starts, runs.sources, runs.firsts):
                digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
        return digest.hexdigest()


def embedding_of(checkpoint: CheckpointIndex) -> TensorEntry | None:
    """Return the embedding of the tokens of a checkpoint; None if it has none by name."""
    found = [
        entry
        for name, entry in checkpoint.tensors.items()
        if len(entry.shape) == 2 and ends_in(name, EMBEDDINGS) and not _in_a_layer(name)
    ]
    return max(found, key=lambda entry: entry.shape[0], default=None)


def _num_rows(checkpoint: CheckpointIndex) -> int:
    embedding = embedding_of(checkpoint)
    return 0 if embedding is None else embedding.shape[0]


def seen_as(checkpoints: Sequence[CheckpointIndex], num_rows: int) -> tuple[CheckpointIndex, ...]:
    """Return the checkpoints with tensors of tokens in the shape that the output has.

    Raises
    ------
    InputError
        If a tensor has as many rows as there are tokens, and is not known to be of tokens.
    """
    found = []
    for checkpoint in checkpoints:
        rows = _num_rows(checkpoint)
        tensors = dict(checkpoint.tensors)
        for name, entry in checkpoint.tensors.items():
            if _axis(name, entry, rows) is not None:
                tensors[name] = _with_rows(entry, rows, num_rows)
            elif ends_in(name, _OTHER_ROWS) or (rows in entry.shape and not _in_a_layer(name)):
                raise InputError(
                    f"{checkpoint.location}: {name} {list(entry.shape)} has a row for each of "
                    f"{rows} tokens, as it seems, and is none of the tensors whose rows can be "
                    "moved to other tokens (embeddings and output heads). Merge models of one "
                    "vocabulary."
                )
        found.append(replace(checkpoint, tensors=tensors))
    return tuple(found)


def _axis(name: str, entry: TensorEntry, rows: int) -> int | None:
    """Return the axis of tokens of a tensor; None if it has none."""
    if entry.shape[:1] == (rows,) and ends_in(name, (*EMBEDDINGS, *HEADS, *_BIASES)):
        return 0
    if entry.shape == (1, rows) and ends_in(name, _ACROSS):
        return 1
    return None


def _with_rows(entry: TensorEntry, before: int, rows: int) -> TensorEntry:
    axis = _axis(entry.name, entry, before)
    assert axis is not None
    return replace(entry, shape=(*entry.shape[:axis], rows, *entry.shape[axis + 1 :]))


def _in_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _common(dtypes: Sequence[str]) -> str:
    """Return the smallest dtype that holds all numbers of several dtypes exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return "F64" if "F64" in dtypes else "F32"


def align(
    policy: TokenizerPolicy,
    vocabularies: Sequence[Vocabulary],
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
        Of each checkpoint.
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
    rows = [_num_rows(c) for c in checkpoints]
    output, added = output_tokens(policy, donor, vocabularies)
    num_tokens = max(output, default=-1) + 1
    num_rows = max(num_tokens, rows[donor])
    if policy.pad_to_multiple_of is not None:
        num_rows = -(-num_rows // policy.pad_to_multiple_of) * policy.pad_to_multiple_of
    by_token = [_by_token(vocabulary) for vocabulary in vocabularies]
    keys = {number: key for key, number in _by_token(output).items()}
    numbers = [
        array("q", _numbers(keys, by_token[c], vocabularies[c], rows[c], rows[donor], num_rows))
        for c in range(len(checkpoints))
    ]
    forced = {
        i for i, token in output.items() if token in policy.tokens and policy.tokens[token].force
    }
    if not forced and all(
        rows[c] == num_rows and all(row == i for i, row in enumerate(own))
        for c, own in enumerate(numbers)
    ):
        return None
    fallbacks = _Fallbacks(policy, places, by_token, rows, numbers)
    # Behind every vocabulary, an average row: its logit is none that a model would choose.
    average = (donor, 0, max(1, min(max(vocabularies[donor], default=0) + 1, rows[donor])))
    chosen = [
        fallbacks.choose(i, output.get(i), average, has_base=has_base)
        if i in forced or any(own[i] < 0 for own in numbers)
        else _OWN
        for i in range(num_rows)
    ]
    columns, uses = [], []
    for c, own in enumerate(numbers):
        picked = [
            (c, row) if row >= 0 and i not in forced else fallback
            for i, (row, fallback) in enumerate(zip(own, chosen, strict=True))
        ]
        used = tuple(sorted({source for source, _ in picked if source >= 0}))
        local = {source: i for i, source in enumerate(used)} | {_ZEROS: _ZEROS}
        columns.append(Runs.of((local[source], row) for source, row in picked))
        uses.append(used)
    return Alignment(
        num_rows,
        num_tokens,
        added,
        tuple(rows),
        tuple(columns),
        tuple(uses),
        tuple(
            Runs.of((0, row) if row >= 0 else (_ZEROS, i) for i, row in enumerate(own))
            for own in numbers
        ),
        tuple(fallbacks.means),
        tuple(fallbacks.fixed),
        tuple(_notes(checkpoints, vocabularies, output, numbers, donor)),
    )


def output_tokens(
    policy: TokenizerPolicy, donor: int, vocabularies: Sequence[Vocabulary]
) -> tuple[dict[int, str], tuple[str, ...]]:
    """Return the vocabulary of the output, and which of its tokens that of the donor lacks."""
    output = dict(vocabularies[donor])
    there = set(output.values())
    added: dict[str, None] = {}
    if policy.source == "union":
        for vocabulary in vocabularies:
            added.update((vocabulary[n], None) for n in sorted(vocabulary))
    added.update(dict.fromkeys(policy.tokens))
    new = tuple(token for token in added if token not in there)
    first = max(output, default=-1) + 1
    output.update(enumerate(new, first))
    return output, new


Key: TypeAlias = str | tuple[str, int]


def _by_token(vocabulary: Vocabulary) -> dict[Key, int]:
    """Return number by token; of a token that is there again, by the token and which it is."""
    found: dict[Key, int] = {}
    again: dict[str, int] = {}
    for number in sorted(vocabulary):
        token = vocabulary[number]
        if token in found:
            again[token] = again.get(token, 0) + 1
            found[token, again[token]] = number
        else:
            found[token] = number
    return found


def _numbers(
    keys: Mapping[int, Key],
    by_token: Mapping[Key, int],
    vocabulary: Vocabulary,
    rows: int,
    rows_of_donor: int,
    num_rows: int,
) -> Iterator[int]:
    """Yield which row of one checkpoint each row of the output is; -1 where it has none."""
    for i in range(num_rows):
        key = keys.get(i)
        if key is None:  # of no token: the same row, if it is of none here either
            row = i if i < rows_of_donor and i not in vocabulary else -1
        else:
            row = by_token.get(key, -1)
        yield row if row < rows else -1


#: Where no model needs another's row.
_OWN = (_ZEROS, 0)


class _Fallbacks:
    """What stands for a row where a model lacks the token."""

    def __init__(
        self,
        policy: TokenizerPolicy,
        places: Mapping[str, int],
        by_token: Sequence[Mapping[Key, int]],
        rows: Sequence[int],
        numbers: Sequence[array[int]],
    ) -> None:
        self._policy = policy
        self._places = places
        self._by_token = by_token
        self._rows = rows
        self._numbers = numbers
        self.means: dict[tuple[int, ...], int] = {}
        self.fixed: dict[tuple[int, int, int], int] = {}

    def choose(
        self, row: int, token: str | None, average: tuple[int, int, int], *, has_base: bool
    ) -> tuple[int, int]:
        """Return the source of a row of the output, and its row in it."""
        if token is not None and token in self._policy.tokens:
            return self._configured(row, token)
        donor = average[0]
        if token is None and self._numbers[donor][row] >= 0:
            return donor, row
        having = tuple(c for c, own in enumerate(self._numbers) if own[row] >= 0)
        if not having:
            return self._one_row(average), row
        if len(having) == 1 or (has_base and having[0] == 0):
            return having[0], self._numbers[having[0]][row]
        place = self.means.setdefault(having, len(self.means))
        return len(self._rows) + 2 * place, row

    def _one_row(self, which: tuple[int, int, int]) -> int:
        return len(self._rows) + 2 * self.fixed.setdefault(which, len(self.fixed)) + 1

    def _configured(self, row: int, token: str) -> tuple[int, int]:
        source = self._policy.tokens[token]
        if source.model is None:
            return _ZEROS, row
        c = self._places[source.model]
        if source.token is None:
            number = self._numbers[c][row]
            if number < 0:
                self._refuse(token, source.model, f"no token {token!r}")
            return c, number
        if isinstance(source.token, int):
            number = source.token
        else:
            number = self._by_token[c].get(source.token, -1)
        if not 0 <= number < self._rows[c]:
            self._refuse(token, source.model, f"no row of {source.token!r}")
        return self._one_row((c, number, 1)), row

    def _refuse(self, token: str, model: str, what: str) -> NoReturn:
        raise InputError(
            f"`tokenizer.tokens.{token}`: {model} has {what}, whose rows it is to have. Name a "
            "model and a token that it has, or `kind: zero`."
        )


def _notes(
    checkpoints: Sequence[CheckpointIndex],
    vocabularies: Sequence[Vocabulary],
    output: Vocabulary,
    numbers: Sequence[array[int]],
    donor: int,
) -> Iterator[str]:
    there = set(output.values())
    for c, (checkpoint, own) in enumerate(zip(checkpoints, numbers, strict=True)):
        lacking = [output[i] for i, row in enumerate(own) if row < 0 and i in output]
        moved = sum(row >= 0 and row != i and i in output for i, row in enumerate(own))
        left_out = [token for token in vocabularies[c].values() if token not in there]
        parts = []
        if moved:
            parts.append(f"rows of {plural(moved, 'token')} are moved to their numbers")
        if lacking:
            parts.append(f"{_counted(lacking)} that it lacks have the rows of others")
        if left_out:
            parts.append(f"{_counted(left_out)} are left out")
        if parts:
            yield f"{checkpoint.location}: {'; '.join(parts)}."


def _counted(tokens: Sequence[str]) -> str:
    return f"{plural(len(tokens), 'token')} ({few([repr(token) for token in tokens])})"
