"""Where every tensor of the output goes.

The layout depends on names, sizes and the shard size alone: not on the worker count, and not on
how the inputs are sharded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from della_dist.specs.dtypes import num_bytes

MIB = 1 << 20
GIB = 1 << 30

#: Shards are the unit of commit and of distribution: enough of them to spread and to resume ...
TARGET_SHARDS = 64
#: ... but none so small that files abound, nor so large that a lost attempt costs much.
MIN_SHARD_BYTES = 256 * MIB
MAX_SHARD_BYTES = 2 * GIB

SINGLE_SHARD_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SHARD_NAME = re.compile(r"model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_DIGITS = re.compile(r"([0-9]{1,1000})")


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output, as its header will have it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One shard of the output: a file and the tensors in it."""

    name: str
    tensors: tuple[OutputTensor, ...]
    size_bytes: int
    """Bytes of tensor data, without the header."""


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key by which ``layers.2`` comes before ``layers.10``."""
    parts = (part for part in _DIGITS.split(name) if part)
    return [(0, int(part)) if part[0] in "0123456789" else (1, part) for part in parts]


def default_shard_bytes(output_bytes: int) -> int:
    """Return the shard size for an output of `output_bytes` where the user gives none."""
    return min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, -(-output_bytes // TARGET_SHARDS)))


def lay_out(tensors: Iterable[OutputTensor], shard_bytes: int) -> tuple[ShardLayout, ...]:
    """Distribute `tensors` over shards of at most `shard_bytes` of data, in natural name order.

    A tensor larger than `shard_bytes` gets a shard of its own. An output without tensors is one
    empty shard.
    """
    ordered = sorted(tensors, key=lambda t: (natural_key(t.name), t.name))
    total = sum(t.size_bytes for t in ordered)
    # As few shards as the limit allows, of about the same size: a small last one would leave
    # workers without work.
    target = total / max(1, -(-total // shard_bytes))
    groups: list[list[OutputTensor]] = [[]]
    used = 0
    for tensor in ordered:
        size = tensor.size_bytes
        if size and used and (used >= target or used + size > shard_bytes):
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += size
    return tuple(
        ShardLayout(
            name=_shard_name(i, len(groups)),
            tensors=tuple(group),
            size_bytes=sum(t.size_bytes for t in group),
        )
        for i, group in enumerate(groups)
    )


def is_shard_name(name: str) -> bool:
    """Tell whether a shard of some output is called `name`."""
    return name == SINGLE_SHARD_NAME or _SHARD_NAME.fullmatch(name) is not None


def _shard_name(index: int, count: int) -> str:
    if count == 1:
        return SINGLE_SHARD_NAME
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def weight_map(shards: Sequence[ShardLayout]) -> dict[str, str]:
    """Return tensor name -> shard name, sorted by name, as the index file has it."""
    pairs = ((t.name, shard.name) for shard in shards for t in shard.tensors)
    return dict(sorted(pairs))
