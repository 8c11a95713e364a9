"""Tensors that are rows of one matrix in one file, and matrices of their own in another.

A matrix of a group is cut into *cells*, one for every part of every expert (or head); a tensor is
some cells, one behind the other. Whatever the layouts of two files are, they have the same cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from della_dist.errors import InputError
from della_dist.planning.facts import text_config
from della_dist.planning.views.layout_rules import (
    ALIASES,
    AMBIGUOUS_QKV,
    BY_NAME,
    MAX_PARTS,
    OTHER_EXPERTS,
    OTHER_QKV,
    QKV_BY_HEAD,
    QKV_IN_ORDER,
    Group,
)
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import num_elements

#: Expert or head, and which part of it.
Cell: TypeAlias = tuple[int, int]

#: Longer numbers of experts are none.
_MAX_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Label:
    """What a name says that a tensor is."""

    name: str
    key: str
    """Of all tensors that have the same cells, whatever they are called."""
    group: Group | None = None
    """None: a tensor by itself."""
    expert: int | None = None
    part: int | None = None

    @property
    def place(self) -> tuple[int | None, int | None]:
        """What tells it from others of one key."""
        parts = 1 if self.group is None else self.group.num_parts
        return self.expert, 0 if self.part is None and parts == 1 else self.part


@dataclass(frozen=True, slots=True)
class Span:
    """Whole rows of a tensor."""

    entry: TensorEntry
    first: int
    count: int


def label(name: str) -> Label:
    """Return what a tensor is by its name."""
    text = f".{name}"
    for one, other in ALIASES:
        if one in text:
            text = text.replace(one, other)
    parts = text[1:].split(".")
    for length in range(min(MAX_PARTS, len(parts)), 0, -1):
        tail, expert = parts[-length:], None
        if tail[0] == "experts" and length > 2:
            number = tail[1]
            if not number.isdecimal() or len(number) > _MAX_DIGITS:
                continue
            tail[1], expert = "*", int(number)
        if found := BY_NAME.get(".".join(tail)):
            group, part = found
            return Label(name, ".".join([*parts[:-length], group.name]), group, expert, part)
    return Label(name, text[1:])


def by_key(labels: Iterable[Label]) -> dict[str, list[Label]]:
    """Return tensors by their keys."""
    found: dict[str, list[Label]] = {}
    for one in labels:
        found.setdefault(one.key, []).append(one)
    return found


class Cells:
    """Where a model has the cells of one matrix.

    Parameters
    ----------
    model
        The checkpoint.
    labels
        Those of its tensors that have cells of it.
    sizes
        Rows of a cell of parts that its tensors do not tell, if they are known.
    num_turns
        See `turns`.

    Raises
    ------
    InputError
        If how they lie in a tensor is not known, or does not keep rows whole.
    """

    def __init__(
        self,
        model: CheckpointIndex,
        labels: Sequence[Label],
        sizes: Mapping[int, int],
        num_turns: int,
    ) -> None:
        self._model = model
        self._labels = labels
        self.group = labels[0].group
        self.cols = num_cols(model.tensors[labels[0].name])
        self._num_turns = num_turns
        self._sizes = {**sizes, **part_sizes(model, labels, num_turns)}
        self.spans: dict[Cell, Span] = {}
        for one in labels:
            entry, row = model.tensors[one.name], 0
            if num_cols(entry) != self.cols:
                raise self._error(entry, f"has {num_cols(entry)} columns, and not {self.cols}")
            for cell in self._cells(one, entry):
                size = self._size(entry, cell)
                if cell in self.spans:
                    raise self._error(entry, "is there twice, under several names")
                self.spans[cell] = Span(entry, row, size)
                row += size
            if row != num_rows(entry):
                raise self._error(entry, f"has {num_rows(entry)} rows, and its parts have {row}")
        #: Experts, or heads that take turns; 1 where there are neither.
        self.num_experts = 1 + max((expert for expert, _ in self.spans), default=0)

    def of(self, wanted: Label, num_experts: int) -> list[Span]:
        """Return the rows that a tensor of another layout has, as few ranges as there are.

        Raises
        ------
        InputError
            Naming a tensor that is not there.
        """
        found: list[Span] = []
        for cell in self.cells_of(wanted, num_experts):
            if cell not in self.spans:
                raise self._lacks(wanted, cell)
            span = self.spans[cell]
            if found and found[-1].entry is span.entry:
                last = found[-1]
                if last.first + last.count == span.first:
                    found[-1] = Span(last.entry, last.first, last.count + span.count)
                    continue
            found.append(span)
        return found

    def cells_of(self, wanted: Label, num_experts: int) -> list[Cell]:
        """Return the cells of a tensor, in its order."""
        assert self.group is not None
        parts = range(self.group.num_parts) if wanted.part is None else (wanted.part,)
        experts = range(num_experts) if wanted.expert is None else (wanted.expert,)
        return [(expert, part) for expert in experts for part in parts]

    def _cells(self, one: Label, entry: TensorEntry) -> list[Cell]:
        assert self.group is not None
        count = self._num_turns
        if self.group.has_experts and one.expert is None:
            if len(entry.shape) != 3:
                raise self._error(entry, f"is {list(entry.shape)}, and no matrix for each expert")
            count = entry.shape[0]
        elif self.group.has_experts:
            count = 1
        return self.cells_of(one, count)

    def _size(self, entry: TensorEntry, cell: Cell) -> int:
        size = self._sizes.get(cell[1])
        if size is None:
            raise self._error(
                entry, "has rows of several matrices, and how many of each is not known"
            )
        return size

    def _lacks(self, wanted: Label, cell: Cell) -> InputError:
        name = f"a part of {wanted.name}"
        for one in self._labels:
            if one.expert is not None and one.place[1] == cell[1]:
                name = one.name.replace(f"experts.{one.expert}.", f"experts.{cell[0]}.")
        return InputError(
            f"{self._model.location} lacks {name}: {wanted.name} cannot be put together without "
            "it. Nothing stands in for a missing expert."
        )

    def _error(self, entry: TensorEntry, what: str) -> InputError:
        return InputError(f"{self._model.location}: {entry.name} {what}.")


def part_sizes(model: CheckpointIndex, labels: Sequence[Label], num_turns: int) -> dict[int, int]:
    """Return how many rows a cell of each part has, as far as the tensors tell."""
    sizes: dict[int, int] = {}
    for one in labels:
        group, entry = one.group, model.tensors[one.name]
        assert group is not None
        rows = num_rows(entry)
        if group.has_experts:
            rows //= max(1, entry.shape[0]) if one.expert is None and entry.shape else 1
        else:
            rows //= num_turns
        if one.part is not None or group.num_parts == 1:
            sizes.setdefault(one.part or 0, rows)
        elif group.is_equal and rows % group.num_parts == 0:
            sizes.update(dict.fromkeys(range(group.num_parts), rows // group.num_parts))
    return sizes


def turns(model: CheckpointIndex, one: Label) -> int:
    """Return how often a query, a key and a value follow one another in a matrix of all three.

    Raises
    ------
    InputError
        If how its rows lie is not known, or does not keep the rows of a matrix in its order.
    """
    if one.part is not None or one.group is None or one.group.num_parts == 1:
        return 1
    config = text_config(model.documents.get("config.json", {}))
    model_type = config.get("model_type")
    leaf = one.name.split(".")[-2]
    if one.group.has_experts:
        if model_type in OTHER_EXPERTS:
            raise InputError(
                f"{model.location}: {one.name} of {model_type} has its matrices transposed, or "
                "gate and up in turns, and another model has them by rows, one by one: rows do not "
                "stay whole. Convert one of them to the other's layout first."
            )
        return 1
    if leaf in AMBIGUOUS_QKV and model_type not in QKV_IN_ORDER:
        count = _turns_by_config(config, model_type)
        if count:
            return count
        raise _unknown_qkv(model, one, model_type)
    if model_type in OTHER_QKV and one.group.num_parts == 3:
        raise _unknown_qkv(model, one, model_type)
    return 1


def _turns_by_config(config: Mapping[str, Any], model_type: object) -> int | None:
    heads = _count(config, "num_attention_heads", "n_head")
    groups = _count(config, "num_key_value_heads", "num_kv_heads") or heads
    if model_type == "falcon" and config.get("new_decoder_architecture"):
        return groups
    if model_type == "falcon" and config.get("multi_query", True):
        return 1
    return heads if model_type in QKV_BY_HEAD else None


def _unknown_qkv(model: CheckpointIndex, one: Label, model_type: object) -> InputError:
    return InputError(
        f"{model.location}: {one.name} has the rows of queries, keys and values, and another model "
        f"has each in a tensor of its own. How they lie in it is not known for model_type "
        f"{model_type!r} with what its config.json says. Convert one of them to the other's layout "
        "first."
    )


def sizes_by_config(model: CheckpointIndex, group: Group) -> dict[int, int]:
    """Return the rows of queries, keys and values, as the config.json of a model has them."""
    config = text_config(model.documents.get("config.json", {}))
    heads = _count(config, "num_attention_heads", "n_head")
    size = _count(config, "head_dim")
    hidden = _count(config, "hidden_size", "n_embd")
    if group.num_parts != 3 or group.has_experts or heads is None or not (size or hidden):
        return {}
    rows = size or (hidden or 0) // heads
    groups = _count(config, "num_key_value_heads", "num_kv_heads") or heads
    return {0: heads * rows, 1: groups * rows, 2: groups * rows}


def _count(config: Mapping[str, Any], *keys: str) -> int | None:
    found = (config.get(key) for key in keys)
    return next((n for n in found if type(n) is int and n > 0), None)


def num_cols(entry: TensorEntry) -> int:
    """Return how many numbers a row has that stays whole."""
    return entry.shape[-1] if len(entry.shape) > 1 else 1


def num_rows(entry: TensorEntry) -> int:
    """Return how many rows a tensor has."""
    cols = num_cols(entry)
    return num_elements(entry.shape) // cols if cols else 0
