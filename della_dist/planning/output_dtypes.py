"""Which dtype merged tensors have, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from della_dist.config import MergeConfig
from della_dist.planning.fp32 import keeps_fp32
from della_dist.planning.layout import OutputTensor
from della_dist.planning.matching import Action
from della_dist.planning.parts import Part
from della_dist.specs.checkpoint import TensorEntry
from della_dist.wording import listed_tensors


def output_dtype(config: MergeConfig, entry: TensorEntry, action: Action) -> str:
    """Return the dtype of a tensor of the output, whose entry in the reference is `entry`."""
    dtype = config.output_dtype
    if action != "merge" or dtype is None:
        return entry.dtype
    if config.keep_fp32 == "auto" and entry.dtype == "F32" and keeps_fp32(entry.name, dtype):
        return "F32"
    return dtype


def dtype_notes(config: MergeConfig, parts: Sequence[Part], merged: Sequence[str]) -> Iterator[str]:
    """Yield that inputs are not rounded, where it makes a difference."""
    dtype = config.dtype
    columns = [column.tensors for part in parts for column in part.columns]
    if dtype is not None and any(c[n].dtype != dtype for c in columns for n in merged if n in c):
        yield (
            "dtype: the arithmetic is float32 and only the output is rounded; mergekit rounds the "
            "inputs to dtype first."
        )


def fp32_notes(
    config: MergeConfig, entries: Mapping[str, TensorEntry], tensors: Sequence[OutputTensor]
) -> Iterator[str]:
    """Yield what becomes of F32 tensors in an output of 16 bits."""
    dtype = config.output_dtype
    if dtype not in ("F16", "BF16"):
        return
    wide = [t for t in tensors if entries[t.name].dtype == "F32"]
    kept = [t.name for t in wide if t.dtype == "F32"]
    rounded = [t.name for t in wide if t.dtype != "F32"]
    if rounded:
        yield f"{listed_tensors(rounded)} of F32 rounded to {dtype}, as `dtype` says."
    if kept:
        yield f"{listed_tensors(kept)} of F32 kept in F32, not rounded to {dtype}."
