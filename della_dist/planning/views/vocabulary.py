"""Embeddings and heads, seen with their rows at the numbers that tokens have in the output.

Which row goes where is `della_dist.planning.views.tokens`' affair.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from della_dist.errors import InputError
from della_dist.planning.ties import CAUSAL_HEAD, EMBEDDINGS, HEADS, ends_in
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import num_bytes, num_elements
from della_dist.specs.runs import Runs
from della_dist.specs.sources import Mean, MeanRow, Rows, Stored

#: Heads, those included that no model ties.
_HEADS = (*HEADS, "lm_loss.weight", "output.weight", "output_layer.weight")
_BIASES = (
    *(head.replace(".weight", ".bias") for head in _HEADS),
    *("predictions.bias", "decoder.bias", "generator_lm_head.bias"),
)
#: Of one row, with an entry for each token.
_ACROSS = ("final_logits_bias",)
#: Rows of tokens that are not those of the embedding (Gemma 3n).
_OTHER_ROWS = ("embed_tokens_per_layer.weight",)


@dataclass(frozen=True, slots=True)
class Alignment:
    """Which rows of which checkpoints the rows of aligned tensors are."""

    num_rows: int
    """Of the output."""
    num_tokens: int
    """Of them, those of tokens."""
    mem: int
    """Bytes that it took, at most, to find this out."""
    added: tuple[str, ...]
    """Tokens that the tokenizer of the output does not have yet: the last of `num_tokens`."""
    stored_rows: tuple[int, ...]
    """Of each checkpoint."""
    columns: tuple[Runs, ...]
    """Of each checkpoint; their sources are those of `uses`."""
    uses: tuple[tuple[int, ...], ...]
    """What the sources of a column are: a checkpoint; behind these, one of `means` or, every other
    number, of `fixed`."""
    numbers: array[int]
    """Which row of the output each row of the reference is, -1 none; empty: each is the same."""
    own: Mapping[int, Runs]
    """Of each checkpoint that has a part in a mean, its own rows; zeros where it lacks a token."""
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
        return num_bytes(entry.dtype, shape) == entry.size_bytes

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
            stored = self._stored(checkpoint, name)
            row_elements = num_elements(stored.entry.shape) // self.stored_rows[checkpoint]
            return MeanRow(stored, first, rows, row_elements)
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
        if not self.numbers:
            return row
        number = self.numbers[row] if row < len(self.numbers) else -1
        return None if number < 0 else number

    def digest(self) -> str:
        """Return a digest of which row goes where."""
        digest = hashlib.sha256(repr((self.num_rows, self.uses, self.means, self.fixed)).encode())
        for runs in (*self.columns, *self.own.values()):
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


def num_rows_of(checkpoint: CheckpointIndex) -> int:
    """Return how many rows the embedding of a checkpoint has; 0 if it has none by name."""
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
        rows = num_rows_of(checkpoint)
        tensors = dict(checkpoint.tensors)
        for name, entry in checkpoint.tensors.items():
            if _axis(name, entry, rows) is not None:
                tensors[name] = _with_rows(entry, rows, num_rows)
            elif len(entry.shape) == 2 and ends_in(name, (CAUSAL_HEAD,)):
                raise InputError(
                    f"{checkpoint.location}: {name} has {entry.shape[0]} rows, and the embedding "
                    f"{rows}: which row is whose token is not known. Give both as many rows."
                )
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
    if entry.shape[:1] == (rows,) and ends_in(name, (*EMBEDDINGS, *_HEADS, *_BIASES)):
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
