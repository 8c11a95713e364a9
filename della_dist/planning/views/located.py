"""Tensors as an adapter calls them, found in a model whose files call or lay them out otherwise.

An adapter has the names of a transformers class in memory; which class, and which version of it, is
as open as with another checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from della_dist.planning.views.grouped import (
    Cells,
    Label,
    Span,
    by_key,
    label,
    num_cols,
    num_rows,
    sizes_by_config,
    turns,
)
from della_dist.planning.views.prefixes import find_renamings
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.wording import plural


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor as an adapter has it in mind."""

    name: str
    """What the adapter calls it."""
    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    """The rows of tensors of the model that it is, one behind the other."""

    @property
    def is_whole(self) -> bool:
        """Whether it is one tensor of the model."""
        return self.spans[0].entry.shape == self.shape


class Located:
    """Finds tensors of a model by the names that an adapter has for them.

    Parameters
    ----------
    model
        The model.
    names
        All that will be asked for, and perhaps others.
    where
        The adapter, for messages.

    Raises
    ------
    InputError
        If the names may be meant in two ways.
    """

    def __init__(self, model: CheckpointIndex, names: Collection[str], where: str) -> None:
        self._model = model
        self._where = where
        self._said: list[str] = []
        self._others: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._labels: Mapping[str, Sequence[Label]] = {}
        other = [name for name in names if name not in model.tensors]
        if other:
            self._labels = by_key(map(label, model.tensors))
            keys = {label(name).key for name in other}
            for renaming in find_renamings(keys, self._labels, lambda *_: False, where):
                self._keys.update(renaming.names)
                self._said += [str(renaming)] if renaming.theirs != renaming.ours else []

    def note(self) -> str | None:
        """Return what to say of names that were found under others; None if there are none."""
        if not self._others:
            return None
        ours, theirs = next(iter(self._others.items()))
        text = "; ".join([*self._said, f"for example {ours} in {theirs}"])
        return (
            f"{self._where}: {plural(len(self._others), 'tensor')} named or laid out otherwise "
            f"than in {self._model.location}: {text}."
        )

    def target(self, name: str) -> Target | None:
        """Return what a name means; None if nothing that is known.

        Raises
        ------
        InputError
            If its rows do not stay whole in the model, or some are not there.
        """
        found = self._target(name)
        if found is not None and name not in self._model.tensors:
            self._others[name] = found.spans[0].entry.name
        return found

    def _target(self, name: str) -> Target | None:
        entry = self._model.tensors.get(name)
        if entry is not None:
            return Target(name, entry.shape, (Span(entry, 0, num_rows(entry)),))
        wanted = label(name)
        labels = self._labels.get(self._keys.get(wanted.key, ""), ())
        for one in labels:
            if one.place == wanted.place:
                entry = self._model.tensors[one.name]
                return Target(name, entry.shape, (Span(entry, 0, num_rows(entry)),))
        if not labels or wanted.group is None:
            return None
        count = max(turns(self._model, one) for one in (*labels, wanted))
        sizes = {
            part: rows // count for part, rows in sizes_by_config(self._model, wanted.group).items()
        }
        cells = Cells(self._model, labels, sizes, count)
        spans = tuple(cells.of(wanted, cells.num_experts))
        rows, cols = sum(span.count for span in spans), num_cols(spans[0].entry)
        shape: tuple[int, ...] = (rows, cols)
        if wanted.group.has_experts and wanted.expert is None:
            shape = (cells.num_experts, rows // cells.num_experts, cols)
        elif len(spans[0].entry.shape) == 1:
            shape = (rows,)
        return Target(name, shape, spans)
