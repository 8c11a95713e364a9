"""Checkpoints seen with the names and the layout of the reference.

What a tensor is called, and whether it lies beside others in one matrix, is no property of the
model: the same one appears under other prefixes, with its experts in one tensor or in many. The
layout of the reference is that of the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from della_dist.errors import InputError
from della_dist.planning.matching import is_buffer
from della_dist.planning.views.grouped import (
    Cells,
    Label,
    Span,
    by_key,
    label,
    num_cols,
    num_rows,
    part_sizes,
    turns,
)
from della_dist.planning.views.prefixes import Renaming, beginning, find_renamings
from della_dist.planning.views.quantised import refuse_quantised
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import FLOAT_DTYPES, itemsize, num_bytes
from della_dist.wording import plural

#: Of the reference's tensors, or of the checkpoint's own, how many a mapping must match.
_ENOUGH = 0.95


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint with the names and the layout of the reference."""

    checkpoint: CheckpointIndex
    note: str
    """What a person should know of it."""

    def digest(self) -> str:
        """Return a digest of what each tensor is."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.checkpoint.tensors.items()):
            places = [piece.place for piece in entry.pieces or (entry,)]
            digest.update(repr((name, entry.dtype, entry.shape, places)).encode())
        return digest.hexdigest()


def seen_as_reference(
    reference: CheckpointIndex, checkpoint: CheckpointIndex, *, in_layers: bool = False
) -> Layout | None:
    """Return a checkpoint with the names and the layout of the reference; None if it has them.

    What neither has is left as it is, for `della_dist.planning.matching` to say.

    Parameters
    ----------
    reference, checkpoint
        The names of the first one are looked for in the second one.
    in_layers
        Whether layers of them are merged, rather than all: whether models that have nothing in
        common may make one is another's affair then (`della_dist.planning.views.slices`).

    Raises
    ------
    InputError
        If no way is known to do so that keeps rows whole, or there are two.
    """
    ours, theirs = reference.tensors, checkpoint.tensors
    if ours.keys() == theirs.keys():  # nearly all: nothing else is looked at
        return None
    missing = [n for n, entry in ours.items() if n not in theirs and not is_buffer(entry)]
    extra = [n for n, entry in theirs.items() if n not in ours and not is_buffer(entry)]
    if not missing or not extra:
        return None
    for one in (reference, checkpoint):
        refuse_quantised(one)
    found = _Found.of(reference, checkpoint, missing, extra)
    exact = len(ours.keys() & theirs.keys())
    if found.renamings or not (exact or in_layers):
        _refuse_partial(reference, checkpoint, found, exact)
    if not found.tensors:
        return None
    tensors = {n: e for n, e in theirs.items() if n not in found.used}
    tensors.update(found.tensors)
    return Layout(replace(checkpoint, tensors=tensors), found.note(reference, checkpoint))


@dataclass(frozen=True, slots=True)
class _Found:
    """What of a checkpoint has another name in the reference."""

    renamings: Sequence[Renaming]
    """Of keys (`della_dist.planning.views.grouped`)."""
    tensors: Mapping[str, TensorEntry]
    """By the reference's names."""
    used: Mapping[str, str]
    """Their names, and one of ours that each became."""
    missing: Sequence[str]
    extra: Sequence[str]
    """The names that were looked at."""
    layouts: Mapping[str, int]
    """How tensors were cut and put together, and how many."""

    @classmethod
    def of(
        cls,
        reference: CheckpointIndex,
        checkpoint: CheckpointIndex,
        missing: Sequence[str],
        extra: Sequence[str],
    ) -> _Found:
        ours, theirs = by_key(map(label, missing)), by_key(map(label, extra))

        def is_alike(their: str, our: str) -> bool:
            a, b = theirs[their], ours[our]
            shapes = (checkpoint.tensors[a[0].name].shape, reference.tensors[b[0].name].shape)
            return len(a) == len(b) and shapes[0] == shapes[1]

        renamings = find_renamings(theirs, ours, is_alike, checkpoint.location)
        tensors: dict[str, TensorEntry] = {}
        used: dict[str, str] = {}
        layouts: dict[str, int] = {}
        for renaming in renamings:
            for their, our in renaming.names.items():
                matrix = _Matrix(reference, ours[our], checkpoint, theirs[their])
                for name, entry, sources in matrix.tensors():
                    tensors[name] = entry
                    used |= dict.fromkeys(sources, name)
                if matrix.how:
                    layouts[matrix.how] = layouts.get(matrix.how, 0) + 1
        return cls(renamings, tensors, used, missing, extra, layouts)

    def note(self, reference: CheckpointIndex, checkpoint: CheckpointIndex) -> str:
        """Return what a person should know of it."""
        said = [str(one) for one in self.renamings if one.theirs != one.ours]
        said += [f"{how} ({plural(count, 'time')})" for how, count in self.layouts.items()]
        theirs, ours = next(iter(self.used.items()))
        text = "; ".join([*said, f"for example {ours} from {theirs}"])
        return (
            f"{checkpoint.location}: {plural(len(self.used), 'tensor')} named or laid out "
            f"otherwise than in {reference.location}, whose layout the output has: {text}. Random "
            "words are drawn by the names of the output."
        )


class _Matrix:
    """The tensors of one key on both sides."""

    def __init__(
        self,
        reference: CheckpointIndex,
        ours: Sequence[Label],
        checkpoint: CheckpointIndex,
        theirs: Sequence[Label],
    ) -> None:
        self._reference, self._ours = reference, ours
        self._checkpoint, self._theirs = checkpoint, theirs
        self._by_place = {one.place: one for one in theirs}
        for model, side in ((reference, ours), (checkpoint, theirs)):
            if len({one.place for one in side}) < len(side):
                raise InputError(
                    f"{model.location}: {side[0].name} and {side[1].name} are two names of one "
                    "tensor, as far as is known. Say which is which with `rename`."
                )
        is_same = self._by_place.keys() >= {one.place for one in ours}
        self._is_same = is_same or ours[0].group is None
        self.how = "" if self._is_same else self._said()

    def tensors(self) -> Iterator[tuple[str, TensorEntry, Sequence[str]]]:
        """Yield our name, the entry, and the names of theirs that it is made of."""
        if self._is_same:
            for one in self._ours:
                if (their := self._by_place.get(one.place)) is not None:
                    entry = self._checkpoint.tensors[their.name]
                    yield one.name, replace(entry, name=one.name), [their.name]
            return
        count = max(
            *(turns(self._reference, one) for one in self._ours),
            *(turns(self._checkpoint, one) for one in self._theirs),
        )
        sizes = part_sizes(self._reference, self._ours, count)
        cells = Cells(self._checkpoint, self._theirs, sizes, count)
        left = set(cells.spans)
        for one in self._ours:
            entry = self._reference.tensors[one.name]
            is_whole = one.group is not None and one.group.has_experts and one.expert is None
            wanted = entry.shape[0] if is_whole and entry.shape else cells.num_experts
            spans = cells.of(one, wanted)
            left -= set(cells.cells_of(one, wanted))
            self._check(entry, spans)
            yield one.name, _put_together(self._checkpoint, entry, spans), _names(spans)
        if left:
            cell = min(left)
            has_experts = self._theirs[0].group is not None and self._theirs[0].group.has_experts
            what = f"of an expert (number {cell[0]})" if has_experts else f"(of part {cell[1]})"
            raise InputError(
                f"{self._checkpoint.location}: {cells.spans[cell].entry.name} has rows {what} that "
                f"{self._reference.location} does not have."
            )

    def _said(self) -> str:
        ours, theirs = (
            ", ".join(dict.fromkeys(_shown(one) for one in side))
            for side in (self._ours, self._theirs)
        )
        how = "put together of" if len(self._theirs) > len(self._ours) else "taken out of"
        return f"{ours} {how} {theirs}"

    def _check(self, entry: TensorEntry, spans: Sequence[Span]) -> None:
        rows, cols = sum(span.count for span in spans), num_cols(spans[0].entry)
        if (rows, cols) == (num_rows(entry), num_cols(entry)):
            return
        raise InputError(
            f"{self._checkpoint.location}: what {entry.name} of {self._reference.location} "
            f"({num_rows(entry)} rows of {num_cols(entry)}) would be put together of has {rows} "
            f"rows of {cols} ({', '.join(_names(spans)[:2])}). It is another model, or one of them "
            "has its matrices transposed, whose rows do not stay whole."
        )


def _put_together(
    checkpoint: CheckpointIndex, like: TensorEntry, spans: Sequence[Span]
) -> TensorEntry:
    pieces = tuple([_rows_of(span) for span in spans])
    dtypes = {piece.dtype for piece in pieces}
    dtype = pieces[0].dtype
    if len(dtypes) > 1:
        if not dtypes <= set(FLOAT_DTYPES):
            raise InputError(
                f"{checkpoint.location}: {like.name} would be put together of tensors of dtypes "
                f"{', '.join(sorted(dtypes))}."
            )
        dtype = "F64" if "F64" in dtypes else "F32"
    if len(pieces) == 1:
        return replace(pieces[0], name=like.name, shape=like.shape)
    first = pieces[0]
    stop = first.start + num_bytes(dtype, like.shape)
    return TensorEntry(like.name, dtype, like.shape, first.shard, first.start, stop, pieces=pieces)


def _rows_of(span: Span) -> TensorEntry:
    entry, cols = span.entry, num_cols(span.entry)
    size = cols * itemsize(entry.dtype)
    start = entry.start + span.first * size
    shape = (span.count, cols) if len(entry.shape) > 1 else (span.count,)
    if entry.strided is not None:
        if span.count == num_rows(entry):
            return replace(entry, shape=shape)
        raise InputError(
            f"{entry.name} is stored as a view (transposed, or a part of each row), of which rows "
            "cannot be taken. Save the model again, as safetensors."
        )
    return replace(entry, shape=shape, start=start, stop=start + span.count * size)


def _names(spans: Sequence[Span]) -> list[str]:
    return list(dict.fromkeys(span.entry.name for span in spans))


def _shown(one: Label) -> str:
    """Return a name without what comes before it, and with an asterisk for an expert's number."""
    assert one.group is not None
    name = one.name
    if one.expert is not None:
        before, _, after = name.rpartition(f"experts.{one.expert}.")
        return f"{before.rsplit('.', 2)[-2]}.experts.*.{after}" if before else name
    return ".".join(name.split(".")[-2:])


def _refuse_partial(
    reference: CheckpointIndex, checkpoint: CheckpointIndex, found: _Found, exact: int
) -> None:
    """Refuse a mapping that leaves much over on both sides: it is another model, or unknown."""
    ours = (exact + len(found.tensors), exact + len(found.missing))
    theirs = (exact + len(found.used), exact + len(found.extra))
    if max(ours[0] / ours[1], theirs[0] / theirs[1]) >= _ENOUGH:
        return
    left = [n for n in found.missing if n not in found.tensors]
    extra = [n for n in found.extra if n not in found.used]
    matched = f"{ours[0]} of the {ours[1]} tensors" if ours[0] else f"none of the {ours[1]} tensors"
    raise InputError(
        f"{checkpoint.location} has {matched} of {reference.location}. Of those left over, its "
        f"names are {beginning(extra)} ({extra[0]}), and those of {reference.location} "
        f"{beginning(left)} ({left[0]}). If they are of one model, say how its names become the "
        "others with `rename` beside it in the configuration: `rename: [{from: REGEX, to: TEXT}]`."
    )
