"""Which elements of which tensors are looked at where a model is too large to be read: no I/O.

A sample is a function of the plan and of a number of bytes. Of every kind of tensor (its name
without numbers) one comes first; then one of every file that none was taken of yet; then further
ones, spread over the depth of the model. Of each there is a block of elements, at a place that its
name decides, or several where there is room.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from della_dist.planning.build import MergePlan
from della_dist.planning.layout import OutputTensor
from della_dist.planning.parts import Part
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.reading import read_once, resident
from della_dist.specs.rows import row_shape
from della_dist.specs.sources import (
    Adapted,
    Balanced,
    Column,
    Dora,
    Mean,
    MeanRow,
    Merged,
    Rows,
    Stored,
    stored,
)

#: Elements of a block: enough to tell a cosine of 0 from one of 0.04 (four standard errors).
BLOCK_ELEMENTS = 8192

#: Tensors that are looked at, each of which takes about a kilobyte.
MOST_TENSORS = 2048

#: The part of all bytes that what one tensor needs beside its blocks may take: factors of adapters,
#: rows of which the mean is taken.
_MOST_BESIDE = 1 / 4

_NUMBER = re.compile(r"(?:^|(?<=\.))[0-9]+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one tensor, what is looked at: of a reference, and of what is compared with it."""

    name: str
    shape: tuple[int, ...]
    source: Merged
    """Without a base: its first expert is the reference, the others are compared with it."""
    is_delta: tuple[bool, ...]
    """Of the others: which are deltas to the reference."""
    files: tuple[tuple[int, int], ...]
    """Of all, number of the checkpoint, and shard that the tensor is in, or begins in."""
    spans: tuple[tuple[int, int], ...]
    """Ranges of elements, ascending."""
    weight: float = 1.0
    """Elements of the kind that each one of the sample stands for."""

    @property
    def kind(self) -> str:
        """The name without numbers."""
        return kind_of(self.name)

    @property
    def layer(self) -> str:
        """The name up to its first number, as ``model.layers.3``; empty: it is in no layer."""
        found = _NUMBER.search(self.name)
        return "" if found is None else self.name[: found.end()]

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns."""
        return sum(length > 1 for length in self.shape) > 1

    @property
    def beside_bytes(self) -> int:
        """Bytes that are read beside blocks: of adapters, and of rows whose mean is taken."""
        return sum(map(read_once, resident(self.source)))

    @property
    def num_elements(self) -> int:
        """Elements that are looked at."""
        return sum(stop - start for start, stop in self.spans)


def kind_of(name: str) -> str:
    """Return the name of a tensor without numbers of layers, heads and experts."""
    return _NUMBER.sub("*", name)


def sampled(
    plan: MergePlan, budget_bytes: int, output: CheckpointIndex | None = None
) -> tuple[Sample, ...]:
    """Return what to look at of the checkpoints of a plan, in order of their tensors.

    Compared are the base and the experts of each tensor that is merged, or the first model and the
    others where the method has no base. Left out are experts of weight 0; models that do not exist
    yet, as outputs of the same run; and models of which another layer is merged than of the
    reference. Where a single model is left, there is nothing to compare.

    Parameters
    ----------
    plan
        The merge.
    budget_bytes
        What is read at most, of all checkpoints together.
    output
        What the merge has made, to be compared as well: its number is that behind all inputs. It
        has all tensors that are merged, in their shapes.
    """
    made = (plan.made_of(tensor) for shard in plan.shards for tensor in shard.tensors)
    tensors = {tensor.name: tensor for tensor in made}
    merged = [t for t in tensors.values() if plan.matching.actions[t.name] == "merge"]
    if plan.output_bytes <= budget_bytes and len(merged) <= MOST_TENSORS:
        samples = [s for tensor in merged if (s := _compared(plan, tensor, output)) is not None]
        if sum(map(_whole_bytes, samples)) <= budget_bytes:
            return tuple(replace(s, spans=_everything(s.shape)) for s in samples)
    chosen: dict[str, Sample] = {}
    left = budget_bytes
    for name in _by_priority(plan, [tensor.name for tensor in merged]):
        sample = _compared(plan, tensors[name], output)
        if len(chosen) == MOST_TENSORS:
            break
        if sample is None or (beside := sample.beside_bytes) > budget_bytes * _MOST_BESIDE:
            continue
        needed = beside + _block_bytes(sample)
        if needed > left:
            if left < budget_bytes / 64:  # nothing fits any more
                break
            continue
        left -= needed
        chosen[name] = sample
    # The same number of further blocks for all that have more.
    longer = [s for s in chosen.values() if num_elements(s.shape) > BLOCK_ELEMENTS]
    more = left // max(1, sum(map(_block_bytes, longer)))
    found = [replace(s, spans=_blocks(s, 1 + more)) for t in merged if (s := chosen.get(t.name))]
    return _weighted(found, merged)


def _weighted(samples: list[Sample], merged: Iterable[OutputTensor]) -> tuple[Sample, ...]:
    there: dict[str, int] = {}
    seen: dict[str, int] = {}
    for tensor in merged:
        kind = kind_of(tensor.name)
        there[kind] = there.get(kind, 0) + num_elements(tensor.shape)
    for sample in samples:
        seen[sample.kind] = seen.get(sample.kind, 0) + sample.num_elements
    return tuple([replace(s, weight=there[s.kind] / max(1, seen[s.kind])) for s in samples])


def _compared(
    plan: MergePlan, tensor: OutputTensor, output: CheckpointIndex | None
) -> Sample | None:
    """Return what is compared of a tensor that is merged, without its spans."""
    source = plan.merged_source(tensor)
    merged = source.of if isinstance(source, Balanced) else source
    assert isinstance(merged, Merged)
    part = plan.part(tensor.name)
    weights = merged.recipe.settings.weights
    columns = [*zip(merged.experts, part.experts, merged.recipe.is_delta, weights, strict=True)]
    if merged.base is not None:
        columns.insert(0, (merged.base, part.columns[0], False, 1.0))
    names: list[str] = []
    found: list[tuple[Column, bool, tuple[int, int]]] = []
    for column, of_part, is_delta, weight in columns:
        is_there = all(_is_made(plan.inputs[number]) for number in _checkpoints(column))
        if not is_there and merged.base is column:
            return None
        own = of_part.names.get(tensor.name, tensor.name)
        is_again = any(column.checkpoint == file[0] for _, _, file in found)
        if not is_there or not weight or is_again or (names and own != names[0]):
            continue
        names.append(own)
        file = column.checkpoint, of_part.tensors[tensor.name].shard
        found.append((column, is_delta, file))
    if output is not None:
        entry = output.tensors[tensor.name]
        number = len(plan.inputs)
        found.append((stored(number, entry), False, (number, entry.shard)))
    if len(found) < 2 or not num_elements(tensor.shape):
        return None
    return Sample(
        tensor.name,
        tensor.shape,
        Merged(merged.recipe, None, tuple(column for column, _, _ in found)),
        tuple(is_delta for _, is_delta, _ in found[1:]),
        tuple(file for _, _, file in found),
        (),
    )


def _is_made(checkpoint: CheckpointIndex) -> bool:
    """Return whether a checkpoint is there: all are but the outputs that the same run makes."""
    return not checkpoint.is_stage or bool(checkpoint.shards[0].version)


def _checkpoints(source: Column | Mean | MeanRow) -> set[int]:
    """Return the numbers of the checkpoints that a tensor is read from."""
    match source:
        case Stored(checkpoint):
            return {checkpoint}
        case MeanRow(of):
            return {of.checkpoint}
        case Mean(sources) | Rows(sources=sources):
            return set().union(*map(_checkpoints, sources))
        case Adapted(of=of, terms=terms):
            weights = [term.weight for term in terms if isinstance(term, Dora)]
            return set().union(*(_checkpoints(one) for one in (of, *weights) if one is not None))


def _by_priority(plan: MergePlan, names: list[str]) -> Iterator[str]:
    """Yield every name once: of all kinds, of all files, then the rest."""
    rounds = list(_in_rounds(names))
    yielded: set[str] = set()
    files: set[tuple[int, int]] = set()
    for number, name in rounds:
        new = set(_files(plan.part(name), name)) - files
        if number == 0 or new:
            files |= new
            yielded.add(name)
            yield name
    yield from (name for _, name in rounds if name not in yielded)


def _in_rounds(names: list[str]) -> Iterator[tuple[int, str]]:
    """Yield round and name: in each round one of every kind, the rounds spread over the depth."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    spread = []
    for of_kind in kinds.values():
        of_kind.sort(key=lambda name: [int(n) for n in _NUMBER.findall(name)])
        bits = max(1, (len(of_kind) - 1).bit_length())
        order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
        spread.append([of_kind[i] for i in order if i < len(of_kind)])
    for number in range(max(map(len, spread), default=0)):
        yield from ((number, of_kind[number]) for of_kind in spread if number < len(of_kind))


def _files(part: Part, name: str) -> Iterator[tuple[int, int]]:
    return ((column.checkpoint, column.tensors[name].shard) for column in part.columns)


def _everything(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    count = num_elements(shape)
    return tuple((i, min(i + BLOCK_ELEMENTS, count)) for i in range(0, count, BLOCK_ELEMENTS))


def _blocks(sample: Sample, count: int) -> tuple[tuple[int, int], ...]:
    """Return blocks of a tensor: one in each of as many parts of equal size."""
    size = num_elements(sample.shape)
    if size <= count * BLOCK_ELEMENTS:
        return _everything(sample.shape)
    cols = row_shape(sample.shape)[1]
    grain = cols if cols <= BLOCK_ELEMENTS else BLOCK_ELEMENTS  # where a block may begin
    spans = []
    for i in range(count):
        first, last = size * i // count, size * (i + 1) // count - BLOCK_ELEMENTS
        digest = hashlib.blake2b(f"{i} {sample.name}".encode(), digest_size=8).digest()
        place = first + int.from_bytes(digest, "little") % (last - first + 1)
        start = max(first, place // grain * grain)
        spans.append((start, start + BLOCK_ELEMENTS))
    return tuple(spans)


def _block_bytes(sample: Sample, elements: int = BLOCK_ELEMENTS) -> int:
    """Return the bytes that so many elements read at most of all that is compared.

    Those of a view may lie anywhere in what it is a view of.
    """
    count = min(elements, num_elements(sample.shape))
    return sum(
        column.entry.stop - column.entry.start
        if isinstance(column, Stored) and column.entry.strided is not None
        else itemsize(column.dtype) * count  # of what adapters change, as it is formed
        for column in sample.source.experts
    )


def _whole_bytes(sample: Sample) -> int:
    return sample.beside_bytes + _block_bytes(sample, num_elements(sample.shape))
